//! Records the events that change the state of keys: refusals and their withdrawal, served requests, charges, and polls
//! of this and other replicas. Also returns when a poll can confirm or refute a refusal.
//!
//! Each event changes the narrowest scope about which it proves something: the key, its workspace, a concurrency group
//! of the workspace, or a restriction.

use std::sync::Arc;

use super::Pool;
use super::cells::FinishedReservation;
use super::division::PoolChange;
use super::key::Key;
use super::lease::Lease;
use super::refusal::RefusalRecord;
use super::restrictions::Restriction;
use super::roster::Roster;
use super::transitions::{Transition, transitions_after_charge, workspace_transitions};
use super::wait_queue::KeyRequest;
use crate::elevenlabs::features::RequestFeatures;
use crate::elevenlabs::plan::Capabilities;
use crate::policy::evidence::{
    ClaimedFault, Evidence, Poll, PollResult, RefusalSource, decisive_poll_at, is_refuted_by_service,
};
use crate::policy::quota::Quota;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;

/// An attempt that the provider has refused.
#[derive(Clone, Debug)]
pub struct RefusedAttempt<'a> {
    /// The classification of the response.
    pub verdict: Verdict,
    /// The requirements of the request for a key, or `None` if they are unknown.
    pub request: Option<&'a KeyRequest>,
    /// Whether another account has refused the same request with the same message.
    pub is_repeated_elsewhere: bool,
    /// Route, status and message of the response.
    pub source: RefusalSource,
}

/// An attempt that the provider has served.
#[derive(Clone, Copy, Debug)]
pub struct ServedAttempt<'a> {
    /// The requirements of the request for a key, or `None` if they are unknown.
    pub request: Option<&'a KeyRequest>,
    /// The time at which the key was reserved.
    pub began_at: UnixMs,
    /// Whether the request costs credits.
    pub is_charged: bool,
}

/// The result of requesting a key's quota from the provider, in a poll by this or another replica or in a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// The quota and the plan of the key's workspace.
    Quota {
        /// Spent credits, limit, extension and reset date.
        quota: Quota,
        /// The provider's name of the plan, or `None` if the provider does not report it.
        tier: Option<String>,
        /// Whether the latest invoice is paid, or `None` if the provider does not report it.
        is_paid: Option<bool>,
        /// The features and limits of the plan.
        capabilities: Capabilities,
    },
    /// The key is valid, but lacks the permission to read its quota.
    Unreadable,
    /// The provider refused the key itself.
    Invalid {
        /// [`Verdict::InvalidKey`], or [`Verdict::WrongHost`] for a key of another region.
        verdict: Verdict,
        /// Route and message of the refusal.
        source: RefusalSource,
    },
}

impl Pool {
    /// Records a refusal as evidence about the key or its workspace, or at the limiter of the concurrency group if it
    /// was for too many concurrent requests. Returns the state changes. [`restrict`](Self::restrict) records refusals
    /// of a narrower scope.
    pub fn record_refusal(
        &self,
        roster: &Roster,
        key: &Key,
        refused: RefusedAttempt<'_>,
        now: UnixMs,
    ) -> Vec<Transition> {
        let settings = &roster.settings;
        let workspace = key.workspace();
        let RefusedAttempt { verdict, request, is_repeated_elsewhere, source } = refused;
        let group = request.and_then(|request| request.group);
        if let Verdict::Concurrency { maximum } = verdict {
            if let Some(group) = group {
                workspace.limiter(group).record_refusal(maximum, now.plus(settings.concurrency_cooldown));
            }
            return Vec::new();
        }
        let Some(claim) =
            ClaimedFault::from_verdict(verdict, request.and_then(|request| request.estimate), group)
        else {
            return Vec::new();
        };
        let retry_after = if let Verdict::RateLimited(retry_after) = verdict { retry_after } else { None };
        let evidence = Evidence { claim, at: now, retry_after, is_repeated_elsewhere, source };
        let is_about_key = claim.is_about_key(matches!(verdict, Verdict::KeyQuota(_)));
        self.publish(|| PoolChange::Refused {
            key: key.api_key().fingerprint(),
            is_about_key,
            evidence: evidence.clone(),
        });
        let cell = if is_about_key { &key.evidence_cell } else { &workspace.evidence_cell };
        let is_poll_requested =
            decisive_poll_at(&evidence, cell.last_poll(), &settings.cooldowns()) == Some(now);
        cell.add(evidence);
        if is_about_key {
            key.apply_evidence(settings, now);
        } else {
            workspace.apply_evidence(settings, now);
        }
        if is_poll_requested {
            self.request_poll(key);
        }
        workspace_transitions(roster, workspace, now)
    }

    /// Removes the evidence about `key` and its workspace that was recorded with the given `source`. The caller
    /// knows that the refusal was about the request, because another account has refused the request with the same
    /// message. Returns the state changes.
    pub fn withdraw_refusal(
        self: &Arc<Self>,
        roster: &Roster,
        key: &Key,
        source: &RefusalSource,
        now: UnixMs,
    ) -> Vec<Transition> {
        // Clients choose request identifiers and may repeat one. Therefore the addresses of the identifiers are
        // compared, not the identifiers.
        let has_source = |evidence: &Evidence| Arc::ptr_eq(&evidence.source.request_id, &source.request_id);
        self.remove_evidence(roster, key, has_source, now)
    }

    /// Records that a request was served with `key`, and removes the evidence that the served request refutes. Returns
    /// the state changes.
    pub fn record_service(
        self: &Arc<Self>,
        roster: &Roster,
        key: &Key,
        served: ServedAttempt<'_>,
        now: UnixMs,
    ) -> Vec<Transition> {
        // Usually there is no evidence, and no lock is taken.
        if key.evidence_cell.is_empty() && key.workspace().evidence_cell.is_empty() {
            return Vec::new();
        }
        let ServedAttempt { request, began_at, is_charged } = served;
        let group = request.and_then(|request| request.group);
        let is_refuted = |evidence: &Evidence| is_refuted_by_service(evidence, began_at, is_charged, group);
        let other_transitions = self.remove_shared_evidence(roster, key, is_refuted, now);
        let mut transitions = self.remove_evidence(roster, key, is_refuted, now);
        transitions.extend(other_transitions);
        transitions
    }

    /// Removes the evidence of other accounts that reported a rate limit for the same request as the
    /// workspace of `key`. If one of these accounts now serves the group, the limit was about the request.
    fn remove_shared_evidence(
        self: &Arc<Self>,
        roster: &Roster,
        key: &Key,
        is_refuted: impl Fn(&Evidence) -> bool,
        now: UnixMs,
    ) -> Vec<Transition> {
        let evidence = key.workspace().evidence();
        let is_shared = |evidence: &&Evidence| {
            evidence.is_repeated_elsewhere
                && matches!(evidence.claim, ClaimedFault::RateLimited(_))
                && is_refuted(evidence)
        };
        let Some(refuted) = evidence.iter().find(is_shared) else { return Vec::new() };
        let is_same_refusal = |evidence: &Evidence| {
            evidence.claim.is_same_kind(refuted.claim)
                && evidence.is_repeated_elsewhere
                && evidence.source.request_id == refuted.source.request_id
        };
        let other_keys =
            roster.keys().iter().filter(|other| !std::ptr::eq(other.workspace(), key.workspace()));
        other_keys.flat_map(|other| self.remove_evidence(roster, other, is_same_refusal, now)).collect()
    }

    /// Removes the evidence about `key` and its workspace that `is_removed` selects, at all replicas.
    fn remove_evidence(
        self: &Arc<Self>,
        roster: &Roster,
        key: &Key,
        is_removed: impl Fn(&Evidence) -> bool,
        now: UnixMs,
    ) -> Vec<Transition> {
        let (settings, workspace) = (&roster.settings, key.workspace());
        let key_claims = key.evidence_cell.remove_if(&is_removed);
        let workspace_claims = workspace.evidence_cell.remove_if(&is_removed);
        if !key_claims.is_empty() {
            key.apply_evidence(settings, now);
        }
        if !workspace_claims.is_empty() {
            workspace.apply_evidence(settings, now);
        }
        if key_claims.is_empty() && workspace_claims.is_empty() {
            return Vec::new();
        }
        for (is_about_key, claims) in [(true, key_claims), (false, workspace_claims)] {
            for claim in claims {
                let key = key.api_key().fingerprint();
                self.publish(|| PoolChange::Refuted { key, is_about_key, claim, at: now });
            }
        }
        self.dispatch_waiters(now);
        workspace_transitions(roster, workspace, now)
    }

    /// Records the restriction that a refusal proves, in the narrowest scope that its message allows.
    /// Returns the restriction if it is new.
    pub fn restrict(
        &self,
        roster: &Roster,
        key: &Key,
        features: &RequestFeatures,
        refused: &RefusedAttempt<'_>,
        now: UnixMs,
    ) -> Option<Restriction> {
        let record = RefusalRecord::new(key, features, refused, now);
        let restriction = record.clone().into_restriction(&roster.settings)?;
        self.publish(|| PoolChange::Restricted(restriction.record.clone()));
        let is_new = self.restrictions.record(&restriction, now);
        let plan_record = RefusalRecord { applies_to_plan: true, ..record };
        if let Some(plan_restriction) = plan_record.into_restriction(&roster.settings) {
            self.restrictions.record(&plan_restriction, now);
        }
        is_new.then_some(restriction)
    }

    /// Whether the account of `key` has refused a request with the given `features` with the given `verdict`, and a
    /// poll or a served request has refuted the refusal.
    #[must_use]
    pub fn was_refuted(&self, features: &RequestFeatures, key: &Key, verdict: Verdict, now: UnixMs) -> bool {
        let Some(claim) = ClaimedFault::from_verdict(verdict, None, None) else { return false };
        let has_same_claim = |evidence: &Evidence| evidence.claim.is_same_kind(claim);
        self.restrictions.is_refused_by_account(features, key, verdict, now)
            && !key.evidence().iter().any(has_same_claim)
            && !key.workspace().evidence().iter().any(has_same_claim)
    }

    /// Charges the cost of the request that holds `lease`. Returns the state changes.
    pub fn charge(&self, roster: &Roster, lease: &mut Lease, credits: u64, now: UnixMs) -> Vec<Transition> {
        lease.charge(credits, now);
        if credits == 0 { Vec::new() } else { transitions_after_charge(roster, lease.key().workspace(), now) }
    }

    /// Charges credits that the provider reports only after the lease of the request has ended. Returns the state
    /// changes.
    pub fn charge_late(&self, roster: &Roster, key: &Key, credits: u64, now: UnixMs) -> Vec<Transition> {
        key.workspace()
            .quota_cell
            .finish_reservation(FinishedReservation { reserved: 0, spent: credits }, now);
        key.workspace().spending.add(credits, now);
        transitions_after_charge(roster, key.workspace(), now)
    }

    /// Records the result of a poll with `key`. Returns the state changes.
    pub fn observe(
        self: &Arc<Self>,
        roster: &Roster,
        key: &Key,
        observation: Observation,
        now: UnixMs,
    ) -> Vec<Transition> {
        let poll = self.apply_observation(roster, key, observation, now);
        if matches!(poll.result, PollResult::Quota { .. }) {
            key.workspace().evidence_cell.record_poll(poll);
        }
        key.evidence_cell.record_poll(poll);
        self.apply_poll_evidence(roster, key, now)
    }

    /// Records the result of another replica's poll with `key` at `at`. Returns the state changes.
    pub fn observe_shared(
        self: &Arc<Self>,
        roster: &Roster,
        key: &Key,
        observation: Observation,
        at: UnixMs,
        now: UnixMs,
    ) -> Vec<Transition> {
        // A replica that connects again receives the last polls again.
        if key.evidence_cell.last_poll().is_some_and(|known| known.at >= at) {
            return Vec::new();
        }
        let poll = self.apply_observation(roster, key, observation, at);
        if matches!(poll.result, PollResult::Quota { .. }) {
            key.workspace().evidence_cell.record_shared_poll(poll);
        }
        key.evidence_cell.record_shared_poll(poll);
        self.apply_poll_evidence(roster, key, now)
    }

    /// Applies the quota and the capabilities of a poll at `at`. Returns the result of the poll as evidence.
    fn apply_observation(&self, roster: &Roster, key: &Key, observation: Observation, at: UnixMs) -> Poll {
        let (settings, workspace) = (&roster.settings, key.workspace());
        key.set_poll_requested(false);
        let result = match observation {
            Observation::Quota { quota, tier, is_paid, capabilities } => {
                workspace.apply_poll(quota, tier, capabilities, at, settings.quota_lag);
                if capabilities.voices_left.is_some_and(|left| left > 0) {
                    self.restrictions.remove(workspace.identity(), Verdict::Slots);
                }
                PollResult::Quota { spendable: quota.spendable(), is_paid }
            }
            Observation::Unreadable => PollResult::Unreadable,
            Observation::Invalid { verdict, source } => {
                let claim = if verdict == Verdict::WrongHost {
                    ClaimedFault::WrongHost
                } else {
                    ClaimedFault::InvalidKey
                };
                key.evidence_cell.add(Evidence {
                    claim,
                    at,
                    retry_after: None,
                    is_repeated_elsewhere: false,
                    source,
                });
                PollResult::Invalid
            }
        };
        Poll { at, result }
    }

    /// Computes the state of `key` and its workspace after a poll, and assigns available keys to queued requests.
    fn apply_poll_evidence(self: &Arc<Self>, roster: &Roster, key: &Key, now: UnixMs) -> Vec<Transition> {
        let (settings, workspace) = (&roster.settings, key.workspace());
        key.apply_evidence(settings, now);
        workspace.apply_evidence(settings, now);
        self.dispatch_waiters(now);
        workspace_transitions(roster, workspace, now)
    }

    /// Returns the earliest time at which a poll with `key` can confirm or refute a refusal of the key or of its
    /// workspace. Returns `None` if there is no such refusal.
    #[must_use]
    pub fn next_deciding_poll_at(roster: &Roster, key: &Key) -> Option<UnixMs> {
        let cooldowns = roster.settings.cooldowns();
        let cells = [&key.evidence_cell, &key.workspace().evidence_cell];
        let decisions = cells.into_iter().flat_map(|cell| {
            let (evidence, last_poll) = (cell.entries(), cell.last_poll());
            evidence
                .into_iter()
                .filter_map(move |evidence| decisive_poll_at(&evidence, last_poll, &cooldowns))
        });
        decisions.min()
    }
}
