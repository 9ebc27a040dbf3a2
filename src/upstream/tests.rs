//! Tests the HTTP client for the provider over in-memory pipes and with virtual time. The tests cover the encoded
//! request, the reuse of connections, timeouts and other errors of an attempt, and the framing and the flow of
//! responses.

mod strictness;

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join;
use http_body_util::{BodyExt, Full};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;

use http::{HeaderName, HeaderValue, StatusCode, Uri};

use super::*;
use crate::body::budget::BufferBudget;
use crate::body::replay::Replay;
use crate::policy::authority::Scheme;
use crate::policy::forward_proxy::{ForwardProxy, ProxyScheme};
use crate::policy::min_rate::MinRate;
use crate::policy::replay::Progress;
use crate::secret::ProxyCredentials;

/// A connector of in-memory pipes, which sends the provider's end of each connection to a channel.
struct PipeConnector {
    connection_sender: mpsc::UnboundedSender<DuplexStream>,
    opened_connections: Arc<AtomicUsize>,
}

impl Connect for PipeConnector {
    type Io = DuplexStream;

    async fn connect(&self, _: &Authority) -> Result<Self::Io, ConnectError> {
        let (client, server) = tokio::io::duplex(64 * 1024);
        self.opened_connections.fetch_add(1, Ordering::SeqCst);
        self.connection_sender
            .send(server)
            .map_err(|_| ConnectError::Tcp(std::io::ErrorKind::ConnectionRefused.into()))?;
        Ok(client)
    }
}

/// A connector whose connection attempts never complete.
struct StalledConnector;

impl Connect for StalledConnector {
    type Io = DuplexStream;

    async fn connect(&self, _: &Authority) -> Result<Self::Io, ConnectError> {
        std::future::pending().await
    }
}

const SETTINGS: Settings = Settings {
    connect_timeout: Duration::from_secs(10),
    response_timeout: Duration::from_secs(60),
    stream_idle_timeout: Duration::from_secs(30),
    request_body_timeout: Duration::from_secs(20),
    min_request_body_rate: MinRate { bytes_per_second: 0 },
    max_idle_connections: 4,
    keepalive_timeout: Duration::from_secs(50),
    max_connection_duration: Duration::from_secs(60),
};

/// The provider's end of all connections of a [`PipeConnector`].
struct Provider {
    connections: mpsc::UnboundedReceiver<DuplexStream>,
    opened_connections: Arc<AtomicUsize>,
}

impl Provider {
    /// Waits for the next connection.
    async fn accept(&mut self) -> DuplexStream {
        self.connections.recv().await.unwrap()
    }

    /// Accepts a connection, reads a request that ends with `request_end`, and writes `response`.
    async fn accept_and_respond(&mut self, request_end: &str, response: &[u8]) -> DuplexStream {
        let mut connection = self.accept().await;
        read_until(&mut connection, request_end).await;
        connection.write_all(response).await.unwrap();
        connection
    }
}

fn connect_provider() -> (Upstream<PipeConnector>, Provider) {
    let (connection_sender, connections) = mpsc::unbounded_channel();
    let opened_connections = Arc::new(AtomicUsize::new(0));
    let connector = PipeConnector { connection_sender, opened_connections: Arc::clone(&opened_connections) };
    (
        Upstream::new(authority(), connector, SETTINGS, Tasks::new(), None),
        Provider { connections, opened_connections },
    )
}

fn authority() -> Authority {
    Authority::new(Scheme::Http, "api.example", 80, "").unwrap()
}

fn key() -> ApiKey {
    ApiKey::new("sk_the_key_of_the_test").unwrap()
}

/// Returns the head of a request with a query and without headers.
fn request_head(method: Method) -> UpstreamRequestHead {
    UpstreamRequestHead { method, target: Uri::from_static("/v1/x?a=1"), headers: HeaderMap::new() }
}

#[tokio::test]
async fn a_foreign_host_in_the_request_line_does_not_receive_the_key() {
    let authority = Authority::new(Scheme::Https, "gate.example", 443, "/eleven").unwrap();
    for (target, expected_start) in [
        ("http://evil.example/v1/x?y", "GET /eleven/v1/x?y HTTP/1.1\r\nhost: gate.example\r\n"),
        ("/v1/x?a=1&a=%20", "GET /eleven/v1/x?a=1&a=%20 HTTP/1.1\r\nhost: gate.example\r\n"),
        ("http://evil.example?y", "GET /eleven/?y HTTP/1.1\r\nhost: gate.example\r\n"),
        ("http://evil.example", "GET /eleven/ HTTP/1.1\r\nhost: gate.example\r\n"),
    ] {
        let request = UpstreamRequestHead { target: target.parse().unwrap(), ..request_head(Method::GET) };
        let head =
            head::encode_request(&authority, &key(), &request, RequestFraming::Empty, &LoopMarker::new());
        assert!(
            head.starts_with(expected_start.as_bytes()),
            "a request for {target} must be sent to the configured host"
        );
    }
}

#[test]
fn requests_contain_the_loop_marker_unless_the_host_is_elevenlabs() {
    for (host, is_marked) in [
        ("gate.example", true),
        ("127.0.0.1", true),
        ("elevenlabs.io.example", true),
        ("notelevenlabs.io", true),
        ("api.elevenlabs.io", false),
        ("API.ElevenLabs.io", false),
        ("api.eu.residency.elevenlabs.io", false),
    ] {
        let authority = Authority::new(Scheme::Https, host, 443, "").unwrap();
        let (loop_marker, mut request) = (LoopMarker::new(), request_head(Method::GET));
        request.headers.insert("x-keychoir-hop", HeaderValue::from_static("another"));
        let head = head::encode_request(&authority, &key(), &request, RequestFraming::Empty, &loop_marker);
        let head = String::from_utf8(head.to_vec()).unwrap();
        let markers: Vec<&str> =
            head.lines().filter_map(|line| line.strip_prefix("x-keychoir-hop: ")).collect();
        let expected = if is_marked { vec!["another", loop_marker.id()] } else { vec![] };
        assert_eq!(markers, expected, "a request to {host} must contain the expected markers");
    }
}

#[test]
fn compacting_a_head_does_not_change_it() {
    let mut sensitive_value = HeaderValue::from_static("xi");
    sensitive_value.set_sensitive(true);
    let headers =
        [("a", HeaderValue::from_static("1")), ("b", sensitive_value), ("a", HeaderValue::from_static("2"))];
    let mut headers: HeaderMap =
        headers.into_iter().map(|(name, value)| (HeaderName::from_static(name), value)).collect();
    for target in ["/v1/x?a=1&b=%20", "/v1/x?", "/"] {
        let original = UpstreamRequestHead { method: Method::GET, target: Uri::from_static(target), headers };
        let mut copied_head = original.clone();
        copied_head.compact();
        assert_eq!((copied_head.target, &copied_head.headers), (original.target, &original.headers));
        assert!(copied_head.headers["b"].is_sensitive() && !copied_head.headers["a"].is_sensitive());
        headers = original.headers;
    }
}

/// Returns the body of a request without a body.
fn empty_body() -> AttemptBody<Full<Bytes>> {
    Replay::empty().start_attempt()
}

fn request_body(text: &'static str) -> Replay<Full<Bytes>> {
    Replay::new(Full::new(Bytes::from_static(text.as_bytes())), &BufferBudget::empty())
}

/// Reads until the received text ends with `end`. Returns the text.
async fn read_until(connection: &mut DuplexStream, end: &str) -> String {
    let mut read_bytes = Vec::new();
    while !read_bytes.ends_with(end.as_bytes()) {
        read_bytes.push(connection.read_u8().await.unwrap());
    }
    String::from_utf8(read_bytes).unwrap()
}

/// A complete response whose connection can be reused.
const OK_RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test(start_paused = true)]
async fn the_key_is_set_once_and_the_host_header_names_the_upstream() {
    let (upstream, mut provider) = connect_provider();
    let (_, request) = join(
        upstream.send(None, &key(), &request_head(Method::POST), request_body("hello").start_attempt()),
        async {
            let mut connection = provider.accept().await;
            let request = read_until(&mut connection, "hello").await;
            connection.write_all(OK_RESPONSE).await.unwrap();
            request
        },
    )
    .await;
    assert!(request.starts_with("POST /v1/x?a=1 HTTP/1.1\r\n"), "the request line must be sent: {request}");
    assert_eq!(request.matches("xi-api-key: sk_the_key_of_the_test\r\n").count(), 1);
    assert_eq!(request.matches("host: api.example\r\n").count(), 1);
    assert!(request.contains("content-length: 5\r\n"), "the length of the body must be sent: {request}");
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_reused_after_a_complete_exchange() {
    let (upstream, mut provider) = connect_provider();
    let serve = async {
        let mut connection = provider.accept().await;
        for _ in 0..3 {
            read_until(&mut connection, "\r\n\r\n").await;
            connection.write_all(OK_RESPONSE).await.unwrap();
        }
    };
    let exchange = async {
        for _ in 0..3 {
            let response =
                upstream.send(None, &key(), &request_head(Method::GET), empty_body()).await.unwrap();
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "ok");
        }
    };
    join(serve, exchange).await;
    assert_eq!(provider.opened_connections.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_reused_after_trailers() {
    let (upstream, mut provider) = connect_provider();
    let serve = async {
        let mut connection = provider.accept().await;
        for _ in 0..2 {
            read_until(&mut connection, "\r\n\r\n").await;
            let response =
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 1\r\n\r\n";
            connection.write_all(response.as_bytes()).await.unwrap();
        }
    };
    let exchange = async {
        for _ in 0..2 {
            let response =
                upstream.send(None, &key(), &request_head(Method::GET), empty_body()).await.unwrap();
            let mut body = response.into_body();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "ok");
            assert!(body.frame().await.unwrap().unwrap().is_trailers());
        }
    };
    join(serve, exchange).await;
    assert_eq!(provider.opened_connections.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_101_response_to_a_request_without_an_upgrade_is_an_error() {
    let (upstream, mut provider) = connect_provider();
    let (send_result, ()) =
        join(upstream.send(None, &key(), &request_head(Method::GET), empty_body()), async {
            let response = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";
            provider.accept_and_respond("\r\n\r\n", response).await;
        })
        .await;
    let error = send_result.unwrap_err();
    assert_eq!(error.progress, Progress::NoResponse);
    assert!(
        matches!(error.kind, SendErrorKind::UnexpectedUpgrade(StatusCode::SWITCHING_PROTOCOLS)),
        "the error must be an unexpected upgrade, not: {error}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_request_moves_from_a_closed_idle_connection_to_a_new_one() {
    let (upstream, mut provider) = connect_provider();
    let (first_result, ()) = join(
        upstream.send(None, &key(), &request_head(Method::POST), request_body("hello").start_attempt()),
        async {
            provider.accept_and_respond("hello", OK_RESPONSE).await;
        },
    )
    .await;
    first_result.unwrap().into_body().collect().await.unwrap();
    let (second_result, ()) = join(
        upstream.send(None, &key(), &request_head(Method::POST), request_body("hello").start_attempt()),
        async {
            provider.accept_and_respond("hello", OK_RESPONSE).await;
        },
    )
    .await;
    assert_eq!(second_result.unwrap().status(), 200);
    assert_eq!(provider.opened_connections.load(Ordering::SeqCst), 2);
}

/// Sends a request, responds to it on an open connection, and sleeps for `pause`.
async fn exchange_and_wait(
    upstream: &Upstream<PipeConnector>,
    connection: &mut DuplexStream,
    pause: Duration,
) {
    let serve = async {
        read_until(connection, "\r\n\r\n").await;
        connection.write_all(OK_RESPONSE).await.unwrap();
    };
    let (key, request) = (key(), request_head(Method::GET));
    let exchange = async {
        let response = upstream.send(None, &key, &request, empty_body()).await.unwrap();
        response.into_body().collect().await.unwrap();
    };
    join(serve, exchange).await;
    tokio::time::sleep(pause).await;
}

#[tokio::test(start_paused = true)]
async fn a_reused_connection_is_replaced_at_its_maximum_age() {
    let (upstream, mut provider) = connect_provider();
    let first_send = async { upstream.send(None, &key(), &request_head(Method::GET), empty_body()).await };
    let (_, mut connection) =
        join(first_send, provider.accept_and_respond("\r\n\r\n", b"HTTP/1.1 204 No\r\n\r\n")).await;
    for _ in 0..3 {
        exchange_and_wait(&upstream, &mut connection, Duration::from_secs(20)).await;
    }
    assert_eq!(provider.opened_connections.load(Ordering::SeqCst), 1);
    let (_, ()) = join(upstream.send(None, &key(), &request_head(Method::GET), empty_body()), async {
        provider.accept_and_respond("\r\n\r\n", OK_RESPONSE).await;
    })
    .await;
    assert_eq!(provider.opened_connections.load(Ordering::SeqCst), 2);
}

/// Checks that sending has failed with `progress`, and that the error contains `message`.
#[track_caller]
fn check_send_error<B: std::fmt::Debug>(
    send_result: Result<B, SendError>,
    progress: Progress,
    message: &str,
) {
    let error = send_result.unwrap_err();
    assert_eq!(error.progress, progress);
    assert!(error.to_string().contains(message), "the error must contain {message:?}, but it is: {error}");
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_closes_without_a_response_is_an_error() {
    let (upstream, mut provider) = connect_provider();
    let (send_result, ()) = join(
        upstream.send(None, &key(), &request_head(Method::POST), request_body("hello").start_attempt()),
        async {
            let mut connection = provider.accept().await;
            read_until(&mut connection, "hello").await;
        },
    )
    .await;
    check_send_error(send_result, Progress::NoResponse, "broke before a response");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_without_a_response_ends_at_the_timeout() {
    let (upstream, mut provider) = connect_provider();
    let never_respond = async {
        let connection = provider.accept().await;
        std::future::pending::<()>().await;
        drop(connection);
    };
    let (key, request, body) = (key(), request_head(Method::POST), request_body("hello"));
    let exchange = upstream.send(None, &key, &request, body.start_attempt());
    let send_result =
        tokio::select! { send_result = exchange => send_result, () = never_respond => unreachable!() };
    check_send_error(send_result, Progress::NoResponse, "no response within 60000 ms");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_without_a_connection_is_unsent() {
    let upstream: Upstream<StalledConnector> =
        Upstream::new(authority(), StalledConnector, SETTINGS, Tasks::new(), None);
    let send_result =
        upstream.send(None, &key(), &request_head(Method::POST), request_body("hello").start_attempt()).await;
    check_send_error(send_result, Progress::Unsent, "no connection within 10000 ms");
}

#[tokio::test(start_paused = true)]
async fn a_timeout_of_a_tunnel_names_the_proxy() {
    let credentials = Some(ProxyCredentials::new("alice", "hunter2"));
    let proxy = ForwardProxy::new(ProxyScheme::Http, "proxy.corp", 3128, credentials);
    let authority = authority().through(Some(Arc::new(proxy)));
    let upstream: Upstream<StalledConnector> =
        Upstream::new(authority, StalledConnector, SETTINGS, Tasks::new(), None);
    let send_result =
        upstream.send(None, &key(), &request_head(Method::POST), request_body("hello").start_attempt()).await;
    let message = "no connection through the proxy http://proxy.corp:3128 within 10000 ms";
    check_send_error(send_result, Progress::Unsent, message);
}

#[tokio::test(start_paused = true)]
async fn idle_connections_are_kept_per_proxy() {
    let (upstream, mut provider) = connect_provider();
    let proxied_authority = || {
        let proxy = ForwardProxy::new(ProxyScheme::Http, "proxy.corp", 3128, None);
        Arc::new(authority().through(Some(Arc::new(proxy))))
    };
    let mut connections = Vec::new();
    for (key_authority, is_new) in
        [(None, true), (Some(proxied_authority()), true), (None, false), (Some(proxied_authority()), false)]
    {
        let exchange = async {
            let send_result =
                upstream.send(key_authority.as_ref(), &key(), &request_head(Method::GET), empty_body()).await;
            send_result.unwrap().into_body().collect().await.unwrap();
        };
        let serve = async {
            if is_new {
                connections.push(provider.accept().await);
            }
            let connection = &mut connections[usize::from(key_authority.is_some())];
            read_until(connection, "\r\n\r\n").await;
            connection.write_all(OK_RESPONSE).await.unwrap();
        };
        join(exchange, serve).await;
    }
    assert_eq!(provider.opened_connections.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn a_redirect_is_returned_and_not_followed() {
    let (upstream, mut provider) = connect_provider();
    let (send_result, ()) =
        join(upstream.send(None, &key(), &request_head(Method::GET), empty_body()), async {
            let redirect =
                b"HTTP/1.1 307 Go\r\nlocation: http://elsewhere.example/\r\ncontent-length: 0\r\n\r\n";
            provider.accept_and_respond("\r\n\r\n", redirect).await;
        })
        .await;
    let response = send_result.unwrap();
    assert_eq!(
        (response.status().as_u16(), response.headers()["location"].to_str().unwrap()),
        (307, "http://elsewhere.example/")
    );
    assert_eq!(provider.opened_connections.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_response_closes_its_connection() {
    let (upstream, mut provider) = connect_provider();
    let (send_result, mut connection) = join(
        upstream.send(None, &key(), &request_head(Method::GET), empty_body()),
        provider.accept_and_respond("\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf"),
    )
    .await;
    drop(send_result.unwrap());
    let mut remaining_bytes = Vec::new();
    connection.read_to_end(&mut remaining_bytes).await.unwrap();
    assert!(remaining_bytes.is_empty(), "the client must send nothing before it closes the connection");
}

#[tokio::test(start_paused = true)]
async fn a_response_that_breaks_off_is_an_error() {
    let (upstream, mut provider) = connect_provider();
    let (send_result, ()) =
        join(upstream.send(None, &key(), &request_head(Method::GET), empty_body()), async {
            provider
                .accept_and_respond("\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
                .await;
        })
        .await;
    assert!(
        send_result.unwrap().into_body().collect().await.is_err(),
        "a body that ends before its declared length must fail"
    );
}

#[tokio::test(start_paused = true)]
async fn a_stalled_response_times_out_and_a_slow_one_does_not() {
    let (upstream, mut provider) = connect_provider();
    let (send_result, connection) = join(
        upstream.send(None, &key(), &request_head(Method::GET), empty_body()),
        provider.accept_and_respond("\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n"),
    )
    .await;
    let mut body = send_result.unwrap().into_body();
    let send_slowly = async {
        let mut connection = connection;
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_secs(29)).await;
            connection.write_all(b"x").await.unwrap();
        }
        connection
    };
    let read_all = async {
        for _ in 0..5 {
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "x");
        }
        body.frame().await.unwrap().unwrap_err()
    };
    let (connection, error) = join(send_slowly, read_all).await;
    assert!(matches!(error, UpstreamBodyError::Stalled(_)), "the error must be a stall, not: {error}");
    drop(connection);
}

/// Returns the status and the body that the client receives when the provider sends `bytes` and closes the connection.
async fn receive(bytes: &[u8]) -> (u16, Result<Bytes, UpstreamBodyError>) {
    let (upstream, mut provider) = connect_provider();
    let (send_result, ()) =
        join(upstream.send(None, &key(), &request_head(Method::GET), empty_body()), async {
            let mut connection = provider.accept().await;
            read_until(&mut connection, "\r\n\r\n").await;
            // The pipe is small, so the writer waits until the client has read.
            for chunk in bytes.chunks(1_000) {
                connection.write_all(chunk).await.unwrap();
            }
        })
        .await;
    let (head, body) = send_result.unwrap().into_parts();
    (head.status.as_u16(), body.collect().await.map(|body| body.to_bytes()))
}

#[tokio::test(start_paused = true)]
async fn informational_responses_are_skipped() {
    let mut bytes = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n".repeat(2_000);
    bytes.extend_from_slice(OK_RESPONSE);
    let (status, body) = receive(&bytes).await;
    assert_eq!((status, body.unwrap().as_ref()), (200, &b"ok"[..]));
}

#[tokio::test(start_paused = true)]
async fn chunked_coding_overrides_a_content_length() {
    let (status, body) = receive(
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    )
    .await;
    assert_eq!((status, body.unwrap().as_ref()), (200, &b"abc"[..]));
}

#[tokio::test(start_paused = true)]
async fn a_response_without_a_length_ends_with_its_connection() {
    let (status, body) = receive(b"HTTP/1.1 200 OK\r\n\r\nto the end").await;
    assert_eq!((status, body.unwrap().as_ref()), (200, &b"to the end"[..]));
}

#[tokio::test(start_paused = true)]
async fn a_response_that_ends_in_a_chunk_is_an_error() {
    let (_, body) = receive(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab").await;
    assert!(body.is_err(), "a body that ends in a chunk must not be accepted");
    let (_, body) = receive(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n").await;
    assert!(body.is_err(), "a body without its last chunk must not be accepted");
}

#[tokio::test(start_paused = true)]
async fn a_body_is_pending_once_before_its_error_so_that_its_data_is_flushed() {
    let (upstream, mut provider) = connect_provider();
    let (send_result, ()) =
        join(upstream.send(None, &key(), &request_head(Method::GET), empty_body()), async {
            provider
                .accept_and_respond("\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
                .await;
        })
        .await;
    let mut body = send_result.unwrap().into_body();
    let mut cx = Context::from_waker(std::task::Waker::noop());
    let mut poll_body = || Pin::new(&mut body).poll_frame(&mut cx).map(|frame| frame.unwrap().is_ok());
    let polls = [poll_body(), poll_body(), poll_body()];
    assert_eq!(polls, [Poll::Ready(true), Poll::Pending, Poll::Ready(false)]);
}

#[tokio::test(start_paused = true)]
async fn the_first_chunk_of_a_fast_response_is_written_before_more_is_read() {
    let (upstream, mut provider) = connect_provider();
    let (mut open_connection, response) =
        (None, [&b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n"[..], &[1; 1_000_000]]);
    // The reads of the first response show that the connection is fast.
    for is_fast in [false, true] {
        let exchange = async {
            let send_result = upstream.send(None, &key(), &request_head(Method::GET), empty_body()).await;
            let mut body = send_result.unwrap().into_body();
            let first_chunk = body.frame().await.unwrap().unwrap().into_data().unwrap();
            let second_poll = poll_fn(|cx| Poll::Ready(Pin::new(&mut body).poll_frame(cx))).await;
            assert_eq!(
                second_poll.is_pending(),
                is_fast,
                "after the first chunk, only the body of a fast response must be pending"
            );
            let second_chunk = match second_poll {
                Poll::Ready(frame) => frame.unwrap().unwrap().into_data().unwrap(),
                Poll::Pending => Bytes::new(),
            };
            first_chunk.len() + second_chunk.len() + body.collect().await.unwrap().to_bytes().len()
        };
        let serve = async {
            let connection = match &mut open_connection {
                Some(connection) => connection,
                None => open_connection.insert(provider.accept().await),
            };
            read_until(connection, "\r\n\r\n").await;
            connection.write_all(&response.concat()).await.unwrap();
        };
        let (received_bytes, ()) = join(exchange, serve).await;
        assert_eq!(received_bytes, 1_000_000);
    }
}
