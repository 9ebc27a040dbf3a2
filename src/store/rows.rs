//! What is written: one row an attempt, the sums of its hour in the same transaction, and the state
//! of the keys.

use std::time::Duration;

use rusqlite::{Connection, ToSql, Transaction, TransactionBehavior, params};

use super::outbox::{self, Mirrored};
use super::owners;
use super::read::reason_word;
use crate::policy::budget::Extension;
use crate::policy::retention::hour_of;
use crate::policy::standing::Park;
use crate::policy::units::UnixMs;
use crate::pool::KeySnapshot;
use crate::proxy::{AttemptRecord, CreditSource, Ownership};

/// What stands in the place of a key's hash when a client has brought its own key.
pub(super) const OWN_KEY: &str = "own";

/// No honest figure comes near it. Larger ones are cut to it, so that one mad record cannot make
/// the sums overflow and keep every other from being written.
const AMOUNT_MAX: i64 = 1 << 48;

/// Writes records, owners and keys, and what the mirror is to be told of them, all of it or nothing.
pub(super) fn commit<'a>(
    connection: &mut Connection,
    records: &[AttemptRecord],
    owners: &[Ownership],
    keys: impl Iterator<Item = &'a KeySnapshot>,
    mirrored: Mirrored,
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for record in records {
        // A record that is delivered twice counts once.
        if insert_attempt(&transaction, record)? {
            add_to_hour(&transaction, record)?;
            if mirrored == Mirrored::KeysAndEvents {
                outbox::put_event(&transaction, &record.id.to_string())?;
            }
        }
    }
    owners::write(&transaction, owners)?;
    for key in keys {
        upsert_key(&transaction, key, now)?;
        if mirrored != Mirrored::Nothing {
            outbox::put_key(&transaction, key, now)?;
        }
    }
    transaction.commit()
}

/// Returns whether it was not there yet.
fn insert_attempt(transaction: &Transaction<'_>, record: &AttemptRecord) -> Result<bool, rusqlite::Error> {
    let mut statement = transaction.prepare_cached(
        "INSERT OR IGNORE INTO attempts (id, request_id, number, started_at_ms, client, key_hash, workspace, method,
            route, model, status, verdict, request_bytes, response_bytes, characters, credits_reserved, credits,
            credits_from, first_byte_ms, total_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20)",
    )?;
    let inserted = statement.execute(params![
        record.id.to_string(),
        &*record.request_id,
        record.number,
        moment(record.started_at),
        record.client.as_str(),
        key_hash(record),
        record
            .key
            .as_ref()
            .map(|key| key.workspace().belonging())
            .as_ref()
            .and_then(|belonging| belonging.name()),
        &*record.method,
        &*record.route,
        record.model.as_deref(),
        record.status,
        record.verdict,
        amount(record.request_bytes),
        amount(record.response_bytes),
        record.characters.map(amount),
        record.credits_reserved.map(amount),
        amount(record.credits),
        record.credits_from.word(),
        record.first_byte.map(millis),
        millis(record.total),
    ])?;
    Ok(inserted == 1)
}

/// The hash of the pool's key that was asked with; of a client's own, nothing is written down.
fn key_hash(record: &AttemptRecord) -> String {
    match &record.key {
        Some(key) => key.api_key().fingerprint().to_string(),
        None => OWN_KEY.to_owned(),
    }
}

fn add_to_hour(transaction: &Transaction<'_>, record: &AttemptRecord) -> Result<(), rusqlite::Error> {
    // A sum stops at 2^53, where it is far beyond anything true and still exact in every language.
    let mut statement = transaction.prepare_cached(
        "INSERT INTO hours (hour_ms, key_hash, client, route, model, attempts, served, request_bytes,
            response_bytes, characters, credits, unpriced)
         VALUES (?1, ?2, ?3, ?4, ?5, 1, ?6, ?7, ?8, ?9, ?10, ?11)
         ON CONFLICT DO UPDATE SET
            attempts = attempts + 1,
            served = served + excluded.served,
            request_bytes = min(request_bytes + excluded.request_bytes, 9007199254740992),
            response_bytes = min(response_bytes + excluded.response_bytes, 9007199254740992),
            characters = min(characters + excluded.characters, 9007199254740992),
            credits = min(credits + excluded.credits, 9007199254740992),
            unpriced = unpriced + excluded.unpriced",
    )?;
    statement.execute(params![
        moment(hour_of(record.started_at)),
        key_hash(record),
        record.client.as_str(),
        &*record.route,
        record.model.as_deref().unwrap_or(""),
        record.status.is_some_and(|status| status < 400),
        amount(record.request_bytes),
        amount(record.response_bytes),
        amount(record.characters.unwrap_or(0)),
        amount(record.credits),
        record.credits_from == CreditSource::Unknown,
    ])?;
    Ok(())
}

fn upsert_key(transaction: &Transaction<'_>, seen: &KeySnapshot, now: UnixMs) -> Result<(), rusqlite::Error> {
    let mut statement = transaction.prepare_cached(
        "INSERT OR REPLACE INTO keys (key_hash, short_key, name, workspace, position, status, character_count,
            character_limit, extension, resets_at_ms, park_reason, park_until_ms, workspace_park_reason,
            workspace_park_until_ms, updated_at_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
    )?;
    let KeySnapshot { key, quota, standing, .. } = seen;
    let extension: Option<i64> = match quota.extension {
        Extension::None => None,
        Extension::Credits(more) => Some(whole(more)),
        Extension::Unlimited => Some(-1),
    };
    let belonging = key.workspace().belonging();
    let (park, workspace_park) = (key.parked(), key.workspace().parked());
    let columns: [&dyn ToSql; 15] = [
        &key.api_key().fingerprint().to_string(),
        &key.api_key().short().as_str(),
        &key.name(),
        &belonging.name(),
        &whole(key.position() as u64),
        &standing.status().word(),
        &whole(quota.count),
        &quota.limit.map(whole),
        &extension,
        &quota.resets_at.map(moment),
        &park.map(|park| reason_word(park.reason)),
        &park.map(until),
        &workspace_park.map(|park| reason_word(park.reason)),
        &workspace_park.map(until),
        &moment(now),
    ];
    statement.execute(columns.as_slice())?;
    Ok(())
}

fn until(park: Park) -> i64 {
    moment(park.until)
}

/// A moment as a column has it.
pub(super) fn moment(at: UnixMs) -> i64 {
    whole(at.0)
}

fn amount(amount: u64) -> i64 {
    whole(amount).min(AMOUNT_MAX)
}

/// SQLite's integers are signed.
fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}
