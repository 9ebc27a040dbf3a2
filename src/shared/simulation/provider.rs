//! Models the provider: counts the credits and the concurrent requests of workspaces, refuses a request that exceeds
//! their limits, and reports a count of credits that is some time old.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::clock;
use crate::policy::quota::Quota;
use crate::policy::units::UnixMs;
use crate::policy::verdict::{Shortfall, Verdict};

/// The plans of workspaces, and the maximum number of concurrent speech requests of each plan.
const PLANS: [(&str, u32); 4] = [("free", 2), ("starter", 3), ("creator", 5), ("scale", 15)];

/// The end of the billing period, after every simulation.
const RESETS_AT: UnixMs = UnixMs(1_900_000_000_000);

/// A workspace at the provider.
#[derive(Debug)]
pub(super) struct ProviderWorkspace {
    /// The credits of the billing period.
    pub(super) limit: u64,
    /// The costs of all ended requests.
    pub(super) spent: u64,
    /// The costs of the running requests.
    pub(super) committed: u64,
    pub(super) running: u32,
    /// The maximum number of concurrent requests.
    pub(super) max: u32,
    /// The plan.
    pub(super) tier: &'static str,
    /// The last time at which the workspace had its maximum of concurrent requests.
    pub(super) full_at: Instant,
    /// The time of each charge and the count after it, because a poll reports an old count.
    history: VecDeque<(Instant, u64)>,
}

impl ProviderWorkspace {
    /// Returns the credits that are left after all ended and running requests.
    pub(super) fn left(&self) -> u64 {
        self.limit - self.spent - self.committed
    }

    /// Records the current time if all concurrent requests are in use.
    fn record_full(&mut self) {
        if self.running >= self.max {
            self.full_at = clock::instant();
        }
    }

    /// Returns the quota that a poll reports at `now`. Its count is `lag` old.
    pub(super) fn report_quota(&mut self, now: Instant, lag: Duration) -> Quota {
        while self.history.get(1).is_some_and(|(at, _)| *at + lag <= now) {
            self.history.pop_front();
        }
        let count = self.history.front().map_or(0, |(_, count)| *count);
        Quota { count, limit: Some(self.limit), resets_at: Some(RESETS_AT), ..Quota::default() }
    }
}

/// The provider with all its workspaces.
#[derive(Debug)]
pub(super) struct Provider {
    pub(super) workspaces: RefCell<Vec<ProviderWorkspace>>,
}

/// A request that the provider serves. Dropping it without [`RunningRequest::charge`] ends it without a charge.
#[derive(Debug)]
pub(super) struct RunningRequest {
    provider: Rc<Provider>,
    workspace: usize,
    cost: u64,
}

impl Provider {
    /// Creates a workspace with a random plan for each of `limits`.
    pub(super) fn new(limits: &[u64], start: Instant, random: impl Fn() -> f64) -> Rc<Self> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the result is an index of PLANS"
        )]
        let plan_at = |random: f64| PLANS[((random * PLANS.len() as f64) as usize).min(PLANS.len() - 1)];
        let workspace = |limit: &u64| {
            let (tier, max) = plan_at(random());
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

    /// Starts a request that will cost `cost`, or returns the refusal of a request with this `estimate`.
    pub(super) fn start_request(
        self: &Rc<Self>,
        workspace: usize,
        cost: u64,
        estimate: u64,
    ) -> Result<RunningRequest, Verdict> {
        let mut workspaces = self.workspaces.borrow_mut();
        let served_workspace = &mut workspaces[workspace];
        if served_workspace.running >= served_workspace.max {
            return Err(Verdict::Concurrency { maximum: Some(served_workspace.max) });
        }
        if served_workspace.left() < cost {
            let (remaining, required) = (Some(served_workspace.left()), Some(estimate));
            return Err(Verdict::WorkspaceQuota(Shortfall { remaining, required, quota: None }));
        }
        served_workspace.running += 1;
        served_workspace.record_full();
        served_workspace.committed += cost;
        Ok(RunningRequest { provider: Rc::clone(self), workspace, cost })
    }
}

impl RunningRequest {
    /// Charges the request, at the end of its response.
    pub(super) fn charge(self, now: Instant) {
        let mut workspaces = self.provider.workspaces.borrow_mut();
        let served_workspace = &mut workspaces[self.workspace];
        served_workspace.spent += self.cost;
        served_workspace.history.push_back((now, served_workspace.spent));
        drop(workspaces);
    }
}

impl Drop for RunningRequest {
    fn drop(&mut self) {
        let mut workspaces = self.provider.workspaces.borrow_mut();
        let served_workspace = &mut workspaces[self.workspace];
        served_workspace.record_full();
        served_workspace.running -= 1;
        served_workspace.committed -= self.cost;
    }
}
