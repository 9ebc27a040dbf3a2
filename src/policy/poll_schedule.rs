//! Computes the delay until the next quota poll of a key. Polls are rare, because many polls from one address look
//! like abuse. They are more frequent if their result may change the state of the key.

use std::time::Duration;

use super::key_state::{CooldownReason, KeyState};
use super::units::UnixMs;

/// The result of the last poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollOutcome {
    /// The provider reported the quota, or refused the key itself. The result is also conclusive after the key was
    /// polled at the regional hosts.
    Conclusive,
    /// The key lacks the permission to read its quota.
    Unreadable,
    /// No response was received, or the response did not concern the key.
    NoResponse,
}

/// The facts about a key that determine when it is polled.
#[derive(Clone, Copy, Debug)]
pub struct PollState {
    /// The result of the last poll.
    pub outcome: PollOutcome,
    /// The state of the key.
    pub key_state: KeyState,
    /// Whether the spent credits of the key's workspace are near their limit.
    pub is_near_limit: bool,
    /// The time at which the credits of the workspace are reset, if it is known.
    pub resets_at: Option<UnixMs>,
}

/// The divisor of the configured interval if the result of a poll may change the state of the key.
const FREQUENT_DIVISOR: u32 = 5;
/// The factor of the configured interval for a key that may not read its quota. Such a key is still polled, because
/// the permission may be granted later.
const INFREQUENT_FACTOR: u32 = 6;
/// Delay from the reset date to a poll, because the provider does not report the new quota immediately.
const RESET_DELAY: Duration = Duration::from_secs(30);

/// Returns the delay until the next poll for a configured `interval`. `jitter`, from 0.0 to 1.0, spreads the
/// polls of keys that were added at the same time.
#[must_use]
pub fn next_poll_delay(poll: &PollState, interval: Duration, jitter: f64, now: UnixMs) -> Duration {
    let regular_delay = match (poll.outcome, poll.key_state) {
        (PollOutcome::Unreadable, _) => interval * INFREQUENT_FACTOR,
        (PollOutcome::NoResponse, _) => interval / FREQUENT_DIVISOR,
        (PollOutcome::Conclusive, KeyState::Usable) if poll.is_near_limit => interval / FREQUENT_DIVISOR,
        // The provider refused the key as invalid. The next poll confirms or refutes the refusal.
        (PollOutcome::Conclusive, KeyState::CoolingDown { reason: CooldownReason::Invalid, .. }) => {
            interval / FREQUENT_DIVISOR
        }
        (
            PollOutcome::Conclusive,
            KeyState::Usable | KeyState::CoolingDown { .. } | KeyState::Paused { .. },
        ) => interval,
    };
    let reset_delay = poll.resets_at.filter(|&at| at > now).map(|at| at.since(now) + RESET_DELAY);
    let delay = reset_delay.map_or(regular_delay, |reset_delay| regular_delay.min(reset_delay));
    delay.mul_f64(0.9 + 0.2 * jitter.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000_000);
    const INTERVAL: Duration = Duration::from_secs(600);
    const USABLE: PollState = PollState {
        outcome: PollOutcome::Conclusive,
        key_state: KeyState::Usable,
        is_near_limit: false,
        resets_at: None,
    };

    #[track_caller]
    fn check_delay(poll: PollState, expected_secs: u64) {
        assert_eq!(next_poll_delay(&poll, INTERVAL, 0.5, NOW), Duration::from_secs(expected_secs));
    }

    #[test]
    fn a_usable_key_is_polled_rarely() {
        check_delay(USABLE, 600);
        check_delay(PollState { outcome: PollOutcome::Unreadable, ..USABLE }, 3_600);
    }

    #[test]
    fn a_key_is_polled_sooner_when_its_state_may_change() {
        check_delay(PollState { is_near_limit: true, ..USABLE }, 120);
        check_delay(PollState { outcome: PollOutcome::NoResponse, ..USABLE }, 120);
        let refused = KeyState::CoolingDown { reason: CooldownReason::Invalid, until: None };
        check_delay(PollState { key_state: refused, ..USABLE }, 120);
    }

    #[test]
    fn a_key_is_polled_after_its_reset_date() {
        check_delay(PollState { resets_at: Some(UnixMs(NOW.0 + 60_000)), ..USABLE }, 90);
        check_delay(PollState { resets_at: Some(UnixMs(NOW.0 + 6_000_000)), ..USABLE }, 600);
        check_delay(PollState { resets_at: Some(NOW), ..USABLE }, 600);
    }

    #[test]
    fn jitter_changes_the_delay_by_at_most_a_tenth() {
        let delay = |jitter| next_poll_delay(&USABLE, INTERVAL, jitter, NOW);
        assert_eq!((delay(0.0), delay(1.0)), (Duration::from_secs(540), Duration::from_secs(660)));
        assert_eq!(delay(7.0), delay(1.0));
    }
}
