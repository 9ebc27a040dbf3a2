//! Measures the load of idle connections that become busy (`idle-connections` on the command line). Clients open
//! connections, of which each of two workers has half. Then either the connections of one worker or random connections
//! become busy, in some cases beside streams on other connections. This build of Keychoir and the builds in
//! `BENCH_KEYCHOIR` take turns in each round. Keychoir uses two processors. Its clients and its provider use the second
//! one.

use std::time::Duration;

use crate::harness::{format_median_and_range, median};
use crate::load::{LoadGenerator, RequestSpec};
use crate::peers::{Peer, PeerSetup, StartedPeer, Target};
use crate::rounds::{RoundPlan, current_thread_runtime, quantile_micros};
use crate::workload::{PACED_INTERVAL_MS, Workload};

/// The number of open connections per busy connection. Each worker has half of the open connections.
const OPEN_PER_BUSY: u32 = 3;
/// The number of requests whose processor time identifies the worker of a connection.
const PROBE_REQUESTS: u32 = 3;
/// The time without a request after which a connection has released its buffers.
const IDLE_TIME: Duration = Duration::from_millis(1_600);

/// Each round of the plan is divided into this number of rounds, because the results of many short rounds vary less
/// than the medians of a few long rounds.
const ROUND_DIVISOR: u32 = 8;

/// The connections that become busy in a round.
#[derive(Clone, Copy, PartialEq)]
enum BusyConnections {
    /// The connections of one worker. The next round uses the other worker.
    OneWorker,
    /// Random connections of any worker. Each round uses different connections.
    Random,
}

/// The rate of the requests.
#[derive(Clone, Copy)]
enum RequestRate {
    /// Each connection sends the next request after each response.
    Saturating,
    /// The number of requests per second on all connections.
    PerSecond(u32),
}

/// Requests on previously idle connections, and concurrent streams on other connections.
struct IdleLoadCase {
    name: &'static str,
    busy_connections: BusyConnections,
    requests: (Workload, RequestRate),
    connections: u32,
    /// The workload and the number of the streams.
    streams: (Workload, u32),
}

const CASES: [IdleLoadCase; 7] = [
    case(
        "get, 32 as fast as possible",
        BusyConnections::OneWorker,
        (Workload::Get, RequestRate::Saturating),
        32,
    ),
    case(
        "tts, 16 as fast as possible",
        BusyConnections::OneWorker,
        (Workload::Tts, RequestRate::Saturating),
        16,
    ),
    case("get, 8 random, fast", BusyConnections::Random, (Workload::Get, RequestRate::Saturating), 8),
    case(
        "get, 6,000/s over 32",
        BusyConnections::OneWorker,
        (Workload::Get, RequestRate::PerSecond(6_000)),
        32,
    ),
    case(
        "tts, 3,000/s over 32",
        BusyConnections::OneWorker,
        (Workload::Tts, RequestRate::PerSecond(3_000)),
        32,
    ),
    IdleLoadCase {
        streams: (Workload::Paced, 100),
        ..case(
            "get, 500/s beside 100 paced",
            BusyConnections::OneWorker,
            (Workload::Get, RequestRate::PerSecond(500)),
            16,
        )
    },
    IdleLoadCase {
        streams: (Workload::Stream, 4),
        ..case(
            "get, 500/s beside 4 fast",
            BusyConnections::OneWorker,
            (Workload::Get, RequestRate::PerSecond(500)),
            16,
        )
    },
];

const fn case(
    name: &'static str,
    busy_connections: BusyConnections,
    requests: (Workload, RequestRate),
    connections: u32,
) -> IdleLoadCase {
    IdleLoadCase { name, busy_connections, requests, connections, streams: (Workload::Stream, 0) }
}

/// The results of a turn, in which one build is measured once. Request times are in µs.
struct TurnResults {
    /// Requests per second, or MiB per second of the concurrent fast streams.
    throughput: f64,
    p50: f64,
    p99: f64,
    /// Processor time of the proxy in µs per request, or per MiB of the concurrent fast streams.
    cost: f64,
    /// The share of the less busy worker in the processor time of both workers, from 0 to 0.5.
    lesser_share: f64,
}

/// Measures all cases, and prints a table for each case.
pub fn measure(plan: &RoundPlan, peers: &[Peer], setup: &PeerSetup) {
    let plan = &RoundPlan {
        seconds: plan.seconds / f64::from(ROUND_DIVISOR),
        rounds: plan.rounds * ROUND_DIVISOR as usize,
        ..plan.clone()
    };
    let setup = PeerSetup { processors: "0,1", threads: 2, ..setup.clone() };
    println!(
        "\nidle connections: requests on connections of one worker or on random ones, which were idle, two \
         processors; {} rounds of {} s in turns; ratios to the first build, medians of the rounds",
        plan.rounds, plan.seconds
    );
    let peers: Vec<&Peer> = peers.iter().filter(|peer| matches!(peer, Peer::Keychoir(..))).collect();
    let directory = tempfile::tempdir_in(&plan.directory).unwrap();
    let start = |peer: &&Peer| peer.start(&setup, &directory.path().join(peer.name())).unwrap();
    let started_peers: Vec<StartedPeer> = peers.iter().map(start).collect();
    let mut turns: Vec<Vec<Vec<TurnResults>>> =
        CASES.iter().map(|_| peers.iter().map(|_| Vec::new()).collect()).collect();
    for round in 0..plan.rounds {
        current_thread_runtime().block_on(async {
            let mut prepared_loads = Vec::new();
            for case in &CASES {
                for started_peer in &started_peers {
                    prepared_loads.push(
                        PreparedLoad::open(&setup.target(Some(started_peer)), started_peer, case, round)
                            .await,
                    );
                }
            }
            tokio::time::sleep(IDLE_TIME).await;
            let mut prepared_loads = prepared_loads.into_iter();
            for (case, turns) in CASES.iter().zip(&mut turns) {
                let mut loads: Vec<Option<PreparedLoad>> =
                    prepared_loads.by_ref().take(peers.len()).map(Some).collect();
                for turn in 0..peers.len() {
                    let index = (round + turn) % peers.len();
                    let load = loads[index].take().unwrap();
                    turns[index].push(load.take_turn(plan, &setup, &started_peers[index], case).await);
                    setup.upstream.assert_requests_were_valid(peers[index].name());
                }
            }
        });
    }
    for (case, turns) in CASES.iter().zip(&turns) {
        print_case(case, &peers, turns);
    }
}

fn print_case(case: &IdleLoadCase, peers: &[&Peer], turns: &[Vec<TurnResults>]) {
    println!(
        "\n{:<28}{:>12}{:>10}{:>10}{:>10}{:>8}",
        case.name, "per s", "p50, µs", "p99, µs", "CPU, µs", "lesser"
    );
    for (peer, peer_turns) in peers.iter().zip(turns) {
        let median_of = |field: fn(&TurnResults) -> f64| median(peer_turns.iter().map(field));
        println!(
            "  {:<26}{:>12.0}{:>10.0}{:>10.0}{:>10.1}{:>7.0}%",
            peer.name(),
            median_of(|turn| turn.throughput),
            median_of(|turn| turn.p50),
            median_of(|turn| turn.p99),
            median_of(|turn| turn.cost),
            median_of(|turn| turn.lesser_share * 1e2)
        );
    }
    for (peer, peer_turns) in peers.iter().zip(turns).skip(1) {
        let ratio = |field: fn(&TurnResults) -> f64| {
            let pairs = peer_turns.iter().zip(&turns[0]);
            let ratios: Vec<f64> = pairs.map(|(turn, first)| field(turn) / field(first)).collect();
            format_median_and_range(ratios.into_iter(), 2)
        };
        println!(
            "  {}: throughput {}, p50 {}, p99 {}, CPU {}",
            peer.name(),
            ratio(|turn| turn.throughput),
            ratio(|turn| turn.p50),
            ratio(|turn| turn.p99),
            ratio(|turn| turn.cost)
        );
    }
}

/// Connections that become busy in the next turn. The other connections stay idle.
struct PreparedLoad {
    load: LoadGenerator,
    streams: LoadGenerator,
    _idle_connections: LoadGenerator,
}

impl PreparedLoad {
    /// Opens the connections of a case, and chooses those that become busy.
    async fn open(target: &Target, started_peer: &StartedPeer, case: &IdleLoadCase, round: usize) -> Self {
        let busy_count = case.connections + case.streams.1;
        let (mut idle_connections, workers) =
            open_connections(target, started_peer, busy_count * OPEN_PER_BUSY).await;
        let busy_indices = choose_connections(&workers, case.busy_connections, busy_count as usize, round);
        let (streams, load) = busy_indices.split_at(case.streams.1 as usize);
        Self {
            load: idle_connections.take_clients(load),
            streams: idle_connections.take_clients(streams),
            _idle_connections: idle_connections,
        }
    }

    /// Sends the requests and the streams of a case. Returns their results.
    async fn take_turn(
        self,
        plan: &RoundPlan,
        setup: &PeerSetup,
        started_peer: &StartedPeer,
        case: &IdleLoadCase,
    ) -> TurnResults {
        let Self { mut load, mut streams, _idle_connections } = self;
        let (target, (stream_workload, stream_count)) = (setup.target(Some(started_peer)), case.streams);
        let (workload, rate) = case.requests;
        let request_spec = RequestSpec::new(workload, target.key, 0.0);
        // The streams start before the requests and end after them.
        let seconds = if stream_count == 0 { plan.seconds } else { plan.seconds + 0.3 };
        let stream_spec = RequestSpec::new(stream_workload, target.key, seconds);
        let stream_load = async {
            match stream_workload {
                Workload::Paced => {
                    streams.send_once_per_client(&stream_spec, Duration::from_millis(PACED_INTERVAL_MS)).await
                }
                Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
                    streams.send_saturating(&stream_spec, seconds).await
                }
            }
        };
        let request_load = async {
            if stream_count > 0 {
                tokio::time::sleep(Duration::from_millis(150)).await;
            }
            match rate {
                RequestRate::Saturating => load.send_saturating(&request_spec, plan.seconds).await,
                RequestRate::PerSecond(rate) => load.send_at_rate(&request_spec, rate, plan.seconds).await,
            }
        };
        let process = &started_peer.process;
        let (time_before, worker_times_before) = (process.processor_time(), process.worker_times());
        let (stream_results, mut results) = tokio::join!(stream_load, request_load);
        let processor_seconds = process.processor_time().since(&time_before);
        let worker_times = differences(&process.worker_times(), &worker_times_before);
        let (units, elapsed) = if stream_count > 0 && stream_workload == Workload::Stream {
            let bytes = stream_results.requests * stream_spec.response_bytes;
            (bytes as f64 / 1024.0 / 1024.0, stream_results.elapsed)
        } else {
            (results.requests as f64, results.elapsed)
        };
        TurnResults {
            throughput: units / elapsed.as_secs_f64(),
            p50: quantile_micros(&mut results.total_times, 0.5),
            p99: quantile_micros(&mut results.total_times, 0.99),
            cost: processor_seconds * 1e6 / units,
            lesser_share: worker_times.iter().fold(f64::INFINITY, |least, time| least.min(*time))
                / worker_times.iter().sum::<f64>(),
        }
    }
}

fn differences(after: &[f64], before: &[f64]) -> Vec<f64> {
    after.iter().zip(before).map(|(after, before)| after - before).collect()
}

/// Opens connections. Returns them, and the index of the worker of each connection.
async fn open_connections(
    target: &Target,
    started_peer: &StartedPeer,
    count: u32,
) -> (LoadGenerator, Vec<usize>) {
    let request_spec = RequestSpec::new(Workload::Get, target.key, 0.0);
    let mut load = LoadGenerator::open(target, 0, 1).await;
    for _ in 0..count {
        // Each connection sends a request before the next is opened, so that they alternate between the workers.
        let mut client = LoadGenerator::open(target, 1, 1).await;
        client.send_alternating(&request_spec, 1, |_| {}).await;
        load.append(client);
    }
    let (mut workers, mut times_before) = (Vec::new(), started_peer.process.worker_times());
    load.send_alternating(&request_spec, PROBE_REQUESTS, |_| {
        let times_after = started_peer.process.worker_times();
        let times = differences(&times_after, &times_before);
        workers
            .push((0..times.len()).max_by(|first, second| times[*first].total_cmp(&times[*second])).unwrap());
        times_before = times_after;
    })
    .await;
    (load, workers)
}

/// Returns the indices of `count` connections that become busy in `round`.
fn choose_connections(
    workers: &[usize],
    busy_connections: BusyConnections,
    count: usize,
    round: usize,
) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..workers.len()).collect();
    // A Lehmer generator gives the same order of the connections in each run and for each build.
    let mut generator = round as u64 * 7_919 + 1;
    for index in (1..indices.len()).rev() {
        generator = generator * 48_271 % 2_147_483_647;
        indices.swap(index, (generator % (index as u64 + 1)) as usize);
    }
    indices.retain(|index| busy_connections == BusyConnections::Random || workers[*index] == round % 2);
    assert!(
        indices.len() >= count,
        "the worker must have {count} connections: it has {} of {}",
        indices.len(),
        workers.len()
    );
    indices.truncate(count);
    indices
}
