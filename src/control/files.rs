//! Writes the key files and the overlay of a change, deletes key files that no entry of the overlay names, and converts
//! file errors into [`ControlError`]s.

use std::path::PathBuf;

use tracing::warn;

#[cfg(test)]
use super::ChangeStep;
use super::Controller;
use super::edit::KeyFile;
use crate::admin::control::ControlError;
use crate::config::{Config, FileError, KEYS_DIRECTORY, Overlay, StateDirectory, StateLock};

impl Controller {
    /// Writes the new key files and then the overlay, which is formatted as `overlay_text`, and deletes the files of
    /// removed keys. If a file cannot be written, the overlay stays as it was.
    pub(super) fn save_files(
        &self,
        lock: &StateLock<'_>,
        directory: &StateDirectory,
        new_keys: &[KeyFile],
        overlay: &Overlay,
        overlay_text: &str,
    ) -> Result<(), ControlError> {
        let write_all = || {
            new_keys.iter().try_for_each(|KeyFile { name, key }| lock.write_key(name, key))?;
            #[cfg(test)]
            if self.stop_after == Some(ChangeStep::KeyFilesWritten) {
                return Ok(());
            }
            lock.save(overlay_text)
        };
        if let Err(error) = write_all() {
            // The saved overlay does not name the new key files. If a file cannot be deleted, the next change deletes
            // it.
            if let Ok(previous) = lock.read() {
                let _ = lock.delete_orphaned_key_files(&previous);
            }
            return Err(state_write_error(directory, error.source.to_string()));
        }
        #[cfg(test)]
        if self.stop_after.is_some() {
            return Err(ControlError::Unavailable);
        }
        delete_orphaned_key_files(lock, overlay);
        Ok(())
    }
}

/// Returns the paths and contents of the files of a change.
pub(super) fn next_files(
    directory: &StateDirectory,
    overlay: &str,
    new_keys: &[KeyFile],
) -> Vec<(PathBuf, String)> {
    let keys = new_keys.iter().map(|file| (directory.key_path(&file.name), file.key.expose().to_owned()));
    std::iter::once((directory.overlay_path(), overlay.to_owned())).chain(keys).collect()
}

/// Converts the error of the overlay or of a key file that cannot be read.
pub(super) fn overlay_read_error(error: &FileError) -> ControlError {
    let FileError { path, source } = error;
    ControlError::UnreadableOverlay { path: path.display().to_string(), reason: source.to_string() }
}

/// Returns the error for a state directory that cannot be locked, or in which a file cannot be written.
pub(super) fn state_write_error(directory: &StateDirectory, reason: String) -> ControlError {
    ControlError::Unwritable { directory: directory.path().display().to_string(), reason }
}

/// Deletes the key files that an interrupted change left in the state directory. `serve` calls it at startup.
pub fn delete_leftover_key_files(config: &Config) {
    let has_keys = |directory: &StateDirectory| directory.path().join(KEYS_DIRECTORY).exists();
    let Some(directory) = config.state_directory().filter(has_keys) else { return };
    // If another process holds the lock, its change deletes the files.
    if let Ok(lock) = directory.try_lock()
        && let Ok(overlay) = lock.read()
    {
        delete_orphaned_key_files(&lock, &overlay);
    }
}

/// Deletes the key files that no entry of the overlay names. Logs a file that cannot be deleted.
fn delete_orphaned_key_files(lock: &StateLock<'_>, overlay: &Overlay) {
    if let Err(error) = lock.delete_orphaned_key_files(overlay) {
        warn!(event = "key_file_not_deleted", "A key file that no entry names cannot be deleted: {error}");
    }
}
