//! Models the provider: counts the credits and the concurrent requests of workspaces, refuses the requests beyond
//! them, and reports a count that lags behind.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::clock;
use crate::policy::budget::Quota;
use crate::policy::units::UnixMs;
use crate::policy::verdict::{Shortfall, Verdict};

/// The plans of workspaces, with the concurrent speech requests of each.
const PLANS: [(&str, u32); 4] = [("free", 2), ("starter", 3), ("creator", 5), ("scale", 15)];

/// The end of the billing period, after every simulation.
const RESETS_AT: UnixMs = UnixMs(1_900_000_000_000);

/// A workspace at the provider.
#[derive(Debug)]
pub(super) struct ProviderWorkspace {
    pub(super) limit: u64,
    pub(super) spent: u64,
    /// The costs of the running requests.
    pub(super) committed: u64,
    pub(super) running: u32,
    pub(super) max: u32,
    pub(super) tier: &'static str,
    /// The last time at which the workspace had its maximum of concurrent requests.
    pub(super) full_at: Instant,
    /// The count after each charge, because polls lag behind it.
    history: VecDeque<(Instant, u64)>,
}

impl ProviderWorkspace {
    /// Returns the credits that neither ended nor running requests cost.
    pub(super) fn left(&self) -> u64 {
        self.limit - self.spent - self.committed
    }

    fn record_full(&mut self) {
        if self.running >= self.max {
            self.full_at = clock::instant();
        }
    }

    /// Returns the quota that a poll reports at `now`: its count is `lag` old.
    pub(super) fn quota(&mut self, now: Instant, lag: Duration) -> Quota {
        while self.history.get(1).is_some_and(|(at, _)| *at + lag <= now) {
            self.history.pop_front();
        }
        let count = self.history.front().map_or(0, |(_, count)| *count);
        Quota { count, limit: Some(self.limit), resets_at: Some(RESETS_AT), ..Quota::default() }
    }
}

/// All workspaces of the provider.
#[derive(Debug)]
pub(super) struct Provider {
    pub(super) workspaces: RefCell<Vec<ProviderWorkspace>>,
}

/// A request that the provider serves. It ends without a charge when it is dropped.
#[derive(Debug)]
pub(super) struct RunningRequest {
    provider: Rc<Provider>,
    workspace: usize,
    cost: u64,
}

impl Provider {
    pub(super) fn new(limits: &[u64], start: Instant, random: impl Fn() -> f64) -> Rc<Self> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        let plan = |random: f64| PLANS[((random * PLANS.len() as f64) as usize).min(PLANS.len() - 1)];
        let workspace = |limit: &u64| {
            let (tier, max) = plan(random());
            // These credits were spent before the replicas started.
            let spent = limit / 4;
            let history = VecDeque::from([(start, spent)]);
            ProviderWorkspace {
                limit: *limit,
                spent,
                committed: 0,
                running: 0,
                max,
                tier,
                full_at: start,
                history,
            }
        };
        Rc::new(Self { workspaces: RefCell::new(limits.iter().map(workspace).collect()) })
    }

    /// Starts a request, or refuses it.
    pub(super) fn begin(
        self: &Rc<Self>,
        workspace: usize,
        cost: u64,
        estimate: u64,
    ) -> Result<RunningRequest, Verdict> {
        let mut workspaces = self.workspaces.borrow_mut();
        let state = &mut workspaces[workspace];
        if state.running >= state.max {
            return Err(Verdict::Concurrency { maximum: Some(state.max) });
        }
        if state.left() < cost {
            let (remaining, required) = (Some(state.left()), Some(estimate));
            return Err(Verdict::WorkspaceQuota(Shortfall { remaining, required, quota: None }));
        }
        state.running += 1;
        state.record_full();
        state.committed += cost;
        Ok(RunningRequest { provider: Rc::clone(self), workspace, cost })
    }
}

impl RunningRequest {
    /// Charges the request, at the end of its response.
    pub(super) fn charge(self, now: Instant) {
        let mut workspaces = self.provider.workspaces.borrow_mut();
        let state = &mut workspaces[self.workspace];
        state.spent += self.cost;
        state.history.push_back((now, state.spent));
        drop(workspaces);
    }
}

impl Drop for RunningRequest {
    fn drop(&mut self) {
        let mut workspaces = self.provider.workspaces.borrow_mut();
        let state = &mut workspaces[self.workspace];
        state.record_full();
        state.running -= 1;
        state.committed -= self.cost;
    }
}
