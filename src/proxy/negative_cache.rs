//! Caches the lookups in other replicas that found no value, for `replica_owners`, so that a request for the same
//! value does not repeat the lookup. Most requests name a voice that belongs to no account.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::policy::units::UnixMs;

/// Maximum number of entries. An entry takes a few dozen bytes.
const MAX_ENTRIES: usize = 4_096;

/// The lookups that found no value, each with its expiry.
#[derive(Debug)]
pub(super) struct NegativeCache<K>(Mutex<HashMap<K, UnixMs>>);

impl<K> Default for NegativeCache<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash> NegativeCache<K> {
    /// Returns whether a lookup of `key` is known at `now` to find no value.
    pub(super) fn contains(&self, key: &K, now: UnixMs) -> bool {
        self.lock().get(key).is_some_and(|expiry| *expiry > now)
    }

    /// Records for `ttl` that a lookup of `key` finds no value. If the cache is full of unexpired entries, all
    /// entries are removed, because a lookup costs less than a larger table.
    pub(super) fn insert(&self, key: K, ttl: Duration, now: UnixMs) {
        let mut expiries = self.lock();
        if expiries.len() >= MAX_ENTRIES {
            expiries.retain(|_, expiry| *expiry > now);
        }
        if expiries.len() >= MAX_ENTRIES {
            expiries.clear();
        }
        expiries.insert(key, now.plus(ttl));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, UnixMs>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000);
    const TTL: Duration = Duration::from_secs(10);

    #[test]
    fn an_entry_is_valid_for_its_ttl() {
        let cache = NegativeCache::default();
        cache.insert("voice", TTL, NOW);
        assert!(cache.contains(&"voice", NOW) && !cache.contains(&"other", NOW));
        assert!(!cache.contains(&"voice", NOW.plus(TTL)));
    }

    #[test]
    fn the_table_is_bounded() {
        let cache = NegativeCache::default();
        for number in 0..=MAX_ENTRIES {
            cache.insert(number, TTL, NOW);
        }
        assert!(cache.lock().len() <= MAX_ENTRIES);
        assert!(cache.contains(&MAX_ENTRIES, NOW), "the newest entry must be kept");
    }
}
