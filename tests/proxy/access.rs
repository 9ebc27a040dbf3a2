//! Malformed requests as raw bytes: bad heads and bodies are refused, the connection is closed, and
//! nothing of them reaches the provider.

use crate::support::{FIRST_KEY, SECOND_KEY, TestProxy, start_proxy, start_proxy_with, wait_until};
use keychoir::simulator::Plan;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn fresh() -> TestProxy {
    start_proxy(Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])).await
}

/// Sends bytes and reads until the server closes the connection.
async fn raw(proxy: &TestProxy, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    // A server that has refused need not read on.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// The request is refused once with this status, the connection is closed, and the provider
/// receives nothing.
async fn check_refused(requests: &[&str], status: &str) {
    let proxy = fresh().await;
    let before = proxy.simulator.ledger().totals.requests;
    for request in requests {
        // The following bytes must not be parsed as a second request.
        let smuggled = format!("{request}GET /v1/voices HTTP/1.1\r\nhost: localhost\r\n\r\n");
        let answer = raw(&proxy, smuggled.as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {answer:?}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{request:?}: {answer:?}");
    }
    assert_eq!(proxy.simulator.ledger().totals.requests, before, "nothing reaches the provider");
    assert_eq!(proxy.key_statuses().await, ["active", "active"]);
    proxy.close().await;
}

#[tokio::test]
async fn a_request_has_one_host() {
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

/// The status line and headers of the response in lower case, for a request with these headers.
async fn visited(proxy: &TestProxy, method: &str, headers: &str) -> String {
    let request = format!("{method} /v1/voices HTTP/1.1\r\nconnection: close\r\n{headers}\r\n");
    let answer = raw(proxy, request.as_bytes()).await;
    answer.split("\r\n\r\n").next().unwrap().to_ascii_lowercase()
}

#[tokio::test]
async fn foreign_origins_and_hosts_are_refused() {
    let proxy = fresh().await;
    for (headers, status, code) in [
        ("host: rebound.example\r\n", "421", "host_not_allowed"),
        ("host: localhost\r\norigin: https://evil.example\r\n", "403", "origin_not_allowed"),
        ("host: localhost\r\norigin: null\r\n", "403", "origin_not_allowed"),
        ("host: localhost\r\nsec-fetch-site: cross-site\r\n", "403", "origin_not_allowed"),
    ] {
        let answer = visited(&proxy, "GET", headers).await;
        assert!(answer.starts_with(&format!("http/1.1 {status} ")), "{headers}: {answer}");
        assert!(answer.contains(&format!("x-keychoir-error: {code}")), "{answer}");
        assert!(!answer.contains("access-control-allow-origin"), "{answer}");
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn listed_pages_may_ask_and_read() {
    let proxy = start_proxy_with(Plan::of([(FIRST_KEY, 100_000)]), |config| {
        config.access.origins = vec!["https://app.example".to_owned()];
    })
    .await;
    let page = "host: localhost\r\norigin: https://app.example\r\n";
    let asked = format!(
        "{page}access-control-request-method: POST\r\naccess-control-request-headers: xi-api-key\r\n"
    );
    let permitted = visited(&proxy, "OPTIONS", &asked).await;
    assert!(permitted.starts_with("http/1.1 204 "), "{permitted}");
    assert!(permitted.contains("access-control-allow-headers: xi-api-key"), "{permitted}");
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [0], "the provider is not asked for that");
    for method in ["GET", "PUT"] {
        let answer = visited(&proxy, method, page).await;
        assert_eq!(answer.matches("access-control-allow-origin: https://app.example").count(), 1, "{answer}");
        assert_eq!(answer.matches("access-control-allow-origin").count(), 1, "{answer}");
        assert!(answer.contains("request-id, history-item-id"), "{answer}");
    }
    proxy.close().await;
}

#[tokio::test]
async fn a_target_with_its_own_authority_is_fine_and_http_1_0_needs_none() {
    let proxy = fresh().await;
    for request in [
        "GET http://localhost/v1/voices HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        "GET /v1/voices HTTP/1.0\r\n\r\n",
    ] {
        let answer = raw(&proxy, request.as_bytes()).await;
        assert!(answer.contains(" 200 "), "{answer}");
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [2]);
    proxy.close().await;
}

#[tokio::test]
async fn a_body_has_one_length() {
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
async fn a_head_is_made_of_plain_lines() {
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
async fn a_head_that_never_ends_is_cut() {
    let proxy = fresh().await;
    let endless = format!("GET /v1/voices HTTP/1.1\r\nhost: localhost\r\nx: {}", "a".repeat(200_000));
    assert!(raw(&proxy, endless.as_bytes()).await.starts_with("HTTP/1.1 431 "));
    proxy.close().await;
}

#[tokio::test]
async fn broken_chunks_are_the_clients_fault() {
    let proxy = fresh().await;
    for chunks in
        ["5\r\nhelloXX", "zz\r\nhello\r\n", "5\r\nhel", "-5\r\nhello\r\n0\r\n\r\n", "5;\0\r\nhello\r\n"]
    {
        let request = format!(
            "POST /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n{chunks}"
        );
        let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer);
        // An interim 100 may precede the response.
        let answer = answer.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n").unwrap_or(&answer);
        // A client that has closed its write half may get no response; it never gets one of the
        // provider.
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400 "), "{chunks:?}: {answer}");
    }
    assert_eq!(proxy.key_statuses().await, ["active", "active"]);
    let ledger = proxy.simulator.ledger();
    assert!(ledger.requests_to("/v1/simulator/echo").all(|request| request.status.is_none()), "{ledger:?}");
    proxy.close().await;
}

#[tokio::test]
async fn trailers_of_a_request_are_not_forwarded() {
    let proxy = fresh().await;
    let request = format!(
        "POST /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\
         trailer: xi-api-key\r\n\r\n5\r\nhello\r\n0\r\nxi-api-key: {}\r\n\r\n",
        crate::support::CLIENT_TOKEN
    );
    let answer = raw(&proxy, request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.contains("\"body_bytes\":5"), "{answer}");
    proxy.close().await;
}

#[tokio::test]
async fn no_text_of_a_client_ends_a_log_line() {
    let proxy = fresh().await;
    for id in ["a b", "a\tb", "a\u{e9}b", "<script>", &"x".repeat(129)] {
        let request = format!(
            "GET /v1/service-accounts HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-request-id: {id}\r\n\r\n"
        );
        let answer = raw(&proxy, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 403 ") && !answer.contains(id), "{answer}");
    }
    proxy.close().await;
}

#[tokio::test]
async fn everything_is_served_below_a_base_path_as_well() {
    let proxy = start_proxy_with(Plan::of([(FIRST_KEY, 100_000)]), |config| {
        config.server.base_path = "/eleven/labs".parse().unwrap();
    })
    .await;
    for path in ["/eleven/labs/v1/voices?a=1", "/v1/voices?a=1", "/eleven/labs/v1/v1/voices?a=1"] {
        assert_eq!(proxy.get(path).await.status(), 200, "{path}");
    }
    for path in ["/eleven/labs/livez", "/livez", "/eleven/labs/api/elevenlabs-status"] {
        assert_eq!(proxy.get(path).await.status(), 200, "{path}");
    }
    let (ledger, _) = proxy.close().await;
    let asked: Vec<&str> = ledger.requests.iter().map(|request| &*request.path_and_query).collect();
    assert!(asked.ends_with(&["/v1/voices?a=1"; 3]), "{asked:?}");
}

#[tokio::test]
async fn requests_beyond_the_maximum_are_refused_at_once() {
    let proxy =
        start_proxy_with(Plan::of([(FIRST_KEY, 100_000)]), |config| config.server.max_requests = 1).await;
    proxy.set_fault(FIRST_KEY, "stall=3600s");
    let mut first = TcpStream::connect(proxy.app.address()).await.unwrap();
    first.write_all(b"GET /v1/voices HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    wait_until(|| proxy.simulator.ledger().totals.in_flight == 1).await;
    let second = proxy.get("/v1/voices").await;
    assert_eq!((second.status().as_u16(), second.headers()["retry-after"].to_str().unwrap()), (503, "1"));
    assert_eq!(second.headers()["x-keychoir-error"], "overloaded");
    assert_eq!(proxy.get("/livez").await.status(), 200, "our own pages take no place");
    drop(first);
    wait_until(|| proxy.simulator.ledger().totals.in_flight == 0).await;
    proxy.simulator.always(FIRST_KEY, None);
    proxy.wait_until_served("/v1/voices").await;
    proxy.close().await;
}
