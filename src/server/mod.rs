//! Serves HTTP/1.1 with and without TLS: accepts connections up to a limit, and assigns each to the least loaded
//! worker. Moves an idle connection to a less loaded worker when its next request arrives. Closes the connections in
//! the phases of a [`Drain`]. The [`Service`] that responds to the requests is a type parameter.

mod acceptor;
mod connection;
mod connection_end;
mod connection_state;
mod counting_io;
mod disconnect;
mod http2_refusal;
mod inherited_sockets;
mod linger;
mod listener;
mod parked_future;
mod reset_on_drop;
mod tls;
mod tracked_body;
mod workers;
mod write_timeout;

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::platform::sockets::UnixStream;
use crate::policy::min_rate::MinRate;
use crate::tasks::Tasks;

pub use crate::platform::{open_files_limit, raise_open_files_limit};
pub use inherited_sockets::InheritedSockets;
pub use listener::{Address, Listener};
pub use tls::Tls;
pub use workers::{WorkerPool, WorkerThreads};

use acceptor::{AcceptedConnection, Acceptor};
use connection::IdleConnection;
use connection_state::ConnectionState;
use listener::BACKLOG;

/// Limits of the listener and of each connection.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// Timeout of a request head, measured from its first byte, or from the start of the connection for the
    /// first request. Also the timeout of the first byte of a connection, and of its TLS handshake.
    pub request_headers_timeout: Duration,
    /// Timeout of the first byte of a later request on a kept connection.
    pub keepalive_timeout: Duration,
    /// Maximum time for which a client may continue to send after a response that ends its connection.
    pub linger_timeout: Duration,
    /// Maximum number of bytes that the client may send during `linger_timeout`.
    pub max_linger_size: u64,
    /// Timeout for a client to read any bytes of a response that is being sent.
    pub send_timeout: Duration,
    /// Minimum average rate at which the client must read a response, over the time that writes are blocked.
    pub min_response_rate: MinRate,
    /// The time for which writes may be blocked before `min_response_rate` applies.
    pub response_grace: Duration,
    /// Maximum size of a request head in bytes. A larger head is rejected with a 431 response.
    pub max_request_headers_size: usize,
    /// Maximum number of open connections. Further connections wait to be accepted.
    pub max_connections: usize,
    /// Time without a request after which a connection is idle: it releases its buffers, and its next request
    /// may be served by another worker. A new connection is idle sooner after its first request.
    pub idle_after: Duration,
}

/// Default of `idle_after`. Most connections without a request for one second have none for many seconds.
pub const IDLE_AFTER: Duration = Duration::from_secs(1);

/// The signals and task groups of a drain, in the order of its phases.
///
/// 1. `draining`: every response closes its connection. Only such a response informs a client of the drain,
///    and the client may send a request on an open connection at any moment. Open connections are therefore
///    served until `close_idle`. New connections are accepted as well, because this phase may take seconds.
/// 2. `stop_accepting` starts when `kept_connections` have ended or their timeout has passed. A connection on
///    which no request has arrived yet counts among `requests` for at most a second.
/// 3. `close_idle` starts when `requests` have ended.
/// 4. `abort` starts when the drain exceeds its timeout.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    /// Once cancelled, every response closes its connection.
    pub draining: CancellationToken,
    /// The connections opened before `draining`, each counted until HTTP ends on it: until it is closed or upgraded, or
    /// only discards the bytes that its client still sends.
    pub kept_connections: Tasks,
    /// Once cancelled, no more connections are accepted. Requests in progress continue.
    pub stop_accepting: CancellationToken,
    /// The requests in progress, each counted until the end of its response or of the session that the response
    /// starts. The imminent request of a connection also counts.
    pub requests: Tasks,
    /// Once cancelled, connections without a request are closed.
    pub close_idle: CancellationToken,
    /// Once cancelled, requests in progress are aborted.
    pub abort: CancellationToken,
}

impl Drain {
    /// Returns the same drain with a different group of requests.
    #[must_use]
    pub fn with_requests(&self, requests: Tasks) -> Self {
        Self { requests, ..self.clone() }
    }
}

/// The stream of an upgraded connection.
pub trait UpgradedStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> UpgradedStream for T {}

/// The function that serves an upgraded connection until it is closed. Its arguments are the stream and the bytes
/// that were read beyond the upgrade request. Its future must end when [`Drain::abort`] is cancelled.
pub type Session =
    Box<dyn FnOnce(Box<dyn UpgradedStream>, Bytes) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// A response, and the session that the response may start.
pub struct Reply<B> {
    /// The HTTP response.
    pub response: Response<B>,
    /// The session that takes over the connection. Set only for a 101 response.
    pub session: Option<Session>,
}

impl<B> From<Response<B>> for Reply<B> {
    fn from(response: Response<B>) -> Self {
        Self { response, session: None }
    }
}

/// Responds to requests. Each connection has a clone of its worker's service.
pub trait Service: Clone + Send + Sync + Unpin + 'static {
    /// The body of the responses.
    type Body: Body<Data = Bytes, Error: std::error::Error + Send + Sync + 'static> + Send + 'static;

    /// Responds to one request. `peer` is the IP address of the client. It is `None` for a Unix socket, and for a
    /// client that disconnected before its address was read.
    fn respond(
        &self,
        request: Request<Incoming>,
        peer: Option<IpAddr>,
    ) -> impl Future<Output = Reply<Self::Body>> + Send;
}

/// Limits the open connections of all listeners. Clones share the limit.
#[derive(Clone, Debug)]
pub struct ConnectionLimiter {
    permits: Arc<Semaphore>,
    counts: Arc<ConnectionCounts>,
}

/// The number of open connections, and of all connections since startup.
#[derive(Debug, Default)]
struct ConnectionCounts {
    open: AtomicU64,
    accepted: AtomicU64,
}

/// Counts one open connection until it is dropped.
struct ConnectionPermit {
    counts: Arc<ConnectionCounts>,
    _permit: OwnedSemaphorePermit,
}

impl ConnectionLimiter {
    /// Allows up to `max_connections` open connections.
    #[must_use]
    pub fn new(max_connections: usize) -> Self {
        let permits = Semaphore::new(max_connections.min(Semaphore::MAX_PERMITS));
        Self { permits: Arc::new(permits), counts: Arc::default() }
    }

    /// Returns the number of open connections.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.counts.open.load(Ordering::Relaxed)
    }

    /// Returns the number of connections accepted since startup.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.counts.accepted.load(Ordering::Relaxed)
    }

    /// Counts a connection that was accepted with `permit`.
    fn admit(&self, permit: OwnedSemaphorePermit) -> ConnectionPermit {
        self.counts.open.fetch_add(1, Ordering::Relaxed);
        self.counts.accepted.fetch_add(1, Ordering::Relaxed);
        ConnectionPermit { counts: Arc::clone(&self.counts), _permit: permit }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.counts.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Delay after an accept error such as too many open files, so that the accept loop does not spin.
const ACCEPT_ERROR_DELAY: Duration = Duration::from_millis(100);

/// Maximum consecutive accepts before yielding to other tasks on this worker.
const MAX_CONSECUTIVE_ACCEPTS: u32 = 64;

/// A future that opens a connection. Returns `None` if the connection cannot be opened.
type OpenFuture = Pin<Box<dyn Future<Output = Option<IdleConnection<tls::Stream>>> + Send>>;

/// The origin of a connection that is assigned to a worker.
enum Assignment<'a> {
    /// The connection was just accepted from `peer`.
    New { peer: Option<IpAddr> },
    /// The connection moves from another worker.
    Moved(&'a Arc<ConnectionState>),
}

/// Serves the connections of all listeners.
#[derive(Debug)]
pub struct Server<S> {
    /// The workers, each with its own service.
    pub worker_pool: WorkerPool<S>,
    /// Limits of each connection.
    pub limits: ConnectionLimits,
    /// The limit of open connections.
    pub connection_limiter: ConnectionLimiter,
    /// The signals and task groups of the drain.
    pub drain: Drain,
    /// The tasks that accept connections.
    pub accept_tasks: Tasks,
    /// The tasks that serve connections.
    pub connection_tasks: Tasks,
}

impl<S: Service> Server<S> {
    /// Accepts connections on `listener` until the drain stops it. Serves HTTP and, when `tls` has a
    /// certificate, HTTPS on the same port.
    ///
    /// # Errors
    ///
    /// Fails when the listener cannot be registered with a runtime, or the worker pool is empty.
    pub fn listen(self: &Arc<Self>, listener: Listener, tls: Tls) -> io::Result<()> {
        // One task accepts the connections for all workers, so that each address is bound once and the task
        // can choose the least loaded worker. The task runs on a worker thread, so the connections of that
        // worker are not handed to another thread.
        let worker =
            self.worker_pool.next_worker().ok_or_else(|| io::Error::other("the worker pool is empty"))?;
        let acceptor = {
            let _runtime_guard = worker.handle.enter();
            Acceptor::open(listener)?
        };
        self.accept_tasks.spawn_on(Arc::clone(self).accept(acceptor, tls), &worker.handle);
        Ok(())
    }

    /// Accepts connections and assigns them to workers, until the drain stops it.
    async fn accept(self: Arc<Self>, acceptor: Acceptor, tls: Tls) {
        let mut consecutive_accepts = 0;
        loop {
            let accept_result = tokio::select! {
                () = self.drain.stop_accepting.cancelled() => break,
                accept_result = acceptor.accept(&self.connection_limiter.permits) => accept_result,
            };
            match accept_result {
                Ok((accepted, permit)) => self.assign(accepted, permit, tls.clone()),
                Err(error) => {
                    warn!("a connection cannot be accepted: {error}; the listener continues");
                    tokio::time::sleep(ACCEPT_ERROR_DELAY).await;
                }
            }
            consecutive_accepts += 1;
            if consecutive_accepts == MAX_CONSECUTIVE_ACCEPTS {
                consecutive_accepts = 0;
                tokio::task::yield_now().await;
            }
        }
        // Closing the listener resets the connections in its accept queue, so they are accepted first.
        for _ in 0..BACKLOG {
            let Some((accepted, permit)) = acceptor.accept_pending(&self.connection_limiter.permits) else {
                return;
            };
            self.assign(accepted, permit, tls.clone());
        }
    }

    /// Assigns a new connection to the least loaded worker.
    fn assign(self: &Arc<Self>, accepted: AcceptedConnection, permit: OwnedSemaphorePermit, tls: Tls) {
        let Some(worker_index) = self.worker_pool.least_loaded() else { return };
        let headers_timeout = self.limits.request_headers_timeout;
        let peer = accepted.peer();
        // The future is boxed, so that its memory is freed once the stream is open.
        let open = Box::pin(async move {
            let stream = register_connection(accepted)?;
            tls.accept(stream, headers_timeout).await.map(IdleConnection::from)
        });
        self.serve_on(worker_index, open, Assignment::New { peer }, self.connection_limiter.admit(permit));
    }

    /// Spawns the task that serves a connection on a worker.
    fn serve_on(
        self: &Arc<Self>,
        worker_index: usize,
        open: OpenFuture,
        assignment: Assignment<'_>,
        permit: ConnectionPermit,
    ) {
        let Some(worker) = self.worker_pool.worker(worker_index) else { return };
        let (service, drain) = (worker.service.clone(), Arc::clone(&worker.drain));
        let requests = drain.requests.clone();
        let state = match assignment {
            Assignment::New { peer } => ConnectionState::new(requests, peer),
            Assignment::Moved(state) => {
                state.move_to(requests);
                Arc::clone(state)
            }
        };
        let (server, mut permit, worker_connection) =
            (Arc::clone(self), Some(permit), worker.count_connection());
        let relocate = move |connection, state: &_| {
            // The closure owns the value, so that the connection counts for this worker until its task ends.
            let _ = &worker_connection;
            server.relocate(worker_index, connection, state, &mut permit)
        };
        let serve = connection::serve(open, state, service, self.limits, drain, relocate);
        self.connection_tasks.spawn_on(serve, &worker.handle);
    }

    /// Moves a connection with an imminent request to a less loaded worker. Returns the connection if it
    /// stays on its worker. TLS connections always stay, because their state is bound to their stream.
    fn relocate(
        self: &Arc<Self>,
        worker_index: usize,
        connection: IdleConnection<tls::Stream>,
        state: &Arc<ConnectionState>,
        permit: &mut Option<ConnectionPermit>,
    ) -> Option<IdleConnection<tls::Stream>> {
        let Some(target) = self.worker_pool.less_loaded_than(worker_index) else { return Some(connection) };
        // A drain waits for the requests of one worker after the other, and would miss a request that moves.
        if self.drain.draining.is_cancelled() {
            return Some(connection);
        }
        let IdleConnection { stream, read_buf } = connection;
        let plain_stream = match stream {
            Either::Left(plain_stream) => plain_stream,
            Either::Right(_) => return Some(IdleConnection { stream, read_buf }),
        };
        match AcceptedConnection::deregister(plain_stream) {
            Ok(accepted) => {
                let open = async move {
                    Some(IdleConnection { stream: Either::Left(register_connection(accepted)?), read_buf })
                };
                self.serve_on(target, Box::pin(open), Assignment::Moved(state), permit.take()?);
            }
            Err(error) => debug!("a connection was lost while it moved to another worker: {error}"),
        }
        None
    }
}

/// Registers the stream with the current runtime. Returns `None` if the registration fails.
fn register_connection(accepted: AcceptedConnection) -> Option<Either<TcpStream, UnixStream>> {
    accepted.register().inspect_err(|error| debug!("a connection ended before it was served: {error}")).ok()
}
