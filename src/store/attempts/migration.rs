//! Migrates to schema version 12, in which each attempt has its own row in `attempts`. In version 11, the attempts of a
//! commit share a JSON row in `attempt_sheets`, single attempts have rows in `attempt_rows`, and both refer to
//! their common columns in `series`.
//!
//! Moving all attempts of a large file would delay startup by minutes. The migration therefore moves a limited number
//! of attempts, and maintenance moves the remaining attempts in separate transactions. Until all attempts are moved,
//! the old tables exist, and their attempts are missing from `attempts`. If Keychoir stops at any point, each attempt
//! is in exactly one table. Only the attempts of a JSON row that cannot be parsed are lost.

use rusqlite::Connection;

/// The statements of the migration. They replace the view `attempts` by a table, and convert the ids of the attempts in
/// the outbox to text. They drop the stored owners of identifiers that are valid for hours.
pub(in crate::store) const STATEMENTS: &str = "
    DROP VIEW attempts;
    DROP TRIGGER attempts_forgotten;

    -- One row per attempt: the sending of a request with one key.
    CREATE TABLE attempts (
        -- UUID of version 7, so ids are in the order of time
        id TEXT PRIMARY KEY,
        request_id TEXT NOT NULL,
        -- from 1 within the request
        number INTEGER NOT NULL,
        -- Unix milliseconds
        started_at_ms INTEGER NOT NULL,
        client TEXT NOT NULL,
        -- fingerprint of the key; `own` for a client's own key
        key_hash TEXT NOT NULL,
        workspace TEXT,
        method TEXT NOT NULL,
        -- the path with {id} instead of identifiers
        route TEXT NOT NULL,
        model TEXT,
        -- of the response; NULL: no response was received
        status INTEGER,
        verdict TEXT NOT NULL,
        request_bytes INTEGER NOT NULL,
        response_bytes INTEGER NOT NULL,
        characters INTEGER,
        -- duration of the audio that a WebSocket sent to be transcribed
        audio_ms INTEGER,
        -- credits that were reserved before the request was sent
        credits_reserved INTEGER,
        credits INTEGER NOT NULL,
        -- source of `credits`: answer, estimate, free or unknown
        credits_from TEXT NOT NULL,
        first_byte_ms INTEGER,
        total_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;

    ALTER TABLE outbox_events RENAME TO earlier_outbox_events;
    CREATE TABLE outbox_events (
        -- id of the attempt
        id TEXT PRIMARY KEY,
        -- error code of Supabase, if it has refused the row
        refused TEXT,
        parked_until_ms INTEGER,
        -- increases when the attempt changes, so that the delivery of an earlier state does not count
        revision INTEGER NOT NULL DEFAULT 0
    ) STRICT, WITHOUT ROWID;
    INSERT INTO outbox_events
    SELECT iif(length(id) <> 16, CAST(id AS TEXT), lower(printf('%s-%s-%s-%s-%s', substr(hex(id), 1, 8),
        substr(hex(id), 9, 4), substr(hex(id), 13, 4), substr(hex(id), 17, 4), substr(hex(id), 21)))),
        refused, parked_until_ms, revision
    FROM earlier_outbox_events;
    DROP TABLE earlier_outbox_events;
    CREATE INDEX outbox_events_refused ON outbox_events (id) WHERE refused IS NOT NULL;
    CREATE TRIGGER attempts_deleted AFTER DELETE ON attempts BEGIN
        DELETE FROM outbox_events WHERE id = OLD.id;
    END;

    -- Identifiers that are valid for hours are kept in memory only.
    DROP TABLE owners_passing;
    ";

/// Maximum number of rows that a step moves from each old table. As a shared row contains many attempts, a step also
/// moves no further shared row after it has moved this number of attempts from shared rows. A step takes less than a
/// tenth of a second.
const MAX_STEP_ROWS: i64 = 4_096;
/// Maximum number of steps in the transaction of the migration. They delay startup by less than two seconds.
const MAX_START_STEPS: usize = 16;

/// Moves the first attempts, in the transaction of the migration.
pub(in crate::store) fn move_first_attempts(transaction: &Connection) -> Result<(), rusqlite::Error> {
    for _ in 0..MAX_START_STEPS {
        if !move_step(transaction)? {
            break;
        }
    }
    Ok(())
}

/// Moves the attempts of one step in a separate transaction. Returns whether attempts may remain.
pub(in crate::store) fn move_next_attempts(connection: &Connection) -> Result<bool, rusqlite::Error> {
    if !is_unfinished(connection)? {
        return Ok(false);
    }
    let transaction = connection.unchecked_transaction()?;
    let may_have_more = move_step(&transaction)?;
    transaction.commit()?;
    Ok(may_have_more)
}

/// Returns whether the tables of the earlier version still exist.
pub(in crate::store) fn is_unfinished(connection: &Connection) -> Result<bool, rusqlite::Error> {
    const HAS_SERIES: &str =
        "SELECT EXISTS (SELECT * FROM sqlite_schema WHERE type = 'table' AND name = 'series')";
    connection.prepare_cached(HAS_SERIES)?.query_row([], |row| row.get(0))
}

/// Moves the attempts of one step, and drops the old tables when they are empty. Returns whether attempts may
/// remain.
fn move_step(connection: &Connection) -> Result<bool, rusqlite::Error> {
    let may_have_more = move_rows(connection)? | move_shared_rows(connection)?;
    if !may_have_more {
        connection.execute_batch("DROP TABLE attempt_rows; DROP TABLE attempt_sheets; DROP TABLE series")?;
    }
    Ok(may_have_more)
}

/// Moves attempts from `attempt_rows`. Returns false if that table is empty.
fn move_rows(connection: &Connection) -> Result<bool, rusqlite::Error> {
    const LAST: &str = "SELECT max(id) FROM (SELECT id FROM attempt_rows ORDER BY id LIMIT ?1)";
    const MOVE: &str = "INSERT OR IGNORE INTO attempts (id, request_id, number, started_at_ms, client, key_hash,
            workspace, method, route, model, status, verdict, request_bytes, response_bytes, characters, audio_ms,
            credits_reserved, credits, credits_from, first_byte_ms, total_ms)
        SELECT iif(length(id) <> 16, CAST(id AS TEXT), lower(printf('%s-%s-%s-%s-%s', substr(hex(id), 1, 8),
                substr(hex(id), 9, 4), substr(hex(id), 13, 4), substr(hex(id), 17, 4), substr(hex(id), 21)))),
            request_id, attempt_rows.number, started_at_ms, client, key_hash, workspace, method, route, model, status,
            verdict, request_bytes, response_bytes, characters, audio_ms, credits_reserved, credits, credits_from,
            first_byte_ms, total_ms
        FROM attempt_rows JOIN series ON series.number = attempt_rows.series WHERE id <= ?1";
    let last: Option<Vec<u8>> = connection.query_row(LAST, [MAX_STEP_ROWS], |row| row.get(0))?;
    let Some(last) = last else { return Ok(false) };
    connection.execute(MOVE, [&last])?;
    connection.execute("DELETE FROM attempt_rows WHERE id <= ?1", [&last])?;
    Ok(true)
}

/// Moves the attempts of shared rows from `attempt_sheets`. Returns false if that table is empty.
fn move_shared_rows(connection: &Connection) -> Result<bool, rusqlite::Error> {
    const LAST: &str = "SELECT max(number)
        FROM (SELECT number, sum(attempts) OVER (ORDER BY number) - attempts AS attempts_before
            FROM (SELECT number, attempts FROM attempt_sheets ORDER BY number LIMIT ?1))
        WHERE attempts_before < ?1";
    // The comment on `lines` in `schema.rs` lists the elements of `value`. A row with corrupt JSON is deleted without
    // being moved, so that it does not prevent the other attempts from being moved.
    const MOVE: &str = "INSERT OR IGNORE INTO attempts (id, request_id, number, started_at_ms, client, key_hash,
            workspace, method, route, model, status, verdict, request_bytes, response_bytes, characters, audio_ms,
            credits_reserved, credits, credits_from, first_byte_ms, total_ms)
        SELECT printf('%08x-%04x-%04x-%04x-%04x%08x', started_at_ms >> 16, started_at_ms & 0xffff,
                0x7000 | ((count >> 30) & 0x0fff), 0x8000 | ((count >> 16) & 0x3fff), count & 0xffff, chance),
            value ->> 2, value ->> 4, started_at_ms, client, key_hash, workspace, method, route, model, status,
            verdict, value ->> 5, value ->> 6, value ->> 10, value ->> 12, value ->> 11, value ->> 9, credits_from,
            value ->> 8, value ->> 7
        FROM (SELECT value, chance, hour_ms + (value ->> 0) AS started_at_ms, count + (value ->> 1) AS count
            FROM attempt_sheets, json_each(iif(json_valid(lines), lines, '[]')) WHERE attempt_sheets.number <= ?1)
        JOIN series ON series.number = value ->> 3";
    let last: Option<i64> = connection.query_row(LAST, [MAX_STEP_ROWS], |row| row.get(0))?;
    let Some(last) = last else { return Ok(false) };
    connection.execute(MOVE, [last])?;
    connection.execute("DELETE FROM attempt_sheets WHERE number <= ?1", [last])?;
    Ok(true)
}
