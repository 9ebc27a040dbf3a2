//! The cost of a log line for the logging thread and for the writing thread: the line of a request,
//! in bursts like those of a busy proxy, into a pipe that is read.
//!
//! ```text
//! cargo bench --bench line
//! ```
//!
//! `BENCH_RATE` (lines a second), `BENCH_SECONDS` and `BENCH_FORM` (json or terminal) change it.
//! Linux only.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a measurement reads the clock, waits, prints, and ends at its first surprise"
)]

mod house;

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use house::{middle, number};
use keychoir::elevenlabs::endpoint::Route;
use keychoir::telemetry::{self, LineFormat, LogSink};
use tracing::info;

/// Number of bursts per second.
const BURSTS: u32 = 200;

/// The text of the last line.
const END: &str = "nothing more is said";

fn main() {
    let rate = number("BENCH_RATE", 3_000);
    let seconds = number("BENCH_SECONDS", 8);
    let form = match std::env::var("BENCH_FORM").as_deref() {
        Ok("terminal") => LineFormat::Terminal,
        _ => LineFormat::Json,
    };
    let (mut reader, writer) = io::pipe().unwrap();
    let reading = keychoir::tasks::spawn_thread("reader", move || {
        let (mut bytes, mut buffer) = (0, vec![0; 64 * 1024]);
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            bytes += count;
            if buffer[..count].windows(END.len()).any(|window| window == END.as_bytes()) {
                break;
            }
        }
        bytes
    });
    telemetry::start(form, "info", LogSink::queued(writer, form).unwrap()).unwrap();

    // The thread has its name after its first write.
    info!(event = "begin", "begin");
    telemetry::flush();

    let request_id: Arc<str> = "0198c2f0-7b1a-7000-8000-000100000002".into();
    let each = rate / BURSTS;
    let mut spans = Vec::new();
    let began = Instant::now();
    let before = writing();
    for burst in 0..BURSTS * seconds {
        let at = Instant::now();
        for number in 0..each {
            say(&request_id, u64::from(number));
        }
        spans.push(at.elapsed().as_secs_f64() * 1e9 / f64::from(each));
        std::thread::sleep((Duration::from_secs(1) / BURSTS * burst).saturating_sub(began.elapsed()));
    }
    let after = writing();
    let lines = f64::from(BURSTS * seconds * each);
    println!("{form:?}, {each} lines at once, {BURSTS} times a second:");
    println!("the logging thread, ns a line (median of the bursts): {:.0}", middle(spans.into_iter()));
    println!("the thread `log`, ns a line: {:.0}", (after - before) / lines);
    info!(event = "end", "{END}");
    println!("bytes a line: {:.0}", reading.unwrap().join().unwrap() as f64 / lines);
}

/// Logs the line of a request, like the proxy.
fn say(request_id: &str, total_ms: u64) {
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

/// Processor time of the writing thread, in nanoseconds.
fn writing() -> f64 {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let text = |task: &Path, file: &str| fs::read_to_string(task.join(file)).unwrap();
    let log =
        tasks.into_iter().find(|task| text(task, "comm").trim() == "log").expect("the thread of the log");
    text(&log, "schedstat").split_whitespace().next().unwrap().parse().unwrap()
}
