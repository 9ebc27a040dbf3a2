//! Stores the id by which the other replicas of a shared pool identify this replica, so that it is the same after a
//! restart.

use rusqlite::OptionalExtension;

use super::Store;

/// The migration that adds the table.
pub(super) const TABLE: &str = "
    -- The id of this replica in a pool that several replicas share: one row.
    CREATE TABLE replica (
        id TEXT PRIMARY KEY
    ) STRICT, WITHOUT ROWID;
    ";

impl Store {
    /// Returns the id of this replica, and stores `new_id` if the database has none. Returns `new_id` if the database
    /// is not open.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read or written.
    pub fn replica_id(&self, new_id: &str) -> Result<String, rusqlite::Error> {
        let stored_id = self.read(|connection| {
            let read_id = || connection.query_row("SELECT id FROM replica", [], |row| row.get(0)).optional();
            if let Some(id) = read_id()? {
                return Ok(vec![id]);
            }
            connection.execute("INSERT INTO replica VALUES (?1)", [new_id])?;
            Ok(vec![new_id.to_owned()])
        })?;
        Ok(stored_id.into_iter().next().unwrap_or_else(|| new_id.to_owned()))
    }
}
