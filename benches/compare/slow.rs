//! Whether slow clients delay the others: three that trickle their requests and three that do not
//! read their responses, beside regular ones. Each round measures the regular ones with and without
//! them, one right after the other, and the ratio counts.

use std::time::Duration;

use keychoir::tasks::{AbortOnDrop, Tasks};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::house::{middle, spread};
use crate::load::{Asked, Load};
use crate::peers::{Front, House, Peer, Scene};
use crate::rounds::{Plan, here, quantile};
use crate::workload::Workload;

/// Speech requests per second of the regular clients, and their number.
const RATE: u32 = 500;
const ASKERS: u32 = 16;
/// Slow clients of each kind.
const SLOW: u32 = 3;
/// Interval of two bytes of a trickled request.
const TRICKLE: Duration = Duration::from_millis(50);
/// Maximum ratio of the regular clients' 99th percentile with the slow ones to that without them.
const BOUND: f64 = 1.2;

/// The results of a round: durations of speech requests in µs, at the median and the 99th
/// percentile.
struct Turn {
    without: [f64; 2],
    with: [f64; 2],
}

impl Turn {
    fn ratio(&self, place: usize) -> f64 {
        self.with[place] / self.without[place]
    }
}

pub fn measure(plan: &Plan, peers: &[Peer], scene: &Scene) {
    println!(
        "\nslow: tts, {RATE} requests/s over {ASKERS} connections, beside {SLOW} clients that trickle and {SLOW} \
         that do not read and without them; {} rounds of 2 x {} s in turns",
        plan.rounds, plan.seconds
    );
    println!("{:<18}{:>12}{:>12}{:>10}{:>24}  bound {BOUND}", "", "p50, µs", "p99, µs", "p50, x", "p99, x");
    let folder = tempfile::tempdir_in(&plan.folder).unwrap();
    let houses: Vec<Option<House>> =
        peers.iter().map(|peer| peer.start(scene, &folder.path().join(peer.name()))).collect();
    let mut turns: Vec<Vec<Turn>> = peers.iter().map(|_| Vec::new()).collect();
    for round in 0..plan.rounds {
        for turn in 0..peers.len() {
            let place = (round + turn) % peers.len();
            let front = scene.front(houses[place].as_ref());
            turns[place].push(here().block_on(take_turn(plan, &front, round)));
            scene.upstream.was_respected(peers[place].name());
        }
    }
    for (peer, turns) in peers.iter().zip(&turns) {
        let told = |what: &dyn Fn(&Turn) -> f64| middle(turns.iter().map(what));
        let p99: Vec<f64> = turns.iter().map(|turn| turn.ratio(1)).collect();
        println!(
            "{:<18}{:>12.0}{:>12.0}{:>10.2}{:>24}",
            peer.name(),
            told(&|turn| turn.with[0]),
            told(&|turn| turn.with[1]),
            told(&|turn| turn.ratio(0)),
            spread(p99.iter().copied(), 2)
        );
    }
}

/// The regular clients; in every other round, first beside the slow ones.
async fn take_turn(plan: &Plan, front: &Front, round: usize) -> Turn {
    let mut load = Load::open(front, ASKERS, 1).await;
    let small = Asked::new(Workload::Tts, front.key, 0.0);
    load.at_rate(&small, RATE, 0.5).await;
    let (mut without, mut with) = ([0.0; 2], [0.0; 2]);
    for is_beside in [round.is_multiple_of(2), !round.is_multiple_of(2)] {
        let slow = if is_beside { slow_clients(front).await } else { Vec::new() };
        let mut heard = load.at_rate(&small, RATE, plan.seconds).await;
        let times = [0.5, 0.99].map(|part| quantile(&mut heard.whole, part));
        *(if is_beside { &mut with } else { &mut without }) = times;
        drop(slow);
    }
    Turn { without, with }
}

/// The slow clients, until they are dropped.
async fn slow_clients(front: &Front) -> Vec<AbortOnDrop> {
    let tasks = Tasks::new();
    let mut slow = Vec::new();
    for _ in 0..SLOW {
        let mut stream = TcpStream::connect(front.address).await.unwrap();
        let request = Workload::Tts.request(front.key, 0.0);
        let end = crate::wire::head_end(&request).unwrap();
        stream.write_all(&request[..end]).await.unwrap();
        slow.push(tasks.spawn_guarded(async move {
            for byte in &request[end..] {
                tokio::time::sleep(TRICKLE).await;
                if stream.write_all(&[*byte]).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        }));
        let mut stream = TcpStream::connect(front.address).await.unwrap();
        stream.write_all(&Workload::Stream.request(front.key, 0.0)).await.unwrap();
        slow.push(tasks.spawn_guarded(async move {
            // The connection is kept open and not read.
            let _stream = stream;
            std::future::pending::<()>().await;
        }));
    }
    slow
}
