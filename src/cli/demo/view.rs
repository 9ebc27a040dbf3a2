//! Prints the output of the demo. A terminal shows the keys as bars that are redrawn below the log;
//! any other output receives plain lines.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

use crate::policy::key_state::KeyStatus;
use crate::policy::units::Grouped;
use crate::pool::KeySnapshot;
use crate::telemetry::LineFormat;

/// The output of the demo. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct View {
    live: bool,
    format: LineFormat,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// The lines that are redrawn.
    block: Vec<String>,
    keys: Vec<String>,
    request: String,
    /// Number of redrawn lines that are on the screen.
    drawn_lines: usize,
}

impl State {
    /// Ends the redrawing.
    fn end_updates(&mut self) {
        self.block.clear();
        self.drawn_lines = 0;
    }
}

const BAR_CELLS: u64 = 20;

impl View {
    /// Creates the output for standard output. Bars are redrawn only on a terminal.
    pub(super) fn of_stdout() -> Self {
        let live = io::stdout().is_terminal();
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(|name| std::env::var(name).ok());
        let format = LineFormat::of_terminal(locale.as_deref());
        Self { live, format, state: Arc::default() }
    }

    /// Whether the output is a terminal.
    pub(super) fn is_live(&self) -> bool {
        self.live
    }

    /// The format of log lines.
    pub(super) fn format(&self) -> LineFormat {
        self.format
    }

    /// A writer for the log, whose lines appear above the bars.
    pub(super) fn log(&self) -> impl Write + Send + 'static {
        Log(self.clone())
    }

    pub(super) fn title(&self, url: &str) {
        self.print_line(&format!(
            "Keychoir at {url}, in front of a simulated ElevenLabs. Every request has api_key=\"anything\"."
        ));
    }

    /// Prints the final result below the bars.
    ///
    /// # Errors
    ///
    /// When the result cannot be written, except to a closed pipe.
    pub(super) fn result(&self, text: &str) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.end_updates();
        draw(&mut state, &format!("{text}\n"))
            .or_else(|error| if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) })
    }

    /// Prints the result of a request.
    pub(super) fn request(&self, number: usize, total: usize, status: u16, sentence: &str) {
        let line = format!("request {number:>2}/{total}  {status}  {sentence}");
        if self.live {
            self.change(|state| state.request = line);
        } else {
            self.print_line(&line);
        }
    }

    /// Prints a line for a request that was refused with one key and served with another.
    pub(super) fn replay(&self, replay_path: &str) {
        self.print_line(&format!("               {replay_path}"));
    }

    /// Redraws the bars.
    pub(super) fn keys(&self, keys: &[KeySnapshot]) {
        if self.live {
            let in_use = keys.iter().position(|key| key.state.status() == KeyStatus::Active);
            let lines =
                keys.iter().enumerate().map(|(index, key)| self.bar(key, in_use == Some(index))).collect();
            self.change(|state| state.keys = lines);
        }
    }

    fn bar(&self, snapshot: &KeySnapshot, is_in_use: bool) -> String {
        let (full, empty, mark) =
            if self.format == LineFormat::Ascii { ("#", ".", "> ") } else { ("█", "░", "▶ ") };
        let cells =
            usize::try_from((snapshot.quota.usage_percent() * BAR_CELLS / 100).min(BAR_CELLS)).unwrap_or(0);
        let limit = snapshot.quota.limit.unwrap_or(0);
        let used = format!("{}/{}", Grouped(snapshot.quota.count), Grouped(limit));
        let mark = if is_in_use { mark } else { "  " };
        let mut line = format!("{mark}{}  ", snapshot.key.api_key().short());
        line.push_str(&full.repeat(cells));
        line.push_str(&empty.repeat(usize::try_from(BAR_CELLS).unwrap_or(0) - cells));
        let _ = write!(line, " {used:>11}  {}", snapshot.state.status().word());
        line
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        state.block = state.keys.iter().chain([&state.request]).cloned().collect();
        // After the pipe was closed the demo continues without output.
        let _ = draw(&mut state, "");
    }

    /// Prints a line that is not redrawn.
    fn print_line(&self, line: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = draw(&mut state, &format!("{line}\n"));
    }
}

/// Prints `above` in place of the redrawn lines, and these lines below it.
fn draw(state: &mut State, above: &str) -> io::Result<()> {
    let mut text = String::new();
    if state.drawn_lines > 0 {
        // Moves to the first redrawn line and clears the screen from there.
        let _ = write!(text, "\u{1b}[{}A\u{1b}[J", state.drawn_lines);
    }
    text.push_str(above);
    // A longer line would wrap onto a second row, and the bars would move down the screen.
    let columns =
        rustix::termios::tcgetwinsize(io::stdout()).map_or(80, |size| usize::from(size.ws_col).max(20));
    for line in &state.block {
        let _ = writeln!(text, "{}", line.chars().take(columns - 1).collect::<String>());
    }
    state.drawn_lines = state.block.len();
    let mut stdout = io::stdout();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
}

/// The writer of the log. It drops the lines of single requests, because the bars show them.
struct Log(View);

impl Write for Log {
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
