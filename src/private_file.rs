//! Opens, creates and replaces files that only their owner may read, such as keys, tokens, the database and lock files.
//! Also creates their directories, and syncs the directories to the disk.
//!
//! An administrator may run a command as root that writes into the directory of the service. New files and directories
//! therefore get the owner of the directory that contains them. Otherwise the service could not open them at its next
//! startup.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use crate::platform::files::{adopt_owner, create_private_directory, open, private_options, sync_directory};

/// Creates the directory at `path` and its missing parents with mode 0700.
///
/// # Errors
///
/// Fails when a directory cannot be created.
pub fn create_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = directory_of(path);
    if parent != path {
        create_directory(parent)?;
    }
    match create_private_directory(path) {
        Ok(()) => adopt_owner(&open(path)?, parent),
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Opens the file at `path` for reading and writing. Creates it with mode 0600 if it is missing.
///
/// # Errors
///
/// Fails when the file cannot be opened or created.
pub fn open_or_create(path: &Path) -> io::Result<File> {
    let mut options = private_options();
    options.read(true).write(true);
    match options.open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        opened => return opened,
    }
    // Only a file that this call has created changes its owner: a link at `path` may lead to any file.
    match options.clone().create_new(true).open(path) {
        Ok(file) => {
            adopt_owner(&file, directory_of(path))?;
            Ok(file)
        }
        // Another process has just created the file, or a link leads to a missing file.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            options.create(true).truncate(false).open(path)
        }
        Err(error) => Err(error),
    }
}

/// Replaces the file at `path` atomically with a file of mode 0600 that contains `content`, and syncs its content to
/// the disk. The caller syncs the directory with [`sync_directory_of`].
///
/// # Errors
///
/// Fails when the file cannot be written. In that case, the previous file is unchanged.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let directory = directory_of(path);
    // `tempfile` creates the file with mode 0600.
    let mut file = tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempfile_in(directory)?;
    adopt_owner(file.as_file(), directory)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// The start of the names of files that [`replace`] has not finished writing.
const TEMPORARY_PREFIX: &str = ".keychoir-";

/// Syncs the directory that contains the file at `path`, so that a replaced file survives a loss of power.
///
/// # Errors
///
/// Fails when the directory cannot be opened or synced.
pub fn sync_directory_of(path: &Path) -> io::Result<()> {
    sync_directory(directory_of(path))
}

/// Returns the directory that contains the file at `path`.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

    use rustix::process::geteuid;

    use super::*;

    /// Returns a directory that belongs to another user if the tests run as root.
    fn foreign_directory() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        if geteuid().is_root() {
            chown(directory.path(), Some(12_345), Some(12_346)).unwrap();
        }
        directory
    }

    /// Asserts that the file at `path` has the owner of `directory` and the mode `mode`.
    #[track_caller]
    fn check_owner_and_mode(path: &Path, directory: &Path, mode: u32) {
        let (file, directory) = (path.metadata().unwrap(), directory.metadata().unwrap());
        let owner = (file.uid(), file.gid());
        assert_eq!(
            owner,
            (directory.uid(), directory.gid()),
            "{} must have the owner of its directory",
            path.display()
        );
        assert_eq!(file.permissions().mode() & 0o777, mode, "{} must have the given mode", path.display());
    }

    #[test]
    fn new_files_belong_to_the_owner_of_their_directory() {
        let directory = foreign_directory();
        let nested = directory.path().join("a/b");
        create_directory(&nested).unwrap();
        check_owner_and_mode(&directory.path().join("a"), directory.path(), 0o700);
        check_owner_and_mode(&nested, directory.path(), 0o700);
        let lock = nested.join("lock");
        open_or_create(&lock).unwrap();
        check_owner_and_mode(&lock, directory.path(), 0o600);
        let file = nested.join("file");
        for content in ["first", "second"] {
            replace(&file, content.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), content);
            check_owner_and_mode(&file, directory.path(), 0o600);
        }
        let file_count = fs::read_dir(&nested).unwrap().count();
        assert_eq!(file_count, 2, "no temporary file must remain");
    }

    #[test]
    fn a_linked_file_keeps_its_owner_and_content() {
        let (directory, other) = (foreign_directory(), tempfile::tempdir().unwrap());
        let target = other.path().join("target");
        fs::write(&target, "content").unwrap();
        let owner = target.metadata().unwrap().uid();
        let link = directory.path().join("link");
        symlink(&target, &link).unwrap();
        open_or_create(&link).unwrap();
        assert_eq!(target.metadata().unwrap().uid(), owner);
        assert_eq!(fs::read_to_string(&target).unwrap(), "content");
        let missing = other.path().join("missing");
        let dangling_link = directory.path().join("dangling");
        symlink(&missing, &dangling_link).unwrap();
        open_or_create(&dangling_link).unwrap();
        assert_eq!(missing.metadata().unwrap().uid(), owner);
    }

    #[test]
    fn a_failed_replacement_keeps_the_previous_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("content"), "").unwrap();
        assert!(replace(&path, b"new").is_err());
        assert!(path.join("content").exists());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
