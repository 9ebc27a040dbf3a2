//! Types of settings that accept a fixed set of words, and the log filter.

use std::fmt;
use std::str::FromStr;

use tracing_subscriber::filter::{LevelFilter, Targets};

use super::mask::shown;
use super::problem::{WrongValue, nearest};
use super::renamed;
use crate::policy::strategy::{STRATEGIES, Strategy};

/// The strategy that chooses the key of a request.
#[derive(Clone, Copy, Debug)]
pub struct StrategyChoice(pub &'static Strategy);

impl Default for StrategyChoice {
    fn default() -> Self {
        Self(Strategy::DEFAULT)
    }
}

impl PartialEq for StrategyChoice {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl fmt::Display for StrategyChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name)
    }
}

impl FromStr for StrategyChoice {
    type Err = WrongValue;

    fn from_str(text: &str) -> Result<Self, WrongValue> {
        match Strategy::named(text) {
            Some(strategy) => Ok(Self(strategy)),
            None => {
                let wrong =
                    unknown_word("strategy", text, &STRATEGIES.each_ref().map(|strategy| strategy.name));
                Err(wrong.suggest(renamed::strategy(text)))
            }
        }
    }
}

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
    const ALL: [(&'static str, Self); 4] =
        [("auto", Self::Auto), ("terminal", Self::Terminal), ("ascii", Self::Ascii), ("json", Self::Json)];
}

/// Implements `Display` and `FromStr` for an enum with a list of words.
macro_rules! words {
    ($choice:ident, $noun:literal) => {
        impl fmt::Display for $choice {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let word = Self::ALL.iter().find(|(_, choice)| choice == self).map(|(word, _)| *word);
                f.write_str(word.unwrap_or_default())
            }
        }

        impl FromStr for $choice {
            type Err = WrongValue;

            fn from_str(text: &str) -> Result<Self, WrongValue> {
                if let Some((_, choice)) = Self::ALL.iter().find(|(word, _)| *word == text) {
                    return Ok(*choice);
                }
                Err(unknown_word($noun, text, &Self::ALL.map(|(word, _)| word)))
            }
        }
    };
}

words!(LogFormat, "log format");

fn unknown_word(noun: &str, text: &str, words: &[&'static str]) -> WrongValue {
    let listed: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
    WrongValue::new(format!("there is no {noun} {}", shown(text)))
        .advise(format!("there is {}", listed.join(", ")))
        .suggest(nearest(&text.to_lowercase().replace('_', "-"), words.iter().copied()))
}

/// A log level, or targets with levels: `info`, `info,keychoir::pool=debug`. A valid value always
/// parses as `tracing_subscriber::filter::Targets`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter(String);

impl LogFilter {
    /// The text, without spaces between its directives.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

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
    type Err = WrongValue;

    fn from_str(text: &str) -> Result<Self, WrongValue> {
        const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
        // A space would become part of the target's name, and the target would match nothing.
        let text = text.split(',').map(str::trim).collect::<Vec<_>>().join(",");
        for directive in text.split(',') {
            // `tracing` treats a misspelt level such as `debgu` as a target at the most verbose
            // level, so a directive without a valid level is an error.
            let level = directive.split_once('=').map_or(directive, |(_, level)| level);
            if level.parse::<LevelFilter>().is_err() || level.is_empty() {
                return Err(WrongValue::new(format!("there is no log level {}", shown(level)))
                    .advise(format!(
                        "write one of {}, or TARGET=LEVEL, separated by commas",
                        LEVELS.join(", ")
                    ))
                    .suggest(nearest(&level.trim().to_lowercase(), LEVELS)));
            }
        }
        match text.parse::<Targets>() {
            Ok(_) => Ok(Self(text)),
            Err(_) => Err(WrongValue::new(format!("{} is no log filter", shown(&text)))
                .advise("write for example `info` or `info,keychoir::pool=debug`")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check<T: FromStr<Err = WrongValue> + fmt::Display>(text: &str, expected: &str) {
        let printed = match text.parse::<T>() {
            Ok(value) => value.to_string(),
            Err(wrong) => format!("! {wrong}"),
        };
        assert_eq!(printed, expected);
    }

    #[test]
    fn every_word_is_parsed() {
        STRATEGIES.iter().for_each(|known| check::<StrategyChoice>(known.name, known.name));
        LogFormat::ALL.iter().for_each(|(word, _)| check::<LogFormat>(word, word));
    }

    #[test]
    fn an_unknown_word_lists_the_known_ones() {
        check::<StrategyChoice>(
            "best",
            "! there is no strategy `best`; there is `fill-first`, `round-robin`, `most-remaining`, `least-requests`, \
             `soonest-reset`",
        );
        check::<StrategyChoice>(
            "Fill_first",
            "! there is no strategy `Fill_first`; there is `fill-first`, `round-robin`, `most-remaining`, \
             `least-requests`, `soonest-reset`; did you mean `fill-first`?",
        );
        check::<LogFormat>(
            "jsn",
            "! there is no log format `jsn`; there is `auto`, `terminal`, `ascii`, `json`; did you mean `json`?",
        );
    }

    #[test]
    fn levels_and_targets_are_read() {
        for text in ["info", "off", "WARN", "info,keychoir::pool=debug"] {
            check::<LogFilter>(text, text);
        }
        check::<LogFilter>(" info , keychoir::pool=debug", "info,keychoir::pool=debug");
    }

    #[test]
    fn a_misspelt_level_is_refused() {
        let list = "write one of off, error, warn, info, debug, trace, or TARGET=LEVEL, separated by commas";
        check::<LogFilter>(
            "debgu",
            &format!("! there is no log level `debgu`; {list}; did you mean `debug`?"),
        );
        check::<LogFilter>(
            "info,x=wran",
            &format!("! there is no log level `wran`; {list}; did you mean `warn`?"),
        );
        check::<LogFilter>("info,", &format!("! there is no log level ``; {list}"));
        check::<LogFilter>(
            "a=b=info",
            &format!("! there is no log level `b=info`; {list}; did you mean `info`?"),
        );
    }
}
