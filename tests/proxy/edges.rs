//! Forwarding of headers and paths between client and provider, and the pages for browsers.

use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, TestProxy, assert_proxy_error, fixed_upstream, send_raw,
    start_proxy, start_proxy_with,
};
use keychoir::config::{ClientConfig, Config};
use keychoir::policy::client::Rules;
use keychoir::secret::TokenFingerprint;
use keychoir::simulator::Plan;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn plan() -> Plan {
    Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])
}

/// The response to a request of a target.
async fn asked(proxy: &TestProxy, method: &str, target: &str, headers: &str) -> String {
    let head = format!("{method} {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\r\n");
    send_raw(proxy, &head).await
}

/// The request headers that the provider received.
async fn seen(proxy: &TestProxy, headers: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut request = proxy.client.get(format!("{}/v1/simulator/echo", proxy.url));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let echo: Value = request.send().await.unwrap().json().await.unwrap();
    let pairs = echo["headers"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    pairs.map(|pair| (text(&pair[0]).to_ascii_lowercase(), text(&pair[1]))).collect()
}

fn value<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
}

/// A proxy whose upstream sends this response to every request.
async fn before(said: &str, change: impl FnOnce(&mut Config)) -> TestProxy {
    let url = fixed_upstream(said.as_bytes()).await;
    start_proxy_with(plan(), |config| {
        config.upstream.base_url = url;
        config.quota_polling.enabled = false;
        change(config);
    })
    .await
}

#[tokio::test]
async fn only_encodings_that_can_be_read_are_offered() {
    let proxy = start_proxy(plan()).await;
    for (written, offered) in [
        (Some("gzip, deflate, br, zstd"), Some("gzip, deflate")),
        (Some("br;q=1, gzip;q=0.5"), Some("gzip;q=0.5")),
        (Some("br"), Some("identity")),
        (Some("*"), Some("gzip, deflate")),
        (Some("deflate"), Some("deflate")),
        (None, None),
    ] {
        let headers: Vec<_> = written.iter().map(|written| ("accept-encoding", *written)).collect();
        assert_eq!(value(&seen(&proxy, &headers).await, "accept-encoding"), offered, "{written:?}");
    }
    proxy.close().await;
}

#[tokio::test]
async fn forwarding_headers_of_proxies_are_not_sent() {
    let said = [
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
    let headers = seen(&proxy, &[&said[..], &[("x-mine", "1"), ("traceparent", "00-1")]].concat()).await;
    for (name, _) in said {
        assert_eq!(value(&headers, &name.to_ascii_lowercase()), None, "{name}");
    }
    assert_eq!((value(&headers, "x-mine"), value(&headers, "traceparent")), (Some("1"), Some("00-1")));
    proxy.close().await;

    let listed = |config: &mut Config| {
        config.access.forward_headers = vec!["cf-ray".to_owned(), "x-real-ip".to_owned()];
    };
    let proxy = start_proxy_with(plan(), listed).await;
    let headers = seen(&proxy, &said).await;
    let kept: Vec<&str> = said
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| value(&headers, &name.to_ascii_lowercase()).is_some())
        .collect();
    assert_eq!(kept, ["CF-Ray", "x-real-ip"]);
    proxy.close().await;
}

#[tokio::test]
async fn an_ambiguous_path_is_refused_before_the_provider() {
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
            let answer = asked(&proxy, method, target, "").await;
            assert!(
                answer.starts_with("HTTP/1.1 400") && answer.contains("ambiguous_path"),
                "{target}: {answer}"
            );
        }
        let upgrade = "upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";
        let head =
            format!("GET {target} HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\n{upgrade}\r\n");
        let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut start = [0; 12];
        stream.read_exact(&mut start).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 400", "{target}");
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 0]);
    for target in ["/v1/simulator/echo/caf%C3%A9%20x", "/v1/simulator/echo/a+b,c", "//v1/simulator/echo"] {
        let answer = asked(&proxy, "GET", target, "").await;
        assert!(
            answer.starts_with("HTTP/1.1 200") || answer.starts_with("HTTP/1.1 404"),
            "{target}: {answer}"
        );
    }
    proxy.close().await;
}

#[tokio::test]
async fn response_headers_about_the_providers_origin_are_not_relayed() {
    let said = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nalt-svc: h3=\":443\"\r\nset-cookie: a=b\r\n\
        strict-transport-security: max-age=1\r\nnel: {}\r\nreport-to: {}\r\nexpect-ct: x\r\n\
        public-key-pins: x\r\nclear-site-data: \"*\"\r\nservice-worker-allowed: /\r\nrequest-id: r\r\n\r\n";
    let proxy = before(said, |_| {}).await;
    let answer = proxy.get("/v1/voices").await;
    let mut names: Vec<&str> = answer.headers().keys().map(http::HeaderName::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["content-length", "date", "request-id", "x-content-type-options", "x-request-id"]);
    proxy.close().await;
}

#[tokio::test]
async fn a_document_of_the_provider_runs_nothing_in_our_origin() {
    for (kind, is_active) in [
        ("text/html; charset=utf-8", true),
        ("application/xhtml+xml", true),
        ("image/svg+xml", true),
        ("text/xml", true),
        ("application/json", false),
    ] {
        for status in ["200 OK", "404 Not Found", "502 Bad Gateway"] {
            let said = format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: 2\r\n\r\nhi");
            let proxy = before(&said, |config| config.retry.max_attempts = 1).await;
            let answer = proxy.get("/v1/voices").await;
            let policy =
                answer.headers().get("content-security-policy").map(|policy| policy.to_str().unwrap());
            assert_eq!(policy, is_active.then_some("sandbox"), "{kind}");
            let is_sniffed = !answer.headers().contains_key("x-content-type-options");
            assert_eq!(is_sniffed, !is_active, "{kind}");
            proxy.close().await;
        }
    }
}

#[tokio::test]
async fn paths_that_browsers_request_everywhere_are_served_locally() {
    let proxy = start_proxy_with(plan(), |config| config.server.base_path = "/eleven".parse().unwrap()).await;
    for base in ["", "/eleven"] {
        for method in ["GET", "HEAD"] {
            let page = asked(&proxy, method, &format!("{base}/"), "").await.to_lowercase();
            assert!(page.starts_with("http/1.1 200") && page.contains("content-type: text/html"), "{page}");
            assert!(page.contains("content-security-policy: default-src 'none'"), "{page}");
            assert!(page.contains("cache-control: no-store") && page.contains("nosniff"), "{page}");
            assert_eq!(page.contains("/api/elevenlabs-status"), method == "GET", "{page}");
            assert!(
                asked(&proxy, method, &format!("{base}/favicon.ico"), "").await.starts_with("HTTP/1.1 204")
            );
            let robots = asked(&proxy, method, &format!("{base}/robots.txt"), "").await;
            assert!(robots.starts_with("HTTP/1.1 200") && robots.contains("nosniff"), "{robots}");
            assert_eq!(robots.contains("Disallow: /"), method == "GET");
        }
        assert!(
            asked(&proxy, "POST", &format!("{base}/"), "content-length: 0\r\n")
                .await
                .starts_with("HTTP/1.1 405")
        );
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_made_up_method_is_recorded_as_other_and_a_long_one_is_refused() {
    let proxy = start_proxy(plan()).await;
    assert!(asked(&proxy, "BREW", "/v1/simulator/echo", "").await.starts_with("HTTP/1.1 200"));
    let long = "A".repeat(20_000);
    let answer = asked(&proxy, &long, "/v1/simulator/echo", "").await;
    assert!(answer.starts_with("HTTP/1.1 501") && answer.contains("method_too_long"), "{answer}");
    let records = proxy.into_records().await;
    assert_eq!(records.iter().map(|record| record.method.as_str()).collect::<Vec<_>>(), ["other"]);
}

/// A request that fails at several steps gets the error of the first of them, and none is sent.
#[tokio::test]
async fn the_first_failing_step_decides_and_nothing_is_sent() {
    let proxy = start_proxy_with(Plan::of([(FIRST_KEY, 1_000)]), |config| {
        let rules = Rules { paths: vec!["/v1/text-to-speech".to_owned()], ..Rules::default() };
        let token = TokenFingerprint::new(CLIENT_TOKEN);
        config.clients = vec![ClientConfig { name: "app".to_owned(), token, rules }];
    })
    .await;
    const WRONG: &str = "a-token-that-no-client-has";
    // Each path but the last fails at a later step, too.
    for (token, path, status, code) in [
        (WRONG, "/v1/workspaces/api-keys;x", 401, "client_token_wrong"),
        (CLIENT_TOKEN, "/v1/workspaces/api-keys;x", 400, "ambiguous_path"),
        (CLIENT_TOKEN, "/v1/workspaces/api-keys", 403, "path_denied"),
        (CLIENT_TOKEN, "/v1/sound-generation", 403, "path_not_allowed"),
    ] {
        let request = proxy.client.post(format!("{}{path}", proxy.url)).header("xi-api-key", token);
        let answer = request.json(&json!({"text": "a".repeat(2_000)})).send().await.unwrap();
        assert_proxy_error(&answer, status, code);
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [0]);
    proxy.close().await;
}

/// A record of the attempt is certain before the provider is asked.
#[tokio::test]
async fn a_request_whose_usage_record_cannot_be_queued_is_not_sent() {
    let proxy =
        start_proxy_with(Plan::of([(FIRST_KEY, 100_000)]), |config| config.storage.max_queued_records = 1)
            .await;
    let other = rusqlite::Connection::open(proxy.database()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut served = 0;
    let refused = loop {
        let answer = proxy.request_speech(1).await;
        if answer.status() != 200 {
            break answer;
        }
        answer.bytes().await.unwrap();
        served += 1;
        assert!(served < 1_000, "no request is refused");
    };
    assert_proxy_error(&refused, 503, "usage_queue_full");
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [served]);
    other.execute_batch("ROLLBACK").unwrap();
    proxy.wait_until_served("/v1/voices").await;
    proxy.close_unchecked().await;
}
