//! Compares Keychoir with other proxies: the processor time per request, the added latency, and the maximum rate on one
//! core, with each proxy configured for the same work. The benchmark starts a simulated provider and each installed
//! proxy, and sends requests to all of them in rotation.
//!
//! ```text
//! cargo bench --bench compare                    all workloads
//! cargo bench --bench compare -- get tts         some workloads
//! cargo bench --bench compare -- tls-upstream    all workloads with TLS to the provider
//! cargo bench --bench compare -- tls-both        all workloads with TLS on both sides
//! cargo bench --bench compare -- memory          memory of idle proxies and of idle clients
//! cargo bench --bench compare -- growth          cost per request with more keys, clients, connections
//!                                                and cores; nginx with more connections
//! cargo bench --bench compare -- uneven          latency of small requests during long streams
//! cargo bench --bench compare -- idle-connections    requests on idle connections that become busy
//! cargo bench --bench compare -- slow            latency of speech requests during slow clients
//! cargo bench --bench compare -- replicas        commands of Redis, and latency of replicas with and without it
//! BENCH_PEERS=nginx,keychoir BENCH_SECONDS=1 BENCH_ROUNDS=3 cargo bench --bench compare -- get
//! BENCH_KEYCHOIR=/path/of/another/build cargo bench --bench compare
//! ```
//!
//! The variables are `BENCH_SECONDS` (of a round), `BENCH_ROUNDS`, `BENCH_PEERS` (the compared proxies) and
//! `BENCH_KEYCHOIR` (other builds to compare). Proxies run on the first processor, this program on the second. Linux only.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    unreachable_pub,
    reason = "a benchmark reads the clock, prints its results, and ends at a failed expectation"
)]

#[path = "../harness/mod.rs"]
mod harness;

#[path = "../../tests/support/mod.rs"]
mod support;

mod growth;
mod http1;
mod idle_connections;
mod load;
mod machine;
mod memory;
mod peers;
mod replicas;
mod rounds;
mod slow;
mod table;
mod tls;
mod uneven;
mod upstream;
mod workload;

use std::path::PathBuf;

use harness::env_number;
use peers::{Peer, PeerSetup, TlsMode};
use rounds::{ComparedPeer, RoundPlan};
use table::Reference;
use tls::Certificates;
use upstream::Upstream;
use workload::Workload;

fn main() {
    // `cargo bench` also passes `--bench`.
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let selection = Selection::parse(&arguments);
    let peers = selected_peers();
    println!("{}", machine::describe_machine());
    for peer in &peers {
        if let Some(version) = peer.version() {
            println!("{}: {version}", peer.name());
        }
    }
    machine::pin_to_processor("1");
    machine::raise_open_files_limit();
    let plan = RoundPlan {
        seconds: f64::from(env_number("BENCH_SECONDS", 4)),
        rounds: env_number("BENCH_ROUNDS", 5) as usize,
        measures_max_rate: true,
        directory: PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
    };
    let directory = tempfile::tempdir_in(&plan.directory).unwrap();
    let certificates = Certificates::create(directory.path());
    let setup = PeerSetup::new(Upstream::start(&certificates), certificates);
    for tls_mode in selection.tls_modes {
        for workload in &selection.workloads {
            compare(&plan, &peers, &PeerSetup { tls_mode, ..setup.clone() }, *workload);
        }
    }
    for study in selection.studies {
        study(&plan, &peers, &setup);
    }
}

/// The measurements that the command line selects.
struct Selection {
    workloads: Vec<Workload>,
    tls_modes: Vec<TlsMode>,
    studies: Vec<fn(&RoundPlan, &[Peer], &PeerSetup)>,
}

impl Selection {
    fn parse(arguments: &[String]) -> Self {
        let mut selection = Self { workloads: Vec::new(), tls_modes: Vec::new(), studies: Vec::new() };
        for argument in arguments {
            match (&**argument, Workload::ALL.into_iter().find(|workload| workload.name() == argument)) {
                (_, Some(workload)) => selection.workloads.push(workload),
                ("plain", None) => selection.tls_modes.push(TlsMode::Plain),
                ("tls-upstream", None) => selection.tls_modes.push(TlsMode::TlsToProvider),
                ("tls-both", None) => selection.tls_modes.push(TlsMode::TlsOnBothSides),
                ("memory", None) => selection.studies.push(memory::measure),
                ("growth", None) => selection.studies.push(growth::measure),
                ("uneven", None) => selection.studies.push(uneven::measure),
                ("idle-connections", None) => selection.studies.push(idle_connections::measure),
                ("slow", None) => selection.studies.push(slow::measure),
                ("replicas", None) => selection.studies.push(replicas::measure),
                (argument, None) => panic!("unknown measurement `{argument}`"),
            }
        }
        // A study runs without the comparison, and a TLS setup without workloads runs all of them.
        if selection.tls_modes.is_empty() && (selection.studies.is_empty() || !selection.workloads.is_empty())
        {
            selection.tls_modes.push(TlsMode::Plain);
        }
        if selection.workloads.is_empty() {
            selection.workloads.extend(Workload::ALL);
        }
        selection
    }
}

/// Measures one workload with all peers, and prints the results.
fn compare(plan: &RoundPlan, peers: &[Peer], setup: &PeerSetup, workload: Workload) {
    let compared_peer = |peer: &Peer| ComparedPeer::new(peer.clone(), setup.clone(), workload);
    let compared_peers: Vec<ComparedPeer> =
        peers.iter().filter(|peer| peer.supports(setup.tls_mode)).map(compared_peer).collect();
    let peer_results = rounds::measure(plan, &compared_peers, workload);
    let tls_mode = match setup.tls_mode {
        TlsMode::Plain => "",
        TlsMode::TlsToProvider => "TLS to the provider, ",
        TlsMode::TlsOnBothSides => "TLS on both sides, ",
    };
    let title = format!("{tls_mode}{}", table::describe(plan, workload));
    let index = compared_peers.iter().position(|compared_peer| compared_peer.peer == Peer::Nginx);
    let max_ratio = Some(workload.max_ratio());
    table::print(&title, &compared_peers, &peer_results, &Reference { name: "nginx", index, max_ratio });
}

/// Returns the installed peers that `BENCH_PEERS` names, or all installed peers.
fn selected_peers() -> Vec<Peer> {
    let mut peers = Peer::find_installed();
    if let Ok(names) = std::env::var("BENCH_PEERS") {
        let names: Vec<&str> = names.split(',').collect();
        peers.retain(|peer| *peer == Peer::Direct || names.contains(&peer.name()));
    }
    peers
}
