//! The tables of the outbox: inserting rows, selecting due rows, and recording the results of a
//! delivery.

use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params};

use super::{Batch, Command, Delivery, Event, MirroredKeyState, RefusedRow, Rename, RowName};
use crate::policy::units::UnixMs;
use crate::pool::KeySnapshot;
use crate::store::columns::timestamp;

/// Runs a command of the mirror. The sender may have been dropped.
pub(in crate::store) fn run_command(
    connection: &mut Connection,
    command: Command,
    keys: &[KeySnapshot],
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    match command {
        Command::Take { rows_max, reply } => {
            let _ = reply.send(take(connection, rows_max, keys, now)?);
        }
        Command::Record { delivery, reply } => {
            let _ = reply.send(record(connection, &delivery)?);
        }
        Command::ClearParked { reply } => {
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
    seen: &KeySnapshot,
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    // A clock that was set back must not make a newer state check older: Supabase would refuse it.
    let mut statement = transaction.prepare_cached(
        "INSERT INTO outbox_keys (key_hash, short_key, status, character_count, character_limit, remaining, usage,
            is_over_limit, is_near_limit, resets_at_ms, observed_at_ms)
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
            observed_at_ms = max(excluded.observed_at_ms, observed_at_ms + 1)",
    )?;
    let state = state(seen, now);
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

/// Puts an attempt into the outbox. If the attempt is deleted first, its outbox row is deleted with
/// it.
pub(in crate::store) fn put_event(transaction: &Transaction<'_>, id: &str) -> Result<(), rusqlite::Error> {
    transaction.prepare_cached("INSERT OR IGNORE INTO outbox_events (id) VALUES (?1)")?.execute([id])?;
    Ok(())
}

/// Puts a changed attempt into the outbox again. A delivery under way does not contain the change,
/// and a refused row may be accepted now.
pub(in crate::store) fn put_event_again(
    transaction: &Transaction<'_>,
    id: &str,
) -> Result<(), rusqlite::Error> {
    const AGAIN: &str = "INSERT INTO outbox_events (id) VALUES (?1)
        ON CONFLICT DO UPDATE SET revision = revision + 1, refused = NULL, parked_until_ms = NULL";
    transaction.prepare_cached(AGAIN)?.execute([id])?;
    Ok(())
}

fn state(seen: &KeySnapshot, now: UnixMs) -> MirroredKeyState {
    let KeySnapshot { key, state, quota, is_near_limit, .. } = seen;
    let whole = |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX);
    MirroredKeyState {
        key_hash: key.api_key().fingerprint().to_string(),
        short_key: key.api_key().short().to_string(),
        status: state.status().word().to_owned(),
        count: whole(quota.count),
        limit: whole(quota.limit.unwrap_or(0)),
        remaining: whole(quota.remaining()),
        usage: quota.usage_ratio(),
        is_over_limit: quota.is_over_limit(),
        is_near_limit: *is_near_limit,
        resets_at: quota.resets_at,
        observed_at: now,
    }
}

fn take(
    connection: &mut Connection,
    rows_max: usize,
    keys: &[KeySnapshot],
    now: UnixMs,
) -> Result<Batch, rusqlite::Error> {
    let rows_max = i64::try_from(rows_max).unwrap_or(i64::MAX);
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for seen in keys {
        let wanted = state(seen, now);
        let noted = noted(&transaction, &wanted.key_hash)?;
        if noted.is_none_or(|noted| MirroredKeyState { observed_at: now, ..noted } != wanted) {
            put_key(&transaction, seen, now)?;
        }
    }
    let batch = Batch {
        renames: renames(&transaction, rows_max)?,
        keys: due_keys(&transaction, rows_max, now)?,
        events: due_events(&transaction, rows_max, now)?,
        refused: refused(&transaction)?,
    };
    transaction.commit()?;
    Ok(batch)
}

fn renames(connection: &Connection, rows_max: i64) -> Result<Vec<Rename>, rusqlite::Error> {
    let mut statement = connection
        .prepare_cached("SELECT beginning, key_hash FROM outbox_renames ORDER BY beginning LIMIT ?1")?;
    statement
        .query_map([rows_max], |row| Ok(Rename { beginning: row.get(0)?, key_hash: row.get(1)? }))?
        .collect()
}

const KEY_COLUMNS: &str = "key_hash, short_key, status, character_count, character_limit, remaining, usage,
    is_over_limit, is_near_limit, resets_at_ms, observed_at_ms";

fn noted(connection: &Connection, key_hash: &str) -> Result<Option<MirroredKeyState>, rusqlite::Error> {
    connection
        .prepare_cached(&format!("SELECT {KEY_COLUMNS} FROM outbox_keys WHERE key_hash = ?1"))?
        .query_row([key_hash], read_key)
        .optional()
}

fn due_keys(
    connection: &Connection,
    rows_max: i64,
    now: UnixMs,
) -> Result<Vec<MirroredKeyState>, rusqlite::Error> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {KEY_COLUMNS} FROM outbox_keys
         WHERE coalesce(sent_at_ms, -1) < observed_at_ms AND coalesce(parked_until_ms, 0) <= ?1
         ORDER BY observed_at_ms, key_hash LIMIT ?2"
    ))?;
    statement.query_map(params![timestamp(now), rows_max], read_key)?.collect()
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
        resets_at: row.get::<_, Option<i64>>(9)?.map(unix),
        observed_at: unix(row.get(10)?),
    })
}

fn due_events(connection: &Connection, rows_max: i64, now: UnixMs) -> Result<Vec<Event>, rusqlite::Error> {
    let mut statement = connection.prepare_cached(
        "SELECT id, request_id, number, started_at_ms, client, key_hash, workspace, method,
            route, model, status, verdict, request_bytes, response_bytes, characters, credits, credits_from,
            first_byte_ms, total_ms, revision
         FROM outbox_events JOIN attempts USING (id)
         WHERE coalesce(parked_until_ms, 0) <= ?1
         ORDER BY id LIMIT ?2",
    )?;
    let read = |row: &Row<'_>| {
        Ok(Event {
            id: row.get(0)?,
            request_id: row.get(1)?,
            number: row.get(2)?,
            started_at: unix(row.get(3)?),
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
            revision: row.get(19)?,
        })
    };
    statement.query_map(params![timestamp(now), rows_max], read)?.collect()
}

fn refused(connection: &Connection) -> Result<u64, rusqlite::Error> {
    // Only refused events are indexed, so a long outbox costs nothing here.
    connection.query_row(
        "SELECT (SELECT count(*) FROM outbox_keys WHERE refused IS NOT NULL)
            + (SELECT count(*) FROM outbox_events WHERE refused IS NOT NULL)",
        [],
        |row| row.get::<_, i64>(0).map(i64::unsigned_abs),
    )
}

fn record(connection: &mut Connection, delivery: &Delivery) -> Result<u64, rusqlite::Error> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for name in &delivery.sent {
        match name {
            RowName::Key { key_hash, observed_at } => transaction
                .prepare_cached(
                    "UPDATE outbox_keys SET sent_at_ms = max(coalesce(sent_at_ms, 0), ?2),
                        refused = NULL, parked_until_ms = NULL
                     WHERE key_hash = ?1",
                )?
                .execute(params![key_hash, timestamp(*observed_at)])?,
            RowName::Rename(Rename { beginning, key_hash }) => transaction
                .prepare_cached("DELETE FROM outbox_renames WHERE beginning = ?1 AND key_hash = ?2")?
                .execute([beginning, key_hash])?,
            RowName::Event { id, revision } => transaction
                .prepare_cached("DELETE FROM outbox_events WHERE id = ?1 AND revision = ?2")?
                .execute(params![id, revision])?,
        };
    }
    let mut first_times = 0;
    for RefusedRow { name, code, until } in &delivery.refused {
        let (table, column, name) = match name {
            // A rename is retried with every batch.
            RowName::Rename(_) => continue,
            RowName::Key { key_hash, .. } => ("outbox_keys", "key_hash", key_hash),
            RowName::Event { id, revision } => {
                if !is_of(&transaction, id, *revision)? {
                    continue;
                }
                ("outbox_events", "id", id)
            }
        };
        let is_known: Option<bool> = transaction
            .prepare_cached(&format!("SELECT refused IS NOT NULL FROM {table} WHERE {column} = ?1"))?
            .query_row([name], |row| row.get(0))
            .optional()?;
        first_times += u64::from(is_known == Some(false));
        transaction
            .prepare_cached(&format!(
                "UPDATE {table} SET refused = ?2, parked_until_ms = ?3 WHERE {column} = ?1"
            ))?
            .execute(params![name, code, timestamp(*until)])?;
    }
    transaction.commit()?;
    Ok(first_times)
}

/// Whether an event is unchanged since that revision.
fn is_of(connection: &Connection, id: &str, revision: i64) -> Result<bool, rusqlite::Error> {
    connection
        .prepare_cached("SELECT count(*) FROM outbox_events WHERE id = ?1 AND revision = ?2")?
        .query_row(params![id, revision], |row| row.get::<_, i64>(0).map(|count| count == 1))
}

fn unix(ms: i64) -> UnixMs {
    UnixMs(u64::try_from(ms).unwrap_or(0))
}
