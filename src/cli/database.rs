//! Finds the usage database for the commands that use it, and opens it for the commands that read usage records. The
//! database is opened read-only, so that it can be read while the service is running.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::{ConfigSources, fail, load};
use crate::config::{Config, KeyRequirement};
use crate::store::{ReadError, UsageReader};

/// The options that select the database.
#[derive(Clone, Debug, Args)]
pub(super) struct DatabaseOptions {
    #[command(flatten)]
    pub(super) sources: ConfigSources,
    /// Use this database instead of the configured one.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

/// The reason why the usage database cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum DatabaseError {
    #[error("{0}. Use --file to read another file{hint}.", hint = service_database_hint(.0))]
    Read(#[from] ReadError),
    #[error(
        "usage records are kept only in memory (storage.ephemeral): `keychoir status` shows the state of the keys"
    )]
    Ephemeral,
}

/// The database of the service in `systemd/`. A command that another user runs looks for a different file by default.
const SERVICE_DATABASE: &str = "/var/lib/keychoir/keychoir.db";

/// Returns a hint that names the database of the service. The hint is empty if that database does not exist
/// or is the one that cannot be read.
fn service_database_hint(error: &ReadError) -> String {
    match error {
        ReadError::NoFile(path)
            if path.as_os_str() != SERVICE_DATABASE && PathBuf::from(SERVICE_DATABASE).exists() =>
        {
            format!("; the service uses {SERVICE_DATABASE}")
        }
        ReadError::NoFile(_)
        | ReadError::Empty(_)
        | ReadError::Unreadable { .. }
        | ReadError::Newer { .. }
        | ReadError::Older(_)
        | ReadError::Corrupt { .. }
        | ReadError::Unusable { .. } => String::new(),
    }
}

impl DatabaseOptions {
    /// Opens the database. If that fails, prints the error and returns the exit code.
    pub(super) fn open(self) -> Result<UsageReader, ExitCode> {
        let reader = match &self.file {
            Some(file) => UsageReader::open(file).map_err(DatabaseError::from),
            None => self.open_configured(&self.load_config()?),
        };
        reader.map_err(fail)
    }

    /// Opens the database of a loaded configuration.
    pub(super) fn open_configured(&self, config: &Config) -> Result<UsageReader, DatabaseError> {
        match self.file.as_deref().or(config.storage.file()) {
            Some(file) => Ok(UsageReader::open(file)?),
            None => Err(DatabaseError::Ephemeral),
        }
    }

    /// Returns the path of the database. If there is none, prints the error and returns the exit code.
    pub(super) fn path(&self) -> Result<PathBuf, ExitCode> {
        if let Some(file) = &self.file {
            return Ok(file.clone());
        }
        let config = self.load_config()?;
        config.storage.file().map(Path::to_owned).ok_or_else(|| fail(DatabaseError::Ephemeral))
    }

    /// Returns whether the database is the configured one, because `--file` does not name another.
    pub(super) fn uses_configured_file(&self) -> bool {
        self.file.is_none()
    }

    /// Loads the configuration, which may contain no keys.
    pub(super) fn load_config(&self) -> Result<Config, ExitCode> {
        let mut overrides = self.sources.clone().into_overrides(KeyRequirement::Optional);
        // If `--file` names a database, the configured path of the database is not validated.
        overrides.is_ephemeral = self.file.is_some();
        Ok(load(&overrides)?.config)
    }
}
