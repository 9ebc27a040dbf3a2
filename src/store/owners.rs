//! Stores the owners of identifiers: the workspace that each identifier belongs to. Owners are written in the
//! transactions of the usage records and read at startup, and maintenance limits their number and age. Only the hash of
//! an identifier is stored.
//!
//! Identifiers of resources that users create have one row each. Identifiers that every request creates are
//! appended to a log, because each row with a random hash as its key would cost one page write.

mod log;
mod pack;

use rusqlite::{Connection, Row, Transaction, params};

use super::columns::{timestamp, unsigned};
use crate::elevenlabs::affinity::{Identifier, IdentifierHash, ResourceKind, RetentionLimits, StorageClass};
use crate::policy::units::UnixMs;
use crate::pool::{OwnerId, OwnershipEntry};
use crate::proxy::OwnershipUpdate;

pub(super) use log::{compact, names, pack_rows, rename};

/// Maximum number of rows that one step of maintenance deletes.
const MAX_STEP_ROWS: usize = 512;

/// Returns whether the database stores the identifier. Identifiers that are valid for hours are kept in memory only:
/// few requests name one after a restart, and each would add a change to the log.
pub(super) fn is_stored(update: &OwnershipUpdate) -> bool {
    match update.identifier().kind.storage_class() {
        StorageClass::LongLived | StorageClass::PerRequest => true,
        StorageClass::ShortLived => false,
    }
}

/// Writes the updates in their order. Removed identifiers get the time `now` in the log.
pub(super) fn write(
    transaction: &Transaction<'_>,
    updates: &[OwnershipUpdate],
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    let updates_of =
        |class| updates.iter().filter(move |update| update.identifier().kind.storage_class() == class);
    write_rows(transaction, updates_of(StorageClass::LongLived))?;
    log::append(transaction, updates_of(StorageClass::PerRequest), now)
}

fn write_rows<'a>(
    transaction: &Transaction<'_>,
    updates: impl Iterator<Item = &'a OwnershipUpdate>,
) -> Result<(), rusqlite::Error> {
    let mut insert = transaction.prepare_cached(
        "INSERT OR REPLACE INTO owners (id, kind, class, workspace, learned_at_ms, used_at_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    let mut delete = transaction.prepare_cached("DELETE FROM owners WHERE id = ?1")?;
    for update in updates {
        match update {
            OwnershipUpdate::Recorded(OwnershipEntry { identifier, owner, recorded_at, used_at }) => {
                insert.execute(params![
                    identifier.hash.bytes(),
                    identifier.kind.as_str(),
                    identifier.kind.storage_class().number(),
                    owner.as_str(),
                    timestamp(*recorded_at),
                    timestamp(*used_at),
                ])?
            }
            OwnershipUpdate::Removed(identifier) => delete.execute(params![identifier.hash.bytes()])?,
        };
    }
    Ok(())
}

/// Reads all owners: first the owners of created resources in the order of their last use, then the owners in the log
/// in the order of their changes, the oldest first.
pub(super) fn read(connection: &Connection) -> Result<Vec<OwnershipEntry>, rusqlite::Error> {
    let mut statement = connection
        .prepare("SELECT id, kind, workspace, learned_at_ms, used_at_ms FROM owners ORDER BY used_at_ms")?;
    // An unreadable row is skipped, because the owner is recorded again from later responses.
    let owners = statement.query_map([], read_owner)?.filter_map(Result::transpose);
    let mut owners: Vec<OwnershipEntry> = owners.collect::<Result<_, _>>()?;
    owners.append(&mut log::read(connection)?);
    Ok(owners)
}

fn read_owner(row: &Row<'_>) -> Result<Option<OwnershipEntry>, rusqlite::Error> {
    let id: Vec<u8> = row.get(0)?;
    let kind: String = row.get(1)?;
    let owner: String = row.get(2)?;
    let time = |index| row.get(index).map(|time| UnixMs(unsigned(time)));
    let (recorded_at, used_at) = (time(3)?, time(4)?);
    let hash_and_kind = <[u8; 16]>::try_from(id).ok().zip(ResourceKind::parse(&kind));
    Ok(hash_and_kind.map(|(bytes, kind)| OwnershipEntry {
        identifier: Identifier { kind, hash: IdentifierHash::from_bytes(bytes) },
        owner: OwnerId::from_stored(&owner),
        recorded_at,
        used_at,
    }))
}

/// Deletes some of the owners that exceed the limits, and returns whether further excess owners may remain.
pub(super) fn delete_excess(
    connection: &Connection,
    limits: &RetentionLimits,
    now: UnixMs,
) -> Result<bool, rusqlite::Error> {
    let limits_of = |class| {
        let max_idle_ms =
            limits.max_idle(class).map(|max_idle| u64::try_from(max_idle.as_millis()).unwrap_or(u64::MAX));
        (max_idle_ms.map(|ms| UnixMs(now.0.saturating_sub(ms))), limits.max_count(class))
    };
    let (oldest, max_rows) = limits_of(StorageClass::LongLived);
    if delete_excess_rows(connection, oldest, max_rows)? {
        return Ok(true);
    }
    let (oldest, max_changes) = limits_of(StorageClass::PerRequest);
    log::delete_excess(connection, oldest, max_changes)
}

fn delete_excess_rows(
    connection: &Connection,
    oldest: Option<UnixMs>,
    max_rows: usize,
) -> Result<bool, rusqlite::Error> {
    if let Some(oldest) = oldest {
        // Class 0 is `StorageClass::LongLived`, the only class in this table.
        const DELETE_OLDER: &str = "DELETE FROM owners WHERE id IN (
            SELECT id FROM owners WHERE class = 0 AND used_at_ms < ?1 LIMIT ?2)";
        let parameters = params![timestamp(oldest), MAX_STEP_ROWS as i64];
        if connection.prepare_cached(DELETE_OLDER)?.execute(parameters)? == MAX_STEP_ROWS {
            return Ok(true);
        }
    }
    let excess = count_rows(connection)?.saturating_sub(max_rows);
    if excess > 0 {
        const DELETE_OLDEST: &str = "DELETE FROM owners WHERE id IN (
            SELECT id FROM owners WHERE class = 0 ORDER BY used_at_ms LIMIT ?1)";
        connection.prepare_cached(DELETE_OLDEST)?.execute([excess.min(MAX_STEP_ROWS) as i64])?;
    }
    Ok(excess > MAX_STEP_ROWS)
}

fn count_rows(connection: &Connection) -> Result<usize, rusqlite::Error> {
    let count: i64 =
        connection.prepare_cached("SELECT count(*) FROM owners")?.query_row([], |row| row.get(0))?;
    Ok(usize::try_from(count).unwrap_or(0))
}
