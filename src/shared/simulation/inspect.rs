//! Reads the credits, slots and reported charges of a replica for the invariants of a simulation.

use super::super::replica::Replica;
use super::world::{Process, World};
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::shared_id::SharedId;

impl Replica {
    /// Formats the credits and slots of a workspace for the report of a failed simulation.
    pub(super) fn format_workspace(&self, workspace: SharedId) -> String {
        format!("{:?}", self.workspaces.get(&workspace))
    }

    /// Returns the amount up to which this process may use credits, and the credits that were left at the last reply.
    pub(super) fn credit_bound(&self, workspace: SharedId) -> (Option<i64>, u64) {
        self.workspaces.get(&workspace).map_or((None, 0), |state| state.credits.bound_and_left())
    }

    /// Returns the slots that this replica may use.
    pub(super) fn slot_share(&self, workspace: SharedId, group: ConcurrencyGroup) -> u32 {
        self.workspaces
            .get(&workspace)
            .and_then(|state| state.slots[group.index()].share())
            .unwrap_or(u32::MAX)
    }

    /// Whether this replica has no grant of slots. It may then use one slot.
    pub(super) fn lacks_slot_grant(&self, workspace: SharedId, group: ConcurrencyGroup) -> bool {
        self.workspaces.get(&workspace).is_none_or(|state| !state.slots[group.index()].has_grant())
    }
}

impl World {
    /// Whether another replica has received all charges of a process for each workspace, or there is no other replica.
    pub(super) fn has_reported_all(&self, process: &Process) -> bool {
        let (roster, replica) = (process.pool.roster(), process.replica.borrow());
        let mut others = self.processes();
        others.retain(|other| other.index != process.index);
        roster.keys().iter().all(|key| {
            let (id, usage) = (key.workspace().shared_id(), key.workspace().credit_use());
            let Some(used) = replica.workspaces.get(&id).and_then(|state| state.credits.used(usage)) else {
                return false;
            };
            others.is_empty()
                || others.iter().any(|other| {
                    let other_replica = other.replica.borrow();
                    other_replica
                        .workspaces
                        .get(&id)
                        .is_some_and(|state| state.credits.used_by(&process.id) >= used)
                })
        })
    }
}
