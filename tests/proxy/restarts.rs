//! Tests that restrictions of keys survive a restart: the first attempt of the same request uses the account that
//! served it before, and the details of every key are unchanged. A refuted restriction does not return. Refusals are
//! written to the database while the proxy runs, and later evidence replaces the stored evidence.

use crate::support::routes::Route;
use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, THIRD_KEY, TestProxy, join_all, read_usage_records,
    start_proxy, start_proxy_in, start_proxy_with, wait_until,
};
use keychoir::simulator::{Fault, KeyPlan, Plan, WorkspacePlan};
use serde_json::{Value, json};

const FOURTH_KEY: &str = "sk_key_number_four_00000000000000000000000000000004";
const KEYS: [&str; 4] = [FIRST_KEY, SECOND_KEY, THIRD_KEY, FOURTH_KEY];

const REGION_BLOCKED: &str =
    r#"answer=403/{"detail":{"status":"region_blocked","message":"Not available here."}}"#;

/// Returns four workspaces with the given `tiers`, with one key each.
fn plan_with_tiers(tiers: [&str; 4]) -> Plan {
    tiers.iter().zip(KEYS).enumerate().fold(Plan::with_keys([]), |plan, (number, (tier, key))| {
        let name = format!("ws_{number}");
        let workspace = WorkspacePlan { tier: (*tier).to_owned(), ..WorkspacePlan::new(&name, 100_000) };
        plan.with_workspace(workspace).with_key(KeyPlan { workspace: Some(name), ..KeyPlan::new(key, 0) })
    })
}

/// A kind of request that refusals restrict.
#[derive(Clone, Copy, Debug)]
enum TestRequest {
    Speech,
    WavSpeech,
    Voices,
    VoiceAddition,
    SoundEffect,
}

impl TestRequest {
    /// Sends the request, and returns the status of the response.
    async fn send(self, proxy: &TestProxy) -> u16 {
        let response = match self {
            Self::Speech => proxy.request_speech(40).await,
            Self::WavSpeech => {
                proxy.post(&format!("{SPEECH_PATH}?output_format=wav_16000"), &speech_body()).await
            }
            Self::Voices => proxy.get("/v1/voices").await,
            Self::VoiceAddition => Route::VoiceAddition.send_request(proxy, CLIENT_TOKEN, 0).await,
            Self::SoundEffect => proxy.post("/v1/sound-generation", &json!({"text": "rain"})).await,
        };
        let status = response.status().as_u16();
        response.bytes().await.unwrap();
        status
    }

    /// Returns the path prefix of the faults that affect the request.
    fn fault_path(self) -> &'static str {
        match self {
            Self::Speech | Self::WavSpeech => "/v1/text-to-speech",
            Self::Voices => "/v1/voices",
            Self::VoiceAddition => "/v1/voices/add",
            Self::SoundEffect => "/v1/sound-generation",
        }
    }
}

fn speech_body() -> Value {
    json!({"text": "hello", "model_id": "eleven_multilingual_v2"})
}

/// Returns the details of each key that do not depend on the time.
async fn key_details(proxy: &TestProxy) -> Vec<Value> {
    let details: Value = proxy.get("/api/keychoir-keys").await.json().await.unwrap();
    let stable_fields = |key: &Value| {
        let fields =
            ["shortKey", "plan", "state", "reason", "since", "until", "possible", "evidence", "cannot"];
        fields
            .iter()
            .map(|field| ((*field).to_owned(), key[*field].clone()))
            .collect::<serde_json::Map<_, _>>()
    };
    details["keys"].as_array().unwrap().iter().map(|key| Value::Object(stable_fields(key))).collect()
}

/// Sends the request and returns the status of the response and the number of attempts with each key.
async fn send_and_count(proxy: &TestProxy, request: TestRequest) -> (u16, [usize; 4]) {
    let counts_before = proxy.request_counts(&KEYS);
    let status = request.send(proxy).await;
    let counts_after = proxy.request_counts(&KEYS);
    (status, std::array::from_fn(|index| counts_after[index] - counts_before[index]))
}

/// Sends the request until it is served with `expected` attempts. Each refusal restricts one account, so at
/// most four requests are needed.
async fn wait_for_attempts(proxy: &TestProxy, request: TestRequest, expected: [usize; 4]) {
    for _ in 0..4 {
        if send_and_count(proxy, request).await == (200, expected) {
            return;
        }
    }
    panic!("{request:?} must be served with the attempts {expected:?}");
}

/// Checks a request that the first three accounts refuse: after they are restricted, only the last account is tried,
/// also after two restarts.
async fn check_restarts(proxy: TestProxy, request: TestRequest, case: &str) {
    wait_for_attempts(&proxy, request, [0, 0, 0, 1]).await;
    let details_before = key_details(&proxy).await;
    assert!(
        details_before[..3].iter().any(|key| key["cannot"] != json!([])),
        "{case}: a refusing account must be restricted: {details_before:?}"
    );
    assert_eq!(
        details_before[3]["cannot"],
        json!([]),
        "{case}: the serving account must not be restricted: {details_before:?}"
    );
    let proxy = proxy.restart().await;
    assert_eq!(
        key_details(&proxy).await,
        details_before,
        "{case}: the restart must not change the details of the keys"
    );
    assert_eq!(
        send_and_count(&proxy, request).await,
        (200, [0, 0, 0, 1]),
        "{case}: only the last account must be tried after the first restart"
    );
    // The second restart checks that reading the restrictions does not delete them.
    let proxy = proxy.restart().await;
    assert_eq!(
        key_details(&proxy).await,
        details_before,
        "{case}: the restart must not change the details of the keys"
    );
    assert_eq!(
        send_and_count(&proxy, request).await,
        (200, [0, 0, 0, 1]),
        "{case}: only the last account must be tried after the second restart"
    );
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn restrictions_are_restored_after_a_restart() {
    let free = ["free", "free", "free", "creator"];
    let paid = ["creator"; 4];
    let cases = [
        (REGION_BLOCKED, paid, TestRequest::Speech),
        ("forbidden", paid, TestRequest::Speech),
        ("unauthorized", paid, TestRequest::Voices),
        ("answer=402/", paid, TestRequest::Speech),
        ("workspace_access_denied", paid, TestRequest::SoundEffect),
        ("missing_permissions", paid, TestRequest::Voices),
        ("paid_plan_required", free, TestRequest::Speech),
        ("output_format_not_allowed", free, TestRequest::WavSpeech),
        ("text_too_long", free, TestRequest::Speech),
        ("subscription_required", free, TestRequest::Speech),
    ];
    let check_case = |(refusal, tiers, request): (&'static str, [&'static str; 4], TestRequest)| async move {
        let fault: Fault = refusal.parse().unwrap();
        let proxy = start_proxy(plan_with_tiers(tiers)).await;
        for key in &KEYS[..3] {
            proxy.simulator.set_route_fault(key, request.fault_path(), Some(fault.clone()));
        }
        Box::pin(check_restarts(proxy, request, &format!("{refusal} of {request:?}"))).await;
    };
    join_all(cases.into_iter().map(check_case)).await;
}

#[tokio::test]
async fn missing_permissions_are_restored_after_a_restart() {
    let mut plan = plan_with_tiers(["creator"; 4]);
    for key in &mut plan.keys[..3] {
        key.permissions = Some(vec!["text_to_speech".to_owned(), "user_read".to_owned()]);
    }
    Box::pin(check_restarts(start_proxy(plan).await, TestRequest::Voices, "permissions")).await;
}

/// The keys may not read their subscriptions, so polls do not report voice slots.
#[tokio::test]
async fn full_voice_slots_are_restored_after_a_restart() {
    let mut plan = plan_with_tiers(["creator"; 4]);
    for key in &mut plan.keys[..3] {
        key.permissions = Some(vec!["create_instant_voice_clone".to_owned(), "text_to_speech".to_owned()]);
    }
    plan.workspaces[..3].iter_mut().for_each(|workspace| workspace.voice_limit = Some(0));
    Box::pin(check_restarts(start_proxy(plan).await, TestRequest::VoiceAddition, "slots")).await;
}

/// The endpoint has no concurrency group, and polling is disabled.
#[tokio::test]
async fn a_rate_limit_of_an_endpoint_is_restored_after_a_restart() {
    let proxy =
        start_proxy_with(plan_with_tiers(["creator"; 4]), |config| config.quota_polling.enabled = false)
            .await;
    for key in &KEYS[..3] {
        proxy.set_fault(key, "rate_limit=200");
    }
    Box::pin(check_restarts(proxy, TestRequest::Voices, "a rate limit")).await;
}

/// A served request refutes the restriction.
#[tokio::test]
async fn a_refuted_restriction_is_not_restored() {
    let proxy = start_proxy(plan_with_tiers(["creator"; 4])).await;
    proxy.simulator.set_route_fault(FIRST_KEY, SPEECH_PATH, Some("forbidden".parse().unwrap()));
    assert_eq!(send_and_count(&proxy, TestRequest::Speech).await, (200, [1, 1, 0, 0]));
    assert_ne!(key_details(&proxy).await[0]["cannot"], json!([]));
    let proxy = proxy.restart().await;
    assert_eq!(send_and_count(&proxy, TestRequest::Speech).await, (200, [0, 1, 0, 0]));
    // After this change, the other accounts refuse the request, and the first account serves it.
    for key in &KEYS[1..] {
        proxy.simulator.set_route_fault(key, SPEECH_PATH, Some("workspace_access_denied".parse().unwrap()));
    }
    proxy.simulator.set_route_fault(FIRST_KEY, SPEECH_PATH, None);
    wait_for_attempts(&proxy, TestRequest::Speech, [1, 0, 0, 0]).await;
    assert_eq!(key_details(&proxy).await[0]["cannot"], json!([]));
    let details_before = key_details(&proxy).await;
    let proxy = proxy.restart().await;
    assert_eq!(key_details(&proxy).await, details_before);
    assert_eq!(send_and_count(&proxy, TestRequest::Speech).await, (200, [1, 0, 0, 0]));
    proxy.close_unchecked().await;
}

/// A refusal of a plan feature restricts all accounts of that plan. After the restart, the proxy reads the plans from
/// the database and needs no poll.
#[tokio::test]
async fn restrictions_of_plans_are_restored_after_a_restart() {
    let plan = || plan_with_tiers(["free", "free", "free", "creator"]);
    let refuse = |proxy: &TestProxy| {
        for key in &KEYS[..3] {
            proxy.simulator.set_route_fault(key, SPEECH_PATH, Some("paid_plan_required".parse().unwrap()));
        }
    };
    let proxy = start_proxy(plan()).await;
    refuse(&proxy);
    assert_eq!(
        send_and_count(&proxy, TestRequest::Speech).await,
        (200, [1, 0, 0, 1]),
        "one account of each plan must be tried"
    );
    let directory = proxy.close_unchecked().await;
    let proxy = start_proxy_in(directory, plan(), |config| config.quota_polling.enabled = false).await;
    refuse(&proxy);
    assert_eq!(send_and_count(&proxy, TestRequest::Speech).await, (200, [0, 0, 0, 1]));
    assert_eq!(key_details(&proxy).await[1]["plan"], "free");
    proxy.close_unchecked().await;
}

/// Refusals are not only written at shutdown, so that a killed proxy does not lose them.
#[tokio::test]
async fn refusals_are_written_while_the_program_runs() {
    let proxy = start_proxy(plan_with_tiers(["creator"; 4])).await;
    proxy.simulator.set_route_fault(FIRST_KEY, SPEECH_PATH, Some("forbidden".parse().unwrap()));
    let row_count = || -> i64 {
        let database = rusqlite::Connection::open(proxy.database_path()).unwrap();
        database.query_row("SELECT count(*) FROM refusals", [], |row| row.get(0)).unwrap()
    };
    assert_eq!(send_and_count(&proxy, TestRequest::Speech).await, (200, [1, 1, 0, 0]));
    wait_until(|| row_count() == 1).await;
    // Only the first account serves the request again.
    proxy.simulator.set_route_fault(FIRST_KEY, SPEECH_PATH, None);
    for key in &KEYS[1..] {
        proxy.simulator.set_route_fault(key, SPEECH_PATH, Some("workspace_access_denied".parse().unwrap()));
    }
    wait_for_attempts(&proxy, TestRequest::Speech, [1, 0, 0, 0]).await;
    wait_until(|| row_count() == 3).await;
    proxy.close_unchecked().await;
}

/// A poll contradicts the reported credits until another account serves the request. The weaker evidence is already
/// stored when this account serves it, and no later poll writes the state of the keys.
#[tokio::test]
async fn evidence_that_a_later_response_proves_replaces_the_stored_evidence() {
    const POLL_PATH: &str = "/v1/user/subscription";
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])).await;
    let set_route_fault =
        |key, path, fault: &str| proxy.simulator.set_route_fault(key, path, fault.parse().ok());
    set_route_fault(FIRST_KEY, "/v1/text-to-speech", "quota");
    set_route_fault(SECOND_KEY, "/v1/text-to-speech", "slow_head=2000");
    set_route_fault(FIRST_KEY, POLL_PATH, "slow_head=60000");
    let path = proxy.database_path();
    let is_first_attempt_stored = || read_usage_records(&path).len() == 1;
    let (response, ()) = tokio::join!(proxy.request_speech(40), wait_until(is_first_attempt_stored));
    assert_eq!(response.status(), 200);
    response.bytes().await.unwrap();
    assert_eq!(proxy.key_statuses().await, ["exhausted", "active"]);
    proxy.simulator.set_route_fault(FIRST_KEY, POLL_PATH, None);
    let proxy = proxy.restart().await;
    assert_eq!(
        proxy.key_statuses().await,
        ["exhausted", "active"],
        "the key must stay exhausted over the restart"
    );
    proxy.close().await;
}
