//! Measures how the cost of a request changes with the number of keys, clients, connections and processors.

use crate::machine;
use crate::peers::{Peer, Setup};
use crate::rounds::{self, Entry, Plan};
use crate::table::{self, Reference};
use crate::workload::Workload;

/// The number of requests per second, low enough that a single connection can serve it sequentially.
const RATE: u32 = 1_000;
const LOAD_CLIENTS: u32 = 48;

pub fn measure(plan: &Plan, peers: &[Peer], setup: &Setup) {
    let plan = Plan { measures_max_rate: false, ..plan.clone() };
    for peer in peers {
        let growth = Growth { plan: &plan, peer, setup };
        let is_ours = matches!(peer, Peer::Keychoir(..));
        // nginx shows how much of the growth is caused by the kernel and the CPU caches.
        if is_ours || *peer == Peer::Nginx {
            growth.measure_connections();
        }
        if is_ours {
            growth.measure_keys();
            growth.measure_clients();
            growth.measure_processors();
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

    fn print_table(&self, title: &str, entries: &[Entry]) {
        let measured = rounds::measure(self.plan, entries, Workload::Get);
        let title = format!("growth of {}: {title}; get, {RATE} requests/s", self.peer.name());
        let reference = Reference { name: "the first", index: Some(0), max_ratio: None };
        table::print(&title, entries, &measured, &reference);
    }

    fn measure_keys(&self) {
        let keys = |keys: u32, strategy: &'static str| {
            self.entry(&format!("{keys} {strategy}"), Setup { keys, strategy, ..self.setup.clone() })
        };
        self.print_table(
            "number of keys and selection strategy",
            &[
                keys(1, "fill-first"),
                keys(100, "fill-first"),
                keys(1_000, "fill-first"),
                keys(100, "most-remaining"),
                keys(1_000, "most-remaining"),
            ],
        );
    }

    fn measure_clients(&self) {
        let clients =
            |clients: u32| self.entry(&clients.to_string(), Setup { clients, ..self.setup.clone() });
        self.print_table("number of clients", &[clients(1), clients(100), clients(10_000)]);
    }

    fn measure_connections(&self) {
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
        self.print_table("number of connections, used in turns", &entries);
    }

    fn measure_processors(&self) {
        let two = Setup { processors: "0,1", threads: 2, ..self.setup.clone() };
        self.print_table("processors", &[self.entry("one", self.setup.clone()), self.entry("two", two)]);
    }
}
