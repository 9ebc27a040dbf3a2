//! Parses, formats, compares and copies each setting by its entry in the table [`SETTINGS`]: its path, its type with
//! limits, and the field of [`Config`] that stores it. Files, variables and suggestions use the same table, so a new
//! setting needs only an entry in `table`, and a field with its default in the struct of its section.

mod table;

use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::Config;
use super::listen::ListenAddresses;
use super::problem::ValueError;
use super::proxy::ProxySetting;
use super::redis::RedisUrlSetting;
use super::tls::{self, TlsConfig};
use super::value::{
    BaseDirectories, RawValue, parse_bool, parse_days, parse_duration, parse_integer, parse_ratio,
    parse_size, parse_string, parse_strings, saturating_usize, wrong_type,
};
use crate::policy::quantity::duration::DisplayDuration;
use crate::policy::quantity::size::DisplaySize;

const ZERO: Duration = Duration::ZERO;
const DAY: Duration = Duration::from_secs(24 * 3_600);
/// Maximum retention, which is a hundred years.
const MAX_RETENTION: Duration = Duration::from_secs(36_500 * 24 * 3_600);

pub(super) use table::SETTINGS;

/// One setting of the configuration.
pub(super) struct Setting {
    /// The section and the name in the TOML file, as `section.name`. A setting that may be a table is also a section.
    pub(super) path: &'static str,
    kind: ValueKind,
}

/// The type of a value with its limits, and the field that stores it.
enum ValueKind {
    /// A value that is parsed from a string.
    Text(fn(&mut Config) -> &mut dyn TextValue),
    Listen(fn(&mut Config) -> &mut ListenAddresses),
    /// The URL of a forward proxy, whose credentials are not printed.
    Proxy(fn(&mut Config) -> &mut ProxySetting),
    /// The URL of Redis, whose credentials are not printed.
    Redis(fn(&mut Config) -> &mut RedisUrlSetting),
    /// A string, or a table whose members are settings.
    Tls(fn(&mut Config) -> &mut TlsConfig),
    /// A list of strings, each of which the first function parses.
    Strings(fn(&str) -> Result<String, ValueError>, fn(&mut Config) -> &mut Vec<String>),
    Duration(RangeInclusive<Duration>, fn(&mut Config) -> &mut Duration),
    /// A retention time, usually in days, or zero for unlimited.
    Retention(fn(&mut Config) -> &mut Duration),
    Size(RangeInclusive<u64>, fn(&mut Config) -> &mut usize),
    Count(RangeInclusive<u64>, fn(&mut Config) -> &mut usize),
    Ratio(fn(&mut Config) -> &mut f64),
    Bool(fn(&mut Config) -> &mut bool),
    File(fn(&mut Config) -> &mut PathBuf),
    /// A path, or an empty string for none.
    OptionalFile(fn(&mut Config) -> &mut Option<PathBuf>),
}

/// Finds the setting with exactly this path.
pub(super) fn find(path: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.path == path)
}

/// Returns the name of the environment variable for the setting with the given `path`.
pub(super) fn variable_name(path: &str) -> String {
    format!("KEYCHOIR_{}", path.to_uppercase().replace('.', "__"))
}

/// Returns whether `name` is the name of a section.
pub(super) fn is_section(name: &str) -> bool {
    SETTINGS.iter().any(|setting| setting.section() == name)
}

/// Finds the setting to suggest for a name whose section is missing or wrong.
pub(super) fn find_by_name(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.name() == name && !setting.is_nested())
}

impl Setting {
    /// Returns the part of the path before the last dot.
    pub(super) fn section(&self) -> &'static str {
        self.path.rsplit_once('.').map_or(self.path, |(section, _)| section)
    }

    /// Returns the part of the path after the last dot.
    pub(super) fn name(&self) -> &'static str {
        self.path.rsplit_once('.').map_or(self.path, |(_, name)| name)
    }

    /// Returns whether the path of this setting starts with the path of another setting. If so, the name alone is
    /// ambiguous.
    pub(super) fn is_nested(&self) -> bool {
        find(self.section()).is_some()
    }

    /// Returns the name of the setting's environment variable.
    pub(super) fn variable_name(&self) -> String {
        variable_name(self.path)
    }

    /// Parses `raw` into the field of `config`, or leaves the field unchanged and returns the
    /// error.
    pub(super) fn parse_into(
        &self,
        raw: RawValue<'_>,
        directories: BaseDirectories<'_>,
        config: &mut Config,
    ) -> Result<(), ValueError> {
        match &self.kind {
            ValueKind::Text(field) => field(config).set(parse_string(raw)?)?,
            ValueKind::Proxy(field) => *field(config) = parse_string(raw)?.parse()?,
            ValueKind::Redis(field) => *field(config) = parse_string(raw)?.parse()?,
            ValueKind::Tls(field) => match raw {
                RawValue::Toml(value) if !value.is_str() => {
                    let suggestion = value.as_bool().map(|is_on| if is_on { "\"auto\"" } else { "\"off\"" });
                    let error = wrong_type(value, "a string or a table").advise(tls::NOTATION);
                    return Err(error.suggest(suggestion));
                }
                RawValue::Toml(_) | RawValue::Text(_) => field(config).set(parse_string(raw)?)?,
            },
            ValueKind::Listen(field) => *field(config) = ListenAddresses::parse(&parse_strings(raw)?)?,
            ValueKind::Strings(parse_item, field) => {
                let items = parse_strings(raw)?.into_iter().filter(|text| !text.is_empty()).map(parse_item);
                *field(config) = items.collect::<Result<_, _>>()?;
            }
            ValueKind::Duration(range, field) => {
                *field(config) = self.check_range(parse_duration(raw), range, &DURATION_RANGE)?;
            }
            ValueKind::Retention(field) => {
                *field(config) = match parse_days(raw) {
                    Ok(ZERO) => ZERO,
                    parsed => self.check_range(parsed, &(DAY..=MAX_RETENTION), &RETENTION_RANGE)?,
                };
            }
            ValueKind::Size(range, field) => {
                *field(config) = saturating_usize(self.check_range(parse_size(raw), range, &SIZE_RANGE)?);
            }
            ValueKind::Count(range, field) => {
                *field(config) =
                    saturating_usize(self.check_range(parse_integer(raw), range, &COUNT_RANGE)?);
            }
            ValueKind::Ratio(field) => *field(config) = parse_ratio(raw)?,
            ValueKind::Bool(field) => *field(config) = parse_bool(raw)?,
            ValueKind::File(field) => *field(config) = directories.resolve(parse_string(raw)?)?,
            ValueKind::OptionalFile(field) => {
                let text = parse_string(raw)?;
                *field(config) = if text.trim().is_empty() { None } else { Some(directories.resolve(text)?) };
            }
        }
        Ok(())
    }

    /// Returns whether the values in two configurations differ. Parts that are not printed are compared as well.
    pub(super) fn differs(&self, first: &mut Config, second: &mut Config) -> bool {
        match &self.kind {
            ValueKind::Proxy(field) => field(first) != field(second),
            ValueKind::Redis(field) => field(first) != field(second),
            ValueKind::Text(_)
            | ValueKind::Listen(_)
            | ValueKind::Tls(_)
            | ValueKind::Strings(..)
            | ValueKind::Duration(..)
            | ValueKind::Retention(_)
            | ValueKind::Size(..)
            | ValueKind::Count(..)
            | ValueKind::Ratio(_)
            | ValueKind::Bool(_)
            | ValueKind::File(_)
            | ValueKind::OptionalFile(_) => self.format_value(first) != self.format_value(second),
        }
    }

    /// Returns whether the value in `config` contains credentials, which are not printed.
    pub(super) fn contains_secret(&self, config: &mut Config) -> bool {
        match &self.kind {
            ValueKind::Proxy(field) => field(config).has_credentials(),
            ValueKind::Redis(field) => field(config).has_credentials(),
            ValueKind::Text(_)
            | ValueKind::Listen(_)
            | ValueKind::Tls(_)
            | ValueKind::Strings(..)
            | ValueKind::Duration(..)
            | ValueKind::Retention(_)
            | ValueKind::Size(..)
            | ValueKind::Count(..)
            | ValueKind::Ratio(_)
            | ValueKind::Bool(_)
            | ValueKind::File(_)
            | ValueKind::OptionalFile(_) => false,
        }
    }

    /// Copies the value in `source` to `target`.
    pub(super) fn copy_value(&self, source: &mut Config, target: &mut Config) {
        match &self.kind {
            // The printed form of a valid value can always be parsed.
            ValueKind::Text(field) => {
                let _ = field(target).set(&field(source).to_string());
            }
            ValueKind::Proxy(field) => field(target).clone_from(field(source)),
            ValueKind::Redis(field) => field(target).clone_from(field(source)),
            ValueKind::Tls(field) => field(target).clone_from(field(source)),
            ValueKind::Listen(field) => field(target).clone_from(field(source)),
            ValueKind::Strings(_, field) => field(target).clone_from(field(source)),
            ValueKind::Duration(_, field) | ValueKind::Retention(field) => *field(target) = *field(source),
            ValueKind::Size(_, field) | ValueKind::Count(_, field) => *field(target) = *field(source),
            ValueKind::Ratio(field) => *field(target) = *field(source),
            ValueKind::Bool(field) => *field(target) = *field(source),
            ValueKind::File(field) => field(target).clone_from(field(source)),
            ValueKind::OptionalFile(field) => field(target).clone_from(field(source)),
        }
    }

    /// Formats the value in `config` in TOML notation. Credentials are masked.
    pub(super) fn format_value(&self, config: &mut Config) -> String {
        match &self.kind {
            ValueKind::Strings(_, field) => {
                let items = field(config).iter().map(|item| quote_text(item)).collect::<Vec<_>>();
                format!("[{}]", items.join(", "))
            }
            ValueKind::Text(field) => quote_text(&field(config).to_string()),
            ValueKind::Proxy(field) => quote_text(&field(config).to_string()),
            ValueKind::Redis(field) => quote_text(&field(config).to_string()),
            ValueKind::Tls(field) => quote_text(&field(config).to_string()),
            ValueKind::Listen(field) => field(config).to_string(),
            ValueKind::Duration(_, field) | ValueKind::Retention(field) => {
                format!("\"{}\"", DisplayDuration(*field(config)))
            }
            ValueKind::Size(_, field) => format!("\"{}\"", DisplaySize(*field(config) as u64)),
            ValueKind::Count(_, field) => field(config).to_string(),
            ValueKind::Ratio(field) => field(config).to_string(),
            ValueKind::Bool(field) => field(config).to_string(),
            ValueKind::File(field) => quote_text(&field(config).to_string_lossy()),
            ValueKind::OptionalFile(field) => {
                quote_text(&field(config).as_deref().unwrap_or(Path::new("")).to_string_lossy())
            }
        }
    }

    /// Returns the parsed value if it is in `range`. The advice of an error contains the range and the default.
    fn check_range<T: PartialOrd + Copy>(
        &self,
        parsed: Result<T, ValueError>,
        range: &RangeInclusive<T>,
        messages: &RangeMessages<T>,
    ) -> Result<T, ValueError> {
        let RangeMessages { noun, suffix, below, above, format } = messages;
        let (min, max) = (format(*range.start()), format(*range.end()));
        let default = self.format_value(&mut Config::default());
        let advice = format!("write {noun} from {min} to {max}{suffix}; the default is {default}");
        match parsed {
            Ok(value) if range.contains(&value) => Ok(value),
            Ok(value) => {
                let comparison = if value < *range.start() { below } else { above };
                let message = format!("{} is too {comparison} for `{}`", format(value), self.path);
                Err(ValueError::new(message).advise(advice))
            }
            Err(error) => Err(error.advise(advice)),
        }
    }
}

/// Formats a TOML string.
fn quote_text(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// The words of the messages about values of one type.
struct RangeMessages<T> {
    noun: &'static str,
    /// The words about valid values outside the range, which follow the range.
    suffix: &'static str,
    /// The adjective for a value below the range.
    below: &'static str,
    /// The adjective for a value above the range.
    above: &'static str,
    format: fn(T) -> String,
}

const DURATION_RANGE: RangeMessages<Duration> = RangeMessages {
    noun: "a duration",
    suffix: "",
    below: "short",
    above: "long",
    format: |duration| DisplayDuration(duration).to_string(),
};

const RETENTION_RANGE: RangeMessages<Duration> =
    RangeMessages { suffix: ", or 0s for unlimited", ..DURATION_RANGE };

const SIZE_RANGE: RangeMessages<u64> = RangeMessages {
    noun: "a size",
    suffix: "",
    below: "small",
    above: "large",
    format: |bytes| DisplaySize(bytes).to_string(),
};

const COUNT_RANGE: RangeMessages<u64> =
    RangeMessages { noun: "a whole number", format: |count| count.to_string(), ..SIZE_RANGE };

/// A value that is parsed from text and printed in the same form.
trait TextValue: fmt::Display {
    /// Replaces the value with the parsed `text`, or leaves it unchanged and returns the error.
    fn set(&mut self, text: &str) -> Result<(), ValueError>;
}

impl<T: FromStr<Err = ValueError> + fmt::Display> TextValue for T {
    fn set(&mut self, text: &str) -> Result<(), ValueError> {
        *self = text.parse()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
