//! Maintenance between two transactions: deletes old records and shrinks the file, in steps so
//! small that they do not delay other work of the writing thread.

use std::time::Duration;

use rusqlite::{Connection, params};

use super::database::Database;
use super::rows::moment;
use super::{Settings, owners, pending};
use crate::policy::retention::{first_id, oldest_kept};
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
    ledger: &mut Database,
    settings: &Settings,
    now: UnixMs,
) -> Result<MaintenanceStep, rusqlite::Error> {
    let Database { connection, series, owners_tidied_at, .. } = ledger;
    let retention = &settings.retention;
    if let Some(oldest) = oldest_kept(retention.attempts, now) {
        if forget_attempts(connection, oldest)? == usize::from(ROWS) {
            return Ok(MaintenanceStep::More);
        }
        if pending::forget_some(connection, oldest)? {
            return Ok(MaintenanceStep::More);
        }
        // Series without attempts.
        const SERIES: &str = "DELETE FROM series WHERE number IN (
            SELECT number FROM series WHERE used_at_ms < ?1 LIMIT ?2)";
        match connection.prepare_cached(SERIES)?.execute(params![moment(oldest), ROWS])? {
            0 => {}
            forgotten => {
                series.clear();
                if forgotten == usize::from(ROWS) {
                    return Ok(MaintenanceStep::More);
                }
            }
        }
    }
    if let Some(oldest) = oldest_kept(retention.hours, now) {
        const HOURS: &str = "DELETE FROM hours WHERE (hour_ms, key_hash, client, route, model) IN (
            SELECT hour_ms, key_hash, client, route, model FROM hours WHERE hour_ms < ?1 LIMIT ?2)";
        if connection.prepare_cached(HOURS)?.execute(params![moment(oldest), ROWS])? == usize::from(ROWS) {
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
    ledger: &Database,
    settings: &Settings,
    now: UnixMs,
) -> Result<MaintenanceStep, rusqlite::Error> {
    let is_more = owners::forget_some(&ledger.connection, &settings.owners, now)?;
    Ok(if is_more { MaintenanceStep::More } else { MaintenanceStep::Done })
}

/// Deletes some of the attempts that began before `oldest`; returns how many.
fn forget_attempts(connection: &Connection, oldest: UnixMs) -> Result<usize, rusqlite::Error> {
    // Ids begin with the time, so no index is needed to find the rows. The two agree, except for
    // records of an earlier version, one of which may lie slightly beyond the limit.
    const ATTEMPTS: &str = "DELETE FROM attempt_rows WHERE id IN (
        SELECT id FROM attempt_rows WHERE id < ?1 AND started_at_ms < ?2 LIMIT ?3)";
    connection.prepare_cached(ATTEMPTS)?.execute(params![&first_id(oldest)[..], moment(oldest), ROWS])
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
