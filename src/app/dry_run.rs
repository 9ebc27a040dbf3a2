//! Finds the obstacles of a start without starting: addresses are listened on for a moment, and the database
//! is examined without being changed. Separate from `start`, which ends at the first obstacle.

use std::io;

use super::listen::listen_on;
use super::{AppConfig, StartError};
use crate::config::{Config, Listen};
use crate::server::Listener;
use crate::store;
use crate::upstream::TcpTlsConnector;

/// An obstacle of a start.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    /// An address cannot be listened on.
    #[error("{address}: {source}")]
    Address {
        /// The configured address.
        address: Listen,
        /// The error of the system.
        source: io::Error,
    },
    /// Any other error of a start.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// All obstacles of a start with this configuration. Sockets of systemd exist only when systemd starts the
/// program, so they are not checked.
pub async fn dry_run(config: Config) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    // All listeners stay open until the end, because two of them may have the same address.
    let mut held: Vec<Listener> = Vec::new();
    for address in config.server.listen.iter().filter(|address| **address != Listen::Systemd) {
        match listen_on(address, config.server.unix_mode) {
            Ok(listeners) => held.extend(listeners),
            Err(source) => obstacles.push(Obstacle::Address { address: address.clone(), source }),
        }
    }
    drop(held);
    match AppConfig::of(config) {
        Err(error) => obstacles.push(StartError::from(error).into()),
        Ok(settings) => {
            let errors = [
                TcpTlsConnector::new(settings.ca_file.as_deref()).err().map(StartError::from),
                store::examine(&settings.database).err().map(StartError::from),
            ];
            obstacles.extend(errors.into_iter().flatten().map(Obstacle::from));
        }
    }
    obstacles
}
