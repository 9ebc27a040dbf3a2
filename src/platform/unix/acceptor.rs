//! Accepts connections from a TCP or Unix socket that is registered with the runtime. `accept` waits for a
//! connection and for its permit. `accept_pending` neither waits nor acquires a permit. The connections are not
//! registered, so that they can be passed to any worker.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::socket_listener::{SocketFile, UnixSocketListener};

/// A listening TCP socket that is registered with the current runtime.
#[derive(Debug)]
pub(crate) struct TcpAcceptor(AsyncFd<TcpListener>);

/// A listening Unix socket that is registered with the current runtime. Dropping it removes the socket file that it
/// created.
#[derive(Debug)]
pub(crate) struct UnixAcceptor {
    listener: AsyncFd<UnixListener>,
    /// The file to remove on drop, or `None` if another process owns the file.
    _file: Option<SocketFile>,
}

impl TcpAcceptor {
    /// Moves a listener from its runtime to the current one.
    pub(crate) fn open(listener: tokio::net::TcpListener) -> io::Result<Self> {
        register(listener.into_std()?).map(Self)
    }

    /// Accepts the next connection. Dropping the future does not lose a connection.
    pub(crate) async fn accept(
        &self,
        permits: &Arc<Semaphore>,
    ) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
        accept_on(&self.0, permits, |listener| listener.accept().map(|accepted| accepted.0)).await
    }

    /// Accepts a connection if one is pending.
    pub(crate) fn accept_pending(&self) -> Option<TcpStream> {
        self.0.get_ref().accept().ok().map(|accepted| accepted.0)
    }
}

impl UnixAcceptor {
    /// Moves a listener from its runtime to the current one.
    pub(crate) fn open(listener: UnixSocketListener) -> io::Result<Self> {
        let (listener, file) = listener.into_parts()?;
        Ok(Self { listener: register(listener)?, _file: file })
    }

    /// Accepts the next connection. Dropping the future does not lose a connection.
    pub(crate) async fn accept(
        &self,
        permits: &Arc<Semaphore>,
    ) -> io::Result<(UnixStream, OwnedSemaphorePermit)> {
        accept_on(&self.listener, permits, |listener| listener.accept().map(|accepted| accepted.0)).await
    }

    /// Accepts a connection if one is pending.
    pub(crate) fn accept_pending(&self) -> Option<UnixStream> {
        self.listener.get_ref().accept().ok().map(|accepted| accepted.0)
    }
}

/// Waits until a connection is pending, acquires a permit of `permits`, and accepts the connection.
async fn accept_on<Listener: AsRawFd, Stream>(
    listener: &AsyncFd<Listener>,
    permits: &Arc<Semaphore>,
    accept: impl Fn(&Listener) -> io::Result<Stream>,
) -> io::Result<(Stream, OwnedSemaphorePermit)> {
    loop {
        let mut ready = listener.readable().await?;
        let permit = Arc::clone(permits).acquire_owned().await.map_err(io::Error::other)?;
        // If the client has disconnected during the wait for the permit, the permit is released.
        if let Ok(accepted) = ready.try_io(|listener| accept(listener.get_ref())) {
            return Ok((accepted?, permit));
        }
    }
}

/// Registers a listener with the current runtime.
#[expect(deprecated, reason = "the unsafe successor is necessary only if a descriptor can change")]
fn register<Listener: AsRawFd>(listener: Listener) -> io::Result<AsyncFd<Listener>> {
    AsyncFd::with_interest(listener, Interest::READABLE)
}
