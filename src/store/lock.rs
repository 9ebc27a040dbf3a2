//! Locks a database for one process, because two processes would each grant the full quotas. The kernel releases the
//! lock (`flock`) when the process ends, so the lock file of a killed process does not prevent a start. Also checks
//! whether a database is locked, and recognizes Keychoir's lock files.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use super::open::companion;
use crate::private_file;

/// The text after the process id by which Keychoir recognizes its own lock files.
const SIGNATURE: &str = "keychoir";

/// Maximum number of bytes that are read from a lock file, which contains a process id and the signature.
const MAX_READ_BYTES: u64 = 64;

/// The lock of a database, held until it is dropped. The lock file is never removed: otherwise one process
/// could hold the lock of the removed file while another one locks a new file.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
}

impl Drop for Lock {
    /// Unlocks the file. Closing it is not enough: a child process that was forked at this moment has a copy of
    /// the descriptor until it runs its program.
    fn drop(&mut self) {
        let _ = self.file.unlock();
    }
}

/// The reason why a lock cannot be acquired.
#[derive(Debug)]
pub(super) enum DatabaseLockError {
    /// Another process has the lock. Contains its process id if the lock file contains one.
    Held(Option<u32>),
    /// The lock file cannot be created, opened, locked or written.
    System(io::Error),
}

impl From<io::Error> for DatabaseLockError {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

impl Lock {
    /// Locks the database at `path`, whose directory must exist, without waiting.
    pub(super) fn acquire(path: &Path) -> Result<Self, DatabaseLockError> {
        let mut file = private_file::open_or_create(&lock_path(path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DatabaseLockError::Held(read_pid(&mut file))),
            Err(TryLockError::Error(error)) => return Err(DatabaseLockError::System(error)),
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{} {SIGNATURE}", std::process::id())?;
        Ok(Self { file })
    }
}

/// Checks whether [`Lock::acquire`] would succeed, without creating a file. The check holds a shared lock until it
/// returns, so a program that starts at the same moment may find the database locked.
pub(super) fn check_unlocked(path: &Path) -> Result<(), DatabaseLockError> {
    let mut file = match OpenOptions::new().read(true).write(true).open(lock_path(path)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(DatabaseLockError::System(error)),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(DatabaseLockError::Held(read_pid(&mut file))),
        Err(TryLockError::Error(error)) => Err(DatabaseLockError::System(error)),
    }
}

/// Returns whether there is a lock file of Keychoir next to the database at `path`.
pub(super) fn has_lock_file(path: &Path) -> bool {
    let mut content = String::new();
    let read_result =
        File::open(lock_path(path)).and_then(|file| file.take(MAX_READ_BYTES).read_to_string(&mut content));
    read_result.is_ok() && content.split_whitespace().nth(1) == Some(SIGNATURE)
}

/// Returns the path of the lock file: next to the resolved database file, so that all links to the file have the same
/// lock.
fn lock_path(path: &Path) -> PathBuf {
    companion(&path.canonicalize().unwrap_or_else(|_| path.to_owned()), ".lock")
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut content = String::new();
    file.rewind().ok()?;
    file.take(MAX_READ_BYTES).read_to_string(&mut content).ok()?;
    content.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_held_lock_names_the_process_of_its_holder() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keychoir.db");
        fs::write(&path, "").unwrap();
        let link = directory.path().join("link.db");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(!has_lock_file(&path));
        let lock = Lock::acquire(&path).unwrap();
        assert!(has_lock_file(&path) && has_lock_file(&link));
        for path in [&path, &link] {
            for error in [Lock::acquire(path).unwrap_err(), check_unlocked(path).unwrap_err()] {
                assert!(
                    matches!(error, DatabaseLockError::Held(Some(pid)) if pid == std::process::id()),
                    "the error must contain the id of this process: {error:?}"
                );
            }
        }
        drop(lock);
        assert!(has_lock_file(&path), "the lock file must remain");
        check_unlocked(&path).unwrap();
        Lock::acquire(&link).unwrap();
    }

    #[test]
    fn a_dropped_lock_is_free_even_if_a_forked_process_has_its_descriptor() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keychoir.db");
        let lock = Lock::acquire(&path).unwrap();
        let inherited_file = lock.file.try_clone().unwrap();
        drop(lock);
        Lock::acquire(&path).unwrap();
        drop(inherited_file);
    }

    #[test]
    fn the_lock_file_of_a_dead_process_does_not_prevent_locking() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keychoir.db");
        fs::write(companion(&path, ".lock"), "4294967295 keychoir and a long line more\n").unwrap();
        let _lock = Lock::acquire(&path).unwrap();
        let content = fs::read_to_string(companion(&path, ".lock")).unwrap();
        assert_eq!(content, format!("{} keychoir\n", std::process::id()));
    }

    #[test]
    fn an_unwritable_path_is_not_reported_as_a_held_lock() {
        let missing = Path::new("/no/such/directory/keychoir.db");
        assert!(matches!(Lock::acquire(missing).unwrap_err(), DatabaseLockError::System(_)));
    }
}
