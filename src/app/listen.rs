//! Opens the configured listeners for clients and for operators: on IP addresses, on Unix sockets, or with sockets
//! passed by systemd. If a configured address cannot be opened, the listeners that are already open are closed. A host
//! with several IP addresses needs only the first one.

use std::io;

use tracing::debug;

use crate::config::{AdminListen, HostPort, ListenAddress, ListenAddresses, UnixMode};
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
    /// The configuration requires sockets passed by systemd, but systemd passed none, or they are in use already.
    #[error("systemd passed no sockets (LISTEN_FDS is not set for this process)")]
    NoSockets,
    /// A socket that systemd passed is not usable.
    #[error(transparent)]
    InvalidSocket(io::Error),
}

/// The open listeners: those for clients and those for operators.
#[derive(Debug, Default)]
pub struct ProgramListeners {
    /// The listeners for clients. If there are no listeners for operators, they also serve Keychoir's own pages and
    /// the admin API.
    pub clients: Vec<Listener>,
    /// The listeners for operators, which serve only Keychoir's own pages and the admin API.
    pub operators: Vec<Listener>,
}

impl From<Vec<Listener>> for ProgramListeners {
    fn from(clients: Vec<Listener>) -> Self {
        Self { clients, operators: Vec::new() }
    }
}

/// Opens a listener for every address of `configured`.
///
/// # Errors
///
/// Fails when a listener cannot be opened.
pub async fn listen(
    configured: &ListenAddresses,
    mode: UnixMode,
    sockets: InheritedSockets,
) -> Result<Vec<Listener>, ListenError> {
    let mut unused_sockets = Some(sockets).filter(|sockets| sockets.count() > 0);
    let mut listeners: Vec<Listener> = Vec::new();
    for address in configured.iter() {
        let to_error = |source| ListenError::Address { address: address.to_string(), source };
        listeners.extend(match address {
            ListenAddress::Tcp(_) | ListenAddress::Unix(_) => listen_on(address, mode).map_err(to_error)?,
            ListenAddress::Systemd => {
                let sockets = unused_sockets.take().ok_or(ListenError::NoSockets)?;
                sockets.listen().map_err(ListenError::InvalidSocket)?
            }
        });
    }
    Ok(listeners)
}

/// Opens the listener for operators, if one is configured.
///
/// # Errors
///
/// Fails when the listener cannot be opened.
pub fn listen_for_operators(configured: &AdminListen, mode: UnixMode) -> Result<Vec<Listener>, ListenError> {
    let Some(address) = configured.address() else { return Ok(Vec::new()) };
    listen_on(address, mode).map_err(|source| ListenError::Address { address: address.to_string(), source })
}

/// Listens on one configured address. Returns an empty list for sockets passed by systemd.
pub(super) fn listen_on(address: &ListenAddress, mode: UnixMode) -> io::Result<Vec<Listener>> {
    match address {
        ListenAddress::Tcp(host_port) => listen_on_host_port(host_port),
        ListenAddress::Unix(path) => Ok(vec![Listener::unix(path, mode.bits())?]),
        ListenAddress::Systemd => Ok(Vec::new()),
    }
}

/// Listens on every IP address of a host and port. Fails only if listening on the first address fails. All
/// listeners use the port of the first one, which the kernel chooses if the configured port is 0.
fn listen_on_host_port(host_port: &HostPort) -> io::Result<Vec<Listener>> {
    let mut listeners: Vec<Listener> = Vec::new();
    for mut address in host_port.socket_addresses() {
        if let Some(server::Address::Tcp(first)) = listeners.first().map(Listener::address).transpose()? {
            address.set_port(first.port());
        }
        match Listener::tcp(address) {
            Ok(listener) => listeners.push(listener),
            Err(error) if listeners.is_empty() => return Err(error),
            Err(error) => debug!("cannot listen on {address}: {error}"),
        }
    }
    Ok(listeners)
}
