//! Tests several replicas of Keychoir that share one pool through a real Redis server. The simulator is the provider,
//! and its ledger contains the charges, the refusals and the concurrent requests of each account. This file has the
//! functions that start the replicas and send requests, and each module contains the tests of one subject.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test panics if an expectation fails"
)]

#[path = "../support/mod.rs"]
mod support;

mod clients;
mod credits;
mod evidence;
mod killed;
mod lost_redis;
mod operators;
mod owners;
mod secrets;
mod servers;
mod slots;

use std::sync::atomic::{AtomicUsize, Ordering};

use keychoir::simulator::{KeyPlan, Ledger, Plan, WorkspacePlan};
use support::redis::RedisServer;
use support::replicas::TestReplicas;

const FIRST_KEY: &str = "sk_first_key_of_the_replicas_0000";
const SECOND_KEY: &str = "sk_second_key_of_the_replicas_000";

const ADMIN_TOKEN: &str = "an-admin-token-of-the-replicas-0123456789";

/// The setting with which all replicas have the same admin token.
const ADMIN: [(&str, &str); 1] = [("KEYCHOIR_ADMIN_TOKEN", ADMIN_TOKEN)];

/// The settings of all replicas. Quota polling is enabled, which `TestReplicas` disables by default. Requests wait for
/// Redis up to a second, because a test of exact amounts must not depend on the speed of the machine.
const REPLICA_SETTINGS: [(&str, &str); 2] =
    [("KEYCHOIR_QUOTA_POLLING__ENABLED", "true"), ("KEYCHOIR_REDIS__WAIT_TIMEOUT", "1s")];

/// Starts a Redis server and the given number of replicas, and waits until they share one pool.
async fn start(count: usize, plan: Plan) -> (RedisServer, TestReplicas) {
    start_with(count, plan, &[]).await
}

/// Starts replicas like [`start`], with additional environment variables.
async fn start_with(count: usize, plan: Plan, settings: &[(&str, &str)]) -> (RedisServer, TestReplicas) {
    let redis = RedisServer::start().await;
    let settings: Vec<(&str, &str)> = REPLICA_SETTINGS.iter().chain(settings).copied().collect();
    let replicas = TestReplicas::start_with(count, plan, Some(&redis.url()), &settings).await;
    wait_until_shared(&replicas, count).await;
    (redis, replicas)
}

/// Waits until each of the first `count` replicas reports `count` live replicas and the quota of every key.
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
    tokio::time::timeout(std::time::Duration::from_secs(30), polling)
        .await
        .expect("the condition must hold within the timeout");
}

/// Returns a plan of one workspace per key, with the given credits and concurrency limit.
fn plan(keys: &[(&str, u64)], max_concurrent: Option<u32>) -> Plan {
    keys.iter().enumerate().fold(Plan::with_keys([]), |plan, (index, (key, credits))| {
        let workspace =
            WorkspacePlan { max_concurrent, ..WorkspacePlan::new(&format!("account-{index}"), *credits) };
        let key = KeyPlan { workspace: Some(workspace.name.clone()), ..KeyPlan::new(key, *credits) };
        plan.with_workspace(workspace).with_key(key)
    })
}

/// Sends `count` requests for speech of the given number of characters, at most `concurrent` at the same time. Returns
/// the number of served requests and the number of failed ones.
async fn request_speech(
    replicas: &TestReplicas,
    count: usize,
    concurrent: usize,
    characters: usize,
) -> (usize, usize) {
    let (sent, served) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let send_in_turn = |_| async {
        while sent.fetch_add(1, Ordering::Relaxed) < count {
            let response = replicas.request_speech(characters).await;
            if response.status() == 200 && response.bytes().await.is_ok() {
                served.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    support::join_all((0..concurrent).map(send_in_turn)).await;
    let served_count = served.into_inner();
    (served_count, count - served_count)
}

/// Returns the number of requests that the provider refused.
fn refused_attempts(ledger: &Ledger) -> u64 {
    ledger.keys.iter().map(|key| key.refused).sum()
}
