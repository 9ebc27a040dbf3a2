//! The cost of an idle proxy: memory after its start, memory per connected client, and the time
//! from its start to its first response.

use crate::house::{middle, spread};
use crate::load::{Asked, Load};
use crate::machine;
use crate::peers::{Peer, Scene};
use crate::rounds::{Plan, here};
use crate::workload::Workload;

const CLIENTS: [u32; 2] = [1_000, 10_000];
/// Open files besides those of connections.
const FILES_BESIDE: u64 = 500;

/// The results of one start.
struct Turn {
    first_ready_ms: f64,
    ready_ms: f64,
    memory: f64,
    /// KiB per client, for each number of clients that the limit of open files allows.
    each: Vec<f64>,
}

pub fn measure(plan: &Plan, peers: &[Peer], scene: &Scene) {
    let files = machine::open_files_max();
    let peers: Vec<&Peer> = peers.iter().filter(|peer| **peer != Peer::Direct).collect();
    let clients: Vec<u32> =
        CLIENTS.into_iter().filter(|clients| u64::from(*clients) + FILES_BESIDE <= files).collect();
    let mut turns: Vec<Vec<Turn>> = peers.iter().map(|_| Vec::new()).collect();
    for round in 0..plan.rounds {
        for turn in 0..peers.len() {
            let place = (round + turn) % peers.len();
            turns[place].push(start(plan, peers[place], scene, &clients));
        }
    }
    println!("\nmemory: {} rounds in turns, fresh proxies; clients have asked once and stay", plan.rounds);
    let of_clients: String =
        clients.iter().map(|clients| format!("{:>24}", format!("KiB, {clients}"))).collect();
    println!("{:<18}{:>24}{:>24}{:>24}{of_clients}", "", "first answer, ms", "when restarted", "idle, MiB");
    for (peer, turns) in peers.iter().zip(&turns) {
        let told = |what: &dyn Fn(&Turn) -> f64| spread(turns.iter().map(what), 1);
        let mut line = format!("{:<18}", peer.name());
        line += &format!("{:>24}", told(&|turn| turn.first_ready_ms));
        line += &format!("{:>24}", told(&|turn| turn.ready_ms));
        line += &format!("{:>24}", told(&|turn| turn.memory));
        for place in 0..clients.len() {
            line += &format!("{:>24}", told(&|turn| turn.each[place]));
        }
        println!("{line}");
    }
    if clients.len() < CLIENTS.len() {
        println!("    {files} open files are not enough for {} clients", CLIENTS[1]);
    }
}

/// Starts it in a new folder, and again in the same folder.
fn start(plan: &Plan, peer: &Peer, scene: &Scene, clients: &[u32]) -> Turn {
    let folder = tempfile::tempdir_in(&plan.folder).unwrap();
    let ready_ms = || {
        let house = peer.start(scene, folder.path()).unwrap();
        house.ready.as_secs_f64() * 1e3
    };
    let (first_ready_ms, ready) = (ready_ms(), [ready_ms(), ready_ms(), ready_ms()]);
    let house = peer.start(scene, folder.path()).unwrap();
    let (memory, front) = (house.running.memory(), scene.front(Some(&house)));
    let asked = Asked::new(Workload::Get, front.key, 0.0);
    let each = clients.iter().map(|clients| {
        here().block_on(async {
            let mut load = Load::open(&front, 10, clients / 10).await;
            load.everywhere(&asked).await;
            let grown = house.running.memory() - memory;
            grown * 1024.0 / f64::from(*clients)
        })
    });
    Turn { first_ready_ms, ready_ms: middle(ready.into_iter()), memory, each: each.collect() }
}
