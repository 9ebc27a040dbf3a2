//! Tests the relay of raw upstream responses: the client receives the same response as without the proxy, can detect a
//! truncated response, and receives a 502 instead of an invalid one. A GET without a response is sent once more.

use crate::support::{FIRST_KEY, SECOND_KEY, TestProxy, bind_loopback, start_proxy_with};
use keychoir::simulator::Plan;
use keychoir::tasks::Tasks;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The end of a connection by the upstream after its response.
#[derive(Clone, Copy)]
enum ConnectionEnd {
    Close,
    Reset,
}

/// Starts a proxy whose upstream sends `upstream_response` to every request.
async fn start_proxy_with_response(upstream_response: Vec<u8>, end: ConnectionEnd) -> TestProxy {
    start_proxy_and_upstream(upstream_response, end).await.0
}

/// Starts the same proxy as [`start_proxy_with_response`], and also returns the base URL of its upstream. The upstream
/// serves one request per connection and one connection after the other.
async fn start_proxy_and_upstream(upstream_response: Vec<u8>, end: ConnectionEnd) -> (TestProxy, String) {
    let listener = bind_loopback().await;
    let url = format!("http://{}", listener.local_addr().unwrap());
    Tasks::new().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            // The proxy may close the connection before it has read the whole response.
            let _ = stream.write_all(&upstream_response).await;
            if matches!(end, ConnectionEnd::Reset) {
                stream.set_zero_linger().unwrap();
            }
        }
    });
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 100), (SECOND_KEY, 100)]), |config| {
        config.upstream.base_url = url.parse().unwrap();
        config.quota_polling.enabled = false;
    })
    .await;
    (proxy, url)
}

/// Sends a request. Returns all bytes that the client receives until the connection ends.
async fn send_and_read_to_end(proxy: &TestProxy, method: &str) -> String {
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    let request = format!("{method} /v1/voices HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = Vec::new();
    // The connection may end with a reset. Only the bytes before the reset matter.
    let _ = stream.read_to_end(&mut response).await;
    String::from_utf8_lossy(&response).into_owned()
}

/// Sends one POST through a proxy whose upstream sends `upstream_response`. Returns the client's response and the
/// recorded verdict.
async fn response_and_verdict(upstream_response: &str) -> (String, String) {
    let proxy = start_proxy_with_response(upstream_response.as_bytes().to_vec(), ConnectionEnd::Close).await;
    let response = send_and_read_to_end(&proxy, "POST").await;
    let verdicts: Vec<String> = proxy.into_records().await.into_iter().map(|record| record.verdict).collect();
    assert_eq!(verdicts.len(), 1, "a POST must be sent once");
    (response, verdicts[0].clone())
}

/// Asserts that the client receives a complete response with the given `headers` and `body`.
async fn check_complete(upstream_response: &str, headers: &[&str], body: &str) {
    let (response, verdict) = response_and_verdict(upstream_response).await;
    let (head, rest) = response.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "the response must be served: {response}");
    for header in headers {
        assert!(head.contains(header), "the response must have the header {header:?}: {response}");
    }
    assert_eq!(rest, body, "{upstream_response}: the body must be relayed");
    assert_eq!(verdict, "served", "{upstream_response}: the attempt must be recorded as served");
}

#[tokio::test]
async fn a_complete_response_is_relayed_completely() {
    check_complete("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", &["content-length: 2"], "ok").await;
    let chunks = "2\r\nok\r\n0\r\n\r\n";
    let chunked = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunks}");
    check_complete(&chunked, &["transfer-encoding: chunked"], chunks).await;
    let trailers = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 1\r\n\r\n";
    check_complete(trailers, &["transfer-encoding: chunked"], chunks).await;
    // The chunked encoding takes precedence over a content length.
    let both_lengths =
        format!("HTTP/1.1 200 OK\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n{chunks}");
    check_complete(&both_lengths, &["transfer-encoding: chunked"], chunks).await;
}

#[tokio::test]
async fn the_http_version_of_the_upstream_is_not_relayed() {
    check_complete("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", &["content-length: 2"], "ok").await;
}

#[tokio::test]
async fn informational_responses_are_not_relayed() {
    let early = "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n".repeat(1_000);
    check_complete(&format!("{early}HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"), &[], "ok").await;
}

/// Asserts that the client can detect the truncation, and that the usage record reports it.
async fn check_truncated(upstream_response: &str) {
    let (response, verdict) = response_and_verdict(upstream_response).await;
    assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "the head must be relayed: {response}");
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    let is_truncated = match head.split_once("content-length: ") {
        Some((_, length)) => body.len() < length.split("\r\n").next().unwrap().parse::<usize>().unwrap(),
        None => head.contains("transfer-encoding: chunked") && !body.ends_with("0\r\n\r\n"),
    };
    assert!(is_truncated, "the response must not end cleanly: {response}");
    assert_eq!(verdict, "upstream_reset", "{upstream_response}: the attempt must be recorded as truncated");
}

#[tokio::test]
async fn a_truncated_response_does_not_end_cleanly() {
    check_truncated("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf").await;
    check_truncated("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
    check_truncated("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n8\r\nsec").await;
    check_truncated("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\nzz\r\n").await;
}

#[tokio::test]
async fn an_invalid_response_is_a_502_without_a_cooldown() {
    let huge_header =
        format!("HTTP/1.1 200 OK\r\nx-huge: {}\r\ncontent-length: 2\r\n\r\nok", "a".repeat(1 << 20));
    let many_headers =
        format!("HTTP/1.1 200 OK\r\n{}content-length: 2\r\n\r\nok", "x-one: 1\r\n".repeat(10_000));
    for upstream_response in [
        "",
        "HTTP/1.1 2",
        "SSH-2.0-OpenSSH_9.2\r\n\r\n",
        "HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        "HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nok",
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nx",
        &huge_header,
        &many_headers,
    ] {
        for end in [ConnectionEnd::Close, ConnectionEnd::Reset] {
            let proxy = start_proxy_with_response(upstream_response.as_bytes().to_vec(), end).await;
            let response = send_and_read_to_end(&proxy, "POST").await;
            let case = &upstream_response[..upstream_response.len().min(60)];
            assert!(
                response.starts_with("HTTP/1.1 502 "),
                "{case}: the client must receive a 502: {response}"
            );
            assert!(response.contains("\"request_id\""), "the error must contain the request id: {response}");
            assert_eq!(proxy.key_statuses().await, ["active", "active"], "{case}: the keys must stay active");
            let records = proxy.into_records().await;
            assert_eq!(records.len(), 1, "{case}: a POST must be sent once");
            assert_eq!(
                (&*records[0].verdict, &*records[0].credits_from),
                ("no_response", "free"),
                "{case}: the attempt must be recorded without a charge"
            );
        }
    }
}

#[tokio::test]
async fn a_get_is_sent_once_more_after_a_closed_connection() {
    let proxy = start_proxy_with_response(Vec::new(), ConnectionEnd::Close).await;
    let response = send_and_read_to_end(&proxy, "GET").await;
    assert!(response.starts_with("HTTP/1.1 502 "), "the client must receive a 502: {response}");
    assert_eq!(proxy.into_records().await.len(), 2);
}

/// The parts of a response that the proxy must not change.
#[derive(Debug, PartialEq)]
struct ComparableResponse {
    status: u16,
    headers: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
}

/// Sends a request to `url`, which is the base URL of the proxy or of its upstream.
async fn fetch_comparable_response(proxy: &TestProxy, method: &str, url: &str) -> ComparableResponse {
    let request = proxy.client.request(method.parse().unwrap(), format!("{url}/v1/voices?a=1"));
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    // Hop-by-hop headers, headers about the provider's origin, and headers that the proxy adds.
    const IGNORED_HEADERS: [&str; 7] = [
        "connection",
        "transfer-encoding",
        "date",
        "x-request-id",
        "set-cookie",
        "alt-svc",
        "x-content-type-options",
    ];
    let headers = response.headers().iter().filter(|(name, _)| !IGNORED_HEADERS.contains(&name.as_str()));
    let mut headers: Vec<_> =
        headers.map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect();
    // The order of headers with different names is irrelevant (RFC 9110, section 5.3).
    headers.sort_by(|(first, _), (second, _)| first.cmp(second));
    ComparableResponse { status, headers, body: response.bytes().await.unwrap().to_vec() }
}

#[tokio::test]
async fn a_response_is_the_same_with_and_without_the_proxy() {
    let gzip = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b\x08\x00";
    let mut upstream_responses = vec![gzip.to_vec()];
    for upstream_response in [
        "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 200 Fine\r\nset-cookie: a=1\r\nset-cookie: b=2\r\nvary: a\r\nvary: b\r\ncontent-length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nX-Upper: A  b \r\nx-empty:\r\ncontent-length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n3\r\n{}\n\r\n3\r\n{}\n\r\n0\r\n\r\n",
        "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes 1-2/9\r\naccept-ranges: bytes\r\ncontent-length: 2\r\n\r\nok",
        "HTTP/1.1 204 No Content\r\nx-a: 1\r\n\r\n",
        "HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\ncache-control: max-age=1\r\n\r\n",
        "HTTP/1.1 302 Found\r\nlocation: https://elsewhere.example/\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 404 Not Found\r\ncontent-length: 22\r\n\r\n{\"detail\":\"Not Found\"}",
        "HTTP/1.1 418 Teapot\r\ncontent-length: 2\r\n\r\nno",
        "HTTP/1.1 422 Unprocessable\r\ncontent-length: 13\r\n\r\n{\"detail\":[]}",
        "HTTP/1.1 507 Full\r\nretry-after: 9\r\ncontent-length: 2\r\n\r\nno",
        "HTTP/1.1 200 OK\r\naccess-control-allow-origin: *\r\nalt-svc: h3=\":443\"\r\ncontent-length: 2\r\n\r\nok",
    ] {
        upstream_responses.push(upstream_response.as_bytes().to_vec());
    }
    for upstream_response in upstream_responses {
        let case = String::from_utf8_lossy(&upstream_response).into_owned();
        let (proxy, upstream) = start_proxy_and_upstream(upstream_response, ConnectionEnd::Close).await;
        for method in ["GET", "POST", "PATCH", "BREW"] {
            let (direct, proxied) = (
                fetch_comparable_response(&proxy, method, &upstream).await,
                fetch_comparable_response(&proxy, method, &proxy.url).await,
            );
            assert_eq!(direct, proxied, "{method}: the proxy must not change the response {case}");
        }
        proxy.close().await;
    }
}

#[tokio::test]
async fn the_response_to_a_head_request_has_the_content_length_of_the_body() {
    let upstream_response = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nx-a: 1\r\n\r\n".to_vec();
    let (proxy, upstream) = start_proxy_and_upstream(upstream_response, ConnectionEnd::Close).await;
    let (direct, proxied) = (
        fetch_comparable_response(&proxy, "HEAD", &upstream).await,
        fetch_comparable_response(&proxy, "HEAD", &proxy.url).await,
    );
    assert_eq!(direct, proxied);
    assert_eq!(proxied.body, b"", "the response to a HEAD request must have no body");
    proxy.close().await;
}
