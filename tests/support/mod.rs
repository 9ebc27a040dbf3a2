//! Runs the complete proxy in the test process, on a free port, with a separate database and a simulated provider as
//! its upstream. Tests start it with [`start_proxy`], and [`TestProxy::close`] checks the usage records. The submodules
//! run Keychoir as a process, run the servers that it uses, and read WebSockets and server-sent events.

#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test target uses a part of this module")]

pub mod events;
pub mod program;
pub mod redis;
pub mod replicas;
pub mod routes;
pub mod slow_forwarder;
pub mod supabase;
pub mod websocket;

use std::path::PathBuf;
use std::task::Poll;
use std::time::Duration;

use keychoir::app::{self, AppConfig, DrainOutcome, RunningApp};
use keychoir::config::{BaseUrl, ClientConfig, Config};
use keychoir::policy::client::Rules;
use keychoir::secret::{ApiKey, Fingerprint, TokenFingerprint};
use keychoir::simulator::{Fault, Ledger, Plan, Simulator};
use keychoir::tasks::Tasks;
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A premade voice, which every account has.
pub const VOICE_ID: &str = "21m00Tcm4TlvDq8ikWAM";
pub const SPEECH_PATH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM";
/// The token that the test clients send in the header of the provider's keys.
pub const CLIENT_TOKEN: &str = "client-token-canary-7f3a";

pub const FIRST_KEY: &str = "sk_key_number_one_000000000000000000000000000000001";
pub const SECOND_KEY: &str = "sk_key_number_two_000000000000000000000000000000002";
pub const THIRD_KEY: &str = "sk_key_number_three_0000000000000000000000000000003";

/// The maximum time until a test's condition holds. It is much longer than any condition needs.
const WAIT_TIMEOUT: Duration = Duration::from_secs(30);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// The paths that the quota poller requests.
const POLLED_PATHS: [&str; 3] = ["/v1/user/subscription", "/v1/user", "/v1/models"];

/// A running proxy whose upstream is the simulator.
pub struct TestProxy {
    pub simulator: Simulator,
    pub app: RunningApp,
    pub url: String,
    pub client: reqwest::Client,
    config: Config,
    directory: TempDir,
}

/// Starts a proxy whose pool contains the keys of the plan, in the same order.
pub async fn start_proxy(plan: Plan) -> TestProxy {
    start_proxy_with(plan, |_| {}).await
}

/// Starts a proxy like [`start_proxy`], after `change` has changed its configuration.
pub async fn start_proxy_with(plan: Plan, change: impl FnOnce(&mut Config)) -> TestProxy {
    let directory = tempfile::tempdir().unwrap();
    start_proxy_in(directory, plan, change).await
}

/// Starts a proxy like [`start_proxy_with`], with its database in `directory`. The database may already exist.
pub async fn start_proxy_in(directory: TempDir, plan: Plan, change: impl FnOnce(&mut Config)) -> TestProxy {
    start_proxy_with_app(directory, plan, change, |_| {}).await
}

/// Starts a proxy like [`start_proxy_in`]. `change_app` changes settings that the configuration file does not have.
pub async fn start_proxy_with_app(
    directory: TempDir,
    plan: Plan,
    change: impl FnOnce(&mut Config),
    change_app: impl FnOnce(&mut AppConfig),
) -> TestProxy {
    let keys = plan.keys.iter().map(|key| ApiKey::new(&key.key).unwrap()).collect();
    let simulator =
        Simulator::start(bind_loopback().await, plan.with_forbidden_text(CLIENT_TOKEN)).await.unwrap();
    let mut config = Config::with_defaults(keys, simulator.base_url().parse::<BaseUrl>().unwrap());
    config.storage.path = directory.path().join("keychoir.db");
    config.storage.ephemeral = false;
    // The test clients keep idle connections open, and the drain need not wait for them.
    config.server.drain_idle_timeout = Duration::ZERO;
    // The disk of the machine that runs the tests may be nearly full.
    config.retry.min_disk_free_percent = 0;
    change(&mut config);
    let (app, url) = start_app(&config, change_app).await;
    TestProxy { simulator, app, url, client: http_client(), config, directory }
}

async fn start_app(config: &Config, change_app: impl FnOnce(&mut AppConfig)) -> (RunningApp, String) {
    let mut app_config = AppConfig::from_config(config.clone()).unwrap();
    change_app(&mut app_config);
    let mut app = app::start(app_config, vec![bind_loopback().await.into()]).unwrap();
    if config.quota_polling.enabled {
        // A test sets its faults after this poll, so that they do not affect it.
        let is_polled = app.wait_for_first_poll(WAIT_TIMEOUT).await;
        assert!(is_polled, "the first quota poll must end");
    }
    let url = format!("http://{}", app.address());
    (app, url)
}

/// Returns the configuration of a client.
pub fn client_config(name: &str, token: &str, rules: Rules) -> ClientConfig {
    ClientConfig::new(name.to_owned(), TokenFingerprint::new(token), rules)
}

/// Returns a listener on a free port of the loopback interface.
pub async fn bind_loopback() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

/// Sends the text of a request unchanged, and reads until the proxy closes the connection.
pub async fn send_raw(proxy: &TestProxy, request: &str) -> String {
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = Vec::new();
    stream.read_to_end(&mut response).await.unwrap();
    String::from_utf8_lossy(&response).into_owned()
}

/// Reads from a stream up to the end of a request head.
pub async fn read_head(stream: &mut TcpStream) -> Vec<u8> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    head
}

/// Starts an upstream that sends `response` after every request head and keeps the connection open.
/// Returns its base URL.
pub async fn start_fixed_upstream(response: &[u8]) -> BaseUrl {
    let listener = bind_loopback().await;
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

fn http_client() -> reqwest::Client {
    keychoir::upstream::http_client().unwrap().build().unwrap()
}

impl TestProxy {
    /// Reloads the configuration of startup, changed by `change` and `change_app`.
    pub fn reload(&self, change: impl FnOnce(&mut Config), change_app: impl FnOnce(&mut AppConfig)) {
        let mut config = self.config.clone();
        change(&mut config);
        let mut app_config = AppConfig::from_reload(&config, &self.config).unwrap();
        change_app(&mut app_config);
        self.app.reload(app_config).unwrap();
    }

    /// Requests speech of the given number of characters, which costs the same number of credits.
    pub async fn request_speech(&self, characters: usize) -> reqwest::Response {
        self.post(SPEECH_PATH, &json!({"text": "a".repeat(characters), "model_id": "eleven_multilingual_v2"}))
            .await
    }

    /// Sends requests until one has the status 200. After a client has disconnected, another thread releases the
    /// permits of its request with a delay.
    pub async fn wait_until_served(&self, path: &str) {
        let requests = async { while self.get(path).await.status() != 200 {} };
        let result = tokio::time::timeout(WAIT_TIMEOUT, requests).await;
        result.expect("a request must be served within the timeout");
    }

    /// Returns a request to the proxy with a client token.
    pub fn request(&self, method: Method, path: &str, token: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url)).header("xi-api-key", token)
    }

    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        self.request(Method::POST, path, CLIENT_TOKEN).json(body).send().await.unwrap()
    }

    pub async fn get(&self, path: &str) -> reqwest::Response {
        self.request(Method::GET, path, CLIENT_TOKEN).send().await.unwrap()
    }

    pub async fn status_document(&self) -> Value {
        self.get("/api/elevenlabs-status").await.json().await.unwrap()
    }

    /// Returns the status of each key.
    pub async fn key_statuses(&self) -> Vec<String> {
        let status = self.status_document().await;
        let keys = status["keys"].as_array().unwrap();
        keys.iter().map(|key| key["status"].as_str().unwrap().to_owned()).collect()
    }

    /// Sets the fault of all requests with the given `key`, in the notation of the simulator.
    pub fn set_fault(&self, key: &str, fault: &str) {
        self.simulator.set_fault(key, Some(fault.parse::<Fault>().unwrap()));
    }

    /// Returns the number of requests that the provider received with each key, except requests on the paths that the
    /// quota poller requests.
    pub fn request_counts(&self, keys: &[&str]) -> Vec<usize> {
        let ledger = self.simulator.ledger();
        let request_count = |key: &str| {
            let requests = ledger.requests.iter().filter(|request| request.key.as_deref() == Some(key));
            requests.filter(|request| !POLLED_PATHS.contains(&&*request.path_and_query)).count()
        };
        keys.iter().map(|key| request_count(key)).collect()
    }

    pub fn database_path(&self) -> PathBuf {
        database_path(&self.directory)
    }

    /// Stops the proxy and the provider. Asserts that the provider recorded no violation, and that the usage
    /// records of each key sum up to the credits that the provider charged.
    pub async fn close(self) -> (Ledger, TempDir) {
        assert_eq!(self.app.drain(DRAIN_TIMEOUT).await, DrainOutcome::Completed);
        let ledger = self.simulator.ledger();
        assert_eq!(ledger.violations, Vec::<String>::new());
        let records = read_usage_records(&database_path(&self.directory));
        for key in &ledger.keys {
            let key_hash = Fingerprint::new(&key.key).to_string();
            let key_records = records.iter().filter(|record| record.key_hash == key_hash);
            let recorded_credits: i64 = key_records.map(|record| record.credits).sum();
            let recorded_credits = u64::try_from(recorded_credits).unwrap();
            assert_eq!(recorded_credits, key.charged, "the records of {} must equal its charges", key.key);
        }
        self.simulator.stop().await;
        (ledger, self.directory)
    }

    /// Stops the proxy and starts it again with the same database and the same provider.
    pub async fn restart(self) -> Self {
        assert_eq!(self.app.drain(DRAIN_TIMEOUT).await, DrainOutcome::Completed);
        let (app, url) = start_app(&self.config, |_| {}).await;
        Self { app, url, ..self }
    }

    /// Stops the proxy and the provider without the checks of [`close`](Self::close), for tests whose usage records
    /// differ from the ledger of this provider.
    pub async fn close_unchecked(self) -> TempDir {
        assert_eq!(self.app.drain(DRAIN_TIMEOUT).await, DrainOutcome::Completed);
        self.simulator.stop().await;
        self.directory
    }

    /// Closes the proxy like [`close`](Self::close). Returns its usage records.
    pub async fn into_records(self) -> Vec<UsageRecord> {
        let (_, directory) = self.close().await;
        read_usage_records(&database_path(&directory))
    }
}

fn database_path(directory: &TempDir) -> PathBuf {
    directory.path().join("keychoir.db")
}

/// The usage record of an attempt.
#[derive(Debug)]
pub struct UsageRecord {
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

/// Returns all usage records of a database, oldest first.
pub fn read_usage_records(path: &std::path::Path) -> Vec<UsageRecord> {
    let connection = rusqlite::Connection::open(path).unwrap();
    let mut statement = connection
        .prepare(
            "SELECT key_hash, request_id, number, client, route, status, verdict, credits, credits_from,
                request_bytes, response_bytes, method
             FROM attempts ORDER BY id",
        )
        .unwrap();
    let rows = statement.query_map([], |row| {
        Ok(UsageRecord {
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

/// Asserts that a response is an error response of the proxy and not of the provider.
#[track_caller]
pub fn assert_proxy_error(response: &reqwest::Response, status: u16, code: &str) {
    assert_eq!(response.status(), status);
    assert_eq!(response.headers()["x-keychoir-error"], code);
}

/// Polls `condition` until it holds.
///
/// # Panics
///
/// Panics if the condition does not hold within [`WAIT_TIMEOUT`].
pub async fn wait_until(condition: impl Fn() -> bool) {
    let polling = async {
        while !condition() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    };
    let result = tokio::time::timeout(WAIT_TIMEOUT, polling).await;
    result.expect("the condition must hold within the timeout");
}

/// Runs all futures concurrently. Returns their outputs in the order of completion.
pub async fn join_all<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut pending: Vec<_> = futures.map(Box::pin).collect();
    let mut outputs = Vec::new();
    std::future::poll_fn(|context| {
        pending.retain_mut(|future| match future.as_mut().poll(context) {
            Poll::Ready(output) => {
                outputs.push(output);
                false
            }
            Poll::Pending => true,
        });
        if pending.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    outputs
}
