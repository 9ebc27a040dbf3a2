//! The simulator's state: accounts, scripted faults and the ledger, behind one lock that is never
//! held across an await. Each change notifies waiting tests.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use std::time::Duration;

use http::Method;
use tokio::sync::watch;

use crate::clock;

use super::accounts::{Accounts, Admitted, CreditLimits, Refused};
use super::fault::Fault;
use super::ledger::{KeyEntry, Ledger, RequestSummary, SocketSummary, Totals, WorkspaceEntry};
use super::plan::Plan;
use super::script::Script;
use super::tokens::Tokens;

/// Maximum requests in the ledger.
const MAX_REQUESTS: usize = 1_000;
/// Maximum violations in the ledger.
const MAX_VIOLATIONS: usize = 1_000;

/// The state shared by all connections. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct World {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    forbidden: Vec<String>,
    elsewhere: Vec<String>,
    region: String,
    socket_second: Duration,
    changed: watch::Sender<()>,
}

/// The mutable state.
#[derive(Debug)]
pub(super) struct State {
    pub(super) accounts: Accounts,
    pub(super) tokens: Tokens,
    index: HashMap<String, usize>,
    scripts: Vec<Script>,
    /// Scripted faults of routes that apply to requests with any key or none.
    every_key: Script,
    counts: Vec<Counts>,
    totals: Totals,
    violations: Vec<String>,
    /// The recorded requests with their numbers, by which a session finds its record.
    requests: VecDeque<(u64, RequestSummary)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    requests: u64,
    served: u64,
    refused: u64,
    unanswered: u64,
    charged: u64,
}

/// The key of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presented {
    /// No key.
    Nothing,
    /// A key that is not in the plan.
    Unknown,
    /// A key of another region.
    OtherRegion,
    /// The key at this index of the plan.
    Known(usize),
}

/// The requests that a fault applies to.
#[derive(Clone, Copy, Debug)]
pub(super) enum FaultTarget<'a> {
    /// Requests with this key.
    Key(&'a str),
    /// All requests, including those without a key.
    EveryKey,
}

impl World {
    pub(super) fn new(plan: &Plan) -> Self {
        let index = plan.keys.iter().enumerate().map(|(index, key)| (key.key.clone(), index)).collect();
        let scripts = plan.keys.iter().map(|key| Script::of(key.faults.clone()));
        let state = State {
            accounts: Accounts::open(plan, clock::now()),
            tokens: Tokens::default(),
            index,
            scripts: scripts.collect(),
            every_key: Script::default(),
            counts: vec![Counts::default(); plan.keys.len()],
            totals: Totals::default(),
            violations: Vec::new(),
            requests: VecDeque::new(),
        };
        let forbidden = plan.forbidden.iter().filter(|text| !text.is_empty()).cloned().collect();
        let inner = Inner {
            state: Mutex::new(state),
            forbidden,
            elsewhere: plan.elsewhere.clone(),
            region: plan.region.clone(),
            socket_second: plan.socket_second,
            changed: watch::Sender::new(()),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Locks the state, after resetting the credits of all ended periods. Other tasks see all
    /// changes under one guard together.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held may leave wrong numbers, but the state stays usable.
        let mut state = self.inner.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.accounts.refresh(clock::now());
        state
    }

    /// Texts that must not be received.
    pub(super) fn forbidden(&self) -> &[String] {
        &self.inner.forbidden
    }

    /// The duration of a second of a WebSocket's inactivity timeout.
    pub(super) fn socket_second(&self) -> Duration {
        self.inner.socket_second
    }

    fn notify(&self) {
        self.inner.changed.send_replace(());
    }

    /// A receiver that is notified of each change of the ledger.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.inner.changed.subscribe()
    }

    /// Finds a key in the plan.
    pub(super) fn find(&self, key: &str) -> Presented {
        if self.inner.elsewhere.iter().any(|elsewhere| elsewhere == key) {
            return Presented::OtherRegion;
        }
        self.state().index.get(key).map_or(Presented::Unknown, |index| Presented::Known(*index))
    }

    /// The `x-region` of the responses.
    pub(super) fn region(&self) -> &str {
        &self.inner.region
    }

    /// Changes the script of a key, or the script of all requests. Returns false if the plan has no
    /// such key.
    pub(super) fn with_script(&self, target: FaultTarget<'_>, change: impl FnOnce(&mut Script)) -> bool {
        let mut state = self.state();
        let script = match target {
            FaultTarget::EveryKey => Some(&mut state.every_key),
            FaultTarget::Key(key) => {
                let index = state.index.get(key).copied();
                index.and_then(|index| state.scripts.get_mut(index))
            }
        };
        script.map(change).is_some()
    }

    /// Takes the fault of a request in this order: a fault of the key on the route, a fault of all
    /// requests on the route, a general fault of the key.
    pub(super) fn take_fault(&self, presented: Presented, method: &Method, path: &str) -> Fault {
        let mut state = self.state();
        let State { scripts, every_key, .. } = &mut *state;
        let mut own = match presented {
            Presented::Nothing | Presented::Unknown | Presented::OtherRegion => None,
            Presented::Known(index) => scripts.get_mut(index),
        };
        let route_fault = own.as_mut().and_then(|script| script.take_for_route(method, path));
        let route_fault = route_fault.or_else(|| every_key.take_for_route(method, path));
        route_fault.or_else(|| own.and_then(|script| script.take())).unwrap_or(Fault::Pass)
    }

    pub(super) fn record_violation(&self, violation: String) {
        let mut state = self.state();
        state.totals.violations += 1;
        if state.violations.len() < MAX_VIOLATIONS {
            state.violations.push(violation);
        }
        drop(state);
        self.notify();
    }

    /// Charges an operation and starts it. Dropping the slot ends the operation.
    pub(super) fn admit(&self, key: usize, cost: u64) -> Result<(Admitted, Slot), Refused> {
        let mut state = self.state();
        let admitted = state.accounts.admit(key, cost, CreditLimits::KeyAndWorkspace)?;
        state.record_charge(key, cost);
        drop(state);
        self.notify();
        Ok((admitted, Slot { world: self.clone(), workspace: admitted.workspace }))
    }

    /// Counts a received request.
    pub(super) fn request_received(&self, presented: Presented, summary: RequestSummary) -> PendingRequest {
        let mut state = self.state();
        state.totals.requests += 1;
        state.totals.in_flight += 1;
        let number = state.totals.requests;
        if let Some(counts) = state.counts_of(presented) {
            counts.requests += 1;
        }
        drop(state);
        self.notify();
        PendingRequest { world: self.clone(), presented, number, summary }
    }

    pub(super) fn ledger(&self) -> Ledger {
        let state = self.state();
        let keys = state.accounts.keys.iter().zip(&state.counts).map(|(key, counts)| {
            let workspace = state.accounts.workspaces.get(key.workspace);
            KeyEntry {
                key: key.plan.key.clone(),
                workspace: workspace.map(|workspace| workspace.plan.name.clone()).unwrap_or_default(),
                requests: counts.requests,
                served: counts.served,
                refused: counts.refused,
                unanswered: counts.unanswered,
                charged: counts.charged,
                remaining: workspace.map_or(0, |workspace| workspace.remaining()),
            }
        });
        let workspaces = state.accounts.workspaces.iter().map(|workspace| WorkspaceEntry {
            name: workspace.plan.name.clone(),
            limit: workspace.plan.credits,
            used: workspace.used,
            running: workspace.running,
            running_max: workspace.running_max,
        });
        Ledger {
            keys: keys.collect(),
            workspaces: workspaces.collect(),
            totals: state.totals.clone(),
            violations: state.violations.clone(),
            requests: state.requests.iter().map(|(_, summary)| summary.clone()).collect(),
        }
    }
}

impl State {
    fn record_charge(&mut self, key: usize, cost: u64) {
        self.totals.charged += cost;
        if let Some(counts) = self.counts.get_mut(key) {
            counts.charged += cost;
        }
    }

    fn request(&mut self, number: u64) -> Option<&mut RequestSummary> {
        // Recent requests are searched first, because the session is usually among them.
        self.requests.iter_mut().rev().find(|(own, _)| *own == number).map(|(_, summary)| summary)
    }

    fn counts_of(&mut self, presented: Presented) -> Option<&mut Counts> {
        match presented {
            Presented::Nothing | Presented::Unknown | Presented::OtherRegion => None,
            Presented::Known(index) => self.counts.get_mut(index),
        }
    }
}

/// A running operation, which ends when this value is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    world: World,
    workspace: usize,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.world.state().accounts.finish(self.workspace);
        self.world.notify();
    }
}

/// A request that is being processed. Dropping it records the request: with its status if a
/// response was sent, else without one.
#[derive(Debug)]
pub(super) struct PendingRequest {
    world: World,
    presented: Presented,
    number: u64,
    pub(super) summary: RequestSummary,
}

impl PendingRequest {
    /// Converts an accepted handshake to a session, and records it.
    pub(super) fn into_session(mut self, socket: SocketSummary) -> Session {
        self.summary.socket = Some(SocketSummary { is_open: true, ..socket });
        let session = Session { world: self.world.clone(), number: self.number };
        session.world.state().totals.sockets_open += 1;
        session
    }
}

/// A WebSocket session, which ends when this value is dropped.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) world: World,
    number: u64,
}

impl Session {
    /// Updates the record of the session.
    pub(super) fn update_summary(&self, change: impl FnOnce(&mut SocketSummary)) {
        let mut state = self.world.state();
        state.request(self.number).and_then(|summary| summary.socket.as_mut()).map(change);
        drop(state);
        self.world.notify();
    }

    /// Charges an operation and starts it. Dropping the slot ends the operation.
    pub(super) fn begin(&self, key: usize, cost: u64, limits: CreditLimits) -> Result<Slot, Refused> {
        let workspace = self.charge(key, cost, |accounts| {
            accounts.admit(key, cost, limits).map(|admitted| admitted.workspace)
        })?;
        Ok(Slot { world: self.world.clone(), workspace })
    }

    /// Charges the continuation of an operation.
    pub(super) fn spend(&self, key: usize, cost: u64, limits: CreditLimits) -> Result<(), Refused> {
        self.charge(key, cost, |accounts| accounts.spend(key, cost, limits))
    }

    fn charge<T>(
        &self,
        key: usize,
        cost: u64,
        pay: impl FnOnce(&mut Accounts) -> Result<T, Refused>,
    ) -> Result<T, Refused> {
        let mut state = self.world.state();
        let paid = pay(&mut state.accounts)?;
        state.record_charge(key, cost);
        if let Some(summary) = state.request(self.number) {
            summary.charged += cost;
        }
        drop(state);
        self.world.notify();
        Ok(paid)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut state = self.world.state();
        state.totals.sockets_open = state.totals.sockets_open.saturating_sub(1);
        if let Some(socket) = state.request(self.number).and_then(|summary| summary.socket.as_mut()) {
            socket.is_open = false;
        }
        drop(state);
        self.world.notify();
    }
}

impl Drop for PendingRequest {
    fn drop(&mut self) {
        let mut state = self.world.state();
        let summary = std::mem::take(&mut self.summary);
        let status = summary.status;
        let count = |served: &mut u64, refused: &mut u64, unanswered: &mut u64| match status {
            None => *unanswered += 1,
            Some(..400) => *served += 1,
            Some(400..) => *refused += 1,
        };
        if let Some(counts) = state.counts_of(self.presented) {
            count(&mut counts.served, &mut counts.refused, &mut counts.unanswered);
        }
        let totals = &mut state.totals;
        count(&mut totals.served, &mut totals.refused, &mut totals.unanswered);
        totals.in_flight = totals.in_flight.saturating_sub(1);
        if state.requests.len() == MAX_REQUESTS {
            state.requests.pop_front();
        }
        state.requests.push_back((self.number, summary));
        drop(state);
        self.world.notify();
    }
}
