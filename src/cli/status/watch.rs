//! `keychoir status --watch`: requests the state at an interval and redraws it in place, until a signal to stop. While
//! Keychoir does not respond, for example during its restart, the last state stays visible with the time of its
//! response.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::{StatusDocuments, fetch_documents};
use crate::cli::color::{Palette, Tone};
use crate::cli::control::parse_duration;
use crate::cli::server::{KeychoirClient, ServerRequestError};
use crate::cli::signals::Signals;
use crate::cli::{CommandResult, fail};
use crate::clock;
use crate::platform::terminal_size;
use crate::policy::quantity::duration::DisplayDuration;
use crate::policy::units::UnixMs;

/// Minimum interval. Each redraw needs three requests, so a shorter interval would put needless load on Keychoir.
const MIN_INTERVAL: Duration = Duration::from_millis(500);

/// Parses the interval of `--watch`.
pub(super) fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration(text)?;
    if interval < MIN_INTERVAL {
        return Err(format!("the shortest interval is {}", DisplayDuration(MIN_INTERVAL)));
    }
    Ok(interval)
}

/// The state that Keychoir reported last, as it is shown.
struct LastResponse {
    received_at: UnixMs,
    text: String,
}

/// Redraws the state at every `interval` until SIGINT or SIGTERM. Both signals end the command with success.
pub(super) async fn run(
    client: KeychoirClient,
    interval: Duration,
    palette: Palette,
    format: impl Fn(&StatusDocuments) -> String,
) -> CommandResult {
    let mut signals = Signals::new().map_err(fail)?;
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_response: Option<LastResponse> = None;
    loop {
        let fetch_at_tick = async {
            ticks.tick().await;
            fetch_documents(&client).await
        };
        let fetch_result = tokio::select! {
            fetch_result = fetch_at_tick => fetch_result,
            () = signals.wait_for_stop() => return Ok(()),
        };
        let error = match fetch_result {
            Ok(documents) => {
                last_response = Some(LastResponse { received_at: clock::now(), text: format(&documents) });
                None
            }
            Err(error) => Some(error),
        };
        if draw_frame(&format_frame(last_response.as_ref(), error.as_ref(), interval, palette)).is_err() {
            // The standard output is closed.
            return Ok(());
        }
    }
}

/// Formats a frame: the time of the last response, the error of the last request, if any, and the last state.
fn format_frame(
    last_response: Option<&LastResponse>,
    error: Option<&ServerRequestError>,
    interval: Duration,
    palette: Palette,
) -> String {
    let interval = DisplayDuration(interval);
    match (last_response, error) {
        (Some(LastResponse { received_at, text }), None) => {
            let line = format!("{}, every {interval}", received_at.rfc3339_seconds());
            format!("{}\n{text}", palette.paint(Tone::Muted, &line))
        }
        (Some(LastResponse { received_at, text }), Some(error)) => {
            let line =
                format!("No response since {}, retried every {interval}", received_at.rfc3339_seconds());
            format!("{}\n{error}\n{text}", palette.paint(Tone::Bad, &line))
        }
        (None, Some(error)) => {
            let line = format!("No response yet, retried every {interval}");
            format!("{}\n{error}", palette.paint(Tone::Bad, &line))
        }
        (None, None) => String::new(),
    }
}

/// Replaces the previous frame on a terminal. On any other output, prints the frame after the previous one.
fn draw_frame(frame: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    if !stdout.is_terminal() {
        writeln!(stdout, "{frame}\n")?;
        return stdout.flush();
    }
    // A frame that is higher than the terminal would scroll, and a part of it would remain on the screen.
    let max_lines = terminal_size().map_or(usize::MAX, |size| usize::from(size.rows.max(2)) - 1);
    let (lines, hidden_count) = limit_lines(frame, max_lines);
    // The escape sequences move the cursor to the start, clear the rest of each line, and clear everything below.
    write!(stdout, "\u{1b}[H")?;
    for line in lines {
        write!(stdout, "{line}\u{1b}[K\r\n")?;
    }
    if hidden_count > 0 {
        write!(stdout, "({hidden_count} more lines: enlarge the window)\u{1b}[K")?;
    }
    write!(stdout, "\u{1b}[J")?;
    stdout.flush()
}

/// Returns the first `max_lines` lines, and the number of the other lines.
fn limit_lines(frame: &str, max_lines: usize) -> (Vec<&str>, usize) {
    let mut lines: Vec<&str> = frame.lines().collect();
    let hidden_count = lines.len().saturating_sub(max_lines);
    lines.truncate(max_lines);
    (lines, hidden_count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_shows_the_time_of_the_last_response() {
        let second = Duration::from_secs(1);
        let response = LastResponse { received_at: UnixMs(1_764_446_465_000), text: "TABLE".to_owned() };
        let error = ServerRequestError::NoFixedPort;
        let frame = |response, error| format_frame(response, error, second, Palette::default());
        assert_eq!(frame(Some(&response), None), "2025-11-29T20:01:05Z, every 1s\nTABLE");
        let error_frame = frame(Some(&response), Some(&error));
        assert!(
            error_frame.starts_with("No response since 2025-11-29T20:01:05Z"),
            "the time of the last response must be shown: {error_frame}"
        );
        assert!(error_frame.ends_with("\nTABLE"), "the last state must stay visible: {error_frame}");
        assert!(frame(None, Some(&error)).starts_with("No response yet"));
    }

    #[test]
    fn a_frame_never_has_more_lines_than_the_terminal() {
        assert_eq!(limit_lines("a\nb\nc", 3), (vec!["a", "b", "c"], 0));
        assert_eq!(limit_lines("a\nb\nc", 2), (vec!["a", "b"], 1));
        assert_eq!(limit_lines("", 2), (vec![], 0));
    }

    #[test]
    fn a_short_interval_is_refused() {
        assert_eq!(parse_interval("500ms"), Ok(MIN_INTERVAL));
        assert!(parse_interval("499ms").unwrap_err().contains("500ms"));
        assert!(parse_interval("5").is_err());
    }
}
