//! Whether the cost of a request grows with the number of keys, clients, connections or cores.

use crate::machine;
use crate::peers::{Peer, Scene};
use crate::rounds::{Entry, Plan, measure};
use crate::table::{self, Beside};
use crate::workload::Workload;

/// Low enough for one connection with one request at a time.
const RATE: u32 = 1_000;
const ASKERS: u32 = 48;

pub fn grow(plan: &Plan, peers: &[Peer], scene: &Scene) {
    let plan = Plan { is_saturated: false, ..plan.clone() };
    for peer in peers {
        let growth = Growth { plan: &plan, peer, scene };
        let is_ours = matches!(peer, Peer::Keychoir(..));
        // nginx shows the part of the kernel and the caches.
        if is_ours || *peer == Peer::Nginx {
            growth.of_connections();
        }
        if is_ours {
            growth.of_keys();
            growth.of_clients();
            growth.of_processors();
        }
    }
}

struct Growth<'a> {
    plan: &'a Plan,
    peer: &'a Peer,
    scene: &'a Scene,
}

impl Growth<'_> {
    fn entry(&self, name: &str, scene: Scene) -> Entry {
        Entry { name: name.to_owned(), rate: RATE, ..Entry::new(self.peer.clone(), scene, Workload::Get) }
    }

    fn table(&self, title: &str, entries: &[Entry]) {
        let measured = measure(self.plan, entries, Workload::Get);
        let title = format!("growth of {}: {title}; get, {RATE} requests/s", self.peer.name());
        let beside = Beside { name: "the first", place: Some(0), bound: None };
        table::print(&title, entries, &measured, &beside);
    }

    fn of_keys(&self) {
        let keys = |keys: u32, strategy: &'static str| {
            self.entry(&format!("{keys} {strategy}"), Scene { keys, strategy, ..self.scene.clone() })
        };
        self.table(
            "keys and how one of them is chosen",
            &[
                keys(1, "fill-first"),
                keys(100, "fill-first"),
                keys(1_000, "fill-first"),
                keys(100, "most-remaining"),
                keys(1_000, "most-remaining"),
            ],
        );
    }

    fn of_clients(&self) {
        let clients =
            |clients: u32| self.entry(&clients.to_string(), Scene { clients, ..self.scene.clone() });
        self.table("clients that are known", &[clients(1), clients(100), clients(10_000)]);
    }

    fn of_connections(&self) {
        let connections = |askers: u32, connections_each: u32| Entry {
            askers,
            connections_each,
            ..self.entry(&(askers * connections_each).to_string(), self.scene.clone())
        };
        let mut entries = vec![connections(1, 1), connections(ASKERS, 1), connections(ASKERS, 20)];
        if machine::open_files_max() > 10_500 {
            entries.push(connections(ASKERS, 208));
        }
        self.table("connections, all of them used in turns", &entries);
    }

    fn of_processors(&self) {
        let two = Scene { processors: "0,1", threads: 2, ..self.scene.clone() };
        self.table("processors", &[self.entry("one", self.scene.clone()), self.entry("two", two)]);
    }
}
