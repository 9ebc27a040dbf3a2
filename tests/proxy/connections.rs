//! Ends of client connections: an early refusal is received, a truncated response is recognizable,
//! and HTTP/2 is refused with advice.

use std::io::ErrorKind;

use std::time::Duration;

use crate::support::{FIRST_KEY, TestProxy, assert_proxy_error, bind_loopback, join_all, start_proxy_with};
use keychoir::app::{self, AppConfig, DrainOutcome};
use keychoir::config::{ClientConfig, Config};
use keychoir::secret::{ApiKey, TokenFingerprint};
use keychoir::simulator::Plan;
use keychoir::tasks::Tasks;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// A proxy with one client.
async fn with_client() -> TestProxy {
    let client = ClientConfig {
        name: "app".into(),
        token: TokenFingerprint::new("its-token"),
        rules: Default::default(),
    };
    start_proxy_with(Plan::of([(FIRST_KEY, 1_000)]), |config| config.clients = vec![client]).await
}

/// Sends a whole upload without a token and only then reads; returns the response, or the error
/// instead.
async fn upload(proxy: &TestProxy, framing: &str, pieces: usize, pause: Duration) -> String {
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    let head = format!("POST /v1/speech-to-text HTTP/1.1\r\nhost: localhost\r\n{framing}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..pieces {
        let piece = [b"10000\r\n".to_vec(), vec![b'a'; 0x10000], b"\r\n".to_vec()].concat();
        if let Err(error) = stream.write_all(&piece).await {
            return format!("writing: {error}");
        }
        sleep(pause).await;
    }
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer).await {
        Ok(_) => String::from_utf8(answer).unwrap(),
        Err(error) => format!("reading: {error}"),
    }
}

#[tokio::test]
async fn clients_of_refused_uploads_receive_the_response() {
    let proxy = with_client().await;
    let (none, some) = (Duration::ZERO, Duration::from_millis(1));
    let fast = (0..50).map(|_| upload(&proxy, "transfer-encoding: chunked", 60, none));
    let fast = join_all(fast).await;
    let slow = (0..50).map(|_| upload(&proxy, "content-length: 9999999", 60, some));
    let slow = join_all(slow).await;
    for answer in fast.iter().chain(&slow) {
        assert!(answer.starts_with("HTTP/1.1 401 ") && answer.contains("client_token_missing"), "{answer}");
    }
    proxy.close().await;
}

/// A proxy whose upstream sends `response` and closes.
async fn with_upstream_response(response: &'static str) -> TestProxy {
    let listener = bind_loopback().await;
    let url = format!("http://{}", listener.local_addr().unwrap());
    Tasks::new().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let _ = stream.write_all(response.as_bytes()).await;
        }
    });
    start_proxy_with(Plan::of([(FIRST_KEY, 100)]), |config| {
        config.upstream.base_url = url.parse().unwrap();
        config.quota_polling.enabled = false;
    })
    .await
}

/// A proxy whose upstream passes its connections to the test after their head was read.
async fn with_held_upstream() -> (mpsc::UnboundedReceiver<TcpStream>, TestProxy) {
    let listener = bind_loopback().await;
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, receiver) = mpsc::unbounded_channel();
    Tasks::new().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            if sender.send(stream).is_err() {
                return;
            }
        }
    });
    let proxy = start_proxy_with(Plan::of([(FIRST_KEY, 100)]), |config| {
        config.upstream.base_url = url.parse().unwrap();
        config.upstream.max_idle_connections = 0;
        config.quota_polling.enabled = false;
    })
    .await;
    (receiver, proxy)
}

/// The response to an HTTP/1.0 client, and whether the connection ends cleanly.
async fn http_1_0_client(proxy: &TestProxy, method: &str) -> (String, Result<(), ErrorKind>) {
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    let request = format!("{method} /v1/voices HTTP/1.0\r\nhost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let ended = stream.read_to_end(&mut answer).await.map(drop).map_err(|error| error.kind());
    (String::from_utf8(answer).unwrap(), ended)
}

#[tokio::test]
async fn a_truncated_response_to_http_1_0_ends_with_a_reset() {
    for (rest, is_complete) in
        [("4\r\nhalf\r\n", false), ("4\r\nhalf\r\n8\r\nsec", false), ("4\r\nhalf\r\n0\r\n\r\n", true)]
    {
        let response = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{rest}");
        let proxy = with_upstream_response(response.leak()).await;
        for method in ["GET", "POST"] {
            let (answer, ended) = http_1_0_client(&proxy, method).await;
            assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
            assert_eq!(ended, if is_complete { Ok(()) } else { Err(ErrorKind::ConnectionReset) }, "{rest:?}");
        }
        proxy.close_unchecked().await;
    }
}

#[tokio::test]
async fn a_response_without_a_body_to_http_1_0_is_complete() {
    let proxy = with_upstream_response("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
    let (answer, ended) = http_1_0_client(&proxy, "HEAD").await;
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
    assert_eq!(ended, Ok(()));
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_truncated_refusal_has_its_head_and_no_clean_end() {
    let part = "a".repeat(240);
    for (framing, part) in [
        ("content-length: 5000", part.clone()),
        ("transfer-encoding: chunked", format!("f0\r\n{part}\r\n")),
        // The same without a byte of the body.
        ("content-length: 5000", String::new()),
        ("transfer-encoding: chunked", String::new()),
    ] {
        let proxy =
            with_upstream_response(format!("HTTP/1.1 401 Unauthorized\r\n{framing}\r\n\r\n{part}").leak())
                .await;
        for _ in 0..20 {
            let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
            stream.write_all(b"POST /v1/voices HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            let answer = String::from_utf8(answer).unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").expect("a whole head");
            assert!(head.starts_with("HTTP/1.1 401 "), "{answer}");
            assert!(body.len() < 5000 && !body.ends_with("0\r\n\r\n"), "it ended cleanly: {answer}");
        }
        proxy.close_unchecked().await;
    }
}

#[tokio::test]
async fn a_body_in_an_unsupported_transfer_coding_is_a_502() {
    for coding in ["gzip, chunked", "something", "chunked, gzip"] {
        let proxy = with_upstream_response(
            format!("HTTP/1.1 200 OK\r\ntransfer-encoding: {coding}\r\n\r\nabc").leak(),
        )
        .await;
        let answer = proxy.get("/v1/voices").await;
        assert_proxy_error(&answer, 502, "upstream_reset");
        proxy.close_unchecked().await;
    }
}

#[tokio::test]
async fn requests_in_a_loop_are_refused_with_508() {
    let folder = tempfile::tempdir().unwrap();
    let listener = bind_loopback().await;
    // Loops that `check` cannot detect: by a name, or through a gateway.
    let url = format!("http://{}", listener.local_addr().unwrap());
    let keys = vec![ApiKey::new(FIRST_KEY).unwrap()];
    let mut config = Config::with_defaults(keys, url.parse().unwrap());
    config.storage.path = folder.path().join("keychoir.db");
    config.quota_polling.enabled = false;
    config.server.drain_idle_timeout = Duration::ZERO;
    let running = app::start(AppConfig::from_config(config).unwrap(), vec![listener.into()]).unwrap();
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    for request in
        [client.get(format!("{url}/v1/voices")), client.post(format!("{url}/v1/dubbing")).body("x")]
    {
        let answer = request.header("xi-api-key", "any").send().await.unwrap();
        assert_eq!(answer.status(), 508);
        assert!(answer.text().await.unwrap().contains("leads back"));
    }
    assert_eq!(running.drain(Duration::from_secs(10)).await, DrainOutcome::Completed);
}

/// The response to a client that closes its write half right after its request.
async fn half_closed<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn a_client_that_closes_its_sending_half_gets_its_response() {
    let (mut upstream, proxy) = with_held_upstream().await;
    let rest = "host: localhost\r\n\r\n";
    for request in [
        format!("GET /v1/voices HTTP/1.1\r\n{rest}"),
        format!("GET /v1/voices HTTP/1.0\r\n{rest}"),
        format!("POST /v1/voices HTTP/1.1\r\ncontent-length: 5\r\n{rest}hello"),
        format!("POST /v1/voices HTTP/1.1\r\ntransfer-encoding: chunked\r\n{rest}5\r\nhello\r\n0\r\n\r\n"),
    ] {
        let stream = TcpStream::connect(proxy.app.address()).await.unwrap();
        let answering = async {
            let mut connection = upstream.recv().await.unwrap();
            let mut body = Vec::new();
            while request.contains("hello") && !body.windows(5).any(|part| part == b"hello") {
                assert_ne!(connection.read_buf(&mut body).await.unwrap(), 0, "the request was cut");
            }
            connection.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nanswer").await.unwrap();
        };
        let (answer, ()) = tokio::join!(half_closed(stream, &request), answering);
        assert!(answer.ends_with("answer") && answer.contains(" 200 OK\r\n"), "{request}: {answer}");
    }
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn the_request_of_a_disconnected_client_is_cancelled() {
    let (mut upstream, proxy) = with_held_upstream().await;
    for request in [
        "GET /v1/voices HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "POST /v1/voices HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\nhello",
    ] {
        let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut connection = upstream.recv().await.unwrap();
        drop(stream);
        // The provider's connection is closed without a response.
        let closed = async { while connection.read(&mut [0; 64]).await.is_ok_and(|count| count > 0) {} };
        timeout(Duration::from_secs(30), closed).await.expect("the request was not cancelled");
    }
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn http2_with_prior_knowledge_is_refused() {
    let proxy = with_client().await;
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let (mut settings, mut goaway) = ([0; 9], [0; 17]);
    stream.read_exact(&mut settings).await.unwrap();
    stream.read_exact(&mut goaway).await.unwrap();
    assert_eq!((settings[3], goaway[3], goaway[16]), (4, 7, 0xd));
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    proxy.close().await;
}
