//! Measures the latency of small requests while long streams run on other connections (`uneven` on the command line),
//! and the throughput of the streams. Each proxy uses two processors. Its clients and the provider use the second one.

use std::time::Duration;

use crate::harness::median;
use crate::load::{LoadGenerator, RequestSpec};
use crate::peers::{Peer, PeerSetup, StartedPeer};
use crate::rounds::{RoundPlan, current_thread_runtime, quantile_micros};
use crate::workload::{PACED_INTERVAL_MS, Workload};

/// Small requests per second.
const RATE: u32 = 500;
const LOAD_CLIENTS: u32 = 16;

/// The streams that run on other connections during the requests.
#[derive(Clone, Copy)]
enum BackgroundLoad {
    Nothing,
    /// A number of paced streams.
    Paced(u32),
    /// A number of connections that each send the next stream request after each response.
    Fast(u32),
}

impl BackgroundLoad {
    const ALL: [Self; 4] = [Self::Nothing, Self::Paced(200), Self::Fast(2), Self::Fast(16)];

    fn name(self) -> String {
        match self {
            Self::Nothing => "nothing".to_owned(),
            Self::Paced(count) => format!("{count} paced"),
            Self::Fast(count) => format!("{count} fast"),
        }
    }
}

/// The results of a turn, in which one proxy is measured once. Times of small requests are in µs.
struct TurnResults {
    p50: f64,
    p99: f64,
    max: f64,
    /// The throughput of the streams in MiB per second.
    stream_throughput: f64,
}

/// Measures all proxies with each background load, and prints a table.
pub fn measure(plan: &RoundPlan, peers: &[Peer], setup: &PeerSetup) {
    let setup = PeerSetup { processors: "0,1", threads: 2, ..setup.clone() };
    println!(
        "\nuneven: get, {RATE} requests/s over {LOAD_CLIENTS} connections beside long streams, two processors; \
         {} rounds of {} s in turns",
        plan.rounds, plan.seconds
    );
    println!(
        "{:<18}{:<12}{:>12}{:>12}{:>12}{:>14}",
        "", "beside", "p50, µs", "p99, µs", "most, µs", "streams MiB/s"
    );
    let directory = tempfile::tempdir_in(&plan.directory).unwrap();
    let started_peers: Vec<Option<StartedPeer>> =
        peers.iter().map(|peer| peer.start(&setup, &directory.path().join(peer.name()))).collect();
    for background_load in BackgroundLoad::ALL {
        let mut turns: Vec<Vec<TurnResults>> = peers.iter().map(|_| Vec::new()).collect();
        for round in 0..plan.rounds {
            for turn in 0..peers.len() {
                let index = (round + turn) % peers.len();
                let turn = take_turn(plan, &setup, started_peers[index].as_ref(), background_load);
                turns[index].push(current_thread_runtime().block_on(turn));
                setup.upstream.assert_requests_were_valid(peers[index].name());
            }
        }
        for (peer, turns) in peers.iter().zip(&turns) {
            let median_of = |field: fn(&TurnResults) -> f64| median(turns.iter().map(field));
            println!(
                "{:<18}{:<12}{:>12.0}{:>12.0}{:>12.0}{:>14.1}",
                peer.name(),
                background_load.name(),
                median_of(|turn| turn.p50),
                median_of(|turn| turn.p99),
                median_of(|turn| turn.max),
                median_of(|turn| turn.stream_throughput)
            );
        }
    }
}

/// Sends small requests during the background load. Returns their results.
async fn take_turn(
    plan: &RoundPlan,
    setup: &PeerSetup,
    started_peer: Option<&StartedPeer>,
    background_load: BackgroundLoad,
) -> TurnResults {
    let target = setup.target(started_peer);
    // The streams start before the small requests and end after them.
    let seconds = plan.seconds + 0.5;
    let (workload, count) = match background_load {
        BackgroundLoad::Nothing | BackgroundLoad::Paced(0) | BackgroundLoad::Fast(0) => (Workload::Stream, 0),
        BackgroundLoad::Paced(count) => (Workload::Paced, count),
        BackgroundLoad::Fast(count) => (Workload::Stream, count),
    };
    let stream_spec = RequestSpec::new(workload, target.key, seconds);
    let mut streams = LoadGenerator::open(&target, count, 1).await;
    let stream_load = async {
        match workload {
            Workload::Paced => {
                streams.send_once_per_client(&stream_spec, Duration::from_millis(PACED_INTERVAL_MS)).await
            }
            Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
                streams.send_saturating(&stream_spec, seconds).await
            }
        }
    };
    let request_spec = RequestSpec::new(Workload::Get, target.key, 0.0);
    let request_load = async {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let mut load = LoadGenerator::open(&target, LOAD_CLIENTS, 1).await;
        load.send_at_rate(&request_spec, RATE, plan.seconds).await
    };
    let (stream_results, mut results) = tokio::join!(stream_load, request_load);
    let bytes = stream_results.requests * stream_spec.response_bytes;
    TurnResults {
        p50: quantile_micros(&mut results.total_times, 0.5),
        p99: quantile_micros(&mut results.total_times, 0.99),
        max: quantile_micros(&mut results.total_times, 1.0),
        stream_throughput: bytes as f64 / 1024.0 / 1024.0 / seconds,
    }
}
