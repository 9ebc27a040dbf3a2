//! Opens the usage database read-only for commands, also while the service runs.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::{ConfigSources, load};
use crate::config::{Config, Need};
use crate::store::{ReadError, Reader};

/// The options that select the database.
#[derive(Clone, Debug, Args)]
pub(super) struct DatabaseOptions {
    #[command(flatten)]
    pub(super) sources: ConfigSources,
    /// Read this file instead of the one that the configuration names.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

/// The errors that prevent reading the database.
#[derive(Debug, thiserror::Error)]
pub(super) enum DatabaseError {
    #[error("{0}. Give another file with --file{hint}.", hint = hint(.0))]
    Read(#[from] ReadError),
    #[error(
        "the usage database is in memory only (storage.ephemeral): `keychoir status` shows the state of the keys"
    )]
    Ephemeral,
}

/// The database of the service in `systemd/`. The configuration of another user has a different
/// path.
const SERVICE_DATABASE: &str = "/var/lib/keychoir/keychoir.db";

fn hint(error: &ReadError) -> String {
    match error {
        ReadError::NoFile(path)
            if path.as_os_str() != SERVICE_DATABASE && PathBuf::from(SERVICE_DATABASE).exists() =>
        {
            format!("; the service's is {SERVICE_DATABASE}")
        }
        ReadError::NoFile(_)
        | ReadError::Empty(_)
        | ReadError::Unreadable { .. }
        | ReadError::Newer { .. }
        | ReadError::Older(_)
        | ReadError::Broken { .. }
        | ReadError::Unusable { .. } => String::new(),
    }
}

impl DatabaseOptions {
    /// Opens the database. If the configuration is invalid, its mistakes are printed and the exit
    /// code is returned.
    pub(super) fn open(self) -> Result<Result<Reader, DatabaseError>, ExitCode> {
        if let Some(file) = &self.file {
            return Ok(Reader::open(file).map_err(DatabaseError::from));
        }
        let config = self.config()?;
        Ok(self.open_configured(&config))
    }

    /// Opens the database of a loaded configuration.
    pub(super) fn open_configured(&self, config: &Config) -> Result<Reader, DatabaseError> {
        match self.file.as_deref().or(config.storage.file()) {
            Some(file) => Ok(Reader::open(file)?),
            None => Err(DatabaseError::Ephemeral),
        }
    }

    /// Whether the database is the configured one.
    pub(super) fn uses_configured_file(&self) -> bool {
        self.file.is_none()
    }

    /// Loads the configuration. It may have no keys.
    pub(super) fn config(&self) -> Result<Config, ExitCode> {
        let mut overrides = self.sources.clone().overrides(false);
        overrides.keys = Need::Optional;
        // If the command line names a file, the configured path of the database is not validated.
        overrides.is_ephemeral = self.file.is_some();
        Ok(load(&overrides)?.config)
    }
}
