//! Holds the state of this replica, and computes its statements for the next beat. `beat_replies.rs` applies the
//! replies. Both do no input or output, and take the time as an argument, so that tests can simulate many replicas on
//! virtual time.

use std::collections::{BTreeSet, HashMap};
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::beat_calls::{Beat, BeatCause};
use super::changes::KeyIndex;
use super::credit_statement::CreditStatement;
use super::credits::{CreditSituation, Credits};
use super::maps::KnownMaps;
use super::members::{Description, Membership};
use super::scripts::{Keyspace, MAX_SUBJECTS};
use super::shared_clock::{Moment, SharedClock};
use super::slots::{SlotDemand, SlotStatement, Slots};
use crate::policy::authority::Authority;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::shared_id::SharedId;
use crate::policy::shared_pool_name::SharedPoolName;
use crate::policy::units::UnixMs;
use crate::pool::{GroupDemand, Pool, QueuedDemand, Roster, Workspace};

/// Maximum interval between two statements about a subject that did not change.
pub(super) const FULL_BEAT_INTERVAL: Duration = Duration::from_secs(2);
/// The assumed number of replicas before the first response of Redis, so that a replica which starts while Redis is
/// down does not use the whole pool.
const UNKNOWN_REPLICAS: u32 = 2;

/// The identity and the role of this replica.
#[derive(Debug)]
pub(super) struct ReplicaSettings {
    pub(super) id: String,
    pub(super) pool_name: SharedPoolName,
    /// Whether this replica can poll the provider for all replicas.
    pub(super) can_lead: bool,
    /// The regional hosts of the provider.
    pub(super) regions: Arc<[Arc<Authority>]>,
}

/// The state of this replica.
#[derive(Debug)]
pub(super) struct Replica {
    pub(super) id: String,
    pub(super) keyspace: Keyspace,
    pub(super) pool: Arc<Pool>,
    pub(super) clock: SharedClock,
    pub(super) maps: KnownMaps,
    pub(super) key_index: KeyIndex,
    /// The regional hosts of the provider.
    pub(super) regions: Arc<[Arc<Authority>]>,
    pub(super) description: Description,
    started_at: UnixMs,
    /// Whether this replica can poll the provider for all replicas.
    pub(super) can_lead: bool,
    pub(super) membership: Option<Membership>,
    /// The number of live replicas at the last reply.
    pub(super) replicas: u32,
    /// The number of the last statement.
    pub(super) statement: u64,
    pub(super) workspaces: HashMap<SharedId, WorkspaceState>,
    pub(super) last_full_beat: Option<Instant>,
    /// The workspaces whose credits or slots other replicas need.
    demanded: BTreeSet<SharedId>,
    /// Whether Redis does not respond, so that divided amounts are used carefully.
    pub(super) is_alone: bool,
    /// Whether Redis has received a statement of this replica over the current connection.
    pub(super) has_stated: bool,
    /// Whether the replica returns its grants and slots, because its program ends.
    pub(super) is_leaving: bool,
}

/// The state of a workspace at this replica.
#[derive(Debug)]
pub(super) struct WorkspaceState {
    pub(super) credits: Credits,
    /// The last statement, to detect changes.
    pub(super) last_statement: Option<CreditStatement>,
    pub(super) slots: [Slots; ConcurrencyGroup::COUNT],
    polled_at: Option<UnixMs>,
}

impl WorkspaceState {
    pub(super) fn new(instant: Instant) -> Self {
        Self {
            credits: Credits::new(instant),
            last_statement: None,
            slots: Default::default(),
            polled_at: None,
        }
    }
}

impl Replica {
    pub(super) fn new(settings: ReplicaSettings, pool: Arc<Pool>, started_at: UnixMs) -> Self {
        let ReplicaSettings { id, pool_name, can_lead, regions } = settings;
        let description = Description {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            process: fastrand::u64(1..1 << 53),
            ..Description::default()
        };
        Self {
            id,
            keyspace: Keyspace::new(pool_name),
            pool,
            clock: SharedClock::default(),
            maps: KnownMaps::default(),
            key_index: KeyIndex::default(),
            regions,
            description,
            started_at,
            can_lead,
            membership: None,
            replicas: UNKNOWN_REPLICAS,
            statement: 0,
            workspaces: HashMap::new(),
            last_full_beat: None,
            demanded: BTreeSet::new(),
            is_alone: true,
            has_stated: false,
            is_leaving: false,
        }
    }

    /// Returns all grants and slots with the next beat, which must be the last beat.
    pub(super) fn leave(&mut self) {
        self.is_leaving = true;
        self.last_full_beat = None;
    }

    /// Uses a new id, because another program uses the previous id.
    pub(super) fn replace_id(&mut self, id: String) {
        self.id = id;
        // The statements under the previous id belong to the other program.
        self.workspaces.clear();
        self.last_full_beat = None;
    }

    /// Returns the replicas at the last reply, if there was one.
    pub(super) fn membership(&self) -> Option<&Membership> {
        self.membership.as_ref()
    }

    /// Returns the number of live replicas at the last reply, at least 1.
    pub(super) fn live_replicas(&self) -> u32 {
        self.replicas
    }

    /// Whether Redis does not respond.
    pub(super) fn is_alone(&self) -> bool {
        self.is_alone
    }

    /// Whether this replica polls the provider: it is the leader or alone, or the leader is unknown.
    pub(super) fn is_polling(&self) -> bool {
        self.is_alone || self.membership.as_ref().is_none_or(|membership| membership.leader == self.id)
    }

    /// Records that Redis responds.
    pub(super) fn record_connected(&mut self) {
        self.is_alone = false;
    }

    /// Records that Redis does not respond.
    pub(super) fn record_disconnected(&mut self) {
        if !mem::replace(&mut self.is_alone, true) {
            self.maps.forget_versions();
            self.workspaces.values_mut().for_each(|state| state.credits.request_uses());
            self.has_stated = false;
        }
    }

    /// Records a demand of another replica.
    pub(super) fn record_demand(&mut self, workspaces: Vec<SharedId>) {
        let workspaces = workspaces.into_iter().filter(|workspace| self.workspaces.contains_key(workspace));
        self.demanded.extend(workspaces);
    }

    /// Records that this replica has responded to all demands.
    pub(super) fn record_response(&mut self) {
        self.demanded.clear();
    }

    /// Returns the statements of the next beat. They contain every workspace if the last full beat is too long ago.
    pub(super) fn beat(&mut self, moment: Moment, cause: BeatCause) -> Beat {
        let roster = self.pool.roster();
        let queued = self.pool.queued_demand();
        let is_full = self
            .last_full_beat
            .is_none_or(|last| moment.instant.saturating_duration_since(last) >= FULL_BEAT_INTERVAL);
        let mut beat = Beat {
            calls: Vec::new(),
            sent: moment,
            workspaces: HashMap::new(),
            credits: Vec::new(),
            slots: Vec::new(),
            held_slots: 0,
            is_due: is_full,
            is_full,
        };
        for workspace in roster.workspaces() {
            self.state_credits(workspace, &queued, cause, &mut beat);
            self.state_slots(workspace, &queued, cause, &mut beat);
            beat.workspaces.insert(workspace.shared_id(), Arc::clone(workspace));
        }
        if is_full {
            self.forget_removed(&roster);
        }
        self.description.slots = beat.held_slots;
        self.statement += 1;
        self.description.started_ms = self.clock.to_shared(self.started_at);
        beat.calls.push(self.members_call());
        for credits in beat.credits.chunks(MAX_SUBJECTS) {
            beat.calls.push(self.credits_call(credits));
        }
        for slots in beat.slots.chunks(MAX_SUBJECTS) {
            beat.calls.push(self.slots_call(slots));
        }
        beat
    }

    /// Adds the statement about the credits of a workspace to `beat`, unless Redis knows it already.
    fn state_credits(
        &mut self,
        workspace: &Workspace,
        queued: &QueuedDemand,
        cause: BeatCause,
        beat: &mut Beat,
    ) {
        let moment = beat.sent;
        let Some(limit) = workspace.quota(moment.now).ceiling() else { return };
        let (id, usage) = (workspace.shared_id(), workspace.credit_use());
        let polled_at = workspace.polled_at();
        let state = self.workspaces.entry(id).or_insert_with(|| WorkspaceState::new(moment.instant));
        let has_new_poll = mem::replace(&mut state.polled_at, polled_at) != polled_at;
        let base_time = polled_at.filter(|_| has_new_poll).unwrap_or(moment.now);
        // Queued requests whose credits are granted wait for something else. A replica in the line keeps its place
        // until its requests have started.
        let needs_credits = state.last_statement.is_some_and(|last| last.queued > 0)
            || !state.credits.can_start(usage, Some(queued.max_credits));
        // At most the cost of two requests, because other replicas also need the credits that are left.
        let max_queued = queued.credits.min(queued.max_credits.saturating_mul(2));
        let statement = state.credits.statement(CreditSituation {
            usage,
            limit,
            queued: if needs_credits { max_queued } else { 0 },
            least: if needs_credits { queued.min_credits } else { 0 },
            is_polled: polled_at.is_some(),
            base_time: self.clock.to_shared(base_time),
            instant: moment.instant,
        });
        let statement = if self.is_leaving { statement.without_need() } else { statement };
        let is_changed = !state.last_statement.is_some_and(|last| last.is_same(statement));
        // A queued request waits until other replicas have returned the credits that they do not need.
        beat.is_due |= is_changed || statement.queued > 0;
        let is_demanded = cause == BeatCause::DemandedByOthers
            && self.demanded.contains(&id)
            && (statement.has_unused() || state.credits.may_exceed());
        if beat.is_full
            || is_changed
            || is_demanded
            || state.credits.is_returned_by(statement)
            || statement.needed() > 0
        {
            beat.credits.push((id, statement));
        }
    }

    /// Adds the statements about the concurrent requests of a workspace to `beat`, unless Redis knows them already.
    fn state_slots(
        &mut self,
        workspace: &Workspace,
        queued: &QueuedDemand,
        cause: BeatCause,
        beat: &mut Beat,
    ) {
        let moment = beat.sent;
        let (id, credit_use) = (workspace.shared_id(), workspace.credit_use());
        let is_limited = workspace.quota(moment.now).ceiling().is_some();
        let shared_now = self.clock.to_shared(moment.now);
        let state = self.workspaces.entry(id).or_insert_with(|| WorkspaceState::new(moment.instant));
        for (group, slots) in ConcurrencyGroup::all().zip(&mut state.slots) {
            let usage = workspace.sample_slots(group);
            let GroupDemand { slots: queued, min_credits } = queued.groups[group.index()];
            // A slot is useless without credits, so a replica without credits leaves its slots to other replicas.
            let lacks_credits = is_limited
                && if queued == 0 {
                    !state.credits.can_start(credit_use, None)
                } else {
                    state.credits.is_waiting() && !state.credits.can_start(credit_use, Some(min_credits))
                };
            let demand = SlotDemand { queued, lacks_credits };
            let Some(statement) = slots.statement(usage, demand, shared_now, moment.instant) else {
                continue;
            };
            let statement = if self.is_leaving {
                SlotStatement { held: usage.count.running, demand: 0, ..statement }
            } else {
                statement
            };
            beat.held_slots += u64::from(statement.held);
            // A queued request waits until other replicas have returned a slot.
            let needs_reply = slots.is_changed(statement) || (queued > 0 && !lacks_credits);
            beat.is_due |= needs_reply;
            let is_demanded = cause == BeatCause::DemandedByOthers && self.demanded.contains(&id);
            if beat.is_full || needs_reply || is_demanded {
                beat.slots.push((id, group, statement));
            }
        }
    }

    /// Forgets the workspaces that have no key any more.
    fn forget_removed(&mut self, roster: &Roster) {
        let workspaces = roster.workspaces();
        self.workspaces.retain(|id, _| workspaces.iter().any(|workspace| workspace.shared_id() == *id));
    }
}
