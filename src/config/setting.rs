//! Defines a setting: its path, its type with limits, and the field that stores it. The table of
//! settings drives the parsing of files and variables, the suggestions and the test of the
//! reference file. A new setting thus needs one entry in the table and one field with its default
//! in `sections`.

mod table;

use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::Config;
use super::listen::Listens;
use super::problem::WrongValue;
use super::tls::{self, TlsConfig};
use super::value::{
    Folders, Raw, days, duration, ratio, saturated, size, switch, text, texts, whole_number, wrong_type,
};
use crate::policy::quantity::duration::ShownDuration;
use crate::policy::quantity::size::ShownSize;

const ZERO: Duration = Duration::ZERO;
const DAY: Duration = Duration::from_secs(24 * 3_600);
/// Maximum retention: a hundred years.
const MAX_RETENTION: Duration = Duration::from_secs(36_500 * 24 * 3_600);

pub(super) use table::TABLE;

/// One entry of the table.
pub(super) struct Setting {
    /// `section.name`, as in the TOML file and the documents. A setting that may be a table is also
    /// a section.
    pub(super) path: &'static str,
    kind: Kind,
}

/// The type of a value, and the field that stores it.
enum Kind {
    Word(fn(&mut Config) -> &mut dyn Word),
    Listen(fn(&mut Config) -> &mut Listens),
    /// A word, or a table whose members are settings.
    Tls(fn(&mut Config) -> &mut TlsConfig),
    /// A list of names, each parsed by `fn`.
    Names(fn(&str) -> Result<String, WrongValue>, fn(&mut Config) -> &mut Vec<String>),
    Duration(RangeInclusive<Duration>, fn(&mut Config) -> &mut Duration),
    /// A retention time, usually in days; zero for unlimited.
    Retention(fn(&mut Config) -> &mut Duration),
    Size(RangeInclusive<u64>, fn(&mut Config) -> &mut usize),
    Count(RangeInclusive<u64>, fn(&mut Config) -> &mut usize),
    Ratio(fn(&mut Config) -> &mut f64),
    Switch(fn(&mut Config) -> &mut bool),
    File(fn(&mut Config) -> &mut PathBuf),
    /// A path; empty for none.
    OptionalFile(fn(&mut Config) -> &mut Option<PathBuf>),
}

/// The setting of exactly this path.
pub(super) fn find(path: &str) -> Option<&'static Setting> {
    TABLE.iter().find(|setting| setting.path == path)
}

/// The environment variable of the setting with this path.
pub(super) fn variable(path: &str) -> String {
    format!("KEYCHOIR_{}", path.to_uppercase().replace('.', "__"))
}

/// Whether a section has this name.
pub(super) fn is_section(name: &str) -> bool {
    TABLE.iter().any(|setting| setting.section() == name)
}

/// The setting to suggest for a name without a section or with a wrong one.
pub(super) fn of_name(name: &str) -> Option<&'static Setting> {
    TABLE.iter().find(|setting| setting.name() == name && !setting.is_nested())
}

impl Setting {
    /// The part of the path before the last dot.
    pub(super) fn section(&self) -> &'static str {
        self.path.rsplit_once('.').map_or(self.path, |(section, _)| section)
    }

    /// The part of the path after the last dot.
    pub(super) fn name(&self) -> &'static str {
        self.path.rsplit_once('.').map_or(self.path, |(_, name)| name)
    }

    /// Whether another setting contains this one. Its name alone is ambiguous then.
    pub(super) fn is_nested(&self) -> bool {
        find(self.section()).is_some()
    }

    /// The environment variable of this setting.
    pub(super) fn variable(&self) -> String {
        variable(self.path)
    }

    /// Parses `raw` into the field of `config`, or leaves the field unchanged and returns the
    /// error.
    pub(super) fn read(
        &self,
        raw: Raw<'_>,
        folders: Folders<'_>,
        config: &mut Config,
    ) -> Result<(), WrongValue> {
        match &self.kind {
            Kind::Word(field) => field(config).set(text(raw)?),
            Kind::Tls(field) => match raw {
                Raw::Toml(value) if !value.is_str() => {
                    let near = value.as_bool().map(|is_on| if is_on { "\"auto\"" } else { "\"off\"" });
                    Err(wrong_type(value, "a text or a table").advise(tls::NOTATION).suggest(near))
                }
                Raw::Toml(_) | Raw::Text(_) => field(config).set(text(raw)?),
            },
            Kind::Listen(field) => {
                *field(config) = Listens::parse(&texts(raw)?)?;
                Ok(())
            }
            Kind::Names(one, field) => {
                let names = texts(raw)?.into_iter().filter(|text| !text.is_empty()).map(one);
                *field(config) = names.collect::<Result<_, _>>()?;
                Ok(())
            }
            Kind::Duration(range, field) => {
                let (min, max) = (ShownDuration(*range.start()), ShownDuration(*range.end()));
                let allowed = self.allowed(&format!("a duration from {min} to {max}"));
                let duration = duration(raw).map_err(|wrong| wrong.advise(allowed.clone()))?;
                let size = if duration < *range.start() { "short" } else { "long" };
                self.check(range.contains(&duration), ShownDuration(duration), size, &allowed)?;
                *field(config) = duration;
                Ok(())
            }
            Kind::Retention(field) => {
                let max = ShownDuration(MAX_RETENTION);
                let allowed = self.allowed(&format!("a duration from 1d to {max}, or 0s for ever"));
                let duration = days(raw).map_err(|wrong| wrong.advise(allowed.clone()))?;
                let size = if duration < DAY { "short" } else { "long" };
                let fits = duration == ZERO || (DAY..=MAX_RETENTION).contains(&duration);
                self.check(fits, ShownDuration(duration), size, &allowed)?;
                *field(config) = duration;
                Ok(())
            }
            Kind::Size(range, field) => {
                let (min, max) = (ShownSize(*range.start()), ShownSize(*range.end()));
                let allowed = self.allowed(&format!("a size from {min} to {max}"));
                let bytes = size(raw).map_err(|wrong| wrong.advise(allowed.clone()))?;
                let size = if bytes < *range.start() { "small" } else { "large" };
                self.check(range.contains(&bytes), ShownSize(bytes), size, &allowed)?;
                *field(config) = saturated(bytes);
                Ok(())
            }
            Kind::Count(range, field) => {
                let (min, max) = (range.start(), range.end());
                let allowed = self.allowed(&format!("a whole number from {min} to {max}"));
                let number = whole_number(raw).map_err(|wrong| wrong.advise(allowed.clone()))?;
                let size = if number < *min { "small" } else { "large" };
                self.check(range.contains(&number), number, size, &allowed)?;
                *field(config) = saturated(number);
                Ok(())
            }
            Kind::Ratio(field) => {
                *field(config) = ratio(raw)?;
                Ok(())
            }
            Kind::Switch(field) => {
                *field(config) = switch(raw)?;
                Ok(())
            }
            Kind::File(field) => {
                *field(config) = folders.file(text(raw)?)?;
                Ok(())
            }
            Kind::OptionalFile(field) => {
                let text = text(raw)?;
                *field(config) = if text.trim().is_empty() { None } else { Some(folders.file(text)?) };
                Ok(())
            }
        }
    }

    /// The value in `config`, in TOML notation.
    pub(super) fn show(&self, config: &mut Config) -> String {
        match &self.kind {
            Kind::Names(_, field) => {
                let names = field(config).iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>();
                format!("[{}]", names.join(", "))
            }
            Kind::Word(field) => format!("\"{}\"", field(config)),
            Kind::Tls(field) => format!("\"{}\"", field(config)),
            Kind::Listen(field) => field(config).to_string(),
            Kind::Duration(_, field) | Kind::Retention(field) => {
                format!("\"{}\"", ShownDuration(*field(config)))
            }
            Kind::Size(_, field) => format!("\"{}\"", ShownSize(*field(config) as u64)),
            Kind::Count(_, field) => field(config).to_string(),
            Kind::Ratio(field) => field(config).to_string(),
            Kind::Switch(field) => field(config).to_string(),
            Kind::File(field) => format!("\"{}\"", field(config).display()),
            Kind::OptionalFile(field) => {
                format!("\"{}\"", field(config).as_deref().unwrap_or(Path::new("")).display())
            }
        }
    }

    /// Advice with the valid form and the default.
    fn allowed(&self, form: &str) -> String {
        format!("write {form}; the default is {}", self.show(&mut Config::default()))
    }

    fn check(
        &self,
        fits: bool,
        value: impl fmt::Display,
        size: &str,
        allowed: &str,
    ) -> Result<(), WrongValue> {
        let wrong = || WrongValue::new(format!("{value} is too {size} for `{}`", self.path));
        if fits { Ok(()) } else { Err(wrong().advise(allowed)) }
    }
}

/// A value that is parsed from text and printed in the same form.
trait Word: fmt::Display {
    fn set(&mut self, text: &str) -> Result<(), WrongValue>;
}

impl<T: FromStr<Err = WrongValue> + fmt::Display> Word for T {
    fn set(&mut self, text: &str) -> Result<(), WrongValue> {
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
        check(path, Raw::Toml(value.get_ref()), expected);
    }

    #[track_caller]
    fn check_text(path: &str, text: &str, expected: &str) {
        check(path, Raw::Text(text), expected);
    }

    #[track_caller]
    fn check(path: &str, raw: Raw<'_>, expected: &str) {
        let folders = Folders { base: Some(Path::new("/etc/k")), home: Some(Path::new("/home/me")) };
        let mut config = Config::default();
        let setting = find(path).unwrap();
        let shown = match setting.read(raw, folders, &mut config) {
            Ok(()) => setting.show(&mut config),
            Err(wrong) => format!("! {wrong}"),
        };
        assert_eq!(shown, expected);
    }

    #[test]
    fn paths_are_unique_and_have_one_section() {
        for (index, setting) in TABLE.iter().enumerate() {
            let parts = if setting.is_nested() { 3 } else { 2 };
            assert_eq!(setting.path.split('.').count(), parts, "{}", setting.path);
            assert!(TABLE[..index].iter().all(|other| other.path != setting.path), "{}", setting.path);
        }
    }

    #[test]
    fn each_setting_changes_one_field() {
        // At least one value other than the default for every type of setting.
        const SAMPLES: [&str; 17] = [
            "/below",
            "999",
            "99",
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
            "127.0.0.1:1",
            "0600",
            "off",
            "round-robin",
        ];
        for setting in TABLE {
            let changed_by = |text: &str| -> Vec<&str> {
                let (mut config, mut fresh) = (Config::default(), Config::default());
                let _ = setting.read(Raw::Text(text), Folders::default(), &mut config);
                let differs = |other: &&Setting| other.show(&mut config) != other.show(&mut fresh);
                TABLE.iter().filter(differs).map(|other| other.path).collect()
            };
            let changed: Vec<_> =
                SAMPLES.into_iter().map(changed_by).filter(|paths| !paths.is_empty()).collect();
            assert!(!changed.is_empty(), "{}", setting.path);
            assert!(changed.iter().all(|paths| *paths == [setting.path]), "{changed:?}");
        }
    }

    #[test]
    fn every_default_is_within_its_limits() {
        for setting in TABLE {
            let mut config = Config::default();
            let default = setting.show(&mut config);
            let value = DeValue::parse(&default).unwrap();
            setting.read(Raw::Toml(value.get_ref()), Folders::default(), &mut config).unwrap();
            assert_eq!(setting.show(&mut config), default);
        }
    }

    #[test]
    fn several_addresses_are_a_list_in_a_file_and_separated_by_commas_elsewhere() {
        let both = "[\"127.0.0.1:1\", \"unix:/k\"]";
        check_toml("server.listen", both, both);
        check_toml("server.listen", "\"127.0.0.1:1\"", "\"127.0.0.1:1\"");
        check_text("server.listen", "127.0.0.1:1 , unix:/k", both);
        check_toml("server.listen", "[1]", "! this is a number and should be a text; write it in quotes");
        check_text(
            "server.listen",
            "127.0.0.1:1,",
            "! `` has no port; write HOST:PORT, for example 127.0.0.1:11011",
        );
    }

    #[test]
    fn variables_nest_with_two_underscores() {
        assert_eq!(find("server.listen").unwrap().variable(), "KEYCHOIR_SERVER__LISTEN");
        assert_eq!(find("upstream.base_url").unwrap().variable(), "KEYCHOIR_UPSTREAM__BASE_URL");
    }

    #[test]
    fn numbers_are_read_in_every_spelling_of_toml() {
        for toml in ["3000", "3_000", "+3000", "0xbb8"] {
            check_toml("server.max_requests", toml, "3000");
        }
        check_text("server.max_requests", "3_000", "3000");
    }

    #[test]
    fn the_workers_are_a_number_or_one_per_core() {
        check_toml("server.workers", "0", "0");
        check_text("server.workers", "1024", "1024");
        let allowed = "write a whole number from 0 to 1024; the default is 0";
        check_toml("server.workers", "1025", &format!("! 1025 is too large for `server.workers`; {allowed}"));
    }

    #[test]
    fn a_value_beyond_its_limits_is_refused() {
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
        let allowed = "write a duration from 1d to 36500d, or 0s for ever; the default is \"30d\"";
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
            &format!("! a duration is written with its unit; write \"30d\" if 30 days are meant; {allowed}"),
        );
        check_text(
            "storage.attempts_retention",
            "18446744073709551615",
            &format!("! a duration is written with its unit; {allowed}"),
        );
    }

    #[test]
    fn the_error_says_how_a_duration_is_written() {
        let allowed = "write a duration from 1ms to 10m; the default is \"10s\"";
        let units = "the units are ms, s, m, h, d and w";
        for (toml, message) in [
            ("75000", "a duration is written with its unit; write \"75s\" if 75000 milliseconds are meant"),
            ("0", "a duration is written with its unit; write \"0s\" if 0 milliseconds are meant"),
            ("0x3e8", "a duration is written with its unit; write \"1s\" if 1000 milliseconds are meant"),
            ("\"500\"", "a duration is written with its unit; write \"500ms\" if 500 milliseconds are meant"),
            ("-1", "the number is negative"),
            ("99999999999999999999", "the number is too large"),
            ("1.5", "a duration has a unit and no fraction"),
            ("\"-1s\"", "the duration is negative"),
            ("\"1.5s\"", "`1.5s` has a fraction; write \"1s500ms\""),
            ("\"0.5ms\"", "`0.5ms` has a fraction"),
            ("\"30x\"", &format!("`30x` has the unknown unit `x`; {units}")),
            ("\"5min\"", &format!("`5min` has the unknown unit `min`; {units}; did you mean `5m`?")),
            ("\"5 min\"", "`5 min` is no duration; did you mean `5m`?"),
            ("\"1m1h\"", "`1m1h` has its units in another order than 1h30m"),
            ("\"99999999999999999999s\"", "the duration is too large"),
            ("\"\"", "`` is no duration"),
            ("\"soon\"", "`soon` is no duration"),
            ("true", "this is true or false and should be a duration in quotes"),
            ("[1]", "this is a list and should be a duration in quotes"),
            ("\"0s\"", "0s is too short for `upstream.connect_timeout`"),
        ] {
            check_toml("upstream.connect_timeout", toml, &format!("! {message}; {allowed}"));
        }
        // A variable is not quoted.
        for (text, message) in [
            ("75000", "a duration is written with its unit; write 75s if 75000 milliseconds are meant"),
            ("\"75s\"", "`\\\"75s\\\"` is no duration; did you mean `75s`?"),
            ("1.5s", "`1.5s` has a fraction; write 1s500ms"),
            ("-1", "the duration is negative"),
        ] {
            check_text("upstream.connect_timeout", text, &format!("! {message}; {allowed}"));
        }
    }

    #[test]
    fn the_error_says_how_a_size_is_written() {
        let allowed = "write a size from 0B to 1GiB; the default is \"16MiB\"";
        let units = "the units are B, KiB, MiB, GiB and TiB (of 1024), kB, MB, GB and TB (of 1000)";
        for (toml, message) in [
            ("16777216", "a size is written with its unit; write \"16MiB\" if 16777216 bytes are meant"),
            ("0", "a size is written with its unit; write \"0B\" if 0 bytes are meant"),
            ("\"64k\"", &format!("`64k` has the unknown unit `k`; {units}; did you mean `64KiB`?")),
            ("\"64KB\"", &format!("`64KB` has the unknown unit `KB`; {units}; did you mean `64kB`?")),
            ("\"1 MiB\"", "`1 MiB` is no size; did you mean `1MiB`?"),
            ("\"1.5MiB\"", "`1.5MiB` has a fraction; write \"1536KiB\""),
            ("\"-1MiB\"", "the size is negative"),
            ("false", "this is true or false and should be a size in quotes"),
        ] {
            check_toml("retry.buffer_size", toml, &format!("! {message}; {allowed}"));
        }
        check_toml("retry.buffer_size", "\"1GB\"", "\"1GB\"");
    }

    #[test]
    fn the_error_says_that_a_value_is_no_whole_number() {
        let allowed = "write a whole number from 1 to 1000; the default is 16";
        for (toml, message) in [
            ("-1", "the number is negative"),
            ("1.5", "a number with a fraction is no whole number"),
            ("\"30\"", "a number is written without quotes; did you mean `30`?"),
            ("\"x\"", "a number is written without quotes"),
            ("true", "this is true or false and should be a number"),
            ("[1]", "this is a list and should be a number"),
            ("99999999999999999999999", "the number is too large"),
            ("0", "0 is too small for `retry.max_attempts`"),
        ] {
            check_toml("retry.max_attempts", toml, &format!("! {message}; {allowed}"));
        }
        for (text, message) in [
            ("-1", "the number is negative"),
            ("1.5", "`1.5` is no whole number"),
            ("_", "`_` is no whole number"),
        ] {
            check_text("retry.max_attempts", text, &format!("! {message}; {allowed}"));
        }
    }

    #[test]
    fn a_ratio_is_above_0_and_up_to_1() {
        const FORM: &str = "write a number above 0 and up to 1, for example 0.8 for 80 %";
        check_toml("pool.near_limit_ratio", "1", "1");
        check_toml("pool.near_limit_ratio", "1.0", "1");
        check_text("pool.near_limit_ratio", "0.01", "0.01");
        check_toml(
            "pool.near_limit_ratio",
            "80",
            &format!("! the ratio is above 1; {FORM}; did you mean `0.8`?"),
        );
        for toml in ["0", "0.0", "-0.5", "nan", "inf", "101"] {
            check_toml("pool.near_limit_ratio", toml, &format!("! the ratio is out of range; {FORM}"));
        }
        check_text("pool.near_limit_ratio", "80%", &format!("! this is no number; {FORM}"));
    }

    #[test]
    fn switches_are_true_or_false() {
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
            "! `true` and `false` are written without quotes; write `true` or `false`; did you mean `false`?",
        );
        check_toml(
            "quota_polling.enabled",
            "1",
            "! this is a number and should be `true` or `false`; write `true` or `false`",
        );
    }

    #[test]
    fn a_path_is_relative_to_the_folder_of_its_file() {
        check_toml("storage.path", "\"a.db\"", "\"/etc/k/a.db\"");
        check_toml("storage.path", "\"/a.db\"", "\"/a.db\"");
        check_toml("storage.path", "\"~/a.db\"", "\"/home/me/a.db\"");
        check_toml("storage.path", "\" \"", "! the path is empty");
        check_toml("storage.path", "3", "! this is a number and should be a text; write it in quotes");
        assert!(Folders::default().file("~/a").is_err());
        assert_eq!(Folders::default().file("a").unwrap(), Path::new("a"));
    }
}
