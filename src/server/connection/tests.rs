//! Tests of one connection over in-memory pipes: drains, timeouts, sessions and malformed clients.

use http::StatusCode;
use http_body_util::Full;
use tokio::io::{DuplexStream, duplex};
use tokio::time::timeout;

use std::future::pending;
use std::net::IpAddr;

use super::super::IDLE_AFTER;
use super::super::ending::FIRST_REQUEST_TIMEOUT;
use super::*;
use crate::policy::min_rate::{GRACE, MinRate};
use crate::tasks::Tasks;

pub(in crate::server) const LIMITS: ConnectionLimits = ConnectionLimits {
    request_headers_timeout: Duration::from_secs(30),
    keepalive_timeout: Duration::from_secs(75),
    linger_timeout: Duration::from_secs(10),
    max_linger_size: 1024 * 1024,
    send_timeout: Duration::from_secs(60),
    min_response_rate: MinRate { bytes_per_second: 500 },
    response_grace: GRACE,
    max_request_headers_size: 8192,
    max_connections: 1,
    idle_after: IDLE_AFTER,
};
/// Longer than the keep-alive timeout of these tests.
const LATE: Duration = Duration::from_secs(76);
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: k\r\n\r\n";

/// Responds to every request in the same way.
#[derive(Clone)]
struct Echo;

impl Service for Echo {
    type Body = Full<Bytes>;

    async fn answer(&self, request: Request<Incoming>, _: Option<IpAddr>) -> Reply<Full<Bytes>> {
        let mut answer = Response::new(Full::new(Bytes::from_static(b"answer")));
        let wants_upgrade = request.headers().contains_key(UPGRADE);
        if request.method() == Method::PUT {
            // The body is neither read nor dropped.
            std::mem::forget(request);
        }
        let session = wants_upgrade.then(|| -> Session {
            *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            Box::new(|mut stream, early| {
                Box::pin(async move {
                    stream.write_all(&early).await.unwrap();
                    // Echoes bytes until the client closes.
                    let mut bytes = [0; 64];
                    while let Ok(count @ 1..) = stream.read(&mut bytes).await {
                        stream.write_all(&bytes[..count]).await.unwrap();
                    }
                })
            })
        });
        Reply { answer, session }
    }
}

/// Serves the stream that `opening` yields, and always stays on this worker.
fn spawn(opening: impl Future<Output = Option<DuplexStream>> + Send + 'static, drain: &Drain) {
    let opening = async { opening.await.map(IdleConnection::from) };
    let (state, drain) = (ConnectionState::new(drain.requests.clone(), None), Arc::new(drain.clone()));
    Tasks::new().spawn(serve(opening, state, Echo, LIMITS, drain, |connection, _| Some(connection)));
}

/// The client's end of a served connection.
fn connect(drain: &Drain) -> DuplexStream {
    let (client, server) = duplex(4096);
    spawn(ready(Some(server)), drain);
    client
}

/// Drains without waiting for kept connections first.
fn begin_stop(drain: &Drain) {
    drain.ending.cancel();
    drain.stop.cancel();
}

async fn get(client: &mut DuplexStream) -> String {
    client.write_all(REQUEST).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"answer") {
        assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0, "it was closed");
    }
    String::from_utf8(answer).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_the_first_request_of_a_connection() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    begin_stop(&drain);
    let almost = FIRST_REQUEST_TIMEOUT.saturating_sub(Duration::from_millis(1));
    assert!(timeout(almost, drain.requests.ended()).await.is_err(), "a client may still send a request");
    let answer = get(&mut client).await;
    assert!(answer.contains("connection: close") && answer.ends_with("answer"), "{answer}");
    assert!(timeout(almost, drain.requests.ended()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_a_silent_connection_within_the_timeout() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    begin_stop(&drain);
    assert!(timeout(FIRST_REQUEST_TIMEOUT * 2, drain.requests.ended()).await.is_ok());
    drain.close.cancel();
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "it is closed");
}

#[tokio::test(start_paused = true)]
async fn half_a_head_does_not_delay_the_drain() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    client.write_all(&REQUEST[..REQUEST.len() - 2]).await.unwrap();
    begin_stop(&drain);
    drain.requests.ended().await;
    drain.close.cancel();
    let closed = timeout(FIRST_REQUEST_TIMEOUT * 2, client.read(&mut [0])).await;
    assert_eq!(closed.expect("it is still open").unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_open_connection_is_served_until_connections_are_closed() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    assert!(get(&mut client).await.ends_with("answer"));
    begin_stop(&drain);
    drain.requests.ended().await;
    let answer = get(&mut client).await;
    assert!(answer.contains("connection: close") && answer.ends_with("answer"), "{answer}");
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "it is closed");
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_does_not_open_delays_the_drain_no_longer_than_others() {
    let drain = Drain::default();
    let (mut client, server) = duplex(4096);
    // The other end is dropped with the future, as a socket is.
    let opening = async move {
        let _server = server;
        pending::<Option<DuplexStream>>().await
    };
    spawn(opening, &drain);
    begin_stop(&drain);
    assert!(timeout(FIRST_REQUEST_TIMEOUT * 2, drain.requests.ended()).await.is_ok());
    drain.close.cancel();
    let closed = timeout(FIRST_REQUEST_TIMEOUT, client.read(&mut [0])).await;
    assert_eq!(closed.expect("it is closed at once").unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_fails_to_open_does_not_delay_the_drain() {
    let drain = Drain::default();
    spawn(ready(None), &drain);
    begin_stop(&drain);
    assert!(timeout(FIRST_REQUEST_TIMEOUT / 2, drain.requests.ended()).await.is_ok());
}

const UPGRADE_REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: k\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";

#[tokio::test(start_paused = true)]
async fn a_session_counts_as_a_request_to_its_end() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    client.write_all(UPGRADE_REQUEST).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        client.read_buf(&mut head).await.unwrap();
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "));
    client.write_all(b"hello").await.unwrap();
    let mut echo = [0; 5];
    client.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"hello");
    begin_stop(&drain);
    let long = FIRST_REQUEST_TIMEOUT * 10;
    assert!(timeout(long, drain.requests.ended()).await.is_err(), "the session is under way");
    drop(client);
    assert!(timeout(long, drain.requests.ended()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn bytes_sent_before_the_upgrade_response_are_refused() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    let both = [UPGRADE_REQUEST, b"too early"].concat();
    client.write_all(&both).await.unwrap();
    let mut answer = Vec::new();
    let closed = timeout(FIRST_REQUEST_TIMEOUT, client.read_to_end(&mut answer)).await;
    closed.expect("it is still open").unwrap();
    assert!(answer.ends_with(b"\r\n\r\n"), "there is no echo");
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_serves_requests_within_the_keepalive_timeout() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    assert!(get(&mut client).await.ends_with("answer"));
    for millis in [1, 999, 1_000, 1_001, 29_999, 30_001, 74_999] {
        tokio::time::sleep(Duration::from_millis(millis)).await;
        assert!(get(&mut client).await.ends_with("answer"), "after {millis} ms");
    }
    let closed = timeout(LATE, client.read(&mut [0])).await;
    assert_eq!(closed.expect("its timeout has passed").unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_slow_head_is_read_within_the_headers_timeout() {
    for pause in [Duration::ZERO, Duration::from_secs(5)] {
        let drain = Drain::default();
        let mut client = connect(&drain);
        tokio::time::sleep(pause).await;
        let began = crate::clock::instant();
        for byte in REQUEST.iter().take(REQUEST.len() - 1) {
            client.write_all(&[*byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(900)).await;
        }
        client.write_all(b"\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"answer") {
            assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0, "it was closed");
        }
        assert!(crate::clock::since(began) < LIMITS.request_headers_timeout);
        client.write_all(b"GET").await.unwrap();
        let closed = timeout(LATE, client.read(&mut [0])).await;
        assert_eq!(closed.expect("its timeout has passed").unwrap(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_with_the_others() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    assert!(get(&mut client).await.ends_with("answer"));
    tokio::time::sleep(Duration::from_secs(5)).await;
    begin_stop(&drain);
    assert!(
        timeout(FIRST_REQUEST_TIMEOUT / 2, drain.requests.ended()).await.is_ok(),
        "no request is expected"
    );
    let answer = get(&mut client).await;
    assert!(answer.contains("connection: close") && answer.ends_with("answer"), "{answer}");
    let mut other = connect(&Drain { ending: drain.ending.clone(), ..Drain::default() });
    assert!(get(&mut other).await.contains("connection: close"));
    drain.close.cancel();
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "it is closed");
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_ends_when_its_client_disconnects() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    assert!(get(&mut client).await.ends_with("answer"));
    tokio::time::sleep(Duration::from_secs(5)).await;
    client.shutdown().await.unwrap();
    let closed = timeout(Duration::from_secs(1), client.read(&mut [0])).await;
    assert_eq!(closed.expect("it is closed at once").unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_can_be_upgraded() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    assert!(get(&mut client).await.ends_with("answer"));
    tokio::time::sleep(Duration::from_secs(5)).await;
    client.write_all(UPGRADE_REQUEST).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        client.read_buf(&mut head).await.unwrap();
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "));
    client.write_all(b"hello").await.unwrap();
    let mut echo = [0; 5];
    client.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"hello");
    let mut other = connect(&drain);
    assert!(get(&mut other).await.ends_with("answer"));
    tokio::time::sleep(Duration::from_secs(5)).await;
    other.write_all(&[UPGRADE_REQUEST, b"too early"].concat()).await.unwrap();
    let mut answer = Vec::new();
    other.read_to_end(&mut answer).await.unwrap();
    assert!(answer.ends_with(b"\r\n\r\n"), "there is no echo");
}

#[tokio::test(start_paused = true)]
async fn a_head_that_has_begun_gets_less_time_than_an_idle_connection() {
    let drain = Drain::default();
    for (idle, has_had_request) in [(0, true), (10, true), (60, true), (0, false)] {
        let mut client = connect(&drain);
        if has_had_request {
            get(&mut client).await;
        }
        tokio::time::sleep(Duration::from_secs(idle)).await;
        client.write_all(&REQUEST[..REQUEST.len() - 2]).await.unwrap();
        let mut byte = [0];
        // Idle connections are checked with a delay.
        let (early, late) = (Duration::from_secs(28), Duration::from_secs(3));
        assert!(timeout(early, client.read(&mut byte)).await.is_err(), "{idle} s: it is closed early");
        let closed = timeout(late, client.read(&mut byte)).await;
        assert_eq!(closed.expect("it is still open").unwrap(), 0, "{idle} s");
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_a_request_has_the_headers_timeout() {
    let drain = Drain::default();
    let mut client = connect(&drain);
    assert!(timeout(Duration::from_secs(29), client.read(&mut [0])).await.is_err());
    assert_eq!(timeout(Duration::from_secs(2), client.read(&mut [0])).await.unwrap().unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_kept_connection_is_served_during_the_drain_and_closed_by_its_response() {
    for idle in [0, 10] {
        let drain = Drain::default();
        let mut client = connect(&drain);
        assert!(!get(&mut client).await.contains("connection: close"));
        tokio::time::sleep(Duration::from_secs(idle)).await;
        drain.ending.cancel();
        let kept = drain.kept.ended();
        let almost = Duration::from_secs(4);
        assert!(timeout(almost, kept).await.is_err(), "its client does not know yet");
        let answer = get(&mut client).await;
        assert!(answer.contains("connection: close"), "{answer}");
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "it is closed");
        drain.kept.ended().await;
        // A connection that is accepted now is served, and the drain does not wait for it first.
        let mut late = connect(&drain);
        drain.kept.ended().await;
        assert!(get(&mut late).await.contains("connection: close"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_has_arrived_when_connections_are_closed_is_served() {
    for idle in [0, 10] {
        let drain = Drain::default();
        let mut client = connect(&drain);
        get(&mut client).await;
        tokio::time::sleep(Duration::from_secs(idle)).await;
        begin_stop(&drain);
        client.write_all(REQUEST).await.unwrap();
        drain.close.cancel();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.contains("connection: close") && answer.ends_with("answer"), "{idle} s: {answer}");
    }
}

#[tokio::test(start_paused = true)]
async fn http2_with_prior_knowledge_is_refused() {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    for idle in [0, 5] {
        let drain = Drain::default();
        let mut client = connect(&drain);
        tokio::time::sleep(Duration::from_secs(idle)).await;
        client.write_all(preface).await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        let frames = [&[0, 0, 0, 4, 0, 0, 0, 0, 0][..], &[0, 0, 8, 7], &[0; 12], &[0xd]].concat();
        assert_eq!(answer, frames, "after {idle} s");
    }
}

/// Number of bytes of a body that a client can send after its response, in pieces with a pause
/// between them.
async fn sent_after_the_response(pieces: usize, pause: Duration) -> usize {
    let drain = Drain::default();
    let mut client = connect(&drain);
    client.write_all(b"POST / HTTP/1.1\r\nhost: k\r\ncontent-length: 99999999\r\n\r\n").await.unwrap();
    let mut sent = 0;
    for _ in 0..pieces {
        tokio::time::sleep(pause).await;
        match client.write_all(&[0; 4096]).await {
            Ok(()) => sent += 4096,
            Err(_) => break,
        }
    }
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert!(answer.ends_with(b"answer"));
    sent
}

#[tokio::test(start_paused = true)]
async fn bytes_after_the_response_are_read_within_bounds() {
    let (quick, slow) = (Duration::ZERO, Duration::from_secs(1));
    assert_eq!(sent_after_the_response(200, quick).await, 200 * 4096);
    assert_eq!(sent_after_the_response(9, slow).await, 9 * 4096);
    let (most, ten_seconds) = (LIMITS.max_linger_size as usize, 12 * 4096);
    assert!(sent_after_the_response(1_000, quick).await <= most + 8 * 4096);
    assert!(sent_after_the_response(100, slow).await <= ten_seconds);
    // A client that pauses for longer than the bound is disconnected.
    assert!(sent_after_the_response(100, Duration::from_secs(6)).await <= 2 * 4096);
}

#[tokio::test(start_paused = true)]
async fn the_rest_of_a_body_is_not_read_as_a_request() {
    for method in ["POST", "PUT"] {
        let drain = Drain::default();
        let mut client = connect(&drain);
        let head = format!("{method} / HTTP/1.1\r\nhost: k\r\ncontent-length: 100\r\n\r\nhello");
        client.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"answer") {
            assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0, "it was closed");
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
        // The connection may already be closed.
        let _ = client.write_all(REQUEST).await;
        answer.clear();
        let closed = timeout(LATE, client.read_to_end(&mut answer)).await;
        closed.expect("it is still open").unwrap();
        assert!(answer.is_empty(), "{method}: {}", String::from_utf8_lossy(&answer));
    }
}
