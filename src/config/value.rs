//! Parses values from TOML and from text: strings, numbers, durations and sizes with units, and
//! paths relative to folders.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::{DeInteger, DeValue};

use super::mask::shown;
use super::problem::{WrongValue, nearest};
use crate::policy::quantity::QuantityError;
use crate::policy::quantity::duration::{self, ShownDuration};
use crate::policy::quantity::size::{self, ShownSize};

/// An unparsed value. Flags and variables are text; the values of a file have TOML types.
#[derive(Clone, Copy)]
pub(super) enum Raw<'a> {
    Text(&'a str),
    Toml(&'a DeValue<'a>),
}

/// The base folders of relative paths.
#[derive(Clone, Copy, Default)]
pub(super) struct Folders<'a> {
    /// The folder of the file that contains the path; `None` for the working directory.
    pub(super) base: Option<&'a Path>,
    /// The home folder, which replaces `~`.
    pub(super) home: Option<&'a Path>,
}

impl Folders<'_> {
    /// Parses a path and makes it absolute where a folder is known.
    pub(super) fn file(&self, text: &str) -> Result<PathBuf, WrongValue> {
        if text.trim().is_empty() {
            return Err(WrongValue::new("the path is empty"));
        }
        if let Some(relative) = text.strip_prefix("~/") {
            let unknown =
                || WrongValue::new("`~` is unknown: HOME is not set").advise("write the whole path");
            return Ok(self.home.ok_or_else(unknown)?.join(relative));
        }
        Ok(self.base.map_or_else(|| PathBuf::from(text), |base| base.join(text)))
    }
}

/// Errors of numbers.
const NEGATIVE: &str = "the number is negative";
const TOO_LARGE: &str = "the number is too large";

pub(super) fn whole_number(raw: Raw<'_>) -> Result<u64, WrongValue> {
    match raw {
        Raw::Toml(DeValue::Integer(integer)) => parse_integer(integer).map_err(WrongValue::new),
        Raw::Toml(DeValue::Float(_)) => Err(WrongValue::new("a number with a fraction is no whole number")),
        Raw::Toml(DeValue::String(text)) => {
            Err(WrongValue::new("a number is written without quotes").suggest(text.parse::<u64>().ok()))
        }
        Raw::Toml(other) => Err(wrong_type(other, "a number")),
        Raw::Text(text) => {
            let digits = text.replace('_', "");
            if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return digits.parse().map_err(|_| WrongValue::new(TOO_LARGE));
            }
            if digits.strip_prefix('-').is_some_and(|rest| rest.parse::<f64>().is_ok()) {
                return Err(WrongValue::new(NEGATIVE));
            }
            Err(WrongValue::new(format!("{} is no whole number", shown(text))))
        }
    }
}

/// Parses a TOML integer in its radix.
fn parse_integer(integer: &DeInteger<'_>) -> Result<u64, &'static str> {
    u64::from_str_radix(integer.as_str(), integer.radix())
        .map_err(|_| if integer.as_str().starts_with('-') { NEGATIVE } else { TOO_LARGE })
}

/// A notation of quantities with units.
struct Notation {
    noun: &'static str,
    parse: fn(&str) -> Result<u64, QuantityError>,
    guess: fn(&str) -> Option<u64>,
    show: fn(u64) -> String,
    /// The suggested unit for a number without a unit, and its factor in the smallest unit.
    default_unit: (&'static str, u64),
    known_units: &'static str,
}

const DURATION: Notation = Notation {
    noun: "duration",
    parse: |text| duration::parse(text).map(milliseconds),
    guess: |text| duration::guess(text).map(milliseconds),
    show: |milliseconds| ShownDuration(Duration::from_millis(milliseconds)).to_string(),
    default_unit: ("milliseconds", 1),
    known_units: duration::KNOWN_UNITS,
};

const DAYS: Notation = Notation { default_unit: ("days", 24 * 3_600_000), ..DURATION };

const SIZE: Notation = Notation {
    noun: "size",
    parse: size::parse,
    guess: size::guess,
    show: |bytes| ShownSize(bytes).to_string(),
    default_unit: ("bytes", 1),
    known_units: size::KNOWN_UNITS,
};

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Parses a duration such as `"30s"`.
pub(super) fn duration(raw: Raw<'_>) -> Result<Duration, WrongValue> {
    DURATION.read(raw).map(Duration::from_millis)
}

/// Parses a duration such as `"30d"`, usually in days.
pub(super) fn days(raw: Raw<'_>) -> Result<Duration, WrongValue> {
    DAYS.read(raw).map(Duration::from_millis)
}

/// Parses a size such as `"16MiB"` into bytes.
pub(super) fn size(raw: Raw<'_>) -> Result<u64, WrongValue> {
    SIZE.read(raw)
}

impl Notation {
    /// Parses a quantity into its smallest unit. The error contains advice.
    fn read(&self, raw: Raw<'_>) -> Result<u64, WrongValue> {
        let noun = self.noun;
        let text = match raw {
            Raw::Text(text) => text,
            Raw::Toml(DeValue::String(text)) => text,
            Raw::Toml(DeValue::Integer(integer)) => {
                let number = parse_integer(integer).map_err(WrongValue::new)?;
                return Err(self.missing_unit(number, raw));
            }
            Raw::Toml(DeValue::Float(_)) => {
                return Err(WrongValue::new(format!("a {noun} has a unit and no fraction")));
            }
            Raw::Toml(other) => return Err(wrong_type(other, &format!("a {noun} in quotes"))),
        };
        let wrong = match (self.parse)(text) {
            Ok(number) => return Ok(number),
            Err(QuantityError::NoUnit(number)) => return Err(self.missing_unit(number, raw)),
            Err(QuantityError::Negative) => return Err(WrongValue::new(format!("the {noun} is negative"))),
            Err(QuantityError::TooLarge) => return Err(WrongValue::new(format!("the {noun} is too large"))),
            Err(QuantityError::Fraction(exact)) => {
                let wrong = WrongValue::new(format!("{} has a fraction", shown(text)));
                return Err(match exact {
                    Some(number) => wrong.advise(format!("write {}", self.written(number, raw))),
                    None => wrong,
                });
            }
            Err(QuantityError::UnknownUnit(unit)) => {
                WrongValue::new(format!("{} has the unknown unit {}", shown(text), shown(&unit)))
                    .advise(format!("the units are {}", self.known_units))
            }
            Err(QuantityError::UnitOrder) => {
                WrongValue::new(format!("{} has its units in another order than 1h30m", shown(text)))
            }
            Err(QuantityError::Malformed) => WrongValue::new(format!("{} is no {noun}", shown(text))),
        };
        Err(wrong.suggest((self.guess)(text).map(|number| (self.show)(number))))
    }

    /// The error for a number without a unit. It suggests the same number with the probable unit.
    fn missing_unit(&self, number: u64, raw: Raw<'_>) -> WrongValue {
        let (unit, factor) = self.default_unit;
        let wrong = WrongValue::new(format!("a {} is written with its unit", self.noun));
        match number.checked_mul(factor) {
            Some(converted) => {
                let written = self.written(converted, raw);
                wrong.advise(format!("write {written} if {number} {unit} are meant"))
            }
            None => wrong,
        }
    }

    /// Formats the quantity for its source: quoted in a file, unquoted in a variable.
    fn written(&self, number: u64, raw: Raw<'_>) -> String {
        let shown = (self.show)(number);
        match raw {
            Raw::Text(_) => shown,
            Raw::Toml(_) => format!("\"{shown}\""),
        }
    }
}

pub(super) fn ratio(raw: Raw<'_>) -> Result<f64, WrongValue> {
    const ADVICE: &str = "write a number above 0 and up to 1, for example 0.8 for 80 %";
    let number = match raw {
        Raw::Toml(DeValue::Float(number)) => number.as_str().parse::<f64>().ok(),
        Raw::Toml(DeValue::Integer(number)) => {
            number.as_str().parse::<f64>().ok().filter(|_| number.radix() == 10)
        }
        Raw::Toml(other) => return Err(wrong_type(other, "a number").advise(ADVICE)),
        Raw::Text(text) => text.parse::<f64>().ok(),
    };
    match number {
        Some(number) if number > 0.0 && number <= 1.0 => Ok(number),
        Some(percent) if percent > 1.0 && percent <= 100.0 => {
            Err(WrongValue::new("the ratio is above 1").advise(ADVICE).suggest(Some(percent / 100.0)))
        }
        Some(_) => Err(WrongValue::new("the ratio is out of range").advise(ADVICE)),
        None => Err(WrongValue::new("this is no number").advise(ADVICE)),
    }
}

pub(super) fn switch(raw: Raw<'_>) -> Result<bool, WrongValue> {
    const ADVICE: &str = "write `true` or `false`";
    let text = match raw {
        Raw::Toml(DeValue::Boolean(value)) => return Ok(*value),
        Raw::Toml(DeValue::String(text)) => {
            let wrong = WrongValue::new("`true` and `false` are written without quotes");
            return Err(wrong.advise(ADVICE).suggest(guess_switch(text)));
        }
        Raw::Toml(other) => return Err(wrong_type(other, "`true` or `false`").advise(ADVICE)),
        Raw::Text(text) => text,
    };
    text.parse().map_err(|_| {
        WrongValue::new(format!("{} is neither true nor false", shown(text)))
            .advise(ADVICE)
            .suggest(guess_switch(text))
    })
}

fn guess_switch(text: &str) -> Option<bool> {
    match text.to_lowercase().as_str() {
        "1" | "on" | "yes" | "y" => Some(true),
        "0" | "off" | "no" | "n" => Some(false),
        other => nearest(other, ["true", "false"]).map(|word| word == "true"),
    }
}

/// The string of a value; any other type is an error.
pub(super) fn text<'a>(raw: Raw<'a>) -> Result<&'a str, WrongValue> {
    match raw {
        Raw::Text(text) => Ok(text),
        Raw::Toml(DeValue::String(text)) => Ok(text),
        Raw::Toml(other) => Err(wrong_type(other, "a text").advise("write it in quotes")),
    }
}

/// The strings of a value with several: a list in a file, else text separated by commas.
pub(super) fn texts<'a>(raw: Raw<'a>) -> Result<Vec<&'a str>, WrongValue> {
    match raw {
        Raw::Text(text) => Ok(text.split(',').map(str::trim).collect()),
        Raw::Toml(DeValue::Array(items)) => {
            items.iter().map(|item| text(Raw::Toml(item.get_ref()))).collect()
        }
        Raw::Toml(_) => Ok(vec![text(raw)?]),
    }
}

/// The error for a wrong type. It contains the type and not the value, which may be a secret.
pub(super) fn wrong_type(value: &DeValue<'_>, expected: &str) -> WrongValue {
    let actual = match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    };
    WrongValue::new(format!("this is {actual} and should be {expected}"))
}

pub(super) fn saturated(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
