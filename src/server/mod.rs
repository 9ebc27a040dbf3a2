//! Accepts connections and speaks HTTP/1.1 on them. Knows nothing of what is served.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::tasks::Tasks;

/// Bounds of the listener and of each connection.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For a head to arrive, from its first moment on, and between two requests of a connection.
    pub head_read_max: Duration,
    /// For a head; more is answered with 431.
    pub head_bytes_max: usize,
    /// Connections open at once; more wait to be accepted.
    pub connections_max: usize,
}

/// How a server is told to end.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    /// Accept nothing more; let what runs finish.
    pub stop: CancellationToken,
    /// Cut what still runs.
    pub cut: CancellationToken,
}

/// Answers requests. Cheap to clone: each connection has one.
pub trait Service: Clone + Send + Sync + 'static {
    /// The body of its answers.
    type Body: Body<Data = Bytes, Error: std::error::Error + Send + Sync + 'static> + Send + 'static;

    /// Answers one.
    fn answer(&self, request: Request<Incoming>) -> impl Future<Output = Response<Self::Body>> + Send;
}

/// Room for connections, shared by all listeners. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Room(Arc<Semaphore>);

impl Room {
    /// Room for so many.
    #[must_use]
    pub fn new(connections_max: usize) -> Self {
        Self(Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS))))
    }
}

/// After an error such as too many open files, the loop rests: it must neither spin nor die.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// Accepts until told to stop. Connections run as members of `tasks`.
pub async fn serve<S: Service>(
    listener: TcpListener,
    service: S,
    limits: Limits,
    room: Room,
    drain: Drain,
    tasks: Tasks,
) {
    loop {
        let accepted = tokio::select! {
            () = drain.stop.cancelled() => return,
            accepted = accept(&listener, &room) => accepted,
        };
        match accepted {
            Ok(Some((stream, place))) => {
                let connection = connection(stream, service.clone(), limits, drain.clone());
                tasks.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Ok(None) => return,
            Err(error) => {
                warn!("a connection cannot be accepted: {error}; trying on");
                tokio::time::sleep(ACCEPT_REST).await;
            }
        }
    }
}

/// The next connection, once there is room for it. `None` when there never will be.
async fn accept(
    listener: &TcpListener,
    room: &Room,
) -> io::Result<Option<(TcpStream, OwnedSemaphorePermit)>> {
    let Ok(place) = Arc::clone(&room.0).acquire_owned().await else { return Ok(None) };
    let (stream, _) = listener.accept().await?;
    // Small writes go out at once: a first chunk must not wait for an acknowledgement.
    stream.set_nodelay(true)?;
    Ok(Some((stream, place)))
}

async fn connection<S: Service>(stream: TcpStream, service: S, limits: Limits, drain: Drain) {
    let answer = service_fn(move |request| {
        let service = service.clone();
        async move { Ok::<_, Infallible>(service.answer(request).await) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head_read_max)
            .max_buf_size(limits.head_bytes_max)
            .serve_connection(TokioIo::new(stream), answer)
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = drain.stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection => ended,
                () = drain.cut.cancelled() => return,
            }
        }
    };
    if let Err(error) = ended {
        // Clients leave and send what is no HTTP; neither is news.
        debug!("a connection ended: {error}");
    }
}
