//! Limits the concurrent requests of one concurrency group of a workspace. Counts the running requests and their peak,
//! and computes their maximum from the provider's maximum and the share of this replica. Also stores the end of the
//! rate limit, and of the cooldown after a refusal for too many concurrent requests.

use std::time::Duration;

use super::super::sync::{AtomicU32, AtomicU64, Ordering};
use super::probe::ProbeCell;
use crate::policy::select::ConcurrencyState;
use crate::policy::units::UnixMs;

/// The stored form of a maximum or share that is unknown or does not apply.
const UNLIMITED: u32 = u32::MAX;

/// The limiter of one concurrency group of a workspace.
#[derive(Debug)]
pub(in crate::pool) struct ConcurrencyLimiter {
    /// The number of running requests in the lower half, and its peak since the last sample in the upper half.
    running: AtomicU64,
    /// The maximum number of running requests: the provider's maximum or the share of this replica, whichever is lower.
    max: AtomicU32,
    /// The maximum that the provider last reported to this or another replica, or 0 if it has reported none.
    reported_max: AtomicU32,
    /// The maximum of the plan, or 0 if it is unknown.
    plan_max: AtomicU32,
    /// The share of this replica: its maximum number of running requests, or [`UNLIMITED`] if the group is not divided
    /// between replicas.
    share: AtomicU32,
    /// End of the cooldown after a refusal because of too many concurrent requests, in Unix milliseconds, or 0 before
    /// such a refusal. It does not depend on the number of running requests, because other programs may also use the
    /// workspace.
    full_until: AtomicU64,
    /// End of the rate limit in Unix milliseconds, or 0 without a rate limit.
    limited_until: AtomicU64,
    /// Schedules probes of the rate limit.
    pub(in crate::pool) probe: ProbeCell,
}

/// The number of running requests of a group, now and at its peak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunningCount {
    /// The current number of running requests.
    pub running: u32,
    /// The highest number of running requests since the last sample.
    pub peak: u32,
}

impl RunningCount {
    #[expect(clippy::cast_possible_truncation, reason = "each half of the word is cast separately")]
    fn from_bits(word: u64) -> Self {
        Self { running: word as u32, peak: (word >> 32) as u32 }
    }

    fn to_bits(self) -> u64 {
        u64::from(self.peak) << 32 | u64::from(self.running)
    }
}

impl Default for ConcurrencyLimiter {
    fn default() -> Self {
        Self {
            running: AtomicU64::new(0),
            max: AtomicU32::new(UNLIMITED),
            reported_max: AtomicU32::new(0),
            plan_max: AtomicU32::new(0),
            share: AtomicU32::new(UNLIMITED),
            full_until: AtomicU64::new(0),
            limited_until: AtomicU64::new(0),
            probe: ProbeCell::default(),
        }
    }
}

impl ConcurrencyLimiter {
    /// Returns whether the group has capacity at `now`, and if not, why.
    pub(in crate::pool) fn state(&self, now: UnixMs) -> ConcurrencyState {
        let full_until = self.full_until.load(Ordering::Acquire);
        if full_until > now.0 {
            return ConcurrencyState::Full { until: Some(UnixMs(full_until)) };
        }
        let limited_until = self.limited_until.load(Ordering::Acquire);
        if limited_until > now.0 {
            return ConcurrencyState::Cooling { until: UnixMs(limited_until) };
        }
        if self.running() < self.max.load(Ordering::Acquire) {
            ConcurrencyState::Free
        } else {
            ConcurrencyState::Full { until: None }
        }
    }

    /// Sets or clears the rate limit of the group, and the delay after which one request may probe it. Without the
    /// delay, no request may probe it.
    pub(in crate::pool) fn set_rate_limit(
        &self,
        until: Option<UnixMs>,
        probe_after: Option<Duration>,
        now: UnixMs,
    ) {
        self.limited_until.store(until.map_or(0, |until| until.0), Ordering::Release);
        self.probe.schedule(probe_after.filter(|_| until.is_some()), now);
    }

    /// Acquires a slot. Returns `false` when no slot is available.
    pub(in crate::pool) fn try_acquire(&self) -> bool {
        let max = self.max.load(Ordering::Acquire);
        let increment = |word: u64| {
            let RunningCount { running, peak } = RunningCount::from_bits(word);
            let running = running.saturating_add(1);
            (running <= max).then(|| RunningCount { running, peak: peak.max(running) }.to_bits())
        };
        self.running.fetch_update(Ordering::AcqRel, Ordering::Acquire, increment).is_ok()
    }

    /// Releases an acquired slot.
    pub(in crate::pool) fn release(&self) {
        self.running.fetch_sub(1, Ordering::AcqRel);
    }

    /// Records the maximum that the provider reports. Returns whether the maximum has increased.
    pub(in crate::pool) fn set_reported_max(&self, max: u32) -> bool {
        // Nearly every response reports the same maximum. Writing it each time would invalidate the
        // cache line of all cores.
        if self.reported_max.load(Ordering::Acquire) == max {
            return false;
        }
        let previous_max = self.max.load(Ordering::Acquire);
        self.reported_max.store(max, Ordering::Release);
        self.update_max() > previous_max
    }

    /// Sets the maximum of the plan, or `None` if it is unknown.
    pub(in crate::pool) fn set_plan_max(&self, max: Option<u32>) {
        self.plan_max.store(max.unwrap_or(0), Ordering::Release);
        self.update_max();
    }

    /// Sets the share of this replica, or `None` if the group is not divided. Returns whether the maximum has
    /// increased.
    pub(in crate::pool) fn set_share(&self, share: Option<u32>) -> bool {
        let previous_max = self.max.load(Ordering::Acquire);
        self.share.store(share.unwrap_or(UNLIMITED), Ordering::Release);
        self.update_max() > previous_max
    }

    /// Records a refusal because of too many concurrent requests, which may report the maximum `max`, and starts a
    /// cooldown until `until`.
    pub(in crate::pool) fn record_refusal(&self, max: Option<u32>, until: UnixMs) {
        if let Some(max) = max.filter(|&max| max > 0) {
            self.set_reported_max(max);
        }
        self.full_until.fetch_max(until.0, Ordering::AcqRel);
    }

    /// Returns the number of running requests.
    pub(in crate::pool) fn running(&self) -> u32 {
        RunningCount::from_bits(self.running.load(Ordering::Acquire)).running
    }

    /// Returns the number of running requests and its peak since the previous call. Restarts the measurement of the
    /// peak.
    pub(in crate::pool) fn sample(&self) -> RunningCount {
        let restart_peak = |word| {
            let RunningCount { running, .. } = RunningCount::from_bits(word);
            Some(RunningCount { running, peak: running }.to_bits())
        };
        let (Ok(word) | Err(word)) =
            self.running.fetch_update(Ordering::AcqRel, Ordering::Acquire, restart_peak);
        RunningCount::from_bits(word)
    }

    /// Returns the provider's maximum number of concurrent requests, if it is known.
    pub(in crate::pool) fn known_max(&self) -> Option<u32> {
        let max = self.provider_max();
        (max != UNLIMITED).then_some(max)
    }

    fn provider_max(&self) -> u32 {
        match (self.reported_max.load(Ordering::Acquire), self.plan_max.load(Ordering::Acquire)) {
            (0, 0) => UNLIMITED,
            (0, plan_max) => plan_max,
            (reported, _) => reported,
        }
    }

    /// Computes, stores and returns the maximum after one of its inputs has changed.
    fn update_max(&self) -> u32 {
        loop {
            let max = self.provider_max().min(self.share.load(Ordering::Acquire));
            self.max.store(max, Ordering::Release);
            // A concurrent change of an input may have stored its maximum before this store.
            if max == self.provider_max().min(self.share.load(Ordering::Acquire)) {
                return max;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000);

    #[test]
    fn the_maximum_is_unknown_until_it_is_reported() {
        let limiter = ConcurrencyLimiter::default();
        assert!((0..100).all(|_| limiter.try_acquire()));
        assert_eq!(limiter.known_max(), None);
        limiter.set_plan_max(Some(3));
        assert_eq!(
            (limiter.known_max(), limiter.state(NOW)),
            (Some(3), ConcurrencyState::Full { until: None })
        );
        limiter.set_reported_max(200);
        assert!(limiter.state(NOW) == ConcurrencyState::Free && limiter.try_acquire());
    }

    #[test]
    fn a_released_slot_is_acquired_again() {
        let limiter = ConcurrencyLimiter::default();
        limiter.set_reported_max(2);
        assert!(limiter.try_acquire() && limiter.try_acquire() && !limiter.try_acquire());
        limiter.release();
        assert!(limiter.try_acquire());
        assert_eq!(limiter.running(), 2);
    }

    #[test]
    fn a_group_is_full_until_the_later_cooldown_of_two_refusals_ends() {
        let limiter = ConcurrencyLimiter::default();
        limiter.record_refusal(Some(4), UnixMs(2_000));
        limiter.record_refusal(None, UnixMs(1_500));
        assert_eq!(limiter.state(NOW), ConcurrencyState::Full { until: Some(UnixMs(2_000)) });
        assert_eq!((limiter.state(UnixMs(2_000)), limiter.known_max()), (ConcurrencyState::Free, Some(4)));
    }
}
