//! Opening the books, whatever lies where they should be. Nothing is ever deleted.

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

/// Why there are no books.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder or the file cannot be made or written.
    #[error("{} cannot be written: {source}", .path.display())]
    Unwritable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// SQLite cannot use the file, though it is not broken.
    #[error("{} cannot be used: {source}", .path.display())]
    Unusable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
    /// Another version of the program wrote it.
    #[error("{} was written by a newer Keychoir (schema {found}, this one knows {})", .path.display(), schema::VERSION)]
    Newer {
        /// Which.
        path: PathBuf,
        /// Its schema.
        found: usize,
    },
    /// Another program has the file open.
    #[error("{} is in use by another Keychoir{}", .path.display(), process(*.pid))]
    InUse {
        /// The database.
        path: PathBuf,
        /// The process that has it, when the lock file names one.
        pid: Option<u32>,
    },
    /// The file was not made by Keychoir; it is left as it is.
    #[error("{} is not a Keychoir database ({found}); it is left as it is", .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        found: &'static str,
    },
    /// A broken file could not be renamed.
    #[error("{} is broken and cannot be set aside: {source}", .path.display())]
    CannotSetAside {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl OpenError {
    /// Whether it is a trouble of the disk that may pass, and no mistake in the configuration: then
    /// requests are served meanwhile.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unwritable { source, .. } | Self::CannotSetAside { source, .. } => matches!(
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

/// How closely a file is looked at before it is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IntegrityCheck {
    /// Not at all: the next write will tell.
    Trusting,
    /// Through all of it, unless it is so large that it would keep the start waiting.
    Quick,
    /// Through all of it: SQLite has found something wrong.
    Whole,
    /// It need not be looked at any more: it goes.
    Condemning,
}

/// Opened books.
#[derive(Debug)]
pub(super) struct OpenDatabase {
    pub(super) ledger: Database,
    /// Where the broken file went that lay there.
    pub(super) set_aside: Option<PathBuf>,
}

/// How long one connection waits for another's lock when it opens: a `sqlite3` shell may be
/// looking, or another Keychoir may be ending.
const OPEN_BUSY_MAX: Duration = Duration::from_secs(5);
/// Later the queue waits meanwhile, so not for long: what is not written is held and tried again.
const WRITE_BUSY_MAX: Duration = Duration::from_millis(500);
/// A file that is looked through in about a second. What is wrong with a larger one is found when it
/// is used.
const QUICK_LOOK_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// The log shrinks to this after a burst.
const LOG_BYTES_KEPT: i64 = 16 * 1024 * 1024;

pub(super) fn open(
    place: &DatabaseLocation,
    now: UnixMs,
    look: IntegrityCheck,
) -> Result<OpenDatabase, OpenError> {
    let path = match place {
        DatabaseLocation::File(path) => path,
        DatabaseLocation::Memory => {
            let unusable = |source| OpenError::Unusable { path: PathBuf::from(":memory:"), source };
            let mut connection = Connection::open_in_memory().map_err(unusable)?;
            connection.pragma_update(None, "auto_vacuum", "INCREMENTAL").map_err(unusable)?;
            schema::migrate(&mut connection).map_err(unusable)?;
            return Ok(OpenDatabase { ledger: Database::in_memory(connection), set_aside: None });
        }
    };
    let unwritable = |source| OpenError::Unwritable { path: path.clone(), source };
    let unusable = |source| OpenError::Unusable { path: path.clone(), source };
    // Looked at before SQLite does: it would change the file of another program, and throw the log of a
    // file away that it does not know.
    let is_database = match origin::of(path).map_err(unwritable)? {
        Origin::Ours => true,
        Origin::OursNoDatabase => false,
        Origin::Foreign(found) => return Err(OpenError::Foreign { path: path.clone(), found }),
    };
    make_private(path).map_err(unwritable)?;
    if is_database && look != IntegrityCheck::Condemning {
        match prepared(path, look) {
            Ok(connection) => return checked(connection, path, None),
            Err(error) if is_broken(&error) => {}
            Err(source) => return Err(unusable(source)),
        }
    }
    let aside =
        set_aside(path, now).map_err(|source| OpenError::CannotSetAside { path: path.clone(), source })?;
    make_private(path).map_err(unwritable)?;
    checked(prepared(path, IntegrityCheck::Trusting).map_err(unusable)?, path, Some(aside))
}

/// Whether a start could open the books: they could be written, and no newer version has written them.
/// Nothing is made or changed. What is broken is no obstacle, because a start puts it aside.
///
/// # Errors
///
/// What a start would end with.
pub fn examine(place: &DatabaseLocation) -> Result<(), OpenError> {
    let path = match place {
        DatabaseLocation::File(path) => path,
        DatabaseLocation::Memory => return Ok(()),
    };
    let unwritable = |source| OpenError::Unwritable { path: path.clone(), source };
    let is_there = match OpenOptions::new().append(true).open(path) {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(unwritable(error)),
    };
    // The first folder that is there: those below it would be made.
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
        Origin::Foreign(found) => return Err(OpenError::Foreign { path: path.clone(), found }),
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    match Connection::open_with_flags(path, flags).and_then(|connection| schema::version(&connection)) {
        Ok(found) if found > schema::VERSION => Err(OpenError::Newer { path: path.clone(), found }),
        Ok(_) => Ok(()),
        Err(error) if is_broken(&error) => Ok(()),
        Err(source) => Err(OpenError::Unusable { path: path.clone(), source }),
    }
}

/// The file that SQLite keeps beside another.
pub(super) fn companion(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Makes the folder (0700) and the file (0600) where there are none, and proves that both can be
/// written.
pub(super) fn make_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).map(drop)
}

/// A connection that is set up, to a file that was looked at.
fn prepared(path: &Path, look: IntegrityCheck) -> Result<Connection, rusqlite::Error> {
    let connection = Connection::open(path)?;
    // A file that turns out to be broken keeps its log: closing it must not fold one into the other.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.busy_timeout(OPEN_BUSY_MAX)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // With NORMAL a power cut loses what was committed since the last checkpoint, and before the
    // first one the whole file.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "journal_size_limit", LOG_BYTES_KEPT)?;
    let is_looked_through = match look {
        IntegrityCheck::Trusting | IntegrityCheck::Condemning => false,
        IntegrityCheck::Quick => fs::metadata(path).is_ok_and(|file| file.len() <= QUICK_LOOK_BYTES_MAX),
        IntegrityCheck::Whole => true,
    };
    if is_looked_through {
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
    set_aside: Option<PathBuf>,
) -> Result<OpenDatabase, OpenError> {
    let unusable = |source| OpenError::Unusable { path: path.to_owned(), source };
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false).map_err(unusable)?;
    let found = schema::version(&connection).map_err(unusable)?;
    if found > schema::VERSION {
        return Err(OpenError::Newer { path: path.to_owned(), found });
    }
    schema::sign(&connection).map_err(unusable)?;
    update(&mut connection, found).map_err(unusable)?;
    connection.busy_timeout(WRITE_BUSY_MAX).map_err(unusable)?;
    let ledger = Database::of_file(connection, path)
        .map_err(|source| OpenError::Unwritable { path: path.to_owned(), source })?;
    Ok(OpenDatabase { ledger, set_aside })
}

/// Brings a file that `found` is the schema of up to date. What it held before, above all plain digests
/// of keys, leaves its pages, its free pages and its log.
fn update(connection: &mut Connection, found: usize) -> Result<(), rusqlite::Error> {
    if found < schema::VERSION {
        // What is replaced is overwritten, and no temporary file holds it.
        connection.execute_batch("PRAGMA secure_delete = ON; PRAGMA temp_store = MEMORY")?;
        schema::migrate(connection)?;
        connection.execute_batch("PRAGMA secure_delete = OFF; PRAGMA temp_store = DEFAULT")?;
    }
    let is_wipe_due = names::is_wipe_due(connection)?;
    if found >= schema::VERSION && !is_wipe_due {
        return Ok(());
    }
    // A file that can shrink in steps has another form; should there be no room to rewrite an older
    // one, it stays as it is.
    let is_rewritten = (is_wipe_due || !shrinks(connection)?)
        && connection.execute_batch("PRAGMA auto_vacuum = INCREMENTAL; VACUUM").is_ok();
    // A reader that is at it keeps the log from being emptied.
    let is_blocked: bool = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
    if is_wipe_due && is_rewritten && !is_blocked {
        names::wiped(connection)?;
    } else if is_wipe_due {
        tracing::warn!(
            event = "old_digests_not_wiped",
            "The database could not be rewritten after its migration, so deleted digests of keys may still be in \
             unused parts of it; the next start tries again"
        );
    }
    Ok(())
}

/// Whether the file gives back what it no longer needs.
fn shrinks(connection: &Connection) -> Result<bool, rusqlite::Error> {
    let mode: i64 = connection.query_row("PRAGMA auto_vacuum", [], |row| row.get(0))?;
    Ok(mode == 2)
}

/// Whether the file is broken, and not merely out of reach.
pub(super) fn is_broken(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// Renames the file and what belongs to it; the new name carries the moment.
fn set_aside(path: &Path, now: UnixMs) -> io::Result<PathBuf> {
    let mut aside = companion(path, &format!(".broken-{}", now.0));
    // Two in one moment: neither takes the other's place.
    let mut again = 0;
    while aside.exists() {
        again += 1;
        aside = companion(path, &format!(".broken-{}-{again}", now.0));
    }
    for suffix in ["-wal", "-shm"] {
        if companion(path, suffix).exists() {
            fs::rename(companion(path, suffix), companion(&aside, suffix))?;
        }
    }
    fs::rename(path, &aside)?;
    Ok(aside)
}
