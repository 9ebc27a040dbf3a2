//! Owns the pool of API keys: an immutable [`Roster`] of workspaces and keys in an `ArcSwap`, and their state in
//! atomics. The pool also has the queue of the requests that wait for a key, and leases that release their key on drop.
//! Also reloads the keys, restores the state of the previous run, forecasts when all credits are spent, and returns
//! snapshots of the keys.
//!
//! A request that does not wait takes no lock: it loads the roster once, selection reads atomics, and a reservation is
//! a compare-and-swap. A cancelled request keeps no credits reserved, because dropping its [`Lease`] releases them.

mod candidate;
mod cells;
mod division;
mod key;
mod lease;
mod membership;
mod ownership_index;
mod record;
mod refusal;
mod reserve;
mod restrictions;
mod roster;
mod settings;
mod sync;
mod transitions;
mod wait_queue;
mod workspace;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::{Notify, mpsc};

use crate::elevenlabs::models::Models;
use crate::policy::authority::Authority;
use crate::policy::evidence::Evidence;
use crate::policy::forecast::{Forecast, forecast_remaining};
use crate::policy::key_state::{KeyState, Pause};
use crate::policy::quota::Quota;
use crate::policy::shared_id::{SharedId, SharedKind};
use crate::policy::units::UnixMs;
use crate::secret::Fingerprint;
use sync::{AtomicU64, AtomicUsize};

pub use cells::{CreditShare, CreditUse, RunningCount};
pub use division::{GroupDemand, PoolChange, QueuedDemand, SlotUse};
pub use key::Key;
pub use lease::Lease;
pub use membership::WorkspaceMembership;
pub use ownership_index::{OwnerId, OwnerLookup, OwnershipEntry, OwnershipIndex};
pub use record::{Observation, RefusedAttempt, ServedAttempt};
pub use refusal::{RefusalHistory, RefusalRecord};
pub use reserve::Reserved;
pub use restrictions::{MAX_RESTRICTIONS, Restriction, RestrictionLevel, RestrictionScope, Restrictions};
pub use roster::{KeyEntry, Roster};
pub use settings::Settings;
pub use transitions::Transition;
use transitions::workspace_transitions;
pub use wait_queue::KeyRequest;
use wait_queue::WaitQueue;
pub use workspace::Workspace;

/// The state of a key that the previous run of Keychoir has stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoredKey {
    /// The fingerprint of the key.
    pub fingerprint: Fingerprint,
    /// The quota of the key's workspace.
    pub quota: Quota,
    /// The plan of the key's workspace, if a poll has reported it.
    pub tier: Option<String>,
    /// Refusals of the key itself.
    pub key_evidence: Vec<Evidence>,
    /// Refusals of the key's workspace.
    pub workspace_evidence: Vec<Evidence>,
}

/// The state of a key at one moment, for status pages, metrics and logs.
#[derive(Clone, Debug)]
pub struct KeySnapshot {
    /// The key itself, which the roster also holds.
    pub key: Arc<Key>,
    /// The state: usable, in cooldown, or paused.
    pub state: KeyState,
    /// The state without the pause: usable, or in cooldown.
    pub unpaused_state: KeyState,
    /// The operator's pause, or `None` if the key is not paused.
    pub pause: Option<Arc<Pause>>,
    /// The quota of the key's workspace.
    pub quota: Quota,
    /// Whether the spent credits of the workspace are near its limit.
    pub is_near_limit: bool,
    /// Whether and when the credits run out at the current rate of spending.
    pub forecast: Forecast,
    /// Current refusals of the key itself.
    pub key_evidence: Vec<Evidence>,
    /// Current refusals of the key's workspace.
    pub workspace_evidence: Vec<Evidence>,
}

/// Whether a key may serve a request, regardless of its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eligibility {
    /// The key may not serve: the request belongs to another account, or the client may not use the key.
    No,
    /// The key may serve while it is usable.
    Yes,
    /// The key may serve while it is usable. If no usable key can serve the request, this key may serve it without
    /// credits, because the request costs none.
    EvenExhausted,
}

/// The effect of a reload on the number of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReloadSummary {
    /// Number of keys after the reload.
    pub keys: usize,
    /// Number of keys that the reload added.
    pub added: usize,
    /// Number of keys that the reload removed.
    pub removed: usize,
}

/// The pool of keys: the roster, the wait queue and the restrictions.
#[derive(Debug)]
pub struct Pool {
    roster: ArcSwap<Roster>,
    /// The lock that is held while a new roster is built from the current roster and stored, so that concurrent changes
    /// are not lost.
    roster_update: Mutex<()>,
    models: ArcSwap<Models>,
    queue: WaitQueue,
    /// The memory address of the key in use, or 0 before the first request. It is not a position, because a reload
    /// may change the position of the key.
    key_in_use_address: AtomicUsize,
    /// The turn of the last selected key, as [`RankingInputs`](crate::policy::strategy::RankingInputs) defines it.
    last_turn: AtomicU64,
    restrictions: Restrictions,
    /// Wakes the poller when a poll can confirm or refute a refusal, or when there may be new keys.
    poll_request: Notify,
    /// The queue of changes for the other replicas, if the pool is shared.
    changes: OnceLock<mpsc::Sender<PoolChange>>,
    /// Notified when a request is queued, because this replica may need a larger share.
    demand_increase: Notify,
}

impl Pool {
    /// Creates a pool of `entries`, in this order. No key has a recorded state.
    #[must_use]
    pub fn new(entries: Vec<KeyEntry>, settings: Settings) -> Self {
        Self {
            roster: ArcSwap::from_pointee(Roster::new(entries, settings)),
            roster_update: Mutex::new(()),
            models: ArcSwap::from_pointee(Models::default()),
            queue: WaitQueue::default(),
            key_in_use_address: AtomicUsize::new(0),
            last_turn: AtomicU64::new(0),
            restrictions: Restrictions::default(),
            poll_request: Notify::new(),
            changes: OnceLock::new(),
            demand_increase: Notify::new(),
        }
    }

    /// Returns the current roster. A request uses the same roster until it ends or fails with
    /// [`Unavailable::Outdated`](crate::policy::select::Unavailable::Outdated).
    #[must_use]
    pub fn roster(&self) -> Arc<Roster> {
        self.roster.load_full()
    }

    /// Returns the models of the provider from the last poll. The list is empty before the first poll.
    #[must_use]
    pub fn models(&self) -> Arc<Models> {
        self.models.load_full()
    }

    /// Replaces the models of the provider.
    pub fn record_models(&self, models: Models) {
        self.models.store(Arc::new(models));
    }

    /// Returns the restrictions of plans, workspaces and keys.
    #[must_use]
    pub fn restrictions(&self) -> &Restrictions {
        &self.restrictions
    }

    /// Requests a poll with `key` that can confirm or refute a refusal.
    pub fn request_poll(&self, key: &Key) {
        key.set_poll_requested(true);
        self.poll_request.notify_one();
    }

    /// Requests polls of the keys that were not polled yet.
    pub fn request_first_polls(&self) {
        self.poll_request.notify_one();
    }

    /// Completes when a poll is requested that can confirm or refute a refusal, or that is the first poll of a new
    /// key.
    pub async fn poll_requested(&self) {
        self.poll_request.notified().await;
    }

    /// Forecasts when the credits of all workspaces together run out, at the current rate of spending.
    #[must_use]
    pub fn forecast(&self, now: UnixMs) -> Forecast {
        let roster = self.roster.load();
        let mut counted_workspaces: Vec<&Workspace> = Vec::new();
        let (mut remaining, mut spent_per_day) = (0_u64, 0.0);
        let mut resets_at: Option<UnixMs> = None;
        for workspace in roster.keys().iter().map(|key| key.workspace()) {
            if counted_workspaces.iter().any(|counted| std::ptr::eq(*counted, workspace)) {
                continue;
            }
            counted_workspaces.push(workspace);
            let quota = workspace.quota(now);
            spent_per_day += workspace.spent_per_day(now);
            // A workspace with unlimited or unknown credits makes the sum unknown.
            let Some(spendable) = quota.spendable() else { return Forecast::Unknown };
            remaining = remaining.saturating_add(spendable);
            resets_at = resets_at.into_iter().chain(quota.resets_at).min();
        }
        forecast_remaining(remaining, resets_at, spent_per_day, now)
    }

    /// Returns the number of requests that are currently queued for a key.
    #[must_use]
    pub fn queued_requests(&self) -> usize {
        self.queue.len()
    }

    /// Replaces the keys, their pauses and the settings. Keys that stay configured keep their state. Removed and
    /// paused keys serve no new requests. Requests in flight continue with the roster that they have loaded, and
    /// queued requests select again from the new roster. The caller logs the
    /// [`transitions`](Self::transitions) afterwards.
    pub fn reload(&self, entries: Vec<KeyEntry>, settings: Settings) -> ReloadSummary {
        let _guard = self.roster_update.lock().unwrap_or_else(PoisonError::into_inner);
        let previous_roster = self.roster();
        let entries = previous_roster.with_detected_regions(entries);
        let next = Arc::new(previous_roster.next(entries, settings, previous_roster.reported_ids.clone()));
        self.roster.store(Arc::clone(&next));
        self.restrictions.update_identities(&next);
        self.queue.outdate_all();
        let count_missing = |source: &Roster, target: &Roster| {
            source.keys().iter().filter(|key| target.find(key.api_key().fingerprint()).is_none()).count()
        };
        ReloadSummary {
            keys: next.keys().len(),
            added: count_missing(&next, &previous_roster),
            removed: count_missing(&previous_roster, &next),
        }
    }

    /// Records the workspace identifier that the provider reports for a key. From then on, keys with
    /// the same identifier share their credits. Returns whether the identifier has changed.
    pub fn record_workspace(&self, key: &Key, id: &str) -> bool {
        // Workspace identifiers are unique only within a region of the provider.
        let region = key.authority().map_or("", |region| region.host());
        self.record_workspace_id(
            key,
            SharedId::new(SharedKind::Workspace, &[region.as_bytes(), id.as_bytes()]),
        )
    }

    /// Records the digest of the workspace identifier that the provider reports for a key. Returns whether it has
    /// changed.
    pub fn record_workspace_id(&self, key: &Key, id: SharedId) -> bool {
        let _guard = self.roster_update.lock().unwrap_or_else(PoisonError::into_inner);
        let previous_roster = self.roster();
        let fingerprint = key.api_key().fingerprint();
        if previous_roster.reported_ids.get(&fingerprint) == Some(&id) {
            return false;
        }
        let mut reported_ids = previous_roster.reported_ids.clone();
        reported_ids.insert(fingerprint, id);
        let next = Arc::new(previous_roster.next(
            previous_roster.entries.to_vec(),
            previous_roster.settings,
            reported_ids,
        ));
        self.roster.store(Arc::clone(&next));
        self.restrictions.update_identities(&next);
        true
    }

    /// Records the provider's host for the region of a key. From then on, requests with the key are
    /// sent to that host.
    pub fn record_region(&self, key: &Key, region: &Arc<Authority>) {
        let _guard = self.roster_update.lock().unwrap_or_else(PoisonError::into_inner);
        let previous_roster = self.roster();
        let fingerprint = key.api_key().fingerprint();
        let mut entries = previous_roster.entries.to_vec();
        for entry in entries.iter_mut().filter(|entry| entry.key.fingerprint() == fingerprint) {
            entry.detected_region = Some(Arc::clone(region));
        }
        let next =
            previous_roster.next(entries, previous_roster.settings, previous_roster.reported_ids.clone());
        self.roster.store(Arc::new(next));
        self.queue.outdate_all();
    }

    /// Returns the state changes of all keys that were not returned before, for example changes due to a reload.
    #[must_use]
    pub fn transitions(&self, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster.load();
        let mut evaluated_workspaces: Vec<&Workspace> = Vec::new();
        let mut transitions = Vec::new();
        for workspace in roster.keys().iter().map(|key| key.workspace()) {
            if !evaluated_workspaces.iter().any(|evaluated| std::ptr::eq(*evaluated, workspace)) {
                evaluated_workspaces.push(workspace);
                transitions.extend(workspace_transitions(&roster, workspace, now));
            }
        }
        transitions
    }

    /// Restores the state of the keys from the previous run. Computes the cooldowns again from the evidence, which
    /// the first poll confirms or refutes.
    pub fn restore(&self, restored: &[RestoredKey], now: UnixMs) {
        let roster = self.roster.load();
        for key in roster.keys() {
            let fingerprint = key.api_key().fingerprint();
            if let Some(stored) = restored.iter().find(|stored| stored.fingerprint == fingerprint) {
                key.workspace().restore(stored.quota, now);
                stored.tier.iter().for_each(|tier| key.workspace().restore_tier(tier));
                // If the clock was set back, the time of the evidence may be in the future. It is then set to `now`.
                let not_after_now =
                    |evidence: &Evidence| Evidence { at: evidence.at.min(now), ..evidence.clone() };
                for evidence in &stored.workspace_evidence {
                    key.workspace().evidence_cell.add(not_after_now(evidence));
                }
                for evidence in &stored.key_evidence {
                    key.evidence_cell.add(not_after_now(evidence));
                }
                key.apply_evidence(&roster.settings, now);
                key.workspace().apply_evidence(&roster.settings, now);
            }
        }
    }

    /// Computes the restrictions that follow from stored refusals, oldest first, and restores them.
    pub fn restore_restrictions(&self, records: Vec<RefusalRecord>, now: UnixMs) {
        let roster = self.roster.load();
        let restrictions = records
            .into_iter()
            .filter_map(|record| record.restored(&roster, now).into_restriction(&roster.settings));
        let restrictions: Vec<Restriction> =
            restrictions.filter(|restriction| restriction.until > now).collect();
        if !restrictions.is_empty() {
            self.restrictions.restore(&restrictions);
        }
    }

    /// Returns snapshots of all keys at `now`, in pool order.
    #[must_use]
    pub fn snapshot(&self, now: UnixMs) -> Vec<KeySnapshot> {
        self.snapshot_of(now, |_| true)
    }

    /// Returns snapshots of the keys that `is_selected` selects, in pool order.
    #[must_use]
    pub fn snapshot_of(&self, now: UnixMs, is_selected: impl Fn(&Key) -> bool) -> Vec<KeySnapshot> {
        let roster = self.roster.load();
        let snapshot = |key: &Arc<Key>| {
            let quota = key.workspace().quota(now);
            KeySnapshot {
                state: key.state(now),
                unpaused_state: key.unpaused_state(now),
                pause: key.pause(now),
                is_near_limit: roster.is_near_limit(&quota),
                forecast: key.workspace().forecast(now),
                quota,
                key_evidence: key.evidence(),
                workspace_evidence: key.workspace().evidence(),
                key: Arc::clone(key),
            }
        };
        roster.keys().iter().filter(|key| is_selected(key)).map(snapshot).collect()
    }
}

#[cfg(test)]
#[cfg(not(keychoir_model))]
mod tests;

#[cfg(test)]
#[cfg(not(keychoir_model))]
mod month;

#[cfg(test)]
#[cfg(keychoir_model)]
mod model;
