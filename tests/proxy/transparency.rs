//! Tests that requests and responses are forwarded unchanged and without delay, except for credentials, hop-by-hop
//! headers and repeated or missing version segments of a path. Disconnects and truncations are forwarded as well.
//! Blocked endpoints and methods, clients without a valid token, and an unreachable upstream receive an error of the
//! proxy.

use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, TestProxy, send_raw, start_proxy, start_proxy_with,
    wait_until,
};
use keychoir::config::ClientConfig;
use keychoir::policy::client::Rules;
use keychoir::secret::TokenFingerprint;
use keychoir::simulator::Plan;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

fn plan() -> Plan {
    Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])
}

/// Sends a raw request with this request line and `headers`. Returns the request as the provider received it.
async fn fetch_echo(proxy: &TestProxy, request_line: &str, headers: &str) -> Value {
    let response = send_raw(
        proxy,
        &format!("{request_line} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\r\n"),
    )
    .await;
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "the echo must be served: {response}");
    let body = if head.contains("chunked") { decode_chunks(body) } else { body.to_owned() };
    serde_json::from_str(&body).unwrap()
}

/// Returns the content of a chunked body.
fn decode_chunks(body: &str) -> String {
    let mut remaining_body = body;
    let mut decoded_body = String::new();
    while let Some((size, after)) = remaining_body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        decoded_body.push_str(&after[..size]);
        remaining_body = after[size..].trim_start_matches("\r\n");
        if size == 0 {
            break;
        }
    }
    decoded_body
}

/// Returns the values of a header that the provider received.
fn header_values(echo: &Value, name: &str) -> Vec<String> {
    let headers = echo["headers"].as_array().unwrap();
    let pairs = headers.iter().map(|pair| (pair[0].as_str().unwrap(), pair[1].as_str().unwrap()));
    pairs.filter(|(header, _)| header.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).collect()
}

#[tokio::test]
async fn path_and_query_are_forwarded_unchanged() {
    let proxy = start_proxy(plan()).await;
    for target in [
        "/v1/simulator/echo?a=1&a=%20&a=+&b&=&c=%2F",
        "/v1/simulator/echo?",
        "/v1/simulator/echo?token=t&single_use_token=s",
    ] {
        assert_eq!(fetch_echo(&proxy, &format!("GET {target}"), "").await["path_and_query"], target);
    }
    proxy.close().await;
}

#[tokio::test]
async fn any_method_but_trace_and_connect_is_forwarded() {
    let proxy = start_proxy(plan()).await;
    for method in ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"] {
        assert_eq!(fetch_echo(&proxy, &format!("{method} /v1/simulator/echo"), "").await["method"], method);
    }
    for request_line in ["TRACE /v1/simulator/echo", "CONNECT example.com:443"] {
        let response = send_raw(
            &proxy,
            &format!("{request_line} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"),
        )
        .await;
        assert!(response.starts_with("HTTP/1.1 405"), "the method must be refused: {response}");
    }
    proxy.close().await;
}

#[tokio::test]
async fn no_credential_of_a_client_reaches_the_provider() {
    let proxy = start_proxy(plan()).await;
    let headers = format!(
        "xi-api-key: {CLIENT_TOKEN}\r\nxi-api-key: {CLIENT_TOKEN}2\r\nxi_api_key: {CLIENT_TOKEN}\r\n\
         authorization: Bearer {CLIENT_TOKEN}\r\nproxy-authorization: Basic {CLIENT_TOKEN}\r\n\
         cookie: session={CLIENT_TOKEN}\r\nconnection: xi-api-key, content-length, host\r\n"
    );
    let target = format!("GET /v1/simulator/echo?xi_api_key={CLIENT_TOKEN}&a=1&xi%2Dapi-key={CLIENT_TOKEN}");
    let echo = fetch_echo(&proxy, &target, &headers).await;
    assert_eq!(echo["path_and_query"], "/v1/simulator/echo?a=1");
    assert_eq!(header_values(&echo, "xi-api-key").len(), 1);
    for name in ["authorization", "proxy-authorization", "cookie", "xi_api_key", "connection"] {
        assert_eq!(header_values(&echo, name), Vec::<String>::new(), "{name} must not be forwarded");
    }
    // `close` asserts that the simulator has not received the token.
    proxy.close().await;
}

#[tokio::test]
async fn headers_of_the_sdk_are_forwarded() {
    let proxy = start_proxy(plan()).await;
    let echo = fetch_echo(
        &proxy,
        "GET /v1/simulator/echo",
        "User-Agent: elevenlabs/2.78.0\r\nX-Fern-Language: Python\r\nsafety-identifier: s\r\naccept-encoding: gzip\r\n",
    )
    .await;
    assert_eq!(header_values(&echo, "user-agent"), ["elevenlabs/2.78.0"]);
    assert_eq!(header_values(&echo, "x-fern-language"), ["Python"]);
    assert_eq!(header_values(&echo, "safety-identifier"), ["s"]);
    assert_eq!(header_values(&echo, "accept-encoding"), ["gzip"]);
    assert_eq!(header_values(&echo, "host"), [proxy.simulator.address().to_string()]);
    proxy.close().await;
}

#[tokio::test]
async fn the_response_headers_of_the_provider_are_relayed() {
    let proxy = start_proxy(plan()).await;
    let response = proxy.request_speech(12).await;
    let headers = response.headers();
    for name in ["request-id", "history-item-id", "character-cost", "content-type", "x-request-id"] {
        assert!(headers.contains_key(name), "{name} must be relayed");
    }
    assert_eq!(headers["character-cost"], "12");
    assert!(!headers.contains_key("x-keychoir-error"));
    proxy.close().await;
}

#[tokio::test]
async fn the_request_id_of_the_client_is_kept() {
    let proxy = start_proxy(plan()).await;
    let request = proxy.client.get(format!("{}/v1/voices", proxy.url)).header("x-request-id", "mine-1");
    assert_eq!(request.send().await.unwrap().headers()["x-request-id"], "mine-1");
    let records = proxy.into_records().await;
    assert_eq!(records[0].request_id, "mine-1");
}

#[tokio::test]
async fn a_response_is_streamed_as_it_arrives() {
    let proxy = start_proxy(plan()).await;
    // The pause between two chunks of the provider is longer than the test.
    proxy.set_fault(FIRST_KEY, "slow_body=3600s");
    let mut response = proxy.post(&format!("{SPEECH_PATH}/stream"), &json!({"text": "a".repeat(100)})).await;
    assert!(
        !response.chunk().await.unwrap().unwrap().is_empty(),
        "the first chunk must be relayed before the second one arrives"
    );
}

#[tokio::test]
async fn a_truncated_response_is_truncated_for_the_client() {
    let proxy = start_proxy(plan()).await;
    proxy.set_fault(FIRST_KEY, "cut=2000");
    let response = proxy.request_speech(100).await;
    assert_eq!(response.status(), 200);
    assert!(response.bytes().await.is_err(), "a truncated response must not look complete");
    let records = proxy.into_records().await;
    assert_eq!((&*records[0].verdict, records[0].credits), ("upstream_reset", 100));
}

#[tokio::test]
async fn the_request_is_cancelled_when_the_client_disconnects() {
    let proxy = start_proxy(plan()).await;
    proxy.set_fault(FIRST_KEY, "stall=3600s");
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    let body = r#"{"text":"hello"}"#;
    let request = format!(
        "POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    wait_until(|| proxy.simulator.ledger().totals.in_flight == 1).await;
    drop(stream);
    wait_until(|| proxy.simulator.ledger().totals.in_flight == 0).await;
    let records = proxy.into_records().await;
    assert_eq!((records.len(), &*records[0].verdict, records[0].credits), (1, "client_closed", 0));
}

#[tokio::test]
async fn admin_endpoints_are_blocked() {
    let proxy = start_proxy(plan()).await;
    let response = proxy.post("/v1/workspaces/api-keys/disable?api_key_name=self", &json!({})).await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()["x-keychoir-error"]),
        (403, &"path_denied".parse().unwrap())
    );
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn only_clients_with_a_valid_token_are_served() {
    let app = ClientConfig::new("app".to_owned(), TokenFingerprint::new(CLIENT_TOKEN), Rules::default());
    let proxy = start_proxy_with(plan(), |config| config.clients = vec![app]).await;
    assert_eq!(proxy.request_speech(5).await.status(), 200);
    for (request, code) in [
        (proxy.client.get(format!("{}/v1/voices", proxy.url)), "client_token_missing"),
        (
            proxy.client.get(format!("{}/v1/voices", proxy.url)).header("xi-api-key", "wrong"),
            "client_token_wrong",
        ),
        (proxy.client.get(format!("{}/api/elevenlabs-status", proxy.url)), "client_token_missing"),
    ] {
        let response = request.send().await.unwrap();
        assert_eq!(
            (response.status().as_u16(), response.headers()["x-keychoir-error"].to_str().unwrap()),
            (401, code)
        );
    }
    assert_eq!(proxy.get("/livez").await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [1, 0]);
    let records = proxy.into_records().await;
    assert_eq!((records.len(), &*records[0].client), (1, "app"));
}

#[tokio::test]
async fn an_unreachable_upstream_is_reported() {
    let proxy = start_proxy_with(plan(), |config| {
        let unused_address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        config.upstream.base_url = format!("http://{unused_address}").parse().unwrap();
    })
    .await;
    let response = proxy.request_speech(5).await;
    assert_eq!(
        (response.status().as_u16(), response.headers()["x-keychoir-error"].to_str().unwrap()),
        (502, "upstream_unreachable")
    );
    assert_eq!(
        proxy.key_statuses().await,
        ["active", "active"],
        "an unreachable upstream must not affect the keys"
    );
    assert_eq!(proxy.get("/readyz").await.status(), 200);
    proxy.close().await;
}

#[tokio::test]
async fn paths_with_two_versions_or_without_one_are_served() {
    let proxy = start_proxy(plan()).await;
    for path in ["/v1/v1/voices", "/voices", "/v1/v2/voices", "/user/subscription"] {
        assert_eq!(proxy.get(path).await.status(), 200, "{path}: the request must be served");
    }
    let (ledger, _) = proxy.close().await;
    let paths: Vec<&str> = ledger.requests.iter().map(|request| &*request.path_and_query).collect();
    let expected = ["/v1/voices", "/v1/voices", "/v2/voices", "/v1/user/subscription"];
    assert!(paths.ends_with(&expected), "each path must have one version: {paths:?}");
}
