//! The only place that reads a clock, so that every decision elsewhere takes its time as an
//! argument and can be tested at any moment of any month.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::policy::units::UnixMs;
use crate::policy::wall_clock::correction;

/// The time of day, for dates that people and providers use: reset dates, cooldowns, records. It never runs
/// backward: it is the monotonic clock, anchored to the wall clock at the first call. A wall clock that is
/// set forward, or was ahead after a suspend, is followed within a second; one that is set back is approached
/// by slowing down (see [`correction`]). A call costs one reading of the monotonic clock and three loads of a
/// cache line that is written at most once a second.
#[must_use]
pub fn now() -> UnixMs {
    static SCALE: LazyLock<Scale> = LazyLock::new(Scale::anchored);
    let time = instant();
    SCALE.follow(time);
    SCALE.at(SCALE.elapsed(time))
}

/// The monotonic clock, for measurements: time to first byte, totals, deadlines. It is the clock of the
/// runtime, so that tests can use virtual time.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this is the place the lint points to")]
pub fn instant() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// How long ago `time` was.
#[must_use]
pub fn since(time: Instant) -> Duration {
    instant().saturating_duration_since(time)
}

/// Microseconds from one comparison with the wall clock to the next.
const COMPARE_EVERY: i64 = 1_000_000;

/// Maximum duration of the three readings of a comparison. When they take longer, the thread was interrupted
/// between them and their difference means nothing; the next call compares again.
const COMPARE_MAX: Duration = Duration::from_millis(1);

/// The wall clock as a monotonic scale. All values are in microseconds; `elapsed` counts from the anchor.
#[derive(Debug)]
struct Scale {
    anchor: Instant,
    /// The Unix time of the anchor, with every correction so far.
    origin: AtomicI64,
    /// The time shown at the last backward correction: the scale stands still there until the corrected time
    /// has caught up, instead of going back by the size of the correction.
    floor: AtomicI64,
    /// When the scale was last compared with the wall clock.
    compared: AtomicI64,
}

impl Scale {
    #[expect(clippy::disallowed_methods, reason = "this is the place the lint points to")]
    fn anchored() -> Self {
        Self::new(Instant::now(), wall())
    }

    fn new(anchor: Instant, wall: i64) -> Self {
        Self {
            anchor,
            origin: AtomicI64::new(wall),
            floor: AtomicI64::new(i64::MIN),
            compared: AtomicI64::new(0),
        }
    }

    /// Microseconds from the anchor to `time`; negative before it, which virtual time can be.
    fn elapsed(&self, time: Instant) -> i64 {
        match time.checked_duration_since(self.anchor) {
            Some(after) => micros(after),
            None => -micros(self.anchor.saturating_duration_since(time)),
        }
    }

    fn at(&self, elapsed: i64) -> UnixMs {
        // The floor that belongs to an origin is stored before the origin.
        let time = self.origin.load(Ordering::Acquire).saturating_add(elapsed);
        let time = time.max(self.floor.load(Ordering::Relaxed));
        UnixMs(u64::try_from(time / 1_000).unwrap_or_default())
    }

    /// Compares with the wall clock, when that is due at `time`.
    #[expect(clippy::disallowed_methods, reason = "this is the place the lint points to")]
    fn follow(&self, time: Instant) {
        let compared = self.compared.load(Ordering::Relaxed);
        if self.elapsed(time).saturating_sub(compared) < COMPARE_EVERY {
            return;
        }
        let before = Instant::now();
        let (time, wall) = (instant(), wall());
        let after = Instant::now();
        // A runtime with virtual time must not follow the wall clock.
        let is_real = (before..=after).contains(&time);
        if is_real && after.saturating_duration_since(before) <= COMPARE_MAX {
            self.correct(compared, self.elapsed(time), wall);
        }
    }

    /// Corrects the scale by what the wall clock showed at `elapsed`, unless another thread has done so since
    /// `compared`.
    fn correct(&self, compared: i64, elapsed: i64, wall: i64) {
        let won = self.compared.compare_exchange(compared, elapsed, Ordering::Relaxed, Ordering::Relaxed);
        if won.is_err() {
            return;
        }
        let origin = self.origin.load(Ordering::Relaxed);
        let shown = origin.saturating_add(elapsed);
        let correction = correction(wall.saturating_sub(shown), elapsed.saturating_sub(compared));
        if correction < 0 {
            self.floor.fetch_max(shown, Ordering::Relaxed);
        }
        self.origin.store(origin.saturating_add(correction), Ordering::Release);
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the place the lint points to")]
fn wall() -> i64 {
    micros(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;
    const HOUR: i64 = 3_600 * SECOND;
    /// 2026-12-01.
    const BEGAN: i64 = 1_796_083_200 * SECOND;

    /// The times that a scale shows, in microseconds beyond the anchor, when its wall clock is off by `step`
    /// from its first second on; it is read once a second for `seconds`.
    fn shown(step: i64, seconds: i64) -> Vec<i64> {
        let scale = Scale::new(instant(), BEGAN);
        let look = |second: i64| {
            let elapsed = second * SECOND;
            scale.correct((second - 1) * SECOND, elapsed, BEGAN + elapsed + step);
            i64::try_from(scale.at(elapsed).0).unwrap() * 1_000 - BEGAN
        };
        (1..=seconds).map(look).collect()
    }

    #[test]
    fn a_step_forward_is_followed_at_once() {
        for step in [0, 5_000, SECOND, HOUR, 24 * HOUR] {
            assert_eq!(shown(step, 2), [SECOND + step, 2 * SECOND + step]);
        }
    }

    #[test]
    fn a_step_back_never_turns_the_clock_back_and_lengthens_a_wait_by_one_percent_at_most() {
        for step in [-1_000, -SECOND, -HOUR, -100_000 * HOUR] {
            let shown = shown(step, 100);
            assert!(shown.is_sorted(), "{step}: {shown:?}");
            // The correction of a second counts from the next one on.
            assert!(*shown.last().unwrap() >= 99 * SECOND, "{step}: {shown:?}");
        }
        // A small difference disappears in the end.
        assert_eq!(shown(-500_000, 100).last(), Some(&(100 * SECOND - 500_000)));
    }

    #[test]
    fn the_clock_stands_still_instead_of_going_back() {
        let scale = Scale::new(instant(), BEGAN);
        let before = scale.at(SECOND - 1);
        scale.correct(0, SECOND, BEGAN - HOUR);
        let values = [0, 5_000, 9_000, 10_000, 11_000].map(|after| scale.at(SECOND + after).0);
        assert!(before.0 <= values[0] && values.is_sorted(), "{before:?} {values:?}");
        assert_eq!((values[3] - values[0], values[4] - values[3]), (0, 1), "10 ms of a second are lost");
    }

    #[test]
    fn one_thread_corrects_the_clock() {
        let scale = Scale::new(instant(), BEGAN);
        scale.correct(0, SECOND, BEGAN + SECOND + HOUR);
        scale.correct(0, SECOND, BEGAN + SECOND + 2 * HOUR);
        assert_eq!(i64::try_from(scale.at(SECOND).0).unwrap() * 1_000, BEGAN + SECOND + HOUR);
    }

    #[test]
    fn the_clock_follows_the_wall_clock() {
        let (before, shown, after) = (wall(), now(), wall());
        // Allows for the comparison of each second, and for the time that the system takes to run this.
        let span = (before / 1_000 - 1_000)..=(after / 1_000 + 1_000);
        assert!(span.contains(&i64::try_from(shown.0).unwrap()), "{shown:?} {span:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn virtual_time_moves_the_clock() {
        let scale = Scale::anchored();
        let read = || {
            let time = instant();
            scale.follow(time);
            scale.at(scale.elapsed(time))
        };
        let began = read();
        for (span, total) in [(86_400, 86_400), (1, 86_401)] {
            tokio::time::advance(Duration::from_secs(span)).await;
            assert_eq!(read().since(began), Duration::from_secs(total));
        }
    }
}
