//! Counts the usage in each period with atomic integers. [`UsageCounters`](super::counters::UsageCounters) has one
//! [`PeriodCounters`] for requests and one for credits. Each counter packs a [`Tally`], the amount with the number of
//! its period, so that a new period starts without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::policy::client_quota::{Period, Tally};
use crate::policy::units::UnixMs;

/// One counter per period. All periods are counted, because a reload may change the period of a quota.
#[derive(Debug, Default)]
pub(super) struct PeriodCounters([AtomicU64; 3]);

/// The numbers of the periods in which an amount was counted, so that a correction applies to the same
/// periods.
pub(super) type PeriodNumbers = [u16; 3];

/// The amount that a request takes from a quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AmountRange {
    /// The amount without which the request is refused.
    pub(super) min: u64,
    /// The amount that the request takes if the quota has that much left.
    pub(super) max: u64,
}

impl AmountRange {
    /// Returns the range of a request that is refused unless all of `amount` is available.
    pub(super) fn exactly(amount: u64) -> Self {
        Self { min: amount, max: amount }
    }

    /// Returns the range of a request that takes at least 1 and at most `amount`.
    pub(super) fn up_to(amount: u64) -> Self {
        Self { min: amount.min(1), max: amount }
    }

    /// Returns the amount to take from a quota with `remaining`, or `None` if that is less than the minimum. Nothing
    /// can be taken from an exhausted quota, not even 0.
    pub(super) fn amount_within(self, remaining: u64) -> Option<u64> {
        (remaining > 0 && self.min <= remaining).then_some(self.max.min(remaining))
    }
}

/// Returns the index of a period in arrays of amounts, period numbers and counters.
pub(super) fn period_index(period: Period) -> usize {
    match period {
        Period::Day => 0,
        Period::Month => 1,
        Period::Total => 2,
    }
}

impl PeriodCounters {
    /// Returns the used and reserved amount in the period that contains `now`.
    pub(super) fn used(&self, period: Period, now: UnixMs) -> u64 {
        Tally::from_bits(self.0[period_index(period)].load(Ordering::Acquire)).used(period, now)
    }

    /// Adds an amount to each period. Returns the periods in which the amounts were counted.
    pub(super) fn add(&self, amounts: &[u64; 3], now: UnixMs) -> PeriodNumbers {
        Period::ALL.map(|period| self.add_to(period, amounts[period_index(period)], now))
    }

    /// Adds an amount to each period: as much of `demand` as `limit` leaves in the quota's `period`. One atomic update
    /// of the counter of that period decides. Returns the added amount, and the periods in which it was counted.
    ///
    /// # Errors
    ///
    /// Fails with the used amount when less than the minimum remains. The counters are then unchanged.
    pub(super) fn try_add(
        &self,
        period: Period,
        limit: u64,
        demand: AmountRange,
        now: UnixMs,
    ) -> Result<(u64, PeriodNumbers), u64> {
        let used_amount = |bits| Tally::from_bits(bits).used(period, now);
        let update_result =
            self.0[period_index(period)].fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
                let amount = demand.amount_within(limit.saturating_sub(used_amount(bits)))?;
                Some(Tally::from_bits(bits).add(amount, period, now).to_bits())
            });
        let tally_before = update_result.map_err(used_amount)?;
        let added = demand.amount_within(limit.saturating_sub(used_amount(tally_before))).unwrap_or(0);
        let quota_period = Tally::from_bits(tally_before).add(added, period, now).period_number();
        let periods = Period::ALL
            .map(|counted| if counted == period { quota_period } else { self.add_to(counted, added, now) });
        Ok((added, periods))
    }

    /// Replaces the amount `reserved`, which was counted in `periods`, with `amount`. Periods that have ended
    /// remain unchanged.
    pub(super) fn replace(&self, periods: PeriodNumbers, reserved: u64, amount: u64) {
        for period in Period::ALL {
            let period_number = periods[period_index(period)];
            self.update(period, |tally| tally.replace_reservation(period_number, reserved, amount));
        }
    }

    /// Adds an amount to one period. Returns the number of the period in which it was counted.
    fn add_to(&self, period: Period, amount: u64, now: UnixMs) -> u16 {
        let tally_before = self.update(period, |tally| tally.add(amount, period, now));
        tally_before.add(amount, period, now).period_number()
    }

    /// Applies `change` in one atomic update. Returns the tally before the change.
    fn update(&self, period: Period, change: impl Fn(Tally) -> Tally) -> Tally {
        let changed = |bits| Some(change(Tally::from_bits(bits)).to_bits());
        let counter = &self.0[period_index(period)];
        // `changed` always returns `Some`, so the update never fails.
        let tally_before = counter.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed);
        Tally::from_bits(tally_before.unwrap_or_else(|bits| bits))
    }
}
