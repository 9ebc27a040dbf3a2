//! Decides when usage records are committed: at once if the last commit is at least one interval old,
//! otherwise when the interval ends or a batch is full. Records that arrive in one interval share a commit,
//! because a commit of any size costs one fsync.

use std::time::Duration;

/// At this many records per second or more, commits are a full interval apart.
const FULL_PACE: u64 = 1_000;
/// At low rates, the interval is divided by this number: a crash loses few records, and commits are still
/// rare.
const MIN_INTERVAL_DIVISOR: u64 = 5;

/// The time between the beginnings of two commits, when `records` arrived in the `span` before. It grows
/// with the rate up to `max_interval`, so that commits cost little in comparison with the requests.
#[must_use]
pub fn interval(records: u64, span: Duration, max_interval: Duration) -> Duration {
    // A few records that arrive together are not a rate.
    let span = span.max(max_interval / MIN_INTERVAL_DIVISOR as u32);
    let span_us = u64::try_from(span.as_micros()).unwrap_or(u64::MAX).max(1);
    let pace = records.saturating_mul(1_000_000) / span_us;
    let pace = u32::try_from(pace.clamp(FULL_PACE / MIN_INTERVAL_DIVISOR, FULL_PACE)).unwrap_or(u32::MAX);
    max_interval.saturating_mul(pace) / FULL_PACE as u32
}

/// The time until the next commit. The last one began `since` ago, and one begins at most every
/// `interval`; when `queued` records fill a `batch`, it begins immediately.
#[must_use]
pub fn pause(since: Duration, interval: Duration, queued: u64, batch: u64) -> Duration {
    if queued >= batch { Duration::ZERO } else { interval.saturating_sub(since) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(since: u64, interval: u64, queued: u64, expected: u64) {
        let [since, interval, expected] = [since, interval, expected].map(Duration::from_millis);
        assert_eq!(pause(since, interval, queued, 512), expected);
    }

    #[test]
    fn a_commit_after_a_pause_begins_immediately() {
        check(50, 50, 1, 0);
        check(60_000, 50, 1, 0);
    }

    #[test]
    fn a_commit_begins_no_sooner_than_an_interval_after_the_last() {
        check(49, 50, 1, 1);
        check(0, 50, 0, 50);
        check(10, 50, 511, 40);
    }

    #[test]
    fn a_full_batch_does_not_wait() {
        check(0, 50, 512, 0);
        check(0, 50, 8_192, 0);
    }

    #[test]
    fn without_an_interval_commits_follow_each_other() {
        check(0, 0, 1, 0);
    }

    #[test]
    fn the_interval_grows_with_the_pace_between_its_bounds() {
        for (records, over_ms, expected) in [
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
            let [span, max_interval, expected] = [over_ms, 500, expected].map(Duration::from_millis);
            assert_eq!(interval(records, span, max_interval), expected, "{records} in {span:?}");
        }
        assert_eq!(interval(1_000, Duration::from_secs(1), Duration::ZERO), Duration::ZERO);
    }
}
