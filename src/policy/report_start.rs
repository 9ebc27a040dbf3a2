//! Parses the start time of a usage report: an age such as `7d`, a day such as `2026-11-01`, or a timestamp.

use std::time::Duration;

use super::quantity::duration;
use super::units::UnixMs;

/// The reason why a text is not a valid start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidStartTime {
    /// The text is not in an accepted format.
    #[error("write an age as 24h, 7d or 4w, a day as 2026-11-01 (UTC), or a time as 2026-11-01T12:00:00Z")]
    Malformed,
    /// The time is in the future.
    #[error("that time is in the future")]
    Future,
}

/// Parses a start time. An age counts back from `now`.
///
/// # Errors
///
/// Fails if `text` is malformed, or the time is in the future.
pub fn parse_report_start(text: &str, now: UnixMs) -> Result<UnixMs, InvalidStartTime> {
    if let Some(age) = parse_age(text) {
        return Ok(now.minus(age));
    }
    let is_day = text.len() == "2026-11-01".len();
    let start = if is_day { UnixMs::parse(&format!("{text}T00:00:00Z")) } else { UnixMs::parse(text) };
    match start {
        None => Err(InvalidStartTime::Malformed),
        Some(start) if start > now => Err(InvalidStartTime::Future),
        Some(start) => Ok(start),
    }
}

/// Parses an age such as `24h` or `1d12h`. Usage is summed by the hour, so only whole hours are accepted.
fn parse_age(text: &str) -> Option<Duration> {
    duration::parse(text).ok().filter(|age| age.as_millis().is_multiple_of(3_600_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-12-01T00:00:00Z.
    const NOW: UnixMs = UnixMs(1_796_083_200_000);
    const HOUR: u64 = 3_600_000;

    #[track_caller]
    fn check_start(text: &str, expected_ms: Result<u64, InvalidStartTime>) {
        assert_eq!(parse_report_start(text, NOW), expected_ms.map(UnixMs), "{text:?} must have this result");
    }

    #[test]
    fn an_age_counts_back_from_now() {
        check_start("1h", Ok(NOW.0 - HOUR));
        check_start("7d", Ok(NOW.0 - 7 * 24 * HOUR));
        check_start("4w", Ok(NOW.0 - 28 * 24 * HOUR));
        check_start("1d12h", Ok(NOW.0 - 36 * HOUR));
        check_start("0d", Ok(NOW.0));
        check_start("99999999d", Ok(0));
    }

    #[test]
    fn a_day_starts_at_midnight_utc() {
        check_start("2026-11-30", Ok(NOW.0 - 24 * HOUR));
        check_start("2026-11-30T12:00:00Z", Ok(NOW.0 - 12 * HOUR));
        check_start("2026-11-30T12:00:00+01:00", Ok(NOW.0 - 13 * HOUR));
    }

    #[test]
    fn a_text_that_is_not_a_start_time_is_rejected() {
        for text in [
            "",
            "d",
            "7",
            "-7d",
            "+7d",
            "7 d",
            "7m",
            "1.5h",
            "yesterday",
            "2026-13-01",
            "99999999999999999999d",
        ] {
            check_start(text, Err(InvalidStartTime::Malformed));
        }
        check_start("2026-12-01", Ok(NOW.0));
        check_start("2026-12-02", Err(InvalidStartTime::Future));
    }
}
