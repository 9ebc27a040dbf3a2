//! Responses of an upstream, byte by byte: the client receives the whole response, or sees that it
//! broke.

use crate::support::{FIRST_KEY, SECOND_KEY, TestProxy, bind_loopback, start_proxy_with};
use keychoir::simulator::Plan;
use keychoir::tasks::Tasks;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How the upstream ends a connection after its response.
#[derive(Clone, Copy)]
enum End {
    Close,
    Reset,
}

/// A proxy whose upstream sends `said` to every request.
async fn before(said: Vec<u8>, end: End) -> TestProxy {
    before_at(said, end).await.0
}

/// The same, with the address of the upstream, which accepts one request after the other, each on a
/// connection of its own.
async fn before_at(said: Vec<u8>, end: End) -> (TestProxy, String) {
    let listener = bind_loopback().await;
    let url = format!("http://{}", listener.local_addr().unwrap());
    Tasks::new().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            // The proxy may close before it has read all.
            let _ = stream.write_all(&said).await;
            if matches!(end, End::Reset) {
                stream.set_zero_linger().unwrap();
            }
        }
    });
    let proxy = start_proxy_with(Plan::of([(FIRST_KEY, 100), (SECOND_KEY, 100)]), |config| {
        config.upstream.base_url = url.parse().unwrap();
        config.quota_polling.enabled = false;
    })
    .await;
    (proxy, url)
}

/// All bytes that a client reads until the connection ends.
async fn heard(proxy: &TestProxy, method: &str) -> String {
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    let request = format!("{method} /v1/voices HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A reset after the response is an end as well: only the bytes before it count.
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// The recorded verdict of one request whose response is `said`, and the client's response.
async fn relayed(said: &str) -> (String, String) {
    let proxy = before(said.as_bytes().to_vec(), End::Close).await;
    let answer = heard(&proxy, "POST").await;
    let verdicts: Vec<String> = proxy.into_records().await.into_iter().map(|record| record.verdict).collect();
    assert_eq!(verdicts.len(), 1, "a POST is sent once");
    (answer, verdicts[0].clone())
}

/// The client receives the whole response, and it ends cleanly.
async fn check_whole(said: &str, headers: &[&str], body: &str) {
    let (answer, verdict) = relayed(said).await;
    let (head, rest) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    for header in headers {
        assert!(head.contains(header), "{answer}");
    }
    assert_eq!(rest, body, "{said}");
    assert_eq!(verdict, "served", "{said}");
}

#[tokio::test]
async fn a_response_is_relayed_whole() {
    check_whole("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", &["content-length: 2"], "ok").await;
    let chunks = "2\r\nok\r\n0\r\n\r\n";
    let chunked = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunks}");
    check_whole(&chunked, &["transfer-encoding: chunked"], chunks).await;
    let trailers = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 1\r\n\r\n";
    check_whole(trailers, &["transfer-encoding: chunked"], chunks).await;
    // If both lengths are given, the chunks count.
    let both = format!("HTTP/1.1 200 OK\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n{chunks}");
    check_whole(&both, &["transfer-encoding: chunked"], chunks).await;
}

#[tokio::test]
async fn the_version_of_the_other_connection_stays_there() {
    check_whole("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", &["content-length: 2"], "ok").await;
}

#[tokio::test]
async fn informational_responses_are_not_relayed() {
    let early = "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n".repeat(1_000);
    check_whole(&format!("{early}HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"), &[], "ok").await;
}

/// The client sees that the response is incomplete, and the usage record has that verdict.
async fn check_broken(said: &str) {
    let (answer, verdict) = relayed(said).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let is_cut = match head.split_once("content-length: ") {
        Some((_, length)) => body.len() < length.split("\r\n").next().unwrap().parse::<usize>().unwrap(),
        None => head.contains("transfer-encoding: chunked") && !body.ends_with("0\r\n\r\n"),
    };
    assert!(is_cut, "it ended cleanly: {answer}");
    assert_eq!(verdict, "upstream_reset", "{said}");
}

#[tokio::test]
async fn a_broken_response_does_not_end_cleanly() {
    check_broken("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf").await;
    check_broken("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
    check_broken("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n8\r\nsec").await;
    check_broken("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\nzz\r\n").await;
}

#[tokio::test]
async fn an_invalid_response_is_a_502_without_a_cooldown() {
    let huge = format!("HTTP/1.1 200 OK\r\nx-huge: {}\r\ncontent-length: 2\r\n\r\nok", "a".repeat(1 << 20));
    let many = format!("HTTP/1.1 200 OK\r\n{}content-length: 2\r\n\r\nok", "x-one: 1\r\n".repeat(10_000));
    for said in [
        "",
        "HTTP/1.1 2",
        "SSH-2.0-OpenSSH_9.2\r\n\r\n",
        "HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        "HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nok",
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nx",
        &huge,
        &many,
    ] {
        for end in [End::Close, End::Reset] {
            let proxy = before(said.as_bytes().to_vec(), end).await;
            let answer = heard(&proxy, "POST").await;
            let shown = &said[..said.len().min(60)];
            assert!(answer.starts_with("HTTP/1.1 502 "), "{shown}: {answer}");
            assert!(answer.contains("\"request_id\""), "{answer}");
            assert_eq!(proxy.key_statuses().await, ["active", "active"], "{shown}");
            let records = proxy.into_records().await;
            assert_eq!(records.len(), 1, "{shown}: a POST is sent once");
            assert_eq!((&*records[0].verdict, &*records[0].credits_from), ("no_response", "free"), "{shown}");
        }
    }
}

#[tokio::test]
async fn a_request_without_effect_is_sent_once_more() {
    let proxy = before(Vec::new(), End::Close).await;
    let answer = heard(&proxy, "GET").await;
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    assert_eq!(proxy.into_records().await.len(), 2);
}

/// Status, headers without those of the connection and the request id, and body.
async fn seen(proxy: &TestProxy, method: &str, url: &str) -> (u16, Vec<(String, Vec<u8>)>, Vec<u8>) {
    let request = proxy.client.request(method.parse().unwrap(), format!("{url}/v1/voices?a=1"));
    let answer = request.send().await.unwrap();
    let status = answer.status().as_u16();
    // Headers of this hop, of the provider's origin, and for responses without a type.
    const OURS: [&str; 7] = [
        "connection",
        "transfer-encoding",
        "date",
        "x-request-id",
        "set-cookie",
        "alt-svc",
        "x-content-type-options",
    ];
    let headers = answer.headers().iter().filter(|(name, _)| !OURS.contains(&name.as_str()));
    let mut headers: Vec<_> =
        headers.map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect();
    // The order of headers with different names is irrelevant (RFC 9110, section 5.3).
    headers.sort_by(|(one, _), (other, _)| one.cmp(other));
    (status, headers, answer.bytes().await.unwrap().to_vec())
}

#[tokio::test]
async fn a_response_is_the_same_with_and_without_the_proxy() {
    let gzip = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b\x08\x00";
    let mut answers = vec![gzip.to_vec()];
    for said in [
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
        answers.push(said.as_bytes().to_vec());
    }
    for said in answers {
        let shown = String::from_utf8_lossy(&said).into_owned();
        let (proxy, upstream) = before_at(said, End::Close).await;
        for method in ["GET", "POST", "PATCH", "BREW"] {
            let (beside, through) =
                (seen(&proxy, method, &upstream).await, seen(&proxy, method, &proxy.url).await);
            assert_eq!(beside, through, "{method}: {shown}");
        }
        proxy.close().await;
    }
}

#[tokio::test]
async fn the_response_to_a_head_has_the_length_of_the_body() {
    let said = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nx-a: 1\r\n\r\n".to_vec();
    let (proxy, upstream) = before_at(said, End::Close).await;
    let (beside, through) = (seen(&proxy, "HEAD", &upstream).await, seen(&proxy, "HEAD", &proxy.url).await);
    assert_eq!(beside, through);
    assert_eq!(through.2, b"");
    proxy.close().await;
}
