//! Locks a database for one process: two processes that count against the same quotas would each
//! allow all of them. The lock is the kernel's (`flock`), so it ends with the process in every
//! case, and a lock file left behind by a killed process is no obstacle.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::open::companion;

/// The word after the process id by which Keychoir recognizes its own lock file.
const WORD: &str = "keychoir";

/// The largest lock file in bytes: it holds a process id and a word.
const SIZE_MAX: u64 = 64;

/// The lock of a database, held until it is dropped. The lock file stays: if it were removed, a
/// third process could lock a new file while the second one waits for the old one.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

/// Why the lock was not taken.
#[derive(Debug)]
pub(super) enum LockError {
    /// Another process holds it; its id, if the file names one.
    Held(Option<u32>),
    /// The lock file cannot be made or written.
    System(io::Error),
}

impl From<io::Error> for LockError {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

impl Lock {
    /// Locks the database at `path`, whose folder must exist. Does not wait.
    pub(super) fn take(path: &Path) -> Result<Self, LockError> {
        let mut options = OpenOptions::new();
        options.create(true).read(true).write(true).truncate(false).mode(0o600);
        let mut file = options.open(file_of(path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(LockError::Held(pid_in(&mut file))),
            Err(error) => return Err(LockError::System(error.into())),
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{} {WORD}", std::process::id())?;
        Ok(Self { _file: file })
    }
}

/// Whether a lock file of Keychoir lies beside the database at `path`.
pub(super) fn is_beside(path: &Path) -> bool {
    let mut text = String::new();
    let read = File::open(file_of(path)).and_then(|file| file.take(SIZE_MAX).read_to_string(&mut text));
    read.is_ok() && text.split_whitespace().nth(1) == Some(WORD)
}

/// The path of the lock file: beside the resolved database file, so that two links to it are one
/// database.
fn file_of(path: &Path) -> PathBuf {
    companion(&path.canonicalize().unwrap_or_else(|_| path.to_owned()), ".lock")
}

fn pid_in(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(SIZE_MAX).read_to_string(&mut text).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_held_lock_names_the_process_of_its_holder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keychoir.db");
        fs::write(&path, "").unwrap();
        let link = folder.path().join("link.db");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(!is_beside(&path));
        let lock = Lock::take(&path).unwrap();
        assert!(is_beside(&path) && is_beside(&link));
        for path in [&path, &link] {
            let held = Lock::take(path).unwrap_err();
            assert!(matches!(held, LockError::Held(Some(pid)) if pid == std::process::id()), "{held:?}");
        }
        drop(lock);
        assert!(is_beside(&path), "the file stays");
        Lock::take(&link).unwrap();
    }

    #[test]
    fn the_lock_file_of_a_dead_process_is_no_obstacle() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keychoir.db");
        fs::write(companion(&path, ".lock"), "4294967295 keychoir and a long line more\n").unwrap();
        let _lock = Lock::take(&path).unwrap();
        let text = fs::read_to_string(companion(&path, ".lock")).unwrap();
        assert_eq!(text, format!("{} keychoir\n", std::process::id()));
    }

    #[test]
    fn a_path_that_cannot_be_written_is_no_held_lock() {
        let missing = Path::new("/no/such/folder/keychoir.db");
        assert!(matches!(Lock::take(missing).unwrap_err(), LockError::System(_)));
    }
}
