//! The credits of accounts that several replicas spend.

use super::{FIRST_KEY, SECOND_KEY, plan, refused_attempts, request_speech, start};

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_spend_all_credits_without_a_refusal() {
    let (_redis, replicas) = start(3, plan(&[(FIRST_KEY, 1_000), (SECOND_KEY, 1_000)], None)).await;
    let (served, failed) = request_speech(&replicas, 200, 12, 10).await;
    assert_eq!((served, failed), (200, 0), "the credits suffice for all requests");
    let (served, _) = request_speech(&replicas, 6, 3, 10).await;
    assert_eq!(served, 0, "no credits are left");
    let books = replicas.close().await;
    assert_eq!(books.ledger.totals.charged, 2_000);
    assert_eq!(refused_attempts(&books.ledger), 0, "no replica must ask for more than is left");
}
