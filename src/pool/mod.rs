//! The pool of API keys: an immutable [`Roster`] of workspaces and keys behind an `ArcSwap`, key state in
//! atomics, and leases that release their key on drop.
//!
//! A request that need not wait takes no lock: it loads the roster once, selection reads atomics, and
//! reserving is a compare-and-swap.
//! A [`Lease`] returns its reservation when it is dropped, so that a cancelled request cannot leak one.

mod candidate;
mod cells;
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
mod wait_queue;
mod workspace;

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use crate::elevenlabs::features::RequestFeatures;
use crate::elevenlabs::models::Models;
use crate::elevenlabs::plan::Capabilities;
use crate::policy::authority::Authority;
use crate::policy::budget::Quota;
use crate::policy::evidence::{Evidence, RefusalSource};
use crate::policy::forecast::{Forecast, forecast_of};
use crate::policy::key_state::KeyState;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::secret::Fingerprint;
use cells::NextChange;
use sync::{AtomicU64, AtomicUsize};

pub use key::Key;
pub use lease::Lease;
pub use membership::WorkspaceMembership;
pub use ownership_index::{KnownOwner, LearnedOwner, OwnerId, OwnershipIndex};
pub use record::{Refused, Served};
pub use refusal::{Earlier, RefusalRecord};
pub use reserve::Reserved;
pub use restrictions::{Holder, RESTRICTIONS_MAX, Restraint, Restriction, Restrictions};
pub use roster::{KeyEntry, Roster};
pub use settings::Settings;
pub use wait_queue::KeyRequest;
use wait_queue::WaitQueue;
pub use workspace::Workspace;

/// A state change and its key.
pub type Transition = crate::policy::key_state::Transition<Arc<Key>>;

/// The result of polling the provider for a key's quota.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// The figures of the key's workspace.
    Quota {
        /// Count, limit, overage and reset date.
        quota: Quota,
        /// The plan's name, as the provider writes it.
        tier: Option<String>,
        /// Whether the latest invoice is paid; `None` when the provider does not report it.
        is_paid: Option<bool>,
        /// The features and limits of the plan.
        capabilities: Capabilities,
    },
    /// The key is valid, but lacks the permission to read its quota.
    Unreadable,
    /// The provider refused the key itself.
    Invalid {
        /// Either an unknown key or a key of another region.
        verdict: Verdict,
        /// The refusal that the poll received.
        source: RefusalSource,
    },
}

/// The state of a key that was stored when the previous run of the program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoredKey {
    /// The fingerprint of the key.
    pub fingerprint: Fingerprint,
    /// The quota of its workspace.
    pub quota: Quota,
    /// The plan of its workspace, when it was known.
    pub tier: Option<String>,
    /// Evidence about the key itself.
    pub of_key: Vec<Evidence>,
    /// Evidence about its workspace.
    pub of_workspace: Vec<Evidence>,
}

/// The state of a key at one moment, for status pages, metrics and logs.
#[derive(Clone, Debug)]
pub struct KeySnapshot {
    /// The key, shared with the roster.
    pub key: Arc<Key>,
    /// Whether it is usable, or in which cooldown.
    pub state: KeyState,
    /// The quota of its workspace.
    pub quota: Quota,
    /// Whether the workspace's use is near its limit.
    pub is_near_limit: bool,
    /// When the credits run out at the current rate.
    pub forecast: Forecast,
    /// Evidence about the key itself that still matters.
    pub of_key: Vec<Evidence>,
    /// Evidence about its workspace that still matters.
    pub of_workspace: Vec<Evidence>,
}

/// Whether a key may serve a request, apart from its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eligibility {
    /// It may not: the request belongs to another account.
    No,
    /// It may serve while it is usable.
    Yes,
    /// It may serve even without credits when no other key can: the request costs none.
    EvenExhausted,
}

/// How a reload has changed the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reloaded {
    /// Number of keys after the reload.
    pub keys: usize,
    /// Number of keys that the reload added.
    pub added: usize,
    /// Number of keys that the reload removed.
    pub removed: usize,
}

/// The pool of keys: roster, wait queue and restrictions.
#[derive(Debug)]
pub struct Pool {
    roster: ArcSwap<Roster>,
    /// Serializes the tasks that replace the roster.
    replacing: Mutex<()>,
    models: ArcSwap<Models>,
    queue: WaitQueue,
    /// The address of the key that serves now, which stays the same when its position changes; 0 before
    /// the first request.
    in_use: AtomicUsize,
    /// The turn of the key that was selected last.
    turn: AtomicU64,
    /// Restrictions of plans, workspaces and keys; see [`Restrictions`].
    restrictions: Restrictions,
    /// Wakes the poller: a poll with some key can decide about a refusal.
    polls: Notify,
}

impl Pool {
    /// A pool of the keys `entries`, in this order.
    #[must_use]
    pub fn new(entries: Vec<KeyEntry>, settings: Settings) -> Self {
        Self {
            roster: ArcSwap::from_pointee(Roster::new(entries, settings)),
            replacing: Mutex::new(()),
            models: ArcSwap::from_pointee(Models::default()),
            queue: WaitQueue::default(),
            in_use: AtomicUsize::new(0),
            turn: AtomicU64::new(0),
            restrictions: Restrictions::default(),
            polls: Notify::new(),
        }
    }

    /// The current roster. A request loads it once and uses it until its end.
    #[must_use]
    pub fn roster(&self) -> Arc<Roster> {
        self.roster.load_full()
    }

    /// The provider's models, as last polled.
    #[must_use]
    pub fn models(&self) -> Arc<Models> {
        self.models.load_full()
    }

    /// Stores the polled models of the provider.
    pub fn record_models(&self, models: Models) {
        self.models.store(Arc::new(models));
    }

    /// The restrictions of plans, workspaces and keys.
    #[must_use]
    pub fn restrictions(&self) -> &Restrictions {
        &self.restrictions
    }

    /// Requests a poll with `key`, because it can decide about a refusal.
    pub fn want_poll(&self, key: &Key) {
        key.want_poll(true);
        self.polls.notify_one();
    }

    /// Returns when a poll with a key was requested, because it can decide about a refusal.
    pub async fn poll_wanted(&self) {
        self.polls.notified().await;
    }

    /// Removes the restrictions that kept requests with these features from `key`, which has served one.
    /// Returns whether there were any.
    pub fn refute_restrictions(&self, features: &RequestFeatures, key: &Key) -> bool {
        self.restrictions.refute(features, key)
    }

    /// The forecast for the credits of all workspaces together, at the rate they are spent at `now`.
    #[must_use]
    pub fn forecast(&self, now: UnixMs) -> Forecast {
        let roster = self.roster.load();
        let mut counted: Vec<&Workspace> = Vec::new();
        let (mut left, mut per_day) = (0_u64, 0.0);
        let mut resets_at: Option<UnixMs> = None;
        for workspace in roster.keys().iter().map(|key| key.workspace()) {
            if counted.iter().any(|known| std::ptr::eq(*known, workspace)) {
                continue;
            }
            counted.push(workspace);
            let quota = workspace.quota(now);
            per_day += workspace.spent_per_day(now);
            // A workspace with unlimited or unknown credits makes the sum unknown.
            let Some(spendable) = quota.spendable() else { return Forecast::Unknown };
            left = left.saturating_add(spendable);
            resets_at = match (resets_at, quota.resets_at) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (one, other) => one.or(other),
            };
        }
        forecast_of(left, resets_at, per_day, now)
    }

    /// Number of requests that are queued for a key now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Replaces keys and settings. A key that stays keeps its state. A key that is removed serves no new
    /// request; requests in flight end with the roster they loaded.
    pub fn reload(&self, entries: Vec<KeyEntry>, settings: Settings) -> Reloaded {
        let _replacing = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.roster();
        let entries = before.with_found_regions(entries);
        let next = Arc::new(before.following(entries, settings, before.reported_ids().clone()));
        self.roster.store(Arc::clone(&next));
        self.restrictions.follow(&next);
        self.queue.outdate();
        let has = |roster: &Roster, fingerprint| {
            roster.keys().iter().any(|key| key.api_key().fingerprint() == fingerprint)
        };
        let missing_in = |one: &Roster, other: &Roster| {
            one.keys().iter().filter(|key| !has(other, key.api_key().fingerprint())).count()
        };
        Reloaded {
            keys: next.keys().len(),
            added: missing_in(&next, &before),
            removed: missing_in(&before, &next),
        }
    }

    /// Records to which workspace of the provider a key belongs. Keys of one workspace share its credits
    /// from then on. Returns whether the workspace was unknown or another one before.
    pub fn record_workspace(&self, key: &Key, id: &str) -> bool {
        let _replacing = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.roster();
        let fingerprint = key.api_key().fingerprint();
        // Workspace identifiers are unique only within a region of the provider.
        let id = key.authority().map_or_else(|| id.to_owned(), |region| format!("{}/{id}", region.host()));
        if before.reported_ids().get(&fingerprint).is_some_and(|known| **known == id) {
            return false;
        }
        let mut reported_ids = before.reported_ids().clone();
        reported_ids.insert(fingerprint, id.as_str().into());
        let next = Arc::new(before.following(before.entries().to_vec(), *before.settings(), reported_ids));
        self.roster.store(Arc::clone(&next));
        self.restrictions.follow(&next);
        true
    }

    /// Records at which host of the provider a key works: the host of its region. Requests with the key
    /// are sent there from then on.
    pub fn record_region(&self, key: &Key, region: &Arc<Authority>) {
        let _replacing = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.roster();
        let fingerprint = key.api_key().fingerprint();
        let mut entries = before.entries().to_vec();
        for entry in entries.iter_mut().filter(|entry| entry.key.fingerprint() == fingerprint) {
            entry.found_region = Some(Arc::clone(region));
        }
        let next = before.following(entries, *before.settings(), before.reported_ids().clone());
        self.roster.store(Arc::new(next));
        self.queue.outdate();
    }

    /// Restores the key state of the previous run. Cooldowns are computed anew from the evidence, and the
    /// first poll decides what a poll can decide.
    pub fn restore(&self, restored: &[RestoredKey], now: UnixMs) {
        let roster = self.roster.load();
        for key in roster.keys() {
            let fingerprint = key.api_key().fingerprint();
            if let Some(known) = restored.iter().find(|known| known.fingerprint == fingerprint) {
                key.workspace().restore(known.quota, now);
                known.tier.iter().for_each(|tier| key.workspace().restore_tier(tier));
                // Evidence from the future, after a clock was set back, counts as recorded now.
                let aged = |evidence: &Evidence| Evidence { at: evidence.at.min(now), ..evidence.clone() };
                for evidence in &known.of_workspace {
                    key.workspace().evidence_cell().add(aged(evidence));
                }
                for evidence in &known.of_key {
                    key.evidence_cell().add(aged(evidence));
                }
                key.weigh(roster.settings(), now);
                key.workspace().weigh(roster.settings(), now);
            }
        }
    }

    /// Restores the refusals that restrictions are computed from, the oldest first.
    pub fn restore_restrictions(&self, records: Vec<RefusalRecord>, now: UnixMs) {
        let roster = self.roster.load();
        let restriction = |record: RefusalRecord| {
            let restriction = Self::restriction(record.restored(&roster, now), roster.settings());
            restriction.filter(|restriction| restriction.until > now)
        };
        let restrictions: Vec<Restriction> = records.into_iter().filter_map(restriction).collect();
        if !restrictions.is_empty() {
            self.restrictions.restore(&restrictions);
        }
    }

    /// Snapshots of all keys at `now`, in pool order.
    #[must_use]
    pub fn snapshot(&self, now: UnixMs) -> Vec<KeySnapshot> {
        self.snapshot_of(now, |_| true)
    }

    /// Snapshots of the keys that `is_wanted` selects, in pool order.
    #[must_use]
    pub fn snapshot_of(&self, now: UnixMs, is_wanted: impl Fn(&Key) -> bool) -> Vec<KeySnapshot> {
        let roster = self.roster.load();
        let snapshot = |key: &Arc<Key>| {
            let quota = key.workspace().quota(now);
            KeySnapshot {
                state: key.state(now),
                is_near_limit: roster.is_near_limit(&quota),
                forecast: key.workspace().forecast(now),
                quota,
                of_key: key.evidence(),
                of_workspace: key.workspace().evidence(),
                key: Arc::clone(key),
            }
        };
        roster.keys().iter().filter(|key| is_wanted(key)).map(snapshot).collect()
    }
}

/// The state changes of a workspace's keys since they were last reported.
fn news_of_workspace(roster: &Roster, workspace: &Workspace, now: UnixMs) -> Vec<Transition> {
    let before = workspace.state_change_cache().begin();
    let quota = workspace.quota(now);
    let mut until = workspace.next_change(&quota, now);
    let mut transitions = Vec::new();
    for key in roster.keys().iter().filter(|key| std::ptr::eq(key.workspace(), workspace)) {
        transitions.extend(transitions_of(roster, key, now));
        until = [until, key.next_change(now)].into_iter().flatten().min();
    }
    workspace.state_change_cache().keep(
        before,
        evaluation_inputs(roster, &quota),
        until.unwrap_or(UnixMs(u64::MAX)),
    );
    transitions
}

/// The same after a charge, which seldom changes anything but the count of spent credits.
fn news_of_charge(roster: &Roster, workspace: &Workspace, now: UnixMs) -> Vec<Transition> {
    let is_unchanged =
        workspace.state_change_cache().holds(evaluation_inputs(roster, &workspace.quota(now)), now);
    if is_unchanged { Vec::new() } else { news_of_workspace(roster, workspace, now) }
}

fn evaluation_inputs(roster: &Roster, quota: &Quota) -> NextChange {
    NextChange {
        generation: roster.generation(),
        is_spent: quota.is_spent(),
        is_near: roster.is_near_limit(quota),
    }
}

fn transitions_of(roster: &Roster, key: &Arc<Key>, now: UnixMs) -> Option<Transition> {
    let quota = key.workspace().quota(now);
    let is_near = roster.is_near_limit(&quota);
    let change = key.report_change(key.state(now), quota, is_near)?;
    Some(Transition { key: Arc::clone(key), change })
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
