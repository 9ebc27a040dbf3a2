//! Whether a request costs more when there is more of everything: keys, clients, connections, cores.

use crate::machine;
use crate::peers::{Peer, Scene};
use crate::rounds::{Entry, Plan, measure};
use crate::table::{self, Beside};
use crate::workload::Workload;

/// Low enough for one connection, one request at a time.
const RATE: u32 = 1_000;
const ASKERS: u32 = 48;

pub fn grow(plan: &Plan, peers: &[Peer], scene: &Scene) {
    let plan = Plan { is_saturated: false, ..plan.clone() };
    for peer in peers.iter().filter(|peer| matches!(peer, Peer::Keychoir(..))) {
        let entry = |name: &str, scene: Scene| Entry {
            name: name.to_owned(),
            rate: RATE,
            ..Entry::new(peer.clone(), scene, Workload::Get)
        };
        let keys = |keys: u32, strategy: &'static str| {
            entry(&format!("{keys} {strategy}"), Scene { keys, strategy, ..scene.clone() })
        };
        let table = |title: &str, entries: &[Entry]| {
            let measured = measure(&plan, entries, Workload::Get);
            let title = format!("growth of {}: {title}; get, {RATE} requests/s", peer.name());
            let beside = Beside { name: "the first", place: Some(0), bound: None };
            table::print(&title, entries, &measured, &beside);
        };
        table(
            "keys and how one of them is chosen",
            &[
                keys(1, "fill-first"),
                keys(100, "fill-first"),
                keys(1_000, "fill-first"),
                keys(100, "most-remaining"),
                keys(1_000, "most-remaining"),
            ],
        );
        let clients = |clients: u32| entry(&clients.to_string(), Scene { clients, ..scene.clone() });
        table("clients that are known", &[clients(1), clients(100), clients(10_000)]);
        let connections = |askers: u32, connections_each: u32| Entry {
            askers,
            connections_each,
            ..entry(&(askers * connections_each).to_string(), scene.clone())
        };
        let mut entries = vec![connections(1, 1), connections(ASKERS, 1), connections(ASKERS, 20)];
        if machine::open_files_max() > 10_500 {
            entries.push(connections(ASKERS, 208));
        }
        table("connections, all of them used in turns", &entries);
        let two = Scene { processors: "0,1", threads: 2, ..scene.clone() };
        table("processors", &[entry("one", scene.clone()), entry("two", two)]);
    }
}
