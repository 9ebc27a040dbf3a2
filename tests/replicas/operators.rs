//! Tests the pages and commands by which operators observe replicas: the overview, the readiness, the status document,
//! the metrics, the events, and the output and exit codes of `keychoir status`. They must also report the replacement
//! of a killed leader and a lost Redis, and `docs/operations.md` must list exactly the metrics of replicas.

use std::collections::BTreeSet;
use std::process::Output;

use serde_json::{Value, json};

use super::{
    ADMIN, ADMIN_TOKEN, FIRST_KEY, SECOND_KEY, plan, request_speech, start_with, wait_until_async,
    wait_until_shared,
};
use crate::support::events::EventReader;
use crate::support::program::{keychoir_command, run, stderr};
use crate::support::redis::RedisServer;
use crate::support::replicas::TestReplicas;

const OVERVIEW_PATH: &str = "/api/keychoir/v1/overview";
/// The documentation, which lists all metrics.
const DOCUMENTATION: &str = include_str!("../../docs/operations.md");

async fn start_replicas(count: usize) -> (RedisServer, TestReplicas) {
    let plan = plan(&[(FIRST_KEY, 10_000), (SECOND_KEY, 10_000)], None);
    start_with(count, plan, &ADMIN).await
}

/// Sends a GET request with the admin token to a replica.
async fn get(replicas: &TestReplicas, replica: usize, path: &str) -> reqwest::Response {
    let request = replicas.client.get(format!("{}{path}", replicas.url(replica)));
    request.bearer_auth(ADMIN_TOKEN).send().await.unwrap()
}

async fn read_overview(replicas: &TestReplicas, replica: usize) -> Value {
    get(replicas, replica, OVERVIEW_PATH).await.json().await.unwrap()
}

/// Returns the sorted ids of the replicas in an overview for which `member` is true.
fn replica_ids(overview: &Value, member: &str) -> Vec<String> {
    let listed_replicas = overview["replicas"].as_array().unwrap().iter();
    let matching = listed_replicas.filter(|replica| replica[member] == true);
    let mut ids: Vec<String> = matching.map(|replica| replica["id"].as_str().unwrap().to_owned()).collect();
    ids.sort();
    ids
}

/// Asserts that an overview matches its schema in `docs/openapi.json`.
#[track_caller]
fn assert_matches_schema(overview: &Value) {
    let document: Value = serde_json::from_str(include_str!("../../docs/openapi.json")).unwrap();
    let schema = json!({"$ref": "#/components/schemas/Overview", "components": document["components"]});
    let validator = jsonschema::validator_for(&schema).unwrap();
    let errors: Vec<String> = validator.iter_errors(overview).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "the overview must match its schema: {errors:?}\n{overview:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_replica_lists_all_replicas_and_a_killed_leader_is_replaced() {
    let (_redis, mut replicas) = start_replicas(3).await;
    let first = read_overview(&replicas, 0).await;
    let (all, leader) = (replica_ids(&first, "is_live"), replica_ids(&first, "is_leader"));
    assert_eq!((all.len(), leader.len()), (3, 1), "there must be 3 replicas and one leader: {first:#}");
    let mut own_ids = Vec::new();
    for replica in 0..3 {
        let overview = read_overview(&replicas, replica).await;
        assert_matches_schema(&overview);
        assert_eq!(overview["shared"], "connected");
        assert_eq!(
            (replica_ids(&overview, "is_live"), replica_ids(&overview, "is_leader")),
            (all.clone(), leader.clone())
        );
        own_ids.extend(replica_ids(&overview, "is_self"));
    }
    let leading = own_ids.iter().position(|id| *id == leader[0]).unwrap();
    assert_eq!(
        own_ids.iter().collect::<BTreeSet<_>>().len(),
        3,
        "each replica must mark a different replica as itself: {own_ids:?}"
    );

    replicas.kill(leading);
    let remaining: Vec<usize> = (0..3).filter(|replica| *replica != leading).collect();
    wait_until_async(async || {
        let mut leaders = BTreeSet::new();
        for replica in &remaining {
            let overview = read_overview(&replicas, *replica).await;
            let live = replica_ids(&overview, "is_live");
            if live.len() != 2 || live.contains(&leader[0]) {
                return false;
            }
            leaders.extend(replica_ids(&overview, "is_leader"));
        }
        leaders.len() == 1 && !leaders.contains(&leader[0])
    })
    .await;
    let overview = read_overview(&replicas, remaining[0]).await;
    assert_matches_schema(&overview);
    assert_eq!(overview["replicas"].as_array().unwrap().len(), 3, "a killed replica must stay listed");
    replicas.close_unchecked().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_of_every_replica_counts_the_credits_that_all_have_used() {
    let (_redis, replicas) = start_replicas(3).await;
    assert_eq!(request_speech(&replicas, 30, 3, 10).await, (30, 0));
    for replica in 0..3 {
        wait_until_async(async || {
            let status = replicas.document(replica, "/api/elevenlabs-status").await;
            let keys = status["keys"].as_array().unwrap().iter();
            keys.map(|key| key["characterCount"].as_u64().unwrap()).sum::<u64>() == 300
        })
        .await;
    }
    replicas.close().await;
}

/// A metric of `/metrics` with the sum of its samples.
#[derive(Debug)]
struct Metric {
    /// The name, labels and type of the metric, as in the documentation.
    description: String,
    sum: f64,
}

/// Returns the metrics of the replicas and of Redis on the page of a replica.
async fn read_metrics(replicas: &TestReplicas, replica: usize) -> Vec<Metric> {
    let page = get(replicas, replica, "/metrics").await.text().await.unwrap();
    let families = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let families = families.filter(|(family, _)| is_about_replicas(family));
    families
        .map(|(family, kind)| {
            let (name, suffix) = match kind {
                "counter" => (format!("{family}_total"), ""),
                "histogram" => (family.to_owned(), "_count"),
                _ => (family.to_owned(), ""),
            };
            let samples = page.lines().filter(|line| line.starts_with(&format!("{name}{suffix}")));
            let samples: Vec<(&str, &str)> = samples.map(|line| line.rsplit_once(' ').unwrap()).collect();
            let label = samples[0].0.split_once('{').map(|(_, labels)| labels.split_once('=').unwrap().0);
            let labels = label.map(|label| format!("{{{label}}}")).unwrap_or_default();
            let sum = samples.iter().map(|(_, value)| value.parse::<f64>().unwrap()).sum();
            Metric { description: format!("{name}{labels} {kind}"), sum }
        })
        .collect()
}

/// Returns whether a metric is about the replicas or Redis.
fn is_about_replicas(name: &str) -> bool {
    name.starts_with("keychoir_redis_") || name.starts_with("keychoir_replica")
}

/// Returns the sum of the samples of the metric `name`, which must exist.
fn sum_of(metrics: &[Metric], name: &str) -> f64 {
    let has_name = |metric: &&Metric| metric.description.split([' ', '{']).next() == Some(name);
    metrics.iter().find(has_name).unwrap_or_else(|| panic!("{name} must exist: {metrics:?}")).sum
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documentation_lists_exactly_the_metrics_of_replicas() {
    let (_redis, replicas) = start_replicas(2).await;
    let documented = DOCUMENTATION.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split('|').map(str::trim);
        let (name, kind) = (cells.next()?.strip_suffix('`')?, cells.next()?);
        is_about_replicas(name).then(|| format!("{name} {kind}"))
    });
    let exported_metrics = read_metrics(&replicas, 0).await;
    let descriptions: BTreeSet<String> =
        exported_metrics.iter().map(|metric| metric.description.clone()).collect();
    assert_eq!(descriptions, documented.collect());
    for name in ["keychoir_redis_round_trip_seconds", "keychoir_redis_commands_total"] {
        assert!(sum_of(&exported_metrics, name) > 0.0, "{name} must be counted: {exported_metrics:?}");
    }
    let mut leaders = 0.0;
    for replica in 0..2 {
        let metrics = read_metrics(&replicas, replica).await;
        assert_eq!(sum_of(&metrics, "keychoir_redis_up"), 1.0);
        assert_eq!(sum_of(&metrics, "keychoir_replicas"), 2.0);
        leaders += sum_of(&metrics, "keychoir_replica_is_leader");
    }
    assert_eq!(leaders, 1.0, "exactly one replica must be the leader");
    replicas.close().await;
}

/// Runs `keychoir status` for a replica.
fn run_status(replicas: &TestReplicas, replica: usize, arguments: &[&str]) -> Output {
    run(&mut keychoir_command(&[&["status", "--url", replicas.url(replica)], arguments].concat()))
}

/// Returns the standard output of a program that has exited with `exit_code`.
#[track_caller]
fn stdout(output: &Output, exit_code: i32) -> String {
    assert_eq!(
        output.status.code(),
        Some(exit_code),
        "the exit code must be {exit_code}: {}",
        stderr(output)
    );
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_redis_is_reported_to_operators_and_fails_no_request() {
    let (mut redis, replicas) = start_replicas(2).await;
    let connected_table = stdout(&run_status(&replicas, 0, &[]), 0);
    assert!(
        connected_table.ends_with("\n2 replicas share the pool.\n"),
        "the last line must report the number of replicas: {connected_table}"
    );
    let mut events = EventReader::new(get(&replicas, 0, "/api/keychoir/v1/events").await);

    redis.kill();
    for replica in 0..2 {
        wait_until_async(async || replicas.document(replica, "/readyz").await["shared"] == "alone").await;
        let readiness = get(&replicas, replica, "/readyz").await;
        assert_eq!(readiness.status(), 200, "a load balancer must continue to use a replica that is alone");
        let readiness: Value = readiness.json().await.unwrap();
        assert_eq!((&readiness["status"], &readiness["replicas"]), (&json!("degraded"), &json!(2)));
        let metrics = read_metrics(&replicas, replica).await;
        assert_eq!(sum_of(&metrics, "keychoir_redis_up"), 0.0);
        assert_eq!(sum_of(&metrics, "keychoir_replica_is_leader"), 0.0);
        assert!(
            sum_of(&metrics, "keychoir_redis_errors_total") > 0.0,
            "failed commands must be counted: {metrics:?}"
        );
    }
    events.wait_for("overview", |overview| overview["shared"] == "alone").await;
    assert_eq!(request_speech(&replicas, 10, 2, 10).await, (10, 0), "no request may fail without Redis");
    let alone_line = "Alone: Redis does not respond, and this replica uses its part of the pool.";
    let alone_table = stdout(&run_status(&replicas, 0, &[]), 0);
    assert!(
        alone_table.contains(&format!("\n{alone_line}\n")),
        "the table must warn about Redis: {alone_table}"
    );
    let colored_table = stdout(&run_status(&replicas, 0, &["--color", "always"]), 0);
    assert!(
        colored_table.contains(&format!("\n\u{1b}[33m{alone_line}\u{1b}[0m\n")),
        "the warning must be yellow: {colored_table}"
    );
    stdout(&run_status(&replicas, 0, &["--check"]), 1);
    let document: Value = serde_json::from_str(&stdout(&run_status(&replicas, 0, &["--json"]), 0)).unwrap();
    assert_eq!((&document["shared"], &document["replicas"]), (&json!("alone"), &json!(2)));
    assert_eq!(document["totalKeys"], 2);

    redis.restart().await;
    wait_until_shared(&replicas, 2).await;
    events.wait_for("overview", |overview| overview["shared"] == "connected").await;
    stdout(&run_status(&replicas, 0, &["--check"]), 0);
    replicas.close().await;
}
