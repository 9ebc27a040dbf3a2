//! Prints the output of the demo. On a terminal, the keys are shown as bars that are redrawn below the log.
//! On any other output, only lines are printed.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

use crate::cli::locale;
use crate::platform::terminal_size;
use crate::policy::key_state::KeyStatus;
use crate::policy::units::Grouped;
use crate::pool::KeySnapshot;
use crate::telemetry::LineFormat;

/// The output of the demo. Clones share the state.
#[derive(Clone, Debug)]
pub(super) struct View {
    is_terminal: bool,
    format: LineFormat,
    state: Arc<Mutex<DemoState>>,
}

#[derive(Debug, Default)]
struct DemoState {
    /// The lines to redraw: the bars of the keys, and the last request.
    lines: Vec<String>,
    bars: Vec<String>,
    request: String,
    /// The number of `lines` on the screen.
    drawn_lines: usize,
}

impl DemoState {
    /// Leaves the drawn lines on the screen.
    fn stop_redrawing(&mut self) {
        self.lines.clear();
        self.drawn_lines = 0;
    }
}

/// The width of a bar in characters.
const BAR_WIDTH: u64 = 20;

impl View {
    /// Creates the view on standard output.
    pub(super) fn for_stdout() -> Self {
        let format = LineFormat::for_terminal(locale().as_deref());
        Self { is_terminal: io::stdout().is_terminal(), format, state: Arc::default() }
    }

    /// Whether the output is a terminal.
    pub(super) fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// Returns the format of log lines.
    pub(super) fn format(&self) -> LineFormat {
        self.format
    }

    /// Returns a writer for the log, whose lines are printed above the bars.
    pub(super) fn log_writer(&self) -> impl Write + Send + 'static {
        DemoLogWriter(self.clone())
    }

    pub(super) fn print_title(&self, url: &str) {
        self.print_line(&format!(
            "Keychoir at {url}, in front of a simulated ElevenLabs. Every request has api_key=\"anything\"."
        ));
    }

    /// Prints a final result below the bars.
    ///
    /// # Errors
    ///
    /// Fails when the result cannot be written. A closed pipe is not an error.
    pub(super) fn print_result(&self, text: &str) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.stop_redrawing();
        draw(&mut state, &format!("{text}\n"))
            .or_else(|error| if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) })
    }

    /// Shows the status of a request.
    pub(super) fn show_request(&self, number: usize, total: usize, status: u16, sentence: &str) {
        let line = format!("request {number:>2}/{total}  {status}  {sentence}");
        if self.is_terminal {
            self.redraw(|state| state.request = line);
        } else {
            self.print_line(&line);
        }
    }

    /// Prints the description of a request that was sent again with another key.
    pub(super) fn print_retry(&self, description: &str) {
        self.print_line(&format!("               {description}"));
    }

    /// Redraws the bars.
    pub(super) fn update_keys(&self, keys: &[KeySnapshot]) {
        if self.is_terminal {
            let first_active = keys.iter().position(|key| key.state.status() == KeyStatus::Active);
            let bars = keys
                .iter()
                .enumerate()
                .map(|(index, key)| self.format_bar(key, first_active == Some(index)))
                .collect();
            self.redraw(|state| state.bars = bars);
        }
    }

    fn format_bar(&self, snapshot: &KeySnapshot, is_in_use: bool) -> String {
        let (full, empty, in_use_mark) =
            if self.format == LineFormat::Ascii { ("#", ".", "> ") } else { ("█", "░", "▶ ") };
        let full_width =
            usize::try_from((snapshot.quota.usage_percent() * BAR_WIDTH / 100).min(BAR_WIDTH)).unwrap_or(0);
        let limit = snapshot.quota.limit.unwrap_or(0);
        let usage = format!("{}/{}", Grouped(snapshot.quota.count), Grouped(limit));
        let mark = if is_in_use { in_use_mark } else { "  " };
        let mut line = format!("{mark}{}  ", snapshot.key.api_key().short());
        line.push_str(&full.repeat(full_width));
        line.push_str(&empty.repeat(usize::try_from(BAR_WIDTH).unwrap_or(0) - full_width));
        let _ = write!(line, " {usage:>11}  {}", snapshot.state.status().as_str());
        line
    }

    fn redraw(&self, change: impl FnOnce(&mut DemoState)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        state.lines = state.bars.iter().chain([&state.request]).cloned().collect();
        // If the pipe is closed, the demo continues without output.
        let _ = draw(&mut state, "");
    }

    /// Prints a line that is not redrawn.
    fn print_line(&self, line: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = draw(&mut state, &format!("{line}\n"));
    }
}

/// Prints `above` in place of the drawn lines, and then draws the lines again.
fn draw(state: &mut DemoState, above: &str) -> io::Result<()> {
    let mut text = String::new();
    if state.drawn_lines > 0 {
        // Moves to the first redrawn line and clears the screen from there.
        let _ = write!(text, "\u{1b}[{}A\u{1b}[J", state.drawn_lines);
    }
    text.push_str(above);
    // A longer line would wrap, and the bars would move down the screen.
    let columns = terminal_size().map_or(80, |size| usize::from(size.columns).max(20));
    for line in &state.lines {
        let _ = writeln!(text, "{}", line.chars().take(columns - 1).collect::<String>());
    }
    state.drawn_lines = state.lines.len();
    let mut stdout = io::stdout();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
}

/// The writer of the log. Drops the lines of requests, because the view shows the requests.
struct DemoLogWriter(View);

impl Write for DemoLogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        if !text.starts_with("   ") {
            self.0.print_line(text.trim_end());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
