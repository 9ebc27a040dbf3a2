//! Stores the changes that operators make, and reads the latest ones: one row per change, without secrets, up to a
//! maximum number. The writer thread commits each change of the admin API or of a reload in a separate transaction,
//! before the operator gets the response. While `keychoir serve` does not run, a command records its change through
//! [`OfflineChanges`].

use std::path::Path;

use rusqlite::{Connection, OpenFlags, Row, params};

use super::columns::{integer, timestamp, unsigned};
use super::open::IntegrityCheck;
use super::{DatabaseLocation, LockableLocation, OpenError, schema};
use crate::policy::units::UnixMs;
use crate::proxy::AttemptRecord;

/// The migration that adds the table.
pub(super) const TABLE: &str = "
    -- Changes of keys, clients and the configuration by operators.
    CREATE TABLE changes (
        -- UUID of version 7, so ids are in the order of time
        id TEXT PRIMARY KEY,
        -- Unix milliseconds
        at_ms INTEGER NOT NULL,
        -- credential or program: admin_token, command_line or reload
        actor TEXT NOT NULL,
        -- IP address of the client of the admin API; NULL for a Unix socket or the command line
        address TEXT,
        -- such as key_added or client_rotated
        action TEXT NOT NULL,
        -- the short form or name of the key, or the name of the client
        target TEXT,
        -- JSON without secrets
        detail TEXT NOT NULL,
        -- the generation after the change
        generation INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    ";

/// Maximum number of stored changes. The oldest changes are deleted first.
const MAX_CHANGES: u32 = 10_000;

/// A change that an operator has made. It contains no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredChange {
    /// A UUID of version 7.
    pub id: String,
    /// The time of the change.
    pub at: UnixMs,
    /// The origin of the change: `admin_token`, `command_line` or `reload`.
    pub actor: String,
    /// The IP address of the client of the admin API. It is `None` for a client on a Unix socket, and for a change that
    /// was not made through the admin API.
    pub address: Option<String>,
    /// The kind of the change: `key_added`, `key_removed`, `key_paused`, `key_resumed`, `client_added`,
    /// `client_changed`, `client_rotated`, `client_revoked`, `reloaded`, or `unrecorded_changes` for changes whose
    /// records are missing.
    pub action: String,
    /// The name or short form of the key, or the name of the client. It is `None` for a change that
    /// concerns neither, such as a reload.
    pub target: Option<String>,
    /// The details of the change, as a JSON object without secrets.
    pub detail: String,
    /// The generation of the keys and clients after the change.
    pub generation: u64,
}

impl StoredChange {
    /// Creates an id for a change at `now`. Later ids of this process are greater.
    #[must_use]
    pub fn new_id(now: UnixMs) -> String {
        AttemptRecord::new_id(now).to_string()
    }
}

/// Records the change of a command while `keychoir serve` does not run. Holds the lock of the database, so that
/// `keychoir serve` cannot start before the change is made.
#[derive(Debug)]
pub struct OfflineChanges {
    _location: LockableLocation,
    /// The connection, or `None` if the database is of another version or cannot be opened.
    connection: Option<Connection>,
}

impl OfflineChanges {
    /// Locks the database. Creates a missing database, and does not upgrade an existing one.
    ///
    /// # Errors
    ///
    /// Fails with [`OpenError::InUse`] when another process uses the database, and with a different error when the
    /// database cannot be created or locked.
    pub fn open(path: &Path, now: UnixMs) -> Result<Self, OpenError> {
        let is_new = path.metadata().map_or(true, |metadata| metadata.len() == 0);
        let mut location = LockableLocation::from(DatabaseLocation::File(path.to_owned()));
        if is_new {
            let connection = location.open(now, IntegrityCheck::Skip)?.database.connection;
            return Ok(Self { _location: location, connection: Some(connection) });
        }
        location.lock()?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags).ok();
        let is_current = |connection: &Connection| {
            schema::version(connection).is_ok_and(|version| version == schema::VERSION)
        };
        Ok(Self { _location: location, connection: connection.filter(is_current) })
    }

    /// Records a change. Returns false if the database is of another version or cannot be written.
    #[must_use]
    pub fn record(&self, change: &StoredChange) -> bool {
        self.connection.as_ref().is_some_and(|connection| insert(connection, change).is_ok())
    }
}

/// Inserts a change, and deletes the oldest changes above [`MAX_CHANGES`].
pub(super) fn insert(connection: &Connection, change: &StoredChange) -> Result<(), rusqlite::Error> {
    const INSERT: &str = "INSERT INTO changes (id, at_ms, actor, address, action, target, detail, generation)
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    const DELETE_OLDEST: &str = "DELETE FROM changes WHERE id <=
        (SELECT id FROM changes ORDER BY id DESC LIMIT 1 OFFSET ?1)";
    let transaction = connection.unchecked_transaction()?;
    transaction.prepare_cached(INSERT)?.execute(params![
        change.id,
        timestamp(change.at),
        change.actor,
        change.address,
        change.action,
        change.target,
        change.detail,
        integer(change.generation),
    ])?;
    transaction.prepare_cached(DELETE_OLDEST)?.execute([MAX_CHANGES])?;
    transaction.commit()
}

/// Reads at most `limit` changes with ids below `before`, the latest first. If `before` is `None`, it reads the latest
/// changes.
pub(super) fn read(
    connection: &Connection,
    before: Option<&str>,
    limit: usize,
) -> Result<Vec<StoredChange>, rusqlite::Error> {
    const READ: &str = "SELECT id, at_ms, actor, address, action, target, detail, generation FROM changes
        WHERE ?1 IS NULL OR id < ?1 ORDER BY id DESC LIMIT ?2";
    let mut statement = connection.prepare_cached(READ)?;
    let rows = statement.query_map(params![before, integer(limit as u64)], read_change)?;
    rows.collect()
}

fn read_change(row: &Row<'_>) -> Result<StoredChange, rusqlite::Error> {
    Ok(StoredChange {
        id: row.get(0)?,
        at: UnixMs(unsigned(row.get(1)?)),
        actor: row.get(2)?,
        address: row.get(3)?,
        action: row.get(4)?,
        target: row.get(5)?,
        detail: row.get(6)?,
        generation: unsigned(row.get(7)?),
    })
}
