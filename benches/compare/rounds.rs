//! The order of a measurement: in every round each proxy has one turn, and another one begins, so
//! that other load on the machine affects all of them alike.

use std::path::PathBuf;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::load::{Asked, Heard, Load};
use crate::machine::Others;
use crate::peers::{House, Peer, Scene};
use crate::workload::{PACED_MS, Workload};

/// Unmeasured seconds before each turn.
const WARM_SECONDS: f64 = 0.5;

#[derive(Clone)]
pub struct Plan {
    pub seconds: f64,
    pub rounds: usize,
    /// Whether the maximum throughput is measured as well.
    pub is_saturated: bool,
    pub folder: PathBuf,
}

/// A proxy of the comparison.
pub struct Entry {
    pub name: String,
    pub peer: Peer,
    pub scene: Scene,
    pub rate: u32,
    /// The number of clients, and of connections of each.
    pub askers: u32,
    pub connections_each: u32,
}

impl Entry {
    pub fn new(peer: Peer, scene: Scene, workload: Workload) -> Self {
        Self {
            name: peer.name().to_owned(),
            peer,
            scene,
            rate: workload.rate(),
            askers: workload.connections(),
            connections_each: 1,
        }
    }
}

/// The results of a proxy, one per round.
#[derive(Debug, Default)]
pub struct Measured {
    pub turns: Vec<Turn>,
    /// Memory in MiB at the end.
    pub memory: f64,
}

/// The results of a turn. Times in µs.
#[derive(Debug)]
pub struct Turn {
    /// Processor time per request; per piece for paced streams.
    pub cost: f64,
    pub first_p50: f64,
    pub p50: f64,
    pub p99: f64,
    /// The share of the machine that other programs used meanwhile.
    pub others: f64,
    /// Whether the rate was reached.
    pub is_on_time: bool,
    pub most: Option<Most>,
}

/// The maximum throughput.
#[derive(Debug)]
pub struct Most {
    /// Requests per second.
    pub rate: f64,
    pub cost: f64,
    /// The utilization of its processor: well below 1, something else was the bottleneck.
    pub busy: f64,
}

/// All rounds of one workload, with newly started proxies.
pub fn measure(plan: &Plan, entries: &[Entry], workload: Workload) -> Vec<Measured> {
    let folder = tempfile::tempdir_in(&plan.folder).unwrap();
    let start = |(place, entry): (usize, &Entry)| {
        entry.peer.start(&entry.scene, &folder.path().join(format!("{place}-{}", entry.name)))
    };
    let houses: Vec<Option<House>> = entries.iter().enumerate().map(start).collect();
    let mut measured: Vec<Measured> = entries.iter().map(|_| Measured::default()).collect();
    let mut asked = vec![0; houses.len()];
    let upstream = &entries[0].scene.upstream;
    let (runtime, seen) = (here(), upstream.requests());
    for round in 0..plan.rounds {
        for turn in 0..houses.len() {
            let place = (round + turn) % houses.len();
            let turn = take_turn(plan, &entries[place], workload, houses[place].as_ref());
            let (turn, requests) = runtime.block_on(turn);
            asked[place] += requests;
            measured[place].turns.push(turn);
            upstream.was_respected(&entries[place].name);
        }
    }
    assert_eq!(upstream.requests() - seen, asked.iter().sum::<u64>(), "each request was sent on once");
    for (place, house) in houses.iter().enumerate() {
        if let Some(house) = house {
            measured[place].memory = house.running.memory();
            house.has_logged(&entries[place].name, asked[place]);
        }
    }
    measured
}

pub fn here() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// One turn of a proxy; returns its results and the number of requests.
async fn take_turn(plan: &Plan, entry: &Entry, workload: Workload, house: Option<&House>) -> (Turn, u64) {
    let front = entry.scene.front(house);
    let asked = |seconds: f64| Asked::new(workload, front.key, seconds);
    let mut load = Load::open(&front, entry.askers, entry.connections_each).await;
    // At least one request per connection: the first one of a connection costs more.
    let mut requests = match workload {
        Workload::Paced => 0,
        Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
            load.everywhere(&asked(WARM_SECONDS)).await.requests
        }
    };
    requests += drive(&mut load, entry, workload, &asked(WARM_SECONDS), WARM_SECONDS).await.requests;
    let asked = asked(plan.seconds);
    let others = Others::look();
    let (mut heard, seconds) = costing(house, drive(&mut load, entry, workload, &asked, plan.seconds)).await;
    let others = others.share(seconds);
    drop(load);
    requests += heard.requests;
    let mut most = None;
    if let Some(connections) = workload.saturating().filter(|_| plan.is_saturated) {
        let mut load = Load::open(&front, connections, 1).await;
        requests += load.saturating(&asked, WARM_SECONDS / 2.0).await.requests;
        let (heard, seconds) = costing(house, load.saturating(&asked, plan.seconds / 2.0)).await;
        requests += heard.requests;
        most = Some(Most {
            rate: heard.requests as f64 / heard.took.as_secs_f64(),
            cost: seconds * 1e6 / heard.requests as f64,
            busy: seconds / heard.took.as_secs_f64(),
        });
    }
    let turn = Turn {
        // For paced streams, each piece has a time of its own.
        cost: seconds * 1e6 / heard.whole.len() as f64,
        first_p50: quantile(&mut heard.first, 0.5),
        p50: quantile(&mut heard.whole, 0.5),
        p99: quantile(&mut heard.whole, 0.99),
        others,
        is_on_time: heard.took.as_secs_f64() < plan.seconds * 1.05 + 0.1,
        most,
    };
    (turn, requests)
}

/// The responses of a run, and the processor time of the proxy in seconds.
async fn costing(house: Option<&House>, driving: impl Future<Output = Heard>) -> (Heard, f64) {
    let used = || house.map(|house| house.running.used());
    let before = used();
    let heard = driving.await;
    let seconds = used().zip(before).map_or(0.0, |(after, before)| after.since(&before));
    (heard, seconds)
}

async fn drive(load: &mut Load, entry: &Entry, workload: Workload, asked: &Asked, seconds: f64) -> Heard {
    match workload {
        Workload::Paced => load.once_each(asked, Duration::from_millis(PACED_MS)).await,
        Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
            load.at_rate(asked, entry.rate, seconds).await
        }
    }
}

/// A quantile, converted from seconds to µs.
pub fn quantile(seconds: &mut [f64], part: f64) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[((seconds.len() as f64 * part) as usize).min(seconds.len() - 1)] * 1e6
}
