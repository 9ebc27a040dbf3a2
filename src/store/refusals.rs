//! Stores and reads the refusals from which the pool computes restrictions: one row per active restriction. A
//! restriction makes the pool try a key last for requests like the refused one. The restrictions are not stored,
//! because a later version may derive different restrictions from the same refusals. `shared` sends refusals to other
//! replicas in the same JSON.

mod document;

use std::collections::HashSet;

use rusqlite::{Connection, Transaction, params};

use super::columns::{integer, timestamp};
use crate::policy::units::UnixMs;
use crate::pool::{MAX_RESTRICTIONS, RefusalRecord, Restriction, Restrictions};

/// The migration that adds the table.
pub(super) const TABLE: &str = "
    -- The refusals that restrict plans, workspaces and keys: at most 1,024 rows.
    CREATE TABLE refusals (
        -- number of the restriction in the run of the program that wrote it
        number INTEGER PRIMARY KEY,
        refused_at_ms INTEGER NOT NULL,
        -- JSON
        refusal TEXT NOT NULL
    ) STRICT;

    -- The name of the plan of its workspace, if the provider has reported it.
    ALTER TABLE keys ADD COLUMN plan TEXT;
    ";

/// Tracks which of the pool's restrictions are in the file, so that a transaction only writes the changes.
#[derive(Debug, Default)]
pub(super) struct RefusalRows {
    /// The rows in the file. `None` if they are unknown, so that the next transaction replaces all of them.
    written: Option<WrittenRows>,
    /// The change that the next transaction writes. `None` if the rows are up to date.
    prepared: Option<RefusalChange>,
}

/// The rows in the file.
#[derive(Debug)]
struct WrittenRows {
    /// The version of the pool's restrictions from which the rows were written.
    version: u64,
    /// The sequence numbers of the restrictions.
    numbers: HashSet<u64>,
    /// The time at which the first of the restrictions ends, or `None` if there are no restrictions.
    ends_at: Option<UnixMs>,
}

/// The change that the next transaction writes.
#[derive(Debug)]
struct RefusalChange {
    /// The numbers of the rows to delete, or `None` for all rows.
    removed: Option<Vec<u64>>,
    added: Vec<Restriction>,
    /// The rows in the file after the change.
    rows: WrittenRows,
}

impl RefusalRows {
    /// Returns whether the rows may differ from the restrictions that are active at `now`.
    pub(super) fn are_stale(&self, restrictions: &Restrictions, now: UnixMs) -> bool {
        self.written.as_ref().is_none_or(|rows| {
            rows.version != restrictions.version() || rows.ends_at.is_some_and(|ends_at| ends_at <= now)
        })
    }

    /// Computes the change that the next transaction writes.
    pub(super) fn prepare(&mut self, restrictions: &Restrictions, now: UnixMs) {
        self.prepared = self.are_stale(restrictions, now).then(|| {
            // The version is read before the restrictions, so a change in between is written by the next
            // transaction.
            let version = restrictions.version();
            let mut added_restrictions = restrictions.all(now);
            let rows = WrittenRows {
                version,
                numbers: added_restrictions.iter().map(|restriction| restriction.sequence_number).collect(),
                ends_at: added_restrictions.iter().map(|restriction| restriction.until).min(),
            };
            let written_numbers = self.written.as_ref().map(|rows| &rows.numbers);
            added_restrictions.retain(|restriction| {
                written_numbers.is_none_or(|numbers| !numbers.contains(&restriction.sequence_number))
            });
            let removed_numbers =
                written_numbers.map(|numbers| numbers.difference(&rows.numbers).copied().collect());
            RefusalChange { removed: removed_numbers, added: added_restrictions, rows }
        });
    }

    /// Writes the prepared change.
    pub(super) fn write(&self, transaction: &Transaction<'_>) -> Result<(), rusqlite::Error> {
        let Some(RefusalChange { removed, added, .. }) = &self.prepared else { return Ok(()) };
        match removed {
            None => transaction.execute_batch("DELETE FROM refusals")?,
            Some(numbers) => {
                let mut delete = transaction.prepare_cached("DELETE FROM refusals WHERE number = ?1")?;
                for number in numbers {
                    delete.execute([integer(*number)])?;
                }
            }
        }
        let mut insert = transaction.prepare_cached("INSERT INTO refusals VALUES (?1, ?2, ?3)")?;
        for restriction in added {
            insert.execute(params![
                integer(restriction.sequence_number),
                timestamp(restriction.refused_at),
                document::to_json(&restriction.record)
            ])?;
        }
        Ok(())
    }

    /// Records that the prepared change was committed.
    pub(super) fn record_commit(&mut self) {
        if let Some(RefusalChange { rows, .. }) = self.prepared.take() {
            self.written = Some(rows);
        }
    }

    /// Marks the rows in the file as unknown, after a transaction that failed or whose result is unknown.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}

/// Serializes a refusal as the JSON that the database stores.
#[must_use]
pub fn refusal_to_json(record: &RefusalRecord) -> String {
    document::to_json(record)
}

/// Parses the JSON of a refusal. Returns `None` if it is unreadable or of a verdict that restricts nothing.
#[must_use]
pub fn refusal_from_json(json: &str) -> Option<RefusalRecord> {
    document::from_json(json)
}

/// Reads all refusals, the oldest first. An unreadable row is skipped, because the provider will refuse the
/// request again.
pub(super) fn read(connection: &Connection) -> Result<Vec<RefusalRecord>, rusqlite::Error> {
    let mut statement = connection.prepare("SELECT refusal FROM refusals ORDER BY number DESC LIMIT ?1")?;
    let rows = statement.query_map([integer(MAX_RESTRICTIONS as u64)], |row| row.get::<_, String>(0))?;
    let mut records: Vec<RefusalRecord> = rows
        .filter_map(|row| row.map(|json| document::from_json(&json)).transpose())
        .collect::<Result<_, _>>()?;
    records.reverse();
    Ok(records)
}

#[cfg(test)]
mod tests;
