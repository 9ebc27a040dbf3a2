//! Defines a beat, its cause and its outcome, and builds the calls of the Lua scripts for it. A beat is the round trip
//! in which a replica sends its statements to Redis and receives its grants of credits and slots. `replica.rs` makes
//! the statements, and `beat_replies.rs` applies the replies.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::credit_statement::CreditStatement;
use super::credits::GRANT_LEASE;
use super::maps::OutdatedMaps;
use super::members::{ENDED_MEMBER_TTL, LEADER_TTL, MEMBER_TTL};
use super::replica::Replica;
use super::scripts::{self, ChangeMap, ScriptCall};
use super::shared_clock::Moment;
use super::slots::{SlotStatement, slots_call};
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::shared_id::SharedId;
use crate::pool::Workspace;

/// Time to live of a workspace's credits in Redis after the last statement about them.
const CREDITS_TTL: Duration = Duration::from_secs(40 * 24 * 3_600);

/// The number of arguments of one statement, which is `ARGUMENTS` in `grants.lua`.
const GRANT_ARGUMENTS: usize = 15;

/// The maximum time for which a replica keeps its place among the replicas that wait in `grants.lua`, after its credits
/// are enough for a queued request. The request may also need a slot, so it cannot always start at once.
pub(super) const MAX_TURN: Duration = Duration::from_secs(2);

/// Minimum time between two replies of `grants.lua` that contain the charges of each replica. A reply contains them
/// earlier if Redis has lost charges. The other replicas restore lost charges from these replies. Charges that no reply
/// has contained are lost if their replica ends and a failover of Redis loses its last statement.
const MIN_LIST_INTERVAL: Duration = Duration::from_millis(500);

/// Maximum number of workspaces in one demand. By a demand, a replica asks the others to return credits or slots that
/// they do not need. A queued request needs credits of only one workspace, and the next demand contains other
/// workspaces.
const MAX_DEMANDED_WORKSPACES: usize = 8;

/// The reason for a beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BeatCause {
    /// The beat interval has passed. The beat is sent only if [`Beat::is_due`] is true.
    Interval,
    /// Queued requests, missed messages, a new connection or the end of the program need a reply.
    ReplyNeeded,
    /// Other replicas need credits or slots of some workspaces ([`Replica::record_demand`]). The beat contains those
    /// workspaces of which this replica holds more than it needs.
    DemandedByOthers,
}

/// The statements of one beat, and the calls that send them.
#[derive(Debug)]
pub(super) struct Beat {
    pub(super) calls: Vec<ScriptCall>,
    pub(super) sent_at: Moment,
    /// All workspaces of the pool at the time of the beat.
    pub(super) workspaces: HashMap<SharedId, Arc<Workspace>>,
    pub(super) credits: Vec<(SharedId, CreditStatement)>,
    pub(super) slots: Vec<(SharedId, ConcurrencyGroup, SlotStatement)>,
    /// The sum of the slots that the replica uses or may use.
    pub(super) held_slots: u64,
    /// Whether a statement differs from the last statement, queued requests need credits or slots, or a full beat is
    /// due. A beat of [`BeatCause::Interval`] is sent only in these cases.
    pub(super) is_due: bool,
    /// Whether the beat contains the statements about all workspaces, including those that have not changed.
    pub(super) is_full: bool,
}

/// The tasks that follow from the replies to a beat.
#[derive(Debug, Default)]
pub(super) struct BeatOutcome {
    /// The maps that this replica must read or send again.
    pub(super) outdated: OutdatedMaps,
    /// Whether Redis has lost the statements of this replica.
    pub(super) has_redis_lost_statements: bool,
    /// Whether another program sends statements with the id of this replica, because it has a copy of its database.
    pub(super) has_duplicate_id: bool,
    /// The workspaces of which other replicas hold credits or slots that this replica needs.
    pub(super) unmet_demands: BTreeSet<SharedId>,
    /// Whether the next beat must follow at once, because this beat only read the earlier statements of this replica,
    /// or Redis lacks data that this replica restores.
    pub(super) is_incomplete: bool,
}

impl BeatOutcome {
    /// Returns the workspaces of the next demand. If there are too many for one demand, `statement_number` selects
    /// them, so that successive demands contain all of them.
    pub(super) fn demanded_workspaces(&self, statement_number: u64) -> Vec<SharedId> {
        let count = self.unmet_demands.len();
        let offset = usize::try_from(statement_number).unwrap_or(0).wrapping_mul(MAX_DEMANDED_WORKSPACES);
        let first = offset.checked_rem(count).unwrap_or(0);
        let workspaces = self.unmet_demands.iter().cycle().skip(first);
        workspaces.take(count.min(MAX_DEMANDED_WORKSPACES)).copied().collect()
    }
}

impl Replica {
    /// Returns the call of `members.lua`, which renews this replica's membership and leadership, or ends both when the
    /// replica leaves.
    pub(super) fn members_call(&self) -> ScriptCall {
        let mut keys = vec![self.keyspace.members(), self.keyspace.leader()];
        keys.extend(ChangeMap::ALL.map(|map| self.keyspace.map(map)));
        let (member_ttl, leader_ttl) = match (self.is_leaving, self.can_lead) {
            (true, _) => (Duration::ZERO, Duration::ZERO),
            (false, true) => (MEMBER_TTL, LEADER_TTL),
            (false, false) => (MEMBER_TTL, Duration::ZERO),
        };
        let mut arguments =
            vec![self.id.clone(), serde_json::to_string(&self.description).unwrap_or_default()];
        arguments.extend([member_ttl, ENDED_MEMBER_TTL, leader_ttl].map(|ttl| ttl.as_millis().to_string()));
        ScriptCall { script: scripts::MEMBERS, keys, arguments }
    }

    /// Returns the call of `grants.lua` with these statements.
    pub(super) fn credits_call(&self, statements: &[(SharedId, CreditStatement)]) -> ScriptCall {
        let keys = statements.iter().map(|(workspace, _)| self.keyspace.credits(*workspace)).collect();
        let numbers = [
            self.live_replicas.into(),
            millis(GRANT_LEASE),
            self.statement_number,
            millis(MAX_TURN),
            millis(MIN_LIST_INTERVAL),
        ];
        let mut arguments = vec![self.id.clone()];
        arguments.extend(numbers.map(|number: u64| number.to_string()));
        for (workspace, statement) in statements {
            arguments.extend(grant_arguments(statement, self.lost_use_argument(*workspace), CREDITS_TTL));
        }
        ScriptCall { script: scripts::GRANTS, keys, arguments }
    }

    /// Returns the charges of other replicas that Redis has lost, in the format of `grants.lua`. Each replica has four
    /// words: its name, its charges, the number of its process, and the charges of its earlier processes.
    fn lost_use_argument(&self, workspace: SharedId) -> String {
        self.workspaces.get(&workspace).map(|state| state.credits.lost_use_argument()).unwrap_or_default()
    }

    /// Returns the call of `slots.lua` with these statements.
    pub(super) fn slots_call(
        &self,
        statements: &[(SharedId, ConcurrencyGroup, SlotStatement)],
    ) -> ScriptCall {
        let key = |(workspace, group, _): &(SharedId, ConcurrencyGroup, _)| {
            self.keyspace.slots(*workspace, group.index())
        };
        slots_call(
            &self.id,
            statements.iter().map(key).collect(),
            statements.iter().map(|(.., statement)| statement),
        )
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Returns the arguments of one statement, in the order that `grants.lua` expects.
pub(super) fn grant_arguments(
    statement: &CreditStatement,
    lost_use_argument: String,
    ttl: Duration,
) -> [String; GRANT_ARGUMENTS] {
    let CreditStatement {
        used,
        run,
        used_before,
        reserved,
        queued,
        least,
        held,
        limit,
        base,
        is_idle,
        used_by_others,
        epoch,
    } = *statement;
    let optional = |number: Option<u64>| number.map(|number| number.to_string()).unwrap_or_default();
    [
        optional(used),
        run.to_string(),
        used_before.to_string(),
        reserved.to_string(),
        queued.to_string(),
        least.to_string(),
        held.to_string(),
        limit.to_string(),
        base.map(|(base, _)| base.to_string()).unwrap_or_default(),
        optional(base.map(|(_, stamp)| stamp)),
        u8::from(is_idle).to_string(),
        ttl.as_millis().to_string(),
        used_by_others.to_string(),
        epoch.to_string(),
        lost_use_argument,
    ]
}
