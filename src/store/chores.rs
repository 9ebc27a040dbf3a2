//! What is due between two transactions: old records go, and the file shrinks, each in steps so
//! small that nothing waits for them.

use rusqlite::{Connection, params};

use super::rows::moment;
use super::{Settings, owners};
use crate::policy::retention::oldest_kept;
use crate::policy::units::UnixMs;

/// Rows that one step forgets.
const ROWS: i64 = 512;
/// Pages that one step gives back to the disk.
const PAGES: i64 = 128;

/// What a step leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is more to do.
    More,
    /// Nothing is due any more.
    Done,
}

/// Does a little of what is due.
pub(super) fn step(
    connection: &Connection,
    settings: &Settings,
    now: UnixMs,
) -> Result<Step, rusqlite::Error> {
    const ATTEMPTS: &str = "DELETE FROM attempts WHERE id IN (
        SELECT id FROM attempts WHERE started_at_ms < ?1 LIMIT ?2)";
    const HOURS: &str = "DELETE FROM hours WHERE (hour_ms, key_hash, client, route, model) IN (
        SELECT hour_ms, key_hash, client, route, model FROM hours WHERE hour_ms < ?1 LIMIT ?2)";
    let retention = &settings.retention;
    for (forget, kept) in [(ATTEMPTS, retention.attempts), (HOURS, retention.hours)] {
        if let Some(oldest) = oldest_kept(kept, now) {
            let forgotten = connection.prepare_cached(forget)?.execute(params![moment(oldest), ROWS])?;
            if forgotten as i64 == ROWS {
                return Ok(Step::More);
            }
        }
    }
    if owners::forget_some(connection, &settings.owners, now)? {
        return Ok(Step::More);
    }
    let free = free_pages(connection)?;
    if free == 0 {
        return Ok(Step::Done);
    }
    shrink(connection)?;
    let left = free_pages(connection)?;
    // Should it not shrink, it is not asked to again and again.
    Ok(if (1..free).contains(&left) { Step::More } else { Step::Done })
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
