//! Schedules the next poll of a key: rarely, because many requests for quotas from one address look like
//! abuse, and sooner when the result may change the key's state.

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
const OFTEN_FACTOR: u32 = 5;
/// Factor by which a key that may not read its quota is polled less often; the permission may be granted.
const SELDOM_FACTOR: u32 = 6;
/// Time after the reset date until the provider reports the new figures.
const RESET_DELAY: Duration = Duration::from_secs(30);

/// The time until the next poll, for a regular `interval`. `jitter`, from 0.0 to 1.0, spreads the polls
/// of keys that started at the same moment.
#[must_use]
pub fn next_poll_at(poll: &PollState, interval: Duration, jitter: f64, now: UnixMs) -> Duration {
    let spread = |span: Duration| span.mul_f64(0.9 + 0.2 * jitter.clamp(0.0, 1.0));
    let regular = match (poll.outcome, poll.state) {
        (PollOutcome::Nothing, _) => interval * SELDOM_FACTOR,
        (PollOutcome::Silence, _) => interval / OFTEN_FACTOR,
        (PollOutcome::Figures, KeyState::Usable) if poll.is_near_limit => interval / OFTEN_FACTOR,
        // The key was refused as invalid: the next poll confirms or refutes it.
        (PollOutcome::Figures, KeyState::Resting { reason: CooldownReason::Invalid, .. }) => {
            interval / OFTEN_FACTOR
        }
        (PollOutcome::Figures, KeyState::Usable | KeyState::Resting { .. }) => interval,
    };
    let reset = poll.resets_at.filter(|&at| at > now).map(|at| at.since(now) + RESET_DELAY);
    spread(reset.map_or(regular, |reset| regular.min(reset)))
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
    fn a_key_is_polled_sooner_when_its_state_may_change() {
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
        let at = |jitter| next_poll_at(&USABLE, INTERVAL, jitter, NOW);
        assert_eq!((at(0.0), at(1.0)), (Duration::from_secs(540), Duration::from_secs(660)));
        assert_eq!(at(7.0), at(1.0));
    }
}
