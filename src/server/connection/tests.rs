//! Tests `connection::serve` over in-memory pipes: drains, timeouts, idle connections, upgrades, the refusal of HTTP/2,
//! and bytes that a client sends before a 101 response or after the last response.

use http::StatusCode;
use http_body_util::Full;
use tokio::io::{DuplexStream, duplex};
use tokio::time::timeout;

use std::future::pending;
use std::net::IpAddr;

use super::super::IDLE_AFTER;
use super::super::connection_end::FIRST_REQUEST_TIMEOUT;
use super::*;
use crate::policy::min_rate::{GRACE_PERIOD, MinRate};
use crate::tasks::Tasks;

pub(in crate::server) const LIMITS: ConnectionLimits = ConnectionLimits {
    request_headers_timeout: Duration::from_secs(30),
    keepalive_timeout: Duration::from_secs(75),
    linger_timeout: Duration::from_secs(10),
    max_linger_size: 1024 * 1024,
    send_timeout: Duration::from_secs(60),
    min_response_rate: MinRate { bytes_per_second: 500 },
    response_grace: GRACE_PERIOD,
    max_request_headers_size: 8192,
    max_connections: 1,
    idle_after: IDLE_AFTER,
};
/// One second longer than the keep-alive timeout of these tests.
const AFTER_KEEPALIVE: Duration = Duration::from_secs(76);
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: k\r\n\r\n";
const UPGRADE_REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: k\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";

/// Responds to every request with the same body, or with a session that echoes bytes.
#[derive(Clone)]
struct EchoService;

impl Service for EchoService {
    type Body = Full<Bytes>;

    async fn respond(&self, request: Request<Incoming>, _: Option<IpAddr>) -> Reply<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from_static(b"answer")));
        let wants_upgrade = request.headers().contains_key(UPGRADE);
        if request.method() == Method::PUT {
            // The body is neither read nor dropped.
            std::mem::forget(request);
        }
        let session = wants_upgrade.then(|| -> Session {
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            Box::new(|mut stream, read_buf| {
                Box::pin(async move {
                    stream.write_all(&read_buf).await.unwrap();
                    let mut bytes = [0; 64];
                    while let Ok(count @ 1..) = stream.read(&mut bytes).await {
                        stream.write_all(&bytes[..count]).await.unwrap();
                    }
                })
            })
        });
        Reply { response, session }
    }
}

/// Serves the stream that `open` returns, always on this worker.
fn spawn_connection(open: impl Future<Output = Option<DuplexStream>> + Send + 'static, drain: &Drain) {
    let open = async { open.await.map(IdleConnection::from) };
    let (state, drain) = (ConnectionState::new(drain.requests.clone(), None), Arc::new(drain.clone()));
    Tasks::new().spawn(serve(open, state, EchoService, LIMITS, drain, |connection, _| Some(connection)));
}

/// Serves a connection, and returns the client's end.
fn connect(drain: &Drain) -> DuplexStream {
    let (client, server) = duplex(4096);
    spawn_connection(ready(Some(server)), drain);
    client
}

/// Starts a drain and its second phase, without waiting for kept connections.
fn stop_accepting(drain: &Drain) {
    drain.draining.cancel();
    drain.stop_accepting.cancel();
}

/// Reads until the received bytes end with `end`.
async fn read_until(client: &mut DuplexStream, end: &[u8]) -> String {
    let mut received_bytes = Vec::new();
    while !received_bytes.ends_with(end) {
        assert_ne!(client.read_buf(&mut received_bytes).await.unwrap(), 0, "the connection must stay open");
    }
    String::from_utf8(received_bytes).unwrap()
}

/// Reads until the end of the stream, and returns the received bytes.
async fn read_to_end(client: &mut DuplexStream) -> Vec<u8> {
    let mut received_bytes = Vec::new();
    client.read_to_end(&mut received_bytes).await.unwrap();
    received_bytes
}

/// Sends a request, and returns its response.
async fn send_get(client: &mut DuplexStream) -> String {
    client.write_all(REQUEST).await.unwrap();
    read_until(client, b"answer").await
}

/// Checks that a response announces the end of the connection.
#[track_caller]
fn assert_closes_connection(response: &str) {
    assert!(
        response.contains("connection: close") && response.ends_with("answer"),
        "the response must close the connection: {response}"
    );
}

/// Checks that the connection is closed within `max_wait`, and that no byte arrives before.
async fn assert_closed(client: &mut DuplexStream, max_wait: Duration) {
    let close_result = timeout(max_wait, client.read(&mut [0])).await;
    assert_eq!(close_result.expect("the connection must be closed in time").unwrap(), 0);
}

/// Upgrades the connection, and checks that its session echoes bytes.
async fn upgrade(client: &mut DuplexStream) {
    client.write_all(UPGRADE_REQUEST).await.unwrap();
    assert!(read_until(client, b"\r\n\r\n").await.starts_with("HTTP/1.1 101 "));
    client.write_all(b"hello").await.unwrap();
    assert_eq!(read_until(client, b"hello").await, "hello");
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_the_first_request_of_a_connection() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    stop_accepting(&drain);
    let before_timeout = FIRST_REQUEST_TIMEOUT.saturating_sub(Duration::from_millis(1));
    let requests_ended = timeout(before_timeout, drain.requests.wait_until_ended()).await;
    assert!(requests_ended.is_err(), "the drain must wait for the request of a connected client");
    assert_closes_connection(&send_get(&mut client).await);
    assert!(timeout(before_timeout, drain.requests.wait_until_ended()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_a_silent_connection_within_the_timeout() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    stop_accepting(&drain);
    assert!(timeout(FIRST_REQUEST_TIMEOUT * 2, drain.requests.wait_until_ended()).await.is_ok());
    drain.close_idle.cancel();
    assert_closed(&mut client, Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn an_incomplete_head_delays_the_drain_no_longer_than_its_timeout() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    client.write_all(&REQUEST[..REQUEST.len() - 2]).await.unwrap();
    stop_accepting(&drain);
    drain.requests.wait_until_ended().await;
    drain.close_idle.cancel();
    assert_closed(&mut client, FIRST_REQUEST_TIMEOUT * 2).await;
}

#[tokio::test(start_paused = true)]
async fn an_open_connection_is_served_until_connections_are_closed() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    assert!(send_get(&mut client).await.ends_with("answer"));
    stop_accepting(&drain);
    drain.requests.wait_until_ended().await;
    assert_closes_connection(&send_get(&mut client).await);
    assert_closed(&mut client, Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_never_opens_delays_the_drain_no_longer_than_a_silent_connection() {
    let drain = Drain::default();
    let (mut client, server) = duplex(4096);
    // Keychoir's end of the pipe is dropped with the future, as a socket would be.
    let open = async move {
        let _server = server;
        pending::<Option<DuplexStream>>().await
    };
    spawn_connection(open, &drain);
    stop_accepting(&drain);
    assert!(timeout(FIRST_REQUEST_TIMEOUT * 2, drain.requests.wait_until_ended()).await.is_ok());
    drain.close_idle.cancel();
    assert_closed(&mut client, FIRST_REQUEST_TIMEOUT).await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_fails_to_open_does_not_delay_the_drain() {
    let drain = Drain::default();
    spawn_connection(ready(None), &drain);
    stop_accepting(&drain);
    assert!(timeout(FIRST_REQUEST_TIMEOUT / 2, drain.requests.wait_until_ended()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_session_counts_as_a_request_in_progress_until_its_end() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    upgrade(&mut client).await;
    stop_accepting(&drain);
    let session_duration = FIRST_REQUEST_TIMEOUT * 10;
    let requests_ended = timeout(session_duration, drain.requests.wait_until_ended()).await;
    assert!(requests_ended.is_err(), "the drain must wait for the session");
    drop(client);
    assert!(timeout(session_duration, drain.requests.wait_until_ended()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn bytes_sent_before_the_upgrade_response_are_rejected() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    client.write_all(&[UPGRADE_REQUEST, b"too early"].concat()).await.unwrap();
    let received_bytes = timeout(FIRST_REQUEST_TIMEOUT, read_to_end(&mut client)).await;
    let received_bytes = received_bytes.expect("the connection must be closed in time");
    assert!(received_bytes.ends_with(b"\r\n\r\n"), "the early bytes must not be echoed");
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_serves_requests_within_the_keepalive_timeout() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    assert!(send_get(&mut client).await.ends_with("answer"));
    for pause_ms in [1, 999, 1_000, 1_001, 29_999, 30_001, 74_999] {
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        assert!(
            send_get(&mut client).await.ends_with("answer"),
            "the connection must serve a request after {pause_ms} ms"
        );
    }
    assert_closed(&mut client, AFTER_KEEPALIVE).await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_head_is_served_within_the_headers_timeout() {
    for pause in [Duration::ZERO, Duration::from_secs(5)] {
        let drain = Drain::default();
        let mut client = connect(&drain);
        tokio::time::sleep(pause).await;
        let start = crate::clock::instant();
        for byte in REQUEST.iter().take(REQUEST.len() - 1) {
            client.write_all(&[*byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(900)).await;
        }
        client.write_all(b"\n").await.unwrap();
        read_until(&mut client, b"answer").await;
        assert!(crate::clock::elapsed_since(start) < LIMITS.request_headers_timeout);
        client.write_all(b"GET").await.unwrap();
        assert_closed(&mut client, AFTER_KEEPALIVE).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_does_not_delay_the_drain_and_is_closed_by_it() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    assert!(send_get(&mut client).await.ends_with("answer"));
    tokio::time::sleep(Duration::from_secs(5)).await;
    stop_accepting(&drain);
    assert!(
        timeout(FIRST_REQUEST_TIMEOUT / 2, drain.requests.wait_until_ended()).await.is_ok(),
        "the drain must not wait for an idle connection"
    );
    assert_closes_connection(&send_get(&mut client).await);
    let mut new_client = connect(&Drain { draining: drain.draining.clone(), ..Drain::default() });
    assert_closes_connection(&send_get(&mut new_client).await);
    drain.close_idle.cancel();
    assert_closed(&mut client, Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_ends_when_its_client_disconnects() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    assert!(send_get(&mut client).await.ends_with("answer"));
    tokio::time::sleep(Duration::from_secs(5)).await;
    client.shutdown().await.unwrap();
    assert_closed(&mut client, Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_can_be_upgraded() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    assert!(send_get(&mut client).await.ends_with("answer"));
    tokio::time::sleep(Duration::from_secs(5)).await;
    upgrade(&mut client).await;
    let mut second_client = connect(&drain);
    assert!(send_get(&mut second_client).await.ends_with("answer"));
    tokio::time::sleep(Duration::from_secs(5)).await;
    second_client.write_all(&[UPGRADE_REQUEST, b"too early"].concat()).await.unwrap();
    assert!(
        read_to_end(&mut second_client).await.ends_with(b"\r\n\r\n"),
        "the early bytes must not be echoed"
    );
}

#[tokio::test(start_paused = true)]
async fn a_head_that_has_begun_gets_less_time_than_an_idle_connection() {
    let drain = Drain::default();
    for (idle_seconds, has_had_request) in [(0, true), (10, true), (60, true), (0, false)] {
        let mut client = connect(&drain);
        if has_had_request {
            send_get(&mut client).await;
        }
        tokio::time::sleep(Duration::from_secs(idle_seconds)).await;
        client.write_all(&REQUEST[..REQUEST.len() - 2]).await.unwrap();
        let before_timeout = LIMITS.request_headers_timeout.saturating_sub(Duration::from_secs(2));
        assert!(
            timeout(before_timeout, client.read(&mut [0])).await.is_err(),
            "a head that begins after {idle_seconds} idle seconds must have the headers timeout"
        );
        // Idle connections are checked with a delay.
        assert_closed(&mut client, Duration::from_secs(3)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_a_request_has_the_headers_timeout() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    assert!(timeout(Duration::from_secs(29), client.read(&mut [0])).await.is_err());
    assert_closed(&mut client, Duration::from_secs(2)).await;
}

#[tokio::test(start_paused = true)]
async fn a_kept_connection_is_served_during_the_drain_and_closed_by_its_response() {
    for idle_seconds in [0, 10] {
        let drain = Drain::default();
        let mut client = connect(&drain);
        assert!(!send_get(&mut client).await.contains("connection: close"));
        tokio::time::sleep(Duration::from_secs(idle_seconds)).await;
        drain.draining.cancel();
        let kept_ended = timeout(Duration::from_secs(4), drain.kept_connections.wait_until_ended()).await;
        assert!(
            kept_ended.is_err(),
            "the connection must not end before its client is notified of the drain"
        );
        assert_closes_connection(&send_get(&mut client).await);
        assert_closed(&mut client, Duration::from_secs(1)).await;
        drain.kept_connections.wait_until_ended().await;
        // A connection that is accepted during the drain is served, but is not a kept connection.
        let mut new_client = connect(&drain);
        drain.kept_connections.wait_until_ended().await;
        assert_closes_connection(&send_get(&mut new_client).await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_has_arrived_when_connections_are_closed_is_served() {
    for idle_seconds in [0, 10] {
        let drain = Drain::default();
        let mut client = connect(&drain);
        send_get(&mut client).await;
        tokio::time::sleep(Duration::from_secs(idle_seconds)).await;
        stop_accepting(&drain);
        client.write_all(REQUEST).await.unwrap();
        drain.close_idle.cancel();
        assert_closes_connection(&String::from_utf8(read_to_end(&mut client).await).unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn http2_with_prior_knowledge_is_refused() {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    for idle_seconds in [0, 5] {
        let drain = Drain::default();
        let mut client = connect(&drain);
        tokio::time::sleep(Duration::from_secs(idle_seconds)).await;
        client.write_all(preface).await.unwrap();
        let frames = [&[0, 0, 0, 4, 0, 0, 0, 0, 0][..], &[0, 0, 8, 7], &[0; 12], &[0xd]].concat();
        assert_eq!(
            read_to_end(&mut client).await,
            frames,
            "HTTP/2 must be refused after {idle_seconds} idle seconds"
        );
    }
}

/// The size of the chunks that a client sends after its response.
const CHUNK_SIZE: usize = 4096;

/// Sends `chunks` chunks of a body after the response, each after `pause`. Returns the number of bytes that
/// the connection accepts.
async fn send_after_response(chunks: usize, pause: Duration) -> usize {
    let drain = Drain::default();
    let mut client = connect(&drain);
    client.write_all(b"POST / HTTP/1.1\r\nhost: k\r\ncontent-length: 99999999\r\n\r\n").await.unwrap();
    let mut sent_bytes = 0;
    for _ in 0..chunks {
        tokio::time::sleep(pause).await;
        match client.write_all(&[0; CHUNK_SIZE]).await {
            Ok(()) => sent_bytes += CHUNK_SIZE,
            Err(_) => break,
        }
    }
    assert!(read_to_end(&mut client).await.ends_with(b"answer"));
    sent_bytes
}

#[tokio::test(start_paused = true)]
async fn bytes_after_the_response_are_read_up_to_the_limits() {
    let (no_pause, one_second) = (Duration::ZERO, Duration::from_secs(1));
    assert_eq!(send_after_response(200, no_pause).await, 200 * CHUNK_SIZE);
    assert_eq!(send_after_response(9, one_second).await, 9 * CHUNK_SIZE);
    let max_linger_size = LIMITS.max_linger_size as usize;
    assert!(send_after_response(1_000, no_pause).await <= max_linger_size + 8 * CHUNK_SIZE);
    // The linger timeout is 10 seconds.
    assert!(send_after_response(100, one_second).await <= 12 * CHUNK_SIZE);
    // A client that exceeds the read timeout of 5 seconds is disconnected.
    assert!(send_after_response(100, Duration::from_secs(6)).await <= 2 * CHUNK_SIZE);
}

#[tokio::test(start_paused = true)]
async fn the_remaining_bytes_of_a_body_are_not_parsed_as_a_request() {
    for method in ["POST", "PUT"] {
        let drain = Drain::default();
        let mut client = connect(&drain);
        let head = format!("{method} / HTTP/1.1\r\nhost: k\r\ncontent-length: 100\r\n\r\nhello");
        client.write_all(head.as_bytes()).await.unwrap();
        read_until(&mut client, b"answer").await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        // The connection may already be closed.
        let _ = client.write_all(REQUEST).await;
        let received_bytes = timeout(AFTER_KEEPALIVE, read_to_end(&mut client)).await;
        let received_bytes = received_bytes.expect("the connection must be closed in time");
        assert!(
            received_bytes.is_empty(),
            "the rest of the {method} body must not get a response: {}",
            String::from_utf8_lossy(&received_bytes)
        );
    }
}
