//! Stores the owners of identifiers: written in the same transactions as the usage records, read
//! back at the start, and bounded in number and age. Of an identifier only its hash is stored.
//!
//! Identifiers of resources that were created by hand have one row each. Those of every request go
//! into a log: rows keyed by random hashes would cost a page write each.

mod log;

use rusqlite::{Connection, Row, Transaction, params};

use super::columns::timestamp;
use crate::elevenlabs::affinity::{Class, Keeping, Kind, Named, Tag};
use crate::policy::units::UnixMs;
use crate::pool::{LearnedOwner, OwnerId};
use crate::proxy::OwnershipUpdate;

pub(super) use log::{pack_rows, rename, tidy, words};

/// Rows of long-lived identifiers that one retention step deletes.
const ROWS: usize = 512;

/// Whether the database has the identifier. Those that are valid for hours are kept in memory only:
/// after a restart, few requests still name one, and each would add a change to the log.
pub(super) fn is_stored(change: &OwnershipUpdate) -> bool {
    match change.named().kind.class() {
        Class::Lasting | Class::Plentiful => true,
        Class::Passing => false,
    }
}

pub(super) fn write(
    transaction: &Transaction<'_>,
    changes: &[OwnershipUpdate],
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    let of = |class| changes.iter().filter(move |change| change.named().kind.class() == class);
    change_rows(transaction, of(Class::Lasting))?;
    log::add(transaction, of(Class::Plentiful), now)
}

fn change_rows<'a>(
    transaction: &Transaction<'_>,
    changes: impl Iterator<Item = &'a OwnershipUpdate>,
) -> Result<(), rusqlite::Error> {
    let mut insert = transaction.prepare_cached(
        "INSERT OR REPLACE INTO owners (id, kind, class, workspace, learned_at_ms, used_at_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    let mut delete = transaction.prepare_cached("DELETE FROM owners WHERE id = ?1")?;
    for change in changes {
        match change {
            OwnershipUpdate::Recorded(LearnedOwner { named, owner, learned_at, used_at }) => {
                insert.execute(params![
                    named.tag.bytes(),
                    named.kind.word(),
                    named.kind.class().number(),
                    owner.word(),
                    timestamp(*learned_at),
                    timestamp(*used_at),
                ])?
            }
            OwnershipUpdate::Forgotten(named) => delete.execute(params![named.tag.bytes()])?,
        };
    }
    Ok(())
}

/// All owners, within each class the oldest use first.
pub(super) fn read(connection: &Connection) -> Result<Vec<LearnedOwner>, rusqlite::Error> {
    let mut statement = connection
        .prepare("SELECT id, kind, workspace, learned_at_ms, used_at_ms FROM owners ORDER BY used_at_ms")?;
    // An unreadable row is skipped: the owner is recorded again from later responses.
    let owners = statement.query_map([], read_owner)?.filter_map(Result::transpose);
    let mut owners: Vec<LearnedOwner> = owners.collect::<Result<_, _>>()?;
    owners.append(&mut log::read(connection)?);
    Ok(owners)
}

fn read_owner(row: &Row<'_>) -> Result<Option<LearnedOwner>, rusqlite::Error> {
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
    let bounds = |class| {
        let kept = keeping.kept(class).map(|kept| u64::try_from(kept.as_millis()).unwrap_or(u64::MAX));
        (kept.map(|kept_ms| UnixMs(now.0.saturating_sub(kept_ms))), keeping.count_max(class))
    };
    let (oldest, count_max) = bounds(Class::Lasting);
    if forget_rows(connection, oldest, count_max)? {
        return Ok(true);
    }
    let (oldest, count_max) = bounds(Class::Plentiful);
    log::forget_some(connection, oldest, count_max)
}

fn forget_rows(
    connection: &Connection,
    oldest: Option<UnixMs>,
    count_max: usize,
) -> Result<bool, rusqlite::Error> {
    if let Some(oldest) = oldest {
        const OLD: &str = "DELETE FROM owners WHERE id IN (SELECT id FROM owners WHERE class = 0 AND used_at_ms < ?1 LIMIT ?2)";
        if connection.prepare_cached(OLD)?.execute(params![timestamp(oldest), ROWS as i64])? == ROWS {
            return Ok(true);
        }
    }
    let excess = count(connection)?.saturating_sub(count_max);
    if excess > 0 {
        const FIRST: &str = "DELETE FROM owners WHERE id IN (SELECT id FROM owners WHERE class = 0 ORDER BY used_at_ms LIMIT ?1)";
        connection.prepare_cached(FIRST)?.execute([excess.min(ROWS) as i64])?;
    }
    Ok(excess > ROWS)
}

fn count(connection: &Connection) -> Result<usize, rusqlite::Error> {
    let count: i64 =
        connection.prepare_cached("SELECT count(*) FROM owners")?.query_row([], |row| row.get(0))?;
    Ok(usize::try_from(count).unwrap_or(0))
}
