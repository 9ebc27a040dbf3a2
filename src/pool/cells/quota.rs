//! Counts the credits of a workspace: the spent credits, the credits that requests in flight have reserved, and the
//! ceiling of their sum. Also ends the period at its reset date, and applies polls and the share of this replica: the
//! part of the credits that it may use.
//!
//! One atomic word holds the sum, and a reservation is one compare-and-swap against the ceiling. Two
//! requests therefore cannot reserve the same credits. The spent and the reserved credits are also held
//! separately, for readers. Every change is added to the sum as a difference, so that concurrent changes
//! may be applied in any order.

use std::sync::PoisonError;
use std::time::Duration;

use super::super::sync::{AtomicBool, AtomicI64, AtomicU64, Mutex, MutexGuard, Ordering};
use super::reported_remaining::ReportedRemaining;
use crate::policy::quota::{BillingDiscrepancy, Extension, Quota};
use crate::policy::units::UnixMs;

/// The stored form of a number of credits that is unknown or unlimited.
const UNKNOWN: u64 = u64::MAX;

/// The credits of a workspace. Within a period, requests change only the first three fields, the time of the last
/// charge and the reported remaining credits.
#[derive(Debug)]
pub(in crate::pool) struct QuotaCell {
    /// Sum of spent and reserved credits. It wraps below zero while only a part of a change is applied.
    committed: AtomicU64,
    spent: AtomicU64,
    /// Credits that requests in flight have reserved.
    reserved: AtomicU64,
    /// The limit of the spent credits, or [`UNKNOWN`] until the provider reports it.
    limit: AtomicU64,
    /// The credits beyond the limit that may be spent, or [`UNKNOWN`] if they are unlimited.
    extension: AtomicU64,
    /// The maximum of the spent credits, from the limit and the extension, or [`UNKNOWN`] without a known maximum.
    ceiling: AtomicU64,
    /// The end of the period in Unix milliseconds, or 0 if it is unknown.
    resets_at: AtomicU64,
    /// Time of the last charge in Unix milliseconds.
    last_spent_at: AtomicU64,
    /// Sum of the differences by which the provider's counts of this period exceeded the count of the pool.
    discrepancy: AtomicI64,
    /// The maximum of the sum of spent and reserved credits that this replica may reach, or [`UNKNOWN`] if the credits
    /// are not divided between replicas.
    share: AtomicU64,
    /// Whether a request may exceed the ceiling while no other request has reserved credits.
    may_overcommit: AtomicBool,
    /// The part of the spent credits that this process did not charge: credits that were polled, restored, or charged
    /// by other replicas. Negative after the start of a new period. Every change of it also changes `spent`.
    foreign: Mutex<i64>,
    /// The remaining credits that the provider reported when it last refused a request for its price.
    pub(in crate::pool) reported_remaining: ReportedRemaining,
}

/// The credits of a request that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pool) struct FinishedReservation {
    /// Credits that were reserved for the request.
    pub(in crate::pool) reserved: u64,
    /// Credits that the request has cost.
    pub(in crate::pool) spent: u64,
}

/// The credits of a workspace by their origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreditUse {
    /// Credits that this process has charged since its start, in all periods.
    pub charged_here: i64,
    /// The spent credits of the current period minus `charged_here`.
    pub foreign: i64,
    /// Credits that requests in flight may still spend.
    pub reserved: u64,
}

/// The credits of a workspace that this replica may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreditShare {
    /// The new value of [`CreditUse::foreign`].
    pub foreign: i64,
    /// The maximum of the credits that this process has charged and reserved since its start. `None` if the credits
    /// are not divided.
    pub granted: Option<i64>,
    /// Whether one request at a time may exceed the remaining credits when no other key can serve it.
    pub may_overcommit: bool,
}

impl Default for QuotaCell {
    fn default() -> Self {
        Self {
            committed: AtomicU64::new(0),
            spent: AtomicU64::new(0),
            reserved: AtomicU64::new(0),
            limit: AtomicU64::new(UNKNOWN),
            extension: AtomicU64::new(0),
            ceiling: AtomicU64::new(UNKNOWN),
            resets_at: AtomicU64::new(0),
            last_spent_at: AtomicU64::new(0),
            discrepancy: AtomicI64::new(0),
            share: AtomicU64::new(UNKNOWN),
            may_overcommit: AtomicBool::new(true),
            foreign: Mutex::new(0),
            reported_remaining: ReportedRemaining::default(),
        }
    }
}

impl QuotaCell {
    /// Returns the quota at `now`. Ends the period first if its reset date has passed.
    pub(in crate::pool) fn load(&self, now: UnixMs) -> Quota {
        let resets_at = self.resets_at.load(Ordering::Acquire);
        if resets_at != 0 && resets_at <= now.0 {
            self.end_period(resets_at);
        }
        self.stored_quota().reset_if_due(now)
    }

    /// Starts a new period, unless another task has started it.
    #[cold]
    fn end_period(&self, resets_at: u64) {
        // If several tasks find the passed date, only the task that removes the date resets the count.
        if self.resets_at.compare_exchange(resets_at, 0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            // Requests in flight are charged in the new period.
            self.replace_count(|_| 0);
            self.reported_remaining.clear();
        }
    }

    /// Whether no credits remain at `now`. This check is cheaper than [`load`](Self::load), and returns `false` from
    /// the end of a period until [`load`](Self::load) starts the next period.
    pub(in crate::pool) fn is_exhausted(&self, now: UnixMs) -> bool {
        let ceiling = self.ceiling.load(Ordering::Acquire);
        if ceiling == UNKNOWN || self.spent.load(Ordering::Acquire) < ceiling {
            return false;
        }
        let resets_at = self.resets_at.load(Ordering::Acquire);
        resets_at == 0 || now.0 < resets_at
    }

    /// Returns the credits that requests in flight may still spend.
    pub(in crate::pool) fn reserved(&self) -> u64 {
        self.reserved.load(Ordering::Acquire)
    }

    /// Whether `credits` can be reserved so that at least `kept` credits remain.
    pub(in crate::pool) fn fits(&self, credits: u64, kept: u64) -> bool {
        not_below_zero(self.committed.load(Ordering::Acquire)).saturating_add(credits)
            <= self.max_committed(kept)
    }

    /// Returns the maximum of the sum of spent and reserved credits, so that `kept` credits remain unspent.
    fn max_committed(&self, kept: u64) -> u64 {
        let share = self.share.load(Ordering::Acquire);
        match self.ceiling.load(Ordering::Acquire) {
            UNKNOWN => share,
            ceiling => ceiling.saturating_sub(kept).min(share),
        }
    }

    /// Whether `credits` can be reserved within the share of this replica.
    pub(in crate::pool) fn fits_share(&self, credits: u64) -> bool {
        let committed = not_below_zero(self.committed.load(Ordering::Acquire));
        committed.saturating_add(credits) <= self.share.load(Ordering::Acquire)
    }

    /// Reserves `credits` within the share of this replica, if at least `kept` credits remain. If `kept` is `None`, the
    /// ceiling does not apply. Returns `false` and changes nothing if the credits do not suffice.
    pub(in crate::pool) fn reserve(&self, credits: u64, kept: Option<u64>) -> bool {
        let max_committed =
            kept.map_or_else(|| self.share.load(Ordering::Acquire), |kept| self.max_committed(kept));
        self.reserve_if(credits, |sum, _| sum <= max_committed)
    }

    /// Reserves `credits` beyond the ceiling, unless another request has reserved credits.
    pub(in crate::pool) fn overcommit(&self, credits: u64) -> bool {
        let may_overcommit = self.may_overcommit.load(Ordering::Acquire);
        self.reserve_if(credits, |_, reserved_before| may_overcommit && reserved_before == 0)
    }

    /// Whether [`overcommit`](Self::overcommit) would succeed.
    pub(in crate::pool) fn may_overcommit(&self) -> bool {
        self.reserved() == 0 && self.may_overcommit.load(Ordering::Acquire)
    }

    /// Reserves `credits` if `fits` accepts the new sum of spent and reserved credits and the credits that were
    /// reserved before.
    fn reserve_if(&self, credits: u64, fits: impl Fn(u64, u64) -> bool) -> bool {
        let reserved_before = self.reserved.fetch_add(credits, Ordering::AcqRel);
        let added = self.committed.fetch_update(Ordering::AcqRel, Ordering::Acquire, |committed| {
            let sum = not_below_zero(committed).saturating_add(credits);
            fits(sum, reserved_before).then(|| committed.wrapping_add(credits))
        });
        if added.is_err() {
            self.reserved.fetch_sub(credits, Ordering::AcqRel);
        }
        added.is_ok()
    }

    /// Replaces the reserved credits of a request with the credits that it has cost.
    pub(in crate::pool) fn finish_reservation(&self, finished: FinishedReservation, now: UnixMs) {
        if finished.spent > 0 {
            self.last_spent_at.fetch_max(now.0, Ordering::AcqRel);
        }
        self.committed.fetch_add(finished.spent.wrapping_sub(finished.reserved), Ordering::AcqRel);
        self.spent.fetch_add(finished.spent, Ordering::AcqRel);
        self.reserved.fetch_sub(finished.reserved, Ordering::AcqRel);
    }

    /// Applies the quota of a poll at `at`. Returns whether the limit, the extension or the reset date has changed.
    pub(in crate::pool) fn apply_poll(&self, polled: Quota, at: UnixMs, lag: Duration) -> bool {
        let previous_quota = self.stored_quota();
        let idle = at.since(UnixMs(self.last_spent_at.load(Ordering::Acquire)));
        self.record_discrepancy(previous_quota.discrepancy(polled, idle, lag));
        self.replace_count(|count| Quota { count, ..previous_quota }.reconcile(polled, idle, lag).count);
        self.set_limits(polled);
        let has_new_limits = Quota { count: 0, ..previous_quota } != Quota { count: 0, ..polled };
        if has_new_limits {
            self.reported_remaining.clear();
        }
        has_new_limits
    }

    /// Returns the sum of the differences by which the provider's counts of this period exceeded the count of the pool.
    /// The sum is negative if the provider's counts were lower.
    pub(in crate::pool) fn discrepancy(&self) -> i64 {
        self.discrepancy.load(Ordering::Acquire)
    }

    fn record_discrepancy(&self, discrepancy: BillingDiscrepancy) {
        let signed = |credits| i64::try_from(credits).unwrap_or(i64::MAX);
        match discrepancy {
            BillingDiscrepancy::Incomparable => self.discrepancy.store(0, Ordering::Release),
            BillingDiscrepancy::WithinLag => {}
            BillingDiscrepancy::ProviderHigher(excess) => {
                self.discrepancy.fetch_add(signed(excess), Ordering::AcqRel);
            }
            BillingDiscrepancy::ProviderLower(deficit) => {
                self.discrepancy.fetch_sub(signed(deficit), Ordering::AcqRel);
            }
        }
    }

    /// Restores a stored quota. The next count that the provider reports may lag behind the stored count, so `now`
    /// counts as the time of the last charge.
    pub(in crate::pool) fn restore(&self, quota: Quota, now: UnixMs) {
        self.last_spent_at.fetch_max(now.0, Ordering::AcqRel);
        self.replace_count(|_| quota.count);
        self.set_limits(quota);
    }

    /// Replaces the spent credits with the result of `new_count`. The difference counts as spent elsewhere.
    fn replace_count(&self, new_count: impl Fn(u64) -> u64) {
        self.replace_foreign(&mut self.lock_foreign(), new_count);
    }

    /// Replaces the spent credits with the result of `new_count`, and adds the difference to `foreign`.
    fn replace_foreign(&self, foreign: &mut i64, new_count: impl Fn(u64) -> u64) {
        let (Ok(count_before) | Err(count_before)) =
            self.spent.fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| Some(new_count(count)));
        let difference = new_count(count_before).wrapping_sub(count_before);
        self.committed.fetch_add(difference, Ordering::AcqRel);
        *foreign = foreign.wrapping_add(difference.cast_signed());
        // The credits that this replica may still reserve stay the same.
        let shift = |share: u64| (share != UNKNOWN).then(|| not_below_zero(share.wrapping_add(difference)));
        let _ = self.share.fetch_update(Ordering::AcqRel, Ordering::Acquire, shift);
    }

    fn lock_foreign(&self) -> MutexGuard<'_, i64> {
        self.foreign.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the credits by their origin.
    pub(in crate::pool) fn credit_use(&self) -> CreditUse {
        let foreign = self.lock_foreign();
        let spent = self.spent.load(Ordering::Acquire);
        CreditUse {
            charged_here: spent.cast_signed().wrapping_sub(*foreign),
            foreign: *foreign,
            reserved: self.reserved(),
        }
    }

    /// Applies the credits that were spent elsewhere, and the share of this replica.
    pub(in crate::pool) fn divide(&self, share: CreditShare, now: UnixMs) {
        let mut foreign = self.lock_foreign();
        let increase = share.foreign.saturating_sub(*foreign);
        if increase != 0 {
            self.replace_foreign(&mut foreign, |count| count.saturating_add_signed(increase));
        }
        if increase > 0 {
            self.last_spent_at.fetch_max(now.0, Ordering::AcqRel);
        }
        let max_committed = share.granted.map_or(UNKNOWN, |granted| {
            u64::try_from(granted.saturating_add(*foreign)).unwrap_or(0).min(UNKNOWN - 1)
        });
        self.share.store(max_committed, Ordering::Release);
        self.may_overcommit.store(share.may_overcommit, Ordering::Release);
    }

    fn set_limits(&self, quota: Quota) {
        let extension = match quota.extension {
            Extension::None => 0,
            Extension::Credits(credits) => credits.min(UNKNOWN - 1),
            Extension::Unlimited => UNKNOWN,
        };
        self.limit.store(quota.limit.map_or(UNKNOWN, |limit| limit.min(UNKNOWN - 1)), Ordering::Release);
        self.extension.store(extension, Ordering::Release);
        self.ceiling.store(quota.ceiling().unwrap_or(UNKNOWN), Ordering::Release);
        self.resets_at.store(quota.resets_at.map_or(0, |at| at.0), Ordering::Release);
    }

    fn stored_quota(&self) -> Quota {
        Quota { count: self.spent.load(Ordering::Acquire), ..self.limits() }
    }

    /// Returns the stored quota without its count.
    fn limits(&self) -> Quota {
        let unless_unknown = |word: u64, unknown: u64| (word != unknown).then_some(word);
        Quota {
            count: 0,
            limit: unless_unknown(self.limit.load(Ordering::Acquire), UNKNOWN),
            extension: match self.extension.load(Ordering::Acquire) {
                0 => Extension::None,
                UNKNOWN => Extension::Unlimited,
                credits => Extension::Credits(credits),
            },
            resets_at: unless_unknown(self.resets_at.load(Ordering::Acquire), 0).map(UnixMs),
        }
    }
}

/// Maps a sum that has wrapped below zero to zero. The remaining part of the concurrent change will raise the sum
/// again.
fn not_below_zero(sum: u64) -> u64 {
    if sum > u64::MAX / 2 { 0 } else { sum }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(50);

    fn quota_cell(count: u64, limit: u64) -> QuotaCell {
        let cell = QuotaCell::default();
        cell.restore(
            Quota { count, limit: Some(limit), resets_at: Some(UnixMs(100)), ..Quota::default() },
            NOW,
        );
        cell
    }

    fn charge(cell: &QuotaCell, reserved: u64, spent: u64) {
        cell.finish_reservation(FinishedReservation { reserved, spent }, NOW);
    }

    #[test]
    fn a_stored_quota_is_loaded_unchanged() {
        let cell = QuotaCell::default();
        assert_eq!(cell.load(UnixMs(5)), Quota::default());
        for extension in [Extension::None, Extension::Credits(7), Extension::Unlimited] {
            let quota = Quota { count: 3, limit: Some(10), extension, resets_at: Some(UnixMs(100)) };
            cell.restore(quota, NOW);
            assert_eq!(cell.load(UnixMs(99)), quota);
            assert!(!cell.is_exhausted(UnixMs(99)));
        }
    }

    #[test]
    fn the_last_credits_are_reserved_once() {
        let cell = quota_cell(90, 100);
        assert!(cell.reserve(6, Some(0)) && !cell.reserve(6, Some(0)) && cell.reserve(4, Some(0)));
        assert!(!cell.fits(1, 0) && cell.fits(0, 0));
        assert_eq!((cell.load(NOW).count, cell.reserved()), (90, 10));
        charge(&cell, 6, 3);
        charge(&cell, 4, 4);
        assert_eq!((cell.load(NOW).count, cell.reserved()), (97, 0));
        assert!(cell.fits(3, 0) && !cell.fits(4, 0) && !cell.fits(3, 1));
    }

    #[test]
    fn credits_are_used_up_until_the_period_ends() {
        assert!(!QuotaCell::default().is_exhausted(NOW));
        let cell = quota_cell(99, 100);
        assert!(!cell.is_exhausted(NOW));
        charge(&cell, 0, 1);
        assert!(cell.is_exhausted(NOW) && cell.load(NOW).is_exhausted());
        assert!(!cell.is_exhausted(UnixMs(100)) && !cell.load(UnixMs(100)).is_exhausted());
    }

    #[test]
    fn an_unknown_limit_and_an_unlimited_extension_fit_any_request() {
        assert!(QuotaCell::default().reserve(1 << 40, Some(5)));
        let cell = QuotaCell::default();
        let limit = Some(10);
        cell.restore(Quota { count: 10, limit, extension: Extension::Credits(5), ..Quota::default() }, NOW);
        assert!(cell.reserve(5, Some(0)) && !cell.reserve(1, Some(0)));
        cell.restore(Quota { count: 10, limit, extension: Extension::Unlimited, ..Quota::default() }, NOW);
        assert!(cell.reserve(1 << 40, Some(5)));
    }

    #[test]
    fn only_one_request_overcommits_at_a_time() {
        let cell = quota_cell(98, 100);
        assert!(cell.overcommit(5) && !cell.overcommit(5) && !cell.reserve(1, Some(0)));
        charge(&cell, 5, 1);
        assert_eq!(cell.load(NOW).count, 99);
        assert!(cell.reserve(1, Some(0)) && !cell.overcommit(5));
    }

    #[test]
    fn discrepancies_add_up_until_the_period_ends() {
        let cell = QuotaCell::default();
        let lag = Duration::from_millis(10);
        let polled = |count, resets_at| Quota {
            count,
            limit: Some(100),
            resets_at: Some(UnixMs(resets_at)),
            ..Quota::default()
        };
        let spend = |credits, at| {
            cell.finish_reservation(FinishedReservation { reserved: 0, spent: credits }, UnixMs(at))
        };
        cell.apply_poll(polled(7, 900), UnixMs(1), lag);
        assert_eq!(cell.discrepancy(), 0, "credits spent before the first poll must not count");
        spend(10, 2);
        cell.apply_poll(polled(20, 900), UnixMs(3), lag);
        cell.apply_poll(polled(20, 900), UnixMs(4), lag);
        assert_eq!(cell.discrepancy(), 3, "the three credits of other applications must count once");
        spend(5, 5);
        cell.apply_poll(polled(20, 900), UnixMs(14), lag);
        assert_eq!(
            (cell.discrepancy(), cell.load(UnixMs(14)).count),
            (3, 25),
            "a lower count of the provider within the lag must not change the discrepancy"
        );
        cell.apply_poll(polled(24, 900), UnixMs(15), lag);
        assert_eq!(
            (cell.discrepancy(), cell.load(UnixMs(15)).count),
            (2, 24),
            "a lower count of the provider after the lag must be applied"
        );
        cell.apply_poll(polled(30, 9_000), UnixMs(16), lag);
        assert_eq!(cell.discrepancy(), 0);
    }

    #[test]
    fn a_lagging_poll_does_not_lower_a_restored_count() {
        let cell = quota_cell(50, 100);
        let polled = Quota { count: 30, limit: Some(100), resets_at: Some(UnixMs(100)), ..Quota::default() };
        cell.apply_poll(polled, NOW, Duration::from_secs(1));
        assert_eq!(cell.load(NOW).count, 50);
    }

    #[test]
    fn a_period_ends_once_and_keeps_later_spending() {
        let cell = quota_cell(9, 10);
        assert!(cell.reserve(1, Some(0)));
        cell.reported_remaining.report(0, UnixMs(900), NOW);
        assert_eq!(cell.load(UnixMs(100)).count, 0);
        assert_eq!(cell.reported_remaining.credits(NOW), None);
        charge(&cell, 1, 1);
        assert!(cell.reserve(3, Some(0)));
        charge(&cell, 3, 3);
        assert_eq!(cell.load(UnixMs(500)).count, 4);
    }

    #[test]
    fn a_poll_keeps_reserved_credits() {
        let cell = quota_cell(10, 100);
        assert!(cell.reserve(5, Some(0)));
        let polled = Quota { count: 40, limit: Some(100), resets_at: Some(UnixMs(100)), ..Quota::default() };
        assert!(!cell.apply_poll(polled, NOW, Duration::from_secs(1)));
        assert_eq!((cell.load(NOW).count, cell.reserved()), (40, 5));
        cell.reported_remaining.report(3, UnixMs(900), NOW);
        assert!(cell.apply_poll(Quota { limit: Some(200), ..polled }, NOW, Duration::from_secs(1)));
        assert_eq!(cell.reported_remaining.credits(NOW), None);
    }
}
