//! The refusals recorded for a key or a workspace, and the result of the last poll.
//!
//! The evidence is behind a lock, but off the path of requests that are served: what follows from it is
//! computed when it changes, and kept in atomics beside it.

use std::sync::PoisonError;

use super::super::sync::{AtomicUsize, Mutex, MutexGuard, Ordering};
use crate::policy::evidence::{Cooldowns, Evidence, Meaning, Poll, meaning};
use crate::policy::units::UnixMs;

/// Evidence about one key or workspace, with one entry per claim.
#[derive(Debug, Default)]
pub(in crate::pool) struct EvidenceCell {
    /// Number of entries, readable without the lock.
    count: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    evidence: Vec<Evidence>,
    poll: Option<Poll>,
}

impl EvidenceCell {
    /// Whether there is no evidence.
    pub(in crate::pool) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// Adds evidence, which replaces earlier evidence of the same claim.
    pub(in crate::pool) fn add(&self, evidence: Evidence) {
        let mut state = self.lock();
        state.evidence.retain(|known| !known.claim.is_same(evidence.claim));
        state.evidence.push(evidence);
        self.count.store(state.evidence.len(), Ordering::Release);
    }

    /// Drops the evidence that `is_over` selects. Returns whether there was any.
    pub(in crate::pool) fn drop_if(&self, is_over: impl Fn(&Evidence) -> bool) -> bool {
        let mut state = self.lock();
        let before = state.evidence.len();
        state.evidence.retain(|known| !is_over(known));
        self.count.store(state.evidence.len(), Ordering::Release);
        state.evidence.len() < before
    }

    /// Records the result of a poll. Its time is later than that of all evidence recorded before, also
    /// within the same millisecond.
    pub(in crate::pool) fn polled(&self, poll: Poll) {
        let mut state = self.lock();
        let latest = state.evidence.iter().map(|known| known.at.0.saturating_add(1)).max();
        let at = UnixMs(poll.at.0.max(latest.unwrap_or(0)));
        state.poll = Some(Poll { at, ..poll });
    }

    pub(in crate::pool) fn poll(&self) -> Option<Poll> {
        self.lock().poll
    }

    /// What each piece of evidence means at `now`. Evidence without a meaning is dropped.
    pub(in crate::pool) fn weigh(
        &self,
        resets_at: Option<UnixMs>,
        cooldowns: &Cooldowns,
        now: UnixMs,
    ) -> Vec<Meaning> {
        let mut state = self.lock();
        let poll = state.poll;
        let mut meanings = Vec::new();
        state.evidence.retain(|evidence| {
            let meaning = meaning(evidence, poll, resets_at, cooldowns, now);
            meanings.push(meaning);
            meaning != Meaning::Nothing
        });
        self.count.store(state.evidence.len(), Ordering::Release);
        meanings.retain(|meaning| *meaning != Meaning::Nothing);
        meanings
    }

    /// A copy of all evidence.
    pub(in crate::pool) fn all(&self) -> Vec<Evidence> {
        if self.is_empty() { Vec::new() } else { self.lock().evidence.clone() }
    }

    /// Holds its lock.
    #[cfg(test)]
    pub(in crate::pool) fn hold(&self) -> impl Sized + '_ {
        self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
