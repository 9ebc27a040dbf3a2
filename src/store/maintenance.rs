//! Maintenance between two transactions: deletes old records and shrinks the file, in steps so
//! small that they do not delay other work of the writing thread.

use std::time::Duration;

use rusqlite::{Connection, params};

use super::attempts::{self, migration};
use super::columns::timestamp;
use super::database::Database;
use super::{Settings, owners};
use crate::policy::retention::oldest_kept;
use crate::policy::units::UnixMs;

/// Rows that one step deletes.
const ROWS: u16 = 512;
/// Pages that one step returns to the file system.
const PAGES: i64 = 128;

/// Time between two compactions of the owner logs, each of which reads all of them.
const TIDY_INTERVAL: Duration = Duration::from_secs(3_600);

/// The result of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MaintenanceStep {
    /// More work is due.
    More,
    /// Nothing is due any more.
    Done,
}

/// Does one step of the work that is due.
pub(super) fn step(
    database: &mut Database,
    settings: &Settings,
    now: UnixMs,
) -> Result<MaintenanceStep, rusqlite::Error> {
    let Database { connection, owners_tidied_at, .. } = database;
    if migration::go_on(connection)? {
        return Ok(MaintenanceStep::More);
    }
    let retention = &settings.retention;
    if let Some(oldest) = oldest_kept(retention.attempts, now)
        && attempts::delete_some(connection, oldest, ROWS)? == usize::from(ROWS)
    {
        return Ok(MaintenanceStep::More);
    }
    if let Some(oldest) = oldest_kept(retention.hours, now) {
        const HOURS: &str = "DELETE FROM hours WHERE (hour_ms, key_hash, client, route, model) IN (
            SELECT hour_ms, key_hash, client, route, model FROM hours WHERE hour_ms < ?1 LIMIT ?2)";
        if connection.prepare_cached(HOURS)?.execute(params![timestamp(oldest), ROWS])? == usize::from(ROWS) {
            return Ok(MaintenanceStep::More);
        }
    }
    if owners_tidied_at.is_none_or(|tidied_at| now.since(tidied_at) >= TIDY_INTERVAL) {
        owners::tidy(connection)?;
        *owners_tidied_at = Some(now);
    }
    if owners::forget_some(connection, &settings.owners, now)? {
        return Ok(MaintenanceStep::More);
    }
    let free = free_pages(connection)?;
    if free == 0 {
        return Ok(MaintenanceStep::Done);
    }
    shrink(connection)?;
    let left = free_pages(connection)?;
    // If the file does not shrink, no further step is tried.
    Ok(if (1..free).contains(&left) { MaintenanceStep::More } else { MaintenanceStep::Done })
}

/// Deletes some excess owners between two rounds of maintenance. The file does not shrink: its free
/// pages are about to be used again.
pub(super) fn trim_owners(
    database: &Database,
    settings: &Settings,
    now: UnixMs,
) -> Result<MaintenanceStep, rusqlite::Error> {
    let is_more = owners::forget_some(&database.connection, &settings.owners, now)?;
    Ok(if is_more { MaintenanceStep::More } else { MaintenanceStep::Done })
}

fn free_pages(connection: &Connection) -> Result<i64, rusqlite::Error> {
    // Zero in a file without incremental vacuum: it keeps and reuses its free pages.
    connection.query_row(
        "SELECT freelist_count * (auto_vacuum = 2) FROM pragma_freelist_count, pragma_auto_vacuum",
        [],
        |row| row.get(0),
    )
}

fn shrink(connection: &Connection) -> Result<(), rusqlite::Error> {
    let mut statement = connection.prepare(&format!("PRAGMA incremental_vacuum({PAGES})"))?;
    // Each step of the statement frees a page.
    let mut rows = statement.query([])?;
    while rows.next()?.is_some() {}
    Ok(())
}
