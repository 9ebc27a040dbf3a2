//! Tests several replicas that share one pool through a real Redis, with the simulator as the referee: its ledger has
//! what each account was charged, how many requests it refused, and how many it served at the same time.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a failed expectation ends the test"
)]

#[path = "../support/mod.rs"]
mod support;

mod credits;
mod evidence;
mod slots;

use keychoir::simulator::{KeyPlan, Ledger, Plan, WorkspacePlan};
use support::redis::RedisServer;
use support::replicas::TestReplicas;
use tokio::task::JoinSet;

const FIRST_KEY: &str = "sk_first_key_of_the_replicas_0000";
const SECOND_KEY: &str = "sk_second_key_of_the_replicas_000";

/// The settings with which quotas are polled. By default, the tests do not poll.
const POLLING: [(&str, &str); 1] = [("KEYCHOIR_QUOTA_POLLING__ENABLED", "true")];

/// Starts a Redis and this number of replicas, and waits until they share one pool.
async fn start(count: usize, plan: Plan) -> (RedisServer, TestReplicas) {
    start_with(count, plan, &[]).await
}

async fn start_with(count: usize, plan: Plan, settings: &[(&str, &str)]) -> (RedisServer, TestReplicas) {
    let redis = RedisServer::start().await;
    let settings: Vec<(&str, &str)> = POLLING.iter().chain(settings).copied().collect();
    let replicas = TestReplicas::start_with(count, plan, Some(&redis.url()), &settings).await;
    wait_until_shared(&replicas, count).await;
    (redis, replicas)
}

/// Waits until every replica knows this number of live replicas, and the quota of every key.
async fn wait_until_shared(replicas: &TestReplicas, count: usize) {
    for replica in 0..count {
        let is_ready = async || {
            let readiness = replicas.document(replica, "/readyz").await;
            let is_shared = readiness["shared"] == "connected" && readiness["replicas"] == count;
            let status = replicas.document(replica, "/api/elevenlabs-status").await;
            let mut keys = status["keys"].as_array().unwrap().iter();
            is_shared && keys.all(|key| key["characterLimit"].as_u64().unwrap_or(0) > 0)
        };
        wait_until_async(is_ready).await;
    }
}

/// Waits until an asynchronous condition holds.
async fn wait_until_async(condition: impl AsyncFn() -> bool) {
    let polling = async {
        while !condition().await {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    let result = tokio::time::timeout(std::time::Duration::from_secs(30), polling).await;
    result.expect("the condition must hold within the timeout");
}

/// Returns a plan of one workspace per key, with these credits and this maximum of concurrent requests.
fn plan(keys: &[(&str, u64)], max_concurrent: Option<u32>) -> Plan {
    keys.iter().fold(Plan::of([]), |plan, (key, credits)| {
        let workspace =
            WorkspacePlan { max_concurrent, ..WorkspacePlan::new(&format!("workspace of {key}"), *credits) };
        let key = KeyPlan { workspace: Some(workspace.name.clone()), ..KeyPlan::new(key, *credits) };
        plan.with_workspace(workspace).with_key(key)
    })
}

/// Requests speech of this number of characters `count` times, `concurrent` at a time. Returns the numbers of served
/// requests and of others.
async fn request_speech(
    replicas: &std::sync::Arc<TestReplicas>,
    count: usize,
    concurrent: usize,
    characters: usize,
) -> (usize, usize) {
    let (mut served, mut failed, mut sent) = (0, 0, 0);
    let mut requests = JoinSet::new();
    loop {
        while sent < count && requests.len() < concurrent {
            let replicas = std::sync::Arc::clone(replicas);
            requests.spawn(async move {
                let response = replicas.request_speech(characters).await;
                let is_served = response.status() == 200;
                let body = response.bytes().await;
                is_served && body.is_ok()
            });
            sent += 1;
        }
        match requests.join_next().await {
            Some(is_served) => *(if is_served.unwrap() { &mut served } else { &mut failed }) += 1,
            None => return (served, failed),
        }
    }
}

/// Returns the number of requests for speech that the provider refused.
fn refused_attempts(ledger: &Ledger) -> u64 {
    ledger.keys.iter().map(|key| key.refused).sum()
}

/// Returns the only owner of the replicas.
fn into_inner(replicas: std::sync::Arc<TestReplicas>) -> TestReplicas {
    std::sync::Arc::into_inner(replicas).expect("all requests have ended")
}
