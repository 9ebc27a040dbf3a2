//! Provides the types and operations of sockets that differ between operating systems: acceptors, Unix sockets, HTTP
//! clients that use a Unix socket, inherited Unix sockets, and a peek at the next byte of a connection.

use std::io;
use std::path::Path;
use std::task::{Context, Poll, ready};

use listenfd::ListenFd;
use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::UnixSocketListener;

pub(crate) use std::os::unix::net::UnixStream as StdUnixStream;

pub(crate) use tokio::net::UnixStream;

pub(crate) use super::acceptor::{TcpAcceptor, UnixAcceptor};

/// Polls for a byte of a socket without consuming it. It is a macro, because tokio has no trait with the methods that
/// both socket types share.
macro_rules! poll_peek {
    ($stream:ident, $cx:ident) => {
        loop {
            ready!($stream.poll_read_ready($cx))?;
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            let peek = || Ok(recv($stream, &mut [0; 1], flags)?.0);
            match $stream.try_io(Interest::READABLE, peek) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    };
}

/// Configures an HTTP client to connect to the Unix socket at `path`.
#[expect(clippy::unnecessary_wraps, reason = "the function fails on Windows")]
pub(crate) fn with_unix_socket(
    builder: reqwest::ClientBuilder,
    path: &Path,
) -> io::Result<reqwest::ClientBuilder> {
    Ok(builder.unix_socket(path))
}

/// Takes the inherited Unix socket with the number `index`, or returns `None` if it was already taken.
///
/// # Errors
///
/// Fails when the socket is not a Unix stream socket.
pub(crate) fn take_inherited(sockets: &mut ListenFd, index: usize) -> io::Result<Option<UnixSocketListener>> {
    sockets.take_unix_listener(index)?.map(UnixSocketListener::from_inherited).transpose()
}

/// Returns 1 if a byte can be read from the socket, and 0 at the end of its stream, without consuming the byte.
pub(crate) fn poll_peek_tcp(stream: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    poll_peek!(stream, cx)
}

/// Returns 1 if a byte can be read from the Unix socket, and 0 at the end of its stream, without consuming the byte.
pub(crate) fn poll_peek_unix(stream: &UnixStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    poll_peek!(stream, cx)
}
