//! A replica is killed: the others get what it held.

use std::time::Duration;

use keychoir::clock;
use serde_json::Value;

use super::{FIRST_KEY, plan, request_speech, start, wait_until_async};

#[tokio::test(flavor = "multi_thread")]
async fn the_slots_the_credits_and_the_leadership_of_a_killed_replica_return() {
    let (_redis, mut replicas) = start(2, plan(&[(FIRST_KEY, 1_000)], Some(4))).await;
    replicas.simulator.set_fault(FIRST_KEY, Some("slow_body=20".parse().unwrap()));
    assert_eq!(request_speech(&replicas, 40, 4, 10).await, (40, 0));
    let killed_at = clock::instant();
    replicas.kill(0);
    // The rest of the credits, of which the killed replica held a part, and all slots.
    assert_eq!(request_speech(&replicas, 60, 4, 10).await, (60, 0), "all credits must be usable");
    let elapsed = clock::elapsed_since(killed_at);
    assert!(elapsed < Duration::from_secs(30), "the leases of the killed replica must end: {elapsed:?}");
    wait_until_async(async || {
        let readiness: Value = replicas.document(1, "/readyz").await;
        readiness["replicas"] == 1
    })
    .await;
    let books = replicas.close_unchecked().await;
    assert_eq!(books.ledger.totals.charged, 1_000);
    assert_eq!(books.ledger.workspaces[0].running_max.max(4), 4, "no more than the plan allows");
}
