//! Converts between the clock of this process and the clock of Redis, by which replicas state times to each other.
//! The clocks of the replicas may differ by hours.

use std::time::{Duration, Instant};

use crate::policy::units::UnixMs;

/// One moment on both clocks of this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    /// The date and time.
    pub(super) now: UnixMs,
    /// The monotonic clock, for leases.
    pub(super) instant: Instant,
}

/// The offset between the clock of Redis and that of this process, from the sample with the shortest round trip.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SharedClock {
    best: Option<Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// The difference: the clock of Redis minus the clock of this process, in milliseconds.
    offset_ms: i64,
    round_trip: Duration,
    taken_at: Instant,
}

/// The age from which any newer sample replaces a sample, because clocks drift.
const MAX_SAMPLE_AGE: Duration = Duration::from_secs(60);
/// A new offset that differs by more than this time replaces the former offset at once, because a clock was set or
/// another server responded.
const STEP: Duration = Duration::from_secs(1);

impl SharedClock {
    /// Records the time `redis_ms` in a reply of Redis, whose command was sent at `sent_at` and which arrived at
    /// `received_at`.
    pub(super) fn record(&mut self, redis_ms: u64, sent_at: Moment, received_at: Moment) {
        let round_trip = received_at.instant.saturating_duration_since(sent_at.instant);
        let half = u64::try_from(round_trip.as_millis() / 2).unwrap_or(u64::MAX);
        let local = sent_at.now.0.saturating_add(half);
        let offset_ms = redis_ms.cast_signed().saturating_sub(local.cast_signed());
        let sample = Sample { offset_ms, round_trip, taken_at: received_at.instant };
        let is_replaced = self.best.is_none_or(|best| {
            let is_old = received_at.instant.saturating_duration_since(best.taken_at) >= MAX_SAMPLE_AGE;
            let difference = Duration::from_millis(best.offset_ms.abs_diff(offset_ms));
            round_trip <= best.round_trip || is_old || difference > STEP + round_trip
        });
        if is_replaced {
            self.best = Some(sample);
        }
    }

    /// Returns the time of Redis at a local time, in milliseconds since 1970.
    pub(super) fn to_shared(self, local: UnixMs) -> u64 {
        local.0.saturating_add_signed(self.offset_ms())
    }

    /// Returns the local time at a time of Redis.
    pub(super) fn to_local(self, shared_ms: u64) -> UnixMs {
        UnixMs(shared_ms.saturating_add_signed(self.offset_ms().saturating_neg()))
    }

    fn offset_ms(self) -> i64 {
        self.best.map_or(0, |best| best.offset_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    fn moment(start: Instant, ms: u64) -> Moment {
        Moment { now: UnixMs(1_000_000 + ms), instant: start + Duration::from_millis(ms) }
    }

    #[test]
    fn the_sample_with_the_shortest_round_trip_counts() {
        let start = clock::instant();
        let mut shared = SharedClock::default();
        assert_eq!(shared.to_shared(UnixMs(5)), 5);
        shared.record(4_600_050, moment(start, 0), moment(start, 100));
        assert_eq!(shared.to_shared(UnixMs(1_000_000)), 4_600_000);
        shared.record(4_600_110, moment(start, 100), moment(start, 300));
        assert_eq!(shared.to_shared(UnixMs(1_000_000)), 4_600_000, "a slow sample must not count");
        shared.record(4_600_305, moment(start, 300), moment(start, 302));
        assert_eq!(shared.to_shared(UnixMs(1_000_000)), 4_600_004);
        assert_eq!(shared.to_local(4_600_004), UnixMs(1_000_000));
    }

    #[test]
    fn a_clock_that_was_set_and_an_old_sample_are_replaced() {
        let start = clock::instant();
        let mut shared = SharedClock::default();
        shared.record(1_000_001, moment(start, 0), moment(start, 2));
        shared.record(3_000_150, moment(start, 100), moment(start, 200));
        assert_eq!(shared.to_shared(UnixMs(1_000_150)), 3_000_150);
        shared.record(3_061_200, moment(start, 61_000), moment(start, 61_400));
        assert_eq!(shared.to_shared(UnixMs(1_061_200)), 3_061_200);
    }
}
