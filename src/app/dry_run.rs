//! Checks whether the program could start: briefly listens on the addresses, and examines the database
//! without changing it. Unlike `start`, the check continues after a problem.

use std::io;

use super::listen::listen_on;
use super::{AppConfig, StartError};
use crate::config::{Config, ListenAddress};
use crate::server::Listener;
use crate::store;
use crate::upstream::TcpTlsConnector;

/// A problem that prevents the start.
#[derive(Debug, thiserror::Error)]
pub enum StartProblem {
    /// Listening on an address failed.
    #[error("{address}: {source}")]
    Address {
        /// The configured address.
        address: ListenAddress,
        /// The I/O error.
        source: io::Error,
    },
    /// The start would fail with this error.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Returns all problems that prevent a start with `config`. Sockets passed by systemd are not checked,
/// because they exist only when systemd starts the program.
pub async fn dry_run(config: Config) -> Vec<StartProblem> {
    let mut problems = Vec::new();
    // The listeners stay open until all addresses are checked, so that conflicting addresses are detected.
    let mut open_listeners: Vec<Listener> = Vec::new();
    let addresses = config.server.listen.iter().chain(config.admin.listen.address());
    for address in addresses.filter(|address| **address != ListenAddress::Systemd) {
        match listen_on(address, config.server.unix_mode) {
            Ok(listeners) => open_listeners.extend(listeners),
            Err(source) => problems.push(StartProblem::Address { address: address.clone(), source }),
        }
    }
    drop(open_listeners);
    match AppConfig::from_config(config) {
        Err(error) => problems.push(StartError::from(error).into()),
        Ok(app_config) => {
            let errors = [
                TcpTlsConnector::new(app_config.ca_file.as_deref()).err().map(StartError::from),
                store::check_location(&app_config.database).err().map(StartError::from),
            ];
            problems.extend(errors.into_iter().flatten().map(StartProblem::from));
        }
    }
    problems
}
