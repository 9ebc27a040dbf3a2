//! Tests of the log thread with pipes that are read or not read, and with outputs that fail.

use std::io::{BufRead, BufReader, PipeReader, Read};
use std::sync::mpsc;

use super::*;

const WAIT_MAX: Duration = Duration::from_secs(30);

fn queued(writer: impl Write + Send + 'static) -> (Sink, Arc<LogQueue>) {
    let sink = Sink::queued(writer, LineFormat::Json).unwrap();
    let Output::Queued(queued) = &sink.0 else { panic!("it has a thread") };
    let queued = Arc::clone(queued);
    (sink, queued)
}

fn piped() -> (Sink, Arc<LogQueue>, BufReader<PipeReader>) {
    let (reader, writer) = io::pipe().unwrap();
    let (sink, queued) = queued(writer);
    (sink, queued, BufReader::new(reader))
}

fn next(reader: &mut impl BufRead) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line
}

/// The number of lost lines that a message reports.
#[track_caller]
fn lost_count(line: &str) -> u64 {
    let event: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!((&event["event"], &event["level"]), (&"log_lines_dropped".into(), &"warn".into()), "{line}");
    event["lines"].as_u64().unwrap()
}

#[test]
fn a_lone_line_needs_no_flush() {
    let (sink, _, mut reader) = piped();
    for level in [Level::INFO, Level::ERROR, Level::TRACE, Level::WARN] {
        sink.write(format!("{level}\n").as_bytes(), level);
        assert_eq!(next(&mut reader), format!("{level}\n"));
    }
}

#[test]
fn every_line_is_whole_and_in_its_order() {
    const THREADS: usize = 4;
    const LINES: usize = 20_000;
    let (sink, queued, reader) = piped();
    let reading = tasks::thread("reader", || {
        let mut counts = [0; THREADS];
        for line in reader.lines().take(THREADS * LINES) {
            let line = line.unwrap();
            let (thread, number) = line.split_once(' ').unwrap();
            let count = &mut counts[thread.parse::<usize>().unwrap()];
            assert_eq!(number.parse(), Ok(*count));
            *count += 1;
        }
        counts
    });
    let writing = [0, 1, 2, 3].map(|thread| {
        let (sink, queued) = (sink.clone(), Arc::clone(&queued));
        let log = move || {
            for number in 0..LINES {
                let level = if number % 1_000 == 0 { Level::WARN } else { Level::INFO };
                sink.write(format!("{thread} {number}\n").as_bytes(), level);
                // The queue has room for all lines, even if the reader is slow.
                if number % 5_000 == 0 {
                    assert!(queued.flush(WAIT_MAX));
                }
            }
        };
        tasks::thread("writer", log).unwrap()
    });
    writing.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(reading.unwrap().join().unwrap(), [LINES; THREADS]);
    assert_eq!(queued.dropped.load(Ordering::Relaxed), 0);
}

#[test]
fn a_flush_writes_all_earlier_lines() {
    let (sink, queued, mut reader) = piped();
    for round in 0..200 {
        for _ in 0..round % 3 {
            sink.write(b"x\n", Level::INFO);
        }
        assert!(queued.flush(WAIT_MAX));
        let mut written = vec![0; round % 3 * 2];
        reader.read_exact(&mut written).unwrap();
        assert_eq!(written, b"x\n".repeat(round % 3));
    }
}

#[test]
fn an_unread_pipe_blocks_no_thread_and_dropped_lines_are_reported() {
    const LINES: u64 = 1_000;
    // More than fits in the queue, in the pipe and in the write under way.
    let long = [vec![b'x'; 3 * QUEUE_BYTES_MAX / LINES as usize], b"\n".to_vec()].concat();
    let (sink, queued, mut reader) = piped();
    // The lines are logged on this thread: if a write blocked, the test would not end.
    for _ in 0..LINES {
        sink.write(&long, Level::WARN);
    }
    assert!(!queued.flush(Duration::from_millis(20)), "the lines are not written");
    let dropped = queued.dropped.load(Ordering::Relaxed);
    assert!((LINES / 3 - 50..LINES).contains(&dropped), "{dropped}");
    let (mut whole, mut missing) = (0, 0);
    while whole + missing < LINES {
        let line = next(&mut reader);
        if line.as_bytes() == long { whole += 1 } else { missing += lost_count(&line) }
    }
    assert_eq!((whole, missing), (LINES - dropped, dropped));
    // Afterwards lines are written as before.
    sink.write(b"later\n", Level::INFO);
    assert_eq!(next(&mut reader), "later\n");
}

/// An output that returns one given result per write.
struct ScriptedOutput {
    results: mpsc::Receiver<io::Result<usize>>,
    written: mpsc::Sender<String>,
}

impl Write for ScriptedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.results.recv().unwrap()?.min(bytes.len());
        self.written.send(String::from_utf8_lossy(&bytes[..count]).into_owned()).unwrap();
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct LogTest {
    sink: Sink,
    queued: Arc<LogQueue>,
    result: mpsc::Sender<io::Result<usize>>,
    written: mpsc::Receiver<String>,
}

impl LogTest {
    fn new() -> Self {
        let (result, results) = mpsc::channel();
        let (sender, written) = mpsc::channel();
        let (sink, queued) = queued(ScriptedOutput { results, written: sender });
        Self { sink, queued, result, written }
    }

    /// The text that is written for these lines when the output returns these results.
    fn log(&self, lines: &str, results: impl IntoIterator<Item = io::Result<usize>>) -> String {
        results.into_iter().for_each(|result| self.result.send(result).unwrap());
        self.sink.write(lines.as_bytes(), Level::INFO);
        assert!(self.queued.flush(WAIT_MAX));
        self.written.try_iter().collect()
    }
}

fn full() -> io::Result<usize> {
    Err(ErrorKind::StorageFull.into())
}

#[test]
fn an_output_with_short_writes_gets_every_byte() {
    let test_log = LogTest::new();
    let again = || Err(ErrorKind::WouldBlock.into());
    let interrupted = Err(ErrorKind::Interrupted.into());
    assert_eq!(
        test_log.log("abc\ndef\n", [Ok(2), again(), Ok(3), interrupted, again(), Ok(9)]),
        "abc\ndef\n"
    );
    assert_eq!(test_log.log("g\n", [Ok(9)]), "g\n");
    assert_eq!(test_log.queued.dropped.load(Ordering::Relaxed), 0);
}

#[test]
fn lost_lines_are_reported_when_the_output_works_again() {
    let test_log = LogTest::new();
    assert_eq!(test_log.log("a\nb\n", [full()]), "");
    // The message about the lost lines cannot be written yet, so the next line is not written either.
    assert_eq!(test_log.log("c\n", [full()]), "");
    let text = test_log.log("d\n", [Ok(999), Ok(999)]);
    let (line, rest) = text.split_once('\n').unwrap();
    assert_eq!((lost_count(line), rest), (3, "d\n"));
    assert_eq!(test_log.log("e\n", [Ok(999)]), "e\n");
    assert_eq!(test_log.queued.dropped.load(Ordering::Relaxed), 3);
}

#[test]
fn a_line_that_was_cut_is_ended_before_the_next() {
    let test_log = LogTest::new();
    assert_eq!(test_log.log("whole\nhalf\n", [Ok(8), full()]), "whole\nha");
    let text = test_log.log("next\n", [Ok(999), Ok(999), Ok(999)]);
    let [end, line, rest] = *text.splitn(3, '\n').collect::<Vec<_>>() else { panic!("{text}") };
    assert_eq!((end, lost_count(line), rest), ("", 1, "next\n"));
    // A write that ends with a line cuts no line.
    assert_eq!(test_log.log("a\nb\n", [Ok(2), full()]), "a\n");
    let text = test_log.log("c\n", [Ok(999), Ok(999)]);
    let (line, rest) = text.split_once('\n').unwrap();
    assert_eq!((lost_count(line), rest), (1, "c\n"));
}
