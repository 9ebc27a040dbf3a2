//! When the books are written: at once after a quiet moment, and in steps while records keep coming,
//! so that many of them share a commit. A commit costs a flush of the disk, whatever is in it.

use std::time::Duration;

/// How long the next commit is still put off. The last one began `since` ago, and one begins each
/// `interval` at the most; but when `waiting` records fill a `batch`, nothing is gained by waiting.
#[must_use]
pub fn pause(since: Duration, interval: Duration, waiting: u64, batch: u64) -> Duration {
    if waiting >= batch { Duration::ZERO } else { interval.saturating_sub(since) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(since: u64, interval: u64, waiting: u64, expected: u64) {
        let [since, interval, expected] = [since, interval, expected].map(Duration::from_millis);
        assert_eq!(pause(since, interval, waiting, 512), expected);
    }

    #[test]
    fn after_a_quiet_moment_nothing_is_put_off() {
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
    fn what_fills_a_commit_does_not_wait() {
        check(0, 50, 512, 0);
        check(0, 50, 8_192, 0);
    }

    #[test]
    fn without_an_interval_one_follows_the_other() {
        check(0, 0, 1, 0);
    }
}
