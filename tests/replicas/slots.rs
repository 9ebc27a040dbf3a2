//! Tests that the concurrent requests of all replicas together stay within the limit of an account.

use super::{FIRST_KEY, SECOND_KEY, plan, request_speech, start};

#[tokio::test(flavor = "multi_thread")]
async fn the_requests_of_all_replicas_stay_within_the_plan() {
    let (_redis, replicas) = start(3, plan(&[(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)], Some(5))).await;
    for key in [FIRST_KEY, SECOND_KEY] {
        replicas.simulator.set_fault(key, Some("slow_body=20".parse().unwrap()));
    }
    // The first requests may exceed the maximum by one per replica, until the replicas have stated that they use the
    // account.
    request_speech(&replicas, 30, 3, 10).await;
    let warm_up: Vec<u64> = replicas.simulator.ledger().keys.iter().map(|key| key.refused).collect();
    let (served, failed) = request_speech(&replicas, 200, 18, 10).await;
    assert_eq!((served, failed), (200, 0));
    let results = replicas.close().await;
    for workspace in &results.ledger.workspaces {
        assert!(workspace.peak_running <= 5, "{workspace:?}");
    }
    let refused: Vec<u64> = results.ledger.keys.iter().map(|key| key.refused).collect();
    assert_eq!(refused, warm_up, "no request must be refused for concurrency after the warm-up");
}
