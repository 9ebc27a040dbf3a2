//! Schedules probes. A probe is a single request that tries a key, a workspace or a concurrency group during a cooldown
//! whose reason is unproven.

use std::time::Duration;

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::select::SHORT_WAIT;
use crate::policy::units::UnixMs;

/// The schedule of the probes of one cooldown.
#[derive(Debug, Default)]
pub(in crate::pool) struct ProbeCell {
    /// Unix milliseconds from which the next probe is allowed, or 0 if probes are forbidden.
    allowed_at: AtomicU64,
    /// Unix milliseconds by which the result of the last probe is expected, or 0 if no result is pending.
    result_due_at: AtomicU64,
}

/// The factor of the delay of the first probe. A probe without a result is repeated after the product.
const REPEAT_FACTOR: u32 = 5;

impl ProbeCell {
    /// Schedules a probe after `delay`, unless a probe is scheduled for a time after `now`. If `delay` is `None`,
    /// probes are forbidden. The result of the last probe is not pending afterwards.
    pub(in crate::pool) fn schedule(&self, delay: Option<Duration>, now: UnixMs) {
        self.result_due_at.store(0, Ordering::Release);
        let Some(delay) = delay else { return self.allowed_at.store(0, Ordering::Release) };
        let reschedule = |at: u64| (at <= now.0).then(|| now.plus(delay).0.max(1));
        let _ = self.allowed_at.fetch_update(Ordering::AcqRel, Ordering::Acquire, reschedule);
    }

    /// Returns the time at which a retry may succeed, because the next probe is allowed or the result of the last probe
    /// is overdue. Returns `None` when probes are forbidden.
    pub(in crate::pool) fn retry_at(&self, now: UnixMs) -> Option<UnixMs> {
        let result_due_at = UnixMs(self.result_due_at.load(Ordering::Acquire));
        self.allowed_at().map(|at| if result_due_at > now { at.min(result_due_at) } else { at })
    }

    /// Returns the time from which the next probe is allowed. Returns `None` when probes are forbidden.
    pub(in crate::pool) fn allowed_at(&self) -> Option<UnixMs> {
        Some(self.allowed_at.load(Ordering::Acquire)).filter(|at| *at > 0).map(UnixMs)
    }

    /// Whether a probe is allowed at `now`.
    pub(in crate::pool) fn is_due(&self, now: UnixMs) -> bool {
        self.allowed_at().is_some_and(|at| at <= now)
    }

    /// Claims the due probe. `delay` is the delay of the first probe. Returns `false` when no probe is due or another
    /// request has claimed it first.
    pub(in crate::pool) fn claim(&self, delay: Duration, now: UnixMs) -> bool {
        let next_allowed_at = now.plus(delay * REPEAT_FACTOR).0;
        let postpone_if_due = |at: u64| (at > 0 && at <= now.0).then_some(next_allowed_at);
        let is_claimed =
            self.allowed_at.fetch_update(Ordering::AcqRel, Ordering::Acquire, postpone_if_due).is_ok();
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
        let (cell, delay) = (ProbeCell::default(), Duration::from_millis(100));
        assert!(!cell.claim(delay, UnixMs(1_000)));
        cell.schedule(Some(delay), UnixMs(900));
        cell.schedule(Some(delay), UnixMs(950));
        assert!(!cell.is_due(UnixMs(999)) && cell.is_due(UnixMs(1_000)));
        assert_eq!(cell.retry_at(UnixMs(999)), Some(UnixMs(1_000)));
        let long_delay = Duration::from_secs(60);
        assert!(cell.claim(long_delay, UnixMs(1_000)) && !cell.claim(delay, UnixMs(1_499)));
        let overdue = UnixMs(1_000).plus(SHORT_WAIT);
        assert_eq!(cell.retry_at(UnixMs(1_000)), Some(overdue));
        // Without a result, the next probe is the next retry.
        assert_eq!(cell.retry_at(overdue), Some(UnixMs(1_000).plus(long_delay * REPEAT_FACTOR)));
        // The result has arrived.
        cell.schedule(Some(delay), UnixMs(1_400));
        assert_eq!(cell.retry_at(UnixMs(1_500)), Some(UnixMs(301_000)));
        let cell = ProbeCell::default();
        cell.schedule(Some(delay), UnixMs(900));
        assert!(cell.claim(delay, UnixMs(1_000)));
        // A refusal of the probe does not make the next probe earlier.
        cell.schedule(Some(delay), UnixMs(1_001));
        assert!(!cell.is_due(UnixMs(1_499)) && cell.claim(delay, UnixMs(1_500)));
        cell.schedule(None, UnixMs(1_500));
        assert_eq!(cell.allowed_at(), None);
    }
}
