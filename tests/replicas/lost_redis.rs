//! Tests that no request fails while Redis is killed, stopped, flushed or slow, or before Redis is started. A replica
//! without Redis reports that it is alone, and stays ready. When Redis responds again, the replicas share the pool
//! again.

use std::time::Duration;

use super::{
    FIRST_KEY, SECOND_KEY, plan, refused_attempts, request_speech, start, wait_until_async, wait_until_shared,
};
use crate::support::redis::RedisServer;
use crate::support::replicas::TestReplicas;
use crate::support::slow_forwarder::SlowForwarder;

/// Waits until `/readyz` of a replica reports `state` as the state of its connection to Redis.
async fn wait_for_link(replicas: &TestReplicas, replica: usize, state: &str) {
    wait_until_async(async || replicas.document(replica, "/readyz").await["shared"] == state).await;
}

/// Sends 60 requests, which must all be served. `phase` completes the message of a failure.
async fn assert_all_served(replicas: &TestReplicas, phase: &str) {
    assert_eq!(request_speech(replicas, 60, 6, 10).await, (60, 0), "no request must fail {phase}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_while_redis_is_killed_stopped_or_flushed() {
    let (mut redis, replicas) = start(3, plan(&[(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)], Some(9))).await;
    assert_all_served(&replicas, "with Redis").await;
    redis.kill();
    assert_all_served(&replicas, "just after Redis was killed").await;
    for replica in 0..3 {
        wait_for_link(&replicas, replica, "alone").await;
        let response = replicas.client.get(format!("{}/readyz", replicas.url(replica))).send().await.unwrap();
        assert_eq!(response.status(), 200, "a replica that is alone must stay ready");
    }
    assert_all_served(&replicas, "without Redis").await;
    redis.restart().await;
    wait_until_shared(&replicas, 3).await;
    assert_all_served(&replicas, "with a new and empty Redis").await;
    redis.pause();
    assert_all_served(&replicas, "just after Redis was stopped").await;
    wait_for_link(&replicas, 0, "alone").await;
    redis.resume();
    wait_until_shared(&replicas, 3).await;
    redis.flush();
    assert_all_served(&replicas, "after a flush").await;
    let results = replicas.close().await;
    assert_eq!(refused_attempts(&results.ledger), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_redis_fails_no_request() {
    let redis = RedisServer::start().await;
    let forwarder = SlowForwarder::start(redis.port(), Duration::from_millis(150)).await;
    let replicas = TestReplicas::start_with(
        2,
        plan(&[(FIRST_KEY, 100_000)], Some(9)),
        Some(&format!("redis://{}", forwarder.address())),
        &super::REPLICA_SETTINGS,
    )
    .await;
    wait_until_shared(&replicas, 2).await;
    assert_all_served(&replicas, "with a slow Redis").await;
    replicas.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_start_without_redis_share_the_pool_when_it_starts() {
    let mut redis = RedisServer::start().await;
    redis.kill();
    let replicas = TestReplicas::start_with(
        2,
        plan(&[(FIRST_KEY, 100_000)], Some(9)),
        Some(&redis.url()),
        &super::REPLICA_SETTINGS,
    )
    .await;
    for replica in 0..2 {
        wait_for_link(&replicas, replica, "alone").await;
    }
    assert_all_served(&replicas, "without Redis since the start").await;
    redis.restart().await;
    wait_until_shared(&replicas, 2).await;
    assert_all_served(&replicas, "after Redis has started").await;
    replicas.close().await;
}
