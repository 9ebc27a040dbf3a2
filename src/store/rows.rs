//! Writes a transaction: the attempts, one by one or packed, the sums of their hours, and the state
//! of the keys.

use std::collections::{HashMap, HashSet};

use rusqlite::{OptionalExtension, ToSql, Transaction, TransactionBehavior, params};
use uuid::Uuid;

use super::database::Database;
use super::dimensions::{Dimensions, Known};
use super::evidence;
use super::outbox::{self, Mirrored};
use super::owners;
use super::pending::{CommitUncertainty, PendingBatches};
use crate::policy::budget::Extension;
use crate::policy::retention::hour_of;
use crate::policy::units::UnixMs;
use crate::pool::KeySnapshot;
use crate::proxy::{CreditSource, UsageBatch, UsageDimensions, UsageRow};

/// The key hash of attempts with a client's own key.
pub(super) const OWN_KEY: &str = "own";

/// Upper bound of an amount, far above every real one. Larger amounts are cut to it, so that one
/// corrupt record cannot make the sums overflow and keep every other record from being written.
const AMOUNT_MAX: i64 = 1 << 48;
/// Attempts of a commit share rows from this number on: fewer are cheaper, and easier to read, one
/// by one.
const SHARED_FROM: usize = 16;

/// Writes records, owners, refusals, keys and outbox rows in one transaction.
pub(super) fn commit(
    ledger: &mut Database,
    sheets: &[UsageBatch],
    keys: &[KeySnapshot],
    mirrored: Mirrored,
    doubt: &mut CommitUncertainty,
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    let Database { connection, series, refusals, .. } = ledger;
    series.stay_small();
    let committed = (|| {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let written = doubt.written(&transaction)?;
        let attempts = sheets.iter().map(|sheet| sheet.rows().len()).sum();
        if attempts > 0 {
            Attempts::new(&transaction, series, mirrored, written, attempts).insert(sheets)?;
        }
        owners::write(&transaction, sheets, now)?;
        refusals.write(&transaction)?;
        for key in keys {
            upsert_key(&transaction, key, now)?;
            if mirrored != Mirrored::Nothing {
                outbox::put_key(&transaction, key, now)?;
            }
        }
        transaction.commit()
    })();
    match committed {
        Ok(()) => {
            doubt.is_resolved();
            refusals.written();
        }
        Err(_) => {
            // The rolled back series and refusals are not in the file.
            series.clear();
            refusals.forget();
            doubt.arises();
        }
    }
    committed
}

/// Writes the attempts of a transaction.
struct Attempts<'a> {
    transaction: &'a Transaction<'a>,
    series: &'a mut Known,
    mirrored: Mirrored,
    /// Ids that may be in the file already.
    written: HashSet<Uuid>,
    /// The batches of attempts that share rows, if any.
    sheets: Option<PendingBatches>,
    hours: HashMap<(UnixMs, usize), Sums>,
}

/// A series in an hour, and the sums of its attempts.
struct Run {
    hour: UnixMs,
    place: usize,
    sums: Sums,
}

impl<'a> Attempts<'a> {
    fn new(
        transaction: &'a Transaction<'a>,
        series: &'a mut Known,
        mirrored: Mirrored,
        written: HashSet<Uuid>,
        count: usize,
    ) -> Self {
        // The mirror sends attempts one by one, so each needs its own row.
        let is_shared = count >= SHARED_FROM && mirrored != Mirrored::KeysAndEvents;
        let sheets = is_shared.then(PendingBatches::default);
        Self { transaction, series, mirrored, written, sheets, hours: HashMap::new() }
    }

    /// Inserts the attempts that are not in the file yet, and adds them to their hours.
    fn insert(mut self, sheets: &[UsageBatch]) -> Result<(), rusqlite::Error> {
        for sheet in sheets {
            let mut runs: Vec<Option<Run>> = sheet.commons().iter().map(|_| None).collect();
            for row in sheet.rows() {
                let (common, request_id) = sheet.of(row);
                let (Some(common), Some(run)) = (sheet.commons().get(common), runs.get_mut(common)) else {
                    continue;
                };
                if self.written.is_empty() || !self.written.contains(&row.id) {
                    self.insert_one(common, run, row, request_id)?;
                }
            }
            for run in runs.into_iter().flatten() {
                self.end(run);
            }
        }
        if let Some(sheets) = self.sheets {
            sheets.write(self.transaction)?;
        }
        for ((hour, place), sums) in &self.hours {
            add_to_hour(self.transaction, *hour, &self.series[*place], sums)?;
        }
        Ok(())
    }

    fn insert_one(
        &mut self,
        common: &UsageDimensions,
        run: &mut Option<Run>,
        row: &UsageRow,
        request_id: &str,
    ) -> Result<(), rusqlite::Error> {
        if row.is_price
            && let Some(is_priced) = self.is_priced(row.id)?
        {
            return if is_priced { Ok(()) } else { self.complete(common, run, row) };
        }
        let Run { place, sums, .. } = self.run(common, run, row)?;
        // An attempt whose price may come later is then looked up by its id.
        let may_share = common.credits_from != CreditSource::Unknown && !row.is_price;
        let series = self.series[*place].number;
        let shared = self.sheets.as_mut().filter(|_| may_share);
        let is_shared = shared.is_some_and(|sheets| sheets.add(row, request_id, series));
        // A record that is delivered twice counts once.
        if is_shared || self.insert_row(row, request_id, series)? {
            sums.add(common, row);
        }
        Ok(())
    }

    /// The series and the sums of rows in the hour of `row`.
    fn run<'r>(
        &mut self,
        common: &UsageDimensions,
        run: &'r mut Option<Run>,
        row: &UsageRow,
    ) -> Result<&'r mut Run, rusqlite::Error> {
        let hour = hour_of(row.started_at);
        if let Some(before) = run.take_if(|run| run.hour != hour) {
            self.end(before);
        }
        Ok(match run {
            Some(run) => run,
            None => {
                let place = self.series.of(self.transaction, common, hour)?;
                run.insert(Run { hour, place, sums: Sums::default() })
            }
        })
    }

    fn end(&mut self, Run { hour, place, sums }: Run) {
        self.hours.entry((hour, place)).or_default().add_all(&sums);
    }

    /// Inserts a row of its own; returns whether it was missing.
    fn insert_row(&self, row: &UsageRow, request_id: &str, series: i64) -> Result<bool, rusqlite::Error> {
        let mut statement = self.transaction.prepare_cached(
            "INSERT OR IGNORE INTO attempt_rows (id, request_id, series, number, started_at_ms, request_bytes,
                response_bytes, characters, credits_reserved, credits, first_byte_ms, total_ms, audio_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
        )?;
        let inserted = statement.execute(params![
            &row.id.as_bytes()[..],
            request_id,
            series,
            row.number,
            moment(row.started_at),
            amount(row.request_bytes),
            amount(row.response_bytes),
            row.characters.map(amount),
            row.credits_reserved.map(amount),
            amount(row.credits),
            row.first_byte_ms.map(whole),
            whole(row.total_ms),
            row.audio_ms.map(whole),
        ])?;
        if inserted == 1 && self.mirrored == Mirrored::KeysAndEvents {
            outbox::put_event(self.transaction, row.id.as_bytes())?;
        }
        Ok(inserted == 1)
    }

    /// Whether a stored attempt has a price; `None` if there is no such attempt.
    fn is_priced(&self, id: Uuid) -> Result<Option<bool>, rusqlite::Error> {
        const FROM: &str =
            "SELECT credits_from <> ?2 FROM attempt_rows JOIN series ON series.number = attempt_rows.series
            WHERE id = ?1";
        self.transaction
            .prepare_cached(FROM)?
            .query_row(params![&id.as_bytes()[..], CreditSource::Unknown.word()], |row| row.get(0))
            .optional()
    }

    /// Writes the price of an attempt that had none.
    fn complete(
        &mut self,
        common: &UsageDimensions,
        run: &mut Option<Run>,
        row: &UsageRow,
    ) -> Result<(), rusqlite::Error> {
        let Run { place, sums, .. } = self.run(common, run, row)?;
        self.transaction
            .prepare_cached("UPDATE attempt_rows SET credits = ?1, series = ?2 WHERE id = ?3")?
            .execute(params![amount(row.credits), self.series[*place].number, &row.id.as_bytes()[..]])?;
        sums.complete(row);
        if self.mirrored == Mirrored::KeysAndEvents {
            outbox::put_event_again(self.transaction, row.id.as_bytes())?;
        }
        Ok(())
    }
}

/// The amounts that a transaction adds to an hour. The number of attempts in a transaction is too
/// small for an overflow.
#[derive(Default)]
struct Sums {
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

impl Sums {
    /// Adds the price of an attempt that was counted without one.
    fn complete(&mut self, row: &UsageRow) {
        self.credits += amount(row.credits);
        self.unpriced -= 1;
        self.quota_credits += amount(row.quota.credits) - amount(row.quota.replaced);
    }

    fn add(&mut self, common: &UsageDimensions, row: &UsageRow) {
        self.attempts += 1;
        self.served += i64::from(common.status.is_some_and(|status| status < 400));
        self.request_bytes += amount(row.request_bytes);
        self.response_bytes += amount(row.response_bytes);
        self.characters += amount(row.characters.unwrap_or(0));
        self.credits += amount(row.credits);
        self.unpriced += i64::from(common.credits_from == CreditSource::Unknown);
        self.quota_requests += amount(row.quota.requests);
        self.quota_credits += amount(row.quota.credits);
    }

    fn add_all(&mut self, other: &Self) {
        self.attempts += other.attempts;
        self.served += other.served;
        self.request_bytes += other.request_bytes;
        self.response_bytes += other.response_bytes;
        self.characters += other.characters;
        self.credits += other.credits;
        self.unpriced += other.unpriced;
        self.quota_requests += other.quota_requests;
        self.quota_credits += other.quota_credits;
    }
}

fn add_to_hour(
    transaction: &Transaction<'_>,
    hour: UnixMs,
    series: &Dimensions,
    sums: &Sums,
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
        moment(hour),
        series.key_hash,
        series.client.as_str(),
        series.route_text,
        series.model.as_deref().unwrap_or(""),
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

fn upsert_key(transaction: &Transaction<'_>, seen: &KeySnapshot, now: UnixMs) -> Result<(), rusqlite::Error> {
    let mut statement = transaction.prepare_cached(
        "INSERT INTO keys (key_hash, short_key, name, workspace, position, status, character_count, character_limit,
            extension, resets_at_ms, evidence, updated_at_ms, plan)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
         ON CONFLICT DO UPDATE SET
            short_key = excluded.short_key, name = excluded.name, workspace = excluded.workspace,
            position = excluded.position, status = excluded.status, character_count = excluded.character_count,
            character_limit = excluded.character_limit, extension = excluded.extension,
            resets_at_ms = excluded.resets_at_ms, evidence = excluded.evidence,
            updated_at_ms = excluded.updated_at_ms, plan = excluded.plan",
    )?;
    let KeySnapshot { key, quota, state, of_key, of_workspace, .. } = seen;
    let extension: Option<i64> = match quota.extension {
        Extension::None => None,
        Extension::Credits(more) => Some(whole(more)),
        Extension::Unlimited => Some(-1),
    };
    let belonging = key.workspace().membership();
    let tier = key.workspace().tier();
    let columns: [&dyn ToSql; 13] = [
        &key.api_key().fingerprint().to_string(),
        &key.api_key().short().as_str(),
        &key.name(),
        &belonging.name(),
        &whole(key.position() as u64),
        &state.status().word(),
        &whole(quota.count),
        &quota.limit.map(whole),
        &extension,
        &quota.resets_at.map(moment),
        &evidence::write(of_key, of_workspace),
        &moment(now),
        &tier.as_ref().map(|tier| tier.as_str()),
    ];
    statement.execute(columns.as_slice())?;
    Ok(())
}

/// A time as a column stores it, in Unix milliseconds.
pub(super) fn moment(at: UnixMs) -> i64 {
    whole(at.0)
}

/// An amount as a column stores it.
pub(super) fn amount(amount: u64) -> i64 {
    whole(amount).min(AMOUNT_MAX)
}

/// Converts to SQLite's signed integers.
pub(super) fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
