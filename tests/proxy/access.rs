//! Tests the checks before a request is forwarded: its syntax, size, framing, host, origin and request id, the base
//! path, forwarding loops, the maximum number of requests, and the queue of usage records. A request that fails several
//! checks receives the error of the first one. The provider receives no refused request, except the beginning of a body
//! whose later chunks are malformed. Web pages of allowed origins and unusual but valid requests are served.

use std::time::Duration;

use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, TestProxy, assert_proxy_error, bind_loopback,
    client_config, start_proxy, start_proxy_with, wait_until,
};
use keychoir::app::{self, AppConfig, DrainOutcome};
use keychoir::config::Config;
use keychoir::policy::client::Rules;
use keychoir::secret::ApiKey;
use keychoir::simulator::Plan;
use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn start_proxy_with_two_keys() -> TestProxy {
    start_proxy(Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])).await
}

/// Sends bytes, and returns the bytes that the proxy sends until it closes the connection.
async fn exchange_bytes(proxy: &TestProxy, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    // The proxy may stop reading after a refusal.
    let _ = stream.write_all(request).await;
    let mut response = Vec::new();
    let _ = stream.read_to_end(&mut response).await;
    String::from_utf8_lossy(&response).into_owned()
}

/// Asserts that each request is refused once with the given `status`, that the connection is closed, that the provider
/// receives no request, and that all keys stay active.
async fn check_refused(requests: &[&str], status: &str) {
    let proxy = start_proxy_with_two_keys().await;
    let requests_before = proxy.simulator.ledger().totals.requests;
    for request in requests {
        // The bytes after the refused request must not be parsed as a second request.
        let bytes = format!("{request}GET /v1/voices HTTP/1.1\r\nhost: localhost\r\n\r\n");
        let response = exchange_bytes(&proxy, bytes.as_bytes()).await;
        assert!(
            response.starts_with(&format!("HTTP/1.1 {status} ")),
            "{request:?} must be refused with {status}: {response:?}"
        );
        assert_eq!(
            response.matches("HTTP/1.1").count(),
            1,
            "{request:?} must receive exactly one response: {response:?}"
        );
    }
    assert_eq!(
        proxy.simulator.ledger().totals.requests,
        requests_before,
        "the provider must receive no request"
    );
    assert_eq!(proxy.key_statuses().await, ["active", "active"]);
    proxy.close().await;
}

#[tokio::test]
async fn a_request_without_exactly_one_host_is_refused() {
    check_refused(
        &[
            "GET /v1/voices HTTP/1.1\r\n\r\n",
            "GET /v1/voices HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n",
            "GET /v1/voices HTTP/1.1\r\nhost: localhost\r\nHost: elsewhere.example\r\n\r\n",
            "GET http://elsewhere.example/v1/voices HTTP/1.1\r\nhost: localhost\r\n\r\n",
            "GET https://elsewhere.example/v1/voices HTTP/1.1\r\nhost: localhost\r\n\r\n",
        ],
        "400",
    )
    .await;
}

/// Sends a request with the given `headers`. Returns the head of the response in lower case.
async fn response_head(proxy: &TestProxy, method: &str, headers: &str) -> String {
    let request = format!("{method} /v1/voices HTTP/1.1\r\nconnection: close\r\n{headers}\r\n");
    let response = exchange_bytes(proxy, request.as_bytes()).await;
    response.split("\r\n\r\n").next().unwrap().to_ascii_lowercase()
}

#[tokio::test]
async fn foreign_origins_and_hosts_are_refused() {
    let proxy = start_proxy_with_two_keys().await;
    for (headers, status, code) in [
        ("host: rebound.example\r\n", "421", "host_not_allowed"),
        ("host: localhost\r\norigin: https://evil.example\r\n", "403", "origin_not_allowed"),
        ("host: localhost\r\norigin: null\r\n", "403", "origin_not_allowed"),
        ("host: localhost\r\nsec-fetch-site: cross-site\r\n", "403", "origin_not_allowed"),
    ] {
        let response = response_head(&proxy, "GET", headers).await;
        assert!(
            response.starts_with(&format!("http/1.1 {status} ")),
            "a request with {headers:?} must be refused with {status}: {response}"
        );
        assert!(
            response.contains(&format!("x-keychoir-error: {code}")),
            "the response must have the error code {code}: {response}"
        );
        assert!(
            !response.contains("access-control-allow-origin"),
            "the response must not contain `access-control-allow-origin`: {response}"
        );
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn pages_of_allowed_origins_may_send_requests_and_read_responses() {
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 100_000)]), |config| {
        config.access.origins = vec!["https://app.example".to_owned()];
    })
    .await;
    let page_headers = "host: localhost\r\norigin: https://app.example\r\n";
    let preflight_headers = format!(
        "{page_headers}access-control-request-method: POST\r\naccess-control-request-headers: xi-api-key\r\n"
    );
    let preflight = response_head(&proxy, "OPTIONS", &preflight_headers).await;
    assert!(
        preflight.starts_with("http/1.1 204 "),
        "the preflight response must start with `http/1.1 204`: {preflight}"
    );
    assert!(
        preflight.contains("access-control-allow-headers: xi-api-key"),
        "the preflight response must contain `access-control-allow-headers: xi-api-key`: {preflight}"
    );
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [0], "the proxy must answer a preflight request itself");
    for method in ["GET", "PUT"] {
        let response = response_head(&proxy, method, page_headers).await;
        assert_eq!(
            response.matches("access-control-allow-origin: https://app.example").count(),
            1,
            "the response must allow the origin exactly once: {response}"
        );
        assert_eq!(
            response.matches("access-control-allow-origin").count(),
            1,
            "the response must allow no other origin: {response}"
        );
        assert!(
            response.contains("request-id, history-item-id"),
            "the response must expose the headers of the provider: {response}"
        );
    }
    proxy.close().await;
}

#[tokio::test]
async fn an_absolute_target_is_served_and_http_1_0_requires_no_host() {
    let proxy = start_proxy_with_two_keys().await;
    for request in [
        "GET http://localhost/v1/voices HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        "GET /v1/voices HTTP/1.0\r\n\r\n",
    ] {
        let response = exchange_bytes(&proxy, request.as_bytes()).await;
        assert!(response.contains(" 200 "), "the request must be served: {response}");
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [2]);
    proxy.close().await;
}

#[tokio::test]
async fn a_body_without_exactly_one_length_is_refused() {
    let framings = [
        "content-length: 5\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 5\r\n",
        "transfer-encoding: chunked, chunked\r\n",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: identity, chunked\r\n",
        "transfer-encoding: chunked, identity\r\n",
        "transfer-encoding: identity\r\n",
        "transfer-encoding: gzip, chunked\r\n",
        "transfer-encoding: gzip\r\n",
        "transfer-encoding: xchunked\r\n",
        "transfer-encoding: \"chunked\"\r\n",
        "transfer-encoding: chunked;q=1\r\n",
        "transfer-encoding:\r\n",
        "transfer-encoding : chunked\r\n",
        "content-length: 5\r\ncontent-length: 6\r\n",
        "content-length: 5, 6\r\n",
        "content-length: +5\r\n",
        "content-length: -5\r\n",
        "content-length: 5 5\r\n",
        "content-length: 0x5\r\n",
        "content-length: 5.0\r\n",
        "content-length:\r\n",
        "content-length : 5\r\n",
        "content-length: 99999999999999999999999\r\n",
    ];
    let requests: Vec<String> = framings
        .iter()
        .map(|framing| format!("POST /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\n{framing}\r\n"))
        .collect();
    check_refused(&requests.iter().map(String::as_str).collect::<Vec<_>>(), "400").await;
}

#[tokio::test]
async fn a_malformed_head_is_refused() {
    check_refused(
        &[
            "GET /v1/voices HTTP/1.1\r\nhost: localhost\r\n folded: 1\r\n\r\n",
            "GET /v1/voices HTTP/1.1\r\nhost: localhost\r\nx: a\rb\r\n\r\n",
            "GET /v1/voices HTTP/1.1\r\nhost: localhost\r\nx: a\0b\r\n\r\n",
            "GET /v1/voices HTTP/1.1\r\nhost: localhost\r\nx y: 1\r\n\r\n",
            "GET /v1/voi ces HTTP/1.1\r\nhost: localhost\r\n\r\n",
            "GET /v1/voices HTTP/3.0\r\nhost: localhost\r\n\r\n",
            "nonsense\r\n\r\n",
        ],
        "400",
    )
    .await;
}

#[tokio::test]
async fn a_head_beyond_the_maximum_size_is_refused() {
    let proxy = start_proxy_with_two_keys().await;
    let request = format!("GET /v1/voices HTTP/1.1\r\nhost: localhost\r\nx: {}", "a".repeat(200_000));
    assert!(exchange_bytes(&proxy, request.as_bytes()).await.starts_with("HTTP/1.1 431 "));
    proxy.close().await;
}

#[tokio::test]
async fn malformed_chunks_are_refused_and_affect_no_key() {
    let proxy = start_proxy_with_two_keys().await;
    for chunks in
        ["5\r\nhelloXX", "zz\r\nhello\r\n", "5\r\nhel", "-5\r\nhello\r\n0\r\n\r\n", "5;\0\r\nhello\r\n"]
    {
        let request = format!(
            "POST /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n{chunks}"
        );
        let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut response_bytes = Vec::new();
        let _ = stream.read_to_end(&mut response_bytes).await;
        let responses = String::from_utf8_lossy(&response_bytes);
        // An interim response may precede the final one.
        let response = responses.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n").unwrap_or(&responses);
        // The client has closed its write half, so it may receive no response. It must not receive a response of the
        // provider.
        assert!(
            response.is_empty() || response.starts_with("HTTP/1.1 400 "),
            "{chunks:?} must receive an error or no response: {response}"
        );
    }
    assert_eq!(proxy.key_statuses().await, ["active", "active"]);
    let ledger = proxy.simulator.ledger();
    assert!(
        ledger.requests_to("/v1/simulator/echo").all(|request| request.status.is_none()),
        "no request with malformed chunks must be served: {ledger:?}"
    );
    proxy.close().await;
}

#[tokio::test]
async fn trailers_of_a_request_are_not_forwarded() {
    let proxy = start_proxy_with_two_keys().await;
    let request = format!(
        "POST /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\
         trailer: xi-api-key\r\n\r\n5\r\nhello\r\n0\r\nxi-api-key: {CLIENT_TOKEN}\r\n\r\n"
    );
    let response = exchange_bytes(&proxy, request.as_bytes()).await;
    assert!(response.starts_with("HTTP/1.1 200 "), "the request must be served: {response}");
    assert!(
        response.contains("\"body_bytes\":5"),
        "the provider must receive the body without the trailer: {response}"
    );
    proxy.close().await;
}

#[tokio::test]
async fn an_invalid_request_id_of_a_client_is_not_used() {
    let proxy = start_proxy_with_two_keys().await;
    for id in ["a b", "a\tb", "a\u{e9}b", "<script>", &"x".repeat(129)] {
        let request = format!(
            "GET /v1/service-accounts HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-request-id: {id}\r\n\r\n"
        );
        let response = exchange_bytes(&proxy, request.as_bytes()).await;
        assert!(
            response.starts_with("HTTP/1.1 403 ") && !response.contains(id),
            "the request must be refused, and the response must not contain its request id: {response}"
        );
    }
    proxy.close().await;
}

#[tokio::test]
async fn all_paths_are_served_with_and_without_the_base_path() {
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 100_000)]), |config| {
        config.server.base_path = "/eleven/labs".parse().unwrap();
    })
    .await;
    for path in ["/eleven/labs/v1/voices?a=1", "/v1/voices?a=1", "/eleven/labs/v1/v1/voices?a=1"] {
        assert_eq!(proxy.get(path).await.status(), 200, "{path}: the request must be served");
    }
    for path in ["/eleven/labs/livez", "/livez", "/eleven/labs/api/elevenlabs-status"] {
        assert_eq!(proxy.get(path).await.status(), 200, "{path}: the request must be served");
    }
    let (ledger, _) = proxy.close().await;
    let paths: Vec<&str> = ledger.requests.iter().map(|request| &*request.path_and_query).collect();
    assert!(
        paths.ends_with(&["/v1/voices?a=1"; 3]),
        "every path must be forwarded in the same form: {paths:?}"
    );
}

#[tokio::test]
async fn requests_beyond_the_maximum_are_refused_immediately() {
    let proxy =
        start_proxy_with(Plan::with_keys([(FIRST_KEY, 100_000)]), |config| config.server.max_requests = 1)
            .await;
    proxy.set_fault(FIRST_KEY, "stall=3600s");
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    stream.write_all(b"GET /v1/voices HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    wait_until(|| proxy.simulator.ledger().totals.in_flight == 1).await;
    let refused_response = proxy.get("/v1/voices").await;
    assert_eq!(refused_response.headers()["retry-after"], "1");
    assert_proxy_error(&refused_response, 503, "overloaded");
    assert_eq!(proxy.get("/livez").await.status(), 200, "the limit must not apply to the pages of the proxy");
    drop(stream);
    wait_until(|| proxy.simulator.ledger().totals.in_flight == 0).await;
    proxy.simulator.set_fault(FIRST_KEY, None);
    proxy.wait_until_served("/v1/voices").await;
    proxy.close().await;
}

#[tokio::test]
async fn a_request_that_the_proxy_sent_to_itself_is_refused_with_508() {
    let directory = tempfile::tempdir().unwrap();
    let listener = bind_loopback().await;
    // The upstream of the proxy is the proxy itself. `keychoir check` cannot detect such a loop if it leads through a
    // host name or a gateway.
    let url = format!("http://{}", listener.local_addr().unwrap());
    let keys = vec![ApiKey::new(FIRST_KEY).unwrap()];
    let mut config = Config::with_defaults(keys, url.parse().unwrap());
    config.storage.path = directory.path().join("keychoir.db");
    config.quota_polling.enabled = false;
    config.server.drain_idle_timeout = Duration::ZERO;
    let app = app::start(AppConfig::from_config(config).unwrap(), vec![listener.into()]).unwrap();
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    for request in
        [client.get(format!("{url}/v1/voices")), client.post(format!("{url}/v1/dubbing")).body("x")]
    {
        let response = request.header("xi-api-key", "any").send().await.unwrap();
        assert_eq!(response.status(), 508);
        assert!(response.text().await.unwrap().contains("leads back"));
    }
    assert_eq!(app.drain(Duration::from_secs(10)).await, DrainOutcome::Completed);
}

#[tokio::test]
async fn a_request_that_fails_several_checks_gets_the_error_of_the_first_and_is_not_sent() {
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 1_000)]), |config| {
        let paths = vec!["/v1/text-to-speech".to_owned()];
        let (quota, user_quota) = ("0 requests".parse().ok(), "3 requests".parse().ok());
        let rules = Rules { paths, quota, user_quota, ..Rules::default() };
        config.clients = vec![client_config("app", CLIENT_TOKEN, rules)];
    })
    .await;
    const WRONG_TOKEN: &str = "a-token-that-no-client-has";
    // Each request except the last also fails a later check.
    for (token, user, path, status, code) in [
        (WRONG_TOKEN, Some(""), "/v1/workspaces/api-keys;x", 401, "client_token_wrong"),
        (CLIENT_TOKEN, Some(""), "/v1/workspaces/api-keys;x", 400, "invalid_user"),
        (CLIENT_TOKEN, None, "/v1/workspaces/api-keys;x", 400, "ambiguous_path"),
        (CLIENT_TOKEN, None, "/v1/workspaces/api-keys", 403, "path_denied"),
        (CLIENT_TOKEN, None, "/v1/sound-generation", 403, "path_not_allowed"),
        (CLIENT_TOKEN, None, SPEECH_PATH, 400, "user_required"),
        (CLIENT_TOKEN, Some("alice"), SPEECH_PATH, 402, "client_quota_exceeded"),
    ] {
        let request = proxy.request(Method::POST, path, token);
        let request = match user {
            Some(user) => request.header("x-keychoir-user", user),
            None => request,
        };
        let response = request.json(&json!({"text": "a".repeat(2_000)})).send().await.unwrap();
        assert_proxy_error(&response, status, code);
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [0]);
    proxy.close().await;
}

/// The proxy reserves the space for the usage record of an attempt before it sends the request.
#[tokio::test]
async fn a_request_whose_usage_record_cannot_be_queued_is_not_sent() {
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 100_000)]), |config| {
        config.storage.max_queued_records = 1
    })
    .await;
    let locking_connection = rusqlite::Connection::open(proxy.database_path()).unwrap();
    locking_connection.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut served_count = 0;
    let refused_response = loop {
        let response = proxy.request_speech(1).await;
        if response.status() != 200 {
            break response;
        }
        response.bytes().await.unwrap();
        served_count += 1;
        assert!(served_count < 1_000, "a request must be refused when the queue of usage records is full");
    };
    assert_proxy_error(&refused_response, 503, "usage_queue_full");
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [served_count]);
    locking_connection.execute_batch("ROLLBACK").unwrap();
    proxy.wait_until_served("/v1/voices").await;
    proxy.close_unchecked().await;
}
