//! The tables, and how each version of them becomes the next.

use rusqlite::{Connection, Transaction};

/// One step for each version; a step that was released never changes.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE keys (
        key_hash TEXT PRIMARY KEY,
        short_key TEXT NOT NULL,
        name TEXT,
        workspace TEXT,
        position INTEGER NOT NULL,
        status TEXT NOT NULL,
        character_count INTEGER NOT NULL,
        character_limit INTEGER,
        -- NULL: no overage; -1: without end
        extension INTEGER,
        resets_at_ms INTEGER,
        park_reason TEXT,
        park_until_ms INTEGER,
        workspace_park_reason TEXT,
        workspace_park_until_ms INTEGER,
        updated_at_ms INTEGER NOT NULL
    ) STRICT;

    CREATE TABLE attempts (
        id TEXT PRIMARY KEY,
        request_id TEXT NOT NULL,
        number INTEGER NOT NULL,
        started_at_ms INTEGER NOT NULL,
        client TEXT NOT NULL,
        key_hash TEXT NOT NULL,
        workspace TEXT,
        method TEXT NOT NULL,
        route TEXT NOT NULL,
        status INTEGER,
        verdict TEXT NOT NULL,
        request_bytes INTEGER NOT NULL,
        response_bytes INTEGER NOT NULL,
        credits INTEGER NOT NULL,
        -- answer, free or unknown
        credits_from TEXT NOT NULL,
        first_byte_ms INTEGER,
        total_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;

    CREATE INDEX attempts_by_time ON attempts (started_at_ms);
"];

/// The version that this program writes.
pub(super) const VERSION: usize = MIGRATIONS.len();

/// The version of a file; 0 when nothing was written yet.
pub(super) fn version(connection: &Connection) -> Result<usize, rusqlite::Error> {
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    Ok(usize::try_from(version).unwrap_or(usize::MAX))
}

/// Brings a file to [`VERSION`]; returns whether that changed it. All steps or none are taken.
pub(super) fn migrate(connection: &mut Connection) -> Result<bool, rusqlite::Error> {
    let from = version(connection)?;
    let transaction = connection.transaction()?;
    for step in MIGRATIONS.iter().skip(from) {
        transaction.execute_batch(step)?;
    }
    set_version(&transaction)?;
    transaction.commit()?;
    Ok(from < VERSION)
}

fn set_version(transaction: &Transaction<'_>) -> Result<(), rusqlite::Error> {
    transaction.execute_batch(&format!("PRAGMA user_version = {VERSION}"))
}
