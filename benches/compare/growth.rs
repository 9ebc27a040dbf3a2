//! The cost of a request with more keys, clients, connections or processors.

use crate::machine;
use crate::peers::{Peer, Setup};
use crate::rounds::{Entry, Plan, measure};
use crate::table::{self, Reference};
use crate::workload::Workload;

/// Low enough for one connection with one request at a time.
const RATE: u32 = 1_000;
const LOAD_CLIENTS: u32 = 48;

pub fn grow(plan: &Plan, peers: &[Peer], setup: &Setup) {
    let plan = Plan { is_saturated: false, ..plan.clone() };
    for peer in peers {
        let growth = Growth { plan: &plan, peer, setup };
        let is_ours = matches!(peer, Peer::Keychoir(..));
        // nginx is the reference for the cost of the kernel and the caches.
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
    setup: &'a Setup,
}

impl Growth<'_> {
    fn entry(&self, name: &str, setup: Setup) -> Entry {
        Entry { name: name.to_owned(), rate: RATE, ..Entry::new(self.peer.clone(), setup, Workload::Get) }
    }

    fn table(&self, title: &str, entries: &[Entry]) {
        let measured = measure(self.plan, entries, Workload::Get);
        let title = format!("growth of {}: {title}; get, {RATE} requests/s", self.peer.name());
        let reference = Reference { name: "the first", index: Some(0), bound: None };
        table::print(&title, entries, &measured, &reference);
    }

    fn of_keys(&self) {
        let keys = |keys: u32, strategy: &'static str| {
            self.entry(&format!("{keys} {strategy}"), Setup { keys, strategy, ..self.setup.clone() })
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
            |clients: u32| self.entry(&clients.to_string(), Setup { clients, ..self.setup.clone() });
        self.table("clients that are known", &[clients(1), clients(100), clients(10_000)]);
    }

    fn of_connections(&self) {
        let connections = |load_clients: u32, connections_per_client: u32| Entry {
            load_clients,
            connections_per_client,
            ..self.entry(&(load_clients * connections_per_client).to_string(), self.setup.clone())
        };
        let mut entries =
            vec![connections(1, 1), connections(LOAD_CLIENTS, 1), connections(LOAD_CLIENTS, 20)];
        if machine::raise_open_files_limit() > 10_500 {
            entries.push(connections(LOAD_CLIENTS, 208));
        }
        self.table("connections, all of them used in turns", &entries);
    }

    fn of_processors(&self) {
        let two = Setup { processors: "0,1", threads: 2, ..self.setup.clone() };
        self.table("processors", &[self.entry("one", self.setup.clone()), self.entry("two", two)]);
    }
}
