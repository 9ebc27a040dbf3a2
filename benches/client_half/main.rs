//! Compares the HTTP/1.1 client `keychoir::upstream` with a client on top of `hyper::client::conn::http1`
//! (`hyper_client.rs`), which is also driven by the task of the request and also reads up to 128 KiB.
//!
//! ```text
//! cargo bench --bench client_half
//! ```
//!
//! The first table compares instructions per request and body frames per response. Valgrind counts the instructions for
//! N and for 2 N requests over a deterministic stream in memory, and the difference divided by N is the cost of a
//! request.
//!
//! The second table compares times over TCP on this machine, with the provider on separate threads: the processor time
//! of the client's thread, and the elapsed time. Both clients take turns in each round. The figures are medians, and
//! the ratios also have quartiles. In the third table, hyper's server relays the responses on the thread of the client,
//! which adds a cost per body frame.
//!
//! `BENCH_ROUNDS` is the number of rounds. The benchmark runs only on Linux and needs valgrind.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a benchmark reads the clock, waits, prints its results, and panics if an expectation fails"
)]
#![allow(unreachable_pub, reason = "the modules belong to this benchmark")]

#[path = "../harness/mod.rs"]
mod harness;

mod cases;
mod hyper_client;
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
use cases::{CASES, RequestCase};
use harness::{env_number, median};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Either};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_client::HyperClient;
use hyper_util::rt::TokioIo;
use keychoir::body::budget::BufferBudget;
use keychoir::body::replay::Replay;
use keychoir::policy::authority::{Authority, Scheme};
use keychoir::policy::min_rate::MinRate;
use keychoir::secret::ApiKey;
use keychoir::tasks::Tasks;
use keychoir::upstream::{Connect, Settings, TcpTlsConnector, Upstream};
use provider::MemoryConnector;
use rustix::time::{ClockId, clock_gettime};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

const ROUNDS: u32 = 41;
const KEY: &str = "sk_0123456789abcdef0123456789abcdef0123456789abcdef";
/// A full frame of a request body.
const UPLOAD_CHUNK: Bytes = Bytes::from_static(&[b'x'; 64 * 1024]);

/// Makes glibc copy memory by a loop instead of the instruction `rep movsb`. Valgrind counts `rep movsb` once per byte,
/// and the loop copies 32 bytes per instruction.
const GLIBC_COPY_SETTING: &str = "glibc.cpu.x86_rep_movsb_threshold=1073741824";

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
    if let Some(flag_index) = arguments.iter().position(|argument| argument == "--counted") {
        let [case, client, requests] =
            std::array::from_fn(|offset| arguments[flag_index + 1 + offset].parse().unwrap());
        return run_counted(&CASES[case], case, CLIENTS[client], requests);
    }
    println!(
        "| | instructions, ours | hyper | hyper / ours | frames, ours | hyper |\n|---|---|---|---|---|---|"
    );
    for (index, case) in CASES.iter().enumerate() {
        print_instructions(index, case);
    }
    let (address, opened_connections) = provider::start();
    print_times(address, false);
    print_times(address, true);
    let cases = CASES.len() + CASES.iter().filter(|case| case.is_chunked()).count();
    let connections = cases * CLIENTS.len() * env_number("BENCH_ROUNDS", ROUNDS) as usize;
    assert_eq!(
        opened_connections.load(Ordering::Relaxed),
        connections,
        "each client must reuse its connection"
    );
}

/// One of the two compared clients.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ClientKind {
    /// `keychoir::upstream`.
    Ours,
    /// The client on top of hyper.
    Hyper,
}

const CLIENTS: [ClientKind; 2] = [ClientKind::Ours, ClientKind::Hyper];

/// Both clients, with connections of `C`.
struct Clients<C: Connect> {
    ours: Upstream<C>,
    hyper: Arc<HyperClient<C>>,
    key: ApiKey,
    empty_budget: BufferBudget,
}

impl<C: Connect + Clone> Clients<C> {
    fn new(authority: Authority, connector: C) -> Self {
        Self {
            ours: Upstream::new(authority.clone(), connector.clone(), SETTINGS, Tasks::new(), None),
            hyper: HyperClient::new(authority, connector, SETTINGS, KEY),
            key: ApiKey::new(KEY).unwrap(),
            // The client under test does not include the replay buffer.
            empty_budget: BufferBudget::empty(),
        }
    }

    /// Sends the requests of a case. Returns the number of frames in their response bodies.
    async fn send(
        &self,
        client: ClientKind,
        case: &RequestCase,
        index: usize,
        blocks: usize,
        requests: usize,
    ) -> usize {
        let head = case.request_head(index);
        let mut frames = 0;
        for _ in 0..requests {
            let body = Replay::new(UploadBody(case.body_bytes), &self.empty_budget).start_attempt();
            let body = match client {
                ClientKind::Ours => {
                    let response = self.ours.send(None, &self.key, &head, body).await;
                    read_body(response.unwrap().into_body()).await
                }
                ClientKind::Hyper => read_body(self.hyper.send(&head, body).await.into_body()).await,
            };
            assert_eq!(
                body.bytes,
                case.response_bytes(blocks),
                "the response must be complete: {}",
                case.name
            );
            frames += body.frames;
        }
        frames
    }
}

impl Clients<TcpTlsConnector> {
    /// Relays the responses of a case through hyper's server to a client on a separate thread.
    async fn relay(&self, client: ClientKind, case: &'static RequestCase, index: usize) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        keychoir::tasks::spawn_thread("client", move || provider::send_requests(address, case.requests))
            .unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let head = case.request_head(index);
        let service = service_fn(|_| async {
            let body = Replay::new(UploadBody(case.body_bytes), &self.empty_budget).start_attempt();
            Ok::<_, Infallible>(match client {
                ClientKind::Ours => {
                    self.ours.send(None, &self.key, &head, body).await.unwrap().map(Either::Left)
                }
                ClientKind::Hyper => self.hyper.send(&head, body).await.map(Either::Right),
            })
        });
        http1::Builder::new().serve_connection(TokioIo::new(stream), service).await.unwrap();
    }
}

/// The size of a received response body.
#[derive(Default)]
struct ReceivedBody {
    bytes: usize,
    frames: usize,
}

async fn read_body<B>(mut body: B) -> ReceivedBody
where
    B: Body<Data = Bytes, Error: std::fmt::Debug> + Unpin,
{
    let mut received_body = ReceivedBody::default();
    while let Some(frame) = body.frame().await {
        received_body.bytes += black_box(frame.unwrap().into_data().unwrap()).len();
        received_body.frames += 1;
    }
    received_body
}

/// A request body whose bytes are available immediately. The field is the number of remaining bytes.
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

fn current_thread_runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Sends the counted requests in a child process under valgrind. Prints the number of frames per response.
fn run_counted(case: &'static RequestCase, index: usize, client: ClientKind, requests: usize) {
    let authority = Authority::new(Scheme::Http, "api.example", 80, "").unwrap();
    let clients = Clients::new(authority, MemoryConnector::new(case));
    let frames =
        current_thread_runtime().block_on(clients.send(client, case, index, case.counted_blocks, requests));
    println!("{}", frames / requests);
}

/// Prints the number of instructions per request, and the number of frames per response.
fn print_instructions(index: usize, case: &RequestCase) {
    let count_per_request = |client: usize| {
        let (single_count, frames) = count_with_valgrind(index, client, case.counted_requests);
        let (double_count, _) = count_with_valgrind(index, client, 2 * case.counted_requests);
        ((double_count - single_count) / case.counted_requests as u64, frames)
    };
    let ((ours, our_frames), (hyper, hyper_frames)) = (count_per_request(0), count_per_request(1));
    let ratio = hyper as f64 / ours as f64;
    println!("| {} | {ours} | {hyper} | {ratio:.2} | {our_frames} | {hyper_frames} |", case.name);
}

/// Returns the number of instructions of `requests` requests, and the output of the child process, which is the number
/// of frames per response.
fn count_with_valgrind(case: usize, client: usize, requests: usize) -> (u64, String) {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .env("GLIBC_TUNABLES", GLIBC_COPY_SETTING)
        .arg(env::current_exe().unwrap())
        .arg("--counted")
        .args([case, client, requests].map(|number| number.to_string()))
        .output()
        .expect("valgrind must be installed: apt-get install valgrind");
    let report = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "valgrind must succeed: {report}");
    let (_, sum) = report
        .lines()
        .find_map(|line| line.split_once("Collected : "))
        .expect("the report must contain the sum");
    (sum.trim().parse().unwrap(), String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

/// Prints the times per request of each case, for the clients alone or with a server that relays their responses.
fn print_times(address: SocketAddr, is_relayed: bool) {
    let name = if is_relayed { "relayed" } else { "alone" };
    println!(
        "\n| {name} | processor time, ours (µs) | hyper | hyper / ours | elapsed time, ours (µs) | hyper \
         | hyper / ours |"
    );
    println!("|---|---|---|---|---|---|---|");
    let rounds = env_number("BENCH_ROUNDS", ROUNDS);
    let authority = Authority::new(Scheme::Http, "127.0.0.1", address.port(), "").unwrap();
    let (runtime, connector) = (current_thread_runtime(), TcpTlsConnector::new(None).unwrap());
    let cases = CASES.iter().enumerate().filter(|(_, case)| !is_relayed || case.is_chunked());
    for (index, case) in cases {
        let turns: Vec<_> = (0..rounds)
            .map(|round| {
                // A connection may be slow during its whole life, depending on its TCP windows and on the cores of its
                // two threads, so each round opens new connections.
                let clients = Clients::new(authority.clone(), connector.clone());
                for client in CLIENTS {
                    runtime.block_on(clients.send(client, &CASES[0], 0, 1, 1));
                }
                let take_turn = |client: ClientKind| {
                    let (started_at, processor_time_before) = (Instant::now(), processor_time());
                    runtime.block_on(async {
                        if is_relayed {
                            clients.relay(client, case, index).await;
                        } else {
                            clients.send(client, case, index, case.blocks, case.requests).await;
                        }
                    });
                    let micros_per_request =
                        |duration: Duration| duration.as_secs_f64() * 1e6 / case.requests as f64;
                    (
                        micros_per_request(processor_time() - processor_time_before),
                        micros_per_request(started_at.elapsed()),
                    )
                };
                // Each client takes the first turn in every second round.
                if round % 2 == 0 {
                    CLIENTS.map(take_turn)
                } else {
                    let (hyper, ours) = (take_turn(ClientKind::Hyper), take_turn(ClientKind::Ours));
                    [ours, hyper]
                }
            })
            .collect();
        let columns = |time: fn(&(f64, f64)) -> f64| {
            let median_of = |client: usize| median(turns.iter().map(|turn| time(&turn[client])));
            let ratios = turns.iter().map(|[ours, hyper]| time(hyper) / time(ours));
            format!("{:.1} | {:.1} | {}", median_of(0), median_of(1), format_quartiles(ratios))
        };
        println!("| {} | {} | {} |", case.name, columns(|times| times.0), columns(|times| times.1));
    }
}

/// Formats the median, with the first and the third quartile in parentheses.
fn format_quartiles(values: impl Iterator<Item = f64>) -> String {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let [first, median, third] = [1, 2, 3].map(|quarter| values[values.len() * quarter / 4]);
    format!("{median:.2} ({first:.2} to {third:.2})")
}

/// Returns the processor time of this thread.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap())
}
