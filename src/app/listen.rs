//! Opens all configured listeners, or none of them.

use std::io;

use tracing::debug;

use crate::config::{HostPort, Listen, Listens, UnixMode};
use crate::server::{Address, InheritedSockets, Listener};

/// Why a listener cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// An address cannot be listened on.
    #[error("{place}: {source}")]
    Place {
        /// The address as it was configured.
        place: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The configuration names sockets of systemd, and none were passed.
    #[error("systemd passes no sockets (LISTEN_FDS is not set for this process)")]
    NothingPassed,
    /// A socket that systemd passed cannot be listened on.
    #[error(transparent)]
    Passed(io::Error),
}

/// Listens on every address of `meant`.
///
/// # Errors
///
/// When one of them cannot be opened. Listeners opened before are closed.
pub async fn listen(
    meant: &Listens,
    mode: UnixMode,
    passed: InheritedSockets,
) -> Result<Vec<Listener>, ListenError> {
    let mut passed = Some(passed);
    let mut listeners: Vec<Listener> = Vec::new();
    for listen in meant.iter() {
        let refused = |source| ListenError::Place { place: listen.to_string(), source };
        match listen {
            Listen::Port(_) | Listen::Unix(_) => listeners.extend(one(listen, mode).map_err(refused)?),
            Listen::Systemd => {
                let passed = passed.take().filter(|passed| passed.count() > 0);
                let passed = passed.ok_or(ListenError::NothingPassed)?;
                listeners.extend(passed.listen().map_err(ListenError::Passed)?);
            }
        }
    }
    Ok(listeners)
}

/// Listens on one address; returns no listener for sockets of systemd.
pub(super) fn one(listen: &Listen, mode: UnixMode) -> io::Result<Vec<Listener>> {
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
        if let Some(Address::Tcp(first)) = listeners.first().map(Listener::address).transpose()? {
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
