//! The sums of a client's used and reserved amounts, one atomic word per period.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::policy::client_quota::{ClientQuota, Period, QuotaSpent, Tally};
use crate::policy::units::UnixMs;

/// A tally per period, so that a reload may change the period of a quota.
#[derive(Debug, Default)]
pub(super) struct Tallies([AtomicU64; 3]);

/// The numbers of the periods in which an amount was counted, so that it is corrected in the same
/// ones.
pub(super) type Counted = [u16; 3];

fn index(period: Period) -> usize {
    match period {
        Period::Day => 0,
        Period::Month => 1,
        Period::Ever => 2,
    }
}

impl Tallies {
    pub(super) fn used(&self, period: Period, now: UnixMs) -> u64 {
        Tally::of_word(self.0[index(period)].load(Ordering::Acquire)).used(period, now)
    }

    /// Adds an amount to each period.
    pub(super) fn add(&self, amounts: &[u64; 3], now: UnixMs) -> Counted {
        Period::ALL.map(|period| self.add_to(period, amounts[index(period)], now))
    }

    /// Adds an amount to each period if it fits into `quota`; one compare-and-swap on the word of
    /// the quota's period decides. `amount` gets what is used in that period and returns what to
    /// add.
    ///
    /// # Errors
    ///
    /// When it does not fit. The tallies are unchanged then.
    pub(super) fn take(
        &self,
        quota: ClientQuota,
        now: UnixMs,
        amount: impl Fn(u64) -> u64,
    ) -> Result<(u64, Counted), QuotaSpent> {
        let period = quota.period;
        let used_of = |word| Tally::of_word(word).used(period, now);
        let result = self.0[index(period)].fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            let (used, tally) = (used_of(word), Tally::of_word(word));
            let more = amount(used);
            quota.has_room(used, more).then(|| tally.plus(more, period, now).word())
        });
        let before = result.map_err(|word| {
            let used = used_of(word);
            quota.refusal(used, amount(used), now)
        })?;
        let added = amount(used_of(before));
        let own = Tally::of_word(before).plus(added, period, now).number();
        let counted =
            Period::ALL.map(|other| if other == period { own } else { self.add_to(other, added, now) });
        Ok((added, counted))
    }

    /// Replaces the amount `less`, which was counted in these periods, by `more`. Periods that have
    /// ended are left unchanged.
    pub(super) fn replace(&self, counted: Counted, less: u64, more: u64) {
        for period in Period::ALL {
            let at = index(period);
            self.update(period, |tally| tally.replaced(counted[at], less, more));
        }
    }

    fn add_to(&self, period: Period, amount: u64, now: UnixMs) -> u16 {
        let before = self.update(period, |tally| tally.plus(amount, period, now));
        before.plus(amount, period, now).number()
    }

    /// Applies `change`; returns the tally before it.
    fn update(&self, period: Period, change: impl Fn(Tally) -> Tally) -> Tally {
        let changed = |word| Some(change(Tally::of_word(word)).word());
        let cell = &self.0[index(period)];
        // `changed` never returns `None`, so there is no error.
        let before = cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed);
        Tally::of_word(before.unwrap_or_else(|word| word))
    }
}
