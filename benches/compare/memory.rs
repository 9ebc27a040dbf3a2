//! The memory of an idle proxy and of each connected client, and the time from the start to the first response.

use crate::harness::{format_median_and_range, median};
use crate::load::{Load, RequestSpec};
use crate::machine;
use crate::peers::{Peer, Setup};
use crate::rounds::{Plan, current_thread_runtime};
use crate::workload::Workload;

const CLIENTS: [u32; 2] = [1_000, 10_000];
/// The number of open files that are not connections.
const FILES_BESIDE: u64 = 500;

/// The results of one start.
struct Turn {
    first_ready_ms: f64,
    ready_ms: f64,
    memory: f64,
    /// KiB per client, for each number of clients that the limit of open files allows.
    each: Vec<f64>,
}

pub fn measure(plan: &Plan, peers: &[Peer], setup: &Setup) {
    let files = machine::raise_open_files_limit();
    let peers: Vec<&Peer> = peers.iter().filter(|peer| **peer != Peer::Direct).collect();
    let clients: Vec<u32> =
        CLIENTS.into_iter().filter(|clients| u64::from(*clients) + FILES_BESIDE <= files).collect();
    let mut turns: Vec<Vec<Turn>> = peers.iter().map(|_| Vec::new()).collect();
    for round in 0..plan.rounds {
        for turn in 0..peers.len() {
            let index = (round + turn) % peers.len();
            turns[index].push(start(plan, peers[index], setup, &clients));
        }
    }
    println!("\nmemory: {} rounds in turns, fresh proxies; clients have asked once and stay", plan.rounds);
    let of_clients: String =
        clients.iter().map(|clients| format!("{:>24}", format!("KiB, {clients}"))).collect();
    println!("{:<18}{:>24}{:>24}{:>24}{of_clients}", "", "first answer, ms", "when restarted", "idle, MiB");
    for (peer, turns) in peers.iter().zip(&turns) {
        let median_of = |what: &dyn Fn(&Turn) -> f64| format_median_and_range(turns.iter().map(what), 1);
        let mut line = format!("{:<18}", peer.name());
        line += &format!("{:>24}", median_of(&|turn| turn.first_ready_ms));
        line += &format!("{:>24}", median_of(&|turn| turn.ready_ms));
        line += &format!("{:>24}", median_of(&|turn| turn.memory));
        for index in 0..clients.len() {
            line += &format!("{:>24}", median_of(&|turn| turn.each[index]));
        }
        println!("{line}");
    }
    if clients.len() < CLIENTS.len() {
        println!("    {files} open files are not enough for {} clients", CLIENTS[1]);
    }
}

/// Starts a proxy in a new folder, and again in the same folder.
fn start(plan: &Plan, peer: &Peer, setup: &Setup, clients: &[u32]) -> Turn {
    let folder = tempfile::tempdir_in(&plan.folder).unwrap();
    let ready_ms = || {
        let started_peer = peer.start(setup, folder.path()).unwrap();
        started_peer.ready.as_secs_f64() * 1e3
    };
    let (first_ready_ms, ready) = (ready_ms(), [ready_ms(), ready_ms(), ready_ms()]);
    let started_peer = peer.start(setup, folder.path()).unwrap();
    let (memory, target) = (started_peer.running.memory(), setup.target(Some(&started_peer)));
    let request_spec = RequestSpec::new(Workload::Get, target.key, 0.0);
    let each = clients.iter().map(|clients| {
        current_thread_runtime().block_on(async {
            let mut load = Load::open(&target, 10, clients / 10).await;
            load.once_per_connection(&request_spec).await;
            let grown = started_peer.running.memory() - memory;
            grown * 1024.0 / f64::from(*clients)
        })
    });
    Turn { first_ready_ms, ready_ms: median(ready.into_iter()), memory, each: each.collect() }
}
