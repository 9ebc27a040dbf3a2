//! Implements the HTTP/1.1 client for the provider: sends a request over a pooled connection, and reports the progress
//! of a failed attempt. A key of a region is sent only to the authority of that region. No other module writes a key to
//! a request head. Redirects are returned, not followed.
//!
//! This HTTP client implements only the part of HTTP/1.1 that Keychoir needs. `docs/adr/0007-http1-client-half.md` has
//! the reasons and measurements, and `src/upstream/tests/strictness.rs` compares it with hyper's client. Other
//! modules use the submodules `connect` and `http_client` for connections to Redis and for requests to other servers.

mod connect;
mod connection;
mod header_name_cache;
mod http_client;
mod idle_pool;
mod loop_marker;
mod probe;
mod reachability;
mod request_head;
mod request_writer;
mod response_body;
mod send_error;
mod tunnel;

pub mod chunk_decoder;
pub mod head;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderMap, Method, Response};
use http_body::Body;

use crate::body::budget::BufferBudget;
use crate::body::replay::{AttemptBody, UploadProgress, UploadWait};
use crate::clock;
use crate::policy::authority::Authority;
use crate::policy::min_rate::MinRate;
use crate::secret::ApiKey;
use crate::tasks::Tasks;

pub use connect::{
    Connect, ConnectError, TcpError, TcpTlsConnector, TlsError, connect_tcp, private_tls_config,
};
use connection::Connection;
pub use connection::{BoxedStream, ByteStream};
use head::{RequestFraming, ResponseHead};
pub use http_client::{HttpClientError, http_client, http_client_through, http_client_trusting};
use idle_pool::IdlePool;
use loop_marker::LoopMarker;
pub use probe::{ProbeError, ProbeTimeouts, RouteProbe, resolve};
pub use reachability::{Reachability, ReachabilityCell};
pub use request_head::UpstreamRequestHead;
use request_writer::{RequestWriteError, RequestWriter};
pub use response_body::{ConnectionError, UpgradedConnection, UpstreamBody, UpstreamBodyError};
pub use send_error::{SendError, SendErrorKind};
pub use tunnel::{ForwardProxyError, ForwardProxyErrorKind};

/// Timeouts and limits of upstream connections.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Timeout of name resolution, TCP connection, tunnel through a forward proxy and TLS handshake together.
    pub connect_timeout: Duration,
    /// Timeout from the last byte of the request to the head of the response.
    pub response_timeout: Duration,
    /// Timeout between two reads of a response body.
    pub stream_idle_timeout: Duration,
    /// Timeout between two chunks of a request body, for a slow client and for a slow provider.
    pub request_body_timeout: Duration,
    /// Minimum rate at which a client must send a request body.
    pub min_request_body_rate: MinRate,
    /// Maximum number of connections kept open without a request.
    pub max_idle_connections: usize,
    /// Maximum time for which an idle connection is kept open.
    pub keepalive_timeout: Duration,
    /// Maximum age of a connection that is reused, so that changes of the DNS records take effect.
    pub max_connection_duration: Duration,
}

/// The HTTP client for the provider, and its connection pools. Clones share the pools.
#[derive(Debug)]
pub struct Upstream<C = TcpTlsConnector> {
    inner: Arc<Inner<C>>,
}

#[derive(Debug)]
struct Inner<C> {
    connector: C,
    /// The pool of the configured authority.
    default_pool: AuthorityPool,
    /// The pools of other regions and of keys with a forward proxy of their own. The first request to an authority adds
    /// its pool.
    other_pools: ArcSwap<Vec<AuthorityPool>>,
    settings: Settings,
    tasks: Tasks,
    loop_marker: LoopMarker,
    reachability: ReachabilityCell,
    /// The budget of the read buffers, or `None` if they are unlimited.
    buffers: Option<BufferBudget>,
}

/// The idle connections to one authority.
#[derive(Clone, Debug)]
struct AuthorityPool {
    authority: Arc<Authority>,
    idle: Arc<IdlePool>,
}

impl AuthorityPool {
    fn new(authority: Arc<Authority>, settings: &Settings, tasks: &Tasks) -> Self {
        let Settings { max_idle_connections, keepalive_timeout, max_connection_duration, .. } = *settings;
        let idle =
            IdlePool::new(max_idle_connections, keepalive_timeout, max_connection_duration, tasks.clone());
        Self { authority, idle: Arc::new(idle) }
    }
}

impl<C> Clone for Upstream<C> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<C> Upstream<C> {
    /// Returns the configured authority, which is used for all keys without an authority of their own.
    #[must_use]
    pub fn authority(&self) -> &Arc<Authority> {
        &self.inner.default_pool.authority
    }
}

impl<C: Connect> Upstream<C> {
    /// Creates a client for `authority`. Connections are opened on demand. The read buffers of connections count
    /// against `buffers`, except for a minimum per connection. If `buffers` is `None`, they are unlimited.
    pub fn new(
        authority: Authority,
        connector: C,
        settings: Settings,
        tasks: Tasks,
        buffers: Option<BufferBudget>,
    ) -> Self {
        let default_pool = AuthorityPool::new(Arc::new(authority), &settings, &tasks);
        Self {
            inner: Arc::new(Inner {
                connector,
                default_pool,
                other_pools: ArcSwap::default(),
                settings,
                tasks,
                loop_marker: LoopMarker::new(),
                reachability: ReachabilityCell::default(),
                buffers,
            }),
        }
    }

    /// Returns a copy of this client with its own connection pools for one of `cores` cores, so that cores do not
    /// contend for the locks of the pools. The limit of idle connections is divided among the cores.
    #[must_use]
    pub fn for_core(&self, cores: usize) -> Self
    where
        C: Clone,
    {
        let inner = &*self.inner;
        let max_idle_connections = inner.settings.max_idle_connections.div_ceil(cores.max(1));
        let settings = Settings { max_idle_connections, ..inner.settings };
        Self {
            inner: Arc::new(Inner {
                connector: inner.connector.clone(),
                default_pool: AuthorityPool::new(Arc::clone(self.authority()), &settings, &inner.tasks),
                other_pools: ArcSwap::default(),
                settings,
                tasks: inner.tasks.clone(),
                loop_marker: inner.loop_marker.clone(),
                reachability: inner.reachability.clone(),
                buffers: inner.buffers.clone(),
            }),
        }
    }

    /// Returns the cell that contains whether the last connection attempt to the configured authority succeeded. The
    /// copies of this client for all cores share the cell.
    #[must_use]
    pub fn reachability(&self) -> &ReachabilityCell {
        &self.inner.reachability
    }

    /// Returns whether this client has sent the request with the given `headers`. If it has, the upstream address leads
    /// back to Keychoir.
    #[must_use]
    pub fn has_sent(&self, headers: &HeaderMap) -> bool {
        self.inner.loop_marker.is_in(headers)
    }

    /// Returns the pool of the key's authority, or of the configured authority if the key has none.
    fn pool_for(&self, key_authority: Option<&Arc<Authority>>) -> AuthorityPool {
        let Inner { default_pool, other_pools, settings, tasks, .. } = &*self.inner;
        let Some(authority) = key_authority.filter(|authority| **authority != default_pool.authority) else {
            return default_pool.clone();
        };
        let find = |pools: &[AuthorityPool]| pools.iter().find(|pool| pool.authority == *authority).cloned();
        if let Some(pool) = find(&other_pools.load()) {
            return pool;
        }
        let new_pool = AuthorityPool::new(Arc::clone(authority), settings, tasks);
        // When two requests add the same authority, the second uses the pool of the first.
        other_pools.rcu(|pools| {
            let mut pools = pools.to_vec();
            if find(&pools).is_none() {
                pools.push(new_pool.clone());
            }
            pools
        });
        find(&other_pools.load()).unwrap_or(new_pool)
    }

    /// Sends one attempt with `key`, and waits for the head of the response. The attempt is sent to `key_authority` if
    /// it is set, and otherwise to the configured authority. The calling task polls the connection.
    ///
    /// If an idle connection turns out to be closed before it accepts a byte of the request, the attempt uses the
    /// next connection.
    ///
    /// # Errors
    ///
    /// Fails when no complete and valid response head was received.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection, so that the provider can cancel the request.
    pub async fn send<B>(
        &self,
        key_authority: Option<&Arc<Authority>>,
        key: &ApiKey,
        request: &UpstreamRequestHead,
        body: AttemptBody<B>,
    ) -> Result<Response<UpstreamBody<B>>, SendError>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let pool = self.pool_for(key_authority);
        let upload = body.upload();
        let framing = RequestFraming::new(&body);
        let head = head::encode_request(&pool.authority, key, request, framing, &self.inner.loop_marker);
        let mut writer = RequestWriter::new(head, framing, body);
        loop {
            let (mut connection, is_reused) = match pool.idle.take(clock::instant()) {
                Some(connection) => (connection, true),
                // The future is boxed, because most requests use an idle connection and do not need it.
                None => (Box::pin(self.open_connection(&pool.authority)).await?, false),
            };
            match self.send_and_receive_head(&mut connection, &mut writer, &request.method, &upload).await {
                Ok(head) if head.status.is_informational() && !request.is_upgraded_by(&head.headers) => {
                    let kind = SendErrorKind::UnexpectedUpgrade(head.status);
                    return Err(SendError::no_response(kind));
                }
                Ok(head) => {
                    let idle_timeout = self.inner.settings.stream_idle_timeout;
                    let body = UpstreamBody::new(&head, connection, writer, pool.idle, idle_timeout);
                    return Ok(into_response(head, body));
                }
                // The provider had closed the idle connection, so the next one is used.
                Err(SendErrorKind::Broken(_)) if !writer.has_started() && is_reused => {}
                // A new connection that accepts no byte counts as a failed connection attempt.
                Err(SendErrorKind::Broken(_)) if !writer.has_started() => {
                    return Err(SendError::unsent(ConnectError::ClosedBeforeRequest.into()));
                }
                Err(kind) => return Err(SendError::no_response(kind)),
            }
        }
    }

    /// Opens a connection within the connect timeout, and records whether the configured authority is reachable.
    async fn open_connection(&self, authority: &Authority) -> Result<Box<Connection>, SendError> {
        let Inner { connector, settings, buffers, .. } = &*self.inner;
        let connect_result =
            tokio::time::timeout(settings.connect_timeout, connector.connect(authority)).await;
        if *authority == **self.authority() {
            let is_connected = connect_result.as_ref().is_ok_and(Result::is_ok);
            let reachability = if is_connected { Reachability::Reachable } else { Reachability::Unreachable };
            self.inner.reachability.set(reachability);
        }
        match connect_result {
            Ok(Ok(stream)) => {
                let reservation =
                    buffers.as_ref().map(|buffers| buffers.reservation(connection::UNBUDGETED_BYTES));
                let reservation = reservation.unwrap_or_default();
                Ok(Box::new(Connection::new(Box::new(stream), reservation)))
            }
            Ok(Err(error)) => Err(SendError::connect(error)),
            Err(_) => {
                let timeout = settings.connect_timeout;
                Err(SendError::unsent(match authority.proxy() {
                    Some(proxy) => SendErrorKind::TunnelTimeout { proxy: proxy.to_string(), timeout },
                    None => SendErrorKind::ConnectTimeout(timeout),
                }))
            }
        }
    }

    /// Sends the request and waits for the response head, which may arrive before the request is complete.
    async fn send_and_receive_head<B>(
        &self,
        connection: &mut Connection,
        writer: &mut RequestWriter<B>,
        method: &Method,
        upload: &UploadProgress<B>,
    ) -> Result<ResponseHead, SendErrorKind>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        poll_fn(|cx| {
            if let Poll::Ready(head) = poll_response_head(cx, connection, writer, method) {
                return Poll::Ready(head.map_err(|error| match upload.waits_for() {
                    UploadWait::Failed => SendErrorKind::ClientBodyFailed,
                    UploadWait::ForClient | UploadWait::ForUpstream | UploadWait::ForResponse => {
                        SendErrorKind::Broken(error)
                    }
                }));
            }
            let (deadline, timeout_error) = self.next_deadline(upload);
            connection.timer.poll_until(deadline, cx).map(|()| Err(timeout_error))
        })
        .await
    }

    /// Returns the deadline of the event for which the attempt waits, and the error of the attempt if the event does
    /// not occur before the deadline.
    fn next_deadline<B: Body<Data = Bytes> + Unpin>(
        &self,
        upload: &UploadProgress<B>,
    ) -> (Instant, SendErrorKind) {
        let Settings { response_timeout, request_body_timeout, min_request_body_rate, .. } =
            self.inner.settings;
        let (timeout, kind) = match upload.waits_for() {
            UploadWait::ForResponse => (response_timeout, SendErrorKind::ResponseTimeout(response_timeout)),
            UploadWait::ForUpstream => {
                (request_body_timeout, SendErrorKind::UploadStalled(request_body_timeout))
            }
            UploadWait::ForClient => {
                (request_body_timeout, SendErrorKind::ClientStalled(request_body_timeout))
            }
            UploadWait::Failed => (request_body_timeout, SendErrorKind::ClientBodyFailed),
        };
        let idle_deadline = upload.last_polled_at() + timeout;
        // A client that sends single bytes never exceeds the idle timeout, and would hold the key's
        // concurrency slot without a limit.
        match upload.min_rate_deadline(min_request_body_rate) {
            Some(rate_deadline) if rate_deadline < idle_deadline => {
                (rate_deadline, SendErrorKind::ClientTooSlow(min_request_body_rate.bytes_per_second))
            }
            _ => (idle_deadline, kind),
        }
    }
}

/// Sends the available bytes of the request and reads until the response head is complete.
fn poll_response_head<B>(
    cx: &mut Context<'_>,
    connection: &mut Connection,
    writer: &mut RequestWriter<B>,
    method: &Method,
) -> Poll<Result<ResponseHead, ConnectionError>>
where
    B: Body<Data = Bytes> + Unpin,
{
    let write_error = if writer.is_complete() {
        None
    } else {
        match writer.poll_send(cx, &mut *connection.stream) {
            Poll::Ready(Err(RequestWriteError::Body)) => return Poll::Ready(Err(ConnectionError::Closed)),
            // The provider has stopped reading the request, but may have sent a response.
            Poll::Ready(Err(RequestWriteError::Connection(error))) => Some(error),
            Poll::Ready(Ok(())) | Poll::Pending => None,
        }
    };
    loop {
        if let Some(head) = connection.decode_head(method)? {
            return Poll::Ready(Ok(head));
        }
        match (connection.poll_fill(cx), write_error.as_ref()) {
            (Poll::Ready(Ok(0)), _) => return Poll::Ready(Err(ConnectionError::Closed)),
            (Poll::Ready(Ok(_)), _) => {}
            (Poll::Ready(Err(error)), _) => return Poll::Ready(Err(ConnectionError::Failed(error))),
            (Poll::Pending, Some(error)) => {
                return Poll::Ready(Err(ConnectionError::Failed(error.kind().into())));
            }
            (Poll::Pending, None) => return Poll::Pending,
        }
    }
}

fn into_response<B>(head: ResponseHead, body: UpstreamBody<B>) -> Response<UpstreamBody<B>> {
    let ResponseHead { status, version, headers, extensions, .. } = head;
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.version_mut() = version;
    *response.headers_mut() = headers;
    *response.extensions_mut() = extensions;
    response
}

#[cfg(test)]
mod tests;
