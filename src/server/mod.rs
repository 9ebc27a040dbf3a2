//! Accepts connections, hands each to a worker and speaks HTTP/1.1 on it. Knows nothing of what is
//! served.

mod connection;
mod door;
mod gauged;
mod listener;
mod passed;
mod patient;
mod tls;
mod unix;
mod workers;

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
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::tasks::Tasks;

pub use listener::{Address, Listener};
pub use passed::Passed;
pub use tls::Tls;
pub use workers::{Crew, Workers};

use door::{Accepted, Door};
use workers::Opened;

/// Bounds of the listener and of each connection.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For a head to arrive, from its first moment on, and between two requests of a connection; and
    /// for a connection to say its first byte and to agree on TLS.
    pub head_read_max: Duration,
    /// For a client to take something of an answer that waits for it.
    pub write_idle_max: Duration,
    /// For a head; more is answered with 431.
    pub head_bytes_max: usize,
    /// Connections open at once; more wait to be accepted.
    pub connections_max: usize,
}

/// How a server is told to end: `stop`, then `close` when `requests` has ended, then `cut` when
/// that takes too long.
///
/// A connection that was accepted and has not asked yet counts among `requests` for a moment.
/// Between `stop` and `close` the open connections stay open: a client that asks on one of them
/// hears that we end, instead of finding it closed under its request.
#[derive(Clone, Debug, Default)]
pub struct Drain {
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
pub trait Service: Clone + Send + Sync + 'static {
    /// The body of its answers.
    type Body: Body<Data = Bytes, Error: std::error::Error + Send + Sync + 'static> + Send + 'static;

    /// Answers one.
    fn answer(&self, request: Request<Incoming>) -> impl Future<Output = Reply<Self::Body>> + Send;
}

/// Marks the first request of a connection, among its extensions: whoever was let in is served, also
/// when we end.
#[derive(Clone, Copy, Debug)]
pub struct First;

/// Room for connections, shared by all listeners. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Room {
    places: Arc<Semaphore>,
    guests: Arc<Guests>,
}

#[derive(Debug, Default)]
struct Guests {
    open: AtomicU64,
    accepted: AtomicU64,
}

/// A connection in the room, until it is dropped.
struct Guest {
    guests: Arc<Guests>,
    _place: OwnedSemaphorePermit,
    _opened: Opened,
}

impl Room {
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

    fn enter(&self, place: OwnedSemaphorePermit, opened: Opened) -> Guest {
        self.guests.open.fetch_add(1, Ordering::Relaxed);
        self.guests.accepted.fetch_add(1, Ordering::Relaxed);
        Guest { guests: Arc::clone(&self.guests), _place: place, _opened: opened }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.guests.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// After an error such as too many open files, the loop rests: it must neither spin nor die.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// So many are accepted in one go before whoever else runs on the same worker has a turn.
const ACCEPTED_MAX: u32 = 64;

/// What serves connections, wherever they come from. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Server<S> {
    /// Who answers.
    pub crew: Crew<S>,
    /// Bounds of each connection.
    pub limits: Limits,
    /// Room for all of them.
    pub room: Room,
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
    pub fn listen(&self, listener: Listener, tls: Tls) -> io::Result<()> {
        // One accepts for all: each place is listened on once, whatever it is, and who has the least
        // to do is known. It is a worker, so what it gives itself crosses no thread.
        let post = self.crew.any().ok_or_else(|| io::Error::other("there is no worker"))?;
        let door = {
            let _runtime = post.handle.enter();
            Door::open(listener)?
        };
        self.accepting.spawn_on(self.clone().accept(door, tls), &post.handle);
        Ok(())
    }

    async fn accept(self, door: Door, tls: Tls) {
        let mut in_one_go = 0;
        loop {
            let next = async {
                let place = Arc::clone(&self.room.places).acquire_owned().await.map_err(io::Error::other)?;
                Ok::<_, io::Error>((door.accept().await?, place))
            };
            let accepted = tokio::select! {
                () = self.drain.stop.cancelled() => return,
                accepted = next => accepted,
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
    }

    fn hand_over(&self, accepted: Accepted, place: OwnedSemaphorePermit, tls: Tls) {
        let Some(post) = self.crew.least() else { return };
        let guest = self.room.enter(place, post.open());
        let head_read_max = self.limits.head_read_max;
        // In a box, so that it takes no room any more once the stream is open.
        let opening = Box::pin(async move {
            match accepted.here() {
                Ok(stream) => tls.open(stream, head_read_max).await,
                Err(error) => {
                    debug!("a connection ended before it began: {error}");
                    None
                }
            }
        });
        let serving = connection::serve(opening, post.service.clone(), self.limits, post.drain.clone());
        let served = async move {
            serving.await;
            drop(guest);
        };
        self.connections.spawn_on(served, &post.handle);
    }
}
