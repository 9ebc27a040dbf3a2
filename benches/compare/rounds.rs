//! Runs the rounds of a comparison, in which each proxy has one turn per round. A turn measures the processor time, the
//! latency and the maximum rate. Each round starts with a different proxy, so that other load on the machine affects
//! all proxies equally. At the end, the requests that the provider received and the proxies logged are counted.

use std::path::PathBuf;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::load::{LoadGenerator, LoadResults, RequestSpec};
use crate::machine::OtherLoad;
use crate::peers::{Peer, PeerSetup, StartedPeer};
use crate::workload::{PACED_INTERVAL_MS, Workload};

/// Seconds of unmeasured load before each turn.
const WARM_UP_SECONDS: f64 = 0.5;

/// The number and the duration of the turns of a comparison, and what is measured in a turn.
#[derive(Clone)]
pub struct RoundPlan {
    /// Seconds per turn.
    pub seconds: f64,
    pub rounds: usize,
    /// Whether each turn also measures the maximum rate.
    pub measures_max_rate: bool,
    /// The directory in which temporary directories are created.
    pub directory: PathBuf,
}

/// A proxy to measure, with its setup and the load that it receives.
pub struct ComparedPeer {
    pub name: String,
    pub peer: Peer,
    pub setup: PeerSetup,
    /// The number of requests per second. It does not apply to paced streams.
    pub rate: u32,
    /// The number of clients, each of which sends one request at a time.
    pub load_clients: u32,
    pub connections_per_client: u32,
}

impl ComparedPeer {
    pub fn new(peer: Peer, setup: PeerSetup, workload: Workload) -> Self {
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

/// The results of a proxy.
#[derive(Debug, Default)]
pub struct PeerResults {
    /// The results of its turns, one per round.
    pub turns: Vec<TurnResults>,
    /// The memory of the proxy after the last round, in MiB.
    pub memory_mib: f64,
}

/// The results of a turn. Times are in µs.
#[derive(Debug)]
pub struct TurnResults {
    /// The processor time of the proxy per request, or per chunk of a paced stream.
    pub cost: f64,
    pub first_byte_p50: f64,
    pub p50: f64,
    pub p99: f64,
    /// The share of the time of all processors that other programs used during the turn.
    pub other_load: f64,
    /// Whether the requests were completed in the planned time, except for a tolerance of five percent and 0.1 s.
    pub has_reached_rate: bool,
    /// The results at the maximum rate, if it was measured.
    pub max_rate: Option<MaxRateResults>,
}

/// The results of a run in which each client sends its next request as soon as it has received a response.
#[derive(Debug)]
pub struct MaxRateResults {
    pub requests_per_second: f64,
    /// The processor time of the proxy per request, in µs.
    pub cost: f64,
    /// The utilization of the proxy's processor, from 0 to 1. If it is well below 1, the proxy was not the bottleneck.
    pub utilization: f64,
}

/// Starts the proxies and runs all rounds of one workload. Returns the results in the order of `compared_peers`.
pub fn measure(plan: &RoundPlan, compared_peers: &[ComparedPeer], workload: Workload) -> Vec<PeerResults> {
    let directory = tempfile::tempdir_in(&plan.directory).unwrap();
    let start = |(index, compared_peer): (usize, &ComparedPeer)| {
        compared_peer
            .peer
            .start(&compared_peer.setup, &directory.path().join(format!("{index}-{}", compared_peer.name)))
    };
    let started_peers: Vec<Option<StartedPeer>> = compared_peers.iter().enumerate().map(start).collect();
    let mut peer_results: Vec<PeerResults> = compared_peers.iter().map(|_| PeerResults::default()).collect();
    let mut request_counts = vec![0; started_peers.len()];
    let upstream = &compared_peers[0].setup.upstream;
    let (runtime, requests_before) = (current_thread_runtime(), upstream.request_count());
    for round in 0..plan.rounds {
        for turn in 0..started_peers.len() {
            let index = (round + turn) % started_peers.len();
            let (turn_results, requests) = runtime.block_on(take_turn(
                plan,
                &compared_peers[index],
                workload,
                started_peers[index].as_ref(),
            ));
            request_counts[index] += requests;
            peer_results[index].turns.push(turn_results);
            upstream.assert_requests_were_valid(&compared_peers[index].name);
        }
    }
    assert_eq!(
        upstream.request_count() - requests_before,
        request_counts.iter().sum::<u64>(),
        "each request must reach the provider exactly once"
    );
    for (index, started_peer) in started_peers.iter().enumerate() {
        if let Some(started_peer) = started_peer {
            peer_results[index].memory_mib = started_peer.process.memory_mib();
            started_peer.assert_requests_are_logged(&compared_peers[index].name, request_counts[index]);
        }
    }
    peer_results
}

pub fn current_thread_runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs one turn of a proxy. Returns its results and the number of requests that were sent.
async fn take_turn(
    plan: &RoundPlan,
    compared_peer: &ComparedPeer,
    workload: Workload,
    started_peer: Option<&StartedPeer>,
) -> (TurnResults, u64) {
    let target = compared_peer.setup.target(started_peer);
    let warm_up_spec = RequestSpec::new(workload, target.key, WARM_UP_SECONDS);
    let request_spec = RequestSpec::new(workload, target.key, plan.seconds);
    let mut load =
        LoadGenerator::open(&target, compared_peer.load_clients, compared_peer.connections_per_client).await;
    // The first request of a connection costs more, so each connection sends at least one request before the
    // measurement.
    let mut requests = match workload {
        Workload::Paced => 0,
        Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
            load.send_once_per_connection(&warm_up_spec).await.requests
        }
    };
    requests += run_load(&mut load, compared_peer, workload, &warm_up_spec, WARM_UP_SECONDS).await.requests;
    let other_load = OtherLoad::start();
    let (mut results, processor_seconds) = measure_processor_time(
        started_peer,
        run_load(&mut load, compared_peer, workload, &request_spec, plan.seconds),
    )
    .await;
    let other_load = other_load.share(processor_seconds);
    drop(load);
    requests += results.requests;
    let mut max_rate = None;
    if let Some(connections) = workload.saturating_connections().filter(|_| plan.measures_max_rate) {
        let mut load = LoadGenerator::open(&target, connections, 1).await;
        requests += load.send_saturating(&request_spec, WARM_UP_SECONDS / 2.0).await.requests;
        let (results, processor_seconds) =
            measure_processor_time(started_peer, load.send_saturating(&request_spec, plan.seconds / 2.0))
                .await;
        requests += results.requests;
        max_rate = Some(MaxRateResults {
            requests_per_second: results.requests as f64 / results.elapsed.as_secs_f64(),
            cost: processor_seconds * 1e6 / results.requests as f64,
            utilization: processor_seconds / results.elapsed.as_secs_f64(),
        });
    }
    let turn_results = TurnResults {
        // `total_times` contains one time per request, or one time per chunk of a paced stream.
        cost: processor_seconds * 1e6 / results.total_times.len() as f64,
        first_byte_p50: quantile_micros(&mut results.first_byte_times, 0.5),
        p50: quantile_micros(&mut results.total_times, 0.5),
        p99: quantile_micros(&mut results.total_times, 0.99),
        other_load,
        has_reached_rate: results.elapsed.as_secs_f64() < plan.seconds * 1.05 + 0.1,
        max_rate,
    };
    (turn_results, requests)
}

/// Awaits `run`. Returns its results and the processor time that the proxy used during the run, in seconds.
async fn measure_processor_time(
    started_peer: Option<&StartedPeer>,
    run: impl Future<Output = LoadResults>,
) -> (LoadResults, f64) {
    let processor_time = || started_peer.map(|started_peer| started_peer.process.processor_time());
    let processor_time_before = processor_time();
    let results = run.await;
    let processor_seconds =
        processor_time().zip(processor_time_before).map_or(0.0, |(after, before)| after.since(&before));
    (results, processor_seconds)
}

/// Sends requests at the rate of `compared_peer` for `seconds`. For a paced workload, sends one request per client.
async fn run_load(
    load: &mut LoadGenerator,
    compared_peer: &ComparedPeer,
    workload: Workload,
    request_spec: &RequestSpec,
    seconds: f64,
) -> LoadResults {
    match workload {
        Workload::Paced => {
            load.send_once_per_client(request_spec, Duration::from_millis(PACED_INTERVAL_MS)).await
        }
        Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
            load.send_at_rate(request_spec, compared_peer.rate, seconds).await
        }
    }
}

/// Sorts times in seconds. Returns their quantile for `fraction`, in µs.
pub fn quantile_micros(seconds: &mut [f64], fraction: f64) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[((seconds.len() as f64 * fraction) as usize).min(seconds.len() - 1)] * 1e6
}
