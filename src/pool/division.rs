//! Connects the pool to the division of its limits between several replicas. Reports the credits and the concurrent
//! requests that this replica uses and needs, and applies its shares: the parts of the limits that it may use. Also
//! sends the changes that other replicas must receive, and applies the changes of other replicas.
//!
//! The module `shared` computes the division and connects the replicas. A pool without other replicas sends no changes
//! and is never divided.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::Pool;
use super::cells::{CreditShare, CreditUse, RunningCount};
use super::key::Key;
use super::ownership_index::OwnerId;
use super::refusal::RefusalRecord;
use super::roster::Roster;
use super::transitions::{Transition, transitions_after_charge, workspace_transitions};
use super::workspace::Workspace;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::{ClaimedFault, Evidence, decisive_poll_at};
use crate::policy::shared_id::SharedId;
use crate::policy::units::UnixMs;
use crate::secret::Fingerprint;

/// A change of the pool that other replicas must receive.
#[derive(Clone, Debug)]
pub enum PoolChange {
    /// The provider has refused a key or its workspace.
    Refused {
        /// The fingerprint of the refused key.
        key: Fingerprint,
        /// Whether the evidence is about the key and not about its workspace.
        is_about_key: bool,
        /// The claim of the refusal, with its time and source.
        evidence: Evidence,
    },
    /// Evidence about a key or its workspace was refuted or withdrawn.
    Refuted {
        /// The fingerprint of the key that was refused.
        key: Fingerprint,
        /// Whether the evidence was about the key and not about its workspace.
        is_about_key: bool,
        /// The claim that is refuted or withdrawn.
        claim: ClaimedFault,
        /// The time of the removal. Evidence after this time is not refuted.
        at: UnixMs,
    },
    /// The provider has refused a kind of request.
    Restricted(Arc<RefusalRecord>),
}

/// The number of concurrent requests of one concurrency group of a workspace at this replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotUse {
    /// The running requests.
    pub count: RunningCount,
    /// The provider's maximum for all replicas together, if it is known.
    pub max: Option<u32>,
}

/// The demand of a concurrency group: the slots (concurrent requests) and the credits that its queued requests need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupDemand {
    /// The number of queued requests.
    pub slots: u32,
    /// The lowest estimated cost of a queued request. A request of unknown cost counts as 0.
    pub min_credits: u64,
}

/// The demand of all queued requests, by concurrency group and in total.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueuedDemand {
    /// The queued requests of each concurrency group.
    pub groups: [GroupDemand; ConcurrencyGroup::COUNT],
    /// The sum of the estimated costs of the queued requests.
    pub credits: u64,
    /// The highest estimated cost of a queued request.
    pub max_credits: u64,
    /// The lowest estimated cost of a queued request that costs credits, or 0 if there is none.
    pub min_credits: u64,
}

impl Pool {
    /// Sends the changes that other replicas must receive to `changes` from now on. Only the first call has an
    /// effect. A change is dropped when the channel is full.
    pub fn send_changes_to(&self, changes: mpsc::Sender<PoolChange>) {
        let _ = self.changes.set(changes);
    }

    /// Sends a change to the other replicas, if there are any.
    pub(super) fn publish(&self, change: impl FnOnce() -> PoolChange) {
        if let Some(changes) = self.changes.get() {
            // If the channel is full, the change is dropped. Other replicas then find the fact by their own requests,
            // or after this replica has connected again and has sent all its evidence.
            let _ = changes.try_send(change());
        }
    }

    /// Completes when a request was queued. This replica may then need a larger share.
    pub async fn demand_increased(&self) {
        self.demand_increase.notified().await;
    }

    /// Returns the demand of the queued requests.
    #[must_use]
    pub fn queued_demand(&self) -> QueuedDemand {
        self.queue.demand()
    }

    /// Applies the credits that other replicas and programs have spent, and the credits that this replica may use.
    /// Returns the state changes.
    pub fn divide_credits(
        self: &Arc<Self>,
        workspace: &Workspace,
        share: CreditShare,
        now: UnixMs,
    ) -> Vec<Transition> {
        workspace.quota_cell.divide(share, now);
        self.dispatch_waiters(now);
        transitions_after_charge(&self.roster.load(), workspace, now)
    }

    /// Sets the number of concurrent requests of a group that this replica may send, or `None` if the group is not
    /// divided.
    pub fn divide_slots(
        self: &Arc<Self>,
        workspace: &Workspace,
        group: ConcurrencyGroup,
        share: Option<u32>,
        now: UnixMs,
    ) {
        if workspace.limiter(group).set_share(share) {
            self.dispatch_waiters(now);
        }
    }

    /// Records the maximum of a concurrency group that another replica has received.
    pub fn record_shared_maximum(
        self: &Arc<Self>,
        workspace: &Workspace,
        group: ConcurrencyGroup,
        max: u32,
        now: UnixMs,
    ) {
        if workspace.limiter(group).set_reported_max(max) {
            self.dispatch_waiters(now);
        }
    }

    /// Records a refusal that another replica has received. Returns the state changes.
    pub fn record_shared_refusal(
        &self,
        roster: &Roster,
        key: &Key,
        is_about_key: bool,
        evidence: Evidence,
        now: UnixMs,
    ) -> Vec<Transition> {
        let (settings, workspace) = (&roster.settings, key.workspace());
        let cell = if is_about_key { &key.evidence_cell } else { &workspace.evidence_cell };
        let decided_at = decisive_poll_at(&evidence, cell.last_poll(), &settings.cooldowns());
        cell.add(evidence);
        if is_about_key {
            key.apply_evidence(settings, now);
        } else {
            workspace.apply_evidence(settings, now);
        }
        if decided_at.is_some_and(|at| at <= now) {
            self.request_poll(key);
        }
        workspace_transitions(roster, workspace, now)
    }

    /// Removes the evidence that `is_refuted` selects, because another replica has refuted or withdrawn it. Returns
    /// the state changes.
    pub fn remove_shared_refusal(
        self: &Arc<Self>,
        roster: &Roster,
        key: &Key,
        is_about_key: bool,
        is_refuted: impl Fn(&Evidence) -> bool,
        now: UnixMs,
    ) -> Vec<Transition> {
        let (settings, workspace) = (&roster.settings, key.workspace());
        let cell = if is_about_key { &key.evidence_cell } else { &workspace.evidence_cell };
        if cell.remove_if(is_refuted).is_empty() {
            return Vec::new();
        }
        if is_about_key {
            key.apply_evidence(settings, now);
        } else {
            workspace.apply_evidence(settings, now);
        }
        self.dispatch_waiters(now);
        workspace_transitions(roster, workspace, now)
    }

    /// Records the restrictions of the key, its workspace and its plan that follow from a refusal at another replica.
    pub fn record_shared_restriction(&self, roster: &Roster, record: RefusalRecord, now: UnixMs) {
        let record = record.restored(roster, now);
        let plan_record = RefusalRecord { applies_to_plan: true, ..record.clone() };
        for restriction in
            [record, plan_record].into_iter().filter_map(|record| record.into_restriction(&roster.settings))
        {
            if restriction.until > now {
                self.restrictions.record(&restriction, now);
            }
        }
    }
}

impl Workspace {
    /// Returns the digest by which replicas name the workspace.
    #[must_use]
    pub fn shared_id(&self) -> SharedId {
        self.membership().shared_id()
    }

    /// Returns the credits by their origin.
    #[must_use]
    pub fn credit_use(&self) -> CreditUse {
        self.quota_cell.credit_use()
    }

    /// Returns the concurrent requests of a group, and restarts the measurement of their peak.
    #[must_use]
    pub fn sample_slots(&self, group: ConcurrencyGroup) -> SlotUse {
        let limiter = self.limiter(group);
        SlotUse { count: limiter.sample(), max: limiter.known_max() }
    }
}

impl Roster {
    /// Returns the digest of the workspace identifier that the provider has reported for the key with this
    /// fingerprint.
    #[must_use]
    pub fn reported_workspace(&self, key: Fingerprint) -> Option<SharedId> {
        self.reported_ids.get(&key).copied()
    }

    /// Returns the workspaces of the keys, each once, in the order of the keys.
    #[must_use]
    pub fn workspaces(&self) -> Vec<&Arc<Workspace>> {
        let mut addresses = HashSet::with_capacity(self.keys().len());
        let workspaces = self.keys().iter().map(|key| &key.workspace);
        workspaces.filter(|workspace| addresses.insert(Arc::as_ptr(workspace))).collect()
    }

    /// Returns the digest by which replicas name the workspace that was stored as `owner`, or `None` if the roster
    /// has no key of that workspace.
    #[must_use]
    pub fn shared_id_of(&self, owner: &OwnerId) -> Option<SharedId> {
        self.workspace_of(owner).map(Workspace::shared_id)
    }

    /// Returns the identity of the workspace with the digest `id`.
    #[must_use]
    pub fn owner_with_shared_id(&self, id: SharedId) -> Option<OwnerId> {
        let key = self.keys().iter().find(|key| key.workspace().shared_id() == id)?;
        Some(key.workspace().identity().clone())
    }
}
