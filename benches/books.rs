//! What the books add to the processor time of a proxied request: the thread that writes, and what a
//! request does for them on its way. Starts the simulator and two proxies, one with books in a file and
//! one with `--ephemeral`, drives a fixed rate through them in turns, and reads from /proc what the
//! proxy used, and its thread `books` of that. The way's part is measured by itself.
//!
//! ```text
//! cargo bench --bench books
//! ```
//!
//! `BENCH_RATE` (requests a second), `BENCH_SECONDS` (of a round) and `BENCH_ROUNDS` change it.
//! Linux only.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a measurement reads the clock, prints, and ends at its first surprise"
)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use keychoir::policy::client::ClientName;
use keychoir::policy::strategy::FillFirst;
use keychoir::policy::units::UnixMs;
use keychoir::pool::{self, Pool};
use keychoir::proxy::{AttemptRecord, Books, CreditSource, Depth};
use keychoir::secret::ApiKey;
use keychoir::tasks::Tasks;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const CONNECTIONS: u32 = 48;
const KEYS: usize = 3;
/// Of the rate asked for, what must be driven for a round to count as that rate.
const DRIVEN_MIN: f64 = 0.97;
/// What /proc counts processor time in.
const TICKS_PER_SECOND: f64 = 100.0;

/// A pool that is never asked.
const STILL: pool::Settings = pool::Settings {
    strategy: &FillFirst,
    wait_max: Duration::ZERO,
    waiting_max: 0,
    near_limit_ratio: 0.8,
    rate_limited_cooldown: Duration::ZERO,
    concurrency_cooldown: Duration::ZERO,
    exhausted_cooldown: Duration::ZERO,
    billing_cooldown: Duration::ZERO,
    invalid_confirm: Duration::ZERO,
    invalid_cooldown: Duration::ZERO,
    permission_cooldown: Duration::ZERO,
    quota_lag: Duration::ZERO,
};

fn main() {
    let rate = number("BENCH_RATE", 3_000);
    let seconds = number("BENCH_SECONDS", 8);
    let rounds = number("BENCH_ROUNDS", 7);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let keys: Vec<String> = (0..KEYS).map(|key| format!("sk_bench_key_number_{key}")).collect();
    let mut simulator = program("simulate");
    for key in &keys {
        simulator.args(["--key", &format!("{key}=100000000000")]);
    }
    let simulator = Running::start(simulator.stdout(Stdio::piped()), |child| child.stdout.take().map(boxed));
    let proxy = |arguments: &[&str]| {
        let mut command = program("serve");
        command
            .args(arguments)
            .env("ELEVENLABS_API_KEYS", keys.join(","))
            .env("KEYCHOIR_UPSTREAM__BASE_URL", format!("http://{}", simulator.address))
            .env("KEYCHOIR_STORAGE__PATH", folder.path().join("keychoir.db"))
            // No line a request: what the books add weighs most beside little else.
            .env("KEYCHOIR_LOG__LEVEL", "error,keychoir::cli=info")
            .env("KEYCHOIR_LOG__FORMAT", "ascii")
            .env("KEYCHOIR_WATCH__ENABLED", "false");
        Running::start(command.stderr(Stdio::piped()), |child| child.stderr.take().map(boxed))
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
        "request", "books in", "driven/s", "all threads", "thread `books`", "share", "wakes/s", "p99 ms"
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
    let of = |what: &dyn Fn(&Round) -> f64| {
        let values: Vec<f64> = rounds.iter().map(what).collect();
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        (middle(values.into_iter()), least, most)
    };
    let spread = |(middle, least, most): (f64, f64, f64)| format!("{middle:.1} ({least:.1} to {most:.1})");
    println!(
        "{request:<8}{place:<11}{:>9.0}{:>24}{:>24}{:>8.1}%{:>9.0}{:>9.1}",
        of(&|round| round.driven).0,
        spread(of(&|round| round.all)),
        spread(of(&|round| round.books)),
        of(&|round| (round.books + path) / (round.all - round.books - path) * 100.0).0,
        of(&|round| round.wakes).0,
        of(&|round| round.p99_ms).0,
    );
    if rounds.iter().any(|round| !round.is_on_time) {
        println!("        not every round could be driven at that rate here: set BENCH_RATE lower");
    }
}

/// What a request does for the books on its way, in µs: it takes a place, names its record, and sends
/// it. Without the reader, whose thread is measured as a whole.
fn path() -> f64 {
    const RECORDS: usize = 100;
    const ROUNDS: usize = 2_000;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let (books, mut queue) = Books::new(1_000, 512, Depth::default());
    let key = ApiKey::new("sk_bench_key_number_0").unwrap();
    let roster = Pool::new(vec![key.into()], STILL).roster();
    let (request_id, method, route): (Arc<str>, Arc<str>, Arc<str>) =
        ("0198c2f0-7b1a-7000-8000-000100000002".into(), "GET".into(), "/v1/simulator/echo".into());
    let client = ClientName::new("local");
    let mut took = Duration::ZERO;
    runtime.block_on(async {
        let mut taken = Vec::new();
        for _ in 0..ROUNDS {
            let began = Instant::now();
            for _ in 0..RECORDS {
                let place = books.place().await.unwrap();
                let started_at = UnixMs(1_796_000_000_000);
                place.write(AttemptRecord {
                    id: AttemptRecord::name(started_at),
                    request_id: Arc::clone(&request_id),
                    number: 1,
                    started_at,
                    client: client.clone(),
                    key: Some(Arc::clone(&roster.keys()[0])),
                    method: Arc::clone(&method),
                    route: Arc::clone(&route),
                    status: Some(200),
                    verdict: "served",
                    request_bytes: 0,
                    response_bytes: 2,
                    model: None,
                    characters: None,
                    audio: None,
                    credits_reserved: None,
                    credits: 0,
                    credits_from: CreditSource::Free,
                    first_byte: Some(Duration::from_millis(1)),
                    total: Duration::from_millis(1),
                });
            }
            took += began.elapsed();
            assert_eq!(queue.take(&mut taken, RECORDS).await, RECORDS);
            taken.clear();
        }
    });
    took.as_secs_f64() * 1e6 / (RECORDS * ROUNDS) as f64
}

fn number(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a whole number"))
}

fn middle(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A request that the simulator answers with two bytes.
fn get() -> Vec<u8> {
    b"GET /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\n\r\n".to_vec()
}

/// A speech with a body of 200 bytes: a short text, because the sound that comes back would be most
/// of the work.
fn speech() -> Vec<u8> {
    let plain = r#"{"text":"Hi","model_id":"eleven_flash_v2_5","voice_settings":{}"#;
    let body = format!("{plain}{}}}", " ".repeat(199 - plain.len()));
    let path = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM?output_format=mp3_22050_32";
    let head = "host: localhost\r\ncontent-type: application/json";
    format!("POST {path} HTTP/1.1\r\n{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// What a round has shown; times in µs a request.
struct Round {
    driven: f64,
    is_on_time: bool,
    all: f64,
    books: f64,
    /// How often the writing thread went to sleep, a second.
    wakes: f64,
    p99_ms: f64,
}

/// Sends so many requests a second, each at its own moment, and waits until the books have them.
fn drive(house: &Running, request: &[u8], rate: u32, seconds: u32) -> Round {
    house.settled();
    let before = house.used();
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
    let after = house.used();
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

/// One connection's requests; how long each took. One that is late is sent at once.
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

/// Whether this is all of an answer, which must be a good one.
fn is_whole(answer: &[u8]) -> bool {
    let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { return false };
    let head = std::str::from_utf8(&answer[..end]).unwrap().to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 200"), "{head}");
    match head.split("content-length: ").nth(1) {
        Some(rest) => answer.len() == end + 4 + rest.lines().next().unwrap().parse::<usize>().unwrap(),
        None => answer.ends_with(b"\r\n0\r\n\r\n"),
    }
}

/// Processor time in seconds, since the program began.
struct Used {
    all: f64,
    books: f64,
    sleeps: f64,
}

struct Running {
    child: Child,
    address: SocketAddr,
}

fn program(command: &str) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_keychoir"));
    program.args([command, "--listen", "127.0.0.1:0"]).env_clear().stdin(Stdio::null());
    program.stdout(Stdio::null()).stderr(Stdio::null());
    program
}

fn boxed(stream: impl Read + Send + 'static) -> Box<dyn Read + Send> {
    Box::new(stream)
}

impl Running {
    /// Starts a program and waits until it says where it listens.
    fn start(command: &mut Command, says: fn(&mut Child) -> Option<Box<dyn Read + Send>>) -> Self {
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(says(&mut child).unwrap()).lines();
        let address = lines
            .find_map(|line| {
                let rest = line.unwrap().split_once(" at http://")?.1.to_owned();
                rest.split_whitespace().next()?.trim_end_matches('/').parse().ok()
            })
            .expect("it starts");
        // Whatever else it says is read, so that it never waits for us.
        keychoir::tasks::thread("what it says", move || lines.for_each(drop)).unwrap();
        Self { child, address }
    }

    /// Waits until every record is written.
    fn settled(&self) {
        let is_waiting = || {
            let mut stream = TcpStream::connect(self.address).unwrap();
            let ask = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
            stream.write_all(ask).unwrap();
            let mut page = String::new();
            stream.read_to_string(&mut page).unwrap();
            !page.contains("\nkeychoir_store_records_waiting 0\n")
        };
        let began = Instant::now();
        while is_waiting() {
            assert!(began.elapsed() < Duration::from_secs(60), "the books do not keep up");
        }
    }

    fn used(&self) -> Used {
        let process = format!("/proc/{}", self.child.id());
        let stat = fs::read_to_string(format!("{process}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks = |field: usize| fields[field].parse::<f64>().unwrap();
        let books = fs::read_dir(format!("{process}/task")).unwrap().map(|task| task.unwrap().path());
        let books = books
            .into_iter()
            .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "books"))
            .expect("the thread of the books");
        // In nanoseconds, where the process as a whole is counted in ticks.
        let schedule = fs::read_to_string(books.join("schedstat")).unwrap();
        let status = fs::read_to_string(books.join("status")).unwrap();
        let sleeps = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        Used {
            all: (ticks(11) + ticks(12)) / TICKS_PER_SECOND,
            books: schedule.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e9,
            sleeps: sleeps.unwrap().trim().parse().unwrap(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
