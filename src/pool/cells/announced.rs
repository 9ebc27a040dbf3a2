//! What was last said of a key, so that every change is told once, by whoever notices it first.

use super::super::sync::{AtomicU8, Ordering};
use super::park::reason_code;
use crate::policy::budget::Quota;
use crate::policy::standing::{Change, Standing};

/// The last word said: how the key stood, and whether it was near its limit.
#[derive(Debug, Default)]
pub(in crate::pool) struct Announced(AtomicU8);

const NEAR_LIMIT: u8 = 0x80;

impl Announced {
    /// The change since the last call, if there is one to tell.
    pub(in crate::pool) fn update(&self, standing: Standing, quota: Quota, is_near: bool) -> Option<Change> {
        let code = match standing {
            Standing::Usable => 0,
            Standing::Resting { reason, .. } => reason_code(reason),
        };
        let word = code | if is_near { NEAR_LIMIT } else { 0 };
        // Nearly always there is nothing new: a write would take the line from all others.
        if self.0.load(Ordering::Acquire) == word {
            return None;
        }
        let before = self.0.swap(word, Ordering::AcqRel);
        let was = before & !NEAR_LIMIT;
        match standing {
            Standing::Resting { reason, until } if was != code => Some(Change::Rests { reason, until }),
            Standing::Usable if was != code => Some(Change::Returns),
            Standing::Usable if is_near && before & NEAR_LIMIT == 0 => Some(Change::NearLimit(quota)),
            Standing::Usable | Standing::Resting { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::standing::ParkReason;

    #[test]
    fn every_change_is_told_once() {
        let said = Announced::default();
        let quota = Quota::default();
        let resting = Standing::Resting { reason: ParkReason::Exhausted, until: None };
        assert_eq!(said.update(Standing::Usable, quota, false), None);
        assert_eq!(said.update(Standing::Usable, quota, true), Some(Change::NearLimit(quota)));
        assert_eq!(said.update(Standing::Usable, quota, true), None);
        assert_eq!(
            said.update(resting, quota, true),
            Some(Change::Rests { reason: ParkReason::Exhausted, until: None })
        );
        assert_eq!(said.update(resting, quota, true), None);
        assert_eq!(said.update(Standing::Usable, quota, false), Some(Change::Returns));
    }
}
