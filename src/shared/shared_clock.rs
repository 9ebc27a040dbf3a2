//! Converts between the clock of this process and the clock of Redis, which is the clock of all times that replicas
//! send to each other. The clocks of the replicas may differ by hours.

use std::time::{Duration, Instant};

use crate::clock;
use crate::policy::units::UnixMs;

/// One moment on the two clocks of this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    /// The date and time.
    pub(super) now: UnixMs,
    /// The monotonic clock, for leases.
    pub(super) instant: Instant,
}

impl Moment {
    /// Reads both clocks.
    pub(super) fn current() -> Self {
        Self { now: clock::now(), instant: clock::instant() }
    }
}

/// The offset between the clock of Redis and that of this process, from the sample with the shortest round trip.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SharedClock {
    best: Option<ClockSample>,
}

/// One reading of the clock of Redis.
#[derive(Clone, Copy, Debug)]
struct ClockSample {
    /// The time of Redis minus the time of this process, in milliseconds.
    offset_ms: i64,
    round_trip: Duration,
    taken_at: Instant,
}

/// The age from which any newer sample replaces the best sample, because clocks drift.
const MAX_SAMPLE_AGE: Duration = Duration::from_secs(60);
/// A new offset that differs by more than this time replaces the former offset at once, because a clock was set or
/// another server responded.
const MAX_DRIFT: Duration = Duration::from_secs(1);

impl SharedClock {
    /// Records the time `redis_ms` in a reply of Redis, whose command was sent at `sent_at` and which arrived at
    /// `received_at`.
    pub(super) fn record(&mut self, redis_ms: u64, sent_at: Moment, received_at: Moment) {
        let round_trip = received_at.instant.saturating_duration_since(sent_at.instant);
        let half_round_trip = u64::try_from(round_trip.as_millis() / 2).unwrap_or(u64::MAX);
        let local_ms = sent_at.now.0.saturating_add(half_round_trip);
        let offset_ms = redis_ms.cast_signed().saturating_sub(local_ms.cast_signed());
        let sample = ClockSample { offset_ms, round_trip, taken_at: received_at.instant };
        let is_replaced = self.best.is_none_or(|best| {
            let is_old = received_at.instant.saturating_duration_since(best.taken_at) >= MAX_SAMPLE_AGE;
            let difference = Duration::from_millis(best.offset_ms.abs_diff(offset_ms));
            round_trip <= best.round_trip || is_old || difference > MAX_DRIFT + round_trip
        });
        if is_replaced {
            self.best = Some(sample);
        }
    }

    /// Converts a local time to the time of Redis, in milliseconds since 1970.
    pub(super) fn to_shared(self, local: UnixMs) -> u64 {
        local.0.saturating_add_signed(self.offset_ms())
    }

    /// Converts a time of Redis to the local time.
    pub(super) fn to_local(self, shared_ms: u64) -> UnixMs {
        UnixMs(shared_ms.saturating_add_signed(self.offset_ms().saturating_neg()))
    }

    /// Returns the offset, or 0 before the first sample.
    fn offset_ms(self) -> i64 {
        self.best.map_or(0, |best| best.offset_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the moment `ms` milliseconds after `start`.
    fn moment_after(start: Instant, ms: u64) -> Moment {
        Moment { now: UnixMs(1_000_000 + ms), instant: start + Duration::from_millis(ms) }
    }

    #[test]
    fn the_sample_with_the_shortest_round_trip_counts() {
        let start = Moment::current().instant;
        let mut clock = SharedClock::default();
        assert_eq!(clock.to_shared(UnixMs(5)), 5, "the offset must be 0 before the first sample");
        clock.record(4_600_050, moment_after(start, 0), moment_after(start, 100));
        assert_eq!(clock.to_shared(UnixMs(1_000_000)), 4_600_000);
        clock.record(4_600_110, moment_after(start, 100), moment_after(start, 300));
        assert_eq!(clock.to_shared(UnixMs(1_000_000)), 4_600_000, "a slow sample must not count");
        clock.record(4_600_305, moment_after(start, 300), moment_after(start, 302));
        assert_eq!(clock.to_shared(UnixMs(1_000_000)), 4_600_004, "a faster sample must count");
        assert_eq!(clock.to_local(4_600_004), UnixMs(1_000_000));
    }

    #[test]
    fn a_clock_that_was_set_and_an_old_sample_are_replaced() {
        let start = Moment::current().instant;
        let mut clock = SharedClock::default();
        clock.record(1_000_001, moment_after(start, 0), moment_after(start, 2));
        clock.record(3_000_150, moment_after(start, 100), moment_after(start, 200));
        assert_eq!(clock.to_shared(UnixMs(1_000_150)), 3_000_150, "a clock that was set must be followed");
        clock.record(3_061_200, moment_after(start, 61_000), moment_after(start, 61_400));
        assert_eq!(clock.to_shared(UnixMs(1_061_200)), 3_061_200, "a sample of 61 s must be replaced");
    }
}
