//! Caches the time until which no key of a workspace can change state, so that a charge need not
//! re-evaluate all of them.
//!
//! The state of a key depends on a few atomic words and on the time. After an evaluation it stays
//! the same until one of these words is written or the time of the next known change comes. Nearly
//! every charge can thus skip the evaluation.

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::units::UnixMs;

/// The last evaluation of the keys and the time until which it holds, in one word. From the top:
/// the number of changes (10 bits), the generation of the roster (8), whether the credits were
/// spent and whether they were near the limit (1 each), and the time in milliseconds (44).
#[derive(Debug, Default)]
pub(in crate::pool) struct StateChangeCache(AtomicU64);

const UNTIL_MASK: u64 = (1 << 44) - 1;
const CHANGE: u64 = 1 << 54;

/// Inputs of an evaluation that are compared when the cache is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pool) struct NextChange {
    /// The generation of the roster.
    pub(in crate::pool) generation: u8,
    pub(in crate::pool) is_spent: bool,
    pub(in crate::pool) is_near: bool,
}

/// The word before an evaluation.
#[derive(Clone, Copy, Debug)]
pub(in crate::pool) struct EvaluationStart(u64);

impl StateChangeCache {
    /// Whether an evaluation now would have the same result as the last one.
    pub(in crate::pool) fn holds(&self, inputs: NextChange, now: UnixMs) -> bool {
        let word = self.0.load(Ordering::Acquire);
        now.0 < word & UNTIL_MASK && word & !UNTIL_MASK & (CHANGE - 1) == inputs.bits()
    }

    /// Begins an evaluation.
    pub(in crate::pool) fn begin(&self) -> EvaluationStart {
        EvaluationStart(self.0.load(Ordering::Acquire))
    }

    /// Stores that an evaluation holds until `until`, unless the state has changed since it began.
    pub(in crate::pool) fn keep(&self, before: EvaluationStart, inputs: NextChange, until: UnixMs) {
        let EvaluationStart(before) = before;
        let word = before & !(CHANGE - 1) | inputs.bits() | until.0.min(UNTIL_MASK);
        let _ = self.0.compare_exchange(before, word, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Invalidates the cache: a word that the state depends on has changed.
    pub(in crate::pool) fn invalidate(&self) {
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
    fn an_evaluation_holds_until_its_time() {
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
    fn a_change_invalidates_a_stored_and_a_running_evaluation() {
        let cell = StateChangeCache::default();
        // One more than the counter of changes can hold.
        for _ in 0..1_025 {
            let before = cell.begin();
            cell.invalidate();
            cell.keep(before, FRESH, UnixMs(100));
            assert!(!cell.holds(FRESH, UnixMs(0)));
            cell.keep(cell.begin(), FRESH, UnixMs(100));
            assert!(cell.holds(FRESH, UnixMs(0)));
        }
    }
}
