//! Gives the command line and tests access to the state of a running Keychoir, and passes the overlay to the replica
//! task.

use std::net::SocketAddr;

use super::https::HttpsState;
use super::{Address, RunningApp};
use crate::clock;
use crate::pool::KeySnapshot;
use crate::shared::OverlayPort;
use crate::store::History;
use crate::telemetry::EventRing;
use crate::upstream::Reachability;

impl RunningApp {
    /// Returns the address of the first TCP listener, or 127.0.0.1:0 if there is no TCP listener.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        let tcp_address = self.addresses.iter().find_map(|address| match address {
            Address::Tcp(tcp_address) => Some(*tcp_address),
            Address::Unix(_) => None,
        });
        tcp_address.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    /// Returns the addresses of the listeners for clients.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Returns the addresses of the listeners for operators. The list is empty if the listeners for clients also serve
    /// operators.
    #[must_use]
    pub fn operator_addresses(&self) -> &[Address] {
        &self.operator_addresses
    }

    /// Returns the TLS state of the listener at `address`.
    #[must_use]
    pub fn https(&self, address: &Address) -> HttpsState {
        self.certificates.state(address)
    }

    /// Returns the sorted names of the clients with a token. If the list is empty, no token is required.
    #[must_use]
    pub fn client_names(&self) -> Vec<String> {
        let config = self.config.load();
        let mut names: Vec<String> =
            config.clients.names_with_token().map(|name| name.as_str().to_owned()).collect();
        names.sort_unstable();
        names
    }

    /// Returns a handle that reads usage records and records configuration changes.
    #[must_use]
    pub fn history(&self) -> History {
        self.store_writer.history.clone()
    }

    /// Returns the buffer of recent events that the admin API sends to its clients.
    #[must_use]
    pub fn events(&self) -> EventRing {
        self.events.clone()
    }

    /// Returns a snapshot of the keys and their state.
    #[must_use]
    pub fn keys(&self) -> Vec<KeySnapshot> {
        self.pool.snapshot(clock::now())
    }

    /// Returns the number of requests that wait for a key.
    #[must_use]
    pub fn queued_requests(&self) -> usize {
        self.pool.queued_requests()
    }

    /// Returns whether this process shares its pool with other replicas.
    #[must_use]
    pub fn has_replicas(&self) -> bool {
        self.replica.is_some()
    }

    /// Passes `port` to the replica task, which then shares the overlay through the channels of `port`. Does nothing if
    /// this process shares its pool with no other replicas.
    pub fn share_overlay(&self, port: OverlayPort) {
        if let Some(replica) = &self.replica {
            // The send fails only if the replica task has ended, which happens at shutdown.
            let _ = replica.overlay.try_send(port);
        }
    }

    /// Returns the result of the last connection attempt to the provider.
    #[must_use]
    pub fn reachability(&self) -> Reachability {
        self.reachability.get()
    }
}
