//! Tests the credits that replicas share. Together, the replicas spend all credits of an account and no more. After
//! Redis was flushed, the replicas store the used credits of an account in it again.

use super::{FIRST_KEY, SECOND_KEY, plan, refused_attempts, request_speech, start, wait_until_async};

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_spend_all_credits_without_a_refusal() {
    let (_redis, replicas) = start(3, plan(&[(FIRST_KEY, 1_000), (SECOND_KEY, 1_000)], None)).await;
    let (served, failed) = request_speech(&replicas, 200, 12, 10).await;
    assert_eq!((served, failed), (200, 0), "the credits must suffice for all requests");
    let (served, _) = request_speech(&replicas, 6, 3, 10).await;
    assert_eq!(served, 0, "no credits may be left");
    let results = replicas.close().await;
    assert_eq!(results.ledger.totals.charged, 2_000);
    assert_eq!(refused_attempts(&results.ledger), 0, "no replica must request more credits than are left");
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_restore_the_used_credits_of_an_account_in_a_flushed_redis() {
    let mut plan = plan(&[(FIRST_KEY, 1_000)], None);
    plan.workspaces[0].used = 500;
    let (redis, replicas) = start(2, plan).await;
    assert_eq!(request_speech(&replicas, 10, 2, 10).await, (10, 0));
    let all_replicas_count_600 = async || {
        for replica in 0..2 {
            let status = replicas.document(replica, "/api/elevenlabs-status").await;
            if status["keys"][0]["characterCount"] != 600 {
                return false;
            }
        }
        true
    };
    wait_until_async(all_replicas_count_600).await;
    // The field `base` contains the credits that were used outside of the replicas.
    let has_base = async || {
        let keys: Vec<String> = redis.command(&["KEYS", "*:credits:*"]);
        keys.len() == 1 && redis.command::<Option<String>>(&["HGET", &keys[0], "base"]).is_some()
    };
    assert!(has_base().await, "Redis must have the used credits of the account");
    redis.flush();
    wait_until_async(has_base).await;
    wait_until_async(all_replicas_count_600).await;
    replicas.close().await;
}
