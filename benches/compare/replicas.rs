//! Measures the cost of a shared pool. `replica-commands` counts the commands that Redis executes for one to three
//! replicas at different rates. `replica-latency` compares the request latency while Redis responds, is killed, stopped
//! or slow with the latency without `[redis]`. The simulator is the provider. All processes share two processors.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use keychoir::simulator::{KeyPlan, Plan as ProviderPlan, WorkspacePlan};
use tempfile::TempDir;
use tokio::runtime::Builder;
use tokio::time::sleep;

use crate::harness::{format_median_and_range, median};
use crate::http1;
use crate::load::{LoadGenerator, LoadResults, RequestSpec};
use crate::machine;
use crate::peers::{Peer, PeerSetup, Target};
use crate::rounds::{RoundPlan, quantile_micros};
use crate::support::SPEECH_PATH;
use crate::support::redis::RedisServer;
use crate::support::replicas::TestReplicas;
use crate::support::slow_forwarder::SlowForwarder;

const KEYS: usize = 3;
/// The credits of each workspace.
const CREDITS: u64 = 1 << 50;
/// The concurrency limit of each workspace.
const MAX_CONCURRENT: u32 = 200;
const MAX_REPLICAS: usize = 3;
/// The maximum number of clients per replica, each with one request at a time.
const MAX_CLIENTS: u32 = 16;
/// Requests per second of all clients together while commands are counted. `None` means as many as possible.
const RATES: [Option<u32>; 5] = [Some(0), Some(10), Some(100), Some(1_000), None];
/// Requests per second while the latency is measured.
const LATENCY_RATE: u32 = 300;
/// The delay in each direction, for a round trip of 300 ms.
const SLOW_DELAY: Duration = Duration::from_millis(150);
/// The time after the start of the replicas until their poll intervals and pool shares no longer change.
const SETTLING_TIME: Duration = Duration::from_secs(3);

/// A kind of request. One client sends speech with a quota, and another one sends the other kinds.
#[derive(Clone, Copy)]
enum SharedWorkload {
    /// The list of voices, which costs no credits.
    List,
    Speech,
    /// Speech of a client with a credit quota, which the replicas divide among themselves.
    SpeechWithQuota,
}

impl SharedWorkload {
    const ALL: [Self; 3] = [Self::List, Self::Speech, Self::SpeechWithQuota];

    fn name(self) -> &'static str {
        match self {
            Self::List => "GET",
            Self::Speech => "speech",
            Self::SpeechWithQuota => "speech, quota",
        }
    }

    /// Returns the token of the client that sends this workload.
    fn token(self) -> &'static str {
        match self {
            Self::List | Self::Speech => "a-token-of-the-client-0123456789",
            Self::SpeechWithQuota => "a-token-of-the-client-with-quota",
        }
    }

    fn request(self) -> Vec<u8> {
        let token = self.token();
        let headers = format!("host: localhost\r\naccept: */*\r\nxi-api-key: {token}\r\n");
        match self {
            Self::List => format!("GET /v1/voices HTTP/1.1\r\n{headers}\r\n").into_bytes(),
            Self::Speech | Self::SpeechWithQuota => {
                let body = r#"{"text":"Hello, and welcome back.","model_id":"eleven_flash_v2_5"}"#;
                let length = body.len();
                format!(
                    "POST {SPEECH_PATH} HTTP/1.1\r\n{headers}content-type: application/json\r\n\
                     content-length: {length}\r\n\r\n{body}"
                )
                .into_bytes()
            }
        }
    }
}

/// Running replicas that have served one request of each workload.
struct ReplicaGroup {
    replicas: TestReplicas,
    count: usize,
    request_specs: Vec<RequestSpec>,
    _directory: TempDir,
}

impl ReplicaGroup {
    /// Starts replicas. Without `redis_url`, each of them has a separate pool.
    async fn start(count: usize, redis_url: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("keychoir.toml");
        std::fs::write(&config, config_text()).unwrap();
        let settings = [
            ("KEYCHOIR_CONFIG", config.to_str().unwrap()),
            ("KEYCHOIR_QUOTA_POLLING__ENABLED", "true"),
            // Requests are not logged, because the cost of logging would hide the measured cost.
            ("KEYCHOIR_LOG__LEVEL", "error,keychoir::cli=info"),
        ];
        let replicas = TestReplicas::start_with(count, provider_plan(), redis_url, &settings).await;
        let mut group = Self { replicas, count, request_specs: Vec::new(), _directory: directory };
        if redis_url.is_some() {
            group.wait_until_shared().await;
        }
        for workload in SharedWorkload::ALL {
            let request_spec = group.measure_request_spec(workload).await;
            group.request_specs.push(request_spec);
        }
        sleep(SETTLING_TIME).await;
        group
    }

    /// Waits until every replica reports all other replicas in its readiness.
    async fn wait_until_shared(&self) {
        for replica in 0..self.count {
            let is_shared = async || {
                let readiness = self.replicas.document(replica, "/readyz").await;
                readiness["shared"] == "connected" && readiness["replicas"] == self.count
            };
            while !is_shared().await {
                sleep(Duration::from_millis(5)).await;
            }
        }
    }

    /// Sends one request of a workload to measure the length of its response. Returns the request and this length.
    async fn measure_request_spec(&self, workload: SharedWorkload) -> RequestSpec {
        let client = &self.replicas.client;
        let request = match workload {
            SharedWorkload::List => client.get(format!("{}/v1/voices", self.replicas.url(0))),
            SharedWorkload::Speech | SharedWorkload::SpeechWithQuota => {
                let body = workload.request();
                let body = body[http1::head_length(&body).unwrap()..].to_vec();
                let request = client.post(format!("{}{SPEECH_PATH}", self.replicas.url(0))).body(body);
                request.header("content-type", "application/json")
            }
        };
        let response = request.header("xi-api-key", workload.token()).send().await.unwrap();
        assert_eq!(response.status(), 200, "a request before the measurement must be served");
        let response_bytes = response.bytes().await.unwrap().len() as u64;
        RequestSpec { request: workload.request().into(), response_bytes, has_timestamps: false }
    }

    /// Opens the connections of `clients_per_replica` clients to each replica.
    async fn open_load(&self, clients_per_replica: u32) -> LoadGenerator {
        let mut load: Option<LoadGenerator> = None;
        for replica in 0..self.count {
            let address = self.replicas.url(replica).trim_start_matches("http://").parse().unwrap();
            let target = Target { address, tls: None, key: "" };
            let replica_load = LoadGenerator::open(&target, clients_per_replica, 1).await;
            match &mut load {
                Some(load) => load.append(replica_load),
                None => load = Some(replica_load),
            }
        }
        load.unwrap()
    }

    /// Sends requests for `seconds`, at `rate` or as many as possible if `rate` is `None`.
    async fn send(&self, workload_index: usize, rate: Option<u32>, seconds: f64) -> LoadResults {
        let request_spec = &self.request_specs[workload_index];
        let clients = rate.map_or(MAX_CLIENTS, |rate| (rate / 10).clamp(1, MAX_CLIENTS));
        let mut load = self.open_load(clients).await;
        match rate {
            Some(rate) => load.send_at_rate(request_spec, rate, seconds).await,
            None => load.send_saturating(request_spec, seconds).await,
        }
    }
}

fn config_text() -> String {
    let client = |name: &str, workload: SharedWorkload, rules: &str| {
        format!("[[clients]]\nname = \"{name}\"\ntoken = \"{}\"\n{rules}\n", workload.token())
    };
    client("app", SharedWorkload::Speech, "")
        + &client("metered", SharedWorkload::SpeechWithQuota, "quota = \"1000000000000 credits per month\"")
}

fn provider_plan() -> ProviderPlan {
    (0..KEYS).fold(ProviderPlan::with_keys([]), |plan, number| {
        let name = format!("workspace {number}");
        let workspace =
            WorkspacePlan { max_concurrent: Some(MAX_CONCURRENT), ..WorkspacePlan::new(&name, CREDITS) };
        let key = format!("sk_bench_key_of_the_replicas_{number}");
        plan.with_workspace(workspace)
            .with_key(KeyPlan { workspace: Some(name), ..KeyPlan::new(&key, CREDITS) })
    })
}

/// Counts the commands of Redis, and prints a table.
pub fn count_commands(plan: &RoundPlan, _: &[Peer], _: &PeerSetup) {
    block_on(print_commands(plan));
}

/// Measures the latency with and without Redis, and prints a table.
pub fn compare_latency(plan: &RoundPlan, _: &[Peer], _: &PeerSetup) {
    block_on(print_latency(plan));
}

fn block_on(measurement: impl Future<Output = ()>) {
    machine::pin_to_processor("0,1");
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(measurement);
}

/// The number of commands that Redis has executed, by kind. A script counts as the kind of its first key.
#[derive(Default)]
struct CommandCounts {
    by_kind: BTreeMap<String, usize>,
    in_scripts: usize,
}

impl CommandCounts {
    /// Counts the commands in the output of MONITOR, except the commands of this benchmark, which uses the Unix socket.
    fn parse(lines: &str) -> Self {
        let mut counts = Self::default();
        for line in lines.lines() {
            let Some((source, command)) = line.split_once("] ") else { continue };
            if source.ends_with(" lua") {
                counts.in_scripts += 1;
            } else if !source.contains(" unix:") {
                *counts.by_kind.entry(command_kind(command)).or_default() += 1;
            }
        }
        counts
    }

    fn total(&self) -> usize {
        self.by_kind.values().sum()
    }
}

/// Returns the kind of a command as MONITOR shows it, such as `members` for
/// `"EVAL" "…" "6" "{keychoir:default}:1:members" …`.
fn command_kind(command: &str) -> String {
    let name = command.trim_start_matches('"').split('"').next().unwrap_or_default().to_lowercase();
    let key = command.split_once("}:1:").map_or("", |(_, key)| key);
    match (&*name, key.split(['"', ':']).next().unwrap_or_default()) {
        ("eval", kind) => kind.to_owned(),
        (name, "") => name.to_owned(),
        (name, kind) => format!("{name} {kind}"),
    }
}

/// Prints the commands per second for each number of replicas, each workload and each rate.
async fn print_commands(plan: &RoundPlan) {
    println!("\nreplicas: Redis commands per second, {} s each, {KEYS} workspaces", plan.seconds);
    println!(
        "{:<10}{:<15}{:>12}{:>11}{:>13}{:>12}{:>9}  by kind",
        "replicas", "requests", "requests/s", "commands", "per replica", "in scripts", "Redis"
    );
    for count in 1..=MAX_REPLICAS {
        let redis = RedisServer::start().await;
        let group = ReplicaGroup::start(count, Some(&redis.url())).await;
        for (workload_index, workload) in SharedWorkload::ALL.into_iter().enumerate() {
            for rate in RATES {
                let name = if rate == Some(0) { "none" } else { workload.name() };
                if rate == Some(0) && workload_index > 0 {
                    continue;
                }
                let mut monitor = redis.monitor();
                let (started_at, processor_seconds_before) = (Instant::now(), processor_seconds(&redis));
                let sent_requests = match rate {
                    Some(0) => {
                        sleep(Duration::from_secs_f64(plan.seconds)).await;
                        0
                    }
                    rate => group.send(workload_index, rate, plan.seconds).await.requests,
                };
                let seconds = started_at.elapsed().as_secs_f64();
                let utilization = (processor_seconds(&redis) - processor_seconds_before) / seconds;
                let counts = CommandCounts::parse(&monitor.read_commands());
                let per_second = |count: usize| count as f64 / seconds;
                let kinds = counts.by_kind.iter();
                let kinds: Vec<String> =
                    kinds.map(|(kind, count)| format!("{kind} {:.1}", per_second(*count))).collect();
                println!(
                    "{count:<10}{name:<15}{:>12.0}{:>11.1}{:>13.1}{:>12.0}{:>8.1}%  {}",
                    sent_requests as f64 / seconds,
                    per_second(counts.total()),
                    per_second(counts.total()) / count as f64,
                    per_second(counts.in_scripts),
                    utilization * 100.0,
                    kinds.join(", ")
                );
            }
        }
        group.replicas.close_unchecked().await;
    }
}

/// Returns the processor time of a Redis server since its start, in seconds.
fn processor_seconds(redis: &RedisServer) -> f64 {
    let field = |name: &str| redis.info("cpu", name).unwrap().trim().parse::<f64>().unwrap();
    field("used_cpu_user") + field("used_cpu_sys")
}

/// The state of the Redis server, or of the connection to it, during a measurement.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RedisState {
    Responding,
    Killed,
    /// SIGSTOP has stopped the process. Its connections stay open, and it sends no responses.
    Stopped,
    Slow,
}

impl RedisState {
    const ALL: [Self; 4] = [Self::Responding, Self::Killed, Self::Stopped, Self::Slow];

    fn name(self) -> &'static str {
        match self {
            Self::Responding => "responds",
            Self::Killed => "killed",
            Self::Stopped => "stopped",
            Self::Slow => "300 ms slower",
        }
    }

    /// Brings Redis into this state.
    fn start(self, redis: &mut RedisServer, forwarder: &SlowForwarder) {
        match self {
            Self::Responding => {}
            Self::Killed => redis.kill(),
            Self::Stopped => redis.pause(),
            Self::Slow => forwarder.set_delay(SLOW_DELAY),
        }
    }

    /// Makes Redis respond again.
    async fn end(self, redis: &mut RedisServer, forwarder: &SlowForwarder) {
        match self {
            Self::Responding => {}
            Self::Killed => redis.restart().await,
            Self::Stopped => redis.resume(),
            Self::Slow => forwarder.set_delay(Duration::ZERO),
        }
    }
}

/// The positions of the p50 and of the p99 in the results.
const P50: usize = 0;
const P99: usize = 1;

/// The p50 and the p99 of the request latency in one round, in µs.
struct RoundLatency {
    with_redis: [f64; 2],
    without_redis: [f64; 2],
}

/// Prints the latency of each workload in each state of Redis, as a ratio to replicas without `[redis]`. Measurements
/// with and without Redis alternate.
async fn print_latency(plan: &RoundPlan) {
    println!(
        "\nreplicas: {MAX_REPLICAS} replicas, {LATENCY_RATE} requests/s, with Redis compared to without Redis; \
         {} rounds of {} s, alternating",
        plan.rounds, plan.seconds
    );
    println!(
        "{:<16}{:<15}{:>10}{:>10}{:>24}{:>24}{:>22}",
        "Redis", "requests", "p50, µs", "p99, µs", "p50, x", "p99, x", "shared again, s"
    );
    let mut redis = RedisServer::start().await;
    let forwarder = SlowForwarder::start(redis.port(), Duration::ZERO).await;
    let shared_group =
        ReplicaGroup::start(MAX_REPLICAS, Some(&format!("redis://{}", forwarder.address()))).await;
    let separate_group = ReplicaGroup::start(MAX_REPLICAS, None).await;
    for state in RedisState::ALL {
        let mut rounds: Vec<Vec<RoundLatency>> = SharedWorkload::ALL.iter().map(|_| Vec::new()).collect();
        let mut recoveries = Vec::new();
        for round in 0..plan.rounds {
            state.start(&mut redis, &forwarder);
            for (workload_index, rounds) in rounds.iter_mut().enumerate() {
                let mut latency = RoundLatency { with_redis: [0.0; 2], without_redis: [0.0; 2] };
                for is_shared in [round.is_multiple_of(2), !round.is_multiple_of(2)] {
                    let group = if is_shared { &shared_group } else { &separate_group };
                    let mut results = group.send(workload_index, Some(LATENCY_RATE), plan.seconds).await;
                    let quantiles =
                        [0.5, 0.99].map(|fraction| quantile_micros(&mut results.total_times, fraction));
                    *(if is_shared { &mut latency.with_redis } else { &mut latency.without_redis }) =
                        quantiles;
                }
                rounds.push(latency);
            }
            state.end(&mut redis, &forwarder).await;
            let ended_at = Instant::now();
            shared_group.wait_until_shared().await;
            recoveries.push(ended_at.elapsed().as_secs_f64());
            sleep(Duration::from_secs(1)).await;
        }
        for (workload, rounds) in SharedWorkload::ALL.into_iter().zip(&rounds) {
            let ratio = |quantile: usize| {
                format_median_and_range(
                    rounds.iter().map(|round| round.with_redis[quantile] / round.without_redis[quantile]),
                    2,
                )
            };
            println!(
                "{:<16}{:<15}{:>10.0}{:>10.0}{:>24}{:>24}{:>22}",
                state.name(),
                workload.name(),
                median(rounds.iter().map(|round| round.with_redis[P50])),
                median(rounds.iter().map(|round| round.with_redis[P99])),
                ratio(P50),
                ratio(P99),
                format_median_and_range(recoveries.iter().copied(), 2)
            );
        }
    }
    let results = shared_group.replicas.close_unchecked().await;
    assert_eq!(results.ledger.violations, Vec::<String>::new());
    separate_group.replicas.close_unchecked().await;
}
