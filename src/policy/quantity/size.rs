//! Parses and displays sizes in whole bytes: `16MiB`, `64KiB`, `1GB`.

use std::fmt;

use super::{QuantityError, Unit, convert_fraction, is_negative, split_where};

/// The units with their size in bytes, the smallest first.
const UNITS: [Unit; 9] = [
    ("B", 1),
    ("kB", 1_000),
    ("KiB", 1 << 10),
    ("MB", 1_000_000),
    ("MiB", 1 << 20),
    ("GB", 1_000_000_000),
    ("GiB", 1 << 30),
    ("TB", 1_000_000_000_000),
    ("TiB", 1 << 40),
];

/// The units as listed in an error message.
pub const KNOWN_UNITS: &str = "B, KiB, MiB, GiB and TiB (of 1024), kB, MB, GB and TB (of 1000)";

/// Parses a size, a whole number with a unit, and returns it in bytes.
///
/// # Errors
///
/// Fails if `text` is not a size. Spaces, signs and fractions are errors.
pub fn parse(text: &str) -> Result<u64, QuantityError> {
    if is_negative(text) {
        return Err(QuantityError::Negative);
    }
    let (digits, unit) = split_where(text, |character| !character.is_ascii_digit());
    if digits.is_empty() {
        return Err(QuantityError::Malformed);
    }
    if unit.starts_with('.') {
        return Err(QuantityError::Fraction(convert_fraction(text, &UNITS)));
    }
    if unit.is_empty() {
        return Err(digits.parse().map_or(QuantityError::TooLarge, QuantityError::NoUnit));
    }
    let Some((_, factor)) = UNITS.iter().find(|(name, _)| *name == unit) else {
        let is_alphabetic = unit.chars().all(char::is_alphabetic);
        return Err(if is_alphabetic {
            QuantityError::UnknownUnit(unit.to_owned())
        } else {
            QuantityError::Malformed
        });
    };
    digits.parse::<u64>().ok().and_then(|count| count.checked_mul(*factor)).ok_or(QuantityError::TooLarge)
}

/// Guesses the size that a value in another notation means, such as `64k`, `1 MiB` or `10gb`.
#[must_use]
pub fn guess(text: &str) -> Option<u64> {
    let text = text.trim().trim_matches(['"', '\'']);
    let (digits, after_digits) = split_where(text, |character| !matches!(character, '0'..='9' | '_'));
    let unit = after_digits.trim_start().to_lowercase();
    let exact = UNITS.iter().find(|(name, _)| name.to_lowercase() == unit);
    // A single letter means a binary unit, as is common for memory.
    let binary = || UNITS.iter().find(|(name, _)| name.to_lowercase() == format!("{unit}ib"));
    let (_, factor) = exact.or_else(|| if unit.len() == 1 { binary() } else { None })?;
    digits.replace('_', "").parse::<u64>().ok()?.checked_mul(*factor)
}

/// Displays a number of bytes in the notation of [`parse`], with the largest unit that divides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DisplaySize(pub u64);

impl fmt::Display for DisplaySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = UNITS.iter().rev().find(|(_, factor)| self.0 > 0 && self.0.is_multiple_of(*factor));
        let (unit, factor) = exact.unwrap_or(&UNITS[0]);
        write!(f, "{}{unit}", self.0 / factor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_number_and_its_unit_are_a_size() {
        for (text, bytes) in [
            ("0B", 0),
            ("500B", 500),
            ("1kB", 1_000),
            ("64KiB", 65_536),
            ("16MiB", 16_777_216),
            ("1MB", 1_000_000),
            ("6GiB", 6_442_450_944),
            ("2GB", 2_000_000_000),
            ("1TiB", 1_099_511_627_776),
            ("1TB", 1_000_000_000_000),
            ("18446744073709551615B", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text:?} must have this result");
        }
    }

    #[test]
    fn each_malformed_quantity_has_its_error() {
        let unknown = |unit: &str| QuantityError::UnknownUnit(unit.to_owned());
        for (text, expected) in [
            ("", QuantityError::Malformed),
            ("MiB", QuantityError::Malformed),
            (" 1MiB", QuantityError::Malformed),
            ("1 MiB", QuantityError::Malformed),
            ("+1MiB", QuantityError::Malformed),
            ("1MiB2KiB", QuantityError::Malformed),
            ("1_000B", QuantityError::Malformed),
            ("-1MiB", QuantityError::Negative),
            ("16777216", QuantityError::NoUnit(16_777_216)),
            ("64k", unknown("k")),
            ("64KB", unknown("KB")),
            ("1Mb", unknown("Mb")),
            ("1PiB", unknown("PiB")),
            ("1.5MiB", QuantityError::Fraction(Some(1_572_864))),
            ("0.1KiB", QuantityError::Fraction(None)),
            ("1.5", QuantityError::Fraction(None)),
            ("18446744073709551616B", QuantityError::TooLarge),
            ("18446744073709551616", QuantityError::TooLarge),
            ("16777216TiB", QuantityError::TooLarge),
        ] {
            assert_eq!(parse(text), Err(expected), "{text:?} must have this result");
        }
    }

    #[test]
    fn other_notations_are_guessed() {
        for (text, displayed) in [
            ("64k", "64KiB"),
            ("1 MiB", "1MiB"),
            ("10gb", "10GB"),
            ("64KB", "64kB"),
            ("1_000 b", "1kB"),
            ("\"16MiB\"", "16MiB"),
        ] {
            assert_eq!(guess(text).map(|bytes| DisplaySize(bytes).to_string()).as_deref(), Some(displayed));
        }
        for text in ["", "x", "30", "5 pages", "-1MiB"] {
            assert_eq!(guess(text), None, "no size must be guessed for {text:?}");
        }
    }

    #[test]
    fn a_size_is_displayed_in_its_shortest_exact_form() {
        for (bytes, displayed) in [
            (0, "0B"),
            (500, "500B"),
            (1_000, "1kB"),
            (1_024, "1KiB"),
            (1_500_000, "1500kB"),
            (268_435_456, "256MiB"),
            (25_769_803_776, "24GiB"),
            (16_777_215, "16777215B"),
        ] {
            assert_eq!(DisplaySize(bytes).to_string(), displayed);
        }
    }

    proptest! {
        #[test]
        fn a_displayed_size_round_trips(bytes: u64, shift in 0_u32..64) {
            let bytes = bytes >> shift << (shift / 2);
            prop_assert_eq!(parse(&DisplaySize(bytes).to_string()), Ok(bytes));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,20}|[0-9.]{0,22}(B|KiB|MB|x)?[0-9kMB -]{0,8}") {
            let (_, _) = (parse(&text), guess(&text));
        }
    }
}
