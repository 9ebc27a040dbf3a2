//! Counts the recent spending of a workspace in one atomic word. The upper half holds the credits, and the lower half
//! holds the time to which they have decayed.

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::forecast::Spending;
use crate::policy::units::UnixMs;

/// A [`Spending`] that is updated atomically.
#[derive(Debug, Default)]
pub(in crate::pool) struct SpendingCell(AtomicU64);

impl SpendingCell {
    /// Adds credits that were spent at `now`.
    pub(in crate::pool) fn add(&self, credits: u64, now: UnixMs) {
        let add_credits = |word| Some(pack(unpack(word).add(credits, now)));
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, add_credits);
    }

    pub(in crate::pool) fn load(&self) -> Spending {
        unpack(self.0.load(Ordering::Acquire))
    }
}

fn pack(spending: Spending) -> u64 {
    (u64::from(spending.credits.to_bits()) << 32) | u64::from(spending.at_s)
}

#[expect(clippy::cast_possible_truncation, reason = "each half of the word is cast separately")]
fn unpack(word: u64) -> Spending {
    Spending { credits: f32::from_bits((word >> 32) as u32), at_s: word as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn added_credits_are_loaded() {
        let cell = SpendingCell::default();
        assert_eq!(cell.load(), Spending::default());
        cell.add(7, UnixMs(1_796_000_000_000));
        cell.add(5, UnixMs(1_796_000_000_000));
        assert_eq!(cell.load(), Spending { credits: 12.0, at_s: 1_796_000_000 });
    }
}
