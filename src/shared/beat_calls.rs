//! The script calls of a beat.

use std::time::Duration;

use super::credits::{CreditStatement, GRANT_LEASE};
use super::members::{LEADER_LEASE, LISTED, MEMBER_TTL};
use super::replica::Replica;
use super::scripts::{self, Map, ScriptCall};
use super::slots::{SlotStatement, slots_call};
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::shared_id::SharedId;

/// The time after which Redis forgets the credits of a workspace that no replica states.
const CREDITS_TTL: Duration = Duration::from_secs(40 * 24 * 3_600);

/// The time for which a replica that can start a queued request keeps its place in the line, so that it can get a slot.
pub(super) const TURN: Duration = Duration::from_secs(2);

/// Why a beat is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BeatCause {
    /// The interval has passed. Nothing is sent without a change.
    Interval,
    /// Requests or messages need a reply.
    Needed,
    /// Other replicas need what this one does not, so that it states each workspace of which it holds more than it needs.
    Returned,
}

impl Replica {
    pub(super) fn members_call(&self) -> ScriptCall {
        let mut keys = vec![self.keyspace.members(), self.keyspace.leader()];
        keys.extend(Map::ALL.map(|map| self.keyspace.map(map)));
        let (ttl, lease) = match (self.is_leaving, self.can_lead) {
            (true, _) => (Duration::ZERO, Duration::ZERO),
            (false, true) => (MEMBER_TTL, LEADER_LEASE),
            (false, false) => (MEMBER_TTL, Duration::ZERO),
        };
        let mut arguments =
            vec![self.id.clone(), serde_json::to_string(&self.description).unwrap_or_default()];
        arguments.extend([ttl, LISTED, lease].map(|span| span.as_millis().to_string()));
        ScriptCall { script: scripts::MEMBERS, keys, arguments }
    }

    pub(super) fn credits_call(&self, statements: &[(SharedId, CreditStatement)]) -> ScriptCall {
        let keys = statements.iter().map(|(workspace, _)| self.keyspace.credits(*workspace)).collect();
        let numbers = [self.replicas.into(), millis(GRANT_LEASE), self.statement, millis(TURN)];
        let mut arguments = vec![self.id.clone()];
        arguments.extend(numbers.map(|number: u64| number.to_string()));
        for (workspace, statement) in statements {
            arguments.extend(grant_arguments(statement, self.lost_uses(*workspace), CREDITS_TTL));
        }
        ScriptCall { script: scripts::GRANTS, keys, arguments }
    }

    /// Returns what Redis has lost of the credits that other replicas have used.
    fn lost_uses(&self, workspace: SharedId) -> String {
        self.workspaces.get(&workspace).map(|state| state.credits.lost_uses()).unwrap_or_default()
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

/// Returns the arguments of `grants.lua` for one amount.
pub(super) fn grant_arguments(statement: &CreditStatement, lost_uses: String, ttl: Duration) -> [String; 14] {
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
    } = *statement;
    let text = |number: Option<u64>| number.map(|number| number.to_string()).unwrap_or_default();
    [
        text(used),
        run.to_string(),
        used_before.to_string(),
        reserved.to_string(),
        queued.to_string(),
        least.to_string(),
        held.to_string(),
        limit.to_string(),
        base.map(|(base, _)| base.to_string()).unwrap_or_default(),
        text(base.map(|(_, stamp)| stamp)),
        u8::from(is_idle).to_string(),
        ttl.as_millis().to_string(),
        used_by_others.to_string(),
        lost_uses,
    ]
}
