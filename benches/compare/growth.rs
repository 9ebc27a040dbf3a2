//! Measures how the cost of a request changes with the numbers of keys, clients, connections and processors (`growth`
//! on the command line).

use crate::machine;
use crate::peers::{Peer, PeerSetup};
use crate::rounds::{self, ComparedPeer, RoundPlan};
use crate::table::{self, Reference};
use crate::workload::Workload;

/// The number of requests per second. It is so low that one connection can serve all requests one after the other.
const RATE: u32 = 1_000;
const LOAD_CLIENTS: u32 = 48;

/// Measures the growth for Keychoir, and for nginx the growth with the number of connections.
pub fn measure(plan: &RoundPlan, peers: &[Peer], setup: &PeerSetup) {
    let plan = RoundPlan { measures_max_rate: false, ..plan.clone() };
    for peer in peers {
        let growth = Growth { plan: &plan, peer, setup };
        let is_keychoir = matches!(peer, Peer::Keychoir(..));
        // nginx shows how much of the growth is caused by the kernel and the CPU caches.
        if is_keychoir || *peer == Peer::Nginx {
            growth.measure_connections();
        }
        if is_keychoir {
            growth.measure_keys();
            growth.measure_clients();
            growth.measure_processors();
        }
    }
}

/// The measurements of one proxy.
struct Growth<'a> {
    plan: &'a RoundPlan,
    peer: &'a Peer,
    setup: &'a PeerSetup,
}

impl Growth<'_> {
    fn compared_peer(&self, name: &str, setup: PeerSetup) -> ComparedPeer {
        ComparedPeer {
            name: name.to_owned(),
            rate: RATE,
            ..ComparedPeer::new(self.peer.clone(), setup, Workload::Get)
        }
    }

    fn print_table(&self, title: &str, compared_peers: &[ComparedPeer]) {
        let peer_results = rounds::measure(self.plan, compared_peers, Workload::Get);
        let title = format!("growth of {}: {title}; get, {RATE} requests/s", self.peer.name());
        let reference = Reference { name: "the first", index: Some(0), max_ratio: None };
        table::print(&title, compared_peers, &peer_results, &reference);
    }

    fn measure_keys(&self) {
        let with_keys = |keys: u32, strategy: &'static str| {
            self.compared_peer(
                &format!("{keys} {strategy}"),
                PeerSetup { keys, strategy, ..self.setup.clone() },
            )
        };
        self.print_table(
            "number of keys and selection strategy",
            &[
                with_keys(1, "fill-first"),
                with_keys(100, "fill-first"),
                with_keys(1_000, "fill-first"),
                with_keys(100, "most-remaining"),
                with_keys(1_000, "most-remaining"),
            ],
        );
    }

    fn measure_clients(&self) {
        let with_clients = |clients: u32| {
            self.compared_peer(&clients.to_string(), PeerSetup { clients, ..self.setup.clone() })
        };
        self.print_table("number of clients", &[with_clients(1), with_clients(100), with_clients(10_000)]);
    }

    fn measure_connections(&self) {
        let with_connections = |load_clients: u32, connections_per_client: u32| ComparedPeer {
            load_clients,
            connections_per_client,
            ..self.compared_peer(&(load_clients * connections_per_client).to_string(), self.setup.clone())
        };
        let mut compared_peers = vec![
            with_connections(1, 1),
            with_connections(LOAD_CLIENTS, 1),
            with_connections(LOAD_CLIENTS, 20),
        ];
        if machine::raise_open_files_limit() > 10_500 {
            compared_peers.push(with_connections(LOAD_CLIENTS, 208));
        }
        self.print_table("number of connections, used in rotation", &compared_peers);
    }

    fn measure_processors(&self) {
        let two_processors = PeerSetup { processors: "0,1", threads: 2, ..self.setup.clone() };
        self.print_table(
            "processors",
            &[self.compared_peer("one", self.setup.clone()), self.compared_peer("two", two_processors)],
        );
    }
}
