//! The writing thread: what is queued goes into one transaction as soon as the last one is done.

use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, ToSql, Transaction, params};
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use super::Health;
use super::read::reason_word;
use crate::clock;
use crate::policy::budget::Extension;
use crate::policy::standing::Park;
use crate::policy::units::UnixMs;
use crate::pool::{KeySnapshot, Pool};
use crate::proxy::{AttemptRecord, Entry};

/// How many records go into one transaction at the most.
const BATCH_MAX: usize = 512;
/// After a failure, how long until the next try.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Writer {
    pub(super) connection: Connection,
    pool: Arc<Pool>,
    health: Health,
    /// Taken from the queue and not yet written.
    pending: Vec<AttemptRecord>,
    pending_max: usize,
    are_keys_stale: bool,
}

impl Writer {
    pub(super) fn new(connection: Connection, pool: Arc<Pool>, health: Health, pending_max: usize) -> Self {
        Self { connection, pool, health, pending: Vec::new(), pending_max, are_keys_stale: true }
    }

    /// Writes until the last sender is gone and everything is written, or cannot be.
    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Entry>) {
        let mut received = Vec::with_capacity(BATCH_MAX);
        loop {
            let waits_for_retry = self.health.is_failing();
            let count = tokio::select! {
                count = queue.recv_many(&mut received, BATCH_MAX) => Some(count),
                () = tokio::time::sleep(RETRY_PAUSE), if waits_for_retry => None,
            };
            received.drain(..).for_each(|entry| self.take(entry));
            let is_over = count == Some(0);
            // A failing disk is asked once a pause, not once a record.
            if !waits_for_retry || count.is_none() || is_over {
                self.flush();
            }
            if is_over {
                self.lose_pending();
                return;
            }
        }
    }

    pub(super) fn take(&mut self, entry: Entry) {
        match entry {
            Entry::KeysChanged => self.are_keys_stale = true,
            Entry::Attempt(record) if self.pending.len() < self.pending_max => self.pending.push(*record),
            Entry::Attempt(_) => {
                self.health.lose(1);
                let lost = self.health.lost();
                // Once per power of two: loud, and not a second flood.
                if lost.is_power_of_two() {
                    error!(
                        lost,
                        "usage records are lost: the books cannot be written and no more can be held"
                    );
                }
            }
        }
    }

    pub(super) fn flush(&mut self) {
        if self.pending.is_empty() && !self.are_keys_stale && !self.health.is_failing() {
            return;
        }
        let written = self.commit();
        let was_failing = self.health.set_failing(written.is_err());
        match written {
            Ok(()) => {
                self.pending.clear();
                self.are_keys_stale = false;
                if was_failing {
                    info!("the books are written again");
                }
            }
            Err(error) if !was_failing => {
                warn!(
                    "the books cannot be written: {error}; requests go on, records are held and written later"
                );
            }
            Err(_) => {}
        }
    }

    fn commit(&mut self) -> Result<(), rusqlite::Error> {
        let now = clock::now();
        // The state is read when it is written: what is in the file is never older than a record.
        let keys = self.pool.snapshot(now);
        let transaction = self.connection.transaction()?;
        for record in &self.pending {
            insert_attempt(&transaction, record)?;
        }
        for key in keys.iter().filter(|key| self.are_keys_stale || is_touched(key, &self.pending)) {
            upsert_key(&transaction, key, now)?;
        }
        transaction.commit()
    }

    fn lose_pending(&self) {
        if !self.pending.is_empty() {
            self.health.lose(self.pending.len() as u64);
            error!(lost = self.health.lost(), "the program ends and usage records could not be written");
        }
    }
}

/// Whether one of the records changed the state of this key: its own, or that of its workspace.
fn is_touched(key: &KeySnapshot, records: &[AttemptRecord]) -> bool {
    records.iter().any(|record| std::ptr::eq(record.key.workspace(), key.key.workspace()))
}

fn insert_attempt(transaction: &Transaction<'_>, record: &AttemptRecord) -> Result<(), rusqlite::Error> {
    let mut statement = transaction.prepare_cached(
        "INSERT OR IGNORE INTO attempts (id, request_id, number, started_at_ms, client, key_hash, workspace, method,
            route, status, verdict, request_bytes, response_bytes, credits, credits_from, first_byte_ms, total_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17)",
    )?;
    statement.execute(params![
        record.id.to_string(),
        &*record.request_id,
        record.number,
        whole(record.started_at.0),
        record.client.as_str(),
        record.key.api_key().fingerprint().to_string(),
        record.key.workspace().name(),
        &*record.method,
        &*record.route,
        record.status,
        record.verdict,
        whole(record.request_bytes),
        whole(record.response_bytes),
        whole(record.credits),
        record.credits_from.word(),
        record.first_byte.map(millis),
        millis(record.total),
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
    let (park, workspace_park) = (key.parked(), key.workspace().parked());
    let columns: [&dyn ToSql; 15] = [
        &key.api_key().fingerprint().to_string(),
        &key.api_key().short().as_str(),
        &key.name(),
        &key.workspace().name(),
        &whole(key.position() as u64),
        &standing.status().word(),
        &whole(quota.count),
        &quota.limit.map(whole),
        &extension,
        &quota.resets_at.map(|at| whole(at.0)),
        &park.map(|park| reason_word(park.reason)),
        &park.map(until),
        &workspace_park.map(|park| reason_word(park.reason)),
        &workspace_park.map(until),
        &whole(now.0),
    ];
    statement.execute(columns.as_slice())?;
    Ok(())
}

fn until(park: Park) -> i64 {
    whole(park.until.0)
}

/// SQLite's integers are signed; no figure here comes near their end.
fn whole(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}

fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}
