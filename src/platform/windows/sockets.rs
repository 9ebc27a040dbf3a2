//! Accepts TCP connections on Windows, and peeks at the next byte of a connection. The types of Unix sockets have no
//! values, and the functions that would create them fail.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use listenfd::ListenFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

fn unsupported<T>() -> io::Result<T> {
    Err(io::Error::new(ErrorKind::Unsupported, "Keychoir has no Unix sockets on Windows"))
}

/// A listening TCP socket.
#[derive(Debug)]
pub(crate) struct TcpAcceptor(TcpListener);

impl TcpAcceptor {
    /// Moves a listener from its runtime to the current one.
    pub(crate) fn open(listener: TcpListener) -> io::Result<Self> {
        TcpListener::from_std(listener.into_std()?).map(Self)
    }

    /// Acquires a permit of `permits`, and then accepts the next connection. The permit is acquired first, because
    /// tokio can wait for a connection only by accepting it. Dropping the future does not lose a connection.
    pub(crate) async fn accept(
        &self,
        permits: &Arc<Semaphore>,
    ) -> io::Result<(std::net::TcpStream, OwnedSemaphorePermit)> {
        let permit = Arc::clone(permits).acquire_owned().await.map_err(io::Error::other)?;
        let (stream, _) = self.0.accept().await?;
        Ok((stream.into_std()?, permit))
    }

    /// Returns `None`. A pending connection is reset when the listener is closed.
    pub(crate) fn accept_pending(&self) -> Option<std::net::TcpStream> {
        None
    }
}

/// Returns 1 if a byte can be read from the socket, and 0 at the end of its stream, without consuming the byte.
pub(crate) fn poll_peek_tcp(stream: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    stream.poll_peek(cx, &mut ReadBuf::new(&mut [0; 1]))
}

/// Fails, because Keychoir has no Unix sockets on Windows.
pub(crate) fn with_unix_socket(_: reqwest::ClientBuilder, _: &Path) -> io::Result<reqwest::ClientBuilder> {
    unsupported()
}

/// Fails, because Keychoir has no Unix sockets on Windows.
pub(crate) fn take_inherited(_: &mut ListenFd, _: usize) -> io::Result<Option<UnixSocketListener>> {
    unsupported()
}

/// A listening Unix socket. The type has no values.
#[derive(Debug)]
pub enum UnixSocketListener {}

impl UnixSocketListener {
    /// Fails, because Keychoir has no Unix sockets on Windows.
    pub(crate) fn bind(_: &Path, _: u32, _: u32) -> io::Result<Self> {
        unsupported()
    }

    pub(crate) fn path(&self) -> io::Result<Option<PathBuf>> {
        match *self {}
    }
}

/// A listening Unix socket from which connections are accepted. The type has no values.
#[derive(Debug)]
pub(crate) enum UnixAcceptor {}

impl UnixAcceptor {
    pub(crate) fn open(listener: UnixSocketListener) -> io::Result<Self> {
        match listener {}
    }

    pub(crate) async fn accept(
        &self,
        _: &Arc<Semaphore>,
    ) -> io::Result<(StdUnixStream, OwnedSemaphorePermit)> {
        match *self {}
    }

    pub(crate) fn accept_pending(&self) -> Option<StdUnixStream> {
        match *self {}
    }
}

/// A connection of a Unix socket that is not registered with a runtime. The type has no values.
#[derive(Debug)]
pub(crate) enum StdUnixStream {}

impl StdUnixStream {
    pub(crate) fn set_nonblocking(&self, _: bool) -> io::Result<()> {
        match *self {}
    }
}

/// A connection of a Unix socket. The type has no values.
#[derive(Debug)]
pub(crate) enum UnixStream {}

impl UnixStream {
    /// Fails, because Keychoir has no Unix sockets on Windows.
    pub(crate) async fn connect(_: impl AsRef<Path>) -> io::Result<Self> {
        unsupported()
    }

    pub(crate) fn from_std(stream: StdUnixStream) -> io::Result<Self> {
        match stream {}
    }

    pub(crate) fn into_std(self) -> io::Result<StdUnixStream> {
        match self {}
    }

    pub(crate) fn take_error(&self) -> io::Result<Option<io::Error>> {
        match *self {}
    }
}

/// Peeks at a Unix socket, like [`poll_peek_tcp`] at a TCP socket. It is never called, because no Unix socket exists.
pub(crate) fn poll_peek_unix(stream: &UnixStream, _: &mut Context<'_>) -> Poll<io::Result<usize>> {
    match *stream {}
}

impl AsyncRead for UnixStream {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match *self {}
    }
}

impl AsyncWrite for UnixStream {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        match *self {}
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match *self {}
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match *self {}
    }
}
