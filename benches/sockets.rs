//! Measures the cost of WebSocket sessions: the memory of an idle session of Keychoir, and the time that Keychoir adds
//! to a message of a busy session. The benchmark starts the simulator and Keychoir in front of it. It opens idle
//! sessions to Keychoir, with and without TLS, and busy sessions alternately to the simulator and to Keychoir.
//!
//! ```text
//! cargo bench --bench sockets
//! ```
//!
//! Environment variables set the parameters: `BENCH_SESSIONS` (idle sessions), `BENCH_BUSY` (busy sessions),
//! `BENCH_RATE` (messages per second and session), `BENCH_SECONDS` (seconds per busy round) and `BENCH_ROUNDS`. The
//! benchmark runs only on Linux.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a benchmark reads the clock, prints its results, and panics if an expectation fails"
)]

mod harness;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use keychoir::policy::websocket_frame::{self, FrameHeader, Opcode, apply_mask};
use keychoir::tasks::Tasks;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::either::Either;

use harness::{
    RunningProgram, env_number, format_median_and_range, keychoir_command, median, start_proxy,
    start_simulator,
};

const SPEECH_PATH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/stream-input?inactivity_timeout=180";
/// A path on which the simulator echoes messages.
const ECHO_PATH: &str = "/v1/something/new";
/// Maximum memory of a session without TLS in the Keychoir process. The socket buffers of the kernel are not counted.
const MAX_SESSION_BYTES: f64 = 20.0 * 1024.0;
/// Maximum latency that Keychoir adds at the 99th percentile.
const MAX_ADDED_MS: f64 = 1.0;
/// Minimum ratio of the sent messages to the scheduled ones. The benchmark reports rounds with a lower ratio.
const MIN_SENT_RATIO: f64 = 0.97;

fn main() {
    let sessions = env_number("BENCH_SESSIONS", 1_000);
    let (busy, rate) = (env_number("BENCH_BUSY", 200), env_number("BENCH_RATE", 20));
    let seconds = env_number("BENCH_SECONDS", 4);
    let rounds = env_number("BENCH_ROUNDS", 5);
    let setup = BenchmarkSetup::new();
    current_thread_runtime().block_on(async {
        measure_idle_sessions(&setup, sessions, rounds).await;
        println!();
        measure_busy_sessions(&setup, busy, rate, seconds, rounds).await;
    });
}

/// The simulator, with and without TLS, and the settings for Keychoir.
struct BenchmarkSetup {
    directory: TempDir,
    keys: Vec<String>,
    simulator: RunningProgram,
    tls_terminator: TlsTerminator,
}

impl BenchmarkSetup {
    fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let keys: Vec<String> = (0..3).map(|key| format!("sk_bench_key_number_{key}")).collect();
        let simulator = start_simulator(&keys);
        let tls_terminator = start_tls_terminator(simulator.address, directory.path());
        Self { directory, keys, simulator, tls_terminator }
    }

    fn start_proxy(&self, tls_mode: TlsMode) -> RunningProgram {
        let upstream = match tls_mode {
            TlsMode::Ws | TlsMode::Wss => format!("http://{}", self.simulator.address),
            TlsMode::WsToWss => format!("https://localhost:{}", self.tls_terminator.address.port()),
        };
        start_proxy(
            keychoir_command("serve")
                .env("ELEVENLABS_API_KEYS", self.keys.join(","))
                .env("KEYCHOIR_UPSTREAM__BASE_URL", upstream)
                .env("KEYCHOIR_UPSTREAM__CA_FILE", &self.tls_terminator.ca_file)
                .env("KEYCHOIR_STORAGE__PATH", self.directory.path().join("keychoir.db")),
        )
    }

    /// Returns the TLS connector of a client, which trusts the local CA of Keychoir. Returns `None` if the client uses
    /// no TLS.
    fn client_connector(&self, tls_mode: TlsMode) -> Option<TlsConnector> {
        if !matches!(tls_mode, TlsMode::Wss) {
            return None;
        }
        let mut roots = RootCertStore::empty();
        for ca_certificate in CertificateDer::pem_file_iter(self.directory.path().join("tls/ca.pem")).unwrap()
        {
            roots.add(ca_certificate.unwrap()).unwrap();
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Some(TlsConnector::from(Arc::new(config)))
    }
}

/// The connections of a session that use TLS.
#[derive(Clone, Copy)]
enum TlsMode {
    /// No connection uses TLS.
    Ws,
    /// The connection from the client to Keychoir uses TLS.
    Wss,
    /// The connection from Keychoir to the provider uses TLS.
    WsToWss,
}

impl TlsMode {
    const ALL: [Self; 3] = [Self::Ws, Self::Wss, Self::WsToWss];

    fn label(self) -> &'static str {
        match self {
            Self::Ws => "ws → ws",
            Self::Wss => "wss → ws",
            Self::WsToWss => "ws → wss",
        }
    }
}

/// A server that terminates TLS in front of the simulator.
struct TlsTerminator {
    address: SocketAddr,
    /// The file with its self-signed certificate.
    ca_file: PathBuf,
}

fn start_tls_terminator(simulator: SocketAddr, directory: &Path) -> TlsTerminator {
    let certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let ca_file = directory.join("upstream.pem");
    std::fs::write(&ca_file, certificate.cert.pem()).unwrap();
    let key = PrivatePkcs8KeyDer::from(certificate.signing_key.serialize_der());
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.cert.der().clone()], key.into())
        .unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let relay = relay_tls(listener, TlsAcceptor::from(Arc::new(config)), simulator);
    // The relay has a separate thread, because the measuring thread sometimes blocks.
    keychoir::tasks::spawn_thread("tls", move || current_thread_runtime().block_on(relay)).unwrap();
    TlsTerminator { address, ca_file }
}

async fn relay_tls(listener: std::net::TcpListener, acceptor: TlsAcceptor, simulator: SocketAddr) {
    let (listener, tasks) = (TcpListener::from_std(listener).unwrap(), Tasks::new());
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let acceptor = acceptor.clone();
        tasks.spawn(async move {
            let Ok(mut stream) = acceptor.accept(tcp).await else { return };
            let mut upstream = TcpStream::connect(simulator).await.unwrap();
            upstream.set_nodelay(true).unwrap();
            // An error means that one of the peers disconnected.
            let _ = tokio::io::copy_bidirectional(&mut stream, &mut upstream).await;
        });
    }
}

fn current_thread_runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Prints the memory of an idle session, for each TLS mode and for each message that the session has sent before.
async fn measure_idle_sessions(setup: &BenchmarkSetup, sessions: u32, rounds: u32) {
    println!("{sessions} idle sessions, {rounds} alternating rounds, each with a new proxy;");
    println!("memory of the proxy in KiB per session (PSS): median (lowest to highest)");
    println!("{:<10}{:<26}{:>26}", "TLS", "messages before", "KiB per session");
    let messages: [(&str, &str, String); 2] = [
        ("speech: {\"text\":\" \"}", SPEECH_PATH, r#"{"text":" "}"#.to_owned()),
        ("echo: 16 KiB, both ways", ECHO_PATH, audio_message(16 * 1024)),
    ];
    let mut measured: Vec<_> = TlsMode::ALL
        .into_iter()
        .flat_map(|tls_mode| messages.iter().map(move |message| (tls_mode, message, Vec::new())))
        .collect();
    for _ in 0..rounds {
        for (tls_mode, (_, path, message), rounds) in &mut measured {
            let proxy = setup.start_proxy(*tls_mode);
            rounds.push(memory_per_session(setup, &proxy, *tls_mode, path, message, sessions).await);
        }
    }
    let kib = |rounds: &[f64]| format_median_and_range(rounds.iter().map(|bytes| bytes / 1024.0), 1);
    for (tls_mode, (label, ..), rounds) in &measured {
        println!("{:<10}{label:<26}{:>26}", tls_mode.label(), kib(rounds));
    }
    let without_tls = measured.iter().filter(|(tls_mode, ..)| matches!(tls_mode, TlsMode::Ws));
    let max_bytes = without_tls.map(|(.., rounds)| median(rounds.iter().copied())).fold(0.0, f64::max);
    print_verdict(
        "a session without TLS uses at most 20 KiB of the proxy's memory",
        max_bytes <= MAX_SESSION_BYTES,
    );
}

/// Returns the memory per session of `sessions` idle sessions. Each has sent `message` before, and has received its
/// echo if `path` is [`ECHO_PATH`].
async fn memory_per_session(
    setup: &BenchmarkSetup,
    proxy_program: &RunningProgram,
    tls_mode: TlsMode,
    path: &str,
    message: &str,
    sessions: u32,
) -> f64 {
    let connector = setup.client_connector(tls_mode);
    let frame = encode_frame(message);
    let open_sessions = async |count: u32| {
        let mut sessions = Vec::new();
        for _ in 0..count {
            let mut session = Session::open(proxy_program.address, connector.as_ref(), path).await;
            session.stream.write_all(&frame).await.unwrap();
            session.stream.flush().await.unwrap();
            if path == ECHO_PATH {
                session.receive_message(message.len()).await;
            }
            sessions.push(session);
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        sessions
    };
    // The first sessions allocate the memory that does not depend on the number of sessions.
    drop(open_sessions(20).await);
    wait_until_sessions_are_closed(proxy_program);
    let memory_before = proxy_program.memory_bytes();
    let idle_sessions = open_sessions(sessions).await;
    let memory_after = proxy_program.memory_bytes();
    drop(idle_sessions);
    (memory_after - memory_before) / f64::from(sessions)
}

fn wait_until_sessions_are_closed(proxy_program: &RunningProgram) {
    for protocol in ["speech", "unknown"] {
        let line = format!("keychoir_websocket_sessions{{protocol=\"{protocol}\"}} 0");
        proxy_program.wait_for_metric(&line);
    }
}

fn print_verdict(requirement: &str, is_met: bool) {
    println!("{requirement}: {}", if is_met { "holds" } else { "DOES NOT HOLD" });
}

/// The results of a round.
struct RoundResults {
    messages_per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Processor time of the proxy per message, in microseconds.
    proxy_micros: f64,
}

/// Prints the round-trip times of messages on many busy sessions, directly to the simulator and through the proxy.
async fn measure_busy_sessions(setup: &BenchmarkSetup, busy: u32, rate: u32, seconds: u32, rounds: u32) {
    println!(
        "{busy} busy sessions with {rate} messages per second each, {rounds} rounds of {seconds} s, alternating;"
    );
    println!("ms from a message to its echo: median (lowest to highest)");
    println!(
        "{:<10}{:<10}{:>24}{:>24}{:>12}{:>14}",
        "message", "", "p50", "p99", "messages/s", "proxy CPU µs"
    );
    let proxy_program = setup.start_proxy(TlsMode::Ws);
    let mut is_within_limit = true;
    for (name, bytes) in [("200 B", 200), ("16 KiB", 16 * 1024)] {
        let message = audio_message(bytes);
        for address in [setup.simulator.address, proxy_program.address] {
            let _ = run_round(&proxy_program, address, &message, busy, rate, 1).await;
        }
        let (mut direct, mut through) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            direct.push(
                run_round(&proxy_program, setup.simulator.address, &message, busy, rate, seconds).await,
            );
            through
                .push(run_round(&proxy_program, proxy_program.address, &message, busy, rate, seconds).await);
        }
        let values_of = |rounds: &[RoundResults], field: fn(&RoundResults) -> f64| {
            rounds.iter().map(field).collect::<Vec<_>>()
        };
        let format_values = |values: Vec<f64>| format_median_and_range(values.iter().copied(), 3);
        for (target, rounds) in [("direct", &direct), ("through", &through)] {
            println!(
                "{name:<10}{target:<10}{:>24}{:>24}{:>12.0}{:>14.1}",
                format_values(values_of(rounds, |round| round.p50_ms)),
                format_values(values_of(rounds, |round| round.p99_ms)),
                median(rounds.iter().map(|round| round.messages_per_second)),
                median(rounds.iter().map(|round| round.proxy_micros)),
            );
            if rounds.iter().any(|round| round.messages_per_second < MIN_SENT_RATIO * f64::from(busy * rate))
            {
                println!("          not every round reached the rate: set a lower BENCH_RATE");
            }
        }
        let added_times = |field: fn(&RoundResults) -> f64| -> Vec<f64> {
            through.iter().zip(&direct).map(|(through, direct)| field(through) - field(direct)).collect()
        };
        let (p50, p99) = (added_times(|round| round.p50_ms), added_times(|round| round.p99_ms));
        is_within_limit &= median(p99.iter().copied()) < MAX_ADDED_MS;
        println!("{name:<10}{:<10}{:>24}{:>24}", "added", format_values(p50), format_values(p99));
    }
    println!("Each message passes the proxy twice, as a message and as its echo. The CPU time is for both.");
    print_verdict("the added p99 is below 1 ms", is_within_limit);
}

/// Runs a round. The sessions send messages at their scheduled times and wait for each echo.
async fn run_round(
    proxy_program: &RunningProgram,
    address: SocketAddr,
    message: &str,
    busy: u32,
    rate: u32,
    seconds: u32,
) -> RoundResults {
    let mut sessions = Vec::new();
    for _ in 0..busy {
        sessions.push(Session::open(address, None, ECHO_PATH).await);
    }
    let (tasks, interval) = (Tasks::new(), Duration::from_secs(1) / rate);
    let frame: Arc<[u8]> = encode_frame(message).into();
    let seconds_before = proxy_program.processor_seconds();
    let started_at = Instant::now();
    let session_tasks: Vec<_> = (0..busy)
        .zip(sessions)
        .map(|(number, session)| {
            let first_at = started_at + interval * number / busy;
            tasks.spawn(session.send_repeatedly(
                Arc::clone(&frame),
                message.len(),
                first_at,
                interval,
                rate * seconds,
            ))
        })
        .collect();
    let (mut round_trips, mut sessions) = (Vec::new(), Vec::new());
    for session_task in session_tasks {
        let (session, session_round_trips) = session_task.await.unwrap();
        sessions.push(session);
        round_trips.extend(session_round_trips);
    }
    let elapsed = started_at.elapsed().as_secs_f64();
    let proxy_seconds = proxy_program.processor_seconds() - seconds_before;
    drop(sessions);
    round_trips.sort();
    let percentile_ms = |percent: usize| round_trips[round_trips.len() * percent / 100].as_secs_f64() * 1e3;
    let count = round_trips.len() as f64;
    RoundResults {
        messages_per_second: count / elapsed,
        p50_ms: percentile_ms(50),
        p99_ms: percentile_ms(99),
        proxy_micros: proxy_seconds * 1e6 / count,
    }
}

/// Returns an audio message of `bytes` bytes.
fn audio_message(bytes: usize) -> String {
    let (before, after) = (r#"{"message_type":"input_audio_chunk","audio_base_64":""#, r#""}"#);
    format!("{before}{}{after}", "A".repeat(bytes - before.len() - after.len()))
}

/// Encodes a text message as a masked client frame.
fn encode_frame(message: &str) -> Vec<u8> {
    const MASK: [u8; 4] = [0x6d, 0x61, 0x73, 0x6b];
    let length = message.len() as u64;
    let mut bytes = Vec::new();
    FrameHeader { is_final: true, reserved: 0, opcode: Opcode::Text, mask: Some(MASK), length }
        .encode(&mut bytes);
    let payload_start = bytes.len();
    bytes.extend_from_slice(message.as_bytes());
    apply_mask(&mut bytes[payload_start..], MASK, 0);
    bytes
}

/// A session of a client.
struct Session {
    stream: Either<TcpStream, Box<TlsStream<TcpStream>>>,
    buffer: Vec<u8>,
}

impl Session {
    async fn open(address: SocketAddr, connector: Option<&TlsConnector>, path: &str) -> Self {
        let tcp = TcpStream::connect(address).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let mut stream = match connector {
            None => Either::Left(tcp),
            Some(connector) => {
                let name = ServerName::try_from("localhost").unwrap();
                Either::Right(Box::new(connector.connect(name, tcp).await.unwrap()))
            }
        };
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            // Neither Keychoir nor the simulator sends a frame before it has received a message.
            assert_ne!(stream.read_buf(&mut head).await.unwrap(), 0, "the connection must stay open");
        }
        assert!(
            head.starts_with(b"HTTP/1.1 101 "),
            "the session must be accepted: {}",
            String::from_utf8_lossy(&head)
        );
        Self { stream, buffer: Vec::new() }
    }

    /// Receives one text message, which must have this length.
    async fn receive_message(&mut self, length: usize) {
        self.buffer.clear();
        loop {
            if let Some((header, header_length)) = websocket_frame::parse_header(&self.buffer) {
                assert_eq!((header.opcode, header.length), (Opcode::Text, length as u64));
                if self.buffer.len() >= header_length + length {
                    return;
                }
            }
            assert_ne!(
                self.stream.read_buf(&mut self.buffer).await.unwrap(),
                0,
                "the connection must stay open"
            );
        }
    }

    /// Sends a message repeatedly, each time at its scheduled time, or immediately if that time has passed. Returns the
    /// round-trip times, and the session, which stays open until the caller drops it.
    async fn send_repeatedly(
        mut self,
        frame: Arc<[u8]>,
        length: usize,
        first_at: Instant,
        interval: Duration,
        count: u32,
    ) -> (Self, Vec<Duration>) {
        self.buffer.reserve(length + 64);
        let mut round_trips = Vec::new();
        for number in 0..count {
            tokio::time::sleep_until((first_at + interval * number).into()).await;
            let sent_at = Instant::now();
            self.stream.write_all(&frame).await.unwrap();
            self.receive_message(length).await;
            round_trips.push(sent_at.elapsed());
        }
        (self, round_trips)
    }
}
