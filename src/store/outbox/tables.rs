//! Accesses the tables of the outbox: inserts rows in the transaction of the usage records, and runs the commands of
//! the mirror, which select the rows to be sent, record the results of deliveries, and release refused rows.

use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params};

use super::{
    AttemptEvent, DeliveryReport, KeyRename, MirroredKeyState, OutboxBatch, OutboxCommand, RefusedRow,
    RowVersion,
};
use crate::policy::units::UnixMs;
use crate::pool::KeySnapshot;
use crate::store::columns::{integer, timestamp, unsigned};

/// Runs a command of the mirror and sends the reply. A failed send is ignored, because the receiver may have been
/// dropped.
pub(in crate::store) fn run_command(
    connection: &mut Connection,
    command: OutboxCommand,
    keys: &[KeySnapshot],
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    match command {
        OutboxCommand::NextBatch { max_rows, reply } => {
            let _ = reply.send(next_batch(connection, max_rows, keys, now)?);
        }
        OutboxCommand::RecordDelivery { report, reply } => {
            let _ = reply.send(record_delivery(connection, &report)?);
        }
        OutboxCommand::ReleaseRefused { reply } => {
            connection.execute("UPDATE outbox_keys SET parked_until_ms = NULL", [])?;
            connection
                .execute("UPDATE outbox_events SET parked_until_ms = NULL WHERE refused IS NOT NULL", [])?;
            let _ = reply.send(());
        }
    }
    Ok(())
}

/// Puts the state of a key into the outbox, replacing an earlier one.
pub(in crate::store) fn put_key(
    transaction: &Transaction<'_>,
    snapshot: &KeySnapshot,
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    // The time must increase even if the clock was set back, because Supabase would refuse an older state.
    let mut statement = transaction.prepare_cached(&format!(
        "INSERT INTO outbox_keys ({KEY_COLUMNS})
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
         ON CONFLICT DO UPDATE SET
            status = excluded.status,
            character_count = excluded.character_count,
            character_limit = excluded.character_limit,
            remaining = excluded.remaining,
            usage = excluded.usage,
            is_over_limit = excluded.is_over_limit,
            is_near_limit = excluded.is_near_limit,
            resets_at_ms = excluded.resets_at_ms,
            observed_at_ms = max(excluded.observed_at_ms, observed_at_ms + 1)"
    ))?;
    let state = current_state(snapshot, now);
    statement.execute(params![
        state.key_hash,
        state.short_key,
        state.status,
        state.count,
        state.limit,
        state.remaining,
        state.usage,
        state.is_over_limit,
        state.is_near_limit,
        state.resets_at.map(timestamp),
        timestamp(state.observed_at),
    ])?;
    Ok(())
}

/// Puts an attempt into the outbox. A trigger deletes the row if the attempt is deleted before its delivery.
pub(in crate::store) fn put_event(transaction: &Transaction<'_>, id: &str) -> Result<(), rusqlite::Error> {
    transaction.prepare_cached("INSERT OR IGNORE INTO outbox_events (id) VALUES (?1)")?.execute([id])?;
    Ok(())
}

/// Puts a changed attempt into the outbox as the next revision: a delivery that is in progress does not
/// contain the change, and Supabase may accept the row that it refused.
pub(in crate::store) fn put_changed_event(
    transaction: &Transaction<'_>,
    id: &str,
) -> Result<(), rusqlite::Error> {
    const PUT_REVISION: &str = "INSERT INTO outbox_events (id) VALUES (?1)
        ON CONFLICT DO UPDATE SET revision = revision + 1, refused = NULL, parked_until_ms = NULL";
    transaction.prepare_cached(PUT_REVISION)?.execute([id])?;
    Ok(())
}

fn current_state(snapshot: &KeySnapshot, now: UnixMs) -> MirroredKeyState {
    let KeySnapshot { key, state, quota, is_near_limit, .. } = snapshot;
    MirroredKeyState {
        key_hash: key.api_key().fingerprint().to_string(),
        short_key: key.api_key().short().to_string(),
        status: state.status().as_str().to_owned(),
        count: integer(quota.count),
        limit: integer(quota.limit.unwrap_or(0)),
        remaining: integer(quota.remaining()),
        usage: quota.usage_ratio(),
        is_over_limit: quota.is_over_limit(),
        is_near_limit: *is_near_limit,
        resets_at: quota.resets_at,
        observed_at: now,
    }
}

/// Puts the changed states of `keys` into the outbox, and returns the rows that are due at `now`.
fn next_batch(
    connection: &mut Connection,
    max_rows: usize,
    keys: &[KeySnapshot],
    now: UnixMs,
) -> Result<OutboxBatch, rusqlite::Error> {
    let max_rows = i64::try_from(max_rows).unwrap_or(i64::MAX);
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for snapshot in keys {
        let current = current_state(snapshot, now);
        let previous = read_state(&transaction, &current.key_hash)?;
        // The time of the observation alone is not a change.
        if previous.is_none_or(|previous| MirroredKeyState { observed_at: now, ..previous } != current) {
            put_key(&transaction, snapshot, now)?;
        }
    }
    let batch = OutboxBatch {
        renames: read_renames(&transaction, max_rows)?,
        keys: read_due_keys(&transaction, max_rows, now)?,
        events: read_due_events(&transaction, max_rows, now)?,
        refused: count_refused(&transaction)?,
    };
    transaction.commit()?;
    Ok(batch)
}

fn read_renames(connection: &Connection, max_rows: i64) -> Result<Vec<KeyRename>, rusqlite::Error> {
    let mut statement = connection
        .prepare_cached("SELECT beginning, key_hash FROM outbox_renames ORDER BY beginning LIMIT ?1")?;
    statement
        .query_map([max_rows], |row| Ok(KeyRename { old_prefix: row.get(0)?, key_hash: row.get(1)? }))?
        .collect()
}

/// The columns that [`put_key`] writes and [`read_key`] reads.
const KEY_COLUMNS: &str = "key_hash, short_key, status, character_count, character_limit, remaining, usage,
    is_over_limit, is_near_limit, resets_at_ms, observed_at_ms";

fn read_state(connection: &Connection, key_hash: &str) -> Result<Option<MirroredKeyState>, rusqlite::Error> {
    connection
        .prepare_cached(&format!("SELECT {KEY_COLUMNS} FROM outbox_keys WHERE key_hash = ?1"))?
        .query_row([key_hash], read_key)
        .optional()
}

fn read_due_keys(
    connection: &Connection,
    max_rows: i64,
    now: UnixMs,
) -> Result<Vec<MirroredKeyState>, rusqlite::Error> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {KEY_COLUMNS} FROM outbox_keys
         WHERE coalesce(sent_at_ms, -1) < observed_at_ms AND coalesce(parked_until_ms, 0) <= ?1
         ORDER BY observed_at_ms, key_hash LIMIT ?2"
    ))?;
    statement.query_map(params![timestamp(now), max_rows], read_key)?.collect()
}

fn read_key(row: &Row<'_>) -> Result<MirroredKeyState, rusqlite::Error> {
    Ok(MirroredKeyState {
        key_hash: row.get(0)?,
        short_key: row.get(1)?,
        status: row.get(2)?,
        count: row.get(3)?,
        limit: row.get(4)?,
        remaining: row.get(5)?,
        usage: row.get(6)?,
        is_over_limit: row.get(7)?,
        is_near_limit: row.get(8)?,
        resets_at: row.get::<_, Option<i64>>(9)?.map(time),
        observed_at: time(row.get(10)?),
    })
}

fn read_due_events(
    connection: &Connection,
    max_rows: i64,
    now: UnixMs,
) -> Result<Vec<AttemptEvent>, rusqlite::Error> {
    let mut statement = connection.prepare_cached(
        "SELECT id, request_id, number, started_at_ms, client, key_hash, workspace, method,
            route, model, status, verdict, request_bytes, response_bytes, characters, credits, credits_from,
            first_byte_ms, total_ms, user, region, revision
         FROM outbox_events JOIN attempts USING (id)
         WHERE coalesce(parked_until_ms, 0) <= ?1
         ORDER BY id LIMIT ?2",
    )?;
    let read_row = |row: &Row<'_>| {
        Ok(AttemptEvent {
            id: row.get(0)?,
            request_id: row.get(1)?,
            number: row.get(2)?,
            started_at: time(row.get(3)?),
            client: row.get(4)?,
            key_hash: row.get(5)?,
            workspace: row.get(6)?,
            method: row.get(7)?,
            route: row.get(8)?,
            model: row.get(9)?,
            status: row.get(10)?,
            verdict: row.get(11)?,
            request_bytes: row.get(12)?,
            response_bytes: row.get(13)?,
            characters: row.get(14)?,
            credits: row.get(15)?,
            credits_from: row.get(16)?,
            first_byte_ms: row.get(17)?,
            total_ms: row.get(18)?,
            user: row.get(19)?,
            region: row.get(20)?,
            revision: row.get(21)?,
        })
    };
    statement.query_map(params![timestamp(now), max_rows], read_row)?.collect()
}

fn count_refused(connection: &Connection) -> Result<u64, rusqlite::Error> {
    // An index contains only the refused events, so the cost does not grow with the outbox.
    connection.query_row(
        "SELECT (SELECT count(*) FROM outbox_keys WHERE refused IS NOT NULL)
            + (SELECT count(*) FROM outbox_events WHERE refused IS NOT NULL)",
        [],
        |row| row.get::<_, i64>(0).map(i64::unsigned_abs),
    )
}

/// Records the results of a delivery, and returns the number of rows that were refused for the first time.
fn record_delivery(connection: &mut Connection, report: &DeliveryReport) -> Result<u64, rusqlite::Error> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for row in &report.sent {
        match row {
            RowVersion::Key { key_hash, observed_at } => transaction
                .prepare_cached(
                    "UPDATE outbox_keys SET sent_at_ms = max(coalesce(sent_at_ms, 0), ?2),
                        refused = NULL, parked_until_ms = NULL
                     WHERE key_hash = ?1",
                )?
                .execute(params![key_hash, timestamp(*observed_at)])?,
            RowVersion::Rename(KeyRename { old_prefix, key_hash }) => transaction
                .prepare_cached("DELETE FROM outbox_renames WHERE beginning = ?1 AND key_hash = ?2")?
                .execute([old_prefix, key_hash])?,
            RowVersion::Event { id, revision } => transaction
                .prepare_cached("DELETE FROM outbox_events WHERE id = ?1 AND revision = ?2")?
                .execute(params![id, revision])?,
        };
    }
    let mut newly_refused = 0;
    for RefusedRow { row, code, retry_at } in &report.refused {
        let (table, column, key) = match row {
            // A rename is retried with every batch.
            RowVersion::Rename(_) => continue,
            RowVersion::Key { key_hash, .. } => ("outbox_keys", "key_hash", key_hash),
            RowVersion::Event { id, revision } => {
                if !is_current_revision(&transaction, id, *revision)? {
                    continue;
                }
                ("outbox_events", "id", id)
            }
        };
        let was_refused: Option<bool> = transaction
            .prepare_cached(&format!("SELECT refused IS NOT NULL FROM {table} WHERE {column} = ?1"))?
            .query_row([key], |row| row.get(0))
            .optional()?;
        newly_refused += u64::from(was_refused == Some(false));
        transaction
            .prepare_cached(&format!(
                "UPDATE {table} SET refused = ?2, parked_until_ms = ?3 WHERE {column} = ?1"
            ))?
            .execute(params![key, code, timestamp(*retry_at)])?;
    }
    transaction.commit()?;
    Ok(newly_refused)
}

/// Returns whether the event in the outbox has this revision.
fn is_current_revision(connection: &Connection, id: &str, revision: i64) -> Result<bool, rusqlite::Error> {
    connection
        .prepare_cached("SELECT count(*) FROM outbox_events WHERE id = ?1 AND revision = ?2")?
        .query_row(params![id, revision], |row| row.get::<_, i64>(0).map(|count| count == 1))
}

fn time(column: i64) -> UnixMs {
    UnixMs(unsigned(column))
}
