//! Uneven load on idle connections: clients open connections that are spread evenly over two workers. Then either
//! the connections of one worker or randomly chosen connections become busy. Compares this build of Keychoir with
//! the builds in `BENCH_KEYCHOIR`, in turns in each round. The proxy shares two processors with its clients and
//! its provider.

use std::time::Duration;

use crate::harness::{format_median_and_range, median};
use crate::load::{Load, RequestSpec};
use crate::peers::{Peer, Setup, StartedPeer, Target};
use crate::rounds::{Plan, current_thread_runtime, quantile};
use crate::workload::{PACED_MS, Workload};

/// The number of connections that are opened for each busy one. Each worker has half of them.
const SPREAD: u32 = 3;
/// The number of requests whose processor time identifies the worker of a connection.
const LOOKS: u32 = 3;
/// The time without a request after which a connection has released its buffers.
const REST: Duration = Duration::from_millis(1_600);

/// Each round of the plan is divided into this number of rounds, because many short rounds vary less than a few
/// long ones.
const PARTS: u32 = 8;

/// Which connections become busy.
#[derive(Clone, Copy, PartialEq)]
enum Busy {
    /// The connections of one worker. The next round uses the other worker.
    OneWorkers,
    /// Other connections in each round, of any worker.
    ByChance,
}

/// Requests of one kind, and the connections that send them.
#[derive(Clone, Copy)]
enum Pace {
    /// The next one follows each response.
    Saturating,
    /// This many per second.
    Rate(u32),
}

/// Load on kept connections, beside streams on other ones.
struct Case {
    name: &'static str,
    busy: Busy,
    requests: (Workload, Pace),
    connections: u32,
    streams: (Workload, u32),
}

const CASES: [Case; 7] = [
    case("get, 32 as fast as possible", Busy::OneWorkers, (Workload::Get, Pace::Saturating), 32),
    case("tts, 16 as fast as possible", Busy::OneWorkers, (Workload::Tts, Pace::Saturating), 16),
    case("get, 8 by chance, fast", Busy::ByChance, (Workload::Get, Pace::Saturating), 8),
    case("get, 6,000/s over 32", Busy::OneWorkers, (Workload::Get, Pace::Rate(6_000)), 32),
    case("tts, 3,000/s over 32", Busy::OneWorkers, (Workload::Tts, Pace::Rate(3_000)), 32),
    Case {
        streams: (Workload::Paced, 100),
        ..case("get, 500/s beside 100 paced", Busy::OneWorkers, (Workload::Get, Pace::Rate(500)), 16)
    },
    Case {
        streams: (Workload::Stream, 4),
        ..case("get, 500/s beside 4 fast", Busy::OneWorkers, (Workload::Get, Pace::Rate(500)), 16)
    },
];

const fn case(name: &'static str, busy: Busy, requests: (Workload, Pace), connections: u32) -> Case {
    Case { name, busy, requests, connections, streams: (Workload::Stream, 0) }
}

/// The results. Times of requests in µs.
struct Turn {
    /// Requests per second; MiB per second where fast streams are beside them.
    throughput: f64,
    p50: f64,
    p99: f64,
    /// Processor time of the proxy in µs for each unit of the throughput.
    cost: f64,
    /// The less busy worker's share of the workers' processor time.
    lesser: f64,
}

pub fn measure(plan: &Plan, peers: &[Peer], setup: &Setup) {
    let plan = &Plan {
        seconds: plan.seconds / f64::from(PARTS),
        rounds: plan.rounds * PARTS as usize,
        ..plan.clone()
    };
    let setup = Setup { processors: "0,1", threads: 2, ..setup.clone() };
    println!(
        "\nkept: requests on connections that were kept idle, of one worker or by chance, two \
         processors; {} rounds of {} s in turns; ratios to the first build, medians of the rounds",
        plan.rounds, plan.seconds
    );
    let peers: Vec<&Peer> = peers.iter().filter(|peer| matches!(peer, Peer::Keychoir(..))).collect();
    let folder = tempfile::tempdir_in(&plan.folder).unwrap();
    let start = |peer: &&Peer| peer.start(&setup, &folder.path().join(peer.name())).unwrap();
    let started_peers: Vec<StartedPeer> = peers.iter().map(start).collect();
    let mut turns: Vec<Vec<Vec<Turn>>> =
        CASES.iter().map(|_| peers.iter().map(|_| Vec::new()).collect()).collect();
    for round in 0..plan.rounds {
        current_thread_runtime().block_on(async {
            let mut ready = Vec::new();
            for case in &CASES {
                for started_peer in &started_peers {
                    ready.push(
                        Ready::open(&setup.target(Some(started_peer)), started_peer, case, round).await,
                    );
                }
            }
            tokio::time::sleep(REST).await;
            let mut ready = ready.into_iter();
            for (case, turns) in CASES.iter().zip(&mut turns) {
                let mut ready: Vec<Option<Ready>> = ready.by_ref().take(peers.len()).map(Some).collect();
                for turn in 0..peers.len() {
                    let index = (round + turn) % peers.len();
                    let own = ready[index].take().unwrap();
                    turns[index].push(own.take_turn(plan, &setup, &started_peers[index], case).await);
                    setup.upstream.assert_credentials_were_replaced(peers[index].name());
                }
            }
        });
    }
    for (case, turns) in CASES.iter().zip(&turns) {
        print(case, &peers, turns);
    }
}

fn print(case: &Case, peers: &[&Peer], turns: &[Vec<Turn>]) {
    println!(
        "\n{:<28}{:>12}{:>10}{:>10}{:>10}{:>8}",
        case.name, "per s", "p50, µs", "p99, µs", "CPU, µs", "lesser"
    );
    for (peer, own) in peers.iter().zip(turns) {
        let result = |of: fn(&Turn) -> f64| median(own.iter().map(of));
        println!(
            "  {:<26}{:>12.0}{:>10.0}{:>10.0}{:>10.1}{:>7.0}%",
            peer.name(),
            result(|turn| turn.throughput),
            result(|turn| turn.p50),
            result(|turn| turn.p99),
            result(|turn| turn.cost),
            result(|turn| turn.lesser * 1e2)
        );
    }
    for (peer, own) in peers.iter().zip(turns).skip(1) {
        let ratio = |of: fn(&Turn) -> f64| {
            let ratios: Vec<f64> =
                own.iter().zip(&turns[0]).map(|(own, first)| of(own) / of(first)).collect();
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

/// Connections that are about to become busy, and the idle ones beside them.
struct Ready {
    load: Load,
    streams: Load,
    _idle: Load,
}

impl Ready {
    async fn open(target: &Target, started_peer: &StartedPeer, case: &Case, round: usize) -> Self {
        let busy = case.connections + case.streams.1;
        let (mut idle, workers) = open(target, started_peer, busy * SPREAD).await;
        let chosen = choose(&workers, case.busy, busy as usize, round);
        let (streams, load) = chosen.split_at(case.streams.1 as usize);
        Self { load: idle.part(load), streams: idle.part(streams), _idle: idle }
    }

    async fn take_turn(self, plan: &Plan, setup: &Setup, started_peer: &StartedPeer, case: &Case) -> Turn {
        let Self { mut load, mut streams, _idle } = self;
        let (target, (long, count)) = (setup.target(Some(started_peer)), case.streams);
        let (workload, pace) = case.requests;
        let small = RequestSpec::new(workload, target.key, 0.0);
        // The streams begin before the requests and end after them.
        let seconds = if count == 0 { plan.seconds } else { plan.seconds + 0.3 };
        let stream = RequestSpec::new(long, target.key, seconds);
        let streaming = async {
            match long {
                Workload::Paced => streams.once_each(&stream, Duration::from_millis(PACED_MS)).await,
                Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
                    streams.saturating(&stream, seconds).await
                }
            }
        };
        let asking = async {
            if count > 0 {
                tokio::time::sleep(Duration::from_millis(150)).await;
            }
            match pace {
                Pace::Saturating => load.saturating(&small, plan.seconds).await,
                Pace::Rate(rate) => load.at_rate(&small, rate, plan.seconds).await,
            }
        };
        let (used, by_worker) = (started_peer.running.used(), started_peer.running.workers());
        let (streamed, mut results) = tokio::join!(streaming, asking);
        let used = started_peer.running.used().since(&used);
        let spent: Vec<f64> = started_peer
            .running
            .workers()
            .iter()
            .zip(&by_worker)
            .map(|(after, before)| after - before)
            .collect();
        let (units, time) = if count > 0 && long == Workload::Stream {
            let bytes = streamed.requests * stream.response_bytes;
            (bytes as f64 / 1024.0 / 1024.0, streamed.elapsed)
        } else {
            (results.requests as f64, results.elapsed)
        };
        Turn {
            throughput: units / time.as_secs_f64(),
            p50: quantile(&mut results.total_times, 0.5),
            p99: quantile(&mut results.total_times, 0.99),
            cost: used * 1e6 / units,
            lesser: spent.iter().fold(f64::INFINITY, |least, own| least.min(*own))
                / spent.iter().sum::<f64>(),
        }
    }
}

/// Connections with the worker of each.
async fn open(target: &Target, started_peer: &StartedPeer, count: u32) -> (Load, Vec<usize>) {
    let small = RequestSpec::new(Workload::Get, target.key, 0.0);
    let mut load = Load::open(target, 0, 1).await;
    for _ in 0..count {
        // Each connection sends a request before the next is opened, so that they alternate between the workers.
        let mut one = Load::open(target, 1, 1).await;
        one.in_turns(&small, 1, |_| {}).await;
        load.join(one);
    }
    let (mut workers, mut before) = (Vec::new(), started_peer.running.workers());
    load.in_turns(&small, LOOKS, |_| {
        let after = started_peer.running.workers();
        let spent: Vec<f64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
        workers.push((0..spent.len()).max_by(|a, b| spent[*a].total_cmp(&spent[*b])).unwrap());
        before = after;
    })
    .await;
    (load, workers)
}

/// Returns the indices of `count` connections that become busy in this round.
fn choose(workers: &[usize], busy: Busy, count: usize, round: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..workers.len()).collect();
    // A Lehmer generator gives the same order in each run and for each build.
    let mut state = round as u64 * 7_919 + 1;
    for index in (1..order.len()).rev() {
        state = state * 48_271 % 2_147_483_647;
        order.swap(index, (state % (index as u64 + 1)) as usize);
    }
    order.retain(|index| busy == Busy::ByChance || workers[*index] == round % 2);
    assert!(order.len() >= count, "a worker has {} of {} connections", order.len(), workers.len());
    order.truncate(count);
    order
}
