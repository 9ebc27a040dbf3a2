//! Types for moments and amounts, with the unit in the type, so that the compiler rejects a confusion of
//! units.

use std::fmt;
use std::time::Duration;

const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
/// The last moment that the calendar in use can express, in the year 9999.
const MS_MAX: u64 = 253_402_207_200_999;

/// A moment, in milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMs(pub u64);

impl UnixMs {
    /// The moment `span` later, saturating.
    #[must_use]
    pub fn plus(self, span: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(span.as_millis()).unwrap_or(u64::MAX)))
    }

    /// The time from `earlier` to this moment; zero when `earlier` is not earlier.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// `2025-02-01T00:00:00.000Z`, the form of the status document.
    #[must_use]
    pub fn rfc3339(self) -> String {
        self.rfc3339_bytes().into_iter().map(char::from).collect()
    }

    /// [`rfc3339`](Self::rfc3339) as ASCII bytes, without an allocation, because every log line has a
    /// timestamp.
    #[must_use]
    pub fn rfc3339_bytes(self) -> [u8; 24] {
        let (days, of_day) = (self.0.min(MS_MAX) / DAY_MS, self.0.min(MS_MAX) % DAY_MS);
        // Years that begin in March end with their leap day, and 400 of them always have the same length.
        let since_march_0 = days + 719_468;
        let (era, day) = (since_march_0 / 146_097, since_march_0 % 146_097);
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let (month, is_next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        let mut text = *b"0000-00-00T00:00:00.000Z";
        for (range, value) in [
            (0..4, era * 400 + year + is_next_year),
            (5..7, month),
            (8..10, day),
            (11..13, of_day / 3_600_000),
            (14..16, of_day / 60_000 % 60),
            (17..19, of_day / 1_000 % 60),
            (20..23, of_day % 1_000),
        ] {
            let mut value = value;
            for digit in text[range].iter_mut().rev() {
                *digit = b'0' + (value % 10) as u8;
                value /= 10;
            }
        }
        text
    }

    /// `2025-02-01T00:00:00Z`, as in messages.
    #[must_use]
    pub fn rfc3339_seconds(self) -> String {
        self.timestamp().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }

    /// `2025-02-01 00:00 UTC`, as in sentences.
    #[must_use]
    pub fn minute(self) -> String {
        self.timestamp().strftime("%Y-%m-%d %H:%M UTC").to_string()
    }

    /// `Feb 1`, as in tables.
    #[must_use]
    pub fn month_and_day(self) -> String {
        self.timestamp().strftime("%b %-d").to_string()
    }

    /// Parses the form of [`rfc3339`](Self::rfc3339), also with another offset.
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

/// An amount with its thousands separated by commas: `94,580`.
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
    fn moments_are_written_as_in_the_status_document() {
        assert_eq!(UnixMs(1_738_368_000_000).rfc3339(), "2025-02-01T00:00:00.000Z");
        assert_eq!(UnixMs(1_738_368_000_007).rfc3339(), "2025-02-01T00:00:00.007Z");
        assert_eq!(UnixMs(1_738_368_000_000).month_and_day(), "Feb 1");
        assert_eq!(UnixMs::parse("2025-02-01T00:00:00.007Z"), Some(UnixMs(1_738_368_000_007)));
        assert_eq!(UnixMs::parse("2025-02-01T01:00:00+01:00"), Some(UnixMs(1_738_368_000_000)));
        assert_eq!(UnixMs::parse("1969-12-31T00:00:00Z"), None);
        assert_eq!(UnixMs::parse("soon"), None);
    }

    #[test]
    fn moments_are_written_as_by_the_calendar_library() {
        assert_eq!(i64::try_from(MS_MAX), Ok(jiff::Timestamp::MAX.as_millisecond()));
        let as_the_calendar =
            |moment: UnixMs| moment.timestamp().strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string();
        // Every day of the next centuries, then samples, at their ends and in between.
        let days = (0..60_000).chain((60_000..MS_MAX / DAY_MS).step_by(997));
        for moment in days.flat_map(|day| [day * DAY_MS, (day + 1) * DAY_MS - 1, day * DAY_MS + day]) {
            let moment = UnixMs(moment);
            assert_eq!(moment.rfc3339(), as_the_calendar(moment));
        }
        for moment in [MS_MAX, MS_MAX + 1, u64::MAX].map(UnixMs) {
            assert_eq!(moment.rfc3339(), as_the_calendar(moment));
        }
    }

    #[test]
    fn the_last_moment_is_written_without_panic() {
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
