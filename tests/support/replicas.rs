//! Runs several Keychoir processes with the same keys in front of one simulator. Each of them has a separate state
//! directory and database. With the URL of a Redis server, they share one pool. Tests can add, kill, stop and restart
//! replicas, and compare their usage records with the charges of the provider.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use keychoir::secret::Fingerprint;
use keychoir::simulator::{Ledger, Plan, Simulator};
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::program::{Program, keychoir_command};
use super::{SPEECH_PATH, UsageRecord, bind_loopback, http_client, read_usage_records};

/// The running programs and their provider.
pub struct TestReplicas {
    pub simulator: Simulator,
    pub client: reqwest::Client,
    replicas: Vec<Replica>,
    /// The number of requests sent so far, which selects the next replica.
    request_count: AtomicUsize,
    /// The environment variables of every replica.
    settings: Vec<(String, String)>,
}

struct Replica {
    /// The process. It is `None` after the replica was killed or stopped.
    program: Option<Program>,
    url: String,
    directory: TempDir,
}

/// The usage records of all replicas and the ledger of the provider, after the end of the replicas.
pub struct ReplicaResults {
    /// The usage records of each replica, oldest first.
    pub records: Vec<Vec<UsageRecord>>,
    pub ledger: Ledger,
}

impl TestReplicas {
    /// Starts the given number of replicas. Without the URL of a Redis server, each of them has a separate pool.
    pub async fn start(count: usize, plan: Plan, redis_url: Option<&str>) -> Self {
        Self::start_with(count, plan, redis_url, &[]).await
    }

    /// Adds a replica with further environment variables, such as another clock.
    pub fn add(&mut self, settings: &[(&str, &str)]) {
        let mut environment = self.settings.clone();
        environment.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        self.replicas.push(Replica::start(tempfile::tempdir().unwrap(), &environment));
    }

    /// Starts replicas like [`start`](Self::start), with further environment variables.
    pub async fn start_with(
        count: usize,
        plan: Plan,
        redis_url: Option<&str>,
        settings: &[(&str, &str)],
    ) -> Self {
        let keys: Vec<&str> = plan.keys.iter().map(|key| key.key.as_str()).collect();
        let mut environment = vec![
            ("ELEVENLABS_API_KEYS".to_owned(), keys.join(",")),
            ("KEYCHOIR_SERVER__TLS".to_owned(), "off".to_owned()),
            ("KEYCHOIR_LOG__FORMAT".to_owned(), "json".to_owned()),
            ("KEYCHOIR_QUOTA_POLLING__ENABLED".to_owned(), "false".to_owned()),
            // The test clients keep idle connections open, and the drain need not wait for them.
            ("KEYCHOIR_SERVER__DRAIN_IDLE_TIMEOUT".to_owned(), "0s".to_owned()),
        ];
        environment.extend(redis_url.map(|url| ("KEYCHOIR_REDIS__URL".to_owned(), url.to_owned())));
        environment.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let simulator = Simulator::start(bind_loopback().await, plan).await.unwrap();
        environment.push(("KEYCHOIR_UPSTREAM__BASE_URL".to_owned(), simulator.base_url()));
        let replicas =
            (0..count).map(|_| Replica::start(tempfile::tempdir().unwrap(), &environment)).collect();
        Self {
            simulator,
            client: http_client(),
            replicas,
            request_count: AtomicUsize::new(0),
            settings: environment,
        }
    }

    pub fn url(&self, replica: usize) -> &str {
        &self.replicas[replica].url
    }

    /// Returns the process of a running replica, so that a test can read its log.
    pub fn program(&mut self, replica: usize) -> &mut Program {
        self.replicas[replica].program.as_mut().expect("the replica must run")
    }

    /// Returns a request to the next running replica, in rotation.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let running: Vec<&Replica> =
            self.replicas.iter().filter(|replica| replica.program.is_some()).collect();
        let replica = running[self.request_count.fetch_add(1, Ordering::Relaxed) % running.len()];
        self.client.request(method, format!("{}{path}", replica.url))
    }

    /// Requests speech of the given number of characters, which costs the same number of credits, from the next
    /// replica.
    pub async fn request_speech(&self, characters: usize) -> reqwest::Response {
        let body = json!({"text": "a".repeat(characters), "model_id": "eleven_multilingual_v2"});
        self.request(Method::POST, SPEECH_PATH).json(&body).send().await.unwrap()
    }

    /// Returns the JSON document at a path of one replica.
    pub async fn document(&self, replica: usize, path: &str) -> Value {
        let response = self.client.get(format!("{}{path}", self.url(replica))).send().await.unwrap();
        response.json().await.unwrap()
    }

    /// Kills a replica (SIGKILL). Its requests in flight fail, and its last usage records may be lost.
    pub fn kill(&mut self, replica: usize) {
        let program = self.replicas[replica].program.take().expect("the replica must run");
        program.send_signal("KILL");
        program.wait_for_exit();
    }

    /// Stops a replica gracefully (SIGTERM).
    pub fn stop(&mut self, replica: usize) {
        let program = self.replicas[replica].program.take().expect("the replica must run");
        let (code, stderr) = program.terminate();
        assert_eq!(code, Some(0), "a replica must end without an error: {stderr}");
    }

    /// Adds a replica whose database is a copy of the database of a stopped replica.
    pub fn add_copy_of(&mut self, replica: usize) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::copy(database_path(&self.replicas[replica].directory), database_path(&directory)).unwrap();
        self.replicas.push(Replica::start(directory, &self.settings));
    }

    /// Starts a killed or stopped replica with its state directory, on another port.
    pub fn restart(&mut self, replica: usize) {
        let replica = &mut self.replicas[replica];
        assert!(replica.program.is_none(), "the replica must not run before its restart");
        replica.run(&self.settings);
    }

    /// Ends all replicas and the provider. Returns the results without a comparison, for a test that has killed a
    /// replica.
    pub async fn close_unchecked(self) -> ReplicaResults {
        let mut records = Vec::new();
        for replica in self.replicas {
            if let Some(program) = replica.program {
                let (code, stderr) = program.terminate();
                assert_eq!(code, Some(0), "a replica must end without an error: {stderr}");
            }
            records.push(read_usage_records(&database_path(&replica.directory)));
        }
        let ledger = self.simulator.ledger();
        self.simulator.stop().await;
        ReplicaResults { records, ledger }
    }

    /// Ends all replicas and the provider. Asserts that the provider recorded no violation, and that the usage records
    /// of all replicas together have the credits that the provider charged to each key.
    pub async fn close(self) -> ReplicaResults {
        let results = self.close_unchecked().await;
        assert_eq!(results.ledger.violations, Vec::<String>::new());
        for key in &results.ledger.keys {
            let recorded_credits = results.credits_of(&key.key);
            assert_eq!(recorded_credits, key.charged, "the records of {} must equal its charges", key.key);
        }
        results
    }
}

impl ReplicaResults {
    /// Returns the credits of a key in the usage records of all replicas.
    pub fn credits_of(&self, key: &str) -> u64 {
        let key_hash = Fingerprint::new(key).to_string();
        let key_records = self.records.iter().flatten().filter(|record| record.key_hash == key_hash);
        u64::try_from(key_records.map(|record| record.credits).sum::<i64>()).unwrap()
    }
}

impl Replica {
    fn start(directory: TempDir, settings: &[(String, String)]) -> Self {
        let mut replica = Self { program: None, url: String::new(), directory };
        replica.run(settings);
        replica
    }

    fn run(&mut self, settings: &[(String, String)]) {
        let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
        command.env("KEYCHOIR_STORAGE__PATH", database_path(&self.directory)).envs(settings.iter().cloned());
        let mut program = Program::start(&mut command);
        self.url = format!("http://{}", program.wait_for_address());
        self.program = Some(program);
    }
}

fn database_path(directory: &TempDir) -> PathBuf {
    directory.path().join("keychoir.db")
}
