//! The last reported state of a key, so that every change is reported once, by the task that notices it
//! first.

use super::super::sync::{AtomicU8, Ordering};
use super::cooldown::reason_code;
use crate::policy::budget::Quota;
use crate::policy::key_state::{KeyState, StateChange};

/// The last reported state: the cooldown reason, and whether the key was near its limit.
#[derive(Debug, Default)]
pub(in crate::pool) struct LastReported(AtomicU8);

const NEAR_LIMIT: u8 = 0x80;

impl LastReported {
    /// Returns the change since the last call, if there is one to report.
    pub(in crate::pool) fn update(
        &self,
        state: KeyState,
        quota: Quota,
        is_near: bool,
    ) -> Option<StateChange> {
        let code = match state {
            KeyState::Usable => 0,
            KeyState::Resting { reason, .. } => reason_code(reason),
        };
        let word = code | if is_near { NEAR_LIMIT } else { 0 };
        // Usually nothing has changed, and a write would invalidate the cache line of all cores.
        if self.0.load(Ordering::Acquire) == word {
            return None;
        }
        let before = self.0.swap(word, Ordering::AcqRel);
        let code_before = before & !NEAR_LIMIT;
        match state {
            KeyState::Resting { reason, until } if code_before != code => {
                Some(StateChange::Rests { reason, until })
            }
            KeyState::Usable if code_before != code => Some(StateChange::Returns),
            KeyState::Usable if is_near && before & NEAR_LIMIT == 0 => Some(StateChange::NearLimit(quota)),
            KeyState::Usable | KeyState::Resting { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::key_state::CooldownReason;

    #[test]
    fn every_change_is_reported_once() {
        let last_reported = LastReported::default();
        let quota = Quota::default();
        let resting = KeyState::Resting { reason: CooldownReason::Exhausted, until: None };
        assert_eq!(last_reported.update(KeyState::Usable, quota, false), None);
        assert_eq!(last_reported.update(KeyState::Usable, quota, true), Some(StateChange::NearLimit(quota)));
        assert_eq!(last_reported.update(KeyState::Usable, quota, true), None);
        assert_eq!(
            last_reported.update(resting, quota, true),
            Some(StateChange::Rests { reason: CooldownReason::Exhausted, until: None })
        );
        assert_eq!(last_reported.update(resting, quota, true), None);
        assert_eq!(last_reported.update(KeyState::Usable, quota, false), Some(StateChange::Returns));
    }
}
