//! Tests retries: which refusals are retried with another key, which are relayed, and which status the refused key
//! receives. A request that may have been charged is never sent twice, and neither is a request whose body exceeds its
//! buffer. If no key is usable, the proxy responds with the common reason and the end of the first cooldown.

use crate::support::{
    FIRST_KEY, SECOND_KEY, SPEECH_PATH, THIRD_KEY, assert_proxy_error, bind_loopback, join_all, start_proxy,
    start_proxy_with,
};
use keychoir::config::KeyConfig;
use keychoir::secret::ApiKey;
use keychoir::simulator::{KeyPlan, Plan, Simulator, WorkspacePlan};
use serde_json::{Value, json};

const KEYS: [&str; 3] = [FIRST_KEY, SECOND_KEY, THIRD_KEY];

fn funded_plan() -> Plan {
    Plan::with_keys(KEYS.map(|key| (key, 100_000)))
}

/// Checks a request for which the provider refuses the first key. The client must receive a response of the second
/// key, and the first key must have `status` afterwards.
async fn check_retried(fault: &str, status: &str) {
    let proxy = start_proxy(funded_plan()).await;
    proxy.set_fault(FIRST_KEY, fault);
    let response = proxy.request_speech(10).await;
    assert_eq!(response.status(), 200, "{fault}: the request must be served");
    assert!(response.bytes().await.unwrap().len() > 1_000, "{fault}: the client must receive the audio");
    assert_eq!(
        proxy.key_statuses().await,
        [status, "active", "active"],
        "{fault}: the first key must be {status}, and the other keys must be active"
    );
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 0], "{fault}: the first two keys must be tried once each");
    let records = proxy.into_records().await;
    let attempts: Vec<(i64, i64)> = records.iter().map(|record| (record.number, record.credits)).collect();
    assert_eq!(attempts, [(1, 0), (2, 10)], "{fault}: only the second attempt must be charged");
    assert_eq!(records[0].request_id, records[1].request_id);
}

#[tokio::test]
async fn a_refused_request_is_retried_with_the_next_key() {
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
        // A key at its concurrency limit stays active.
        ("concurrency", "active"),
    ] {
        check_retried(fault, status).await;
    }
}

#[tokio::test]
async fn a_refusal_that_does_not_blame_the_key_is_retried_without_a_cooldown() {
    for fault in ["missing_permissions", "paid_plan_required", "subscription_required", "forbidden"] {
        check_retried(fault, "active").await;
    }
}

#[tokio::test]
async fn a_refusal_without_a_reason_makes_no_key_unusable() {
    for status in [401, 402, 403, 429] {
        check_retried(&format!("page={status}"), "active").await;
    }
}

#[tokio::test]
async fn a_refused_head_request_makes_no_key_unusable() {
    for (fault, status) in
        [("quota", 401), ("invalid", 401), ("insufficient_credits", 402), ("rate_limit", 429)]
    {
        let proxy = start_proxy(funded_plan()).await;
        proxy.set_fault(FIRST_KEY, fault);
        proxy.set_fault(SECOND_KEY, fault);
        let head = || proxy.client.head(format!("{}/v1/voices", proxy.url)).send();
        assert_eq!(
            head().await.unwrap().status(),
            status,
            "{fault}: the refusal must be relayed, because two accounts refuse alike"
        );
        assert_eq!(
            proxy.request_counts(&KEYS),
            [1, 1, 0],
            "{fault}: the first two keys must be tried once each"
        );
        proxy.simulator.set_fault(SECOND_KEY, None);
        // The provider does not allow HEAD, and its response is relayed.
        assert_eq!(
            head().await.unwrap().status(),
            405,
            "{fault}: the response of the provider must be relayed"
        );
        assert_eq!(proxy.key_statuses().await, ["active"; 3], "{fault}: all keys must stay active");
        proxy.close().await;
    }
}

#[tokio::test]
async fn a_compressed_or_early_refusal_is_classified() {
    for fault in ["gzip:quota", "early:quota", "early:insufficient_credits"] {
        check_retried(fault, "exhausted").await;
    }
}

/// Checks a request for which the provider refuses every key. The client must receive the provider's response, after
/// `counts` attempts with each key.
async fn check_relayed(fault: &str, status: u16, counts: [usize; 3]) {
    let proxy = start_proxy(funded_plan()).await;
    for key in KEYS {
        proxy.set_fault(key, fault);
    }
    let response = proxy.request_speech(10).await;
    assert_eq!(response.status(), status, "{fault}: the response must have the status {status}");
    assert!(
        !response.headers().contains_key("x-keychoir-error"),
        "{fault}: the provider must send the response"
    );
    response.bytes().await.unwrap();
    assert_eq!(
        proxy.request_counts(&KEYS),
        counts,
        "{fault}: the numbers of attempts with each key must be {counts:?}"
    );
    assert_eq!(proxy.key_statuses().await, ["active"; 3], "{fault}: all keys must stay active");
    proxy.close().await;
}

#[tokio::test]
async fn an_invalid_request_is_sent_with_one_key() {
    check_relayed("unprocessable", 422, [1, 0, 0]).await;
    check_relayed("text_too_long", 400, [1, 0, 0]).await;
    check_relayed("model_not_found", 400, [1, 0, 0]).await;
}

#[tokio::test]
async fn a_missing_resource_is_requested_once_with_every_account() {
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
    // The retry uses another account, because another machine of the provider may serve it.
    check_relayed("system_busy", 429, [1, 1, 0]).await;
    check_relayed("maintenance", 503, [1, 1, 0]).await;
}

#[tokio::test]
async fn an_unreadable_refusal_has_the_effect_of_an_unknown_one() {
    for fault in ["huge", "garbled"] {
        check_relayed(fault, 401, [1, 1, 0]).await;
        check_retried(fault, "active").await;
    }
}

#[tokio::test]
async fn a_post_that_the_provider_has_read_is_not_sent_again() {
    let proxy = start_proxy(funded_plan()).await;
    for key in KEYS {
        proxy.set_fault(key, "close");
    }
    assert_proxy_error(&proxy.request_speech(10).await, 502, "upstream_reset");
    assert_eq!(proxy.request_counts(&KEYS), [1, 0, 0]);
    let records = proxy.into_records().await;
    assert_eq!((&*records[0].verdict, &*records[0].credits_from), ("no_response", "unknown"));
}

#[tokio::test]
async fn a_get_without_a_response_is_sent_once_more() {
    let proxy = start_proxy(funded_plan()).await;
    proxy.simulator.queue_faults(FIRST_KEY, vec!["close".parse().unwrap()]);
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [2, 0, 0]);
    for key in KEYS {
        proxy.set_fault(key, "close");
    }
    assert_proxy_error(&proxy.get("/v1/voices").await, 502, "upstream_reset");
    proxy.close().await;
}

#[tokio::test]
async fn keys_are_used_in_order_and_the_records_equal_the_charges() {
    let proxy =
        start_proxy(Plan::with_keys([(FIRST_KEY, 100), (SECOND_KEY, 50), (THIRD_KEY, 100_000)])).await;
    for _ in 0..40 {
        assert_eq!(proxy.request_speech(7).await.status(), 200);
    }
    // The first two keys have two credits and one credit left. These suffice for one character, but not for seven.
    assert_eq!(proxy.key_statuses().await, ["active"; 3]);
    assert_eq!(proxy.request_speech(2).await.status(), 200);
    let (ledger, _) = proxy.close().await;
    assert_eq!(ledger.totals.charged, 282);
    assert_eq!(ledger.key(FIRST_KEY).unwrap().charged, 100);
}

#[tokio::test]
async fn concurrent_requests_succeed_while_keys_are_exhausted() {
    let proxy =
        start_proxy(Plan::with_keys([(FIRST_KEY, 300), (SECOND_KEY, 300), (THIRD_KEY, 100_000)])).await;
    let responses = (0..100).map(|_| proxy.request_speech(10));
    for response in join_all(responses).await {
        assert_eq!(response.status(), 200);
        response.bytes().await.unwrap();
    }
    let (ledger, _) = proxy.close().await;
    assert_eq!(ledger.totals.charged, 1_000);
}

#[tokio::test]
async fn an_exhausted_pool_responds_like_the_provider_without_an_attempt() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 5), (SECOND_KEY, 5)])).await;
    let response = proxy.request_speech(10).await;
    assert_proxy_error(&response, 401, "all_keys_exhausted");
    assert!(!response.headers().contains_key("retry-after"));
    let body: Value = response.json().await.unwrap();
    let message = body["detail"]["message"].as_str().unwrap();
    assert!(
        message.starts_with("All ElevenLabs API keys are exhausted or rate limited. Next reset: 20"),
        "the message must report the next reset: {message}"
    );
    assert_eq!(body["detail"]["status"], "quota_exceeded");
    assert_eq!(body["error"], json!({"message": message, "code": 401}));
    let request_counts = proxy.request_counts(&[FIRST_KEY, SECOND_KEY]);
    assert_eq!(request_counts, [1, 1]);
    assert_proxy_error(&proxy.request_speech(10).await, 401, "all_keys_exhausted");
    assert_eq!(
        proxy.request_counts(&[FIRST_KEY, SECOND_KEY]),
        request_counts,
        "an exhausted pool must send no attempt"
    );
    proxy.close().await;
}

#[tokio::test]
async fn the_response_reports_the_end_of_the_first_cooldown() {
    let proxy = start_proxy(funded_plan()).await;
    proxy.set_fault(FIRST_KEY, "rate_limit=50");
    proxy.set_fault(SECOND_KEY, "rate_limit=20");
    proxy.set_fault(THIRD_KEY, "rate_limit");
    let response = proxy.request_speech(10).await;
    assert_proxy_error(&response, 429, "all_keys_rate_limited");
    let seconds: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((15..=20).contains(&seconds), "the wait must end with the first cooldown, and it is {seconds} s");
    proxy.close().await;
}

#[tokio::test]
async fn the_response_reports_the_common_refusal_of_all_keys() {
    let proxy = start_proxy(funded_plan()).await;
    for key in KEYS {
        proxy.set_fault(key, "invalid");
    }
    assert_proxy_error(&proxy.request_speech(10).await, 401, "all_keys_invalid");
    // Each refused key is polled, and the polls confirm the refusal.
    while proxy.get("/readyz").await.status() != 503 {
        tokio::task::yield_now().await;
    }
    assert_eq!(proxy.key_statuses().await, ["invalid"; 3]);
    proxy.close().await;
}

#[tokio::test]
async fn the_second_key_of_a_workspace_with_too_few_credits_is_not_tried() {
    let plan = Plan {
        keys: vec![
            KeyPlan { workspace: Some("ws".to_owned()), ..KeyPlan::new(FIRST_KEY, 0) },
            KeyPlan { workspace: Some("ws".to_owned()), ..KeyPlan::new(SECOND_KEY, 0) },
            KeyPlan::new(THIRD_KEY, 1_000),
        ],
        ..Plan::default().with_workspace(WorkspacePlan::new("ws", 5))
    };
    let proxy = start_proxy_with(plan, |config| {
        for key in &mut config.keys[..2] {
            key.workspace = Some("ws".to_owned());
        }
    })
    .await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [0, 0, 1], "a workspace with five credits must not be tried");
    assert_eq!(proxy.key_statuses().await, ["active"; 3], "a workspace with five credits must be active");
    proxy.close().await;
}

#[tokio::test]
async fn a_request_with_a_body_above_the_buffer_size_is_not_retried() {
    let proxy = start_proxy_with(funded_plan(), |config| {
        config.retry.buffer_size = 100;
        config.retry.spill_size = 0;
    })
    .await;
    proxy.set_fault(FIRST_KEY, "quota");
    let body = json!({"text": "a".repeat(200)});
    assert_eq!(proxy.post(SPEECH_PATH, &body).await.status(), 401);
    assert_eq!(proxy.request_counts(&KEYS), [1, 0, 0]);
    assert_eq!(proxy.post(SPEECH_PATH, &body).await.status(), 200, "the refused key must be in cooldown");
    proxy.close().await;
}

#[tokio::test]
async fn a_key_of_another_region_is_sent_only_to_its_own_host() {
    let other_region =
        Simulator::start(bind_loopback().await, Plan::with_keys([(SECOND_KEY, 1_000)])).await.unwrap();
    let region = other_region.base_url();
    // Each simulator knows only one of the keys, and would refuse the other key as invalid.
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 5)]), |config| {
        let key = ApiKey::new(SECOND_KEY).unwrap();
        config.keys.push(KeyConfig { base_url: Some(region.parse().unwrap()), ..KeyConfig::from(key) });
    })
    .await;
    for _ in 0..3 {
        assert_eq!(proxy.request_speech(10).await.status(), 200);
    }
    assert_eq!(proxy.key_statuses().await, ["active", "active"], "each key must be polled at its own host");
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [0]);
    assert_eq!(other_region.ledger().key(SECOND_KEY).unwrap().charged, 30);
}
