//! Reports the activity of Keychoir to operators. Events, including the state changes of keys, are logged as short
//! lines on a terminal and as JSON otherwise. Requests are counted in metrics and in a timeline. The latest events are
//! kept for listeners of the admin API. The log level can be changed at runtime.

mod log;

mod line;
mod text;

mod transitions;

mod metrics;

mod event_ring;

mod timeline;

use std::io::{self, IsTerminal};
use std::str::FromStr;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, reload};

pub use event_ring::{
    EndedRequest, Event, EventBatch, EventContent, EventListener, EventRing, EventSelection,
};
pub use line::{LineFormat, LineLayer};
pub use log::{FlushOnDrop, LogSink, dropped_lines, flush};
pub use metrics::{
    AttemptUsage, ExpositionFormat, GaugeSamples, Histogram, OpenSession, Percentiles, RequestLabels,
    RequestMetrics, RequestTotals, key_label,
};
pub use timeline::{
    RecentRequests, TIMELINE_INTERVAL, Timeline, TimelineHandle, TimelineInterval, sample_timeline,
};
pub use transitions::{
    describe_unknown_limit, key_name, keys_loaded_message, log_discrepancy, log_restriction, log_transitions,
    transition_messages,
};

/// Returns the format of log lines on standard error: JSON if standard error is not a terminal, and otherwise lines
/// that are ASCII unless the terminal supports UTF-8.
/// `locale` is the value of the first of `LC_ALL`, `LC_CTYPE` and `LANG` that is set, or `None` if none is
/// set.
#[must_use]
pub fn stderr_format(locale: Option<&str>) -> LineFormat {
    if io::stderr().is_terminal() { LineFormat::for_terminal(locale) } else { LineFormat::Json }
}

/// Starts logging: writes the `tracing` events that `level` selects to `sink`, which is flushed when a thread panics.
///
/// # Errors
///
/// Fails when `level` is neither a level nor a list of `target=level`, or when another subscriber was set before.
pub fn start(format: LineFormat, level: &str, sink: LogSink) -> Result<LogLevelHandle, LogError> {
    let (filter, handle) = reload::Layer::new(parse_targets(level)?);
    tracing_subscriber::registry()
        .with(filter)
        .with(LineLayer::new(format, sink.clone()))
        .try_init()
        .map_err(|_| LogError::AlreadySet)?;
    sink.install();
    Ok(LogLevelHandle(handle))
}

/// A handle that changes the log level at runtime.
#[derive(Clone, Debug)]
pub struct LogLevelHandle(reload::Handle<Targets, Registry>);

impl LogLevelHandle {
    /// Sets the log level.
    ///
    /// # Errors
    ///
    /// Fails when `level` is neither a level nor a list of `target=level`.
    pub fn set(&self, level: &str) -> Result<(), LogError> {
        // Reloading fails only after the subscriber was dropped, and the subscriber lives until Keychoir exits.
        let _ = self.0.reload(parse_targets(level)?);
        Ok(())
    }
}

fn parse_targets(level: &str) -> Result<Targets, LogError> {
    Targets::from_str(level).map_err(|_| LogError::Level(level.to_owned()))
}

/// The reason why logging cannot be started or its level cannot be changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// The text is neither a log level nor a list of targets with their levels.
    #[error(
        "`{0}` is not a log level: write error, warn, info, debug or trace, or a list such as \
         `info,keychoir::pool=debug`"
    )]
    Level(String),
    /// Another subscriber was set before.
    #[error("logging was started twice")]
    AlreadySet,
}
