//! Starts a master, its replica, and three sentinels that promote the replica when the master is lost.

use std::fs;

use tempfile::TempDir;

use super::{RedisOptions, RedisServer, ServerProcess, connect, info_field, query, wait_for};

/// The name under which the sentinels know the master.
pub const MASTER_NAME: &str = "keychoir";
const SENTINEL_COUNT: usize = 3;

/// A master, its replica and the sentinels, which stop on drop.
pub struct Sentinels {
    servers: [RedisServer; 2],
    /// The index of the server that the sentinels call the master.
    master: usize,
    sentinels: Vec<Sentinel>,
}

struct Sentinel {
    process: ServerProcess,
    _directory: TempDir,
}

impl Sentinels {
    /// Starts the servers. Waits until the sentinels know the replica and each other, which takes about two seconds.
    pub async fn start() -> Self {
        let master = RedisServer::start().await;
        // By default, the master sends its data to a replica after five seconds, to serve several replicas at once.
        master.command::<()>(&["CONFIG", "SET", "repl-diskless-sync-delay", "0"]);
        let config = format!("replicaof 127.0.0.1 {}\nrepl-diskless-sync-delay 0", master.port());
        let replica = RedisServer::start_with(RedisOptions { config, ..RedisOptions::default() }).await;
        // A sentinel looks for replicas at its start, and then every ten seconds.
        wait_for("the Redis replica to connect", || {
            replica.info("replication", "master_link_status").as_deref() == Some("up")
        })
        .await;
        let mut sentinels = Vec::new();
        for _ in 0..SENTINEL_COUNT {
            sentinels.push(Sentinel::start(master.port()).await);
        }
        let is_complete = |sentinel: &Sentinel| {
            sentinel.master_field("num-slaves") == Some("1".to_owned())
                && sentinel.master_field("num-other-sentinels") == Some((SENTINEL_COUNT - 1).to_string())
        };
        wait_for("the sentinels to find all servers", || sentinels.iter().all(is_complete)).await;
        Self { servers: [master, replica], master: 0, sentinels }
    }

    /// Returns the URL of the master with the addresses of the sentinels.
    pub fn url(&self) -> String {
        format!("redis+sentinel://{}/{MASTER_NAME}", self.addresses().join(","))
    }

    /// Returns the addresses of the sentinels.
    pub fn addresses(&self) -> Vec<String> {
        let address = |sentinel: &Sentinel| format!("127.0.0.1:{}", sentinel.process.port);
        self.sentinels.iter().map(address).collect()
    }

    /// Returns the server that the sentinels call the master.
    pub fn master(&self) -> &RedisServer {
        &self.servers[self.master]
    }

    /// Kills the master, and waits until all sentinels name the other server and this server accepts writes.
    pub async fn fail_over(&mut self) {
        self.servers[self.master].kill();
        self.master = 1 - self.master;
        let master = &self.servers[self.master];
        wait_for("the sentinels to report the new master", || {
            self.sentinels.iter().all(|sentinel| sentinel.master_port() == master.port())
                && master.info("replication", "role").as_deref() == Some("master")
        })
        .await;
    }

    /// Starts the server that [`fail_over`](Self::fail_over) has killed, as a replica of the master. Waits until the
    /// sentinels can promote it.
    pub async fn restart_replica(&mut self) {
        let port = self.master().port().to_string();
        let replica = &mut self.servers[1 - self.master];
        replica.restart().await;
        // Without this command, the sentinels would make the server a replica after eight seconds.
        replica.command::<()>(&["REPLICAOF", "127.0.0.1", &port]);
        wait_for("the restarted server to become a replica", || {
            replica.info("replication", "master_link_status").as_deref() == Some("up")
        })
        .await;
    }
}

impl Sentinel {
    async fn start(master_port: u16) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().display();
        // A master that does not respond for 300 ms counts as lost, if two of the three sentinels agree.
        let config = format!(
            "bind 127.0.0.1\ndir {path}\nunixsocket {path}/redis.sock\n\
             sentinel monitor {MASTER_NAME} 127.0.0.1 {master_port} 2\n\
             sentinel down-after-milliseconds {MASTER_NAME} 300\n\
             sentinel failover-timeout {MASTER_NAME} 1000\n"
        );
        fs::write(directory.path().join("redis.conf"), config).unwrap();
        let url = format!("redis+unix://{path}/redis.sock");
        let process =
            ServerProcess::start("redis-sentinel", directory.path(), false, || connect(&url).is_some()).await;
        Self { process, _directory: directory }
    }

    fn query<T: redis::FromRedisValue>(&self, words: &[&str]) -> T {
        let url = format!("redis://127.0.0.1:{}", self.process.port);
        query(&mut connect(&url).expect("a sentinel must accept a connection"), words)
    }

    fn master_field(&self, name: &str) -> Option<String> {
        let fields: Vec<String> = self.query(&["SENTINEL", "MASTER", MASTER_NAME]);
        fields.chunks(2).find(|field| field[0] == name).map(|field| field[1].clone())
    }

    fn master_port(&self) -> u16 {
        let address: [String; 2] = self.query(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME]);
        address[1].parse().unwrap()
    }
}
