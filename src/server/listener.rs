//! Listening sockets: TCP ports and Unix sockets.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, TcpSocket};

use super::unix::UnixSocketListener;

/// Maximum connections in the accept queue. The system drops further ones, and their clients retry a second
/// later; the system has its own bound (`net.core.somaxconn`, usually as large).
pub(super) const BACKLOG: u32 = 4_096;

/// A listening socket. A socket file that it created is removed when it is dropped.
#[derive(Debug)]
pub enum Listener {
    /// A TCP port.
    Tcp(TcpListener),
    /// A Unix socket and its file.
    Unix(UnixSocketListener),
}

/// The address of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// The IP address and port of a TCP listener.
    Tcp(SocketAddr),
    /// The path of a Unix socket; `None` when it has no name in the file system.
    Unix(Option<PathBuf>),
}

impl Address {
    /// Whether only clients on this machine can connect.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(Some(path)) => write!(f, "unix:{}", path.display()),
            Self::Unix(None) => f.write_str("unix:"),
        }
    }
}

impl Listener {
    /// Listens on a TCP port.
    ///
    /// # Errors
    ///
    /// `AddrInUse` when another process listens there, or any other error of the system.
    pub fn tcp(address: SocketAddr) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // The port can be bound again right after a restart, although old connections are still in TIME_WAIT.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG).map(Self::Tcp)
    }

    /// Listens on a Unix socket at `path`. A stale socket file that a terminated process left there is
    /// replaced.
    ///
    /// # Errors
    ///
    /// `AddrInUse` when another process listens there, `AlreadyExists` when another file is in the way, or
    /// any other error of the file system.
    pub fn unix(path: &Path, mode: u32) -> io::Result<Self> {
        UnixSocketListener::bind(path, mode).map(Self::Unix)
    }

    /// The address, with the port that the system chose for port 0.
    ///
    /// # Errors
    ///
    /// When the system cannot report the address.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Address::Tcp),
            Self::Unix(listener) => listener.path().map(Address::Unix),
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}
