//! Whether small requests starve: long streams begin first, and then small requests come on other
//! connections. Two processors, which the proxy shares with both ends.

use std::time::Duration;

use crate::house::middle;
use crate::load::{Asked, Load};
use crate::peers::{House, Peer, Scene};
use crate::rounds::{Plan, here, quantile};
use crate::workload::{PACED_MS, Workload};

const RATE: u32 = 500;
const ASKERS: u32 = 16;

/// The concurrent load.
#[derive(Clone, Copy)]
enum Beside {
    Nothing,
    /// A number of streams in real time.
    Paced(u32),
    /// A number of streams as fast as possible, in sequence.
    Fast(u32),
}

impl Beside {
    const ALL: [Self; 4] = [Self::Nothing, Self::Paced(200), Self::Fast(2), Self::Fast(16)];

    fn name(self) -> String {
        match self {
            Self::Nothing => "nothing".to_owned(),
            Self::Paced(count) => format!("{count} paced"),
            Self::Fast(count) => format!("{count} fast"),
        }
    }
}

/// The results. Times of small requests in µs.
struct Turn {
    p50: f64,
    p99: f64,
    most: f64,
    /// The throughput of the streams in MiB per second.
    streamed: f64,
}

pub fn measure(plan: &Plan, peers: &[Peer], scene: &Scene) {
    let scene = Scene { processors: "0,1", threads: 2, ..scene.clone() };
    println!(
        "\nuneven: get, {RATE} requests/s over {ASKERS} connections beside long streams, two processors; \
         {} rounds of {} s in turns",
        plan.rounds, plan.seconds
    );
    println!(
        "{:<18}{:<12}{:>12}{:>12}{:>12}{:>14}",
        "", "beside", "p50, µs", "p99, µs", "most, µs", "streams MiB/s"
    );
    let folder = tempfile::tempdir_in(&plan.folder).unwrap();
    let houses: Vec<Option<House>> =
        peers.iter().map(|peer| peer.start(&scene, &folder.path().join(peer.name()))).collect();
    for beside in Beside::ALL {
        let mut turns: Vec<Vec<Turn>> = peers.iter().map(|_| Vec::new()).collect();
        for round in 0..plan.rounds {
            for turn in 0..peers.len() {
                let place = (round + turn) % peers.len();
                let turn = take_turn(plan, &scene, houses[place].as_ref(), beside);
                turns[place].push(here().block_on(turn));
                scene.upstream.was_respected(peers[place].name());
            }
        }
        for (peer, turns) in peers.iter().zip(&turns) {
            let told = |what: fn(&Turn) -> f64| middle(turns.iter().map(what));
            println!(
                "{:<18}{:<12}{:>12.0}{:>12.0}{:>12.0}{:>14.1}",
                peer.name(),
                beside.name(),
                told(|turn| turn.p50),
                told(|turn| turn.p99),
                told(|turn| turn.most),
                told(|turn| turn.streamed)
            );
        }
    }
}

async fn take_turn(plan: &Plan, scene: &Scene, house: Option<&House>, beside: Beside) -> Turn {
    let front = scene.front(house);
    // The streams begin before the small requests and end after them.
    let seconds = plan.seconds + 0.5;
    let (workload, count) = match beside {
        Beside::Nothing | Beside::Paced(0) | Beside::Fast(0) => (Workload::Stream, 0),
        Beside::Paced(count) => (Workload::Paced, count),
        Beside::Fast(count) => (Workload::Stream, count),
    };
    let long = Asked::new(workload, front.key, seconds);
    let mut streams = Load::open(&front, count, 1).await;
    let streaming = async {
        match workload {
            Workload::Paced => streams.once_each(&long, Duration::from_millis(PACED_MS)).await,
            Workload::Get | Workload::Tts | Workload::Stream | Workload::Upload => {
                streams.saturating(&long, seconds).await
            }
        }
    };
    let small = Asked::new(Workload::Get, front.key, 0.0);
    let asking = async {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let mut load = Load::open(&front, ASKERS, 1).await;
        load.at_rate(&small, RATE, plan.seconds).await
    };
    let (streamed, mut heard) = tokio::join!(streaming, asking);
    let bytes = streamed.requests * long.answer_bytes;
    Turn {
        p50: quantile(&mut heard.whole, 0.5),
        p99: quantile(&mut heard.whole, 0.99),
        most: quantile(&mut heard.whole, 1.0),
        streamed: bytes as f64 / 1024.0 / 1024.0 / seconds,
    }
}
