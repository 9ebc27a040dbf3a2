//! Where connections come from.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, TcpSocket};

use super::unix::UnixPlace;

/// Clients that may wait to be accepted. When more come at once, the system drops them, and each
/// tries again a second later; it has a bound of its own (`net.core.somaxconn`, usually as large).
pub(super) const BACKLOG: u32 = 4_096;

/// A place that is listened on. A socket file that it made goes with it.
#[derive(Debug)]
pub enum Listener {
    /// A port.
    Tcp(TcpListener),
    /// A Unix socket.
    Unix(UnixPlace),
}

/// Where a listener is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A port.
    Tcp(SocketAddr),
    /// A Unix socket; without a path when it has no name in the file system.
    Unix(Option<PathBuf>),
}

impl Address {
    /// Whether only this machine can connect.
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
    /// Listens on a port.
    ///
    /// # Errors
    ///
    /// `AddrInUse` when somebody listens there, and whatever else the system says.
    pub fn tcp(address: SocketAddr) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // The port is free again at once after a restart, although old connections still fade.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG).map(Self::Tcp)
    }

    /// Listens on a Unix socket at `path`. A file that a dead program left there is replaced.
    ///
    /// # Errors
    ///
    /// `AddrInUse` when somebody listens there or something else is in the way, and whatever the
    /// file system says.
    pub fn unix(path: &Path, mode: u32) -> io::Result<Self> {
        UnixPlace::bind(path, mode).map(Self::Unix)
    }

    /// Its address, with the port that was chosen where 0 was asked for.
    ///
    /// # Errors
    ///
    /// When the system does not tell.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Address::Tcp),
            Self::Unix(place) => place.path().map(Address::Unix),
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}
