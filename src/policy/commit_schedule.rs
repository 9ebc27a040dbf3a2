//! Computes the delay of the next commit of usage records. There is no delay if the last commit started at least one
//! interval ago or a batch is full. Otherwise, the delay is the rest of the interval. Records that arrive within an
//! interval share a commit, because a commit of any size costs one fsync.

use std::time::Duration;

/// The lowest rate, in records per second, at which the interval has its maximum length.
const MAX_INTERVAL_RATE: u64 = 1_000;
/// The divisor of the maximum interval at low rates. With this interval, a crash loses few records, and commits are
/// still rare.
const MIN_INTERVAL_DIVISOR: u64 = 5;

/// Returns the time between the starts of two commits if `records` arrived in the last `duration`. The interval
/// grows with the rate up to `max_interval`, so that commits take a small share of the time.
#[must_use]
pub fn commit_interval(records: u64, duration: Duration, max_interval: Duration) -> Duration {
    // A minimum duration prevents a few records that arrive together from counting as a high rate.
    let measured_duration = duration.max(max_interval / MIN_INTERVAL_DIVISOR as u32);
    let duration_us = u64::try_from(measured_duration.as_micros()).unwrap_or(u64::MAX).max(1);
    let rate = records.saturating_mul(1_000_000) / duration_us;
    let capped_rate = u32::try_from(rate.clamp(MAX_INTERVAL_RATE / MIN_INTERVAL_DIVISOR, MAX_INTERVAL_RATE))
        .unwrap_or(u32::MAX);
    max_interval.saturating_mul(capped_rate) / MAX_INTERVAL_RATE as u32
}

/// Returns the delay until the next commit. `elapsed` is the time since the last commit started. The delay is
/// zero if the `queued` records fill a batch.
#[must_use]
pub fn next_commit_delay(elapsed: Duration, interval: Duration, queued: u64, batch_size: u64) -> Duration {
    if queued >= batch_size { Duration::ZERO } else { interval.saturating_sub(elapsed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_delay(elapsed_ms: u64, interval_ms: u64, queued: u64, expected_ms: u64) {
        const BATCH_SIZE: u64 = 512;
        let [elapsed, interval, expected] = [elapsed_ms, interval_ms, expected_ms].map(Duration::from_millis);
        assert_eq!(next_commit_delay(elapsed, interval, queued, BATCH_SIZE), expected);
    }

    #[test]
    fn a_commit_after_a_full_interval_starts_immediately() {
        check_delay(50, 50, 1, 0);
        check_delay(60_000, 50, 1, 0);
    }

    #[test]
    fn a_commit_starts_at_the_end_of_the_interval() {
        check_delay(49, 50, 1, 1);
        check_delay(0, 50, 0, 50);
        check_delay(10, 50, 511, 40);
    }

    #[test]
    fn a_full_batch_does_not_wait() {
        check_delay(0, 50, 512, 0);
        check_delay(0, 50, 8_192, 0);
    }

    #[test]
    fn without_an_interval_a_commit_starts_immediately() {
        check_delay(0, 0, 1, 0);
    }

    #[test]
    fn the_interval_grows_with_the_rate_between_its_bounds() {
        for (records, duration_ms, expected) in [
            (0, 0, 100),
            (1, 60_000, 100),
            (20, 100, 100),
            (40, 100, 200),
            (99, 100, 495),
            (100, 100, 500),
            (1_500, 500, 500),
            (u64::MAX, 1, 500),
            (19, 0, 100),
            (30, 1, 150),
        ] {
            let [duration, max_interval, expected] = [duration_ms, 500, expected].map(Duration::from_millis);
            assert_eq!(
                commit_interval(records, duration, max_interval),
                expected,
                "the interval must follow the rate of {records} records in {duration:?}"
            );
        }
        assert_eq!(commit_interval(1_000, Duration::from_secs(1), Duration::ZERO), Duration::ZERO);
    }
}
