//! What is due between two transactions: old records go, and the file shrinks, each in steps so
//! small that nothing waits for them.

use std::time::Duration;

use rusqlite::{Connection, params};

use super::database::Database;
use super::rows::moment;
use super::{Settings, owners, pending};
use crate::policy::retention::{first_id, oldest_kept};
use crate::policy::units::UnixMs;

/// Rows that one step forgets.
const ROWS: u16 = 512;
/// Pages that one step gives back to the disk.
const PAGES: i64 = 128;

/// From one look through the logs of owners to the next, which reads all of them.
const TIDY_INTERVAL: Duration = Duration::from_secs(3_600);

/// What a step leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MaintenanceStep {
    /// There is more to do.
    More,
    /// Nothing is due any more.
    Done,
}

/// Does a little of what is due.
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
        // None of their attempts is left.
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
    // Should it not shrink, it is not asked to again and again.
    Ok(if (1..free).contains(&left) { MaintenanceStep::More } else { MaintenanceStep::Done })
}

/// Does a little against too many owners between two rounds. The file does not shrink: what is set
/// free is about to be used again.
pub(super) fn trim_owners(
    ledger: &Database,
    settings: &Settings,
    now: UnixMs,
) -> Result<MaintenanceStep, rusqlite::Error> {
    let is_more = owners::forget_some(&ledger.connection, &settings.owners, now)?;
    Ok(if is_more { MaintenanceStep::More } else { MaintenanceStep::Done })
}

/// Forgets some of the attempts that began before `oldest`; returns how many.
fn forget_attempts(connection: &Connection, oldest: UnixMs) -> Result<usize, rusqlite::Error> {
    // Their ids begin with the moment, so no index is needed to find them. The two agree, but for records
    // of an earlier version, of which one may lie a moment beyond the edge.
    const ATTEMPTS: &str = "DELETE FROM attempt_rows WHERE id IN (
        SELECT id FROM attempt_rows WHERE id < ?1 AND started_at_ms < ?2 LIMIT ?3)";
    connection.prepare_cached(ATTEMPTS)?.execute(params![&first_id(oldest)[..], moment(oldest), ROWS])
}

fn free_pages(connection: &Connection) -> Result<i64, rusqlite::Error> {
    // Zero in a file that cannot shrink in steps: it uses its free pages again, and keeps them.
    connection.query_row(
        "SELECT freelist_count * (auto_vacuum = 2) FROM pragma_freelist_count, pragma_auto_vacuum",
        [],
        |row| row.get(0),
    )
}

fn shrink(connection: &Connection) -> Result<(), rusqlite::Error> {
    let mut statement = connection.prepare(&format!("PRAGMA incremental_vacuum({PAGES})"))?;
    // Each of its steps frees a page.
    let mut rows = statement.query([])?;
    while rows.next()?.is_some() {}
    Ok(())
}
