//! Quotas of clients are exact: with concurrent requests, with an unknown outcome, on every route,
//! and after a restart.

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

const OTHER: &str = "other-token-canary-91d2";
const USED: (u16, &str) = (402, "client_quota_exceeded");

fn plan() -> Plan {
    Plan::of([(FIRST_KEY, 1_000_000), (SECOND_KEY, 1_000_000)])
}

fn clients(rules: Rules) -> Vec<ClientConfig> {
    let client = |name: &str, token: &str, rules| ClientConfig {
        name: name.to_owned(),
        token: TokenFingerprint::new(token),
        rules,
    };
    vec![client("app", CLIENT_TOKEN, rules), client("other", OTHER, Rules::default())]
}

/// The client of the tests with these rules, and another one without.
fn with(rules: Rules) -> impl FnOnce(&mut Config) {
    |config| config.clients = clients(rules)
}

fn quota(amount: u64, unit: QuotaUnit) -> Rules {
    let quota = ClientQuota { amount, unit, period: Period::Total };
    Rules { quota: Some(quota), ..Rules::default() }
}

fn credits(amount: u64) -> Rules {
    quota(amount, QuotaUnit::Credits)
}

/// The status of a response and Keychoir's error code.
fn told(answer: &reqwest::Response) -> (u16, String) {
    let code = answer.headers().get("x-keychoir-error").map_or("", |code| code.to_str().unwrap());
    (answer.status().as_u16(), code.to_owned())
}

#[track_caller]
fn assert_told(answer: &reqwest::Response, (status, code): (u16, &str)) {
    assert_eq!(told(answer), (status, code.to_owned()));
}

async fn ask(proxy: &TestProxy, token: &str, method: &str, path: &str) -> reqwest::Response {
    let request = proxy.client.request(method.parse().unwrap(), format!("{}{path}", proxy.url));
    let request = request.header("xi-api-key", token);
    let request = if method == "GET" { request } else { request.json(&json!({"any": "thing"})) };
    request.send().await.unwrap()
}

/// The usage of the client of the tests: requests and credits.
async fn used(proxy: &TestProxy) -> (u64, u64) {
    let usage: Value = proxy.get("/api/keychoir-usage").await.json().await.unwrap();
    (usage["requests"]["total"].as_u64().unwrap(), usage["credits"]["total"].as_u64().unwrap())
}

/// Waits for this usage.
async fn until_used(proxy: &TestProxy, expected: (u64, u64)) {
    let reached = async { while used(proxy).await != expected {} };
    let reached = tokio::time::timeout(std::time::Duration::from_secs(20), reached).await;
    assert!(reached.is_ok(), "{:?} and not {expected:?}", used(proxy).await);
}

/// C1: 150 concurrent requests, with 1,000 credits.
async fn check_at_once(characters: usize, expected: usize) {
    let proxy = start_proxy_with(plan(), with(credits(1_000))).await;
    let answers = join_all((0..150).map(|_| proxy.request_speech(characters))).await;
    let served = answers.iter().filter(|answer| answer.status() == 200).count();
    let refused = answers.iter().filter(|answer| told(answer) == (USED.0, USED.1.to_owned())).count();
    assert_eq!((served, refused), (expected, 150 - expected), "of {characters} characters");
    drop(answers);
    until_used(&proxy, (expected as u64, (expected * characters) as u64)).await;
    let (ledger, _) = proxy.close().await;
    assert_eq!(ledger.keys.iter().map(|key| key.charged).sum::<u64>(), (expected * characters) as u64);
}

#[tokio::test]
async fn parallel_requests_spend_no_more_than_the_credits() {
    check_at_once(1_000, 1).await;
    check_at_once(300, 3).await;
    check_at_once(10, 100).await;
}

#[tokio::test]
async fn a_request_that_needs_more_than_is_left_is_refused_and_a_smaller_one_served() {
    let proxy = start_proxy_with(plan(), with(credits(1_000))).await;
    assert_eq!(proxy.request_speech(900).await.status(), 200);
    let answer = proxy.request_speech(200).await;
    assert_told(&answer, USED);
    let body: Value = answer.json().await.unwrap();
    assert_eq!(
        body["detail"]["message"],
        "This client has 100 of its quota of 1,000 credits left, and this request may need 200."
    );
    assert_eq!(proxy.request_speech(100).await.status(), 200);
    assert_told(&proxy.request_speech(1).await, USED);
    proxy.close().await;
}

#[tokio::test]
async fn a_possibly_served_request_is_charged_by_its_estimate() {
    let proxy = start_proxy_with(plan(), with(credits(1_000))).await;
    // The connection breaks after the request was received.
    proxy.simulator.script(FIRST_KEY, vec!["close".parse().unwrap()]);
    assert_proxy_error(&proxy.request_speech(300).await, 502, "upstream_reset");
    until_used(&proxy, (1, 300)).await;
    // The client disconnects while the provider works.
    proxy.simulator.script(FIRST_KEY, vec!["stall=3600s".parse().unwrap()]);
    {
        let leaving = proxy.request_speech(200);
        tokio::pin!(leaving);
        tokio::select! {
            _ = &mut leaving => panic!("it was answered"),
            () = wait_until(|| proxy.simulator.ledger().totals.in_flight == 1) => {}
        }
    }
    until_used(&proxy, (2, 500)).await;
    // A refusal costs nothing, nor does a failure of the provider.
    assert_eq!(proxy.post(SPEECH_PATH, &json!({"texxt": "a"})).await.status(), 422);
    for key in [FIRST_KEY, SECOND_KEY] {
        proxy.simulator.script(key, vec!["server_error".parse().unwrap()]);
    }
    assert_eq!(proxy.request_speech(500).await.status(), 500);
    assert_eq!(used(&proxy).await, (2, 500));
    proxy.simulator.script(FIRST_KEY, Vec::new());
    proxy.simulator.script(SECOND_KEY, Vec::new());
    assert_eq!(proxy.request_speech(500).await.status(), 200);
    assert_told(&proxy.request_speech(1).await, USED);
    let (requests, credits) = used(&proxy).await;
    let folder = proxy.close_unchecked().await;
    let again = start_proxy_in(folder, plan(), with(self::credits(1_000))).await;
    assert_eq!(used(&again).await, (requests, credits));
}

#[tokio::test]
async fn an_unsent_request_is_not_charged() {
    let proxy = start_proxy_with(plan(), |config| {
        with(credits(1_000))(config);
        // No server listens on this port.
        config.upstream.base_url = "http://127.0.0.1:9".parse().unwrap();
        config.quota_polling.enabled = false;
    })
    .await;
    assert_proxy_error(&proxy.request_speech(900).await, 502, "upstream_unreachable");
    until_used(&proxy, (0, 0)).await;
    proxy.close_unchecked().await;
}

/// One account with this concurrency limit.
fn narrow(concurrency: u32) -> Plan {
    let workspace =
        WorkspacePlan { concurrency_max: Some(concurrency), ..WorkspacePlan::new("narrow", 1_000_000) };
    let key = KeyPlan { workspace: Some("narrow".to_owned()), ..KeyPlan::new(FIRST_KEY, 0) };
    Plan::of([]).with_workspace(workspace).with_key(key)
}

/// A speech request of the other client.
async fn speak_as_other(proxy: &TestProxy, characters: usize) -> reqwest::Response {
    let request = proxy.client.post(format!("{}{SPEECH_PATH}", proxy.url)).header("xi-api-key", OTHER);
    request.json(&json!({"text": "a".repeat(characters)})).send().await.unwrap()
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_for_a_key_is_not_charged() {
    for rules in [quota(1, QuotaUnit::Requests), credits(50)] {
        let proxy = start_proxy_with(narrow(1), with(rules)).await;
        // The concurrency limit is known from the first response.
        assert_eq!(speak_as_other(&proxy, 1).await.status(), 200);
        proxy.set_fault(FIRST_KEY, "stall=3600s");
        {
            let busy = speak_as_other(&proxy, 2);
            tokio::pin!(busy);
            tokio::select! {
                answer = &mut busy => panic!("it was answered: {}", answer.status()),
                () = wait_until(|| proxy.simulator.ledger().totals.in_flight == 1) => {}
            }
            {
                let waiting = proxy.request_speech(50);
                let counted = async { while used(&proxy).await.0 != 1 {} };
                tokio::pin!(waiting);
                tokio::select! {
                    _ = &mut waiting => panic!("it was answered"),
                    answer = &mut busy => panic!("it was answered: {}", answer.status()),
                    () = counted => {}
                }
            }
            tokio::select! {
                answer = &mut busy => panic!("it was answered: {}", answer.status()),
                () = until_used(&proxy, (0, 0)) => {}
            }
        }
        wait_until(|| proxy.simulator.ledger().totals.in_flight == 0).await;
        proxy.simulator.always(FIRST_KEY, None);
        assert_eq!(proxy.request_speech(50).await.status(), 200);
        assert_told(&proxy.request_speech(50).await, USED);
        proxy.close_unchecked().await;
    }
}

/// C3: requests of a client whose quota is exhausted.
#[tokio::test]
async fn a_spent_client_may_use_free_requests_only() {
    let proxy = start_proxy_with(plan(), with(credits(10))).await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    until_used(&proxy, (1, 10)).await;
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
        // C4: direct use of the provider.
        ("POST", "/v1/single-use-token/realtime_scribe"),
        ("POST", "/v1/convai/realtime/client_secrets"),
        ("GET", "/v1/convai/conversation/token?agent_id=a"),
        ("GET", "/v1/convai/conversation/get-signed-url?agent_id=a"),
        ("GET", "/v1/convai/conversation/get_signed_url?agent_id=a"),
        ("POST", "/v1/convai/twilio/register-call"),
    ] {
        let answer = ask(&proxy, CLIENT_TOKEN, method, path).await;
        assert_eq!(told(&answer), (USED.0, USED.1.to_owned()), "{method} {path}");
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
        let answer = ask(&proxy, CLIENT_TOKEN, method, &path).await;
        assert_ne!(told(&answer).0, 402, "{method} {path}");
    }
    let (status, _) = crate::support::websocket::handshake(
        &proxy,
        "/v1/translation/realtime",
        &[("xi-api-key", CLIENT_TOKEN)],
    )
    .await
    .err()
    .expect("it is refused");
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
        let proxy = start_proxy_with(plan(), with(credits(10_000))).await;
        proxy.set_fault(FIRST_KEY, "answer=200[character-cost: 5000]/{}");
        for _ in 0..served {
            assert_eq!(ask(&proxy, CLIENT_TOKEN, method, path).await.status(), 200, "{method} {path}");
        }
        assert_told(&ask(&proxy, CLIENT_TOKEN, method, path).await, USED);
        assert_eq!(used(&proxy).await, (served, 10_000));
        proxy.close_unchecked().await;
    }
    // The same for a route known to be free: a price in its response makes it count.
    let proxy = start_proxy_with(plan(), with(credits(10_000))).await;
    proxy.set_fault(FIRST_KEY, "answer=200[character-cost: 5000]/{}");
    for _ in 0..3 {
        assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    }
    assert_eq!(used(&proxy).await, (3, 15_000));
    assert_told(&proxy.request_speech(1).await, USED);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn an_unpriced_request_reserves_the_configured_amount_one_at_a_time() {
    let proxy = start_proxy_with(plan(), |config| {
        with(credits(2_500))(config);
        config.access.unpriced_credits = 1_000;
    })
    .await;
    let path = "/v1/something/that/comes/next";
    proxy.set_fault(FIRST_KEY, "answer=200/{}");
    for expected in [1_000, 2_000, 3_000] {
        assert_eq!(ask(&proxy, CLIENT_TOKEN, "POST", path).await.status(), 200);
        assert_eq!(used(&proxy).await.1, expected);
    }
    assert_told(&ask(&proxy, CLIENT_TOKEN, "POST", path).await, USED);
    proxy.close_unchecked().await;

    let proxy = start_proxy_with(plan(), with(credits(1_000_000))).await;
    proxy.set_fault(FIRST_KEY, "stall=3600s");
    let first = ask(&proxy, CLIENT_TOKEN, "POST", path);
    tokio::pin!(first);
    tokio::select! {
        _ = &mut first => panic!("it was answered"),
        () = wait_until(|| proxy.simulator.ledger().totals.in_flight == 1) => {}
    }
    assert_told(&ask(&proxy, CLIENT_TOKEN, "POST", path).await, (429, "client_concurrency_exceeded"));
    proxy.simulator.always(FIRST_KEY, None);
    assert_eq!(proxy.request_speech(5).await.status(), 200, "what has a price goes on");
}

#[tokio::test]
async fn direct_access_needs_no_quota_or_a_permission() {
    let may = Rules { may_request_tokens: true, ..quota(2, QuotaUnit::Requests) };
    for (rules, expected) in [
        (quota(2, QuotaUnit::Requests), (403, "direct_access_not_allowed")),
        (credits(100), (403, "direct_access_not_allowed")),
        (may, (200, "")),
        (Rules::default(), (200, "")),
    ] {
        let proxy = start_proxy_with(plan(), with(rules)).await;
        let path = "/v1/convai/conversation/get-signed-url?agent_id=agent_public";
        for (method, path) in [("GET", path), ("POST", "/v1/single-use-token/realtime_scribe")] {
            assert_told(&ask(&proxy, CLIENT_TOKEN, method, path).await, expected);
        }
        proxy.close().await;
    }
}

/// C6.
#[tokio::test]
async fn a_client_with_paths_sees_its_own_usage_only() {
    let pages = ["/metrics", "/api/elevenlabs-status", "/api/keychoir-keys"];
    let limited = |path: &str| Rules { paths: vec![path.to_owned()], ..credits(100) };
    let proxy = start_proxy_with(plan(), with(limited("/v1/text-to-speech"))).await;
    for page in pages {
        assert_told(&proxy.get(page).await, (403, "path_not_allowed"));
        assert_eq!(ask(&proxy, OTHER, "GET", page).await.status(), 200, "{page}");
    }
    assert_eq!(proxy.request_speech(30).await.status(), 200);
    until_used(&proxy, (1, 30)).await;
    let usage: Value = proxy.get("/api/keychoir-usage").await.json().await.unwrap();
    assert_eq!(usage["client"], "app");
    assert_eq!(
        usage["quota"],
        json!({"limit": "100 credits", "amount": 100, "used": 30, "remaining": 70, "resetsAt": null})
    );
    let other: Value = ask(&proxy, OTHER, "GET", "/api/keychoir-usage").await.json().await.unwrap();
    assert_eq!((&other["client"], &other["quota"]), (&json!("other"), &Value::Null));
    assert_told(&ask(&proxy, "wrong", "GET", "/api/keychoir-usage").await, (401, "client_token_wrong"));
    assert_eq!(ask(&proxy, OTHER, "POST", "/api/keychoir-usage").await.status(), 405);
    proxy.close().await;
    let proxy = start_proxy_with(plan(), with(limited("/metrics"))).await;
    assert_eq!(proxy.get("/metrics").await.status(), 200);
    assert_told(&proxy.get("/api/keychoir-keys").await, (403, "path_not_allowed"));
    proxy.close().await;
}

/// B6: two served for 0 credits, one 500, one of unknown price, one by its price, and one with an
/// unknown outcome.
#[tokio::test]
async fn the_counts_are_the_same_after_a_restart() {
    for rules in [quota(5, QuotaUnit::Requests), credits(5_000)] {
        let is_of_requests = rules.quota.is_some_and(|quota| quota.unit == QuotaUnit::Requests);
        let first = start_proxy_with(plan(), with(rules.clone())).await;
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
        until_used(&first, (5, 47)).await;
        let before: Value = first.get("/api/keychoir-usage").await.json().await.unwrap();
        let folder = first.close_unchecked().await;
        let second = start_proxy_in(folder, plan(), with(rules)).await;
        let after: Value = second.get("/api/keychoir-usage").await.json().await.unwrap();
        assert_eq!(before, after);
        assert_eq!(second.request_speech(20).await.status(), if is_of_requests { 402 } else { 200 });
        second.close_unchecked().await;
    }
}

/// A later price replaces the reservation, in memory and in the file.
#[tokio::test]
async fn a_conversation_is_charged_by_its_time_and_then_by_its_price() {
    let first = start_proxy_with(Plan::of([(FIRST_KEY, 1_000_000)]), with(credits(100_000))).await;
    let mut session = crate::support::websocket::open_session(&first, crate::support::websocket::AGENT).await;
    session.send_json(&json!({"type": "conversation_initiation_client_data"})).await;
    assert_eq!(session.receive_json().await["type"], "conversation_initiation_metadata");
    session.send_json(&json!({"type": "user_message", "text": "Hello?"})).await;
    while session.receive_json().await["type"] != "agent_response" {}
    session.close().await;
    drop(session);
    let priced = async {
        loop {
            let records: Vec<(i64, String)> = {
                let books = rusqlite::Connection::open(first.database()).unwrap();
                let mut read =
                    books.prepare("SELECT credits, credits_from FROM attempts WHERE credits > 0").unwrap();
                let rows = read.query_map([], |row| Ok((row.get(0)?, row.get(1)?)));
                rows.unwrap().map(Result::unwrap).collect()
            };
            if let [(credits, from)] = records.as_slice() {
                assert_eq!(from, "answer");
                return u64::try_from(*credits).unwrap();
            }
            tokio::task::yield_now().await;
        }
    };
    let price = tokio::time::timeout(std::time::Duration::from_secs(60), priced).await.unwrap();
    until_used(&first, (1, price)).await;
    let folder = first.close_unchecked().await;
    let second = start_proxy_in(folder, Plan::of([(FIRST_KEY, 1_000_000)]), with(credits(100_000))).await;
    assert_eq!(used(&second).await, (1, price));
    second.close_unchecked().await;
}

/// Sends the head of a speech request with a content length, and the first bytes of its body.
async fn trickle(proxy: &TestProxy, token: &str) -> TcpStream {
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    let head = format!(
        "POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {token}\r\ncontent-type: application/json\r\n\
         content-length: 100\r\n\r\n{{\"text\":"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

/// B8.
#[tokio::test]
async fn clients_that_trickle_a_short_body_hold_no_slot() {
    let proxy = start_proxy_with(narrow(3), |config| {
        with(Rules::default())(config);
        config.pool.queue_timeout = std::time::Duration::from_millis(1);
        // Without the wait for the text, the request is only waiting for its body.
        config.pool.cost_estimate_timeout = std::time::Duration::ZERO;
    })
    .await;
    assert_eq!(proxy.request_speech(1).await.status(), 200);
    let mut trickling = Vec::new();
    for _ in 0..3 {
        trickling.push(trickle(&proxy, CLIENT_TOKEN).await);
    }
    // The requests were admitted: that is when they are counted.
    until_used(&proxy, (4, 1)).await;
    for _ in 0..3 {
        assert_eq!(speak_as_other(&proxy, 5).await.status(), 200);
    }
    // The rest of the bodies is sent, and the requests are served.
    for stream in &mut trickling {
        stream.write_all(format!("\"{}\"}}", "a".repeat(89)).as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
    }
    proxy.close().await;
}

#[tokio::test]
async fn one_client_does_not_take_all_slots() {
    let proxy = start_proxy_with(plan(), |config| {
        with(Rules::default())(config);
        config.server.max_requests = 4;
    })
    .await;
    let trickling = [trickle(&proxy, CLIENT_TOKEN).await, trickle(&proxy, CLIENT_TOKEN).await];
    until_used(&proxy, (2, 0)).await;
    assert_told(&proxy.get("/v1/voices").await, (429, "client_concurrency_exceeded"));
    assert_eq!(ask(&proxy, OTHER, "GET", "/v1/voices").await.status(), 200);
    drop(trickling);
    proxy.wait_until_served("/v1/voices").await;
    proxy.close().await;
}

#[tokio::test]
async fn parallel_sessions_speak_within_the_quota() {
    let proxy = start_proxy_with(plan(), with(credits(100))).await;
    let mut served = 0;
    for _ in 0..4 {
        let Ok(mut session) = crate::support::websocket::handshake(
            &proxy,
            crate::support::websocket::STREAM_INPUT,
            &[("xi-api-key", CLIENT_TOKEN)],
        )
        .await
        else {
            continue;
        };
        session.send_json(&json!({"text": " "})).await;
        session.send_json(&json!({"text": "a".repeat(39), "flush": true})).await;
        if session.receive_json().await.get("audio").is_some() {
            served += 1;
        }
        drop(session);
    }
    assert_eq!(served, 2);
    assert!(used(&proxy).await.1 <= 100);
    proxy.close_unchecked().await;
}
