//! The rounds of a comparison. In each round every proxy has one turn, and the first turn rotates, so that other
//! load on the machine affects all proxies equally.

use std::path::PathBuf;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::load::{Load, LoadResults, RequestSpec};
use crate::machine::OtherLoad;
use crate::peers::{Peer, Setup, StartedPeer};
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
    pub setup: Setup,
    pub rate: u32,
    /// The number of clients, and of connections of each.
    pub load_clients: u32,
    pub connections_per_client: u32,
}

impl Entry {
    pub fn new(peer: Peer, setup: Setup, workload: Workload) -> Self {
        Self {
            name: peer.name().to_owned(),
            peer,
            setup,
            rate: workload.rate(),
            load_clients: workload.connections(),
            connections_per_client: 1,
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
    pub most: Option<Saturation>,
}

/// The maximum throughput.
#[derive(Debug)]
pub struct Saturation {
    /// Requests per second.
    pub rate: f64,
    pub cost: f64,
    /// The utilization of the processor of the proxy. If it is well below 1, the proxy was not the bottleneck.
    pub busy: f64,
}

/// All rounds of one workload, with newly started proxies.
pub fn measure(plan: &Plan, entries: &[Entry], workload: Workload) -> Vec<Measured> {
    let folder = tempfile::tempdir_in(&plan.folder).unwrap();
    let start = |(index, entry): (usize, &Entry)| {
        entry.peer.start(&entry.setup, &folder.path().join(format!("{index}-{}", entry.name)))
    };
    let started_peers: Vec<Option<StartedPeer>> = entries.iter().enumerate().map(start).collect();
    let mut measured: Vec<Measured> = entries.iter().map(|_| Measured::default()).collect();
    let mut request_spec = vec![0; started_peers.len()];
    let upstream = &entries[0].setup.upstream;
    let (runtime, counters) = (current_thread_runtime(), upstream.requests());
    for round in 0..plan.rounds {
        for turn in 0..started_peers.len() {
            let index = (round + turn) % started_peers.len();
            let turn = take_turn(plan, &entries[index], workload, started_peers[index].as_ref());
            let (turn, requests) = runtime.block_on(turn);
            request_spec[index] += requests;
            measured[index].turns.push(turn);
            upstream.assert_credentials_were_replaced(&entries[index].name);
        }
    }
    assert_eq!(
        upstream.requests() - counters,
        request_spec.iter().sum::<u64>(),
        "each request is forwarded exactly once"
    );
    for (index, started_peer) in started_peers.iter().enumerate() {
        if let Some(started_peer) = started_peer {
            measured[index].memory = started_peer.running.memory();
            started_peer.assert_requests_are_logged(&entries[index].name, request_spec[index]);
        }
    }
    measured
}

pub fn current_thread_runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// One turn of a proxy; returns its results and the number of requests.
async fn take_turn(
    plan: &Plan,
    entry: &Entry,
    workload: Workload,
    started_peer: Option<&StartedPeer>,
) -> (Turn, u64) {
    let target = entry.setup.target(started_peer);
    let request_spec = |seconds: f64| RequestSpec::new(workload, target.key, seconds);
    let mut load = Load::open(&target, entry.load_clients, entry.connections_per_client).await;
    // At least one request per connection: the first one of a connection costs more.
    let mut requests = match workload {
        Workload::Paced => 0,
        Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
            load.once_per_connection(&request_spec(WARM_SECONDS)).await.requests
        }
    };
    requests += drive(&mut load, entry, workload, &request_spec(WARM_SECONDS), WARM_SECONDS).await.requests;
    let request_spec = request_spec(plan.seconds);
    let others = OtherLoad::start();
    let (mut results, seconds) =
        costing(started_peer, drive(&mut load, entry, workload, &request_spec, plan.seconds)).await;
    let others = others.share(seconds);
    drop(load);
    requests += results.requests;
    let mut most = None;
    if let Some(connections) = workload.saturating().filter(|_| plan.is_saturated) {
        let mut load = Load::open(&target, connections, 1).await;
        requests += load.saturating(&request_spec, WARM_SECONDS / 2.0).await.requests;
        let (results, seconds) =
            costing(started_peer, load.saturating(&request_spec, plan.seconds / 2.0)).await;
        requests += results.requests;
        most = Some(Saturation {
            rate: results.requests as f64 / results.elapsed.as_secs_f64(),
            cost: seconds * 1e6 / results.requests as f64,
            busy: seconds / results.elapsed.as_secs_f64(),
        });
    }
    let turn = Turn {
        // Paced streams record a time per chunk.
        cost: seconds * 1e6 / results.total_times.len() as f64,
        first_p50: quantile(&mut results.first_byte_times, 0.5),
        p50: quantile(&mut results.total_times, 0.5),
        p99: quantile(&mut results.total_times, 0.99),
        others,
        is_on_time: results.elapsed.as_secs_f64() < plan.seconds * 1.05 + 0.1,
        most,
    };
    (turn, requests)
}

/// The responses of a run, and the processor time of the proxy in seconds.
async fn costing(
    started_peer: Option<&StartedPeer>,
    driving: impl Future<Output = LoadResults>,
) -> (LoadResults, f64) {
    let used = || started_peer.map(|started_peer| started_peer.running.used());
    let before = used();
    let results = driving.await;
    let seconds = used().zip(before).map_or(0.0, |(after, before)| after.since(&before));
    (results, seconds)
}

async fn drive(
    load: &mut Load,
    entry: &Entry,
    workload: Workload,
    request_spec: &RequestSpec,
    seconds: f64,
) -> LoadResults {
    match workload {
        Workload::Paced => load.once_each(request_spec, Duration::from_millis(PACED_MS)).await,
        Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
            load.at_rate(request_spec, entry.rate, seconds).await
        }
    }
}

/// A quantile, converted from seconds to µs.
pub fn quantile(seconds: &mut [f64], part: f64) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[((seconds.len() as f64 * part) as usize).min(seconds.len() - 1)] * 1e6
}
