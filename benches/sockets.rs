//! The cost of a WebSocket session: memory while it is idle, and the time per message while it is
//! busy. Starts the simulator and a proxy in front of it, and is the client of both, in turns.
//! ```text
//! cargo bench --bench sockets
//! ```
//!
//! `BENCH_SESSIONS` (idle ones), `BENCH_BUSY` (busy ones), `BENCH_RATE` (messages a second of each),
//! `BENCH_SECONDS` (of a busy round) and `BENCH_ROUNDS` change it. Linux only.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a measurement reads the clock, prints, and ends at its first surprise"
)]

mod house;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use keychoir::policy::frame::{self, FrameHeader, Opcode, apply_mask};
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

use house::{Running, middle, number, program, proxy, simulator, spread};

const SPEECH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/stream-input?inactivity_timeout=180";
/// A path that the simulator echoes on.
const ECHO: &str = "/v1/something/new";
/// Maximum memory of a session besides the buffers of its two connections.
const SESSION_BYTES_MAX: f64 = 20.0 * 1024.0;
/// Maximum time added to a message at the 99th percentile.
const ADDED_MS_MAX: f64 = 1.0;
/// Minimum ratio of the driven to the requested messages for a round to count.
const DRIVEN_MIN: f64 = 0.97;

fn main() {
    let sessions = number("BENCH_SESSIONS", 1_000);
    let (busy, rate) = (number("BENCH_BUSY", 200), number("BENCH_RATE", 20));
    let seconds = number("BENCH_SECONDS", 4);
    let rounds = number("BENCH_ROUNDS", 5);
    let stage = SessionStage::new();
    here().block_on(async {
        idle(&stage, sessions, rounds).await;
        println!();
        talking(&stage, busy, rate, seconds, rounds).await;
    });
}

/// The programs and their certificates.
struct SessionStage {
    folder: TempDir,
    keys: Vec<String>,
    simulator: Running,
    /// The address with TLS, and the certificate.
    tls: (SocketAddr, PathBuf),
}

impl SessionStage {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let keys: Vec<String> = (0..3).map(|key| format!("sk_bench_key_number_{key}")).collect();
        let simulator = simulator(&keys);
        let tls = speak_tls_before(simulator.address, folder.path());
        Self { folder, keys, simulator, tls }
    }

    fn proxy(&self, way: Way) -> Running {
        let (tls, ca_file) = &self.tls;
        let upstream = match way {
            Way::Ws | Way::Wss => format!("http://{}", self.simulator.address),
            Way::WsToWss => format!("https://localhost:{}", tls.port()),
        };
        proxy(
            program("serve")
                .env("ELEVENLABS_API_KEYS", self.keys.join(","))
                .env("KEYCHOIR_UPSTREAM__BASE_URL", upstream)
                .env("KEYCHOIR_UPSTREAM__CA_FILE", ca_file)
                .env("KEYCHOIR_STORAGE__PATH", self.folder.path().join("keychoir.db")),
        )
    }

    /// The connector of a client: with TLS, it trusts the proxy's own CA.
    fn connector(&self, way: Way) -> Option<TlsConnector> {
        if !matches!(way, Way::Wss) {
            return None;
        }
        let mut roots = RootCertStore::empty();
        for authority in CertificateDer::pem_file_iter(self.folder.path().join("tls/ca.pem")).unwrap() {
            roots.add(authority.unwrap()).unwrap();
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Some(TlsConnector::from(Arc::new(config)))
    }
}

/// Which of the two connections of a session use TLS.
#[derive(Clone, Copy)]
enum Way {
    Ws,
    Wss,
    WsToWss,
}

impl Way {
    const ALL: [Self; 3] = [Self::Ws, Self::Wss, Self::WsToWss];

    fn words(self) -> &'static str {
        match self {
            Self::Ws => "ws → ws",
            Self::Wss => "wss → ws",
            Self::WsToWss => "ws → wss",
        }
    }
}

/// Terminates TLS in front of the simulator, like the provider; returns the address, and the file
/// of its certificate.
fn speak_tls_before(simulator: SocketAddr, folder: &Path) -> (SocketAddr, PathBuf) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let file = folder.join("upstream.pem");
    std::fs::write(&file, made.cert.pem()).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let relaying = relay_tls(listener, TlsAcceptor::from(Arc::new(config)), simulator);
    // On a thread of its own, because the measuring thread blocks at times.
    keychoir::tasks::spawn_thread("tls", move || here().block_on(relaying)).unwrap();
    (address, file)
}

async fn relay_tls(listener: std::net::TcpListener, acceptor: TlsAcceptor, simulator: SocketAddr) {
    let (listener, tasks) = (TcpListener::from_std(listener).unwrap(), Tasks::new());
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let acceptor = acceptor.clone();
        tasks.spawn(async move {
            let Ok(mut stream) = acceptor.accept(tcp).await else { return };
            let mut behind = TcpStream::connect(simulator).await.unwrap();
            behind.set_nodelay(true).unwrap();
            // Either end may disconnect.
            let _ = tokio::io::copy_bidirectional(&mut stream, &mut behind).await;
        });
    }
}

/// A runtime on this thread.
fn here() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Memory of an idle session.
async fn idle(stage: &SessionStage, sessions: u32, rounds: u32) {
    println!("{sessions} idle sessions, {rounds} rounds in turns, each with a fresh proxy;");
    println!("memory of the proxy in KiB a session (PSS): median (lowest to highest)");
    println!("{:<10}{:<26}{:>26}", "way", "what was said before", "KiB a session");
    let said: [(&str, &str, String); 2] = [
        ("speech: {\"text\":\" \"}", SPEECH, r#"{"text":" "}"#.to_owned()),
        ("echo: 16 KiB, both ways", ECHO, sound(16 * 1024)),
    ];
    let mut measured: Vec<_> =
        Way::ALL.into_iter().flat_map(|way| said.iter().map(move |said| (way, said, Vec::new()))).collect();
    for _ in 0..rounds {
        for (way, (_, path, message), rounds) in &mut measured {
            let house = stage.proxy(*way);
            rounds.push(memory_of_a_session(stage, &house, *way, path, message, sessions).await);
        }
    }
    let kib = |rounds: &[f64]| spread(rounds.iter().map(|bytes| bytes / 1024.0), 1);
    for (way, (words, ..), rounds) in &measured {
        println!("{:<10}{words:<26}{:>26}", way.words(), kib(rounds));
    }
    let most = measured.iter().filter(|(way, ..)| matches!(way, Way::Ws));
    let most = most.map(|(.., rounds)| middle(rounds.iter().copied())).fold(0.0, f64::max);
    verdict("a session beside its sockets, without TLS, takes at most 20 KiB", most <= SESSION_BYTES_MAX);
}

/// Memory per session, of `sessions` sessions that have sent `message`, received its echo, and are
/// idle since.
async fn memory_of_a_session(
    stage: &SessionStage,
    house: &Running,
    way: Way,
    path: &str,
    message: &str,
    sessions: u32,
) -> f64 {
    let connector = stage.connector(way);
    let frame = framed(message);
    let open = async |count: u32| {
        let mut open = Vec::new();
        for _ in 0..count {
            let mut session = Session::open(house.address, connector.as_ref(), path).await;
            session.stream.write_all(&frame).await.unwrap();
            session.stream.flush().await.unwrap();
            if path == ECHO {
                session.classify_message(message.len()).await;
            }
            open.push(session);
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        open
    };
    // Allocates the memory that is needed once, whatever the number of sessions.
    drop(open(20).await);
    until_none_is_open(house);
    let before = house.memory();
    let open = open(sessions).await;
    let after = house.memory();
    drop(open);
    (after - before) / f64::from(sessions)
}

fn until_none_is_open(house: &Running) {
    for socket in ["speech", "unknown"] {
        let line = format!("keychoir_websocket_sessions{{protocol=\"{socket}\"}} 0");
        house.says(&line);
    }
}

fn verdict(what: &str, holds: bool) {
    println!("{what}: {}", if holds { "holds" } else { "DOES NOT HOLD" });
}

/// The results of a round.
struct Round {
    driven: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Processor time of the proxy.
    micros: f64,
}

/// The time of a message on many busy sessions.
async fn talking(stage: &SessionStage, busy: u32, rate: u32, seconds: u32, rounds: u32) {
    println!(
        "{busy} busy sessions with {rate} messages a second each, {rounds} rounds of {seconds} s in turns;"
    );
    println!("ms from a message to its echo: median (lowest to highest)");
    println!(
        "{:<10}{:<10}{:>24}{:>24}{:>12}{:>14}",
        "message", "", "p50", "p99", "driven/s", "proxy µs each"
    );
    let house = stage.proxy(Way::Ws);
    let mut is_fast = true;
    for (name, bytes) in [("200 B", 200), ("16 KiB", 16 * 1024)] {
        let message = sound(bytes);
        for address in [stage.simulator.address, house.address] {
            let _ = talk(&house, address, &message, busy, rate, 1).await;
        }
        let (mut direct, mut through) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            direct.push(talk(&house, stage.simulator.address, &message, busy, rate, seconds).await);
            through.push(talk(&house, house.address, &message, busy, rate, seconds).await);
        }
        let of = |rounds: &[Round], what: fn(&Round) -> f64| rounds.iter().map(what).collect::<Vec<_>>();
        let told = |values: Vec<f64>| spread(values.iter().copied(), 3);
        for (way, rounds) in [("direct", &direct), ("through", &through)] {
            println!(
                "{name:<10}{way:<10}{:>24}{:>24}{:>12.0}{:>14.1}",
                told(of(rounds, |round| round.p50_ms)),
                told(of(rounds, |round| round.p99_ms)),
                middle(rounds.iter().map(|round| round.driven)),
                middle(rounds.iter().map(|round| round.micros)),
            );
            if rounds.iter().any(|round| round.driven < DRIVEN_MIN * f64::from(busy * rate)) {
                println!("          not every round could be driven at that rate here: set BENCH_RATE lower");
            }
        }
        let added = |what: fn(&Round) -> f64| -> Vec<f64> {
            through.iter().zip(&direct).map(|(through, direct)| what(through) - what(direct)).collect()
        };
        let (p50, p99) = (added(|round| round.p50_ms), added(|round| round.p99_ms));
        is_fast &= middle(p99.iter().copied()) < ADDED_MS_MAX;
        println!("{name:<10}{:<10}{:>24}{:>24}", "added", told(p50), told(p99));
    }
    println!("Each goes through the proxy twice, there and back.");
    verdict("the p99 that is added is below 1 ms", is_fast);
}

/// Sessions that each send messages at their scheduled times, and wait for the echo.
async fn talk(
    house: &Running,
    address: SocketAddr,
    message: &str,
    busy: u32,
    rate: u32,
    seconds: u32,
) -> Round {
    let mut open = Vec::new();
    for _ in 0..busy {
        open.push(Session::open(address, None, ECHO).await);
    }
    let (tasks, interval) = (Tasks::new(), Duration::from_secs(1) / rate);
    let frame: Arc<[u8]> = framed(message).into();
    let used = house.processor_seconds();
    let began = Instant::now();
    let talking: Vec<_> = (0..busy)
        .zip(open)
        .map(|(number, session)| {
            let begin = began + interval * number / busy;
            tasks.spawn(session.say(Arc::clone(&frame), message.len(), begin, interval, rate * seconds))
        })
        .collect();
    let (mut spans, mut sessions) = (Vec::new(), Vec::new());
    for talking in talking {
        let (session, each) = talking.await.unwrap();
        sessions.push(session);
        spans.extend(each);
    }
    let took = began.elapsed().as_secs_f64();
    let used = house.processor_seconds() - used;
    drop(sessions);
    spans.sort();
    let at = |part: usize| spans[spans.len() * part / 100].as_secs_f64() * 1e3;
    let count = spans.len() as f64;
    Round { driven: count / took, p50_ms: at(50), p99_ms: at(99), micros: used * 1e6 / count }
}

/// A message with audio of `bytes` bytes.
fn sound(bytes: usize) -> String {
    let (before, after) = (r#"{"message_type":"input_audio_chunk","audio_base_64":""#, r#""}"#);
    format!("{before}{}{after}", "A".repeat(bytes - before.len() - after.len()))
}

/// A message as a masked frame of a client.
fn framed(message: &str) -> Vec<u8> {
    const MASK: [u8; 4] = [0x6d, 0x61, 0x73, 0x6b];
    let length = message.len() as u64;
    let mut bytes = Vec::new();
    FrameHeader { is_final: true, reserved: 0, opcode: Opcode::Text, mask: Some(MASK), length }
        .encode(&mut bytes);
    let from = bytes.len();
    bytes.extend_from_slice(message.as_bytes());
    apply_mask(&mut bytes[from..], MASK, 0);
    bytes
}

/// The client's end of a session.
struct Session {
    stream: Either<TcpStream, Box<TlsStream<TcpStream>>>,
    heard: Vec<u8>,
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
        let ask = format!(
            "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        stream.write_all(ask.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            // The server sends nothing before the first message.
            assert_ne!(stream.read_buf(&mut head).await.unwrap(), 0, "it was closed");
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        Self { stream, heard: Vec::new() }
    }

    /// Receives one message of this length.
    async fn classify_message(&mut self, length: usize) {
        self.heard.clear();
        loop {
            if let Some((head, from)) = frame::parse_header(&self.heard) {
                assert_eq!((head.opcode, head.length), (Opcode::Text, length as u64));
                if self.heard.len() >= from + length {
                    return;
                }
            }
            assert_ne!(self.stream.read_buf(&mut self.heard).await.unwrap(), 0, "it was closed");
        }
    }

    /// Sends a message repeatedly, each at its scheduled time, or at once if that has passed;
    /// returns the round-trip times.
    async fn say(
        mut self,
        frame: Arc<[u8]>,
        length: usize,
        begin: Instant,
        interval: Duration,
        count: u32,
    ) -> (Self, Vec<Duration>) {
        self.heard.reserve(length + 64);
        let mut spans = Vec::new();
        for number in 0..count {
            tokio::time::sleep_until((begin + interval * number).into()).await;
            let sent = Instant::now();
            self.stream.write_all(&frame).await.unwrap();
            self.classify_message(length).await;
            spans.push(sent.elapsed());
        }
        (self, spans)
    }
}
