//! Generates the admin token at the first startup, if the operator gave none.

use std::path::PathBuf;

use crate::config::{Config, LockError, StateDirectory};
use crate::secret::{AdminTokenFingerprint, generate_token};

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
    /// Generates a token for `config`, unless the configuration has one or there is no state directory.
    pub fn generate(config: &mut Config) -> Option<Self> {
        let directory = config.state_directory()?;
        // A token that exists and cannot be read was reported when the configuration was loaded.
        if config.admin_token.is_some() || directory.admin_token_path().exists() {
            return None;
        }
        let token = generate_token("kca_")?;
        config.admin_token = Some(AdminTokenFingerprint::new(&token));
        Some(Self { token, directory })
    }

    /// Saves the token in the state directory, and returns its path. The caller saves the token after the program has
    /// started, so that a failed start leaves no file.
    ///
    /// # Errors
    ///
    /// Fails when the token cannot be written. In that case, the admin API cannot be used.
    pub fn save(self) -> Result<PathBuf, LockError> {
        self.directory.try_lock()?.write_admin_token(&self.token)?;
        Ok(self.directory.admin_token_path())
    }
}
