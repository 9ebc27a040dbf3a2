//! Key selection with knowledge of the provider: the right key at the first attempt, over the wire.

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

/// Workspaces with these credits, each modified, and a key in each.
fn of_workspaces<const N: usize>(
    credits: [(&str, u64); N],
    change: impl Fn(WorkspacePlan) -> WorkspacePlan,
) -> Plan {
    credits.into_iter().zip(KEYS).fold(Plan::of([]), |plan, ((workspace, credits), key)| {
        plan.with_workspace(change(WorkspacePlan::new(workspace, credits)))
            .with_key(KeyPlan { workspace: Some(workspace.to_owned()), ..KeyPlan::new(key, 0) })
    })
}

/// Three workspaces with these credits and concurrency limits, a key in each.
fn three(credits: u64, places: u32) -> Plan {
    of_workspaces([("ws_1", credits), ("ws_2", credits), ("ws_3", credits)], |workspace| WorkspacePlan {
        concurrency_max: Some(places),
        ..workspace
    })
}

#[tokio::test]
async fn a_key_without_enough_credits_is_not_used() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 30), (SECOND_KEY, 1_000)])).await;
    for _ in 0..5 {
        assert_eq!(proxy.request_speech(20).await.status(), 200);
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [1, 4], "no request was refused");
    assert_eq!(proxy.key_statuses().await, ["active", "active"], "ten credits are left");
    // The remaining credits suffice for a cheaper request.
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [2, 4]);
    let (ledger, _) = proxy.close().await;
    assert_eq!(ledger.key(FIRST_KEY).unwrap().charged, 30);
}

#[tokio::test]
async fn two_requests_never_both_pass_a_nearly_empty_key() {
    // All may run concurrently: none uses the other key for lack of a slot.
    let plan = of_workspaces([("ws_1", 100), ("ws_2", 100_000)], |workspace| WorkspacePlan {
        tier: "enterprise".to_owned(),
        ..workspace
    });
    let proxy = start_proxy(plan).await;
    let answers = join_all((0..40).map(|_| proxy.request_speech(9))).await;
    assert!(answers.iter().all(|answer| answer.status() == 200));
    drop(answers);
    assert_eq!(
        proxy.request_counts(&[FIRST_KEY, SECOND_KEY]),
        [11, 29],
        "11 times 9 is 99, and no request was refused"
    );
    proxy.close().await;
}

#[tokio::test]
async fn the_price_follows_the_model() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 30), (SECOND_KEY, 1_000)])).await;
    let flash = json!({"text": "a".repeat(60), "model_id": "eleven_flash_v2_5"});
    assert_eq!(proxy.post(SPEECH_PATH, &flash).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [1, 0], "60 characters at half a credit");
    proxy.close().await;
}

#[tokio::test]
async fn a_request_beyond_all_credits_is_tried_once_and_its_refusal_recorded() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 30), (SECOND_KEY, 20)])).await;
    for _ in 0..3 {
        assert_proxy_error(&proxy.request_speech(50).await, 401, "all_keys_exhausted");
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [1, 1], "each has said no once");
    // Smaller requests are still served.
    assert_eq!(proxy.request_speech(25).await.status(), 200);
    assert_eq!(proxy.request_speech(20).await.status(), 200);
    proxy.close().await;
}

/// Waits until the simulator has this number of concurrent speech requests.
async fn running(proxy: &TestProxy, count: u32) {
    let running =
        || proxy.simulator.ledger().workspaces.iter().map(|workspace| workspace.running).sum::<u32>();
    wait_until(|| running() == count).await;
}

#[tokio::test]
async fn fifteen_requests_run_and_the_sixteenth_waits() {
    // Five is the limit of these workspaces' plan; no refusal is needed to find it.
    let proxy = start_proxy(three(100_000, 5)).await;
    for key in KEYS {
        proxy.set_fault(key, "slow_body=600000");
    }
    let mut answers = join_all((0..15).map(|_| proxy.request_speech(200))).await;
    running(&proxy, 15).await;
    let body = json!({"text": "a".repeat(200), "model_id": "eleven_multilingual_v2"});
    let mut sixteenth = JoinSet::new();
    sixteenth.spawn(proxy.client.post(format!("{}{SPEECH_PATH}", proxy.url)).json(&body).send());
    wait_until(|| proxy.app.waiting() == 1).await;
    drop(answers.pop());
    assert_eq!(sixteenth.join_next().await.unwrap().unwrap().unwrap().status(), 200);
    assert!(answers.iter().all(|answer| answer.status() == 200));
    let ledger = proxy.simulator.ledger();
    assert_eq!(ledger.totals.refused, 0, "none of them saw a 429");
    assert!(ledger.workspaces.iter().all(|workspace| workspace.running_max == 5));
}

#[tokio::test]
async fn a_concurrency_refusal_records_the_limit_and_waits() {
    let plan = Plan { keys: three(0, 0).keys[..1].to_vec(), ..Plan::default() }
        .with_workspace(WorkspacePlan { concurrency_max: Some(2), ..WorkspacePlan::new("ws_1", 100_000) });
    let proxy =
        start_proxy_with(plan, |config| config.pool.concurrency_cooldown = Duration::from_millis(20)).await;
    let answers = join_all((0..12).map(|_| async {
        let answer = proxy.request_speech(50).await;
        (answer.status(), answer.bytes().await.unwrap().len())
    }))
    .await;
    assert!(answers.iter().all(|(status, bytes)| *status == 200 && *bytes > 0), "{answers:?}");
    proxy.close().await;
}

#[tokio::test]
async fn a_request_that_waits_too_long_gets_a_retry_after() {
    let proxy = start_proxy_with(three(100_000, 1), |config| {
        config.keys.truncate(1);
        config.pool.queue_timeout = Duration::from_millis(50);
    })
    .await;
    assert_eq!(proxy.request_speech(1).await.status(), 200);
    proxy.set_fault(FIRST_KEY, "slow_body=600000");
    let held = proxy.request_speech(500).await;
    assert_eq!(held.status(), 200);
    let answer = proxy.request_speech(1).await;
    assert_proxy_error(&answer, 429, "all_keys_busy");
    assert_eq!(answer.headers()["retry-after"], "1");
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [2]);
    drop(held);
}

#[tokio::test]
async fn keys_of_one_workspace_are_found_by_themselves() {
    let plan = Plan {
        keys: vec![
            KeyPlan { workspace: Some("ws_1".to_owned()), ..KeyPlan::new(FIRST_KEY, 0) },
            KeyPlan { workspace: Some("ws_1".to_owned()), ..KeyPlan::new(SECOND_KEY, 0) },
            KeyPlan::new(THIRD_KEY, 1_000),
        ],
        ..Plan::default().with_workspace(WorkspacePlan::new("ws_1", 500))
    };
    let proxy = start_proxy(plan).await;
    let status = proxy.status().await;
    assert_eq!(status["totalRemainingCharacters"], 1_500, "{status}");
    proxy.set_fault(FIRST_KEY, "quota");
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 0, 1], "its sister is as empty");
    assert_eq!(proxy.key_statuses().await, ["exhausted", "exhausted", "active"]);
    proxy.close().await;
}

#[tokio::test]
async fn a_missing_permission_is_requested_once() {
    let mut plan = Plan::of([(FIRST_KEY, 1_000), (SECOND_KEY, 1_000)]);
    plan.keys[0].permissions = Some(vec!["voices_read".to_owned()]);
    let proxy = start_proxy(plan).await;
    for _ in 0..3 {
        assert_eq!(proxy.request_speech(5).await.status(), 200);
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [1, 3]);
    assert_eq!(proxy.key_statuses().await, ["active", "active"]);
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [2, 3], "what it may, it does");
    proxy.close().await;
}

#[tokio::test]
async fn an_abuse_refusal_is_not_tried_with_every_key() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 1_000), (SECOND_KEY, 1_000), (THIRD_KEY, 1_000)])).await;
    for key in KEYS {
        proxy.set_fault(key, "unusual_activity");
    }
    assert_eq!(proxy.request_speech(5).await.status(), 401);
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 0]);
    assert_eq!(proxy.key_statuses().await, ["active"; 3], "both say the same of one request");
    // A refusal of one account while another serves is attributed to the account.
    proxy.simulator.always(SECOND_KEY, None);
    let other = json!({"text": "hello", "model_id": "eleven_flash_v2_5"});
    assert_eq!(proxy.post(SPEECH_PATH, &other).await.status(), 200);
    assert_eq!(proxy.key_statuses().await, ["exhausted", "active", "active"]);
    proxy.close().await;
}

#[tokio::test]
async fn a_refused_key_that_a_poll_confirms_is_usable_at_once() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 1_000), (SECOND_KEY, 1_000)])).await;
    proxy.simulator.script(FIRST_KEY, vec!["invalid".parse().unwrap()]);
    assert_eq!(proxy.request_speech(5).await.status(), 200);
    // It is polled on its own, and the poll succeeds.
    loop {
        if proxy.key_statuses().await == ["active", "active"] {
            break;
        }
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
            Plan::of([(FIRST_KEY, 1_000), (SECOND_KEY, 9_000), (THIRD_KEY, 5_000)]),
            |config| {
                config.pool.strategy = strategy.parse().unwrap();
            },
        )
        .await;
        for _ in 0..6 {
            let answer = proxy.request_speech(5).await;
            assert_eq!(answer.status(), 200);
            answer.bytes().await.unwrap();
        }
        assert_eq!(proxy.request_counts(&KEYS), expected, "{strategy}");
        proxy.close().await;
    }
}

#[tokio::test]
async fn a_slow_text_is_sent_without_an_estimate() {
    let proxy = start_proxy_with(Plan::of([(FIRST_KEY, 1_000)]), |config| {
        config.pool.cost_estimate_timeout = Duration::from_millis(1);
    })
    .await;
    let mut client = TcpStream::connect(proxy.app.address()).await.unwrap();
    let head = format!(
        "POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    // The proxy would wait for a short body of announced length.
    client.write_all(format!("{head}8\r\n{{\"text\":\r\n").as_bytes()).await.unwrap();
    // The request is sent before its text is known.
    wait_until(|| proxy.simulator.ledger().totals.in_flight == 1).await;
    client.write_all(b"7\r\n\"slow\"}\r\n0\r\n\r\n").await.unwrap();
    let mut start = [0; 12];
    client.read_exact(&mut start).await.unwrap();
    assert_eq!(&start, b"HTTP/1.1 200");
    drop(client);
    let records = proxy.into_records().await;
    assert_eq!(records[0].credits, 4);
}
