//! The processor time that usage records add to a proxied request: in the writing thread, and on
//! the request's path. Starts the simulator and two proxies, one with a database file and one with
//! `--ephemeral`, drives a fixed rate through them in turns, and reads from /proc the time of the
//! proxy, and of its thread `usage-store`. The part of the path is measured separately.
//!
//! ```text
//! cargo bench --bench books
//! ```
//!
//! `BENCH_RATE` (requests a second), `BENCH_SECONDS` (of a round), `BENCH_ROUNDS` and `BENCH_INTERVAL_MS`
//! (`storage.commit_interval`) change it.
//! Linux only.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a measurement reads the clock, prints, and ends at its first surprise"
)]

mod house;

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Method;
use keychoir::elevenlabs::endpoint::Route;
use keychoir::policy::client::ClientName;
use keychoir::policy::outcome::Outcome;
use keychoir::policy::strategy::Strategy;
use keychoir::policy::units::UnixMs;
use keychoir::pool::{self, Pool};
use keychoir::proxy::{AttemptRecord, CreditSource, QueueDepth, QuotaCharge, UsageBatch, UsageSink};
use keychoir::secret::ApiKey;
use keychoir::tasks::Tasks;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use house::{Running, middle, number, program, proxy, simulator, spread};

const CONNECTIONS: u32 = 48;
const KEYS: usize = 3;
/// Minimum ratio of the driven to the requested rate for a round to count.
const DRIVEN_MIN: f64 = 0.97;

/// The settings of a pool that receives no request.
const STILL: pool::Settings = pool::Settings {
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
    let rate = number("BENCH_RATE", 3_000);
    let seconds = number("BENCH_SECONDS", 8);
    let rounds = number("BENCH_ROUNDS", 7);
    let interval_ms = number("BENCH_INTERVAL_MS", 500);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let keys: Vec<String> = (0..KEYS).map(|key| format!("sk_bench_key_number_{key}")).collect();
    let simulator = simulator(&keys);
    let proxy = |arguments: &[&str]| {
        proxy(
            program("serve")
                .args(arguments)
                .env("ELEVENLABS_API_KEYS", keys.join(","))
                .env("KEYCHOIR_UPSTREAM__BASE_URL", format!("http://{}", simulator.address))
                .env("KEYCHOIR_STORAGE__PATH", folder.path().join("keychoir.db"))
                .env("KEYCHOIR_STORAGE__COMMIT_INTERVAL", format!("{interval_ms}ms")),
        )
    };
    let houses = [("file", proxy(&[])), ("ephemeral", proxy(&["--ephemeral"]))];

    println!(
        "{rate} requests/s over {CONNECTIONS} connections, {rounds} rounds of {seconds} s each in turns;"
    );
    println!("processor time of the proxy in µs a request: median (lowest to highest)");
    let path = path();
    println!("on a request's way (a place, its record, the queue): {path:.2}");
    println!(
        "{:<8}{:<11}{:>9}{:>24}{:>24}{:>9}{:>9}{:>9}",
        "request",
        "records in",
        "driven/s",
        "all threads",
        "thread `usage-store`",
        "share",
        "wakes/s",
        "p99 ms"
    );
    for (name, request) in [("GET", get()), ("TTS", speech())] {
        // The first requests open connections and files.
        for (_, house) in &houses {
            let _ = drive(house, &request, rate, 1);
        }
        let mut measured = [const { Vec::new() }; 2];
        for _ in 0..rounds {
            for ((_, house), rounds) in houses.iter().zip(&mut measured) {
                rounds.push(drive(house, &request, rate, seconds));
            }
        }
        for ((place, _), rounds) in houses.iter().zip(&measured) {
            report(name, place, rounds, path);
        }
        let [file, memory] = measured.map(|rounds| middle(rounds.iter().map(|round| round.all)));
        println!("{name:<8}file / ephemeral, all threads: {:.3}", file / memory);
    }
    println!("`share`: the thread that writes and the way's part, beside all the rest of a request.");
}

fn report(request: &str, place: &str, rounds: &[Round], path: f64) {
    let of = |what: &dyn Fn(&Round) -> f64| middle(rounds.iter().map(what));
    let told = |what: fn(&Round) -> f64| spread(rounds.iter().map(what), 1);
    println!(
        "{request:<8}{place:<11}{:>9.0}{:>24}{:>24}{:>8.1}%{:>9.0}{:>9.1}",
        of(&|round| round.driven),
        told(|round| round.all),
        told(|round| round.books),
        of(&|round| (round.books + path) / (round.all - round.books - path) * 100.0),
        of(&|round| round.wakes),
        of(&|round| round.p99_ms),
    );
    if rounds.iter().any(|round| !round.is_on_time) {
        println!("        not every round could be driven at that rate here: set BENCH_RATE lower");
    }
}

/// The recording of a request on its path, in µs: it acquires a permit, names its record, and sends
/// it. Without the reader, whose thread is measured as a whole.
fn path() -> f64 {
    const RECORDS: usize = 100;
    const ROUNDS: usize = 2_000;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let (books, mut queue) = UsageSink::new(1_000, 512, QueueDepth::default());
    let key = ApiKey::new("sk_bench_key_number_0").unwrap();
    let roster = Pool::new(vec![key.into()], STILL).roster();
    let request_id: Arc<str> = "0198c2f0-7b1a-7000-8000-000100000002".into();
    let route = Route::parse("/v1/models");
    let client = ClientName::new("local");
    let mut took = Duration::ZERO;
    runtime.block_on(async {
        for _ in 0..ROUNDS {
            let began = Instant::now();
            for _ in 0..RECORDS {
                let place = books.acquire_permit().await.unwrap();
                let started_at = UnixMs(1_796_000_000_000);
                place.write(AttemptRecord {
                    id: AttemptRecord::new_id(started_at),
                    request_id: Arc::clone(&request_id),
                    number: 1,
                    started_at,
                    client: client.clone(),
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
                    is_price: false,
                });
            }
            took += began.elapsed();
            let mut taken = UsageBatch::default();
            queue.take(&mut taken);
            assert_eq!(taken.attempts.len(), RECORDS);
        }
    });
    took.as_secs_f64() * 1e6 / (RECORDS * ROUNDS) as f64
}

/// A request with a response of two bytes from the simulator.
fn get() -> Vec<u8> {
    b"GET /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\n\r\n".to_vec()
}

/// A speech request with a body of 200 bytes: a short text, because the returned audio would
/// otherwise be most of the work.
fn speech() -> Vec<u8> {
    let plain = r#"{"text":"Hi","model_id":"eleven_flash_v2_5","voice_settings":{}"#;
    let body = format!("{plain}{}}}", " ".repeat(199 - plain.len()));
    let path = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM?output_format=mp3_22050_32";
    let head = "host: localhost\r\ncontent-type: application/json";
    format!("POST {path} HTTP/1.1\r\n{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// The results of a round; times in µs per request.
struct Round {
    driven: f64,
    is_on_time: bool,
    all: f64,
    books: f64,
    /// How often per second the writing thread went to sleep.
    wakes: f64,
    p99_ms: f64,
}

/// Sends requests at a fixed rate, each at its scheduled time, and waits until they are recorded.
fn drive(house: &Running, request: &[u8], rate: u32, seconds: u32) -> Round {
    house.settled();
    let before = Used::by(house);
    let began = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (tasks, each) = (Tasks::new(), (rate * seconds).div_ceil(CONNECTIONS));
    let interval = Duration::from_secs_f64(f64::from(CONNECTIONS) / f64::from(rate));
    let mut spans = runtime.block_on(async {
        let clients: Vec<_> = (0..CONNECTIONS)
            .map(|client| {
                let begin = began + interval / CONNECTIONS * client;
                tasks.spawn(ask(house.address, request.to_vec(), begin, interval, each))
            })
            .collect();
        let mut spans = Vec::new();
        for client in clients {
            spans.extend(client.await.unwrap());
        }
        spans
    });
    let took = began.elapsed().as_secs_f64();
    house.settled();
    let after = Used::by(house);
    spans.sort();
    let count = spans.len() as f64;
    let micros = |seconds: f64| seconds * 1e6 / count;
    Round {
        driven: count / took,
        is_on_time: count / took >= DRIVEN_MIN * f64::from(rate),
        all: micros(after.all - before.all),
        books: micros(after.books - before.books),
        wakes: (after.sleeps - before.sleeps) / took,
        p99_ms: spans[spans.len() * 99 / 100].as_secs_f64() * 1e3,
    }
}

/// The requests of one connection; returns the duration of each. A late request is sent at once.
async fn ask(
    address: SocketAddr,
    request: Vec<u8>,
    begin: Instant,
    interval: Duration,
    count: u32,
) -> Vec<Duration> {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut spans, mut buffer) = (Vec::new(), Vec::with_capacity(64 * 1024));
    for number in 0..count {
        tokio::time::sleep_until((begin + interval * number).into()).await;
        let sent = Instant::now();
        stream.write_all(&request).await.unwrap();
        buffer.clear();
        while !is_whole(&buffer) {
            assert_ne!(stream.read_buf(&mut buffer).await.unwrap(), 0, "the connection was closed");
        }
        spans.push(sent.elapsed());
    }
    spans
}

/// Whether this is a complete response; panics if it is no success.
fn is_whole(answer: &[u8]) -> bool {
    let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { return false };
    let head = std::str::from_utf8(&answer[..end]).unwrap().to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 200"), "{head}");
    match head.split("content-length: ").nth(1) {
        Some(rest) => answer.len() == end + 4 + rest.lines().next().unwrap().parse::<usize>().unwrap(),
        None => answer.ends_with(b"\r\n0\r\n\r\n"),
    }
}

/// Processor time in seconds since the start of the program.
struct Used {
    all: f64,
    books: f64,
    sleeps: f64,
}

impl Used {
    fn by(house: &Running) -> Self {
        let books = fs::read_dir(format!("{}/task", house.process()))
            .unwrap()
            .map(|task| task.unwrap().path())
            .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "usage-store"))
            .expect("the thread of the usage store");
        // In nanoseconds, while the whole process is counted in ticks.
        let schedule = fs::read_to_string(books.join("schedstat")).unwrap();
        let status = fs::read_to_string(books.join("status")).unwrap();
        let sleeps = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        Self {
            all: house.processor_seconds(),
            books: schedule.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e9,
            sleeps: sleeps.unwrap().trim().parse().unwrap(),
        }
    }
}
