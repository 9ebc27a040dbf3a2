//! Defines the time type [`UnixMs`], the calendar date `CivilDate` and the number format [`Grouped`]. The unit is part
//! of the type, so that the compiler rejects mixed units.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The length of a day in milliseconds.
const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
/// The last time that the calendar library can express, in the year 9999.
const MAX_MS: u64 = 253_402_207_200_999;

/// A time, in milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct UnixMs(pub u64);

impl UnixMs {
    /// Returns the time `duration` later, saturating at the maximum.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Returns the time `duration` earlier, saturating at 1970.
    #[must_use]
    pub fn minus(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Returns the time elapsed since `earlier`, or zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// Formats the time as `2025-02-01T00:00:00.000Z`, as in the status document.
    #[must_use]
    pub fn rfc3339(self) -> String {
        self.rfc3339_bytes().into_iter().map(char::from).collect()
    }

    /// Formats the time like [`rfc3339`](Self::rfc3339), as ASCII and without an allocation, for the
    /// timestamp of each log line.
    #[must_use]
    pub fn rfc3339_bytes(self) -> [u8; 24] {
        let (days, ms_of_day) = (self.0.min(MAX_MS) / DAY_MS, self.0.min(MAX_MS) % DAY_MS);
        let CivilDate { year, month, day } = CivilDate::from_days(days);
        let mut formatted = *b"0000-00-00T00:00:00.000Z";
        for (range, mut number) in [
            (0..4, year),
            (5..7, month),
            (8..10, day),
            (11..13, ms_of_day / 3_600_000),
            (14..16, ms_of_day / 60_000 % 60),
            (17..19, ms_of_day / 1_000 % 60),
            (20..23, ms_of_day % 1_000),
        ] {
            for digit in formatted[range].iter_mut().rev() {
                *digit = b'0' + (number % 10) as u8;
                number /= 10;
            }
        }
        formatted
    }

    /// Formats the time as `2025-02-01T00:00:00Z`, for messages.
    #[must_use]
    pub fn rfc3339_seconds(self) -> String {
        self.timestamp().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }

    /// Formats the time as `2025-02-01 00:00 UTC`, for sentences.
    #[must_use]
    pub fn date_and_minute(self) -> String {
        self.timestamp().strftime("%Y-%m-%d %H:%M UTC").to_string()
    }

    /// Formats the time as `Feb 1`, for tables.
    #[must_use]
    pub fn month_and_day(self) -> String {
        self.timestamp().strftime("%b %-d").to_string()
    }

    /// Parses an RFC 3339 timestamp with any offset. Returns `None` for a time before 1970.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let timestamp: jiff::Timestamp = text.parse().ok()?;
        u64::try_from(timestamp.as_millisecond()).ok().map(Self)
    }

    fn timestamp(self) -> jiff::Timestamp {
        let ms = i64::try_from(self.0).unwrap_or(i64::MAX);
        jiff::Timestamp::from_millisecond(ms).unwrap_or(jiff::Timestamp::MAX)
    }
}

/// A date of the Gregorian calendar. The month and the day are counted from 1.
pub(super) struct CivilDate {
    year: u64,
    month: u64,
    pub(super) day: u64,
}

impl CivilDate {
    /// Returns the date that is `days` after 1970-01-01. This runs for every request and log line, and a general
    /// calendar library takes ten times as long.
    pub(super) fn from_days(days: u64) -> Self {
        const DAYS_OF_400_YEARS: u64 = 146_097;
        // In this computation, years start in March, so that a leap day is the last day of its year.
        let days_since_year_0 = days + 719_468;
        let (era, day_of_era) =
            (days_since_year_0 / DAYS_OF_400_YEARS, days_since_year_0 % DAYS_OF_400_YEARS);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // Five months that start in March have 153 days.
        let months_since_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * months_since_march + 2) / 5 + 1;
        let (month, next_year) =
            if months_since_march < 10 { (months_since_march + 3, 0) } else { (months_since_march - 9, 1) };
        Self { year: era * 400 + year_of_era + next_year, month, day }
    }
}

/// Displays a number with commas between groups of three digits: `94,580`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grouped(pub u64);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(3) {
                f.write_str(",")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_formatted_as_in_the_status_document() {
        assert_eq!(UnixMs(1_738_368_000_000).rfc3339(), "2025-02-01T00:00:00.000Z");
        assert_eq!(UnixMs(1_738_368_000_007).rfc3339(), "2025-02-01T00:00:00.007Z");
        assert_eq!(UnixMs(1_738_368_000_000).month_and_day(), "Feb 1");
        assert_eq!(UnixMs::parse("2025-02-01T00:00:00.007Z"), Some(UnixMs(1_738_368_000_007)));
        assert_eq!(UnixMs::parse("2025-02-01T01:00:00+01:00"), Some(UnixMs(1_738_368_000_000)));
        assert_eq!(UnixMs::parse("1969-12-31T00:00:00Z"), None);
        assert_eq!(UnixMs::parse("soon"), None);
    }

    #[test]
    fn times_are_formatted_as_by_the_calendar_library() {
        assert_eq!(i64::try_from(MAX_MS), Ok(jiff::Timestamp::MAX.as_millisecond()));
        let format_with_library =
            |time: UnixMs| time.timestamp().strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string();
        // The times are the start, the end and a moment of every day until the year 2134, and then of some days.
        let days = (0..60_000).chain((60_000..MAX_MS / DAY_MS).step_by(997));
        for time in days.flat_map(|day| [day * DAY_MS, (day + 1) * DAY_MS - 1, day * DAY_MS + day]) {
            let time = UnixMs(time);
            assert_eq!(time.rfc3339(), format_with_library(time));
        }
        for time in [MAX_MS, MAX_MS + 1, u64::MAX].map(UnixMs) {
            assert_eq!(time.rfc3339(), format_with_library(time));
        }
    }

    #[test]
    fn the_maximum_time_is_formatted_without_panic() {
        assert!(UnixMs(u64::MAX).rfc3339().starts_with("9999-12-"));
        assert_eq!(UnixMs(u64::MAX).plus(Duration::MAX), UnixMs(u64::MAX));
        assert_eq!(UnixMs(1).since(UnixMs(2)), Duration::ZERO);
    }

    #[test]
    fn thousands_are_grouped() {
        for (amount, text) in
            [(0, "0"), (7, "7"), (999, "999"), (1_000, "1,000"), (94_580, "94,580"), (1_234_567, "1,234,567")]
        {
            assert_eq!(Grouped(amount).to_string(), text);
        }
    }
}
