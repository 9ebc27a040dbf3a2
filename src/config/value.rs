//! Values as people write them: typed in a file, texts elsewhere; numbers with the units that they
//! mean, and folders that paths start at.

use std::path::{Path, PathBuf};

use toml::de::DeValue;

use super::mask::shown;
use super::problem::{WrongValue, nearest};

pub(super) const MINUTE: u64 = 60_000;
pub(super) const HOUR: u64 = 60 * MINUTE;
pub(super) const DAY: u64 = 24 * HOUR;
pub(super) const MEBI: u64 = 1024 * 1024;
pub(super) const GIBI: u64 = 1024 * MEBI;

/// What a value was written as: a flag and a variable are text, a file has types.
#[derive(Clone, Copy)]
pub(super) enum Raw<'a> {
    Text(&'a str),
    Toml(&'a DeValue<'a>),
}

/// What paths are relative to.
#[derive(Clone, Copy, Default)]
pub(super) struct Folders<'a> {
    /// The folder of the file the path is written in; none for the working directory.
    pub(super) base: Option<&'a Path>,
    /// What `~` stands for.
    pub(super) home: Option<&'a Path>,
}

impl Folders<'_> {
    /// The file that `text` names.
    pub(super) fn file(&self, text: &str) -> Result<PathBuf, WrongValue> {
        if text.trim().is_empty() {
            return Err(WrongValue::new("the path is empty"));
        }
        if let Some(below) = text.strip_prefix("~/") {
            let unknown =
                || WrongValue::new("`~` is unknown: HOME is not set").advise("write the whole path");
            return Ok(self.home.ok_or_else(unknown)?.join(below));
        }
        Ok(self.base.map_or_else(|| PathBuf::from(text), |base| base.join(text)))
    }
}

/// What numbers count, and the endings that people write after them.
pub(super) struct Unit {
    /// ` of bytes`, or nothing where the name says what is counted.
    pub(super) of: &'static str,
    endings: &'static [(&'static str, u64)],
}

pub(super) const MILLISECONDS: Unit = Unit {
    of: " of milliseconds",
    endings: &[("ms", 1), ("s", 1000), ("m", MINUTE), ("min", MINUTE), ("h", HOUR), ("d", DAY)],
};
pub(super) const BYTES: Unit = Unit {
    of: " of bytes",
    endings: &[
        ("b", 1),
        ("k", 1024),
        ("kb", 1024),
        ("kib", 1024),
        ("m", MEBI),
        ("mb", MEBI),
        ("mib", MEBI),
        ("g", GIBI),
        ("gb", GIBI),
        ("gib", GIBI),
    ],
};
pub(super) const PIECES: Unit = Unit { of: "", endings: &[] };

impl Unit {
    /// `30s` in milliseconds, `64k` in bytes.
    fn guess(&self, text: &str) -> Option<u64> {
        let text = text.trim();
        let split = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
        let (digits, ending) = text.split_at(split);
        let ending = ending.trim().to_lowercase();
        let factor = self.endings.iter().find(|(known, _)| *known == ending).map(|(_, factor)| *factor);
        let factor = if ending.is_empty() { Some(1) } else { factor };
        digits.parse::<u64>().ok()?.checked_mul(factor?)
    }
}

pub(super) fn whole_number(raw: Raw<'_>, unit: &Unit) -> Result<u64, WrongValue> {
    let negative = || WrongValue::new("the number is negative");
    let too_large = || WrongValue::new("the number is too large");
    match raw {
        Raw::Toml(DeValue::Integer(integer)) => {
            match u64::from_str_radix(integer.as_str(), integer.radix()) {
                Ok(number) => Ok(number),
                Err(_) if integer.as_str().starts_with('-') => Err(negative()),
                Err(_) => Err(too_large()),
            }
        }
        Raw::Toml(DeValue::Float(_)) => Err(WrongValue::new("a number with a fraction is no whole number")),
        Raw::Toml(DeValue::String(text)) => {
            Err(WrongValue::new("a number is written without quotes").suggest(unit.guess(text)))
        }
        Raw::Toml(other) => Err(wrong_type(other, "a number")),
        Raw::Text(text) => {
            let digits = text.replace('_', "");
            if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return digits.parse().map_err(|_| too_large());
            }
            if digits.strip_prefix('-').is_some_and(|rest| rest.parse::<f64>().is_ok()) {
                return Err(negative());
            }
            Err(WrongValue::new(format!("{} is no whole number", shown(text))).suggest(unit.guess(text)))
        }
    }
}

pub(super) fn ratio(raw: Raw<'_>) -> Result<f64, WrongValue> {
    const FORM: &str = "write a number above 0 and up to 1, for example 0.8 for 80 %";
    let number = match raw {
        Raw::Toml(DeValue::Float(number)) => number.as_str().parse::<f64>().ok(),
        Raw::Toml(DeValue::Integer(number)) => {
            number.as_str().parse::<f64>().ok().filter(|_| number.radix() == 10)
        }
        Raw::Toml(other) => return Err(wrong_type(other, "a number").advise(FORM)),
        Raw::Text(text) => text.parse::<f64>().ok(),
    };
    match number {
        Some(number) if number > 0.0 && number <= 1.0 => Ok(number),
        Some(percent) if percent > 1.0 && percent <= 100.0 => {
            Err(WrongValue::new("the ratio is above 1").advise(FORM).suggest(Some(percent / 100.0)))
        }
        Some(_) => Err(WrongValue::new("the ratio is out of range").advise(FORM)),
        None => Err(WrongValue::new("this is no number").advise(FORM)),
    }
}

pub(super) fn switch(raw: Raw<'_>) -> Result<bool, WrongValue> {
    const FORM: &str = "write `true` or `false`";
    let text = match raw {
        Raw::Toml(DeValue::Boolean(value)) => return Ok(*value),
        Raw::Toml(DeValue::String(text)) => {
            let wrong = WrongValue::new("`true` and `false` are written without quotes");
            return Err(wrong.advise(FORM).suggest(guess_switch(text)));
        }
        Raw::Toml(other) => return Err(wrong_type(other, "`true` or `false`").advise(FORM)),
        Raw::Text(text) => text,
    };
    text.parse().map_err(|_| {
        WrongValue::new(format!("{} is neither true nor false", shown(text)))
            .advise(FORM)
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

/// The text of a value that must be one.
pub(super) fn text<'a>(raw: Raw<'a>) -> Result<&'a str, WrongValue> {
    match raw {
        Raw::Text(text) => Ok(text),
        Raw::Toml(DeValue::String(text)) => Ok(text),
        Raw::Toml(other) => Err(wrong_type(other, "a text").advise("write it in quotes")),
    }
}

/// The texts of a value that may be one or several: a list in a file, commas elsewhere.
pub(super) fn texts<'a>(raw: Raw<'a>) -> Result<Vec<&'a str>, WrongValue> {
    match raw {
        Raw::Text(text) => Ok(text.split(',').map(str::trim).collect()),
        Raw::Toml(DeValue::Array(items)) => {
            items.iter().map(|item| text(Raw::Toml(item.get_ref()))).collect()
        }
        Raw::Toml(_) => Ok(vec![text(raw)?]),
    }
}

/// Says the type of a value and not the value: it may be anything.
pub(super) fn wrong_type(value: &DeValue<'_>, expected: &str) -> WrongValue {
    let found = match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    };
    WrongValue::new(format!("this is {found} and should be {expected}"))
}

pub(super) fn saturated(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
