//! Which key serves next, and what to tell a client when none does.

use super::standing::{ParkReason, Standing};
use super::strategy::{Strategy, Traits, best};
use super::units::UnixMs;

/// One key as a choice sees it, for one request.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// How it stands.
    pub standing: Standing,
    /// Whether this request may use it: it was not tried, has the permission, is not another's.
    pub is_eligible: bool,
    /// Whether it can pay.
    pub means: Means,
    /// Whether its workspace has room for one more at once.
    pub room: Room,
    /// What the strategy looks at.
    pub traits: Traits,
}

/// Whether a key can pay for a request, as far as can be foreseen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// It can, or nobody knows.
    Enough,
    /// It is out of credits for larger requests, and the provider said that so much is left.
    StillEnough,
    /// By our estimate it cannot, which is an upper bound.
    Short {
        /// Whether nobody else is about to spend what is left.
        is_undisturbed: bool,
    },
    /// The provider has said that it cannot.
    Refused,
}

/// Whether a workspace has room for one more request of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It has.
    Free,
    /// It has none, until a request of it ends or until this moment.
    Full {
        /// When it is worth asking again without that.
        until: Option<UnixMs>,
    },
}

/// The key that a request goes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The one at this position.
    Use(usize),
    /// The one at this position, although it cannot pay by our estimate: nobody else can either, the
    /// estimate is an upper bound, and the provider may serve it.
    Stretch(usize),
}

impl Choice {
    /// Where the key is.
    #[must_use]
    pub fn position(self) -> usize {
        match self {
            Self::Use(position) | Self::Stretch(position) => position,
        }
    }
}

/// Why no key can serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// All are out of credits (or worse); the earliest reset, when one is known.
    #[error("every key is exhausted")]
    Exhausted {
        /// When the first of them comes back.
        resets_at: Option<UnixMs>,
    },
    /// At least one only cools down, until then.
    #[error("every key is exhausted or cools down")]
    Cooling {
        /// When the first of them comes back.
        until: UnixMs,
    },
    /// Those that could serve have as much to do as they may have.
    #[error("every usable key is busy")]
    Full {
        /// When it is worth asking again, if nothing ends before.
        until: Option<UnixMs>,
    },
    /// The provider refuses every one of them as a key.
    #[error("every key is invalid")]
    Invalid,
    /// Some are usable, and this request has tried them all or may not use them.
    #[error("every usable key was tried")]
    Tried,
}

impl Candidate {
    /// Whether it stands so that it may be asked.
    fn is_open(&self) -> bool {
        match self.standing {
            // What it can pay, it serves.
            Standing::Usable | Standing::Resting { reason: ParkReason::Short, .. } => true,
            Standing::Resting { reason: ParkReason::Exhausted, .. } => self.means == Means::StillEnough,
            Standing::Resting {
                reason: ParkReason::RateLimited | ParkReason::Billing | ParkReason::Invalid,
                ..
            } => false,
        }
    }

    fn can_pay(&self) -> bool {
        matches!(self.means, Means::Enough | Means::StillEnough)
    }

    /// Whether it can serve now.
    #[must_use]
    pub fn is_able(&self) -> bool {
        self.is_eligible && self.is_open() && self.can_pay() && self.room == Room::Free
    }
}

/// The key to use: of those that stand well, can pay and have room, the one that `strategy` ranks
/// best. When nobody can pay by our estimate, the richest is asked, one request at a time.
///
/// # Errors
///
/// When there is none, with what stands in the way.
pub fn select(
    strategy: &dyn Strategy,
    candidates: impl Iterator<Item = Candidate> + Clone,
) -> Result<Choice, Unavailable> {
    let able = candidates.clone().enumerate().filter(|(_, key)| key.is_able());
    match best(strategy, able.map(|(position, key)| (position, key.traits))) {
        Some(position) => Ok(Choice::Use(position)),
        None => otherwise(candidates),
    }
}

/// What is left when none of these is able: the richest of those that cannot pay, or nothing.
///
/// # Errors
///
/// When there is nothing, with what stands in the way.
pub fn otherwise(candidates: impl Iterator<Item = Candidate> + Clone) -> Result<Choice, Unavailable> {
    let open = || candidates.clone().enumerate().filter(|(_, key)| key.is_eligible && key.is_open());
    // Whoever can pay will have room again; until then, nobody else is bothered.
    if let Some(until) = room_again(open().filter(|(_, key)| key.can_pay())) {
        return Err(Unavailable::Full { until });
    }
    let is_short = |key: &Candidate| matches!(key.means, Means::Short { .. });
    let richest = open().filter(|(_, key)| is_short(key)).max_by_key(|(_, key)| key.traits.remaining);
    match richest {
        Some((
            position,
            Candidate { means: Means::Short { is_undisturbed: true }, room: Room::Free, .. },
        )) => Ok(Choice::Stretch(position)),
        // What others have reserved of it may come back.
        Some((_, Candidate { room: Room::Free, .. })) => Err(Unavailable::Full { until: None }),
        Some((_, Candidate { room: Room::Full { until }, .. })) => Err(Unavailable::Full { until }),
        None => Err(unavailable(candidates)),
    }
}

/// When one of these full ones is worth asking again. `None` when there are none.
fn room_again(full: impl Iterator<Item = (usize, Candidate)>) -> Option<Option<UnixMs>> {
    full.map(|(_, key)| match key.room {
        Room::Free => None,
        Room::Full { until } => until,
    })
    .reduce(earliest)
}

fn earliest(a: Option<UnixMs>, b: Option<UnixMs>) -> Option<UnixMs> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    }
}

fn unavailable(candidates: impl Iterator<Item = Candidate>) -> Unavailable {
    let (mut cooling, mut resets_at, mut has_exhausted, mut has_usable) = (None, None, false, false);
    for key in candidates {
        match key.standing {
            // It stands well and could not pay, whatever it was asked.
            Standing::Usable if key.is_eligible => {
                has_exhausted = true;
                resets_at = earliest(resets_at, key.traits.resets_at);
            }
            Standing::Usable => has_usable = true,
            Standing::Resting { reason: ParkReason::Short, .. } if !key.is_eligible => has_usable = true,
            Standing::Resting { reason: ParkReason::RateLimited, until } => {
                cooling = earliest(cooling, until);
            }
            Standing::Resting {
                reason: ParkReason::Exhausted | ParkReason::Short | ParkReason::Billing,
                until,
            } => {
                has_exhausted = true;
                resets_at = earliest(resets_at, until);
            }
            Standing::Resting { reason: ParkReason::Invalid, .. } => {}
        }
    }
    match cooling {
        _ if has_usable => Unavailable::Tried,
        Some(until) => Unavailable::Cooling { until },
        None if has_exhausted => Unavailable::Exhausted { resets_at },
        None => Unavailable::Invalid,
    }
}

#[cfg(test)]
mod tests {
    use super::super::strategy::{FillFirst, MostRemaining};
    use super::*;

    const USABLE: Candidate = Candidate {
        standing: Standing::Usable,
        is_eligible: true,
        means: Means::Enough,
        room: Room::Free,
        traits: Traits { remaining: None, resets_at: None, in_flight: 0, turn: 0, weight: 1 },
    };
    const TRIED: Candidate = Candidate { is_eligible: false, ..USABLE };
    const FULL: Candidate = Candidate { room: Room::Full { until: None }, ..USABLE };
    const REFUSED: Candidate = Candidate { means: Means::Refused, ..USABLE };

    fn resting(reason: ParkReason, until: u64) -> Candidate {
        Candidate { standing: Standing::Resting { reason, until: Some(UnixMs(until)) }, ..USABLE }
    }

    fn short(remaining: u64, is_undisturbed: bool) -> Candidate {
        let traits = Traits { remaining: Some(remaining), ..USABLE.traits };
        Candidate { means: Means::Short { is_undisturbed }, traits, ..USABLE }
    }

    #[track_caller]
    fn check(keys: &[Candidate], expected: Result<Choice, Unavailable>) {
        assert_eq!(select(&FillFirst, keys.iter().copied()), expected);
    }

    #[test]
    fn the_first_usable_key_serves() {
        check(&[USABLE, USABLE], Ok(Choice::Use(0)));
        check(&[resting(ParkReason::Exhausted, 5), USABLE], Ok(Choice::Use(1)));
        check(&[TRIED, resting(ParkReason::Invalid, 5), USABLE], Ok(Choice::Use(2)));
    }

    #[test]
    fn the_strategy_decides_among_those_that_can() {
        let rich = |remaining| Candidate {
            traits: Traits { remaining: Some(remaining), ..USABLE.traits },
            ..USABLE
        };
        let keys = [rich(1), Candidate { is_eligible: false, ..rich(9) }, rich(5)];
        assert_eq!(select(&MostRemaining, keys.into_iter()), Ok(Choice::Use(2)));
    }

    #[test]
    fn a_full_workspace_spills_to_the_next() {
        check(&[FULL, USABLE], Ok(Choice::Use(1)));
    }

    #[test]
    fn when_all_that_can_pay_are_full_the_request_waits() {
        let until = |ms| Candidate { room: Room::Full { until: Some(UnixMs(ms)) }, ..USABLE };
        check(&[FULL, resting(ParkReason::Exhausted, 5)], Err(Unavailable::Full { until: None }));
        check(&[until(9), FULL, until(7)], Err(Unavailable::Full { until: Some(UnixMs(7)) }));
        check(&[FULL, short(5, true)], Err(Unavailable::Full { until: None }));
    }

    #[test]
    fn a_key_that_cannot_pay_is_passed_over() {
        check(&[short(5, true), USABLE], Ok(Choice::Use(1)));
        check(&[REFUSED, USABLE], Ok(Choice::Use(1)));
    }

    #[test]
    fn when_nobody_can_pay_by_our_estimate_the_richest_is_asked_alone() {
        check(&[short(5, true), short(7, true), TRIED], Ok(Choice::Stretch(1)));
        check(&[short(5, true), short(7, false)], Err(Unavailable::Full { until: None }));
        check(&[Candidate { room: FULL.room, ..short(7, true) }], Err(Unavailable::Full { until: None }));
    }

    #[test]
    fn what_the_provider_said_is_left_may_still_be_spent() {
        let some = Candidate { means: Means::StillEnough, ..resting(ParkReason::Exhausted, 9) };
        check(&[some, USABLE], Ok(Choice::Use(0)));
        check(
            &[Candidate { means: Means::Refused, ..some }],
            Err(Unavailable::Exhausted { resets_at: Some(UnixMs(9)) }),
        );
        let cooling = Candidate { means: Means::StillEnough, ..resting(ParkReason::RateLimited, 9) };
        check(&[cooling], Err(Unavailable::Cooling { until: UnixMs(9) }));
    }

    #[test]
    fn when_all_were_tried_the_last_answer_stands() {
        check(&[TRIED, resting(ParkReason::Exhausted, 5)], Err(Unavailable::Tried));
    }

    #[test]
    fn one_that_only_cools_down_is_worth_waiting_for() {
        check(
            &[
                resting(ParkReason::Exhausted, 1),
                resting(ParkReason::RateLimited, 7),
                resting(ParkReason::RateLimited, 5),
            ],
            Err(Unavailable::Cooling { until: UnixMs(5) }),
        );
    }

    #[test]
    fn exhausted_keys_name_the_earliest_reset() {
        let unknown = Candidate {
            standing: Standing::Resting { reason: ParkReason::Exhausted, until: None },
            ..USABLE
        };
        check(
            &[resting(ParkReason::Exhausted, 9), unknown, resting(ParkReason::Billing, 8)],
            Err(Unavailable::Exhausted { resets_at: Some(UnixMs(8)) }),
        );
        check(&[unknown], Err(Unavailable::Exhausted { resets_at: None }));
        check(&[resting(ParkReason::Invalid, 1), unknown], Err(Unavailable::Exhausted { resets_at: None }));
        let poor = Candidate { traits: Traits { resets_at: Some(UnixMs(3)), ..REFUSED.traits }, ..REFUSED };
        check(&[poor, unknown], Err(Unavailable::Exhausted { resets_at: Some(UnixMs(3)) }));
    }

    #[test]
    fn keys_that_are_all_refused_are_invalid() {
        check(&[resting(ParkReason::Invalid, 9)], Err(Unavailable::Invalid));
    }
}
