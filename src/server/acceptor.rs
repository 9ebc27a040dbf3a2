//! Accepts TCP and Unix connections for `Server`. Each connection needs a permit of the connection limit. An accepted
//! connection is not registered with a runtime, so that it can be passed to any worker. The worker registers it and
//! thereby sets the options of a TCP socket, and deregisters it to move it to another worker.

use std::io;
use std::net;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::either::Either;

use super::listener::Listener;
use crate::platform::sockets::{StdUnixStream, TcpAcceptor, UnixAcceptor, UnixStream};

/// A listener registered with the runtime that accepts its connections. Dropping the acceptor removes the
/// socket file that the listener created.
#[derive(Debug)]
pub(super) enum Acceptor {
    Tcp(TcpAcceptor),
    Unix(UnixAcceptor),
}

/// A connection that is not registered with a runtime: a new one, or one that moves between workers.
#[derive(Debug)]
pub(super) enum AcceptedConnection {
    Tcp(net::TcpStream),
    Unix(StdUnixStream),
}

impl Acceptor {
    /// Registers a listener with the current runtime.
    pub(super) fn open(listener: Listener) -> io::Result<Self> {
        match listener {
            Listener::Tcp(listener) => TcpAcceptor::open(listener).map(Self::Tcp),
            Listener::Unix(listener) => UnixAcceptor::open(listener).map(Self::Unix),
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
    ) -> io::Result<(AcceptedConnection, OwnedSemaphorePermit)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, permit) = listener.accept(permits).await?;
                Ok((AcceptedConnection::Tcp(stream), permit))
            }
            Self::Unix(listener) => {
                let (stream, permit) = listener.accept(permits).await?;
                Ok((AcceptedConnection::Unix(stream), permit))
            }
        }
    }

    /// Accepts a connection if one is pending and a permit is available.
    pub(super) fn accept_pending(
        &self,
        permits: &Arc<Semaphore>,
    ) -> Option<(AcceptedConnection, OwnedSemaphorePermit)> {
        let permit = Arc::clone(permits).try_acquire_owned().ok()?;
        let connection = match self {
            Self::Tcp(listener) => AcceptedConnection::Tcp(listener.accept_pending()?),
            Self::Unix(listener) => AcceptedConnection::Unix(listener.accept_pending()?),
        };
        Some((connection, permit))
    }
}

/// Maximum number of unsent bytes that the kernel buffers per connection (`TCP_NOTSENT_LOWAT`). By default,
/// the kernel buffers up to 4 MiB of a response that the client does not read. That memory is outside the
/// buffer budget, and those bytes would count as received. With this limit, a client that never reads uses
/// about 256 KiB.
#[cfg(any(target_os = "linux", target_os = "android"))]
const MAX_UNSENT_BYTES: u32 = 128 * 1024;

impl AcceptedConnection {
    /// Removes a stream from its runtime. The caller keeps the bytes that were already read from the stream.
    pub(super) fn deregister(stream: Either<TcpStream, UnixStream>) -> io::Result<Self> {
        match stream {
            Either::Left(stream) => stream.into_std().map(Self::Tcp),
            Either::Right(stream) => stream.into_std().map(Self::Unix),
        }
    }

    /// Returns the IP address of the client. Returns `None` for a Unix socket, and for a TCP client that has already
    /// disconnected.
    pub(super) fn peer(&self) -> Option<net::IpAddr> {
        match self {
            Self::Tcp(stream) => stream.peer_addr().ok().map(|address| address.ip().to_canonical()),
            Self::Unix(_) => None,
        }
    }

    /// Registers the stream with the current runtime.
    pub(super) fn register(self) -> io::Result<Either<TcpStream, UnixStream>> {
        match self {
            Self::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                // Small writes are sent immediately, because the first chunk of a response must not wait for an
                // acknowledgement.
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
