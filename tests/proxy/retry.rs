//! A refused key is replaced, in the right way for each kind of refusal, and a request that may
//! have been charged is never sent twice.

use crate::support::{
    FIRST_KEY, SECOND_KEY, SPEECH_PATH, THIRD_KEY, assert_proxy_error, join_all, start_proxy,
    start_proxy_with,
};
use keychoir::config::KeyConfig;
use keychoir::secret::ApiKey;
use keychoir::simulator::{KeyPlan, Plan, Simulator, WorkspacePlan};
use serde_json::{Value, json};

const KEYS: [&str; 3] = [FIRST_KEY, SECOND_KEY, THIRD_KEY];

fn rich() -> Plan {
    Plan::of(KEYS.map(|key| (key, 100_000)))
}

/// Refuses the first key: the client must not notice, and that key must have `status` afterwards.
async fn check_replaced(fault: &str, status: &str) {
    let proxy = start_proxy(rich()).await;
    proxy.set_fault(FIRST_KEY, fault);
    let answer = proxy.request_speech(10).await;
    assert_eq!(answer.status(), 200, "{fault}");
    assert!(answer.bytes().await.unwrap().len() > 1_000, "{fault}");
    assert_eq!(proxy.key_statuses().await, [status, "active", "active"], "{fault}");
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 0], "{fault}");
    let records = proxy.into_records().await;
    let verdicts: Vec<(i64, i64)> = records.iter().map(|record| (record.number, record.credits)).collect();
    assert_eq!(verdicts, [(1, 0), (2, 10)], "{fault}");
    assert_eq!(records[0].request_id, records[1].request_id);
}

#[tokio::test]
async fn a_refused_key_is_replaced() {
    for (fault, status) in [
        ("quota", "exhausted"),
        ("key_cap", "exhausted"),
        ("insufficient_credits", "exhausted"),
        ("quota_403", "exhausted"),
        ("payment_issue", "exhausted"),
        ("unusual_activity", "exhausted"),
        ("invalid", "invalid"),
        ("invalid_400", "invalid"),
        ("rate_limit", "rate_limited"),
        ("rate_limit=30", "rate_limited"),
        // The key itself is fine: its concurrency limit is reached for a moment.
        ("concurrency", "active"),
    ] {
        check_replaced(fault, status).await;
    }
}

#[tokio::test]
async fn a_refusal_without_fault_of_the_key_is_retried_without_a_cooldown() {
    for fault in ["missing_permissions", "paid_plan_required", "subscription_required", "forbidden"] {
        check_replaced(fault, "active").await;
    }
}

#[tokio::test]
async fn a_refusal_without_a_reason_makes_no_key_unusable() {
    for status in [401, 402, 403, 429] {
        check_replaced(&format!("page={status}"), "active").await;
    }
}

#[tokio::test]
async fn a_head_response_contains_no_key() {
    for (fault, status) in
        [("quota", 401), ("invalid", 401), ("insufficient_credits", 402), ("rate_limit", 429)]
    {
        let proxy = start_proxy(rich()).await;
        proxy.set_fault(FIRST_KEY, fault);
        proxy.set_fault(SECOND_KEY, fault);
        let head = || proxy.client.head(format!("{}/v1/voices", proxy.url)).send();
        assert_eq!(head().await.unwrap().status(), status, "two say the same");
        assert_eq!(proxy.request_counts(&KEYS), [1, 1, 0], "{fault}");
        proxy.simulator.always(SECOND_KEY, None);
        // The provider refuses HEAD, which is still its response.
        assert_eq!(head().await.unwrap().status(), 405, "{fault}");
        assert_eq!(proxy.key_statuses().await, ["active"; 3], "{fault}");
        proxy.close().await;
    }
}

#[tokio::test]
async fn a_compressed_or_early_refusal_is_classified() {
    for fault in ["gzip:quota", "early:quota", "early:insufficient_credits"] {
        check_replaced(fault, "exhausted").await;
    }
}

/// Every key is refused: the client receives the provider's response, and each key was tried that
/// often.
async fn check_relayed(fault: &str, status: u16, hits: [usize; 3]) {
    let proxy = start_proxy(rich()).await;
    for key in KEYS {
        proxy.set_fault(key, fault);
    }
    let answer = proxy.request_speech(10).await;
    assert_eq!(answer.status(), status, "{fault}");
    assert!(!answer.headers().contains_key("x-keychoir-error"), "{fault}");
    answer.bytes().await.unwrap();
    assert_eq!(proxy.request_counts(&KEYS), hits, "{fault}");
    assert_eq!(proxy.key_statuses().await, ["active"; 3], "{fault}");
    proxy.close().await;
}

#[tokio::test]
async fn an_error_of_the_client_is_sent_with_one_key() {
    check_relayed("unprocessable", 422, [1, 0, 0]).await;
    check_relayed("text_too_long", 400, [1, 0, 0]).await;
    check_relayed("model_not_found", 400, [1, 0, 0]).await;
}

#[tokio::test]
async fn a_missing_resource_is_searched_once_in_every_account() {
    check_relayed("voice_not_found", 404, [1, 1, 1]).await;
}

#[tokio::test]
async fn an_ambiguous_refusal_of_two_workspaces_is_relayed() {
    check_relayed("forbidden", 403, [1, 1, 0]).await;
    check_relayed("unauthorized", 401, [1, 1, 0]).await;
    check_relayed("sign_in_required", 401, [1, 1, 0]).await;
    for status in [401, 402, 403, 429] {
        check_relayed(&format!("page={status}"), status, [1, 1, 0]).await;
    }
}

#[tokio::test]
async fn an_operation_that_one_account_lacks_is_tried_with_every_other() {
    check_relayed("missing_permissions", 401, [1, 1, 1]).await;
    check_relayed("paid_plan_required", 402, [1, 1, 1]).await;
    check_relayed("voice_limit_reached", 400, [1, 1, 1]).await;
}

#[tokio::test]
async fn a_provider_failure_after_a_possible_effect_is_not_retried() {
    check_relayed("server_error", 500, [1, 0, 0]).await;
}

#[tokio::test]
async fn an_overloaded_provider_is_retried_once() {
    // Another account is tried if there is one: it may be served by another machine of the
    // provider.
    check_relayed("system_busy", 429, [1, 1, 0]).await;
    check_relayed("maintenance", 503, [1, 1, 0]).await;
}

#[tokio::test]
async fn an_unreadable_refusal_is_unexplained() {
    for fault in ["huge", "garbled"] {
        check_relayed(fault, 401, [1, 1, 0]).await;
        check_replaced(fault, "active").await;
    }
}

#[tokio::test]
async fn a_post_that_was_read_and_not_answered_is_not_sent_again() {
    let proxy = start_proxy(rich()).await;
    for key in KEYS {
        proxy.set_fault(key, "close");
    }
    assert_proxy_error(&proxy.request_speech(10).await, 502, "upstream_reset");
    assert_eq!(proxy.request_counts(&KEYS), [1, 0, 0]);
    let records = proxy.into_records().await;
    assert_eq!((&*records[0].verdict, &*records[0].credits_from), ("no_response", "unknown"));
}

#[tokio::test]
async fn an_unanswered_get_is_sent_once_more() {
    let proxy = start_proxy(rich()).await;
    proxy.simulator.script(FIRST_KEY, vec!["close".parse().unwrap()]);
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [2, 0, 0]);
    for key in KEYS {
        proxy.set_fault(key, "close");
    }
    assert_proxy_error(&proxy.get("/v1/voices").await, 502, "upstream_reset");
    proxy.close().await;
}

#[tokio::test]
async fn keys_are_spent_in_order_and_the_records_equal_the_charges() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 100), (SECOND_KEY, 50), (THIRD_KEY, 100_000)])).await;
    for _ in 0..40 {
        assert_eq!(proxy.request_speech(7).await.status(), 200);
    }
    // Two credits and one are left: too few for seven characters, enough for one.
    assert_eq!(proxy.key_statuses().await, ["active"; 3]);
    assert_eq!(proxy.request_speech(2).await.status(), 200);
    let (ledger, _) = proxy.close().await;
    assert_eq!(ledger.totals.charged, 282);
    assert_eq!(ledger.key(FIRST_KEY).unwrap().charged, 100);
}

#[tokio::test]
async fn many_requests_at_once_all_succeed_while_keys_run_out() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 300), (SECOND_KEY, 300), (THIRD_KEY, 100_000)])).await;
    let answers = (0..100).map(|_| proxy.request_speech(10));
    for answer in join_all(answers).await {
        assert_eq!(answer.status(), 200);
        answer.bytes().await.unwrap();
    }
    let (ledger, _) = proxy.close().await;
    assert_eq!(ledger.totals.charged, 1_000);
}

#[tokio::test]
async fn an_empty_pool_responds_like_the_provider_without_an_attempt() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 5), (SECOND_KEY, 5)])).await;
    let answer = proxy.request_speech(10).await;
    assert_proxy_error(&answer, 401, "all_keys_exhausted");
    assert!(!answer.headers().contains_key("retry-after"));
    let body: Value = answer.json().await.unwrap();
    let message = body["detail"]["message"].as_str().unwrap();
    assert!(
        message.starts_with("All ElevenLabs API keys are exhausted or rate limited. Next reset: 20"),
        "{message}"
    );
    assert_eq!(body["detail"]["status"], "quota_exceeded");
    assert_eq!(body["error"], json!({"message": message, "code": 401}));
    let hits = proxy.request_counts(&[FIRST_KEY, SECOND_KEY]);
    assert_eq!(hits, [1, 1]);
    assert_proxy_error(&proxy.request_speech(10).await, 401, "all_keys_exhausted");
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), hits, "an empty pool sends nothing upstream");
    proxy.close().await;
}

#[tokio::test]
async fn the_response_names_the_end_of_the_cooldown_of_all_keys() {
    let proxy = start_proxy(rich()).await;
    proxy.set_fault(FIRST_KEY, "rate_limit=50");
    proxy.set_fault(SECOND_KEY, "rate_limit=20");
    proxy.set_fault(THIRD_KEY, "rate_limit");
    let answer = proxy.request_speech(10).await;
    assert_proxy_error(&answer, 429, "all_keys_rate_limited");
    let seconds: u64 = answer.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((15..=20).contains(&seconds), "{seconds}");
    proxy.close().await;
}

#[tokio::test]
async fn the_response_names_the_refusal_of_all_keys() {
    let proxy = start_proxy(rich()).await;
    for key in KEYS {
        proxy.set_fault(key, "invalid");
    }
    assert_proxy_error(&proxy.request_speech(10).await, 401, "all_keys_invalid");
    // Each key was polled on its own, and is refused.
    while proxy.get("/readyz").await.status() != 503 {
        tokio::task::yield_now().await;
    }
    assert_eq!(proxy.key_statuses().await, ["invalid"; 3]);
    proxy.close().await;
}

#[tokio::test]
async fn a_second_key_of_an_empty_workspace_is_not_tried() {
    let plan = Plan {
        keys: vec![
            KeyPlan { workspace: Some("choir".to_owned()), ..KeyPlan::new(FIRST_KEY, 0) },
            KeyPlan { workspace: Some("choir".to_owned()), ..KeyPlan::new(SECOND_KEY, 0) },
            KeyPlan::new(THIRD_KEY, 1_000),
        ],
        ..Plan::default().with_workspace(WorkspacePlan::new("choir", 5))
    };
    let proxy = start_proxy_with(plan, |config| {
        for key in &mut config.keys[..2] {
            key.workspace = Some("choir".to_owned());
        }
    })
    .await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [0, 0, 1], "five credits do not pay for ten characters");
    assert_eq!(proxy.key_statuses().await, ["active"; 3], "five credits are left");
    proxy.close().await;
}

#[tokio::test]
async fn a_body_beyond_the_buffer_is_forwarded_without_a_replay() {
    let proxy = start_proxy_with(rich(), |config| {
        config.retry.buffer_size = 100;
        config.retry.spill_size = 0;
    })
    .await;
    proxy.set_fault(FIRST_KEY, "quota");
    let body = json!({"text": "a".repeat(200)});
    assert_eq!(proxy.post(SPEECH_PATH, &body).await.status(), 401);
    assert_eq!(proxy.request_counts(&KEYS), [1, 0, 0]);
    assert_eq!(proxy.post(SPEECH_PATH, &body).await.status(), 200, "the key is parked all the same");
    proxy.close().await;
}

#[tokio::test]
async fn a_key_of_another_region_is_sent_to_its_own_host_and_to_no_other() {
    let elsewhere = Simulator::start(crate::support::bind_loopback().await, Plan::of([(SECOND_KEY, 1_000)]))
        .await
        .unwrap();
    let region = elsewhere.base_url();
    // Each simulator knows its own key only and would refuse the other one as invalid.
    let proxy = start_proxy_with(Plan::of([(FIRST_KEY, 5)]), |config| {
        let key = ApiKey::new(SECOND_KEY).unwrap();
        config.keys.push(KeyConfig { base_url: Some(region.parse().unwrap()), ..KeyConfig::from(key) });
    })
    .await;
    for _ in 0..3 {
        assert_eq!(proxy.request_speech(10).await.status(), 200);
    }
    assert_eq!(proxy.key_statuses().await, ["active", "active"], "a foreign key would be invalid");
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [0]);
    assert_eq!(elsewhere.ledger().key(SECOND_KEY).unwrap().charged, 30);
}
