//! Generates the admin token at startup if none is configured or stored, and saves it in the state directory after the
//! startup has succeeded.

use std::path::PathBuf;

use crate::config::{Config, FileError, LockError, StateDirectory};
use crate::secret::{AdminTokenFingerprint, generate_token};

/// The reason why a generated admin token was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveTokenError {
    /// The lock of the state directory was not acquired.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The file of the token cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// A generated admin token that is not saved yet.
pub struct NewAdminToken {
    token: String,
    directory: StateDirectory,
}

impl std::fmt::Debug for NewAdminToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewAdminToken").finish_non_exhaustive()
    }
}

impl NewAdminToken {
    /// Generates a token and sets its fingerprint in `config`. Returns `None` if a token is configured or stored, if
    /// there is no state directory, or if the system provides no random numbers.
    pub fn generate_into(config: &mut Config) -> Option<Self> {
        let directory = config.state_directory()?;
        // A token that exists and cannot be read was reported when the configuration was loaded.
        if config.admin_token.is_some() || directory.admin_token_path().exists() {
            return None;
        }
        let token = generate_token("kca_")?;
        config.admin_token = Some(AdminTokenFingerprint::new(&token));
        Some(Self { token, directory })
    }

    /// Saves the token in the state directory, and returns its path. The caller saves the token after Keychoir has
    /// started, so that a failed start leaves no file.
    ///
    /// # Errors
    ///
    /// Fails if the lock of the state directory is not acquired or the file cannot be written. The token is then lost,
    /// and the admin API cannot be used before a restart.
    pub fn save(self) -> Result<PathBuf, SaveTokenError> {
        self.directory.try_lock()?.write_admin_token(&self.token)?;
        Ok(self.directory.admin_token_path())
    }
}
