//! Whose identifiers are, on disk: written in the same transactions as everything else, read back at
//! the start, and bounded in number and age. An identifier is there as its hash only.

use rusqlite::{Connection, Row, Transaction, params};

use super::rows::moment;
use crate::policy::affinity::{Class, Keeping, Kind, Named, Tag};
use crate::policy::units::UnixMs;
use crate::pool::{Identity, Lesson};
use crate::proxy::Ownership;

/// Rows that one step forgets.
const ROWS: i64 = 512;

pub(super) fn write(transaction: &Transaction<'_>, changes: &[Ownership]) -> Result<(), rusqlite::Error> {
    for change in changes {
        match change {
            Ownership::Learned(lesson) => {
                let mut statement = transaction.prepare_cached(
                    "INSERT OR REPLACE INTO owners (id, kind, class, workspace, learned_at_ms, used_at_ms)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                )?;
                statement.execute(params![
                    lesson.named.tag.bytes(),
                    lesson.named.kind.word(),
                    lesson.named.kind.class().number(),
                    lesson.owner.word(),
                    moment(lesson.learned_at),
                    moment(lesson.used_at),
                ])?;
            }
            Ownership::Forgotten(named) => {
                let mut statement = transaction.prepare_cached("DELETE FROM owners WHERE id = ?1")?;
                statement.execute(params![named.tag.bytes()])?;
            }
        }
    }
    Ok(())
}

/// All of them, the oldest use first.
pub(super) fn read(connection: &Connection) -> Result<Vec<Lesson>, rusqlite::Error> {
    let mut statement = connection
        .prepare("SELECT id, kind, workspace, learned_at_ms, used_at_ms FROM owners ORDER BY used_at_ms")?;
    let rows = statement.query_map([], |row| Ok(lesson(row)))?;
    // A row that says nothing sensible is as good as none: it is learned again.
    rows.filter_map(|row| row.and_then(|row| row).transpose()).collect()
}

fn lesson(row: &Row<'_>) -> Result<Option<Lesson>, rusqlite::Error> {
    let id: Vec<u8> = row.get(0)?;
    let kind: String = row.get(1)?;
    let owner: String = row.get(2)?;
    let at = |index| -> Result<UnixMs, rusqlite::Error> {
        Ok(UnixMs(u64::try_from(row.get::<_, i64>(index)?).unwrap_or(0)))
    };
    let (learned_at, used_at) = (at(3)?, at(4)?);
    let named = <[u8; 16]>::try_from(id).ok().zip(Kind::of_word(&kind));
    Ok(named.map(|(bytes, kind)| Lesson {
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
        let number = class.number();
        if let Some(kept) = keeping.kept(class) {
            let oldest = now.0.saturating_sub(u64::try_from(kept.as_millis()).unwrap_or(u64::MAX));
            let mut statement = connection.prepare_cached(
                "DELETE FROM owners WHERE id IN (
                    SELECT id FROM owners WHERE class = ?1 AND used_at_ms < ?2 LIMIT ?3)",
            )?;
            if statement.execute(params![number, moment(UnixMs(oldest)), ROWS])? as i64 == ROWS {
                return Ok(true);
            }
        }
        let count_max = i64::try_from(keeping.count_max(class)).unwrap_or(i64::MAX);
        let count: i64 = connection
            .prepare_cached("SELECT count(*) FROM owners WHERE class = ?1")?
            .query_row([number], |row| row.get(0))?;
        let excess = count.saturating_sub(count_max);
        if excess > 0 {
            let mut statement = connection.prepare_cached(
                "DELETE FROM owners WHERE id IN (
                    SELECT id FROM owners WHERE class = ?1 ORDER BY used_at_ms LIMIT ?2)",
            )?;
            statement.execute(params![number, excess.min(ROWS)])?;
            if excess > ROWS {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
