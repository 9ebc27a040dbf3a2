//! The permissions that a key was refused for lacking, for a while: somebody may grant them.

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::permission::Permission;
use crate::policy::units::UnixMs;

/// Permissions as bits, and one end for all of them: the last refusal renews them all.
#[derive(Debug, Default)]
pub(in crate::pool) struct LacksCell {
    permissions: AtomicU64,
    until: AtomicU64,
}

impl LacksCell {
    pub(in crate::pool) fn has(&self, permission: Permission, now: UnixMs) -> bool {
        let permissions = self.permissions.load(Ordering::Acquire);
        permissions & permission.bit() != 0 && now.0 < self.until.load(Ordering::Acquire)
    }

    pub(in crate::pool) fn add(&self, permission: Permission, now: UnixMs, until: UnixMs) {
        // What was learned before an end that has passed is forgotten.
        if self.until.fetch_max(until.0, Ordering::AcqRel) <= now.0 {
            self.permissions.store(0, Ordering::Release);
        }
        self.permissions.fetch_or(permission.bit(), Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_permission_is_remembered_for_a_while() {
        let [speech, user] = ["text_to_speech", "user_read"].map(|name| Permission::parse(name).unwrap());
        let cell = LacksCell::default();
        assert!(!cell.has(speech, UnixMs(0)));
        cell.add(speech, UnixMs(0), UnixMs(100));
        assert!(
            cell.has(speech, UnixMs(99)) && !cell.has(speech, UnixMs(100)) && !cell.has(user, UnixMs(99))
        );
        cell.add(user, UnixMs(200), UnixMs(300));
        assert!(cell.has(user, UnixMs(299)) && !cell.has(speech, UnixMs(299)));
    }
}
