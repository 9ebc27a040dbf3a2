//! Remembers what the other replicas recently answered that they do not know, so that a request for the same thing does
//! not ask them again. Most requests name a voice that belongs to no account.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::policy::units::UnixMs;

/// Maximum number of remembered answers of a few dozen bytes each.
const MAX_ENTRIES: usize = 4_096;

/// The answers without a value, each until its expiry.
#[derive(Debug)]
pub(super) struct AbsentAnswers<K>(Mutex<HashMap<K, UnixMs>>);

impl<K> Default for AbsentAnswers<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash> AbsentAnswers<K> {
    /// Whether the answer about `key` is remembered at `now`.
    pub(super) fn contains(&self, key: &K, now: UnixMs) -> bool {
        self.lock().get(key).is_some_and(|expiry| *expiry > now)
    }

    /// Remembers the answer about `key` for `ttl`. When there is no space left, the unexpired answers are forgotten
    /// too, because a question costs less than a larger table.
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
    fn an_answer_is_remembered_for_its_ttl() {
        let answers = AbsentAnswers::default();
        answers.insert("voice", TTL, NOW);
        assert!(answers.contains(&"voice", NOW) && !answers.contains(&"other", NOW));
        assert!(!answers.contains(&"voice", NOW.plus(TTL)));
    }

    #[test]
    fn the_table_is_bounded() {
        let answers = AbsentAnswers::default();
        for number in 0..=MAX_ENTRIES {
            answers.insert(number, TTL, NOW);
        }
        assert!(answers.lock().len() <= MAX_ENTRIES);
        assert!(answers.contains(&MAX_ENTRIES, NOW), "the newest answer must be remembered");
    }
}
