//! What is written: one row an attempt, the sums of its hour in the same transaction, and the state
//! of the keys.

use std::collections::HashMap;
use std::time::Duration;

use rusqlite::{ToSql, Transaction, TransactionBehavior, params};

use super::ledger::Ledger;
use super::outbox::{self, Mirrored};
use super::owners;
use super::read::reason_word;
use super::series::{Known, Series};
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
pub(super) fn commit(
    ledger: &mut Ledger,
    records: &[AttemptRecord],
    owners: &[Ownership],
    keys: &[KeySnapshot],
    mirrored: Mirrored,
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    let Ledger { connection, series, .. } = ledger;
    series.stay_small();
    let committed = (|| {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        insert_attempts(&transaction, series, records, mirrored)?;
        owners::write(&transaction, owners, now)?;
        for key in keys {
            upsert_key(&transaction, key, now)?;
            if mirrored != Mirrored::Nothing {
                outbox::put_key(&transaction, key, now)?;
            }
        }
        transaction.commit()
    })();
    if committed.is_err() {
        // What it has put there is not there.
        series.clear();
    }
    committed
}

/// Inserts the attempts that are not there yet, and adds them to their hours.
fn insert_attempts(
    transaction: &Transaction<'_>,
    series: &mut Known,
    records: &[AttemptRecord],
    mirrored: Mirrored,
) -> Result<(), rusqlite::Error> {
    let mut hours: HashMap<(UnixMs, usize), Sums> = HashMap::new();
    let mut statement = transaction.prepare_cached(
        "INSERT OR IGNORE INTO attempt_rows (id, request_id, series, number, started_at_ms, request_bytes,
            response_bytes, characters, credits_reserved, credits, first_byte_ms, total_ms, audio_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
    )?;
    for record in records {
        let place = series.of(transaction, record)?;
        let inserted = statement.execute(params![
            &record.id.as_bytes()[..],
            &*record.request_id,
            series[place].number,
            record.number,
            moment(record.started_at),
            amount(record.request_bytes),
            amount(record.response_bytes),
            record.characters.map(amount),
            record.credits_reserved.map(amount),
            amount(record.credits),
            record.first_byte.map(millis),
            millis(record.total),
            record.audio.map(millis),
        ])?;
        // A record that is delivered twice counts once.
        if inserted == 1 {
            hours.entry((hour_of(record.started_at), place)).or_default().add(record);
            if mirrored == Mirrored::KeysAndEvents {
                outbox::put_event(transaction, record.id.as_bytes())?;
            }
        } else if record.credits_from == CreditSource::Answer
            && complete(transaction, record, series[place].number)?
        {
            hours.entry((hour_of(record.started_at), place)).or_default().complete(record);
        }
    }
    for ((hour, place), sums) in hours {
        add_to_hour(transaction, hour, &series[place], &sums)?;
    }
    Ok(())
}

/// Writes the price of an attempt that had none; whether it had none.
fn complete(
    transaction: &Transaction<'_>,
    record: &AttemptRecord,
    series: i64,
) -> Result<bool, rusqlite::Error> {
    let mut statement = transaction.prepare_cached(
        "UPDATE attempt_rows SET credits = ?1, series = ?2
         WHERE id = ?3 AND (SELECT credits_from FROM series WHERE number = attempt_rows.series) = ?4",
    )?;
    let changed = statement.execute(params![
        amount(record.credits),
        series,
        &record.id.as_bytes()[..],
        CreditSource::Unknown.word(),
    ])?;
    Ok(changed == 1)
}

/// What a transaction adds to an hour. It cannot overflow: so many attempts are not in one.
#[derive(Default)]
struct Sums {
    attempts: i64,
    served: i64,
    request_bytes: i64,
    response_bytes: i64,
    characters: i64,
    credits: i64,
    unpriced: i64,
}

impl Sums {
    /// What the attempt was counted with before, it had no price.
    fn complete(&mut self, record: &AttemptRecord) {
        self.credits += amount(record.credits);
        self.unpriced -= 1;
    }

    fn add(&mut self, record: &AttemptRecord) {
        self.attempts += 1;
        self.served += i64::from(record.status.is_some_and(|status| status < 400));
        self.request_bytes += amount(record.request_bytes);
        self.response_bytes += amount(record.response_bytes);
        self.characters += amount(record.characters.unwrap_or(0));
        self.credits += amount(record.credits);
        self.unpriced += i64::from(record.credits_from == CreditSource::Unknown);
    }
}

fn add_to_hour(
    transaction: &Transaction<'_>,
    hour: UnixMs,
    series: &Series,
    sums: &Sums,
) -> Result<(), rusqlite::Error> {
    // A sum stops at 2^53, where it is far beyond anything true and still exact in every language.
    let mut statement = transaction.prepare_cached(
        "INSERT INTO hours (hour_ms, key_hash, client, route, model, attempts, served, request_bytes,
            response_bytes, characters, credits, unpriced)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, min(?8, 9007199254740992), min(?9, 9007199254740992),
            min(?10, 9007199254740992), min(?11, 9007199254740992), ?12)
         ON CONFLICT DO UPDATE SET
            attempts = attempts + excluded.attempts,
            served = served + excluded.served,
            request_bytes = min(request_bytes + excluded.request_bytes, 9007199254740992),
            response_bytes = min(response_bytes + excluded.response_bytes, 9007199254740992),
            characters = min(characters + excluded.characters, 9007199254740992),
            credits = min(credits + excluded.credits, 9007199254740992),
            unpriced = unpriced + excluded.unpriced",
    )?;
    statement.execute(params![
        moment(hour),
        series.key_hash,
        series.client.as_str(),
        &*series.route,
        series.model.as_deref().unwrap_or(""),
        sums.attempts,
        sums.served,
        sums.request_bytes,
        sums.response_bytes,
        sums.characters,
        sums.credits,
        sums.unpriced,
    ])?;
    Ok(())
}

fn upsert_key(transaction: &Transaction<'_>, seen: &KeySnapshot, now: UnixMs) -> Result<(), rusqlite::Error> {
    let mut statement = transaction.prepare_cached(
        "INSERT INTO keys (key_hash, short_key, name, workspace, position, status, character_count, character_limit,
            extension, resets_at_ms, park_reason, park_until_ms, workspace_park_reason, workspace_park_until_ms,
            updated_at_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)
         ON CONFLICT DO UPDATE SET
            short_key = excluded.short_key, name = excluded.name, workspace = excluded.workspace,
            position = excluded.position, status = excluded.status, character_count = excluded.character_count,
            character_limit = excluded.character_limit, extension = excluded.extension,
            resets_at_ms = excluded.resets_at_ms, park_reason = excluded.park_reason,
            park_until_ms = excluded.park_until_ms, workspace_park_reason = excluded.workspace_park_reason,
            workspace_park_until_ms = excluded.workspace_park_until_ms, updated_at_ms = excluded.updated_at_ms",
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
