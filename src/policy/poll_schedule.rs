//! Schedules the next poll of a key: rarely, because many requests for quotas from one address look like
//! abuse, and sooner where the result matters.

use std::time::Duration;

use super::key_state::{CooldownReason, KeyState};
use super::units::UnixMs;

/// The result of the last poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollOutcome {
    /// The key's figures.
    Figures,
    /// The key may not read its figures.
    Nothing,
    /// No response.
    Silence,
}

/// Inputs of the schedule.
#[derive(Clone, Copy, Debug)]
pub struct PollState {
    /// The result of the last poll.
    pub outcome: PollOutcome,
    /// The key's state.
    pub state: KeyState,
    /// Whether its use is near the limit.
    pub is_near_limit: bool,
    /// When its credits are reset.
    pub resets_at: Option<UnixMs>,
}

/// Factor by which a key near its limit is polled more often.
const SOONER: u32 = 5;
/// Factor by which a key that may not read its quota is polled less often; the permission may be granted.
const SELDOM: u32 = 6;
/// After the reset date, the provider needs a moment to show the new figures.
const AFTER_RESET: Duration = Duration::from_secs(30);

/// The time until the next poll, for a regular `interval`. `chance`, from 0.0 to 1.0, spreads the polls
/// of keys that started at the same moment.
#[must_use]
pub fn next_poll_at(poll: &PollState, interval: Duration, chance: f64, now: UnixMs) -> Duration {
    let spread = |span: Duration| span.mul_f64(0.9 + 0.2 * chance.clamp(0.0, 1.0));
    let usual = match (poll.outcome, poll.state) {
        (PollOutcome::Nothing, _) => interval * SELDOM,
        (PollOutcome::Silence, _) => interval / SOONER,
        (PollOutcome::Figures, KeyState::Usable) if poll.is_near_limit => interval / SOONER,
        // Refused as invalid once: the next poll decides.
        (PollOutcome::Figures, KeyState::Resting { reason: CooldownReason::Invalid, .. }) => {
            interval / SOONER
        }
        (PollOutcome::Figures, KeyState::Usable | KeyState::Resting { .. }) => interval,
    };
    let reset = poll.resets_at.filter(|&at| at > now).map(|at| at.since(now) + AFTER_RESET);
    spread(reset.map_or(usual, |reset| usual.min(reset)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000_000);
    const INTERVAL: Duration = Duration::from_secs(600);
    const USABLE: PollState = PollState {
        outcome: PollOutcome::Figures,
        state: KeyState::Usable,
        is_near_limit: false,
        resets_at: None,
    };

    #[track_caller]
    fn check(poll: PollState, seconds: u64) {
        assert_eq!(next_poll_at(&poll, INTERVAL, 0.5, NOW), Duration::from_secs(seconds));
    }

    #[test]
    fn a_usable_key_is_polled_rarely() {
        check(USABLE, 600);
        check(PollState { outcome: PollOutcome::Nothing, ..USABLE }, 3_600);
    }

    #[test]
    fn a_key_is_polled_sooner_where_the_result_matters() {
        check(PollState { is_near_limit: true, ..USABLE }, 120);
        check(PollState { outcome: PollOutcome::Silence, ..USABLE }, 120);
        let refused = KeyState::Resting { reason: CooldownReason::Invalid, until: None };
        check(PollState { state: refused, ..USABLE }, 120);
    }

    #[test]
    fn a_key_is_polled_after_its_reset_date() {
        check(PollState { resets_at: Some(UnixMs(NOW.0 + 60_000)), ..USABLE }, 90);
        check(PollState { resets_at: Some(UnixMs(NOW.0 + 6_000_000)), ..USABLE }, 600);
        check(PollState { resets_at: Some(NOW), ..USABLE }, 600);
    }

    #[test]
    fn polls_of_keys_are_spread() {
        let at = |chance| next_poll_at(&USABLE, INTERVAL, chance, NOW);
        assert_eq!((at(0.0), at(1.0)), (Duration::from_secs(540), Duration::from_secs(660)));
        assert_eq!(at(7.0), at(1.0));
    }
}
