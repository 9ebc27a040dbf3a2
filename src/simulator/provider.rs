//! Holds the state of the simulated provider: accounts, tokens, scripted faults and the ledger, protected by one lock
//! that is never held across an await. Each change of the ledger notifies tests that wait for it, and callers of agents
//! that wait for a slot.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::Method;
use tokio::sync::watch;

use crate::clock;

use super::accounts::{Accounts, Admission, CreditLimits, Refusal};
use super::fault::Fault;
use super::ledger::{KeyEntry, Ledger, RequestSummary, SocketSummary, Totals, WorkspaceEntry};
use super::plan::Plan;
use super::script::Script;
use super::tokens::UnusedTokens;

/// Maximum number of requests in the ledger.
const MAX_REQUESTS: usize = 1_000;
/// Maximum number of violations in the ledger.
const MAX_VIOLATIONS: usize = 1_000;

/// The state that all connections share. It is cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Provider {
    pub(super) plan: Arc<Plan>,
    state: Arc<Mutex<ProviderState>>,
    change_sender: watch::Sender<()>,
}

/// The state that the lock protects.
#[derive(Debug)]
pub(super) struct ProviderState {
    pub(super) accounts: Accounts,
    pub(super) tokens: UnusedTokens,
    /// The index of each key in the plan.
    key_indices: HashMap<String, usize>,
    scripts: Vec<Script>,
    /// Scripted faults of routes that apply to requests with any key or none.
    script_of_all_requests: Script,
    /// The ledger's entries of the keys. Their remaining credits are filled in by a snapshot.
    key_entries: Vec<KeyEntry>,
    totals: Totals,
    violations: Vec<String>,
    /// The recorded requests with their numbers. A session finds its record by its number.
    requests: VecDeque<(u64, RequestSummary)>,
}

/// The key that a request contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PresentedKey {
    Absent,
    /// A key that is not in the plan.
    Unknown,
    /// A key that is valid only in another region.
    OtherRegion,
    /// The key with the contained index in the plan.
    Known(usize),
}

/// The requests that a fault applies to.
#[derive(Clone, Copy, Debug)]
pub(super) enum FaultTarget<'a> {
    /// Requests with the contained key.
    Key(&'a str),
    /// All requests, including requests without a key.
    AllRequests,
}

impl Provider {
    pub(super) fn new(mut plan: Plan) -> Self {
        // Every request contains the empty text, so each would be a violation.
        plan.forbidden_texts.retain(|text| !text.is_empty());
        let accounts = Accounts::new(&plan, clock::now());
        let key_entries = accounts.keys.iter().map(|key| KeyEntry {
            key: key.plan.key.clone(),
            workspace: accounts.workspaces[key.workspace_index].plan.name.clone(),
            ..KeyEntry::default()
        });
        let state = ProviderState {
            key_indices: plan.keys.iter().zip(0..).map(|(key, index)| (key.key.clone(), index)).collect(),
            scripts: plan.keys.iter().map(|key| Script::new(key.faults.clone())).collect(),
            script_of_all_requests: Script::default(),
            key_entries: key_entries.collect(),
            accounts,
            tokens: UnusedTokens::default(),
            totals: Totals::default(),
            violations: Vec::new(),
            requests: VecDeque::new(),
        };
        Self {
            plan: Arc::new(plan),
            state: Arc::new(Mutex::new(state)),
            change_sender: watch::Sender::new(()),
        }
    }

    /// Locks the state and resets the credits of all ended periods. Other tasks see no change of the caller until it
    /// drops the returned guard.
    pub(super) fn state(&self) -> MutexGuard<'_, ProviderState> {
        // A panic while the lock is held may leave wrong numbers, but the state stays usable.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.accounts.reset_ended_periods(clock::now());
        state
    }

    fn notify_of_change(&self) {
        self.change_sender.send_replace(());
    }

    /// Returns a receiver that is notified of each change of the ledger.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.change_sender.subscribe()
    }

    pub(super) fn find_key(&self, key: &str) -> PresentedKey {
        if self.plan.other_region_keys.iter().any(|other_region_key| other_region_key == key) {
            return PresentedKey::OtherRegion;
        }
        self.state().key_indices.get(key).map_or(PresentedKey::Unknown, |index| PresentedKey::Known(*index))
    }

    /// Updates the script of a key, or the script of all requests. Returns false if the plan has no
    /// such key.
    pub(super) fn update_script(&self, target: FaultTarget<'_>, update: impl FnOnce(&mut Script)) -> bool {
        let mut state = self.state();
        let script = match target {
            FaultTarget::AllRequests => Some(&mut state.script_of_all_requests),
            FaultTarget::Key(key) => {
                let index = state.key_indices.get(key).copied();
                index.and_then(|index| state.scripts.get_mut(index))
            }
        };
        script.map(update).is_some()
    }

    /// Takes the fault of a request from the scripts. A fault of the key on the route takes precedence over a fault of
    /// all requests on the route. Both take precedence over a fault of the key on all routes.
    pub(super) fn take_fault(&self, presented_key: PresentedKey, method: &Method, path: &str) -> Fault {
        let mut state = self.state();
        let ProviderState { scripts, script_of_all_requests, .. } = &mut *state;
        let mut key_script = presented_key.index().and_then(|index| scripts.get_mut(index));
        let route_fault = key_script.as_mut().and_then(|script| script.take_for_route(method, path));
        let route_fault = route_fault.or_else(|| script_of_all_requests.take_for_route(method, path));
        route_fault
            .or_else(|| key_script.and_then(|script| script.take_for_all_routes()))
            .unwrap_or(Fault::Pass)
    }

    pub(super) fn record_violation(&self, violation: String) {
        let mut state = self.state();
        state.totals.violations += 1;
        if state.violations.len() < MAX_VIOLATIONS {
            state.violations.push(violation);
        }
        drop(state);
        self.notify_of_change();
    }

    /// Charges an operation and starts it. Dropping the slot ends the operation.
    pub(super) fn admit(&self, key_index: usize, cost: u64) -> Result<(Admission, ConcurrencySlot), Refusal> {
        let mut state = self.state();
        let admission = state.accounts.admit(key_index, cost, CreditLimits::KeyAndWorkspace)?;
        state.record_charge(key_index, cost);
        drop(state);
        self.notify_of_change();
        Ok((
            admission,
            ConcurrencySlot { provider: self.clone(), workspace_index: admission.workspace_index },
        ))
    }

    /// Counts a received request. The request is in progress until the returned value is dropped.
    pub(super) fn record_request(
        &self,
        presented_key: PresentedKey,
        summary: RequestSummary,
    ) -> PendingRequest {
        let mut state = self.state();
        state.totals.requests += 1;
        state.totals.in_flight += 1;
        let number = state.totals.requests;
        if let Some(entry) = state.key_entry_mut(presented_key) {
            entry.requests += 1;
        }
        drop(state);
        self.notify_of_change();
        PendingRequest { provider: self.clone(), presented_key, number, summary }
    }

    /// Takes a snapshot of the ledger.
    pub(super) fn ledger(&self) -> Ledger {
        let state = self.state();
        let keys = state.accounts.keys.iter().zip(&state.key_entries).map(|(key, entry)| KeyEntry {
            remaining: state.accounts.workspaces[key.workspace_index].remaining_credits(),
            ..entry.clone()
        });
        let workspaces = state.accounts.workspaces.iter().map(|workspace| WorkspaceEntry {
            name: workspace.plan.name.clone(),
            limit: workspace.plan.credits,
            used: workspace.used,
            running: workspace.running,
            peak_running: workspace.peak_running,
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

impl PresentedKey {
    /// Returns the index of a key of the plan.
    pub(super) fn index(self) -> Option<usize> {
        match self {
            PresentedKey::Known(index) => Some(index),
            PresentedKey::Absent | PresentedKey::Unknown | PresentedKey::OtherRegion => None,
        }
    }
}

impl ProviderState {
    fn record_charge(&mut self, key_index: usize, cost: u64) {
        self.totals.charged += cost;
        if let Some(entry) = self.key_entries.get_mut(key_index) {
            entry.charged += cost;
        }
    }

    fn recorded_request(&mut self, number: u64) -> Option<&mut RequestSummary> {
        // Recent requests are searched first, because the session is usually among them.
        self.requests.iter_mut().rev().find(|(recorded, _)| *recorded == number).map(|(_, summary)| summary)
    }

    fn key_entry_mut(&mut self, presented_key: PresentedKey) -> Option<&mut KeyEntry> {
        self.key_entries.get_mut(presented_key.index()?)
    }
}

/// A running operation, which ends when this value is dropped.
#[derive(Debug)]
pub(super) struct ConcurrencySlot {
    provider: Provider,
    workspace_index: usize,
}

impl Drop for ConcurrencySlot {
    fn drop(&mut self) {
        self.provider.state().accounts.release_slot(self.workspace_index);
        self.provider.notify_of_change();
    }
}

/// A request that is being processed. Dropping this value records the request, with its status if a
/// response was sent.
#[derive(Debug)]
pub(super) struct PendingRequest {
    provider: Provider,
    presented_key: PresentedKey,
    number: u64,
    pub(super) summary: RequestSummary,
}

impl PendingRequest {
    /// Converts an accepted handshake into a session. Records the handshake.
    pub(super) fn into_session(mut self, socket: SocketSummary) -> Session {
        self.summary.socket = Some(SocketSummary { is_open: true, ..socket });
        let session = Session { provider: self.provider.clone(), number: self.number };
        session.provider.state().totals.sockets_open += 1;
        session
    }
}

/// A WebSocket session, which ends when this value is dropped.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) provider: Provider,
    number: u64,
}

impl Session {
    /// Updates the record of the session.
    pub(super) fn update_summary(&self, update: impl FnOnce(&mut SocketSummary)) {
        let mut state = self.provider.state();
        state.recorded_request(self.number).and_then(|summary| summary.socket.as_mut()).map(update);
        drop(state);
        self.provider.notify_of_change();
    }

    /// Charges an operation and starts it. Dropping the slot ends the operation.
    pub(super) fn admit(
        &self,
        key_index: usize,
        cost: u64,
        limits: CreditLimits,
    ) -> Result<ConcurrencySlot, Refusal> {
        let admission =
            self.charge_with(key_index, cost, |accounts| accounts.admit(key_index, cost, limits))?;
        Ok(ConcurrencySlot { provider: self.provider.clone(), workspace_index: admission.workspace_index })
    }

    /// Charges the continuation of an operation.
    pub(super) fn charge(&self, key_index: usize, cost: u64, limits: CreditLimits) -> Result<(), Refusal> {
        self.charge_with(key_index, cost, |accounts| accounts.charge(key_index, cost, limits))
    }

    /// Charges credits with `charge`, and records them for the key and for the session.
    fn charge_with<T>(
        &self,
        key_index: usize,
        cost: u64,
        charge: impl FnOnce(&mut Accounts) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let mut state = self.provider.state();
        let charged = charge(&mut state.accounts)?;
        state.record_charge(key_index, cost);
        if let Some(summary) = state.recorded_request(self.number) {
            summary.charged += cost;
        }
        drop(state);
        self.provider.notify_of_change();
        Ok(charged)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut state = self.provider.state();
        state.totals.sockets_open = state.totals.sockets_open.saturating_sub(1);
        if let Some(socket) = state.recorded_request(self.number).and_then(|summary| summary.socket.as_mut())
        {
            socket.is_open = false;
        }
        drop(state);
        self.provider.notify_of_change();
    }
}

impl Drop for PendingRequest {
    fn drop(&mut self) {
        let mut state = self.provider.state();
        let summary = std::mem::take(&mut self.summary);
        let status = summary.status;
        let count_outcome = |served: &mut u64, refused: &mut u64, unanswered: &mut u64| match status {
            None => *unanswered += 1,
            Some(..400) => *served += 1,
            Some(400..) => *refused += 1,
        };
        if let Some(entry) = state.key_entry_mut(self.presented_key) {
            count_outcome(&mut entry.served, &mut entry.refused, &mut entry.unanswered);
        }
        let totals = &mut state.totals;
        count_outcome(&mut totals.served, &mut totals.refused, &mut totals.unanswered);
        totals.in_flight = totals.in_flight.saturating_sub(1);
        if state.requests.len() == MAX_REQUESTS {
            state.requests.pop_front();
        }
        state.requests.push_back((self.number, summary));
        drop(state);
        self.provider.notify_of_change();
    }
}
