//! Determines the state changes of keys that were not reported before.
//!
//! Charges, polls, refusals and reservations return these changes, and after a reload `Pool::transitions` returns them.
//! The caller logs each change once.

use std::sync::Arc;

use super::cells::EvaluationInputs;
use super::key::Key;
use super::roster::Roster;
use super::workspace::Workspace;
use crate::policy::key_state;
use crate::policy::quota::Quota;
use crate::policy::units::UnixMs;

/// A state change of a key of the pool.
pub type Transition = key_state::Transition<Arc<Key>>;

/// Returns the unreported state changes of all keys of `workspace`.
pub(super) fn workspace_transitions(roster: &Roster, workspace: &Workspace, now: UnixMs) -> Vec<Transition> {
    let start = workspace.state_change_cache.start_evaluation();
    let quota = workspace.quota(now);
    let mut next_change = workspace.next_change(&quota, now);
    let mut transitions = Vec::new();
    for key in roster.keys().iter().filter(|key| std::ptr::eq(key.workspace(), workspace)) {
        transitions.extend(key_transition(roster, key, now));
        next_change = next_change.into_iter().chain(key.next_change(now)).min();
    }
    let inputs = evaluation_inputs(roster, &quota);
    workspace.state_change_cache.store(start, inputs, next_change.unwrap_or(UnixMs(u64::MAX)));
    transitions
}

/// Returns the unreported state changes of all keys of `workspace` after a charge. A charge seldom changes more than
/// the count of spent credits, so the keys are evaluated only if the last evaluation is outdated.
pub(super) fn transitions_after_charge(
    roster: &Roster,
    workspace: &Workspace,
    now: UnixMs,
) -> Vec<Transition> {
    let inputs = evaluation_inputs(roster, &workspace.quota(now));
    if workspace.state_change_cache.is_current(inputs, now) {
        return Vec::new();
    }
    workspace_transitions(roster, workspace, now)
}

/// Returns the unreported state change of one key.
pub(super) fn key_transition(roster: &Roster, key: &Arc<Key>, now: UnixMs) -> Option<Transition> {
    let quota = key.workspace().quota(now);
    let change = key.last_reported.update(key.state(now), quota, roster.is_near_limit(&quota))?;
    Some(Transition { key: Arc::clone(key), change })
}

fn evaluation_inputs(roster: &Roster, quota: &Quota) -> EvaluationInputs {
    EvaluationInputs {
        roster_generation: roster.generation,
        is_exhausted: quota.is_exhausted(),
        is_near_limit: roster.is_near_limit(quota),
    }
}
