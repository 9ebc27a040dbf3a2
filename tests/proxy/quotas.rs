//! Tests that client quotas are exact: with concurrent requests, for requests with an unknown outcome, on every route,
//! for sessions, and after a restart. Also tests the requests and pages that rules forbid to a client, and that one
//! client cannot use all slots or request permits.

use std::time::Duration;

use crate::support::websocket::{AGENT, STREAM_INPUT, handshake, open_session};
use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, TestProxy, VOICE_ID, assert_proxy_error, join_all,
    start_proxy_in, start_proxy_with, wait_until,
};
use keychoir::config::{ClientConfig, Config};
use keychoir::policy::client::Rules;
use keychoir::policy::client_quota::{ClientQuota, Period, QuotaUnit};
use keychoir::secret::TokenFingerprint;
use keychoir::simulator::{KeyPlan, Plan, WorkspacePlan};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const OTHER_TOKEN: &str = "other-token-canary-91d2";
/// The status and the error code of a request above the quota.
const QUOTA_EXCEEDED: (u16, &str) = (402, "client_quota_exceeded");

fn plan() -> Plan {
    Plan::with_keys([(FIRST_KEY, 1_000_000), (SECOND_KEY, 1_000_000)])
}

/// Configures the client of the tests with the given `rules`, and another client without rules.
fn configure_clients(rules: Rules) -> impl FnOnce(&mut Config) {
    let client = |name: &str, token: &str, rules| {
        ClientConfig::new(name.to_owned(), TokenFingerprint::new(token), rules)
    };
    let clients = vec![client("app", CLIENT_TOKEN, rules), client("other", OTHER_TOKEN, Rules::default())];
    |config| config.clients = clients
}

fn rules_with_quota(amount: u64, unit: QuotaUnit) -> Rules {
    let quota = ClientQuota { amount, unit, period: Period::Total };
    Rules { quota: Some(quota), ..Rules::default() }
}

fn credit_quota(amount: u64) -> Rules {
    rules_with_quota(amount, QuotaUnit::Credits)
}

/// Returns the status of a response and the error code of the proxy. The code is empty for a response of the provider.
fn status_and_code(response: &reqwest::Response) -> (u16, String) {
    let code = response.headers().get("x-keychoir-error").map_or("", |code| code.to_str().unwrap());
    (response.status().as_u16(), code.to_owned())
}

#[track_caller]
fn assert_status_and_code(response: &reqwest::Response, (status, code): (u16, &str)) {
    assert_eq!(status_and_code(response), (status, code.to_owned()));
}

async fn send_request(proxy: &TestProxy, token: &str, method: &str, path: &str) -> reqwest::Response {
    let request = proxy.client.request(method.parse().unwrap(), format!("{}{path}", proxy.url));
    let request = request.header("xi-api-key", token);
    let request = if method == "GET" { request } else { request.json(&json!({"any": "thing"})) };
    request.send().await.unwrap()
}

/// Returns the numbers of requests and credits that the test client has used.
async fn read_usage(proxy: &TestProxy) -> (u64, u64) {
    let usage: Value = proxy.get("/api/keychoir-usage").await.json().await.unwrap();
    (usage["requests"]["total"].as_u64().unwrap(), usage["credits"]["total"].as_u64().unwrap())
}

/// Waits until the client of the tests has this usage.
async fn wait_for_usage(proxy: &TestProxy, expected: (u64, u64)) {
    let polling = async { while read_usage(proxy).await != expected {} };
    let result = tokio::time::timeout(Duration::from_secs(20), polling).await;
    assert!(result.is_ok(), "the usage must be {expected:?}, not {:?}", read_usage(proxy).await);
}

/// Sends 150 concurrent requests with a quota of 1,000 credits, of which `expected` must be served.
async fn check_concurrent_requests(characters: usize, expected: usize) {
    let proxy = start_proxy_with(plan(), configure_clients(credit_quota(1_000))).await;
    let responses = join_all((0..150).map(|_| proxy.request_speech(characters))).await;
    let served_count = responses.iter().filter(|response| response.status() == 200).count();
    let refused_count = responses
        .iter()
        .filter(|response| status_and_code(response) == (QUOTA_EXCEEDED.0, QUOTA_EXCEEDED.1.to_owned()))
        .count();
    assert_eq!(
        (served_count, refused_count),
        (expected, 150 - expected),
        "the quota must suffice for {expected} requests of {characters} characters"
    );
    drop(responses);
    wait_for_usage(&proxy, (expected as u64, (expected * characters) as u64)).await;
    let (ledger, _) = proxy.close().await;
    assert_eq!(ledger.keys.iter().map(|key| key.charged).sum::<u64>(), (expected * characters) as u64);
}

#[tokio::test]
async fn concurrent_requests_spend_no_more_than_the_quota() {
    check_concurrent_requests(1_000, 1).await;
    check_concurrent_requests(300, 3).await;
    check_concurrent_requests(10, 100).await;
}

#[tokio::test]
async fn a_request_above_the_remaining_quota_is_refused_and_a_cheaper_one_is_served() {
    let proxy = start_proxy_with(plan(), configure_clients(credit_quota(1_000))).await;
    assert_eq!(proxy.request_speech(900).await.status(), 200);
    let response = proxy.request_speech(200).await;
    assert_status_and_code(&response, QUOTA_EXCEEDED);
    let body: Value = response.json().await.unwrap();
    assert_eq!(
        body["detail"]["message"],
        "This client has 100 of its quota of 1,000 credits left, and this request may need 200."
    );
    assert_eq!(proxy.request_speech(100).await.status(), 200);
    assert_status_and_code(&proxy.request_speech(1).await, QUOTA_EXCEEDED);
    proxy.close().await;
}

#[tokio::test]
async fn a_possibly_served_request_is_charged_by_its_estimate() {
    let proxy = start_proxy_with(plan(), configure_clients(credit_quota(1_000))).await;
    // The provider closes the connection after it has received the request.
    proxy.simulator.queue_faults(FIRST_KEY, vec!["close".parse().unwrap()]);
    assert_proxy_error(&proxy.request_speech(300).await, 502, "upstream_reset");
    wait_for_usage(&proxy, (1, 300)).await;
    // The client disconnects while the provider processes the request.
    proxy.simulator.queue_faults(FIRST_KEY, vec!["stall=3600s".parse().unwrap()]);
    {
        let cancelled = proxy.request_speech(200);
        tokio::pin!(cancelled);
        tokio::select! {
            _ = &mut cancelled => panic!("the stalled request must not receive a response"),
            () = wait_until(|| proxy.simulator.ledger().totals.in_flight == 1) => {}
        }
    }
    wait_for_usage(&proxy, (2, 500)).await;
    // A refusal and a failure of the provider cost nothing.
    assert_eq!(proxy.post(SPEECH_PATH, &json!({"texxt": "a"})).await.status(), 422);
    for key in [FIRST_KEY, SECOND_KEY] {
        proxy.simulator.queue_faults(key, vec!["server_error".parse().unwrap()]);
    }
    assert_eq!(proxy.request_speech(500).await.status(), 500);
    assert_eq!(read_usage(&proxy).await, (2, 500));
    proxy.simulator.queue_faults(FIRST_KEY, Vec::new());
    proxy.simulator.queue_faults(SECOND_KEY, Vec::new());
    assert_eq!(proxy.request_speech(500).await.status(), 200);
    assert_status_and_code(&proxy.request_speech(1).await, QUOTA_EXCEEDED);
    let usage = read_usage(&proxy).await;
    let directory = proxy.close_unchecked().await;
    let restarted = start_proxy_in(directory, plan(), configure_clients(credit_quota(1_000))).await;
    assert_eq!(read_usage(&restarted).await, usage);
}

#[tokio::test]
async fn an_unsent_request_is_not_charged() {
    let proxy = start_proxy_with(plan(), |config| {
        configure_clients(credit_quota(1_000))(config);
        // Port 9 refuses connections.
        config.upstream.base_url = "http://127.0.0.1:9".parse().unwrap();
        config.quota_polling.enabled = false;
    })
    .await;
    assert_proxy_error(&proxy.request_speech(900).await, 502, "upstream_unreachable");
    wait_for_usage(&proxy, (0, 0)).await;
    proxy.close_unchecked().await;
}

/// Returns a plan of one account with the given `concurrency` limit.
fn plan_with_concurrency(concurrency: u32) -> Plan {
    let workspace =
        WorkspacePlan { max_concurrent: Some(concurrency), ..WorkspacePlan::new("ws", 1_000_000) };
    let key = KeyPlan { workspace: Some("ws".to_owned()), ..KeyPlan::new(FIRST_KEY, 0) };
    Plan::with_keys([]).with_workspace(workspace).with_key(key)
}

/// Requests speech as the other client.
async fn request_speech_as_other(proxy: &TestProxy, characters: usize) -> reqwest::Response {
    let request = proxy.client.post(format!("{}{SPEECH_PATH}", proxy.url)).header("xi-api-key", OTHER_TOKEN);
    request.json(&json!({"text": "a".repeat(characters)})).send().await.unwrap()
}

#[tokio::test]
async fn a_client_that_disconnects_while_it_waits_for_a_key_is_not_charged() {
    for rules in [rules_with_quota(1, QuotaUnit::Requests), credit_quota(50)] {
        let proxy = start_proxy_with(plan_with_concurrency(1), configure_clients(rules)).await;
        // The first response reports the concurrency limit.
        assert_eq!(request_speech_as_other(&proxy, 1).await.status(), 200);
        proxy.set_fault(FIRST_KEY, "stall=3600s");
        {
            let busy = request_speech_as_other(&proxy, 2);
            tokio::pin!(busy);
            tokio::select! {
                response = &mut busy => panic!("the stalled request must not receive {}", response.status()),
                () = wait_until(|| proxy.simulator.ledger().totals.in_flight == 1) => {}
            }
            {
                let waiting = proxy.request_speech(50);
                let request_counted = async { while read_usage(&proxy).await.0 != 1 {} };
                tokio::pin!(waiting);
                tokio::select! {
                    _ = &mut waiting => panic!("the waiting request must not receive a response"),
                    response = &mut busy => panic!("the stalled request must not receive {}", response.status()),
                    () = request_counted => {}
                }
            }
            tokio::select! {
                response = &mut busy => panic!("the stalled request must not receive {}", response.status()),
                () = wait_for_usage(&proxy, (0, 0)) => {}
            }
        }
        wait_until(|| proxy.simulator.ledger().totals.in_flight == 0).await;
        proxy.simulator.set_fault(FIRST_KEY, None);
        assert_eq!(proxy.request_speech(50).await.status(), 200);
        assert_status_and_code(&proxy.request_speech(50).await, QUOTA_EXCEEDED);
        proxy.close_unchecked().await;
    }
}

#[tokio::test]
async fn a_client_with_an_exhausted_quota_may_send_only_free_requests() {
    let proxy = start_proxy_with(plan(), configure_clients(credit_quota(10))).await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    wait_for_usage(&proxy, (1, 10)).await;
    for (method, path) in [
        ("POST", "/v1/convai/twilio/outbound-call"),
        ("POST", "/v1/convai/sip-trunk/outbound-call"),
        ("POST", "/v1/convai/whatsapp/outbound-message"),
        ("POST", "/v1/convai/batch-calling/submit"),
        ("POST", "/v1/convai/batch-calling/b1/retry"),
        ("POST", "/v1/convai/agents/a1/simulate-conversation"),
        ("POST", "/v1/convai/agents/a1/simulate-conversation/stream"),
        ("POST", "/v1/convai/agents/a1/run-tests"),
        ("POST", "/v1/convai/conversations/c1/analysis/run"),
        ("POST", "/v1/translation"),
        ("POST", "/v1/flows/video"),
        ("POST", "/v1/speech-to-text"),
        ("POST", "/v1/music"),
        ("POST", "/v1/dubbing"),
        ("POST", "/v1/something/that/comes/next"),
        ("POST", "/v3/voices/add/more"),
        ("PUT", "/v1/something"),
        ("DELETE", "/v1/something/new"),
        ("BREW", "/v1/voices/add"),
        // Tokens and URLs with which the client could use the provider directly.
        ("POST", "/v1/single-use-token/realtime_scribe"),
        ("POST", "/v1/convai/realtime/client_secrets"),
        ("GET", "/v1/convai/conversation/token?agent_id=a"),
        ("GET", "/v1/convai/conversation/get-signed-url?agent_id=a"),
        ("GET", "/v1/convai/conversation/get_signed_url?agent_id=a"),
        ("POST", "/v1/convai/twilio/register-call"),
    ] {
        let response = send_request(&proxy, CLIENT_TOKEN, method, path).await;
        assert_eq!(
            status_and_code(&response),
            (QUOTA_EXCEEDED.0, QUOTA_EXCEEDED.1.to_owned()),
            "{method} {path}: the client must be refused by its quota"
        );
    }
    for (method, path) in [
        ("GET", "/v1/voices".to_owned()),
        ("GET", "/v1/something/that/comes/next".to_owned()),
        ("POST", "/v1/voices/add".to_owned()),
        ("POST", format!("/v1/voices/{VOICE_ID}/edit")),
        ("POST", "/v1/convai/agents/create".to_owned()),
        ("POST", "/v1/history/download".to_owned()),
        ("DELETE", "/v1/voices/none".to_owned()),
    ] {
        let response = send_request(&proxy, CLIENT_TOKEN, method, &path).await;
        assert_ne!(
            status_and_code(&response).0,
            402,
            "{method} {path}: a free request must not be refused by the quota"
        );
    }
    let (status, _) = handshake(&proxy, "/v1/translation/realtime", &[("xi-api-key", CLIENT_TOKEN)])
        .await
        .err()
        .expect("the handshake must be refused");
    assert_eq!(status, 402);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_reported_price_is_charged_on_every_route() {
    for (method, path, served) in [
        ("POST", "/v1/convai/agents/a1/simulate-conversation", 2),
        ("POST", "/v1/something/that/comes/next", 2),
        ("POST", "/v1/convai/twilio/outbound-call", 2),
    ] {
        let proxy = start_proxy_with(plan(), configure_clients(credit_quota(10_000))).await;
        proxy.set_fault(FIRST_KEY, "answer=200[character-cost: 5000]/{}");
        for _ in 0..served {
            assert_eq!(
                send_request(&proxy, CLIENT_TOKEN, method, path).await.status(),
                200,
                "{method} {path}: the request must be served within the quota"
            );
        }
        assert_status_and_code(&send_request(&proxy, CLIENT_TOKEN, method, path).await, QUOTA_EXCEEDED);
        assert_eq!(read_usage(&proxy).await, (served, 10_000));
        proxy.close_unchecked().await;
    }
    // A price in the response of a free route is charged as well.
    let proxy = start_proxy_with(plan(), configure_clients(credit_quota(10_000))).await;
    proxy.set_fault(FIRST_KEY, "answer=200[character-cost: 5000]/{}");
    for _ in 0..3 {
        assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    }
    assert_eq!(read_usage(&proxy).await, (3, 15_000));
    assert_status_and_code(&proxy.request_speech(1).await, QUOTA_EXCEEDED);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn an_unpriced_request_reserves_the_configured_amount() {
    let proxy = start_proxy_with(plan(), |config| {
        configure_clients(credit_quota(2_500))(config);
        config.access.unpriced_credits = 1_000;
    })
    .await;
    let path = "/v1/something/that/comes/next";
    proxy.set_fault(FIRST_KEY, "answer=200/{}");
    for expected in [1_000, 2_000, 3_000] {
        assert_eq!(send_request(&proxy, CLIENT_TOKEN, "POST", path).await.status(), 200);
        assert_eq!(read_usage(&proxy).await.1, expected);
    }
    assert_status_and_code(&send_request(&proxy, CLIENT_TOKEN, "POST", path).await, QUOTA_EXCEEDED);
    proxy.close_unchecked().await;

    let proxy = start_proxy_with(plan(), configure_clients(credit_quota(1_000_000))).await;
    proxy.set_fault(FIRST_KEY, "stall=3600s");
    let first = send_request(&proxy, CLIENT_TOKEN, "POST", path);
    tokio::pin!(first);
    tokio::select! {
        _ = &mut first => panic!("the stalled request must not receive a response"),
        () = wait_until(|| proxy.simulator.ledger().totals.in_flight == 1) => {}
    }
    assert_status_and_code(
        &send_request(&proxy, CLIENT_TOKEN, "POST", path).await,
        (429, "client_concurrency_exceeded"),
    );
    proxy.simulator.set_fault(FIRST_KEY, None);
    assert_eq!(proxy.request_speech(5).await.status(), 200, "priced requests must not be limited");
}

#[tokio::test]
async fn direct_access_requires_a_permission_if_the_client_has_a_quota() {
    let with_permission = Rules { may_request_tokens: true, ..rules_with_quota(2, QuotaUnit::Requests) };
    for (rules, expected) in [
        (rules_with_quota(2, QuotaUnit::Requests), (403, "direct_access_not_allowed")),
        (credit_quota(100), (403, "direct_access_not_allowed")),
        (with_permission, (200, "")),
        (Rules::default(), (200, "")),
    ] {
        let proxy = start_proxy_with(plan(), configure_clients(rules)).await;
        let path = "/v1/convai/conversation/get-signed-url?agent_id=agent_public";
        for (method, path) in [("GET", path), ("POST", "/v1/single-use-token/realtime_scribe")] {
            assert_status_and_code(&send_request(&proxy, CLIENT_TOKEN, method, path).await, expected);
        }
        proxy.close().await;
    }
}

#[tokio::test]
async fn a_client_with_restricted_paths_can_read_only_its_own_usage() {
    let pages = ["/metrics", "/api/elevenlabs-status", "/api/keychoir-keys"];
    let rules_with_path = |path: &str| Rules { paths: vec![path.to_owned()], ..credit_quota(100) };
    let proxy = start_proxy_with(plan(), configure_clients(rules_with_path("/v1/text-to-speech"))).await;
    for page in pages {
        assert_status_and_code(&proxy.get(page).await, (403, "path_not_allowed"));
        assert_eq!(
            send_request(&proxy, OTHER_TOKEN, "GET", page).await.status(),
            200,
            "{page} must be served to a client without restrictions"
        );
    }
    assert_eq!(proxy.request_speech(30).await.status(), 200);
    wait_for_usage(&proxy, (1, 30)).await;
    let usage: Value = proxy.get("/api/keychoir-usage").await.json().await.unwrap();
    assert_eq!(usage["client"], "app");
    assert_eq!(
        usage["quota"],
        json!({"limit": "100 credits", "amount": 100, "used": 30, "remaining": 70, "resetsAt": null})
    );
    let other_usage: Value =
        send_request(&proxy, OTHER_TOKEN, "GET", "/api/keychoir-usage").await.json().await.unwrap();
    assert_eq!((&other_usage["client"], &other_usage["quota"]), (&json!("other"), &Value::Null));
    assert_status_and_code(
        &send_request(&proxy, "wrong", "GET", "/api/keychoir-usage").await,
        (401, "client_token_wrong"),
    );
    assert_eq!(send_request(&proxy, OTHER_TOKEN, "POST", "/api/keychoir-usage").await.status(), 405);
    proxy.close().await;
    let proxy = start_proxy_with(plan(), configure_clients(rules_with_path("/metrics"))).await;
    assert_eq!(proxy.get("/metrics").await.status(), 200);
    assert_status_and_code(&proxy.get("/api/keychoir-keys").await, (403, "path_not_allowed"));
    proxy.close().await;
}

/// The provider sends a refusal, two responses that cost nothing, a failure, a response without a price and one with a
/// price. The last request has an unknown outcome.
#[tokio::test]
async fn the_counts_are_the_same_after_a_restart() {
    for rules in [rules_with_quota(5, QuotaUnit::Requests), credit_quota(5_000)] {
        let is_request_quota = rules.quota.is_some_and(|quota| quota.unit == QuotaUnit::Requests);
        let first = start_proxy_with(plan(), configure_clients(rules.clone())).await;
        for fault in [
            "answer=422/{}",
            "answer=200[character-cost: 0]/{}",
            "answer=200[character-cost: 0]/{}",
            "answer=500/{}",
            "answer=200/{}",
            "answer=200[character-cost: 7]/{}",
            "close",
        ] {
            for key in [FIRST_KEY, SECOND_KEY] {
                first.set_fault(key, fault);
            }
            assert_ne!(first.request_speech(20).await.status(), 402);
        }
        wait_for_usage(&first, (5, 47)).await;
        let usage_before: Value = first.get("/api/keychoir-usage").await.json().await.unwrap();
        let directory = first.close_unchecked().await;
        let second = start_proxy_in(directory, plan(), configure_clients(rules)).await;
        let usage_after: Value = second.get("/api/keychoir-usage").await.json().await.unwrap();
        assert_eq!(usage_before, usage_after);
        assert_eq!(second.request_speech(20).await.status(), if is_request_quota { 402 } else { 200 });
        second.close_unchecked().await;
    }
}

/// The price replaces the estimate in memory and in the database.
#[tokio::test]
async fn the_reported_price_of_a_conversation_replaces_its_estimate() {
    let first =
        start_proxy_with(Plan::with_keys([(FIRST_KEY, 1_000_000)]), configure_clients(credit_quota(100_000)))
            .await;
    let mut session = open_session(&first, AGENT).await;
    session.send_json(&json!({"type": "conversation_initiation_client_data"})).await;
    assert_eq!(session.receive_json().await["type"], "conversation_initiation_metadata");
    session.send_json(&json!({"type": "user_message", "text": "Hello?"})).await;
    while session.receive_json().await["type"] != "agent_response" {}
    session.close().await;
    drop(session);
    let priced = async {
        loop {
            let records: Vec<(i64, String)> = {
                let database = rusqlite::Connection::open(first.database_path()).unwrap();
                let mut statement =
                    database.prepare("SELECT credits, credits_from FROM attempts WHERE credits > 0").unwrap();
                let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)));
                rows.unwrap().map(Result::unwrap).collect()
            };
            if let [(credits, source)] = records.as_slice() {
                assert_eq!(source, "answer");
                return u64::try_from(*credits).unwrap();
            }
            tokio::task::yield_now().await;
        }
    };
    let price = tokio::time::timeout(Duration::from_secs(60), priced).await.unwrap();
    wait_for_usage(&first, (1, price)).await;
    let directory = first.close_unchecked().await;
    let second = start_proxy_in(
        directory,
        Plan::with_keys([(FIRST_KEY, 1_000_000)]),
        configure_clients(credit_quota(100_000)),
    )
    .await;
    assert_eq!(read_usage(&second).await, (1, price));
    second.close_unchecked().await;
}

/// Sends the head of a speech request with a content length and the first bytes of its body.
async fn start_slow_upload(proxy: &TestProxy, token: &str) -> TcpStream {
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    let head = format!(
        "POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {token}\r\ncontent-type: application/json\r\n\
         content-length: 100\r\n\r\n{{\"text\":"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn clients_that_send_a_short_body_slowly_hold_no_slot() {
    let proxy = start_proxy_with(plan_with_concurrency(3), |config| {
        configure_clients(Rules::default())(config);
        config.pool.queue_timeout = Duration::from_millis(1);
        // The request does not wait for a cost estimate, so it only waits for its body.
        config.pool.cost_estimate_timeout = Duration::ZERO;
    })
    .await;
    assert_eq!(proxy.request_speech(1).await.status(), 200);
    let mut slow_uploads = Vec::new();
    for _ in 0..3 {
        slow_uploads.push(start_slow_upload(&proxy, CLIENT_TOKEN).await);
    }
    // Requests are counted when they are admitted.
    wait_for_usage(&proxy, (4, 1)).await;
    for _ in 0..3 {
        assert_eq!(request_speech_as_other(&proxy, 5).await.status(), 200);
    }
    // The requests are served after the rest of their bodies is sent.
    for stream in &mut slow_uploads {
        stream.write_all(format!("\"{}\"}}", "a".repeat(89)).as_bytes()).await.unwrap();
        let mut response = [0; 12];
        stream.read_exact(&mut response).await.unwrap();
        assert_eq!(&response, b"HTTP/1.1 200");
    }
    proxy.close().await;
}

#[tokio::test]
async fn one_client_cannot_use_all_request_permits() {
    let proxy = start_proxy_with(plan(), |config| {
        configure_clients(Rules::default())(config);
        config.server.max_requests = 4;
    })
    .await;
    let slow_uploads =
        [start_slow_upload(&proxy, CLIENT_TOKEN).await, start_slow_upload(&proxy, CLIENT_TOKEN).await];
    wait_for_usage(&proxy, (2, 0)).await;
    assert_status_and_code(&proxy.get("/v1/voices").await, (429, "client_concurrency_exceeded"));
    assert_eq!(send_request(&proxy, OTHER_TOKEN, "GET", "/v1/voices").await.status(), 200);
    drop(slow_uploads);
    proxy.wait_until_served("/v1/voices").await;
    proxy.close().await;
}

#[tokio::test]
async fn sessions_are_charged_within_the_quota() {
    let proxy = start_proxy_with(plan(), configure_clients(credit_quota(100))).await;
    let mut served_count = 0;
    for _ in 0..4 {
        let Ok(mut session) = handshake(&proxy, STREAM_INPUT, &[("xi-api-key", CLIENT_TOKEN)]).await else {
            continue;
        };
        session.send_json(&json!({"text": " "})).await;
        session.send_json(&json!({"text": "a".repeat(39), "flush": true})).await;
        if session.receive_json().await.get("audio").is_some() {
            served_count += 1;
        }
        drop(session);
    }
    assert_eq!(served_count, 2, "the quota must suffice for two sessions");
    assert!(read_usage(&proxy).await.1 <= 100, "the sessions must stay within the quota");
    proxy.close_unchecked().await;
}
