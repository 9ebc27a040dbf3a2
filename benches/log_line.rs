//! Measures the cost of the log line of a request, on the thread that logs it and on the thread that writes it. The
//! lines are logged in bursts, like the lines of a busy Keychoir, and written into a pipe that another thread reads.
//!
//! ```text
//! cargo bench --bench log_line
//! ```
//!
//! Environment variables set the parameters: `BENCH_RATE` (lines per second), `BENCH_SECONDS` and `BENCH_FORM` (`json`
//! or `terminal`). The benchmark runs only on Linux.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a benchmark reads the clock, waits, prints its results, and panics if an expectation fails"
)]

mod harness;

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::{env_number, median};
use keychoir::elevenlabs::endpoint::Route;
use keychoir::telemetry::{self, LineFormat, LogSink};
use tracing::info;

/// Number of bursts per second.
const BURSTS_PER_SECOND: u32 = 200;

/// The message of the last line, at which the reader stops.
const LAST_MESSAGE: &str = "this is the last line";

fn main() {
    let rate = env_number("BENCH_RATE", 3_000);
    let seconds = env_number("BENCH_SECONDS", 8);
    let format = match std::env::var("BENCH_FORM").as_deref() {
        Ok("terminal") => LineFormat::Terminal,
        _ => LineFormat::Json,
    };
    let (mut reader, writer) = io::pipe().unwrap();
    let reader_thread = keychoir::tasks::spawn_thread("reader", move || {
        let (mut bytes, mut buffer) = (0, vec![0; 64 * 1024]);
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            bytes += count;
            if buffer[..count].windows(LAST_MESSAGE.len()).any(|window| window == LAST_MESSAGE.as_bytes()) {
                break;
            }
        }
        bytes
    });
    telemetry::start(format, "info", LogSink::queued(writer, format).unwrap()).unwrap();

    // The writer thread sets its name before its first write, so that the thread can be found by its name afterwards.
    info!(event = "begin", "begin");
    telemetry::flush();

    let request_id: Arc<str> = "0198c2f0-7b1a-7000-8000-000100000002".into();
    let lines_per_burst = rate / BURSTS_PER_SECOND;
    let mut nanos_per_line = Vec::new();
    let started_at = Instant::now();
    let nanos_before = writer_thread_nanos();
    for burst in 0..BURSTS_PER_SECOND * seconds {
        let burst_started_at = Instant::now();
        for number in 0..lines_per_burst {
            log_request(&request_id, u64::from(number));
        }
        nanos_per_line.push(burst_started_at.elapsed().as_secs_f64() * 1e9 / f64::from(lines_per_burst));
        std::thread::sleep(
            (Duration::from_secs(1) / BURSTS_PER_SECOND * burst).saturating_sub(started_at.elapsed()),
        );
    }
    let writer_nanos = writer_thread_nanos() - nanos_before;
    let lines = f64::from(BURSTS_PER_SECOND * seconds * lines_per_burst);
    println!("{format:?}, {BURSTS_PER_SECOND} bursts per second of {lines_per_burst} lines:");
    println!(
        "the logging thread, ns per line (median of the bursts): {:.0}",
        median(nanos_per_line.into_iter())
    );
    println!("the thread `log`, ns per line: {:.0}", writer_nanos / lines);
    info!(event = "end", "{LAST_MESSAGE}");
    println!("bytes per line: {:.0}", reader_thread.unwrap().join().unwrap() as f64 / lines);
}

/// Logs the event of a request as Keychoir does.
fn log_request(request_id: &str, total_ms: u64) {
    let route = Route::parse("/v1/text-to-speech/{voice_id}/stream");
    info!(
        attempts = 1,
        bytes = 48_213,
        client = "studio",
        credits = 120,
        event = "request_ended",
        first_byte_ms = 240,
        key = "sk_6c036526...d452b",
        method = "POST",
        parameters = "output_format,optimize_streaming_latency",
        request_id,
        route = %route,
        status = 200,
        total_ms,
        upstream_host = "api.elevenlabs.io",
        user_agent = "python-httpx/0.28.1",
        verdict = "served",
        "POST {route} 200 served sk_6c036526...d452b 120 credits, 1 attempts, {total_ms} ms"
    );
}

/// Returns the processor time of the writer thread, in nanoseconds.
fn writer_thread_nanos() -> f64 {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let read_file = |task: &Path, file: &str| fs::read_to_string(task.join(file)).unwrap();
    let writer_thread = tasks
        .into_iter()
        .find(|task| read_file(task, "comm").trim() == "log")
        .expect("the log must have a writer thread");
    read_file(&writer_thread, "schedstat").split_whitespace().next().unwrap().parse().unwrap()
}
