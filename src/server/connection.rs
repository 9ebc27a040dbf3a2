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
mod tests;
