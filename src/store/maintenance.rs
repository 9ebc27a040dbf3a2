//! Maintains the database between commits: completes the migration of attempts, deletes old records, sums the hours by
//! day, compacts the log of the owners of identifiers, deletes excess owners, and shrinks the file. The writer thread
//! runs it in small steps, so that commits are not delayed.

use std::time::Duration;

use rusqlite::{Connection, params};

use super::attempts::{self, migration};
use super::columns::timestamp;
use super::database::Database;
use super::{Settings, days, owners, users};
use crate::policy::retention::deletion_cutoff;
use crate::policy::units::UnixMs;

/// Maximum number of rows that one step deletes.
const MAX_STEP_ROWS: u16 = 512;
/// Maximum number of pages that one step returns to the file system.
const MAX_STEP_PAGES: i64 = 128;

/// Time between two compactions of the owner log. A compaction reads the whole log.
const COMPACTION_INTERVAL: Duration = Duration::from_secs(3_600);

/// The result of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MaintenanceProgress {
    /// Further work may be due, so the writer thread runs another step.
    MoreWork,
    /// No further work is due.
    Done,
}

/// Runs one step of the work that is due at `now`.
pub(super) fn run_step(
    database: &mut Database,
    settings: &Settings,
    now: UnixMs,
) -> Result<MaintenanceProgress, rusqlite::Error> {
    let Database { connection, owners_compacted_at, .. } = database;
    if migration::move_next_attempts(connection)? {
        return Ok(MaintenanceProgress::MoreWork);
    }
    let retention = &settings.retention;
    if let Some(oldest) = deletion_cutoff(retention.attempts, now)
        && attempts::delete_older(connection, oldest, MAX_STEP_ROWS)? == usize::from(MAX_STEP_ROWS)
    {
        return Ok(MaintenanceProgress::MoreWork);
    }
    if let Some(oldest) = deletion_cutoff(retention.hours, now) {
        const DELETE_HOURS: &str = "DELETE FROM hours WHERE (hour_ms, key_hash, client, route, model) IN (
            SELECT hour_ms, key_hash, client, route, model FROM hours WHERE hour_ms < ?1 LIMIT ?2)";
        if connection.prepare_cached(DELETE_HOURS)?.execute(params![timestamp(oldest), MAX_STEP_ROWS])?
            == usize::from(MAX_STEP_ROWS)
        {
            return Ok(MaintenanceProgress::MoreWork);
        }
        for delete_older in [users::delete_older, days::delete_older] {
            if delete_older(connection, oldest, MAX_STEP_ROWS)? == usize::from(MAX_STEP_ROWS) {
                return Ok(MaintenanceProgress::MoreWork);
            }
        }
    }
    if days::add_next_hour(connection, now)? {
        return Ok(MaintenanceProgress::MoreWork);
    }
    if owners_compacted_at.is_none_or(|compacted_at| now.since(compacted_at) >= COMPACTION_INTERVAL) {
        owners::compact(connection)?;
        *owners_compacted_at = Some(now);
    }
    if owners::delete_excess(connection, &settings.owner_limits, now)? {
        return Ok(MaintenanceProgress::MoreWork);
    }
    let free_pages_before = count_free_pages(connection)?;
    if free_pages_before == 0 {
        return Ok(MaintenanceProgress::Done);
    }
    shrink_database(connection)?;
    let free_pages_after = count_free_pages(connection)?;
    // If the file did not shrink, the next step would not shrink it either.
    Ok(if (1..free_pages_before).contains(&free_pages_after) {
        MaintenanceProgress::MoreWork
    } else {
        MaintenanceProgress::Done
    })
}

/// Deletes some excess owners between two rounds of maintenance. The file does not shrink, because new owners
/// use its free pages.
pub(super) fn delete_excess_owners(
    database: &Database,
    settings: &Settings,
    now: UnixMs,
) -> Result<MaintenanceProgress, rusqlite::Error> {
    let has_more = owners::delete_excess(&database.connection, &settings.owner_limits, now)?;
    Ok(if has_more { MaintenanceProgress::MoreWork } else { MaintenanceProgress::Done })
}

/// Returns the number of free pages that the file could return to the file system. It is 0 in a file without
/// incremental vacuum, which keeps and reuses its free pages.
fn count_free_pages(connection: &Connection) -> Result<i64, rusqlite::Error> {
    connection.query_row(
        "SELECT freelist_count * (auto_vacuum = 2) FROM pragma_freelist_count, pragma_auto_vacuum",
        [],
        |row| row.get(0),
    )
}

fn shrink_database(connection: &Connection) -> Result<(), rusqlite::Error> {
    let mut statement = connection.prepare(&format!("PRAGMA incremental_vacuum({MAX_STEP_PAGES})"))?;
    // Reading a row of the statement frees a page.
    let mut rows = statement.query([])?;
    while rows.next()?.is_some() {}
    Ok(())
}
