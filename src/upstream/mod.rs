//! Pooled HTTP/1.1 connections to the provider, over TLS or plain TCP: to one authority, or to the authority
//! that a key belongs to (a region's keys work only at their own host). This is the only module that writes a
//! key to a request head, and its errors state how far the request got.
//!
//! Redirects are responses like any other: they are not followed here.
//!
//! This module contains its own HTTP/1.1 client, which is deliberately limited and not extended:
//! `docs/adr/0007-http1-client-half.md` has the reasons and the figures, and `tests/strictness.rs` compares
//! it with hyper's client.

mod connect;
mod header_name_cache;
mod hop;
mod http_client;
mod idle;
mod reach;
mod request_head;
mod request_writer;
mod response_body;
mod wire;

pub mod chunks;
pub mod head;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderMap, Method, Response, StatusCode};
use http_body::Body;

use crate::body::budget::BufferBudget;
use crate::body::replay::{AttemptBody, Upload, UploadWait};
use crate::clock;
use crate::policy::authority::Authority;
use crate::policy::min_rate::MinRate;
use crate::policy::replay::Progress;
use crate::secret::ApiKey;
use crate::tasks::Tasks;

pub use connect::{Connect, ConnectError, TcpTlsConnector, TlsError};
use head::ResponseHead;
use hop::Hop;
pub use http_client::http_client;
use idle::Idle;
pub use reach::{Reach, ReachCell};
pub use request_head::UpstreamRequestHead;
use request_writer::{RequestWriter, SendFault};
pub use response_body::{Switched, UpstreamBody, UpstreamBodyError, WireError};
use wire::Connection;
pub use wire::{Stream, Wire};

/// Timeouts and limits of upstream connections.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Timeout of name resolution, TCP connection and TLS handshake together.
    pub connect_timeout: Duration,
    /// Timeout from the last byte of the request to the head of the response.
    pub response_timeout: Duration,
    /// Timeout between two pieces of a response.
    pub stream_idle_timeout: Duration,
    /// Timeout between two pieces of a request body, whether the client or the provider is slow.
    pub request_body_timeout: Duration,
    /// Minimum rate at which a client must send a request body.
    pub min_request_body_rate: MinRate,
    /// Maximum connections kept open without a request.
    pub max_idle_connections: usize,
    /// Maximum time that an idle connection is kept.
    pub keepalive_timeout: Duration,
    /// Maximum age at which a connection takes another request, so that address changes of the name are
    /// followed.
    pub max_connection_duration: Duration,
}

/// An attempt that ended without a response.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct SendError {
    /// How far the attempt got.
    pub progress: Progress,
    /// The cause.
    pub kind: SendErrorKind,
}

/// The cause of an attempt's end without a response.
#[derive(Debug, thiserror::Error)]
pub enum SendErrorKind {
    /// No connection could be opened.
    #[error("{0}")]
    Connect(#[from] ConnectError),
    /// No connection was opened in time.
    #[error("no connection within {} ms", .0.as_millis())]
    ConnectTimeout(Duration),
    /// The connection broke before the response head was complete.
    #[error("the connection broke before a response: {0}")]
    Broken(#[source] WireError),
    /// No response head was received in time.
    #[error("no response within {} ms", .0.as_millis())]
    ResponseTimeout(Duration),
    /// The upstream stopped reading the request body.
    #[error("the upstream read no more of the request's body for {} ms", .0.as_millis())]
    UploadStalled(Duration),
    /// The client stopped sending the request body.
    #[error("the client sent no more of its request's body for {} ms", .0.as_millis())]
    ClientStalled(Duration),
    /// The client sends the request body below the minimum rate.
    #[error("the client sends its request's body at less than {0} bytes a second")]
    ClientSlow(u32),
    /// The client's request body broke off or was malformed.
    #[error("the client's request body broke off or was malformed")]
    ClientBroke,
    /// The upstream switched protocols although the request did not ask for it.
    #[error("the upstream switched protocols with {0} although the request did not ask for it")]
    Switched(StatusCode),
}

/// The provider and its pooled connections; a clone shares them.
#[derive(Debug)]
pub struct Upstream<C = TcpTlsConnector> {
    inner: Arc<Inner<C>>,
}

#[derive(Debug)]
struct Inner<C> {
    connector: C,
    /// The pool of keys without an authority of their own.
    common: IdlePool,
    /// The pools of other authorities, added at the first request to each. They are few.
    other_pools: ArcSwap<Vec<IdlePool>>,
    settings: Settings,
    tasks: Tasks,
    hop: Hop,
    reach: ReachCell,
    buffers: Option<BufferBudget>,
}

/// One authority and its idle connections.
#[derive(Clone, Debug)]
struct IdlePool {
    authority: Arc<Authority>,
    idle: Arc<Idle>,
}

impl IdlePool {
    fn new(authority: Arc<Authority>, settings: &Settings, tasks: &Tasks) -> Self {
        let Settings { max_idle_connections, keepalive_timeout, max_connection_duration, .. } = *settings;
        let idle = Idle::new(max_idle_connections, keepalive_timeout, max_connection_duration, tasks.clone());
        Self { authority, idle: Arc::new(idle) }
    }
}

impl<C> Clone for Upstream<C> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<C> Upstream<C> {
    /// The authority of keys that have none of their own.
    #[must_use]
    pub fn authority(&self) -> &Arc<Authority> {
        &self.inner.common.authority
    }
}

impl<C: Connect> Upstream<C> {
    /// An upstream at `authority`. Connections are opened on demand; their read buffers beyond a free minimum
    /// are taken from `buffers`, if there is such a budget.
    pub fn new(
        authority: Authority,
        connector: C,
        settings: Settings,
        tasks: Tasks,
        buffers: Option<BufferBudget>,
    ) -> Self {
        let common = IdlePool::new(Arc::new(authority), &settings, &tasks);
        let (other_pools, hop, reach) = (ArcSwap::default(), Hop::new(), ReachCell::default());
        Self {
            inner: Arc::new(Inner { connector, common, other_pools, settings, tasks, hop, reach, buffers }),
        }
    }

    /// The same upstream for one of `cores` cores: with its own connections, so that no other core contends
    /// for them, and with its part of the idle connections.
    #[must_use]
    pub fn for_core(&self, cores: usize) -> Self
    where
        C: Clone,
    {
        let Inner { connector, common, settings, tasks, hop, reach, buffers, .. } = &*self.inner;
        let max_idle_connections = settings.max_idle_connections.div_ceil(cores.max(1));
        let settings = Settings { max_idle_connections, ..*settings };
        let common = IdlePool::new(Arc::clone(&common.authority), &settings, tasks);
        let (connector, tasks, other_pools) = (connector.clone(), tasks.clone(), ArcSwap::default());
        let (hop, reach, buffers) = (hop.clone(), reach.clone(), buffers.clone());
        Self {
            inner: Arc::new(Inner { connector, common, other_pools, settings, tasks, hop, reach, buffers }),
        }
    }

    /// Whether connections can be opened to the common authority, shared by all cores.
    #[must_use]
    pub fn reach(&self) -> &ReachCell {
        &self.inner.reach
    }

    /// Whether a client's request with these headers was sent by this upstream before: then the upstream
    /// address leads back to Keychoir.
    #[must_use]
    pub fn has_sent(&self, headers: &HeaderMap) -> bool {
        self.inner.hop.marks(headers)
    }

    /// The pool of a key: of its own authority, or the common one.
    fn pool_of(&self, own: Option<&Arc<Authority>>) -> IdlePool {
        let Inner { common, other_pools, settings, tasks, .. } = &*self.inner;
        let Some(own) = own.filter(|own| !Arc::ptr_eq(own, &common.authority) && ***own != *common.authority)
        else {
            return common.clone();
        };
        let existing = |pools: &[IdlePool]| pools.iter().find(|pool| pool.authority == *own).cloned();
        if let Some(pool) = existing(&other_pools.load()) {
            return pool;
        }
        let new = IdlePool::new(Arc::clone(own), settings, tasks);
        // When two requests add the same authority, the second uses the pool of the first.
        other_pools.rcu(|pools| {
            let mut pools = pools.to_vec();
            if existing(&pools).is_none() {
                pools.push(new.clone());
            }
            pools
        });
        existing(&other_pools.load()).unwrap_or(new)
    }

    /// Sends one attempt with `key`, to `own` authority if the key has one, and waits for the head of its
    /// response. The connection is driven by the calling task and has no task of its own.
    ///
    /// An idle connection may have been closed meanwhile. If it accepts no byte of the request, the attempt
    /// uses the next connection.
    ///
    /// # Errors
    ///
    /// When no complete head was received; the error states how far the attempt got.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection, so the provider can cancel the request.
    pub async fn send<B>(
        &self,
        own: Option<&Arc<Authority>>,
        key: &ApiKey,
        request: &UpstreamRequestHead,
        body: AttemptBody<B>,
    ) -> Result<Response<UpstreamBody<B>>, SendError>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let pool = self.pool_of(own);
        let upload = body.upload();
        let length = RequestWriter::length(&body);
        let text = head::write(&pool.authority, key, request, length, &self.inner.hop);
        let mut writer = RequestWriter::new(text, length, body);
        loop {
            let (mut connection, is_reused) = match pool.idle.take(clock::instant()) {
                Some(connection) => (connection, true),
                // Boxed, because most requests use an idle connection and do not need the memory of this
                // future.
                None => (Box::pin(self.open(&pool.authority)).await?, false),
            };
            let response_head =
                self.response_head(&mut connection, &mut writer, &request.method, &upload).await;
            match response_head {
                Ok(head) if head.status.is_informational() && !request.is_upgraded_by(&head.headers) => {
                    let kind = SendErrorKind::Switched(head.status);
                    return Err(SendError { progress: Progress::Unanswered, kind });
                }
                Ok(head) => {
                    let idle_timeout = self.inner.settings.stream_idle_timeout;
                    let idle = Arc::clone(&pool.idle);
                    let body = UpstreamBody::new(&head, connection, writer, idle, idle_timeout);
                    return Ok(response(head, body));
                }
                // The idle connection was closed before it accepted a byte.
                Err(SendErrorKind::Broken(_)) if !writer.has_begun() && is_reused => {}
                // A new connection that accepts no byte counts as unreachable.
                Err(SendErrorKind::Broken(_)) if !writer.has_begun() => {
                    return Err(unsent(ConnectError::ClosedAtOnce.into()));
                }
                Err(kind) => return Err(SendError { progress: Progress::Unanswered, kind }),
            }
        }
    }

    async fn open(&self, authority: &Authority) -> Result<Box<Connection>, SendError> {
        let Inner { connector, settings, buffers, .. } = &*self.inner;
        let opened = tokio::time::timeout(settings.connect_timeout, connector.connect(authority)).await;
        if *authority == *self.inner.common.authority {
            self.inner.reach.set(matches!(opened, Ok(Ok(_))));
        }
        match opened {
            Ok(Ok(stream)) => {
                let share =
                    buffers.as_ref().map(|buffers| buffers.share(wire::FREE_BYTES)).unwrap_or_default();
                Ok(Box::new(Connection::new(Box::new(stream), share)))
            }
            Ok(Err(error)) => Err(unsent(error.into())),
            Err(_) => Err(unsent(SendErrorKind::ConnectTimeout(settings.connect_timeout))),
        }
    }

    /// Sends the request and waits for the head of its response, which may come before the request is
    /// complete.
    async fn response_head<B>(
        &self,
        connection: &mut Connection,
        writer: &mut RequestWriter<B>,
        method: &Method,
        upload: &Upload<B>,
    ) -> Result<ResponseHead, SendErrorKind>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        poll_fn(|cx| {
            if let Poll::Ready(head) = poll_response_head(cx, connection, writer, method) {
                return Poll::Ready(head.map_err(|error| match upload.waiting() {
                    UploadWait::Never => SendErrorKind::ClientBroke,
                    UploadWait::ForClient | UploadWait::ForUpstream | UploadWait::ForResponse => {
                        SendErrorKind::Broken(error)
                    }
                }));
            }
            let (deadline, stalled) = self.deadline(upload);
            connection.timer.poll_until(deadline, cx).map(|()| Err(stalled))
        })
        .await
    }

    /// The next deadline of the attempt, and the error when no bytes move until then.
    fn deadline<B: Body<Data = Bytes> + Unpin>(&self, upload: &Upload<B>) -> (Instant, SendErrorKind) {
        let Settings { response_timeout, request_body_timeout, min_request_body_rate, .. } =
            self.inner.settings;
        let (span, kind) = match upload.waiting() {
            UploadWait::ForResponse => (response_timeout, SendErrorKind::ResponseTimeout(response_timeout)),
            UploadWait::ForUpstream => {
                (request_body_timeout, SendErrorKind::UploadStalled(request_body_timeout))
            }
            UploadWait::ForClient => {
                (request_body_timeout, SendErrorKind::ClientStalled(request_body_timeout))
            }
            UploadWait::Never => (request_body_timeout, SendErrorKind::ClientBroke),
        };
        let idle_at = upload.moved_at() + span;
        // A client that sends single bytes always makes progress, and would occupy the key's concurrency slot
        // without a limit.
        match upload.slow_at(min_request_body_rate) {
            Some(slow_at) if slow_at < idle_at => {
                (slow_at, SendErrorKind::ClientSlow(min_request_body_rate.bytes_per_second))
            }
            _ => (idle_at, kind),
        }
    }
}

/// Polls a connection that sends a request or waits for its response.
fn poll_response_head<B>(
    cx: &mut Context<'_>,
    connection: &mut Connection,
    writer: &mut RequestWriter<B>,
    method: &Method,
) -> Poll<Result<ResponseHead, WireError>>
where
    B: Body<Data = Bytes> + Unpin,
{
    let fault = match writer.is_over() {
        true => None,
        false => match writer.poll_send(cx, &mut *connection.stream) {
            Poll::Ready(Err(SendFault::Body)) => return Poll::Ready(Err(WireError::Closed)),
            // The provider no longer reads the request, but may have sent a response.
            Poll::Ready(Err(SendFault::Wire(error))) => Some(error),
            Poll::Ready(Ok(())) | Poll::Pending => None,
        },
    };
    loop {
        if let Some(head) = connection.read_head(method)? {
            return Poll::Ready(Ok(head));
        }
        match (connection.poll_fill(cx), fault.as_ref()) {
            (Poll::Ready(Ok(0)), _) => return Poll::Ready(Err(WireError::Closed)),
            (Poll::Ready(Ok(_)), _) => {}
            (Poll::Ready(Err(error)), _) => return Poll::Ready(Err(WireError::Failed(error))),
            (Poll::Pending, Some(error)) => return Poll::Ready(Err(WireError::Failed(error.kind().into()))),
            (Poll::Pending, None) => return Poll::Pending,
        }
    }
}

fn response<B>(head: ResponseHead, body: UpstreamBody<B>) -> Response<UpstreamBody<B>> {
    let ResponseHead { status, version, headers, extensions, .. } = head;
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.version_mut() = version;
    *response.headers_mut() = headers;
    *response.extensions_mut() = extensions;
    response
}

fn unsent(kind: SendErrorKind) -> SendError {
    SendError { progress: Progress::Unsent, kind }
}

#[cfg(test)]
mod tests;
