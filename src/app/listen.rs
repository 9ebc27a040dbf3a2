//! Opens the configured listeners. If one of them fails, the others are closed.

use std::io;

use tracing::debug;

use crate::config::{HostPort, ListenAddress, ListenAddresses, UnixMode};
use crate::server::{self, InheritedSockets, Listener};

/// The reason why a listener cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Listening on an address failed.
    #[error("{address}: {source}")]
    Address {
        /// The address as it was configured.
        address: String,
        /// The I/O error.
        source: io::Error,
    },
    /// The configuration requires sockets passed by systemd, but systemd passed none.
    #[error("systemd passed no sockets (LISTEN_FDS is not set for this process)")]
    NoSockets,
    /// A socket that systemd passed is not usable.
    #[error(transparent)]
    InvalidSocket(io::Error),
}

/// Listens on every address of `configured`.
///
/// # Errors
///
/// Fails when one of them cannot be opened.
pub async fn listen(
    configured: &ListenAddresses,
    mode: UnixMode,
    sockets: InheritedSockets,
) -> Result<Vec<Listener>, ListenError> {
    let mut sockets = Some(sockets);
    let mut listeners: Vec<Listener> = Vec::new();
    for listen in configured.iter() {
        let failed = |source| ListenError::Address { address: listen.to_string(), source };
        match listen {
            ListenAddress::Tcp(_) | ListenAddress::Unix(_) => {
                listeners.extend(listen_on(listen, mode).map_err(failed)?)
            }
            ListenAddress::Systemd => {
                let sockets = sockets.take().filter(|sockets| sockets.count() > 0);
                let sockets = sockets.ok_or(ListenError::NoSockets)?;
                listeners.extend(sockets.listen().map_err(ListenError::InvalidSocket)?);
            }
        }
    }
    Ok(listeners)
}

/// Listens on one configured address. Returns an empty list for sockets passed by systemd.
pub(super) fn listen_on(listen: &ListenAddress, mode: UnixMode) -> io::Result<Vec<Listener>> {
    match listen {
        ListenAddress::Tcp(port) => listen_on_port(port),
        ListenAddress::Unix(path) => Ok(vec![Listener::unix(path, mode.bits())?]),
        ListenAddress::Systemd => Ok(Vec::new()),
    }
}

/// Listens on every IP address of a host and port. Only the first one must succeed. All of them use the same
/// port, even if it is 0.
fn listen_on_port(port: &HostPort) -> io::Result<Vec<Listener>> {
    let mut listeners: Vec<Listener> = Vec::new();
    for mut address in port.socket_addresses() {
        if let Some(server::Address::Tcp(first)) = listeners.first().map(Listener::address).transpose()? {
            address.set_port(first.port());
        }
        match Listener::tcp(address) {
            Ok(listener) => listeners.push(listener),
            Err(error) if listeners.is_empty() => return Err(error),
            Err(error) => debug!("{address} is not listened on: {error}"),
        }
    }
    Ok(listeners)
}
