//! Tests of the log thread with pipes that are read at once, slowly or not at all, and with outputs that fail or write
//! only a part: lines stay whole and in order, and lost lines are reported.

use std::io::{BufRead, BufReader, PipeReader, Read};
use std::sync::mpsc;

use super::*;

const WAIT_TIMEOUT: Duration = Duration::from_secs(30);

fn queued_sink(writer: impl Write + Send + 'static) -> (LogSink, Arc<LogQueue>) {
    let sink = LogSink::queued(writer, LineFormat::Json).unwrap();
    let Output::Queued(queue) = &sink.0 else { panic!("the sink must have a queue") };
    let queue = Arc::clone(queue);
    (sink, queue)
}

/// Returns a queued sink, its queue, and a reader of the pipe to which the sink writes.
fn piped_sink() -> (LogSink, Arc<LogQueue>, BufReader<PipeReader>) {
    let (reader, writer) = io::pipe().unwrap();
    let (sink, queue) = queued_sink(writer);
    (sink, queue, BufReader::new(reader))
}

fn read_line(reader: &mut impl BufRead) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line
}

/// Returns the number of lost lines that a line reports.
#[track_caller]
fn lost_count(line: &str) -> u64 {
    let event: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(
        (&event["event"], &event["level"]),
        (&"log_lines_dropped".into(), &"warn".into()),
        "the line must report lost lines: {line}"
    );
    event["lines"].as_u64().unwrap()
}

#[test]
fn a_single_line_is_written_without_a_flush() {
    let (sink, _, mut reader) = piped_sink();
    for level in [Level::INFO, Level::ERROR, Level::TRACE, Level::WARN] {
        sink.write(format!("{level}\n").as_bytes(), level);
        assert_eq!(read_line(&mut reader), format!("{level}\n"));
    }
}

#[test]
fn every_line_is_written_whole_and_in_order() {
    const THREADS: usize = 4;
    const LINES: usize = 20_000;
    let (sink, queue, reader) = piped_sink();
    let reading = tasks::spawn_thread("reader", || {
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
        let (sink, queue) = (sink.clone(), Arc::clone(&queue));
        let log = move || {
            for number in 0..LINES {
                let level = if number % 1_000 == 0 { Level::WARN } else { Level::INFO };
                sink.write(format!("{thread} {number}\n").as_bytes(), level);
                // Flushing keeps the queue from becoming full if the reader is slow.
                if number % 5_000 == 0 {
                    assert!(queue.flush(WAIT_TIMEOUT));
                }
            }
        };
        tasks::spawn_thread("writer", log).unwrap()
    });
    writing.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(reading.unwrap().join().unwrap(), [LINES; THREADS]);
    assert_eq!(queue.dropped_lines.load(Ordering::Relaxed), 0);
}

#[test]
fn a_flush_writes_all_earlier_lines() {
    let (sink, queue, mut reader) = piped_sink();
    for round in 0..200 {
        for _ in 0..round % 3 {
            sink.write(b"x\n", Level::INFO);
        }
        assert!(queue.flush(WAIT_TIMEOUT));
        let mut written_bytes = vec![0; round % 3 * 2];
        reader.read_exact(&mut written_bytes).unwrap();
        assert_eq!(written_bytes, b"x\n".repeat(round % 3));
    }
}

#[test]
fn an_unread_pipe_blocks_no_thread_and_dropped_lines_are_reported() {
    const LINES: u64 = 1_000;
    // The lines exceed the capacity of the queue, the pipe and the write in progress together.
    let long_line = [vec![b'x'; 3 * MAX_QUEUE_BYTES / LINES as usize], b"\n".to_vec()].concat();
    let (sink, queue, mut reader) = piped_sink();
    // The lines are logged on this thread, so a blocked write would block the test.
    for _ in 0..LINES {
        sink.write(&long_line, Level::WARN);
    }
    assert!(!queue.flush(Duration::from_millis(20)), "a flush must time out while the pipe is not read");
    let dropped = queue.dropped_lines.load(Ordering::Relaxed);
    assert!(
        (LINES / 3 - 50..LINES).contains(&dropped),
        "about a third of the lines must be dropped, not {dropped}"
    );
    let (mut written, mut reported) = (0, 0);
    while written + reported < LINES {
        let line = read_line(&mut reader);
        if line.as_bytes() == long_line { written += 1 } else { reported += lost_count(&line) }
    }
    assert_eq!((written, reported), (LINES - dropped, dropped));
    // Later lines are written again.
    sink.write(b"later\n", Level::INFO);
    assert_eq!(read_line(&mut reader), "later\n");
}

/// An output whose writes return the results that a test sends.
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

/// A queued sink, and the channels to its output.
struct LogTest {
    sink: LogSink,
    queue: Arc<LogQueue>,
    write_results: mpsc::Sender<io::Result<usize>>,
    written: mpsc::Receiver<String>,
}

impl LogTest {
    fn new() -> Self {
        let (write_results, results) = mpsc::channel();
        let (sender, written) = mpsc::channel();
        let (sink, queue) = queued_sink(ScriptedOutput { results, written: sender });
        Self { sink, queue, write_results, written }
    }

    /// Logs lines while the output returns these results, and returns the written text.
    fn write(&self, lines: &str, results: impl IntoIterator<Item = io::Result<usize>>) -> String {
        results.into_iter().for_each(|result| self.write_results.send(result).unwrap());
        self.sink.write(lines.as_bytes(), Level::INFO);
        assert!(self.queue.flush(WAIT_TIMEOUT));
        self.written.try_iter().collect()
    }
}

fn disk_full() -> io::Result<usize> {
    Err(ErrorKind::StorageFull.into())
}

#[test]
fn an_output_with_short_writes_receives_every_byte() {
    let log_test = LogTest::new();
    let would_block = || Err(ErrorKind::WouldBlock.into());
    let interrupted = Err(ErrorKind::Interrupted.into());
    assert_eq!(
        log_test.write("abc\ndef\n", [Ok(2), would_block(), Ok(3), interrupted, would_block(), Ok(9)]),
        "abc\ndef\n"
    );
    assert_eq!(log_test.write("g\n", [Ok(9)]), "g\n");
    assert_eq!(log_test.queue.dropped_lines.load(Ordering::Relaxed), 0);
}

#[test]
fn lost_lines_are_reported_when_the_output_works_again() {
    let log_test = LogTest::new();
    assert_eq!(log_test.write("a\nb\n", [disk_full()]), "");
    // While the message about lost lines cannot be written, later lines are also lost.
    assert_eq!(log_test.write("c\n", [disk_full()]), "");
    let written_text = log_test.write("d\n", [Ok(999), Ok(999)]);
    let (line, rest) = written_text.split_once('\n').unwrap();
    assert_eq!((lost_count(line), rest), (3, "d\n"));
    assert_eq!(log_test.write("e\n", [Ok(999)]), "e\n");
    assert_eq!(log_test.queue.dropped_lines.load(Ordering::Relaxed), 3);
}

#[test]
fn a_partial_line_is_ended_before_the_next_line() {
    let log_test = LogTest::new();
    assert_eq!(log_test.write("whole\nhalf\n", [Ok(8), disk_full()]), "whole\nha");
    let written_text = log_test.write("next\n", [Ok(999), Ok(999), Ok(999)]);
    let [end, line, rest] = *written_text.splitn(3, '\n').collect::<Vec<_>>() else {
        panic!("the output must be three lines: {written_text}")
    };
    assert_eq!((end, lost_count(line), rest), ("", 1, "next\n"));
    // A write that ends at the end of a line leaves no partial line.
    assert_eq!(log_test.write("a\nb\n", [Ok(2), disk_full()]), "a\n");
    let written_text = log_test.write("c\n", [Ok(999), Ok(999)]);
    let (line, rest) = written_text.split_once('\n').unwrap();
    assert_eq!((lost_count(line), rest), (1, "c\n"));
}
