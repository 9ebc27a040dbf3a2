//! Stores the remaining credits that the provider reports when it refuses a request because of its cost.
//!
//! The report is about a workspace or about a key with its own quota. It is stored separately from the count of spent
//! credits in [`QuotaCell`](super::QuotaCell). While the report is current, it overrides that count.

use super::super::sync::{AtomicU64, Ordering};
use super::quota::FinishedReservation;
use crate::policy::units::UnixMs;

/// The stored form of remaining credits that were not reported.
const UNKNOWN: u64 = u64::MAX;

/// The reported remaining credits, on the scale of the pool's estimates. A request with a lower estimate may still be
/// served.
#[derive(Debug)]
pub(in crate::pool) struct ReportedRemaining {
    /// The remaining credits, or [`UNKNOWN`] without a report.
    credits: AtomicU64,
    /// Time at which the report expires, in Unix milliseconds.
    expires_at: AtomicU64,
}

/// The result of subtracting credits from a [`ReportedRemaining`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pool) enum ReportedDecrease {
    /// The credits were subtracted.
    Subtracted,
    /// There is no current report.
    NotReported,
    /// The remaining credits are fewer than the requested credits.
    Insufficient,
}

impl Default for ReportedRemaining {
    fn default() -> Self {
        Self { credits: AtomicU64::new(UNKNOWN), expires_at: AtomicU64::new(0) }
    }
}

impl ReportedRemaining {
    /// Returns the remaining credits at `now`. Returns `None` without a current report.
    pub(in crate::pool) fn credits(&self, now: UnixMs) -> Option<u64> {
        let credits = self.credits.load(Ordering::Acquire);
        (credits != UNKNOWN && now.0 < self.expires_at.load(Ordering::Acquire)).then_some(credits)
    }

    /// Returns the time at which the report expires. Returns `None` without a current report.
    pub(in crate::pool) fn expires_at(&self, now: UnixMs) -> Option<UnixMs> {
        self.credits(now).map(|_| UnixMs(self.expires_at.load(Ordering::Acquire)))
    }

    /// Records a report. While an earlier report is current, the lower number of credits is used, because requests may
    /// have spent credits that the later report still contains.
    pub(in crate::pool) fn report(&self, credits: u64, expires_at: UnixMs, now: UnixMs) {
        if self.credits(now).is_none() {
            self.clear();
        }
        self.expires_at.store(expires_at.0, Ordering::Release);
        self.credits.fetch_min(credits.min(UNKNOWN - 1), Ordering::AcqRel);
    }

    /// Removes the report.
    pub(in crate::pool) fn clear(&self) {
        self.credits.store(UNKNOWN, Ordering::Release);
    }

    /// Subtracts `credits` from a current report.
    pub(in crate::pool) fn decrease(&self, credits: u64, now: UnixMs) -> ReportedDecrease {
        if self.credits(now).is_none() {
            return ReportedDecrease::NotReported;
        }
        let decrease = |known: u64| if known == UNKNOWN { None } else { known.checked_sub(credits) };
        match self.credits.fetch_update(Ordering::AcqRel, Ordering::Acquire, decrease) {
            Ok(_) => ReportedDecrease::Subtracted,
            Err(UNKNOWN) => ReportedDecrease::NotReported,
            Err(_) => ReportedDecrease::Insufficient,
        }
    }

    /// Adds back the credits that were subtracted and not spent.
    pub(in crate::pool) fn finish_reservation(&self, finished: FinishedReservation) {
        let _ = self.credits.fetch_update(Ordering::AcqRel, Ordering::Acquire, |known| {
            let returned = known.saturating_add(finished.reserved).saturating_sub(finished.spent);
            Some(if known == UNKNOWN { known } else { returned.min(UNKNOWN - 1) })
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(50);

    #[test]
    fn requests_decrease_the_reported_remaining_credits() {
        let report = ReportedRemaining::default();
        assert_eq!(report.decrease(1_000, NOW), ReportedDecrease::NotReported);
        let expires_at = UnixMs(NOW.0 + 100);
        report.report(10, expires_at, NOW);
        report.report(12, expires_at, NOW);
        assert_eq!(
            (report.decrease(7, NOW), report.decrease(7, NOW)),
            (ReportedDecrease::Subtracted, ReportedDecrease::Insufficient)
        );
        report.finish_reservation(FinishedReservation { reserved: 7, spent: 4 });
        assert_eq!(report.credits(NOW), Some(6));
        report.finish_reservation(FinishedReservation { reserved: 0, spent: 9 });
        assert_eq!(report.credits(NOW), Some(0));
        // The report has expired, and the next report replaces it.
        assert_eq!(
            (report.credits(expires_at), report.decrease(5, expires_at)),
            (None, ReportedDecrease::NotReported)
        );
        report.report(50, UnixMs(expires_at.0 + 100), expires_at);
        assert_eq!(report.credits(expires_at), Some(50));
    }
}
