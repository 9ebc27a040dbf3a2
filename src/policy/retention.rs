//! Computes when usage records are deleted, and the hours by which they are summed.

use std::time::Duration;

use super::units::UnixMs;

/// The interval of the sums.
const HOUR_MS: u64 = 3_600_000;

/// How long records are kept; `None` for no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Records of single attempts.
    pub attempts: Option<Duration>,
    /// Hourly sums.
    pub hours: Option<Duration>,
}

impl Retention {
    /// A retention in days; 0 for no limit.
    #[must_use]
    pub fn of_days(attempts: usize, hours: usize) -> Self {
        let span = |days: usize| (days > 0).then(|| Duration::from_secs(days as u64 * 24 * 3_600));
        Self { attempts: span(attempts), hours: span(hours) }
    }
}

/// The beginning of the hour that contains `at`.
#[must_use]
pub fn hour_of(at: UnixMs) -> UnixMs {
    UnixMs(at.0 - at.0 % HOUR_MS)
}

/// The moment before which records may be deleted; `None` when all are kept. Always the beginning of an
/// hour, so that the attempts of an hour that is kept are complete.
#[must_use]
pub fn oldest_kept(kept: Option<Duration>, now: UnixMs) -> Option<UnixMs> {
    let kept_ms = u64::try_from(kept?.as_millis()).unwrap_or(u64::MAX);
    Some(hour_of(UnixMs(now.0.saturating_sub(kept_ms))))
}

/// The prefix of UUIDs (version 7, RFC 9562) generated at this moment: those generated earlier are
/// smaller.
#[must_use]
pub fn first_id(at: UnixMs) -> [u8; 6] {
    const LAST: u64 = (1 << 48) - 1;
    let [_, _, moment @ ..] = at.0.min(LAST).to_be_bytes();
    moment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hour_begins_at_its_first_millisecond() {
        for (at, hour) in [(0, 0), (HOUR_MS - 1, 0), (HOUR_MS, HOUR_MS), (7 * HOUR_MS + 5, 7 * HOUR_MS)] {
            assert_eq!(hour_of(UnixMs(at)), UnixMs(hour));
        }
    }

    #[test]
    fn ids_are_in_the_order_of_their_moments() {
        assert_eq!(first_id(UnixMs(0x0198_c2f0_7b1a)), [0x01, 0x98, 0xc2, 0xf0, 0x7b, 0x1a]);
        assert!(first_id(UnixMs(0xff)) < first_id(UnixMs(0x100)));
        assert_eq!(first_id(UnixMs(u64::MAX)), [0xff; 6], "a moment beyond all bounds is the last one");
    }

    #[track_caller]
    fn check(days: usize, now: u64, expected: Option<u64>) {
        let retention = Retention::of_days(days, 0);
        assert_eq!(oldest_kept(retention.attempts, UnixMs(now)), expected.map(UnixMs));
        assert_eq!(retention.hours, None);
    }

    #[test]
    fn whole_hours_are_deleted() {
        let day = 24 * HOUR_MS;
        check(1, 3 * day, Some(2 * day));
        check(1, 3 * day + HOUR_MS - 1, Some(2 * day));
        check(1, 3 * day + HOUR_MS, Some(2 * day + HOUR_MS));
    }

    #[test]
    fn zero_days_and_very_many_days_keep_all_records() {
        check(0, u64::MAX, None);
        check(30, 5, Some(0));
        check(usize::MAX / 86_400, u64::MAX - 1, Some(0));
    }
}
