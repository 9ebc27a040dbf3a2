//! Tests replicas that end or have the same database. After a replica is killed or stopped, the other replica can use
//! its part of the credits and of the concurrent requests. A stopped replica also gives up its membership and its
//! leadership immediately. Replicas with copies of one database get different ids.

use std::time::Duration;

use keychoir::clock;
use serde_json::Value;

use super::{ADMIN, ADMIN_TOKEN, FIRST_KEY, plan, request_speech, start, start_with, wait_until_async};

#[tokio::test(flavor = "multi_thread")]
async fn another_replica_can_use_the_credits_and_concurrent_requests_of_a_killed_replica() {
    let (_redis, mut replicas) = start(2, plan(&[(FIRST_KEY, 1_000)], Some(4))).await;
    replicas.simulator.set_fault(FIRST_KEY, Some("slow_body=20".parse().unwrap()));
    assert_eq!(request_speech(&replicas, 40, 4, 10).await, (40, 0));
    let killed_at = clock::instant();
    replicas.kill(0);
    // The killed replica held a part of the remaining credits and of the 4 concurrent requests.
    assert_eq!(request_speech(&replicas, 60, 4, 10).await, (60, 0), "all credits must be usable");
    let elapsed = clock::elapsed_since(killed_at);
    assert!(
        elapsed < Duration::from_secs(30),
        "the leases of the killed replica must end within 30 s, and it took {elapsed:?}"
    );
    wait_until_async(async || {
        let readiness: Value = replicas.document(1, "/readyz").await;
        readiness["replicas"] == 1
    })
    .await;
    let results = replicas.close_unchecked().await;
    assert_eq!(results.ledger.totals.charged, 1_000);
    assert_eq!(
        results.ledger.workspaces[0].peak_running.max(4),
        4,
        "no more requests may run at the same time than the plan permits"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_replica_returns_its_membership_and_credits_at_once() {
    let (redis, mut replicas) = start(2, plan(&[(FIRST_KEY, 1_000)], Some(4))).await;
    assert_eq!(request_speech(&replicas, 20, 4, 10).await, (20, 0));
    replicas.stop(0);
    let members: Vec<String> = redis.command(&["HKEYS", "{keychoir:default}:1:members"]);
    assert_eq!(members.len(), 1, "a replica that has left must not be a member: {members:?}");
    let leader: Option<String> = redis.command(&["GET", "{keychoir:default}:1:leader"]);
    assert!(leader.is_none_or(|leader| leader == members[0]), "a replica that has left must not lead");
    assert_eq!(request_speech(&replicas, 80, 4, 10).await, (80, 0), "all credits must be usable");
    let results = replicas.close().await;
    assert_eq!(results.ledger.totals.charged, 1_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_with_copies_of_one_database_have_different_ids() {
    let accounts = plan(&[(FIRST_KEY, 10_000)], Some(4));
    let (_redis, mut replicas) = start_with(1, accounts, &ADMIN).await;
    replicas.stop(0);
    replicas.add_copy_of(0);
    replicas.restart(0);
    wait_until_async(async || {
        let mut ids = Vec::new();
        for replica in 0..2 {
            let url = format!("{}/api/keychoir/v1/overview", replicas.url(replica));
            let overview = replicas.client.get(url).bearer_auth(ADMIN_TOKEN).send().await.unwrap();
            let overview: Value = overview.json().await.unwrap();
            let mut listed_replicas = overview["replicas"].as_array().unwrap().iter();
            ids.push(
                listed_replicas
                    .find(|listed_replica| listed_replica["is_self"] == true)
                    .map(|listed_replica| listed_replica["id"].clone()),
            );
        }
        ids.iter().all(Option::is_some) && ids[0] != ids[1]
    })
    .await;
    assert_eq!(request_speech(&replicas, 20, 4, 10).await, (20, 0));
    replicas.close().await;
}
