//! Opens the usage database. A corrupt file is renamed and replaced by an empty one; a file of another
//! program or of a newer version is refused. No file is ever deleted.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use rustix::fs::{Access, access};

use super::database::Database;
use super::origin::{self, Origin};
use super::{DatabaseLocation, names, schema};
use crate::policy::units::UnixMs;

/// The reason that the database cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder or the file cannot be created or written.
    #[error("{} cannot be written: {source}", .path.display())]
    Unwritable {
        /// The folder or file.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// SQLite cannot use the file, though the file is not corrupt.
    #[error("{} cannot be used: {source}", .path.display())]
    Unusable {
        /// The database file.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// A newer version of Keychoir wrote the file.
    #[error("{} was written by a newer Keychoir (schema {version}, this one knows {})", .path.display(), schema::VERSION)]
    Newer {
        /// The database file.
        path: PathBuf,
        /// The schema version in the file.
        version: usize,
    },
    /// Another process has the database open.
    #[error("{} is in use by another Keychoir{}", .path.display(), process(*.pid))]
    InUse {
        /// The database.
        path: PathBuf,
        /// The id of that process, if the lock file names one.
        pid: Option<u32>,
    },
    /// The file was not made by Keychoir; it is left unchanged.
    #[error("{} is not a Keychoir database ({content}); it is left as it is", .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The kind of file it is instead.
        content: &'static str,
    },
    /// A corrupt file could not be renamed.
    #[error("{} is broken and cannot be quarantined: {source}", .path.display())]
    CannotQuarantine {
        /// The corrupt file.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
}

impl OpenError {
    /// Whether the cause is a disk failure that may be temporary, not a mistake in the configuration. Until
    /// it ends, requests are served without a database.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unwritable { source, .. } | Self::CannotQuarantine { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::ReadOnlyFilesystem
            ),
            Self::Unusable { source, .. } => match source.sqlite_error_code() {
                Some(
                    ErrorCode::DiskFull
                    | ErrorCode::SystemIoFailure
                    | ErrorCode::DatabaseBusy
                    | ErrorCode::DatabaseLocked,
                ) => true,
                Some(_) | None => false,
            },
            Self::Newer { .. } | Self::InUse { .. } | Self::Foreign { .. } => false,
        }
    }
}

fn process(pid: Option<u32>) -> String {
    pid.map(|pid| format!(", process {pid}")).unwrap_or_default()
}

/// The check of a file for corruption before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IntegrityCheck {
    /// No check: the next write reports corruption.
    Skip,
    /// The whole file, unless it is so large that the check would delay the start.
    Quick,
    /// The whole file: SQLite has reported corruption.
    Full,
    /// No check: the file is quarantined in any case.
    Quarantine,
}

/// An opened database.
#[derive(Debug)]
pub(super) struct OpenDatabase {
    pub(super) database: Database,
    /// The new path of a corrupt file that was renamed.
    pub(super) quarantined: Option<PathBuf>,
}

/// Maximum wait for another connection's lock while the database opens: a `sqlite3` shell may be
/// reading, or another Keychoir may be stopping.
const OPEN_BUSY_MAX: Duration = Duration::from_secs(5);
/// Maximum wait for the lock in later writes. It is short, because the queue fills meanwhile; records that
/// are not written are kept and retried.
const WRITE_BUSY_MAX: Duration = Duration::from_millis(500);
/// The largest file that is checked at the start; the check takes about a second. Corruption of a larger file
/// is found when it is used.
const QUICK_CHECK_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// SQLite truncates the write-ahead log to this size after a burst.
const LOG_BYTES_KEPT: i64 = 16 * 1024 * 1024;

pub(super) fn open(
    location: &DatabaseLocation,
    now: UnixMs,
    check: IntegrityCheck,
) -> Result<OpenDatabase, OpenError> {
    let path = match location {
        DatabaseLocation::File(path) => path,
        DatabaseLocation::Memory => {
            let unusable = |source| OpenError::Unusable { path: PathBuf::from(":memory:"), source };
            let mut connection = Connection::open_in_memory().map_err(unusable)?;
            connection.pragma_update(None, "auto_vacuum", "INCREMENTAL").map_err(unusable)?;
            schema::migrate(&mut connection).map_err(unusable)?;
            return Ok(OpenDatabase { database: Database::in_memory(connection), quarantined: None });
        }
    };
    let unwritable = |source| OpenError::Unwritable { path: path.clone(), source };
    let unusable = |source| OpenError::Unusable { path: path.clone(), source };
    // The origin is checked before SQLite opens the file: SQLite would change the file of another
    // program, and would discard a write-ahead log that it does not know.
    let is_database = match origin::of(path).map_err(unwritable)? {
        Origin::Ours => true,
        Origin::OursNoDatabase => false,
        Origin::Foreign(content) => return Err(OpenError::Foreign { path: path.clone(), content }),
    };
    make_private(path).map_err(unwritable)?;
    if is_database && check != IntegrityCheck::Quarantine {
        match prepared(path, check) {
            Ok(connection) => return checked(connection, path, None),
            Err(error) if is_broken(&error) => {}
            Err(source) => return Err(unusable(source)),
        }
    }
    let quarantined =
        quarantine(path, now).map_err(|source| OpenError::CannotQuarantine { path: path.clone(), source })?;
    make_private(path).map_err(unwritable)?;
    checked(prepared(path, IntegrityCheck::Skip).map_err(unusable)?, path, Some(quarantined))
}

/// Checks whether a start could open the database: it is writable, and no newer version has written it.
/// Creates and changes nothing. A corrupt file is no error, because a start quarantines it.
///
/// # Errors
///
/// The error that a start would end with.
pub fn examine(location: &DatabaseLocation) -> Result<(), OpenError> {
    let path = match location {
        DatabaseLocation::File(path) => path,
        DatabaseLocation::Memory => return Ok(()),
    };
    let unwritable = |source| OpenError::Unwritable { path: path.clone(), source };
    let is_there = match OpenOptions::new().append(true).open(path) {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(unwritable(error)),
    };
    // The first folder that exists: a start would create the folders below it.
    let mut folders = path.ancestors().skip(1).map(|folder| match folder.as_os_str().is_empty() {
        true => Path::new("."),
        false => folder,
    });
    let folder = folders.find(|folder| fs::symlink_metadata(folder).is_ok()).unwrap_or(Path::new("."));
    if !fs::metadata(folder).map_err(unwritable)?.is_dir() {
        return Err(unwritable(io::ErrorKind::NotADirectory.into()));
    }
    access(folder, Access::WRITE_OK | Access::EXEC_OK).map_err(|error| unwritable(error.into()))?;
    if !is_there {
        return Ok(());
    }
    match origin::of(path).map_err(unwritable)? {
        Origin::Ours => {}
        Origin::OursNoDatabase => return Ok(()),
        Origin::Foreign(content) => return Err(OpenError::Foreign { path: path.clone(), content }),
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    match Connection::open_with_flags(path, flags).and_then(|connection| schema::version(&connection)) {
        Ok(version) if version > schema::VERSION => Err(OpenError::Newer { path: path.clone(), version }),
        Ok(_) => Ok(()),
        Err(error) if is_broken(&error) => Ok(()),
        Err(source) => Err(OpenError::Unusable { path: path.clone(), source }),
    }
}

/// The path of one of SQLite's files beside the database.
pub(super) fn companion(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Creates the folder (0700) and the file (0600) if they are missing, and checks that both are writable.
pub(super) fn make_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).map(drop)
}

/// Opens and configures a connection to a file whose origin was checked.
fn prepared(path: &Path, check: IntegrityCheck) -> Result<Connection, rusqlite::Error> {
    let connection = Connection::open(path)?;
    // A file that turns out to be corrupt keeps its write-ahead log: closing it must not merge the
    // two.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.busy_timeout(OPEN_BUSY_MAX)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // With `NORMAL` a power cut loses everything committed since the last checkpoint, and before
    // the first checkpoint the whole file.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "journal_size_limit", LOG_BYTES_KEPT)?;
    let is_checked = match check {
        IntegrityCheck::Skip | IntegrityCheck::Quarantine => false,
        IntegrityCheck::Quick => fs::metadata(path).is_ok_and(|file| file.len() <= QUICK_CHECK_BYTES_MAX),
        IntegrityCheck::Full => true,
    };
    if is_checked {
        let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if verdict != "ok" {
            let broken = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
            return Err(rusqlite::Error::SqliteFailure(broken, Some(verdict)));
        }
    }
    Ok(connection)
}

fn checked(
    mut connection: Connection,
    path: &Path,
    quarantined: Option<PathBuf>,
) -> Result<OpenDatabase, OpenError> {
    let unusable = |source| OpenError::Unusable { path: path.to_owned(), source };
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false).map_err(unusable)?;
    let version = schema::version(&connection).map_err(unusable)?;
    if version > schema::VERSION {
        return Err(OpenError::Newer { path: path.to_owned(), version });
    }
    schema::sign(&connection).map_err(unusable)?;
    update(&mut connection, version).map_err(unusable)?;
    connection.busy_timeout(WRITE_BUSY_MAX).map_err(unusable)?;
    let database = Database::of_file(connection, path)
        .map_err(|source| OpenError::Unwritable { path: path.to_owned(), source })?;
    Ok(OpenDatabase { database, quarantined })
}

/// Migrates a file of schema version `version` to the current one. Data of the old schema, above all
/// plain digests of keys, is record_wipe from the pages, the free pages and the write-ahead log.
fn update(connection: &mut Connection, version: usize) -> Result<(), rusqlite::Error> {
    if version < schema::VERSION {
        // Replaced data is overwritten, and is written to no temporary file.
        connection.execute_batch("PRAGMA secure_delete = ON; PRAGMA temp_store = MEMORY")?;
        schema::migrate(connection)?;
        connection.execute_batch("PRAGMA secure_delete = OFF; PRAGMA temp_store = DEFAULT")?;
    }
    let is_wipe_due = names::is_wipe_due(connection)?;
    if version >= schema::VERSION && !is_wipe_due {
        return Ok(());
    }
    // Incremental vacuum needs another file format; if the disk has no space to rewrite an older
    // file, the file stays as it is.
    let is_rewritten = (is_wipe_due || !shrinks(connection)?)
        && connection.execute_batch("PRAGMA auto_vacuum = INCREMENTAL; VACUUM").is_ok();
    // An open reader keeps SQLite from truncating the log.
    let is_blocked: bool = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
    if is_wipe_due && is_rewritten && !is_blocked {
        names::record_wipe(connection)?;
    } else if is_wipe_due {
        tracing::warn!(
            event = "old_digests_not_wiped",
            "The database could not be rewritten after its migration, so deleted digests of keys may still be in \
             unused parts of it; the next start tries again"
        );
    }
    Ok(())
}

/// Whether the file returns free pages to the file system.
fn shrinks(connection: &Connection) -> Result<bool, rusqlite::Error> {
    let mode: i64 = connection.query_row("PRAGMA auto_vacuum", [], |row| row.get(0))?;
    Ok(mode == 2)
}

/// Whether the error means that the file is corrupt, not that it is inaccessible.
pub(super) fn is_broken(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// Renames the file and its companions; the new name contains the current time.
fn quarantine(path: &Path, now: UnixMs) -> io::Result<PathBuf> {
    let mut quarantined = companion(path, &format!(".broken-{}", now.0));
    // Two files quarantined in the same millisecond must not overwrite each other.
    let mut again = 0;
    while quarantined.exists() {
        again += 1;
        quarantined = companion(path, &format!(".broken-{}-{again}", now.0));
    }
    for suffix in ["-wal", "-shm"] {
        if companion(path, suffix).exists() {
            fs::rename(companion(path, suffix), companion(&quarantined, suffix))?;
        }
    }
    fs::rename(path, &quarantined)?;
    Ok(quarantined)
}
