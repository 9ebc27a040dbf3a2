//! Opens all configured listeners, or none of them.

use std::io;

use tracing::debug;

use crate::config::{HostPort, Listen, Listens, UnixMode};
use crate::server::{self, InheritedSockets, Listener};

/// The reason that a listener cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// An address cannot be listened on.
    #[error("{address}: {source}")]
    Address {
        /// The address as it was configured.
        address: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The configuration names sockets of systemd, and none were passed.
    #[error("systemd passes no sockets (LISTEN_FDS is not set for this process)")]
    NoSockets,
    /// A socket that systemd passed cannot be listened on.
    #[error(transparent)]
    InvalidSocket(io::Error),
}

/// Listens on every address of `configured`.
///
/// # Errors
///
/// When one of them cannot be opened. Listeners opened before are closed.
pub async fn listen(
    configured: &Listens,
    mode: UnixMode,
    sockets: InheritedSockets,
) -> Result<Vec<Listener>, ListenError> {
    let mut sockets = Some(sockets);
    let mut listeners: Vec<Listener> = Vec::new();
    for listen in configured.iter() {
        let failed = |source| ListenError::Address { address: listen.to_string(), source };
        match listen {
            Listen::Port(_) | Listen::Unix(_) => listeners.extend(listen_on(listen, mode).map_err(failed)?),
            Listen::Systemd => {
                let sockets = sockets.take().filter(|sockets| sockets.count() > 0);
                let sockets = sockets.ok_or(ListenError::NoSockets)?;
                listeners.extend(sockets.listen().map_err(ListenError::InvalidSocket)?);
            }
        }
    }
    Ok(listeners)
}

/// Listens on one address; returns no listener for sockets of systemd.
pub(super) fn listen_on(listen: &Listen, mode: UnixMode) -> io::Result<Vec<Listener>> {
    match listen {
        Listen::Port(port) => on_port(port),
        Listen::Unix(path) => Ok(vec![Listener::unix(path, mode.bits())?]),
        Listen::Systemd => Ok(Vec::new()),
    }
}

/// Listens on every address of a host name and port; only the first one is mandatory.
fn on_port(port: &HostPort) -> io::Result<Vec<Listener>> {
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
