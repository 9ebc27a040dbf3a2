//! Holds the state of this replica, and makes the statements for the next beat, which is a round trip to Redis. A
//! statement contains the credits or slots that the replica has used, holds and needs. Also records connections, the
//! demands of other replicas, and the end of the program. `beat_replies.rs` applies the replies. Neither file does
//! input or output, and both take the time as an argument, so that tests can simulate many replicas on virtual time.

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

/// Maximum interval between two full beats. A full beat also contains the statements that have not changed.
pub(super) const FULL_BEAT_INTERVAL: Duration = Duration::from_secs(2);
/// The assumed number of replicas before the first reply of Redis, so that a replica which starts while Redis is down
/// does not use the whole pool.
const ASSUMED_REPLICAS: u32 = 2;

/// The settings of a [`Replica`].
#[derive(Debug)]
pub(super) struct ReplicaSettings {
    pub(super) id: String,
    pub(super) pool_name: SharedPoolName,
    /// Whether this replica can poll the provider for all replicas.
    pub(super) can_lead: bool,
    /// The regional hosts of the provider.
    pub(super) regions: Arc<[Arc<Authority>]>,
}

/// The state of this replica, which its beats change.
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
    pub(super) live_replicas: u32,
    /// The number of the last beat, by which Redis recognizes a statement that arrives late.
    pub(super) statement_number: u64,
    pub(super) workspaces: HashMap<SharedId, WorkspaceState>,
    pub(super) last_full_beat: Option<Instant>,
    /// The workspaces whose credits or slots other replicas need.
    demanded_by_others: BTreeSet<SharedId>,
    /// Whether this replica has no connection to Redis, so that it uses only its part of the pool.
    pub(super) is_alone: bool,
    /// Whether Redis has replied to a beat over the current connection.
    pub(super) has_reported: bool,
    /// Whether the replica returns its grants and slots, because its program ends.
    pub(super) is_leaving: bool,
}

/// The credits and slots of a workspace, as this replica knows them.
#[derive(Debug)]
pub(super) struct WorkspaceState {
    pub(super) credits: Credits,
    /// The last statement that Redis has received, by which changes are detected.
    pub(super) last_statement: Option<CreditStatement>,
    pub(super) slots: [Slots; ConcurrencyGroup::COUNT],
    /// The time of the poll that the last statement contains, or `None` before the first poll.
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
            live_replicas: ASSUMED_REPLICAS,
            statement_number: 0,
            workspaces: HashMap::new(),
            last_full_beat: None,
            demanded_by_others: BTreeSet::new(),
            is_alone: true,
            has_reported: false,
            is_leaving: false,
        }
    }

    /// Prepares the last beat, which returns all grants and slots.
    pub(super) fn leave(&mut self) {
        self.is_leaving = true;
        self.last_full_beat = None;
    }

    /// Uses a new id, because another program uses the previous id.
    pub(super) fn replace_id(&mut self, id: String) {
        self.id = id;
        // The statements of the previous id belong to the other program.
        self.workspaces.clear();
        self.last_full_beat = None;
    }

    /// Returns the replicas in the last reply, or `None` before the first reply.
    pub(super) fn membership(&self) -> Option<&Membership> {
        self.membership.as_ref()
    }

    /// Returns the number of live replicas at the last reply, including this replica.
    pub(super) fn live_replica_count(&self) -> u32 {
        self.live_replicas
    }

    /// Whether this replica has no connection to Redis, so that it uses only its part of the pool.
    pub(super) fn is_alone(&self) -> bool {
        self.is_alone
    }

    /// Whether this replica polls the provider: it is the leader or alone, or the leader is unknown.
    pub(super) fn is_polling(&self) -> bool {
        self.is_alone || self.membership.as_ref().is_none_or(|membership| membership.leader == self.id)
    }

    /// Records that a connection to Redis is open.
    pub(super) fn record_connected(&mut self) {
        self.is_alone = false;
    }

    /// Records that there is no connection to Redis.
    pub(super) fn record_disconnected(&mut self) {
        if !mem::replace(&mut self.is_alone, true) {
            self.maps.forget_versions();
            self.workspaces.values_mut().for_each(|state| state.credits.request_uses());
            self.has_reported = false;
        }
    }

    /// Records that another replica needs credits or slots of these workspaces.
    pub(super) fn record_demand(&mut self, workspaces: Vec<SharedId>) {
        let workspaces = workspaces.into_iter().filter(|workspace| self.workspaces.contains_key(workspace));
        self.demanded_by_others.extend(workspaces);
    }

    /// Records that the last beats contained this replica's response to all demands.
    pub(super) fn record_response(&mut self) {
        self.demanded_by_others.clear();
    }

    /// Returns the next beat. It is full if the last full beat was [`FULL_BEAT_INTERVAL`] ago.
    pub(super) fn make_beat(&mut self, moment: Moment, cause: BeatCause) -> Beat {
        let roster = self.pool.roster();
        let queued = self.pool.queued_demand();
        let is_full = self
            .last_full_beat
            .is_none_or(|last| moment.instant.saturating_duration_since(last) >= FULL_BEAT_INTERVAL);
        let mut beat = Beat {
            calls: Vec::new(),
            sent_at: moment,
            workspaces: HashMap::new(),
            credits: Vec::new(),
            slots: Vec::new(),
            held_slots: 0,
            is_due: is_full,
            is_full,
        };
        for workspace in roster.workspaces() {
            self.add_credit_statement(workspace, &queued, cause, &mut beat);
            self.add_slot_statements(workspace, &queued, cause, &mut beat);
            beat.workspaces.insert(workspace.shared_id(), Arc::clone(workspace));
        }
        if is_full {
            self.forget_removed_workspaces(&roster);
        }
        self.description.slots = beat.held_slots;
        self.statement_number += 1;
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

    /// Adds the statement about the credits of a workspace to `beat`. A beat that is not full omits an unchanged
    /// statement that needs no credits, returns none and responds to no demand.
    fn add_credit_statement(
        &mut self,
        workspace: &Workspace,
        queued: &QueuedDemand,
        cause: BeatCause,
        beat: &mut Beat,
    ) {
        let moment = beat.sent_at;
        let Some(limit) = workspace.quota(moment.now).ceiling() else { return };
        let (id, usage) = (workspace.shared_id(), workspace.credit_use());
        let polled_at = workspace.polled_at();
        let state = self.workspaces.entry(id).or_insert_with(|| WorkspaceState::new(moment.instant));
        let has_new_poll = mem::replace(&mut state.polled_at, polled_at) != polled_at;
        let base_time = polled_at.filter(|_| has_new_poll).unwrap_or(moment.now);
        // Queued requests whose credits are granted wait for a slot, and need no more credits. A replica that waits in
        // `grants.lua` keeps its place until its requests have started.
        let needs_credits = state.last_statement.is_some_and(|last| last.queued > 0)
            || !state.credits.can_start(usage, Some(queued.max_credits));
        // The demand is at most the cost of two requests, because other replicas also need the credits that are left.
        let max_queued = queued.credits.min(queued.max_credits.saturating_mul(2));
        let statement = state.credits.make_statement(CreditSituation {
            usage,
            limit,
            queued: if needs_credits { max_queued } else { 0 },
            least: if needs_credits { queued.min_credits } else { 0 },
            is_polled: polled_at.is_some(),
            base_time: self.clock.to_shared(base_time),
            instant: moment.instant,
        });
        let statement = if self.is_leaving { statement.without_need() } else { statement };
        let is_changed = !state.last_statement.is_some_and(|last| last.is_equivalent_to(statement));
        // A queued request waits until other replicas have returned the credits that they do not need.
        beat.is_due |= is_changed || statement.queued > 0;
        let is_demanded = cause == BeatCause::DemandedByOthers
            && self.demanded_by_others.contains(&id)
            && (statement.has_unused() || state.credits.may_exceed());
        if beat.is_full
            || is_changed
            || is_demanded
            || state.credits.are_returned_by(statement)
            || statement.needed() > 0
        {
            beat.credits.push((id, statement));
        }
    }

    /// Adds the statements about the slots of a workspace to `beat`. A beat that is not full omits an unchanged
    /// statement, unless queued requests need slots or another replica has demanded them.
    fn add_slot_statements(
        &mut self,
        workspace: &Workspace,
        queued: &QueuedDemand,
        cause: BeatCause,
        beat: &mut Beat,
    ) {
        let moment = beat.sent_at;
        let (id, credit_use) = (workspace.shared_id(), workspace.credit_use());
        let is_limited = workspace.quota(moment.now).ceiling().is_some();
        let shared_now = self.clock.to_shared(moment.now);
        let state = self.workspaces.entry(id).or_insert_with(|| WorkspaceState::new(moment.instant));
        for (group, slots) in ConcurrencyGroup::all().zip(&mut state.slots) {
            let usage = workspace.sample_slots(group);
            let GroupDemand { slots: queued, min_credits } = queued.groups[group.index()];
            // A request needs a slot and credits, so a replica without credits leaves its slots to other replicas.
            let lacks_credits = is_limited
                && if queued == 0 {
                    !state.credits.can_start(credit_use, None)
                } else {
                    state.credits.is_waiting() && !state.credits.can_start(credit_use, Some(min_credits))
                };
            let demand = SlotDemand { queued, lacks_credits };
            let Some(statement) = slots.make_statement(usage, demand, shared_now, moment.instant) else {
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
            let is_demanded = cause == BeatCause::DemandedByOthers && self.demanded_by_others.contains(&id);
            if beat.is_full || needs_reply || is_demanded {
                beat.slots.push((id, group, statement));
            }
        }
    }

    /// Forgets the workspaces that are not in `roster`.
    fn forget_removed_workspaces(&mut self, roster: &Roster) {
        let workspaces = roster.workspaces();
        self.workspaces.retain(|id, _| workspaces.iter().any(|workspace| workspace.shared_id() == *id));
    }
}
