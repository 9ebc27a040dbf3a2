//! The whole program in front of a simulated ElevenLabs, on port 0, with a database in a folder of
//! its own.

#![allow(dead_code, unreachable_pub, unused_imports, reason = "every test uses its own part of this module")]

pub mod program;
pub mod routes;
pub mod supabase;
pub mod websocket;

use std::path::PathBuf;
use std::task::Poll;
use std::time::Duration;

use keychoir::app::{self, AppConfig, Drained, Running};
use keychoir::config::{BaseUrl, Config};
use keychoir::secret::{ApiKey, Fingerprint};
use keychoir::simulator::{Fault, Ledger, Plan, Simulator};
use keychoir::tasks::Tasks;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub const VOICE: &str = "21m00Tcm4TlvDq8ikWAM";
pub const SPEECH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM";
/// The paths that the poller requests by itself.
const WATCHED: [&str; 3] = ["/v1/user/subscription", "/v1/user", "/v1/models"];
/// The credential of the test clients.
pub const CLIENT_TOKEN: &str = "client-token-canary-7f3a";

pub const ONE: &str = "sk_key_number_one_000000000000000000000000000000001";
pub const TWO: &str = "sk_key_number_two_000000000000000000000000000000002";
pub const THREE: &str = "sk_key_number_three_0000000000000000000000000000003";

/// Keychoir in front of a simulator.
pub struct TestProxy {
    pub simulator: Simulator,
    pub running: Running,
    pub url: String,
    pub client: reqwest::Client,
    config: Config,
    folder: TempDir,
}

/// A proxy whose pool has the plan's keys, in their order.
pub async fn start_proxy(plan: Plan) -> TestProxy {
    start_proxy_with(plan, |_| {}).await
}

/// The same with a modified configuration.
pub async fn start_proxy_with(plan: Plan, change: impl FnOnce(&mut Config)) -> TestProxy {
    let folder = tempfile::tempdir().unwrap();
    start_proxy_in(folder, plan, change).await
}

/// The same with a database that may exist already.
pub async fn start_proxy_in(folder: TempDir, plan: Plan, change: impl FnOnce(&mut Config)) -> TestProxy {
    let keys = plan.keys.iter().map(|key| ApiKey::new(&key.key).unwrap()).collect();
    let simulator = Simulator::start(loopback().await, plan.forbidding(CLIENT_TOKEN)).await.unwrap();
    let mut config = Config::with_defaults(keys, simulator.base_url().parse::<BaseUrl>().unwrap());
    config.storage.path = folder.path().join("keychoir.db");
    config.storage.ephemeral = false;
    // The clients of the tests keep their connections, and the shutdown need not wait for them.
    config.server.drain_idle_timeout = Duration::ZERO;
    // The disk of a machine that runs tests may be nearly full.
    config.retry.min_disk_free_percent = 0;
    change(&mut config);
    let (running, url) = run(&config).await;
    TestProxy { simulator, running, url, client: client(), config, folder }
}

async fn run(config: &Config) -> (Running, String) {
    let is_watched = config.quota_polling.enabled;
    let parts = AppConfig::of(config.clone()).unwrap();
    let mut running = app::start(parts, vec![loopback().await.into()]).unwrap();
    // The poller polls once at the start; faults of a test must not affect that poll.
    assert!(!is_watched || running.first_round(Duration::from_secs(30)).await);
    let url = format!("http://{}", running.address());
    (running, url)
}

pub async fn loopback() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

/// Sends raw bytes and reads until the server closes.
pub async fn send_raw(proxy: &TestProxy, request: &str) -> String {
    let mut stream = TcpStream::connect(proxy.running.address()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// The base URL of an upstream that sends `response` after every request head, and leaves the
/// connection open.
pub async fn fixed_upstream(response: &[u8]) -> BaseUrl {
    let listener = loopback().await;
    let url = format!("http://{}", listener.local_addr().unwrap());
    let response = response.to_vec();
    Tasks::new().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let response = response.clone();
            Tasks::new().spawn(async move {
                let mut head = Vec::new();
                while let Ok(byte) = stream.read_u8().await {
                    head.push(byte);
                    if head.ends_with(b"\r\n\r\n") {
                        stream.write_all(&response).await.unwrap();
                    }
                }
            });
        }
    });
    url.parse().unwrap()
}

fn client() -> reqwest::Client {
    keychoir::upstream::http_client().unwrap().build().unwrap()
}

impl TestProxy {
    /// Speech of this number of characters, which costs the same number of credits.
    pub async fn speak(&self, characters: usize) -> reqwest::Response {
        self.post(SPEECH, &json!({"text": "a".repeat(characters), "model_id": "eleven_multilingual_v2"}))
            .await
    }

    /// Sends requests until one is served: the permits of a disconnected client are released by
    /// another thread, right after the provider has seen it disconnect.
    pub async fn served(&self, path: &str) {
        let served = async { while self.get(path).await.status() != 200 {} };
        tokio::time::timeout(Duration::from_secs(30), served).await.expect("it was never served");
    }

    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        let request = self.client.post(format!("{}{path}", self.url)).header("xi-api-key", CLIENT_TOKEN);
        request.json(body).send().await.unwrap()
    }

    pub async fn get(&self, path: &str) -> reqwest::Response {
        let request = self.client.get(format!("{}{path}", self.url)).header("xi-api-key", CLIENT_TOKEN);
        request.send().await.unwrap()
    }

    pub async fn status(&self) -> Value {
        self.get("/api/elevenlabs-status").await.json().await.unwrap()
    }

    /// The status words of all keys.
    pub async fn statuses(&self) -> Vec<String> {
        let status = self.status().await;
        let keys = status["keys"].as_array().unwrap();
        keys.iter().map(|key| key["status"].as_str().unwrap().to_owned()).collect()
    }

    pub fn always(&self, key: &str, fault: &str) {
        self.simulator.always(key, Some(fault.parse::<Fault>().unwrap()));
    }

    /// Requests that the provider received, without those of the poller, by key.
    pub fn hits(&self, keys: &[&str]) -> Vec<usize> {
        let ledger = self.simulator.ledger();
        let asked = |key: &str| {
            let requests = ledger.requests.iter().filter(|request| request.key.as_deref() == Some(key));
            requests.filter(|request| !WATCHED.contains(&&*request.path_and_query)).count()
        };
        keys.iter().map(|key| asked(key)).collect()
    }

    /// The path of its database.
    pub fn database(&self) -> PathBuf {
        database(&self.folder)
    }

    /// Stops it, and compares the usage records with the provider's ledger: to the credit, key by
    /// key, and without violations.
    pub async fn close(self) -> (Ledger, TempDir) {
        assert_eq!(self.running.drain(Duration::from_secs(10)).await, Drained::Clean);
        let ledger = self.simulator.ledger();
        assert_eq!(ledger.violations, Vec::<String>::new());
        let spent = attempts(&database(&self.folder));
        for entry in &ledger.keys {
            let print = Fingerprint::of(&entry.key).to_string();
            let booked: i64 = spent.iter().filter(|row| row.key_hash == print).map(|row| row.credits).sum();
            assert_eq!(u64::try_from(booked).unwrap(), entry.charged, "credits of {}", entry.key);
        }
        self.simulator.stop().await;
        (ledger, self.folder)
    }

    /// Stops the program and starts it again with the same database and the same provider.
    pub async fn restarted(self) -> Self {
        assert_eq!(self.running.drain(Duration::from_secs(10)).await, Drained::Clean);
        let (running, url) = run(&self.config).await;
        Self { running, url, ..self }
    }

    /// Stops it, with usage records that contain more than its provider has received.
    pub async fn abandon(self) -> TempDir {
        assert_eq!(self.running.drain(Duration::from_secs(10)).await, Drained::Clean);
        self.simulator.stop().await;
        self.folder
    }

    /// Stops it and returns the records.
    pub async fn records(self) -> Vec<Record> {
        let (_, folder) = self.close().await;
        attempts(&database(&folder))
    }
}

fn database(folder: &TempDir) -> PathBuf {
    folder.path().join("keychoir.db")
}

/// A usage record.
#[derive(Debug)]
pub struct Record {
    pub key_hash: String,
    pub request_id: String,
    pub number: i64,
    pub client: String,
    pub route: String,
    pub status: Option<i64>,
    pub verdict: String,
    pub credits: i64,
    pub credits_from: String,
    pub request_bytes: i64,
    pub response_bytes: i64,
    pub method: String,
}

/// All records of a database, oldest first.
pub fn attempts(path: &std::path::Path) -> Vec<Record> {
    let connection = rusqlite::Connection::open(path).unwrap();
    let mut statement = connection
        .prepare(
            "SELECT key_hash, request_id, number, client, route, status, verdict, credits, credits_from,
                request_bytes, response_bytes, method
             FROM attempts ORDER BY id",
        )
        .unwrap();
    let rows = statement.query_map([], |row| {
        Ok(Record {
            key_hash: row.get(0)?,
            request_id: row.get(1)?,
            number: row.get(2)?,
            client: row.get(3)?,
            route: row.get(4)?,
            status: row.get(5)?,
            verdict: row.get(6)?,
            credits: row.get(7)?,
            credits_from: row.get(8)?,
            request_bytes: row.get(9)?,
            response_bytes: row.get(10)?,
            method: row.get(11)?,
        })
    });
    rows.unwrap().map(Result::unwrap).collect()
}

/// Asserts that a response is one of Keychoir's own.
#[track_caller]
pub fn assert_ours(answer: &reqwest::Response, status: u16, code: &str) {
    assert_eq!(answer.status(), status);
    assert_eq!(answer.headers()["x-keychoir-error"], code);
}

/// How often a condition is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Waits until the condition holds, by polling; the test's own timeout is the bound.
pub async fn wait_until(is_so: impl Fn() -> bool) {
    let looking = async {
        while !is_so() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), looking).await.expect("it never came to be so");
}

/// Runs all futures concurrently; returns their outputs in the order of completion.
pub async fn join_all<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<_> = futures.map(Box::pin).collect();
    let mut ended = Vec::new();
    std::future::poll_fn(|cx| {
        running.retain_mut(|future| match future.as_mut().poll(cx) {
            Poll::Ready(output) => {
                ended.push(output);
                false
            }
            Poll::Pending => true,
        });
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    ended
}
