//! Opening the books, whatever lies where they should be. Nothing is ever deleted.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode};

use super::{Place, Store, schema};
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
    /// A broken file could not be renamed.
    #[error("{} is broken and cannot be set aside: {source}", .path.display())]
    CannotSetAside {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// How long one connection waits for another's lock: a `sqlite3` shell may be looking.
const BUSY_MAX: Duration = Duration::from_secs(5);

pub(super) fn open(place: &Place, now: UnixMs) -> Result<Store, OpenError> {
    let path = match place {
        Place::File(path) => path,
        Place::Memory => {
            let unusable = |source| OpenError::Unusable { path: PathBuf::from(":memory:"), source };
            let mut connection = Connection::open_in_memory().map_err(unusable)?;
            schema::migrate(&mut connection).map_err(unusable)?;
            return Ok(Store { connection, set_aside: None });
        }
    };
    let unwritable = |source| OpenError::Unwritable { path: path.clone(), source };
    let unusable = |source| OpenError::Unusable { path: path.clone(), source };
    // Looked at before SQLite does: it would throw the log of a file away that it does not know.
    let is_foreign = is_no_database(path).map_err(unwritable)?;
    make_private(path).map_err(unwritable)?;
    if !is_foreign {
        match prepared(path) {
            Ok(connection) => return checked(connection, path, None),
            Err(error) if is_broken(&error) => {}
            Err(source) => return Err(unusable(source)),
        }
    }
    let aside =
        set_aside(path, now).map_err(|source| OpenError::CannotSetAside { path: path.clone(), source })?;
    make_private(path).map_err(unwritable)?;
    checked(prepared(path).map_err(unusable)?, path, Some(aside))
}

/// What every SQLite file begins with.
const MAGIC: &[u8] = b"SQLite format 3\0";

/// Whether the file has something in it and is no SQLite file, or is empty beside a log that is
/// not.
fn is_no_database(path: &Path) -> io::Result<bool> {
    let mut start = Vec::new();
    match fs::File::open(path) {
        Ok(file) => file.take(MAGIC.len() as u64).read_to_end(&mut start)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let has_log = fs::metadata(companion(path, "-wal")).is_ok_and(|log| log.len() > 0);
    Ok(if start.is_empty() { has_log } else { start != MAGIC })
}

fn companion(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Makes the folder (0700) and the file (0600) where there are none, and proves that both can be
/// written.
fn make_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).map(drop)
}

/// A connection that is set up, to a file that was looked through.
fn prepared(path: &Path) -> Result<Connection, rusqlite::Error> {
    let connection = Connection::open(path)?;
    // A file that turns out to be broken keeps its log: closing it must not fold one into the other.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.busy_timeout(BUSY_MAX)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // With NORMAL a power cut loses what was committed since the last checkpoint, and before the
    // first one the whole file.
    connection.pragma_update(None, "synchronous", "FULL")?;
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if verdict == "ok" {
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
        return Ok(connection);
    }
    Err(rusqlite::Error::SqliteFailure(
        rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT),
        Some(verdict),
    ))
}

fn checked(mut connection: Connection, path: &Path, set_aside: Option<PathBuf>) -> Result<Store, OpenError> {
    let unusable = |source| OpenError::Unusable { path: path.to_owned(), source };
    let found = schema::version(&connection).map_err(unusable)?;
    if found > schema::VERSION {
        return Err(OpenError::Newer { path: path.to_owned(), found });
    }
    if schema::migrate(&mut connection).map_err(unusable)? {
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).map_err(unusable)?;
    }
    Ok(Store { connection, set_aside })
}

fn is_broken(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// Renames the file and what belongs to it; the new name carries the moment.
fn set_aside(path: &Path, now: UnixMs) -> io::Result<PathBuf> {
    let aside = companion(path, &format!(".broken-{}", now.0));
    for suffix in ["-wal", "-shm"] {
        if companion(path, suffix).exists() {
            fs::rename(companion(path, suffix), companion(&aside, suffix))?;
        }
    }
    fs::rename(path, &aside)?;
    Ok(aside)
}
