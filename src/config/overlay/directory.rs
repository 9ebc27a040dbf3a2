//! Reads and writes the overlay, its key files and the generated admin token in the state directory. Each file is
//! replaced atomically, and only while the lock is held, so that two processes cannot overwrite each other's change.
//!
//! A key file is written before the overlay that names it, and deleted after the overlay is replaced by one that does
//! not name it. A crash in between leaves an orphaned key file, which [`StateLock::delete_orphaned_key_files`] deletes.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::{ManagedKey, Overlay};
use crate::private_file;
use crate::secret::ApiKey;

/// The directory of key files in the state directory. Only Keychoir writes files there, because it deletes the files
/// that the overlay does not name.
pub const KEYS_DIRECTORY: &str = "managed_keys";

const OVERLAY_FILE: &str = "managed.toml";
const LOCK_FILE: &str = "managed.lock";
const ADMIN_TOKEN_FILE: &str = "admin_token";
/// The file of the dashboard sessions.
const SESSIONS_FILE: &str = "dashboard_sessions.json";

/// The error of an operation on a file of the state directory.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", .path.display())]
pub struct FileError {
    /// The file or directory.
    pub path: PathBuf,
    /// The error of the file system.
    pub source: io::Error,
}

/// The reason why the lock of the overlay was not acquired.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds the lock.
    #[error("another process is changing the keys or clients")]
    Held,
    /// The lock file cannot be created or locked.
    #[error(transparent)]
    File(#[from] FileError),
}

/// The directory of the usage database, the overlay with its key files, the generated admin token and the sessions of
/// the dashboard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDirectory {
    path: PathBuf,
}

impl StateDirectory {
    /// Creates the state directory at the given `path`, which need not exist yet.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        // The path of a database without a directory, such as `keychoir.db`.
        let path = if path.as_os_str().is_empty() { PathBuf::from(".") } else { path };
        Self { path }
    }

    /// Returns the path of the directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of the overlay.
    #[must_use]
    pub fn overlay_path(&self) -> PathBuf {
        self.path.join(OVERLAY_FILE)
    }

    /// Returns the path of the generated admin token.
    #[must_use]
    pub fn admin_token_path(&self) -> PathBuf {
        self.path.join(ADMIN_TOKEN_FILE)
    }

    /// Returns the path of the dashboard sessions.
    #[must_use]
    pub fn sessions_path(&self) -> PathBuf {
        self.path.join(SESSIONS_FILE)
    }

    /// Returns the path of the key file with the file name `name`.
    #[must_use]
    pub fn key_path(&self, name: &str) -> PathBuf {
        self.path.join(KEYS_DIRECTORY).join(name)
    }

    /// Locks the overlay for changes. Creates the directory if it is missing.
    ///
    /// # Errors
    ///
    /// Fails when another process holds the lock, or the directory cannot be written.
    pub fn try_lock(&self) -> Result<StateLock<'_>, LockError> {
        create_directory(&self.path)?;
        let path = self.path.join(LOCK_FILE);
        let file = private_file::open_or_create(&path);
        let file = file.map_err(|source| FileError { path: path.clone(), source })?;
        match file.try_lock() {
            Ok(()) => Ok(StateLock { directory: self, file }),
            Err(TryLockError::WouldBlock) => Err(LockError::Held),
            Err(TryLockError::Error(source)) => Err(LockError::File(FileError { path, source })),
        }
    }
}

/// The lock of the overlay, which is the right to change the files of the overlay. It is unlocked when it is dropped.
#[derive(Debug)]
pub struct StateLock<'a> {
    directory: &'a StateDirectory,
    file: File,
}

impl Drop for StateLock<'_> {
    /// Unlocks the file. Closing it is not enough, because a child process that another thread forks at this moment has
    /// a copy of the descriptor until it runs its program.
    fn drop(&mut self) {
        let _ = self.file.unlock();
    }
}

impl StateLock<'_> {
    /// Reads the overlay. A missing file is an empty overlay.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read or is not an overlay.
    pub fn read(&self) -> Result<Overlay, FileError> {
        let path = self.directory.overlay_path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Overlay::default()),
            Err(source) => return Err(FileError { path, source }),
        };
        Overlay::parse(&text).map_err(|message| FileError { path, source: io::Error::other(message) })
    }

    /// Replaces the overlay with `text`.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be replaced. In that case, the previous overlay remains.
    pub fn save(&self, text: &str) -> Result<(), FileError> {
        replace_file(self.directory.overlay_path(), text)
    }

    /// Writes the key file with the file name `name`.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be written.
    pub fn write_key(&self, name: &str, key: &ApiKey) -> Result<(), FileError> {
        create_directory(&self.directory.path.join(KEYS_DIRECTORY))?;
        replace_file(self.directory.key_path(name), &format!("{}\n", key.expose()))
    }

    /// Reads the keys that `overlay` names, by the `key_file` of their entries.
    ///
    /// # Errors
    ///
    /// Fails when a file cannot be read or contains no key.
    pub fn read_keys(&self, overlay: &Overlay) -> Result<HashMap<String, ApiKey>, FileError> {
        let read_entry_key = |entry: &ManagedKey| {
            let path = self.directory.path.join(&entry.key_file);
            let key = fs::read_to_string(&path)
                .and_then(|text| ApiKey::new(text.trim()).map_err(io::Error::other))
                .map_err(|source| FileError { path, source })?;
            Ok((entry.key_file.clone(), key))
        };
        overlay.keys.iter().map(read_entry_key).collect()
    }

    /// Writes the admin token.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be written.
    pub fn write_admin_token(&self, token: &str) -> Result<(), FileError> {
        replace_file(self.directory.admin_token_path(), &format!("{token}\n"))
    }

    /// Deletes the key files that `overlay` does not name, and the temporary files of an interrupted write.
    /// Returns the number of deleted files.
    ///
    /// # Errors
    ///
    /// Fails when a file cannot be deleted. The other files are still deleted.
    pub fn delete_orphaned_key_files(&self, overlay: &Overlay) -> Result<usize, FileError> {
        let directory = self.directory.path.join(KEYS_DIRECTORY);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(source) => return Err(FileError { path: directory, source }),
        };
        let is_named = |path: &Path| {
            overlay.keys.iter().any(|key| self.directory.path.join(&key.key_file).as_path() == path)
        };
        let orphaned_files = entries.flatten().map(|entry| entry.path()).filter(|path| !is_named(path));
        let mut last_result = Ok(());
        let mut deleted_count = 0;
        for path in orphaned_files {
            match fs::remove_file(&path) {
                Ok(()) => deleted_count += 1,
                Err(source) => last_result = Err(FileError { path, source }),
            }
        }
        last_result.map(|()| deleted_count)
    }
}

fn create_directory(path: &Path) -> Result<(), FileError> {
    private_file::create_directory(path).map_err(|source| FileError { path: path.to_owned(), source })
}

fn replace_file(path: PathBuf, text: &str) -> Result<(), FileError> {
    private_file::replace(&path, text.as_bytes())
        .map_err(|source| FileError { path: path.clone(), source })?;
    // An error of the synchronization is ignored, because the file is replaced: the change is lost only if the machine
    // loses power before the file system writes the directory by itself.
    let _ = private_file::sync_directory_of(&path);
    Ok(())
}
