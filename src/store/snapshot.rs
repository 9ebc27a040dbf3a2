//! Copies the database into another file while it is used: before a migration, for `keychoir db migrate --dry-run`, and
//! for `keychoir db backup`.
//!
//! `VACUUM INTO` reads in one transaction, so the copy is the state at one moment, and writers are not blocked. It
//! leaves out free pages, which may contain deleted data. The copy gets its name only when it is complete and on the
//! disk, so a file with that name is complete even after a crash. Also checks the free space for a copy, and the
//! integrity of a copy.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};
use tempfile::TempPath;

use super::open::is_corruption;
use super::origin::{self, Origin};
use super::schema;
use super::temporary::LockedTemporary;
use crate::clock;
use crate::platform::files;

/// The reason why a database cannot be copied. The database is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The database does not exist.
    #[error("there is no database at {}", .0.display())]
    NoFile(PathBuf),
    /// The file is not a database of Keychoir.
    #[error("{} is not a Keychoir database ({content})", .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// A clause about the kind of the file.
        content: &'static str,
    },
    /// A file exists at the path of the copy.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// The path of the copy is the database, or one of Keychoir's files next to it.
    #[error("{} belongs to the database itself: choose another path", .0.display())]
    Itself(PathBuf),
    /// The disk has too little space for the copy, or for the copy and the migration that follows it.
    #[error(
        "the disk of {} has {} MiB left, and {} MiB are needed",
        .path.display(),
        to_mebibytes(*.available),
        to_mebibytes(*.needed) + 1
    )]
    NoSpace {
        /// The path of the copy, or of the database on the same disk.
        path: PathBuf,
        /// The bytes that are needed.
        needed: u64,
        /// The free bytes on the disk.
        available: u64,
    },
    /// The file system reports an error when the database is read.
    #[error("{} cannot be read: {source}", .path.display())]
    NoAccess {
        /// The database.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// SQLite cannot read the database or its copy.
    #[error("{} cannot be read: {source}", .path.display())]
    Unreadable {
        /// The database or its copy.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// The copy cannot be created, written, flushed or renamed.
    #[error("{} cannot be written: {source}", .path.display())]
    Unwritable {
        /// The copy or its directory.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// The integrity check of the copy found an error, or SQLite reported corruption of the database.
    #[error("{} is corrupt: {report}", .path.display())]
    Corrupt {
        /// The database.
        path: PathBuf,
        /// The first error that SQLite reports.
        report: String,
    },
}

fn to_mebibytes(bytes: u64) -> u64 {
    bytes / (1024 * 1024)
}

/// A complete copy of the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backup {
    /// The size of the copy in bytes.
    pub bytes: u64,
    /// The schema version of the copy.
    pub version: usize,
    /// The number of attempts in the copy.
    pub attempts: u64,
    /// The duration of the copy and its check.
    pub duration: Duration,
}

/// The handling of an existing file at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExistingFile {
    /// The existing file is kept, and the copy fails.
    Keep,
    /// The copy replaces the existing file.
    Replace,
}

/// Maximum wait for a lock. Readers wait only for a startup that migrates the database.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Copies the database at `path` to `target` and checks the copy. Another process may be writing the database.
///
/// # Errors
///
/// Fails when the database cannot be read, or the copy cannot be written or is corrupt. A file at `target` is then
/// unchanged, unless only the flush of its directory failed.
pub fn back_up(path: &Path, target: &Path, existing: ExistingFile) -> Result<Backup, SnapshotError> {
    let started_at = clock::instant();
    let unreadable = |source| SnapshotError::Unreadable { path: path.to_owned(), source };
    if is_part_of(target, path) {
        return Err(SnapshotError::Itself(target.to_owned()));
    }
    if let (Ok(file), Ok(target_file)) = (fs::metadata(path), fs::metadata(target)) {
        if files::identity(&file) == files::identity(&target_file) {
            return Err(SnapshotError::Itself(target.to_owned()));
        }
        if existing == ExistingFile::Keep {
            return Err(SnapshotError::Exists(target.to_owned()));
        }
    }
    let connection = open_for_reading(path)?;
    check_space(target, database_size(&connection).map_err(unreadable)?)?;
    let partial = create_partial(target)?;
    copy(&connection, path, partial.path())?;
    let IntactCopy { version, attempts } = check_copy(partial.path(), path)?;
    publish(partial.path(), target, existing)?;
    let bytes = fs::metadata(target).map(|file| file.len()).unwrap_or_default();
    Ok(Backup { bytes, version, attempts, duration: clock::elapsed_since(started_at) })
}

/// Returns whether `target` is one of the files of Keychoir next to the database at `path`: a log, the shared-memory
/// file or the lock file of the database, the overlay of the configuration, the lock of the overlay, or the admin
/// token.
fn is_part_of(target: &Path, path: &Path) -> bool {
    // A missing target is in the resolved directory that would contain it.
    let resolve = |path: &Path| {
        let canonical_path = || Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?));
        path.canonicalize().ok().or_else(canonical_path).unwrap_or_else(|| path.to_owned())
    };
    let (target, path) = (resolve(target), resolve(path));
    let (Some(name), Some(database)) = (target.file_name(), path.file_name()) else { return false };
    let (name, database) = (name.as_encoded_bytes(), database.as_encoded_bytes());
    let companions: [&[u8]; 4] = [b"-wal", b"-shm", b"-journal", b".lock"];
    let is_companion = name.strip_prefix(database).is_some_and(|suffix| companions.contains(&suffix));
    let is_state = [b"managed.toml".as_slice(), b"managed.lock", b"admin_token"].contains(&name);
    target.parent() == path.parent() && (is_companion || is_state)
}

/// Opens a database of Keychoir of any version, without changing it.
pub(super) fn open_for_reading(path: &Path) -> Result<Connection, SnapshotError> {
    let unreadable = |source| SnapshotError::Unreadable { path: path.to_owned(), source };
    match fs::metadata(path) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(SnapshotError::NoFile(path.to_owned()));
        }
        Err(source) => return Err(SnapshotError::NoAccess { path: path.to_owned(), source }),
    }
    let foreign_file = |content| SnapshotError::Foreign { path: path.to_owned(), content };
    match origin::detect(path) {
        Ok(Origin::Ours) => {}
        Ok(Origin::OursNotADatabase) => return Err(foreign_file("it is not an SQLite file")),
        Ok(Origin::Foreign(content)) => return Err(foreign_file(content)),
        Err(source) => return Err(SnapshotError::NoAccess { path: path.to_owned(), source }),
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(unreadable)?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(unreadable)?;
    Ok(connection)
}

/// Creates an empty file with a random name in the directory of `target`.
pub(super) fn create_partial(target: &Path) -> Result<LockedTemporary<TempPath>, SnapshotError> {
    let directory = directory_of(target);
    let mut prefix = target.file_name().unwrap_or_default().to_owned();
    prefix.push(".partial-");
    LockedTemporary::create_file(directory, &prefix)
        .map_err(|source| SnapshotError::Unwritable { path: directory.to_owned(), source })
}

/// Copies the open database at `path` to the empty file `partial`. The copy is on the disk when the function returns.
pub(super) fn copy(connection: &Connection, path: &Path, partial: &Path) -> Result<(), SnapshotError> {
    let unwritable = |source| SnapshotError::Unwritable { path: partial.to_owned(), source };
    let absolute = std::path::absolute(partial).map_err(unwritable)?;
    let Some(name) = absolute.to_str() else {
        return Err(unwritable(io::Error::new(io::ErrorKind::InvalidInput, "the path is not UTF-8")));
    };
    connection.execute("VACUUM INTO ?1", [name]).map_err(|source| match source.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => unwritable(io::ErrorKind::StorageFull.into()),
        Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) => unwritable(io::Error::other(source)),
        Some(_) | None if is_corruption(&source) => {
            SnapshotError::Corrupt { path: path.to_owned(), report: source.to_string() }
        }
        Some(_) | None => SnapshotError::Unreadable { path: path.to_owned(), source },
    })?;
    File::open(partial).and_then(|file| file.sync_all()).map_err(unwritable)
}

/// Renames the complete copy `partial` to `target`. The new name is on the disk when the function returns.
pub(super) fn publish(partial: &Path, target: &Path, existing: ExistingFile) -> Result<(), SnapshotError> {
    let unwritable = |source| SnapshotError::Unwritable { path: target.to_owned(), source };
    match existing {
        // Unlike a rename, a hard link does not replace a file that another process has created.
        ExistingFile::Keep => match fs::hard_link(partial, target).and_then(|()| fs::remove_file(partial)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(SnapshotError::Exists(target.to_owned()));
            }
            // Some file systems do not support hard links.
            Err(_) => fs::rename(partial, target).map_err(unwritable)?,
        },
        ExistingFile::Replace => fs::rename(partial, target).map_err(unwritable)?,
    }
    File::open(directory_of(target)).and_then(|directory| directory.sync_all()).map_err(unwritable)
}

/// The schema version and the number of attempts of a copy that passed the integrity check.
pub(super) struct IntactCopy {
    version: usize,
    attempts: u64,
}

/// Checks the integrity of a whole copy of the database at `path`, and returns its version and number of attempts.
pub(super) fn check_copy(copy: &Path, path: &Path) -> Result<IntactCopy, SnapshotError> {
    let check_result =
        Connection::open_with_flags(copy, OpenFlags::SQLITE_OPEN_READ_ONLY).and_then(|connection| {
            let report: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
            Ok((report, schema::version(&connection)?, count_attempts(&connection)))
        });
    match check_result {
        Ok((report, version, attempts)) if report == "ok" => {
            Ok(IntactCopy { version, attempts: attempts.unwrap_or_default() })
        }
        Ok((report, ..)) => Err(SnapshotError::Corrupt { path: path.to_owned(), report }),
        Err(source) => Err(SnapshotError::Unreadable { path: copy.to_owned(), source }),
    }
}

/// Counts the attempts in a database of any version, including those that the migration has not moved to `attempts`
/// yet. Returns `None` if `attempts` is missing or cannot be read.
pub(super) fn count_attempts(connection: &Connection) -> Option<u64> {
    let count = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).ok();
    let moved = count("SELECT count(*) FROM attempts")?;
    // Before version 12, `attempts` is a view of these tables.
    let is_view = count("SELECT count(*) FROM sqlite_schema WHERE type = 'view' AND name = 'attempts'")? > 0;
    let not_moved = if is_view {
        0
    } else {
        count("SELECT count(*) FROM attempt_rows").unwrap_or(0)
            + count("SELECT coalesce(sum(attempts), 0) FROM attempt_sheets").unwrap_or(0)
    };
    u64::try_from(moved + not_moved).ok()
}

/// Returns the size of the database in bytes, including the pages that its write-ahead log adds.
pub(super) fn database_size(connection: &Connection) -> Result<u64, rusqlite::Error> {
    let read_number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0));
    let bytes = read_number("PRAGMA page_count")?.saturating_mul(read_number("PRAGMA page_size")?);
    Ok(u64::try_from(bytes).unwrap_or(0))
}

/// Checks that the disk of `target` has `needed` bytes left.
pub(super) fn check_space(target: &Path, needed: u64) -> Result<(), SnapshotError> {
    let available = free_space(target)
        .map_err(|source| SnapshotError::Unwritable { path: directory_of(target).to_owned(), source })?;
    if available < needed {
        return Err(SnapshotError::NoSpace { path: target.to_owned(), needed, available });
    }
    Ok(())
}

/// Returns the free bytes on the disk of `path` that a process without privileges can use.
pub(super) fn free_space(path: &Path) -> io::Result<u64> {
    Ok(files::disk_space(directory_of(path))?.free)
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
