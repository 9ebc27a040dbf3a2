//! Collects the refusals of a key or a workspace and the result of the last poll, and computes the cooldown, the rate
//! limits and the remaining credits from them.
//!
//! A lock protects the evidence. When the evidence changes, its owner computes the cooldowns and stores them in other
//! cells, whose atomics selection reads without the lock.

use std::sync::PoisonError;

use super::super::sync::{AtomicUsize, Mutex, MutexGuard, Ordering};
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::{ClaimedFault, Cooldowns, Evidence, EvidenceEffect, Poll, evaluate};
use crate::policy::key_state::Cooldown;
use crate::policy::units::UnixMs;

/// Evidence about one key or workspace, with one entry per kind of claim.
#[derive(Debug, Default)]
pub(in crate::pool) struct EvidenceCell {
    /// Number of entries, readable without the lock.
    count: AtomicUsize,
    collected: Mutex<CollectedEvidence>,
}

/// The state that follows from all evidence of a cell.
#[derive(Debug, Default)]
pub(in crate::pool) struct EvidenceSummary {
    /// The cooldown with the latest end, and whether it may be probed. It may be probed only if all cooldowns of the
    /// evidence may be probed.
    pub(in crate::pool) cooldown: Option<(Cooldown, bool)>,
    /// For each concurrency group, the end of its rate limit and whether it may be probed.
    pub(in crate::pool) rate_limits: [Option<(UnixMs, bool)>; ConcurrencyGroup::COUNT],
    /// The reported remaining credits, on the scale of the pool's estimates, and the time at which the report expires.
    /// `None` if no evidence reports remaining credits above 0.
    pub(in crate::pool) remaining: Option<(u64, UnixMs)>,
}

impl EvidenceSummary {
    fn add(&mut self, effect: EvidenceEffect) {
        match effect {
            EvidenceEffect::Nothing => {}
            EvidenceEffect::Cooldown { cooldown, may_probe } => {
                let (known_cooldown, may_probe_known) = self.cooldown.unwrap_or((cooldown, true));
                self.cooldown = Some((known_cooldown.latest(cooldown), may_probe_known && may_probe));
            }
            EvidenceEffect::GroupCooldown { group, until, may_probe } => {
                self.rate_limits[group.index()] = Some((until, may_probe));
            }
            EvidenceEffect::CostLimit { max_cost, until } => self.remaining = Some((max_cost, until)),
        }
    }
}

/// The evidence of a cell and the last poll, which a lock protects together.
#[derive(Debug, Default)]
struct CollectedEvidence {
    evidence: Vec<Evidence>,
    last_poll: Option<Poll>,
}

impl EvidenceCell {
    /// Whether the cell holds no evidence. Takes no lock.
    pub(in crate::pool) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// Adds evidence, which replaces earlier evidence with the same kind of claim.
    pub(in crate::pool) fn add(&self, evidence: Evidence) {
        let mut collected = self.lock();
        collected.evidence.retain(|known| !known.claim.is_same_kind(evidence.claim));
        collected.evidence.push(evidence);
        self.count.store(collected.evidence.len(), Ordering::Release);
    }

    /// Removes the evidence that `is_removed` selects. Returns the claims of the removed evidence.
    pub(in crate::pool) fn remove_if(&self, is_removed: impl Fn(&Evidence) -> bool) -> Vec<ClaimedFault> {
        let mut collected = self.lock();
        let removed = collected.evidence.extract_if(.., |evidence| is_removed(evidence));
        let claims = removed.map(|evidence| evidence.claim).collect();
        self.count.store(collected.evidence.len(), Ordering::Release);
        claims
    }

    /// Records the result of a poll of this replica. Its recorded time is later than the times of all recorded
    /// evidence, even if the evidence was recorded in the same millisecond.
    pub(in crate::pool) fn record_poll(&self, poll: Poll) {
        let mut collected = self.lock();
        let min_polled_at = collected.evidence.iter().map(|evidence| evidence.at.0.saturating_add(1)).max();
        let polled_at = UnixMs(poll.at.0.max(min_polled_at.unwrap_or(0)));
        collected.last_poll = Some(Poll { at: polled_at, ..poll });
    }

    /// Records the result of another replica's poll, which may be older than the recorded evidence and polls.
    pub(in crate::pool) fn record_shared_poll(&self, poll: Poll) {
        let mut collected = self.lock();
        if collected.last_poll.is_none_or(|known| known.at < poll.at) {
            collected.last_poll = Some(poll);
        }
    }

    pub(in crate::pool) fn last_poll(&self) -> Option<Poll> {
        self.lock().last_poll
    }

    /// Returns the state that follows from the evidence at `now`, and removes evidence without an effect.
    pub(in crate::pool) fn evaluate(
        &self,
        resets_at: Option<UnixMs>,
        cooldowns: &Cooldowns,
        now: UnixMs,
    ) -> EvidenceSummary {
        let mut summary = EvidenceSummary::default();
        let mut collected = self.lock();
        let last_poll = collected.last_poll;
        collected.evidence.retain(|evidence| {
            let effect = evaluate(evidence, last_poll, resets_at, cooldowns, now);
            summary.add(effect);
            effect != EvidenceEffect::Nothing
        });
        self.count.store(collected.evidence.len(), Ordering::Release);
        summary
    }

    /// Returns a copy of all evidence.
    pub(in crate::pool) fn entries(&self) -> Vec<Evidence> {
        if self.is_empty() { Vec::new() } else { self.lock().evidence.clone() }
    }

    /// Holds the lock of the evidence until the result is dropped.
    #[cfg(test)]
    pub(in crate::pool) fn hold_lock(&self) -> impl Sized + '_ {
        self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, CollectedEvidence> {
        self.collected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
