//! Tests replicas that share a pool through a Redis Cluster, and through a Redis master that Redis Sentinel replaces
//! while the replicas serve requests.

use super::{
    FIRST_KEY, REPLICA_SETTINGS, SECOND_KEY, plan, refused_attempts, request_speech, wait_until_shared,
};
use crate::support::redis::{RedisCluster, Sentinels};
use crate::support::replicas::TestReplicas;

const KEYS: [(&str, u64); 2] = [(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)];

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_a_pool_through_a_cluster() {
    let cluster = RedisCluster::start(3).await;
    // In each round, the replicas first connect to another node. It redirects them if it does not own their data.
    for node in &cluster.nodes {
        let replicas =
            TestReplicas::start_with(2, plan(&KEYS, Some(9)), Some(&node.url()), &REPLICA_SETTINGS).await;
        wait_until_shared(&replicas, 2).await;
        assert_eq!(request_speech(&replicas, 20, 4, 10).await, (20, 0));
        let results = replicas.close().await;
        assert_eq!(refused_attempts(&results.ledger), 0);
        // The next round must not find the state of these replicas.
        cluster.nodes[cluster.owner_of("{keychoir:default}:1:members")].flush();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_during_a_failover() {
    let mut sentinels = Sentinels::start().await;
    let replicas =
        TestReplicas::start_with(3, plan(&KEYS, Some(9)), Some(&sentinels.url()), &REPLICA_SETTINGS).await;
    wait_until_shared(&replicas, 3).await;
    let load = async {
        let mut served_count = 0;
        for _ in 0..20 {
            let (served, failed) = request_speech(&replicas, 30, 6, 10).await;
            assert_eq!(failed, 0, "no request must fail");
            served_count += served;
        }
        served_count
    };
    let (served, ()) = tokio::join!(load, sentinels.fail_over());
    assert_eq!(served, 600, "all requests must be served");
    wait_until_shared(&replicas, 3).await;
    assert_eq!(request_speech(&replicas, 30, 6, 10).await, (30, 0));
    let results = replicas.close().await;
    assert_eq!(refused_attempts(&results.ledger), 0);
}
