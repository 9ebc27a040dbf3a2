//! Minimum data rates of a client, for sending its request and for reading the response: a slower client
//! holds resources that other requests wait for.

use std::time::Duration;

/// Time before a client's rate counts: a phone that leaves its sleep mode is slow at first. Source:
/// `RequestReadTimeout body=20` of Apache's mod_reqtimeout.
pub const GRACE: Duration = Duration::from_secs(20);

/// A minimum number of bytes per second, averaged from the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MinRate {
    /// 0 disables the limit.
    pub bytes_per_second: u32,
}

impl MinRate {
    /// Time since the beginning by which the byte after `bytes` must have arrived; `None` for any time.
    #[must_use]
    pub fn due(self, bytes: u64) -> Option<Duration> {
        let rate = u64::from(self.bytes_per_second);
        (rate > 0).then(|| GRACE + Duration::from_millis(bytes.saturating_mul(1_000) / rate))
    }
}

/// The time for which the proxy still waits for a slow reader: an initial grace, less the time spent
/// waiting for the client, plus the time that corresponds to the bytes it has read. Time without data to
/// read does not count.
#[derive(Clone, Copy, Debug)]
pub struct ReadPace {
    rate: MinRate,
    left: Duration,
    /// Upper bound of `left`: a player that was fast at first may let its buffer drain.
    left_max: Duration,
    /// Bytes that are not yet included in `left`.
    uncounted_bytes: u64,
}

impl ReadPace {
    /// The pace of a client that has read nothing yet, and can earn `saved_max` beyond the `grace`.
    #[must_use]
    pub fn new(rate: MinRate, grace: Duration, saved_max: Duration) -> Self {
        Self { rate, left: grace, left_max: grace + saved_max, uncounted_bytes: 0 }
    }

    /// Records that the client has read this many bytes.
    pub fn record_read(&mut self, bytes: u64) {
        self.uncounted_bytes = self.uncounted_bytes.saturating_add(bytes);
    }

    /// Records a wait for the client. Returns whether it was longer than the time left.
    pub fn record_wait(&mut self, span: Duration) -> bool {
        self.add_earned_time();
        let is_too_long = self.rate.bytes_per_second > 0 && span > self.left;
        self.left = self.left.saturating_sub(span);
        is_too_long
    }

    /// The time left; `None` for any time.
    #[must_use]
    pub fn left(&mut self) -> Option<Duration> {
        self.add_earned_time();
        (self.rate.bytes_per_second > 0).then_some(self.left)
    }

    fn add_earned_time(&mut self) {
        let rate = u64::from(self.rate.bytes_per_second.max(1));
        let earned =
            Duration::from_millis(std::mem::take(&mut self.uncounted_bytes).saturating_mul(1_000) / rate);
        self.left = self.left.saturating_add(earned).min(self.left_max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bytes_per_second: u32, bytes: u64, expected_ms: Option<u64>) {
        let due = MinRate { bytes_per_second }.due(bytes);
        assert_eq!(due, expected_ms.map(Duration::from_millis));
    }

    #[test]
    fn each_sent_byte_adds_its_part_of_a_second() {
        check(500, 0, Some(20_000));
        check(500, 1, Some(20_002));
        check(500, 500, Some(21_000));
        check(500, 500_000, Some(1_020_000));
        check(u32::MAX, u64::MAX, Some(20_000 + u64::MAX / u64::from(u32::MAX)));
        check(0, 0, None);
        check(0, 500, None);
    }

    const FAST: u64 = 1_000_000;

    /// The time left after each step, in which a client reads bytes and is waited for.
    #[track_caller]
    fn check_pace(steps: &[(u64, u64)], expected_s: u64) {
        let rate = MinRate { bytes_per_second: 500 };
        let mut pace = ReadPace::new(rate, GRACE, Duration::from_secs(600));
        for (bytes, waited_s) in steps {
            pace.record_read(*bytes);
            pace.record_wait(Duration::from_secs(*waited_s));
        }
        assert_eq!(pace.left(), Some(Duration::from_secs(expected_s)));
    }

    #[test]
    fn each_read_byte_adds_its_part_of_a_second() {
        check_pace(&[], 20);
        check_pace(&[(0, 19)], 1);
        check_pace(&[(0, 20)], 0);
        check_pace(&[(0, 21)], 0);
        check_pace(&[(5_000, 20)], 10);
        // A client at the rate never runs out of time, a slower one does.
        check_pace(&[(500, 1); 10_000], 20);
        check_pace(&[(250, 1); 40], 0);
        check_pace(&[(1_000, 4), (1_000, 4), (1_000, 4)], 14);
    }

    #[test]
    fn the_earned_time_of_a_fast_client_is_bounded() {
        check_pace(&[(FAST, 0)], 620);
        check_pace(&[(FAST, 0), (FAST, 100)], 520);
        check_pace(&[(FAST, 620)], 0);
        check_pace(&[(u64::MAX, 0), (u64::MAX, 1)], 619);
    }

    #[test]
    fn without_a_rate_a_client_may_pause_for_any_time() {
        let mut pace = ReadPace::new(MinRate { bytes_per_second: 0 }, GRACE, Duration::ZERO);
        assert!(!pace.record_wait(Duration::MAX));
        assert_eq!(pace.left(), None);
    }
}
