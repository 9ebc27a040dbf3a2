//! Whose identifiers are, on disk: written in the same transactions as everything else, read back at
//! the start, and bounded in number and age. An identifier is there as its hash only.
//!
//! What lasts has a row for each identifier. What comes with every request has a log for each class:
//! rows at random places, for hashes are random, would cost a page each.

use std::collections::HashSet;

use rusqlite::{Connection, Row, Statement, Transaction, params};

use super::rows::moment;
use crate::policy::affinity::{Class, Keeping, Kind, Named, Tag};
use crate::policy::units::UnixMs;
use crate::pool::{Identity, Lesson};
use crate::proxy::Ownership;

/// Rows that one step forgets of what lasts.
const ROWS: usize = 512;
/// Rows that one step forgets of a log, where they lie side by side.
const LOG_ROWS: usize = 2_048;

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
    changes: &[Ownership],
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    for class in Class::ALL {
        let of_class = |change: &&Ownership| named(change).kind.class() == class;
        let mut changes = changes.iter().filter(of_class).peekable();
        if changes.peek().is_none() {
            continue;
        }
        match log(class) {
            None => change_rows(transaction, changes)?,
            Some(log) => {
                let statement = transaction.prepare_cached(&format!(
                    "INSERT INTO {log} (id, kind, workspace, learned_at_ms, used_at_ms) VALUES (?1, ?2, ?3, ?4, ?5)"
                ))?;
                add_to_log(statement, changes, now)?;
            }
        }
    }
    Ok(())
}

fn named(change: &Ownership) -> &Named {
    match change {
        Ownership::Learned(lesson) => &lesson.named,
        Ownership::Forgotten(named) => named,
    }
}

fn change_rows<'a>(
    transaction: &Transaction<'_>,
    changes: impl Iterator<Item = &'a Ownership>,
) -> Result<(), rusqlite::Error> {
    let mut learned = transaction.prepare_cached(
        "INSERT OR REPLACE INTO owners (id, kind, class, workspace, learned_at_ms, used_at_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    let mut forgotten = transaction.prepare_cached("DELETE FROM owners WHERE id = ?1")?;
    for change in changes {
        match change {
            Ownership::Learned(lesson) => learned.execute(params![
                lesson.named.tag.bytes(),
                lesson.named.kind.word(),
                lesson.named.kind.class().number(),
                lesson.owner.word(),
                moment(lesson.learned_at),
                moment(lesson.used_at),
            ])?,
            Ownership::Forgotten(named) => forgotten.execute(params![named.tag.bytes()])?,
        };
    }
    Ok(())
}

fn add_to_log<'a>(
    mut statement: impl std::ops::DerefMut<Target = Statement<'a>>,
    changes: impl Iterator<Item = &'a Ownership>,
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    for change in changes {
        let Named { kind, tag } = named(change);
        let (owner, learned_at, used_at) = match change {
            Ownership::Learned(lesson) => (Some(lesson.owner.word()), lesson.learned_at, lesson.used_at),
            Ownership::Forgotten(_) => (None, now, now),
        };
        statement.execute(params![tag.bytes(), kind.word(), owner, moment(learned_at), moment(used_at)])?;
    }
    Ok(())
}

/// All of them, of each class the oldest use first.
pub(super) fn read(connection: &Connection) -> Result<Vec<Lesson>, rusqlite::Error> {
    let mut lessons = read_from(connection, "owners", "used_at_ms")?;
    for log in Class::ALL.into_iter().filter_map(log) {
        lessons.append(&mut read_from(connection, log, "number")?);
    }
    Ok(lessons)
}

/// The last word on each identifier, unless it is that there is none any more.
fn read_from(connection: &Connection, table: &str, order: &str) -> Result<Vec<Lesson>, rusqlite::Error> {
    let mut statement = connection.prepare(&format!(
        "SELECT id, kind, workspace, learned_at_ms, used_at_ms FROM {table} ORDER BY {order} DESC"
    ))?;
    let rows = statement.query_map([], |row| Ok((row.get::<_, Vec<u8>>(0)?, lesson(row)?)))?;
    let (mut seen, mut lessons) = (HashSet::new(), Vec::new());
    for row in rows {
        let (id, lesson) = row?;
        // A row that says nothing sensible is as good as none: it is learned again.
        if seen.insert(id) {
            lessons.extend(lesson);
        }
    }
    lessons.reverse();
    Ok(lessons)
}

fn lesson(row: &Row<'_>) -> Result<Option<Lesson>, rusqlite::Error> {
    let id: Vec<u8> = row.get(0)?;
    let kind: String = row.get(1)?;
    let owner: Option<String> = row.get(2)?;
    let at = |index| -> Result<UnixMs, rusqlite::Error> {
        Ok(UnixMs(u64::try_from(row.get::<_, i64>(index)?).unwrap_or(0)))
    };
    let (learned_at, used_at) = (at(3)?, at(4)?);
    let named = <[u8; 16]>::try_from(id).ok().zip(Kind::of_word(&kind)).zip(owner);
    Ok(named.map(|((bytes, kind), owner)| Lesson {
        named: Named { kind, tag: Tag::of_bytes(bytes) },
        owner: Identity::of_word(&owner),
        learned_at,
        used_at,
    }))
}

/// Forgets a little of what is too old or too much; whether there may be more.
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
            Some(log) => forget_from_log(connection, log, oldest, count_max)?,
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

fn forget_from_log(
    connection: &Connection,
    log: &str,
    oldest: Option<UnixMs>,
    count_max: usize,
) -> Result<bool, rusqlite::Error> {
    if let Some(oldest) = oldest {
        let old = format!(
            "DELETE FROM {log} WHERE number IN (
                SELECT number FROM (SELECT number, used_at_ms FROM {log} ORDER BY number LIMIT ?2)
                WHERE used_at_ms < ?1)"
        );
        let forgotten = connection.prepare_cached(&old)?.execute(params![moment(oldest), LOG_ROWS as i64])?;
        if forgotten == LOG_ROWS {
            return Ok(true);
        }
    }
    let excess = count(connection, log)?.saturating_sub(count_max);
    if excess > 0 {
        let first = format!(
            "DELETE FROM {log} WHERE number <= (SELECT number FROM {log} ORDER BY number LIMIT 1 OFFSET ?1)"
        );
        connection.prepare_cached(&first)?.execute([excess.min(LOG_ROWS) as i64 - 1])?;
    }
    Ok(excess > LOG_ROWS)
}

/// Removes from the logs what a later row has overtaken, which would push out what is not.
pub(super) fn tidy(connection: &Connection) -> Result<(), rusqlite::Error> {
    for log in Class::ALL.into_iter().filter_map(log) {
        connection.execute_batch(&format!(
            "DELETE FROM {log} WHERE number NOT IN (SELECT max(number) FROM {log} GROUP BY id);
             DELETE FROM {log} WHERE workspace IS NULL"
        ))?;
    }
    Ok(())
}

fn count(connection: &Connection, table: &str) -> Result<usize, rusqlite::Error> {
    let count: i64 = connection
        .prepare_cached(&format!("SELECT count(*) FROM {table}"))?
        .query_row([], |row| row.get(0))?;
    Ok(usize::try_from(count).unwrap_or(0))
}
