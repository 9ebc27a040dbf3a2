//! Prints the output of the demo. On a terminal, the keys are shown as bars that are redrawn below the log.
//! On any other output, only lines are printed. Log lines about single requests are dropped, because the view shows the
//! requests itself.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

use crate::cli::locale;
use crate::platform::terminal_size;
use crate::policy::key_state::KeyStatus;
use crate::policy::units::Grouped;
use crate::pool::KeySnapshot;
use crate::telemetry::LineFormat;

/// The output of the demo. Clones share the screen.
#[derive(Clone, Debug)]
pub(super) struct View {
    is_terminal: bool,
    format: LineFormat,
    screen: Arc<Mutex<DemoScreen>>,
}

/// The lines below the log on a terminal, which are redrawn after each change.
#[derive(Debug, Default)]
struct DemoScreen {
    /// The lines to redraw: the bars of the keys, and the last request.
    lines: Vec<String>,
    /// One line for each key.
    bars: Vec<String>,
    /// The status and the text of the last request.
    request: String,
    /// The number of `lines` on the screen.
    drawn_lines: usize,
}

impl DemoScreen {
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
        Self { is_terminal: io::stdout().is_terminal(), format, screen: Arc::default() }
    }

    /// Returns whether the output is a terminal.
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
        let mut screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        screen.stop_redrawing();
        draw(&mut screen, &format!("{text}\n"))
            .or_else(|error| if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) })
    }

    /// Shows the status of a request.
    pub(super) fn show_request(&self, number: usize, total: usize, status: u16, sentence: &str) {
        let line = format!("request {number:>2}/{total}  {status}  {sentence}");
        if self.is_terminal {
            self.redraw(|screen| screen.request = line);
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
            self.redraw(|screen| screen.bars = bars);
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

    fn redraw(&self, change: impl FnOnce(&mut DemoScreen)) {
        let mut screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut screen);
        screen.lines = screen.bars.iter().chain([&screen.request]).cloned().collect();
        // If the pipe is closed, the demo continues without output.
        let _ = draw(&mut screen, "");
    }

    /// Prints a line that is not redrawn.
    fn print_line(&self, line: &str) {
        let mut screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = draw(&mut screen, &format!("{line}\n"));
    }
}

/// Prints `lines_above` in place of the drawn lines, and then draws the lines again below them.
fn draw(screen: &mut DemoScreen, lines_above: &str) -> io::Result<()> {
    let mut text = String::new();
    if screen.drawn_lines > 0 {
        // Moves to the first redrawn line and clears the screen from there.
        let _ = write!(text, "\u{1b}[{}A\u{1b}[J", screen.drawn_lines);
    }
    text.push_str(lines_above);
    // A longer line would wrap, and the bars would move down the screen.
    let columns = terminal_size().map_or(80, |size| usize::from(size.columns).max(20));
    for line in &screen.lines {
        let _ = writeln!(text, "{}", line.chars().take(columns - 1).collect::<String>());
    }
    screen.drawn_lines = screen.lines.len();
    let mut stdout = io::stdout();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
}

/// The indentation of a log line whose event has no symbol, such as the line of a request.
const NO_SYMBOL: &str = "   ";

/// The writer of the log. It drops lines without a symbol, because the view shows the requests.
struct DemoLogWriter(View);

impl Write for DemoLogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        if !text.starts_with(NO_SYMBOL) {
            self.0.print_line(text.trim_end());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
