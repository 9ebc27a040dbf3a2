//! Starts a Redis Cluster. Each node is a master with an equal part of the slots.

use super::{PORTS, RedisOptions, RedisServer, wait_for};

/// The number of hash slots of every Redis Cluster.
const SLOTS: usize = 16_384;

/// A running Redis Cluster, which stops on drop.
pub struct RedisCluster {
    pub nodes: Vec<RedisServer>,
}

impl RedisCluster {
    /// Starts `count` masters. Waits until each of them knows the owners of all slots.
    pub async fn start(count: usize) -> Self {
        let mut nodes = Vec::new();
        for _ in 0..count {
            // By default, the port of the cluster's bus is the port plus 10,000, which a client on this machine may
            // use.
            let bus_port = fastrand::u16(PORTS);
            let config = format!(
                "cluster-enabled yes\ncluster-port {bus_port}\ncluster-config-file nodes.conf\ncluster-node-timeout 2000"
            );
            nodes.push((
                RedisServer::start_with(RedisOptions { config, ..RedisOptions::default() }).await,
                bus_port,
            ));
        }
        for (index, (node, _)) in nodes.iter().enumerate() {
            let (first, end) = (index * SLOTS / count, (index + 1) * SLOTS / count);
            node.command::<()>(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &(end - 1).to_string()]);
            // Two nodes with the same configuration epoch would first have to agree on different epochs.
            node.command::<()>(&["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()]);
        }
        for (node, bus_port) in &nodes[1..] {
            let (port, bus_port) = (node.port().to_string(), bus_port.to_string());
            nodes[0].0.command::<()>(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus_port]);
        }
        let cluster = Self { nodes: nodes.into_iter().map(|(node, _)| node).collect() };
        let is_complete = |node: &RedisServer| {
            let info: String = node.command(&["CLUSTER", "INFO"]);
            info.contains("cluster_state:ok") && info.contains(&format!("cluster_known_nodes:{count}\r"))
        };
        wait_for("the cluster to be complete", || cluster.nodes.iter().all(is_complete)).await;
        cluster
    }

    /// Returns the index of the node that owns the slot of a key.
    pub fn owner_of(&self, key: &str) -> usize {
        let slot: usize = self.nodes[0].command(&["CLUSTER", "KEYSLOT", key]);
        let count = self.nodes.len();
        (0..count).find(|index| slot < (index + 1) * SLOTS / count).unwrap()
    }
}
