//! Parses and displays durations in whole milliseconds: `30s`, `1h30m`, `250ms`.

use std::fmt;
use std::time::Duration;

use super::{QuantityError, Unit, convert_fraction, is_negative, split_where};

/// The units with their length in milliseconds, the largest first.
const UNITS: [Unit; 6] = [
    ("w", 7 * 24 * 3_600_000),
    ("d", 24 * 3_600_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

/// Other spellings of the units. They are rejected, but [`guess`] accepts them.
const LONG_NAMES: [(&str, &[&str]); 6] = [
    ("w", &["wk", "wks", "week", "weeks"]),
    ("d", &["day", "days"]),
    ("h", &["hr", "hrs", "hour", "hours"]),
    ("m", &["min", "mins", "minute", "minutes"]),
    ("s", &["sec", "secs", "second", "seconds"]),
    ("ms", &["msec", "msecs", "millis", "millisecond", "milliseconds"]),
];

/// The units as listed in an error message.
pub const KNOWN_UNITS: &str = "ms, s, m, h, d and w";

/// Parses a duration: whole numbers with units, the largest unit first.
///
/// # Errors
///
/// Fails if `text` is not a duration. Spaces, signs and fractions are errors.
pub fn parse(text: &str) -> Result<Duration, QuantityError> {
    if is_negative(text) {
        return Err(QuantityError::Negative);
    }
    let mut remaining = text;
    let mut milliseconds: u64 = 0;
    // The index of the largest unit that may follow.
    let mut next_unit = 0;
    while !remaining.is_empty() || remaining.len() == text.len() {
        let (digits, after_digits) = split_where(remaining, |character| !character.is_ascii_digit());
        if digits.is_empty() {
            return Err(QuantityError::Malformed);
        }
        if after_digits.starts_with('.') {
            return Err(QuantityError::Fraction(convert_fraction(text, &UNITS)));
        }
        let (unit, next) = split_where(after_digits, |character| !character.is_alphabetic());
        let Some(unit_index) = UNITS.iter().position(|(name, _)| *name == unit) else {
            return Err(match (unit.is_empty(), next.is_empty()) {
                (false, _) => QuantityError::UnknownUnit(unit.to_owned()),
                (true, true) if digits.len() == text.len() => {
                    digits.parse().map_or(QuantityError::TooLarge, QuantityError::NoUnit)
                }
                (true, _) => QuantityError::Malformed,
            });
        };
        if unit_index < next_unit {
            return Err(QuantityError::UnitOrder);
        }
        next_unit = unit_index + 1;
        let count: u64 = digits.parse().map_err(|_| QuantityError::TooLarge)?;
        let part_ms = count.checked_mul(UNITS[unit_index].1);
        milliseconds =
            part_ms.and_then(|part_ms| milliseconds.checked_add(part_ms)).ok_or(QuantityError::TooLarge)?;
        remaining = next;
    }
    Ok(Duration::from_millis(milliseconds))
}

/// Guesses the duration that a value in another notation means, such as `5 min` or `2 Hours`.
#[must_use]
pub fn guess(text: &str) -> Option<Duration> {
    let mut rewritten = String::new();
    let lower = text.trim().trim_matches(['"', '\'']).to_lowercase();
    let mut remaining = lower.trim_start();
    while !remaining.is_empty() {
        let (digits, after_digits) =
            split_where(remaining, |character| !matches!(character, '0'..='9' | '_'));
        let (unit_name, next) =
            split_where(after_digits.trim_start(), |character| !character.is_alphabetic());
        let short_name =
            LONG_NAMES.iter().find(|(_, names)| names.contains(&unit_name)).map(|(unit, _)| *unit);
        let unit = short_name.unwrap_or(unit_name);
        if digits.is_empty() || unit.is_empty() {
            return None;
        }
        rewritten.extend(digits.chars().filter(char::is_ascii_digit).chain(unit.chars()));
        remaining = next.trim_start();
    }
    parse(&rewritten).ok()
}

/// Displays a duration in the notation of [`parse`], to the millisecond: with one unit if the result is short, as in
/// `75s`, and otherwise with several units, as in `1h1m1s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DisplayDuration(pub Duration);

impl fmt::Display for DisplayDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Maximum count of one unit. Two units are easier to read than a larger count.
        const MAX_SINGLE_COUNT: u64 = 99;
        let mut remaining = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        // Weeks are accepted but not displayed, because few people use them.
        let mut units = UNITS.iter().filter(|(unit, _)| *unit != "w");
        if remaining == 0 {
            return f.write_str("0s");
        }
        let exact = units.clone().find(|(_, factor)| remaining.is_multiple_of(*factor));
        if let Some((unit, factor)) = exact.filter(|(_, factor)| remaining / factor <= MAX_SINGLE_COUNT) {
            return write!(f, "{}{unit}", remaining / factor);
        }
        units.try_for_each(|(unit, factor)| {
            let count = remaining / factor;
            remaining %= factor;
            if count > 0 { write!(f, "{count}{unit}") } else { Ok(()) }
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check_duration(text: &str, milliseconds: u64) {
        assert_eq!(parse(text), Ok(Duration::from_millis(milliseconds)), "{text:?} must have this result");
    }

    #[test]
    fn a_number_and_its_unit_are_a_duration() {
        for (text, milliseconds) in [
            ("0s", 0),
            ("250ms", 250),
            ("75s", 75_000),
            ("10m", 600_000),
            ("1h30m", 5_400_000),
            ("1w1d1h1m1s1ms", 694_861_001),
            ("90m", 5_400_000),
            ("007s", 7_000),
            ("18446744073709551615ms", u64::MAX),
        ] {
            check_duration(text, milliseconds);
        }
    }

    #[test]
    fn each_malformed_quantity_has_its_error() {
        let unknown = |unit: &str| QuantityError::UnknownUnit(unit.to_owned());
        let exact = |milliseconds| QuantityError::Fraction(Some(milliseconds));
        for (text, expected) in [
            ("", QuantityError::Malformed),
            ("s", QuantityError::Malformed),
            (" 30s", QuantityError::Malformed),
            ("30s ", QuantityError::Malformed),
            ("30 s", QuantityError::Malformed),
            ("+30s", QuantityError::Malformed),
            ("1h30", QuantityError::Malformed),
            ("1_000ms", QuantityError::Malformed),
            ("-30s", QuantityError::Negative),
            ("75000", QuantityError::NoUnit(75_000)),
            ("0", QuantityError::NoUnit(0)),
            ("30x", unknown("x")),
            ("30S", unknown("S")),
            ("30µs", unknown("µs")),
            ("1h30min", unknown("min")),
            ("1M", unknown("M")),
            ("30m1h", QuantityError::UnitOrder),
            ("1s1s", QuantityError::UnitOrder),
            ("1.5h", exact(5_400_000)),
            ("0.25s", exact(250)),
            ("0.5ms", QuantityError::Fraction(None)),
            ("1.h", QuantityError::Fraction(None)),
            ("1.5", QuantityError::Fraction(None)),
            ("18446744073709551616ms", QuantityError::TooLarge),
            ("18446744073709551616", QuantityError::TooLarge),
            ("99999999999999999999d", QuantityError::TooLarge),
            ("18446744073709551s616ms", QuantityError::TooLarge),
        ] {
            assert_eq!(parse(text), Err(expected), "{text:?} must have this result");
        }
    }

    #[test]
    fn other_notations_are_guessed() {
        for (text, displayed) in [
            ("5 min", "5m"),
            ("30 S", "30s"),
            ("1 hour 30 minutes", "90m"),
            ("1_000 ms", "1s"),
            ("\"75s\"", "75s"),
            ("2 Days", "2d"),
        ] {
            assert_eq!(
                guess(text).map(|guess| DisplayDuration(guess).to_string()).as_deref(),
                Some(displayed)
            );
        }
        for text in ["", "x", "30", "5 parsecs", "min 5", "-5 min"] {
            assert_eq!(guess(text), None, "no duration must be guessed for {text:?}");
        }
    }

    #[test]
    fn a_duration_is_displayed_in_its_shortest_exact_form() {
        for (milliseconds, displayed) in [
            (0, "0s"),
            (1, "1ms"),
            (250, "250ms"),
            (1_500, "1s500ms"),
            (60_000, "1m"),
            (75_000, "75s"),
            (99_000, "99s"),
            (100_000, "1m40s"),
            (5_400_000, "90m"),
            (86_400_000, "1d"),
            (3_661_000, "1h1m1s"),
            (400 * 86_400_000, "400d"),
        ] {
            assert_eq!(DisplayDuration(Duration::from_millis(milliseconds)).to_string(), displayed);
        }
    }

    proptest! {
        #[test]
        fn a_displayed_duration_round_trips(milliseconds: u64) {
            let duration = Duration::from_millis(milliseconds);
            prop_assert_eq!(parse(&DisplayDuration(duration).to_string()), Ok(duration));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,20}|[0-9.]{0,22}(ms|s|m|h|d|w|x)?[0-9smhdw -]{0,8}") {
            let (_, _) = (parse(&text), guess(&text));
        }
    }
}
