//! Accepts connections from a listener, each under a permit of the connection limit. An accepted connection
//! is not registered with a runtime, so that it can be passed to any worker.

use std::io;
use std::net;
use std::os::fd::AsRawFd;
use std::os::unix::net as unix;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::either::Either;

use super::listener::Listener;
use super::unix::SocketFile;

/// A listener registered with the runtime that accepts its connections. Dropping the acceptor removes the
/// socket file that the listener created.
#[derive(Debug)]
pub(super) enum Acceptor {
    Tcp(AsyncFd<net::TcpListener>),
    Unix { listener: AsyncFd<unix::UnixListener>, _file: Option<SocketFile> },
}

/// A connection that is not registered with a runtime: a new one, or one that moves between workers.
#[derive(Debug)]
pub(super) enum Accepted {
    Tcp(net::TcpStream),
    Unix(unix::UnixStream),
}

impl Acceptor {
    /// Registers a listener with the current runtime.
    pub(super) fn open(listener: Listener) -> io::Result<Self> {
        match listener {
            Listener::Tcp(listener) => poll_readable(listener.into_std()?).map(Self::Tcp),
            Listener::Unix(listener) => {
                let (listener, file) = listener.into_parts()?;
                Ok(Self::Unix { listener: poll_readable(listener)?, _file: file })
            }
        }
    }

    /// Accepts the next connection with a permit of `permits`, which all listeners share. The permit is
    /// acquired only once a connection is pending, so that an idle listener holds no permit.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not lose a connection.
    pub(super) async fn accept(
        &self,
        permits: &Arc<Semaphore>,
    ) -> io::Result<(Accepted, OwnedSemaphorePermit)> {
        match self {
            Self::Tcp(listener) => {
                let (accepted, permit) = accept_on(listener, permits, net::TcpListener::accept).await?;
                Ok((Accepted::Tcp(accepted.0), permit))
            }
            Self::Unix { listener, .. } => {
                let (accepted, permit) = accept_on(listener, permits, unix::UnixListener::accept).await?;
                Ok((Accepted::Unix(accepted.0), permit))
            }
        }
    }

    /// Accepts a connection if one is pending and a permit is available.
    pub(super) fn accept_pending(
        &self,
        permits: &Arc<Semaphore>,
    ) -> Option<(Accepted, OwnedSemaphorePermit)> {
        let permit = Arc::clone(permits).try_acquire_owned().ok()?;
        let accept_result = match self {
            Self::Tcp(listener) => Accepted::Tcp(listener.get_ref().accept().ok()?.0),
            Self::Unix { listener, .. } => Accepted::Unix(listener.get_ref().accept().ok()?.0),
        };
        Some((accept_result, permit))
    }
}

async fn accept_on<T: AsRawFd, A>(
    listener: &AsyncFd<T>,
    permits: &Arc<Semaphore>,
    accept: impl Fn(&T) -> io::Result<A>,
) -> io::Result<(A, OwnedSemaphorePermit)> {
    loop {
        let mut ready = listener.readable().await?;
        let permit = Arc::clone(permits).acquire_owned().await.map_err(io::Error::other)?;
        // If the client has disconnected in the meantime, the permit is released.
        if let Ok(accepted) = ready.try_io(|listener| accept(listener.get_ref())) {
            return Ok((accepted?, permit));
        }
    }
}

#[expect(deprecated, reason = "its unsafe successor matters only for types whose descriptor can change")]
fn poll_readable<T: AsRawFd>(listener: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(listener, Interest::READABLE)
}

/// Maximum number of unsent bytes that the kernel buffers per connection (`TCP_NOTSENT_LOWAT`). By default,
/// the kernel buffers up to 4 MiB of a response that the client does not read. That memory is outside the
/// buffer budget, and those bytes would count as received. With this limit, a client that never reads uses
/// about 256 KiB.
#[cfg(any(target_os = "linux", target_os = "android"))]
const MAX_UNSENT_BYTES: u32 = 128 * 1024;

impl Accepted {
    /// Removes a stream from its runtime. The caller keeps the bytes that were already read from the stream.
    pub(super) fn deregister(stream: Either<TcpStream, UnixStream>) -> io::Result<Self> {
        match stream {
            Either::Left(stream) => stream.into_std().map(Self::Tcp),
            Either::Right(stream) => stream.into_std().map(Self::Unix),
        }
    }

    /// Returns the address of the client, or `None` for a Unix socket.
    pub(super) fn peer(&self) -> Option<net::IpAddr> {
        match self {
            // The address is unknown if the client has already disconnected.
            Self::Tcp(stream) => stream.peer_addr().ok().map(|address| address.ip().to_canonical()),
            Self::Unix(_) => None,
        }
    }

    /// Registers the stream with the current runtime.
    pub(super) fn register(self) -> io::Result<Either<TcpStream, UnixStream>> {
        match self {
            Self::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                // Small writes are sent immediately: a first chunk must not wait for an acknowledgement.
                stream.set_nodelay(true)?;
                #[cfg(any(target_os = "linux", target_os = "android"))]
                socket2::SockRef::from(&stream).set_tcp_notsent_lowat(MAX_UNSENT_BYTES)?;
                TcpStream::from_std(stream).map(Either::Left)
            }
            Self::Unix(stream) => {
                stream.set_nonblocking(true)?;
                UnixStream::from_std(stream).map(Either::Right)
            }
        }
    }
}
