//! Builds the calls of the Lua scripts for one beat: the round trip in which a replica states its use to Redis and
//! receives its grants. `replica.rs` makes the statements, and `beat_replies.rs` applies the replies.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::credit_statement::CreditStatement;
use super::credits::GRANT_LEASE;
use super::maps::Outdated;
use super::members::{ENDED_MEMBER_TTL, LEADER_TTL, MEMBER_TTL};
use super::replica::Replica;
use super::scripts::{self, Map, ScriptCall};
use super::shared_clock::Moment;
use super::slots::{SlotStatement, slots_call};
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::shared_id::SharedId;
use crate::pool::Workspace;

/// Time to live of a workspace's credits in Redis after the last statement about them.
const CREDITS_TTL: Duration = Duration::from_secs(40 * 24 * 3_600);

/// The number of arguments of one amount, as `ARGUMENTS` in `grants.lua`.
const GRANT_ARGUMENTS: usize = 15;

/// The time for which a replica keeps its place in the line of `grants.lua` after its credits suffice for a queued
/// request, so that it can also get a slot.
pub(super) const TURN: Duration = Duration::from_secs(2);

/// Minimum time between two replies of `grants.lua` that contain the charges of each replica although none were lost.
/// If a replica ends, and a failover of Redis loses its last statement, charges of this time may be lost.
const MIN_LIST_INTERVAL: Duration = Duration::from_millis(500);

/// Maximum number of workspaces in one demand. A queued request needs only one of them, and the next demand contains
/// others.
const MAX_DEMANDED_WORKSPACES: usize = 8;

/// The reason for a beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BeatCause {
    /// The beat interval has passed. The beat is sent only if a statement is due.
    Interval,
    /// Queued requests, missed messages, a new connection or the end of the program need a reply.
    ReplyNeeded,
    /// Other replicas need credits or slots of some workspaces ([`Replica::record_demand`]). This replica states those
    /// in which it holds more than it needs.
    DemandedByOthers,
}

/// The statements of one beat, and the calls that make them.
#[derive(Debug)]
pub(super) struct Beat {
    pub(super) calls: Vec<ScriptCall>,
    pub(super) sent: Moment,
    pub(super) workspaces: HashMap<SharedId, Arc<Workspace>>,
    pub(super) credits: Vec<(SharedId, CreditStatement)>,
    pub(super) slots: Vec<(SharedId, ConcurrencyGroup, SlotStatement)>,
    /// The sum of the slots that the replica uses or may use.
    pub(super) held_slots: u64,
    /// Whether a statement differs from the last statement, or a full beat is due.
    pub(super) is_due: bool,
    pub(super) is_full: bool,
}

/// The result of a beat.
#[derive(Debug, Default)]
pub(super) struct BeatOutcome {
    pub(super) outdated: Outdated,
    /// Whether Redis has lost the statements of this replica.
    pub(super) is_lost: bool,
    /// Whether another program states itself under the id of this replica, because it has a copy of its database.
    pub(super) has_duplicate_id: bool,
    /// The workspaces of which other replicas hold credits or slots that this replica needs.
    pub(super) unmet: BTreeSet<SharedId>,
    /// Whether the earlier statements of this replica were only read, so that the next beat must follow at once.
    pub(super) is_incomplete: bool,
}

impl BeatOutcome {
    /// Returns the workspaces of the next demand. They change with the number of the statement.
    pub(super) fn demanded_workspaces(&self, statement: u64) -> Vec<SharedId> {
        let count = self.unmet.len();
        let turn = usize::try_from(statement).unwrap_or(0).wrapping_mul(MAX_DEMANDED_WORKSPACES);
        let first = turn.checked_rem(count).unwrap_or(0);
        let workspaces = self.unmet.iter().cycle().skip(first);
        workspaces.take(count.min(MAX_DEMANDED_WORKSPACES)).copied().collect()
    }
}

impl Replica {
    pub(super) fn members_call(&self) -> ScriptCall {
        let mut keys = vec![self.keyspace.members(), self.keyspace.leader()];
        keys.extend(Map::ALL.map(|map| self.keyspace.map(map)));
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

    pub(super) fn credits_call(&self, statements: &[(SharedId, CreditStatement)]) -> ScriptCall {
        let keys = statements.iter().map(|(workspace, _)| self.keyspace.credits(*workspace)).collect();
        let numbers = [
            self.replicas.into(),
            millis(GRANT_LEASE),
            self.statement,
            millis(TURN),
            millis(MIN_LIST_INTERVAL),
        ];
        let mut arguments = vec![self.id.clone()];
        arguments.extend(numbers.map(|number: u64| number.to_string()));
        for (workspace, statement) in statements {
            arguments.extend(grant_arguments(statement, self.lost_use_argument(*workspace), CREDITS_TTL));
        }
        ScriptCall { script: scripts::GRANTS, keys, arguments }
    }

    /// Returns the charges of other replicas that Redis has lost, as `replica used run before` for each replica, for
    /// `grants.lua`.
    fn lost_use_argument(&self, workspace: SharedId) -> String {
        self.workspaces.get(&workspace).map(|state| state.credits.lost_use_argument()).unwrap_or_default()
    }

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

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// Returns the arguments that state one amount to `grants.lua`, in its order.
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
    let argument = |number: Option<u64>| number.map(|number| number.to_string()).unwrap_or_default();
    [
        argument(used),
        run.to_string(),
        used_before.to_string(),
        reserved.to_string(),
        queued.to_string(),
        least.to_string(),
        held.to_string(),
        limit.to_string(),
        base.map(|(base, _)| base.to_string()).unwrap_or_default(),
        argument(base.map(|(_, stamp)| stamp)),
        u8::from(is_idle).to_string(),
        ttl.as_millis().to_string(),
        used_by_others.to_string(),
        epoch.to_string(),
        lost_use_argument,
    ]
}
