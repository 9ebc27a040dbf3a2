//! Tests the ends of client connections: after a refused upload, after a complete, truncated or unreadable response of
//! the upstream, after the client closes its write half or disconnects, and after a request with HTTP/2.

use std::io::ErrorKind;
use std::time::Duration;

use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, TestProxy, assert_proxy_error, bind_loopback, client_config, join_all,
    read_head, start_proxy_with,
};
use keychoir::policy::client::Rules;
use keychoir::simulator::Plan;
use keychoir::tasks::Tasks;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// Starts a proxy that requires a client token.
async fn start_proxy_with_client() -> TestProxy {
    start_proxy_with(Plan::with_keys([(FIRST_KEY, 1_000)]), |config| {
        config.clients = vec![client_config("app", CLIENT_TOKEN, Rules::default())];
    })
    .await
}

/// Sends all chunks of an upload without a token before it reads the response. Returns the response, or a description
/// of the error.
async fn upload(proxy: &TestProxy, framing: &str, chunks: usize, pause: Duration) -> String {
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    let head = format!("POST /v1/speech-to-text HTTP/1.1\r\nhost: localhost\r\n{framing}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..chunks {
        let chunk = [b"10000\r\n".to_vec(), vec![b'a'; 0x10000], b"\r\n".to_vec()].concat();
        if let Err(error) = stream.write_all(&chunk).await {
            return format!("write error: {error}");
        }
        sleep(pause).await;
    }
    let mut response = Vec::new();
    match stream.read_to_end(&mut response).await {
        Ok(_) => String::from_utf8(response).unwrap(),
        Err(error) => format!("read error: {error}"),
    }
}

#[tokio::test]
async fn clients_of_refused_uploads_receive_the_response() {
    let proxy = start_proxy_with_client().await;
    let pause = Duration::from_millis(1);
    let fast_uploads = (0..50).map(|_| upload(&proxy, "transfer-encoding: chunked", 60, Duration::ZERO));
    let fast_responses = join_all(fast_uploads).await;
    let slow_uploads = (0..50).map(|_| upload(&proxy, "content-length: 9999999", 60, pause));
    let slow_responses = join_all(slow_uploads).await;
    for response in fast_responses.iter().chain(&slow_responses) {
        assert!(
            response.starts_with("HTTP/1.1 401 ") && response.contains("client_token_missing"),
            "the client must receive the refusal: {response}"
        );
    }
    proxy.close().await;
}

/// Starts a proxy whose upstream sends `response` to every request and closes the connection.
async fn start_proxy_with_upstream_response(response: &'static str) -> TestProxy {
    let listener = bind_loopback().await;
    let url = format!("http://{}", listener.local_addr().unwrap());
    Tasks::new().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            read_head(&mut stream).await;
            let _ = stream.write_all(response.as_bytes()).await;
        }
    });
    start_proxy_with(Plan::with_keys([(FIRST_KEY, 100)]), |config| {
        config.upstream.base_url = url.parse().unwrap();
        config.quota_polling.enabled = false;
    })
    .await
}

/// Starts a proxy whose upstream reads a request head and then passes the connection to the test.
async fn start_proxy_with_manual_upstream() -> (mpsc::UnboundedReceiver<TcpStream>, TestProxy) {
    let listener = bind_loopback().await;
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, receiver) = mpsc::unbounded_channel();
    Tasks::new().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            read_head(&mut stream).await;
            if sender.send(stream).is_err() {
                return;
            }
        }
    });
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 100)]), |config| {
        config.upstream.base_url = url.parse().unwrap();
        config.upstream.max_idle_connections = 0;
        config.quota_polling.enabled = false;
    })
    .await;
    (receiver, proxy)
}

/// Sends an HTTP/1.0 request. Returns the response, and the error if the connection does not end cleanly.
async fn send_http_1_0(proxy: &TestProxy, method: &str) -> (String, Result<(), ErrorKind>) {
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    let request = format!("{method} /v1/voices HTTP/1.0\r\nhost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = Vec::new();
    let end = stream.read_to_end(&mut response).await.map(drop).map_err(|error| error.kind());
    (String::from_utf8(response).unwrap(), end)
}

#[tokio::test]
async fn a_truncated_response_to_an_http_1_0_client_ends_with_a_reset() {
    for (rest, is_complete) in
        [("4\r\nhalf\r\n", false), ("4\r\nhalf\r\n8\r\nsec", false), ("4\r\nhalf\r\n0\r\n\r\n", true)]
    {
        let response = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{rest}");
        let proxy = start_proxy_with_upstream_response(response.leak()).await;
        for method in ["GET", "POST"] {
            let (response, end) = send_http_1_0(&proxy, method).await;
            assert!(
                response.starts_with("HTTP/1.0 200 OK\r\n"),
                "the response must have the version of the client: {response}"
            );
            assert_eq!(
                end,
                if is_complete { Ok(()) } else { Err(ErrorKind::ConnectionReset) },
                "only a truncated response must end with a reset: {rest:?}"
            );
        }
        proxy.close_unchecked().await;
    }
}

#[tokio::test]
async fn a_response_without_a_body_to_an_http_1_0_client_ends_cleanly() {
    let proxy =
        start_proxy_with_upstream_response("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
    let (response, end) = send_http_1_0(&proxy, "HEAD").await;
    assert!(
        response.starts_with("HTTP/1.0 200 OK\r\n"),
        "the response must have the version of the client: {response}"
    );
    assert_eq!(end, Ok(()));
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_truncated_refusal_is_relayed_without_a_clean_end() {
    let partial_body = "a".repeat(240);
    for (framing, partial_body) in [
        ("content-length: 5000", partial_body.clone()),
        ("transfer-encoding: chunked", format!("f0\r\n{partial_body}\r\n")),
        // The upstream closes the connection before the first byte of the body.
        ("content-length: 5000", String::new()),
        ("transfer-encoding: chunked", String::new()),
    ] {
        let proxy = start_proxy_with_upstream_response(
            format!("HTTP/1.1 401 Unauthorized\r\n{framing}\r\n\r\n{partial_body}").leak(),
        )
        .await;
        for _ in 0..20 {
            let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
            stream.write_all(b"POST /v1/voices HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
            let mut response = Vec::new();
            let _ = stream.read_to_end(&mut response).await;
            let response = String::from_utf8(response).unwrap();
            let (head, body) = response.split_once("\r\n\r\n").expect("the head must be complete");
            assert!(head.starts_with("HTTP/1.1 401 "), "the refusal must be relayed: {response}");
            assert!(
                body.len() < 5000 && !body.ends_with("0\r\n\r\n"),
                "the response must not end cleanly: {response}"
            );
        }
        proxy.close_unchecked().await;
    }
}

#[tokio::test]
async fn an_unsupported_transfer_coding_of_the_provider_is_answered_with_502() {
    for coding in ["gzip, chunked", "something", "chunked, gzip"] {
        let proxy = start_proxy_with_upstream_response(
            format!("HTTP/1.1 200 OK\r\ntransfer-encoding: {coding}\r\n\r\nabc").leak(),
        )
        .await;
        let response = proxy.get("/v1/voices").await;
        assert_proxy_error(&response, 502, "upstream_reset");
        proxy.close_unchecked().await;
    }
}

/// Sends a request and closes the write half. Returns the response.
async fn send_and_close_write_half<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    request: &str,
) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut response = Vec::new();
    stream.read_to_end(&mut response).await.unwrap();
    String::from_utf8(response).unwrap()
}

#[tokio::test]
async fn a_client_that_closes_its_write_half_receives_the_response() {
    let (mut upstream, proxy) = start_proxy_with_manual_upstream().await;
    let rest = "host: localhost\r\n\r\n";
    for request in [
        format!("GET /v1/voices HTTP/1.1\r\n{rest}"),
        format!("GET /v1/voices HTTP/1.0\r\n{rest}"),
        format!("POST /v1/voices HTTP/1.1\r\ncontent-length: 5\r\n{rest}hello"),
        format!("POST /v1/voices HTTP/1.1\r\ntransfer-encoding: chunked\r\n{rest}5\r\nhello\r\n0\r\n\r\n"),
    ] {
        let stream = TcpStream::connect(proxy.app.address()).await.unwrap();
        let upstream_response = async {
            let mut connection = upstream.recv().await.unwrap();
            let mut body = Vec::new();
            while request.contains("hello") && !body.windows(5).any(|bytes| bytes == b"hello") {
                assert_ne!(connection.read_buf(&mut body).await.unwrap(), 0, "the request must be complete");
            }
            connection.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nserved").await.unwrap();
        };
        let (response, ()) = tokio::join!(send_and_close_write_half(stream, &request), upstream_response);
        assert!(
            response.ends_with("served") && response.contains(" 200 OK\r\n"),
            "the client must receive the response to {request:?}: {response}"
        );
    }
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn the_request_of_a_disconnected_client_is_cancelled() {
    let (mut upstream, proxy) = start_proxy_with_manual_upstream().await;
    for request in [
        "GET /v1/voices HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "POST /v1/voices HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\nhello",
    ] {
        let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut connection = upstream.recv().await.unwrap();
        drop(stream);
        // The proxy closes the upstream connection before it receives a response.
        let connection_closed =
            async { while connection.read(&mut [0; 64]).await.is_ok_and(|count| count > 0) {} };
        timeout(Duration::from_secs(30), connection_closed)
            .await
            .expect("the request must be cancelled within the timeout");
    }
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn http2_with_prior_knowledge_is_refused() {
    let proxy = start_proxy_with_client().await;
    let mut stream = TcpStream::connect(proxy.app.address()).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let (mut settings, mut goaway) = ([0; 9], [0; 17]);
    stream.read_exact(&mut settings).await.unwrap();
    stream.read_exact(&mut goaway).await.unwrap();
    // The types of the two frames, and the error HTTP_1_1_REQUIRED (RFC 9113).
    assert_eq!((settings[3], goaway[3], goaway[16]), (4, 7, 0xd));
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    proxy.close().await;
}
