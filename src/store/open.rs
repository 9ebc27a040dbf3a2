//! Opening the books, whatever lies where they should be. Nothing is ever deleted.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    make_private(path).map_err(|source| OpenError::Unwritable { path: path.clone(), source })?;
    let unusable = |source| OpenError::Unusable { path: path.clone(), source };
    match prepared(path) {
        Ok(connection) => checked(connection, path, None),
        Err(error) if is_broken(&error) => {
            let aside = set_aside(path, now)
                .map_err(|source| OpenError::CannotSetAside { path: path.clone(), source })?;
            make_private(path).map_err(|source| OpenError::Unwritable { path: path.clone(), source })?;
            checked(prepared(path).map_err(unusable)?, path, Some(aside))
        }
        Err(source) => Err(unusable(source)),
    }
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
    connection.busy_timeout(BUSY_MAX)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // With NORMAL a power cut loses what was committed since the last checkpoint, and before the
    // first one the whole file.
    connection.pragma_update(None, "synchronous", "FULL")?;
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if verdict == "ok" {
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
    let renamed = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".broken-{}{suffix}", now.0));
        PathBuf::from(name)
    };
    let companion = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    for suffix in ["-wal", "-shm"] {
        if companion(suffix).exists() {
            fs::rename(companion(suffix), renamed(suffix))?;
        }
    }
    fs::rename(path, renamed(""))?;
    Ok(renamed(""))
}
