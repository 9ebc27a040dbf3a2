//! Keychoir beside other proxies: what a request costs the processor, how much later its answer comes,
//! and how many go through one core, with each proxy doing the same job. Starts a stand-in for the
//! provider, and every peer that is installed, and is the client of all of them in turns.
//!
//! ```text
//! cargo bench --bench compare                    every workload
//! cargo bench --bench compare -- get tts         some of them
//! cargo bench --bench compare -- tls-upstream    with TLS to the provider; tls-both: on both sides
//! cargo bench --bench compare -- memory          what idle proxies and idle clients take
//! cargo bench --bench compare -- growth          Keychoir with more keys, clients, connections, cores;
//!                                                nginx with more connections
//! cargo bench --bench compare -- uneven          small requests beside long streams
//! cargo bench --bench compare -- kept            requests on idle connections of one worker
//! cargo bench --bench compare -- slow            speeches beside clients that trickle or do not read
//! BENCH_PEERS=nginx,keychoir BENCH_SECONDS=1 BENCH_ROUNDS=3 cargo bench --bench compare -- get
//! BENCH_KEYCHOIR=/path/of/another/build cargo bench --bench compare
//! ```
//!
//! `BENCH_SECONDS` (of a round) and `BENCH_ROUNDS` change how long it takes. Proxies run on the first
//! processor, this program on the second. Linux only.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    unreachable_pub,
    reason = "a measurement reads the clock, prints, and ends at its first surprise"
)]

#[path = "../house/mod.rs"]
mod house;

mod growth;
mod kept;
mod load;
mod machine;
mod memory;
mod peers;
mod rounds;
mod slow;
mod table;
mod tls;
mod uneven;
mod upstream;
mod wire;
mod workload;

use std::path::PathBuf;

use house::number;
use peers::{Peer, Scene, Way};
use rounds::{Entry, Plan};
use table::Beside;
use tls::Certificates;
use upstream::Upstream;
use workload::Workload;

fn main() {
    // `cargo bench` itself passes `--bench`.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let asked = Asked::by(&words);
    let peers = chosen();
    println!("{}", machine::about());
    for peer in &peers {
        if let Some(version) = peer.version() {
            println!("{}: {version}", peer.name());
        }
    }
    machine::stay_on("1");
    machine::open_files_max();
    let plan = Plan {
        seconds: f64::from(number("BENCH_SECONDS", 4)),
        rounds: number("BENCH_ROUNDS", 5) as usize,
        is_saturated: true,
        folder: PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
    };
    let folder = tempfile::tempdir_in(&plan.folder).unwrap();
    let certificates = Certificates::make(folder.path());
    let scene = Scene::new(Upstream::start(&certificates), certificates);
    for way in asked.ways {
        for workload in &asked.workloads {
            compare(&plan, &peers, &Scene { way, ..scene.clone() }, *workload);
        }
    }
    for study in asked.studies {
        study(&plan, &peers, &scene);
    }
}

/// The selection of the command line.
struct Asked {
    workloads: Vec<Workload>,
    ways: Vec<Way>,
    studies: Vec<fn(&Plan, &[Peer], &Scene)>,
}

impl Asked {
    fn by(words: &[String]) -> Self {
        let mut asked = Self { workloads: Vec::new(), ways: Vec::new(), studies: Vec::new() };
        for word in words {
            match (&**word, Workload::ALL.into_iter().find(|workload| workload.name() == word)) {
                (_, Some(workload)) => asked.workloads.push(workload),
                ("plain", None) => asked.ways.push(Way::Plain),
                ("tls-upstream", None) => asked.ways.push(Way::TlsBehind),
                ("tls-both", None) => asked.ways.push(Way::TlsOnBothSides),
                ("memory", None) => asked.studies.push(memory::measure),
                ("growth", None) => asked.studies.push(growth::grow),
                ("uneven", None) => asked.studies.push(uneven::measure),
                ("kept", None) => asked.studies.push(kept::measure),
                ("slow", None) => asked.studies.push(slow::measure),
                (word, None) => panic!("`{word}` is nothing that can be measured here"),
            }
        }
        // A study runs without the comparison, and a TLS setup without workloads runs all of them.
        if asked.ways.is_empty() && (asked.studies.is_empty() || !asked.workloads.is_empty()) {
            asked.ways.push(Way::Plain);
        }
        if asked.workloads.is_empty() {
            asked.workloads.extend(Workload::ALL);
        }
        asked
    }
}

/// One workload with all peers.
fn compare(plan: &Plan, peers: &[Peer], scene: &Scene, workload: Workload) {
    let entry = |peer: &Peer| Entry::new(peer.clone(), scene.clone(), workload);
    let entries: Vec<Entry> = peers.iter().filter(|peer| peer.goes(scene.way)).map(entry).collect();
    let measured = rounds::measure(plan, &entries, workload);
    let way = match scene.way {
        Way::Plain => "",
        Way::TlsBehind => "TLS to the provider, ",
        Way::TlsOnBothSides => "TLS on both sides, ",
    };
    let title = format!("{way}{}", table::about(plan, workload));
    let place = entries.iter().position(|entry| entry.peer == Peer::Nginx);
    let bound = Some(workload.bound());
    table::print(&title, &entries, &measured, &Beside { name: "nginx", place, bound });
}

/// The peers that `BENCH_PEERS` names, or all.
fn chosen() -> Vec<Peer> {
    let (mut peers, missing) = Peer::all();
    for name in missing {
        println!("{name} is not installed here and is left out");
    }
    if let Ok(names) = std::env::var("BENCH_PEERS") {
        let names: Vec<&str> = names.split(',').collect();
        peers.retain(|peer| *peer == Peer::Direct || names.contains(&peer.name()));
    }
    peers
}
