//! Tests that a refusal by the provider at one replica is published as evidence and restricts the key at all replicas.
//! The cooldown has the same
//! duration at all replicas, even if their clocks differ by an hour.

use std::path::Path;

use serde_json::Value;

use super::{
    ADMIN, ADMIN_TOKEN, FIRST_KEY, SECOND_KEY, plan, start, start_with, wait_until_async, wait_until_shared,
};
use crate::support::replicas::{ReplicaResults, TestReplicas};

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_at_one_replica_is_known_at_all() {
    let (_redis, replicas) = start(3, plan(&[(FIRST_KEY, 10_000), (SECOND_KEY, 10_000)], None)).await;
    replicas.simulator.set_fault(FIRST_KEY, Some("rate_limit=60".parse().unwrap()));
    assert_eq!(replicas.request_speech(10).await.status(), 200);
    for replica in 0..3 {
        wait_until_async(async || {
            let status = replicas.document(replica, "/api/elevenlabs-status").await;
            status["keys"].as_array().unwrap().iter().any(|key| key["status"] == "rate_limited")
        })
        .await;
    }
    for _ in 0..9 {
        let response = replicas.request_speech(10).await;
        let status = response.status();
        assert_eq!(status, 200, "the other key must serve the request: {}", response.text().await.unwrap());
    }
    let results = replicas.close().await;
    assert_eq!(
        rate_limited_attempts(&results),
        1,
        "only one replica may send a request with the rate limited key"
    );
}

/// Returns the number of attempts that were refused because of a rate limit, in the usage records of all replicas.
fn rate_limited_attempts(results: &ReplicaResults) -> usize {
    results.records.iter().flatten().filter(|record| record.verdict == "rate_limited").count()
}

/// Returns the path of the library that changes the clock of a program. Debian's package `faketime` installs it.
fn faketime_library() -> String {
    let libraries = ["x86_64-linux-gnu", "aarch64-linux-gnu"];
    let path = |library| format!("/usr/lib/{library}/faketime/libfaketimeMT.so.1");
    let library = libraries.map(path).into_iter().find(|path| Path::new(path).exists());
    library.expect("this test needs faketime: apt-get install faketime")
}

/// Returns the state of the first key at a replica, and the remaining time of its cooldown in seconds, by the clock of
/// the replica.
async fn cooldown_of_first_key(replicas: &TestReplicas, replica: usize) -> (String, f64) {
    let get = async |path: &str| -> Value {
        let url = format!("{}/api/keychoir/v1/{path}", replicas.url(replica));
        let response = replicas.client.get(url).bearer_auth(ADMIN_TOKEN).send().await.unwrap();
        response.json().await.unwrap()
    };
    let (keys, overview) = (get("keys").await, get("overview").await);
    let key = &keys["keys"][0];
    let time = |value: &Value| value.as_str().map(|text| text.parse::<jiff::Timestamp>().unwrap());
    let remaining_cooldown = time(&key["until"])
        .zip(time(&overview["now"]))
        .map_or(0.0, |(until, now)| until.duration_since(now).as_secs_f64());
    (key["state"].as_str().unwrap().to_owned(), remaining_cooldown)
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_whose_clocks_differ_by_an_hour_have_the_same_cooldowns() {
    let (_redis, mut replicas) =
        start_with(1, plan(&[(FIRST_KEY, 10_000), (SECOND_KEY, 10_000)], None), &ADMIN).await;
    let library = faketime_library();
    for offset in ["+3600s", "-3600s"] {
        replicas.add(&[
            ("LD_PRELOAD", library.as_str()),
            ("FAKETIME", offset),
            // Only the wall clock is wrong. The monotonic clock stays right, because a wrong date does not change it.
            ("DONT_FAKE_MONOTONIC", "1"),
        ]);
    }
    wait_until_shared(&replicas, 3).await;
    replicas.simulator.set_fault(FIRST_KEY, Some("rate_limit=200".parse().unwrap()));
    assert_eq!(replicas.request_speech(10).await.status(), 200);
    let mut remaining_cooldowns = Vec::new();
    for replica in 0..3 {
        wait_until_async(async || cooldown_of_first_key(&replicas, replica).await.0 == "rate_limited").await;
        remaining_cooldowns.push(cooldown_of_first_key(&replicas, replica).await.1);
    }
    for remaining in &remaining_cooldowns {
        assert!(
            (100.0..=201.0).contains(remaining),
            "at least 100 s of the cooldown of 200 s must remain by every clock: {remaining_cooldowns:?}"
        );
    }
    for _ in 0..6 {
        assert_eq!(replicas.request_speech(10).await.status(), 200);
    }
    let results = replicas.close().await;
    assert_eq!(
        rate_limited_attempts(&results),
        1,
        "only one replica may send a request with the rate limited key"
    );
}
