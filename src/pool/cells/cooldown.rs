//! Stores a cooldown in one atomic word, so that a reader never combines the reason of one cooldown with the end of
//! another.

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::key_state::{Cooldown, CooldownReason};
use crate::policy::units::UnixMs;

/// A cooldown in one word. The highest byte is the code of the reason, or 0 without a cooldown. The other bytes are the
/// end in Unix milliseconds, which suffice for two million years.
#[derive(Debug, Default)]
pub(in crate::pool) struct CooldownCell(AtomicU64);

const UNTIL_BITS: u32 = 56;
const UNTIL_MASK: u64 = (1 << UNTIL_BITS) - 1;

impl CooldownCell {
    pub(in crate::pool) fn load(&self) -> Option<Cooldown> {
        unpack(self.0.load(Ordering::Acquire))
    }

    /// Replaces the previous cooldown.
    pub(in crate::pool) fn store(&self, cooldown: Option<Cooldown>) {
        self.0.store(cooldown.map_or(0, pack), Ordering::Release);
    }
}

fn pack(cooldown: Cooldown) -> u64 {
    (u64::from(reason_code(cooldown.reason)) << UNTIL_BITS) | cooldown.until.0.min(UNTIL_MASK)
}

fn unpack(word: u64) -> Option<Cooldown> {
    let reason = match word >> UNTIL_BITS {
        1 => CooldownReason::RateLimited,
        2 => CooldownReason::Exhausted,
        3 => CooldownReason::Billing,
        4 => CooldownReason::Invalid,
        5 => CooldownReason::WrongHost,
        _ => return None,
    };
    Some(Cooldown { reason, until: UnixMs(word & UNTIL_MASK) })
}

/// Returns the code of `reason`, which is not 0 and less than `0x40`.
pub(super) fn reason_code(reason: CooldownReason) -> u8 {
    match reason {
        CooldownReason::RateLimited => 1,
        CooldownReason::Exhausted => 2,
        CooldownReason::Billing => 3,
        CooldownReason::Invalid => 4,
        CooldownReason::WrongHost => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_cooldown_is_unpacked_unchanged() {
        for reason in [
            CooldownReason::RateLimited,
            CooldownReason::Exhausted,
            CooldownReason::Billing,
            CooldownReason::Invalid,
            CooldownReason::WrongHost,
        ] {
            for until in [0, 1, 1_738_368_000_000, UNTIL_MASK] {
                let cooldown = Cooldown { reason, until: UnixMs(until) };
                assert_eq!(unpack(pack(cooldown)), Some(cooldown));
            }
        }
        let endless = Cooldown { reason: CooldownReason::Invalid, until: UnixMs(u64::MAX) };
        assert_eq!(unpack(pack(endless)), Some(Cooldown { until: UnixMs(UNTIL_MASK), ..endless }));
        assert_eq!(unpack(0), None);
    }

    #[test]
    fn a_stored_cooldown_replaces_the_previous_one() {
        let cell = CooldownCell::default();
        let cooldown = |reason, until| Some(Cooldown { reason, until: UnixMs(until) });
        cell.store(cooldown(CooldownReason::Exhausted, 100));
        cell.store(cooldown(CooldownReason::RateLimited, 50));
        assert_eq!(cell.load(), cooldown(CooldownReason::RateLimited, 50));
        cell.store(None);
        assert_eq!(cell.load(), None);
    }
}
