//! Caches the time until which no key of a workspace can change state, so that nearly every charge can skip the
//! evaluation of all keys of the workspace.
//!
//! The state of a key is computed from atomic words and the time. It stays the same until one of these words is written
//! or the time of the next known change is reached.

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::units::UnixMs;

/// The inputs of the last evaluation and the time until which it is current, in one word. From the highest bit to the
/// lowest: the number of invalidations (10 bits), the generation of the roster (8 bits), whether the credits were
/// exhausted (1 bit), whether they were near the limit (1 bit), and the time in Unix milliseconds (44 bits).
#[derive(Debug, Default)]
pub(in crate::pool) struct StateChangeCache(AtomicU64);

/// The bits of the time. A later time is stored as the maximum, which is reached in the year 2527.
const UNTIL_MASK: u64 = (1 << 44) - 1;
/// The lowest bit of the number of invalidations. Adding it to the word counts one invalidation.
const INVALIDATION: u64 = 1 << 54;

/// The inputs of an evaluation that are compared when the cache is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pool) struct EvaluationInputs {
    /// The generation of the roster whose keys were evaluated.
    pub(in crate::pool) roster_generation: u8,
    pub(in crate::pool) is_exhausted: bool,
    pub(in crate::pool) is_near_limit: bool,
}

/// The word of the cache at the start of an evaluation.
#[derive(Clone, Copy, Debug)]
pub(in crate::pool) struct EvaluationStart(u64);

impl StateChangeCache {
    /// Whether an evaluation at `now` would have the same result as the last evaluation.
    pub(in crate::pool) fn is_current(&self, inputs: EvaluationInputs, now: UnixMs) -> bool {
        let word = self.0.load(Ordering::Acquire);
        now.0 < word & UNTIL_MASK && word & !UNTIL_MASK & (INVALIDATION - 1) == inputs.bits()
    }

    /// Starts an evaluation. Must be called before the state of the keys is read.
    pub(in crate::pool) fn start_evaluation(&self) -> EvaluationStart {
        EvaluationStart(self.0.load(Ordering::Acquire))
    }

    /// Stores that an evaluation is current until `until`, unless the cache was changed after the start of the
    /// evaluation.
    pub(in crate::pool) fn store(&self, start: EvaluationStart, inputs: EvaluationInputs, until: UnixMs) {
        let EvaluationStart(before) = start;
        let word = before & !(INVALIDATION - 1) | inputs.bits() | until.0.min(UNTIL_MASK);
        let _ = self.0.compare_exchange(before, word, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Invalidates the cache. Must be called after every write of a word that the state depends on.
    pub(in crate::pool) fn invalidate(&self) {
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            Some((word & !(INVALIDATION - 1)).wrapping_add(INVALIDATION))
        });
    }
}

impl EvaluationInputs {
    fn bits(self) -> u64 {
        u64::from(self.roster_generation) << 46
            | u64::from(self.is_exhausted) << 45
            | u64::from(self.is_near_limit) << 44
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INPUTS: EvaluationInputs =
        EvaluationInputs { roster_generation: 255, is_exhausted: false, is_near_limit: true };

    #[test]
    fn an_evaluation_is_current_until_the_next_known_change() {
        let cache = StateChangeCache::default();
        assert!(!cache.is_current(INPUTS, UnixMs(0)));
        cache.store(cache.start_evaluation(), INPUTS, UnixMs(100));
        assert!(cache.is_current(INPUTS, UnixMs(99)) && !cache.is_current(INPUTS, UnixMs(100)));
        for changed in [
            EvaluationInputs { roster_generation: 0, ..INPUTS },
            EvaluationInputs { is_exhausted: true, ..INPUTS },
            EvaluationInputs { is_near_limit: false, ..INPUTS },
        ] {
            assert!(!cache.is_current(changed, UnixMs(0)), "changed inputs must be evaluated: {changed:?}");
        }
        cache.store(cache.start_evaluation(), INPUTS, UnixMs(u64::MAX));
        assert!(cache.is_current(INPUTS, UnixMs(1_796_000_000_000)));
    }

    #[test]
    fn a_change_invalidates_a_stored_and_a_running_evaluation() {
        let cache = StateChangeCache::default();
        // The 10-bit counter of invalidations overflows in the 1,024th iteration.
        for _ in 0..1_025 {
            let start = cache.start_evaluation();
            cache.invalidate();
            cache.store(start, INPUTS, UnixMs(100));
            assert!(!cache.is_current(INPUTS, UnixMs(0)));
            cache.store(cache.start_evaluation(), INPUTS, UnixMs(100));
            assert!(cache.is_current(INPUTS, UnixMs(0)));
        }
    }
}
