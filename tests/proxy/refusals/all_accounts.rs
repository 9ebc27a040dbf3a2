//! Tests requests that every account refuses: the request is at fault, so no key becomes unusable for other requests. A
//! rate limit affects only its endpoint, one request probes the accounts after a restriction of all of them, and a
//! similar request tries fewer accounts.

use std::time::Duration;

use super::{KEYS, assert_every_key_serves, fault, funded_plan, restart_with_plan, wait_for_key_statuses};
use crate::support::{FIRST_KEY, SPEECH_PATH, TestProxy, join_all, start_proxy, start_proxy_with};
use keychoir::simulator::Plan;
use serde_json::json;

const DUBBING: &str = "/v1/dubbing";
/// Speech with a voice that only this request uses.
const REFUSED_VOICE_PATH: &str = "/v1/text-to-speech/AVoiceThatIsRefused0";

/// Every account refuses one request, on a route that the other requests do not use.
#[tokio::test]
async fn one_request_that_every_account_refuses_makes_no_key_unusable() {
    let refusals = [
        r#"answer=402/{"detail":{"type":"x","code":"payment_required","message":"This feature needs payment."}}"#,
        r#"answer=402/{"detail":{"type":"payment_required","code":"","message":"Payment is required."}}"#,
        r#"answer=402/{"detail":"Payment required"}"#,
        r#"answer=402/{"detail":{"code":"insufficient_credits","message":"No."}}"#,
        r#"answer=401/{"detail":{"status":"quota_exceeded","message":"You have spent it."}}"#,
        r#"answer=401/{"detail":{"status":"sign_in_required","message":"Sign in."}}"#,
        r#"answer=401/{"detail":{"code":"invalid_api_key","message":"Invalid API key"}}"#,
        r#"answer=403/{"detail":{"code":"forbidden","message":"Forbidden"}}"#,
        r#"answer=403/{"detail":{"code":"a_new_one","message":"Whatever."}}"#,
        r#"answer=429/{"detail":{"code":"rate_limit_exceeded","message":"Slow down."}}"#,
        r#"answer=429[retry-after: 86400]/{"detail":{"code":"rate_limit_exceeded","message":"Slow down."}}"#,
        "answer=429/",
        "answer=401/",
        "answer=402/",
        "voice_limit_reached",
        "quota_slots",
        "quota_words",
        "payment_required_plan",
        "invalid_workspace_type",
    ];
    let check_refusal = |refusal: &'static str| async move {
        let refusal = fault(refusal).unwrap();
        let proxy = start_proxy(funded_plan()).await;
        proxy.simulator.set_route_fault_for_all(DUBBING, Some(refusal.clone()));
        let case = refusal.to_string();
        let response = proxy.post(DUBBING, &json!({"name": "x"})).await;
        assert!(
            response.status().is_client_error(),
            "{case}: the request must be refused: {}",
            response.status()
        );
        // Some keys are being polled. A request without a usable key waits for the poll.
        assert_eq!(proxy.request_speech(10).await.status(), 200, "{case}: speech must be served");
        wait_for_key_statuses(&proxy, &["active"; 3], &case).await;
        let proxy = restart_with_plan(proxy, funded_plan()).await;
        assert_every_key_serves(&proxy, &case).await;
    };
    join_all(refusals.into_iter().map(check_refusal)).await;
}

/// The request is repeated. If all accounts have refused a request, its next refusal is not evidence against
/// the account that sends it.
#[tokio::test]
async fn a_repeated_request_that_every_account_refuses_makes_no_key_unusable() {
    let refusals = [
        r#"answer=402/{"detail":{"code":"insufficient_credits","message":"No."}}"#,
        r#"answer=402/{"detail":"Payment Required"}"#,
        r#"answer=401/{"detail":{"status":"quota_exceeded","message":"You have spent it."}}"#,
        r#"answer=429/{"detail":{"status":"quota_exceeded","message":"You have spent it."}}"#,
        r#"answer=401/{"detail":{"status":"quota_exceeded","message":"This request exceeds your quota of 10. You have 0 credits remaining, while 3 credits are required for this request."}}"#,
        r#"answer=401/{"detail":{"status":"quota_exceeded","message":"You have 90 credits remaining, while 3 credits are required for this request."}}"#,
        r#"answer=401/{"detail":{"code":"invalid_api_key","message":"Invalid API key"}}"#,
        "payment_issue",
        "unusual_activity",
        "wrong_host",
    ];
    let check_refusal = |refusal: &'static str| async move {
        let proxy = start_proxy(funded_plan()).await;
        proxy.simulator.set_route_fault_for_all(DUBBING, fault(refusal));
        for number in 0..6 {
            let response = proxy.post(DUBBING, &json!({"name": "x"})).await;
            assert!(
                response.status().is_client_error(),
                "{refusal}: the request must be refused: {}",
                response.status()
            );
            // At the first request, all keys could be invalid, so the proxy may send an error about its keys.
            let may_be_proxy_error =
                number == 0 && (refusal.contains("invalid_api_key") || refusal == "wrong_host");
            assert!(
                may_be_proxy_error || !response.headers().contains_key("x-keychoir-error"),
                "{refusal}: the provider must send the response"
            );
            assert_every_key_serves(&proxy, refusal).await;
        }
        let attempts = proxy.simulator.ledger().requests_to(DUBBING).count();
        // The first request tries every account, and each of the others tries two.
        assert!(attempts <= 3 + 5 * 2, "{refusal}: six requests must not make {attempts} attempts");
    };
    join_all(refusals.into_iter().map(check_refusal)).await;
}

/// Every account is rate limited for one voice. One request of a burst probes speech with another voice, and
/// the rest of the burst is served after the probe.
#[tokio::test]
async fn a_burst_waits_for_one_probe_and_is_served() {
    let proxy =
        start_proxy_with(funded_plan(), |config| config.pool.queue_timeout = Duration::from_secs(20)).await;
    proxy.simulator.set_route_fault_for_all(REFUSED_VOICE_PATH, fault("rate_limit=86400"));
    assert_eq!(proxy.post(REFUSED_VOICE_PATH, &json!({"text": "hello"})).await.status(), 429);
    let responses = join_all((0..8).map(|_| proxy.request_speech(10))).await;
    assert_eq!(responses.iter().map(|response| response.status().as_u16()).collect::<Vec<_>>(), [200; 8]);
}

/// Every account refuses speech with one voice.
#[tokio::test]
async fn a_refused_voice_does_not_affect_speech_with_other_voices() {
    let refusals = [
        "quota_words",
        "insufficient_credits",
        "payment_issue",
        "unusual_activity",
        "invalid",
        "wrong_host",
        "rate_limit",
        "rate_limit=86400",
        "concurrency",
        "paid_plan_required",
        "voice_limit_reached",
        "missing_permissions",
        "forbidden",
        "unauthorized",
        "system_busy",
        "server_error",
        "huge",
        "garbled",
    ];
    let check_refusal = |refusal: &'static str| async move {
        let proxy =
            start_proxy_with(funded_plan(), |config| config.pool.queue_timeout = Duration::from_secs(20))
                .await;
        proxy.simulator.set_route_fault_for_all(REFUSED_VOICE_PATH, fault(refusal));
        let response = proxy.post(REFUSED_VOICE_PATH, &json!({"text": "hello"})).await;
        assert_ne!(response.status(), 200, "{refusal}: the request must be refused");
        for _ in 0..3 {
            assert_eq!(
                proxy.request_speech(10).await.status(),
                200,
                "{refusal}: speech with another voice must be served"
            );
        }
        assert_eq!(proxy.get("/readyz").await.status(), 200, "{refusal}: the proxy must be ready");
        proxy.close_unchecked().await;
    };
    join_all(refusals.into_iter().map(check_refusal)).await;
}

#[tokio::test]
async fn one_refused_request_leaves_twelve_accounts_active() {
    let keys: Vec<String> = (0..12).map(|number| format!("sk_of_twelve_{number:037}")).collect();
    let proxy = start_proxy(Plan::with_keys(keys.iter().map(|key| (key.as_str(), 1_000_000)))).await;
    let refusal = r#"answer=402/{"detail":{"type":"x","code":"payment_required","message":"This feature needs payment."}}"#;
    proxy.simulator.set_route_fault_for_all(DUBBING, fault(refusal));
    let response = proxy.post(DUBBING, &json!({})).await;
    assert_eq!(response.status(), 402);
    assert!(!response.headers().contains_key("x-keychoir-error"));
    let status = proxy.status_document().await;
    assert_eq!((&status["activeKeys"], &status["exhaustedKeys"]), (&json!(12), &json!(0)));
    assert_eq!(proxy.get("/readyz").await.status(), 200);
    // A similar request tries one account, not twelve again.
    let requests_before = total_requests(&proxy, &keys);
    assert_eq!(proxy.post(DUBBING, &json!({})).await.status(), 402);
    assert_eq!(total_requests(&proxy, &keys) - requests_before, 1);
}

/// Returns the number of requests that the provider received with any of `keys`.
fn total_requests(proxy: &TestProxy, keys: &[String]) -> usize {
    proxy.request_counts(&keys.iter().map(String::as_str).collect::<Vec<_>>()).iter().sum()
}

#[tokio::test]
async fn a_rate_limit_affects_only_the_limited_endpoint() {
    for (refusal, path) in [
        ("answer=429/", "/v1/similar-voices"),
        ("rate_limit", "/v1/similar-voices"),
        ("rate_limit=86400", "/v1/similar-voices"),
        ("rate_limit", "/v1/sound-generation"),
        ("rate_limit=86400", "/v1/sound-generation"),
        ("rate_limit", "/v1/voices/add"),
    ] {
        let proxy = start_proxy(funded_plan()).await;
        proxy.simulator.set_route_fault_for_all(path, fault(refusal));
        let response = proxy.post(path, &json!({"text": "rain"})).await;
        assert_eq!(response.status(), 429, "{refusal} {path}: the limit must be relayed");
        assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal} {path}: speech must be served");
        assert_eq!(proxy.get("/v1/voices").await.status(), 200, "{refusal} {path}: the list must be served");
        assert_eq!(proxy.get("/readyz").await.status(), 200, "{refusal} {path}: the proxy must be ready");
        // A similar request receives a final response and does not wait for the end of a long rate limit.
        let second_response = proxy.post(path, &json!({"text": "rain"})).await;
        assert_eq!(second_response.status(), 429, "{refusal} {path}: a similar request must be refused");
        if second_response.headers().contains_key("x-keychoir-error") {
            let seconds: u64 = second_response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
            assert!(
                (1..=300).contains(&seconds),
                "{refusal} {path}: the wait must be at most five minutes, and it is {seconds} s"
            );
        }
    }
}

/// Reported credits that a later poll contradicts are treated like a refusal without numbers: no account is
/// disabled, and the client of the refused request receives the refusal.
#[tokio::test]
async fn reported_credits_that_a_poll_contradicts_exhaust_no_account() {
    let refusal = |left: u64, needed: u64| {
        format!(
            r#"answer=401/{{"detail":{{"status":"quota_exceeded","message":"This request exceeds your quota of 1000000. You have {left} credits remaining, while {needed} credits are required for this request."}}}}"#
        )
    };
    for key_count in [1, 3] {
        for (left, needed) in [(0, 43), (5, 17), (100, 900)] {
            let proxy =
                start_proxy(Plan::with_keys(KEYS.into_iter().take(key_count).map(|key| (key, 1_000_000))))
                    .await;
            proxy.simulator.set_route_fault_for_all("/v1/sound-generation", fault(&refusal(left, needed)));
            for _ in 0..2 {
                let response = proxy.post("/v1/sound-generation", &json!({"text": "rain"})).await;
                assert_eq!(
                    response.status(),
                    401,
                    "{left} credits left, {key_count} keys: the request must be refused"
                );
                assert!(
                    key_count == 1 || !response.headers().contains_key("x-keychoir-error"),
                    "{left} credits left, {key_count} keys: the provider must send the response"
                );
                assert_eq!(
                    proxy.request_speech(1_000).await.status(),
                    200,
                    "{left} credits left, {key_count} keys: speech must be served"
                );
            }
            assert_every_key_serves(&proxy, &format!("{left} credits left, {key_count} keys")).await;
            proxy.close().await;
        }
    }
}

/// If all keys report an exhausted key cap, one of them is probed after `probe_after`, even if the accounts
/// are reset much later.
#[tokio::test]
async fn a_key_cap_that_every_key_reports_is_probed() {
    let refusal = r#"answer=401/{"detail":{"status":"quota_exceeded","message":"This request exceeds your API key (prod) quota of 5. You have 0 credits remaining, while 43 credits are required for this request."}}"#;
    let proxy =
        start_proxy_with(funded_plan(), |config| config.pool.probe_after = Duration::from_millis(1)).await;
    proxy.simulator.set_route_fault_for_all("/v1/sound-generation", fault(refusal));
    assert_eq!(proxy.post("/v1/sound-generation", &json!({"text": "rain"})).await.status(), 401);
    assert_eq!(proxy.request_speech(10).await.status(), 200, "the first key must be probed");
    assert_eq!(proxy.key_statuses().await[0], "active");
    assert_eq!(proxy.get("/readyz").await.status(), 200);
    proxy.close().await;
}

/// If every account reports a rate limit for one text, the rate limit ends for all of them as soon as one of
/// them serves another text.
#[tokio::test]
async fn a_rate_limit_of_one_text_ends_for_all_accounts_when_one_serves() {
    let proxy = start_proxy(funded_plan()).await;
    proxy.simulator.set_route_fault_for_all(REFUSED_VOICE_PATH, fault("rate_limit"));
    assert_eq!(proxy.post(REFUSED_VOICE_PATH, &json!({"text": "hello"})).await.status(), 429);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.key_statuses().await, ["active"; 3]);
    proxy.close().await;
}

/// A served request refutes the restriction. Further refusals of the same request do not restore it.
#[tokio::test]
async fn a_refuted_restriction_is_not_restored_by_the_same_refusal() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 1_000_000)])).await;
    proxy.simulator.set_route_fault_for_all(REFUSED_VOICE_PATH, fault("unusual_activity"));
    for _ in 0..3 {
        assert_eq!(proxy.post(REFUSED_VOICE_PATH, &json!({"text": "hello"})).await.status(), 401);
        assert_eq!(proxy.request_speech(10).await.status(), 200);
    }
    assert_eq!(proxy.post(REFUSED_VOICE_PATH, &json!({"text": "hello"})).await.status(), 401);
    assert_every_key_serves(&proxy, "after the fourth refusal").await;
    proxy.close().await;
}

#[tokio::test]
async fn a_missing_resource_is_requested_with_one_account_the_next_time() {
    let proxy = start_proxy(funded_plan()).await;
    let path = "/v1/text-to-speech/AVoiceThatIsUnknown0";
    assert_eq!(proxy.post(path, &json!({"text": "hello"})).await.status(), 404);
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 1]);
    for total in 4..8 {
        assert_eq!(proxy.post(path, &json!({"text": "hello"})).await.status(), 404);
        assert_eq!(proxy.request_counts(&KEYS).iter().sum::<usize>(), total);
    }
    proxy.close().await;
}

#[tokio::test]
async fn a_missing_path_is_requested_with_one_account() {
    let proxy = start_proxy(funded_plan()).await;
    proxy.simulator.set_route_fault_for_all(SPEECH_PATH, fault(r#"answer=404/{"detail":"Not Found"}"#));
    for total in 1..4 {
        assert_eq!(proxy.request_speech(10).await.status(), 404);
        assert_eq!(proxy.request_counts(&KEYS).iter().sum::<usize>(), total);
    }
    proxy.close().await;
}

#[tokio::test]
async fn unexplained_refusals_of_one_client_make_no_key_unusable() {
    let check_refusal = |refusal: &'static str| async move {
        let proxy = start_proxy(funded_plan()).await;
        proxy.simulator.set_route_fault_for_all("/v1/convai", fault(refusal));
        for _ in 0..5 {
            let requests_before: usize = proxy.request_counts(&KEYS).iter().sum();
            assert_eq!(
                proxy.get("/v1/convai/agents").await.status(),
                401,
                "{refusal}: the refusal must be relayed"
            );
            assert_eq!(
                proxy.request_counts(&KEYS).iter().sum::<usize>() - requests_before,
                2,
                "{refusal}: two accounts must be tried"
            );
            assert_every_key_serves(&proxy, refusal).await;
            let speech_attempts = proxy.request_counts(&KEYS).iter().sum::<usize>() - requests_before - 2;
            assert_eq!(speech_attempts, 1, "{refusal}: speech must be served with one attempt");
        }
        proxy.close().await;
    };
    join_all(
        [
            "sign_in_required",
            "unauthorized",
            r#"answer=401/{"detail":{"code":"unauthorized","message":"No."}}"#,
            r#"answer=401/{"detail":{"code":"unheard_of","message":"No."}}"#,
            "answer=401/",
        ]
        .into_iter()
        .map(check_refusal),
    )
    .await;
}
