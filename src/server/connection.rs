//! Serves one connection: HTTP/1.1 on a stream of any kind, until the connection ends, the server drains, or
//! a session of another protocol takes the connection over.

use std::convert::Infallible;
use std::future::{Future, poll_fn, ready};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderValue, UPGRADE};
use http::{Method, Request, Response, Version};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tracing::debug;

use super::connection_state::{ConnectionHistory, ConnectionState, UnderWay};
use super::counted::{Counted, Whole};
use super::counting_io::{CountingIo, IoCounters};
use super::ending::{ConnectionEnd, end, last_words};
use super::leaving::Peek;
use super::linger::{Reset, linger, refuse_http2};
use super::parked_future::ParkedFuture;
use super::write_timeout::WriteTimeout;
use super::{Drain, Limits, Reply, Service, Session, Stream};
use crate::tasks::Member;

/// The first idle check of a new connection comes sooner by this factor.
const FIRST_PAUSE: u32 = 64;

/// Serves the stream that `opening` yields, if it yields one, to its end. A drain that begins before the
/// first poll is taken into account.
///
/// When a request arrives on an idle connection, `elsewhere` may move the connection to another worker: it
/// keeps the connection, or returns it to be served here.
pub(super) fn serve<S, I, E>(
    opening: impl Future<Output = Option<IdleConnection<I>>> + Send + 'static,
    known: ConnectionHistory,
    service: S,
    limits: Limits,
    drain: Arc<Drain>,
    elsewhere: E,
) -> impl Future<Output = ()> + Send + 'static
where
    S: Service,
    I: AsyncRead + AsyncWrite + Peek + Reset + Unpin + Send + 'static,
    E: FnMut(IdleConnection<I>, ConnectionHistory) -> Option<IdleConnection<I>> + Send + 'static,
{
    let here = ConnectionState::new(drain.requests.clone(), known);
    let kept = (!drain.ending.is_cancelled()).then(|| drain.kept.member());
    run(opening, service, limits, drain, (here, kept), elsewhere)
}

/// A connection whose next request is about to arrive.
pub(super) struct IdleConnection<I> {
    pub(super) stream: I,
    /// Bytes that were already read from the stream.
    pub(super) early: Bytes,
}

impl<I> From<I> for IdleConnection<I> {
    fn from(stream: I) -> Self {
        Self { stream, early: Bytes::new() }
    }
}

async fn run<S, I>(
    opening: impl Future<Output = Option<IdleConnection<I>>> + Send,
    service: S,
    limits: Limits,
    drain: Arc<Drain>,
    (here, kept): (Arc<ConnectionState>, Option<Member>),
    mut elsewhere: impl FnMut(IdleConnection<I>, ConnectionHistory) -> Option<IdleConnection<I>> + Send,
) where
    S: Service,
    I: AsyncRead + AsyncWrite + Peek + Reset + Unpin + Send + 'static,
{
    let opened = tokio::select! {
        biased;
        _ = end(&drain, &here, &limits) => return,
        opened = opening => opened,
    };
    let Some(mut awake) = opened else { return };
    here.wait();
    // Most clients send one request: until a second one has come, the pauses between idle checks are short.
    let mut pause = if here.has_asked() { limits.rest_after } else { limits.rest_after / FIRST_PAUSE };
    loop {
        let stream = WriteTimeout::new(awake.stream, &limits);
        let stream = CountingIo::new(stream, here.gauge().clone()).with_early(awake.early);
        // Boxed and dropped before the connection becomes idle or a session begins: its buffers are not
        // needed then.
        let spoken = Box::pin(speak(stream, service.clone(), limits, &drain, &here, pause)).await;
        let stream = match spoken {
            HttpEnd::Over => return,
            HttpEnd::Taken(taken, stream, read) => {
                drop(kept);
                return taken.run(here.gauge(), stream, read).await;
            }
            HttpEnd::Answered(stream) => {
                drop(kept);
                here.expect_nothing();
                return linger(stream, limits, &drain).await;
            }
            HttpEnd::Quiet(stream) => stream,
        };
        let Some(woken) = rest(stream, limits, &drain, &here).await else { return };
        here.expect();
        pause = limits.rest_after;
        match elsewhere(woken, here.known()) {
            Some(stays) => awake = stays,
            None => return,
        }
    }
}

/// How HTTP on a connection ended.
enum HttpEnd<I> {
    /// The connection ended.
    Over,
    /// A 101 was sent; with the bytes that were read beyond its request.
    Taken(Upgraded, CountingIo<WriteTimeout<I>>, Bytes),
    /// A response closes the connection, while the client may still be sending.
    Answered(CountingIo<WriteTimeout<I>>),
    /// The connection is idle: no request is under way.
    Quiet(CountingIo<WriteTimeout<I>>),
}

/// Serves HTTP requests until the connection ends or becomes idle.
async fn speak<S, I>(
    stream: CountingIo<WriteTimeout<I>>,
    service: S,
    limits: Limits,
    drain: &Drain,
    here: &Arc<ConnectionState>,
    pause: Duration,
) -> HttpEnd<I>
where
    S: Service,
    I: AsyncRead + AsyncWrite + Peek + Reset + Unpin + Send + 'static,
{
    let takeover = UpgradeSlot::default();
    let (asked, reserved, read) = (Arc::clone(here), takeover.clone(), here.gauge().clone());
    let answer = service_fn(move |request: Request<Incoming>| {
        let under_way = asked.asks(!request.body().is_end_stream());
        let is_new = request.version() >= Version::HTTP_11;
        read.phase().ask(is_new);
        // HTTP/1.0 has no chunks, so a response without a length ends with the connection.
        let may_end_by_close = !is_new && request.method() != Method::HEAD;
        let (service, here, read_gauge) = (service.clone(), Arc::clone(&asked), read.clone());
        let asks = request.headers().contains_key(UPGRADE);
        let upgrade = asks.then(|| (reserved.clone(), read.clone()));
        // Boxed and dropped with the request: this future is the largest part of a connection, and an idle
        // connection does not need it.
        Box::pin(async move {
            let Reply { mut answer, session } = service.answer(request).await;
            read_gauge.phase().answer();
            if let Some((session, (takeover, gauge))) = session.zip(upgrade) {
                // The session counts as a request under way until it ends.
                gauge.phase().rest();
                takeover.put(Upgraded { session, read: gauge.bytes(), _under_way: under_way });
                return Ok(answer.map(|body| Counted::of_session(body, read_gauge)));
            }
            if here.is_ending() {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            let has_length =
                answer.headers().contains_key(CONTENT_LENGTH) || answer.body().size_hint().exact().is_some();
            let whole = (may_end_by_close && !has_length).then(|| Whole::new(here));
            Ok::<Response<_>, Infallible>(answer.map(|body| Counted::of(body, read_gauge, under_way, whole)))
        })
    });
    let has_halves = stream.get_ref().has_halves();
    let mut connection = Box::pin(
        http1::Builder::new()
            // `Half` decides what the end of the stream means, where that is possible.
            .half_close(has_halves)
            // A timer for each head costs more than everything else here: see `ConnectionState::waited`.
            .header_read_timeout(None)
            .max_buf_size(limits.max_request_headers_size)
            .serve_connection(TokioIo::new(stream), answer),
    );
    let mut told = pin!(ParkedFuture::new(async {
        tokio::select! {
            biased;
            told = end(drain, here, &limits) => Some(told),
            () = here.quiet(pause, limits.rest_after) => None,
        }
    }));
    let ended = tokio::select! {
        biased;
        told = told.as_mut() => match told {
            None => {
                // HTTP ends at once only between two messages: bytes of one message must never be taken for
                // the beginning of another.
                connection.as_mut().graceful_shutdown();
                let ended = poll_fn(|cx| Poll::Ready(connection.poll_without_shutdown(cx))).await;
                if let Poll::Ready(Ok(())) = ended {
                    let parts = Pin::into_inner(connection).into_parts();
                    return HttpEnd::Quiet(parts.io.into_inner().with_early(parts.read_buf));
                }
                tokio::select! {
                    biased;
                    _ = end(drain, here, &limits) => None,
                    ended = connection.as_mut() => Some(ended),
                }
            }
            Some(ConnectionEnd::Close) => {
                // A request that has arrived by now is served.
                let asked = poll_fn(|cx| Poll::Ready(connection.as_mut().poll(cx))).await;
                connection.as_mut().graceful_shutdown();
                match asked {
                    Poll::Ready(ended) => Some(ended),
                    Poll::Pending => tokio::select! {
                        ended = connection.as_mut() => Some(ended),
                        // At most the first part of a request head is under way.
                        () = last_words(drain) => None,
                        () = drain.cut.cancelled() => None,
                    },
                }
            }
            Some(ConnectionEnd::Leave) => None,
        },
        ended = connection.as_mut() => Some(ended),
    };
    // The rest of the HTTP connection is dropped, with a response that was under way.
    let parts = Pin::into_inner(connection).into_parts();
    let mut stream = parts.io.into_inner();
    if here.is_truncated() {
        stream.get_ref().get_ref().reset_on_drop();
        return HttpEnd::Over;
    }
    match (ended, takeover.take()) {
        (Some(Ok(())), Some(taken)) => HttpEnd::Taken(taken, stream, parts.read_buf),
        (Some(Ok(())), None) if here.may_send() => HttpEnd::Answered(stream),
        (Some(Ok(())) | None, _) => HttpEnd::Over,
        (Some(Err(error)), _) => {
            // Clients disconnect and send malformed requests; neither is worth a warning.
            debug!("a connection ended: {error}");
            if error.is_parse_version_h2() {
                refuse_http2(&mut stream).await;
            }
            if error.is_parse() { HttpEnd::Answered(stream) } else { HttpEnd::Over }
        }
    }
}

/// Bytes read when an idle connection becomes active; HTTP reads the rest into its own buffer. As many as the
/// preface of HTTP/2 has, which is recognized only as a whole.
const FIRST_BYTES: usize = 24;

/// Waits without a buffer until bytes can be read. `None` when the connection has ended.
async fn rest<I>(
    stream: CountingIo<WriteTimeout<I>>,
    limits: Limits,
    drain: &Drain,
    here: &ConnectionState,
) -> Option<IdleConnection<I>>
where
    I: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (stream, early) = stream.into_parts();
    let mut stream = stream.into_inner();
    // Copies the beginning of a head, so that its read buffer can be freed.
    let early = early.to_vec();
    if !early.is_empty() {
        here.has_begun_head();
    }
    let mut first = [0; FIRST_BYTES];
    let read = tokio::select! {
        biased;
        // Polled before the end of the connection: a request that has arrived by then is served.
        read = stream.read(&mut first) => read,
        ends = end(drain, here, &limits) => match ends {
            ConnectionEnd::Close => Ok(0),
            ConnectionEnd::Leave => return None,
        },
    };
    match read {
        Ok(count @ 1..) => {
            if early.is_empty() {
                here.begin_head();
            }
            let early = [&early, first.get(..count)?].concat();
            Some(IdleConnection { stream, early: early.into() })
        }
        Ok(_) => {
            // A TLS connection sends its close notification; a client that does not read it is not waited
            // for.
            tokio::select! {
                biased;
                _ = stream.shutdown() => {}
                () = ready(()) => {}
            }
            None
        }
        Err(error) => {
            debug!("a connection ended: {error}");
            None
        }
    }
}

/// Holds the session that takes the connection over.
#[derive(Clone, Default)]
struct UpgradeSlot(Arc<Mutex<Option<Upgraded>>>);

impl UpgradeSlot {
    fn put(&self, taken: Upgraded) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(taken);
    }

    fn take(&self) -> Option<Upgraded> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The session that takes the connection over once the 101 is sent.
struct Upgraded {
    session: Session,
    /// Bytes that the client had sent when the 101 was ready.
    read: u64,
    _under_way: UnderWay,
}

impl Upgraded {
    async fn run(self, gauge: &IoCounters, stream: impl Stream + 'static, beyond: Bytes) {
        let Self { session, read, _under_way } = self;
        // A client that sends bytes before the 101 cannot know whether it sends them to Keychoir or to a
        // server behind it, and no check has seen these bytes.
        let since = gauge.bytes().saturating_sub(read);
        if beyond.len() as u64 > since {
            return debug!("a client spoke on a socket that was not open yet");
        }
        session(Box::new(stream), beyond).await;
    }
}

#[cfg(test)]
pub(super) use tests::LIMITS;

#[cfg(test)]
mod tests {
    use http::StatusCode;
    use http_body_util::Full;
    use tokio::io::{DuplexStream, duplex};
    use tokio::time::timeout;

    use std::future::pending;

    use super::super::REST_AFTER;
    use super::super::ending::FIRST_REQUEST_MAX;
    use super::*;
    use crate::policy::min_rate::{GRACE, MinRate};
    use crate::tasks::Tasks;

    pub(in crate::server) const LIMITS: Limits = Limits {
        request_headers_timeout: Duration::from_secs(30),
        keepalive_timeout: Duration::from_secs(75),
        linger_timeout: Duration::from_secs(10),
        max_linger_size: 1024 * 1024,
        send_timeout: Duration::from_secs(60),
        min_response_rate: MinRate { bytes_per_second: 500 },
        response_grace: GRACE,
        max_request_headers_size: 8192,
        max_connections: 1,
        rest_after: REST_AFTER,
    };
    /// Longer than the keep-alive timeout of these tests.
    const LATE: Duration = Duration::from_secs(76);
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: k\r\n\r\n";

    /// Responds to every request in the same way.
    #[derive(Clone)]
    struct Echo;

    impl Service for Echo {
        type Body = Full<Bytes>;

        async fn answer(&self, request: Request<Incoming>) -> Reply<Full<Bytes>> {
            let mut answer = Response::new(Full::new(Bytes::from_static(b"answer")));
            let asks = request.headers().contains_key(UPGRADE);
            if request.method() == Method::PUT {
                // The body is neither read nor dropped.
                std::mem::forget(request);
            }
            let session = asks.then(|| -> Session {
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
        let (known, drain) = (ConnectionHistory::default(), Arc::new(drain.clone()));
        Tasks::new().spawn(serve(opening, known, Echo, LIMITS, drain, |awake, _| Some(awake)));
    }

    /// The client's end of a served connection.
    fn connected(drain: &Drain) -> DuplexStream {
        let (client, server) = duplex(4096);
        spawn(ready(Some(server)), drain);
        client
    }

    /// Drains without waiting for kept connections first.
    fn stop(drain: &Drain) {
        drain.ending.cancel();
        drain.stop.cancel();
    }

    async fn ask(client: &mut DuplexStream) -> String {
        client.write_all(REQUEST).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"answer") {
            assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0, "it was closed");
        }
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_not_asked_yet_is_waited_for() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        stop(&drain);
        let almost = FIRST_REQUEST_MAX.saturating_sub(Duration::from_millis(1));
        assert!(timeout(almost, drain.requests.ended()).await.is_err(), "a client may still ask");
        let answer = ask(&mut client).await;
        assert!(answer.contains("connection: close") && answer.ends_with("answer"), "{answer}");
        assert!(timeout(almost, drain.requests.ended()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_ask_is_not_waited_for_long() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        stop(&drain);
        assert!(timeout(FIRST_REQUEST_MAX * 2, drain.requests.ended()).await.is_ok());
        drain.close.cancel();
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "it is closed");
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_head_does_not_hold_the_end() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        client.write_all(&REQUEST[..REQUEST.len() - 2]).await.unwrap();
        stop(&drain);
        drain.requests.ended().await;
        drain.close.cancel();
        let closed = timeout(FIRST_REQUEST_MAX * 2, client.read(&mut [0])).await;
        assert_eq!(closed.expect("it is still open").unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_connection_is_answered_until_all_are_closed() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        assert!(ask(&mut client).await.ends_with("answer"));
        stop(&drain);
        drain.requests.ended().await;
        let answer = ask(&mut client).await;
        assert!(answer.contains("connection: close") && answer.ends_with("answer"), "{answer}");
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "it is closed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_does_not_open_holds_the_end_no_longer_than_others() {
        let drain = Drain::default();
        let (mut client, server) = duplex(4096);
        // The other end is dropped with the future, as a socket is.
        let opening = async move {
            let _server = server;
            pending::<Option<DuplexStream>>().await
        };
        spawn(opening, &drain);
        stop(&drain);
        assert!(timeout(FIRST_REQUEST_MAX * 2, drain.requests.ended()).await.is_ok());
        drain.close.cancel();
        let closed = timeout(FIRST_REQUEST_MAX, client.read(&mut [0])).await;
        assert_eq!(closed.expect("it is closed at once").unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_fails_to_open_is_waited_for_no_more() {
        let drain = Drain::default();
        spawn(ready(None), &drain);
        stop(&drain);
        assert!(timeout(FIRST_REQUEST_MAX / 2, drain.requests.ended()).await.is_ok());
    }

    const UPGRADE_REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: k\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_taken_over_counts_to_its_end() {
        let drain = Drain::default();
        let mut client = connected(&drain);
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
        stop(&drain);
        let long = FIRST_REQUEST_MAX * 10;
        assert!(timeout(long, drain.requests.ended()).await.is_err(), "the session is under way");
        drop(client);
        assert!(timeout(long, drain.requests.ended()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_sent_before_the_switch_is_not_let_in() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        let both = [UPGRADE_REQUEST, b"too early"].concat();
        client.write_all(&both).await.unwrap();
        let mut answer = Vec::new();
        let closed = timeout(FIRST_REQUEST_MAX, client.read_to_end(&mut answer)).await;
        closed.expect("it is still open").unwrap();
        assert!(answer.ends_with(b"\r\n\r\n"), "there is no echo");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_serves_on_after_any_rest_within_its_time() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        assert!(ask(&mut client).await.ends_with("answer"));
        for millis in [1, 999, 1_000, 1_001, 29_999, 30_001, 74_999] {
            tokio::time::sleep(Duration::from_millis(millis)).await;
            assert!(ask(&mut client).await.ends_with("answer"), "after {millis} ms");
        }
        let closed = timeout(LATE, client.read(&mut [0])).await;
        assert_eq!(closed.expect("its time is over").unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_trickles_has_its_time_and_no_more() {
        for pause in [Duration::ZERO, Duration::from_secs(5)] {
            let drain = Drain::default();
            let mut client = connected(&drain);
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
            assert_eq!(closed.expect("its time is over").unwrap(), 0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_at_rest_is_closed_with_the_others() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        assert!(ask(&mut client).await.ends_with("answer"));
        tokio::time::sleep(Duration::from_secs(5)).await;
        stop(&drain);
        assert!(
            timeout(FIRST_REQUEST_MAX / 2, drain.requests.ended()).await.is_ok(),
            "no request is expected"
        );
        let answer = ask(&mut client).await;
        assert!(answer.contains("connection: close") && answer.ends_with("answer"), "{answer}");
        let mut other = connected(&Drain { ending: drain.ending.clone(), ..Drain::default() });
        assert!(ask(&mut other).await.contains("connection: close"));
        drain.close.cancel();
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "it is closed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_during_a_rest_is_let_go() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        assert!(ask(&mut client).await.ends_with("answer"));
        tokio::time::sleep(Duration::from_secs(5)).await;
        client.shutdown().await.unwrap();
        let closed = timeout(Duration::from_secs(1), client.read(&mut [0])).await;
        assert_eq!(closed.expect("it is closed at once").unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_socket_may_follow_a_rest() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        assert!(ask(&mut client).await.ends_with("answer"));
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
        let mut other = connected(&drain);
        assert!(ask(&mut other).await.ends_with("answer"));
        tokio::time::sleep(Duration::from_secs(5)).await;
        other.write_all(&[UPGRADE_REQUEST, b"too early"].concat()).await.unwrap();
        let mut answer = Vec::new();
        other.read_to_end(&mut answer).await.unwrap();
        assert!(answer.ends_with(b"\r\n\r\n"), "there is no echo");
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_has_begun_gets_less_time_than_an_idle_connection() {
        let drain = Drain::default();
        for (idle, has_asked) in [(0, true), (10, true), (60, true), (0, false)] {
            let mut client = connected(&drain);
            if has_asked {
                ask(&mut client).await;
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
    async fn a_client_that_never_asks_gets_the_time_of_a_head() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        assert!(timeout(Duration::from_secs(29), client.read(&mut [0])).await.is_err());
        assert_eq!(timeout(Duration::from_secs(2), client.read(&mut [0])).await.unwrap().unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_kept_connection_is_served_while_the_program_ends_and_closed_by_its_answer() {
        for rest in [0, 10] {
            let drain = Drain::default();
            let mut client = connected(&drain);
            assert!(!ask(&mut client).await.contains("connection: close"));
            tokio::time::sleep(Duration::from_secs(rest)).await;
            drain.ending.cancel();
            let kept = drain.kept.ended();
            let almost = Duration::from_secs(4);
            assert!(timeout(almost, kept).await.is_err(), "its client does not know yet");
            let answer = ask(&mut client).await;
            assert!(answer.contains("connection: close"), "{answer}");
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "it is closed");
            drain.kept.ended().await;
            // A connection that is accepted now is served, and the drain does not wait for it first.
            let mut late = connected(&drain);
            drain.kept.ended().await;
            assert!(ask(&mut late).await.contains("connection: close"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_has_arrived_when_connections_are_closed_is_served() {
        for rest in [0, 10] {
            let drain = Drain::default();
            let mut client = connected(&drain);
            ask(&mut client).await;
            tokio::time::sleep(Duration::from_secs(rest)).await;
            stop(&drain);
            client.write_all(REQUEST).await.unwrap();
            drain.close.cancel();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            let answer = String::from_utf8(answer).unwrap();
            assert!(answer.contains("connection: close") && answer.ends_with("answer"), "{rest} s: {answer}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn http2_without_asking_is_told_to_use_http1() {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        for rest in [0, 5] {
            let drain = Drain::default();
            let mut client = connected(&drain);
            tokio::time::sleep(Duration::from_secs(rest)).await;
            client.write_all(preface).await.unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            let frames = [&[0, 0, 0, 4, 0, 0, 0, 0, 0][..], &[0, 0, 8, 7], &[0; 12], &[0xd]].concat();
            assert_eq!(answer, frames, "after {rest} s");
        }
    }

    /// How many bytes of a body a client can send after its response, in pieces with a pause between them.
    async fn sent_after_the_answer(pieces: usize, pause: Duration) -> usize {
        let drain = Drain::default();
        let mut client = connected(&drain);
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
    async fn what_is_still_sent_after_an_answer_is_taken_within_bounds() {
        let (quick, slow) = (Duration::ZERO, Duration::from_secs(1));
        assert_eq!(sent_after_the_answer(200, quick).await, 200 * 4096);
        assert_eq!(sent_after_the_answer(9, slow).await, 9 * 4096);
        let (most, ten_seconds) = (LIMITS.max_linger_size as usize, 12 * 4096);
        assert!(sent_after_the_answer(1_000, quick).await <= most + 8 * 4096);
        assert!(sent_after_the_answer(100, slow).await <= ten_seconds);
        // A client that pauses for longer than the bound is disconnected.
        assert!(sent_after_the_answer(100, Duration::from_secs(6)).await <= 2 * 4096);
    }

    #[tokio::test(start_paused = true)]
    async fn the_rest_of_a_body_is_no_request() {
        for method in ["POST", "PUT"] {
            let drain = Drain::default();
            let mut client = connected(&drain);
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
}
