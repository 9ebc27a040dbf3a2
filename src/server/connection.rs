//! Serves one connection: runs hyper on its stream, and passes an upgraded connection to its session. While the
//! connection is idle, releases its buffers. When data arrives, offers the idle connection to another worker. Also ends
//! the connection after a timeout, a parse error or a truncated response, and when the drain requires it. The stream is
//! a type parameter, so that tests can use in-memory pipes.

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

use super::connection_end::{ConnectionEnd, finish_last_request, wait_for_connection_end};
use super::connection_state::{ActiveRequest, ConnectionState};
use super::counting_io::{CountingIo, IoCounters};
use super::disconnect::Peek;
use super::http2_refusal::refuse_http2;
use super::linger::linger;
use super::parked_future::ParkedFuture;
use super::reset_on_drop::ResetOnDrop;
use super::tracked_body::{CompletionGuard, TrackedBody};
use super::write_timeout::WriteTimeout;
use super::{ConnectionLimits, Drain, Reply, Service, Session, UpgradedStream};
use crate::tasks::TaskToken;

/// The first idle check of a new connection happens after `ConnectionLimits::idle_after` divided by this
/// number. Most clients send one request, so their connections are idle soon.
const FIRST_IDLE_CHECK_DIVISOR: u32 = 64;

/// Serves the stream that `open` returns until the connection is closed. Unless the drain has started, the connection
/// counts among `Drain::kept_connections` from the call of this function, not from the first poll of its future.
///
/// When data arrives on an idle connection, `relocate` may move the connection and its state to another
/// worker. `relocate` returns the connection if this worker continues to serve it.
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
    I: AsyncRead + AsyncWrite + Peek + ResetOnDrop + Unpin + Send + 'static,
    R: FnMut(IdleConnection<I>, &Arc<ConnectionState>) -> Option<IdleConnection<I>> + Send + 'static,
{
    let kept_connection = (!drain.draining.is_cancelled()).then(|| drain.kept_connections.token());
    run_connection(open, service, limits, drain, (state, kept_connection), relocate)
}

/// A connection that hyper does not serve at the moment: a new connection, or an idle connection on which data has
/// arrived.
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

/// Opens a connection and serves it until it ends or moves to another worker.
async fn run_connection<S, I>(
    open: impl Future<Output = Option<IdleConnection<I>>> + Send,
    service: S,
    limits: ConnectionLimits,
    drain: Arc<Drain>,
    (state, kept_connection): (Arc<ConnectionState>, Option<TaskToken>),
    mut relocate: impl FnMut(IdleConnection<I>, &Arc<ConnectionState>) -> Option<IdleConnection<I>> + Send,
) where
    S: Service,
    I: AsyncRead + AsyncWrite + Peek + ResetOnDrop + Unpin + Send + 'static,
{
    let open_result = tokio::select! {
        biased;
        _ = wait_for_connection_end(&drain, &state, &limits) => return,
        open_result = open => open_result,
    };
    let Some(mut connection) = open_result else { return };
    state.await_head();
    let mut first_idle_check = if state.has_had_request() {
        limits.idle_after
    } else {
        limits.idle_after / FIRST_IDLE_CHECK_DIVISOR
    };
    loop {
        let stream = CountingIo::new(WriteTimeout::new(connection.stream, &limits), state.counters().clone())
            .with_read_buf(connection.read_buf);
        let http = serve_http(stream, service.clone(), limits, &drain, &state, first_idle_check);
        // The future is boxed, so that its buffers are freed before the connection becomes idle or a session
        // starts.
        let idle_stream = match Box::pin(http).await {
            HttpEnd::Closed => return,
            HttpEnd::Upgraded { upgrade, stream, read_buf } => {
                drop(kept_connection);
                return upgrade.run(state.counters(), stream, read_buf).await;
            }
            HttpEnd::Closing(stream) => {
                drop(kept_connection);
                state.expect_no_request();
                return linger(stream, limits, &drain).await;
            }
            HttpEnd::Idle(stream) => stream,
        };
        let Some(readable) = wait_for_data(idle_stream, limits, &drain, &state).await else { return };
        state.expect_request();
        first_idle_check = limits.idle_after;
        match relocate(readable, &state) {
            Some(returned) => connection = returned,
            None => return,
        }
    }
}

/// How HTTP has ended on a connection, which determines what happens to its stream.
enum HttpEnd<I> {
    /// The stream was dropped, and the connection is closed.
    Closed,
    /// A 101 response was sent.
    Upgraded {
        upgrade: Upgrade,
        stream: CountingIo<WriteTimeout<I>>,
        /// The bytes that were read beyond the upgrade request.
        read_buf: Bytes,
    },
    /// The last response was sent, or a message could not be parsed, and the client may still be sending.
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
    I: AsyncRead + AsyncWrite + Peek + ResetOnDrop + Unpin + Send + 'static,
{
    let upgrade_slot = UpgradeSlot::default();
    let (request_state, request_slot) = (Arc::clone(state), upgrade_slot.clone());
    let http_service = service_fn(move |request: Request<Incoming>| {
        let active_request = request_state.begin_request(!request.body().is_end_stream());
        request_state.counters().phase().begin_request(request.version());
        let slot = request.headers().contains_key(UPGRADE).then(|| request_slot.clone());
        // The future is the largest part of the memory of a connection. It is boxed, so that it is freed with the
        // request.
        Box::pin(respond(request, active_request, service.clone(), Arc::clone(&request_state), slot))
    });
    let supports_half_close = stream.get_ref().supports_half_close();
    let mut connection = Box::pin(
        http1::Builder::new()
            // If the stream supports it, `SendingHalf` determines the meaning of the end of the stream.
            .half_close(supports_half_close)
            // `ConnectionState::wait_for_head_timeout` replaces this timeout, because a timer per head costs
            // more than all other work here.
            .header_read_timeout(None)
            .max_buf_size(limits.max_request_headers_size)
            .serve_connection(TokioIo::new(stream), http_service),
    );
    // Returns how the connection must end, or `None` if it has become idle.
    let mut end_or_idle = pin!(ParkedFuture::new(async {
        tokio::select! {
            biased;
            end = wait_for_connection_end(drain, state, &limits) => Some(end),
            () = state.wait_until_idle(first_idle_check, limits.idle_after) => None,
        }
    }));
    let http_result = tokio::select! {
        biased;
        end = end_or_idle.as_mut() => match end {
            None => {
                // Hyper ends immediately only between two messages. Otherwise the bytes of one message could
                // be parsed as the start of another.
                connection.as_mut().graceful_shutdown();
                let poll_result = poll_fn(|cx| Poll::Ready(connection.poll_without_shutdown(cx))).await;
                if let Poll::Ready(Ok(())) = poll_result {
                    let connection_parts = Pin::into_inner(connection).into_parts();
                    return HttpEnd::Idle(connection_parts.io.into_inner().with_read_buf(connection_parts.read_buf));
                }
                tokio::select! {
                    biased;
                    _ = wait_for_connection_end(drain, state, &limits) => None,
                    result = connection.as_mut() => Some(result),
                }
            }
            Some(ConnectionEnd::WhenIdle) => {
                // The connection is polled once more, so that a request that has already arrived is served.
                let poll_result = poll_fn(|cx| Poll::Ready(connection.as_mut().poll(cx))).await;
                connection.as_mut().graceful_shutdown();
                match poll_result {
                    Poll::Ready(result) => Some(result),
                    Poll::Pending => tokio::select! {
                        result = connection.as_mut() => Some(result),
                        // The client may have sent part of a request head.
                        () = finish_last_request(drain) => None,
                        () = drain.abort.cancelled() => None,
                    },
                }
            }
            Some(ConnectionEnd::Immediate) => None,
        },
        result = connection.as_mut() => Some(result),
    };
    // Dropping the HTTP connection also drops a response that is in progress.
    let connection_parts = Pin::into_inner(connection).into_parts();
    let mut stream = connection_parts.io.into_inner();
    if state.is_truncated() {
        stream.get_ref().get_ref().reset_on_drop();
        return HttpEnd::Closed;
    }
    match (http_result, upgrade_slot.take()) {
        (Some(Ok(())), Some(upgrade)) => {
            HttpEnd::Upgraded { upgrade, stream, read_buf: connection_parts.read_buf }
        }
        (Some(Ok(())), None) if state.may_send_body() => HttpEnd::Closing(stream),
        (Some(Ok(())) | None, _) => HttpEnd::Closed,
        (Some(Err(error)), _) => {
            // This is not a warning, because disconnects and malformed requests are normal.
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
) -> Result<Response<TrackedBody<S::Body>>, Infallible> {
    // HTTP/1.0 has no chunked coding, so a response without a length is close-delimited.
    let may_be_close_delimited = request.version() < Version::HTTP_11 && request.method() != Method::HEAD;
    let Reply { mut response, session } = service.respond(request, state.peer()).await;
    let counters = state.counters().clone();
    counters.phase().begin_response();
    if let Some((session, slot)) = session.zip(upgrade_slot) {
        // The session counts as a request in progress until it ends.
        counters.phase().set_idle();
        slot.put(Upgrade {
            session,
            received_bytes: counters.received_bytes(),
            _active_request: active_request,
        });
        return Ok(response.map(|body| TrackedBody::for_session(body, counters)));
    }
    if state.is_ending() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let has_length =
        response.headers().contains_key(CONTENT_LENGTH) || response.body().size_hint().exact().is_some();
    let completion = (may_be_close_delimited && !has_length).then(|| CompletionGuard::new(state));
    Ok(response.map(|body| TrackedBody::new(body, counters, active_request, completion)))
}

/// Maximum number of bytes read when an idle connection becomes active. Hyper reads the following bytes into
/// its own buffer. The HTTP/2 preface has this size, and hyper recognizes it only as a whole.
const FIRST_READ_SIZE: usize = 24;

/// Waits without a read buffer until data arrives. Returns `None` if the connection has ended.
async fn wait_for_data<I>(
    stream: CountingIo<WriteTimeout<I>>,
    limits: ConnectionLimits,
    drain: &Drain,
    state: &ConnectionState,
) -> Option<IdleConnection<I>>
where
    I: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (timeout_stream, read_buf) = stream.into_parts();
    let mut stream = timeout_stream.into_inner();
    // The bytes are copied, so that hyper's read buffer is freed.
    let head_start = read_buf.to_vec();
    drop(read_buf);
    if !head_start.is_empty() {
        state.mark_head_begun();
    }
    let mut first_bytes = [0; FIRST_READ_SIZE];
    let read_result = tokio::select! {
        biased;
        // The read is polled first, so that a request that has already arrived is served.
        read_result = stream.read(&mut first_bytes) => read_result,
        end = wait_for_connection_end(drain, state, &limits) => match end {
            ConnectionEnd::WhenIdle => Ok(0),
            ConnectionEnd::Immediate => return None,
        },
    };
    match read_result {
        Ok(count @ 1..) => {
            if head_start.is_empty() {
                state.begin_head();
            }
            let read_buf = [&head_start, first_bytes.get(..count)?].concat().into();
            Some(IdleConnection { stream, read_buf })
        }
        Ok(_) => {
            // Sends the close notification of TLS, but does not wait until the client reads the notification.
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
struct UpgradeSlot(Arc<Mutex<Option<Upgrade>>>);

impl UpgradeSlot {
    fn put(&self, upgrade: Upgrade) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(upgrade);
    }

    fn take(&self) -> Option<Upgrade> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The session that takes over the connection once the 101 response is sent.
struct Upgrade {
    session: Session,
    /// The number of bytes that had been read from the client when the 101 response was ready.
    received_bytes: u64,
    _active_request: ActiveRequest,
}

impl Upgrade {
    /// Runs the session, unless the client sent bytes before the 101 response.
    async fn run(self, counters: &IoCounters, stream: impl UpgradedStream + 'static, read_buf: Bytes) {
        let Self { session, received_bytes, _active_request } = self;
        // Bytes that were sent before the 101 response are rejected. The client cannot know whether Keychoir or the
        // upstream reads them, and Keychoir has not checked them.
        let bytes_since_response = counters.received_bytes().saturating_sub(received_bytes);
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
