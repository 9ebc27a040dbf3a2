//! Computes the timeouts that enforce a minimum rate at which a client must send its request and read the response. A
//! slower client would occupy connections and keys for which other requests wait.

use std::time::Duration;

/// Grace period of a client, because a phone that wakes up is slow at first. Source: `RequestReadTimeout
/// body=20` of Apache's mod_reqtimeout.
pub const GRACE_PERIOD: Duration = Duration::from_secs(20);

/// A minimum rate, averaged from the start of the transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MinRate {
    /// The minimum in bytes per second. 0 disables the limit.
    pub bytes_per_second: u32,
}

impl MinRate {
    /// Returns the time from the start of the transfer by which more than `bytes` must have arrived, or
    /// `None` if the limit is disabled.
    #[must_use]
    pub fn timeout_after(self, bytes: u64) -> Option<Duration> {
        let rate = u64::from(self.bytes_per_second);
        (rate > 0).then(|| GRACE_PERIOD + Duration::from_millis(bytes.saturating_mul(1_000) / rate))
    }
}

/// The time for which Keychoir still waits for a client to read. It starts with a grace period, decreases by the time
/// spent waiting for the client, and increases with the bytes that the client reads. Time without data to read does not
/// count.
#[derive(Clone, Copy, Debug)]
pub struct ReadTimeBudget {
    rate: MinRate,
    remaining: Duration,
    /// Upper bound of `remaining`. It is above the grace period, because a player that read fast at first may
    /// pause until its buffer is drained.
    max_remaining: Duration,
    /// Bytes that are not yet included in `remaining`.
    uncounted_bytes: u64,
}

impl ReadTimeBudget {
    /// Creates the budget at the start of a response. Reading fast can increase it by up to `max_earned`
    /// beyond `grace_period`.
    #[must_use]
    pub fn new(rate: MinRate, grace_period: Duration, max_earned: Duration) -> Self {
        Self { rate, remaining: grace_period, max_remaining: grace_period + max_earned, uncounted_bytes: 0 }
    }

    /// Adds the time for bytes that the client has read.
    pub fn record_read(&mut self, bytes: u64) {
        self.uncounted_bytes = self.uncounted_bytes.saturating_add(bytes);
    }

    /// Subtracts the duration of a wait for the client. Returns whether it exceeded the remaining time.
    pub fn record_wait(&mut self, wait: Duration) -> bool {
        self.add_earned_time();
        let is_too_long = self.rate.bytes_per_second > 0 && wait > self.remaining;
        self.remaining = self.remaining.saturating_sub(wait);
        is_too_long
    }

    /// Returns the remaining time, or `None` if the limit is disabled.
    #[must_use]
    pub fn remaining(&mut self) -> Option<Duration> {
        self.add_earned_time();
        (self.rate.bytes_per_second > 0).then_some(self.remaining)
    }

    fn add_earned_time(&mut self) {
        let rate = u64::from(self.rate.bytes_per_second.max(1));
        let earned =
            Duration::from_millis(std::mem::take(&mut self.uncounted_bytes).saturating_mul(1_000) / rate);
        self.remaining = self.remaining.saturating_add(earned).min(self.max_remaining);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_timeout(bytes_per_second: u32, bytes: u64, expected_ms: Option<u64>) {
        let timeout = MinRate { bytes_per_second }.timeout_after(bytes);
        assert_eq!(timeout, expected_ms.map(Duration::from_millis));
    }

    #[test]
    fn each_sent_byte_extends_the_timeout() {
        check_timeout(500, 0, Some(20_000));
        check_timeout(500, 1, Some(20_002));
        check_timeout(500, 500, Some(21_000));
        check_timeout(500, 500_000, Some(1_020_000));
        check_timeout(u32::MAX, u64::MAX, Some(20_000 + u64::MAX / u64::from(u32::MAX)));
        check_timeout(0, 0, None);
        check_timeout(0, 500, None);
    }

    const FAST: u64 = 1_000_000;

    /// Checks the remaining time after steps in which the client reads bytes and Keychoir then waits.
    #[track_caller]
    fn check_remaining(steps: &[(u64, u64)], expected_s: u64) {
        let rate = MinRate { bytes_per_second: 500 };
        let mut budget = ReadTimeBudget::new(rate, GRACE_PERIOD, Duration::from_secs(600));
        for (bytes, waited_s) in steps {
            budget.record_read(*bytes);
            budget.record_wait(Duration::from_secs(*waited_s));
        }
        assert_eq!(budget.remaining(), Some(Duration::from_secs(expected_s)));
    }

    #[test]
    fn each_read_byte_adds_time() {
        check_remaining(&[], 20);
        check_remaining(&[(0, 19)], 1);
        check_remaining(&[(0, 20)], 0);
        check_remaining(&[(0, 21)], 0);
        check_remaining(&[(5_000, 20)], 10);
        // A client at the minimum rate never runs out of time. A slower client runs out of time.
        check_remaining(&[(500, 1); 10_000], 20);
        check_remaining(&[(250, 1); 40], 0);
        check_remaining(&[(1_000, 4), (1_000, 4), (1_000, 4)], 14);
    }

    #[test]
    fn the_earned_time_of_a_fast_client_is_bounded() {
        check_remaining(&[(FAST, 0)], 620);
        check_remaining(&[(FAST, 0), (FAST, 100)], 520);
        check_remaining(&[(FAST, 620)], 0);
        check_remaining(&[(u64::MAX, 0), (u64::MAX, 1)], 619);
    }

    #[test]
    fn without_a_rate_the_time_is_not_limited() {
        let mut budget = ReadTimeBudget::new(MinRate { bytes_per_second: 0 }, GRACE_PERIOD, Duration::ZERO);
        assert!(!budget.record_wait(Duration::MAX));
        assert_eq!(budget.remaining(), None);
    }
}
