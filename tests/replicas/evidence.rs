//! Refusals that one replica receives and all take into account.

use super::{FIRST_KEY, SECOND_KEY, plan, start, wait_until_async};

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
        assert_eq!(replicas.request_speech(10).await.status(), 200);
    }
    let books = replicas.close().await;
    assert_eq!(books.ledger.keys[0].refused, 1, "one replica must have asked the limited account");
}
