//! Counts the used and reserved amounts of a client or user. Each period has one atomic integer, which contains
//! the amount and the number of the period, so that a new period starts without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::policy::client_quota::{Period, Tally};
use crate::policy::units::UnixMs;

/// The sum of each period. All periods are counted, because a reload may change the period of a quota.
#[derive(Debug, Default)]
pub(super) struct Tallies([AtomicU64; 3]);

/// The numbers of the periods in which an amount was counted, so that a correction applies to the same
/// periods.
pub(super) type PeriodNumbers = [u16; 3];

/// The amount that a request takes from a quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Demand {
    /// The amount without which the request is refused.
    pub(super) min: u64,
    /// The amount that the request takes if it is left.
    pub(super) max: u64,
}

impl Demand {
    /// Exactly `amount`.
    pub(super) fn exactly(amount: u64) -> Self {
        Self { min: amount, max: amount }
    }

    /// At most `amount`: as much of it as is left.
    pub(super) fn up_to(amount: u64) -> Self {
        Self { min: amount.min(1), max: amount }
    }

    /// Returns the amount to take if `left` is left, or `None` if that is too little. Nothing can be taken from a
    /// quota that is used up, not even 0.
    pub(super) fn fit(self, left: u64) -> Option<u64> {
        (left > 0 && self.min <= left).then_some(self.max.min(left))
    }
}

pub(super) fn index(period: Period) -> usize {
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

    /// Adds an amount to each period: as much of `demand` as fits below `limit` in the quota's `period`. A single
    /// compare-and-swap on the sum of that period decides.
    ///
    /// # Errors
    ///
    /// Fails when less than the minimum fits, with the used amount. The sums are then unchanged.
    pub(super) fn try_add(
        &self,
        period: Period,
        limit: u64,
        demand: Demand,
        now: UnixMs,
    ) -> Result<(u64, PeriodNumbers), u64> {
        let used_amount = |bits| Tally::from_bits(bits).used(period, now);
        let result = self.0[index(period)].fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
            let amount = demand.fit(limit.saturating_sub(used_amount(bits)))?;
            Some(Tally::from_bits(bits).add(amount, period, now).to_bits())
        });
        let before = result.map_err(used_amount)?;
        let added = demand.fit(limit.saturating_sub(used_amount(before))).unwrap_or(0);
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
