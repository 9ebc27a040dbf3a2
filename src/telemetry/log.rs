//! The way of a line to where it is read. Whoever says something appends it to what is gathered and goes
//! on; one thread named `log` writes. So a terminal that is slow, or a pipe that nobody reads, makes no
//! request wait: when as much is gathered as may be, lines are dropped, counted, and told of.

mod batch;

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::mem;
use std::panic;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use tracing::{Level, error};

use batch::Batch;

use super::ended::AccessLogEntry;
use super::line::{Draft, Form};
use crate::clock;
use crate::tasks;

/// After a write, this long for more lines to share the next: nobody sees the difference, and a busy
/// program is not woken for each of them. After a quiet moment a line is written at once.
const REST: Duration = Duration::from_millis(50);
/// So much is written without a rest, and at once.
const BATCH_BYTES: usize = 64 * 1024;
/// So much may be gathered: seconds of a busy proxy, while a reader is slow.
const GATHERED_BYTES_MAX: usize = 4 * 1024 * 1024;
/// When the output takes nothing now and does not wait either.
const RETRY: Duration = Duration::from_millis(5);
/// At the end, and before something else is said where lines go, this long for them to be written.
const FLUSH_MAX: Duration = Duration::from_secs(1);
/// A thread that panics may have requests to serve.
const PANIC_FLUSH_MAX: Duration = Duration::from_millis(100);

/// Where lines go. Shared by all threads; each line is written whole, in the order in which they came.
#[derive(Clone)]
pub struct Sink(Way);

#[derive(Clone)]
enum Way {
    Direct(Arc<Mutex<Box<dyn Write + Send>>>),
    /// Put into words and written by a thread of its own.
    Gathered(Arc<Gathered>),
}

impl Sink {
    /// Writes to `writer` whenever something is said, on the thread that says it.
    pub fn new(writer: impl Write + Send + 'static) -> Self {
        Self(Way::Direct(Arc::new(Mutex::new(Box::new(writer)))))
    }

    /// Writes to `writer` on a thread of its own, in lines of this form. What is gathered when the program
    /// ends needs a [`flush`].
    ///
    /// # Errors
    ///
    /// When the system has no thread to give.
    pub fn gathered(writer: impl Write + Send + 'static, form: Form) -> io::Result<Self> {
        let gathered = Arc::new(Gathered::default());
        let writing = Writing {
            gathered: Arc::clone(&gathered),
            writer,
            form,
            lost: 0,
            is_cut: false,
            text: Vec::new(),
        };
        tasks::thread("log", move || writing.run())?;
        Ok(Self(Way::Gathered(gathered)))
    }

    /// Writes to standard error, which is not for data, on a thread of its own.
    ///
    /// # Errors
    ///
    /// When the system has no thread to give.
    pub fn stderr(form: Form) -> io::Result<Self> {
        Self::gathered(io::stderr(), form)
    }

    pub(super) fn write(&self, line: &[u8], level: Level) {
        match &self.0 {
            Way::Direct(writer) => {
                let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
                // A log that cannot be written must not stop the traffic it tells of.
                let _ = writer.write_all(line).and_then(|()| writer.flush());
            }
            Way::Gathered(gathered) => {
                gathered.append(line.len(), level <= Level::WARN, |batch| batch.add_line(line));
            }
        }
    }

    fn tell(&self, ended: &AccessLogEntry<&str>, form: Form) {
        match &self.0 {
            Way::Direct(_) => {
                let mut line = Vec::new();
                ended.append(&mut line, form);
                self.write(&line, Level::INFO);
            }
            Way::Gathered(gathered) => {
                gathered.append(ended.texts_bytes(), false, |batch| batch.add_ended(ended));
            }
        }
    }

    /// Makes it the one that is told of requests, in lines of this form, and that is flushed.
    pub(super) fn install(&self, form: Form) {
        // The log is started once.
        if INSTALLED.set((self.clone(), form)).is_err() || !matches!(self.0, Way::Gathered(_)) {
            return;
        }
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            // What led to it comes first. Where nothing can be written, it would wait for ever.
            if flush_within(PANIC_FLUSH_MAX) { print(info) } else { error!(event = "panicked", "{info}") }
        }));
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sink")
    }
}

static INSTALLED: OnceLock<(Sink, Form)> = OnceLock::new();

fn installed() -> Option<&'static Gathered> {
    match INSTALLED.get() {
        Some((Sink(Way::Gathered(gathered)), _)) => Some(gathered),
        Some((Sink(Way::Direct(_)), _)) | None => None,
    }
}

/// Whether requests are told of.
static IS_TOLD: AtomicBool = AtomicBool::new(false);

/// Tells of requests from here on, or not.
pub(super) fn tell_of_requests(is_told: bool) {
    IS_TOLD.store(is_told, Ordering::Relaxed);
}

/// Says that a request has ended, where the program's lines go.
pub fn tell(ended: &AccessLogEntry<&str>) {
    if !IS_TOLD.load(Ordering::Relaxed) {
        return;
    }
    if let Some((sink, form)) = INSTALLED.get() {
        sink.tell(ended, *form);
    }
}

/// Waits until every line of the program that was said before is written, but not for ever.
pub fn flush() {
    flush_within(FLUSH_MAX);
}

/// Flushes when it is dropped: at the end of whoever has it, however that ends.
#[derive(Debug)]
pub struct FlushAtEnd;

impl Drop for FlushAtEnd {
    fn drop(&mut self) {
        flush();
    }
}

/// Whether they are.
fn flush_within(span: Duration) -> bool {
    installed().is_none_or(|gathered| gathered.flush(span))
}

/// Lines of the program that were dropped, from the start on.
pub(super) fn dropped() -> u64 {
    installed().map_or(0, |gathered| gathered.dropped.load(Ordering::Relaxed))
}

#[derive(Debug, Default)]
struct Gathered {
    state: Mutex<State>,
    /// The thread that writes waits for this.
    wanted: Condvar,
    /// Who flushes waits for this.
    written: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    batch: Batch,
    /// Lines that came after these and had no room.
    dropped: u64,
    /// How many have come and how many have been written, or lost, since the start.
    came: u64,
    written: u64,
    writer: Writer,
}

/// What the thread does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Writer {
    /// It writes, and will look whether there is more.
    Writes,
    /// The same, and it will not rest before.
    #[default]
    Hurries,
    /// It has written, and waits for more to come together.
    Rests,
    /// It waits for a line.
    Sleeps,
}

impl Gathered {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics that holds it; and if it did, lines would be what they are.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gathers an entry, whose texts are so long, unless there is no room.
    fn append(&self, texts_bytes: usize, is_urgent: bool, add: impl FnOnce(&mut Batch)) {
        let mut state = self.state();
        if state.batch.bytes() + texts_bytes > GATHERED_BYTES_MAX {
            state.dropped += 1;
            drop(state);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        add(&mut state.batch);
        state.came += 1;
        let is_woken = match state.writer {
            Writer::Sleeps => state.hurry(),
            Writer::Rests | Writer::Writes if is_urgent || state.batch.bytes() >= BATCH_BYTES => {
                state.hurry()
            }
            Writer::Rests | Writer::Writes | Writer::Hurries => false,
        };
        drop(state);
        if is_woken {
            self.wanted.notify_one();
        }
    }

    fn flush(&self, span: Duration) -> bool {
        let mut state = self.state();
        let end = state.came;
        if state.written < end && state.hurry() {
            self.wanted.notify_one();
        }
        let is_behind = |state: &mut State| state.written < end;
        let waited = self.written.wait_timeout_while(state, span, is_behind);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Waits until something is to be written and puts it into `batch`, which is empty; returns how many
    /// lines were dropped behind it.
    fn take(&self, batch: &mut Batch) -> u64 {
        let mut state = self.state();
        if state.writer == Writer::Writes {
            state.writer = Writer::Rests;
            let rested = self.wanted.wait_timeout_while(state, REST, |state| state.writer == Writer::Rests);
            state = rested.unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.batch.is_empty() && state.dropped == 0 {
            state.writer = Writer::Sleeps;
            let slept = self.wanted.wait_while(state, |state| state.writer == Writer::Sleeps);
            state = slept.unwrap_or_else(PoisonError::into_inner);
        }
        state.writer = Writer::Writes;
        mem::swap(&mut state.batch, batch);
        mem::take(&mut state.dropped)
    }

    /// So many are written, or lost.
    fn done(&self, entries: usize) {
        self.state().written += entries as u64;
        self.written.notify_all();
    }
}

impl State {
    /// Whether the thread must be woken for that.
    fn hurry(&mut self) -> bool {
        matches!(mem::replace(&mut self.writer, Writer::Hurries), Writer::Rests | Writer::Sleeps)
    }
}

/// What the thread has.
struct Writing<W> {
    gathered: Arc<Gathered>,
    writer: W,
    form: Form,
    /// Lines that were lost since it was last told of.
    lost: u64,
    /// The last thing that was written is half a line.
    is_cut: bool,
    /// Its memory serves for one batch after the other.
    text: Vec<u8>,
}

impl<W: Write> Writing<W> {
    fn run(mut self) {
        let mut batch = Batch::default();
        loop {
            let dropped = self.gathered.take(&mut batch);
            self.put_all(&batch);
            if dropped > 0 && (self.lost > 0 || self.tell(dropped) > 0) {
                self.lost += dropped;
            }
            self.gathered.done(batch.entries());
            batch.clear(2 * BATCH_BYTES);
        }
    }

    /// Puts a batch into words, and writes as much at once as it may.
    fn put_all(&mut self, batch: &Batch) {
        let (mut text, form) = (mem::take(&mut self.text), self.form);
        let mut told = batch.told();
        while told.append(&mut text, form) {
            if text.len() >= BATCH_BYTES {
                self.put(&text);
                text.clear();
            }
        }
        self.put(&text);
        text.clear();
        text.shrink_to(2 * BATCH_BYTES);
        self.text = text;
    }

    /// Writes lines, and tells what is missing before them.
    fn put(&mut self, text: &[u8]) {
        if self.lost > 0 && self.tell(self.lost) == 0 {
            self.lost = 0;
        }
        // Where that cannot be told, the rest is not tried: it would stand in front of it.
        let lost = if self.lost > 0 { lines(text) } else { self.write(text) };
        self.gathered.dropped.fetch_add(lost, Ordering::Relaxed);
        self.lost += lost;
    }

    /// Tells how many lines are missing here.
    fn tell(&mut self, count: u64) -> u64 {
        let (lines, were) = if count == 1 { ("line", "was") } else { ("lines", "were") };
        let mut draft = Draft::default();
        draft.begin(self.form);
        draft.text("event", "log_lines_dropped");
        draft.value("lines", count);
        draft.message(format_args!("{count} log {lines} {were} dropped: they could not be written in time"));
        self.write(draft.line(Level::WARN, module_path!(), clock::now()))
    }

    /// Writes all of it; returns how many lines could not be.
    fn write(&mut self, batch: &[u8]) -> u64 {
        let mut rest = batch;
        while !rest.is_empty() {
            let next: &[u8] = if self.is_cut { b"\n" } else { rest };
            match self.writer.write(next) {
                Ok(1..) if self.is_cut => self.is_cut = false,
                Ok(count @ 1..) => rest = rest.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::park_timeout(RETRY),
                Ok(0) | Err(_) => {
                    let begun = batch.len() - rest.len();
                    self.is_cut |= batch[..begun].last().is_some_and(|last| *last != b'\n');
                    return lines(rest);
                }
            }
        }
        // Nothing is left to be lost when it cannot be flushed.
        let _ = self.writer.flush();
        0
    }
}

fn lines(bytes: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', bytes).count() as u64
}

#[cfg(test)]
mod tests;
