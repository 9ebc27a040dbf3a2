//! Checks whether Keychoir could start, for `keychoir check` and `keychoir doctor`: opens and closes the listeners, and
//! inspects the database without changing it. Also checks the limit of open files, the settings of TLS and of the
//! mirror, and whether listeners for other machines require a token. Unlike `start`, the dry run collects all problems
//! instead of stopping at the first.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::connection_limit::ConnectionLimit;
use super::listen::listen_on;
use super::start_error::{check_exposure, check_operator_exposure};
use super::{AppConfig, StartError};
use crate::config::{Config, ListenAddress};
use crate::mirror;
use crate::server::{Address, Listener};
use crate::store::{self, DatabaseIntegrity, DatabaseLocation, OpenError, UsageReader};
use crate::upstream::TcpTlsConnector;

/// The result of a dry run.
#[derive(Debug, Default)]
pub struct DryRun {
    /// The problems that prevent startup.
    pub problems: Vec<StartProblem>,
    /// The conditions under which Keychoir starts but does not work as configured.
    pub warnings: Vec<StartWarning>,
}

/// A problem that prevents startup.
#[derive(Debug, thiserror::Error)]
pub enum StartProblem {
    /// Keychoir cannot listen on an address.
    #[error("{address}: {source}")]
    Address {
        /// The address as it is configured.
        address: ListenAddress,
        /// The I/O error.
        source: io::Error,
    },
    /// Startup would fail with this error.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// A condition under which Keychoir starts but does not work as configured.
#[derive(Debug, thiserror::Error)]
pub enum StartWarning {
    /// The database cannot currently be opened. Requests are served, and usage records are kept in memory.
    #[error("{0}; requests are served without it until it can be used")]
    Database(#[source] OpenError),
    /// The database is damaged. Startup renames the file and creates an empty one.
    #[error("{} is damaged ({damage}): startup renames it and begins with an empty database", .path.display())]
    DamagedDatabase {
        /// The path of the database.
        path: PathBuf,
        /// The first error that SQLite reports.
        damage: String,
    },
    /// The system allows fewer open files than the configured connections need.
    #[error("{0}")]
    Connections(ConnectionLimit),
}

/// Checks whether Keychoir could start with `config`. Sockets passed by systemd are not checked, because they exist
/// only when systemd starts Keychoir.
pub async fn dry_run(config: Config) -> DryRun {
    let mut findings = DryRun::default();
    let limit = ConnectionLimit::determine(&config);
    if limit.is_reduced() {
        findings.warnings.push(StartWarning::Connections(limit));
    }
    // The listeners stay open until all addresses are checked, so that conflicting addresses are detected.
    let client_listeners = open_listeners(&config, config.server.listen.iter(), &mut findings);
    let operator_listeners = open_listeners(&config, config.admin.listen.address(), &mut findings);
    let addresses = listener_addresses(&client_listeners);
    let operator_addresses = listener_addresses(&operator_listeners);
    drop((client_listeners, operator_listeners));
    match AppConfig::from_config(config) {
        Err(error) => findings.problems.push(StartError::from(error).into()),
        Ok(app_config) => {
            let exposure = addresses.map_err(StartError::from).and_then(|addresses| {
                check_exposure(&addresses, &app_config.clients).map_err(StartError::from)
            });
            let operator_exposure = operator_addresses
                .map_err(StartError::from)
                .and_then(|addresses| check_operator_exposure(&addresses, app_config.admin_token.is_some()));
            let mirror = app_config.mirror.as_ref().map_or(Ok(()), mirror::check_settings);
            let errors = [
                exposure.err(),
                operator_exposure.err(),
                TcpTlsConnector::new(app_config.ca_file.as_deref()).err().map(StartError::from),
                mirror.err().map(StartError::from),
            ];
            findings.problems.extend(errors.into_iter().flatten().map(StartProblem::from));
            match store::check_location(&app_config.database) {
                Ok(()) => findings.warnings.extend(find_damage(&app_config.database)),
                Err(error) if error.is_temporary() => findings.warnings.push(StartWarning::Database(error)),
                Err(error) => findings.problems.push(StartError::from(error).into()),
            }
        }
    }
    findings
}

/// Opens the listeners of `addresses`, and adds a problem for each address at which that fails.
fn open_listeners<'a>(
    config: &Config,
    addresses: impl IntoIterator<Item = &'a ListenAddress>,
    findings: &mut DryRun,
) -> Vec<Listener> {
    let mut opened = Vec::new();
    for address in addresses.into_iter().filter(|address| **address != ListenAddress::Systemd) {
        match listen_on(address, config.server.unix_mode) {
            Ok(listeners) => opened.extend(listeners),
            Err(source) => {
                findings.problems.push(StartProblem::Address { address: address.clone(), source });
            }
        }
    }
    opened
}

fn listener_addresses(listeners: &[Listener]) -> io::Result<Vec<Address>> {
    listeners.iter().map(Listener::address).collect()
}

/// Maximum duration of the search for damage. A database that needs more time is searched in part.
const MAX_INSPECTION_TIME: Duration = Duration::from_secs(5);

/// Searches the database for damage. A database that cannot be read now is not searched.
fn find_damage(location: &DatabaseLocation) -> Option<StartWarning> {
    let DatabaseLocation::File(path) = location else { return None };
    let mut reader = UsageReader::open(path).ok()?;
    match reader.inspect(MAX_INSPECTION_TIME).ok()?.integrity {
        DatabaseIntegrity::Damaged(damage) => {
            Some(StartWarning::DamagedDatabase { path: path.clone(), damage })
        }
        DatabaseIntegrity::Intact | DatabaseIntegrity::Unfinished => None,
    }
}
