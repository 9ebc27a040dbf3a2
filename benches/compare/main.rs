//! Compares Keychoir with other proxies: the processor time per request, the added latency, and the maximum rate on one
//! core, with each proxy configured for the same work. The benchmark starts a simulated provider and each installed
//! proxy, and sends requests to all of them in rotation. Further measurements are selected on the command line.
//!
//! ```text
//! cargo bench --bench compare                        all workloads, without TLS (`plain`)
//! cargo bench --bench compare -- get tts             the workloads `get` and `tts`
//! cargo bench --bench compare -- tls-upstream        all workloads, with TLS to the provider
//! cargo bench --bench compare -- tls-both            all workloads, with TLS on both sides
//! cargo bench --bench compare -- memory              the memory of idle proxies and of idle clients
//! cargo bench --bench compare -- growth              the cost per request of Keychoir with more keys, clients,
//!                                                    connections and cores, and of nginx with more connections
//! cargo bench --bench compare -- uneven              the latency of small requests while long streams are running
//! cargo bench --bench compare -- idle-connections    throughput and latency on idle connections that become busy
//! cargo bench --bench compare -- slow                the latency of speech requests while other clients are slow
//! cargo bench --bench compare -- replica-commands    the number of Redis commands of several replicas
//! cargo bench --bench compare -- replica-latency     the latency of several replicas with and without Redis
//! BENCH_PEERS=nginx,keychoir BENCH_SECONDS=1 BENCH_ROUNDS=3 cargo bench --bench compare -- get
//! BENCH_KEYCHOIR=/path/to/another/build cargo bench --bench compare
//! ```
//!
//! Environment variables set the parameters: `BENCH_SECONDS` (seconds per turn), `BENCH_ROUNDS`, `BENCH_PEERS` (the
//! names of the proxies to compare) and `BENCH_KEYCHOIR` (the paths of other builds to compare). Commas separate these
//! names and paths. The proxies run on the first processor, and this program runs on the second processor.
//! Some further measurements use both processors for the proxies. The benchmark runs only on Linux.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    unreachable_pub,
    reason = "a benchmark reads the clock, prints its results, and panics if an expectation fails, and its modules are \
              used only here"
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
    // `cargo bench` also passes the flag `--bench`, so flags are ignored.
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
    for measure in selection.other_measurements {
        measure(&plan, &peers, &setup);
    }
}

/// The measurements that the command line selects.
struct Selection {
    workloads: Vec<Workload>,
    /// The TLS modes in which the workloads are compared.
    tls_modes: Vec<TlsMode>,
    /// Measurements that are not comparisons of workloads, such as the memory of idle proxies.
    other_measurements: Vec<fn(&RoundPlan, &[Peer], &PeerSetup)>,
}

impl Selection {
    fn parse(arguments: &[String]) -> Self {
        let mut selection =
            Self { workloads: Vec::new(), tls_modes: Vec::new(), other_measurements: Vec::new() };
        for argument in arguments {
            match (&**argument, Workload::ALL.into_iter().find(|workload| workload.name() == argument)) {
                (_, Some(workload)) => selection.workloads.push(workload),
                ("plain", None) => selection.tls_modes.push(TlsMode::Plain),
                ("tls-upstream", None) => selection.tls_modes.push(TlsMode::TlsToProvider),
                ("tls-both", None) => selection.tls_modes.push(TlsMode::TlsOnBothSides),
                ("memory", None) => selection.other_measurements.push(memory::measure),
                ("growth", None) => selection.other_measurements.push(growth::measure),
                ("uneven", None) => selection.other_measurements.push(uneven::measure),
                ("idle-connections", None) => selection.other_measurements.push(idle_connections::measure),
                ("slow", None) => selection.other_measurements.push(slow::measure),
                ("replica-commands", None) => selection.other_measurements.push(replicas::count_commands),
                ("replica-latency", None) => selection.other_measurements.push(replicas::compare_latency),
                (argument, None) => panic!("unknown measurement `{argument}`"),
            }
        }
        // If the command line names only other measurements, no workload is compared. If it names no workload, all
        // workloads are compared in the selected TLS modes.
        if selection.tls_modes.is_empty()
            && (selection.other_measurements.is_empty() || !selection.workloads.is_empty())
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
    let title_prefix = match setup.tls_mode {
        TlsMode::Plain => "",
        TlsMode::TlsToProvider => "TLS to the provider, ",
        TlsMode::TlsOnBothSides => "TLS on both sides, ",
    };
    let title = format!("{title_prefix}{}", table::title(plan, workload));
    let index = compared_peers.iter().position(|compared_peer| compared_peer.peer == Peer::Nginx);
    let max_ratio = Some(workload.max_cost_ratio());
    table::print(&title, &compared_peers, &peer_results, &Reference { name: "nginx", index, max_ratio });
}

/// Returns the direct connection and the installed peers that `BENCH_PEERS` names. Without `BENCH_PEERS`, returns all
/// installed peers.
fn selected_peers() -> Vec<Peer> {
    let mut peers = Peer::find_installed();
    if let Ok(names) = std::env::var("BENCH_PEERS") {
        let names: Vec<&str> = names.split(',').collect();
        peers.retain(|peer| *peer == Peer::Direct || names.contains(&peer.name()));
    }
    peers
}
