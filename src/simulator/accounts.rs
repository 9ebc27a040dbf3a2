//! The state of workspaces and keys: credits, caps, permissions and running operations. It has no
//! clock and no lock: the time is an argument, and the caller holds the lock, so that a check and
//! its charge are atomic.

use std::collections::VecDeque;
use std::time::Duration;

use jiff::ToSpan;

use crate::policy::units::UnixMs;

use super::conversations::Conversations;
use super::history::History;
use super::plan::{Billing, KeyPlan, Plan, ShownLimit, WorkspacePlan};
use super::resources::Resources;
use super::shape::{Facts, Shape};

/// All workspaces and keys.
#[derive(Debug)]
pub(super) struct Accounts {
    pub(super) workspaces: Vec<Workspace>,
    pub(super) keys: Vec<Key>,
    /// The voices of the library.
    pub(super) library: Vec<String>,
}

#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) plan: WorkspacePlan,
    pub(super) used: u64,
    pub(super) reset: UnixMs,
    pub(super) running: u32,
    pub(super) running_max: u32,
    /// Its voices that are professional clones.
    pub(super) professional: Vec<String>,
    /// Number of voices added so far.
    pub(super) voice_edits: u64,
    pub(super) history: History,
    pub(super) conversations: Conversations,
    pub(super) resources: Resources,
}

#[derive(Debug)]
pub(super) struct Key {
    pub(super) plan: KeyPlan,
    /// Its name, see [`KeyPlan::name`].
    pub(super) name: String,
    /// Its index among the workspaces.
    pub(super) workspace: usize,
    /// Credits used in this period, which count against its cap.
    pub(super) used: u64,
}

/// A refusal with the numbers at the time of the decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) shape: Shape,
    pub(super) facts: Box<Facts>,
}

impl From<Shape> for Refused {
    fn from(shape: Shape) -> Self {
        Self { shape, facts: Box::default() }
    }
}

impl Refused {
    /// Creates the refusal `shape` about the object `subject`.
    pub(super) fn with_subject(shape: Shape, subject: impl Into<String>) -> Self {
        Self { shape, facts: Box::new(Facts { subject: subject.into(), ..Facts::default() }) }
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
pub(super) struct Admitted {
    pub(super) cost: u64,
    /// Used credits of the workspace before this operation.
    pub(super) used_before: u64,
    /// Concurrent operations, including this one.
    pub(super) running: u32,
    pub(super) running_max: Option<u32>,
    pub(super) workspace: usize,
}

impl Accounts {
    /// Creates the state that `plan` describes, at the time `now`.
    pub(super) fn open(plan: &Plan, now: UnixMs) -> Self {
        let mut accounts = Self { workspaces: Vec::new(), keys: Vec::new(), library: plan.library.clone() };
        for workspace in &plan.workspaces {
            accounts.workspaces.push(Workspace::open(workspace.clone(), now));
        }
        for (index, key) in plan.keys.iter().enumerate() {
            let workspace = accounts.workspace_of(key, index, now);
            let name = key.name.clone().unwrap_or_else(|| format!("key {}", index + 1));
            accounts.keys.push(Key { plan: key.clone(), name, workspace, used: 0 });
        }
        accounts
    }

    fn workspace_of(&mut self, key: &KeyPlan, index: usize, now: UnixMs) -> usize {
        let name = key.workspace.clone().unwrap_or_else(|| format!("workspace-of-key-{}", index + 1));
        if let Some(existing) = self.workspaces.iter().position(|workspace| workspace.plan.name == name) {
            return existing;
        }
        let plan = match key.tier.as_deref() {
            None => WorkspacePlan::new(&name, key.credits),
            Some("payg") => WorkspacePlan::pay_as_you_go(&name, key.credits, ShownLimit::Zero),
            Some(tier) => WorkspacePlan::of_tier(&name, key.credits, tier),
        };
        self.workspaces.push(Workspace::open(plan, now));
        self.workspaces.len() - 1
    }

    /// Resets the credits of every workspace whose period has ended.
    pub(super) fn refresh(&mut self, now: UnixMs) {
        for (index, workspace) in self.workspaces.iter_mut().enumerate() {
            if now < workspace.reset {
                continue;
            }
            workspace.reset = next_reset(workspace.reset, workspace.plan.period, now);
            workspace.used = 0;
            for key in self.keys.iter_mut().filter(|key| key.workspace == index) {
                key.used = 0;
            }
        }
    }

    /// Checks whether the key has the permission.
    pub(super) fn permit(&self, key: usize, permission: &'static str) -> Result<(), Shape> {
        match self.keys.get(key).map(|key| &key.plan.permissions) {
            None => Err(Shape::InvalidKey),
            Some(Some(allowed)) if !allowed.iter().any(|name| name == permission) => {
                Err(Shape::MissingPermissions(permission.into()))
            }
            Some(_) => Ok(()),
        }
    }

    /// Checks whether the bill of the key's workspace allows operations.
    pub(super) fn billing(&self, key: usize) -> Result<(), Shape> {
        match self.workspace(key).map(|workspace| workspace.plan.billing) {
            Some(Billing::Active) | None => Ok(()),
            Some(Billing::PastDue) => Err(Shape::PaymentIssue),
            Some(Billing::FreeDisabled) => Err(Shape::UnusualActivity),
        }
    }

    /// Checks credits, cap and concurrency in the provider's order, and then charges the operation.
    /// A refused operation changes nothing.
    pub(super) fn admit(&mut self, key: usize, cost: u64, limits: CreditLimits) -> Result<Admitted, Refused> {
        let facts = self.check_credits(key, cost, limits)?;
        if !self.has_free_slot(key) {
            return Err(Refused { shape: Shape::Concurrency, facts: Box::new(facts) });
        }
        let used_before = self.workspace(key).map_or(0, |workspace| workspace.used);
        self.charge(key, cost);
        let Some(owner) = self.keys.get(key) else { return Err(Shape::InvalidKey.into()) };
        let Some(workspace) = self.workspaces.get_mut(owner.workspace) else {
            return Err(Shape::InvalidKey.into());
        };
        workspace.running = workspace.running.saturating_add(1);
        workspace.running_max = workspace.running_max.max(workspace.running);
        Ok(Admitted {
            cost,
            used_before,
            running: workspace.running,
            running_max: workspace.plan.concurrency_max,
            workspace: owner.workspace,
        })
    }

    /// Whether the concurrency limit of the key's workspace allows another operation.
    pub(super) fn has_free_slot(&self, key: usize) -> bool {
        let is_saturated = |workspace: &Workspace| {
            workspace.plan.concurrency_max.is_some_and(|max| workspace.running >= max)
        };
        !self.workspace(key).is_some_and(is_saturated)
    }

    /// Checks credits and cap, and then charges the continuation of an admitted operation. A
    /// refusal changes nothing.
    pub(super) fn spend(&mut self, key: usize, cost: u64, limits: CreditLimits) -> Result<(), Refused> {
        self.check_credits(key, cost, limits)?;
        self.charge(key, cost);
        Ok(())
    }

    /// Checks whether credits and cap suffice, and returns the numbers for the response.
    pub(super) fn check_credits(
        &self,
        key: usize,
        cost: u64,
        limits: CreditLimits,
    ) -> Result<Facts, Refused> {
        let facts = self.facts(key, cost);
        let Some(owner) = self.keys.get(key) else { return Err(Shape::InvalidKey.into()) };
        let is_capped = limits == CreditLimits::KeyAndWorkspace && owner.plan.cap.is_some();
        let shape = if cost > facts.remaining {
            Shape::Quota
        } else if is_capped && cost > facts.cap_remaining {
            Shape::KeyCap
        } else {
            return Ok(facts);
        };
        Err(Refused { shape, facts: Box::new(facts) })
    }

    fn charge(&mut self, key: usize, cost: u64) {
        let Some(owner) = self.keys.get_mut(key) else { return };
        owner.used = owner.used.saturating_add(cost);
        if let Some(workspace) = self.workspaces.get_mut(owner.workspace) {
            workspace.used = workspace.used.saturating_add(cost);
        }
    }

    /// Ends an admitted operation.
    pub(super) fn finish(&mut self, workspace: usize) {
        if let Some(workspace) = self.workspaces.get_mut(workspace) {
            workspace.running = workspace.running.saturating_sub(1);
        }
    }

    /// The numbers for the refusal of a request with this cost.
    pub(super) fn facts(&self, key: usize, needed: u64) -> Facts {
        let Some(owner) = self.keys.get(key) else { return Facts { needed, ..Facts::default() } };
        let Some(workspace) = self.workspaces.get(owner.workspace) else {
            return Facts { needed, ..Facts::default() };
        };
        let cap = owner.plan.cap.unwrap_or(workspace.plan.credits);
        Facts {
            needed,
            limit: workspace.plan.credits,
            remaining: workspace.remaining(),
            key_name: owner.name.clone(),
            cap,
            cap_remaining: cap.saturating_sub(owner.used),
            concurrency_max: workspace.plan.concurrency_max.unwrap_or(workspace.running),
            ..Facts::default()
        }
    }

    /// The key that pays for a conversation with an agent: the caller's key if the agent is in its
    /// workspace, else a key of the agent's workspace.
    pub(super) fn agent_payer(&self, agent: &str, key: Option<usize>) -> Result<usize, Refused> {
        let plan_of = |workspace: &Workspace| {
            workspace.plan.agents.iter().find(|existing| existing.id == agent).map(|agent| agent.is_public)
        };
        let agent_workspace = self
            .workspaces
            .iter()
            .enumerate()
            .find_map(|(index, workspace)| Some((index, plan_of(workspace)?)));
        let own = key.and_then(|key| self.keys.get(key)).map(|key| key.workspace);
        let payer = match (agent_workspace, key) {
            (None, Some(key)) => Some(key),
            (None, None) => (!self.keys.is_empty()).then_some(0),
            (Some((workspace, _)), Some(key)) if own == Some(workspace) => Some(key),
            (Some((workspace, true)), _) => self.keys.iter().position(|key| key.workspace == workspace),
            (Some((_, false)), Some(_)) => None,
            (Some((_, false)), None) => return Err(Shape::NeedsAuthorization.into()),
        };
        payer.ok_or_else(|| Refused::with_subject(Shape::AgentNotFound, agent))
    }

    pub(super) fn workspace(&self, key: usize) -> Option<&Workspace> {
        self.workspaces.get(self.keys.get(key)?.workspace)
    }

    pub(super) fn workspace_mut(&mut self, key: usize) -> Option<&mut Workspace> {
        self.workspaces.get_mut(self.keys.get(key)?.workspace)
    }
}

impl Workspace {
    fn open(plan: WorkspacePlan, now: UnixMs) -> Self {
        let used = plan.used;
        let reset = plan.reset.unwrap_or_else(|| match plan.shown_limit {
            ShownLimit::Credits => first_of_next_month(now),
            ShownLimit::Zero | ShownLimit::Absent => UnixMs(u64::MAX),
        });
        Self {
            plan,
            used,
            reset,
            running: 0,
            running_max: 0,
            professional: Vec::new(),
            voice_edits: 0,
            history: History(VecDeque::new()),
            conversations: Conversations::default(),
            resources: Resources::default(),
        }
    }

    pub(super) fn remaining(&self) -> u64 {
        self.plan.credits.saturating_sub(self.used)
    }
}

/// The end of the first period after `now`, if a period ended at `past`.
fn next_reset(past: UnixMs, period: Option<Duration>, now: UnixMs) -> UnixMs {
    match period.map(|period| u64::try_from(period.as_millis()).unwrap_or(u64::MAX)) {
        None | Some(0) => first_of_next_month(now),
        Some(ms) => {
            let periods = (now.0.saturating_sub(past.0) / ms).saturating_add(1);
            UnixMs(past.0.saturating_add(periods.saturating_mul(ms)))
        }
    }
}

/// Midnight UTC of the first of next month; the maximum time if there is no such day.
fn first_of_next_month(now: UnixMs) -> UnixMs {
    let utc = jiff::tz::Offset::UTC;
    let moment = i64::try_from(now.0).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    moment
        .and_then(|moment| utc.to_datetime(moment).date().first_of_month().checked_add(1.month()).ok())
        .and_then(|first| utc.to_timestamp(first.at(0, 0, 0, 0)).ok())
        .and_then(|midnight| u64::try_from(midnight.as_millisecond()).ok())
        .map_or(UnixMs(u64::MAX), UnixMs)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-24T09:00:00Z.
    const NOW: UnixMs = UnixMs(1_795_510_800_000);
    /// 2026-12-01T00:00:00Z.
    const DECEMBER: UnixMs = UnixMs(1_796_083_200_000);

    fn open(keys: &str) -> Accounts {
        Accounts::open(&Plan::parse(keys).unwrap(), NOW)
    }

    fn shape(result: Result<Admitted, Refused>) -> Result<u64, Shape> {
        result.map(|admitted| admitted.cost).map_err(|refused| refused.shape)
    }

    #[test]
    fn the_last_credit_can_be_spent_and_no_more() {
        let mut accounts = open("a=10");
        assert_eq!(shape(accounts.admit(0, 11, CreditLimits::KeyAndWorkspace)), Err(Shape::Quota));
        assert_eq!(shape(accounts.admit(0, 10, CreditLimits::KeyAndWorkspace)), Ok(10));
        assert_eq!(shape(accounts.admit(0, 1, CreditLimits::KeyAndWorkspace)), Err(Shape::Quota));
        assert_eq!(shape(accounts.admit(0, 0, CreditLimits::KeyAndWorkspace)), Ok(0));
    }

    #[test]
    fn keys_of_a_workspace_share_its_credits() {
        let mut accounts = open("a=10@w b=10@w c=10");
        assert_eq!(shape(accounts.admit(0, 6, CreditLimits::KeyAndWorkspace)), Ok(6));
        let refused = accounts.admit(1, 5, CreditLimits::KeyAndWorkspace).unwrap_err();
        assert_eq!((refused.facts.limit, refused.facts.remaining, refused.facts.needed), (10, 4, 5));
        assert_eq!(shape(accounts.admit(2, 10, CreditLimits::KeyAndWorkspace)), Ok(10));
    }

    #[test]
    fn a_cap_binds_its_key_only() {
        let mut accounts = open("a=10@w:cap=3 b=10@w");
        assert_eq!(shape(accounts.admit(0, 3, CreditLimits::KeyAndWorkspace)), Ok(3));
        let refused = accounts.admit(0, 1, CreditLimits::KeyAndWorkspace).unwrap_err();
        assert_eq!(refused.shape, Shape::KeyCap);
        assert_eq!((refused.facts.key_name.as_str(), refused.facts.cap), ("key 1", 3));
        assert_eq!(shape(accounts.admit(1, 7, CreditLimits::KeyAndWorkspace)), Ok(7));
    }

    #[test]
    fn a_workspace_that_is_busy_refuses_and_charges_nothing() {
        let plan = Plan {
            keys: vec![KeyPlan { workspace: Some("w".into()), ..KeyPlan::new("a", 0) }],
            workspaces: vec![WorkspacePlan { concurrency_max: Some(1), ..WorkspacePlan::new("w", 10) }],
            ..Plan::of([])
        };
        let mut accounts = Accounts::open(&plan, NOW);
        let first = accounts.admit(0, 1, CreditLimits::KeyAndWorkspace).unwrap();
        assert_eq!((first.running, first.running_max), (1, Some(1)));
        assert_eq!(shape(accounts.admit(0, 1, CreditLimits::KeyAndWorkspace)), Err(Shape::Concurrency));
        assert_eq!(accounts.workspaces[0].used, 1);
        accounts.finish(first.workspace);
        assert_eq!(shape(accounts.admit(0, 1, CreditLimits::KeyAndWorkspace)), Ok(1));
    }

    #[test]
    fn credits_and_caps_are_restored_when_the_reset_date_passes() {
        let mut accounts = open("a=10:cap=10");
        assert_eq!(accounts.workspaces[0].reset, DECEMBER);
        accounts.admit(0, 10, CreditLimits::KeyAndWorkspace).unwrap();
        accounts.refresh(UnixMs(DECEMBER.0 - 1));
        assert_eq!(shape(accounts.admit(0, 10, CreditLimits::KeyAndWorkspace)), Err(Shape::Quota));
        accounts.refresh(DECEMBER);
        assert_eq!(shape(accounts.admit(0, 10, CreditLimits::KeyAndWorkspace)), Ok(10));
        assert_eq!(accounts.workspaces[0].reset.rfc3339(), "2027-01-01T00:00:00.000Z");
    }

    #[test]
    fn a_period_repeats_from_its_own_beginning() {
        let period = Some(Duration::from_millis(100));
        assert_eq!(next_reset(UnixMs(1_000), period, UnixMs(1_000)), UnixMs(1_100));
        assert_eq!(next_reset(UnixMs(1_000), period, UnixMs(1_099)), UnixMs(1_100));
        assert_eq!(next_reset(UnixMs(1_000), period, UnixMs(1_250)), UnixMs(1_300));
        assert_eq!(next_reset(UnixMs(1_000), Some(Duration::ZERO), NOW), DECEMBER);
        assert_eq!(first_of_next_month(UnixMs(u64::MAX)), UnixMs(u64::MAX));
    }
}
