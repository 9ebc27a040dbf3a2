//! Schedules probes: single requests that try a key, workspace or concurrency group during a
//! cooldown whose reason is not proven.

use std::time::Duration;

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::select::SHORT_WAIT;
use crate::policy::units::UnixMs;

/// The time of the next allowed probe.
#[derive(Debug, Default)]
pub(in crate::pool) struct ProbeCell {
    /// Time from which the next probe is allowed; 0: none is allowed.
    next: AtomicU64,
    /// Deadline for the result of the last probe; 0: it has arrived.
    result_due_at: AtomicU64,
}

/// A probe without a result is repeated after this multiple of the first pause.
const REPEAT_FACTOR: u32 = 5;

impl ProbeCell {
    /// Allows a probe once `after` has passed, unless one is scheduled already; `None` forbids
    /// probes.
    pub(in crate::pool) fn allow(&self, after: Option<Duration>, now: UnixMs) {
        self.result_due_at.store(0, Ordering::Release);
        let Some(after) = after else { return self.next.store(0, Ordering::Release) };
        let next = |at: u64| (at <= now.0).then(|| now.plus(after).0.max(1));
        let _ = self.next.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }

    /// The time at which a retry is worthwhile: the next probe is allowed, or the result of the
    /// last one is overdue. `None` when no probe is allowed.
    pub(in crate::pool) fn retry_at(&self, now: UnixMs) -> Option<UnixMs> {
        let result_due_at = UnixMs(self.result_due_at.load(Ordering::Acquire));
        self.at().map(|at| if result_due_at > now { at.min(result_due_at) } else { at })
    }

    /// The time from which the next probe is allowed.
    pub(in crate::pool) fn at(&self) -> Option<UnixMs> {
        Some(self.next.load(Ordering::Acquire)).filter(|at| *at > 0).map(UnixMs)
    }

    pub(in crate::pool) fn is_due(&self, now: UnixMs) -> bool {
        self.at().is_some_and(|at| at <= now)
    }

    /// Claims the probe that is due. Returns `false` when none is due, or another request claimed
    /// it first.
    pub(in crate::pool) fn claim(&self, pause: Duration, now: UnixMs) -> bool {
        let next = now.plus(pause * REPEAT_FACTOR).0;
        let is_due = |at: u64| (at > 0 && at <= now.0).then_some(next);
        let is_claimed = self.next.fetch_update(Ordering::AcqRel, Ordering::Acquire, is_due).is_ok();
        if is_claimed {
            self.result_due_at.store(now.plus(SHORT_WAIT).0, Ordering::Release);
        }
        is_claimed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_is_claimed_once_and_allowed_again_later() {
        let (cell, pause) = (ProbeCell::default(), Duration::from_millis(100));
        assert!(!cell.claim(pause, UnixMs(1_000)));
        cell.allow(Some(pause), UnixMs(900));
        cell.allow(Some(pause), UnixMs(950));
        assert!(!cell.is_due(UnixMs(999)) && cell.is_due(UnixMs(1_000)));
        assert_eq!(cell.retry_at(UnixMs(999)), Some(UnixMs(1_000)));
        let long = Duration::from_secs(60);
        assert!(cell.claim(long, UnixMs(1_000)) && !cell.claim(pause, UnixMs(1_499)));
        let overdue = UnixMs(1_000).plus(SHORT_WAIT);
        assert_eq!(cell.retry_at(UnixMs(1_000)), Some(overdue));
        // Without a result, a retry is worthwhile at the next probe.
        assert_eq!(cell.retry_at(overdue), Some(UnixMs(1_000).plus(long * REPEAT_FACTOR)));
        // The result has arrived.
        cell.allow(Some(pause), UnixMs(1_400));
        assert_eq!(cell.retry_at(UnixMs(1_500)), Some(UnixMs(301_000)));
        let cell = ProbeCell::default();
        cell.allow(Some(pause), UnixMs(900));
        assert!(cell.claim(pause, UnixMs(1_000)));
        // A refusal of the probe does not make the next one earlier.
        cell.allow(Some(pause), UnixMs(1_001));
        assert!(!cell.is_due(UnixMs(1_499)) && cell.claim(pause, UnixMs(1_500)));
        cell.allow(None, UnixMs(1_500));
        assert_eq!(cell.at(), None);
    }
}
