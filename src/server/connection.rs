//! Serves one connection: runs hyper on its stream, releases the buffers while the connection is idle, and
//! hands an upgraded connection to its session. Generic over the stream, so that tests can use in-memory
//! pipes.

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

use super::connection_end::{ConnectionEnd, connection_end, finish_last_request};
use super::connection_state::{ActiveRequest, ConnectionState};
use super::counted_body::{CompletionGuard, CountedBody};
use super::counting_io::{CountingIo, IoCounters};
use super::disconnect::Peek;
use super::linger::{Reset, linger, refuse_http2};
use super::parked_future::ParkedFuture;
use super::write_timeout::WriteTimeout;
use super::{ConnectionLimits, Drain, Reply, Service, Session, UpgradedStream};
use crate::tasks::TaskToken;

/// `ConnectionLimits::idle_after` is divided by this for the first idle check of a new connection: most
/// clients send one request, so the connection is often idle from then on.
const FIRST_IDLE_CHECK_DIVISOR: u32 = 64;

/// Serves the stream that `open` returns, if any, until the connection is closed. The connection counts among
/// `Drain::kept_connections` from this call on, not from the first poll.
///
/// When data arrives on an idle connection, `relocate` may move the connection and its state to another
/// worker. It returns the connection if this worker continues to serve it.
pub(super) fn serve<S, I, R>(
    open: impl Future<Output = Option<IdleConnection<I>>> + Send + 'static,
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
    let kept_connection = (!drain.draining.is_cancelled()).then(|| drain.kept_connections.token());
    run(open, service, limits, drain, (state, kept_connection), relocate)
}

/// A connection whose next request is about to arrive.
pub(super) struct IdleConnection<I> {
    pub(super) stream: I,
    /// Bytes that were already read from the stream.
    pub(super) read_buf: Bytes,
}

impl<I> From<I> for IdleConnection<I> {
    fn from(stream: I) -> Self {
        Self { stream, read_buf: Bytes::new() }
    }
}

async fn run<S, I>(
    open: impl Future<Output = Option<IdleConnection<I>>> + Send,
    service: S,
    limits: ConnectionLimits,
    drain: Arc<Drain>,
    (state, kept_connection): (Arc<ConnectionState>, Option<TaskToken>),
    mut relocate: impl FnMut(IdleConnection<I>, &Arc<ConnectionState>) -> Option<IdleConnection<I>> + Send,
) where
    S: Service,
    I: AsyncRead + AsyncWrite + Peek + Reset + Unpin + Send + 'static,
{
    let opened = tokio::select! {
        biased;
        _ = connection_end(&drain, &state, &limits) => return,
        opened = open => opened,
    };
    let Some(mut connection) = opened else { return };
    state.await_head();
    let mut first_idle_check = if state.has_had_request() {
        limits.idle_after
    } else {
        limits.idle_after / FIRST_IDLE_CHECK_DIVISOR
    };
    loop {
        let stream = WriteTimeout::new(connection.stream, &limits);
        let stream = CountingIo::new(stream, state.counters().clone()).with_read_buf(connection.read_buf);
        // Boxed, so that its buffers are freed before the connection becomes idle or a session starts.
        let http = serve_http(stream, service.clone(), limits, &drain, &state, first_idle_check);
        let stream = match Box::pin(http).await {
            HttpEnd::Closed => return,
            HttpEnd::Upgraded(upgraded, stream, read_buf) => {
                drop(kept_connection);
                return upgraded.run(state.counters(), stream, read_buf).await;
            }
            HttpEnd::Closing(stream) => {
                drop(kept_connection);
                state.expect_no_request();
                return linger(stream, limits, &drain).await;
            }
            HttpEnd::Idle(stream) => stream,
        };
        let Some(readable) = wait_for_data(stream, limits, &drain, &state).await else { return };
        state.expect_request();
        first_idle_check = limits.idle_after;
        match relocate(readable, &state) {
            Some(returned) => connection = returned,
            None => return,
        }
    }
}

/// How HTTP ended on a connection.
enum HttpEnd<I> {
    /// The connection is closed.
    Closed,
    /// A 101 response was sent. Contains the bytes that were read beyond the upgrade request.
    Upgraded(Upgraded, CountingIo<WriteTimeout<I>>, Bytes),
    /// The last response was sent, but the client may still be sending.
    Closing(CountingIo<WriteTimeout<I>>),
    /// No request is in progress, and hyper has released the stream.
    Idle(CountingIo<WriteTimeout<I>>),
}

/// Serves HTTP requests until the connection ends or becomes idle.
async fn serve_http<S, I>(
    stream: CountingIo<WriteTimeout<I>>,
    service: S,
    limits: ConnectionLimits,
    drain: &Drain,
    state: &Arc<ConnectionState>,
    first_idle_check: Duration,
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
        // Boxed, so that it is freed with the request: this future is the largest part of a connection.
        Box::pin(respond(request, active_request, service.clone(), Arc::clone(&request_state), upgrade_slot))
    });
    let supports_half_close = stream.get_ref().supports_half_close();
    let mut connection = Box::pin(
        http1::Builder::new()
            // `SendingHalf` decides what the end of the stream means, where that is possible.
            .half_close(supports_half_close)
            // `ConnectionState::head_timed_out` replaces it, because a timer per head costs more than all
            // other work here.
            .header_read_timeout(None)
            .max_buf_size(limits.max_request_headers_size)
            .serve_connection(TokioIo::new(stream), respond),
    );
    // The end of the connection, or `None` when it has become idle.
    let mut end = pin!(ParkedFuture::new(async {
        tokio::select! {
            biased;
            end = connection_end(drain, state, &limits) => Some(end),
            () = state.idle(first_idle_check, limits.idle_after) => None,
        }
    }));
    let ended = tokio::select! {
        biased;
        end = end.as_mut() => match end {
            None => {
                // Hyper ends immediately only between two messages. Otherwise the bytes of one message could
                // be parsed as the start of another.
                connection.as_mut().graceful_shutdown();
                let ended = poll_fn(|cx| Poll::Ready(connection.poll_without_shutdown(cx))).await;
                if let Poll::Ready(Ok(())) = ended {
                    let parts = Pin::into_inner(connection).into_parts();
                    return HttpEnd::Idle(parts.io.into_inner().with_read_buf(parts.read_buf));
                }
                tokio::select! {
                    biased;
                    _ = connection_end(drain, state, &limits) => None,
                    ended = connection.as_mut() => Some(ended),
                }
            }
            Some(ConnectionEnd::WhenIdle) => {
                // Polled once more, so that a request that has already arrived is served.
                let polled = poll_fn(|cx| Poll::Ready(connection.as_mut().poll(cx))).await;
                connection.as_mut().graceful_shutdown();
                match polled {
                    Poll::Ready(ended) => Some(ended),
                    Poll::Pending => tokio::select! {
                        ended = connection.as_mut() => Some(ended),
                        // The client may have sent part of a request head.
                        () = finish_last_request(drain) => None,
                        () = drain.abort.cancelled() => None,
                    },
                }
            }
            Some(ConnectionEnd::Immediate) => None,
        },
        ended = connection.as_mut() => Some(ended),
    };
    // Dropping the HTTP connection also drops a response that is in progress.
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
            // Not a warning: disconnects and malformed requests are normal.
            debug!("a connection ended: {error}");
            if error.is_parse_version_h2() {
                refuse_http2(&mut stream).await;
            }
            if error.is_parse() { HttpEnd::Closing(stream) } else { HttpEnd::Closed }
        }
    }
}

/// Responds to a request. Stores the session of a 101 response in `upgrade_slot`.
async fn respond<S: Service>(
    request: Request<Incoming>,
    active_request: ActiveRequest,
    service: S,
    state: Arc<ConnectionState>,
    upgrade_slot: Option<UpgradeSlot>,
) -> Result<Response<CountedBody<S::Body>>, Infallible> {
    // HTTP/1.0 has no chunked coding, so the end of the connection ends a response without a length.
    let may_end_by_close = request.version() < Version::HTTP_11 && request.method() != Method::HEAD;
    let Reply { mut response, session } = service.respond(request, state.peer()).await;
    let counters = state.counters().clone();
    counters.phase().begin_response();
    if let Some((session, slot)) = session.zip(upgrade_slot) {
        // The session counts as a request in progress until it ends.
        counters.phase().set_idle();
        slot.put(Upgraded { session, bytes_read: counters.bytes(), _active_request: active_request });
        return Ok(response.map(|body| CountedBody::for_session(body, counters)));
    }
    if state.is_ending() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let has_length =
        response.headers().contains_key(CONTENT_LENGTH) || response.body().size_hint().exact().is_some();
    let completion = (may_end_by_close && !has_length).then(|| CompletionGuard::new(state));
    Ok(response.map(|body| CountedBody::new(body, counters, active_request, completion)))
}

/// Maximum number of bytes read when an idle connection becomes active; hyper reads the rest into its own
/// buffer. The HTTP/2 preface has this size, and hyper recognizes it only as a whole.
const FIRST_READ_SIZE: usize = 24;

/// Waits without a read buffer until data arrives. `None` when the connection has ended.
async fn wait_for_data<I>(
    stream: CountingIo<WriteTimeout<I>>,
    limits: ConnectionLimits,
    drain: &Drain,
    state: &ConnectionState,
) -> Option<IdleConnection<I>>
where
    I: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (stream, read_buf) = stream.into_parts();
    let mut stream = stream.into_inner();
    // Copied, so that hyper's read buffer is freed.
    let read_buf = read_buf.to_vec();
    if !read_buf.is_empty() {
        state.mark_head_begun();
    }
    let mut first = [0; FIRST_READ_SIZE];
    let read = tokio::select! {
        biased;
        // Polled before the end of the connection, so that a request that has already arrived is served.
        read = stream.read(&mut first) => read,
        end = connection_end(drain, state, &limits) => match end {
            ConnectionEnd::WhenIdle => Ok(0),
            ConnectionEnd::Immediate => return None,
        },
    };
    match read {
        Ok(count @ 1..) => {
            if read_buf.is_empty() {
                state.begin_head();
            }
            let read_buf = [&read_buf, first.get(..count)?].concat();
            Some(IdleConnection { stream, read_buf: read_buf.into() })
        }
        Ok(_) => {
            // Sends the close notification of TLS, but does not wait for a client that does not read it.
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

/// Holds the session of an upgraded connection between its response and the end of HTTP.
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

/// The session that takes over the connection once the 101 is sent.
struct Upgraded {
    session: Session,
    /// Bytes read from the client when the 101 was ready.
    bytes_read: u64,
    _active_request: ActiveRequest,
}

impl Upgraded {
    async fn run(self, counters: &IoCounters, stream: impl UpgradedStream + 'static, read_buf: Bytes) {
        let Self { session, bytes_read, _active_request } = self;
        // Bytes sent before the 101 are refused: the client cannot know whether Keychoir or a server behind
        // it reads them, and Keychoir has not checked them.
        let bytes_since_response = counters.bytes().saturating_sub(bytes_read);
        if read_buf.len() as u64 > bytes_since_response {
            return debug!(
                "a connection ended: the client sent bytes before the response to its upgrade request"
            );
        }
        session(Box::new(stream), read_buf).await;
    }
}

#[cfg(test)]
pub(super) use tests::LIMITS;

#[cfg(test)]
mod tests;
