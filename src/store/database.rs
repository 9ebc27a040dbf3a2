//! Holds the open database with its connection, and tracks which refusals it contains and when its log of the owners of
//! identifiers was compacted. Renames the keys of earlier versions. Detects that the file was moved, removed or
//! replaced: SQLite would continue to write to the unlinked file, and the data would be lost.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use rusqlite::config::DbConfig;

use super::key_names;
use super::open::companion;
use super::refusals::RefusalRows;
use crate::platform::files;
use crate::policy::units::UnixMs;
use crate::secret::ApiKey;

/// An open database file, or a database in memory.
#[derive(Debug)]
pub(super) struct Database {
    pub(super) connection: Connection,
    /// Tracks which refusals are in the file.
    pub(super) refusals: RefusalRows,
    /// The time at which the log of owners was last compacted, or `None` if it was not compacted after the database was
    /// opened.
    pub(super) owners_compacted_at: Option<UnixMs>,
    /// The file, or `None` if the database is in memory.
    file: Option<DatabaseFile>,
}

/// The path of the file, and its identity when it was opened.
#[derive(Debug)]
struct DatabaseFile {
    path: PathBuf,
    identity: FileIdentity,
}

/// The identities of the database file and its write-ahead log, see [`files::identity`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileIdentity {
    file: (u64, u64),
    /// The identity of the log, or `None` if the log does not exist.
    log: Option<(u64, u64)>,
}

impl FileIdentity {
    fn read(path: &Path) -> io::Result<Self> {
        let identity = |path: &Path| fs::metadata(path).map(|metadata| files::identity(&metadata));
        Ok(Self { file: identity(path)?, log: identity(&companion(path, "-wal")).ok() })
    }
}

impl Database {
    pub(super) fn in_memory(connection: Connection) -> Self {
        Self::new(connection, None)
    }

    /// Wraps a connection to the file at `path`. The connection must have read from the file, so that its log
    /// exists.
    pub(super) fn in_file(connection: Connection, path: &Path) -> io::Result<Self> {
        let file = DatabaseFile { path: path.to_owned(), identity: FileIdentity::read(path)? };
        Ok(Self::new(connection, Some(file)))
    }

    fn new(connection: Connection, file: Option<DatabaseFile>) -> Self {
        Self { connection, refusals: RefusalRows::default(), owners_compacted_at: None, file }
    }

    /// Renames the rows of `keys` that an earlier version stored under other names, see [`key_names`]. A failure is
    /// logged.
    pub(super) fn rename_keys<'k>(&mut self, keys: impl Iterator<Item = &'k ApiKey>) {
        if let Err(error) = key_names::rename_keys(&mut self.connection, keys) {
            tracing::warn!(
                event = "old_names_kept",
                "The records that an earlier version stored for the keys cannot be renamed: {error}; the next start \
                 tries again"
            );
        }
    }

    /// Returns whether the file or its write-ahead log was moved, removed or replaced, so that written data would be
    /// lost.
    pub(super) fn is_file_gone(&self) -> bool {
        self.file.as_ref().is_some_and(|file| {
            FileIdentity::read(&file.path).map_or(true, |current| current != file.identity)
        })
    }

    /// Closes the connection without a checkpoint, because the path may name another file, or because the file must
    /// stay unchanged.
    pub(super) fn close_without_checkpoint(self) {
        // If SQLite refuses the setting, the connection is closed with a checkpoint.
        let _ = self.connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
    }
}
