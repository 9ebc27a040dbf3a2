//! Finds the admin token for the commands that connect to a running Keychoir: in the file of `--admin-token-file`, in
//! `KEYCHOIR_ADMIN_TOKEN`, in the file of `admin.token_file`, or else in the generated file beside the usage database.

use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::config::Config;

/// The environment variable with the admin token.
const TOKEN_VARIABLE: &str = "KEYCHOIR_ADMIN_TOKEN";

/// The error of a file with the admin token that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("the admin token cannot be read from {}: {source}", .path.display())]
pub(super) struct AdminTokenError {
    path: PathBuf,
    source: io::Error,
}

/// Returns the admin token. `file` is the file of `--admin-token-file`. Without `config`, the configured file and the
/// generated file are not read. Returns `None` if there is no token, because some requests to Keychoir need none.
pub(super) fn find_admin_token(
    file: Option<&Path>,
    config: Option<&Config>,
) -> Result<Option<String>, AdminTokenError> {
    let read_token = |path: &Path| {
        let content = fs::read_to_string(path);
        content
            .map(|content| content.trim().to_owned())
            .map_err(|source| AdminTokenError { path: path.to_owned(), source })
    };
    if let Some(file) = file {
        return read_token(file).map(Some);
    }
    let variable_token = std::env::var(TOKEN_VARIABLE).unwrap_or_default();
    if !variable_token.trim().is_empty() {
        return Ok(Some(variable_token.trim().to_owned()));
    }
    let Some(config) = config else { return Ok(None) };
    let generated_token_path = config.state_directory().map(|directory| directory.admin_token_path());
    let path = config.admin.token_file.clone().or(generated_token_path).filter(|path| path.exists());
    path.as_deref().map(read_token).transpose()
}
