//! Writes the attempts of a transaction: inserts a row into `attempts` for each, adds their amounts to the sums by
//! hour, day and user, puts their events into the outbox, and adds prices that are reported later. Deletes the attempts
//! whose retention has ended, or all attempts of an in-memory database.
//!
//! The id of an attempt is the primary key of its row. A record whose commit had an unknown result can
//! therefore be written again without changing the rows or the sums.

pub(super) mod migration;

use std::collections::HashMap;
use std::sync::LazyLock;

use http::Method;
use rusqlite::config::DbConfig;
use rusqlite::{CachedStatement, Connection, ErrorCode, ToSql, Transaction, params};
use uuid::Uuid;

use super::columns::{integer, timestamp};
use super::days::{self, SumsRow};
use super::outbox::{self, MirrorScope};
use super::users::UserSums;
use crate::elevenlabs::endpoint::Route;
use crate::elevenlabs::region::region_of_host;
use crate::policy::outcome::Outcome;
use crate::policy::retention::{start_of_hour, uuid_prefix};
use crate::policy::units::UnixMs;
use crate::pool::Key;
use crate::proxy::{AttemptRecord, CreditSource};

/// The value of `key_hash` for attempts with a client's own key.
const OWN_KEY_HASH: &str = "own";

/// Maximum stored amount, far above every real one. Larger amounts are reduced to it, because otherwise one
/// corrupt record could overflow the sums and prevent the other records from being written.
const MAX_AMOUNT: i64 = 1 << 48;

/// The table and its columns in an `INSERT` statement: first the columns that the attempts of a group have in common,
/// then the remaining columns.
const INSERTED_COLUMNS: &str =
    "attempts (client, key_hash, workspace, method, route, model, status, verdict, credits_from,
    region, id, request_id, number, started_at_ms, request_bytes, response_bytes, characters, audio_ms,
    credits_reserved, credits, first_byte_ms, total_ms, user) VALUES ";
const COMMON_COLUMN_COUNT: usize = 10;
const COLUMN_COUNT: usize = COMMON_COLUMN_COUNT + 13;

/// Number of rows that one statement inserts. Compared with one statement per row, this saves a tenth of the work per
/// row.
const ROWS_PER_INSERT: usize = 8;

/// Inserts the attempts that are not in the file yet, and adds their amounts to the sums. Sets the prices of attempts
/// that were written without a price.
pub(super) fn write(
    transaction: &Transaction<'_>,
    attempts: &[AttemptRecord],
    mirror_scope: MirrorScope,
) -> Result<(), rusqlite::Error> {
    let row = format!("({}?)", "?, ".repeat(COLUMN_COUNT - 1));
    let rows = [&*row; ROWS_PER_INSERT].join(", ");
    let insert_rows = transaction.prepare_cached(&format!("INSERT INTO {INSERTED_COLUMNS}{rows}"))?;
    let insert_row = transaction.prepare_cached(&format!("INSERT OR IGNORE INTO {INSERTED_COLUMNS}{row}"))?;
    let [mut insert_rows, mut insert_row] = [insert_rows, insert_row].map(Insert::new);
    let (mut groups, group_indices) = group_by_common_columns(attempts);
    let mut user_sums = UserSums::default();
    for (chunk, group_indices) in attempts.chunks(ROWS_PER_INSERT).zip(group_indices.chunks(ROWS_PER_INSERT))
    {
        let are_inserted = insert_rows.try_insert_chunk(chunk, group_indices, &groups)?;
        for (attempt, &group_index) in chunk.iter().zip(group_indices) {
            let group = &mut groups[group_index];
            if attempt.is_price_update && add_price(transaction, attempt)? {
                group.amounts.add_price(attempt);
                user_sums.amounts_for(attempt).add_price(attempt);
                if mirror_scope == MirrorScope::KeysAndEvents {
                    outbox::put_changed_event(transaction, &attempt.id.to_string())?;
                }
                continue;
            }
            if !are_inserted {
                insert_row.bind(0, attempt, group_index, group)?;
                if insert_row.statement.raw_execute()? == 0 {
                    continue;
                }
            }
            group.amounts.add(attempt);
            user_sums.amounts_for(attempt).add(attempt);
            if mirror_scope == MirrorScope::KeysAndEvents {
                outbox::put_event(transaction, &attempt.id.to_string())?;
            }
        }
    }
    let next_hour = days::next_hour(transaction)?;
    // A group has no amounts if all its attempts were in the file already.
    for group in groups.iter().filter(|group| group.amounts != HourAmounts::default()) {
        add_to_hour(transaction, &group.sums_row(), &group.amounts)?;
        days::add_late_amounts(transaction, &group.sums_row(), &group.amounts, next_hour)?;
    }
    user_sums.write(transaction)
}

/// The columns that the attempts of a group have in common. Keys are compared by their addresses. After a reload a key
/// may have another address, and both groups then add to the same sums in the file.
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
    region: &'a str,
}

/// Attempts with the same common columns. Their text columns are formatted once, and their amounts are added
/// to their hour together.
struct AttemptGroup<'a> {
    first: &'a AttemptRecord,
    key_hash: String,
    workspace: Option<String>,
    route: String,
    amounts: HourAmounts,
}

/// Returns the groups of the attempts, and for each attempt the index of its group.
fn group_by_common_columns(attempts: &[AttemptRecord]) -> (Vec<AttemptGroup<'_>>, Vec<usize>) {
    let (mut groups, mut indices) = (Vec::new(), HashMap::new());
    let group_index = |attempt| {
        *indices.entry(CommonColumns::new(attempt)).or_insert_with(|| {
            groups.push(AttemptGroup::new(attempt));
            groups.len() - 1
        })
    };
    let group_indices = attempts.iter().map(group_index).collect();
    (groups, group_indices)
}

impl<'a> CommonColumns<'a> {
    fn new(attempt: &'a AttemptRecord) -> Self {
        Self {
            hour: start_of_hour(attempt.started_at),
            key: attempt.key.as_deref().map(std::ptr::from_ref),
            client: attempt.client.as_str(),
            method: &attempt.method,
            route: attempt.route,
            model: attempt.model.as_deref(),
            status: attempt.status,
            outcome: attempt.outcome,
            credits_from: attempt.credits_from,
            region: region_of_host(attempt.authority.host()),
        }
    }
}

impl<'a> AttemptGroup<'a> {
    fn new(first: &'a AttemptRecord) -> Self {
        let key = first.key.as_ref();
        let membership = key.map(|key| key.workspace().membership());
        Self {
            first,
            key_hash: key
                .map_or_else(|| OWN_KEY_HASH.to_owned(), |key| key.api_key().fingerprint().to_string()),
            workspace: membership.and_then(|membership| membership.name().map(str::to_owned)),
            route: first.route.to_string(),
            amounts: HourAmounts::default(),
        }
    }

    /// Returns the columns that identify the sums to which the attempts are added.
    fn sums_row(&self) -> SumsRow<'_> {
        SumsRow {
            hour: start_of_hour(self.first.started_at),
            key_hash: &self.key_hash,
            client: self.first.client.as_str(),
            route: &self.route,
            model: self.first.model.as_deref().unwrap_or(""),
        }
    }
}

/// A prepared statement that inserts one or more rows.
struct Insert<'t> {
    statement: CachedStatement<'t>,
    /// For each row of the statement, the index of the group whose common columns are bound, or `None` if no columns
    /// are bound yet.
    bound_groups: [Option<usize>; ROWS_PER_INSERT],
}

impl<'t> Insert<'t> {
    fn new(statement: CachedStatement<'t>) -> Self {
        Self { statement, bound_groups: [None; ROWS_PER_INSERT] }
    }

    /// Inserts a whole chunk of new attempts. Returns false without inserting anything if the chunk is too
    /// short, contains a price update, or contains an attempt that is in the file already.
    fn try_insert_chunk(
        &mut self,
        chunk: &[AttemptRecord],
        group_indices: &[usize],
        groups: &[AttemptGroup<'_>],
    ) -> Result<bool, rusqlite::Error> {
        if chunk.len() < ROWS_PER_INSERT || chunk.iter().any(|attempt| attempt.is_price_update) {
            return Ok(false);
        }
        for (row, (attempt, &group_index)) in chunk.iter().zip(group_indices).enumerate() {
            self.bind(row, attempt, group_index, &groups[group_index])?;
        }
        match self.statement.raw_execute() {
            Ok(_) => Ok(true),
            // An attempt is in the file already. SQLite has undone this statement, but not the transaction.
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Binds the columns of an attempt to the parameters of a row. Parameters keep their values between
    /// executions, so the common columns are only bound when the group changes.
    fn bind(
        &mut self,
        row: usize,
        attempt: &AttemptRecord,
        group_index: usize,
        AttemptGroup { key_hash, workspace, route, .. }: &AttemptGroup<'_>,
    ) -> Result<(), rusqlite::Error> {
        if self.bound_groups[row].replace(group_index) != Some(group_index) {
            let columns: [&dyn ToSql; COMMON_COLUMN_COUNT] = [
                &attempt.client.as_str(),
                key_hash,
                workspace,
                &attempt.method.as_str(),
                route,
                &attempt.model.as_deref(),
                &attempt.status,
                &attempt.outcome.as_str(),
                &attempt.credits_from.as_str(),
                &region_of_host(attempt.authority.host()),
            ];
            self.bind_columns(row * COLUMN_COUNT + 1, columns)?;
        }
        let mut buffer = Uuid::encode_buffer();
        let id: &str = attempt.id.hyphenated().encode_lower(&mut buffer);
        let user = attempt.user.as_ref().map(|user| user.fingerprint().to_string());
        let columns: [&dyn ToSql; COLUMN_COUNT - COMMON_COLUMN_COUNT] = [
            &id,
            &&*attempt.request_id,
            &attempt.number,
            &timestamp(attempt.started_at),
            &amount(attempt.request_bytes),
            &amount(attempt.response_bytes),
            &attempt.characters.map(amount),
            &attempt.audio.map(milliseconds),
            &attempt.credits_reserved.map(amount),
            &amount(attempt.credits),
            &attempt.first_byte.map(milliseconds),
            &milliseconds(attempt.total),
            &user,
        ];
        self.bind_columns(row * COLUMN_COUNT + COMMON_COLUMN_COUNT + 1, columns)
    }

    fn bind_columns<const N: usize>(
        &mut self,
        first_parameter: usize,
        columns: [&dyn ToSql; N],
    ) -> Result<(), rusqlite::Error> {
        (first_parameter..)
            .zip(columns)
            .try_for_each(|(parameter, column)| self.statement.raw_bind_parameter(parameter, column))
    }
}

/// Sets the price of an attempt that was written without a price. Returns false if no such attempt is in the file.
fn add_price(transaction: &Transaction<'_>, attempt: &AttemptRecord) -> Result<bool, rusqlite::Error> {
    const SET_PRICE: &str =
        "UPDATE attempts SET credits = ?2, credits_from = ?3 WHERE id = ?1 AND credits_from = ?4";
    let parameters = params![
        attempt.id.to_string(),
        amount(attempt.credits),
        attempt.credits_from.as_str(),
        CreditSource::Unknown.as_str()
    ];
    Ok(transaction.prepare_cached(SET_PRICE)?.execute(parameters)? == 1)
}

/// The amounts that a transaction adds to the sums of an hour, in the columns [`SUM_COLUMNS`]. A transaction has too
/// few attempts for an overflow.
#[derive(Default, PartialEq, Eq)]
pub(super) struct HourAmounts {
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
    pub(super) fn add(&mut self, attempt: &AttemptRecord) {
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

    /// Returns the amounts in the order of [`SUM_COLUMNS`].
    pub(super) fn columns(&self) -> [i64; SUM_COLUMNS.len()] {
        [
            self.attempts,
            self.served,
            self.request_bytes,
            self.response_bytes,
            self.characters,
            self.credits,
            self.unpriced,
            self.quota_requests,
            self.quota_credits,
        ]
    }

    /// Adds the price of an attempt that was counted without a price.
    pub(super) fn add_price(&mut self, attempt: &AttemptRecord) {
        self.credits += amount(attempt.credits);
        self.unpriced -= 1;
        self.quota_credits += amount(attempt.quota.credits) - amount(attempt.quota.replaced);
    }
}

/// The columns of `hours` and of `user_hours` that are sums.
pub(super) const SUM_COLUMNS: [&str; 9] = [
    "attempts",
    "served",
    "request_bytes",
    "response_bytes",
    "characters",
    "credits",
    "unpriced",
    "quota_requests",
    "quota_credits",
];

/// The `ON CONFLICT` clause that adds the inserted sums to the sums of an existing row. Sums are limited to
/// 2^53, which is far above real amounts and exact as a floating-point number.
pub(super) static ADD_SUMS: LazyLock<String> = LazyLock::new(|| {
    let sums =
        SUM_COLUMNS.map(|column| format!("{column} = min({column} + excluded.{column}, 9007199254740992)"));
    format!("ON CONFLICT DO UPDATE SET {}", sums.join(", "))
});

/// The statement that adds amounts to a row of `hours`. Parameters 1 to 5 identify the row, and parameters 6 to 14 are
/// the amounts.
static ADD_TO_HOUR: LazyLock<String> = LazyLock::new(|| {
    let columns = SUM_COLUMNS.join(", ");
    let limited_sums = (6..15).map(|parameter| format!("min(?{parameter}, 9007199254740992)"));
    let values = limited_sums.collect::<Vec<_>>().join(", ");
    format!(
        "INSERT INTO hours (hour_ms, key_hash, client, route, model, {columns})
         VALUES (?1, ?2, ?3, ?4, ?5, {values}) {}",
        *ADD_SUMS
    )
});

fn add_to_hour(
    transaction: &Transaction<'_>,
    SumsRow { hour, key_hash, client, route, model }: &SumsRow<'_>,
    amounts: &HourAmounts,
) -> Result<(), rusqlite::Error> {
    let mut statement = transaction.prepare_cached(&ADD_TO_HOUR)?;
    let key_columns: [&dyn ToSql; 5] = [&timestamp(*hour), key_hash, client, route, model];
    for (parameter, column) in (1..).zip(key_columns) {
        statement.raw_bind_parameter(parameter, column)?;
    }
    for (parameter, sum) in (key_columns.len() + 1..).zip(amounts.columns()) {
        statement.raw_bind_parameter(parameter, sum)?;
    }
    statement.raw_execute()?;
    Ok(())
}

/// Deletes at most `max_rows` attempts that started before `oldest`, and returns their number.
pub(super) fn delete_older(
    connection: &Connection,
    oldest: UnixMs,
    max_rows: u16,
) -> Result<usize, rusqlite::Error> {
    // Ids start with a time, so the primary key is an index by time. In records of earlier versions this time
    // may differ slightly from `started_at_ms`, so both are compared.
    const DELETE_OLDER: &str = "DELETE FROM attempts WHERE id IN (
        SELECT id FROM attempts WHERE id < ?1 AND started_at_ms < ?2 LIMIT ?3)";
    let mut id = [0; 16];
    id[..6].copy_from_slice(&uuid_prefix(oldest));
    let first_kept_id = Uuid::from_bytes(id).to_string();
    connection.prepare_cached(DELETE_OLDER)?.execute(params![first_kept_id, timestamp(oldest), max_rows])
}

/// Deletes all attempts and their outbox rows.
pub(super) fn delete_all(connection: &Connection) -> Result<(), rusqlite::Error> {
    // With the trigger of the table, SQLite would delete each row separately, which costs as much as inserting it.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
    let deletion = connection.execute_batch("DELETE FROM attempts; DELETE FROM outbox_events");
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, true)?;
    deletion
}

/// Converts an amount to the integer in its column, at most [`MAX_AMOUNT`].
fn amount(amount: u64) -> i64 {
    integer(amount).min(MAX_AMOUNT)
}

fn milliseconds(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
