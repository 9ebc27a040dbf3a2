//! Decides which usage records are deleted: all records before a cutoff at the start of an hour, because usage is
//! summed by the hour. Also computes the prefix of the identifiers of records, by which the records of a period are
//! found.

use std::time::Duration;

use super::units::UnixMs;

/// The interval over which usage is summed, in milliseconds.
const HOUR_MS: u64 = 3_600_000;

/// The time for which usage records are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// The time for which the records of single attempts are kept, or `None` to keep them forever.
    pub attempts: Option<Duration>,
    /// The time for which the hourly sums are kept, or `None` to keep them forever.
    pub hours: Option<Duration>,
}

impl Retention {
    /// Creates a retention from numbers of days. 0 keeps the records forever.
    #[must_use]
    pub fn from_days(attempts: usize, hours: usize) -> Self {
        let duration = |days: usize| (days > 0).then(|| Duration::from_secs(days as u64 * 24 * 3_600));
        Self { attempts: duration(attempts), hours: duration(hours) }
    }
}

/// Returns the start of the hour that contains `at`.
#[must_use]
pub fn start_of_hour(at: UnixMs) -> UnixMs {
    UnixMs(at.0 - at.0 % HOUR_MS)
}

/// Returns the time before which records are deleted, or `None` if all are kept. The time is the start of an
/// hour, so that the attempts of every remaining hour are complete.
#[must_use]
pub fn deletion_cutoff(retention: Option<Duration>, now: UnixMs) -> Option<UnixMs> {
    let retention_ms = u64::try_from(retention?.as_millis()).unwrap_or(u64::MAX);
    Some(start_of_hour(UnixMs(now.0.saturating_sub(retention_ms))))
}

/// Returns the prefix of version 7 UUIDs (RFC 9562) that are generated at `at`. Earlier UUIDs are smaller.
#[must_use]
pub fn uuid_prefix(at: UnixMs) -> [u8; 6] {
    const MAX_TIMESTAMP: u64 = (1 << 48) - 1;
    let [_, _, timestamp @ ..] = at.0.min(MAX_TIMESTAMP).to_be_bytes();
    timestamp
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hour_starts_at_its_first_millisecond() {
        for (at, hour) in [(0, 0), (HOUR_MS - 1, 0), (HOUR_MS, HOUR_MS), (7 * HOUR_MS + 5, 7 * HOUR_MS)] {
            assert_eq!(start_of_hour(UnixMs(at)), UnixMs(hour));
        }
    }

    #[test]
    fn uuid_prefixes_are_in_the_order_of_their_times() {
        assert_eq!(uuid_prefix(UnixMs(0x0198_c2f0_7b1a)), [0x01, 0x98, 0xc2, 0xf0, 0x7b, 0x1a]);
        assert!(uuid_prefix(UnixMs(0xff)) < uuid_prefix(UnixMs(0x100)));
        assert_eq!(
            uuid_prefix(UnixMs(u64::MAX)),
            [0xff; 6],
            "a time that does not fit must become the maximum"
        );
    }

    #[track_caller]
    fn check_cutoff(days: usize, now_ms: u64, expected_ms: Option<u64>) {
        let retention = Retention::from_days(days, 0);
        assert_eq!(deletion_cutoff(retention.attempts, UnixMs(now_ms)), expected_ms.map(UnixMs));
        assert_eq!(retention.hours, None);
    }

    #[test]
    fn whole_hours_are_deleted() {
        let day = 24 * HOUR_MS;
        check_cutoff(1, 3 * day, Some(2 * day));
        check_cutoff(1, 3 * day + HOUR_MS - 1, Some(2 * day));
        check_cutoff(1, 3 * day + HOUR_MS, Some(2 * day + HOUR_MS));
    }

    #[test]
    fn zero_days_and_very_long_retentions_keep_all_records() {
        check_cutoff(0, u64::MAX, None);
        check_cutoff(30, 5, Some(0));
        check_cutoff(usize::MAX / 86_400, u64::MAX - 1, Some(0));
    }
}
