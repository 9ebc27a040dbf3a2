//! Tests refusals by some accounts, which are then tried last for similar requests, while other accounts serve them.
//! The refusals are about credits, plans, permissions, voice slots, regions, rate limits and concurrency, or have no
//! known reason. Also tests when a restriction ends, and accounts without a credit limit.

use std::time::Duration;

use super::{
    KEYS, assert_every_key_serves, fault, funded_plan, plan_with_tiers, restart_with_plan,
    wait_for_key_statuses,
};
use crate::support::routes::Route;
use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, THIRD_KEY, VOICE_ID, assert_proxy_error, bind_loopback,
    join_all, start_proxy, start_proxy_with, wait_until,
};
use keychoir::config::KeyConfig;
use keychoir::secret::{ApiKey, Fingerprint};
use keychoir::simulator::{KeyPlan, Plan, ReportedLimit, Simulator, WorkspacePlan};
use serde_json::{Value, json};

/// Two accounts refuse all speech with unknown messages. From the second request on, the third account serves
/// it.
#[tokio::test]
async fn a_third_account_serves_a_request_with_two_unexplained_refusals() {
    let refusals = [
        r#"answer=403/{"detail":{"code":"forbidden","message":"Your IP address is not allowed."}}"#,
        r#"answer=401/{"detail":"Unauthorized"}"#,
        r#"answer=401/{"detail":{"code":"api_key_expired","message":"Expired."}}"#,
        "answer=403/",
        "answer=402/",
        "answer=429/error code: 1015",
        "garbled",
        "huge",
    ];
    let check_refusal = |refusal: &'static str| async move {
        let proxy = start_proxy(funded_plan()).await;
        for key in [FIRST_KEY, SECOND_KEY] {
            proxy.set_fault(key, refusal);
        }
        proxy.request_speech(10).await;
        for _ in 0..5 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}: the request must be served");
        }
        assert_eq!(
            proxy.request_counts(&[THIRD_KEY]),
            [5],
            "{refusal}: the third account must serve every later request"
        );
        // A request that only those two accounts can serve is still sent to them.
        proxy.simulator.set_fault(FIRST_KEY, None);
        proxy.set_fault(THIRD_KEY, "quota_words");
        assert_eq!(
            proxy.request_speech(10).await.status(),
            200,
            "{refusal}: a restricted account must serve if no other can"
        );
    };
    join_all(refusals.into_iter().map(check_refusal)).await;
}

/// An account refuses one kind of request with a message about the whole account, and each poll contradicts the
/// message. The account is tried exactly once more for that kind of request.
#[tokio::test]
async fn a_refusal_that_polls_contradict_is_retried_once() {
    let refusals = [
        "quota_words",
        "insufficient_credits",
        "payment_issue",
        r#"answer=401/{"detail":{"status":"quota_exceeded","message":"You have 90 credits remaining, while 3 credits are required for this request."}}"#,
        r#"answer=401/{"detail":{"code":"invalid_api_key","message":"Invalid API key"}}"#,
    ];
    let check_refusal = |refusal: &'static str| async move {
        let proxy = start_proxy(funded_plan()).await;
        proxy.simulator.set_route_fault(FIRST_KEY, SPEECH_PATH, fault(refusal));
        for _ in 0..4 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}: the request must be served");
            wait_for_key_statuses(&proxy, &["active"; 3], refusal).await;
        }
        assert_eq!(
            proxy.request_counts(&[FIRST_KEY, SECOND_KEY]),
            [2, 4],
            "{refusal}: the accounts that refuse must be tried less often than the account that serves"
        );
    };
    join_all(refusals.into_iter().map(check_refusal)).await;
}

#[tokio::test]
async fn an_unreadable_refusal_is_retried_with_the_next_key() {
    for refusal in ["garbled", "huge"] {
        let proxy = start_proxy(funded_plan()).await;
        proxy.set_fault(FIRST_KEY, refusal);
        for _ in 0..3 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}: the request must be served");
        }
        assert_eq!(
            proxy.request_counts(&[FIRST_KEY, SECOND_KEY]),
            [1, 3],
            "{refusal}: the accounts that refuse must be tried less often than the account that serves"
        );
    }
}

#[tokio::test]
async fn a_key_with_too_few_credits_for_one_text_stays_active_over_a_restart() {
    let plan = || Plan::with_keys([(FIRST_KEY, 9_000)]);
    let proxy = start_proxy(plan()).await;
    assert_eq!(proxy.request_speech(50).await.status(), 200);
    let response = proxy.request_speech(9_500).await;
    assert_eq!(response.status(), 401);
    assert_eq!(proxy.request_speech(50).await.status(), 200);
    let remaining = |status: &Value| status["keys"][0]["remainingCharacters"].clone();
    let status = proxy.status_document().await;
    assert_eq!(
        (&status["activeKeys"], remaining(&status)),
        (&json!(1), json!(8_900)),
        "the key must stay active with its remaining credits: {status}"
    );
    assert_eq!(status["totalRemainingCharacters"], 8_900);
    assert_eq!(proxy.get("/readyz").await.status(), 200);
    // The proxy refuses the same text without an attempt.
    let response = proxy.request_speech(9_500).await;
    assert_proxy_error(&response, 401, "all_keys_exhausted");
    let message = response.json::<Value>().await.unwrap()["detail"]["message"].to_string();
    assert!(
        message.contains("At most 8,900 credits are left on one key"),
        "the message must report the remaining credits: {message}"
    );
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [3]);

    let workspace = WorkspacePlan { used: 100, ..WorkspacePlan::new("ws", 9_000) };
    let plan = Plan::with_keys([]).with_workspace(workspace);
    let plan = plan.with_key(KeyPlan { workspace: Some("ws".to_owned()), ..KeyPlan::new(FIRST_KEY, 0) });
    let proxy = restart_with_plan(proxy, plan).await;
    assert_eq!(proxy.request_speech(50).await.status(), 200);
    assert_eq!(proxy.key_statuses().await, ["active"]);
    assert_eq!(remaining(&proxy.status_document().await), json!(8_850));
}

#[tokio::test]
async fn a_poll_with_remaining_credits_ends_a_quota_cooldown() {
    let proxy = start_proxy(funded_plan()).await;
    proxy.simulator.queue_faults(FIRST_KEY, vec![fault("quota_words").unwrap()]);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    wait_for_key_statuses(&proxy, &["active"; 3], "a poll reports 100,000 credits").await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [2, 1, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_restriction_is_recorded_for_its_account_and_operation() {
    for refusal in
        ["workspace_access_denied", "forbidden", "subscription_required", "unauthorized", "page=403"]
    {
        let proxy = start_proxy(funded_plan()).await;
        proxy.simulator.set_route_fault(FIRST_KEY, "/v1/text-to-speech", fault(refusal));
        for _ in 0..30 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}: the request must be served");
        }
        assert_eq!(
            proxy.request_counts(&KEYS),
            [1, 30, 0],
            "{refusal}: the accounts that refuse must be tried less often than the account that serves"
        );
        let details: Value = proxy.get("/api/keychoir-keys").await.json().await.unwrap();
        let cannot = details["keys"][0]["cannot"].as_array().unwrap();
        assert_eq!(cannot.len(), 1, "{refusal}: exactly one restriction must be recorded: {details}");
        assert_eq!(
            details["keys"][1]["cannot"],
            json!([]),
            "{refusal}: the serving account must have no restriction"
        );
        // The key still serves all other requests.
        assert_eq!(proxy.get("/v1/models").await.status(), 200, "{refusal}: another request must be served");
        proxy.close().await;
    }
}

#[tokio::test]
async fn a_request_for_a_plan_feature_is_sent_to_accounts_that_may_have_it() {
    const LIBRARY: &str = "LibraryVoice00000001";
    let mut plan = plan_with_tiers(&["free", "free", "creator"], 100_000);
    plan.library = vec![LIBRARY.to_owned()];
    let proxy = start_proxy(plan).await;
    let path = format!("/v1/text-to-speech/{LIBRARY}");
    let body = json!({"text": "hello", "model_id": "eleven_multilingual_v2"});
    let request_library_voice = || proxy.post(&path, &body);
    assert_eq!(request_library_voice().await.status(), 200);
    assert_eq!(
        proxy.request_counts(&KEYS),
        [1, 0, 1],
        "one account of each plan must be tried before a second account of the same plan"
    );
    assert_eq!(request_library_voice().await.status(), 200);
    assert_eq!(
        proxy.request_counts(&KEYS),
        [1, 0, 2],
        "the second request must first be sent to the account that served the first one"
    );
    // The free accounts still serve speech with other voices.
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [2, 0, 2]);
    proxy.close().await;
}

#[tokio::test]
async fn an_output_format_is_requested_with_a_plan_that_includes_it() {
    let proxy = start_proxy(plan_with_tiers(&["free", "creator", "pro"], 100_000)).await;
    for (format, counts) in
        [("mp3_44100_192", [0, 1, 0]), ("pcm_44100", [0, 1, 1]), ("mp3_44100_128", [1, 1, 1])]
    {
        let path = format!("{SPEECH_PATH}?output_format={format}");
        assert_eq!(
            proxy.post(&path, &json!({"text": "hello"})).await.status(),
            200,
            "{format}: the request must be served"
        );
        assert_eq!(
            proxy.request_counts(&KEYS),
            counts,
            "{format}: the numbers of attempts with each key must be {counts:?}"
        );
    }
    proxy.close().await;
}

#[tokio::test]
async fn every_form_of_a_plan_refusal_is_retried_with_another_account() {
    let check_refusal = |refusal: &'static str| async move {
        let proxy = start_proxy(plan_with_tiers(&["free", "free", "creator"], 100_000)).await;
        proxy.set_fault(FIRST_KEY, refusal);
        proxy.set_fault(SECOND_KEY, refusal);
        for _ in 0..3 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}: the request must be served");
        }
        let request_counts = proxy.request_counts(&KEYS);
        assert!(
            request_counts[0] == 1 && request_counts[1] <= 1 && request_counts[2] == 3,
            "{refusal}: the account that serves must be tried first later: {request_counts:?}"
        );
        assert_eq!(proxy.key_statuses().await, ["active"; 3], "{refusal}: all keys must stay active");
        proxy.close().await;
    };
    join_all(
        [
            "paid_plan_required",
            "payment_required_plan",
            "output_format_not_allowed",
            "free_users_not_allowed",
            "invalid_workspace_type",
            "cloning_not_allowed",
            "voice_limit_reached",
            "subscription_required",
            "text_too_long",
        ]
        .into_iter()
        .map(check_refusal),
    )
    .await;
}

/// A request that waits for a busy key is sent with a rate-limited key as soon as the rate limit ends.
#[tokio::test]
async fn a_waiting_request_returns_to_the_key_that_was_rate_limited_for_it() {
    let plan = [FIRST_KEY, SECOND_KEY].into_iter().fold(Plan::with_keys([]), |plan, key| {
        let workspace = WorkspacePlan { max_concurrent: Some(1), ..WorkspacePlan::new(key, 100_000) };
        plan.with_workspace(workspace)
            .with_key(KeyPlan { workspace: Some(key.to_owned()), ..KeyPlan::new(key, 0) })
    });
    let proxy = start_proxy(plan).await;
    // The first response reports the account's concurrency limit.
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    proxy.simulator.queue_faults(FIRST_KEY, vec!["stall=3600s".parse().unwrap()]);
    proxy.simulator.queue_faults(SECOND_KEY, vec!["rate_limit=1".parse().unwrap()]);
    let response = {
        let busy = proxy.request_speech(10);
        let waiting = async {
            wait_until(|| proxy.simulator.ledger().totals.in_flight == 1).await;
            proxy.request_speech(10).await
        };
        tokio::select! {
            biased;
            response = busy => panic!("the stalled request must not receive {response:?}"),
            response = waiting => response,
        }
    };
    assert_eq!(response.status(), 200);
    assert_eq!(proxy.request_counts(&[SECOND_KEY]), [2]);
    let directory = proxy.close_unchecked().await;
    let database = rusqlite::Connection::open(directory.path().join("keychoir.db")).unwrap();
    let mut statement = database
        .prepare("SELECT started_at_ms, total_ms FROM attempts WHERE key_hash = ?1 ORDER BY number")
        .unwrap();
    let rows =
        statement.query_map([Fingerprint::new(SECOND_KEY).to_string()], |row| Ok((row.get(0)?, row.get(1)?)));
    let rows: Vec<(i64, i64)> = rows.unwrap().map(Result::unwrap).collect();
    let [(refused_at, refused_for), (served_at, _)] = rows[..] else {
        panic!("the second key must have two attempts: {rows:?}")
    };
    // The wait of a second is between the attempts and does not count as part of the first one.
    assert!(
        served_at - (refused_at + refused_for) >= 500,
        "the wait must not count as a part of the first attempt: {rows:?}"
    );
}

/// Adding a voice costs no credits, so an account without credits serves the request.
#[tokio::test]
async fn a_free_request_is_served_without_credits() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 10)])).await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_proxy_error(&proxy.request_speech(10).await, 401, "all_keys_exhausted");
    assert_eq!(Route::VoiceAddition.send_request(&proxy, CLIENT_TOKEN, 0).await.status(), 200);
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    proxy.close().await;
}

#[tokio::test]
async fn an_account_without_a_free_voice_slot_is_skipped() {
    let mut plan = plan_with_tiers(&["creator", "creator", "creator"], 100_000);
    plan.workspaces[0].voice_limit = Some(0);
    let proxy = start_proxy(plan).await;
    assert_eq!(Route::VoiceAddition.send_request(&proxy, CLIENT_TOKEN, 0).await.status(), 200);
    assert_eq!(
        proxy.request_counts(&KEYS),
        [0, 1, 0],
        "no request may be sent to an account without an available voice slot"
    );
    proxy.close().await;
}

#[tokio::test]
async fn every_key_is_tried_after_a_missing_permission() {
    let mut plan = funded_plan();
    for key in &mut plan.keys[..2] {
        key.permissions = Some(vec!["text_to_speech".to_owned()]);
    }
    let proxy = start_proxy(plan).await;
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 1]);
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 2]);
    proxy.close().await;
}

/// Returns a plan of two keys, whose provider refuses the first key as a key of another region.
fn plan_without_the_first_key() -> Plan {
    let plan = Plan::with_keys([(SECOND_KEY, 100_000), (THIRD_KEY, 100_000)]);
    Plan { other_region_keys: vec![FIRST_KEY.to_owned()], ..plan }
}

#[tokio::test]
async fn a_key_of_another_region_is_sent_to_its_region() {
    let region =
        Simulator::start(bind_loopback().await, Plan::with_keys([(FIRST_KEY, 1_000)])).await.unwrap();
    let url = region.base_url();
    let proxy = start_proxy_with(plan_without_the_first_key(), |config| {
        config.keys.insert(0, KeyConfig::from(ApiKey::new(FIRST_KEY).unwrap()));
        config.upstream.region_base_urls = vec![url];
    })
    .await;
    assert_eq!(proxy.key_statuses().await, ["active"; 3], "the first poll must find the region of the key");
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(region.ledger().key(FIRST_KEY).unwrap().charged, 10);
    assert_eq!(proxy.request_counts(&KEYS), [0, 0, 0]);
}

#[tokio::test]
async fn a_key_of_an_unknown_region_is_explained() {
    let proxy = start_proxy_with(plan_without_the_first_key(), |config| {
        config.keys.insert(0, KeyConfig::from(ApiKey::new(FIRST_KEY).unwrap()));
    })
    .await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    let details: Value = proxy.get("/api/keychoir-keys").await.json().await.unwrap();
    assert_eq!(
        details["keys"][0]["reason"], "wrong_host",
        "the details must report the wrong host: {details}"
    );
    let advice = details["keys"][0]["advice"].as_str().unwrap();
    assert!(
        advice.contains("base_url") && advice.contains("region"),
        "the advice must name the setting and the region: {advice}"
    );
    proxy.close().await;
}

#[tokio::test]
async fn an_account_without_a_credit_limit_is_never_exhausted() {
    for reported_limit in [ReportedLimit::Zero, ReportedLimit::Absent] {
        let workspace =
            WorkspacePlan { tier: "payg".to_owned(), reported_limit, ..WorkspacePlan::new("ws", 9_000) };
        let plan = Plan::with_keys([]).with_workspace(workspace);
        let proxy = start_proxy(
            plan.with_key(KeyPlan { workspace: Some("ws".to_owned()), ..KeyPlan::new(FIRST_KEY, 0) }),
        )
        .await;
        assert_eq!(proxy.request_speech(50).await.status(), 200);
        assert_eq!(proxy.key_statuses().await, ["active"]);
        assert_eq!(proxy.get("/readyz").await.status(), 200);
        proxy.close().await;
    }
}

#[tokio::test]
async fn the_credits_reported_by_a_refusal_expire_with_its_cooldown() {
    let mut plan = Plan::with_keys([(FIRST_KEY, 1_000)]);
    plan.keys[0].permissions = Some(vec!["text_to_speech".to_owned()]);
    let proxy = start_proxy_with(plan, |config| {
        config.pool.exhausted_cooldown = Duration::from_millis(50);
        config.pool.queue_timeout = Duration::from_millis(200);
    })
    .await;
    proxy.simulator.queue_faults(FIRST_KEY, vec![fault("quota").unwrap()]);
    assert_eq!(proxy.request_speech(10).await.status(), 401);
    let request_served = async { while proxy.request_speech(10).await.status() != 200 {} };
    tokio::time::timeout(Duration::from_secs(10), request_served)
        .await
        .expect("the key must be tried again after the cooldown");
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [2], "the key must be tried again only once");
    proxy.close().await;
}

#[tokio::test]
async fn an_unexplained_429_restricts_an_account_only_if_another_account_serves() {
    let check_refusal = |refusal: &'static str| async move {
        let proxy = start_proxy(funded_plan()).await;
        proxy.simulator.set_route_fault_for_all(SPEECH_PATH, fault(refusal));
        assert_eq!(proxy.request_speech(10).await.status(), 429, "{refusal}: the refusal must be relayed");
        assert_eq!(
            proxy.request_counts(&KEYS),
            [1, 1, 0],
            "{refusal}: two accounts must be tried before the refusal is relayed"
        );
        proxy.simulator.set_route_fault_for_all(SPEECH_PATH, None);
        assert_every_key_serves(&proxy, refusal).await;
        proxy.close().await;
        // If only one account refuses, that account is restricted for that route.
        let proxy = start_proxy(funded_plan()).await;
        proxy.simulator.set_route_fault(FIRST_KEY, SPEECH_PATH, fault(refusal));
        for _ in 0..3 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}: the request must be served");
        }
        assert_eq!(
            proxy.request_counts(&KEYS),
            [1, 3, 0],
            "{refusal}: the accounts that refuse must be tried less often than the account that serves"
        );
        proxy.close().await;
    };
    join_all(["answer=429/", "answer=429/error code: 1015", "page=429"].into_iter().map(check_refusal)).await;
}

#[tokio::test]
async fn an_overloaded_account_is_retried_with_another() {
    let proxy = start_proxy(funded_plan()).await;
    proxy.set_fault(FIRST_KEY, "system_busy");
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 0]);
    assert_eq!(proxy.key_statuses().await, ["active"; 3]);
    proxy.close().await;
}

#[tokio::test]
async fn a_request_waits_for_a_cooldown_that_ends_before_a_slot_is_released() {
    let workspace = WorkspacePlan { max_concurrent: Some(1), ..WorkspacePlan::new("ws_0", 100_000) };
    let mut plan = plan_with_tiers(&["creator", "creator"], 100_000);
    plan.workspaces[0] = workspace;
    let proxy =
        start_proxy_with(plan, |config| config.pool.rate_limited_cooldown = Duration::from_millis(100)).await;
    proxy.set_fault(FIRST_KEY, "slow_body=600000");
    let open_response = proxy.request_speech(500).await;
    assert_eq!(open_response.status(), 200);
    proxy.simulator.queue_faults(SECOND_KEY, vec![fault("rate_limit").unwrap()]);
    let second_request = async {
        wait_until(|| proxy.request_counts(&[SECOND_KEY]) == [1]).await;
        let response = tokio::time::timeout(Duration::from_secs(10), proxy.request_speech(10)).await;
        assert_eq!(response.expect("the end of the cooldown must wake the request").status(), 200);
        assert_eq!(proxy.request_counts(&[SECOND_KEY]), [2]);
        drop(open_response);
    };
    // The rate-limited request waits for the other account.
    let (limited, ()) = tokio::join!(proxy.request_speech(10), second_request);
    assert_eq!(limited.status(), 200);
}

/// A text that is longer than the free plan permits is sent with an account whose plan permits it.
#[tokio::test]
async fn a_long_text_is_sent_with_a_plan_that_permits_it() {
    let proxy = start_proxy(plan_with_tiers(&["free", "creator"], 100_000)).await;
    // The model list reports the limit of free accounts, so the free account is not tried.
    let text = "a".repeat(5_001);
    let body = json!({"text": text, "model_id": "eleven_multilingual_v2"});
    let response = proxy.post(&format!("/v1/text-to-speech/{VOICE_ID}"), &body).await;
    assert_eq!(response.status(), 200);
    let request_counts = proxy.request_counts(&[FIRST_KEY, SECOND_KEY]);
    assert_eq!(request_counts[1], 1, "the creator account must serve the request: {request_counts:?}");
    response.bytes().await.unwrap();
    wait_until(|| proxy.simulator.ledger().totals.in_flight == 0).await;
    proxy.close().await;
}
