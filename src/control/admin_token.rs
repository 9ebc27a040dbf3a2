//! Generates the admin token at the first start, if the operator gave none.

use super::generate_token;
use crate::config::{Config, FileError, LockError};
use crate::secret::AdminTokenFingerprint;

/// Generates the admin token in the state directory, unless the configuration has one or there is no state
/// directory. Returns whether it was generated.
///
/// # Errors
///
/// When the token cannot be written. The admin API is disabled then.
pub fn ensure_admin_token(config: &mut Config) -> Result<bool, FileError> {
    let Some(directory) = config.state_directory() else { return Ok(false) };
    // A token that exists and cannot be read was reported when the configuration was loaded.
    if config.admin_token.is_some() || directory.admin_token_path().exists() {
        return Ok(false);
    }
    let lock = match directory.try_lock() {
        Ok(lock) => lock,
        // A command is changing the keys or clients. The next start generates the token.
        Err(LockError::Held) => return Ok(false),
        Err(LockError::File(error)) => return Err(error),
    };
    let Some(token) = generate_token("kca_") else { return Ok(false) };
    lock.write_admin_token(&token)?;
    config.admin_token = Some(AdminTokenFingerprint::new(&token));
    Ok(true)
}
