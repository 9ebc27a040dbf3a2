//! Tests the key selection: credits, estimated prices, concurrency limits, permissions, refusals and the strategy
//! decide which key a request uses, and whether it waits. Also tests how keys of one workspace are detected, and which
//! keys are polled again after a refusal or a reload.

use keychoir::policy::strategy::STRATEGIES;
use std::time::Duration;

use crate::support::{
    FIRST_KEY, SECOND_KEY, SPEECH_PATH, THIRD_KEY, TestProxy, assert_proxy_error, join_all, start_proxy,
    start_proxy_with, wait_until,
};
use keychoir::simulator::{KeyPlan, Plan, WorkspacePlan};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const KEYS: [&str; 3] = [FIRST_KEY, SECOND_KEY, THIRD_KEY];

/// Returns workspaces with the given names and credits, each modified by `change`, with one key each.
fn plan_of_workspaces<const N: usize>(
    credits: [(&str, u64); N],
    change: impl Fn(WorkspacePlan) -> WorkspacePlan,
) -> Plan {
    credits.into_iter().zip(KEYS).fold(Plan::with_keys([]), |plan, ((workspace, credits), key)| {
        plan.with_workspace(change(WorkspacePlan::new(workspace, credits)))
            .with_key(KeyPlan { workspace: Some(workspace.to_owned()), ..KeyPlan::new(key, 0) })
    })
}

/// Returns three workspaces with the given number of credits and `concurrency` limit, with one key each.
fn three_workspaces(credits: u64, concurrency: u32) -> Plan {
    plan_of_workspaces([("ws_1", credits), ("ws_2", credits), ("ws_3", credits)], |workspace| WorkspacePlan {
        max_concurrent: Some(concurrency),
        ..workspace
    })
}

#[tokio::test]
async fn a_key_without_enough_credits_is_not_used() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 30), (SECOND_KEY, 1_000)])).await;
    for _ in 0..5 {
        assert_eq!(proxy.request_speech(20).await.status(), 200);
    }
    assert_eq!(
        proxy.request_counts(&[FIRST_KEY, SECOND_KEY]),
        [1, 4],
        "the key with too few credits must not be tried"
    );
    assert_eq!(
        proxy.key_statuses().await,
        ["active", "active"],
        "a key with ten credits must not count as exhausted"
    );
    // The remaining credits suffice for a cheaper request.
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [2, 4]);
    let (ledger, _) = proxy.close().await;
    assert_eq!(ledger.key(FIRST_KEY).unwrap().charged, 30);
}

#[tokio::test]
async fn concurrent_requests_never_overspend_a_nearly_exhausted_key() {
    // The enterprise plan permits all requests concurrently, so concurrency does not affect the selection.
    let plan = plan_of_workspaces([("ws_1", 100), ("ws_2", 100_000)], |workspace| WorkspacePlan {
        tier: "enterprise".to_owned(),
        ..workspace
    });
    let proxy = start_proxy(plan).await;
    let responses = join_all((0..40).map(|_| proxy.request_speech(9))).await;
    assert!(responses.iter().all(|response| response.status() == 200));
    drop(responses);
    assert_eq!(
        proxy.request_counts(&[FIRST_KEY, SECOND_KEY]),
        [11, 29],
        "the first key must serve 11 requests of 9 credits"
    );
    proxy.close().await;
}

#[tokio::test]
async fn the_estimated_price_depends_on_the_model() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 30), (SECOND_KEY, 1_000)])).await;
    let flash = json!({"text": "a".repeat(60), "model_id": "eleven_flash_v2_5"});
    assert_eq!(proxy.post(SPEECH_PATH, &flash).await.status(), 200);
    assert_eq!(
        proxy.request_counts(&[FIRST_KEY, SECOND_KEY]),
        [1, 0],
        "the first key must have enough credits for 60 characters at half a credit"
    );
    proxy.close().await;
}

#[tokio::test]
async fn a_request_above_the_credits_of_every_key_is_tried_once_with_each() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 30), (SECOND_KEY, 20)])).await;
    for _ in 0..3 {
        assert_proxy_error(&proxy.request_speech(50).await, 401, "all_keys_exhausted");
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [1, 1], "each key must be tried once");
    // Smaller requests are still served.
    assert_eq!(proxy.request_speech(25).await.status(), 200);
    assert_eq!(proxy.request_speech(20).await.status(), 200);
    proxy.close().await;
}

/// Waits until the provider is processing `count` speech requests.
async fn wait_for_running_requests(proxy: &TestProxy, count: u32) {
    let running =
        || proxy.simulator.ledger().workspaces.iter().map(|workspace| workspace.running).sum::<u32>();
    wait_until(|| running() == count).await;
}

#[tokio::test]
async fn requests_above_the_concurrency_limit_wait() {
    // The limit of five comes from the plan of the workspaces, so no refusal is needed to detect it.
    let proxy = start_proxy(three_workspaces(100_000, 5)).await;
    for key in KEYS {
        proxy.set_fault(key, "slow_body=600000");
    }
    let mut responses = join_all((0..15).map(|_| proxy.request_speech(200))).await;
    wait_for_running_requests(&proxy, 15).await;
    let body = json!({"text": "a".repeat(200), "model_id": "eleven_multilingual_v2"});
    let mut waiting_request = JoinSet::new();
    waiting_request.spawn(proxy.client.post(format!("{}{SPEECH_PATH}", proxy.url)).json(&body).send());
    wait_until(|| proxy.app.queued_requests() == 1).await;
    drop(responses.pop());
    assert_eq!(waiting_request.join_next().await.unwrap().unwrap().unwrap().status(), 200);
    assert!(responses.iter().all(|response| response.status() == 200));
    let ledger = proxy.simulator.ledger();
    assert_eq!(ledger.totals.refused, 0, "no attempt must be refused");
    assert!(ledger.workspaces.iter().all(|workspace| workspace.peak_running == 5));
}

#[tokio::test]
async fn a_concurrency_refusal_records_the_limit_and_waits() {
    let plan = Plan { keys: three_workspaces(0, 0).keys[..1].to_vec(), ..Plan::default() }
        .with_workspace(WorkspacePlan { max_concurrent: Some(2), ..WorkspacePlan::new("ws_1", 100_000) });
    let proxy =
        start_proxy_with(plan, |config| config.pool.concurrency_cooldown = Duration::from_millis(20)).await;
    let responses = join_all((0..12).map(|_| async {
        let response = proxy.request_speech(50).await;
        (response.status(), response.bytes().await.unwrap().len())
    }))
    .await;
    assert!(
        responses.iter().all(|(status, bytes)| *status == 200 && *bytes > 0),
        "every request must be served completely: {responses:?}"
    );
    proxy.close().await;
}

#[tokio::test]
async fn a_request_at_its_queue_timeout_receives_a_retry_after() {
    let proxy = start_proxy_with(three_workspaces(100_000, 1), |config| {
        config.keys.truncate(1);
        config.pool.queue_timeout = Duration::from_millis(50);
    })
    .await;
    assert_eq!(proxy.request_speech(1).await.status(), 200);
    proxy.set_fault(FIRST_KEY, "slow_body=600000");
    let open_response = proxy.request_speech(500).await;
    assert_eq!(open_response.status(), 200);
    let response = proxy.request_speech(1).await;
    assert_proxy_error(&response, 429, "all_keys_busy");
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [2]);
    drop(open_response);
}

#[tokio::test]
async fn keys_of_the_same_workspace_are_detected() {
    let plan = Plan {
        keys: vec![
            KeyPlan { workspace: Some("ws_1".to_owned()), ..KeyPlan::new(FIRST_KEY, 0) },
            KeyPlan { workspace: Some("ws_1".to_owned()), ..KeyPlan::new(SECOND_KEY, 0) },
            KeyPlan::new(THIRD_KEY, 1_000),
        ],
        ..Plan::default().with_workspace(WorkspacePlan::new("ws_1", 500))
    };
    let proxy = start_proxy(plan).await;
    let status = proxy.status_document().await;
    assert_eq!(
        status["totalRemainingCharacters"], 1_500,
        "the credits of the shared workspace must be counted once: {status}"
    );
    proxy.set_fault(FIRST_KEY, "quota");
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(
        proxy.request_counts(&KEYS),
        [1, 0, 1],
        "the second key of the exhausted workspace must not be tried"
    );
    assert_eq!(proxy.key_statuses().await, ["exhausted", "exhausted", "active"]);
    proxy.close().await;
}

#[tokio::test]
async fn the_workspace_of_a_key_is_requested_again_after_an_error_of_the_provider() {
    let plan = Plan {
        keys: vec![
            KeyPlan { workspace: Some("ws_1".to_owned()), ..KeyPlan::new(FIRST_KEY, 0) },
            KeyPlan { workspace: Some("ws_1".to_owned()), ..KeyPlan::new(SECOND_KEY, 0) },
        ],
        ..Plan::default().with_workspace(WorkspacePlan::new("ws_1", 500))
    };
    let mut second = Vec::new();
    let proxy = start_proxy_with(plan, |config| {
        second = config.keys.split_off(1);
        config.quota_polling.interval = Duration::from_secs(1);
    })
    .await;
    // The first request below this path is the poll of the quota.
    let faults = ["pass", "server_error"].map(|fault| fault.parse().unwrap()).to_vec();
    proxy.simulator.queue_route_faults(SECOND_KEY, "/v1/user", faults);
    proxy.reload(|config| config.keys.append(&mut second), |_| {});
    let workspace_requests = || {
        let requests = proxy.simulator.ledger().requests;
        let is_second = |key: &Option<String>| key.as_deref() == Some(SECOND_KEY);
        requests
            .iter()
            .filter(|request| is_second(&request.key) && request.path_and_query == "/v1/user")
            .count()
    };
    wait_until(|| workspace_requests() == 2).await;
    wait_until(|| {
        let keys = proxy.app.keys();
        keys[0].key.workspace().shared_id() == keys[1].key.workspace().shared_id()
    })
    .await;
    proxy.close().await;
}

#[tokio::test]
async fn a_missing_permission_is_recorded_at_the_first_refusal() {
    let mut plan = Plan::with_keys([(FIRST_KEY, 1_000), (SECOND_KEY, 1_000)]);
    plan.keys[0].permissions = Some(vec!["voices_read".to_owned()]);
    let proxy = start_proxy(plan).await;
    for _ in 0..3 {
        assert_eq!(proxy.request_speech(5).await.status(), 200);
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [1, 3]);
    assert_eq!(proxy.key_statuses().await, ["active", "active"]);
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    assert_eq!(
        proxy.request_counts(&[FIRST_KEY, SECOND_KEY]),
        [2, 3],
        "the key must serve the requests that its permissions allow"
    );
    proxy.close().await;
}

#[tokio::test]
async fn an_abuse_refusal_is_not_tried_with_every_key() {
    let proxy =
        start_proxy(Plan::with_keys([(FIRST_KEY, 1_000), (SECOND_KEY, 1_000), (THIRD_KEY, 1_000)])).await;
    for key in KEYS {
        proxy.set_fault(key, "unusual_activity");
    }
    assert_eq!(proxy.request_speech(5).await.status(), 401);
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 0]);
    assert_eq!(
        proxy.key_statuses().await,
        ["active"; 3],
        "the refusals must be attributed to the request, because both accounts refuse it alike"
    );
    // If another account serves the request, the refusal is attributed to the account.
    proxy.simulator.set_fault(SECOND_KEY, None);
    let flash_request = json!({"text": "hello", "model_id": "eleven_flash_v2_5"});
    assert_eq!(proxy.post(SPEECH_PATH, &flash_request).await.status(), 200);
    assert_eq!(proxy.key_statuses().await, ["exhausted", "active", "active"]);
    proxy.close().await;
}

#[tokio::test]
async fn a_refused_key_is_usable_as_soon_as_a_poll_confirms_it() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 1_000), (SECOND_KEY, 1_000)])).await;
    proxy.simulator.queue_faults(FIRST_KEY, vec!["invalid".parse().unwrap()]);
    assert_eq!(proxy.request_speech(5).await.status(), 200);
    // The refused key is polled, and the poll succeeds.
    while proxy.key_statuses().await != ["active", "active"] {
        tokio::task::yield_now().await;
    }
    assert_eq!(proxy.request_speech(5).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [2, 1]);
    proxy.close().await;
}

#[tokio::test]
async fn every_strategy_distributes_requests_as_documented() {
    let cases = [
        ("fill-first", [6, 0, 0]),
        ("round-robin", [2, 2, 2]),
        ("most-remaining", [0, 6, 0]),
        ("least-requests", [6, 0, 0]),
        ("soonest-reset", [6, 0, 0]),
    ];
    assert_eq!(cases.map(|(name, _)| name), STRATEGIES.each_ref().map(|strategy| strategy.name));
    for (strategy, expected) in cases {
        let proxy = start_proxy_with(
            Plan::with_keys([(FIRST_KEY, 1_000), (SECOND_KEY, 9_000), (THIRD_KEY, 5_000)]),
            |config| {
                config.pool.strategy = strategy.parse().unwrap();
            },
        )
        .await;
        for _ in 0..6 {
            let response = proxy.request_speech(5).await;
            assert_eq!(response.status(), 200);
            response.bytes().await.unwrap();
        }
        assert_eq!(
            proxy.request_counts(&KEYS),
            expected,
            "{strategy}: the numbers of attempts with each key must be {expected:?}"
        );
        proxy.close().await;
    }
}

#[tokio::test]
async fn a_slow_body_is_sent_without_a_cost_estimate() {
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 1_000)]), |config| {
        config.pool.cost_estimate_timeout = Duration::from_millis(1);
    })
    .await;
    let mut client = TcpStream::connect(proxy.app.address()).await.unwrap();
    let head = format!(
        "POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    // The body is chunked, because the proxy would wait for a short body with a content length.
    client.write_all(format!("{head}8\r\n{{\"text\":\r\n").as_bytes()).await.unwrap();
    // The request is sent upstream before its text has arrived.
    wait_until(|| proxy.simulator.ledger().totals.in_flight == 1).await;
    client.write_all(b"7\r\n\"slow\"}\r\n0\r\n\r\n").await.unwrap();
    let mut status_line_start = [0; 12];
    client.read_exact(&mut status_line_start).await.unwrap();
    assert_eq!(&status_line_start, b"HTTP/1.1 200");
    drop(client);
    let records = proxy.into_records().await;
    assert_eq!(records[0].credits, 4);
}

/// Returns the number of polls of the quota that the provider received with the given `key`.
fn poll_count(proxy: &TestProxy, key: &str) -> usize {
    let requests = proxy.simulator.ledger().requests;
    let is_poll = |path: &str| path == "/v1/user/subscription";
    let key_requests = requests.iter().filter(|request| request.key.as_deref() == Some(key));
    key_requests.filter(|request| is_poll(&request.path_and_query)).count()
}

#[tokio::test]
async fn a_reload_polls_only_new_keys_and_others_if_the_polling_changes() {
    let plan = Plan::with_keys([(FIRST_KEY, 1_000), (SECOND_KEY, 1_000), (THIRD_KEY, 1_000)]);
    let mut new_keys = Vec::new();
    let proxy = start_proxy_with(plan, |config| new_keys = config.keys.split_off(1)).await;
    let [second, third] = new_keys.try_into().unwrap();
    for _ in 0..5 {
        proxy.reload(|config| config.pool.max_queued = 7, |_| {});
    }
    proxy.reload(|config| config.keys.push(second.clone()), |_| {});
    wait_until(|| poll_count(&proxy, SECOND_KEY) == 1).await;
    proxy.reload(|config| config.keys.extend([second.clone(), third.clone()]), |_| {});
    wait_until(|| poll_count(&proxy, THIRD_KEY) == 1).await;
    assert_eq!(KEYS.map(|key| poll_count(&proxy, key)), [1, 1, 1], "known keys must not be polled again");
    proxy.reload(|config| config.quota_polling.interval = Duration::from_secs(77), |_| {});
    wait_until(|| poll_count(&proxy, FIRST_KEY) == 2).await;
    proxy.close().await;
}

#[tokio::test]
async fn a_key_with_another_host_is_polled_again() {
    let plan = Plan::with_keys([(FIRST_KEY, 1_000), (SECOND_KEY, 1_000)]);
    let proxy = start_proxy_with(plan, |_| {}).await;
    let url = format!("{}/prefix", proxy.simulator.base_url());
    let prefixed_count = |proxy: &TestProxy| {
        let requests = proxy.simulator.ledger().requests;
        requests.iter().filter(|request| request.path_and_query.starts_with("/prefix/")).count()
    };
    proxy.reload(|config| config.keys[1].base_url = Some(url.parse().unwrap()), |_| {});
    wait_until(|| prefixed_count(&proxy) > 0).await;
    assert_eq!(poll_count(&proxy, FIRST_KEY), 1);
    proxy.close().await;
}
