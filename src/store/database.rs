//! The open database: written in whole transactions, and checked for having been moved or replaced.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use rusqlite::config::DbConfig;

use super::names;
use super::open::companion;
use super::refusals::RefusalRows;
use crate::policy::units::UnixMs;
use crate::secret::ApiKey;

/// An open database file, or a database in memory.
#[derive(Debug)]
pub(super) struct Database {
    pub(super) connection: Connection,
    /// The stored refusals that restrictions are computed from.
    pub(super) refusals: RefusalRows,
    /// When the logs of owners were last compacted, if ever.
    pub(super) owners_tidied_at: Option<UnixMs>,
    file: Option<DatabaseFile>,
}

/// The path and identity of the file when it was opened.
#[derive(Debug)]
struct DatabaseFile {
    path: PathBuf,
    identity: FileIdentity,
}

/// The identity of the database file and its log, whatever their names. SQLite goes on writing to
/// files that were unlinked, and that data could never be read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileIdentity {
    file: (u64, u64),
    /// `None` where the file system cannot keep a log.
    log: Option<(u64, u64)>,
}

impl FileIdentity {
    fn of(path: &Path) -> io::Result<Self> {
        let inode = |path: &Path| fs::metadata(path).map(|seen| (seen.dev(), seen.ino()));
        Ok(Self { file: inode(path)?, log: inode(&companion(path, "-wal")).ok() })
    }
}

impl Database {
    pub(super) fn in_memory(connection: Connection) -> Self {
        Self::new(connection, None)
    }

    /// Wraps a connection to the file at `path` that has already read from it, so that its log
    /// exists.
    pub(super) fn of_file(connection: Connection, path: &Path) -> io::Result<Self> {
        let file = DatabaseFile { path: path.to_owned(), identity: FileIdentity::of(path)? };
        Ok(Self::new(connection, Some(file)))
    }

    fn new(connection: Connection, file: Option<DatabaseFile>) -> Self {
        Self { connection, refusals: RefusalRows::default(), owners_tidied_at: None, file }
    }

    /// Renames the rows that an earlier version wrote of these keys, see [`names`].
    pub(super) fn recognize<'k>(&mut self, keys: impl Iterator<Item = &'k ApiKey>) {
        if let Err(error) = names::recognize(&mut self.connection, keys) {
            tracing::warn!(
                event = "old_names_kept",
                "What an earlier version has recorded of the keys cannot be found now ({error}); the next start tries \
                 again"
            );
        }
    }

    /// Whether the file was removed or replaced, so that written data would be lost.
    pub(super) fn is_gone(&self) -> bool {
        self.file
            .as_ref()
            .is_some_and(|file| !FileIdentity::of(&file.path).is_ok_and(|now| now == file.identity))
    }

    /// Closes the connection without a checkpoint: the path may now hold another file, or a file to
    /// be kept as it is.
    pub(super) fn abandon(self) {
        // A connection that refuses this setting is closed all the same.
        let _ = self.connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
    }
}
