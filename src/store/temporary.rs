//! Creates temporary files and directories next to the database. They are locked while they are used, so that a later
//! process finds and removes the unlocked files of a process that was killed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use tempfile::{TempDir, TempPath};

use crate::platform::files;

/// A locked temporary file or directory, which is removed on drop. Other users cannot read it.
#[derive(Debug)]
pub(super) struct LockedTemporary<P> {
    path: P,
    /// The kernel releases the lock when the process ends.
    _lock: File,
}

impl LockedTemporary<TempPath> {
    /// Creates an empty file in `directory` whose name is `prefix` and random characters.
    pub(super) fn create_file(directory: &Path, prefix: &OsStr) -> io::Result<Self> {
        remove_abandoned(directory, prefix);
        let path = tempfile::Builder::new().prefix(prefix).tempfile_in(directory)?.into_temp_path();
        let lock = lock_file(&path)?;
        Ok(Self { path, _lock: lock })
    }
}

impl LockedTemporary<TempDir> {
    /// Creates a directory in `directory` whose name is `prefix` and random characters.
    pub(super) fn create_directory(directory: &Path, prefix: &OsStr) -> io::Result<Self> {
        remove_abandoned(directory, prefix);
        let path = tempfile::Builder::new().prefix(prefix).tempdir_in(directory)?;
        let lock = lock_file(path.path())?;
        Ok(Self { path, _lock: lock })
    }
}

impl<P: AsRef<Path>> LockedTemporary<P> {
    /// Returns the path of the file or directory.
    pub(super) fn path(&self) -> &Path {
        self.path.as_ref()
    }
}

/// Locks a file or directory without waiting.
///
/// # Errors
///
/// Fails if another process has the lock, or has removed the file.
fn lock_file(path: &Path) -> io::Result<File> {
    let file = files::open(path)?;
    file.try_lock()?;
    if files::is_removed(&file.metadata()?) {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(file)
}

/// Removes the files and directories in `directory` whose names start with `prefix` and that no process has locked. A
/// failed removal is not an error, because the file only occupies disk space.
fn remove_abandoned(directory: &Path, prefix: &OsStr) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let prefix = prefix.as_encoded_bytes();
    for entry in entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(prefix)) {
        let (path, kind) = (entry.path(), entry.file_type());
        let (is_file, is_directory) = kind.map_or((false, false), |kind| (kind.is_file(), kind.is_dir()));
        if !is_file && !is_directory {
            continue;
        }
        // The lock is held until the removal, so that no process starts to use the file before it is removed.
        let Ok(_lock) = lock_file(&path) else { continue };
        let removal = if is_directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removal {
            Ok(()) => tracing::info!("Removed {}, which an interrupted command left", path.display()),
            Err(error) => tracing::warn!("{} cannot be removed: {error}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unlocked_files_and_directories_with_the_prefix_are_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let path_of = |name: &str| temporary.path().join(name);
        let prefix = OsStr::new("a.db.partial-");
        let used_file = LockedTemporary::create_file(temporary.path(), prefix).unwrap();
        let used_directory = LockedTemporary::create_directory(temporary.path(), prefix).unwrap();
        for name in ["a.db.partial", "a.db.partial-left", "b.db.partial-x"] {
            fs::write(path_of(name), "text").unwrap();
        }
        fs::create_dir(path_of("a.db.partial-directory")).unwrap();
        fs::write(path_of("a.db.partial-directory/copy.db"), "text").unwrap();
        std::os::unix::fs::symlink(path_of("b.db.partial-x"), path_of("a.db.partial-link")).unwrap();
        remove_abandoned(temporary.path(), prefix);
        assert!(
            used_file.path().exists() && used_directory.path().exists(),
            "a locked file or directory must not be removed"
        );
        let remains = |name: &str| path_of(name).symlink_metadata().is_ok();
        assert!(!remains("a.db.partial-left") && !remains("a.db.partial-directory"));
        assert!(["a.db.partial", "b.db.partial-x", "a.db.partial-link"].iter().all(|name| remains(name)));
        let (file, directory) = (used_file.path().to_owned(), used_directory.path().to_owned());
        drop((used_file, used_directory));
        assert!(!file.exists() && !directory.exists());
    }
}
