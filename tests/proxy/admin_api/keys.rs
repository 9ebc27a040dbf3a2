//! Tests paused keys, and the endpoint that checks a key with requests to the provider. A paused key serves no request,
//! the admin API, the key details and the metrics report it, and requests are refused while every key is paused. A
//! check reports the quota and the permissions or the refusal, ends at its timeout, and excludes a second check of the
//! key.

use super::*;
use serde_json::json;

#[tokio::test]
async fn a_paused_key_is_reported_and_serves_no_request() {
    let (proxy, _) = start_admin_proxy().await;
    set_paused(&proxy, &[FIRST_KEY]);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 1]);
    let key = read_document(&proxy, &format!("keys/{}", key_id(FIRST_KEY))).await;
    assert_eq!(
        json!([key["state"], key["paused"], key["reason"], key["since"], key["until"]]),
        json!(["paused", true, "billing dispute", "2023-11-14T22:13:20.000Z", null])
    );
    let status = proxy.status_document().await;
    assert_eq!((&status["activeKeys"], &status["totalRemainingCharacters"]), (&json!(1), &json!(990)));
    assert_eq!(
        proxy.key_statuses().await,
        ["active", "active"],
        "the status document has no status for a paused key, so the key must be reported as active"
    );
    let details: Value = proxy.get("/api/keychoir-keys").await.json().await.unwrap();
    assert_eq!(
        (&details["keys"][0]["state"], &details["keys"][0]["paused"]),
        (&json!("paused"), &json!(true))
    );
    let metrics = proxy.get("/metrics").await.text().await.unwrap();
    assert!(
        metrics.contains("keychoir_keys{status=\"paused\"} 1\n"),
        "exactly one key must be counted as paused: {metrics}"
    );
    assert!(
        metrics.contains("keychoir_keys{status=\"active\"} 1\n"),
        "exactly one key must be counted as active: {metrics}"
    );
    assert_eq!(read_document(&proxy, "overview").await["keys"]["paused"], 1);
    set_paused(&proxy, &[]);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [1, 1]);
    proxy.close().await;
}

#[tokio::test]
async fn a_request_receives_a_retry_after_while_every_key_is_paused() {
    let (proxy, _) = start_admin_proxy().await;
    set_paused(&proxy, &[FIRST_KEY, SECOND_KEY]);
    let refused_response = proxy.request_speech(10).await;
    assert_eq!(refused_response.headers()["retry-after"], "60");
    crate::support::assert_proxy_error(&refused_response, 503, "all_keys_paused");
    assert_eq!(proxy.get("/readyz").await.status(), 503);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_check_reports_the_response_of_the_provider() {
    let (proxy, _) = start_admin_proxy().await;
    let path = format!("keys/{}/check", key_id(FIRST_KEY));
    let check = async || -> Value { send(&proxy, Method::POST, &path, None).await.json().await.unwrap() };
    let valid = check().await;
    assert_eq!(
        json!([valid["outcome"], valid["credits_limit"], valid["permissions"], valid["refusal"]]),
        json!(["valid", 1_000, {"user_read": true, "models_read": true}, null])
    );
    assert!(valid["latency_ms"].is_u64());
    proxy.set_fault(FIRST_KEY, "invalid");
    let refused_check = check().await;
    assert_eq!(
        (&refused_check["outcome"], &refused_check["refusal"]["status"]),
        (&json!("refused"), &json!(401))
    );
    assert!(refused_check["refusal"]["meaning"].as_str().unwrap().contains("Replace or remove this key"));
    // The check also updates the state of the key.
    assert_eq!(proxy.key_statuses().await, ["invalid", "active"]);
    proxy.set_fault(FIRST_KEY, "missing_permissions");
    let restricted_check = check().await;
    assert_eq!(
        (&restricted_check["outcome"], &restricted_check["permissions"]["user_read"]),
        (&json!("quota_unreadable"), &json!(false))
    );
    assert_error(send(&proxy, Method::POST, "keys/000000000000/check", None).await, 404, "key_not_found")
        .await;
    proxy.close().await;
}

#[tokio::test]
async fn a_check_ends_at_its_timeout_and_a_second_check_of_the_key_is_refused() {
    let (proxy, _) =
        start_admin_proxy_with(|config| config.quota_polling.timeout = std::time::Duration::from_secs(2))
            .await;
    proxy.set_fault(FIRST_KEY, "slow_head=60000");
    let path = format!("keys/{}/check", key_id(FIRST_KEY));
    let checks = (0..2).map(|_| send(&proxy, Method::POST, &path, None));
    let mut checks = crate::support::join_all(checks).await;
    let (last_ended, first_ended) = (checks.pop().unwrap(), checks.pop().unwrap());
    assert_error(first_ended, 409, "check_in_progress").await;
    let result: Value = last_ended.json().await.unwrap();
    assert_eq!(result["outcome"], "no_response");
    assert_eq!(result["reason"], "no response within 2000 ms");
    proxy.close().await;
}
