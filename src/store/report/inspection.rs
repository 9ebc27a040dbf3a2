//! Inspects the database for operators: its size, its schema, the free space on its disk, and its integrity.

use std::fs;
use std::time::Duration;

use super::{ReadError, UsageReader, read_error};
use crate::clock;
use crate::store::open::{companion, is_corruption};
use crate::store::{schema, snapshot};

/// The size, schema and integrity of the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseInspection {
    /// The size of the file and its write-ahead log in bytes.
    pub bytes: u64,
    /// The schema version of the file.
    pub schema: usize,
    /// The schema version that this program writes.
    pub current_schema: usize,
    /// The free bytes on the disk of the file, if the system reports them.
    pub free_bytes: Option<u64>,
    /// The result of the integrity check.
    pub integrity: DatabaseIntegrity,
}

/// The result of the integrity check, which is SQLite's `quick_check`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatabaseIntegrity {
    /// The whole file was checked, and no error was found.
    Intact,
    /// The file is corrupt. Contains the first error that SQLite reports.
    Damaged(String),
    /// The check was interrupted at its timeout before it found an error.
    Unfinished,
}

/// Number of SQLite's virtual-machine instructions between two checks of the timeout. They take a fraction of a
/// millisecond.
const INSTRUCTIONS_PER_CHECK: i32 = 10_000;

impl UsageReader {
    /// Inspects the database without changing it. The integrity check is interrupted at `timeout`.
    ///
    /// # Errors
    ///
    /// Fails when SQLite cannot read the database for a reason other than corruption.
    pub fn inspect(&mut self, timeout: Duration) -> Result<DatabaseInspection, ReadError> {
        let schema =
            schema::version(&self.connection).map_err(|source| read_error(self.path.clone(), source))?;
        let size = |suffix| fs::metadata(companion(&self.path, suffix)).map_or(0, |file| file.len());
        Ok(DatabaseInspection {
            bytes: size("") + size("-wal"),
            schema,
            current_schema: schema::VERSION,
            free_bytes: snapshot::free_space(&self.path).ok(),
            integrity: self.check_integrity(timeout)?,
        })
    }

    fn check_integrity(&mut self, timeout: Duration) -> Result<DatabaseIntegrity, ReadError> {
        let start = clock::instant();
        let is_timed_out = move || clock::elapsed_since(start) >= timeout;
        let report =
            self.connection.progress_handler(INSTRUCTIONS_PER_CHECK, Some(is_timed_out)).and_then(|()| {
                self.connection.query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0))
            });
        // The timeout must not interrupt later queries of this connection.
        let _ = self.connection.progress_handler(0, None::<fn() -> bool>);
        match report {
            Ok(report) if report == "ok" => Ok(DatabaseIntegrity::Intact),
            Ok(report) => Ok(DatabaseIntegrity::Damaged(report)),
            Err(error) if is_corruption(&error) => Ok(DatabaseIntegrity::Damaged(error.to_string())),
            Err(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::OperationInterrupted) => {
                Ok(DatabaseIntegrity::Unfinished)
            }
            Err(source) => Err(read_error(self.path.clone(), source)),
        }
    }
}
