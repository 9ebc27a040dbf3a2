//! The last reported state of a key, so that every change is reported once, by the task that notices it
//! first.

use super::super::sync::{AtomicU8, Ordering};
use super::cooldown::reason_code;
use crate::policy::budget::Quota;
use crate::policy::key_state::{Change, KeyState};

/// The last reported state: the cooldown reason, and whether the key was near its limit.
#[derive(Debug, Default)]
pub(in crate::pool) struct LastReported(AtomicU8);

const NEAR_LIMIT: u8 = 0x80;

impl LastReported {
    /// Returns the change since the last call, if there is one to report.
    pub(in crate::pool) fn update(&self, standing: KeyState, quota: Quota, is_near: bool) -> Option<Change> {
        let code = match standing {
            KeyState::Usable => 0,
            KeyState::Resting { reason, .. } => reason_code(reason),
        };
        let word = code | if is_near { NEAR_LIMIT } else { 0 };
        // Usually nothing has changed, and a write would invalidate the cache line of all cores.
        if self.0.load(Ordering::Acquire) == word {
            return None;
        }
        let before = self.0.swap(word, Ordering::AcqRel);
        let was = before & !NEAR_LIMIT;
        match standing {
            KeyState::Resting { reason, until } if was != code => Some(Change::Rests { reason, until }),
            KeyState::Usable if was != code => Some(Change::Returns),
            KeyState::Usable if is_near && before & NEAR_LIMIT == 0 => Some(Change::NearLimit(quota)),
            KeyState::Usable | KeyState::Resting { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::key_state::CooldownReason;

    #[test]
    fn every_change_is_told_once() {
        let said = LastReported::default();
        let quota = Quota::default();
        let resting = KeyState::Resting { reason: CooldownReason::Exhausted, until: None };
        assert_eq!(said.update(KeyState::Usable, quota, false), None);
        assert_eq!(said.update(KeyState::Usable, quota, true), Some(Change::NearLimit(quota)));
        assert_eq!(said.update(KeyState::Usable, quota, true), None);
        assert_eq!(
            said.update(resting, quota, true),
            Some(Change::Rests { reason: CooldownReason::Exhausted, until: None })
        );
        assert_eq!(said.update(resting, quota, true), None);
        assert_eq!(said.update(KeyState::Usable, quota, false), Some(Change::Returns));
    }
}
