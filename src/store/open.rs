//! Opens the database file, or a database in memory: creates it with private permissions, checks its origin and
//! integrity, and migrates it. A corrupt file is renamed, and an empty file is created. A file of another program or of
//! a newer version is refused. No database is deleted, except for the old copies that `upgrade` removes.
//! [`check_location`] makes the same checks without a change, for `keychoir check` and `keychoir doctor`.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::database::Database;
use super::lock::{self, DatabaseLockError};
use super::origin::{self, Origin};
use super::snapshot::SnapshotError;
use super::{DatabaseLocation, key_names, owners, read, refusals, schema, upgrade};
use crate::platform::files;
use crate::policy::units::UnixMs;
use crate::private_file;

/// The reason why the database cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory, the file or its lock file cannot be created, read, locked or written.
    #[error("{} cannot be written: {source}", .path.display())]
    Unwritable {
        /// The directory or file.
        path: PathBuf,
        /// The I/O error.
        source: io::Error,
    },
    /// SQLite cannot use the file, although it is not corrupt.
    #[error("{} cannot be used: {source}", .path.display())]
    Unusable {
        /// The database file.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// A newer version of Keychoir wrote the file.
    #[error(
        "{} was written by a newer Keychoir (schema {version}, this one supports {})",
        .path.display(),
        schema::VERSION
    )]
    Newer {
        /// The database file.
        path: PathBuf,
        /// The schema version in the file.
        version: usize,
    },
    /// Another process has the database open.
    #[error("{} is in use by another Keychoir{}", .path.display(), process_suffix(*.pid))]
    InUse {
        /// The database.
        path: PathBuf,
        /// The id of that process, if it is in the lock file.
        pid: Option<u32>,
    },
    /// Another program created the file, which stays unchanged.
    #[error("{} is not a Keychoir database ({content}); it stays unchanged", .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// A clause about the kind of the file.
        content: &'static str,
    },
    /// The database is of an earlier version, and it cannot be copied before its upgrade. The database is unchanged.
    #[error(
        "the upgrade of {} needs a copy of it: {source}. Nothing was changed; free space on this disk, or move the \
         database to another one (storage.path)",
        .path.display()
    )]
    CannotCopy {
        /// The database.
        path: PathBuf,
        /// The reason why it cannot be copied.
        source: SnapshotError,
    },
    /// A corrupt file could not be renamed.
    #[error("{} is corrupt and cannot be renamed: {source}", .path.display())]
    CannotQuarantine {
        /// The corrupt file.
        path: PathBuf,
        /// The I/O error.
        source: io::Error,
    },
}

impl OpenError {
    /// Returns whether the cause may end without a change of the configuration, such as a full disk or the lock of
    /// another connection. Until then, requests are served without a database.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Unwritable { source, .. } | Self::CannotQuarantine { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::ReadOnlyFilesystem
            ),
            Self::Unusable { source, .. } => matches!(
                source.sqlite_error_code(),
                Some(
                    ErrorCode::DiskFull
                        | ErrorCode::SystemIoFailure
                        | ErrorCode::DatabaseBusy
                        | ErrorCode::DatabaseLocked
                )
            ),
            Self::Newer { .. } | Self::InUse { .. } | Self::Foreign { .. } | Self::CannotCopy { .. } => false,
        }
    }
}

fn process_suffix(pid: Option<u32>) -> String {
    pid.map(|pid| format!(", process {pid}")).unwrap_or_default()
}

/// The check for corruption before a file is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IntegrityCheck {
    /// The file is not checked: SQLite reports corruption when it reads or writes a corrupt page.
    Skip,
    /// The whole file is checked, unless it is so large that the check would delay startup.
    Quick,
    /// The whole file is checked: after SQLite has reported corruption, and before `keychoir db migrate` migrates it.
    Full,
    /// The file is renamed without a check, because SQLite has reported corruption after a full check.
    Quarantine,
}

/// A database that is open for writing, with the results of its startup checks.
#[derive(Debug)]
pub(super) struct OpenDatabase {
    pub(super) database: Database,
    /// The new path of a corrupt file that was renamed, or `None` if no file was renamed.
    pub(super) quarantined_path: Option<PathBuf>,
}

/// Maximum wait for another connection's lock while the database opens: a `sqlite3` shell may be reading, or
/// another Keychoir may be stopping.
const OPEN_BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum wait for another connection's lock in later writes. It is short because the queue fills during the wait.
/// Records that are not written are kept and retried.
const WRITE_BUSY_TIMEOUT: Duration = Duration::from_millis(500);
/// Maximum size of a file that is checked at startup. The check of such a file takes about a second. Corruption of a
/// larger file is detected when SQLite reads the corrupt page.
const MAX_QUICK_CHECK_BYTES: u64 = 256 * 1024 * 1024;
/// Maximum size of the write-ahead log between transactions: SQLite truncates a larger log to this size.
const MAX_KEPT_LOG_BYTES: i64 = 16 * 1024 * 1024;

/// Opens or creates the database and migrates it. A corrupt file is renamed, and a new file is created.
pub(super) fn open(
    location: &DatabaseLocation,
    now: UnixMs,
    check: IntegrityCheck,
) -> Result<OpenDatabase, OpenError> {
    let path = match location {
        DatabaseLocation::File(path) => path,
        DatabaseLocation::Memory => {
            let database = open_in_memory()
                .map_err(|source| OpenError::Unusable { path: PathBuf::from(":memory:"), source })?;
            return Ok(OpenDatabase { database, quarantined_path: None });
        }
    };
    let unwritable = |source| OpenError::Unwritable { path: path.clone(), source };
    let unusable = |source| OpenError::Unusable { path: path.clone(), source };
    // The origin is checked before SQLite opens the file: SQLite would change the file of another program,
    // and would discard the write-ahead log of another program.
    let is_database = match origin::detect(path).map_err(unwritable)? {
        Origin::Ours => true,
        Origin::OursNotADatabase => false,
        Origin::Foreign(content) => return Err(OpenError::Foreign { path: path.clone(), content }),
    };
    create_private_file(path).map_err(unwritable)?;
    if is_database && check != IntegrityCheck::Quarantine {
        match connect(path, check) {
            Ok(connection) => return migrate(connection, path, None),
            Err(error) if is_corruption(&error) => {}
            Err(source) => return Err(unusable(source)),
        }
    }
    let quarantined_path = quarantine_file(path, now)
        .map_err(|source| OpenError::CannotQuarantine { path: path.clone(), source })?;
    create_private_file(path).map_err(unwritable)?;
    migrate(connect(path, IntegrityCheck::Skip).map_err(unusable)?, path, Some(quarantined_path))
}

fn open_in_memory() -> Result<Database, rusqlite::Error> {
    let mut connection = Connection::open_in_memory()?;
    connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    schema::migrate(&mut connection)?;
    Ok(Database::in_memory(connection))
}

/// Checks whether startup could open the database. The file must be writable, and no other process may use it.
/// Keychoir, but no newer version, must have written it. Its records must be readable, and the disk must have space for
/// an upgrade. Creates and changes nothing. A corrupt file is not an error, because startup replaces it.
///
/// # Errors
///
/// Returns the error that startup would report.
pub fn check_location(location: &DatabaseLocation) -> Result<(), OpenError> {
    let path = match location {
        DatabaseLocation::File(path) => path,
        DatabaseLocation::Memory => return Ok(()),
    };
    let unwritable = |source| OpenError::Unwritable { path: path.clone(), source };
    let file_exists = match OpenOptions::new().append(true).open(path) {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(unwritable(error)),
    };
    check_directory(path).map_err(unwritable)?;
    if file_exists { check_existing_file(path) } else { Ok(()) }
}

/// Checks that startup could create a file at `path` and the missing directories above it.
fn check_directory(path: &Path) -> io::Result<()> {
    // Startup would create the directories below the innermost directory that exists.
    let mut directories = path.ancestors().skip(1).map(|directory| match directory.as_os_str().is_empty() {
        true => Path::new("."),
        false => directory,
    });
    let directory =
        directories.find(|directory| fs::symlink_metadata(directory).is_ok()).unwrap_or(Path::new("."));
    if !fs::metadata(directory)?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    files::check_writable(directory)
}

/// Checks that startup could open, and if necessary upgrade, the existing file at `path`.
fn check_existing_file(path: &Path) -> Result<(), OpenError> {
    let unwritable = |source| OpenError::Unwritable { path: path.to_owned(), source };
    let origin = origin::detect(path).map_err(unwritable)?;
    if let Origin::Foreign(content) = origin {
        return Err(OpenError::Foreign { path: path.to_owned(), content });
    }
    lock::check_unlocked(path).map_err(|error| match error {
        DatabaseLockError::Held(pid) => OpenError::InUse { path: path.to_owned(), pid },
        DatabaseLockError::System(source) => unwritable(source),
    })?;
    if origin == Origin::OursNotADatabase {
        return Ok(());
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let open_result = Connection::open_with_flags(path, flags).and_then(|connection| {
        let version = schema::version(&connection)?;
        if version == schema::VERSION {
            try_reads(&connection)?;
        }
        Ok((connection, version))
    });
    match open_result {
        Ok((_, version)) if version > schema::VERSION => {
            Err(OpenError::Newer { path: path.to_owned(), version })
        }
        Ok((connection, 1..schema::VERSION)) => upgrade::check_space(&connection, path),
        Ok(_) => Ok(()),
        Err(error) if is_corruption(&error) => Ok(()),
        Err(source) => Err(OpenError::Unusable { path: path.to_owned(), source }),
    }
}

/// Runs the queries of startup, so that an error of SQLite is detected before startup.
fn try_reads(connection: &Connection) -> Result<(), rusqlite::Error> {
    read::keys(connection)?;
    refusals::read(connection)?;
    owners::read(connection)?;
    read::client_usage(connection, UnixMs(0)).map(drop)
}

/// Returns the path of a file next to the database, such as `-wal`: the path of the database with a suffix.
pub(super) fn companion(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Creates the directory and the file if they are missing, and checks that the file can be written.
pub(super) fn create_private_file(path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        private_file::create_directory(directory)?;
    }
    private_file::open_or_create(path).map(drop)
}

/// Opens and configures a connection to a file whose origin was checked.
pub(super) fn connect(path: &Path, check: IntegrityCheck) -> Result<Connection, rusqlite::Error> {
    let connection = Connection::open(path)?;
    // If the file proves to be corrupt, closing the connection must not merge its write-ahead log into it.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.busy_timeout(OPEN_BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // With `NORMAL`, a power cut loses everything committed after the last checkpoint, and before the first
    // checkpoint the whole file.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "journal_size_limit", MAX_KEPT_LOG_BYTES)?;
    let is_checked = match check {
        IntegrityCheck::Skip | IntegrityCheck::Quarantine => false,
        IntegrityCheck::Quick => fs::metadata(path).is_ok_and(|file| file.len() <= MAX_QUICK_CHECK_BYTES),
        IntegrityCheck::Full => true,
    };
    if is_checked {
        let report: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if report != "ok" {
            let corrupt = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
            return Err(rusqlite::Error::SqliteFailure(corrupt, Some(report)));
        }
    }
    Ok(connection)
}

/// Migrates the file of an open connection, unless a newer version has written it.
pub(super) fn migrate(
    mut connection: Connection,
    path: &Path,
    quarantined_path: Option<PathBuf>,
) -> Result<OpenDatabase, OpenError> {
    let unusable = |source| OpenError::Unusable { path: path.to_owned(), source };
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false).map_err(unusable)?;
    let version = schema::version(&connection).map_err(unusable)?;
    if version > schema::VERSION {
        return Err(OpenError::Newer { path: path.to_owned(), version });
    }
    upgrade::upgrade(&mut connection, path, version, |connection, version| {
        schema::write_application_id(connection)?;
        migrate_schema(connection, version)
    })?;
    connection.busy_timeout(WRITE_BUSY_TIMEOUT).map_err(unusable)?;
    let database = Database::in_file(connection, path)
        .map_err(|source| OpenError::Unwritable { path: path.to_owned(), source })?;
    Ok(OpenDatabase { database, quarantined_path })
}

/// Migrates a file of schema version `version` to the current one. Data of the old schema, above all plain
/// digests of keys, is overwritten in the pages, the free pages and the write-ahead log.
pub(super) fn migrate_schema(connection: &mut Connection, version: usize) -> Result<(), rusqlite::Error> {
    if version < schema::VERSION {
        // Deleted data is overwritten, and temporary data is not written to a file.
        connection.execute_batch("PRAGMA secure_delete = ON; PRAGMA temp_store = MEMORY")?;
        schema::migrate(connection)?;
        connection.execute_batch("PRAGMA secure_delete = OFF; PRAGMA temp_store = DEFAULT")?;
    }
    let is_wipe_due = key_names::is_wipe_due(connection)?;
    if version >= schema::VERSION && !is_wipe_due {
        return Ok(());
    }
    // Incremental vacuum needs another file format. If the disk has no space to rewrite an older file, the
    // file keeps its format.
    let is_rewritten = (is_wipe_due || !has_incremental_vacuum(connection)?)
        && connection.execute_batch("PRAGMA auto_vacuum = INCREMENTAL; VACUUM").is_ok();
    // SQLite cannot truncate the log while another connection reads it.
    let is_blocked: bool = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
    if is_wipe_due && is_rewritten && !is_blocked {
        key_names::record_wipe(connection)?;
    } else if is_wipe_due {
        tracing::warn!(
            event = "old_digests_not_wiped",
            "The database could not be rewritten after its migration, so its unused pages may still contain deleted \
             digests of keys; the next start tries again"
        );
    }
    Ok(())
}

/// Returns whether free pages of the file can be returned to the file system.
fn has_incremental_vacuum(connection: &Connection) -> Result<bool, rusqlite::Error> {
    let mode: i64 = connection.query_row("PRAGMA auto_vacuum", [], |row| row.get(0))?;
    Ok(mode == 2)
}

/// Returns whether the error means that the file is corrupt or not a database, and not that it is inaccessible.
pub(super) fn is_corruption(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// Renames the file, its write-ahead log and its shared-memory file. The new name contains the time `now`.
fn quarantine_file(path: &Path, now: UnixMs) -> io::Result<PathBuf> {
    let mut new_path = companion(path, &format!(".broken-{}", now.0));
    // Two files that are renamed in the same millisecond must not overwrite each other.
    let mut number = 0;
    while new_path.exists() {
        number += 1;
        new_path = companion(path, &format!(".broken-{}-{number}", now.0));
    }
    for suffix in ["-wal", "-shm"] {
        if companion(path, suffix).exists() {
            fs::rename(companion(path, suffix), companion(&new_path, suffix))?;
        }
    }
    fs::rename(path, &new_path)?;
    Ok(new_path)
}
