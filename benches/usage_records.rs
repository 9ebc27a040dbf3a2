//! Measures the processor time that usage records add to a request, both in the writer thread and on the request path.
//!
//! The benchmark starts the simulator and two Keychoir processes, one with a database file and one with `--ephemeral`.
//! It sends requests through them alternately at a fixed rate, and reads the processor time of each process and of its
//! thread `usage-store` from /proc. The cost on the request path is measured separately, without a process.
//!
//! ```text
//! cargo bench --bench usage_records
//! ```
//!
//! Environment variables set the parameters: `BENCH_RATE` (requests per second), `BENCH_SECONDS` (seconds per round),
//! `BENCH_ROUNDS` and `BENCH_INTERVAL_MS` (`storage.commit_interval`). The benchmark runs only on Linux.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a benchmark reads the clock, prints its results, and panics if an expectation fails"
)]

mod harness;

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Method;
use keychoir::elevenlabs::endpoint::Route;
use keychoir::policy::authority::{Authority, Scheme};
use keychoir::policy::client::ClientName;
use keychoir::policy::outcome::Outcome;
use keychoir::policy::strategy::Strategy;
use keychoir::policy::units::UnixMs;
use keychoir::pool::{self, Pool};
use keychoir::proxy::{AttemptRecord, CreditSource, QueueDepth, QuotaCharge, UsageBatch, UsageSink};
use keychoir::secret::ApiKey;
use keychoir::tasks::Tasks;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use harness::{
    RunningProgram, env_number, format_median_and_range, keychoir_command, median, start_proxy,
    start_simulator,
};

/// The number of connections, each with a client that sends one request at a time.
const CONNECTIONS: u32 = 48;
/// The number of API keys of each Keychoir.
const KEYS: usize = 3;
/// The minimum ratio of the measured rate to the requested rate. The benchmark reports rounds with a lower ratio.
const MIN_RATE_RATIO: f64 = 0.97;

/// The settings of a pool that receives no requests.
const IDLE_POOL_SETTINGS: pool::Settings = pool::Settings {
    strategy: Strategy::DEFAULT,
    queue_timeout: Duration::ZERO,
    max_queued: 0,
    near_limit_ratio: 0.8,
    rate_limited_cooldown: Duration::ZERO,
    concurrency_cooldown: Duration::ZERO,
    exhausted_cooldown: Duration::ZERO,
    billing_cooldown: Duration::ZERO,
    invalid_confirm_cooldown: Duration::ZERO,
    invalid_cooldown: Duration::ZERO,
    permission_cooldown: Duration::ZERO,
    feature_cooldown: Duration::ZERO,
    endpoint_cooldown: Duration::ZERO,
    unproven_cooldown: Duration::ZERO,
    max_retry_after: Duration::ZERO,
    probe_after: Duration::ZERO,
    quota_lag: Duration::ZERO,
};

fn main() {
    let rate = env_number("BENCH_RATE", 3_000);
    let seconds = env_number("BENCH_SECONDS", 8);
    let rounds = env_number("BENCH_ROUNDS", 7);
    let interval_ms = env_number("BENCH_INTERVAL_MS", 500);
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let keys: Vec<String> = (0..KEYS).map(|key| format!("sk_bench_key_number_{key}")).collect();
    let simulator = start_simulator(&keys);
    let start_proxy_with = |arguments: &[&str]| {
        start_proxy(
            keychoir_command("serve")
                .args(arguments)
                .env("ELEVENLABS_API_KEYS", keys.join(","))
                .env("KEYCHOIR_UPSTREAM__BASE_URL", format!("http://{}", simulator.address))
                .env("KEYCHOIR_STORAGE__PATH", directory.path().join("keychoir.db"))
                .env("KEYCHOIR_STORAGE__COMMIT_INTERVAL", format!("{interval_ms}ms")),
        )
    };
    let proxies = [("file", start_proxy_with(&[])), ("ephemeral", start_proxy_with(&["--ephemeral"]))];

    println!(
        "{rate} requests/s over {CONNECTIONS} connections, {rounds} alternating rounds of {seconds} s per proxy"
    );
    println!("processor time of the proxy in µs per request: median (lowest to highest)");
    let request_path_micros = measure_request_path_micros();
    println!("cost of a usage record on the request path (permit, record, queue): {request_path_micros:.2}");
    println!(
        "{:<8}{:<11}{:>9}{:>24}{:>24}{:>9}{:>9}{:>9}",
        "request", "storage", "req/s", "all threads", "thread `usage-store`", "share", "wakes/s", "p99 ms"
    );
    for (request_name, request) in [("GET", get_request()), ("TTS", speech_request())] {
        // The first requests of a proxy open connections and files, so the results of a first round are discarded.
        for (_, proxy) in &proxies {
            let _ = run_round(proxy, &request, rate, 1);
        }
        let mut results_by_proxy = [const { Vec::new() }; 2];
        for _ in 0..rounds {
            for ((_, proxy), results) in proxies.iter().zip(&mut results_by_proxy) {
                results.push(run_round(proxy, &request, rate, seconds));
            }
        }
        for ((storage, _), results) in proxies.iter().zip(&results_by_proxy) {
            print_results(request_name, storage, results, request_path_micros);
        }
        let [file, ephemeral] =
            results_by_proxy.map(|results| median(results.iter().map(|round| round.all_threads_micros)));
        println!("{request_name:<8}ratio of file to ephemeral, all threads: {:.3}", file / ephemeral);
    }
    println!("`share`: the cost of usage records, relative to the remaining processor time of a request");
}

/// Prints one row: the results of all rounds of one proxy with one request.
fn print_results(request_name: &str, storage: &str, rounds: &[RoundResults], request_path_micros: f64) {
    let median_of = |field: &dyn Fn(&RoundResults) -> f64| median(rounds.iter().map(field));
    let range_of = |field: fn(&RoundResults) -> f64| format_median_and_range(rounds.iter().map(field), 1);
    println!(
        "{request_name:<8}{storage:<11}{:>9.0}{:>24}{:>24}{:>8.1}%{:>9.0}{:>9.1}",
        median_of(&|round| round.requests_per_second),
        range_of(|round| round.all_threads_micros),
        range_of(|round| round.writer_thread_micros),
        median_of(&|round| (round.writer_thread_micros + request_path_micros)
            / (round.all_threads_micros - round.writer_thread_micros - request_path_micros)
            * 100.0),
        median_of(&|round| round.wakeups_per_second),
        median_of(&|round| round.p99_ms),
    );
    if rounds.iter().any(|round| !round.has_reached_rate) {
        println!("        some rounds did not reach the requested rate: set a lower BENCH_RATE");
    }
}

/// Measures the time of a usage record on the request path, in µs: to acquire a permit, to create the record and to
/// queue it.
fn measure_request_path_micros() -> f64 {
    const RECORDS: usize = 100;
    const ROUNDS: usize = 2_000;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let (sink, mut queue) = UsageSink::new(1_000, 512, QueueDepth::default());
    let key = ApiKey::new("sk_bench_key_number_0").unwrap();
    let roster = Pool::new(vec![key.into()], IDLE_POOL_SETTINGS).roster();
    let request_id: Arc<str> = "0198c2f0-7b1a-7000-8000-000100000002".into();
    let route = Route::parse("/v1/models");
    let client = ClientName::new("local");
    let authority = Arc::new(Authority::new(Scheme::Https, "api.elevenlabs.io", 443, "").unwrap());
    let mut elapsed = Duration::ZERO;
    runtime.block_on(async {
        for _ in 0..ROUNDS {
            let round_started_at = Instant::now();
            for _ in 0..RECORDS {
                let permit = sink.acquire_permit().await.unwrap();
                let attempt_started_at = UnixMs(1_796_000_000_000);
                permit.write(AttemptRecord {
                    id: AttemptRecord::new_id(attempt_started_at),
                    request_id: Arc::clone(&request_id),
                    number: 1,
                    started_at: attempt_started_at,
                    client: client.clone(),
                    user: None,
                    authority: Arc::clone(&authority),
                    key: Some(Arc::clone(&roster.keys()[0])),
                    method: Method::GET,
                    route,
                    status: Some(200),
                    outcome: Outcome::Served,
                    request_bytes: 0,
                    response_bytes: 2,
                    model: None,
                    characters: None,
                    audio: None,
                    credits_reserved: None,
                    credits: 0,
                    credits_from: CreditSource::Free,
                    quota: QuotaCharge::default(),
                    first_byte: Some(Duration::from_millis(1)),
                    total: Duration::from_millis(1),
                    is_price_update: false,
                });
            }
            elapsed += round_started_at.elapsed();
            let mut batch = UsageBatch::default();
            queue.take(&mut batch);
            assert_eq!(batch.attempts.len(), RECORDS);
        }
    });
    elapsed.as_secs_f64() * 1e6 / (RECORDS * ROUNDS) as f64
}

/// Returns a GET request, to which the simulator responds with a body of two bytes.
fn get_request() -> Vec<u8> {
    b"GET /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\n\r\n".to_vec()
}

/// Returns a speech request with a body of 200 bytes. Its text is short, because otherwise Keychoir would spend most of
/// its time on the response.
fn speech_request() -> Vec<u8> {
    let json = r#"{"text":"Hi","model_id":"eleven_flash_v2_5","voice_settings":{}"#;
    let body = format!("{json}{}}}", " ".repeat(199 - json.len()));
    let path = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM?output_format=mp3_22050_32";
    let headers = "host: localhost\r\ncontent-type: application/json";
    format!("POST {path} HTTP/1.1\r\n{headers}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// The results of a round.
struct RoundResults {
    requests_per_second: f64,
    /// Whether the measured rate is at least [`MIN_RATE_RATIO`] of the requested rate.
    has_reached_rate: bool,
    /// The processor time of all threads per request.
    all_threads_micros: f64,
    /// The processor time of the thread `usage-store` per request.
    writer_thread_micros: f64,
    /// The number of wake-ups of the writer thread per second, counted as its voluntary context switches.
    wakeups_per_second: f64,
    /// The 99th percentile of the request durations.
    p99_ms: f64,
}

/// Runs a round: sends each request at its scheduled time, and waits until all usage records are written.
fn run_round(proxy: &RunningProgram, request: &[u8], rate: u32, seconds: u32) -> RoundResults {
    proxy.wait_until_records_are_written();
    let counters_before = ProcessCounters::read(proxy);
    let started_at = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (tasks, requests_per_client) = (Tasks::new(), (rate * seconds).div_ceil(CONNECTIONS));
    let interval = Duration::from_secs_f64(f64::from(CONNECTIONS) / f64::from(rate));
    let mut durations = runtime.block_on(async {
        let client_tasks: Vec<_> = (0..CONNECTIONS)
            .map(|client_index| {
                let first_at = started_at + interval / CONNECTIONS * client_index;
                tasks.spawn(send_requests(
                    proxy.address,
                    request.to_vec(),
                    first_at,
                    interval,
                    requests_per_client,
                ))
            })
            .collect();
        let mut durations = Vec::new();
        for client_task in client_tasks {
            durations.extend(client_task.await.unwrap());
        }
        durations
    });
    let elapsed = started_at.elapsed().as_secs_f64();
    proxy.wait_until_records_are_written();
    let counters_after = ProcessCounters::read(proxy);
    durations.sort();
    let request_count = durations.len() as f64;
    let micros_per_request = |seconds: f64| seconds * 1e6 / request_count;
    RoundResults {
        requests_per_second: request_count / elapsed,
        has_reached_rate: request_count / elapsed >= MIN_RATE_RATIO * f64::from(rate),
        all_threads_micros: micros_per_request(
            counters_after.all_threads_seconds - counters_before.all_threads_seconds,
        ),
        writer_thread_micros: micros_per_request(
            counters_after.writer_thread_seconds - counters_before.writer_thread_seconds,
        ),
        wakeups_per_second: (counters_after.writer_thread_switches - counters_before.writer_thread_switches)
            / elapsed,
        p99_ms: durations[durations.len() * 99 / 100].as_secs_f64() * 1e3,
    }
}

/// Sends the requests of one connection. Returns the duration of each request. A late request is sent immediately.
async fn send_requests(
    address: SocketAddr,
    request: Vec<u8>,
    first_at: Instant,
    interval: Duration,
    count: u32,
) -> Vec<Duration> {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut durations, mut buffer) = (Vec::new(), Vec::with_capacity(64 * 1024));
    for number in 0..count {
        tokio::time::sleep_until((first_at + interval * number).into()).await;
        let sent_at = Instant::now();
        stream.write_all(&request).await.unwrap();
        buffer.clear();
        while !is_complete(&buffer) {
            assert_ne!(stream.read_buf(&mut buffer).await.unwrap(), 0, "the connection must stay open");
        }
        durations.push(sent_at.elapsed());
    }
    durations
}

/// Returns whether `response` contains a complete response. Panics if its status is not 200.
fn is_complete(response: &[u8]) -> bool {
    let Some(end) = response.windows(4).position(|window| window == b"\r\n\r\n") else { return false };
    let head = std::str::from_utf8(&response[..end]).unwrap().to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 200"), "the request must be served: {head}");
    match head.split("content-length: ").nth(1) {
        Some(length) => response.len() == end + 4 + length.lines().next().unwrap().parse::<usize>().unwrap(),
        None => response.ends_with(b"\r\n0\r\n\r\n"),
    }
}

/// The processor time of a Keychoir process and the context switches of its writer thread, since startup.
struct ProcessCounters {
    all_threads_seconds: f64,
    writer_thread_seconds: f64,
    /// The voluntary context switches. The thread makes one each time it goes to sleep.
    writer_thread_switches: f64,
}

impl ProcessCounters {
    fn read(proxy: &RunningProgram) -> Self {
        let writer_thread = fs::read_dir(format!("{}/task", proxy.proc_directory()))
            .unwrap()
            .map(|task| task.unwrap().path())
            .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "usage-store"))
            .expect("Keychoir must have a thread named `usage-store`");
        // `schedstat` counts nanoseconds. `stat`, which counts ticks, is too coarse for a single thread.
        let schedule = fs::read_to_string(writer_thread.join("schedstat")).unwrap();
        let status = fs::read_to_string(writer_thread.join("status")).unwrap();
        let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        Self {
            all_threads_seconds: proxy.processor_seconds(),
            writer_thread_seconds: schedule.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e9,
            writer_thread_switches: switches.unwrap().trim().parse().unwrap(),
        }
    }
}
