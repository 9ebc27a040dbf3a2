//! Stores the owners of identifiers that every request creates in a log: appends and reads changes, deletes old and
//! superseded changes, and renames owners. The changes of a commit are packed into few rows, because single changes are
//! never queried in the file. Only the latest change of an identifier is valid.

use std::collections::{HashMap, HashSet};

use rusqlite::{Connection, Row, params};

use super::pack::{OwnerChange, OwnerPack};
use crate::policy::units::UnixMs;
use crate::pool::OwnershipEntry;
use crate::proxy::OwnershipUpdate;
use crate::store::columns::{timestamp, unsigned};

/// Maximum number of changes per row. When a row is deleted in part, its remaining changes are encoded again, which
/// takes longer for a larger row.
const MAX_ROW_CHANGES: usize = 1_024;
/// Maximum number of rows that one step deletes. Each step is a commit, which takes longer than the deletion.
const MAX_STEP_ROWS: usize = 64;
/// Maximum number of changes that one step deletes.
const MAX_STEP_CHANGES: usize = 16_384;

/// Appends the updates to the log. Removed identifiers get the time `now`.
pub(super) fn append<'a>(
    connection: &Connection,
    updates: impl Iterator<Item = &'a OwnershipUpdate>,
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    let mut pack = OwnerPack::default();
    for update in updates {
        match update {
            OwnershipUpdate::Recorded(OwnershipEntry { identifier, owner, recorded_at, used_at }) => {
                pack.push(identifier, Some(owner.as_str()), *recorded_at, *used_at);
            }
            OwnershipUpdate::Removed(identifier) => pack.push(identifier, None, now, now),
        }
        insert_pack(connection, &mut pack, MAX_ROW_CHANGES)?;
    }
    insert_pack(connection, &mut pack, 1)
}

/// Inserts a pack as a row and empties the pack, if it has at least `min_changes` changes.
fn insert_pack(
    connection: &Connection,
    pack: &mut OwnerPack,
    min_changes: usize,
) -> Result<(), rusqlite::Error> {
    if pack.changes.len() < min_changes {
        return Ok(());
    }
    let pack = std::mem::take(pack);
    let insert = "INSERT INTO owners_plentiful (changes, used_at_ms, pack) VALUES (?1, ?2, ?3)";
    let columns = params![pack.changes.len() as i64, timestamp(pack.last_used_at()), pack.encode()];
    connection.prepare_cached(insert)?.execute(columns).map(drop)
}

/// Replaces the pack of a row, or deletes the row if the new pack is empty.
fn replace_pack(connection: &Connection, number: i64, pack: &OwnerPack) -> Result<(), rusqlite::Error> {
    if pack.changes.is_empty() {
        return connection.execute("DELETE FROM owners_plentiful WHERE number = ?1", [number]).map(drop);
    }
    let update = "UPDATE owners_plentiful SET changes = ?2, used_at_ms = ?3, pack = ?4 WHERE number = ?1";
    let columns = params![number, pack.changes.len() as i64, timestamp(pack.last_used_at()), pack.encode()];
    connection.prepare_cached(update)?.execute(columns).map(drop)
}

/// Reads the latest change of each identifier, the oldest change first. Removed identifiers are omitted.
pub(super) fn read(connection: &Connection) -> Result<Vec<OwnershipEntry>, rusqlite::Error> {
    let (mut seen_hashes, mut owners) = (HashSet::new(), Vec::new());
    for_each_newest_first(connection, |_, pack| {
        // An unreadable change is skipped: the owner is recorded again from later responses.
        let latest = pack.changes.iter().rev().filter(|change| seen_hashes.insert(change.hash));
        owners.extend(latest.filter_map(|change| pack.entry(change)));
        Ok(())
    })?;
    owners.reverse();
    Ok(owners)
}

/// Calls `visit` with the number and the pack of each row, the latest row first.
fn for_each_newest_first(
    connection: &Connection,
    mut visit: impl FnMut(i64, OwnerPack) -> Result<(), rusqlite::Error>,
) -> Result<(), rusqlite::Error> {
    let mut statement =
        connection.prepare("SELECT number, pack FROM owners_plentiful ORDER BY number DESC")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        visit(row.get(0)?, read_pack(row, 1)?)?;
    }
    Ok(())
}

/// Reads a pack. An unreadable pack is read as an empty one.
fn read_pack(row: &Row<'_>, column: usize) -> Result<OwnerPack, rusqlite::Error> {
    Ok(OwnerPack::decode(row.get_ref(column)?.as_blob().unwrap_or_default()).unwrap_or_default())
}

/// Deletes some of the changes that are older than `oldest` or exceed `max_changes`, and returns whether further excess
/// changes may remain.
pub(super) fn delete_excess(
    connection: &Connection,
    oldest: Option<UnixMs>,
    max_changes: usize,
) -> Result<bool, rusqlite::Error> {
    if let Some(oldest) = oldest {
        let delete_older = "DELETE FROM owners_plentiful WHERE number IN (
                SELECT number FROM (SELECT number, used_at_ms FROM owners_plentiful ORDER BY number LIMIT ?2)
                WHERE used_at_ms < ?1)";
        let parameters = params![timestamp(oldest), MAX_STEP_ROWS as i64];
        if connection.prepare_cached(delete_older)?.execute(parameters)? == MAX_STEP_ROWS {
            return Ok(true);
        }
    }
    let excess = count_changes(connection)?.saturating_sub(max_changes);
    if excess == 0 {
        return Ok(false);
    }
    let mut remaining = excess.min(MAX_STEP_CHANGES);
    let mut last_row = None;
    {
        let first_rows = "SELECT number, changes, pack FROM owners_plentiful ORDER BY number LIMIT ?1";
        let mut statement = connection.prepare_cached(first_rows)?;
        let mut rows = statement.query([MAX_STEP_ROWS as i64])?;
        while remaining > 0
            && let Some(row) = rows.next()?
        {
            let number: i64 = row.get(0)?;
            let changes = usize::try_from(row.get::<_, i64>(1)?).unwrap_or(0);
            if changes > remaining {
                // Only the first changes of the row are deleted.
                let pack = read_pack(row, 2)?;
                let kept_changes = pack.changes.get(remaining..).unwrap_or_default().to_vec();
                last_row = Some((number, OwnerPack { changes: kept_changes, ..pack }));
                remaining = 0;
            } else {
                last_row = Some((number, OwnerPack::default()));
                remaining -= changes;
            }
        }
    }
    if let Some((number, pack)) = last_row {
        let transaction = connection.unchecked_transaction()?;
        transaction.prepare_cached("DELETE FROM owners_plentiful WHERE number < ?1")?.execute([number])?;
        replace_pack(&transaction, number, &pack)?;
        transaction.commit()?;
    }
    Ok(excess > MAX_STEP_CHANGES || remaining > 0)
}

/// Deletes superseded changes and removals, because they count toward the limit and would displace valid changes.
pub(in crate::store) fn compact(connection: &Connection) -> Result<(), rusqlite::Error> {
    let transaction = connection.unchecked_transaction()?;
    let (mut seen_hashes, mut shortened_packs) = (HashSet::new(), Vec::new());
    for_each_newest_first(&transaction, |number, mut pack| {
        let old_length = pack.changes.len();
        pack.changes.reverse();
        pack.changes.retain(|change| seen_hashes.insert(change.hash) && change.owner.is_some());
        pack.changes.reverse();
        if pack.changes.len() < old_length || old_length == 0 {
            shortened_packs.push((number, pack));
        }
        Ok(())
    })?;
    for (number, pack) in &shortened_packs {
        replace_pack(&transaction, *number, pack)?;
    }
    transaction.commit()
}

/// Returns all names in the log: the names of kinds and of workspaces.
pub(in crate::store) fn names(connection: &Connection) -> Result<HashSet<String>, rusqlite::Error> {
    let mut names = HashSet::new();
    for_each_newest_first(connection, |_, pack| {
        names.extend(pack.names);
        Ok(())
    })?;
    Ok(names)
}

/// Renames workspaces in the log. `new_names` maps each old name to the new name.
pub(in crate::store) fn rename(
    connection: &Connection,
    new_names: &HashMap<String, String>,
) -> Result<(), rusqlite::Error> {
    let mut renamed_packs = Vec::new();
    for_each_newest_first(connection, |number, mut pack| {
        let mut has_changed = false;
        for name in &mut pack.names {
            if let Some(new_name) = new_names.get(name) {
                name.clone_from(new_name);
                has_changed = true;
            }
        }
        if has_changed {
            renamed_packs.push((number, pack));
        }
        Ok(())
    })?;
    renamed_packs.iter().try_for_each(|(number, pack)| replace_pack(connection, *number, pack))
}

fn count_changes(connection: &Connection) -> Result<usize, rusqlite::Error> {
    let count: i64 = connection
        .prepare_cached("SELECT coalesce(sum(changes), 0) FROM owners_plentiful")?
        .query_row([], |row| row.get(0))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Packs the rows of a file of schema version 5, which has one row per identifier, and drops its tables.
pub(in crate::store) fn pack_rows(connection: &Connection) -> Result<(), rusqlite::Error> {
    let mut statement = connection.prepare(
        "SELECT id, kind, workspace, learned_at_ms, used_at_ms FROM owners_plentiful_rows ORDER BY number",
    )?;
    let mut rows = statement.query([])?;
    let mut pack = OwnerPack::default();
    while let Some(row) = rows.next()? {
        let Ok(hash) = <[u8; 16]>::try_from(row.get::<_, Vec<u8>>(0)?) else { continue };
        let (kind, owner): (String, Option<String>) = (row.get(1)?, row.get(2)?);
        let (recorded_at, used_at) = (unsigned(row.get(3)?), unsigned(row.get(4)?));
        let (kind, owner) = (pack.name_index(&kind), owner.map(|owner| pack.name_index(&owner)));
        pack.changes.push(OwnerChange { hash, kind, owner, recorded_at, used_at });
        insert_pack(connection, &mut pack, MAX_ROW_CHANGES)?;
    }
    insert_pack(connection, &mut pack, 1)?;
    drop(rows);
    drop(statement);
    connection.execute_batch("DROP TABLE owners_plentiful_rows; DROP TABLE owners_passing_rows")
}
