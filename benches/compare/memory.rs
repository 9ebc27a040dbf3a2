//! Measures the memory of an idle proxy, the memory that each connected idle client adds, and the time from the start
//! of the proxy to its first response, in a new directory and after a restart (`memory` on the command line).

use crate::harness::{format_median_and_range, median};
use crate::load::{LoadGenerator, RequestSpec};
use crate::machine;
use crate::peers::{Peer, PeerSetup};
use crate::rounds::{RoundPlan, current_thread_runtime};
use crate::workload::Workload;

/// The numbers of connected clients.
const CLIENTS: [u32; 2] = [1_000, 10_000];
/// The number of open files that are not connections.
const OTHER_FILES: u64 = 500;

/// The results of a turn, in which one proxy is measured once.
struct TurnResults {
    /// The time from the start in a new directory to the first response.
    first_start_ms: f64,
    /// The same time for later starts in that directory, as the median of three.
    restart_ms: f64,
    /// The memory before the clients connect.
    idle_mib: f64,
    /// KiB per client, for each number of clients that the limit of open files allows.
    kib_per_client: Vec<f64>,
}

/// Measures all proxies, and prints a table.
pub fn measure(plan: &RoundPlan, peers: &[Peer], setup: &PeerSetup) {
    let files = machine::raise_open_files_limit();
    let peers: Vec<&Peer> = peers.iter().filter(|peer| **peer != Peer::Direct).collect();
    let clients: Vec<u32> =
        CLIENTS.into_iter().filter(|clients| u64::from(*clients) + OTHER_FILES <= files).collect();
    let mut turns: Vec<Vec<TurnResults>> = peers.iter().map(|_| Vec::new()).collect();
    for round in 0..plan.rounds {
        for turn in 0..peers.len() {
            let index = (round + turn) % peers.len();
            turns[index].push(take_turn(plan, peers[index], setup, &clients));
        }
    }
    println!("\nmemory: {} alternating rounds with new proxies, idle clients after one request", plan.rounds);
    let client_headings: String =
        clients.iter().map(|clients| format!("{:>24}", format!("KiB, {clients}"))).collect();
    println!(
        "{:<18}{:>24}{:>24}{:>24}{client_headings}",
        "", "first response, ms", "when restarted", "idle, MiB"
    );
    for (peer, turns) in peers.iter().zip(&turns) {
        let format_field =
            |field: &dyn Fn(&TurnResults) -> f64| format_median_and_range(turns.iter().map(field), 1);
        let mut line = format!("{:<18}", peer.name());
        line += &format!("{:>24}", format_field(&|turn| turn.first_start_ms));
        line += &format!("{:>24}", format_field(&|turn| turn.restart_ms));
        line += &format!("{:>24}", format_field(&|turn| turn.idle_mib));
        for index in 0..clients.len() {
            line += &format!("{:>24}", format_field(&|turn| turn.kib_per_client[index]));
        }
        println!("{line}");
    }
    if clients.len() < CLIENTS.len() {
        println!("    {files} open files are not enough for {} clients", CLIENTS[1]);
    }
}

/// Starts a proxy in a new directory and restarts it in the same directory, and then connects clients.
fn take_turn(plan: &RoundPlan, peer: &Peer, setup: &PeerSetup, clients: &[u32]) -> TurnResults {
    let directory = tempfile::tempdir_in(&plan.directory).unwrap();
    let start_ms = || peer.start(setup, directory.path()).unwrap().start_duration.as_secs_f64() * 1e3;
    let (first_start_ms, restarts) = (start_ms(), [start_ms(), start_ms(), start_ms()]);
    let started_peer = peer.start(setup, directory.path()).unwrap();
    let (idle_mib, target) = (started_peer.process.memory_mib(), setup.target(Some(&started_peer)));
    let request_spec = RequestSpec::new(Workload::Get, target.key, 0.0);
    let kib_per_client = clients.iter().map(|clients| {
        current_thread_runtime().block_on(async {
            let mut load = LoadGenerator::open(&target, 10, clients / 10).await;
            load.send_once_per_connection(&request_spec).await;
            (started_peer.process.memory_mib() - idle_mib) * 1024.0 / f64::from(*clients)
        })
    });
    TurnResults {
        first_start_ms,
        restart_ms: median(restarts.into_iter()),
        idle_mib,
        kib_per_client: kib_per_client.collect(),
    }
}
