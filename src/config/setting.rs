//! Parses and formats each setting by its entry in the table [`SETTINGS`]: its path, its type with
//! limits, and the field of [`Config`] that stores it. Files, variables and suggestions use the same
//! table, so a new setting needs one entry here and one field with its default in `sections`.

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
    BaseFolders, RawValue, parse_bool, parse_days, parse_duration, parse_integer, parse_ratio, parse_size,
    parse_string, parse_strings, saturated, wrong_type,
};
use crate::policy::quantity::duration::DisplayDuration;
use crate::policy::quantity::size::DisplaySize;

const ZERO: Duration = Duration::ZERO;
const DAY: Duration = Duration::from_secs(24 * 3_600);
/// Maximum retention: a hundred years.
const MAX_RETENTION: Duration = Duration::from_secs(36_500 * 24 * 3_600);

pub(super) use table::SETTINGS;

/// An entry of the table.
pub(super) struct Setting {
    /// `section.name`, as in the TOML file. A setting that may be a table is also a section.
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
    /// A list of strings, each parsed by the function.
    Strings(fn(&str) -> Result<String, ValueError>, fn(&mut Config) -> &mut Vec<String>),
    Duration(RangeInclusive<Duration>, fn(&mut Config) -> &mut Duration),
    /// A retention time, usually in days; zero for unlimited.
    Retention(fn(&mut Config) -> &mut Duration),
    Size(RangeInclusive<u64>, fn(&mut Config) -> &mut usize),
    Count(RangeInclusive<u64>, fn(&mut Config) -> &mut usize),
    Ratio(fn(&mut Config) -> &mut f64),
    Bool(fn(&mut Config) -> &mut bool),
    File(fn(&mut Config) -> &mut PathBuf),
    /// A path; empty for none.
    OptionalFile(fn(&mut Config) -> &mut Option<PathBuf>),
}

/// Finds the setting with exactly this path.
pub(super) fn find(path: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.path == path)
}

/// The name of the environment variable for the setting with this path.
pub(super) fn variable_name(path: &str) -> String {
    format!("KEYCHOIR_{}", path.to_uppercase().replace('.', "__"))
}

/// Whether a section has this name.
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

    /// Whether another setting contains this one. If so, its name alone is ambiguous.
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
        folders: BaseFolders<'_>,
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
                *field(config) = saturated(self.check_range(parse_size(raw), range, &SIZE_RANGE)?);
            }
            ValueKind::Count(range, field) => {
                *field(config) = saturated(self.check_range(parse_integer(raw), range, &COUNT_RANGE)?);
            }
            ValueKind::Ratio(field) => *field(config) = parse_ratio(raw)?,
            ValueKind::Bool(field) => *field(config) = parse_bool(raw)?,
            ValueKind::File(field) => *field(config) = folders.resolve(parse_string(raw)?)?,
            ValueKind::OptionalFile(field) => {
                let text = parse_string(raw)?;
                *field(config) = if text.trim().is_empty() { None } else { Some(folders.resolve(text)?) };
            }
        }
        Ok(())
    }

    /// Whether the values in two configurations differ, even in a part that is not printed.
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

    /// Whether the value in `config` contains credentials, which are not printed.
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

    /// Copies the value of `source` to `target`.
    pub(super) fn copy(&self, source: &mut Config, target: &mut Config) {
        match &self.kind {
            // The text of a valid value is valid.
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
                let items = field(config).iter().map(|item| quote(item)).collect::<Vec<_>>();
                format!("[{}]", items.join(", "))
            }
            ValueKind::Text(field) => quote(&field(config).to_string()),
            ValueKind::Proxy(field) => quote(&field(config).to_string()),
            ValueKind::Redis(field) => quote(&field(config).to_string()),
            ValueKind::Tls(field) => quote(&field(config).to_string()),
            ValueKind::Listen(field) => field(config).to_string(),
            ValueKind::Duration(_, field) | ValueKind::Retention(field) => {
                format!("\"{}\"", DisplayDuration(*field(config)))
            }
            ValueKind::Size(_, field) => format!("\"{}\"", DisplaySize(*field(config) as u64)),
            ValueKind::Count(_, field) => field(config).to_string(),
            ValueKind::Ratio(field) => field(config).to_string(),
            ValueKind::Bool(field) => field(config).to_string(),
            ValueKind::File(field) => quote(&field(config).to_string_lossy()),
            ValueKind::OptionalFile(field) => {
                quote(&field(config).as_deref().unwrap_or(Path::new("")).to_string_lossy())
            }
        }
    }

    /// Returns the parsed value if it is in `range`. The error states the range and the default.
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
fn quote(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// The words of the messages about values of one type.
struct RangeMessages<T> {
    noun: &'static str,
    /// Valid values outside the range.
    suffix: &'static str,
    below: &'static str,
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
    fn set(&mut self, text: &str) -> Result<(), ValueError>;
}

impl<T: FromStr<Err = ValueError> + fmt::Display> TextValue for T {
    fn set(&mut self, text: &str) -> Result<(), ValueError> {
        *self = text.parse()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use toml::de::DeValue;

    use super::*;

    /// Parses `toml` (a value in TOML notation) into the setting and checks the printed result.
    #[track_caller]
    fn check_toml(path: &str, toml: &str, expected: &str) {
        let value = DeValue::parse(toml).unwrap();
        check(path, RawValue::Toml(value.get_ref()), expected);
    }

    #[track_caller]
    fn check_text(path: &str, text: &str, expected: &str) {
        check(path, RawValue::Text(text), expected);
    }

    #[track_caller]
    fn check(path: &str, raw: RawValue<'_>, expected: &str) {
        let folders = BaseFolders { base: Some(Path::new("/etc/k")), home: Some(Path::new("/home/me")) };
        let mut config = Config::default();
        let setting = find(path).unwrap();
        let shown = match setting.parse_into(raw, folders, &mut config) {
            Ok(()) => setting.format_value(&mut config),
            Err(error) => format!("! {error}"),
        };
        assert_eq!(shown, expected);
    }

    #[test]
    fn each_path_is_unique_and_has_one_section() {
        for (index, setting) in SETTINGS.iter().enumerate() {
            let parts = if setting.is_nested() { 3 } else { 2 };
            assert_eq!(setting.path.split('.').count(), parts, "{}", setting.path);
            assert!(SETTINGS[..index].iter().all(|other| other.path != setting.path), "{}", setting.path);
        }
    }

    /// For each type of setting, at least one valid value that is not the default.
    const SAMPLES: [&str; 20] = [
        "status",
        "/below",
        "999",
        "99",
        "70ms",
        "7s",
        "7d",
        "9KiB",
        "0.5",
        "true",
        "false",
        "json",
        "trace",
        "https://h",
        "wss://h",
        "redis://h",
        "127.0.0.1:1",
        "0600",
        "off",
        "round-robin",
    ];

    #[test]
    fn each_setting_changes_one_field() {
        for setting in SETTINGS {
            let changed_by = |text: &str| -> Vec<&str> {
                let (mut config, mut default) = (Config::default(), Config::default());
                let _ = setting.parse_into(RawValue::Text(text), BaseFolders::default(), &mut config);
                let differs =
                    |other: &&Setting| other.format_value(&mut config) != other.format_value(&mut default);
                SETTINGS.iter().filter(differs).map(|other| other.path).collect()
            };
            let changed: Vec<_> =
                SAMPLES.into_iter().map(changed_by).filter(|paths| !paths.is_empty()).collect();
            assert!(!changed.is_empty(), "{}", setting.path);
            assert!(changed.iter().all(|paths| *paths == [setting.path]), "{changed:?}");
        }
    }

    #[test]
    fn every_setting_can_be_copied() {
        for setting in SETTINGS {
            for text in SAMPLES {
                let (mut source, mut target) = (Config::default(), Config::default());
                let _ = setting.parse_into(RawValue::Text(text), BaseFolders::default(), &mut source);
                setting.copy(&mut source, &mut target);
                assert!(!setting.differs(&mut source, &mut target), "{} = {text}", setting.path);
            }
        }
    }

    #[test]
    fn every_default_is_valid() {
        for setting in SETTINGS {
            let mut config = Config::default();
            let default = setting.format_value(&mut config);
            let value = DeValue::parse(&default).unwrap();
            setting.parse_into(RawValue::Toml(value.get_ref()), BaseFolders::default(), &mut config).unwrap();
            assert_eq!(setting.format_value(&mut config), default);
        }
    }

    #[test]
    fn addresses_are_a_list_in_a_file_and_separated_by_commas_in_a_variable() {
        let addresses = "[\"127.0.0.1:1\", \"unix:/k\"]";
        check_toml("server.listen", addresses, addresses);
        check_toml("server.listen", "\"127.0.0.1:1\"", "\"127.0.0.1:1\"");
        check_text("server.listen", "127.0.0.1:1 , unix:/k", addresses);
        check_toml("server.listen", "[1]", "! this is a number, but should be a string; write it in quotes");
        check_text(
            "server.listen",
            "127.0.0.1:1,",
            "! `` has no port; write HOST:PORT, for example 127.0.0.1:11011",
        );
    }

    #[test]
    fn two_underscores_separate_section_and_name_in_a_variable() {
        assert_eq!(find("server.listen").unwrap().variable_name(), "KEYCHOIR_SERVER__LISTEN");
        assert_eq!(find("upstream.base_url").unwrap().variable_name(), "KEYCHOIR_UPSTREAM__BASE_URL");
    }

    #[test]
    fn a_number_is_parsed_in_every_notation_of_toml() {
        for toml in ["3000", "3_000", "+3000", "0xbb8"] {
            check_toml("server.max_requests", toml, "3000");
        }
        check_text("server.max_requests", "3_000", "3000");
    }

    #[test]
    fn zero_workers_are_allowed() {
        check_toml("server.workers", "0", "0");
        check_text("server.workers", "1024", "1024");
        let allowed = "write a whole number from 0 to 1024; the default is 0";
        check_toml("server.workers", "1025", &format!("! 1025 is too large for `server.workers`; {allowed}"));
    }

    #[test]
    fn a_value_outside_its_range_is_refused() {
        let size = "write a size from 8KiB to 1MiB; the default is \"64KiB\"";
        let duration = "write a duration from 1s to 1d; the default is \"10m\"";
        for (path, value, expected) in [
            ("server.max_request_headers_size", "8KiB", "\"8KiB\""),
            (
                "server.max_request_headers_size",
                "8191B",
                &format!("! 8191B is too small for `server.max_request_headers_size`; {size}"),
            ),
            ("server.max_request_headers_size", "1024KiB", "\"1MiB\""),
            (
                "server.max_request_headers_size",
                "1048577B",
                &format!("! 1048577B is too large for `server.max_request_headers_size`; {size}"),
            ),
            ("server.max_request_headers_size", "99999999TiB", &format!("! the size is too large; {size}")),
            ("quota_polling.interval", "1s", "\"1s\""),
            (
                "quota_polling.interval",
                "999ms",
                &format!("! 999ms is too short for `quota_polling.interval`; {duration}"),
            ),
            ("quota_polling.interval", "24h", "\"1d\""),
            (
                "quota_polling.interval",
                "24h1ms",
                &format!("! 1d1ms is too long for `quota_polling.interval`; {duration}"),
            ),
            ("server.drain_timeout", "0s", "\"0s\""),
            ("upstream.max_idle_connections", "0", "0"),
            ("retry.buffer_size", "0B", "\"0B\""),
        ] {
            check_text(path, value, expected);
        }
    }

    #[test]
    fn a_retention_is_in_days_or_unlimited() {
        let allowed = "write a duration from 1d to 36500d, or 0s for unlimited; the default is \"30d\"";
        check_toml("storage.attempts_retention", "\"0s\"", "\"0s\"");
        check_toml("storage.attempts_retention", "\"1d\"", "\"1d\"");
        check_toml("storage.attempts_retention", "\"36h\"", "\"36h\"");
        check_toml("storage.attempts_retention", "\"36500d\"", "\"36500d\"");
        check_toml(
            "storage.attempts_retention",
            "\"23h\"",
            &format!("! 23h is too short for `storage.attempts_retention`; {allowed}"),
        );
        check_toml(
            "storage.attempts_retention",
            "\"36501d\"",
            &format!("! 36501d is too long for `storage.attempts_retention`; {allowed}"),
        );
        check_toml(
            "storage.attempts_retention",
            "30",
            &format!("! a duration needs a unit; write \"30d\" for 30 days; {allowed}"),
        );
        check_text(
            "storage.attempts_retention",
            "18446744073709551615",
            &format!("! a duration needs a unit; {allowed}"),
        );
    }

    #[test]
    fn the_error_for_an_invalid_duration_shows_the_notation() {
        let allowed = "write a duration from 1ms to 10m; the default is \"10s\"";
        let units = "the units are ms, s, m, h, d and w";
        for (toml, message) in [
            ("75000", "a duration needs a unit; write \"75s\" for 75000 milliseconds"),
            ("0", "a duration needs a unit; write \"0s\" for 0 milliseconds"),
            ("0x3e8", "a duration needs a unit; write \"1s\" for 1000 milliseconds"),
            ("\"500\"", "a duration needs a unit; write \"500ms\" for 500 milliseconds"),
            ("-1", "the number is negative"),
            ("99999999999999999999", "the number is too large"),
            ("1.5", "a duration is a whole number with a unit"),
            ("\"-1s\"", "the duration is negative"),
            ("\"1.5s\"", "`1.5s` has a fraction; write \"1s500ms\""),
            ("\"0.5ms\"", "`0.5ms` has a fraction"),
            ("\"30x\"", &format!("`30x` has the unknown unit `x`; {units}")),
            ("\"5min\"", &format!("`5min` has the unknown unit `min`; {units}; did you mean `5m`?")),
            ("\"5 min\"", "`5 min` is not a duration; did you mean `5m`?"),
            (
                "\"1m1h\"",
                "`1m1h` has its units in the wrong order; write the largest unit first, as in 1h30m",
            ),
            ("\"99999999999999999999s\"", "the duration is too large"),
            ("\"\"", "`` is not a duration"),
            ("\"soon\"", "`soon` is not a duration"),
            ("true", "this is a boolean, but should be a duration in quotes"),
            ("[1]", "this is a list, but should be a duration in quotes"),
            ("\"0s\"", "0s is too short for `upstream.connect_timeout`"),
        ] {
            check_toml("upstream.connect_timeout", toml, &format!("! {message}; {allowed}"));
        }
        // A variable is not quoted.
        for (text, message) in [
            ("75000", "a duration needs a unit; write 75s for 75000 milliseconds"),
            ("\"75s\"", "`\\\"75s\\\"` is not a duration; did you mean `75s`?"),
            ("1.5s", "`1.5s` has a fraction; write 1s500ms"),
            ("-1", "the duration is negative"),
        ] {
            check_text("upstream.connect_timeout", text, &format!("! {message}; {allowed}"));
        }
    }

    #[test]
    fn the_error_for_an_invalid_size_shows_the_notation() {
        let allowed = "write a size from 0B to 1GiB; the default is \"16MiB\"";
        let units = "the units are B, KiB, MiB, GiB and TiB (of 1024), kB, MB, GB and TB (of 1000)";
        for (toml, message) in [
            ("16777216", "a size needs a unit; write \"16MiB\" for 16777216 bytes"),
            ("0", "a size needs a unit; write \"0B\" for 0 bytes"),
            ("\"64k\"", &format!("`64k` has the unknown unit `k`; {units}; did you mean `64KiB`?")),
            ("\"64KB\"", &format!("`64KB` has the unknown unit `KB`; {units}; did you mean `64kB`?")),
            ("\"1 MiB\"", "`1 MiB` is not a size; did you mean `1MiB`?"),
            ("\"1.5MiB\"", "`1.5MiB` has a fraction; write \"1536KiB\""),
            ("\"-1MiB\"", "the size is negative"),
            ("false", "this is a boolean, but should be a size in quotes"),
        ] {
            check_toml("retry.buffer_size", toml, &format!("! {message}; {allowed}"));
        }
        check_toml("retry.buffer_size", "\"1GB\"", "\"1GB\"");
    }

    #[test]
    fn the_error_for_an_invalid_number_shows_the_notation() {
        let allowed = "write a whole number from 1 to 1000; the default is 16";
        for (toml, message) in [
            ("-1", "the number is negative"),
            ("1.5", "the number has a fraction"),
            ("\"30\"", "this number is in quotes; did you mean `30`?"),
            ("\"x\"", "this number is in quotes"),
            ("true", "this is a boolean, but should be a number"),
            ("[1]", "this is a list, but should be a number"),
            ("99999999999999999999999", "the number is too large"),
            ("0", "0 is too small for `retry.max_attempts`"),
        ] {
            check_toml("retry.max_attempts", toml, &format!("! {message}; {allowed}"));
        }
        for (text, message) in [
            ("-1", "the number is negative"),
            ("1.5", "`1.5` is not a whole number"),
            ("_", "`_` is not a whole number"),
        ] {
            check_text("retry.max_attempts", text, &format!("! {message}; {allowed}"));
        }
    }

    #[test]
    fn a_ratio_is_above_0_and_up_to_1() {
        const ADVICE: &str = "write a number above 0 and up to 1, for example 0.8 for 80 %";
        check_toml("pool.near_limit_ratio", "1", "1");
        check_toml("pool.near_limit_ratio", "1.0", "1");
        check_text("pool.near_limit_ratio", "0.01", "0.01");
        check_toml(
            "pool.near_limit_ratio",
            "80",
            &format!("! the ratio is above 1; {ADVICE}; did you mean `0.8`?"),
        );
        for toml in ["0", "0.0", "-0.5", "nan", "inf", "101"] {
            check_toml("pool.near_limit_ratio", toml, &format!("! the ratio is out of range; {ADVICE}"));
        }
        check_text("pool.near_limit_ratio", "80%", &format!("! this is not a number; {ADVICE}"));
    }

    #[test]
    fn a_boolean_is_true_or_false() {
        check_toml("quota_polling.enabled", "false", "false");
        check_text("quota_polling.enabled", "true", "true");
        check_text(
            "quota_polling.enabled",
            "yes",
            "! `yes` is neither true nor false; write `true` or `false`; did you mean `true`?",
        );
        check_toml(
            "quota_polling.enabled",
            "\"off\"",
            "! this boolean is in quotes; write `true` or `false`; did you mean `false`?",
        );
        check_toml(
            "quota_polling.enabled",
            "1",
            "! this is a number, but should be `true` or `false`; write `true` or `false`",
        );
    }

    #[test]
    fn a_relative_path_starts_at_the_folder_of_its_file() {
        check_toml("storage.path", "\"a.db\"", "\"/etc/k/a.db\"");
        check_toml("storage.path", "\"/a.db\"", "\"/a.db\"");
        check_toml("storage.path", "\"~/a.db\"", "\"/home/me/a.db\"");
        check_toml("storage.path", "\" \"", "! the path is empty");
        check_toml("storage.path", "3", "! this is a number, but should be a string; write it in quotes");
        assert!(BaseFolders::default().resolve("~/a").is_err());
        assert_eq!(BaseFolders::default().resolve("a").unwrap(), Path::new("a"));
    }
}
