//! Caches the resources that no account has. The next request for one of them is sent to only one account.
//! Otherwise every request with a misspelled voice would be sent to every account, with its whole body.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::elevenlabs::affinity::{IdentifierHash, RequestIdentifiers};
use crate::policy::units::UnixMs;

/// Maximum number of entries. An entry takes a few dozen bytes.
const MAX_ENTRIES: usize = 4_096;

/// The resources that no account has, keyed by all identifiers of the request.
#[derive(Debug, Default)]
pub(super) struct NotFoundCache {
    /// The number of entries. Lookups read it without the lock while the cache is empty.
    entry_count: AtomicUsize,
    expiries: Mutex<HashMap<Vec<IdentifierHash>, UnixMs>>,
}

/// Returns the hashes of all identifiers in a fixed order.
fn cache_key(identifiers: &RequestIdentifiers) -> Vec<IdentifierHash> {
    let mut hashes: Vec<IdentifierHash> = identifiers.all().map(|identifier| identifier.hash).collect();
    hashes.sort_unstable();
    hashes
}

impl NotFoundCache {
    /// Returns whether exactly these identifiers are cached at `now`.
    pub(super) fn contains(&self, identifiers: &RequestIdentifiers, now: UnixMs) -> bool {
        if self.entry_count.load(Ordering::Acquire) == 0 {
            return false;
        }
        self.lock().get(&cache_key(identifiers)).is_some_and(|expiry| *expiry > now)
    }

    /// Caches for `ttl` that no account has the resources. A full cache drops its expired entries, and
    /// ignores the new entry if no entry has expired.
    pub(super) fn insert(&self, identifiers: &RequestIdentifiers, ttl: Duration, now: UnixMs) {
        let mut expiries = self.lock();
        if expiries.len() >= MAX_ENTRIES {
            expiries.retain(|_, expiry| *expiry > now);
        }
        if expiries.len() < MAX_ENTRIES {
            expiries.insert(cache_key(identifiers), now.plus(ttl));
        }
        self.entry_count.store(expiries.len(), Ordering::Release);
    }

    /// Removes the entry of resources that an account has.
    pub(super) fn remove(&self, identifiers: &RequestIdentifiers) {
        if self.entry_count.load(Ordering::Acquire) > 0 {
            let mut expiries = self.lock();
            expiries.remove(&cache_key(identifiers));
            self.entry_count.store(expiries.len(), Ordering::Release);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<IdentifierHash>, UnixMs>> {
        self.expiries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000);
    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn an_entry_is_valid_for_its_ttl_and_only_for_the_same_identifiers() {
        let cache = NotFoundCache::default();
        let voice = RequestIdentifiers::parse("/v1/text-to-speech/abc", None);
        let other_voice = RequestIdentifiers::parse("/v1/text-to-speech/abd", None);
        assert!(!cache.contains(&voice, NOW));
        cache.insert(&voice, MINUTE, NOW);
        assert!(cache.contains(&voice, NOW) && !cache.contains(&other_voice, NOW));
        let mut with_request_id = voice.clone();
        with_request_id.add_body(br#"{"previous_request_ids":["r1"]}"#);
        assert!(!cache.contains(&with_request_id, NOW));
        assert!(!cache.contains(&voice, NOW.plus(MINUTE)));
        cache.remove(&voice);
        assert!(!cache.contains(&voice, NOW));
    }

    #[test]
    fn the_cache_is_bounded() {
        let cache = NotFoundCache::default();
        for number in 0..MAX_ENTRIES + 10 {
            let identifiers = RequestIdentifiers::parse(&format!("/v1/voices/{number}"), None);
            cache.insert(&identifiers, MINUTE, NOW);
        }
        assert_eq!(cache.lock().len(), MAX_ENTRIES);
        let later = NOW.plus(MINUTE);
        cache.insert(&RequestIdentifiers::parse("/v1/voices/new", None), MINUTE, later);
        assert_eq!(cache.lock().len(), 1);
    }
}
