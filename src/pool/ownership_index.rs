//! Maps identifiers of resources to the workspaces that own them. Entries are recorded from
//! responses and looked up for each request that names an identifier.
//!
//! It is separate from the roster because it outlives the keys: entries of a workspace whose keys are
//! configured again later still count.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::elevenlabs::affinity::{Class, Keeping, Kind, Named, Tag};
use crate::policy::units::UnixMs;
use crate::secret::Fingerprint;

/// The stable identity of a workspace: its configured name, else the fingerprint of its first key.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct OwnerId(Arc<str>);

impl OwnerId {
    /// The identity of a workspace: its name if it has one, else the fingerprint of its first key.
    #[must_use]
    pub fn of(name: Option<&str>, first_key: Fingerprint) -> Self {
        Self(name.map_or_else(|| first_key.to_string().into(), Into::into))
    }

    /// Creates an identity from the text under which it is stored.
    #[must_use]
    pub fn of_word(word: &str) -> Self {
        Self(word.into())
    }

    /// The text under which it is stored.
    #[must_use]
    pub fn word(&self) -> &str {
        &self.0
    }

    /// Whether this is the identity of an unnamed workspace with this first key.
    #[must_use]
    pub fn is_of(&self, key: Fingerprint) -> bool {
        Fingerprint::parse(&self.0) == Some(key)
    }
}

impl fmt::Debug for OwnerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnerId({})", self.0)
    }
}

/// An ownership entry, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LearnedOwner {
    /// The identifier.
    pub named: Named,
    /// The workspace that owns it.
    pub owner: OwnerId,
    /// Time at which the ownership was recorded.
    pub learned_at: UnixMs,
    /// Time of the last use of the entry.
    pub used_at: UnixMs,
}

/// The result of a lookup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownOwner {
    /// The workspace that owns the identifier.
    pub owner: OwnerId,
    /// The entry to be stored again; `None` when its time of use was stored within the last day.
    pub update: Option<LearnedOwner>,
}

/// Minimum interval between two writes of an entry's time of use.
const MIN_USE_WRITE_INTERVAL: Duration = Duration::from_secs(24 * 3_600);
/// Number of shards, each behind its own lock: with a few dozen cores, two rarely contend.
const SHARDS: usize = 64;
/// A full shard evicts its maximum divided by this at once, the oldest entries first, so that not
/// every later insertion has to evict one.
const EVICTION_DIVISOR: usize = 8;

/// Owners by identifier, bounded in number and age.
///
/// A lookup holds one of 64 locks for one access to a hash map, and never across an await.
#[derive(Debug)]
pub struct OwnershipIndex {
    shards: Vec<Mutex<OwnerShard>>,
    keeping: Keeping,
}

/// One map per class, so that each class has its own bound.
#[derive(Debug, Default)]
struct OwnerShard([HashMap<Tag, OwnerEntry, BuildHasherDefault<TagHasher>>; Class::ALL.len()]);

#[derive(Clone, Debug)]
struct OwnerEntry {
    kind: Kind,
    owner: OwnerId,
    learned_at: UnixMs,
    used_at: UnixMs,
}

/// Uses the tag unchanged, because it is a hash already.
#[derive(Debug, Default)]
struct TagHasher(u64);

impl Hasher for TagHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            // The first byte selects the shard; the other bytes distribute the entries within it.
            self.0 = self.0.rotate_left(17) ^ u64::from_be_bytes(word);
        }
    }
}

impl OwnershipIndex {
    /// An empty index.
    #[must_use]
    pub fn new(keeping: Keeping) -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), keeping }
    }

    /// The bounds on number and age.
    #[must_use]
    pub fn keeping(&self) -> Keeping {
        self.keeping
    }

    fn shard(&self, tag: &Tag) -> MutexGuard<'_, OwnerShard> {
        let index = usize::from(tag.bytes()[0]) % SHARDS;
        // Every change is complete in itself, so a panic leaves nothing inconsistent.
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the owner of `named` if it is known, and updates the entry's time of use.
    pub fn find(&self, named: &Named, now: UnixMs) -> Option<KnownOwner> {
        let mut shard = self.shard(&named.tag);
        let map = &mut shard.0[usize::from(named.kind.class().number())];
        let entry = map.get_mut(&named.tag)?;
        if !self.keeping.counts(named.kind, entry.learned_at, entry.used_at, now) {
            map.remove(&named.tag);
            return None;
        }
        let is_due = now.since(entry.used_at) >= MIN_USE_WRITE_INTERVAL;
        if is_due {
            entry.used_at = now;
        }
        Some(KnownOwner { owner: entry.owner.clone(), update: is_due.then(|| entry.to_stored(named.tag)) })
    }

    /// Records that `named` belongs to `owner`. Returns the entry to be stored; `None` when it was known.
    pub fn record(&self, named: Named, owner: &OwnerId, now: UnixMs) -> Option<LearnedOwner> {
        let mut shard = self.shard(&named.tag);
        let map = &mut shard.0[usize::from(named.kind.class().number())];
        let new_entry =
            || OwnerEntry { kind: named.kind, owner: owner.clone(), learned_at: now, used_at: now };
        let entry = match map.entry(named.tag) {
            Slot::Occupied(slot) => {
                let entry = slot.into_mut();
                let is_known = entry.owner == *owner
                    && now.since(entry.used_at) < MIN_USE_WRITE_INTERVAL
                    && self.keeping.counts(named.kind, entry.learned_at, entry.used_at, now);
                if is_known {
                    return None;
                }
                *entry = new_entry();
                entry
            }
            Slot::Vacant(slot) => slot.insert(new_entry()),
        };
        let stored = entry.to_stored(named.tag);
        self.evict_excess(map, named.kind.class());
        Some(stored)
    }

    /// Removes the entry of `named`, because its owner no longer has it.
    pub fn forget(&self, named: &Named) {
        self.shard(&named.tag).0[usize::from(named.kind.class().number())].remove(&named.tag);
    }

    /// Restores the entries of the previous run. When there are too many, the oldest are evicted.
    pub fn restore(&self, records: Vec<LearnedOwner>, now: UnixMs) {
        for LearnedOwner { named, owner, learned_at, used_at } in records {
            if self.keeping.counts(named.kind, learned_at, used_at, now) {
                let mut shard = self.shard(&named.tag);
                let map = &mut shard.0[usize::from(named.kind.class().number())];
                map.insert(named.tag, OwnerEntry { kind: named.kind, owner, learned_at, used_at });
                self.evict_excess(map, named.kind.class());
            }
        }
    }

    /// Number of known identifiers.
    #[must_use]
    pub fn count(&self) -> usize {
        let shards = self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner));
        shards.map(|shard| shard.0.iter().map(HashMap::len).sum::<usize>()).sum()
    }

    fn evict_excess(&self, map: &mut HashMap<Tag, OwnerEntry, BuildHasherDefault<TagHasher>>, class: Class) {
        let count_max = (self.keeping.count_max(class) / SHARDS).max(1);
        if map.len() <= count_max {
            return;
        }
        let mut ages: Vec<UnixMs> = map.values().map(|entry| entry.used_at).collect();
        let evicted = (map.len() - count_max).max(count_max / EVICTION_DIVISOR);
        let (_, &mut youngest, _) = ages.select_nth_unstable(evicted - 1);
        let mut left = evicted;
        map.retain(|_, entry| {
            let is_evicted = left > 0 && entry.used_at <= youngest;
            left -= usize::from(is_evicted);
            !is_evicted
        });
    }
}

impl OwnerEntry {
    fn to_stored(&self, tag: Tag) -> LearnedOwner {
        LearnedOwner {
            named: Named { kind: self.kind, tag },
            owner: self.owner.clone(),
            learned_at: self.learned_at,
            used_at: self.used_at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_796_000_000_000);
    const DAY: Duration = Duration::from_secs(24 * 3_600);
    const KEEPING: Keeping =
        Keeping { identifiers_max: 64 * 40, kept: Some(Duration::from_secs(30 * 24 * 3_600)) };

    fn voice(id: &str) -> Named {
        Named::new(Kind::Voice, id)
    }

    fn identity(name: &str) -> OwnerId {
        OwnerId::of(Some(name), Fingerprint::of("sk"))
    }

    fn owner(owners: &OwnershipIndex, named: Named, now: UnixMs) -> Option<OwnerId> {
        owners.find(&named, now).map(|found| found.owner)
    }

    #[test]
    fn a_recorded_owner_is_found_and_the_latest_counts() {
        let owners = OwnershipIndex::new(KEEPING);
        assert_eq!(owners.find(&voice("v"), NOW), None);
        let learned = owners.record(voice("v"), &identity("a"), NOW).unwrap();
        assert_eq!((learned.named, learned.owner.word()), (voice("v"), "a"));
        assert_eq!(owners.record(voice("v"), &identity("a"), NOW), None, "it is known");
        assert_eq!(owner(&owners, voice("v"), NOW), Some(identity("a")));
        assert!(owners.record(voice("v"), &identity("b"), NOW).is_some());
        assert_eq!(owner(&owners, voice("v"), NOW), Some(identity("b")));
        assert_eq!(owner(&owners, Named::new(Kind::Agent, "v"), NOW), None);
        owners.forget(&voice("v"));
        assert_eq!(owners.find(&voice("v"), NOW), None);
    }

    #[test]
    fn a_used_entry_is_kept_and_stored_once_a_day() {
        let owners = OwnershipIndex::new(KEEPING);
        owners.record(voice("v"), &identity("a"), NOW);
        assert_eq!(owners.find(&voice("v"), NOW.plus(DAY / 2)).unwrap().update, None);
        let used = owners.find(&voice("v"), NOW.plus(DAY)).unwrap().update.unwrap();
        assert_eq!((used.learned_at, used.used_at), (NOW, NOW.plus(DAY)));
        assert_eq!(owners.find(&voice("v"), NOW.plus(DAY)).unwrap().update, None);
        assert!(owner(&owners, voice("v"), NOW.plus(DAY * 30)).is_some());
        assert!(
            owner(&owners, voice("v"), NOW.plus(DAY * 60)).is_none(),
            "the entry was unused for too long"
        );
        assert_eq!(owners.count(), 0);
    }

    #[test]
    fn identifiers_of_traffic_never_evict_managed_resources() {
        let owners = OwnershipIndex::new(KEEPING);
        for index in 0..100 {
            owners.record(voice(&format!("v{index}")), &identity("a"), NOW);
        }
        for index in 0..50_000 {
            let now = UnixMs(NOW.0 + index);
            owners.record(Named::new(Kind::Request, &format!("r{index}")), &identity("a"), now);
            owners.record(Named::new(Kind::HistoryItem, &format!("h{index}")), &identity("a"), now);
        }
        assert!(owners.count() <= KEEPING.identifiers_max, "{}", owners.count());
        let known = (0..100).filter(|index| owners.find(&voice(&format!("v{index}")), NOW).is_some());
        assert_eq!(known.count(), 100);
        let newest = Named::new(Kind::Request, "r49999");
        assert!(owners.find(&newest, NOW).is_some(), "the oldest are evicted first");
        assert!(owners.find(&Named::new(Kind::Request, "r0"), NOW).is_none());
    }

    #[test]
    fn a_restored_entry_counts_if_it_is_not_too_old() {
        let owners = OwnershipIndex::new(KEEPING);
        let records = vec![
            owners.record(voice("v"), &identity("a"), NOW).unwrap(),
            owners.record(Named::new(Kind::Request, "r"), &identity("a"), NOW).unwrap(),
        ];
        let next = OwnershipIndex::new(KEEPING);
        next.restore(records, NOW.plus(DAY));
        assert_eq!(owner(&next, voice("v"), NOW.plus(DAY)), Some(identity("a")));
        assert_eq!(next.count(), 1, "a request cannot be continued after a day");
    }

    #[test]
    fn many_threads_record_and_look_up_at_once() {
        let owners = OwnershipIndex::new(KEEPING);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let owners = &owners;
                scope.spawn(move || {
                    for index in 0..2_000 {
                        let named = voice(&format!("v{}", (index * 7 + thread) % 300));
                        owners.record(named, &identity("a"), NOW);
                        assert_eq!(owner(owners, named, NOW), Some(identity("a")));
                    }
                });
            }
        });
        assert_eq!(owners.count(), 300);
    }

    #[test]
    fn a_workspace_is_identified_by_its_name_or_its_first_key() {
        let key = Fingerprint::of("sk");
        assert!(OwnerId::of(None, key).is_of(key));
        assert!(!OwnerId::of(None, key).is_of(Fingerprint::of("sk2")));
        assert!(!OwnerId::of(Some("studio"), key).is_of(key));
        assert_eq!(OwnerId::of(None, key), OwnerId::of_word(&key.to_string()));
    }
}
