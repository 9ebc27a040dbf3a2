//! Accepts connections, hands each to a worker and speaks HTTP/1.1 on it. Knows nothing of what is
//! served.

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

/// Bounds of the listener and of each connection.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For a head to arrive, from its first byte on; for a connection's first request; and for a
    /// connection to send its first byte and to agree on TLS.
    pub head_read_max: Duration,
    /// For the first byte of a later request on a kept connection.
    pub keepalive_timeout: Duration,
    /// For a client to finish what it sends after an answer that ends its connection.
    pub linger_timeout: Duration,
    /// What a client may still send then, in bytes.
    pub linger_bytes_max: u64,
    /// For a client to take something of an answer that waits for it.
    pub write_idle_max: Duration,
    /// How slowly it may take that, while it is waited for.
    pub response_min_rate: MinRate,
    /// For how long it may do so before its rate counts.
    pub response_grace: Duration,
    /// For a head; more is answered with 431.
    pub head_bytes_max: usize,
    /// Connections open at once; more wait to be accepted.
    pub connections_max: usize,
    /// A connection that waits this long for a request, and a new one that waits as long as its first
    /// took, lays its buffers down until one comes, and that one may be another worker's.
    pub rest_after: Duration,
}

/// Most connections that have waited for a second wait for many.
pub const REST_AFTER: Duration = Duration::from_secs(1);

/// How a server ends: `ending`, then `stop` when `kept` has ended or has had its time, then `close`
/// when `requests` has ended, then `cut` when that takes too long.
///
/// From `ending` on, every answer says that its connection closes. A client cannot know of the end
/// before it has had such an answer, and may ask on a kept connection at any moment; so these stay open
/// and are served up to `close`, and are closed by their next answer. Until `stop`, new connections are
/// accepted as well, because it may take seconds. A connection that was accepted and has not asked yet
/// counts among `requests` for a moment.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    /// Answers end their connections.
    pub ending: CancellationToken,
    /// The connections from before `ending`, each until it is closed or taken over by a session.
    pub kept: Tasks,
    /// Accept nothing more; let what runs finish.
    pub stop: CancellationToken,
    /// The requests under way, up to the end of their answers.
    pub requests: Tasks,
    /// Close the connections without a request.
    pub close: CancellationToken,
    /// Cut what still runs.
    pub cut: CancellationToken,
}

impl Drain {
    /// The same end for other requests.
    #[must_use]
    pub fn with_requests(&self, requests: Tasks) -> Self {
        Self { requests, ..self.clone() }
    }
}

/// The stream of a connection that is taken over.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Who speaks on a connection after a 101, to its end: with its stream, and with what the client has
/// sent meanwhile. It must end when the program cuts what still runs.
pub type Session = Box<dyn FnOnce(Box<dyn Stream>, Bytes) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// What a service says to a request.
pub struct Reply<B> {
    /// The answer.
    pub answer: Response<B>,
    /// Who takes the connection over; with an answer of 101.
    pub session: Option<Session>,
}

impl<B> From<Response<B>> for Reply<B> {
    fn from(answer: Response<B>) -> Self {
        Self { answer, session: None }
    }
}

/// Answers requests. Cheap to clone: each connection has one of its worker's.
pub trait Service: Clone + Send + Sync + Unpin + 'static {
    /// The body of its answers.
    type Body: Body<Data = Bytes, Error: std::error::Error + Send + Sync + 'static> + Send + 'static;

    /// Answers one.
    fn answer(&self, request: Request<Incoming>) -> impl Future<Output = Reply<Self::Body>> + Send;
}

/// Room for connections, shared by all listeners. Cheap to clone.
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

/// A connection in the room, until it is dropped.
struct ConnectionPermit {
    guests: Arc<ConnectionCount>,
    _place: OwnedSemaphorePermit,
}

impl ConnectionLimiter {
    /// Room for so many.
    #[must_use]
    pub fn new(connections_max: usize) -> Self {
        let places = Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS));
        Self { places: Arc::new(places), guests: Arc::default() }
    }

    /// Connections that are open now.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.guests.open.load(Ordering::Relaxed)
    }

    /// Connections that were accepted, from the start on.
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

/// After an error such as too many open files, the loop rests: it must neither spin nor die.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// So many are accepted in one go before whoever else runs on the same worker has a turn.
const ACCEPTED_MAX: u32 = 64;

/// A connection that is opened.
type Opening = Pin<Box<dyn Future<Output = Option<IdleConnection<tls::Stream>>> + Send>>;

/// What serves connections, wherever they come from.
#[derive(Debug)]
pub struct Server<S> {
    /// Who answers.
    pub crew: WorkerPool<S>,
    /// Bounds of each connection.
    pub limits: Limits,
    /// Room for all of them.
    pub room: ConnectionLimiter,
    /// How it is told to end.
    pub drain: Drain,
    /// Has those as members who accept.
    pub accepting: Tasks,
    /// Has the connections as members.
    pub connections: Tasks,
}

impl<S: Service> Server<S> {
    /// Accepts at this place until told to stop, with `tls` or without on the same port.
    ///
    /// # Errors
    ///
    /// When the system refuses, or there is no worker.
    pub fn listen(self: &Arc<Self>, listener: Listener, tls: Tls) -> io::Result<()> {
        // One accepts for all: each place is listened on once, whatever it is, and who has the least
        // to do is known. It is a worker, so what it gives itself crosses no thread.
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
        // Closing the listener would reset the connections that the system has let in already.
        for _ in 0..BACKLOG {
            let Some((accepted, place)) = door.accept_waiting(&self.room.places) else { return };
            self.hand_over(accepted, place, tls.clone());
        }
    }

    fn hand_over(self: &Arc<Self>, accepted: Accepted, place: OwnedSemaphorePermit, tls: Tls) {
        let Some(number) = self.crew.least() else { return };
        let head_read_max = self.limits.head_read_max;
        // In a box, so that it takes no room any more once the stream is open.
        let opening = Box::pin(async move {
            let stream = here(accepted)?;
            tls.open(stream, head_read_max).await.map(IdleConnection::from)
        });
        self.attend(number, opening, ConnectionHistory::default(), self.room.enter(place));
    }

    /// Has a worker serve a connection.
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
            // It counts here until it is served no more, or elsewhere.
            let _ = &opened;
            server.elsewhere(number, awake, known, &mut guest)
        };
        let (service, drain) = (post.service.clone(), Arc::clone(&post.drain));
        let serving = connection::serve(opening, known, service, self.limits, drain, elsewhere);
        self.connections.spawn_on(serving, &post.handle);
    }

    /// Has another worker serve a connection that is about to ask, when the one it was served by has
    /// more to do. What is under TLS stays: its state belongs to its stream.
    fn elsewhere(
        self: &Arc<Self>,
        number: usize,
        awake: IdleConnection<tls::Stream>,
        known: ConnectionHistory,
        guest: &mut Option<ConnectionPermit>,
    ) -> Option<IdleConnection<tls::Stream>> {
        let Some(less) = self.crew.less_than(number) else { return Some(awake) };
        // At the end of the program, each worker is waited for.
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

/// The stream, on the runtime that this is called on.
fn here(accepted: Accepted) -> Option<Either<TcpStream, UnixStream>> {
    match accepted.here() {
        Ok(stream) => Some(stream),
        Err(error) => {
            debug!("a connection ended before it began: {error}");
            None
        }
    }
}
