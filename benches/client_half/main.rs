//! The client half of HTTP/1.1: `keychoir::upstream` beside `hyper::client::conn::http1`, which is driven by the
//! task of the request as ours is and reads up to 128 KiB as ours does (`hyper_half.rs`).
//!
//! ```text
//! cargo bench --bench client_half
//! ```
//!
//! Time is measured over TCP on this machine, with the provider on threads of its own: processor time of the
//! client's thread and time in all, in rounds in which both take turns; medians, of the ratios with the quartiles.
//! The second table of times is with hyper's server, which relays the answers on the same thread to a client: there
//! each piece of an answer costs, too.
//! Instructions are counted by valgrind over a stream in memory that always does the same: those of 2 N requests
//! without those of N. `BENCH_ROUNDS` changes the number of rounds. Linux only.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a benchmark reads the clock, waits, prints its results, and ends at a failed expectation"
)]
#![allow(unreachable_pub, reason = "the modules belong to this benchmark")]

#[path = "../harness/mod.rs"]
mod harness;

mod cases;
mod hyper_half;
mod provider;

use std::convert::Infallible;
use std::env;
use std::hint::black_box;
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cases::{CASES, Case};
use harness::{env_number, median};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Either};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_half::HyperHalf;
use hyper_util::rt::TokioIo;
use keychoir::body::budget::BufferBudget;
use keychoir::body::replay::Replay;
use keychoir::policy::authority::{Authority, Scheme};
use keychoir::policy::min_rate::MinRate;
use keychoir::secret::ApiKey;
use keychoir::tasks::Tasks;
use keychoir::upstream::{Connect, Settings, TcpTlsConnector, Upstream};
use provider::Memory;
use rustix::time::{ClockId, clock_gettime};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

const ROUNDS: u32 = 41;
const KEY: &str = "sk_0123456789abcdef0123456789abcdef0123456789abcdef";
/// The pieces in which the body of a request comes, as a server reads them.
const UPLOAD_CHUNK: Bytes = Bytes::from_static(&[b'x'; 64 * 1024]);

/// Valgrind counts each byte of `rep movsb` as an instruction; loops copy 32 bytes with one.
const COPIED_BY_LOOPS: &str = "glibc.cpu.x86_rep_movsb_threshold=1073741824";

const SETTINGS: Settings = Settings {
    connect_timeout: Duration::from_secs(10),
    response_timeout: Duration::from_secs(60),
    stream_idle_timeout: Duration::from_secs(30),
    request_body_timeout: Duration::from_secs(20),
    min_request_body_rate: MinRate { bytes_per_second: 0 },
    max_idle_connections: 4,
    keepalive_timeout: Duration::from_secs(300),
    max_connection_duration: Duration::from_secs(3_600),
};

fn main() {
    let arguments: Vec<String> = env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--counted") {
        let [case, side, requests] = std::array::from_fn(|next| arguments[at + 1 + next].parse().unwrap());
        return run_counted(&CASES[case], case, SIDES[side], requests);
    }
    println!(
        "| | instructions, ours | hyper | hyper / ours | pieces, ours | hyper |\n|---|---|---|---|---|---|"
    );
    for (at, case) in CASES.iter().enumerate() {
        count(at, case);
    }
    let (address, opened) = provider::start();
    measure(address, false);
    measure(address, true);
    let cases = CASES.len() + CASES.iter().filter(|case| case.is_chunked()).count();
    let connections = cases * SIDES.len() * env_number("BENCH_ROUNDS", ROUNDS) as usize;
    assert_eq!(opened.load(Ordering::Relaxed), connections, "each side keeps its connection");
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Ours,
    Hyper,
}

const SIDES: [Side; 2] = [Side::Ours, Side::Hyper];

/// Both client halves over connections of `C`.
struct ClientHalves<C: Connect> {
    ours: Upstream<C>,
    hyper: Arc<HyperHalf<C>>,
    key: ApiKey,
    no_buffers: BufferBudget,
}

impl<C: Connect + Clone> ClientHalves<C> {
    fn new(authority: Authority, connector: C) -> Self {
        Self {
            ours: Upstream::new(authority.clone(), connector.clone(), SETTINGS, Tasks::new(), None),
            hyper: HyperHalf::new(authority, connector, SETTINGS, KEY),
            key: ApiKey::new(KEY).unwrap(),
            // Bytes that are kept for a replay are no part of a client half.
            no_buffers: BufferBudget::empty(),
        }
    }

    /// Serves these requests of a case; returns the pieces of their answers.
    async fn serve(&self, side: Side, case: &Case, at: usize, blocks: usize, requests: usize) -> usize {
        let head = case.request(at);
        let mut chunks = 0;
        for _ in 0..requests {
            let body = Replay::new(UploadBody(case.body_bytes), &self.no_buffers).start_attempt();
            let (bytes, more) = match side {
                Side::Ours => {
                    let sent = self.ours.send(None, &self.key, &head, body).await;
                    read(sent.unwrap().into_body()).await
                }
                Side::Hyper => read(self.hyper.send(&head, body).await.into_body()).await,
            };
            assert_eq!(bytes, case.answer_bytes(blocks), "{}", case.name);
            chunks += more;
        }
        chunks
    }
}

impl ClientHalves<TcpTlsConnector> {
    /// Relays the answers of a case through hyper's server, to a client on a thread of its own.
    async fn relay(&self, side: Side, case: &'static Case, at: usize) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        keychoir::tasks::spawn_thread("client", move || provider::ask(address, case.requests)).unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let head = case.request(at);
        let service = service_fn(|_| async {
            let body = Replay::new(UploadBody(case.body_bytes), &self.no_buffers).start_attempt();
            Ok::<_, Infallible>(match side {
                Side::Ours => self.ours.send(None, &self.key, &head, body).await.unwrap().map(Either::Left),
                Side::Hyper => self.hyper.send(&head, body).await.map(Either::Right),
            })
        });
        http1::Builder::new().serve_connection(TokioIo::new(stream), service).await.unwrap();
    }
}

/// The bytes of a body, and the pieces in which they came.
async fn read<B>(mut body: B) -> (usize, usize)
where
    B: Body<Data = Bytes, Error: std::fmt::Debug> + Unpin,
{
    let (mut bytes, mut chunks) = (0, 0);
    while let Some(frame) = body.frame().await {
        bytes += black_box(frame.unwrap().into_data().unwrap()).len();
        chunks += 1;
    }
    (bytes, chunks)
}

/// The body of a request: its bytes are there at once.
#[derive(Debug)]
pub struct UploadBody(usize);

impl Body for UploadBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let bytes = self.0.min(UPLOAD_CHUNK.len());
        self.0 -= bytes;
        Poll::Ready((bytes > 0).then(|| Ok(Frame::data(UPLOAD_CHUNK.slice(..bytes)))))
    }

    fn is_end_stream(&self) -> bool {
        self.0 == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0 as u64)
    }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// The code under valgrind.
fn run_counted(case: &'static Case, at: usize, side: Side, requests: usize) {
    let authority = Authority::new(Scheme::Http, "api.example", 80, "").unwrap();
    let halves = ClientHalves::new(authority, Memory::new(case));
    let chunks = runtime().block_on(halves.serve(side, case, at, case.counted_blocks, requests));
    println!("{}", chunks / requests);
}

/// Prints the instructions of a request, and the pieces of its answer.
fn count(at: usize, case: &Case) {
    let of = |side: usize| {
        let (n, chunks) = count_with_valgrind(at, side, case.counted_requests);
        let (double, _) = count_with_valgrind(at, side, 2 * case.counted_requests);
        ((double - n) / case.counted_requests as u64, chunks)
    };
    let ((ours, our_pieces), (hyper, hyper_pieces)) = (of(0), of(1));
    let ratio = hyper as f64 / ours as f64;
    println!("| {} | {ours} | {hyper} | {ratio:.2} | {our_pieces} | {hyper_pieces} |", case.name);
}

fn count_with_valgrind(case: usize, side: usize, requests: usize) -> (u64, String) {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .env("GLIBC_TUNABLES", COPIED_BY_LOOPS)
        .arg(env::current_exe().unwrap())
        .arg("--counted")
        .args([case, side, requests].map(|number| number.to_string()))
        .output()
        .expect("instructions are counted by valgrind: apt-get install valgrind");
    let report = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{report}");
    let line = report.lines().find_map(|line| line.split_once("Collected : ")).expect("a sum");
    (line.1.trim().parse().unwrap(), String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

/// Prints the time of a request, case by case: of the client half alone, or with a server that relays its answers.
fn measure(address: SocketAddr, is_relayed: bool) {
    let name = if is_relayed { "relayed" } else { "alone" };
    println!(
        "\n| {name} | processor time, ours (µs) | hyper | hyper / ours | time in all, ours (µs) | hyper | hyper / ours |"
    );
    println!("|---|---|---|---|---|---|---|");
    let rounds = env_number("BENCH_ROUNDS", ROUNDS);
    let authority = Authority::new(Scheme::Http, "127.0.0.1", address.port(), "").unwrap();
    let (runtime, connector) = (runtime(), TcpTlsConnector::new(None).unwrap());
    let cases = CASES.iter().enumerate().filter(|(_, case)| !is_relayed || case.is_chunked());
    for (at, case) in cases {
        let turns: Vec<_> = (0..rounds)
            .map(|round| {
                // A connection may be slow for as long as it exists, by its windows and by the cores that its two
                // threads run on, so each round has its own.
                let halves = ClientHalves::new(authority.clone(), connector.clone());
                for side in SIDES {
                    runtime.block_on(halves.serve(side, &CASES[0], 0, 1, 1));
                }
                let turn = |side: Side| {
                    let (started_at, before) = (Instant::now(), processor_time());
                    runtime.block_on(async {
                        match is_relayed {
                            true => halves.relay(side, case, at).await,
                            false => drop(halves.serve(side, case, at, case.blocks, case.requests).await),
                        }
                    });
                    let each = |span: Duration| span.as_secs_f64() * 1e6 / case.requests as f64;
                    (each(processor_time() - before), each(started_at.elapsed()))
                };
                // Each side begins every other round.
                if round % 2 == 0 {
                    SIDES.map(turn)
                } else {
                    let (hyper, ours) = (turn(Side::Hyper), turn(Side::Ours));
                    [ours, hyper]
                }
            })
            .collect();
        let row = |of: fn(&(f64, f64)) -> f64| {
            let side = |side: usize| median(turns.iter().map(|turn| of(&turn[side])));
            let ratios = turns.iter().map(|[ours, hyper]| of(hyper) / of(ours));
            format!("{:.1} | {:.1} | {}", side(0), side(1), quartiles(ratios))
        };
        println!("| {} | {} | {} |", case.name, row(|turn| turn.0), row(|turn| turn.1));
    }
}

/// The median, and the quartiles.
fn quartiles(values: impl Iterator<Item = f64>) -> String {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let [first, median, third] = [1, 2, 3].map(|quarter| values[values.len() * quarter / 4]);
    format!("{median:.2} ({first:.2} to {third:.2})")
}

/// Processor time of this thread.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap())
}
