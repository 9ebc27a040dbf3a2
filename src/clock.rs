//! Reads the clocks of the system for all other modules: the date and time, which never goes backward, and the
//! monotonic clock. Pure code takes the time as an argument, so that tests can choose the time.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::policy::units::UnixMs;
use crate::policy::wall_clock::correction;

/// Returns the current date and time, for reset dates, cooldowns and records. It never goes backward.
///
/// The time is computed from the monotonic clock, which is anchored to the wall clock at the first call. When the
/// wall clock is set forward, or is ahead after a suspend, the returned time follows within a second. When the wall
/// clock is set back, the returned time advances more slowly until both agree (see [`correction`]).
///
/// Usually, a call reads the monotonic clock once and loads a cache line that is written at most once a second.
#[must_use]
pub fn now() -> UnixMs {
    #[cfg(test)]
    if let Some(time) = simulated_now() {
        return time;
    }
    static CLOCK: LazyLock<AnchoredClock> = LazyLock::new(AnchoredClock::anchor_now);
    let time = instant();
    CLOCK.compare(time);
    CLOCK.time_at(CLOCK.elapsed(time))
}

#[cfg(test)]
tokio::task_local! {
    /// The first instant of a simulation, and the date and time of the simulated machine at that instant. Tasks of the
    /// machine compute their time from both instead of reading the wall clock.
    pub(crate) static SIMULATED_CLOCK: (Instant, UnixMs);
}

#[cfg(test)]
fn simulated_now() -> Option<UnixMs> {
    let (start, origin) = SIMULATED_CLOCK.try_get().ok()?;
    Some(origin.plus(instant().saturating_duration_since(start)))
}

/// Returns the current time of the monotonic clock, for durations and deadlines. It is the clock of the runtime, so
/// that tests can use virtual time.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the lint refers other code to this module")]
pub fn instant() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Returns the duration from `time` until now, which is zero if `time` is in the future.
#[must_use]
pub fn elapsed_since(time: Instant) -> Duration {
    instant().saturating_duration_since(time)
}

/// Interval between two comparisons with the wall clock.
const COMPARISON_INTERVAL_MICROS: i64 = 1_000_000;

/// Maximum duration of the three clock readings of a comparison. If they take longer, the thread was
/// interrupted between them and the difference is unreliable. In that case, the next call compares again.
const MAX_COMPARISON_DURATION: Duration = Duration::from_millis(1);

/// A monotonic clock that follows the wall clock. All values are in microseconds, and `elapsed` is measured
/// from the anchor.
#[derive(Debug)]
struct AnchoredClock {
    anchor: Instant,
    /// The Unix time of the anchor, including all corrections.
    origin: AtomicI64,
    /// The clock reading at the last backward correction. The clock stops there until the corrected time
    /// reaches it, instead of going back.
    floor: AtomicI64,
    /// The elapsed time at the last comparison with the wall clock.
    compared_at: AtomicI64,
}

impl AnchoredClock {
    #[expect(clippy::disallowed_methods, reason = "the lint refers other code to this module")]
    fn anchor_now() -> Self {
        Self::new(Instant::now(), wall_clock())
    }

    fn new(anchor: Instant, wall_time: i64) -> Self {
        Self {
            anchor,
            origin: AtomicI64::new(wall_time),
            floor: AtomicI64::new(i64::MIN),
            compared_at: AtomicI64::new(0),
        }
    }

    /// Returns the microseconds from the anchor to `time`. They are negative for virtual time before the anchor.
    fn elapsed(&self, time: Instant) -> i64 {
        match time.checked_duration_since(self.anchor) {
            Some(elapsed) => to_micros(elapsed),
            None => -to_micros(self.anchor.saturating_duration_since(time)),
        }
    }

    /// Returns the corrected time `elapsed` microseconds after the anchor.
    fn time_at(&self, elapsed: i64) -> UnixMs {
        // A correction stores the floor before the origin, so the floor is not older than the origin.
        let time = self.origin.load(Ordering::Acquire).saturating_add(elapsed);
        let time = time.max(self.floor.load(Ordering::Relaxed));
        UnixMs(u64::try_from(time / 1_000).unwrap_or_default())
    }

    /// Compares the clock with the wall clock if a comparison is due at `time`.
    #[expect(clippy::disallowed_methods, reason = "the lint refers other code to this module")]
    fn compare(&self, time: Instant) {
        let compared_at = self.compared_at.load(Ordering::Relaxed);
        if self.elapsed(time).saturating_sub(compared_at) < COMPARISON_INTERVAL_MICROS {
            return;
        }
        let instant_before = Instant::now();
        let (time, wall_time) = (instant(), wall_clock());
        let instant_after = Instant::now();
        // Virtual time must not follow the wall clock.
        let is_real = (instant_before..=instant_after).contains(&time);
        if is_real && instant_after.saturating_duration_since(instant_before) <= MAX_COMPARISON_DURATION {
            self.correct(compared_at, self.elapsed(time), wall_time);
        }
    }

    /// Corrects the clock to the wall clock reading at `elapsed`, unless another thread has compared them
    /// after `compared_at`.
    fn correct(&self, compared_at: i64, elapsed: i64, wall_time: i64) {
        let claim =
            self.compared_at.compare_exchange(compared_at, elapsed, Ordering::Relaxed, Ordering::Relaxed);
        if claim.is_err() {
            return;
        }
        let origin = self.origin.load(Ordering::Relaxed);
        let reading = origin.saturating_add(elapsed);
        let correction = correction(wall_time.saturating_sub(reading), elapsed.saturating_sub(compared_at));
        if correction < 0 {
            self.floor.fetch_max(reading, Ordering::Relaxed);
        }
        self.origin.store(origin.saturating_add(correction), Ordering::Release);
    }
}

/// Returns the Unix time of the wall clock in microseconds.
#[expect(clippy::disallowed_methods, reason = "the lint refers other code to this module")]
fn wall_clock() -> i64 {
    to_micros(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn to_micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One second in microseconds, the unit of these tests.
    const SECOND: i64 = 1_000_000;
    const HOUR: i64 = 3_600 * SECOND;
    /// 2026-12-01 as a Unix time.
    const START: i64 = 1_796_083_200 * SECOND;

    /// Reads a clock once a second for `seconds`. From the first second on, the wall clock is ahead of the
    /// clock by `step`. Returns the readings relative to the anchor.
    fn readings(step: i64, seconds: i64) -> Vec<i64> {
        let clock = AnchoredClock::new(instant(), START);
        let time_at = |second: i64| {
            let elapsed = second * SECOND;
            clock.correct((second - 1) * SECOND, elapsed, START + elapsed + step);
            i64::try_from(clock.time_at(elapsed).0).unwrap() * 1_000 - START
        };
        (1..=seconds).map(time_at).collect()
    }

    #[test]
    fn the_clock_follows_a_step_forward_immediately() {
        for step in [0, 5_000, SECOND, HOUR, 24 * HOUR] {
            assert_eq!(readings(step, 2), [SECOND + step, 2 * SECOND + step]);
        }
    }

    #[test]
    fn after_a_step_back_the_clock_advances_at_most_one_percent_more_slowly() {
        for step in [-1_000, -SECOND, -HOUR, -100_000 * HOUR] {
            let readings = readings(step, 100);
            assert!(readings.is_sorted(), "the clock must not go back after a step of {step}: {readings:?}");
            // A correction takes effect in the following second.
            assert!(
                *readings.last().unwrap() >= 99 * SECOND,
                "the clock must lose at most a second after a step of {step}: {readings:?}"
            );
        }
        // A small difference is corrected completely.
        assert_eq!(readings(-500_000, 100).last(), Some(&(100 * SECOND - 500_000)));
    }

    #[test]
    fn the_clock_stops_instead_of_going_back() {
        let clock = AnchoredClock::new(instant(), START);
        let time_before = clock.time_at(SECOND - 1);
        clock.correct(0, SECOND, START - HOUR);
        let times = [0, 5_000, 9_000, 10_000, 11_000].map(|after| clock.time_at(SECOND + after).0);
        assert!(
            time_before.0 <= times[0] && times.is_sorted(),
            "the clock must not go back from {time_before:?}: {times:?}"
        );
        assert_eq!(
            (times[3] - times[0], times[4] - times[3]),
            (0, 1),
            "the clock must be 10 ms slower in this second"
        );
    }

    #[test]
    fn only_one_thread_corrects_the_clock() {
        let clock = AnchoredClock::new(instant(), START);
        clock.correct(0, SECOND, START + SECOND + HOUR);
        clock.correct(0, SECOND, START + SECOND + 2 * HOUR);
        assert_eq!(i64::try_from(clock.time_at(SECOND).0).unwrap() * 1_000, START + SECOND + HOUR);
    }

    #[test]
    fn the_clock_follows_the_wall_clock() {
        let (before, reading, after) = (wall_clock(), now(), wall_clock());
        // The clock may deviate until the next comparison, and the three readings are not simultaneous.
        let tolerance = (before / 1_000 - 1_000)..=(after / 1_000 + 1_000);
        assert!(
            tolerance.contains(&i64::try_from(reading.0).unwrap()),
            "{reading:?} must be in the range {tolerance:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn virtual_time_moves_the_clock() {
        let clock = AnchoredClock::anchor_now();
        let read_clock = || {
            let time = instant();
            clock.compare(time);
            clock.time_at(clock.elapsed(time))
        };
        let start = read_clock();
        for (advanced_seconds, total_seconds) in [(86_400, 86_400), (1, 86_401)] {
            tokio::time::advance(Duration::from_secs(advanced_seconds)).await;
            assert_eq!(read_clock().since(start), Duration::from_secs(total_seconds));
        }
    }
}
