//! Writes the attempts of a transaction: a row for each in `attempts`, and the sums of their hours.
//!
//! The id of an attempt is the key of its row, so writing a record again, after a commit whose result
//! is unknown, changes neither the rows nor the sums.

pub(super) mod migration;

use std::collections::HashMap;

use http::Method;
use rusqlite::config::DbConfig;
use rusqlite::{CachedStatement, Connection, ErrorCode, ToSql, Transaction, params};
use uuid::Uuid;

use super::columns::{timestamp, whole};
use super::outbox::{self, Mirrored};
use crate::elevenlabs::endpoint::Route;
use crate::policy::outcome::Outcome;
use crate::policy::retention::{first_id, hour_of};
use crate::policy::units::UnixMs;
use crate::pool::Key;
use crate::proxy::{AttemptRecord, CreditSource};

/// The key hash of attempts with a client's own key.
const OWN_KEY: &str = "own";

/// Upper bound of an amount, far above every real one. Larger amounts are cut to it, so that one
/// corrupt record cannot make the sums overflow and keep every other record from being written.
const AMOUNT_MAX: i64 = 1 << 48;

/// The columns: first those that attempts of a group have in common, then the others.
const INTO: &str = "attempts (client, key_hash, workspace, method, route, model, status, verdict, credits_from,
    id, request_id, number, started_at_ms, request_bytes, response_bytes, characters, audio_ms, credits_reserved,
    credits, first_byte_ms, total_ms) VALUES ";
const COMMON: usize = 9;
const COLUMNS: usize = COMMON + 12;

/// Rows that one statement inserts, for a tenth less work per row than a statement each.
const CHUNK: usize = 8;

/// Inserts the attempts that are not in the file yet, and adds them to their hours.
pub(super) fn write(
    transaction: &Transaction<'_>,
    attempts: &[AttemptRecord],
    mirrored: Mirrored,
) -> Result<(), rusqlite::Error> {
    let row = format!("({}?)", "?, ".repeat(COLUMNS - 1));
    let rows = [&*row; CHUNK].join(", ");
    let insert_rows = transaction.prepare_cached(&format!("INSERT INTO {INTO}{rows}"))?;
    let insert_row = transaction.prepare_cached(&format!("INSERT OR IGNORE INTO {INTO}{row}"))?;
    let [mut insert_rows, mut insert_row] = [insert_rows, insert_row].map(Insert::new);
    let (mut groups, group_indices) = grouped(attempts);
    for (chunk, group_indices) in attempts.chunks(CHUNK).zip(group_indices.chunks(CHUNK)) {
        let are_inserted = insert_rows.try_chunk(chunk, group_indices, &groups)?;
        for (attempt, &group_index) in chunk.iter().zip(group_indices) {
            let group = &mut groups[group_index];
            if attempt.is_price && add_price(transaction, attempt)? {
                group.sums.add_price(attempt);
                if mirrored == Mirrored::KeysAndEvents {
                    outbox::put_event_again(transaction, &attempt.id.to_string())?;
                }
                continue;
            }
            if !are_inserted {
                insert_row.bind(0, attempt, group_index, group)?;
                if insert_row.statement.raw_execute()? == 0 {
                    continue;
                }
            }
            group.sums.add(attempt);
            if mirrored == Mirrored::KeysAndEvents {
                outbox::put_event(transaction, &attempt.id.to_string())?;
            }
        }
    }
    // Nothing is added for attempts that were in the file already.
    for group in groups.iter().filter(|group| group.sums != HourAmounts::default()) {
        add_to_hour(transaction, group)?;
    }
    Ok(())
}

/// The common columns of attempts of an hour. Keys are compared by address; two of the same key, before
/// and after a reload, add to the same sums in the file.
#[derive(PartialEq, Eq, Hash)]
struct CommonColumns<'a> {
    hour: UnixMs,
    key: Option<*const Key>,
    client: &'a str,
    method: &'a Method,
    route: Route,
    model: Option<&'a str>,
    status: Option<u16>,
    outcome: Outcome,
    credits_from: CreditSource,
}

/// Attempts with the same common columns: the texts of these columns, which are formatted once, and the
/// amounts that the transaction adds to their hour.
struct AttemptGroup<'a> {
    first: &'a AttemptRecord,
    key_hash: String,
    workspace: Option<String>,
    route: String,
    sums: HourAmounts,
}

/// The groups of the attempts, and for each attempt the index of its group.
fn grouped(attempts: &[AttemptRecord]) -> (Vec<AttemptGroup<'_>>, Vec<usize>) {
    let (mut groups, mut indices) = (Vec::new(), HashMap::new());
    let group_index = |attempt| {
        *indices.entry(CommonColumns::of(attempt)).or_insert_with(|| {
            groups.push(AttemptGroup::of(attempt));
            groups.len() - 1
        })
    };
    let group_indices = attempts.iter().map(group_index).collect();
    (groups, group_indices)
}

impl<'a> CommonColumns<'a> {
    fn of(attempt: &'a AttemptRecord) -> Self {
        Self {
            hour: hour_of(attempt.started_at),
            key: attempt.key.as_deref().map(std::ptr::from_ref),
            client: attempt.client.as_str(),
            method: &attempt.method,
            route: attempt.route,
            model: attempt.model.as_deref(),
            status: attempt.status,
            outcome: attempt.outcome,
            credits_from: attempt.credits_from,
        }
    }
}

impl<'a> AttemptGroup<'a> {
    fn of(first: &'a AttemptRecord) -> Self {
        let key = first.key.as_ref();
        let membership = key.map(|key| key.workspace().membership());
        Self {
            first,
            key_hash: key.map_or_else(|| OWN_KEY.to_owned(), |key| key.api_key().fingerprint().to_string()),
            workspace: membership.and_then(|membership| membership.name().map(str::to_owned)),
            route: first.route.to_string(),
            sums: HourAmounts::default(),
        }
    }
}

/// A prepared statement that inserts one or more rows.
struct Insert<'t> {
    statement: CachedStatement<'t>,
    /// The group whose common columns are bound, for each row of the statement.
    bound: [Option<usize>; CHUNK],
}

impl<'t> Insert<'t> {
    fn new(statement: CachedStatement<'t>) -> Self {
        Self { statement, bound: [None; CHUNK] }
    }

    /// Inserts a whole chunk, if it consists of new attempts; otherwise returns false and inserts
    /// nothing.
    fn try_chunk(
        &mut self,
        chunk: &[AttemptRecord],
        group_indices: &[usize],
        groups: &[AttemptGroup<'_>],
    ) -> Result<bool, rusqlite::Error> {
        if chunk.len() < CHUNK || chunk.iter().any(|attempt| attempt.is_price) {
            return Ok(false);
        }
        for (row, (attempt, &group_index)) in chunk.iter().zip(group_indices).enumerate() {
            self.bind(row, attempt, group_index, &groups[group_index])?;
        }
        match self.statement.raw_execute() {
            Ok(_) => Ok(true),
            // One of them is in the file already. SQLite has undone this statement, not the
            // transaction.
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Binds the columns of an attempt to the parameters of a row. Parameters keep their values from
    /// one execution to the next, so the common columns are bound when the group changes.
    fn bind(
        &mut self,
        row: usize,
        attempt: &AttemptRecord,
        group_index: usize,
        AttemptGroup { key_hash, workspace, route, .. }: &AttemptGroup<'_>,
    ) -> Result<(), rusqlite::Error> {
        if self.bound[row].replace(group_index) != Some(group_index) {
            let columns: [&dyn ToSql; COMMON] = [
                &attempt.client.as_str(),
                key_hash,
                workspace,
                &attempt.method.as_str(),
                route,
                &attempt.model.as_deref(),
                &attempt.status,
                &attempt.outcome.word(),
                &attempt.credits_from.word(),
            ];
            self.bind_from(row * COLUMNS + 1, columns)?;
        }
        let mut buffer = Uuid::encode_buffer();
        let id: &str = attempt.id.hyphenated().encode_lower(&mut buffer);
        let columns: [&dyn ToSql; COLUMNS - COMMON] = [
            &id,
            &&*attempt.request_id,
            &attempt.number,
            &timestamp(attempt.started_at),
            &amount(attempt.request_bytes),
            &amount(attempt.response_bytes),
            &attempt.characters.map(amount),
            &attempt.audio.map(millis),
            &attempt.credits_reserved.map(amount),
            &amount(attempt.credits),
            &attempt.first_byte.map(millis),
            &millis(attempt.total),
        ];
        self.bind_from(row * COLUMNS + COMMON + 1, columns)
    }

    fn bind_from<const N: usize>(
        &mut self,
        first: usize,
        columns: [&dyn ToSql; N],
    ) -> Result<(), rusqlite::Error> {
        (first..)
            .zip(columns)
            .try_for_each(|(parameter, column)| self.statement.raw_bind_parameter(parameter, column))
    }
}

/// Writes the price of an attempt that was recorded without one; returns whether there is such an
/// attempt.
fn add_price(transaction: &Transaction<'_>, attempt: &AttemptRecord) -> Result<bool, rusqlite::Error> {
    const PRICE: &str =
        "UPDATE attempts SET credits = ?2, credits_from = ?3 WHERE id = ?1 AND credits_from = ?4";
    let [from, unknown] = [attempt.credits_from, CreditSource::Unknown].map(CreditSource::word);
    let columns = params![attempt.id.to_string(), amount(attempt.credits), from, unknown];
    let updated = transaction.prepare_cached(PRICE)?.execute(columns)?;
    Ok(updated == 1)
}

/// The amounts that a transaction adds to an hour. The number of attempts in a transaction is too
/// small for an overflow.
#[derive(Default, PartialEq, Eq)]
struct HourAmounts {
    attempts: i64,
    served: i64,
    request_bytes: i64,
    response_bytes: i64,
    characters: i64,
    credits: i64,
    unpriced: i64,
    quota_requests: i64,
    quota_credits: i64,
}

impl HourAmounts {
    fn add(&mut self, attempt: &AttemptRecord) {
        self.attempts += 1;
        self.served += i64::from(attempt.status.is_some_and(|status| status < 400));
        self.request_bytes += amount(attempt.request_bytes);
        self.response_bytes += amount(attempt.response_bytes);
        self.characters += amount(attempt.characters.unwrap_or(0));
        self.credits += amount(attempt.credits);
        self.unpriced += i64::from(attempt.credits_from == CreditSource::Unknown);
        self.quota_requests += amount(attempt.quota.requests);
        self.quota_credits += amount(attempt.quota.credits);
    }

    /// Adds the price of an attempt that was counted without one.
    fn add_price(&mut self, attempt: &AttemptRecord) {
        self.credits += amount(attempt.credits);
        self.unpriced -= 1;
        self.quota_credits += amount(attempt.quota.credits) - amount(attempt.quota.replaced);
    }
}

fn add_to_hour(
    transaction: &Transaction<'_>,
    AttemptGroup { first, key_hash, route, sums, .. }: &AttemptGroup<'_>,
) -> Result<(), rusqlite::Error> {
    // A sum stops at 2^53, far above real amounts and still exact in every language.
    let mut statement = transaction.prepare_cached(
        "INSERT INTO hours (hour_ms, key_hash, client, route, model, attempts, served, request_bytes,
            response_bytes, characters, credits, unpriced, quota_requests, quota_credits)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, min(?8, 9007199254740992), min(?9, 9007199254740992),
            min(?10, 9007199254740992), min(?11, 9007199254740992), ?12, ?13, min(?14, 9007199254740992))
         ON CONFLICT DO UPDATE SET
            attempts = attempts + excluded.attempts,
            served = served + excluded.served,
            request_bytes = min(request_bytes + excluded.request_bytes, 9007199254740992),
            response_bytes = min(response_bytes + excluded.response_bytes, 9007199254740992),
            characters = min(characters + excluded.characters, 9007199254740992),
            credits = min(credits + excluded.credits, 9007199254740992),
            unpriced = unpriced + excluded.unpriced,
            quota_requests = quota_requests + excluded.quota_requests,
            quota_credits = min(quota_credits + excluded.quota_credits, 9007199254740992)",
    )?;
    statement.execute(params![
        timestamp(hour_of(first.started_at)),
        key_hash,
        first.client.as_str(),
        route,
        first.model.as_deref().unwrap_or(""),
        sums.attempts,
        sums.served,
        sums.request_bytes,
        sums.response_bytes,
        sums.characters,
        sums.credits,
        sums.unpriced,
        sums.quota_requests,
        sums.quota_credits,
    ])?;
    Ok(())
}

/// Deletes at most `rows_max` of the attempts that began before `oldest`; returns how many.
pub(super) fn delete_some(
    connection: &Connection,
    oldest: UnixMs,
    rows_max: u16,
) -> Result<usize, rusqlite::Error> {
    // Ids begin with the time, so no index is needed to find the rows. The two agree, except for
    // records of an earlier version, one of which may lie slightly beyond the limit.
    const OLD: &str = "DELETE FROM attempts WHERE id IN (
        SELECT id FROM attempts WHERE id < ?1 AND started_at_ms < ?2 LIMIT ?3)";
    let mut first = [0; 16];
    first[..6].copy_from_slice(&first_id(oldest));
    let mut buffer = Uuid::encode_buffer();
    let first: &str = Uuid::from_bytes(first).hyphenated().encode_lower(&mut buffer);
    connection.prepare_cached(OLD)?.execute(params![first, timestamp(oldest), rows_max])
}

/// Deletes all attempts and their outbox rows.
pub(super) fn delete_all(connection: &Connection) -> Result<(), rusqlite::Error> {
    // With a trigger, SQLite would delete row by row, which costs as much as the inserts.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
    let deleted = connection.execute_batch("DELETE FROM attempts; DELETE FROM outbox_events");
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, true)?;
    deleted
}

/// An amount as a column stores it.
fn amount(amount: u64) -> i64 {
    whole(amount).min(AMOUNT_MAX)
}

fn millis(span: std::time::Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}
