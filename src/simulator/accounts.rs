//! Keeps the state of workspaces and keys: credits, caps, permissions, bills and running operations. It admits, refuses
//! and charges operations, and finds the key that pays for a conversation. The module has no clock and no lock. The
//! functions take the current time as an argument, and the caller holds the lock, so that a check and its charge are
//! atomic.

use std::time::Duration;

use jiff::ToSpan;

use crate::policy::units::UnixMs;

use super::conversations::Conversations;
use super::history::History;
use super::plan::{Billing, KeyPlan, Plan, ReportedLimit, WorkspacePlan};
use super::refusal::{RefusalKind, RefusalValues};
use super::resources::Resources;

/// The state of all workspaces and keys.
#[derive(Debug)]
pub(super) struct Accounts {
    pub(super) workspaces: Vec<Workspace>,
    pub(super) keys: Vec<Key>,
    /// The voices of the library.
    pub(super) library: Vec<String>,
}

/// The state of a workspace, which starts as its plan describes.
#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) plan: WorkspacePlan,
    /// Used credits of the current period.
    pub(super) used: u64,
    /// The end of the current period, or the maximum time if the credits are never reset.
    pub(super) resets_at: UnixMs,
    /// Number of running operations.
    pub(super) running: u32,
    /// Highest number of operations that ran at the same time.
    pub(super) peak_running: u32,
    /// The voices of the workspace that are professional clones.
    pub(super) professional_voices: Vec<String>,
    /// Number of instant clones and copies of library voices added so far.
    pub(super) added_voices: u64,
    pub(super) history: History,
    pub(super) conversations: Conversations,
    pub(super) resources: Resources,
}

/// A key of the plan, and the credits that it has used.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) plan: KeyPlan,
    /// The name of the key, see [`KeyPlan::name`].
    pub(super) name: String,
    /// The index of the key's workspace.
    pub(super) workspace_index: usize,
    /// Credits used in the current period, which count towards the key's cap.
    pub(super) used: u64,
}

/// A refusal with the values at the time of the decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) kind: RefusalKind,
    pub(super) values: Box<RefusalValues>,
}

impl From<RefusalKind> for Refusal {
    fn from(kind: RefusalKind) -> Self {
        Self { kind, values: Box::default() }
    }
}

impl Refusal {
    pub(super) fn new(kind: RefusalKind, values: RefusalValues) -> Self {
        Self { kind, values: Box::new(values) }
    }

    /// Creates a refusal whose text is about `subject`.
    pub(super) fn with_subject(kind: RefusalKind, subject: impl Into<String>) -> Self {
        Self::new(kind, RefusalValues { subject: subject.into(), ..RefusalValues::default() })
    }
}

/// The limits that apply to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CreditLimits {
    /// The credits of the workspace, and the cap of the key if it has one.
    KeyAndWorkspace,
    /// The credits of the workspace alone. Caps of keys do not apply to agents (public issues of
    /// the provider, 2026).
    Workspace,
}

/// An admitted operation. Its credits are charged, and it counts as running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Admission {
    pub(super) cost: u64,
    /// Used credits of the workspace before this operation.
    pub(super) used_before: u64,
    /// Number of concurrent operations, including the new operation.
    pub(super) running: u32,
    pub(super) max_concurrent: Option<u32>,
    pub(super) workspace_index: usize,
}

impl Accounts {
    /// Creates the state that `plan` describes, at the time `now`.
    pub(super) fn new(plan: &Plan, now: UnixMs) -> Self {
        let workspaces = plan.workspaces.iter().map(|workspace| Workspace::new(workspace.clone(), now));
        let mut accounts =
            Self { workspaces: workspaces.collect(), keys: Vec::new(), library: plan.library.clone() };
        for (index, key) in plan.keys.iter().enumerate() {
            let workspace_index = accounts.find_or_add_workspace(key, index, now);
            let name = key.name.clone().unwrap_or_else(|| format!("key {}", index + 1));
            accounts.keys.push(Key { plan: key.clone(), name, workspace_index, used: 0 });
        }
        accounts
    }

    /// Returns the index of the key's workspace. Adds the workspace if the plan does not describe it.
    fn find_or_add_workspace(&mut self, key: &KeyPlan, index: usize, now: UnixMs) -> usize {
        let name = key.workspace.clone().unwrap_or_else(|| format!("workspace-of-key-{}", index + 1));
        if let Some(existing) = self.workspaces.iter().position(|workspace| workspace.plan.name == name) {
            return existing;
        }
        let plan = match key.tier.as_deref() {
            None => WorkspacePlan::new(&name, key.credits),
            Some("payg") => WorkspacePlan::pay_as_you_go(&name, key.credits, ReportedLimit::Zero),
            Some(tier) => WorkspacePlan::of_tier(&name, key.credits, tier),
        };
        self.workspaces.push(Workspace::new(plan, now));
        self.workspaces.len() - 1
    }

    /// Resets the credits of every workspace whose period has ended.
    pub(super) fn reset_ended_periods(&mut self, now: UnixMs) {
        for (index, workspace) in self.workspaces.iter_mut().enumerate() {
            if now < workspace.resets_at {
                continue;
            }
            workspace.resets_at = next_reset(workspace.resets_at, workspace.plan.period, now);
            workspace.used = 0;
            for key in self.keys.iter_mut().filter(|key| key.workspace_index == index) {
                key.used = 0;
            }
        }
    }

    /// Refuses an operation if the key lacks the permission.
    pub(super) fn check_permission(
        &self,
        key_index: usize,
        permission: &'static str,
    ) -> Result<(), RefusalKind> {
        match &self.key(key_index)?.plan.permissions {
            Some(permissions) if !permissions.iter().any(|name| name == permission) => {
                Err(RefusalKind::MissingPermissions(permission.into()))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Refuses an operation if the workspace has an unpaid bill, or if the abuse detection has disabled it.
    pub(super) fn check_billing(&self, key_index: usize) -> Result<(), RefusalKind> {
        match self.workspace(key_index)?.plan.billing {
            Billing::Active => Ok(()),
            Billing::PastDue => Err(RefusalKind::PaymentIssue),
            Billing::FreeDisabled => Err(RefusalKind::UnusualActivity),
        }
    }

    /// Checks credits, cap and concurrency in the provider's order, and then charges the operation and counts it as
    /// running. A refused operation changes nothing.
    pub(super) fn admit(
        &mut self,
        key_index: usize,
        cost: u64,
        limits: CreditLimits,
    ) -> Result<Admission, Refusal> {
        self.check_credits(key_index, cost, limits)?;
        if !self.has_free_slot(key_index) {
            return Err(Refusal::new(RefusalKind::Concurrency, self.refusal_values(key_index, cost)));
        }
        let used_before = self.workspace(key_index)?.used;
        self.charge(key_index, cost, limits)?;
        let workspace_index = self.key(key_index)?.workspace_index;
        let workspace = self.workspace_mut(key_index)?;
        workspace.running = workspace.running.saturating_add(1);
        workspace.peak_running = workspace.peak_running.max(workspace.running);
        Ok(Admission {
            cost,
            used_before,
            running: workspace.running,
            max_concurrent: workspace.plan.max_concurrent,
            workspace_index,
        })
    }

    /// Returns whether the concurrency limit of the key's workspace allows another operation.
    pub(super) fn has_free_slot(&self, key_index: usize) -> bool {
        self.workspace(key_index)
            .is_ok_and(|workspace| workspace.plan.max_concurrent.is_none_or(|max| workspace.running < max))
    }

    /// Checks credits and cap, and then charges an admitted operation or its continuation. A
    /// refusal changes nothing.
    pub(super) fn charge(
        &mut self,
        key_index: usize,
        cost: u64,
        limits: CreditLimits,
    ) -> Result<(), Refusal> {
        self.check_credits(key_index, cost, limits)?;
        let workspace = self.workspace_mut(key_index)?;
        workspace.used = workspace.used.saturating_add(cost);
        if let Some(key) = self.keys.get_mut(key_index) {
            key.used = key.used.saturating_add(cost);
        }
        Ok(())
    }

    /// Refuses a cost above the remaining credits or the remaining cap.
    pub(super) fn check_credits(
        &self,
        key_index: usize,
        cost: u64,
        limits: CreditLimits,
    ) -> Result<(), Refusal> {
        let is_capped = limits == CreditLimits::KeyAndWorkspace && self.key(key_index)?.plan.cap.is_some();
        let values = self.refusal_values(key_index, cost);
        if cost > values.remaining_credits {
            Err(Refusal::new(RefusalKind::Quota, values))
        } else if is_capped && cost > values.remaining_cap {
            Err(Refusal::new(RefusalKind::KeyCap, values))
        } else {
            Ok(())
        }
    }

    /// Releases the slot of an admitted operation.
    pub(super) fn release_slot(&mut self, workspace_index: usize) {
        if let Some(workspace) = self.workspaces.get_mut(workspace_index) {
            workspace.running = workspace.running.saturating_sub(1);
        }
    }

    /// Returns the values for the refusal of a request with the given `cost`.
    pub(super) fn refusal_values(&self, key_index: usize, cost: u64) -> RefusalValues {
        let (Ok(key), Ok(workspace)) = (self.key(key_index), self.workspace(key_index)) else {
            return RefusalValues { requested_amount: cost, ..RefusalValues::default() };
        };
        let cap = key.plan.cap.unwrap_or(workspace.plan.credits);
        RefusalValues {
            requested_amount: cost,
            credit_limit: workspace.plan.credits,
            remaining_credits: workspace.remaining_credits(),
            key_name: key.name.clone(),
            key_cap: cap,
            remaining_cap: cap.saturating_sub(key.used),
            max_concurrent: workspace.plan.max_concurrent.unwrap_or(workspace.running),
            ..RefusalValues::default()
        }
    }

    /// Returns the index of the key that pays for a conversation with an agent. It is the caller's key if the agent is
    /// in the caller's workspace, or else a key of the agent's workspace. For an agent that no workspace lists, it is
    /// the caller's key, or the first key if the caller has none. A private agent is refused to other workspaces, and
    /// to callers without a key.
    pub(super) fn find_agent_payer(
        &self,
        agent_id: &str,
        key_index: Option<usize>,
    ) -> Result<usize, Refusal> {
        let is_public_agent = |workspace: &Workspace| {
            workspace.plan.agents.iter().find(|agent| agent.id == agent_id).map(|agent| agent.is_public)
        };
        let agent_workspace =
            self.workspaces.iter().enumerate().find_map(|(workspace_index, workspace)| {
                Some((workspace_index, is_public_agent(workspace)?))
            });
        let caller_workspace =
            key_index.and_then(|key_index| self.keys.get(key_index)).map(|key| key.workspace_index);
        let payer = match (agent_workspace, key_index) {
            (None, Some(key_index)) => Some(key_index),
            (None, None) => (!self.keys.is_empty()).then_some(0),
            (Some((workspace_index, _)), Some(key_index)) if caller_workspace == Some(workspace_index) => {
                Some(key_index)
            }
            (Some((workspace_index, true)), _) => {
                self.keys.iter().position(|key| key.workspace_index == workspace_index)
            }
            (Some((_, false)), Some(_)) => None,
            (Some((_, false)), None) => return Err(RefusalKind::NeedsAuthorization.into()),
        };
        payer.ok_or_else(|| Refusal::with_subject(RefusalKind::AgentNotFound, agent_id))
    }

    /// Returns the key at an index.
    ///
    /// # Errors
    ///
    /// Fails if the key does not exist.
    pub(super) fn key(&self, key_index: usize) -> Result<&Key, RefusalKind> {
        self.keys.get(key_index).ok_or(RefusalKind::InvalidKey)
    }

    /// Returns the workspace of a key.
    ///
    /// # Errors
    ///
    /// Fails if the key does not exist.
    pub(super) fn workspace(&self, key_index: usize) -> Result<&Workspace, RefusalKind> {
        self.workspaces.get(self.key(key_index)?.workspace_index).ok_or(RefusalKind::InvalidKey)
    }

    pub(super) fn workspace_mut(&mut self, key_index: usize) -> Result<&mut Workspace, RefusalKind> {
        let workspace_index = self.key(key_index)?.workspace_index;
        self.workspaces.get_mut(workspace_index).ok_or(RefusalKind::InvalidKey)
    }
}

impl Workspace {
    fn new(plan: WorkspacePlan, now: UnixMs) -> Self {
        let used_credits = plan.used;
        let resets_at = plan.reset.unwrap_or_else(|| match plan.reported_limit {
            ReportedLimit::Credits => first_of_next_month(now),
            ReportedLimit::Zero | ReportedLimit::Absent => UnixMs(u64::MAX),
        });
        Self {
            plan,
            used: used_credits,
            resets_at,
            running: 0,
            peak_running: 0,
            professional_voices: Vec::new(),
            added_voices: 0,
            history: History::default(),
            conversations: Conversations::default(),
            resources: Resources::default(),
        }
    }

    /// Returns the remaining credits of the current period.
    pub(super) fn remaining_credits(&self) -> u64 {
        self.plan.credits.saturating_sub(self.used)
    }
}

/// Returns the end of the period that contains `now`. An earlier period ended at `previous_reset`.
fn next_reset(previous_reset: UnixMs, period: Option<Duration>, now: UnixMs) -> UnixMs {
    match period.map(|period| u64::try_from(period.as_millis()).unwrap_or(u64::MAX)) {
        None | Some(0) => first_of_next_month(now),
        Some(period_ms) => {
            let periods = (now.0.saturating_sub(previous_reset.0) / period_ms).saturating_add(1);
            UnixMs(previous_reset.0.saturating_add(periods.saturating_mul(period_ms)))
        }
    }
}

/// Returns midnight UTC of the first day of the next month, or the maximum time if this day cannot be
/// represented.
fn first_of_next_month(now: UnixMs) -> UnixMs {
    let utc = jiff::tz::Offset::UTC;
    let timestamp = i64::try_from(now.0).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    timestamp
        .and_then(|timestamp| utc.to_datetime(timestamp).date().first_of_month().checked_add(1.month()).ok())
        .and_then(|first| utc.to_timestamp(first.at(0, 0, 0, 0)).ok())
        .and_then(|midnight| u64::try_from(midnight.as_millisecond()).ok())
        .map_or(UnixMs(u64::MAX), UnixMs)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The time 2026-11-24T09:00:00Z.
    const NOW: UnixMs = UnixMs(1_795_510_800_000);
    /// The time 2026-12-01T00:00:00Z.
    const DECEMBER: UnixMs = UnixMs(1_796_083_200_000);

    fn accounts_of(keys: &str) -> Accounts {
        Accounts::new(&Plan::parse(keys).unwrap(), NOW)
    }

    fn admit(accounts: &mut Accounts, key_index: usize, cost: u64) -> Result<u64, RefusalKind> {
        let admission = accounts.admit(key_index, cost, CreditLimits::KeyAndWorkspace);
        admission.map(|admission| admission.cost).map_err(|refusal| refusal.kind)
    }

    #[test]
    fn a_cost_above_the_remaining_credits_is_refused() {
        let mut accounts = accounts_of("a=10");
        assert_eq!(admit(&mut accounts, 0, 11), Err(RefusalKind::Quota));
        assert_eq!(admit(&mut accounts, 0, 10), Ok(10));
        assert_eq!(admit(&mut accounts, 0, 1), Err(RefusalKind::Quota));
        assert_eq!(admit(&mut accounts, 0, 0), Ok(0));
    }

    #[test]
    fn keys_of_a_workspace_share_its_credits() {
        let mut accounts = accounts_of("a=10@w b=10@w c=10");
        assert_eq!(admit(&mut accounts, 0, 6), Ok(6));
        let refusal = accounts.admit(1, 5, CreditLimits::KeyAndWorkspace).unwrap_err();
        let values = &refusal.values;
        assert_eq!((values.credit_limit, values.remaining_credits, values.requested_amount), (10, 4, 5));
        assert_eq!(admit(&mut accounts, 2, 10), Ok(10));
    }

    #[test]
    fn a_cap_limits_only_its_key() {
        let mut accounts = accounts_of("a=10@w:cap=3 b=10@w");
        assert_eq!(admit(&mut accounts, 0, 3), Ok(3));
        let refusal = accounts.admit(0, 1, CreditLimits::KeyAndWorkspace).unwrap_err();
        assert_eq!(refusal.kind, RefusalKind::KeyCap);
        assert_eq!((refusal.values.key_name.as_str(), refusal.values.key_cap), ("key 1", 3));
        assert_eq!(admit(&mut accounts, 1, 7), Ok(7));
    }

    #[test]
    fn a_saturated_workspace_refuses_and_charges_nothing() {
        let plan = Plan {
            keys: vec![KeyPlan { workspace: Some("w".into()), ..KeyPlan::new("a", 0) }],
            workspaces: vec![WorkspacePlan { max_concurrent: Some(1), ..WorkspacePlan::new("w", 10) }],
            ..Plan::with_keys([])
        };
        let mut accounts = Accounts::new(&plan, NOW);
        let first = accounts.admit(0, 1, CreditLimits::KeyAndWorkspace).unwrap();
        assert_eq!((first.running, first.max_concurrent), (1, Some(1)));
        assert_eq!(admit(&mut accounts, 0, 1), Err(RefusalKind::Concurrency));
        assert_eq!(accounts.workspaces[0].used, 1);
        accounts.release_slot(first.workspace_index);
        assert_eq!(admit(&mut accounts, 0, 1), Ok(1));
    }

    #[test]
    fn credits_and_caps_are_restored_when_the_reset_date_passes() {
        let mut accounts = accounts_of("a=10:cap=10");
        assert_eq!(accounts.workspaces[0].resets_at, DECEMBER);
        accounts.admit(0, 10, CreditLimits::KeyAndWorkspace).unwrap();
        accounts.reset_ended_periods(UnixMs(DECEMBER.0 - 1));
        assert_eq!(admit(&mut accounts, 0, 10), Err(RefusalKind::Quota));
        accounts.reset_ended_periods(DECEMBER);
        assert_eq!(admit(&mut accounts, 0, 10), Ok(10));
        assert_eq!(accounts.workspaces[0].resets_at.rfc3339(), "2027-01-01T00:00:00.000Z");
    }

    #[test]
    fn a_period_repeats_from_its_first_reset() {
        let period = Some(Duration::from_millis(100));
        assert_eq!(next_reset(UnixMs(1_000), period, UnixMs(1_000)), UnixMs(1_100));
        assert_eq!(next_reset(UnixMs(1_000), period, UnixMs(1_099)), UnixMs(1_100));
        assert_eq!(next_reset(UnixMs(1_000), period, UnixMs(1_250)), UnixMs(1_300));
        assert_eq!(next_reset(UnixMs(1_000), Some(Duration::ZERO), NOW), DECEMBER);
        assert_eq!(first_of_next_month(UnixMs(u64::MAX)), UnixMs(u64::MAX));
    }
}
