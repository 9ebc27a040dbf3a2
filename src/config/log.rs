//! Parses the settings of the log: its format, and the minimum level of the events of each target, which is the module
//! that logs an event. A misspelled level is an error, because the library would use it as the name of a target.

use std::fmt;
use std::str::FromStr;

use tracing_subscriber::filter::{LevelFilter, Targets};

use super::mask::quote_masked;
use super::problem::ValueError;
use crate::policy::similar::find_similar;

/// The format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// Text with emoji.
    Terminal,
    /// Text in ASCII.
    Ascii,
    /// One JSON object per line.
    Json,
}

impl LogFormat {
    const ALL: [Self; 4] = [Self::Auto, Self::Terminal, Self::Ascii, Self::Json];

    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Terminal => "terminal",
            Self::Ascii => "ascii",
            Self::Json => "json",
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for LogFormat {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        Self::ALL
            .into_iter()
            .find(|format| format.name() == text)
            .ok_or_else(|| ValueError::unknown_name("log format", text, &Self::ALL.map(Self::name)))
    }
}

/// A log level, or targets with levels, such as `info` or `info,keychoir::pool=debug`. The text can always be parsed as
/// `tracing_subscriber::filter::Targets`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter(String);

impl Default for LogFilter {
    fn default() -> Self {
        Self("info".into())
    }
}

impl fmt::Display for LogFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for LogFilter {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
        // A space would become part of the target's name, and the target would match nothing.
        let text = text.split(',').map(str::trim).collect::<Vec<_>>().join(",");
        for directive in text.split(',') {
            // `tracing` treats a misspelled level such as `debgu` as a target at the most verbose
            // level, so a directive without a valid level is an error.
            let level = directive.split_once('=').map_or(directive, |(_, level)| level);
            if level.parse::<LevelFilter>().is_err() || level.is_empty() {
                let levels = LEVELS.join(", ");
                return Err(ValueError::new(format!("unknown log level {}", quote_masked(level)))
                    .advise(format!("use one of {levels}, or TARGET=LEVEL, separated by commas"))
                    .suggest(find_similar(&level.trim().to_lowercase(), LEVELS)));
            }
        }
        match text.parse::<Targets>() {
            Ok(_) => Ok(Self(text)),
            Err(_) => Err(ValueError::new(format!("{} is not a log filter", quote_masked(&text)))
                .advise("write for example `info` or `info,keychoir::pool=debug`")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_setting<T: FromStr<Err = ValueError> + fmt::Display>(text: &str, expected: &str) {
        let printed_text = match text.parse::<T>() {
            Ok(setting) => setting.to_string(),
            Err(error) => format!("! {error}"),
        };
        assert_eq!(printed_text, expected);
    }

    #[test]
    fn every_log_format_is_parsed() {
        for name in ["auto", "terminal", "ascii", "json"] {
            check_setting::<LogFormat>(name, name);
        }
    }

    #[test]
    fn the_error_for_an_unknown_log_format_lists_all_formats() {
        check_setting::<LogFormat>(
            "jsn",
            "! unknown log format `jsn`; use one of `auto`, `terminal`, `ascii`, `json`; did you mean `json`?",
        );
    }

    #[test]
    fn levels_and_targets_are_parsed() {
        for text in ["info", "off", "WARN", "info,keychoir::pool=debug"] {
            check_setting::<LogFilter>(text, text);
        }
        check_setting::<LogFilter>(" info , keychoir::pool=debug", "info,keychoir::pool=debug");
    }

    #[test]
    fn a_misspelled_level_is_refused() {
        let advice = "use one of off, error, warn, info, debug, trace, or TARGET=LEVEL, separated by commas";
        check_setting::<LogFilter>(
            "debgu",
            &format!("! unknown log level `debgu`; {advice}; did you mean `debug`?"),
        );
        check_setting::<LogFilter>(
            "info,x=wran",
            &format!("! unknown log level `wran`; {advice}; did you mean `warn`?"),
        );
        check_setting::<LogFilter>("info,", &format!("! unknown log level ``; {advice}"));
        check_setting::<LogFilter>(
            "a=b=info",
            &format!("! unknown log level `b=info`; {advice}; did you mean `info`?"),
        );
    }
}
