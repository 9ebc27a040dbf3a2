//! The sums of the used and reserved amounts of a client or user. Each period has one atomic integer, which contains
//! the amount and the number of the period, so that a new period starts without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::policy::client_quota::{ClientQuota, Period, QuotaExceeded, Tally};
use crate::policy::units::UnixMs;

/// The sum of each period. All periods are counted, because a reload may change the period of a quota.
#[derive(Debug, Default)]
pub(super) struct Tallies([AtomicU64; 3]);

/// The numbers of the periods in which an amount was counted, so that a correction applies to the same
/// periods.
pub(super) type PeriodNumbers = [u16; 3];

fn index(period: Period) -> usize {
    match period {
        Period::Day => 0,
        Period::Month => 1,
        Period::Total => 2,
    }
}

impl Tallies {
    pub(super) fn used(&self, period: Period, now: UnixMs) -> u64 {
        Tally::from_bits(self.0[index(period)].load(Ordering::Acquire)).used(period, now)
    }

    /// Adds an amount to each period.
    pub(super) fn add(&self, amounts: &[u64; 3], now: UnixMs) -> PeriodNumbers {
        Period::ALL.map(|period| self.add_to(period, amounts[index(period)], now))
    }

    /// Adds an amount to each period, if it fits into `quota`. A single compare-and-swap on the sum of the
    /// quota's period decides. `amount` maps the used amount of that period to the amount to add.
    ///
    /// # Errors
    ///
    /// Fails when the amount does not fit. The sums are then unchanged.
    pub(super) fn try_add(
        &self,
        quota: ClientQuota,
        now: UnixMs,
        amount: impl Fn(u64) -> u64,
    ) -> Result<(u64, PeriodNumbers), QuotaExceeded> {
        let period = quota.period;
        let used_amount = |bits| Tally::from_bits(bits).used(period, now);
        let result = self.0[index(period)].fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
            let (used, tally) = (used_amount(bits), Tally::from_bits(bits));
            let more = amount(used);
            quota.allows(used, more).then(|| tally.add(more, period, now).to_bits())
        });
        let before = result.map_err(|bits| {
            let used = used_amount(bits);
            quota.exceeded(used, amount(used), now)
        })?;
        let added = amount(used_amount(before));
        let quota_period = Tally::from_bits(before).add(added, period, now).period_number();
        let periods =
            Period::ALL.map(|each| if each == period { quota_period } else { self.add_to(each, added, now) });
        Ok((added, periods))
    }

    /// Replaces the amount `former`, which was counted in `periods`, with `amount`. Periods that have ended
    /// remain unchanged.
    pub(super) fn replace(&self, periods: PeriodNumbers, former: u64, amount: u64) {
        for period in Period::ALL {
            self.update(period, |tally| tally.replace_reservation(periods[index(period)], former, amount));
        }
    }

    fn add_to(&self, period: Period, amount: u64, now: UnixMs) -> u16 {
        let before = self.update(period, |tally| tally.add(amount, period, now));
        before.add(amount, period, now).period_number()
    }

    /// Applies `change`, and returns the former tally.
    fn update(&self, period: Period, change: impl Fn(Tally) -> Tally) -> Tally {
        let changed = |bits| Some(change(Tally::from_bits(bits)).to_bits());
        let cell = &self.0[index(period)];
        // `changed` always returns `Some`, so the update never fails.
        let before = cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed);
        Tally::from_bits(before.unwrap_or_else(|bits| bits))
    }
}
