//! Limits the concurrent requests of one concurrency group of a workspace. Counts the running
//! requests, and holds their maximum and the end of a saturation or rate limit.

use std::time::Duration;

use super::super::sync::{AtomicU32, AtomicU64, Ordering};
use super::probe::ProbeCell;
use crate::policy::select::ConcurrencyState;
use crate::policy::units::UnixMs;

/// The limiter of one concurrency group of a workspace.
#[derive(Debug)]
pub(in crate::pool) struct ConcurrencyLimiter {
    running: AtomicU32,
    /// The maximum that the provider has reported, in a response or a refusal; 0: not reported yet.
    reported_max: AtomicU32,
    /// The maximum of the plan; 0: unknown.
    plan_max: AtomicU32,
    /// The group is saturated until then, after a refusal for too many concurrent requests. Our own
    /// count does not matter, because other programs may use the workspace, too.
    full_until: AtomicU64,
    /// The group is rate limited until then.
    limited_until: AtomicU64,
    probe: ProbeCell,
}

impl Default for ConcurrencyLimiter {
    fn default() -> Self {
        Self {
            running: AtomicU32::new(0),
            reported_max: AtomicU32::new(0),
            plan_max: AtomicU32::new(0),
            full_until: AtomicU64::new(0),
            limited_until: AtomicU64::new(0),
            probe: ProbeCell::default(),
        }
    }
}

impl ConcurrencyLimiter {
    /// Whether the group has capacity at `now`.
    pub(in crate::pool) fn state(&self, now: UnixMs) -> ConcurrencyState {
        let full_until = self.full_until.load(Ordering::Acquire);
        if full_until > now.0 {
            return ConcurrencyState::Full { until: Some(UnixMs(full_until)) };
        }
        let limited_until = self.limited_until.load(Ordering::Acquire);
        if limited_until > now.0 {
            return ConcurrencyState::Cooling { until: UnixMs(limited_until) };
        }
        if self.running() < self.max() {
            ConcurrencyState::Free
        } else {
            ConcurrencyState::Full { until: None }
        }
    }

    /// Sets or clears the rate limit of the group, and the delay after which one request may probe
    /// it.
    pub(in crate::pool) fn limit(&self, until: Option<UnixMs>, probe_after: Option<Duration>, now: UnixMs) {
        self.limited_until.store(until.map_or(0, |until| until.0), Ordering::Release);
        self.probe.allow(probe_after.filter(|_| until.is_some()), now);
    }

    pub(in crate::pool) fn probe(&self) -> &ProbeCell {
        &self.probe
    }

    /// Acquires a slot. Returns `false` when no slot is free.
    pub(in crate::pool) fn try_acquire(&self) -> bool {
        let max = self.max();
        let one_more = |running: u32| (running < max).then_some(running.saturating_add(1));
        self.running.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
    }

    pub(in crate::pool) fn release(&self) {
        self.running.fetch_sub(1, Ordering::AcqRel);
    }

    /// Records the maximum that the provider reports. Returns whether it has grown.
    pub(in crate::pool) fn set_reported_max(&self, max: u32) -> bool {
        // Every response reports the same maximum: writing it each time would invalidate the cache line
        // of all cores.
        if self.reported_max.load(Ordering::Acquire) == max {
            return false;
        }
        let before = self.max();
        self.reported_max.store(max, Ordering::Release);
        max > before
    }

    /// Sets the maximum of the plan.
    pub(in crate::pool) fn set_plan_max(&self, max: Option<u32>) {
        self.plan_max.store(max.unwrap_or(0), Ordering::Release);
    }

    /// Records a refusal for too many concurrent requests.
    pub(in crate::pool) fn record_refusal(&self, max: Option<u32>, until: UnixMs) {
        if let Some(max) = max.filter(|&max| max > 0) {
            self.set_reported_max(max);
        }
        self.full_until.fetch_max(until.0, Ordering::AcqRel);
    }

    pub(in crate::pool) fn running(&self) -> u32 {
        self.running.load(Ordering::Acquire)
    }

    /// The maximum of concurrent requests, when it is known.
    pub(in crate::pool) fn known_max(&self) -> Option<u32> {
        let max = self.max();
        (max != u32::MAX).then_some(max)
    }

    fn max(&self) -> u32 {
        match (self.reported_max.load(Ordering::Acquire), self.plan_max.load(Ordering::Acquire)) {
            (0, 0) => u32::MAX,
            (0, plan_max) => plan_max,
            (reported, _) => reported,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000);

    #[test]
    fn the_maximum_is_unknown_until_it_is_reported() {
        let cell = ConcurrencyLimiter::default();
        assert!((0..100).all(|_| cell.try_acquire()));
        assert_eq!(cell.known_max(), None);
        cell.set_plan_max(Some(3));
        assert_eq!((cell.known_max(), cell.state(NOW)), (Some(3), ConcurrencyState::Full { until: None }));
        cell.set_reported_max(200);
        assert!(cell.state(NOW) == ConcurrencyState::Free && cell.try_acquire());
    }

    #[test]
    fn a_released_slot_is_acquired_again() {
        let cell = ConcurrencyLimiter::default();
        cell.set_reported_max(2);
        assert!(cell.try_acquire() && cell.try_acquire() && !cell.try_acquire());
        cell.release();
        assert!(cell.try_acquire());
        assert_eq!(cell.running(), 2);
    }

    #[test]
    fn a_refusal_saturates_the_group_and_reports_its_maximum() {
        let cell = ConcurrencyLimiter::default();
        cell.record_refusal(Some(4), UnixMs(2_000));
        cell.record_refusal(None, UnixMs(1_500));
        assert_eq!(cell.state(NOW), ConcurrencyState::Full { until: Some(UnixMs(2_000)) });
        assert_eq!((cell.state(UnixMs(2_000)), cell.known_max()), (ConcurrencyState::Free, Some(4)));
    }
}
