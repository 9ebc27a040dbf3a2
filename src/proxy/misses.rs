//! A cache of resources that no account has: the next request for one of them tries one account and
//! not all of them. A misspelled voice would otherwise be tried in every account with each request,
//! and each time with its whole upload.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::elevenlabs::affinity::{Names, Tag};
use crate::policy::units::UnixMs;

/// Maximum cached misses; each is a few dozen bytes.
const MISSES_MAX: usize = 4_096;

/// The cached misses, keyed by all identifiers of the request.
#[derive(Debug, Default)]
pub(super) struct Misses {
    /// The number of entries, readable without the lock.
    count: AtomicUsize,
    until: Mutex<HashMap<Vec<Tag>, UnixMs>>,
}

fn key(names: &Names) -> Vec<Tag> {
    let mut tags: Vec<Tag> = names.all().map(|named| named.tag).collect();
    tags.sort_unstable();
    tags
}

impl Misses {
    /// Whether a miss of exactly these identifiers is cached at `now`.
    pub(super) fn includes(&self, names: &Names, now: UnixMs) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        self.lock().get(&key(names)).is_some_and(|until| *until > now)
    }

    /// Caches for `span` that no account has them.
    pub(super) fn remember(&self, names: &Names, span: Duration, now: UnixMs) {
        let mut until = self.lock();
        if until.len() >= MISSES_MAX {
            until.retain(|_, until| *until > now);
        }
        if until.len() < MISSES_MAX {
            until.insert(key(names), now.plus(span));
        }
        self.count.store(until.len(), Ordering::Release);
    }

    /// Removes the miss, because an account has them.
    pub(super) fn forget(&self, names: &Names) {
        if self.count.load(Ordering::Acquire) > 0 {
            let mut until = self.lock();
            until.remove(&key(names));
            self.count.store(until.len(), Ordering::Release);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<Tag>, UnixMs>> {
        self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000);
    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_miss_is_cached_for_its_ttl_by_all_identifiers() {
        let misses = Misses::default();
        let voice = Names::of("/v1/text-to-speech/abc", None);
        let other = Names::of("/v1/text-to-speech/abd", None);
        assert!(!misses.includes(&voice, NOW));
        misses.remember(&voice, MINUTE, NOW);
        assert!(misses.includes(&voice, NOW) && !misses.includes(&other, NOW));
        let mut both = voice.clone();
        both.add_body(br#"{"previous_request_ids":["r1"]}"#);
        assert!(!misses.includes(&both, NOW));
        assert!(!misses.includes(&voice, NOW.plus(MINUTE)));
        misses.forget(&voice);
        assert!(!misses.includes(&voice, NOW));
    }

    #[test]
    fn misses_are_bounded() {
        let misses = Misses::default();
        for number in 0..MISSES_MAX + 10 {
            let names = Names::of(&format!("/v1/voices/{number}"), None);
            misses.remember(&names, MINUTE, NOW);
        }
        assert_eq!(misses.lock().len(), MISSES_MAX);
        // Expired entries are removed first.
        let later = NOW.plus(MINUTE);
        misses.remember(&Names::of("/v1/voices/new", None), MINUTE, later);
        assert_eq!(misses.lock().len(), 1);
    }
}
