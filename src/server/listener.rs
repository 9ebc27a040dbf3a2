//! Binds the listening sockets of TCP ports and Unix sockets, and reports their addresses.
//! [`super::acceptor`] accepts their connections.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, TcpSocket};

use crate::platform::UnixSocketListener;

/// Maximum number of connections in the accept queue. The kernel drops further connections, and their clients
/// retry a second later. On Linux, `net.core.somaxconn` also limits the queue, and has the same default.
pub(super) const BACKLOG: u32 = 4_096;

/// A listening socket. Dropping the listener removes the socket file that it created.
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
    /// The path of a Unix socket. It is `None` if the socket has no name in the file system.
    Unix(Option<PathBuf>),
}

impl Address {
    /// Returns the address of a TCP listener, or `None` for a Unix socket.
    #[must_use]
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(address) => Some(*address),
            Self::Unix(_) => None,
        }
    }

    /// Returns whether only clients on this machine can connect.
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
    /// Fails with `AddrInUse` if another process listens on the port, and with any other error of the
    /// operating system.
    pub fn tcp(address: SocketAddr) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // Allows a restart to bind the port while old connections are still in TIME_WAIT.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG).map(Self::Tcp)
    }

    /// Listens on a Unix socket at `path`, and replaces the stale socket file of a terminated process. `mode`
    /// is the mode of the socket file.
    ///
    /// # Errors
    ///
    /// Fails with `AddrInUse` if another process listens at `path`, with `AlreadyExists` if the file is not a
    /// socket, and with any other error of the file system.
    pub fn unix(path: &Path, mode: u32) -> io::Result<Self> {
        UnixSocketListener::bind(path, mode, BACKLOG).map(Self::Unix)
    }

    /// Returns the address, with the port that the kernel chose if port 0 was configured.
    ///
    /// # Errors
    ///
    /// Fails when the operating system cannot report the address.
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
