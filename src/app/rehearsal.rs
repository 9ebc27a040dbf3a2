//! What a start would stumble over, found without starting: places to listen on are taken for a moment,
//! the database is looked at and not changed. Separate from `start`, which ends at the first obstacle.

use std::io;

use super::listen::one;
use super::{AppConfig, StartError};
use crate::config::{Config, Listen};
use crate::server::Listener;
use crate::store;
use crate::upstream::TcpTlsConnector;

/// What is in the way of a start.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    /// A place cannot be listened on.
    #[error("{place}: {source}")]
    Place {
        /// Which.
        place: Listen,
        /// What the system says.
        source: io::Error,
    },
    /// Everything else.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Everything that is in the way of a start with this configuration. Sockets of systemd are there only
/// when it starts the program, so they are taken as they come.
pub async fn rehearse(config: Config) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    // All are held until the end: two of them may be one place.
    let mut held: Vec<Listener> = Vec::new();
    for place in config.server.listen.iter().filter(|place| **place != Listen::Systemd) {
        match one(place, config.server.unix_mode) {
            Ok(listeners) => held.extend(listeners),
            Err(source) => obstacles.push(Obstacle::Place { place: place.clone(), source }),
        }
    }
    drop(held);
    match AppConfig::of(config) {
        Err(error) => obstacles.push(StartError::from(error).into()),
        Ok(parts) => {
            let found = [
                TcpTlsConnector::new(parts.ca_file.as_deref()).err().map(StartError::from),
                store::examine(&parts.books).err().map(StartError::from),
            ];
            obstacles.extend(found.into_iter().flatten().map(Obstacle::from));
        }
    }
    obstacles
}
