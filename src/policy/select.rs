//! Selects the key for a request, or the reason why no key can serve it.

use std::time::Duration;

use super::key_state::{CooldownReason, KeyState};
use super::strategy::{Strategy, Traits, best};
use super::units::UnixMs;

/// One key, evaluated for one request.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Whether the key is usable, or in which cooldown.
    pub state: KeyState,
    /// Whether this request may use it: not tried yet, with the permission, and in an account that the
    /// request may use.
    pub is_eligible: bool,
    /// Whether its credits suffice.
    pub affordability: Affordability,
    /// Whether its concurrency group has capacity.
    pub concurrency: ConcurrencyState,
    /// Whether one request may probe it during its cooldown when no other key can serve: the reason of
    /// the cooldown is not proven, and the last probe was long enough ago.
    pub may_probe: bool,
    /// When it may be able to serve without an event, if it is in cooldown or saturated now.
    pub again_at: Option<UnixMs>,
    /// The inputs of the strategy.
    pub traits: Traits,
}

/// Whether a key's credits suffice for a request, by our estimate or by a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affordability {
    /// They suffice, or nothing is known about them.
    Enough,
    /// They do not suffice by our estimate, which is an upper bound.
    Short {
        /// Whether no other request has reserved any of the remaining credits.
        is_undisturbed: bool,
    },
    /// The provider has reported that they do not suffice.
    Refused,
}

/// Whether a concurrency group of a workspace has capacity for one more request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConcurrencyState {
    /// It has capacity.
    Free,
    /// It is saturated, until one of its requests ends or until this moment.
    Full {
        /// When a retry is worthwhile, if no request ends before.
        until: Option<UnixMs>,
    },
    /// It is rate limited.
    Cooling {
        /// The end of the rate limit.
        until: UnixMs,
    },
}

/// The selected key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The key at this position.
    Use(usize),
    /// The key at this position, although its credits do not suffice by our estimate, like those of every
    /// other key: the estimate is an upper bound, so the provider may still serve the request.
    Overcommit(usize),
    /// The key at this position, although it is in cooldown: no other key can serve, and the reason of
    /// the cooldown is not proven.
    Probe(usize),
}

impl Choice {
    /// The position of the selected key.
    #[must_use]
    pub fn position(self) -> usize {
        match self {
            Self::Use(position) | Self::Overcommit(position) | Self::Probe(position) => position,
        }
    }
}

/// Why no key can serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// Every key is exhausted, locked or invalid, or has fewer credits left than this request needs.
    #[error("every key is exhausted, or has too few credits left for this request")]
    Exhausted {
        /// The earliest reset, when one is known.
        resets_at: Option<UnixMs>,
        /// The highest number of credits that a single key has left, if it is above 0: a cheaper request
        /// may be served.
        left: Option<u64>,
    },
    /// At least one key is in a cooldown that ends then.
    #[error("every key is exhausted or cools down")]
    Cooling {
        /// When the first cooldown ends.
        until: UnixMs,
    },
    /// Every key that could serve is at its concurrency limit, or has its credits reserved.
    #[error("every usable key is busy")]
    Full {
        /// When a retry is worthwhile, if no request ends before.
        until: Option<UnixMs>,
    },
    /// The provider refuses every key as invalid.
    #[error("every key is invalid")]
    Invalid,
    /// Some keys are usable, and this request has tried them all or may not use them.
    #[error("every usable key was tried")]
    Tried,
    /// A reload replaced the keys while the request was queued: it selects from the new roster.
    #[error("the keys were replaced")]
    Outdated,
}

/// Why no key can serve a request now, and when one may be able to without an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// The reason that the client gets.
    pub reason: Unavailable,
    /// When the first key's cooldown, saturation or probe pause ends, if one does.
    pub again_at: Option<UnixMs>,
    /// Whether a more expensive request is blocked as well. It may not be: it is not queued for a busy
    /// key whose credits would not suffice, and may use a probe or an overcommitment.
    pub blocks_costlier: bool,
}

/// Maximum remaining cooldown for which a request is queued; a longer one is reported in `Retry-After`.
/// Queuing is better for a short one, because an SDK that retries sends the whole request again.
pub const SHORT_WAIT: Duration = Duration::from_secs(2);

impl Blocked {
    /// This value, with `at` as another moment when a key may be able to serve.
    #[must_use]
    pub fn or_earlier(self, at: Option<UnixMs>) -> Self {
        Self { again_at: earliest(self.again_at, at), ..self }
    }

    /// Whether a request is queued at `now` instead of failing: a key is only busy, or its cooldown ends
    /// soon.
    #[must_use]
    pub fn is_worth_waiting(&self, now: UnixMs) -> bool {
        let is_soon = || self.again_at.is_some_and(|at| at.since(now) <= SHORT_WAIT);
        match self.reason {
            Unavailable::Full { .. } => true,
            // The keys that were tried do not count towards `again_at`.
            Unavailable::Cooling { .. }
            | Unavailable::Exhausted { .. }
            | Unavailable::Invalid
            | Unavailable::Tried => is_soon(),
            Unavailable::Outdated => false,
        }
    }
}

impl Candidate {
    fn has_enough_credits(&self) -> bool {
        self.affordability == Affordability::Enough
    }

    /// Whether it can serve now.
    #[must_use]
    pub fn is_able(&self) -> bool {
        self.is_eligible
            && self.state == KeyState::Usable
            && self.has_enough_credits()
            && self.concurrency == ConcurrencyState::Free
    }
}

/// Selects a key: of those that are usable, have enough credits and capacity, the one that `strategy`
/// ranks best. When the credits of none suffice by our estimate, the key with the most credits is used,
/// by one request at a time.
///
/// # Errors
///
/// When there is none, with the reason.
pub fn select(
    strategy: &Strategy,
    candidates: impl Iterator<Item = Candidate> + Clone,
) -> Result<Choice, Blocked> {
    let able = candidates.clone().enumerate().filter(|(_, key)| key.is_able());
    match best(strategy, able.map(|(position, key)| (position, key.traits))) {
        Some(position) => Ok(Choice::Use(position)),
        None => fallback(candidates),
    }
}

/// The fallback when no key is able to serve: wait for a busy key, probe one whose cooldown is not
/// proven, or overcommit the key with the most credits.
///
/// # Errors
///
/// When none of these is possible, with the reason.
fn fallback(candidates: impl Iterator<Item = Candidate> + Clone) -> Result<Choice, Blocked> {
    let eligible = || candidates.clone().enumerate().filter(|(_, key)| key.is_eligible);
    let usable = || eligible().filter(|(_, key)| key.state == KeyState::Usable);
    // A request does not wait for keys that it has tried.
    let again_at = eligible().filter_map(|(_, key)| key.again_at).min();
    let is_short = |key: &Candidate| matches!(key.affordability, Affordability::Short { .. });
    let blocks_costlier = !eligible().any(|(_, key)| key.may_probe || is_short(&key));
    let blocked = |reason| Err(Blocked { reason, again_at, blocks_costlier });
    let full = blocked(Unavailable::Full { until: again_at });
    // A busy key with enough credits will have capacity again; until then, no fallback is used.
    if usable()
        .any(|(_, key)| key.has_enough_credits() && matches!(key.concurrency, ConcurrencyState::Full { .. }))
    {
        return full;
    }
    let is_free = |key: &Candidate| !matches!(key.concurrency, ConcurrencyState::Full { .. });
    if let Some((position, _)) =
        eligible().find(|(_, key)| key.may_probe && key.has_enough_credits() && is_free(key))
    {
        return Ok(Choice::Probe(position));
    }
    let with_most_credits =
        usable().filter(|(_, key)| is_short(key)).max_by_key(|(_, key)| key.traits.remaining);
    match with_most_credits {
        Some((
            position,
            Candidate {
                affordability: Affordability::Short { is_undisturbed: true },
                concurrency: ConcurrencyState::Free,
                ..
            },
        )) => Ok(Choice::Overcommit(position)),
        // Credits that other requests have reserved may be returned.
        Some((_, Candidate { concurrency: ConcurrencyState::Free | ConcurrencyState::Full { .. }, .. })) => {
            full
        }
        Some((_, Candidate { concurrency: ConcurrencyState::Cooling { .. }, .. })) | None => {
            // Neither the cooldown nor the lack of credits is proven.
            let may_be_probed = |key: &Candidate| key.may_probe && is_free(key);
            if let Some((position, _)) =
                eligible().find(|(_, key)| may_be_probed(key) && key.affordability == SHORT)
            {
                return Ok(Choice::Probe(position));
            }
            // The client's `Retry-After` is the next probe, if it comes before the end of the cooldowns.
            blocked(match (unavailable(candidates), again_at) {
                (Unavailable::Cooling { until }, Some(again_at)) => {
                    Unavailable::Cooling { until: until.min(again_at) }
                }
                (reason, _) => reason,
            })
        }
    }
}

/// The credits fall short by our estimate, and no other request has reserved any of them.
const SHORT: Affordability = Affordability::Short { is_undisturbed: true };

fn earliest(a: Option<UnixMs>, b: Option<UnixMs>) -> Option<UnixMs> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    }
}

fn unavailable(candidates: impl Iterator<Item = Candidate>) -> Unavailable {
    let (mut cooling, mut resets_at, mut has_exhausted, mut has_usable) = (None, None, false, false);
    let mut left = None;
    for key in candidates {
        match (key.state, key.concurrency) {
            (KeyState::Usable, ConcurrencyState::Cooling { until }) => {
                cooling = earliest(cooling, Some(until))
            }
            // A usable key of which the credits did not suffice.
            (KeyState::Usable, _) if key.is_eligible => {
                has_exhausted = true;
                resets_at = earliest(resets_at, key.traits.resets_at);
                left = left.max(key.traits.remaining.filter(|&credits| credits > 0));
            }
            (KeyState::Usable, _) => has_usable = true,
            (KeyState::Resting { reason: CooldownReason::RateLimited, until }, _) => {
                cooling = earliest(cooling, until);
            }
            (KeyState::Resting { reason: CooldownReason::Exhausted | CooldownReason::Billing, until }, _) => {
                has_exhausted = true;
                resets_at = earliest(resets_at, until);
            }
            (KeyState::Resting { reason: CooldownReason::Invalid | CooldownReason::WrongHost, .. }, _) => {}
        }
    }
    match cooling {
        _ if has_usable => Unavailable::Tried,
        Some(until) => Unavailable::Cooling { until },
        None if has_exhausted => Unavailable::Exhausted { resets_at, left },
        None => Unavailable::Invalid,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USABLE: Candidate = Candidate {
        state: KeyState::Usable,
        is_eligible: true,
        affordability: Affordability::Enough,
        concurrency: ConcurrencyState::Free,
        may_probe: false,
        again_at: None,
        traits: Traits { remaining: None, resets_at: None, in_flight: 0, turn: 0, weight: 1 },
    };
    const TRIED: Candidate = Candidate { is_eligible: false, ..USABLE };
    const FULL: Candidate = Candidate { concurrency: ConcurrencyState::Full { until: None }, ..USABLE };
    const REFUSED: Candidate = Candidate { affordability: Affordability::Refused, ..USABLE };

    fn resting(reason: CooldownReason, until: u64) -> Candidate {
        let until = Some(UnixMs(until));
        Candidate { state: KeyState::Resting { reason, until }, again_at: until, ..USABLE }
    }

    fn cooling(until: u64) -> Candidate {
        let until = UnixMs(until);
        Candidate { concurrency: ConcurrencyState::Cooling { until }, again_at: Some(until), ..USABLE }
    }

    fn short(remaining: u64, is_undisturbed: bool) -> Candidate {
        let traits = Traits { remaining: Some(remaining), ..USABLE.traits };
        Candidate { affordability: Affordability::Short { is_undisturbed }, traits, ..USABLE }
    }

    #[track_caller]
    fn check(keys: &[Candidate], expected: Result<Choice, Unavailable>) {
        let chosen = select(Strategy::DEFAULT, keys.iter().copied());
        assert_eq!(chosen.map_err(|blocked| blocked.reason), expected);
    }

    #[test]
    fn the_first_usable_key_serves() {
        check(&[USABLE, USABLE], Ok(Choice::Use(0)));
        check(&[resting(CooldownReason::Exhausted, 5), USABLE], Ok(Choice::Use(1)));
        check(&[TRIED, resting(CooldownReason::Invalid, 5), USABLE], Ok(Choice::Use(2)));
        check(&[cooling(5), USABLE], Ok(Choice::Use(1)));
    }

    #[test]
    fn the_strategy_decides_among_the_keys_that_can_serve() {
        let with_credits = |remaining| Candidate {
            traits: Traits { remaining: Some(remaining), ..USABLE.traits },
            ..USABLE
        };
        let keys = [with_credits(1), Candidate { is_eligible: false, ..with_credits(9) }, with_credits(5)];
        assert_eq!(select(Strategy::named("most-remaining").unwrap(), keys.into_iter()), Ok(Choice::Use(2)));
    }

    #[test]
    fn a_request_skips_a_full_workspace() {
        check(&[FULL, USABLE], Ok(Choice::Use(1)));
    }

    #[test]
    fn a_request_waits_while_all_keys_with_enough_credits_are_full() {
        let until = |ms| {
            let at = Some(UnixMs(ms));
            Candidate { concurrency: ConcurrencyState::Full { until: at }, again_at: at, ..USABLE }
        };
        let full = |ms| Err(Unavailable::Full { until: Some(UnixMs(ms)) });
        check(&[FULL, short(5, true)], Err(Unavailable::Full { until: None }));
        check(&[until(9), FULL, until(7)], full(7));
        // A cooldown that ends before a slot becomes free counts as well.
        check(&[FULL, cooling(5)], full(5));
        check(&[until(9), resting(CooldownReason::RateLimited, 5)], full(5));
        let tried = Candidate { is_eligible: false, ..resting(CooldownReason::RateLimited, 3) };
        check(&[until(9), tried], full(9));
    }

    #[test]
    fn a_key_with_too_few_credits_is_skipped() {
        check(&[short(5, true), USABLE], Ok(Choice::Use(1)));
        check(&[REFUSED, USABLE], Ok(Choice::Use(1)));
    }

    #[test]
    fn the_key_with_the_most_credits_serves_one_request_when_no_estimate_fits() {
        check(&[short(5, true), short(7, true), TRIED], Ok(Choice::Overcommit(1)));
        check(&[short(5, true), short(7, false)], Err(Unavailable::Full { until: None }));
        check(
            &[Candidate { concurrency: FULL.concurrency, ..short(7, true) }],
            Err(Unavailable::Full { until: None }),
        );
    }

    #[test]
    fn a_key_in_an_unproven_cooldown_is_probed_when_no_other_key_can_serve() {
        let unproven = Candidate { may_probe: true, ..resting(CooldownReason::Exhausted, 5) };
        check(&[unproven, USABLE], Ok(Choice::Use(1)));
        check(&[unproven, FULL], Err(Unavailable::Full { until: Some(UnixMs(5)) }));
        check(&[resting(CooldownReason::Invalid, 5), unproven], Ok(Choice::Probe(1)));
        check(&[Candidate { may_probe: true, ..cooling(5) }, short(5, true)], Ok(Choice::Probe(0)));
        let too_expensive = Candidate { may_probe: true, affordability: SHORT, ..unproven };
        check(&[resting(CooldownReason::Invalid, 5), too_expensive], Ok(Choice::Probe(1)));
        check(&[too_expensive, short(5, true)], Ok(Choice::Overcommit(1)));
        let refused = Candidate { affordability: Affordability::Refused, ..unproven };
        check(&[refused], Err(Unavailable::Exhausted { resets_at: Some(UnixMs(5)), left: None }));
        let tried = Candidate { is_eligible: false, ..unproven };
        check(&[tried], Err(Unavailable::Exhausted { resets_at: Some(UnixMs(5)), left: None }));
    }

    #[test]
    fn a_request_waits_for_a_cooldown_that_ends_soon_whatever_was_tried() {
        let waits = |keys: &[Candidate]| {
            select(Strategy::DEFAULT, keys.iter().copied()).unwrap_err().is_worth_waiting(UnixMs(1_000))
        };
        let soon = resting(CooldownReason::Exhausted, 3_000);
        assert!(waits(&[soon]) && waits(&[TRIED, soon]));
        assert!(!waits(&[TRIED, resting(CooldownReason::Exhausted, 3_001)]));
        assert!(!waits(&[TRIED, Candidate { is_eligible: false, ..soon }]));
    }

    #[test]
    fn a_request_that_has_tried_every_usable_key_gets_the_last_response() {
        check(&[TRIED, resting(CooldownReason::Exhausted, 5)], Err(Unavailable::Tried));
    }

    #[test]
    fn a_request_names_the_end_of_the_first_cooldown() {
        check(
            &[
                resting(CooldownReason::Exhausted, 9),
                resting(CooldownReason::RateLimited, 7),
                resting(CooldownReason::RateLimited, 5),
            ],
            Err(Unavailable::Cooling { until: UnixMs(5) }),
        );
        check(
            &[cooling(6), resting(CooldownReason::Exhausted, 9)],
            Err(Unavailable::Cooling { until: UnixMs(6) }),
        );
        // It can be probed before its cooldown ends.
        check(
            &[Candidate { again_at: Some(UnixMs(2)), ..cooling(6) }],
            Err(Unavailable::Cooling { until: UnixMs(2) }),
        );
    }

    #[test]
    fn exhausted_keys_name_the_earliest_reset() {
        let unknown = Candidate {
            state: KeyState::Resting { reason: CooldownReason::Exhausted, until: None },
            ..USABLE
        };
        check(
            &[resting(CooldownReason::Exhausted, 9), unknown, resting(CooldownReason::Billing, 8)],
            Err(Unavailable::Exhausted { resets_at: Some(UnixMs(8)), left: None }),
        );
        check(&[unknown], Err(Unavailable::Exhausted { resets_at: None, left: None }));
        check(
            &[resting(CooldownReason::Invalid, 1), unknown],
            Err(Unavailable::Exhausted { resets_at: None, left: None }),
        );
        let too_expensive =
            Candidate { traits: Traits { resets_at: Some(UnixMs(3)), ..REFUSED.traits }, ..REFUSED };
        check(
            &[too_expensive, unknown],
            Err(Unavailable::Exhausted { resets_at: Some(UnixMs(3)), left: None }),
        );
    }

    #[test]
    fn keys_that_are_all_refused_are_invalid() {
        check(&[resting(CooldownReason::Invalid, 9)], Err(Unavailable::Invalid));
        check(&[resting(CooldownReason::WrongHost, 9)], Err(Unavailable::Invalid));
    }
}
