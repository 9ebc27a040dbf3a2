//! Accepts connections, hands each to a worker and serves HTTP/1.1 on it. Independent of the service that
//! responds to the requests.

mod acceptor;
mod connection;
mod connection_state;
mod counted;
mod counting_io;
mod ending;
mod files;
mod inherited_sockets;
mod leaving;
mod linger;
mod listener;
mod parked_future;
mod tls;
mod unix;
mod workers;
mod write_timeout;

use std::future::Future;
use std::io;
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
use connection_state::ConnectionHistory;
use listener::BACKLOG;

/// Limits of the listener and of each connection.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Timeout of a request head, from its first byte on; of a connection's first request; and of its first
    /// byte and its TLS handshake.
    pub request_headers_timeout: Duration,
    /// Timeout of the first byte of a later request on a kept connection.
    pub keepalive_timeout: Duration,
    /// How long a client may continue to send after a response that ends its connection.
    pub linger_timeout: Duration,
    /// Maximum bytes that the client may send then.
    pub max_linger_size: u64,
    /// Timeout for a client to read some bytes of a response that waits for it.
    pub send_timeout: Duration,
    /// Minimum rate at which the client must read the response, while the server waits for it.
    pub min_response_rate: MinRate,
    /// How long the server waits for the client before the rate applies.
    pub response_grace: Duration,
    /// Maximum size of a request head in bytes; a larger one is refused with 431.
    pub max_request_headers_size: usize,
    /// Maximum open connections; further ones wait to be accepted.
    pub max_connections: usize,
    /// A connection without a request for this long, or a new one for as long as its first request took,
    /// frees its buffers until the next request, which another worker may serve.
    pub rest_after: Duration,
}

/// Most connections that have been idle for a second stay idle for many.
pub const REST_AFTER: Duration = Duration::from_secs(1);

/// How a server drains: `ending` first, then `stop` when `kept` has ended or its time is over, then `close`
/// when `requests` has ended, then `cut` when that takes too long.
///
/// From `ending` on, every response closes its connection. A client cannot know of the drain before it has
/// received such a response, and may send a request on a kept connection at any moment; so these connections
/// are served up to `close`, and are closed by their next response. Until `stop`, new connections are
/// accepted as well, because it may take seconds. A connection that was accepted and has sent no request yet
/// counts among `requests` for a moment.
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
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A session that uses a connection after a 101, to its end: it receives the stream, and the bytes that the
/// client has sent meanwhile. It must end when `cut` is cancelled.
pub type Session = Box<dyn FnOnce(Box<dyn Stream>, Bytes) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// What a service returns for a request.
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

    /// Returns the response to one request.
    fn answer(&self, request: Request<Incoming>) -> impl Future<Output = Reply<Self::Body>> + Send;
}

/// Limits the open connections of all listeners; a clone shares the limit.
#[derive(Clone, Debug)]
pub struct ConnectionLimiter {
    places: Arc<Semaphore>,
    guests: Arc<ConnectionCount>,
}

#[derive(Debug, Default)]
struct ConnectionCount {
    open: AtomicU64,
    accepted: AtomicU64,
}

/// The permit of an open connection, until it is dropped.
struct ConnectionPermit {
    guests: Arc<ConnectionCount>,
    _place: OwnedSemaphorePermit,
}

impl ConnectionLimiter {
    /// Allows up to `connections_max` open connections.
    #[must_use]
    pub fn new(connections_max: usize) -> Self {
        let places = Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS));
        Self { places: Arc::new(places), guests: Arc::default() }
    }

    /// Connections open now.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.guests.open.load(Ordering::Relaxed)
    }

    /// Connections accepted since the start.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.guests.accepted.load(Ordering::Relaxed)
    }

    fn enter(&self, place: OwnedSemaphorePermit) -> ConnectionPermit {
        self.guests.open.fetch_add(1, Ordering::Relaxed);
        self.guests.accepted.fetch_add(1, Ordering::Relaxed);
        ConnectionPermit { guests: Arc::clone(&self.guests), _place: place }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.guests.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Pause after an error such as too many open files: the accept loop must neither spin nor end.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// Maximum consecutive accepts before yielding to other tasks on this worker.
const ACCEPTED_MAX: u32 = 64;

/// The future that opens a connection.
type Opening = Pin<Box<dyn Future<Output = Option<IdleConnection<tls::Stream>>> + Send>>;

/// Serves the connections of all listeners.
#[derive(Debug)]
pub struct Server<S> {
    /// The workers and their services.
    pub crew: WorkerPool<S>,
    /// Limits of each connection.
    pub limits: Limits,
    /// The limit of open connections.
    pub room: ConnectionLimiter,
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
        let post = self.crew.any().ok_or_else(|| io::Error::other("there is no worker"))?;
        let door = {
            let _runtime = post.handle.enter();
            Acceptor::open(listener)?
        };
        self.accepting.spawn_on(Arc::clone(self).accept(door, tls), &post.handle);
        Ok(())
    }

    async fn accept(self: Arc<Self>, door: Acceptor, tls: Tls) {
        let mut in_one_go = 0;
        loop {
            let accepted = tokio::select! {
                () = self.drain.stop.cancelled() => break,
                accepted = door.accept(&self.room.places) => accepted,
            };
            match accepted {
                Ok((accepted, place)) => self.hand_over(accepted, place, tls.clone()),
                Err(error) => {
                    warn!("a connection cannot be accepted: {error}; trying on");
                    tokio::time::sleep(ACCEPT_REST).await;
                }
            }
            in_one_go += 1;
            if in_one_go == ACCEPTED_MAX {
                in_one_go = 0;
                tokio::task::yield_now().await;
            }
        }
        // Closing the listener would reset the connections that the system has already accepted.
        for _ in 0..BACKLOG {
            let Some((accepted, place)) = door.accept_waiting(&self.room.places) else { return };
            self.hand_over(accepted, place, tls.clone());
        }
    }

    fn hand_over(self: &Arc<Self>, accepted: Accepted, place: OwnedSemaphorePermit, tls: Tls) {
        let Some(number) = self.crew.least() else { return };
        let head_read_max = self.limits.request_headers_timeout;
        // Boxed, so that it takes no memory once the stream is open.
        let opening = Box::pin(async move {
            let stream = here(accepted)?;
            tls.open(stream, head_read_max).await.map(IdleConnection::from)
        });
        self.attend(number, opening, ConnectionHistory::default(), self.room.enter(place));
    }

    /// Spawns the task that serves a connection on a worker.
    fn attend(
        self: &Arc<Self>,
        number: usize,
        opening: Opening,
        known: ConnectionHistory,
        guest: ConnectionPermit,
    ) {
        let Some(post) = self.crew.post(number) else { return };
        let (server, mut guest, opened) = (Arc::clone(self), Some(guest), post.open());
        let elsewhere = move |awake, known| {
            // The connection counts for this worker until it is closed, or moved to another worker.
            let _ = &opened;
            server.elsewhere(number, awake, known, &mut guest)
        };
        let (service, drain) = (post.service.clone(), Arc::clone(&post.drain));
        let serving = connection::serve(opening, known, service, self.limits, drain, elsewhere);
        self.connections.spawn_on(serving, &post.handle);
    }

    /// Moves a connection with an imminent request to another worker, when its own has more load. TLS
    /// connections stay: their state is bound to their stream.
    fn elsewhere(
        self: &Arc<Self>,
        number: usize,
        awake: IdleConnection<tls::Stream>,
        known: ConnectionHistory,
        guest: &mut Option<ConnectionPermit>,
    ) -> Option<IdleConnection<tls::Stream>> {
        let Some(less) = self.crew.less_than(number) else { return Some(awake) };
        // During a drain, the requests of each worker are awaited one after the other.
        if self.drain.ending.is_cancelled() {
            return Some(awake);
        }
        let IdleConnection { stream, early } = awake;
        let stream = match stream {
            Either::Left(stream) => stream,
            Either::Right(_) => return Some(IdleConnection { stream, early }),
        };
        match Accepted::of(stream) {
            Ok(left) => {
                let opening =
                    async move { Some(IdleConnection { stream: Either::Left(here(left)?), early }) };
                self.attend(less, Box::pin(opening), known, guest.take()?);
            }
            Err(error) => debug!("a connection ended on its way to another worker: {error}"),
        }
        None
    }
}

/// Binds the stream to the current runtime; `None` when that fails.
fn here(accepted: Accepted) -> Option<Either<TcpStream, UnixStream>> {
    match accepted.here() {
        Ok(stream) => Some(stream),
        Err(error) => {
            debug!("a connection ended before it began: {error}");
            None
        }
    }
}
