//! Stores the last reported state of a key, so that only the first task that finds a state change reports it.

use super::super::sync::{AtomicU8, Ordering};
use super::cooldown::reason_code;
use crate::policy::key_state::{KeyState, StateChange};
use crate::policy::quota::Quota;

/// The code of the last reported state: the code of the cooldown reason, [`PAUSED`], or 0 for a usable key. If the
/// workspace is near its limit, the bit [`NEAR_LIMIT`] is also set.
#[derive(Debug, Default)]
pub(in crate::pool) struct LastReportedState(AtomicU8);

/// The bit of a key whose workspace is near its limit.
const NEAR_LIMIT: u8 = 0x80;
/// The code of a paused key. While a key is paused, no other change of its state is reported.
const PAUSED: u8 = 0x40;

impl LastReportedState {
    /// Records the state. Returns the change since the previous call, if it must be reported.
    pub(in crate::pool) fn update(
        &self,
        state: KeyState,
        quota: Quota,
        is_near_limit: bool,
    ) -> Option<StateChange> {
        let code = match state {
            KeyState::Usable => 0,
            KeyState::CoolingDown { reason, .. } => reason_code(reason),
            KeyState::Paused { .. } => PAUSED,
        };
        let new_code = code | if is_near_limit { NEAR_LIMIT } else { 0 };
        // The state is usually unchanged. A write would invalidate the cache line of all cores.
        if self.0.load(Ordering::Acquire) == new_code {
            return None;
        }
        let previous_code = self.0.swap(new_code, Ordering::AcqRel);
        let code_before = previous_code & !NEAR_LIMIT;
        match state {
            KeyState::Paused { until, .. } if code_before != code => Some(StateChange::Paused { until }),
            KeyState::Usable | KeyState::CoolingDown { .. } if code_before == PAUSED => {
                Some(StateChange::Resumed)
            }
            KeyState::CoolingDown { reason, until } if code_before != code => {
                Some(StateChange::CooldownStarted { reason, until })
            }
            KeyState::Usable if code_before != code => Some(StateChange::CooldownEnded),
            KeyState::Usable if is_near_limit && previous_code & NEAR_LIMIT == 0 => {
                Some(StateChange::NearLimit(quota))
            }
            KeyState::Usable | KeyState::CoolingDown { .. } | KeyState::Paused { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::key_state::{CooldownReason, KeyStatus};

    #[test]
    fn every_change_is_reported_once() {
        let last_reported = LastReportedState::default();
        let quota = Quota::default();
        let exhausted = KeyState::CoolingDown { reason: CooldownReason::Exhausted, until: None };
        assert_eq!(last_reported.update(KeyState::Usable, quota, false), None);
        assert_eq!(last_reported.update(KeyState::Usable, quota, true), Some(StateChange::NearLimit(quota)));
        assert_eq!(last_reported.update(KeyState::Usable, quota, true), None);
        assert_eq!(
            last_reported.update(exhausted, quota, true),
            Some(StateChange::CooldownStarted { reason: CooldownReason::Exhausted, until: None })
        );
        assert_eq!(last_reported.update(exhausted, quota, true), None);
        assert_eq!(last_reported.update(KeyState::Usable, quota, false), Some(StateChange::CooldownEnded));
    }

    #[test]
    fn a_pause_and_its_end_are_reported_once() {
        let last_reported = LastReportedState::default();
        let quota = Quota::default();
        let paused = |status| KeyState::Paused { until: None, status };
        let update = |state| last_reported.update(state, quota, false);
        assert_eq!(update(paused(KeyStatus::Active)), Some(StateChange::Paused { until: None }));
        assert_eq!(update(paused(KeyStatus::Exhausted)), None);
        let exhausted = KeyState::CoolingDown { reason: CooldownReason::Exhausted, until: None };
        assert_eq!(update(exhausted), Some(StateChange::Resumed));
        assert_eq!(update(exhausted), None);
    }
}
