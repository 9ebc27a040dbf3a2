//! The effect of slow clients on regular ones. Three clients trickle their requests, and three do not read their
//! responses. Each round measures the regular clients with and without the slow ones, and the ratio is reported.

use std::time::Duration;

use keychoir::tasks::{AbortOnDrop, Tasks};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::harness::{format_median_and_range, median};
use crate::load::{Load, RequestSpec};
use crate::peers::{Peer, Setup, StartedPeer, Target};
use crate::rounds::{Plan, current_thread_runtime, quantile};
use crate::workload::Workload;

/// Speech requests per second of the regular clients, and their number.
const RATE: u32 = 500;
const LOAD_CLIENTS: u32 = 16;
/// Slow clients of each kind.
const SLOW_CLIENTS_PER_KIND: u32 = 3;
/// Interval of two bytes of a trickled request.
const TRICKLE_INTERVAL: Duration = Duration::from_millis(50);
/// Maximum ratio of the regular clients' 99th percentile with the slow ones to that without them.
const MAX_P99_RATIO: f64 = 1.2;

/// The results of a round: durations of speech requests in µs, at the median and the 99th
/// percentile.
struct Turn {
    without: [f64; 2],
    with: [f64; 2],
}

impl Turn {
    fn ratio(&self, index: usize) -> f64 {
        self.with[index] / self.without[index]
    }
}

pub fn measure(plan: &Plan, peers: &[Peer], setup: &Setup) {
    println!(
        "\nslow: tts, {RATE} requests/s over {LOAD_CLIENTS} connections, beside {SLOW_CLIENTS_PER_KIND} clients that trickle and {SLOW_CLIENTS_PER_KIND} \
         that do not read and without them; {} rounds of 2 x {} s in turns",
        plan.rounds, plan.seconds
    );
    println!(
        "{:<18}{:>12}{:>12}{:>10}{:>24}  bound {MAX_P99_RATIO}",
        "", "p50, µs", "p99, µs", "p50, x", "p99, x"
    );
    let folder = tempfile::tempdir_in(&plan.folder).unwrap();
    let started_peers: Vec<Option<StartedPeer>> =
        peers.iter().map(|peer| peer.start(setup, &folder.path().join(peer.name()))).collect();
    let mut turns: Vec<Vec<Turn>> = peers.iter().map(|_| Vec::new()).collect();
    for round in 0..plan.rounds {
        for turn in 0..peers.len() {
            let index = (round + turn) % peers.len();
            let target = setup.target(started_peers[index].as_ref());
            turns[index].push(current_thread_runtime().block_on(take_turn(plan, &target, round)));
            setup.upstream.assert_credentials_were_replaced(peers[index].name());
        }
    }
    for (peer, turns) in peers.iter().zip(&turns) {
        let median_of = |what: &dyn Fn(&Turn) -> f64| median(turns.iter().map(what));
        let p99: Vec<f64> = turns.iter().map(|turn| turn.ratio(1)).collect();
        println!(
            "{:<18}{:>12.0}{:>12.0}{:>10.2}{:>24}",
            peer.name(),
            median_of(&|turn| turn.with[0]),
            median_of(&|turn| turn.with[1]),
            median_of(&|turn| turn.ratio(0)),
            format_median_and_range(p99.iter().copied(), 2)
        );
    }
}

/// The regular clients; in every other round, first beside the slow ones.
async fn take_turn(plan: &Plan, target: &Target, round: usize) -> Turn {
    let mut load = Load::open(target, LOAD_CLIENTS, 1).await;
    let small = RequestSpec::new(Workload::Tts, target.key, 0.0);
    load.at_rate(&small, RATE, 0.5).await;
    let (mut without, mut with) = ([0.0; 2], [0.0; 2]);
    for has_slow_clients in [round.is_multiple_of(2), !round.is_multiple_of(2)] {
        let slow = if has_slow_clients { slow_clients(target).await } else { Vec::new() };
        let mut results = load.at_rate(&small, RATE, plan.seconds).await;
        let times = [0.5, 0.99].map(|part| quantile(&mut results.total_times, part));
        *(if has_slow_clients { &mut with } else { &mut without }) = times;
        drop(slow);
    }
    Turn { without, with }
}

/// The slow clients, until they are dropped.
async fn slow_clients(target: &Target) -> Vec<AbortOnDrop> {
    let tasks = Tasks::new();
    let mut slow = Vec::new();
    for _ in 0..SLOW_CLIENTS_PER_KIND {
        let mut stream = TcpStream::connect(target.address).await.unwrap();
        let request = Workload::Tts.request(target.key, 0.0);
        let end = crate::wire::head_end(&request).unwrap();
        stream.write_all(&request[..end]).await.unwrap();
        slow.push(tasks.spawn_guarded(async move {
            for byte in &request[end..] {
                tokio::time::sleep(TRICKLE_INTERVAL).await;
                if stream.write_all(&[*byte]).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        }));
        let mut stream = TcpStream::connect(target.address).await.unwrap();
        stream.write_all(&Workload::Stream.request(target.key, 0.0)).await.unwrap();
        slow.push(tasks.spawn_guarded(async move {
            // The connection is kept open and not read.
            let _stream = stream;
            std::future::pending::<()>().await;
        }));
    }
    slow
}
