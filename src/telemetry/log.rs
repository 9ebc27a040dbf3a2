//! Queues log lines and writes them in batches on a separate thread. Other threads only append lines to the queue, so a
//! slow terminal or an unread pipe does not delay requests. When the queue is full or the output fails, lines are
//! dropped and counted, and the count is logged. The queue is flushed when Keychoir exits or a thread panics. A sink
//! without a queue writes each line on the thread that logs it.

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

/// Pause after a write, in which lines are collected for the next write, so that the thread is not woken for
/// each line. The pause is too short for a reader to notice. A line after a quiet period is written immediately.
const BATCH_INTERVAL: Duration = Duration::from_millis(50);
/// Number of bytes in the queue that end the pause, and the approximate size of one write.
const BATCH_BYTES: usize = 64 * 1024;
/// Maximum number of bytes in the queue. A busy Keychoir logs this number of bytes in a few seconds.
const MAX_QUEUE_BYTES: usize = 4 * 1024 * 1024;
/// Delay before another write when the output would block.
const RETRY_DELAY: Duration = Duration::from_millis(5);
/// Timeout of a flush, when Keychoir exits and before other output on the same stream.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// Timeout of the flush in a panicking thread, which may have other requests to serve.
const PANIC_FLUSH_TIMEOUT: Duration = Duration::from_millis(100);

/// The output of log lines, shared by all clones. Lines are written whole and in the order in which they were
/// logged.
#[derive(Clone)]
pub struct LogSink(Output);

#[derive(Clone)]
enum Output {
    /// Each line is written on the thread that logs it.
    Direct(Arc<Mutex<Box<dyn Write + Send>>>),
    /// Lines are queued, and written on the log thread.
    Queued(Arc<LogQueue>),
}

impl LogSink {
    /// Writes each line to `writer` on the thread that logs it.
    pub fn new(writer: impl Write + Send + 'static) -> Self {
        Self(Output::Direct(Arc::new(Mutex::new(Box::new(writer)))))
    }

    /// Writes lines to `writer` on a log thread. `format` is the format of messages about dropped lines. Call
    /// [`flush`] before Keychoir exits, or queued lines are lost.
    ///
    /// # Errors
    ///
    /// Fails when the system cannot create a thread.
    pub fn queued(writer: impl Write + Send + 'static, format: LineFormat) -> io::Result<Self> {
        let queue = Arc::new(LogQueue::default());
        let log_writer = LogWriter {
            queue: Arc::clone(&queue),
            output: writer,
            format,
            unreported_lines: 0,
            has_partial_line: false,
        };
        tasks::spawn_thread("log", move || log_writer.run())?;
        Ok(Self(Output::Queued(queue)))
    }

    /// Writes lines to standard error on a log thread, because standard output is for data.
    ///
    /// # Errors
    ///
    /// Fails when the system cannot create a thread.
    pub fn stderr(format: LineFormat) -> io::Result<Self> {
        Self::queued(io::stderr(), format)
    }

    /// Writes or queues one line with its line break.
    pub(super) fn write(&self, line: &[u8], level: Level) {
        match &self.0 {
            Output::Direct(writer) => {
                let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
                // A failing log output must not affect requests.
                let _ = writer.write_all(line).and_then(|()| writer.flush());
            }
            Output::Queued(queue) => queue.append(line, level <= Level::WARN),
        }
    }

    /// Makes [`flush`] and [`dropped_lines`] refer to this sink, and flushes it when a thread panics.
    pub(super) fn install(&self) {
        // Only the first sink of a process can be installed.
        if INSTALLED.set(self.clone()).is_err() || !matches!(self.0, Output::Queued(_)) {
            return;
        }
        let default_hook = panic::take_hook();
        panic::set_hook(Box::new(move |panic_info| {
            // Queued lines are written before the panic message. If they cannot be written, printing the
            // message directly could block forever, so it is also queued.
            if flush_within(PANIC_FLUSH_TIMEOUT) {
                default_hook(panic_info)
            } else {
                error!(event = "panicked", "{panic_info}")
            }
        }));
    }
}

impl fmt::Debug for LogSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogSink")
    }
}

/// A writer of whole lines of one level.
#[derive(Debug)]
pub struct LineWriter<'a> {
    sink: &'a LogSink,
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

impl<'a> MakeWriter<'a> for LogSink {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> LineWriter<'a> {
        LineWriter { sink: self, level: Level::INFO }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> LineWriter<'a> {
        LineWriter { sink: self, level: *metadata.level() }
    }
}

/// The sink of this process.
static INSTALLED: OnceLock<LogSink> = OnceLock::new();

fn installed_queue() -> Option<&'static LogQueue> {
    match INSTALLED.get() {
        Some(LogSink(Output::Queued(queue))) => Some(queue),
        Some(LogSink(Output::Direct(_))) | None => None,
    }
}

/// Waits until all earlier lines of the installed sink are written or lost, for at most one second.
pub fn flush() {
    flush_within(FLUSH_TIMEOUT);
}

/// Flushes the log when it is dropped, so that every return path of a function flushes.
#[derive(Debug)]
pub struct FlushOnDrop;

impl Drop for FlushOnDrop {
    fn drop(&mut self) {
        flush();
    }
}

/// Flushes the installed sink, and returns whether all earlier lines were written or lost within the timeout.
fn flush_within(timeout: Duration) -> bool {
    installed_queue().is_none_or(|queue| queue.flush(timeout))
}

/// Returns the number of lines of the installed sink that were dropped after Keychoir started, because the queue was
/// full or the output failed.
#[must_use]
pub fn dropped_lines() -> u64 {
    installed_queue().map_or(0, |queue| queue.dropped_lines.load(Ordering::Relaxed))
}

/// The queue between the threads that log and the log thread.
#[derive(Debug, Default)]
struct LogQueue {
    state: Mutex<QueueState>,
    /// Wakes the log thread.
    wake_writer: Condvar,
    /// Wakes the threads that wait in `flush`.
    lines_written: Condvar,
    /// Number of lines that were dropped after Keychoir started, because the queue was full or the output failed.
    dropped_lines: AtomicU64,
}

#[derive(Debug, Default)]
struct QueueState {
    /// The queued lines.
    batch: Vec<u8>,
    /// Number of lines that were dropped after the lines of the batch, because the queue was full.
    dropped: u64,
    /// Number of lines queued after Keychoir started.
    queued_total: u64,
    /// Number of lines written or lost after Keychoir started.
    completed_total: u64,
    writer: WriterState,
}

/// The state of the log thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum WriterState {
    /// The thread is writing, and will pause after the write.
    Writing,
    /// The thread is writing, and will take further lines without a pause.
    #[default]
    WritingWithoutPause,
    /// The thread pauses after a write, so that further lines are collected.
    Paused,
    /// The queue is empty, and the thread waits for a line.
    Idle,
}

impl LogQueue {
    fn state(&self) -> MutexGuard<'_, QueueState> {
        // A panic while the lock is held leaves the queue valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a line, or drops it if the queue is full. An urgent line is written without a pause.
    fn append(&self, line: &[u8], is_urgent: bool) {
        let mut state = self.state();
        if state.batch.len() + line.len() > MAX_QUEUE_BYTES {
            state.dropped += 1;
            drop(state);
            self.dropped_lines.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.batch.extend_from_slice(line);
        state.queued_total += 1;
        let must_wake = match state.writer {
            WriterState::Idle => state.end_pause(),
            WriterState::Paused | WriterState::Writing if is_urgent || state.batch.len() >= BATCH_BYTES => {
                state.end_pause()
            }
            WriterState::Paused | WriterState::Writing | WriterState::WritingWithoutPause => false,
        };
        drop(state);
        if must_wake {
            self.wake_writer.notify_one();
        }
    }

    /// Waits until all earlier lines are written or lost. Returns false after the timeout.
    fn flush(&self, timeout: Duration) -> bool {
        let mut state = self.state();
        let target = state.queued_total;
        if state.completed_total < target && state.end_pause() {
            self.wake_writer.notify_one();
        }
        let is_behind = |state: &mut QueueState| state.completed_total < target;
        let wait_result = self.lines_written.wait_timeout_while(state, timeout, is_behind);
        !wait_result.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Waits until there are lines to write, and moves them to `batch`, which must be empty. Returns
    /// `queued_total` up to the last line of `batch`, and the number of lines dropped after it.
    fn take(&self, batch: &mut Vec<u8>) -> (u64, u64) {
        let mut state = self.state();
        if state.writer == WriterState::Writing {
            state.writer = WriterState::Paused;
            let paused = self
                .wake_writer
                .wait_timeout_while(state, BATCH_INTERVAL, |state| state.writer == WriterState::Paused);
            state = paused.unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.batch.is_empty() && state.dropped == 0 {
            state.writer = WriterState::Idle;
            let woken = self.wake_writer.wait_while(state, |state| state.writer == WriterState::Idle);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        state.writer = WriterState::Writing;
        mem::swap(&mut state.batch, batch);
        (state.queued_total, mem::take(&mut state.dropped))
    }

    /// Records that the first `total` lines were written or lost.
    fn record_completed(&self, total: u64) {
        self.state().completed_total = total;
        self.lines_written.notify_all();
    }
}

impl QueueState {
    /// Makes the log thread take lines without a pause, and returns whether the thread must be woken.
    fn end_pause(&mut self) -> bool {
        matches!(
            mem::replace(&mut self.writer, WriterState::WritingWithoutPause),
            WriterState::Paused | WriterState::Idle
        )
    }
}

/// The log thread: writes the lines of the queue to an output.
struct LogWriter<W> {
    queue: Arc<LogQueue>,
    output: W,
    /// The format of messages about dropped lines.
    format: LineFormat,
    /// Number of lines lost after the last message about lost lines.
    unreported_lines: u64,
    /// Whether the last write ended within a line.
    has_partial_line: bool,
}

impl<W: Write> LogWriter<W> {
    fn run(mut self) {
        let mut batch = Vec::new();
        loop {
            let (queued_total, dropped) = self.queue.take(&mut batch);
            self.write_batch(&batch);
            if dropped > 0 && (self.unreported_lines > 0 || !self.report_lost(dropped)) {
                self.unreported_lines += dropped;
            }
            self.queue.record_completed(queued_total);
            batch.clear();
            batch.shrink_to(2 * BATCH_BYTES);
        }
    }

    /// Writes a batch in chunks of whole lines, each of about `BATCH_BYTES`.
    fn write_batch(&mut self, batch: &[u8]) {
        let mut remaining = batch;
        while remaining.len() > BATCH_BYTES {
            let end = memchr::memchr(b'\n', &remaining[BATCH_BYTES..])
                .map_or(remaining.len(), |index| BATCH_BYTES + index + 1);
            let (chunk, remainder) = remaining.split_at(end);
            self.write_lines(chunk);
            remaining = remainder;
        }
        self.write_lines(remaining);
    }

    /// Writes lines, after a message about earlier lines that were lost.
    fn write_lines(&mut self, lines: &[u8]) {
        if self.unreported_lines > 0 && self.report_lost(self.unreported_lines) {
            self.unreported_lines = 0;
        }
        // If the message cannot be written, the lines are not written either, because they would precede it.
        let lost_lines = if self.unreported_lines > 0 { count_lines(lines) } else { self.write(lines) };
        self.queue.dropped_lines.fetch_add(lost_lines, Ordering::Relaxed);
        self.unreported_lines += lost_lines;
    }

    /// Writes a message that `count` lines were lost, and returns whether it was written.
    fn report_lost(&mut self, count: u64) -> bool {
        let (lines, were) = if count == 1 { ("line", "was") } else { ("lines", "were") };
        let mut draft = LineDraft::default();
        draft.begin(self.format);
        draft.add_text("event", "log_lines_dropped");
        draft.add_value("lines", count);
        draft.set_message(format_args!(
            "{count} log {lines} {were} dropped: they could not be written in time"
        ));
        self.write(draft.finish(Level::WARN, module_path!(), clock::now())) == 0
    }

    /// Writes lines, and returns the number of lines that were lost.
    fn write(&mut self, lines: &[u8]) -> u64 {
        let mut remaining = lines;
        while !remaining.is_empty() {
            let next: &[u8] = if self.has_partial_line { b"\n" } else { remaining };
            match self.output.write(next) {
                Ok(1..) if self.has_partial_line => self.has_partial_line = false,
                Ok(count @ 1..) => remaining = remaining.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::park_timeout(RETRY_DELAY),
                Ok(0) | Err(_) => {
                    let written_bytes = lines.len() - remaining.len();
                    self.has_partial_line |= lines[..written_bytes].last().is_some_and(|last| *last != b'\n');
                    return count_lines(remaining);
                }
            }
        }
        // Every line was passed to the output, so it is unknown which lines a failed flush loses.
        let _ = self.output.flush();
        0
    }
}

fn count_lines(bytes: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', bytes).count() as u64
}

#[cfg(test)]
mod tests;
