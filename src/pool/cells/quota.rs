//! A workspace's credits: those spent, those reserved by requests in flight, and the ceiling of
//! both.
//!
//! One word holds the sum of spent and reserved credits, so that the last credits are reserved once:
//! reserving is one compare-and-swap against the ceiling.
//! Spent and reserved credits also have a word each, for readers. Every change is added to the sum as a
//! difference, so that concurrent changes may be applied in any order.

use std::time::Duration;

use super::super::sync::{AtomicI64, AtomicU64, Ordering};
use crate::policy::budget::{BillingDiscrepancy, Extension, Quota};
use crate::policy::units::UnixMs;

const UNKNOWN: u64 = u64::MAX;

/// The credits of a workspace. The sum changes with every request; the other fields change only with a
/// poll.
#[derive(Debug)]
pub(in crate::pool) struct QuotaCell {
    /// Sum of spent and reserved credits. Differences wrap, so it may be below zero for a moment.
    committed: AtomicU64,
    /// The spent part of the sum.
    spent: AtomicU64,
    /// The part of the sum that requests in flight have reserved.
    reserved: AtomicU64,
    /// [`UNKNOWN`] until reported.
    limit: AtomicU64,
    /// 0: none; [`UNKNOWN`]: unlimited.
    extension: AtomicU64,
    /// 0: unknown.
    resets_at: AtomicU64,
    last_spent: AtomicU64,
    /// Sum of the differences by which the provider's figures of this period exceeded ours.
    drift: AtomicI64,
    reported: ReportedRemaining,
}

/// The end of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pool) struct SettledReservation {
    /// Credits that were reserved.
    pub(in crate::pool) reserved: u64,
    /// Credits that were spent.
    pub(in crate::pool) spent: u64,
}

impl Default for QuotaCell {
    fn default() -> Self {
        Self {
            committed: AtomicU64::new(0),
            spent: AtomicU64::new(0),
            reserved: AtomicU64::new(0),
            limit: AtomicU64::new(UNKNOWN),
            extension: AtomicU64::new(0),
            resets_at: AtomicU64::new(0),
            last_spent: AtomicU64::new(0),
            drift: AtomicI64::new(0),
            reported: ReportedRemaining::default(),
        }
    }
}

impl QuotaCell {
    /// Returns the quota at `now`. Ends the period first if its reset date has passed.
    pub(in crate::pool) fn load(&self, now: UnixMs) -> Quota {
        let resets_at = self.resets_at.load(Ordering::Acquire);
        // Only the task that removes the date resets the count.
        if resets_at != 0
            && resets_at <= now.0
            && self.resets_at.compare_exchange(resets_at, 0, Ordering::AcqRel, Ordering::Acquire).is_ok()
        {
            // Requests in flight are charged in the new period.
            self.replace_count(|_| 0);
            self.reported.clear();
        }
        self.peek().at(now)
    }

    /// Credits that requests in flight may still spend.
    pub(in crate::pool) fn reserved(&self) -> u64 {
        self.reserved.load(Ordering::Acquire)
    }

    /// The remaining credits that the provider reported when it last refused a request for its price.
    pub(in crate::pool) fn reported(&self) -> &ReportedRemaining {
        &self.reported
    }

    /// Whether `credits` more fit below the ceiling, with `kept` left over.
    pub(in crate::pool) fn fits(&self, credits: u64, kept: u64) -> bool {
        let sum = not_below_zero(self.committed.load(Ordering::Acquire)).saturating_add(credits);
        self.ceiling().is_none_or(|ceiling| sum <= ceiling.saturating_sub(kept))
    }

    /// Reserves `credits` if they fit with `kept` left over, or unconditionally when `kept` is
    /// `None`. Returns `false` and changes nothing when they do not fit.
    pub(in crate::pool) fn reserve(&self, credits: u64, kept: Option<u64>) -> bool {
        let ceiling = kept.and_then(|kept| Some(self.ceiling()?.saturating_sub(kept)));
        self.reserve_if(credits, |sum, _| ceiling.is_none_or(|ceiling| sum <= ceiling))
    }

    /// Reserves `credits` without regard to the ceiling, if no other request has reserved any.
    pub(in crate::pool) fn overcommit(&self, credits: u64) -> bool {
        self.reserve_if(credits, |_, others| others == 0)
    }

    fn reserve_if(&self, credits: u64, fits: impl Fn(u64, u64) -> bool) -> bool {
        let others = self.reserved.fetch_add(credits, Ordering::AcqRel);
        let added = self.committed.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            let sum = not_below_zero(word).saturating_add(credits);
            fits(sum, others).then(|| word.wrapping_add(credits))
        });
        if added.is_err() {
            self.reserved.fetch_sub(credits, Ordering::AcqRel);
        }
        added.is_ok()
    }

    /// Ends a reservation.
    pub(in crate::pool) fn settle(&self, settled: SettledReservation, now: UnixMs) {
        if settled.spent > 0 {
            self.last_spent.fetch_max(now.0, Ordering::AcqRel);
        }
        self.committed.fetch_add(settled.spent.wrapping_sub(settled.reserved), Ordering::AcqRel);
        self.spent.fetch_add(settled.spent, Ordering::AcqRel);
        self.reserved.fetch_sub(settled.reserved, Ordering::AcqRel);
    }

    /// Adopts the provider's figures. Returns whether they start a new period or set a new limit.
    pub(in crate::pool) fn adopt(&self, polled: Quota, now: UnixMs, lag: Duration) -> bool {
        let before = self.peek();
        let idle = now.since(UnixMs(self.last_spent.load(Ordering::Acquire)));
        self.record_drift(before.drift(polled, idle, lag));
        self.replace_count(|count| Quota { count, ..before }.adopt(polled, idle, lag).count);
        self.set_limits(polled);
        let is_new = Quota { count: 0, ..before } != Quota { count: 0, ..polled };
        if is_new {
            self.reported.clear();
        }
        is_new
    }

    /// Sum of the differences by which the provider's figures of this period exceeded ours; negative when
    /// they were lower.
    pub(in crate::pool) fn drift(&self) -> i64 {
        self.drift.load(Ordering::Acquire)
    }

    fn record_drift(&self, drift: BillingDiscrepancy) {
        let credits = |credits| i64::try_from(credits).unwrap_or(i64::MAX);
        match drift {
            BillingDiscrepancy::Fresh => self.drift.store(0, Ordering::Release),
            BillingDiscrepancy::Within => {}
            BillingDiscrepancy::Above(excess) => {
                self.drift.fetch_add(credits(excess), Ordering::AcqRel);
            }
            BillingDiscrepancy::Below(deficit) => {
                self.drift.fetch_sub(credits(deficit), Ordering::AcqRel);
            }
        }
    }

    /// Restores stored figures at `now`. Credits spent shortly before may be missing in the provider's
    /// figure for a while.
    pub(in crate::pool) fn restore(&self, quota: Quota, now: UnixMs) {
        self.last_spent.fetch_max(now.0, Ordering::AcqRel);
        self.replace_count(|_| quota.count);
        self.set_limits(quota);
    }

    /// Replaces the count of spent credits.
    fn replace_count(&self, count: impl Fn(u64) -> u64) {
        let before = self.spent.fetch_update(Ordering::AcqRel, Ordering::Acquire, |spent| Some(count(spent)));
        let before = before.unwrap_or_else(|spent| spent);
        self.committed.fetch_add(count(before).wrapping_sub(before), Ordering::AcqRel);
    }

    fn set_limits(&self, quota: Quota) {
        let extension = match quota.extension {
            Extension::None => 0,
            Extension::Credits(more) => more.min(UNKNOWN - 1),
            Extension::Unlimited => UNKNOWN,
        };
        self.limit.store(quota.limit.map_or(UNKNOWN, |limit| limit.min(UNKNOWN - 1)), Ordering::Release);
        self.extension.store(extension, Ordering::Release);
        self.resets_at.store(quota.resets_at.map_or(0, |at| at.0), Ordering::Release);
    }

    fn ceiling(&self) -> Option<u64> {
        self.limits().ceiling()
    }

    fn peek(&self) -> Quota {
        Quota { count: self.spent.load(Ordering::Acquire), ..self.limits() }
    }

    fn limits(&self) -> Quota {
        let known = |word: u64, unknown: u64| (word != unknown).then_some(word);
        Quota {
            count: 0,
            limit: known(self.limit.load(Ordering::Acquire), UNKNOWN),
            extension: match self.extension.load(Ordering::Acquire) {
                0 => Extension::None,
                UNKNOWN => Extension::Unlimited,
                more => Extension::Credits(more),
            },
            resets_at: known(self.resets_at.load(Ordering::Acquire), 0).map(UnixMs),
        }
    }
}

/// Maps a sum below zero to zero: other differences are still to be added to it.
fn not_below_zero(word: u64) -> u64 {
    if word > u64::MAX / 2 { 0 } else { word }
}

/// The result of taking credits from a [`ReportedRemaining`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pool) enum ReportedDecrease {
    /// The credits were taken.
    Taken,
    /// No report is in force.
    Unreported,
    /// Too few credits are left.
    TooFew,
}

/// The remaining credits that the provider reported when it refused a request for its price, in the
/// units of our estimates. A smaller request may still be served. The report is about a workspace,
/// or about a key with its own cap.
#[derive(Debug)]
pub(in crate::pool) struct ReportedRemaining {
    left: AtomicU64,
    /// End of the report; 0 when there is none.
    until: AtomicU64,
}

impl Default for ReportedRemaining {
    fn default() -> Self {
        Self { left: AtomicU64::new(UNKNOWN), until: AtomicU64::new(0) }
    }
}

impl ReportedRemaining {
    /// The remaining credits at `now`. `None` when no report is in force.
    pub(in crate::pool) fn left(&self, now: UnixMs) -> Option<u64> {
        let left = self.left.load(Ordering::Acquire);
        (left != UNKNOWN && now.0 < self.until.load(Ordering::Acquire)).then_some(left)
    }

    /// The time at which the report expires. `None` when none is in force.
    pub(in crate::pool) fn ends_at(&self, now: UnixMs) -> Option<UnixMs> {
        self.left(now).map(|_| UnixMs(self.until.load(Ordering::Acquire)))
    }

    /// Records a report. While an earlier report is in force, the lower one counts: some credits of
    /// the later one may have been spent since.
    pub(in crate::pool) fn report(&self, left: u64, until: UnixMs, now: UnixMs) {
        if self.left(now).is_none() {
            self.clear();
        }
        self.until.store(until.0, Ordering::Release);
        self.left.fetch_min(left.min(UNKNOWN - 1), Ordering::AcqRel);
    }

    pub(in crate::pool) fn clear(&self) {
        self.left.store(UNKNOWN, Ordering::Release);
    }

    /// Takes `credits` from the reported remainder, if there is one.
    pub(in crate::pool) fn take(&self, credits: u64, now: UnixMs) -> ReportedDecrease {
        if self.left(now).is_none() {
            return ReportedDecrease::Unreported;
        }
        let take = |left: u64| if left == UNKNOWN { None } else { left.checked_sub(credits) };
        match self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, take) {
            Ok(_) => ReportedDecrease::Taken,
            Err(UNKNOWN) => ReportedDecrease::Unreported,
            Err(_) => ReportedDecrease::TooFew,
        }
    }

    /// Returns credits that were taken and not spent.
    pub(in crate::pool) fn settle(&self, settled: SettledReservation) {
        update(&self.left, |left| {
            let returned =
                left.saturating_add(settled.reserved).saturating_sub(settled.spent).min(UNKNOWN - 1);
            if left == UNKNOWN { left } else { returned }
        });
    }
}

fn update(word: &AtomicU64, change: impl Fn(u64) -> u64) {
    let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |value| Some(change(value)));
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

    fn settle(cell: &QuotaCell, reserved: u64, spent: u64) {
        cell.settle(SettledReservation { reserved, spent }, NOW);
    }

    #[test]
    fn a_stored_quota_is_loaded_unchanged() {
        let cell = QuotaCell::default();
        assert_eq!(cell.load(UnixMs(5)), Quota::default());
        for extension in [Extension::None, Extension::Credits(7), Extension::Unlimited] {
            let quota = Quota { count: 3, limit: Some(10), extension, resets_at: Some(UnixMs(100)) };
            cell.restore(quota, NOW);
            assert_eq!(cell.load(UnixMs(99)), quota);
        }
    }

    #[test]
    fn the_last_credits_are_reserved_once() {
        let cell = quota_cell(90, 100);
        assert!(cell.reserve(6, Some(0)) && !cell.reserve(6, Some(0)) && cell.reserve(4, Some(0)));
        assert!(!cell.fits(1, 0) && cell.fits(0, 0));
        assert_eq!((cell.load(NOW).count, cell.reserved()), (90, 10));
        settle(&cell, 6, 3);
        settle(&cell, 4, 4);
        assert_eq!((cell.load(NOW).count, cell.reserved()), (97, 0));
        assert!(cell.fits(3, 0) && !cell.fits(4, 0) && !cell.fits(3, 1));
    }

    #[test]
    fn an_unknown_limit_and_unlimited_overage_fit_any_request() {
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
        settle(&cell, 5, 1);
        assert_eq!(cell.load(NOW).count, 99);
        assert!(cell.reserve(1, Some(0)) && !cell.overcommit(5));
    }

    #[test]
    fn a_drift_adds_up_until_the_period_ends() {
        let cell = QuotaCell::default();
        let lag = Duration::from_millis(10);
        let polled = |count, reset| Quota {
            count,
            limit: Some(100),
            resets_at: Some(UnixMs(reset)),
            ..Quota::default()
        };
        let spend = |credits, at| cell.settle(SettledReservation { reserved: 0, spent: credits }, UnixMs(at));
        cell.adopt(polled(7, 900), UnixMs(1), lag);
        assert_eq!(cell.drift(), 0, "credits spent before the start are no drift");
        spend(10, 2);
        cell.adopt(polled(20, 900), UnixMs(3), lag);
        cell.adopt(polled(20, 900), UnixMs(4), lag);
        assert_eq!(cell.drift(), 3, "three of them are not ours");
        spend(5, 5);
        cell.adopt(polled(20, 900), UnixMs(14), lag);
        assert_eq!((cell.drift(), cell.load(UnixMs(14)).count), (3, 25), "it may lag");
        cell.adopt(polled(24, 900), UnixMs(15), lag);
        assert_eq!((cell.drift(), cell.load(UnixMs(15)).count), (2, 24), "it has settled");
        cell.adopt(polled(30, 9_000), UnixMs(16), lag);
        assert_eq!(cell.drift(), 0);
    }

    #[test]
    fn restored_spending_is_not_returned_at_once() {
        let cell = quota_cell(50, 100);
        let polled = Quota { count: 30, limit: Some(100), resets_at: Some(UnixMs(100)), ..Quota::default() };
        cell.adopt(polled, NOW, Duration::from_secs(1));
        assert_eq!(cell.load(NOW).count, 50);
    }

    #[test]
    fn a_period_ends_once_and_keeps_later_spending() {
        let cell = quota_cell(9, 10);
        assert!(cell.reserve(1, Some(0)));
        cell.reported().report(0, UnixMs(900), NOW);
        assert_eq!(cell.load(UnixMs(100)).count, 0);
        assert_eq!(cell.reported().left(NOW), None);
        settle(&cell, 1, 1);
        assert!(cell.reserve(3, Some(0)));
        settle(&cell, 3, 3);
        assert_eq!(cell.load(UnixMs(500)).count, 4);
    }

    #[test]
    fn adopted_figures_keep_reserved_credits() {
        let cell = quota_cell(10, 100);
        assert!(cell.reserve(5, Some(0)));
        let polled = Quota { count: 40, limit: Some(100), resets_at: Some(UnixMs(100)), ..Quota::default() };
        assert!(!cell.adopt(polled, NOW, Duration::from_secs(1)));
        assert_eq!((cell.load(NOW).count, cell.reserved()), (40, 5));
        cell.reported().report(3, UnixMs(900), NOW);
        assert!(cell.adopt(Quota { limit: Some(200), ..polled }, NOW, Duration::from_secs(1)));
        assert_eq!(cell.reported().left(NOW), None);
    }

    #[test]
    fn reported_remaining_credits_are_taken_by_requests() {
        let reported = ReportedRemaining::default();
        assert_eq!(reported.take(1_000, NOW), ReportedDecrease::Unreported);
        let until = UnixMs(NOW.0 + 100);
        reported.report(10, until, NOW);
        reported.report(12, until, NOW);
        assert_eq!(
            (reported.take(7, NOW), reported.take(7, NOW)),
            (ReportedDecrease::Taken, ReportedDecrease::TooFew)
        );
        reported.settle(SettledReservation { reserved: 7, spent: 4 });
        assert_eq!(reported.left(NOW), Some(6));
        reported.settle(SettledReservation { reserved: 0, spent: 9 });
        assert_eq!(reported.left(NOW), Some(0));
        // The report expires with the refusal, and the next one replaces it.
        assert_eq!((reported.left(until), reported.take(5, until)), (None, ReportedDecrease::Unreported));
        reported.report(50, UnixMs(until.0 + 100), until);
        assert_eq!(reported.left(until), Some(50));
    }
}
