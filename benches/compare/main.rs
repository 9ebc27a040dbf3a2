//! Keychoir beside other proxies: what a request costs the processor, how much later its answer comes,
//! and how many go through one core, with each proxy doing the same job. Starts a stand-in for the
//! provider, and every peer that is installed, and is the client of all of them in turns.
//!
//! ```text
//! cargo bench --bench compare                    every workload
//! cargo bench --bench compare -- get tts         some of them
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

mod load;
mod machine;
mod peers;
mod rounds;
mod table;
mod upstream;
mod wire;
mod workload;

use std::path::PathBuf;

use house::number;
use peers::Peer;
use rounds::Plan;
use upstream::Upstream;
use workload::Workload;

fn main() {
    // `cargo bench` itself says `--bench`.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let mut workloads = Vec::new();
    for word in &words {
        match Workload::ALL.into_iter().find(|workload| workload.name() == word) {
            Some(workload) => workloads.push(workload),
            None => panic!("`{word}` is none of get, tts, stream, upload and paced"),
        }
    }
    if workloads.is_empty() {
        workloads.extend(Workload::ALL);
    }
    let peers = chosen();
    println!("{}", machine::about());
    for peer in &peers {
        if let Some(version) = peer.version() {
            println!("{}: {version}", peer.name());
        }
    }
    machine::stay_on("1");
    let plan = Plan {
        peers,
        seconds: f64::from(number("BENCH_SECONDS", 4)),
        rounds: number("BENCH_ROUNDS", 5) as usize,
        upstream: Upstream::start(),
        folder: PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
    };
    for workload in workloads {
        let measured = rounds::measure(&plan, workload);
        table::print(&plan, workload, &measured);
    }
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
