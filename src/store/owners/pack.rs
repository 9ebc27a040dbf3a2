//! Encodes and decodes the rows of the log of owners: packs changes of a commit into the bytes of one row. A recent
//! change takes a few bytes more than the hash of its identifier.

use crate::elevenlabs::affinity::{Identifier, IdentifierHash, ResourceKind};
use crate::policy::units::UnixMs;
use crate::pool::{OwnerId, OwnershipEntry};

/// The changes in a row of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct OwnerPack {
    /// The names of kinds and owners, which the changes refer to by index.
    pub(super) names: Vec<String>,
    pub(super) changes: Vec<OwnerChange>,
}

/// A change of an identifier's owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OwnerChange {
    /// The hash of the identifier.
    pub(super) hash: [u8; 16],
    /// Index of the kind's name.
    pub(super) kind: usize,
    /// Index of the owner's name, or `None` if the identifier was removed.
    pub(super) owner: Option<usize>,
    /// The time at which the owner was recorded, in Unix milliseconds.
    pub(super) recorded_at: u64,
    /// The time at which the identifier was last used, in Unix milliseconds.
    pub(super) used_at: u64,
}

impl OwnerPack {
    /// Appends a change. The identifier was removed if `owner` is `None`.
    pub(super) fn push(
        &mut self,
        identifier: &Identifier,
        owner: Option<&str>,
        recorded_at: UnixMs,
        used_at: UnixMs,
    ) {
        let change = OwnerChange {
            hash: *identifier.hash.bytes(),
            kind: self.name_index(identifier.kind.as_str()),
            owner: owner.map(|owner| self.name_index(owner)),
            recorded_at: recorded_at.0,
            used_at: used_at.0,
        };
        self.changes.push(change);
    }

    /// Returns the index of a name, and adds the name if it is missing.
    pub(super) fn name_index(&mut self, name: &str) -> usize {
        self.names.iter().position(|known| known == name).unwrap_or_else(|| {
            self.names.push(name.to_owned());
            self.names.len() - 1
        })
    }

    /// Returns the latest use of an identifier in the pack.
    pub(super) fn last_used_at(&self) -> UnixMs {
        UnixMs(self.changes.iter().map(|change| change.used_at).max().unwrap_or(0))
    }

    /// Returns the owner that a change describes, or `None` if the identifier was removed or the change is unreadable.
    pub(super) fn entry(&self, change: &OwnerChange) -> Option<OwnershipEntry> {
        Some(OwnershipEntry {
            identifier: Identifier {
                kind: ResourceKind::parse(self.names.get(change.kind)?)?,
                hash: IdentifierHash::from_bytes(change.hash),
            },
            owner: OwnerId::from_stored(self.names.get(change.owner?)?),
            recorded_at: UnixMs(change.recorded_at),
            used_at: UnixMs(change.used_at),
        })
    }

    /// Encodes the names and then the changes. Times are encoded as differences from the previous time.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64 + self.changes.len() * 24);
        push_number(&mut bytes, self.names.len() as u64);
        for name in &self.names {
            push_number(&mut bytes, name.len() as u64);
            bytes.extend_from_slice(name.as_bytes());
        }
        let mut previous_used_at = 0;
        for change in &self.changes {
            bytes.extend_from_slice(&change.hash);
            push_number(&mut bytes, change.kind as u64);
            push_number(&mut bytes, change.owner.map_or(0, |owner| owner as u64 + 1));
            push_number(&mut bytes, zigzag_difference(previous_used_at, change.used_at));
            push_number(&mut bytes, zigzag_difference(change.used_at, change.recorded_at));
            previous_used_at = change.used_at;
        }
        bytes
    }

    /// Decodes the bytes that [`encode`](Self::encode) returns. Returns `None` for other bytes.
    pub(super) fn decode(mut bytes: &[u8]) -> Option<Self> {
        let bytes = &mut bytes;
        let mut pack = Self::default();
        for _ in 0..take_number(bytes)? {
            let length = usize::try_from(take_number(bytes)?).ok()?;
            let (name, rest) = bytes.split_at_checked(length)?;
            pack.names.push(String::from_utf8(name.to_vec()).ok()?);
            *bytes = rest;
        }
        let mut previous_used_at = 0;
        while !bytes.is_empty() {
            let (hash, rest) = bytes.split_first_chunk()?;
            *bytes = rest;
            let kind = usize::try_from(take_number(bytes)?).ok()?;
            let owner = usize::try_from(take_number(bytes)?).ok()?.checked_sub(1);
            let used_at = add_difference(previous_used_at, take_number(bytes)?);
            let recorded_at = add_difference(used_at, take_number(bytes)?);
            pack.changes.push(OwnerChange { hash: *hash, kind, owner, recorded_at, used_at });
            previous_used_at = used_at;
        }
        Some(pack)
    }
}

/// Appends a number as LEB128: seven bits per byte, the lowest bits first. The top bit of a byte is set if
/// more bytes follow.
fn push_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// Removes a LEB128 number from the start of `bytes`. Returns `None` if there is no complete number.
fn take_number(bytes: &mut &[u8]) -> Option<u64> {
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

/// Returns the difference between two numbers in zigzag encoding, which encodes small differences of either sign as
/// small numbers.
fn zigzag_difference(from: u64, to: u64) -> u64 {
    let difference = to.wrapping_sub(from).cast_signed();
    (difference << 1 ^ difference >> 63).cast_unsigned()
}

/// Adds a difference in zigzag encoding to a number.
fn add_difference(from: u64, zigzag: u64) -> u64 {
    from.wrapping_add(zigzag >> 1 ^ (zigzag & 1).wrapping_neg())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn any_change()(
            hash in any::<[u8; 16]>(),
            (kind, owner) in (0..3_usize, proptest::option::of(0..3_usize)),
            (recorded_at, used_at) in (any::<u64>(), any::<u64>()),
        ) -> OwnerChange {
            OwnerChange { hash, kind, owner, recorded_at, used_at }
        }
    }

    proptest! {
        #[test]
        fn an_encoded_pack_decodes_to_itself(
            names in proptest::collection::vec(".*", 0..4),
            changes in proptest::collection::vec(any_change(), 0..50),
        ) {
            let pack = OwnerPack { names, changes };
            prop_assert_eq!(OwnerPack::decode(&pack.encode()), Some(pack));
        }

        #[test]
        fn arbitrary_bytes_decode_to_a_valid_pack_or_to_none(
            bytes in proptest::collection::vec(any::<u8>(), 0..200)
        ) {
            if let Some(pack) = OwnerPack::decode(&bytes) {
                prop_assert_eq!(OwnerPack::decode(&pack.encode()), Some(pack));
            }
        }
    }

    #[test]
    fn a_recent_change_takes_a_few_bytes_more_than_its_hash() {
        let identifier = Identifier::new(ResourceKind::HistoryItem, "h");
        let mut pack = OwnerPack::default();
        for number in 0..1_000 {
            let time = UnixMs(1_796_000_000_000 + number / 6);
            pack.push(&identifier, Some("studio"), time, time);
        }
        let length = pack.encode().len();
        assert!(length < 1_000 * 20 + 50, "1,000 changes must take fewer than 20,050 bytes, not {length}");
    }
}
