//! Tests the quotas of a client's end users. Each user has a separate quota, which is exact with concurrent requests,
//! after a restart and with a table in memory that is too small for all users. Requests and sessions that cost credits
//! must name a valid user, and neither the provider nor the database receives the id of a user.

use std::time::Duration;

use crate::support::websocket::{AGENT, Received, STREAM_INPUT, handshake};
use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, TestProxy, client_config, join_all, start_proxy_in,
    start_proxy_with,
};
use keychoir::config::Config;
use keychoir::policy::client::Rules;
use keychoir::policy::client_quota::ClientQuota;
use keychoir::secret::UserFingerprint;
use keychoir::simulator::Plan;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};

const QUOTA_EXCEEDED: (u16, &str) = (402, "user_quota_exceeded");
const SERVED_BY_PROVIDER: (u16, &str) = (200, "");
/// A fragment of the ids of all users in these tests.
const ID_CANARY: &str = "user-canary-5b1d";

fn plan() -> Plan {
    Plan::with_keys([(FIRST_KEY, 1_000_000), (SECOND_KEY, 1_000_000)]).with_forbidden_text(ID_CANARY)
}

fn user_quota(quota: &str) -> Rules {
    let user_quota: ClientQuota = quota.parse().unwrap();
    Rules { user_quota: Some(user_quota), ..Rules::default() }
}

/// Configures the client of the tests with the given `rules`.
fn configure_rules(rules: Rules) -> impl FnOnce(&mut Config) {
    |config| config.clients = vec![client_config("app", CLIENT_TOKEN, rules)]
}

/// Returns the id of a user, which contains [`ID_CANARY`].
fn user_id(user: &str) -> String {
    format!("{user}@{ID_CANARY}.example")
}

fn speech_request(proxy: &TestProxy, characters: usize) -> RequestBuilder {
    speech_request_at(proxy, SPEECH_PATH, characters)
}

fn speech_request_at(proxy: &TestProxy, path: &str, characters: usize) -> RequestBuilder {
    proxy.request(Method::POST, path, CLIENT_TOKEN).json(&json!({"text": "a".repeat(characters)}))
}

fn speech_request_of(proxy: &TestProxy, user: &str, characters: usize) -> RequestBuilder {
    speech_request(proxy, characters).header("x-keychoir-user", user_id(user))
}

async fn send(request: RequestBuilder) -> Response {
    request.send().await.unwrap()
}

fn status_and_code(response: &Response) -> (u16, String) {
    let code = response.headers().get("x-keychoir-error").map_or("", |code| code.to_str().unwrap());
    (response.status().as_u16(), code.to_owned())
}

#[track_caller]
fn assert_status_and_code(response: &Response, (status, code): (u16, &str)) {
    assert_eq!(status_and_code(response), (status, code.to_owned()));
}

async fn error_message(response: Response) -> String {
    let body: Value = response.json().await.unwrap();
    body["detail"]["message"].as_str().unwrap().to_owned()
}

/// Returns the document `me` of the admin API about the client and one of its users.
async fn read_me(proxy: &TestProxy, user: &str) -> Value {
    let request = proxy.request(Method::GET, "/api/keychoir/v1/me", CLIENT_TOKEN);
    let response = send(request.header("x-keychoir-user", user_id(user))).await;
    assert_eq!(response.status(), 200);
    response.json().await.unwrap()
}

/// Waits until `user` has used exactly `expected` requests.
async fn wait_for_requests(proxy: &TestProxy, user: &str, expected: u64) {
    let polling = async { while read_me(proxy, user).await["user"]["requests"]["total"] != expected {} };
    let result = tokio::time::timeout(Duration::from_secs(20), polling).await;
    assert!(result.is_ok(), "{user} must have used {expected} requests: {}", read_me(proxy, user).await);
}

#[tokio::test]
async fn a_free_user_gets_three_voice_messages_and_a_restart_gives_no_further_one() {
    let proxy = start_proxy_with(plan(), configure_rules(user_quota("3 requests"))).await;
    for _ in 0..3 {
        assert_status_and_code(&send(speech_request_of(&proxy, "alice", 5)).await, SERVED_BY_PROVIDER);
    }
    let refused_response = send(speech_request_of(&proxy, "alice", 5)).await;
    assert_status_and_code(&refused_response, QUOTA_EXCEEDED);
    assert!(!refused_response.headers().contains_key("retry-after"), "a quota without a period never resets");
    assert_eq!(error_message(refused_response).await, "This user has used its quota of 3 requests.");
    assert_status_and_code(&send(speech_request_of(&proxy, "bob", 5)).await, SERVED_BY_PROVIDER);
    let proxy = proxy.restart().await;
    assert_status_and_code(&send(speech_request_of(&proxy, "alice", 5)).await, QUOTA_EXCEEDED);
    for expected in [SERVED_BY_PROVIDER, SERVED_BY_PROVIDER, QUOTA_EXCEEDED] {
        assert_status_and_code(&send(speech_request_of(&proxy, "bob", 5)).await, expected);
    }
    let me = read_me(&proxy, "bob").await;
    assert_eq!((&me["client"], &me["requests"]["total"]), (&json!("app"), &json!(6)));
    assert_eq!(
        me["user"],
        json!({
            "id": UserFingerprint::new("app", user_id("bob").as_bytes()).to_string(),
            "quota": {"limit": "3 requests", "amount": 3, "unit": "requests", "period": "total", "used": 3,
                "remaining": 0, "resets_at": null},
            "requests": {"day": 3, "month": 3, "total": 3},
            "credits": {"day": 15, "month": 15, "total": 15},
        })
    );
    let (ledger, _) = proxy.close().await;
    assert_eq!(
        ledger.keys.iter().map(|key| key.charged).sum::<u64>(),
        30,
        "refused requests must not be sent"
    );
}

#[tokio::test]
async fn an_exhausted_quota_with_a_period_reports_its_reset() {
    let proxy = start_proxy_with(plan(), configure_rules(user_quota("10 credits per day"))).await;
    assert_status_and_code(&send(speech_request_of(&proxy, "alice", 8)).await, SERVED_BY_PROVIDER);
    let refused_response = send(speech_request_of(&proxy, "alice", 5)).await;
    assert_status_and_code(&refused_response, QUOTA_EXCEEDED);
    let seconds: u64 = refused_response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!(
        (1..=24 * 3_600).contains(&seconds),
        "the quota must be reset within a day, and it is reset in {seconds} s"
    );
    let message = error_message(refused_response).await;
    let expected =
        "This user has 2 of its quota of 10 credits per day left, and this request may need 5. It resets at ";
    assert!(message.starts_with(expected), "the message must start with {expected:?}: {message}");
    assert_status_and_code(&send(speech_request_of(&proxy, "alice", 2)).await, SERVED_BY_PROVIDER);
    proxy.close().await;
}

#[tokio::test]
async fn a_request_that_costs_something_must_name_its_user() {
    let proxy = start_proxy_with(plan(), configure_rules(user_quota("3 requests"))).await;
    let refused_response = send(speech_request(&proxy, 5)).await;
    assert_status_and_code(&refused_response, (400, "user_required"));
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 0]);
    let unlisted = proxy.request(Method::POST, "/v1/something/that/comes/next", CLIENT_TOKEN);
    assert_status_and_code(&send(unlisted.json(&json!({}))).await, (400, "user_required"));
    let (status, body) = handshake(&proxy, STREAM_INPUT, &[("xi-api-key", CLIENT_TOKEN)])
        .await
        .err()
        .expect("the handshake must be refused");
    assert!(
        status == 400 && body.contains("user_required"),
        "the handshake must be refused without a user: {status} {body}"
    );
    // Free requests need no user.
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    proxy.close().await;
}

#[tokio::test]
async fn an_invalid_user_is_refused_by_every_client() {
    for rules in [Rules::default(), user_quota("3 requests")] {
        let proxy = start_proxy_with(plan(), configure_rules(rules)).await;
        for user in ["", "tab\tin the id", &"a".repeat(257)] {
            let response = send(speech_request(&proxy, 5).header("x-keychoir-user", user)).await;
            assert_status_and_code(&response, (400, "invalid_user"));
        }
        let request_with_two_users =
            speech_request_at(&proxy, &format!("{SPEECH_PATH}?x-keychoir-user={}", user_id("bob")), 5);
        let request_with_two_users = request_with_two_users.header("x-keychoir-user", user_id("alice"));
        assert_status_and_code(&send(request_with_two_users).await, (400, "invalid_user"));
        let unauthenticated = proxy.request(Method::POST, SPEECH_PATH, "wrong").header("x-keychoir-user", "");
        assert_status_and_code(&send(unauthenticated).await, (401, "client_token_wrong"));
        assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 0]);
        proxy.close().await;
    }
}

#[tokio::test]
async fn the_provider_and_the_records_do_not_contain_the_id_of_a_user() {
    let proxy = start_proxy_with(plan(), configure_rules(Rules::default())).await;
    assert_status_and_code(&send(speech_request_of(&proxy, "alice", 5)).await, SERVED_BY_PROVIDER);
    let path = format!("{SPEECH_PATH}?seed=1&X-Keychoir-User={}", user_id("alice").replace('@', "%40"));
    let parameter = speech_request_at(&proxy, &path, 7);
    assert_status_and_code(&send(parameter).await, SERVED_BY_PROVIDER);
    wait_for_requests(&proxy, "alice", 2).await;
    let me = read_me(&proxy, "alice").await;
    assert_eq!((&me["user"]["quota"], &me["user"]["credits"]["total"]), (&Value::Null, &json!(12)));
    // The simulator records a violation if a request contains the id.
    let (ledger, directory) = proxy.close().await;
    assert!(ledger.requests.iter().any(|request| request.path_and_query.ends_with("?seed=1")));
    let files = crate::support::program::read_all_files(directory.path());
    let contains = |text: &str| files.windows(text.len()).any(|bytes| bytes == text.as_bytes());
    assert!(!contains(ID_CANARY), "the database must not contain the id");
    assert!(contains(&UserFingerprint::new("app", user_id("alice").as_bytes()).to_string()));
}

#[tokio::test]
async fn concurrent_requests_of_a_user_spend_no_more_than_its_quota() {
    for (quota, characters, expected) in [("3 requests", 10, 3), ("1_000 credits", 300, 3)] {
        let proxy = start_proxy_with(plan(), |config| {
            configure_rules(user_quota(quota))(config);
            config.access.max_cached_users = 1;
        })
        .await;
        let requests = (0..80).map(|number| {
            // Other users compete for the table in memory.
            let other_user = format!("other{number}");
            let user = if number % 2 == 0 { "alice" } else { &other_user };
            let request = speech_request_of(&proxy, user, characters);
            async move { (number % 2 == 0, send(request).await) }
        });
        let responses = join_all(requests).await;
        let count = |of_alice, status| {
            let is_counted = |(is_alice, response): &&(bool, Response)| {
                *is_alice == of_alice && response.status() == status
            };
            responses.iter().filter(is_counted).count()
        };
        assert_eq!(
            (count(true, 200), count(true, 402)),
            (expected, 40 - expected),
            "{quota}: only the requests within the quota must be served"
        );
        assert_eq!(count(false, 200), 40, "the quota of one user must not limit another");
        drop(responses);
        proxy.close().await;
    }
}

#[tokio::test]
async fn many_random_users_do_not_reset_the_quota_of_another_user() {
    let proxy = start_proxy_with(plan(), |config| {
        configure_rules(user_quota("3 requests"))(config);
        config.access.max_cached_users = 4;
    })
    .await;
    for round in 0..4 {
        let expected = if round < 3 { SERVED_BY_PROVIDER } else { QUOTA_EXCEEDED };
        assert_status_and_code(&send(speech_request_of(&proxy, "alice", 1)).await, expected);
        let users = (0..60).map(|number| format!("random{round}-{number}"));
        let requests: Vec<_> = users.map(|user| speech_request_of(&proxy, &user, 1)).collect();
        for response in join_all(requests.into_iter().map(send)).await {
            assert_status_and_code(&response, SERVED_BY_PROVIDER);
        }
    }
    proxy.close().await;
}

#[tokio::test]
async fn a_user_whose_records_cannot_be_written_keeps_its_usage() {
    let proxy = start_proxy_with(plan(), |config| {
        configure_rules(user_quota("3 requests"))(config);
        config.access.max_cached_users = 1;
    })
    .await;
    let locking_connection = rusqlite::Connection::open(proxy.database_path()).unwrap();
    locking_connection.execute_batch("BEGIN IMMEDIATE").unwrap();
    for _ in 0..3 {
        assert_status_and_code(&send(speech_request_of(&proxy, "alice", 5)).await, SERVED_BY_PROVIDER);
    }
    // These users displace all idle ones from memory.
    for user in ["bob", "carol", "dave", "erin"] {
        assert_status_and_code(&send(speech_request_of(&proxy, user, 5)).await, SERVED_BY_PROVIDER);
    }
    assert_status_and_code(&send(speech_request_of(&proxy, "alice", 5)).await, QUOTA_EXCEEDED);
    locking_connection.execute_batch("ROLLBACK").unwrap();
    let proxy = proxy.restart().await;
    assert_status_and_code(&send(speech_request_of(&proxy, "alice", 5)).await, QUOTA_EXCEEDED);
    proxy.close().await;
}

#[tokio::test]
async fn a_refused_request_is_refunded_to_the_user() {
    let proxy = start_proxy_with(plan(), configure_rules(user_quota("1 request"))).await;
    assert_eq!(
        send(speech_request_of(&proxy, "alice", 5).json(&json!({"texxt": "a"}))).await.status(),
        422,
        "the provider must refuse the request"
    );
    wait_for_requests(&proxy, "alice", 0).await;
    assert_status_and_code(&send(speech_request_of(&proxy, "alice", 5)).await, SERVED_BY_PROVIDER);
    assert_status_and_code(&send(speech_request_of(&proxy, "alice", 5)).await, QUOTA_EXCEEDED);
    proxy.close().await;
}

#[tokio::test]
async fn the_quotas_of_the_client_and_of_the_user_both_apply() {
    let rules = Rules { quota: Some("4 requests".parse().unwrap()), ..user_quota("3 requests") };
    let proxy = start_proxy_with(plan(), configure_rules(rules)).await;
    for (user, expected) in [
        ("alice", SERVED_BY_PROVIDER),
        ("alice", SERVED_BY_PROVIDER),
        ("alice", SERVED_BY_PROVIDER),
        ("alice", QUOTA_EXCEEDED),
        ("bob", SERVED_BY_PROVIDER),
        ("bob", (402, "client_quota_exceeded")),
    ] {
        assert_status_and_code(&send(speech_request_of(&proxy, user, 5)).await, expected);
    }
    proxy.close().await;
}

#[tokio::test]
async fn a_client_with_a_quota_per_user_may_not_request_direct_access() {
    let proxy = start_proxy_with(plan(), configure_rules(user_quota("3 requests"))).await;
    let request = proxy.request(Method::POST, "/v1/single-use-token/realtime_scribe", CLIENT_TOKEN);
    let response = send(request.header("x-keychoir-user", user_id("alice"))).await;
    assert_status_and_code(&response, (403, "direct_access_not_allowed"));
    proxy.close().await;
}

#[tokio::test]
async fn a_user_quota_of_credits_ends_a_running_session() {
    let proxy = start_proxy_with(plan(), configure_rules(user_quota("40 credits"))).await;
    // A browser can name its user only in the query.
    let path = format!("{STREAM_INPUT}?x-keychoir-user={}", user_id("alice"));
    let mut session = handshake(&proxy, &path, &[("xi-api-key", CLIENT_TOKEN)]).await.unwrap();
    session.send_json(&json!({"text": " "})).await;
    for text in ["Sixteen so far. ", "This one takes the rest."] {
        session.send_json(&json!({"text": text, "flush": true})).await;
        assert!(session.receive_json().await["audio"].is_string(), "the text must be spoken: {text}");
    }
    session.send_json(&json!({"text": "This is too much. ", "flush": true})).await;
    let (messages, end) = session.receive_to_end().await;
    assert_eq!(messages.last().unwrap()["error"], "user_quota_exceeded");
    assert_eq!(end, Received::Close(1008, "This user has used its quota of credits.".to_owned()));
    drop(session);
    assert_status_and_code(&send(speech_request_of(&proxy, "alice", 1)).await, QUOTA_EXCEEDED);
    assert_status_and_code(&send(speech_request_of(&proxy, "bob", 40)).await, SERVED_BY_PROVIDER);
    let records = proxy.into_records().await;
    assert_eq!((records[0].verdict.as_str(), records[0].credits), ("user_quota_exceeded", 40));
}

#[tokio::test]
async fn sessions_count_against_a_user_quota_of_requests() {
    let proxy = start_proxy_with(plan(), configure_rules(user_quota("1 request"))).await;
    let user = user_id("alice");
    let headers = [("xi-api-key", CLIENT_TOKEN), ("x-keychoir-user", user.as_str())];
    let mut session = handshake(&proxy, AGENT, &headers).await.unwrap();
    session.receive_json().await;
    let (status, body) =
        handshake(&proxy, AGENT, &headers).await.err().expect("the second session must be refused");
    assert!(
        status == 402 && body.contains("user_quota_exceeded"),
        "the second session must be refused: {status} {body}"
    );
    session.close().await;
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_quota_per_user_that_is_set_later_counts_earlier_requests() {
    let first = start_proxy_with(plan(), configure_rules(Rules::default())).await;
    for _ in 0..2 {
        assert_status_and_code(&send(speech_request_of(&first, "alice", 5)).await, SERVED_BY_PROVIDER);
    }
    let (_, directory) = first.close().await;
    let second = start_proxy_in(directory, plan(), configure_rules(user_quota("3 requests"))).await;
    for expected in [SERVED_BY_PROVIDER, QUOTA_EXCEEDED] {
        assert_status_and_code(&send(speech_request_of(&second, "alice", 5)).await, expected);
    }
    second.close_unchecked().await;
}

#[tokio::test]
async fn users_are_counted_without_a_database_file() {
    let proxy = start_proxy_with(plan(), |config| {
        configure_rules(user_quota("2 requests"))(config);
        config.storage.ephemeral = true;
        config.access.max_cached_users = 1;
    })
    .await;
    for (user, expected) in [
        ("alice", SERVED_BY_PROVIDER),
        ("bob", SERVED_BY_PROVIDER),
        ("carol", SERVED_BY_PROVIDER),
        ("alice", SERVED_BY_PROVIDER),
        ("alice", QUOTA_EXCEEDED),
    ] {
        assert_status_and_code(&send(speech_request_of(&proxy, user, 5)).await, expected);
    }
    proxy.close_unchecked().await;
}
