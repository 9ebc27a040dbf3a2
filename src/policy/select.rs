//! Selects the key that serves a request. If no key can serve it, returns the reason, and whether queuing the request
//! is worthwhile.

use std::time::Duration;

use super::key_state::{CooldownReason, KeyState};
use super::strategy::{RankingInputs, Strategy, select_best};
use super::units::UnixMs;

/// A key, evaluated for one request.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Whether the key is usable, in cooldown or paused.
    pub state: KeyState,
    /// Whether this request may use the key: the request has not tried the key, and no restriction excludes the key in
    /// this round of the selection.
    pub is_eligible: bool,
    /// Whether the credits of the key suffice.
    pub affordability: Affordability,
    /// Whether the concurrency group of the request has capacity.
    pub concurrency: ConcurrencyState,
    /// Whether one request may probe the key during its cooldown if no other key can serve. This requires
    /// that the reason of the cooldown is unproven and that the last probe was long enough ago.
    pub may_probe: bool,
    /// The time at which the key may be able to serve again, if a cooldown, a rate limit or missing credits prevent it.
    pub retry_at: Option<UnixMs>,
    /// The inputs of the strategy.
    pub ranking: RankingInputs,
}

/// Whether the credits of a key suffice for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affordability {
    /// The credits suffice, or are unknown.
    Enough,
    /// The estimated cost, which is an upper bound, exceeds the credits.
    Short {
        /// Whether no request in flight has reserved any of the remaining credits.
        is_unreserved: bool,
    },
    /// The estimated cost exceeds the credits that the provider reported in a refusal, or the request would spend
    /// credits that the key leaves unspent.
    Refused,
}

/// Whether a concurrency group of a workspace has capacity for one more request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConcurrencyState {
    /// The group has capacity.
    Free,
    /// The group is saturated until one of its requests ends, or until the cooldown after a refusal for too many
    /// concurrent requests ends.
    Full {
        /// The time at which a retry is worthwhile if no request ends earlier.
        until: Option<UnixMs>,
    },
    /// The group is rate limited.
    Cooling {
        /// The end of the rate limit.
        until: UnixMs,
    },
}

/// The selected key, and the way in which the request uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The key at this position can serve.
    Use(usize),
    /// The estimated cost exceeds the credits of every key, and the key at this position has the most. The estimate
    /// is an upper bound, so the provider may still serve the request.
    Overcommit(usize),
    /// No other key can serve, and the key at this position is in a cooldown whose reason is not proven.
    Probe(usize),
}

impl Choice {
    /// Returns the position of the selected key in the pool.
    #[must_use]
    pub fn position(self) -> usize {
        match self {
            Self::Use(position) | Self::Overcommit(position) | Self::Probe(position) => position,
        }
    }
}

/// The reason why no key can serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// Every key is exhausted, locked, paused or invalid, or has fewer credits than this request needs.
    #[error("every key is exhausted, or has too few credits left for this request")]
    Exhausted {
        /// The time of the earliest known reset of credits, or `None` if no reset is known.
        resets_at: Option<UnixMs>,
        /// The most credits that any key has left, unless that is 0. A cheaper request may be served.
        left: Option<u64>,
    },
    /// At least one key is rate limited.
    #[error("every key is exhausted or in cooldown")]
    Cooling {
        /// The end of the first cooldown.
        until: UnixMs,
    },
    /// Every key that could serve is at its concurrency limit, has its credits reserved, or was acquired by other
    /// requests first.
    #[error("every usable key is busy")]
    Full {
        /// The time at which a retry is worthwhile if no request ends earlier.
        until: Option<UnixMs>,
    },
    /// The provider refuses every key that may serve the request as invalid, or no key may serve it.
    #[error("every key is invalid")]
    Invalid,
    /// An operator has paused every key that may serve the request and that the provider does not refuse as invalid.
    #[error("every key is paused")]
    Paused {
        /// The end of the first pause that ends by itself, or `None` if only operators end the pauses.
        until: Option<UnixMs>,
    },
    /// This request has tried every usable key that it may use.
    #[error("every usable key was tried")]
    Tried,
    /// A reload replaced the keys while the request was queued. The request selects from the new roster.
    #[error("the keys were replaced")]
    Outdated,
}

/// The failure to select a key for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectionFailure {
    /// The reason, which is reported to the client.
    pub reason: Unavailable,
    /// The earliest time at which a cooldown, a saturation, a pause of an operator or the interval between two probes
    /// ends. `None` if no such time is known.
    pub retry_at: Option<UnixMs>,
    /// Whether every more expensive request fails as well. This is false if a key may be probed or overcommitted,
    /// because a more expensive request does not wait for a busy key whose credits do not suffice.
    pub blocks_costlier: bool,
}

/// Maximum remaining cooldown for which a request is queued. A longer cooldown is reported in `Retry-After`. For a
/// short cooldown, queuing is cheaper than a retry, because an SDK that retries sends the whole request again.
pub const SHORT_WAIT: Duration = Duration::from_secs(2);

impl SelectionFailure {
    /// Lowers `retry_at` to `other` if that is earlier.
    #[must_use]
    pub fn with_earlier_retry(self, other: Option<UnixMs>) -> Self {
        Self { retry_at: earliest(self.retry_at, other), ..self }
    }

    /// Whether the request is queued at `now` instead of failing, because a key is only busy or its
    /// cooldown ends within [`SHORT_WAIT`].
    #[must_use]
    pub fn is_worth_waiting(&self, now: UnixMs) -> bool {
        let can_retry_soon = || self.retry_at.is_some_and(|at| at.since(now) <= SHORT_WAIT);
        match self.reason {
            Unavailable::Full { .. } => true,
            // `retry_at` does not include the keys that this request has tried.
            Unavailable::Cooling { .. }
            | Unavailable::Exhausted { .. }
            | Unavailable::Invalid
            | Unavailable::Paused { .. }
            | Unavailable::Tried => can_retry_soon(),
            Unavailable::Outdated => false,
        }
    }
}

impl Candidate {
    fn has_enough_credits(&self) -> bool {
        self.affordability == Affordability::Enough
    }

    /// Whether the key can serve the request now.
    #[must_use]
    pub fn is_able(&self) -> bool {
        self.is_eligible
            && self.state == KeyState::Usable
            && self.has_enough_credits()
            && self.concurrency == ConcurrencyState::Free
    }
}

/// Selects the key that `strategy` ranks best among those that are usable and have enough credits and
/// capacity. If no key has enough credits for the estimated cost, one request at a time may use the key
/// with the most credits.
///
/// # Errors
///
/// Fails if no key can serve the request now.
pub fn select(
    strategy: &Strategy,
    candidates: impl Iterator<Item = Candidate> + Clone,
) -> Result<Choice, SelectionFailure> {
    let able = candidates.clone().enumerate().filter(|(_, key)| key.is_able());
    match select_best(strategy, able.map(|(position, key)| (position, key.ranking))) {
        Some(position) => Ok(Choice::Use(position)),
        None => select_fallback(candidates),
    }
}

/// Selects a fallback if no key is able to serve: probes a key whose cooldown is not proven, or overcommits the key
/// with the most credits. Fails if neither is possible, or if the request must wait for a busy key.
fn select_fallback(candidates: impl Iterator<Item = Candidate> + Clone) -> Result<Choice, SelectionFailure> {
    let eligible = || candidates.clone().enumerate().filter(|(_, key)| key.is_eligible);
    let usable = || eligible().filter(|(_, key)| key.state == KeyState::Usable);
    // A request does not wait for keys that it has already tried.
    let retry_at = eligible().filter_map(|(_, key)| key.retry_at).min();
    let is_short = |key: &Candidate| matches!(key.affordability, Affordability::Short { .. });
    let blocks_costlier = !eligible().any(|(_, key)| key.may_probe || is_short(&key));
    let fail = |reason| Err(SelectionFailure { reason, retry_at, blocks_costlier });
    let busy = fail(Unavailable::Full { until: retry_at });
    // Waiting is safer than a fallback, because a busy key with enough credits will have capacity again.
    if usable()
        .any(|(_, key)| key.has_enough_credits() && matches!(key.concurrency, ConcurrencyState::Full { .. }))
    {
        return busy;
    }
    let is_free = |key: &Candidate| !matches!(key.concurrency, ConcurrencyState::Full { .. });
    if let Some((position, _)) =
        eligible().find(|(_, key)| key.may_probe && key.has_enough_credits() && is_free(key))
    {
        return Ok(Choice::Probe(position));
    }
    let is_cooling = |key: &Candidate| matches!(key.concurrency, ConcurrencyState::Cooling { .. });
    let with_most_credits = usable()
        .filter(|(_, key)| is_short(key) && !is_cooling(key))
        .max_by_key(|(_, key)| key.ranking.remaining);
    match with_most_credits {
        Some((
            position,
            Candidate {
                affordability: Affordability::Short { is_unreserved: true },
                concurrency: ConcurrencyState::Free,
                ..
            },
        )) => Ok(Choice::Overcommit(position)),
        // Requests in flight, here or at other replicas, may return credits that they have reserved.
        Some(_) => busy,
        None => {
            // The cooldown and the lack of credits are both unproven.
            let is_probe_candidate = |key: &Candidate| key.may_probe && is_free(key);
            if let Some((position, _)) =
                eligible().find(|(_, key)| is_probe_candidate(key) && key.affordability == SHORT)
            {
                return Ok(Choice::Probe(position));
            }
            // The client may retry at the next probe if that is before the end of the cooldowns.
            fail(match (unavailability(candidates), retry_at) {
                (Unavailable::Cooling { until }, Some(retry_at)) => {
                    Unavailable::Cooling { until: until.min(retry_at) }
                }
                (reason, _) => reason,
            })
        }
    }
}

/// The affordability of a key whose credits do not suffice, although no request in flight has reserved any of them.
const SHORT: Affordability = Affordability::Short { is_unreserved: true };

/// Returns the earlier of two times, if at least one is known.
fn earliest(first: Option<UnixMs>, second: Option<UnixMs>) -> Option<UnixMs> {
    first.into_iter().chain(second).min()
}

/// Returns the reason why no candidate can serve the request, if no candidate is only busy.
fn unavailability(candidates: impl Iterator<Item = Candidate>) -> Unavailable {
    let (mut cooldown_end, mut resets_at, mut has_exhausted, mut has_usable) = (None, None, false, false);
    let mut max_remaining = None;
    let (mut has_paused, mut pause_end) = (false, None);
    for key in candidates {
        match (key.state, key.concurrency) {
            (KeyState::Paused { until, .. }, _) => {
                has_paused = true;
                pause_end = earliest(pause_end, until);
            }
            (KeyState::Usable, ConcurrencyState::Cooling { until }) => {
                cooldown_end = earliest(cooldown_end, Some(until))
            }
            // The credits of this usable key do not suffice.
            (KeyState::Usable, _) if key.is_eligible => {
                has_exhausted = true;
                resets_at = earliest(resets_at, key.ranking.resets_at);
                max_remaining = max_remaining.max(key.ranking.remaining.filter(|&credits| credits > 0));
            }
            (KeyState::Usable, _) => has_usable = true,
            (KeyState::CoolingDown { reason: CooldownReason::RateLimited, until }, _) => {
                cooldown_end = earliest(cooldown_end, until);
            }
            (
                KeyState::CoolingDown { reason: CooldownReason::Exhausted | CooldownReason::Billing, until },
                _,
            ) => {
                has_exhausted = true;
                resets_at = earliest(resets_at, until);
            }
            (
                KeyState::CoolingDown { reason: CooldownReason::Invalid | CooldownReason::WrongHost, .. },
                _,
            ) => {}
        }
    }
    match cooldown_end {
        _ if has_usable => Unavailable::Tried,
        Some(until) => Unavailable::Cooling { until },
        None if has_exhausted => Unavailable::Exhausted { resets_at, left: max_remaining },
        None if has_paused => Unavailable::Paused { until: pause_end },
        None => Unavailable::Invalid,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::key_state::KeyStatus;

    const USABLE: Candidate = Candidate {
        state: KeyState::Usable,
        is_eligible: true,
        affordability: Affordability::Enough,
        concurrency: ConcurrencyState::Free,
        may_probe: false,
        retry_at: None,
        ranking: RankingInputs { remaining: None, resets_at: None, in_flight: 0, turn: 0, weight: 1 },
    };
    const TRIED: Candidate = Candidate { is_eligible: false, ..USABLE };
    const FULL: Candidate = Candidate { concurrency: ConcurrencyState::Full { until: None }, ..USABLE };
    const REFUSED: Candidate = Candidate { affordability: Affordability::Refused, ..USABLE };

    fn cooling_down(reason: CooldownReason, until: u64) -> Candidate {
        let until = Some(UnixMs(until));
        Candidate { state: KeyState::CoolingDown { reason, until }, retry_at: until, ..USABLE }
    }

    fn rate_limited_group(until: u64) -> Candidate {
        let until = UnixMs(until);
        Candidate { concurrency: ConcurrencyState::Cooling { until }, retry_at: Some(until), ..USABLE }
    }

    fn short(remaining: u64, is_unreserved: bool) -> Candidate {
        let ranking = RankingInputs { remaining: Some(remaining), ..USABLE.ranking };
        Candidate { affordability: Affordability::Short { is_unreserved }, ranking, ..USABLE }
    }

    #[track_caller]
    fn check_selection(keys: &[Candidate], expected: Result<Choice, Unavailable>) {
        let selection = select(Strategy::DEFAULT, keys.iter().copied());
        assert_eq!(selection.map_err(|failure| failure.reason), expected);
    }

    #[test]
    fn the_first_usable_key_serves() {
        check_selection(&[USABLE, USABLE], Ok(Choice::Use(0)));
        check_selection(&[cooling_down(CooldownReason::Exhausted, 5), USABLE], Ok(Choice::Use(1)));
        check_selection(&[TRIED, cooling_down(CooldownReason::Invalid, 5), USABLE], Ok(Choice::Use(2)));
        check_selection(&[rate_limited_group(5), USABLE], Ok(Choice::Use(1)));
    }

    #[test]
    fn the_strategy_decides_among_the_keys_that_can_serve() {
        let with_credits = |remaining| Candidate {
            ranking: RankingInputs { remaining: Some(remaining), ..USABLE.ranking },
            ..USABLE
        };
        let keys = [with_credits(1), Candidate { is_eligible: false, ..with_credits(9) }, with_credits(5)];
        assert_eq!(
            select(Strategy::by_name("most-remaining").unwrap(), keys.into_iter()),
            Ok(Choice::Use(2))
        );
    }

    #[test]
    fn a_request_skips_a_saturated_workspace() {
        check_selection(&[FULL, USABLE], Ok(Choice::Use(1)));
    }

    #[test]
    fn a_request_waits_while_every_key_with_enough_credits_is_saturated() {
        let full_until = |ms| {
            let until = Some(UnixMs(ms));
            Candidate { concurrency: ConcurrencyState::Full { until }, retry_at: until, ..USABLE }
        };
        let busy_until = |ms| Err(Unavailable::Full { until: Some(UnixMs(ms)) });
        check_selection(&[FULL, short(5, true)], Err(Unavailable::Full { until: None }));
        check_selection(&[full_until(9), FULL, full_until(7)], busy_until(7));
        // A cooldown may end before a slot becomes free.
        check_selection(&[FULL, rate_limited_group(5)], busy_until(5));
        check_selection(&[full_until(9), cooling_down(CooldownReason::RateLimited, 5)], busy_until(5));
        let tried = Candidate { is_eligible: false, ..cooling_down(CooldownReason::RateLimited, 3) };
        check_selection(&[full_until(9), tried], busy_until(9));
    }

    #[test]
    fn a_key_with_too_few_credits_is_skipped() {
        check_selection(&[short(5, true), USABLE], Ok(Choice::Use(1)));
        check_selection(&[REFUSED, USABLE], Ok(Choice::Use(1)));
    }

    #[test]
    fn the_key_with_the_most_credits_is_overcommitted_by_one_request() {
        check_selection(&[short(5, true), short(7, true), TRIED], Ok(Choice::Overcommit(1)));
        check_selection(&[short(5, true), short(7, false)], Err(Unavailable::Full { until: None }));
        check_selection(
            &[Candidate { concurrency: FULL.concurrency, ..short(7, true) }],
            Err(Unavailable::Full { until: None }),
        );
    }

    #[test]
    fn a_key_in_an_unproven_cooldown_is_probed_when_no_other_key_can_serve() {
        let unproven = Candidate { may_probe: true, ..cooling_down(CooldownReason::Exhausted, 5) };
        check_selection(&[unproven, USABLE], Ok(Choice::Use(1)));
        check_selection(&[unproven, FULL], Err(Unavailable::Full { until: Some(UnixMs(5)) }));
        check_selection(&[cooling_down(CooldownReason::Invalid, 5), unproven], Ok(Choice::Probe(1)));
        check_selection(
            &[Candidate { may_probe: true, ..rate_limited_group(5) }, short(5, true)],
            Ok(Choice::Probe(0)),
        );
        let too_expensive = Candidate { may_probe: true, affordability: SHORT, ..unproven };
        check_selection(&[cooling_down(CooldownReason::Invalid, 5), too_expensive], Ok(Choice::Probe(1)));
        check_selection(&[too_expensive, short(5, true)], Ok(Choice::Overcommit(1)));
        let refused = Candidate { affordability: Affordability::Refused, ..unproven };
        check_selection(&[refused], Err(Unavailable::Exhausted { resets_at: Some(UnixMs(5)), left: None }));
        let tried = Candidate { is_eligible: false, ..unproven };
        check_selection(&[tried], Err(Unavailable::Exhausted { resets_at: Some(UnixMs(5)), left: None }));
    }

    #[test]
    fn a_request_waits_for_a_cooldown_that_ends_soon_after_other_keys_were_tried() {
        let is_worth_waiting = |keys: &[Candidate]| {
            select(Strategy::DEFAULT, keys.iter().copied()).unwrap_err().is_worth_waiting(UnixMs(1_000))
        };
        let soon = cooling_down(CooldownReason::Exhausted, 3_000);
        assert!(is_worth_waiting(&[soon]) && is_worth_waiting(&[TRIED, soon]));
        assert!(!is_worth_waiting(&[TRIED, cooling_down(CooldownReason::Exhausted, 3_001)]));
        assert!(!is_worth_waiting(&[TRIED, Candidate { is_eligible: false, ..soon }]));
    }

    #[test]
    fn a_request_that_has_tried_every_usable_key_gets_the_last_response() {
        check_selection(&[TRIED, cooling_down(CooldownReason::Exhausted, 5)], Err(Unavailable::Tried));
    }

    #[test]
    fn the_failure_reports_the_end_of_the_first_cooldown() {
        check_selection(
            &[
                cooling_down(CooldownReason::Exhausted, 9),
                cooling_down(CooldownReason::RateLimited, 7),
                cooling_down(CooldownReason::RateLimited, 5),
            ],
            Err(Unavailable::Cooling { until: UnixMs(5) }),
        );
        check_selection(
            &[rate_limited_group(6), cooling_down(CooldownReason::Exhausted, 9)],
            Err(Unavailable::Cooling { until: UnixMs(6) }),
        );
        // The key can be probed before its cooldown ends.
        check_selection(
            &[Candidate { retry_at: Some(UnixMs(2)), ..rate_limited_group(6) }],
            Err(Unavailable::Cooling { until: UnixMs(2) }),
        );
    }

    #[test]
    fn the_failure_of_exhausted_keys_reports_the_earliest_reset() {
        let unknown = Candidate {
            state: KeyState::CoolingDown { reason: CooldownReason::Exhausted, until: None },
            ..USABLE
        };
        check_selection(
            &[cooling_down(CooldownReason::Exhausted, 9), unknown, cooling_down(CooldownReason::Billing, 8)],
            Err(Unavailable::Exhausted { resets_at: Some(UnixMs(8)), left: None }),
        );
        check_selection(&[unknown], Err(Unavailable::Exhausted { resets_at: None, left: None }));
        check_selection(
            &[cooling_down(CooldownReason::Invalid, 1), unknown],
            Err(Unavailable::Exhausted { resets_at: None, left: None }),
        );
        let too_expensive =
            Candidate { ranking: RankingInputs { resets_at: Some(UnixMs(3)), ..REFUSED.ranking }, ..REFUSED };
        check_selection(
            &[too_expensive, unknown],
            Err(Unavailable::Exhausted { resets_at: Some(UnixMs(3)), left: None }),
        );
    }

    fn paused_candidate(until: Option<u64>) -> Candidate {
        let until = until.map(UnixMs);
        let state = KeyState::Paused { until, status: KeyStatus::Active };
        Candidate { state, retry_at: until, ..USABLE }
    }

    #[test]
    fn a_paused_key_serves_no_request() {
        check_selection(&[paused_candidate(None), USABLE], Ok(Choice::Use(1)));
        check_selection(&[paused_candidate(None), FULL], Err(Unavailable::Full { until: None }));
        check_selection(
            &[Candidate { affordability: SHORT, ..paused_candidate(None) }],
            Err(Unavailable::Paused { until: None }),
        );
    }

    #[test]
    fn a_paused_pool_reports_the_first_end_of_a_pause() {
        let until = |ms| Err(Unavailable::Paused { until: Some(UnixMs(ms)) });
        check_selection(
            &[paused_candidate(Some(9)), paused_candidate(None), paused_candidate(Some(7))],
            until(7),
        );
        check_selection(&[cooling_down(CooldownReason::Invalid, 1), paused_candidate(Some(7))], until(7));
        // The other reasons end by themselves.
        check_selection(
            &[paused_candidate(Some(7)), cooling_down(CooldownReason::Exhausted, 9)],
            Err(Unavailable::Exhausted { resets_at: Some(UnixMs(9)), left: None }),
        );
    }

    #[test]
    fn a_request_waits_for_a_pause_that_ends_soon() {
        let is_worth_waiting = |until| {
            select(Strategy::DEFAULT, [paused_candidate(until)].into_iter())
                .unwrap_err()
                .is_worth_waiting(UnixMs(1_000))
        };
        assert!(is_worth_waiting(Some(3_000)));
        assert!(!is_worth_waiting(Some(3_001)) && !is_worth_waiting(None));
    }

    #[test]
    fn a_pool_of_invalid_keys_is_invalid() {
        check_selection(&[cooling_down(CooldownReason::Invalid, 9)], Err(Unavailable::Invalid));
        check_selection(&[cooling_down(CooldownReason::WrongHost, 9)], Err(Unavailable::Invalid));
    }
}
