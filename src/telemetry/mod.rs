//! The output of the running program: log lines about the keys and each request, as short coloured lines on a
//! terminal and as JSON otherwise, and counters for metrics.

mod line;
mod log;
mod text;
mod transitions;

mod metrics;

use std::io::{self, IsTerminal};
use std::str::FromStr;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, reload};

pub use line::{LineFormat, Lines};
pub use log::{FlushAtEnd, Sink, dropped, flush};
pub use metrics::{AttemptUsage, Exposition, Meters, RequestLabels, Samples, SocketOpen, key_label};
pub use transitions::{
    key_name, keys_loaded, log_discrepancy, log_restriction, log_transitions, unknown_limit, wording,
};

/// The form for standard error: JSON unless it is a terminal, ASCII unless the terminal supports UTF-8.
/// `locale` is the value of the first of `LC_ALL`, `LC_CTYPE` and `LANG` that is set.
#[must_use]
pub fn form_of_stderr(locale: Option<&str>) -> LineFormat {
    if io::stderr().is_terminal() { LineFormat::of_terminal(locale) } else { LineFormat::Json }
}

/// Sends all events of the program to `sink`, which is flushed when a thread panics.
///
/// # Errors
///
/// When `level` is not a level or a list of `target=level`, or when another subscriber was set before.
pub fn start(form: LineFormat, level: &str, sink: Sink) -> Result<Level, LogError> {
    let (filter, handle) = reload::Layer::new(targets(level)?);
    tracing_subscriber::registry()
        .with(filter)
        .with(Lines::new(form, sink.clone()))
        .try_init()
        .map_err(|_| LogError::Twice)?;
    sink.install();
    Ok(Level(handle))
}

/// A handle that changes the log level at runtime.
#[derive(Clone, Debug)]
pub struct Level(reload::Handle<Targets, Registry>);

impl Level {
    /// Sets the log level.
    ///
    /// # Errors
    ///
    /// When `level` is not a level or a list of `target=level`.
    pub fn set(&self, level: &str) -> Result<(), LogError> {
        // The filter lives as long as the program.
        let _ = self.0.reload(targets(level)?);
        Ok(())
    }
}

fn targets(level: &str) -> Result<Targets, LogError> {
    Targets::from_str(level).map_err(|_| LogError::Level(level.to_owned()))
}

/// Why logging cannot be started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// The text is not a log level.
    #[error(
        "`{0}` is not a log level: write error, warn, info, debug or trace, or a list such as `info,keychoir::pool=debug`"
    )]
    Level(String),
    /// Another subscriber was set before.
    #[error("logging was started twice")]
    Twice,
}
