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

use super::connection_state::{ActiveRequest, ConnectionState};
use super::counted::{CompletionGuard, CountedBody};
use super::counting_io::{CountingIo, IoCounters};
use super::disconnect::Peek;
use super::ending::{ConnectionEnd, connection_end, finish_last_request};
use super::linger::{Reset, linger, refuse_http2};
use super::parked_future::ParkedFuture;
use super::write_timeout::WriteTimeout;
use super::{ConnectionLimits, Drain, Reply, Service, Session, UpgradedStream};
use crate::tasks::Member;

/// The first idle check of a new connection comes after `ConnectionLimits::idle_after` divided by this.
const FIRST_IDLE_CHECK_DIVISOR: u32 = 64;

/// Serves the stream that `opening` yields, if it yields one, to its end. A drain that begins before the
/// first poll is taken into account.
///
/// When a request arrives on an idle connection, `relocate` may move the connection with its state to another
/// worker: it takes the connection, or returns it to be served on this one.
pub(super) fn serve<S, I, R>(
    opening: impl Future<Output = Option<IdleConnection<I>>> + Send + 'static,
    state: Arc<ConnectionState>,
    service: S,
    limits: ConnectionLimits,
    drain: Arc<Drain>,
    relocate: R,
) -> impl Future<Output = ()> + Send + 'static
where
    S: Service,
    I: AsyncRead + AsyncWrite + Peek + Reset + Unpin + Send + 'static,
    R: FnMut(IdleConnection<I>, &Arc<ConnectionState>) -> Option<IdleConnection<I>> + Send + 'static,
{
    let kept = (!drain.ending.is_cancelled()).then(|| drain.kept.member());
    run(opening, service, limits, drain, (state, kept), relocate)
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
    limits: ConnectionLimits,
    drain: Arc<Drain>,
    (state, kept): (Arc<ConnectionState>, Option<Member>),
    mut relocate: impl FnMut(IdleConnection<I>, &Arc<ConnectionState>) -> Option<IdleConnection<I>> + Send,
) where
    S: Service,
    I: AsyncRead + AsyncWrite + Peek + Reset + Unpin + Send + 'static,
{
    let opened = tokio::select! {
        biased;
        _ = connection_end(&drain, &state, &limits) => return,
        opened = opening => opened,
    };
    let Some(mut connection) = opened else { return };
    state.await_head();
    // Most clients send one request: until a second one has arrived, the pauses between idle checks are short.
    let mut pause = if state.has_had_request() {
        limits.idle_after
    } else {
        limits.idle_after / FIRST_IDLE_CHECK_DIVISOR
    };
    loop {
        let stream = WriteTimeout::new(connection.stream, &limits);
        let stream = CountingIo::new(stream, state.counters().clone()).with_early(connection.early);
        // Boxed and dropped before the connection becomes idle or a session begins: its buffers are not
        // needed then.
        let ended = Box::pin(serve_http(stream, service.clone(), limits, &drain, &state, pause)).await;
        let stream = match ended {
            HttpEnd::Closed => return,
            HttpEnd::Upgraded(upgraded, stream, read) => {
                drop(kept);
                return upgraded.run(state.counters(), stream, read).await;
            }
            HttpEnd::Closing(stream) => {
                drop(kept);
                state.expect_no_request();
                return linger(stream, limits, &drain).await;
            }
            HttpEnd::Idle(stream) => stream,
        };
        let Some(readable) = wait_for_data(stream, limits, &drain, &state).await else { return };
        state.expect_request();
        pause = limits.idle_after;
        match relocate(readable, &state) {
            Some(returned) => connection = returned,
            None => return,
        }
    }
}

/// The end of HTTP on a connection.
enum HttpEnd<I> {
    /// The connection ended.
    Closed,
    /// A 101 was sent; with the bytes that were read beyond its request.
    Upgraded(Upgraded, CountingIo<WriteTimeout<I>>, Bytes),
    /// A response closes the connection, while the client may still be sending.
    Closing(CountingIo<WriteTimeout<I>>),
    /// The connection is idle: no request is under way.
    Idle(CountingIo<WriteTimeout<I>>),
}

/// Serves HTTP requests until the connection ends or becomes idle.
async fn serve_http<S, I>(
    stream: CountingIo<WriteTimeout<I>>,
    service: S,
    limits: ConnectionLimits,
    drain: &Drain,
    state: &Arc<ConnectionState>,
    pause: Duration,
) -> HttpEnd<I>
where
    S: Service,
    I: AsyncRead + AsyncWrite + Peek + Reset + Unpin + Send + 'static,
{
    let upgrade_slot = UpgradeSlot::default();
    let (request_state, slot) = (Arc::clone(state), upgrade_slot.clone());
    let respond = service_fn(move |request: Request<Incoming>| {
        let active_request = request_state.begin_request(!request.body().is_end_stream());
        request_state.counters().phase().begin_request(request.version() >= Version::HTTP_11);
        let upgrade_slot = request.headers().contains_key(UPGRADE).then(|| slot.clone());
        // Boxed and dropped with the request: this future is the largest part of a connection, and an idle
        // connection does not need it.
        Box::pin(respond(request, active_request, service.clone(), Arc::clone(&request_state), upgrade_slot))
    });
    let has_halves = stream.get_ref().has_halves();
    let mut connection = Box::pin(
        http1::Builder::new()
            // `SendingHalf` decides what the end of the stream means, where that is possible.
            .half_close(has_halves)
            // A timer for each head would cost more than all other work here: see
            // `ConnectionState::head_timed_out`.
            .header_read_timeout(None)
            .max_buf_size(limits.max_request_headers_size)
            .serve_connection(TokioIo::new(stream), respond),
    );
    // The end of the connection; `None` when it has become idle.
    let mut end = pin!(ParkedFuture::new(async {
        tokio::select! {
            biased;
            end = connection_end(drain, state, &limits) => Some(end),
            () = state.idle(pause, limits.idle_after) => None,
        }
    }));
    let ended = tokio::select! {
        biased;
        end = end.as_mut() => match end {
            None => {
                // HTTP ends at once only between two messages: bytes of one message must never be taken for
                // the beginning of another.
                connection.as_mut().graceful_shutdown();
                let ended = poll_fn(|cx| Poll::Ready(connection.poll_without_shutdown(cx))).await;
                if let Poll::Ready(Ok(())) = ended {
                    let parts = Pin::into_inner(connection).into_parts();
                    return HttpEnd::Idle(parts.io.into_inner().with_early(parts.read_buf));
                }
                tokio::select! {
                    biased;
                    _ = connection_end(drain, state, &limits) => None,
                    ended = connection.as_mut() => Some(ended),
                }
            }
            Some(ConnectionEnd::WhenIdle) => {
                // A request that has arrived by now is served.
                let polled = poll_fn(|cx| Poll::Ready(connection.as_mut().poll(cx))).await;
                connection.as_mut().graceful_shutdown();
                match polled {
                    Poll::Ready(ended) => Some(ended),
                    Poll::Pending => tokio::select! {
                        ended = connection.as_mut() => Some(ended),
                        // At most the first part of a request head is under way.
                        () = finish_last_request(drain) => None,
                        () = drain.cut.cancelled() => None,
                    },
                }
            }
            Some(ConnectionEnd::AtOnce) => None,
        },
        ended = connection.as_mut() => Some(ended),
    };
    // The rest of the HTTP connection is dropped, with a response that was under way.
    let parts = Pin::into_inner(connection).into_parts();
    let mut stream = parts.io.into_inner();
    if state.is_truncated() {
        stream.get_ref().get_ref().reset_on_drop();
        return HttpEnd::Closed;
    }
    match (ended, upgrade_slot.take()) {
        (Some(Ok(())), Some(upgraded)) => HttpEnd::Upgraded(upgraded, stream, parts.read_buf),
        (Some(Ok(())), None) if state.may_send_body() => HttpEnd::Closing(stream),
        (Some(Ok(())) | None, _) => HttpEnd::Closed,
        (Some(Err(error)), _) => {
            // Clients disconnect and send malformed requests; neither is worth a warning.
            debug!("a connection ended: {error}");
            if error.is_parse_version_h2() {
                refuse_http2(&mut stream).await;
            }
            if error.is_parse() { HttpEnd::Closing(stream) } else { HttpEnd::Closed }
        }
    }
}

/// Returns the response to a request. Puts the session that it starts, if any, into the slot.
async fn respond<S: Service>(
    request: Request<Incoming>,
    active_request: ActiveRequest,
    service: S,
    state: Arc<ConnectionState>,
    upgrade_slot: Option<UpgradeSlot>,
) -> Result<Response<CountedBody<S::Body>>, Infallible> {
    // HTTP/1.0 has no chunks, so a response without a length ends with the connection.
    let may_end_by_close = request.version() < Version::HTTP_11 && request.method() != Method::HEAD;
    let Reply { answer: mut response, session } = service.answer(request, state.peer()).await;
    let counters = state.counters().clone();
    counters.phase().begin_response();
    if let Some((session, slot)) = session.zip(upgrade_slot) {
        // The session counts as a request under way until it ends.
        counters.phase().set_idle();
        slot.put(Upgraded { session, read: counters.bytes(), _active_request: active_request });
        return Ok(response.map(|body| CountedBody::of_session(body, counters)));
    }
    if state.is_ending() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let has_length =
        response.headers().contains_key(CONTENT_LENGTH) || response.body().size_hint().exact().is_some();
    let completion = (may_end_by_close && !has_length).then(|| CompletionGuard::new(state));
    Ok(response.map(|body| CountedBody::of(body, counters, active_request, completion)))
}

/// Bytes read when an idle connection becomes active; HTTP reads the rest into its own buffer. The
/// preface of HTTP/2 has this size, and is recognized only as a whole.
const FIRST_READ_SIZE: usize = 24;

/// Waits without a buffer until bytes can be read. `None` when the connection has ended.
async fn wait_for_data<I>(
    stream: CountingIo<WriteTimeout<I>>,
    limits: ConnectionLimits,
    drain: &Drain,
    state: &ConnectionState,
) -> Option<IdleConnection<I>>
where
    I: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (stream, early) = stream.into_parts();
    let mut stream = stream.into_inner();
    // Copies the beginning of a head, so that its read buffer can be freed.
    let early = early.to_vec();
    if !early.is_empty() {
        state.mark_head_begun();
    }
    let mut first = [0; FIRST_READ_SIZE];
    let read = tokio::select! {
        biased;
        // Polled before the end of the connection: a request that has arrived by then is served.
        read = stream.read(&mut first) => read,
        end = connection_end(drain, state, &limits) => match end {
            ConnectionEnd::WhenIdle => Ok(0),
            ConnectionEnd::AtOnce => return None,
        },
    };
    match read {
        Ok(count @ 1..) => {
            if early.is_empty() {
                state.begin_head();
            }
            let early = [&early, first.get(..count)?].concat();
            Some(IdleConnection { stream, early: early.into() })
        }
        Ok(_) => {
            // A TLS connection sends its close notification, without waiting for a client that does
            // not read it.
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
    fn put(&self, upgraded: Upgraded) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(upgraded);
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
    _active_request: ActiveRequest,
}

impl Upgraded {
    async fn run(self, counters: &IoCounters, stream: impl UpgradedStream + 'static, early: Bytes) {
        let Self { session, read, _active_request } = self;
        // A client that sends bytes before the 101 cannot know whether it sends them to Keychoir or to a
        // server behind it, and no check has seen these bytes.
        let read_since = counters.bytes().saturating_sub(read);
        if early.len() as u64 > read_since {
            return debug!("a connection ended: its client sent bytes before the response to its upgrade");
        }
        session(Box::new(stream), early).await;
    }
}

#[cfg(test)]
pub(super) use tests::LIMITS;

#[cfg(test)]
mod tests;
