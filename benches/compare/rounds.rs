//! The order of a measurement: in every round each peer has its turn once, and another one begins, so
//! that whatever else the machine does meets all of them alike.

use std::path::PathBuf;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::load::{Asked, Heard, Load};
use crate::peers::{House, Peer, Scene};
use crate::upstream::Upstream;
use crate::workload::{KEY, PACED_MS, TOKEN, Workload};

/// Seconds before each turn that are not measured.
const WARM_SECONDS: f64 = 0.5;

pub struct Plan {
    pub peers: Vec<Peer>,
    pub seconds: f64,
    pub rounds: usize,
    pub upstream: Upstream,
    pub folder: PathBuf,
}

/// What a peer has shown, one of each a round.
#[derive(Debug, Default)]
pub struct Measured {
    pub turns: Vec<Turn>,
    /// MiB, when all was over.
    pub memory: f64,
}

/// Times in µs.
#[derive(Debug)]
pub struct Turn {
    /// Processor time of a request; of a piece, where streams are paced.
    pub cost: f64,
    pub first_p50: f64,
    pub p50: f64,
    pub p99: f64,
    /// Whether the rate could be driven.
    pub is_on_time: bool,
    pub most: Option<Most>,
}

/// As many as go through.
#[derive(Debug)]
pub struct Most {
    /// Requests a second.
    pub rate: f64,
    pub cost: f64,
    /// The part of its processor that it had: where that is well below 1, something else was the bound.
    pub busy: f64,
}

/// All rounds of one workload, with fresh proxies.
pub fn measure(plan: &Plan, workload: Workload) -> Vec<Measured> {
    let folder = tempfile::tempdir_in(&plan.folder).unwrap();
    let scene = Scene { upstream: plan.upstream.address, processors: "0".to_owned(), threads: 1 };
    let houses: Vec<Option<House>> =
        plan.peers.iter().map(|peer| peer.start(&scene, &folder.path().join(peer.name()))).collect();
    let mut measured: Vec<Measured> = plan.peers.iter().map(|_| Measured::default()).collect();
    let runtime = here();
    let seen = plan.upstream.requests();
    let mut asked = vec![0; houses.len()];
    for round in 0..plan.rounds {
        for turn in 0..houses.len() {
            let place = (round + turn) % houses.len();
            let (turn, requests) = runtime.block_on(take_turn(plan, workload, houses[place].as_ref()));
            asked[place] += requests;
            measured[place].turns.push(turn);
            plan.upstream.was_respected(plan.peers[place].name());
        }
    }
    assert_eq!(plan.upstream.requests() - seen, asked.iter().sum::<u64>(), "each request was sent on once");
    for ((house, measured), (peer, asked)) in
        houses.iter().zip(&mut measured).zip(plan.peers.iter().zip(asked))
    {
        if let Some(house) = house {
            measured.memory = house.running.memory();
            house.has_logged(peer.name(), asked);
        }
    }
    measured
}

pub fn here() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// One turn of a peer, and how many requests that were.
async fn take_turn(plan: &Plan, workload: Workload, house: Option<&House>) -> (Turn, u64) {
    let address = house.map_or(plan.upstream.address, |house| house.address);
    // With nobody in between, the client must know the key.
    let key = if house.is_some() { TOKEN } else { KEY };
    let asked = |seconds: f64| Asked {
        request: workload.request(key, seconds),
        answer_bytes: workload.answer_bytes(seconds),
        is_stamped: workload == Workload::Paced,
    };
    let mut load = Load::open(address, None, workload.connections()).await;
    let warm = drive(&mut load, workload, &asked(WARM_SECONDS), WARM_SECONDS).await;
    let asked = asked(plan.seconds);
    let before = house.map(|house| house.running.used());
    let mut heard = drive(&mut load, workload, &asked, plan.seconds).await;
    let used = house.map(|house| house.running.used());
    let seconds = used.zip(before).map_or(0.0, |(after, before)| after.since(&before));
    drop(load);
    let mut requests = warm.requests + heard.requests;
    let mut most = None;
    if let Some(connections) = workload.saturating() {
        let mut load = Load::open(address, None, connections).await;
        let warm = load.saturating(&asked, WARM_SECONDS / 2.0).await;
        let before = house.map(|house| house.running.used());
        let heard = load.saturating(&asked, plan.seconds / 2.0).await;
        let used = house.map(|house| house.running.used());
        let seconds = used.zip(before).map_or(0.0, |(after, before)| after.since(&before));
        requests += warm.requests + heard.requests;
        most = Some(Most {
            rate: heard.requests as f64 / heard.took.as_secs_f64(),
            cost: seconds * 1e6 / heard.requests as f64,
            busy: seconds / heard.took.as_secs_f64(),
        });
    }
    let turn = Turn {
        // Where streams are paced, each piece has a time of its own.
        cost: seconds * 1e6 / heard.whole.len() as f64,
        first_p50: quantile(&mut heard.first, 0.5),
        p50: quantile(&mut heard.whole, 0.5),
        p99: quantile(&mut heard.whole, 0.99),
        is_on_time: heard.took.as_secs_f64() < plan.seconds * 1.05 + 0.1,
        most,
    };
    (turn, requests)
}

async fn drive(load: &mut Load, workload: Workload, asked: &Asked, seconds: f64) -> Heard {
    match workload {
        Workload::Paced => load.once_each(asked, Duration::from_millis(PACED_MS)).await,
        Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
            load.at_rate(asked, workload.rate(), seconds).await
        }
    }
}

/// In µs, of seconds.
pub fn quantile(seconds: &mut [f64], part: f64) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[((seconds.len() as f64 * part) as usize).min(seconds.len() - 1)] * 1e6
}
