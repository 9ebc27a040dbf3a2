//! Quantities that must not be mixed up: moments and credits, each with its unit in its type.

use std::fmt;
use std::time::Duration;

/// A moment, in milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMs(pub u64);

impl UnixMs {
    /// The moment `span` later; saturates at the end of time.
    #[must_use]
    pub fn plus(self, span: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(span.as_millis()).unwrap_or(u64::MAX)))
    }

    /// How long from `earlier` to here; zero when `earlier` is not earlier.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// `2025-02-01T00:00:00.000Z`, the form of the status document.
    #[must_use]
    pub fn rfc3339(self) -> String {
        self.timestamp().strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
    }

    /// `2025-02-01T00:00:00Z`, the form of a message.
    #[must_use]
    pub fn rfc3339_seconds(self) -> String {
        self.timestamp().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }

    /// `2025-02-01 00:00 UTC`, the form people read in a sentence.
    #[must_use]
    pub fn minute(self) -> String {
        self.timestamp().strftime("%Y-%m-%d %H:%M UTC").to_string()
    }

    /// `Feb 1`, the form people read in a table.
    #[must_use]
    pub fn month_and_day(self) -> String {
        self.timestamp().strftime("%b %-d").to_string()
    }

    /// A moment as [`rfc3339`](Self::rfc3339) writes it, or with another offset.
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
    fn moments_print_as_the_status_document_wants_them() {
        assert_eq!(UnixMs(1_738_368_000_000).rfc3339(), "2025-02-01T00:00:00.000Z");
        assert_eq!(UnixMs(1_738_368_000_007).rfc3339(), "2025-02-01T00:00:00.007Z");
        assert_eq!(UnixMs(1_738_368_000_000).month_and_day(), "Feb 1");
        assert_eq!(UnixMs::parse("2025-02-01T00:00:00.007Z"), Some(UnixMs(1_738_368_000_007)));
        assert_eq!(UnixMs::parse("2025-02-01T01:00:00+01:00"), Some(UnixMs(1_738_368_000_000)));
        assert_eq!(UnixMs::parse("1969-12-31T00:00:00Z"), None);
        assert_eq!(UnixMs::parse("soon"), None);
    }

    #[test]
    fn the_end_of_time_prints_and_does_not_panic() {
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
