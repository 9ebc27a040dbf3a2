//! Stores the owners of identifiers: written in the same transactions as the usage records, read
//! back at the start, and bounded in number and age. Of an identifier only its hash is stored.
//!
//! Long-lived identifiers have one row each. Those of every request go into a log per class: rows
//! keyed by random hashes would cost a page write each.

mod log;

use std::collections::{HashMap, HashSet};

use rusqlite::{Connection, Row, Transaction, params};

use super::rows::moment;
use crate::elevenlabs::affinity::{Class, Keeping, Kind, Named, Tag};
use crate::policy::units::UnixMs;
use crate::pool::{LearnedOwner, OwnerId};
use crate::proxy::{OwnershipUpdate, UsageBatch};

/// Rows of long-lived identifiers that one retention step deletes.
const ROWS: usize = 512;

/// The log of a class, if it has one.
fn log(class: Class) -> Option<&'static str> {
    match class {
        Class::Lasting => None,
        Class::Plentiful => Some("owners_plentiful"),
        Class::Passing => Some("owners_passing"),
    }
}

pub(super) fn write(
    transaction: &Transaction<'_>,
    sheets: &[UsageBatch],
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    for class in Class::ALL {
        let changes = sheets.iter().flat_map(UsageBatch::owners);
        let changes = changes.filter(|change| named(change).kind.class() == class);
        match log(class) {
            None => change_rows(transaction, changes)?,
            Some(name) => log::add(transaction, name, changes, now)?,
        }
    }
    Ok(())
}

fn named(change: &OwnershipUpdate) -> &Named {
    match change {
        OwnershipUpdate::Learned(lesson) => &lesson.named,
        OwnershipUpdate::Forgotten(named) => named,
    }
}

fn change_rows<'a>(
    transaction: &Transaction<'_>,
    changes: impl Iterator<Item = &'a OwnershipUpdate>,
) -> Result<(), rusqlite::Error> {
    let mut learned = transaction.prepare_cached(
        "INSERT OR REPLACE INTO owners (id, kind, class, workspace, learned_at_ms, used_at_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    let mut forgotten = transaction.prepare_cached("DELETE FROM owners WHERE id = ?1")?;
    for change in changes {
        match change {
            OwnershipUpdate::Learned(lesson) => learned.execute(params![
                lesson.named.tag.bytes(),
                lesson.named.kind.word(),
                lesson.named.kind.class().number(),
                lesson.owner.word(),
                moment(lesson.learned_at),
                moment(lesson.used_at),
            ])?,
            OwnershipUpdate::Forgotten(named) => forgotten.execute(params![named.tag.bytes()])?,
        };
    }
    Ok(())
}

/// All owners, within each class the oldest use first.
pub(super) fn read(connection: &Connection) -> Result<Vec<LearnedOwner>, rusqlite::Error> {
    let mut statement = connection
        .prepare("SELECT id, kind, workspace, learned_at_ms, used_at_ms FROM owners ORDER BY used_at_ms")?;
    // An unreadable row is skipped: the owner is recorded again from later responses.
    let lessons = statement.query_map([], lesson)?.filter_map(Result::transpose);
    let mut lessons: Vec<LearnedOwner> = lessons.collect::<Result<_, _>>()?;
    for log in Class::ALL.into_iter().filter_map(log) {
        lessons.append(&mut log::read(connection, log)?);
    }
    Ok(lessons)
}

fn lesson(row: &Row<'_>) -> Result<Option<LearnedOwner>, rusqlite::Error> {
    let id: Vec<u8> = row.get(0)?;
    let kind: String = row.get(1)?;
    let owner: String = row.get(2)?;
    let at = |index| -> Result<UnixMs, rusqlite::Error> {
        Ok(UnixMs(u64::try_from(row.get::<_, i64>(index)?).unwrap_or(0)))
    };
    let (learned_at, used_at) = (at(3)?, at(4)?);
    let named = <[u8; 16]>::try_from(id).ok().zip(Kind::of_word(&kind));
    Ok(named.map(|(bytes, kind)| LearnedOwner {
        named: Named { kind, tag: Tag::of_bytes(bytes) },
        owner: OwnerId::of_word(&owner),
        learned_at,
        used_at,
    }))
}

/// Deletes some of the rows that are too old or too many; returns whether there may be more.
pub(super) fn forget_some(
    connection: &Connection,
    keeping: &Keeping,
    now: UnixMs,
) -> Result<bool, rusqlite::Error> {
    for class in Class::ALL {
        let oldest = keeping
            .kept(class)
            .map(|kept| UnixMs(now.0.saturating_sub(u64::try_from(kept.as_millis()).unwrap_or(u64::MAX))));
        let count_max = keeping.count_max(class);
        let is_more = match log(class) {
            None => forget_rows(connection, oldest, count_max)?,
            Some(name) => log::forget_some(connection, name, oldest, count_max)?,
        };
        if is_more {
            return Ok(true);
        }
    }
    Ok(false)
}

fn forget_rows(
    connection: &Connection,
    oldest: Option<UnixMs>,
    count_max: usize,
) -> Result<bool, rusqlite::Error> {
    if let Some(oldest) = oldest {
        const OLD: &str = "DELETE FROM owners WHERE id IN (SELECT id FROM owners WHERE class = 0 AND used_at_ms < ?1 LIMIT ?2)";
        if connection.prepare_cached(OLD)?.execute(params![moment(oldest), ROWS as i64])? == ROWS {
            return Ok(true);
        }
    }
    let excess = count(connection, "owners")?.saturating_sub(count_max);
    if excess > 0 {
        const FIRST: &str = "DELETE FROM owners WHERE id IN (SELECT id FROM owners WHERE class = 0 ORDER BY used_at_ms LIMIT ?1)";
        connection.prepare_cached(FIRST)?.execute([excess.min(ROWS) as i64])?;
    }
    Ok(excess > ROWS)
}

/// Removes superseded changes from the logs, which would otherwise displace current ones.
pub(super) fn tidy(connection: &Connection) -> Result<(), rusqlite::Error> {
    Class::ALL.into_iter().filter_map(log).try_for_each(|name| log::tidy(connection, name))
}

/// Packs the logs of an earlier version, which kept one row per identifier.
pub(super) fn pack_rows(connection: &Connection) -> Result<(), rusqlite::Error> {
    for name in Class::ALL.into_iter().filter_map(log) {
        let rows = format!("{name}_rows");
        log::pack_rows(connection, &rows, name)?;
        connection.execute_batch(&format!("DROP TABLE {rows}"))?;
    }
    Ok(())
}

/// The words in the logs, among them the names of workspaces.
pub(super) fn words(connection: &Connection) -> Result<HashSet<String>, rusqlite::Error> {
    let mut words = HashSet::new();
    for name in Class::ALL.into_iter().filter_map(log) {
        log::words(connection, name, &mut words)?;
    }
    Ok(words)
}

/// Renames workspaces in the logs, from old names to new ones.
pub(super) fn rename(
    connection: &Connection,
    renamed: &HashMap<String, String>,
) -> Result<(), rusqlite::Error> {
    Class::ALL.into_iter().filter_map(log).try_for_each(|name| log::rename(connection, name, renamed))
}

fn count(connection: &Connection, table: &str) -> Result<usize, rusqlite::Error> {
    let count: i64 = connection
        .prepare_cached(&format!("SELECT count(*) FROM {table}"))?
        .query_row([], |row| row.get(0))?;
    Ok(usize::try_from(count).unwrap_or(0))
}
