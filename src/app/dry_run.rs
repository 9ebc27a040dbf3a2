//! Checks whether the program could start: briefly listens on the addresses, and examines the database
//! without changing it. Unlike `start`, it does not end at the first problem.

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
    /// Another error.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Returns all problems of a start with this configuration. Sockets passed by systemd are not checked,
/// because they exist only when systemd starts the program.
pub async fn dry_run(config: Config) -> Vec<StartProblem> {
    let mut problems = Vec::new();
    // Kept open, so that two configured addresses that conflict are detected.
    let mut open_listeners: Vec<Listener> = Vec::new();
    for address in config.server.listen.iter().filter(|address| **address != ListenAddress::Systemd) {
        match listen_on(address, config.server.unix_mode) {
            Ok(listeners) => open_listeners.extend(listeners),
            Err(source) => problems.push(StartProblem::Address { address: address.clone(), source }),
        }
    }
    drop(open_listeners);
    match AppConfig::from_config(config) {
        Err(error) => problems.push(StartError::from(error).into()),
        Ok(settings) => {
            let errors = [
                TcpTlsConnector::new(settings.ca_file.as_deref()).err().map(StartError::from),
                store::check_location(&settings.database).err().map(StartError::from),
            ];
            problems.extend(errors.into_iter().flatten().map(StartProblem::from));
        }
    }
    problems
}
