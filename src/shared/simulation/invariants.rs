//! Checks the invariants of a simulation: at each request, at intervals, and when all replicas must agree. Collects the
//! violations, so that a failed simulation reports several of them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use super::world::{Process, World};
use crate::clock::{self, SIMULATED_CLOCK};
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::pool::Lease;

/// The time after the end of a fault in which the replicas may still repair its effects.
pub(super) const GRACE: Duration = Duration::from_secs(8);
/// Maximum number of reported violations.
const MAX_VIOLATIONS: usize = 10;

/// The violations of the invariants, and the counts of requests from which violations follow.
#[derive(Debug, Default)]
pub(super) struct Violations {
    reports: RefCell<Vec<String>>,
    /// The number of served requests, for the statistics.
    pub(super) served: Cell<usize>,
    /// The number of requests that the provider refused for lack of credits, for the statistics.
    pub(super) refused_for_credits: Cell<usize>,
    /// The longest time that a request waited while no fault had an effect, for the statistics.
    pub(super) longest_wait: Cell<Duration>,
    /// For each workspace, the number of running requests that exceed its credits.
    overcommitted: RefCell<Vec<u32>>,
    /// For each workspace, the number of running requests with a granted slot.
    running: RefCell<Vec<u32>>,
}

/// The maximum use of a workspace by a replica that is alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct MaxUseWhileAlone {
    /// The maximum of the charged and reserved credits.
    max_committed: i64,
    /// The maximum number of running requests.
    max_running: u32,
}

/// The state of the workspace and of the simulation when a request was sent to the provider.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProviderAdmission {
    /// The number of the workspace.
    workspace: usize,
    /// Whether the reserved credits exceed the credits that are left.
    pub(super) is_overcommitted: bool,
    /// Whether the replica used the one slot that it may use without a grant.
    lacks_slot_grant: bool,
    /// Whether no fault had an effect.
    pub(super) was_healthy: bool,
}

/// The count with which the counts of all replicas are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    /// The count of the provider.
    Provider,
    /// The count of the first replica. The provider's count may differ from it until the next poll.
    Replicas,
}

impl Violations {
    /// Removes and returns the reports of the violations.
    pub(super) fn take(&self) -> Vec<String> {
        self.reports.take()
    }
}

/// Increments the count of the workspace `index`, and returns it.
fn increment(counts: &RefCell<Vec<u32>>, index: usize) -> u32 {
    let mut counts = counts.borrow_mut();
    if counts.len() <= index {
        counts.resize(index + 1, 0);
    }
    counts[index] += 1;
    counts[index]
}

/// Decrements the count of the workspace `index`.
fn decrement(counts: &RefCell<Vec<u32>>, index: usize) {
    counts.borrow_mut()[index] -= 1;
}

impl World {
    /// Records a violation of an invariant with the current time of the simulation.
    pub(super) fn fail(&self, text: String) {
        let mut reports = self.violations.reports.borrow_mut();
        if reports.len() < MAX_VIOLATIONS {
            reports.push(format!("{:?}: {text}", clock::elapsed_since(self.start)));
        }
    }

    /// Whether no fault has an effect at the current time.
    pub(super) fn is_healthy(&self) -> bool {
        clock::instant() >= self.healthy_at.get()
    }

    /// Records the maximum use by a replica that has lost its connection, unless it is recorded already.
    pub(super) fn record_max_use_while_alone(&self, process: &Process) {
        if process.max_use_while_alone.borrow().is_empty() {
            self.set_max_use_while_alone(process);
        }
    }

    /// Records the maximum use again after a poll by a replica that is alone. The poll contains the charges of other
    /// replicas, so that the share of this replica changes.
    pub(super) fn update_max_use_while_alone(&self, process: &Process) {
        if process.replica.borrow().is_alone() && process.is_accepting.get() {
            self.set_max_use_while_alone(process);
        }
    }

    fn set_max_use_while_alone(&self, process: &Process) {
        let replica = process.replica.borrow();
        let replicas = replica.live_replica_count();
        for (index, key) in process.pool.roster().keys().iter().enumerate() {
            let workspace = key.workspace();
            let usage = workspace.credit_use();
            let (bound, left) = replica.credit_bound(workspace.shared_id());
            let committed = usage.charged_here.saturating_add_unsigned(usage.reserved);
            let left = workspace.quota(clock::now()).spendable().unwrap_or(0).max(left);
            let base = bound.map_or(committed, |bound| bound.max(committed));
            let max_committed = base.saturating_add_unsigned(left / u64::from(replicas));
            let (running, max) = workspace.concurrency(ConcurrencyGroup::SPEECH);
            let share = replica.slot_share(workspace.shared_id(), ConcurrencyGroup::SPEECH);
            let max_running = running.max(share).max(max.map_or(u32::MAX, |max| (max / replicas).max(1)));
            process
                .max_use_while_alone
                .borrow_mut()
                .insert(index, MaxUseWhileAlone { max_committed, max_running });
        }
    }

    /// Counts a request that is sent to the provider, and checks the invariants about it.
    pub(super) fn admit(&self, process: &Process, lease: &Lease, estimate: u64) -> ProviderAdmission {
        let key = lease.key();
        let (index, workspace) = (key.position(), key.workspace());
        let group = ConcurrencyGroup::SPEECH;
        let quota = workspace.quota(clock::now());
        let usage = workspace.credit_use();
        let is_overcommitted =
            quota.ceiling().is_some_and(|ceiling| quota.count.saturating_add(usage.reserved) > ceiling);
        let replica = process.replica.borrow();
        let lacks_slot_grant = replica.lacks_slot_grant(workspace.shared_id(), group);
        let was_healthy = self.is_healthy();
        if is_overcommitted {
            let count = increment(&self.violations.overcommitted, index);
            if was_healthy && count > 1 {
                self.fail(format!("{count} requests exceed the credits of workspace {index} at once"));
            }
        }
        if !lacks_slot_grant {
            let running = increment(&self.violations.running, index);
            let max = self.provider.workspaces.borrow()[index].max;
            if was_healthy && running > max {
                let states = self.describe_all(index);
                self.fail(format!("{running} of {max} requests run in workspace {index}: {states:#?}"));
            }
        }
        if let Some(alone) = process.max_use_while_alone.borrow().get(&index).filter(|_| replica.is_alone()) {
            let committed = usage.charged_here.saturating_add_unsigned(usage.reserved);
            // One request at a time may exceed the part, so that no request fails while the provider has credits.
            if committed > alone.max_committed && usage.reserved > estimate {
                self.fail(format!(
                    "{} uses {committed} credits of {alone:?} of workspace {index}",
                    process.id
                ));
            }
            let (running, _) = workspace.concurrency(group);
            if running > alone.max_running {
                self.fail(format!("{} uses {running} slots of {alone:?} of workspace {index}", process.id));
            }
        }
        ProviderAdmission { workspace: index, is_overcommitted, lacks_slot_grant, was_healthy }
    }

    /// Formats the credits and slots of a workspace at a replica and at Redis for a report.
    pub(super) fn describe(&self, process: &Process, index: usize) -> String {
        let roster = process.pool.roster();
        let id = roster.keys()[index].workspace().shared_id();
        let replica = process.replica.borrow();
        let redis = self.redis.hash_fields(&replica.keyspace.credits(id));
        let slots = self.redis.hash_fields(&replica.keyspace.slots(id, ConcurrencyGroup::SPEECH.index()));
        let usage = roster.keys()[index].workspace().credit_use();
        format!("{} {usage:?} {} {redis:?} {slots:?}", process.id, replica.format_workspace(id))
    }

    /// Formats the credits and slots of a workspace at all replicas for a report.
    fn describe_all(&self, index: usize) -> Vec<String> {
        self.processes().iter().map(|process| self.describe(process, index)).collect()
    }

    /// Records that an admitted request has ended.
    pub(super) fn end_admission(&self, admission: ProviderAdmission) {
        if admission.is_overcommitted {
            decrement(&self.violations.overcommitted, admission.workspace);
        }
        if !admission.lacks_slot_grant {
            decrement(&self.violations.running, admission.workspace);
        }
    }

    /// Counts a refusal for lack of credits, and checks that the replica has exceeded the credits.
    pub(super) fn record_credit_refusal(&self, process: &Process, admission: ProviderAdmission) {
        self.violations.refused_for_credits.set(self.violations.refused_for_credits.get() + 1);
        if admission.was_healthy && !admission.is_overcommitted {
            let workspace = admission.workspace;
            let states = self.describe_all(workspace);
            self.fail(format!(
                "{} was refused for credits of workspace {workspace} that it counts: {states:#?}",
                process.id
            ));
        }
    }

    /// Checks that exactly one connected replica polls while no fault has an effect.
    pub(super) fn check_leader(&self) {
        /// Maximum time without a leader, from the end of a fault.
        const MAX_VACANCY: Duration = Duration::from_secs(10);
        if !self.is_healthy() {
            return;
        }
        let is_leader = |process: &Rc<Process>| {
            let replica = process.replica.borrow();
            !replica.is_alone() && replica.is_polling()
        };
        let leaders: Vec<String> =
            self.processes().into_iter().filter(is_leader).map(|process| process.id.clone()).collect();
        if leaders.len() > 1 {
            self.fail(format!("{leaders:?} poll at once"));
        }
        if leaders.is_empty() && clock::instant() >= self.healthy_at.get() + MAX_VACANCY - GRACE {
            self.fail("no replica polls".to_owned());
        }
    }

    /// Checks that all replicas have the same members, leader, evidence and counts.
    pub(super) fn check_agreement(&self, comparison: Comparison) {
        let processes = self.processes();
        let views: Vec<ReplicaView> = processes.iter().map(|process| read_view(process)).collect();
        for (process, view) in processes.iter().zip(&views) {
            if process.replica.borrow().is_alone() {
                self.fail(format!("{} is alone", process.id));
            }
            let members = processes.len();
            if view.live != members {
                self.fail(format!("{} counts {} of {members} replicas", process.id, view.live));
            }
            if view.leader != views[0].leader || view.leader.is_empty() {
                self.fail(format!(
                    "{} has the leader {:?}, not {:?}",
                    process.id, view.leader, views[0].leader
                ));
            }
            for index in 0..self.scenario.limits.len() {
                if view.evidence[index] != views[0].evidence[index] {
                    let other = &views[0].evidence[index];
                    self.fail(format!(
                        "{} has the evidence {:?} of workspace {index}, not {other:?}",
                        process.id, view.evidence[index]
                    ));
                }
                let spent = self.provider.workspaces.borrow()[index].spent;
                let expected = match comparison {
                    Comparison::Provider => spent,
                    Comparison::Replicas => views[0].counts[index],
                };
                if view.counts[index] != expected {
                    self.fail(format!(
                        "{} counts {} of {expected} spent credits of workspace {index}: {}",
                        process.id,
                        view.counts[index],
                        self.describe(process, index)
                    ));
                }
            }
        }
    }
}

/// The members, counts and evidence of a replica, which must be the same at all replicas.
struct ReplicaView {
    /// The number of live replicas.
    live: usize,
    leader: String,
    /// The used credits of each workspace.
    counts: Vec<u64>,
    /// The claims of the evidence about each workspace and its key.
    evidence: Vec<Vec<String>>,
}

/// Reads the view of the replica of a process.
fn read_view(process: &Process) -> ReplicaView {
    SIMULATED_CLOCK.sync_scope(process.clock, || {
        let replica = process.replica.borrow();
        let membership = replica.membership();
        let roster = process.pool.roster();
        let workspaces = || roster.keys().iter().map(|key| key.workspace());
        let now = clock::now();
        // Only the claims are compared, because each replica records the times of evidence by its own clock.
        let evidence = roster.keys().iter().map(|key| {
            let evidence = key.evidence().into_iter().chain(key.workspace().evidence());
            let mut claims: Vec<String> =
                evidence.map(|evidence| evidence.claim.as_str().to_owned()).collect();
            claims.sort();
            claims
        });
        ReplicaView {
            live: membership.map_or(0, |membership| usize::try_from(membership.live_count()).unwrap()),
            leader: membership.map_or_else(String::new, |membership| membership.leader.clone()),
            evidence: evidence.collect(),
            counts: workspaces().map(|workspace| workspace.quota(now).count).collect(),
        }
    })
}
