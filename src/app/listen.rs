//! From the places a configuration names to listeners, all of them or none.

use std::io;

use tracing::debug;

use crate::config::{HostPort, Listen, Listens, UnixMode};
use crate::server::{Address, InheritedSockets, Listener};

/// Why it does not listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A place is not to be had.
    #[error("{place}: {source}")]
    Place {
        /// As it was named.
        place: String,
        /// What the system says.
        source: io::Error,
    },
    /// Sockets of systemd are asked for, and none came.
    #[error("systemd passes no sockets (LISTEN_FDS is not set for this process)")]
    NothingPassed,
    /// What systemd passes cannot be listened on.
    #[error(transparent)]
    Passed(io::Error),
}

/// Listens on every place that is meant.
///
/// # Errors
///
/// When one of them is not to be had. What was listened on before is released.
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

/// Listens on one place; on none for sockets of systemd.
pub(super) fn one(listen: &Listen, mode: UnixMode) -> io::Result<Vec<Listener>> {
    match listen {
        Listen::Port(port) => on_port(port),
        Listen::Unix(path) => Ok(vec![Listener::unix(path, mode.bits())?]),
        Listen::Systemd => Ok(Vec::new()),
    }
}

/// Listens on every address of a port; only the first must be there.
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
