//! Measures the effect of slow clients on regular clients (`slow` on the command line). Three clients send their
//! request bodies byte by byte, and three clients do not read their responses. Each round measures the regular clients
//! with and without the slow clients, and the table contains the ratios.

use std::time::Duration;

use keychoir::tasks::{AbortOnDrop, Tasks};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::harness::{format_median_and_range, median};
use crate::http1;
use crate::load::{LoadGenerator, RequestSpec};
use crate::peers::{Peer, PeerSetup, StartedPeer, Target};
use crate::rounds::{RoundPlan, current_thread_runtime, quantile_micros};
use crate::workload::Workload;

/// Speech requests per second of all regular clients.
const RATE: u32 = 500;
const LOAD_CLIENTS: u32 = 16;
/// The number of slow clients of each kind.
const SLOW_CLIENTS_PER_KIND: u32 = 3;
/// The interval between the bytes of a slow request.
const BYTE_INTERVAL: Duration = Duration::from_millis(50);
/// Maximum ratio of the 99th percentile with slow clients to the 99th percentile without them.
const MAX_P99_RATIO: f64 = 1.2;

/// The positions of the median and of the 99th percentile in the results.
const P50: usize = 0;
const P99: usize = 1;

/// The results of a turn, in which one proxy is measured once: the median and the 99th percentile of the durations of
/// speech requests in µs.
struct TurnResults {
    without_slow_clients: [f64; 2],
    with_slow_clients: [f64; 2],
}

impl TurnResults {
    fn ratio(&self, quantile: usize) -> f64 {
        self.with_slow_clients[quantile] / self.without_slow_clients[quantile]
    }
}

/// Measures all proxies, and prints a table.
pub fn measure(plan: &RoundPlan, peers: &[Peer], setup: &PeerSetup) {
    println!(
        "\nslow: tts, {RATE} requests/s over {LOAD_CLIENTS} connections, with and without \
         {SLOW_CLIENTS_PER_KIND} clients that send slowly and {SLOW_CLIENTS_PER_KIND} that do not read; \
         {} rounds of 2 x {} s in turns",
        plan.rounds, plan.seconds
    );
    println!(
        "{:<18}{:>12}{:>12}{:>10}{:>24}  bound {MAX_P99_RATIO}",
        "", "p50, µs", "p99, µs", "p50, x", "p99, x"
    );
    let directory = tempfile::tempdir_in(&plan.directory).unwrap();
    let started_peers: Vec<Option<StartedPeer>> =
        peers.iter().map(|peer| peer.start(setup, &directory.path().join(peer.name()))).collect();
    let mut turns: Vec<Vec<TurnResults>> = peers.iter().map(|_| Vec::new()).collect();
    for round in 0..plan.rounds {
        for turn in 0..peers.len() {
            let index = (round + turn) % peers.len();
            let target = setup.target(started_peers[index].as_ref());
            turns[index].push(current_thread_runtime().block_on(take_turn(plan, &target, round)));
            setup.upstream.assert_requests_were_valid(peers[index].name());
        }
    }
    for (peer, turns) in peers.iter().zip(&turns) {
        let median_of = |field: &dyn Fn(&TurnResults) -> f64| median(turns.iter().map(field));
        let p99_ratios: Vec<f64> = turns.iter().map(|turn| turn.ratio(P99)).collect();
        println!(
            "{:<18}{:>12.0}{:>12.0}{:>10.2}{:>24}",
            peer.name(),
            median_of(&|turn| turn.with_slow_clients[P50]),
            median_of(&|turn| turn.with_slow_clients[P99]),
            median_of(&|turn| turn.ratio(P50)),
            format_median_and_range(p99_ratios.iter().copied(), 2)
        );
    }
}

/// Runs the regular clients with and without the slow clients. The order alternates between rounds.
async fn take_turn(plan: &RoundPlan, target: &Target, round: usize) -> TurnResults {
    let mut load = LoadGenerator::open(target, LOAD_CLIENTS, 1).await;
    let request_spec = RequestSpec::new(Workload::Tts, target.key, 0.0);
    load.send_at_rate(&request_spec, RATE, 0.5).await;
    let (mut without_slow_clients, mut with_slow_clients) = ([0.0; 2], [0.0; 2]);
    for has_slow_clients in [round.is_multiple_of(2), !round.is_multiple_of(2)] {
        let slow_clients = if has_slow_clients { start_slow_clients(target).await } else { Vec::new() };
        let mut results = load.send_at_rate(&request_spec, RATE, plan.seconds).await;
        let times = [0.5, 0.99].map(|fraction| quantile_micros(&mut results.total_times, fraction));
        *(if has_slow_clients { &mut with_slow_clients } else { &mut without_slow_clients }) = times;
        drop(slow_clients);
    }
    TurnResults { without_slow_clients, with_slow_clients }
}

/// Starts the slow clients. They run until they are dropped.
async fn start_slow_clients(target: &Target) -> Vec<AbortOnDrop> {
    let tasks = Tasks::new();
    let mut slow_clients = Vec::new();
    for _ in 0..SLOW_CLIENTS_PER_KIND {
        let mut stream = TcpStream::connect(target.address).await.unwrap();
        let request = Workload::Tts.request(target.key, 0.0);
        let head_length = http1::head_length(&request).unwrap();
        stream.write_all(&request[..head_length]).await.unwrap();
        slow_clients.push(tasks.spawn_guarded(async move {
            for byte in &request[head_length..] {
                tokio::time::sleep(BYTE_INTERVAL).await;
                if stream.write_all(&[*byte]).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        }));
        let mut stream = TcpStream::connect(target.address).await.unwrap();
        stream.write_all(&Workload::Stream.request(target.key, 0.0)).await.unwrap();
        slow_clients.push(tasks.spawn_guarded(async move {
            // The stream stays open and is not read.
            let _stream = stream;
            std::future::pending::<()>().await;
        }));
    }
    slow_clients
}
