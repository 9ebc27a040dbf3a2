//! Tests the forwarding between client and provider: which request headers, response headers, content codings, paths
//! and methods are forwarded, changed, dropped or refused. Also tests the sandbox of documents with scripts, and the
//! paths that the proxy serves itself.

use crate::support::{
    FIRST_KEY, SECOND_KEY, TestProxy, send_raw, start_fixed_upstream, start_proxy, start_proxy_with,
};
use keychoir::config::Config;
use keychoir::simulator::Plan;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn plan() -> Plan {
    Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])
}

/// Sends a request and returns the response.
async fn send_request(proxy: &TestProxy, method: &str, target: &str, headers: &str) -> String {
    let head = format!("{method} {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\r\n");
    send_raw(proxy, &head).await
}

/// Sends a request with the given `headers`. Returns the headers that the provider received, with names in lower case.
async fn upstream_headers(proxy: &TestProxy, headers: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut request = proxy.client.get(format!("{}/v1/simulator/echo", proxy.url));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let echo: Value = request.send().await.unwrap().json().await.unwrap();
    let pairs = echo["headers"].as_array().unwrap().iter();
    let string = |value: &Value| value.as_str().unwrap().to_owned();
    pairs.map(|pair| (string(&pair[0]).to_ascii_lowercase(), string(&pair[1]))).collect()
}

/// Returns the value of the first header with this name, which must be in lower case.
fn header_value<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
}

/// Starts a proxy whose upstream sends `response` to every request.
async fn start_proxy_with_upstream_response(response: &str, change: impl FnOnce(&mut Config)) -> TestProxy {
    let url = start_fixed_upstream(response.as_bytes()).await;
    start_proxy_with(plan(), |config| {
        config.upstream.base_url = url;
        config.quota_polling.enabled = false;
        change(config);
    })
    .await
}

#[tokio::test]
async fn only_encodings_that_the_proxy_can_decode_are_offered_to_the_provider() {
    let proxy = start_proxy(plan()).await;
    for (accepted, offered) in [
        (Some("gzip, deflate, br, zstd"), Some("gzip, deflate")),
        (Some("br;q=1, gzip;q=0.5"), Some("gzip;q=0.5")),
        (Some("br"), Some("identity")),
        (Some("*"), Some("gzip, deflate")),
        (Some("deflate"), Some("deflate")),
        (None, None),
    ] {
        let headers: Vec<_> = accepted.iter().map(|accepted| ("accept-encoding", *accepted)).collect();
        let received_headers = upstream_headers(&proxy, &headers).await;
        assert_eq!(
            header_value(&received_headers, "accept-encoding"),
            offered,
            "{accepted:?}: only encodings that the proxy decodes must be offered"
        );
    }
    proxy.close().await;
}

#[tokio::test]
async fn headers_of_proxies_in_front_of_keychoir_are_not_forwarded() {
    let client_headers = [
        ("cf-connecting-ip", "1.2.3.4"),
        ("CF-Ray", "x"),
        ("x-forwarded-for", "1.2.3.4"),
        ("x-forwarded-host", "h"),
        ("forwarded", "for=1.2.3.4"),
        ("x-real-ip", "1.2.3.4"),
        ("true-client-ip", "1.2.3.4"),
        ("cdn-loop", "cloudflare"),
        ("via", "1.1 x"),
        ("x-original-url", "/v1/user"),
        ("x-rewrite-url", "/v1/user"),
        ("x-http-method-override", "DELETE"),
        ("x-envoy-external-address", "1.2.3.4"),
        ("x-amzn-trace-id", "x"),
        ("fastly-client-ip", "1.2.3.4"),
        ("x-cloud-trace-context", "x"),
    ];
    let proxy = start_proxy(plan()).await;
    let other_headers = [("x-mine", "1"), ("traceparent", "00-1")];
    let headers = upstream_headers(&proxy, &[&client_headers[..], &other_headers].concat()).await;
    for (name, _) in client_headers {
        assert_eq!(header_value(&headers, &name.to_ascii_lowercase()), None, "{name} must not be forwarded");
    }
    for (name, value) in other_headers {
        assert_eq!(header_value(&headers, name), Some(value), "{name} must be forwarded unchanged");
    }
    proxy.close().await;

    let forward_some_headers = |config: &mut Config| {
        config.access.forward_headers = vec!["cf-ray".to_owned(), "x-real-ip".to_owned()];
    };
    let proxy = start_proxy_with(plan(), forward_some_headers).await;
    let headers = upstream_headers(&proxy, &client_headers).await;
    let forwarded: Vec<&str> = client_headers
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| header_value(&headers, &name.to_ascii_lowercase()).is_some())
        .collect();
    assert_eq!(forwarded, ["CF-Ray", "x-real-ip"]);
    proxy.close().await;
}

#[tokio::test]
async fn an_ambiguous_path_is_refused_and_not_forwarded() {
    let proxy = start_proxy(plan()).await;
    for target in [
        "/v1/voices/..;/service-accounts",
        "/v1/voices/%2e%2e/service-accounts",
        "/v1/voices/../service-accounts",
        "/v1/voices%2f..%2fservice-accounts",
        "/v1/%252e%252e/service-accounts",
        "/v1/voices\\..\\x",
        "/v1/a%00",
        "/v1/%c0%ae%c0%ae/x",
        "/v1/a//b",
        "/v1/service-accounts;x",
        "/v1/voices%23x",
        "http://localhost/v1/%2e%2e/x",
    ] {
        for method in ["GET", "POST", "DELETE"] {
            let response = send_request(&proxy, method, target, "").await;
            assert!(
                response.starts_with("HTTP/1.1 400") && response.contains("ambiguous_path"),
                "{target}: the path must be refused as ambiguous: {response}"
            );
        }
        let upgrade = "upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";
        let head =
            format!("GET {target} HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\n{upgrade}\r\n");
        let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut status_line_start = [0; 12];
        stream.read_exact(&mut status_line_start).await.unwrap();
        assert_eq!(&status_line_start, b"HTTP/1.1 400", "{target}: the upgrade must be refused");
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 0]);
    // These paths are unambiguous, so the provider decides whether they exist.
    for target in ["/v1/simulator/echo/caf%C3%A9%20x", "/v1/simulator/echo/a+b,c", "//v1/simulator/echo"] {
        let response = send_request(&proxy, "GET", target, "").await;
        assert!(
            response.starts_with("HTTP/1.1 200") || response.starts_with("HTTP/1.1 404"),
            "{target}: the response must have the status 200 or 404 of the provider: {response}"
        );
    }
    proxy.close().await;
}

#[tokio::test]
async fn response_headers_about_the_providers_origin_are_not_relayed() {
    let upstream_response = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nalt-svc: h3=\":443\"\r\nset-cookie: a=b\r\n\
        strict-transport-security: max-age=1\r\nnel: {}\r\nreport-to: {}\r\nexpect-ct: x\r\n\
        public-key-pins: x\r\nclear-site-data: \"*\"\r\nservice-worker-allowed: /\r\nrequest-id: r\r\n\r\n";
    let proxy = start_proxy_with_upstream_response(upstream_response, |_| {}).await;
    let response = proxy.get("/v1/voices").await;
    let mut names: Vec<&str> = response.headers().keys().map(http::HeaderName::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["content-length", "date", "request-id", "x-content-type-options", "x-request-id"]);
    proxy.close().await;
}

#[tokio::test]
async fn documents_with_scripts_are_sandboxed_by_the_proxy() {
    for (media_type, has_scripts) in [
        ("text/html; charset=utf-8", true),
        ("application/xhtml+xml", true),
        ("image/svg+xml", true),
        ("text/xml", true),
        ("application/json", false),
    ] {
        for status in ["200 OK", "404 Not Found", "502 Bad Gateway"] {
            let upstream_response =
                format!("HTTP/1.1 {status}\r\ncontent-type: {media_type}\r\ncontent-length: 2\r\n\r\nhi");
            let proxy = start_proxy_with_upstream_response(&upstream_response, |config| {
                config.retry.max_attempts = 1
            })
            .await;
            let response = proxy.get("/v1/voices").await;
            let policy =
                response.headers().get("content-security-policy").map(|policy| policy.to_str().unwrap());
            assert_eq!(
                policy,
                has_scripts.then_some("sandbox"),
                "{media_type}: only a document with scripts must have a sandbox"
            );
            let has_nosniff = response.headers().contains_key("x-content-type-options");
            assert_eq!(
                has_nosniff, has_scripts,
                "{media_type}: only a document with scripts must have the header `x-content-type-options`"
            );
            proxy.close().await;
        }
    }
}

#[tokio::test]
async fn paths_that_browsers_request_by_default_are_served_by_the_proxy() {
    let proxy = start_proxy_with(plan(), |config| config.server.base_path = "/eleven".parse().unwrap()).await;
    for base in ["", "/eleven"] {
        for method in ["GET", "HEAD"] {
            let page = send_request(&proxy, method, &format!("{base}/"), "").await.to_lowercase();
            assert!(
                page.starts_with("http/1.1 200") && page.contains("content-type: text/html"),
                "the response must be an HTML page: {page}"
            );
            assert!(
                page.contains("content-security-policy: default-src 'none'"),
                "the page must have a content security policy: {page}"
            );
            assert!(
                page.contains("cache-control: no-store") && page.contains("nosniff"),
                "the page must have the headers `cache-control` and `x-content-type-options`: {page}"
            );
            assert_eq!(
                page.contains("/api/elevenlabs-status"),
                method == "GET",
                "only a GET must receive the content of the page: {page}"
            );
            let favicon = send_request(&proxy, method, &format!("{base}/favicon.ico"), "").await;
            assert!(favicon.starts_with("HTTP/1.1 204"), "the response must have the status 204: {favicon}");
            let robots = send_request(&proxy, method, &format!("{base}/robots.txt"), "").await;
            assert!(
                robots.starts_with("HTTP/1.1 200") && robots.contains("nosniff"),
                "the proxy must serve robots.txt: {robots}"
            );
            assert_eq!(robots.contains("Disallow: /"), method == "GET");
        }
        let refused_response =
            send_request(&proxy, "POST", &format!("{base}/"), "content-length: 0\r\n").await;
        assert!(
            refused_response.starts_with("HTTP/1.1 405"),
            "another method must be refused: {refused_response}"
        );
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn an_unknown_method_is_recorded_as_other_and_a_long_method_is_refused() {
    let proxy = start_proxy(plan()).await;
    assert!(send_request(&proxy, "BREW", "/v1/simulator/echo", "").await.starts_with("HTTP/1.1 200"));
    let long_method = "A".repeat(20_000);
    let response = send_request(&proxy, &long_method, "/v1/simulator/echo", "").await;
    assert!(
        response.starts_with("HTTP/1.1 501") && response.contains("method_too_long"),
        "a long method must be refused: {response}"
    );
    let records = proxy.into_records().await;
    assert_eq!(records.iter().map(|record| record.method.as_str()).collect::<Vec<_>>(), ["other"]);
}
