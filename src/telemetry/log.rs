//! Queues log lines and writes them on one thread named `log`, in batches. Other threads only append a line
//! to the queue, so a slow terminal, or a pipe that is not read, delays no request: when the queue is full, lines are
//! dropped and counted, and the count is logged.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::mem;
use std::panic;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use tracing::{Level, Metadata, error};
use tracing_subscriber::fmt::MakeWriter;

use super::line::{LineDraft, LineFormat};
use crate::clock;
use crate::tasks;

/// Pause after a write, in which more lines are collected for the next one: a reader does not notice it, and
/// the thread is not woken for each line. A line after a quiet period is written at once.
const PAUSE: Duration = Duration::from_millis(50);
/// Bytes in the queue that end the pause, and the size of one write.
const BATCH_BYTES: usize = 64 * 1024;
/// Maximum bytes in the queue: seconds of a busy proxy, while the reader is slow.
const QUEUE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Pause before another write when the output would block.
const RETRY: Duration = Duration::from_millis(5);
/// Timeout of a flush, at the end of the program and before other output on the same stream.
const FLUSH_MAX: Duration = Duration::from_secs(1);
/// Timeout of the flush in a panicking thread, which may have requests to serve.
const PANIC_FLUSH_MAX: Duration = Duration::from_millis(100);

/// The output of log lines, shared by all threads. Each line is written whole, in the order in which it was
/// logged.
#[derive(Clone)]
pub struct Sink(Output);

#[derive(Clone)]
enum Output {
    Direct(Arc<Mutex<Box<dyn Write + Send>>>),
    /// Written on the log thread.
    Queued(Arc<LogQueue>),
}

impl Sink {
    /// Writes each line to `writer` on the thread that logs it.
    pub fn new(writer: impl Write + Send + 'static) -> Self {
        Self(Output::Direct(Arc::new(Mutex::new(Box::new(writer)))))
    }

    /// Writes to `writer` on a log thread, in lines of this form. Queued lines need a [`flush`] before the
    /// program ends.
    ///
    /// # Errors
    ///
    /// When the system cannot create a thread.
    pub fn queued(writer: impl Write + Send + 'static, form: LineFormat) -> io::Result<Self> {
        let queued = Arc::new(LogQueue::default());
        let writing = LogWriter { queued: Arc::clone(&queued), writer, form, lost: 0, ends_in_line: false };
        tasks::thread("log", move || writing.run())?;
        Ok(Self(Output::Queued(queued)))
    }

    /// Writes to standard error on a log thread; standard output is for data.
    ///
    /// # Errors
    ///
    /// When the system cannot create a thread.
    pub fn stderr(form: LineFormat) -> io::Result<Self> {
        Self::queued(io::stderr(), form)
    }

    pub(super) fn write(&self, line: &[u8], level: Level) {
        match &self.0 {
            Output::Direct(writer) => {
                let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
                // A failing log output must not stop the traffic.
                let _ = writer.write_all(line).and_then(|()| writer.flush());
            }
            Output::Queued(queued) => queued.append(line, level <= Level::WARN),
        }
    }

    /// Makes this sink the one of [`flush`].
    pub(super) fn install(&self) {
        // Only the first sink is installed.
        if INSTALLED.set(self.clone()).is_err() || !matches!(self.0, Output::Queued(_)) {
            return;
        }
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            // Earlier lines come first. If they cannot be written, printing the panic could block forever.
            if flush_within(PANIC_FLUSH_MAX) { print(info) } else { error!(event = "panicked", "{info}") }
        }));
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sink")
    }
}

/// Writes whole lines of one level to a sink.
#[derive(Debug)]
pub struct LineWriter<'a> {
    sink: &'a Sink,
    level: Level,
}

impl Write for LineWriter<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.sink.write(line, self.level);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> LineWriter<'a> {
        LineWriter { sink: self, level: Level::INFO }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> LineWriter<'a> {
        LineWriter { sink: self, level: *metadata.level() }
    }
}

static INSTALLED: OnceLock<Sink> = OnceLock::new();

fn installed() -> Option<&'static LogQueue> {
    match INSTALLED.get() {
        Some(Sink(Output::Queued(queued))) => Some(queued),
        Some(Sink(Output::Direct(_))) | None => None,
    }
}

/// Waits until all earlier lines are written, for a limited time.
pub fn flush() {
    flush_within(FLUSH_MAX);
}

/// Flushes when it is dropped: at the end of a function, however that ends.
#[derive(Debug)]
pub struct FlushAtEnd;

impl Drop for FlushAtEnd {
    fn drop(&mut self) {
        flush();
    }
}

/// Whether all earlier lines were written within `span`.
fn flush_within(span: Duration) -> bool {
    installed().is_none_or(|queued| queued.flush(span))
}

/// Lines that were dropped since the start.
#[must_use]
pub fn dropped() -> u64 {
    installed().map_or(0, |queued| queued.dropped.load(Ordering::Relaxed))
}

#[derive(Debug, Default)]
struct LogQueue {
    state: Mutex<State>,
    /// Wakes the log thread.
    wake: Condvar,
    /// Wakes threads that flush.
    written: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Queued lines, one behind the other.
    batch: Vec<u8>,
    /// Lines that came after the batch and found the queue full.
    dropped: u64,
    /// Lines queued, and lines written or lost, since the start.
    accepted: u64,
    written: u64,
    writer: WriterState,
}

/// The state of the log thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum WriterState {
    /// It writes, and checks the queue afterwards.
    Writes,
    /// It writes, and checks the queue without a pause.
    #[default]
    Hurries,
    /// It pauses after a write, to collect more lines.
    Pauses,
    /// The queue is empty, and it waits for a line.
    Sleeps,
}

impl LogQueue {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; if it did, the queue would still be valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a line, unless the queue is full.
    fn append(&self, line: &[u8], is_urgent: bool) {
        let mut state = self.state();
        if state.batch.len() + line.len() > QUEUE_BYTES_MAX {
            state.dropped += 1;
            drop(state);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.batch.extend_from_slice(line);
        state.accepted += 1;
        let is_woken = match state.writer {
            WriterState::Sleeps => state.hurry(),
            WriterState::Pauses | WriterState::Writes if is_urgent || state.batch.len() >= BATCH_BYTES => {
                state.hurry()
            }
            WriterState::Pauses | WriterState::Writes | WriterState::Hurries => false,
        };
        drop(state);
        if is_woken {
            self.wake.notify_one();
        }
    }

    fn flush(&self, span: Duration) -> bool {
        let mut state = self.state();
        let end = state.accepted;
        if state.written < end && state.hurry() {
            self.wake.notify_one();
        }
        let is_behind = |state: &mut State| state.written < end;
        let waited = self.written.wait_timeout_while(state, span, is_behind);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Waits until there are lines to write and moves them to `batch`, which is empty; returns the number of
    /// lines since the start up to the last of them, and how many lines were dropped behind them.
    fn take(&self, batch: &mut Vec<u8>) -> (u64, u64) {
        let mut state = self.state();
        if state.writer == WriterState::Writes {
            state.writer = WriterState::Pauses;
            let paused =
                self.wake.wait_timeout_while(state, PAUSE, |state| state.writer == WriterState::Pauses);
            state = paused.unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.batch.is_empty() && state.dropped == 0 {
            state.writer = WriterState::Sleeps;
            let woken = self.wake.wait_while(state, |state| state.writer == WriterState::Sleeps);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        state.writer = WriterState::Writes;
        mem::swap(&mut state.batch, batch);
        (state.accepted, mem::take(&mut state.dropped))
    }

    /// Records that all lines up to this number were written or lost.
    fn record_written(&self, number: u64) {
        self.state().written = number;
        self.written.notify_all();
    }
}

impl State {
    /// Ends the pause; returns whether the log thread must be woken.
    fn hurry(&mut self) -> bool {
        matches!(
            mem::replace(&mut self.writer, WriterState::Hurries),
            WriterState::Pauses | WriterState::Sleeps
        )
    }
}

/// The state of the log thread.
struct LogWriter<W> {
    queued: Arc<LogQueue>,
    writer: W,
    form: LineFormat,
    /// Lines lost since the last message about lost lines.
    lost: u64,
    /// Whether the last write ended within a line.
    ends_in_line: bool,
}

impl<W: Write> LogWriter<W> {
    fn run(mut self) {
        let mut batch = Vec::new();
        loop {
            let (number, dropped) = self.queued.take(&mut batch);
            self.write_batch(&batch);
            if dropped > 0 && (self.lost > 0 || self.report_lost(dropped) > 0) {
                self.lost += dropped;
            }
            self.queued.record_written(number);
            batch.clear();
            batch.shrink_to(2 * BATCH_BYTES);
        }
    }

    /// Writes a batch in pieces of whole lines, each of about `BATCH_BYTES`.
    fn write_batch(&mut self, batch: &[u8]) {
        let mut rest = batch;
        while rest.len() > BATCH_BYTES {
            let end =
                memchr::memchr(b'\n', &rest[BATCH_BYTES..]).map_or(rest.len(), |at| BATCH_BYTES + at + 1);
            let (piece, later) = rest.split_at(end);
            self.write_lines(piece);
            rest = later;
        }
        self.write_lines(rest);
    }

    /// Writes lines, after a message about lines that were lost before them.
    fn write_lines(&mut self, text: &[u8]) {
        if self.lost > 0 && self.report_lost(self.lost) == 0 {
            self.lost = 0;
        }
        // If this message cannot be written, the lines are not written either: they would come before it.
        let lost = if self.lost > 0 { lines(text) } else { self.write(text) };
        self.queued.dropped.fetch_add(lost, Ordering::Relaxed);
        self.lost += lost;
    }

    /// Writes a message that `count` lines were lost here; returns whether the message was lost, as 0 or 1.
    fn report_lost(&mut self, count: u64) -> u64 {
        let (lines, were) = if count == 1 { ("line", "was") } else { ("lines", "were") };
        let mut draft = LineDraft::default();
        draft.begin(self.form);
        draft.text("event", "log_lines_dropped");
        draft.value("lines", count);
        draft.message(format_args!("{count} log {lines} {were} dropped: they could not be written in time"));
        self.write(draft.line(Level::WARN, module_path!(), clock::now()))
    }

    /// Writes all bytes; returns the number of lines that were lost.
    fn write(&mut self, batch: &[u8]) -> u64 {
        let mut rest = batch;
        while !rest.is_empty() {
            let next: &[u8] = if self.ends_in_line { b"\n" } else { rest };
            match self.writer.write(next) {
                Ok(1..) if self.ends_in_line => self.ends_in_line = false,
                Ok(count @ 1..) => rest = rest.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::park_timeout(RETRY),
                Ok(0) | Err(_) => {
                    let begun = batch.len() - rest.len();
                    self.ends_in_line |= batch[..begun].last().is_some_and(|last| *last != b'\n');
                    return lines(rest);
                }
            }
        }
        // When the flush fails, no line is left to be lost.
        let _ = self.writer.flush();
        0
    }
}

fn lines(bytes: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', bytes).count() as u64
}

#[cfg(test)]
mod tests;
