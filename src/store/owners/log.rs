//! The log of identifiers that come with every request: all changes of a commit are packed into one
//! row, because single changes are never queried in the file. The latest change of an identifier counts.

use std::collections::{HashMap, HashSet};

use rusqlite::{Connection, params};

use crate::elevenlabs::affinity::{Kind, Named, Tag};
use crate::policy::units::UnixMs;
use crate::pool::{LearnedOwner, OwnerId};
use crate::proxy::OwnershipUpdate;
use crate::store::columns::timestamp;

/// Maximum changes per row: when a row at the limit is trimmed, the remainder is packed again.
const CHANGES_MAX: usize = 1_024;
/// Rows that one retention step deletes, and changes in them. A step is a commit, which costs more
/// than its contents.
const ROWS: usize = 64;
const CHANGES: usize = 16_384;

/// A change of an identifier's owner. Kind and owner are indices into the words of the pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OwnerChange {
    tag: [u8; 16],
    kind: usize,
    /// `None`: the owner no longer has the identifier.
    owner: Option<usize>,
    learned_at: u64,
    used_at: u64,
}

/// The content of a row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Pack {
    /// The names of kinds and owners.
    words: Vec<String>,
    changes: Vec<OwnerChange>,
}

impl Pack {
    fn word(&mut self, word: &str) -> usize {
        self.words.iter().position(|known| known == word).unwrap_or_else(|| {
            self.words.push(word.to_owned());
            self.words.len() - 1
        })
    }

    fn push(&mut self, named: &Named, owner: Option<&str>, learned_at: UnixMs, used_at: UnixMs) {
        let change = OwnerChange {
            tag: *named.tag.bytes(),
            kind: self.word(named.kind.word()),
            owner: owner.map(|owner| self.word(owner)),
            learned_at: learned_at.0,
            used_at: used_at.0,
        };
        self.changes.push(change);
    }

    /// The time of the latest use among the changes.
    fn used_at(&self) -> u64 {
        self.changes.iter().map(|change| change.used_at).max().unwrap_or(0)
    }

    /// Serializes the words and then the changes. Times are stored as differences from the previous
    /// one.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64 + self.changes.len() * 24);
        push(&mut bytes, self.words.len() as u64);
        for word in &self.words {
            push(&mut bytes, word.len() as u64);
            bytes.extend_from_slice(word.as_bytes());
        }
        let mut before = 0;
        for change in &self.changes {
            bytes.extend_from_slice(&change.tag);
            push(&mut bytes, change.kind as u64);
            push(&mut bytes, change.owner.map_or(0, |owner| owner as u64 + 1));
            push(&mut bytes, difference(change.used_at, before));
            push(&mut bytes, difference(change.learned_at, change.used_at));
            before = change.used_at;
        }
        bytes
    }

    /// Parses what [`bytes`](Self::bytes) has packed; `None` for anything else.
    fn of(mut bytes: &[u8]) -> Option<Self> {
        let bytes = &mut bytes;
        let mut pack = Self::default();
        for _ in 0..take(bytes)? {
            let length = usize::try_from(take(bytes)?).ok()?;
            let (word, rest) = bytes.split_at_checked(length)?;
            pack.words.push(String::from_utf8(word.to_vec()).ok()?);
            *bytes = rest;
        }
        let mut before = 0;
        while !bytes.is_empty() {
            let (tag, rest) = bytes.split_first_chunk()?;
            *bytes = rest;
            let kind = usize::try_from(take(bytes)?).ok()?;
            let owner = usize::try_from(take(bytes)?).ok()?;
            let used_at = from(before, take(bytes)?);
            let learned_at = from(used_at, take(bytes)?);
            pack.changes.push(OwnerChange {
                tag: *tag,
                kind,
                owner: owner.checked_sub(1),
                learned_at,
                used_at,
            });
            before = used_at;
        }
        Some(pack)
    }

    fn owner(&self, change: &OwnerChange) -> Option<LearnedOwner> {
        Some(LearnedOwner {
            named: Named {
                kind: Kind::of_word(self.words.get(change.kind)?)?,
                tag: Tag::of_bytes(change.tag),
            },
            owner: OwnerId::of_word(self.words.get(change.owner?)?),
            learned_at: UnixMs(change.learned_at),
            used_at: UnixMs(change.used_at),
        })
    }
}

/// Appends a number as LEB128: seven bits per byte, the lowest first; the top bit marks that more
/// bytes follow.
fn push(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// The zigzag difference from `from` to `to`, so that small steps in either direction are small
/// numbers.
fn difference(to: u64, from: u64) -> u64 {
    let difference = to.wrapping_sub(from).cast_signed();
    (difference << 1 ^ difference >> 63).cast_unsigned()
}

fn from(before: u64, difference: u64) -> u64 {
    before.wrapping_add(difference >> 1 ^ (difference & 1).wrapping_neg())
}

/// Appends changes to a log.
pub(super) fn add<'a>(
    connection: &Connection,
    changes: impl Iterator<Item = &'a OwnershipUpdate>,
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    let mut pack = Pack::default();
    for change in changes {
        match change {
            OwnershipUpdate::Recorded(LearnedOwner { named, owner, learned_at, used_at }) => {
                pack.push(named, Some(owner.word()), *learned_at, *used_at);
            }
            OwnershipUpdate::Forgotten(_) => pack.push(change.named(), None, now, now),
        }
        if pack.changes.len() == CHANGES_MAX {
            insert(connection, &std::mem::take(&mut pack))?;
        }
    }
    if pack.changes.is_empty() { Ok(()) } else { insert(connection, &pack) }
}

fn insert(connection: &Connection, pack: &Pack) -> Result<(), rusqlite::Error> {
    let insert = "INSERT INTO owners_plentiful (changes, used_at_ms, pack) VALUES (?1, ?2, ?3)";
    let columns = params![pack.changes.len() as i64, timestamp(UnixMs(pack.used_at())), pack.bytes()];
    connection.prepare_cached(insert)?.execute(columns).map(drop)
}

/// Replaces a pack by another one, or deletes the row if that is empty.
fn replace(connection: &Connection, number: i64, pack: &Pack) -> Result<(), rusqlite::Error> {
    if pack.changes.is_empty() {
        return connection.execute("DELETE FROM owners_plentiful WHERE number = ?1", [number]).map(drop);
    }
    let update = "UPDATE owners_plentiful SET changes = ?2, used_at_ms = ?3, pack = ?4 WHERE number = ?1";
    let columns = params![number, pack.changes.len() as i64, timestamp(UnixMs(pack.used_at())), pack.bytes()];
    connection.prepare_cached(update)?.execute(columns).map(drop)
}

/// The latest change of each identifier, the oldest first; identifiers without an owner are left
/// out.
pub(super) fn read(connection: &Connection) -> Result<Vec<LearnedOwner>, rusqlite::Error> {
    let (mut seen, mut owners) = (HashSet::new(), Vec::new());
    each_from_the_last(connection, |_, pack| {
        // An unreadable change is skipped: the owner is recorded again from later responses.
        let newest = pack.changes.iter().rev().filter(|change| seen.insert(change.tag));
        owners.extend(newest.filter_map(|change| pack.owner(change)));
        Ok(())
    })?;
    owners.reverse();
    Ok(owners)
}

fn each_from_the_last(
    connection: &Connection,
    mut each: impl FnMut(i64, Pack) -> Result<(), rusqlite::Error>,
) -> Result<(), rusqlite::Error> {
    let mut statement =
        connection.prepare("SELECT number, pack FROM owners_plentiful ORDER BY number DESC")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        each(row.get(0)?, Pack::of(row.get_ref(1)?.as_blob().unwrap_or_default()).unwrap_or_default())?;
    }
    Ok(())
}

/// Deletes some of the rows that are too old or too many; returns whether there may be more.
pub(super) fn forget_some(
    connection: &Connection,
    oldest: Option<UnixMs>,
    count_max: usize,
) -> Result<bool, rusqlite::Error> {
    if let Some(oldest) = oldest {
        let old = "DELETE FROM owners_plentiful WHERE number IN (
                SELECT number FROM (SELECT number, used_at_ms FROM owners_plentiful ORDER BY number LIMIT ?2)
                WHERE used_at_ms < ?1)";
        if connection.prepare_cached(old)?.execute(params![timestamp(oldest), ROWS as i64])? == ROWS {
            return Ok(true);
        }
    }
    let all = count(connection)?.saturating_sub(count_max);
    if all == 0 {
        return Ok(false);
    }
    let mut excess = all.min(CHANGES);
    let mut last = None;
    {
        let first = "SELECT number, changes, pack FROM owners_plentiful ORDER BY number LIMIT ?1";
        let mut statement = connection.prepare_cached(first)?;
        let mut rows = statement.query([ROWS as i64])?;
        while let Some(row) = rows.next()? {
            let number: i64 = row.get(0)?;
            let changes = usize::try_from(row.get::<_, i64>(1)?).unwrap_or(0);
            if changes > excess {
                // The row is deleted only in part.
                let pack = Pack::of(row.get_ref(2)?.as_blob().unwrap_or_default()).unwrap_or_default();
                let changes = pack.changes.get(excess..).unwrap_or_default().to_vec();
                last = Some((number, Pack { changes, ..pack }));
                excess = 0;
                break;
            }
            excess -= changes;
            last = Some((number, Pack::default()));
            if excess == 0 {
                break;
            }
        }
    }
    if let Some((number, pack)) = last {
        let transaction = connection.unchecked_transaction()?;
        transaction.prepare_cached("DELETE FROM owners_plentiful WHERE number < ?1")?.execute([number])?;
        replace(&transaction, number, &pack)?;
        transaction.commit()?;
    }
    Ok(all > CHANGES || excess > 0)
}

/// Removes superseded changes, which would otherwise displace current ones.
pub(in crate::store) fn tidy(connection: &Connection) -> Result<(), rusqlite::Error> {
    let transaction = connection.unchecked_transaction()?;
    let (mut seen, mut shorter) = (HashSet::new(), Vec::new());
    each_from_the_last(&transaction, |number, mut pack| {
        let before = pack.changes.len();
        pack.changes.reverse();
        pack.changes.retain(|change| seen.insert(change.tag) && change.owner.is_some());
        pack.changes.reverse();
        if pack.changes.len() < before || before == 0 {
            shorter.push((number, pack));
        }
        Ok(())
    })?;
    for (number, pack) in &shorter {
        replace(&transaction, *number, pack)?;
    }
    transaction.commit()
}

/// The words in the log, among them the names of workspaces.
pub(in crate::store) fn words(connection: &Connection) -> Result<HashSet<String>, rusqlite::Error> {
    let mut words = HashSet::new();
    each_from_the_last(connection, |_, pack| {
        words.extend(pack.words);
        Ok(())
    })?;
    Ok(words)
}

/// Renames workspaces in the log, from old names to new ones.
pub(in crate::store) fn rename(
    connection: &Connection,
    renamed: &HashMap<String, String>,
) -> Result<(), rusqlite::Error> {
    let mut changed = Vec::new();
    each_from_the_last(connection, |number, mut pack| {
        let mut has_changed = false;
        for word in &mut pack.words {
            if let Some(new_name) = renamed.get(word) {
                word.clone_from(new_name);
                has_changed = true;
            }
        }
        if has_changed {
            changed.push((number, pack));
        }
        Ok(())
    })?;
    changed.iter().try_for_each(|(number, pack)| replace(connection, *number, pack))
}

fn count(connection: &Connection) -> Result<usize, rusqlite::Error> {
    let count: i64 = connection
        .prepare_cached("SELECT coalesce(sum(changes), 0) FROM owners_plentiful")?
        .query_row([], |row| row.get(0))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Packs the rows of an earlier version, which kept one row per identifier, and drops their tables.
pub(in crate::store) fn pack_rows(connection: &Connection) -> Result<(), rusqlite::Error> {
    let mut statement = connection.prepare(
        "SELECT id, kind, workspace, learned_at_ms, used_at_ms FROM owners_plentiful_rows ORDER BY number",
    )?;
    let mut rows = statement.query([])?;
    let mut pack = Pack::default();
    while let Some(row) = rows.next()? {
        let Ok(tag) = <[u8; 16]>::try_from(row.get::<_, Vec<u8>>(0)?) else { continue };
        let (kind, owner): (String, Option<String>) = (row.get(1)?, row.get(2)?);
        let at = |index| row.get::<_, i64>(index).map(|at| u64::try_from(at).unwrap_or(0));
        let (learned_at, used_at) = (at(3)?, at(4)?);
        let (kind, owner) = (pack.word(&kind), owner.map(|owner| pack.word(&owner)));
        pack.changes.push(OwnerChange { tag, kind, owner, learned_at, used_at });
        if pack.changes.len() == CHANGES_MAX {
            insert(connection, &std::mem::take(&mut pack))?;
        }
    }
    if !pack.changes.is_empty() {
        insert(connection, &pack)?;
    }
    drop(rows);
    drop(statement);
    connection.execute_batch("DROP TABLE owners_plentiful_rows; DROP TABLE owners_passing_rows")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn any_change()(
            tag in any::<[u8; 16]>(),
            (kind, owner) in (0..3_usize, proptest::option::of(0..3_usize)),
            (learned_at, used_at) in (any::<u64>(), any::<u64>()),
        ) -> OwnerChange {
            OwnerChange { tag, kind, owner, learned_at, used_at }
        }
    }

    proptest! {
        #[test]
        fn a_pack_is_read_as_it_was_written(
            words in proptest::collection::vec(".*", 0..4),
            changes in proptest::collection::vec(any_change(), 0..50),
        ) {
            let pack = Pack { words, changes };
            prop_assert_eq!(Pack::of(&pack.bytes()), Some(pack));
        }

        #[test]
        fn any_other_bytes_are_no_pack(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(pack) = Pack::of(&bytes) {
                prop_assert_eq!(Pack::of(&pack.bytes()), Some(pack));
            }
        }
    }

    #[test]
    fn a_recent_change_takes_a_few_bytes_more_than_its_tag() {
        let named = Named::new(Kind::HistoryItem, "h");
        let mut pack = Pack::default();
        for at in 0..1_000 {
            let at = UnixMs(1_796_000_000_000 + at / 6);
            pack.push(&named, Some("studio"), at, at);
        }
        assert!(pack.bytes().len() < 1_000 * 20 + 50, "{}", pack.bytes().len());
    }
}
