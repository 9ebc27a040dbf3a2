//! Parses the values of settings from TOML and from text: strings, lists of strings, booleans, whole numbers, ratios,
//! durations and sizes with units, and paths.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::{DeInteger, DeValue};

use super::mask::quote_masked;
use super::problem::ValueError;
use crate::policy::quantity::QuantityError;
use crate::policy::quantity::duration::{self, DisplayDuration};
use crate::policy::quantity::size::{self, DisplaySize};
use crate::policy::similar::find_similar;

/// An unparsed value. Flags and variables are text. The values of a file have TOML types.
#[derive(Clone, Copy)]
pub(super) enum RawValue<'a> {
    /// The text of a flag or a variable.
    Text(&'a str),
    /// A value of a TOML file.
    Toml(&'a DeValue<'a>),
}

/// The base directories of relative paths.
#[derive(Clone, Copy, Default)]
pub(super) struct BaseDirectories<'a> {
    /// The directory of the file that contains the path. `None` means the working directory.
    pub(super) base: Option<&'a Path>,
    /// The home directory, which replaces `~`.
    pub(super) home: Option<&'a Path>,
}

impl BaseDirectories<'_> {
    /// Resolves a path against the base directory, or against the home directory after `~/`.
    pub(super) fn resolve(&self, text: &str) -> Result<PathBuf, ValueError> {
        if text.trim().is_empty() {
            return Err(ValueError::new("the path is empty"));
        }
        if let Some(relative) = text.strip_prefix("~/") {
            let unknown_home_error = || {
                ValueError::new("`~` cannot be resolved: HOME is not set").advise("write an absolute path")
            };
            return Ok(self.home.ok_or_else(unknown_home_error)?.join(relative));
        }
        Ok(self.base.map_or_else(|| PathBuf::from(text), |base| base.join(text)))
    }
}

const NEGATIVE: &str = "the number is negative";
const TOO_LARGE: &str = "the number is too large";

/// Parses a number without a sign.
pub(super) fn parse_integer(raw: RawValue<'_>) -> Result<u64, ValueError> {
    match raw {
        RawValue::Toml(DeValue::Integer(integer)) => parse_toml_integer(integer).map_err(ValueError::new),
        RawValue::Toml(DeValue::Float(_)) => Err(ValueError::new("the number has a fraction")),
        RawValue::Toml(DeValue::String(text)) => {
            Err(ValueError::new("this number is in quotes").suggest(text.parse::<u64>().ok()))
        }
        RawValue::Toml(other) => Err(wrong_type(other, "a number")),
        RawValue::Text(text) => {
            let digits = text.replace('_', "");
            if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return digits.parse().map_err(|_| ValueError::new(TOO_LARGE));
            }
            if digits.strip_prefix('-').is_some_and(|rest| rest.parse::<f64>().is_ok()) {
                return Err(ValueError::new(NEGATIVE));
            }
            Err(ValueError::new(format!("{} is not a whole number", quote_masked(text))))
        }
    }
}

/// Parses a TOML integer in its radix.
fn parse_toml_integer(integer: &DeInteger<'_>) -> Result<u64, &'static str> {
    u64::from_str_radix(integer.as_str(), integer.radix())
        .map_err(|_| if integer.as_str().starts_with('-') { NEGATIVE } else { TOO_LARGE })
}

/// The notation of a quantity with units. A quantity is counted in its smallest unit.
struct Notation {
    /// The word for the quantity in messages.
    noun: &'static str,
    parse: fn(&str) -> Result<u64, QuantityError>,
    /// Returns the quantity that an invalid text probably means, for a suggestion.
    guess: fn(&str) -> Option<u64>,
    format: fn(u64) -> String,
    /// The suggested unit for a number without a unit, and its factor in the smallest unit.
    default_unit: (&'static str, u64),
    known_units: &'static str,
}

const DURATION: Notation = Notation {
    noun: "duration",
    parse: |text| duration::parse(text).map(milliseconds),
    guess: |text| duration::guess(text).map(milliseconds),
    format: |milliseconds| DisplayDuration(Duration::from_millis(milliseconds)).to_string(),
    default_unit: ("milliseconds", 1),
    known_units: duration::KNOWN_UNITS,
};

const DAYS: Notation = Notation { default_unit: ("days", 24 * 3_600_000), ..DURATION };

const SIZE: Notation = Notation {
    noun: "size",
    parse: size::parse,
    guess: size::guess,
    format: |bytes| DisplaySize(bytes).to_string(),
    default_unit: ("bytes", 1),
    known_units: size::KNOWN_UNITS,
};

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Parses a duration such as `"30s"`.
pub(super) fn parse_duration(raw: RawValue<'_>) -> Result<Duration, ValueError> {
    DURATION.parse_quantity(raw).map(Duration::from_millis)
}

/// Parses a duration such as `"30d"`. An error about a missing unit suggests days.
pub(super) fn parse_days(raw: RawValue<'_>) -> Result<Duration, ValueError> {
    DAYS.parse_quantity(raw).map(Duration::from_millis)
}

/// Parses a size such as `"16MiB"` into bytes.
pub(super) fn parse_size(raw: RawValue<'_>) -> Result<u64, ValueError> {
    SIZE.parse_quantity(raw)
}

impl Notation {
    /// Parses a quantity. The error contains advice.
    fn parse_quantity(&self, raw: RawValue<'_>) -> Result<u64, ValueError> {
        let noun = self.noun;
        let text = match raw {
            RawValue::Text(text) => text,
            RawValue::Toml(DeValue::String(text)) => text,
            RawValue::Toml(DeValue::Integer(integer)) => {
                let number = parse_toml_integer(integer).map_err(ValueError::new)?;
                return Err(self.missing_unit_error(number, raw));
            }
            RawValue::Toml(DeValue::Float(_)) => {
                return Err(ValueError::new(format!("a {noun} is a whole number with a unit")));
            }
            RawValue::Toml(other) => return Err(wrong_type(other, &format!("a {noun} in quotes"))),
        };
        let error = match (self.parse)(text) {
            Ok(number) => return Ok(number),
            Err(QuantityError::NoUnit(number)) => return Err(self.missing_unit_error(number, raw)),
            Err(QuantityError::Negative) => return Err(ValueError::new(format!("the {noun} is negative"))),
            Err(QuantityError::TooLarge) => return Err(ValueError::new(format!("the {noun} is too large"))),
            Err(QuantityError::Fraction(exact)) => {
                let error = ValueError::new(format!("{} has a fraction", quote_masked(text)));
                return Err(match exact {
                    Some(number) => error.advise(format!("write {}", self.format_for(raw, number))),
                    None => error,
                });
            }
            Err(QuantityError::UnknownUnit(unit)) => ValueError::new(format!(
                "{} has the unknown unit {}",
                quote_masked(text),
                quote_masked(&unit)
            ))
            .advise(format!("the units are {}", self.known_units)),
            Err(QuantityError::UnitOrder) => {
                ValueError::new(format!("{} has its units in the wrong order", quote_masked(text)))
                    .advise("write the largest unit first, as in 1h30m")
            }
            Err(QuantityError::Malformed) => {
                ValueError::new(format!("{} is not a {noun}", quote_masked(text)))
            }
        };
        Err(error.suggest((self.guess)(text).map(|number| (self.format)(number))))
    }

    /// Returns the error for a number without a unit. It suggests the number with the default unit.
    fn missing_unit_error(&self, number: u64, raw: RawValue<'_>) -> ValueError {
        let (unit, factor) = self.default_unit;
        let error = ValueError::new(format!("a {} needs a unit", self.noun));
        match number.checked_mul(factor) {
            Some(converted) => {
                error.advise(format!("write {} for {number} {unit}", self.format_for(raw, converted)))
            }
            None => error,
        }
    }

    /// Formats a quantity in the notation of the source of `raw`: with quotes in a file, and without in a variable.
    fn format_for(&self, raw: RawValue<'_>, number: u64) -> String {
        let formatted = (self.format)(number);
        match raw {
            RawValue::Text(_) => formatted,
            RawValue::Toml(_) => format!("\"{formatted}\""),
        }
    }
}

/// Parses a number above 0 and up to 1.
pub(super) fn parse_ratio(raw: RawValue<'_>) -> Result<f64, ValueError> {
    const ADVICE: &str = "write a number above 0 and up to 1, for example 0.8 for 80 %";
    let number = match raw {
        RawValue::Toml(DeValue::Float(number)) => number.as_str().parse::<f64>().ok(),
        RawValue::Toml(DeValue::Integer(number)) => {
            number.as_str().parse::<f64>().ok().filter(|_| number.radix() == 10)
        }
        RawValue::Toml(other) => return Err(wrong_type(other, "a number").advise(ADVICE)),
        RawValue::Text(text) => text.parse::<f64>().ok(),
    };
    match number {
        Some(number) if number > 0.0 && number <= 1.0 => Ok(number),
        Some(percent) if percent > 1.0 && percent <= 100.0 => {
            Err(ValueError::new("the ratio is above 1").advise(ADVICE).suggest(Some(percent / 100.0)))
        }
        Some(_) => Err(ValueError::new("the ratio is out of range").advise(ADVICE)),
        None => Err(ValueError::new("this is not a number").advise(ADVICE)),
    }
}

/// Parses `true` or `false`.
pub(super) fn parse_bool(raw: RawValue<'_>) -> Result<bool, ValueError> {
    const ADVICE: &str = "write `true` or `false`";
    let text = match raw {
        RawValue::Toml(DeValue::Boolean(is_true)) => return Ok(*is_true),
        RawValue::Toml(DeValue::String(text)) => {
            let error = ValueError::new("this boolean is in quotes");
            return Err(error.advise(ADVICE).suggest(guess_bool(text)));
        }
        RawValue::Toml(other) => return Err(wrong_type(other, "`true` or `false`").advise(ADVICE)),
        RawValue::Text(text) => text,
    };
    text.parse().map_err(|_| {
        ValueError::new(format!("{} is neither true nor false", quote_masked(text)))
            .advise(ADVICE)
            .suggest(guess_bool(text))
    })
}

/// Returns the boolean that an invalid text probably means.
fn guess_bool(text: &str) -> Option<bool> {
    match text.to_lowercase().as_str() {
        "1" | "on" | "yes" | "y" => Some(true),
        "0" | "off" | "no" | "n" => Some(false),
        other => find_similar(other, ["true", "false"]).map(|word| word == "true"),
    }
}

/// Parses a single string.
pub(super) fn parse_string<'a>(raw: RawValue<'a>) -> Result<&'a str, ValueError> {
    match raw {
        RawValue::Text(text) => Ok(text),
        RawValue::Toml(DeValue::String(text)) => Ok(text),
        RawValue::Toml(other) => Err(wrong_type(other, "a string").advise("write it in quotes")),
    }
}

/// Parses one or more strings: a string or a list in a file, or texts that commas separate in a variable.
pub(super) fn parse_strings<'a>(raw: RawValue<'a>) -> Result<Vec<&'a str>, ValueError> {
    match raw {
        RawValue::Text(text) => Ok(text.split(',').map(str::trim).collect()),
        RawValue::Toml(DeValue::Array(items)) => {
            items.iter().map(|item| parse_string(RawValue::Toml(item.get_ref()))).collect()
        }
        RawValue::Toml(_) => Ok(vec![parse_string(raw)?]),
    }
}

/// Returns the error for a value of a wrong type. It contains the type and not the value, which may be a secret.
pub(super) fn wrong_type(value: &DeValue<'_>, expected: &str) -> ValueError {
    let actual = match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    };
    ValueError::new(format!("this is {actual}, but should be {expected}"))
}

/// Converts a number, or returns the largest `usize` if it is larger than that.
pub(super) fn saturating_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
