//! Accepts connections, hands each to a worker and serves HTTP/1.1 on it. Independent of the service that
//! responds to the requests.

mod acceptor;
mod connection;
mod connection_state;
mod counted;
mod counting_io;
mod disconnect;
mod ending;
mod files;
mod inherited_sockets;
mod linger;
mod listener;
mod parked_future;
mod tls;
mod unix;
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
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::policy::min_rate::MinRate;
use crate::tasks::Tasks;

pub use files::{open_files_max, raise_open_files};
pub use inherited_sockets::InheritedSockets;
pub use listener::{Address, Listener};
pub use tls::Tls;
pub use workers::{WorkerPool, WorkerThreads};

use acceptor::{Accepted, Acceptor};
use connection::IdleConnection;
use connection_state::ConnectionState;
use listener::BACKLOG;

/// Limits of the listener and of each connection.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// Timeout of a request head, from its first byte on; of a connection's first request; and of its first
    /// byte and its TLS handshake.
    pub request_headers_timeout: Duration,
    /// Timeout of the first byte of a later request on a kept connection.
    pub keepalive_timeout: Duration,
    /// Time for which a client may continue to send after a response that ends its connection.
    pub linger_timeout: Duration,
    /// Maximum bytes that the client may send then.
    pub max_linger_size: u64,
    /// Timeout for a client to read any bytes of a response that is being sent.
    pub send_timeout: Duration,
    /// Minimum rate at which the client must read the response, while the server waits for it.
    pub min_response_rate: MinRate,
    /// Time that the server waits for the client before the rate applies.
    pub response_grace: Duration,
    /// Maximum size of a request head in bytes; a larger one is refused with 431.
    pub max_request_headers_size: usize,
    /// Maximum open connections; further ones wait to be accepted.
    pub max_connections: usize,
    /// A connection without a request for this long, or a new one for as long as its first request took,
    /// releases its buffers until the next request, which another worker may serve.
    pub idle_after: Duration,
}

/// Default of `idle_after`: most connections that have been idle for one second stay idle for many.
pub const IDLE_AFTER: Duration = Duration::from_secs(1);

/// The signals and task groups of a drain: `ending` first, then `stop` when `kept` has ended or its
/// timeout has passed, then `close` when `requests` has ended, then `cut` when that takes too long.
///
/// From `ending` on, every response closes its connection. A client cannot know of the drain before
/// it has received such a response, and may send a request on a kept connection at any moment; so
/// these connections are served up to `close`, and are closed by their next response. Until `stop`,
/// new connections are accepted as well, because this phase may take seconds. A connection that was
/// accepted and has sent no request yet counts among `requests` for at most a second.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    /// Responses close their connections.
    pub ending: CancellationToken,
    /// The connections from before `ending`, each until it is closed or taken over by a session.
    pub kept: Tasks,
    /// No more connections are accepted; requests under way continue.
    pub stop: CancellationToken,
    /// The requests under way, up to the end of their responses.
    pub requests: Tasks,
    /// Connections without a request are closed.
    pub close: CancellationToken,
    /// Requests under way are cut.
    pub cut: CancellationToken,
}

impl Drain {
    /// The same drain for another group of requests.
    #[must_use]
    pub fn with_requests(&self, requests: Tasks) -> Self {
        Self { requests, ..self.clone() }
    }
}

/// The stream of a connection that a session takes over.
pub trait UpgradedStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> UpgradedStream for T {}

/// A session that uses a connection after a 101, to its end: it receives the stream, and the bytes that the
/// client has sent meanwhile. It must end when `cut` is cancelled.
pub type Session =
    Box<dyn FnOnce(Box<dyn UpgradedStream>, Bytes) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// The reply of a service to a request.
pub struct Reply<B> {
    /// The HTTP response.
    pub answer: Response<B>,
    /// The session that takes the connection over; only with a response of 101.
    pub session: Option<Session>,
}

impl<B> From<Response<B>> for Reply<B> {
    fn from(answer: Response<B>) -> Self {
        Self { answer, session: None }
    }
}

/// Responds to requests. Each connection has a clone of its worker's service.
pub trait Service: Clone + Send + Sync + Unpin + 'static {
    /// The body of its responses.
    type Body: Body<Data = Bytes, Error: std::error::Error + Send + Sync + 'static> + Send + 'static;

    /// Returns the response to one request. `peer` is the address of the client; a client on a Unix socket has
    /// none.
    fn answer(
        &self,
        request: Request<Incoming>,
        peer: Option<IpAddr>,
    ) -> impl Future<Output = Reply<Self::Body>> + Send;
}

/// Limits the open connections of all listeners; a clone shares the limit.
#[derive(Clone, Debug)]
pub struct ConnectionLimiter {
    permits: Arc<Semaphore>,
    counts: Arc<ConnectionCount>,
}

#[derive(Debug, Default)]
struct ConnectionCount {
    open: AtomicU64,
    accepted: AtomicU64,
}

/// The permit of an open connection, until it is dropped.
struct ConnectionPermit {
    counts: Arc<ConnectionCount>,
    _permit: OwnedSemaphorePermit,
}

impl ConnectionLimiter {
    /// Allows up to `max_connections` open connections.
    #[must_use]
    pub fn new(max_connections: usize) -> Self {
        let permits = Semaphore::new(max_connections.min(Semaphore::MAX_PERMITS));
        Self { permits: Arc::new(permits), counts: Arc::default() }
    }

    /// Connections open now.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.counts.open.load(Ordering::Relaxed)
    }

    /// Connections accepted since the start.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.counts.accepted.load(Ordering::Relaxed)
    }

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

/// Pause after an error such as too many open files: the accept loop must neither spin nor end.
const ACCEPT_ERROR_PAUSE: Duration = Duration::from_millis(100);

/// Maximum consecutive accepts before yielding to other tasks on this worker.
const MAX_CONSECUTIVE_ACCEPTS: u32 = 64;

/// The future that opens a connection.
type Opening = Pin<Box<dyn Future<Output = Option<IdleConnection<tls::Stream>>> + Send>>;

/// A connection that a worker is to serve.
enum Assignment<'a> {
    /// The connection was accepted just now.
    New {
        /// The address of the client.
        peer: Option<IpAddr>,
    },
    /// The connection was served by another worker before.
    Moved(&'a Arc<ConnectionState>),
}

/// Serves the connections of all listeners.
#[derive(Debug)]
pub struct Server<S> {
    /// The workers and their services.
    pub worker_pool: WorkerPool<S>,
    /// Limits of each connection.
    pub limits: ConnectionLimits,
    /// The limit of open connections.
    pub connection_limiter: ConnectionLimiter,
    /// The signals by which the server drains.
    pub drain: Drain,
    /// The group of the accepting tasks.
    pub accepting: Tasks,
    /// The group of the connection tasks.
    pub connections: Tasks,
}

impl<S: Service> Server<S> {
    /// Accepts connections on this listener until the drain stops it; HTTP, and HTTPS where `tls` has a
    /// certificate, use the same port.
    ///
    /// # Errors
    ///
    /// When the system refuses, or when there is no worker.
    pub fn listen(self: &Arc<Self>, listener: Listener, tls: Tls) -> io::Result<()> {
        // One task accepts for all workers: each address is bound once, and the task can choose the worker
        // with the least load. It runs on a worker, so connections that this worker serves itself cross no
        // thread.
        let worker = self.worker_pool.take_turn().ok_or_else(|| io::Error::other("there is no worker"))?;
        let acceptor = {
            let _runtime = worker.handle.enter();
            Acceptor::open(listener)?
        };
        self.accepting.spawn_on(Arc::clone(self).accept(acceptor, tls), &worker.handle);
        Ok(())
    }

    async fn accept(self: Arc<Self>, acceptor: Acceptor, tls: Tls) {
        let mut consecutive_accepts = 0;
        loop {
            let accepted = tokio::select! {
                () = self.drain.stop.cancelled() => break,
                accepted = acceptor.accept(&self.connection_limiter.permits) => accepted,
            };
            match accepted {
                Ok((accepted, permit)) => self.assign(accepted, permit, tls.clone()),
                Err(error) => {
                    warn!("a connection cannot be accepted: {error}; the listener continues");
                    tokio::time::sleep(ACCEPT_ERROR_PAUSE).await;
                }
            }
            consecutive_accepts += 1;
            if consecutive_accepts == MAX_CONSECUTIVE_ACCEPTS {
                consecutive_accepts = 0;
                tokio::task::yield_now().await;
            }
        }
        // Closing the listener would reset the connections that the system has already accepted.
        for _ in 0..BACKLOG {
            let Some((accepted, permit)) = acceptor.accept_pending(&self.connection_limiter.permits) else {
                return;
            };
            self.assign(accepted, permit, tls.clone());
        }
    }

    /// Passes a new connection to the worker with the least load.
    fn assign(self: &Arc<Self>, accepted: Accepted, permit: OwnedSemaphorePermit, tls: Tls) {
        let Some(number) = self.worker_pool.least_loaded() else { return };
        let headers_timeout = self.limits.request_headers_timeout;
        let peer = accepted.peer();
        // Boxed, so that it takes no memory once the stream is open.
        let opening = Box::pin(async move {
            let stream = register(accepted)?;
            tls.open(stream, headers_timeout).await.map(IdleConnection::from)
        });
        self.serve_on(number, opening, Assignment::New { peer }, self.connection_limiter.admit(permit));
    }

    /// Spawns the task that serves a connection on a worker: a new one, or one that has moved with its state.
    fn serve_on(
        self: &Arc<Self>,
        number: usize,
        opening: Opening,
        assignment: Assignment<'_>,
        permit: ConnectionPermit,
    ) {
        let Some(worker) = self.worker_pool.worker(number) else { return };
        let (service, drain) = (worker.service.clone(), Arc::clone(&worker.drain));
        let requests = drain.requests.clone();
        let state = match assignment {
            Assignment::New { peer } => ConnectionState::new(requests, peer),
            Assignment::Moved(state) => {
                state.move_to(requests);
                Arc::clone(state)
            }
        };
        let (server, mut permit, count) = (Arc::clone(self), Some(permit), worker.count_connection());
        let relocate = move |connection, state: &_| {
            // The connection counts for this worker until it is closed, or moved to another worker.
            let _ = &count;
            server.relocate(number, connection, state, &mut permit)
        };
        let serving = connection::serve(opening, state, service, self.limits, drain, relocate);
        self.connections.spawn_on(serving, &worker.handle);
    }

    /// Moves a connection with an imminent request to another worker, when its own has more load. TLS
    /// connections stay: their state is bound to their stream.
    fn relocate(
        self: &Arc<Self>,
        number: usize,
        connection: IdleConnection<tls::Stream>,
        state: &Arc<ConnectionState>,
        permit: &mut Option<ConnectionPermit>,
    ) -> Option<IdleConnection<tls::Stream>> {
        let Some(target) = self.worker_pool.less_loaded_than(number) else { return Some(connection) };
        // During a drain, the requests of each worker are awaited one after the other.
        if self.drain.ending.is_cancelled() {
            return Some(connection);
        }
        let IdleConnection { stream, early } = connection;
        let stream = match stream {
            Either::Left(stream) => stream,
            Either::Right(_) => return Some(IdleConnection { stream, early }),
        };
        match Accepted::deregister(stream) {
            Ok(moving) => {
                let opening =
                    async move { Some(IdleConnection { stream: Either::Left(register(moving)?), early }) };
                self.serve_on(target, Box::pin(opening), Assignment::Moved(state), permit.take()?);
            }
            Err(error) => debug!("a connection ended on its way to another worker: {error}"),
        }
        None
    }
}

/// Binds the stream to the current runtime; `None` when that fails.
fn register(accepted: Accepted) -> Option<Either<TcpStream, UnixStream>> {
    match accepted.register() {
        Ok(stream) => Some(stream),
        Err(error) => {
            debug!("a connection ended before it began: {error}");
            None
        }
    }
}
