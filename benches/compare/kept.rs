//! Load that is uneven on purpose: clients open connections evenly over two workers and keep them
//! idle; then only connections of one worker become busy, or a few of all by chance. Compares the
//! builds of Keychoir that `BENCH_KEYCHOIR` names with this one, in turns in every round. Two
//! processors, which the proxy shares with both ends.

use std::time::Duration;

use crate::house::{middle, spread};
use crate::load::{Asked, Load};
use crate::peers::{Front, House, Peer, Scene};
use crate::rounds::{Plan, here, quantile};
use crate::workload::{PACED_MS, Workload};

/// Connections that are opened for each busy one, of which each worker has a half.
const SPREAD: u32 = 3;
/// Requests by which the processor time shows a connection's worker.
const LOOKS: u32 = 3;
/// After that long without a request, a connection has released its buffers.
const REST: Duration = Duration::from_millis(1_600);

/// The chance of many short rounds is less than that of a few long ones: each round of the plan is
/// divided into this many.
const PARTS: u32 = 8;

/// Which connections become busy.
#[derive(Clone, Copy, PartialEq)]
enum Busy {
    /// Those of one worker; of the other one in the next round.
    OneWorkers,
    /// Others in every round, whatever worker they have.
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

pub fn measure(plan: &Plan, peers: &[Peer], scene: &Scene) {
    let plan = &Plan {
        seconds: plan.seconds / f64::from(PARTS),
        rounds: plan.rounds * PARTS as usize,
        ..plan.clone()
    };
    let scene = Scene { processors: "0,1", threads: 2, ..scene.clone() };
    println!(
        "\nkept: requests on connections that were kept idle, of one worker or by chance, two \
         processors; {} rounds of {} s in turns; ratios to the first build, medians of the rounds",
        plan.rounds, plan.seconds
    );
    let peers: Vec<&Peer> = peers.iter().filter(|peer| matches!(peer, Peer::Keychoir(..))).collect();
    let folder = tempfile::tempdir_in(&plan.folder).unwrap();
    let start = |peer: &&Peer| peer.start(&scene, &folder.path().join(peer.name())).unwrap();
    let houses: Vec<House> = peers.iter().map(start).collect();
    let mut turns: Vec<Vec<Vec<Turn>>> =
        CASES.iter().map(|_| peers.iter().map(|_| Vec::new()).collect()).collect();
    for round in 0..plan.rounds {
        here().block_on(async {
            let mut ready = Vec::new();
            for case in &CASES {
                for house in &houses {
                    ready.push(Ready::open(&scene.front(Some(house)), house, case, round).await);
                }
            }
            tokio::time::sleep(REST).await;
            let mut ready = ready.into_iter();
            for (case, turns) in CASES.iter().zip(&mut turns) {
                let mut ready: Vec<Option<Ready>> = ready.by_ref().take(peers.len()).map(Some).collect();
                for turn in 0..peers.len() {
                    let place = (round + turn) % peers.len();
                    let own = ready[place].take().unwrap();
                    turns[place].push(own.take_turn(plan, &scene, &houses[place], case).await);
                    scene.upstream.was_respected(peers[place].name());
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
        let result = |of: fn(&Turn) -> f64| middle(own.iter().map(of));
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
            spread(ratios.into_iter(), 2)
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
    async fn open(front: &Front, house: &House, case: &Case, round: usize) -> Self {
        let busy = case.connections + case.streams.1;
        let (mut idle, workers) = open(front, house, busy * SPREAD).await;
        let chosen = choose(&workers, case.busy, busy as usize, round);
        let (streams, load) = chosen.split_at(case.streams.1 as usize);
        Self { load: idle.part(load), streams: idle.part(streams), _idle: idle }
    }

    async fn take_turn(self, plan: &Plan, scene: &Scene, house: &House, case: &Case) -> Turn {
        let Self { mut load, mut streams, _idle } = self;
        let (front, (long, count)) = (scene.front(Some(house)), case.streams);
        let (workload, pace) = case.requests;
        let small = Asked::new(workload, front.key, 0.0);
        // The streams begin before the requests and end after them.
        let seconds = if count == 0 { plan.seconds } else { plan.seconds + 0.3 };
        let stream = Asked::new(long, front.key, seconds);
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
        let (used, by_worker) = (house.running.used(), house.running.workers());
        let (streamed, mut heard) = tokio::join!(streaming, asking);
        let used = house.running.used().since(&used);
        let spent: Vec<f64> =
            house.running.workers().iter().zip(&by_worker).map(|(after, before)| after - before).collect();
        let (units, time) = if count > 0 && long == Workload::Stream {
            let bytes = streamed.requests * stream.answer_bytes;
            (bytes as f64 / 1024.0 / 1024.0, streamed.took)
        } else {
            (heard.requests as f64, heard.took)
        };
        Turn {
            throughput: units / time.as_secs_f64(),
            p50: quantile(&mut heard.whole, 0.5),
            p99: quantile(&mut heard.whole, 0.99),
            cost: used * 1e6 / units,
            lesser: spent.iter().fold(f64::INFINITY, |least, own| least.min(*own))
                / spent.iter().sum::<f64>(),
        }
    }
}

/// Connections with the worker of each.
async fn open(front: &Front, house: &House, count: u32) -> (Load, Vec<usize>) {
    let small = Asked::new(Workload::Get, front.key, 0.0);
    let mut load = Load::open(front, 0, 1).await;
    for _ in 0..count {
        // Each has sent a request before the next one comes, so they take turns among the workers.
        let mut one = Load::open(front, 1, 1).await;
        one.in_turns(&small, 1, |_| {}).await;
        load.join(one);
    }
    let (mut workers, mut before) = (Vec::new(), house.running.workers());
    load.in_turns(&small, LOOKS, |_| {
        let after = house.running.workers();
        let spent: Vec<f64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
        workers.push((0..spent.len()).max_by(|a, b| spent[*a].total_cmp(&spent[*b])).unwrap());
        before = after;
    })
    .await;
    (load, workers)
}

/// The places of `count` connections that become busy in this round.
fn choose(workers: &[usize], busy: Busy, count: usize, round: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..workers.len()).collect();
    // The same order in every run and for every build: a generator of Lehmer's.
    let mut state = round as u64 * 7_919 + 1;
    for place in (1..order.len()).rev() {
        state = state * 48_271 % 2_147_483_647;
        order.swap(place, (state % (place as u64 + 1)) as usize);
    }
    order.retain(|place| busy == Busy::ByChance || workers[*place] == round % 2);
    assert!(order.len() >= count, "a worker has {} of {} connections", order.len(), workers.len());
    order.truncate(count);
    order
}
