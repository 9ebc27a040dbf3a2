//! Maps identifiers of resources to the workspaces that own them, with bounds on the number and the age of the entries,
//! which depend on the storage class of the identifier. An entry is recorded from a response or from a reply of another
//! replica, and looked up for each request that contains its identifier. The database stores the entries, and a restart
//! restores them.
//!
//! The index is separate from the roster because its entries outlive the keys. The entries of a workspace
//! apply again when its keys are removed and later configured again.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::elevenlabs::affinity::{Identifier, IdentifierHash, ResourceKind, RetentionLimits, StorageClass};
use crate::policy::units::UnixMs;
use crate::secret::Fingerprint;

/// The stable identity of a workspace: its configured name, or else the fingerprint of its first key.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct OwnerId(Arc<str>);

impl OwnerId {
    /// Creates the identity of a workspace from its configured name and its first key.
    #[must_use]
    pub fn new(name: Option<&str>, first_key: Fingerprint) -> Self {
        Self(name.map_or_else(|| first_key.to_string().into(), Into::into))
    }

    /// Creates an identity from its stored form, which [`as_str`](Self::as_str) returns.
    #[must_use]
    pub fn from_stored(text: &str) -> Self {
        Self(text.into())
    }

    /// Returns the identity as it is stored.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is the identity of a workspace without a name whose first key is `key`.
    #[must_use]
    pub fn is_first_key(&self, key: Fingerprint) -> bool {
        Fingerprint::parse(&self.0) == Some(key)
    }
}

impl fmt::Debug for OwnerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnerId({})", self.0)
    }
}

/// An entry of the index, as the database stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnershipEntry {
    /// The identifier of a resource.
    pub identifier: Identifier,
    /// The workspace that owns the resource.
    pub owner: OwnerId,
    /// Time at which the ownership was recorded.
    pub recorded_at: UnixMs,
    /// Time of the last use of the entry.
    pub used_at: UnixMs,
}

/// The result of a lookup of a known identifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerLookup {
    /// The workspace that owns the resource.
    pub owner: OwnerId,
    /// The entry with its new time of use, which the caller stores, or `None` if a time of use was stored within the
    /// last day.
    pub update: Option<OwnershipEntry>,
}

/// Minimum interval between two writes of an entry's time of use.
const MIN_USE_WRITE_INTERVAL: Duration = Duration::from_secs(24 * 3_600);
/// Number of shards, each with its own lock. With a few dozen cores, contention is rare.
const SHARDS: usize = 64;
/// The divisor of the maximum number of entries: a full map evicts the quotient in one step, the entries that were
/// unused for the longest time first. The following insertions then need no eviction.
const EVICTION_DIVISOR: usize = 8;

/// The owners of identifiers, with bounds on their number and age.
///
/// A lookup holds the lock of one shard for one access to a hash map.
#[derive(Debug)]
pub struct OwnershipIndex {
    shards: Vec<Mutex<OwnerShard>>,
    limits: RetentionLimits,
}

/// One map per storage class, because each class has its own maximum number of identifiers.
#[derive(Debug, Default)]
struct OwnerShard([OwnerMap; StorageClass::ALL.len()]);

type OwnerMap = HashMap<IdentifierHash, IndexEntry, BuildHasherDefault<FoldingHasher>>;

impl OwnerShard {
    fn map_of(&mut self, class: StorageClass) -> &mut OwnerMap {
        &mut self.0[usize::from(class.number())]
    }
}

#[derive(Clone, Debug)]
struct IndexEntry {
    kind: ResourceKind,
    owner: OwnerId,
    recorded_at: UnixMs,
    used_at: UnixMs,
}

/// A hasher for [`IdentifierHash`], whose bytes are a hash already. It only folds them into one word.
#[derive(Debug, Default)]
struct FoldingHasher(u64);

impl Hasher for FoldingHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            // The first byte selects the shard. The other bytes distribute the entries within the shard.
            self.0 = self.0.rotate_left(17) ^ u64::from_be_bytes(word);
        }
    }
}

impl OwnershipIndex {
    /// Creates an empty index.
    #[must_use]
    pub fn new(limits: RetentionLimits) -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), limits }
    }

    /// Returns the bounds on the number and age of entries.
    #[must_use]
    pub fn limits(&self) -> RetentionLimits {
        self.limits
    }

    /// Returns the owner of an identifier, if it is known. Updates the entry's time of use at most once a day.
    pub fn find(&self, identifier: &Identifier, now: UnixMs) -> Option<OwnerLookup> {
        let Identifier { kind, hash } = *identifier;
        let mut shard = self.shard(&hash);
        let map = shard.map_of(kind.storage_class());
        let entry = map.get_mut(&hash)?;
        if !self.limits.is_current(kind, entry.recorded_at, entry.used_at, now) {
            map.remove(&hash);
            return None;
        }
        let is_update_due = now.since(entry.used_at) >= MIN_USE_WRITE_INTERVAL;
        if is_update_due {
            entry.used_at = now;
        }
        Some(OwnerLookup { owner: entry.owner.clone(), update: is_update_due.then(|| entry.to_stored(hash)) })
    }

    /// Records the owner of an identifier. Returns the entry, which the caller stores, or `None` if the owner was
    /// known and stored within the last day.
    pub fn record(&self, identifier: Identifier, owner: &OwnerId, now: UnixMs) -> Option<OwnershipEntry> {
        let Identifier { kind, hash } = identifier;
        let mut shard = self.shard(&hash);
        let map = shard.map_of(kind.storage_class());
        let is_known = map.get(&hash).is_some_and(|entry| {
            entry.owner == *owner
                && now.since(entry.used_at) < MIN_USE_WRITE_INTERVAL
                && self.limits.is_current(kind, entry.recorded_at, entry.used_at, now)
        });
        if is_known {
            return None;
        }
        let entry = IndexEntry { kind, owner: owner.clone(), recorded_at: now, used_at: now };
        let stored = entry.to_stored(hash);
        map.insert(hash, entry);
        self.evict_excess(map, kind.storage_class());
        Some(stored)
    }

    /// Removes the entry of an identifier whose resource does not exist in the recorded workspace.
    pub fn remove(&self, identifier: &Identifier) {
        self.shard(&identifier.hash).map_of(identifier.kind.storage_class()).remove(&identifier.hash);
    }

    /// Restores the entries of the previous run. If they exceed the bounds, the entries that were unused for the
    /// longest time are evicted.
    pub fn restore(&self, entries: Vec<OwnershipEntry>, now: UnixMs) {
        for OwnershipEntry { identifier: Identifier { kind, hash }, owner, recorded_at, used_at } in entries {
            if self.limits.is_current(kind, recorded_at, used_at, now) {
                let mut shard = self.shard(&hash);
                let map = shard.map_of(kind.storage_class());
                map.insert(hash, IndexEntry { kind, owner, recorded_at, used_at });
                self.evict_excess(map, kind.storage_class());
            }
        }
    }

    /// Returns the number of entries.
    #[must_use]
    pub fn count(&self) -> usize {
        let shards = self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner));
        shards.map(|shard| shard.0.iter().map(HashMap::len).sum::<usize>()).sum()
    }

    fn shard(&self, hash: &IdentifierHash) -> MutexGuard<'_, OwnerShard> {
        let index = usize::from(hash.bytes()[0]) % SHARDS;
        // A panic cannot leave a partial change, so a poisoned shard is still consistent.
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Evicts entries of `map` if it has more entries than its class may have.
    fn evict_excess(&self, map: &mut OwnerMap, class: StorageClass) {
        let max_count = (self.limits.max_count(class) / SHARDS).max(1);
        if map.len() <= max_count {
            return;
        }
        let mut use_times: Vec<UnixMs> = map.values().map(|entry| entry.used_at).collect();
        let evicted_count = (map.len() - max_count).max(max_count / EVICTION_DIVISOR);
        let (_, &mut latest_evicted, _) = use_times.select_nth_unstable(evicted_count - 1);
        let mut left_to_evict = evicted_count;
        map.retain(|_, entry| {
            let is_evicted = left_to_evict > 0 && entry.used_at <= latest_evicted;
            left_to_evict -= usize::from(is_evicted);
            !is_evicted
        });
    }
}

impl IndexEntry {
    fn to_stored(&self, hash: IdentifierHash) -> OwnershipEntry {
        OwnershipEntry {
            identifier: Identifier { kind: self.kind, hash },
            owner: self.owner.clone(),
            recorded_at: self.recorded_at,
            used_at: self.used_at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_796_000_000_000);
    const DAY: Duration = Duration::from_secs(24 * 3_600);
    const LIMITS: RetentionLimits =
        RetentionLimits { max_identifiers: 64 * 40, max_idle: Some(Duration::from_secs(30 * 24 * 3_600)) };

    fn voice(id: &str) -> Identifier {
        Identifier::new(ResourceKind::Voice, id)
    }

    fn owner(name: &str) -> OwnerId {
        OwnerId::new(Some(name), Fingerprint::new("sk"))
    }

    fn find_owner(index: &OwnershipIndex, identifier: Identifier, now: UnixMs) -> Option<OwnerId> {
        index.find(&identifier, now).map(|lookup| lookup.owner)
    }

    #[test]
    fn the_owner_recorded_last_is_found() {
        let index = OwnershipIndex::new(LIMITS);
        assert_eq!(index.find(&voice("v"), NOW), None);
        let entry = index.record(voice("v"), &owner("a"), NOW).unwrap();
        assert_eq!((entry.identifier, entry.owner.as_str()), (voice("v"), "a"));
        assert_eq!(index.record(voice("v"), &owner("a"), NOW), None, "a known entry must not be added again");
        assert_eq!(find_owner(&index, voice("v"), NOW), Some(owner("a")));
        assert!(index.record(voice("v"), &owner("b"), NOW).is_some());
        assert_eq!(find_owner(&index, voice("v"), NOW), Some(owner("b")));
        assert_eq!(find_owner(&index, Identifier::new(ResourceKind::Agent, "v"), NOW), None);
        index.remove(&voice("v"));
        assert_eq!(index.find(&voice("v"), NOW), None);
    }

    #[test]
    fn a_used_entry_is_retained_and_stored_once_a_day() {
        let index = OwnershipIndex::new(LIMITS);
        index.record(voice("v"), &owner("a"), NOW);
        assert_eq!(index.find(&voice("v"), NOW.plus(DAY / 2)).unwrap().update, None);
        let entry = index.find(&voice("v"), NOW.plus(DAY)).unwrap().update.unwrap();
        assert_eq!((entry.recorded_at, entry.used_at), (NOW, NOW.plus(DAY)));
        assert_eq!(index.find(&voice("v"), NOW.plus(DAY)).unwrap().update, None);
        assert!(find_owner(&index, voice("v"), NOW.plus(DAY * 30)).is_some());
        assert!(
            find_owner(&index, voice("v"), NOW.plus(DAY * 60)).is_none(),
            "an entry that was unused for 30 days must expire"
        );
        assert_eq!(index.count(), 0);
    }

    #[test]
    fn identifiers_of_requests_never_evict_managed_resources() {
        let index = OwnershipIndex::new(LIMITS);
        for number in 0..100 {
            index.record(voice(&format!("v{number}")), &owner("a"), NOW);
        }
        for number in 0..50_000 {
            let now = UnixMs(NOW.0 + number);
            index.record(Identifier::new(ResourceKind::Request, &format!("r{number}")), &owner("a"), now);
            index.record(Identifier::new(ResourceKind::HistoryItem, &format!("h{number}")), &owner("a"), now);
        }
        assert!(
            index.count() <= LIMITS.max_identifiers,
            "the bound must hold, not {} entries",
            index.count()
        );
        let recorded_voices =
            (0..100).filter(|number| index.find(&voice(&format!("v{number}")), NOW).is_some());
        assert_eq!(recorded_voices.count(), 100);
        let newest = Identifier::new(ResourceKind::Request, "r49999");
        assert!(index.find(&newest, NOW).is_some(), "the oldest entries must be evicted first");
        assert!(index.find(&Identifier::new(ResourceKind::Request, "r0"), NOW).is_none());
    }

    #[test]
    fn an_expired_entry_is_not_restored() {
        let index = OwnershipIndex::new(LIMITS);
        let records = vec![
            index.record(voice("v"), &owner("a"), NOW).unwrap(),
            index.record(Identifier::new(ResourceKind::Request, "r"), &owner("a"), NOW).unwrap(),
        ];
        let restored_index = OwnershipIndex::new(LIMITS);
        restored_index.restore(records, NOW.plus(DAY));
        assert_eq!(find_owner(&restored_index, voice("v"), NOW.plus(DAY)), Some(owner("a")));
        assert_eq!(restored_index.count(), 1, "the entry of a request must expire after a day");
    }

    #[test]
    fn threads_record_and_look_up_owners_concurrently() {
        let index = OwnershipIndex::new(LIMITS);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let index = &index;
                scope.spawn(move || {
                    for number in 0..2_000 {
                        let identifier = voice(&format!("v{}", (number * 7 + thread) % 300));
                        index.record(identifier, &owner("a"), NOW);
                        assert_eq!(find_owner(index, identifier, NOW), Some(owner("a")));
                    }
                });
            }
        });
        assert_eq!(index.count(), 300);
    }

    #[test]
    fn a_workspace_is_identified_by_its_name_or_its_first_key() {
        let key = Fingerprint::new("sk");
        assert!(OwnerId::new(None, key).is_first_key(key));
        assert!(!OwnerId::new(None, key).is_first_key(Fingerprint::new("sk2")));
        assert!(!OwnerId::new(Some("studio"), key).is_first_key(key));
        assert_eq!(OwnerId::new(None, key), OwnerId::from_stored(&key.to_string()));
    }
}
