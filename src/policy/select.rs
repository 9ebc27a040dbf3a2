//! Which key serves next, and what to tell a client when none does.

use super::standing::{ParkReason, Standing};
use super::units::UnixMs;

/// How keys are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// The first key that is usable, in the order they were given, until it is refused or spent.
    #[default]
    FillFirst,
}

/// One key as a choice sees it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// How it stands.
    pub standing: Standing,
    /// Whether this request has tried it already.
    pub is_tried: bool,
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
    /// The provider refuses every one of them as a key.
    #[error("every key is invalid")]
    Invalid,
    /// Some are usable, and this request has tried them all.
    #[error("every usable key was tried")]
    Tried,
}

/// The position of the key to use: the first that stands well and was not tried.
///
/// # Errors
///
/// When there is none, with what stands in the way.
pub fn select(
    strategy: Strategy,
    candidates: impl Iterator<Item = Candidate> + Clone,
) -> Result<usize, Unavailable> {
    let Strategy::FillFirst = strategy;
    candidates
        .clone()
        .position(|candidate| candidate.standing == Standing::Usable && !candidate.is_tried)
        .ok_or_else(|| unavailable(candidates.map(|candidate| candidate.standing)))
}

fn unavailable(standings: impl Iterator<Item = Standing>) -> Unavailable {
    let earliest = |a: Option<UnixMs>, b: Option<UnixMs>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    };
    let (mut cooling, mut resets_at, mut has_exhausted) = (None, None, false);
    for standing in standings {
        match standing {
            Standing::Usable => return Unavailable::Tried,
            Standing::Resting { reason: ParkReason::RateLimited, until } => {
                cooling = earliest(cooling, until)
            }
            Standing::Resting { reason: ParkReason::Exhausted | ParkReason::Billing, until } => {
                has_exhausted = true;
                resets_at = earliest(resets_at, until);
            }
            Standing::Resting { reason: ParkReason::Invalid, .. } => {}
        }
    }
    match cooling {
        Some(until) => Unavailable::Cooling { until },
        None if has_exhausted => Unavailable::Exhausted { resets_at },
        None => Unavailable::Invalid,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USABLE: Standing = Standing::Usable;

    fn resting(reason: ParkReason, until: u64) -> Standing {
        Standing::Resting { reason, until: Some(UnixMs(until)) }
    }

    #[track_caller]
    fn check(keys: &[(Standing, bool)], expected: Result<usize, Unavailable>) {
        let candidates = keys.iter().map(|&(standing, is_tried)| Candidate { standing, is_tried });
        assert_eq!(select(Strategy::FillFirst, candidates), expected);
    }

    #[test]
    fn the_first_usable_key_serves() {
        check(&[(USABLE, false), (USABLE, false)], Ok(0));
        check(&[(resting(ParkReason::Exhausted, 5), false), (USABLE, false)], Ok(1));
        check(&[(USABLE, true), (resting(ParkReason::Invalid, 5), false), (USABLE, false)], Ok(2));
    }

    #[test]
    fn when_all_were_tried_the_last_answer_stands() {
        check(&[(USABLE, true), (resting(ParkReason::Exhausted, 5), true)], Err(Unavailable::Tried));
    }

    #[test]
    fn one_that_only_cools_down_is_worth_waiting_for() {
        check(
            &[
                (resting(ParkReason::Exhausted, 1), false),
                (resting(ParkReason::RateLimited, 7), false),
                (resting(ParkReason::RateLimited, 5), false),
            ],
            Err(Unavailable::Cooling { until: UnixMs(5) }),
        );
    }

    #[test]
    fn exhausted_keys_name_the_earliest_reset() {
        let unknown = Standing::Resting { reason: ParkReason::Exhausted, until: None };
        check(
            &[
                (resting(ParkReason::Exhausted, 9), true),
                (unknown, false),
                (resting(ParkReason::Billing, 8), false),
            ],
            Err(Unavailable::Exhausted { resets_at: Some(UnixMs(8)) }),
        );
        check(&[(unknown, false)], Err(Unavailable::Exhausted { resets_at: None }));
        check(
            &[(resting(ParkReason::Invalid, 1), false), (unknown, false)],
            Err(Unavailable::Exhausted { resets_at: None }),
        );
    }

    #[test]
    fn keys_that_are_all_refused_are_invalid() {
        check(&[(resting(ParkReason::Invalid, 9), true)], Err(Unavailable::Invalid));
    }
}
