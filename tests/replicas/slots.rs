//! Tests that the concurrent requests of three replicas together stay within the concurrency limit of each account,
//! and that the provider refuses none of them after a warm-up.

use super::{FIRST_KEY, SECOND_KEY, plan, request_speech, start};

#[tokio::test(flavor = "multi_thread")]
async fn the_concurrent_requests_of_all_replicas_stay_within_the_plan() {
    let (_redis, replicas) = start(3, plan(&[(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)], Some(5))).await;
    for key in [FIRST_KEY, SECOND_KEY] {
        replicas.simulator.set_fault(key, Some("slow_body=20".parse().unwrap()));
    }
    // The first requests may exceed the limit by one per replica, until each replica has published that it uses the
    // account.
    request_speech(&replicas, 30, 3, 10).await;
    let refused_in_warm_up: Vec<u64> =
        replicas.simulator.ledger().keys.iter().map(|key| key.refused).collect();
    let (served, failed) = request_speech(&replicas, 200, 18, 10).await;
    assert_eq!((served, failed), (200, 0), "requests above the limit must be queued");
    let results = replicas.close().await;
    for workspace in &results.ledger.workspaces {
        assert!(workspace.peak_running <= 5, "at most 5 requests may run at the same time: {workspace:?}");
    }
    let refused: Vec<u64> = results.ledger.keys.iter().map(|key| key.refused).collect();
    assert_eq!(
        refused, refused_in_warm_up,
        "no request may be refused because of its concurrency after the warm-up"
    );
}
