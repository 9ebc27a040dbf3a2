//! Whether a look at all keys of a workspace would find news. After every charge somebody would have
//! to look, and nearly always in vain: how a key stands follows from a few words and the time, so
//! after one look nothing changes until somebody changes one of them, or a moment comes.

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::units::UnixMs;

/// When its keys were last looked at, and until when that holds, in one word: from the top, how often
/// something has changed (10 bits), the generation of the roster (8), whether its credits were spent
/// and whether they were near their end (1 each), and the moment in milliseconds (44).
#[derive(Debug, Default)]
pub(in crate::pool) struct StateChangeCache(AtomicU64);

const UNTIL_MASK: u64 = (1 << 44) - 1;
const CHANGE: u64 = 1 << 54;

/// What a look at the keys depends on besides what is told to the cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pool) struct NextChange {
    /// Which roster's keys they are.
    pub(in crate::pool) generation: u8,
    pub(in crate::pool) is_spent: bool,
    pub(in crate::pool) is_near: bool,
}

/// The cell before a look.
#[derive(Clone, Copy, Debug)]
pub(in crate::pool) struct Before(u64);

impl StateChangeCache {
    /// Whether a look now would find what the last one has found.
    pub(in crate::pool) fn holds(&self, outlook: NextChange, now: UnixMs) -> bool {
        let word = self.0.load(Ordering::Acquire);
        now.0 < word & UNTIL_MASK && word & !UNTIL_MASK & (CHANGE - 1) == outlook.bits()
    }

    /// Somebody is going to look.
    pub(in crate::pool) fn begin(&self) -> Before {
        Before(self.0.load(Ordering::Acquire))
    }

    /// Somebody has looked, and what was seen holds until then, unless something has changed meanwhile.
    pub(in crate::pool) fn keep(&self, before: Before, outlook: NextChange, until: UnixMs) {
        let Before(before) = before;
        let word = before & !(CHANGE - 1) | outlook.bits() | until.0.min(UNTIL_MASK);
        let _ = self.0.compare_exchange(before, word, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Something has changed: the next one looks.
    pub(in crate::pool) fn disturb(&self) {
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            Some((word & !(CHANGE - 1)).wrapping_add(CHANGE))
        });
    }
}

impl NextChange {
    fn bits(self) -> u64 {
        u64::from(self.generation) << 46 | u64::from(self.is_spent) << 45 | u64::from(self.is_near) << 44
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRESH: NextChange = NextChange { generation: 255, is_spent: false, is_near: true };

    #[test]
    fn what_was_seen_holds_until_its_time() {
        let cell = StateChangeCache::default();
        assert!(!cell.holds(FRESH, UnixMs(0)));
        cell.keep(cell.begin(), FRESH, UnixMs(100));
        assert!(cell.holds(FRESH, UnixMs(99)) && !cell.holds(FRESH, UnixMs(100)));
        for other in [
            NextChange { generation: 0, ..FRESH },
            NextChange { is_spent: true, ..FRESH },
            NextChange { is_near: false, ..FRESH },
        ] {
            assert!(!cell.holds(other, UnixMs(0)), "{other:?}");
        }
        cell.keep(cell.begin(), FRESH, UnixMs(u64::MAX));
        assert!(cell.holds(FRESH, UnixMs(1_796_000_000_000)));
    }

    #[test]
    fn a_change_ends_it_and_outdates_a_look_that_has_begun() {
        let cell = StateChangeCache::default();
        // As often as there are numbers for changes, and once more.
        for _ in 0..1_025 {
            let before = cell.begin();
            cell.disturb();
            cell.keep(before, FRESH, UnixMs(100));
            assert!(!cell.holds(FRESH, UnixMs(0)));
            cell.keep(cell.begin(), FRESH, UnixMs(100));
            assert!(cell.holds(FRESH, UnixMs(0)));
        }
    }
}
