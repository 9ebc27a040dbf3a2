//! The keys: an immutable [`Roster`] of workspaces and keys in an `ArcSwap`, their state in
//! atomics, and leases that release on drop.
//!
//! No lock is taken on the way of a request that need not wait. A request loads the roster once;
//! choosing reads atomics, reserving is a compare-and-swap, and a [`Lease`] gives back what it holds
//! when it is dropped.

mod candidate;
mod cells;
mod key;
mod learn;
mod lease;
mod membership;
mod ownership_index;
mod refusal;
mod reserve;
mod restrictions;
mod roster;
mod sync;
mod wait_queue;
mod workspace;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use crate::policy::authority::Authority;
use crate::policy::budget::Quota;
use crate::policy::classify::Verdict;
use crate::policy::evidence::{Cooldowns, Evidence, Source};
use crate::policy::features::RequestFeatures;
use crate::policy::forecast::{Forecast, forecast_of};
use crate::policy::key_state::KeyState;
use crate::policy::models::Models;
use crate::policy::plan::Capabilities;
use crate::policy::strategy::Strategy;
use crate::policy::units::UnixMs;
use crate::secret::Fingerprint;
use cells::NextChange;
use sync::{AtomicU64, AtomicUsize};

pub use key::Key;
pub use learn::{Refused, Served};
pub use lease::Lease;
pub use membership::WorkspaceMembership;
pub use ownership_index::{KnownOwner, LearnedOwner, OwnerId, OwnershipIndex};
pub use refusal::{Earlier, RefusalRecord};
pub use reserve::Reserved;
pub use restrictions::{Holder, RESTRICTIONS_MAX, Restraint, Restriction, Restrictions};
pub use roster::{KeyEntry, Roster};
pub use wait_queue::KeyRequest;
use wait_queue::WaitQueue;
pub use workspace::Workspace;

/// A change and the key it is about.
pub type Transition = crate::policy::key_state::Transition<Arc<Key>>;

/// How the pool behaves.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How keys are chosen.
    pub strategy: &'static dyn Strategy,
    /// How long a request waits for a key that is only busy; 0 does not wait.
    pub wait_max: Duration,
    /// How many may wait at once.
    pub waiting_max: usize,
    /// The share of a limit from which on a key is near it.
    pub near_limit_ratio: f64,
    /// How long a key rests after a rate limit that names no time.
    pub rate_limited_cooldown: Duration,
    /// How long a workspace rests after too many requests at once.
    pub concurrency_cooldown: Duration,
    /// How long an empty workspace rests when its reset date is unknown.
    pub exhausted_cooldown: Duration,
    /// How long a locked workspace rests before it is tried again.
    pub billing_cooldown: Duration,
    /// How long a key rests that is refused for the first time, until that is confirmed.
    pub invalid_confirm: Duration,
    /// How long a refused key rests before it is tried again.
    pub invalid_cooldown: Duration,
    /// How long a key is asked last for what it lacked the permission for.
    pub permission_cooldown: Duration,
    /// How long a workspace, and others of its plan, are asked last for what the plan does not have.
    pub feature_cooldown: Duration,
    /// How long a workspace is asked last for an endpoint that refuses it without a known reason.
    pub endpoint_cooldown: Duration,
    /// How long a key or workspace rests after a refusal in words without figures.
    pub unproven_cooldown: Duration,
    /// The longest rest that the provider can name in `Retry-After`.
    pub max_retry_after: Duration,
    /// How long after a refusal that proves little one request may try the key again, when no other can
    /// serve.
    pub probe_after: Duration,
    /// How long the provider's figures may lag behind what was spent.
    pub quota_lag: Duration,
}

impl Settings {
    /// How long evidence holds.
    #[must_use]
    pub fn cooldowns(&self) -> Cooldowns {
        Cooldowns {
            unproven: self.unproven_cooldown,
            rate_limited: self.rate_limited_cooldown,
            max_retry_after: self.max_retry_after,
            exhausted: self.exhausted_cooldown,
            billing: self.billing_cooldown,
            invalid_confirm: self.invalid_confirm,
            invalid: self.invalid_cooldown,
            quota_lag: self.quota_lag,
        }
    }
}

#[cfg(test)]
impl Settings {
    /// For tests of others, in which nothing ever comes back by itself.
    pub(crate) const STILL: Self = Self {
        strategy: &crate::policy::strategy::FillFirst,
        wait_max: Duration::ZERO,
        waiting_max: 0,
        near_limit_ratio: 0.8,
        rate_limited_cooldown: Duration::from_secs(3_600),
        concurrency_cooldown: Duration::from_secs(3_600),
        exhausted_cooldown: Duration::from_secs(3_600),
        billing_cooldown: Duration::from_secs(3_600),
        invalid_confirm: Duration::from_secs(3_600),
        invalid_cooldown: Duration::from_secs(3_600),
        permission_cooldown: Duration::from_secs(3_600),
        feature_cooldown: Duration::from_secs(3_600),
        endpoint_cooldown: Duration::from_secs(3_600),
        unproven_cooldown: Duration::from_secs(3_600),
        max_retry_after: Duration::from_secs(3_600),
        probe_after: Duration::from_secs(3_600),
        quota_lag: Duration::from_secs(3_600),
    };
}

/// What the provider told when it was asked for a key's quota.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// The figures of its workspace.
    Quota {
        /// Count, limit, overage and reset date.
        quota: Quota,
        /// The plan's name, as the provider writes it.
        tier: Option<String>,
        /// Whether it says that the bill is paid, or that it is not.
        is_paid: Option<bool>,
        /// What the plan can do.
        capabilities: Capabilities,
    },
    /// The key is good and may not ask.
    Unreadable,
    /// The key is refused as such.
    Invalid {
        /// As unknown, or as one of another region.
        verdict: Verdict,
        /// In which words.
        source: Source,
    },
}

/// What was known of a key when the program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoredKey {
    /// Whose.
    pub fingerprint: Fingerprint,
    /// The quota of its workspace.
    pub quota: Quota,
    /// The plan of its workspace, when it was known.
    pub tier: Option<String>,
    /// What was refused with it as a key.
    pub of_key: Vec<Evidence>,
    /// What was refused with it as its workspace's.
    pub of_workspace: Vec<Evidence>,
}

/// A key as it stands at a moment, for those who report.
#[derive(Clone, Debug)]
pub struct KeySnapshot {
    /// Which.
    pub key: Arc<Key>,
    /// How it stands.
    pub standing: KeyState,
    /// The quota of its workspace.
    pub quota: Quota,
    /// Whether its use has come near the limit.
    pub is_near_limit: bool,
    /// What will become of it at this rate.
    pub forecast: Forecast,
    /// What was refused with it as a key and still matters.
    pub of_key: Vec<Evidence>,
    /// What was refused with it as its workspace's and still matters.
    pub of_workspace: Vec<Evidence>,
}

/// Whether a key may serve a request, apart from how it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eligibility {
    /// It may not: the request is bound to another account.
    No,
    /// It may.
    Yes,
    /// It may, also without credits, when no other can: what is asked for costs none.
    EvenExhausted,
}

/// What a reload has made of the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reloaded {
    /// How many there are now.
    pub keys: usize,
    /// How many of them are new.
    pub added: usize,
    /// How many are gone.
    pub removed: usize,
}

/// The pool of keys.
#[derive(Debug)]
pub struct Pool {
    roster: ArcSwap<Roster>,
    /// Held by whoever replaces the roster.
    replacing: Mutex<()>,
    models: ArcSwap<Models>,
    line: WaitQueue,
    /// The key that serves now, by its address, which stays when its position changes; 0 before the
    /// first request.
    in_use: AtomicUsize,
    /// The turn of the key that was chosen last.
    turn: AtomicU64,
    /// What plans, workspaces and keys were refused for that others may be able to do.
    restrictions: Restrictions,
    /// The provider should be polled with a key: a poll can decide over what was refused.
    polls: Notify,
}

impl Pool {
    /// A pool of these keys, in this order.
    #[must_use]
    pub fn new(entries: Vec<KeyEntry>, settings: Settings) -> Self {
        Self {
            roster: ArcSwap::from_pointee(Roster::new(entries, settings)),
            replacing: Mutex::new(()),
            models: ArcSwap::from_pointee(Models::default()),
            line: WaitQueue::default(),
            in_use: AtomicUsize::new(0),
            turn: AtomicU64::new(0),
            restrictions: Restrictions::default(),
            polls: Notify::new(),
        }
    }

    /// The keys as they are now. A request loads them once and keeps to them.
    #[must_use]
    pub fn roster(&self) -> Arc<Roster> {
        self.roster.load_full()
    }

    /// What is known of the provider's models.
    #[must_use]
    pub fn models(&self) -> Arc<Models> {
        self.models.load_full()
    }

    /// Learns what the provider says of its models.
    pub fn learn_models(&self, models: Models) {
        self.models.store(Arc::new(models));
    }

    /// What plans, workspaces and keys were refused for that others may be able to do.
    #[must_use]
    pub fn restrictions(&self) -> &Restrictions {
        &self.restrictions
    }

    /// The provider should be polled with `key`: that can decide over a refusal.
    pub fn want_poll(&self, key: &Key) {
        key.want_poll(true);
        self.polls.notify_one();
    }

    /// Returns when the provider should be polled with a key, because that can decide over a refusal.
    pub async fn poll_wanted(&self) {
        self.polls.notified().await;
    }

    /// Forgets what kept requests with these features from `key`, which has served one.
    pub fn refute_restrictions(&self, features: &RequestFeatures, key: &Key) -> bool {
        self.restrictions.refute(features, key)
    }

    /// What will become of all credits, at the rate they are spent at `now`.
    #[must_use]
    pub fn forecast(&self, now: UnixMs) -> Forecast {
        let roster = self.roster.load();
        let mut seen: Vec<&Workspace> = Vec::new();
        let (mut left, mut per_day) = (0_u64, 0.0);
        let mut resets_at: Option<UnixMs> = None;
        for workspace in roster.keys().iter().map(|key| key.workspace()) {
            if seen.iter().any(|known| std::ptr::eq(*known, workspace)) {
                continue;
            }
            seen.push(workspace);
            let quota = workspace.quota(now);
            per_day += workspace.spent_per_day(now);
            // One that has no end, or does not tell, makes the rest no forecast.
            let Some(spendable) = quota.spendable() else { return Forecast::Unknown };
            left = left.saturating_add(spendable);
            resets_at = match (resets_at, quota.resets_at) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (one, other) => one.or(other),
            };
        }
        forecast_of(left, resets_at, per_day, now)
    }

    /// Requests that wait for a key now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.line.len()
    }

    /// Takes other keys and settings. What is known of a key that stays goes on. A key that goes
    /// gets no new request; requests under way end with the roster they hold.
    pub fn reload(&self, entries: Vec<KeyEntry>, settings: Settings) -> Reloaded {
        let _replacing = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.roster();
        let entries = before.with_found_regions(entries);
        let next = Arc::new(before.following(entries, settings, before.told().clone()));
        self.roster.store(Arc::clone(&next));
        self.restrictions.follow(&next);
        self.line.outdate();
        let has =
            |roster: &Roster, print| roster.keys().iter().any(|key| key.api_key().fingerprint() == print);
        let missing_in = |one: &Roster, other: &Roster| {
            one.keys().iter().filter(|key| !has(other, key.api_key().fingerprint())).count()
        };
        Reloaded {
            keys: next.keys().len(),
            added: missing_in(&next, &before),
            removed: missing_in(&before, &next),
        }
    }

    /// Learns to which workspace of the provider a key belongs. Keys of one workspace share its
    /// credits from then on. Returns whether that is news.
    pub fn learn_workspace(&self, key: &Key, id: &str) -> bool {
        let _replacing = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.roster();
        let print = key.api_key().fingerprint();
        // Regions are kept apart: what one calls a workspace says nothing in another.
        let id = key.authority().map_or_else(|| id.to_owned(), |region| format!("{}/{id}", region.host()));
        if before.told().get(&print).is_some_and(|known| **known == id) {
            return false;
        }
        let mut told = before.told().clone();
        told.insert(print, id.as_str().into());
        let next = Arc::new(before.following(before.entries().to_vec(), *before.settings(), told));
        self.roster.store(Arc::clone(&next));
        self.restrictions.follow(&next);
        true
    }

    /// Learns at which host of the provider a key works: its own region's. Requests with it go there from
    /// then on.
    pub fn learn_region(&self, key: &Key, region: &Arc<Authority>) {
        let _replacing = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.roster();
        let print = key.api_key().fingerprint();
        let mut entries = before.entries().to_vec();
        for entry in entries.iter_mut().filter(|entry| entry.key.fingerprint() == print) {
            entry.found_region = Some(Arc::clone(region));
        }
        let next = before.following(entries, *before.settings(), before.told().clone());
        self.roster.store(Arc::new(next));
        self.line.outdate();
    }

    /// Takes up what was known when the program ended. What it means is computed anew, and the first poll
    /// decides over what a poll can decide.
    pub fn restore(&self, remembered: &[RestoredKey], now: UnixMs) {
        let roster = self.roster.load();
        for key in roster.keys() {
            let print = key.api_key().fingerprint();
            if let Some(known) = remembered.iter().find(|known| known.fingerprint == print) {
                key.workspace().restore(known.quota, now);
                known.tier.iter().for_each(|tier| key.workspace().restore_tier(tier));
                // A clock that was set back must not make it younger than it is.
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

    /// Takes up the refusals that restrictions are computed from, the oldest first.
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

    /// Every key as it stands at `now`, in pool order.
    #[must_use]
    pub fn snapshot(&self, now: UnixMs) -> Vec<KeySnapshot> {
        self.snapshot_of(now, |_| true)
    }

    /// The same of some keys.
    #[must_use]
    pub fn snapshot_of(&self, now: UnixMs, is_wanted: impl Fn(&Key) -> bool) -> Vec<KeySnapshot> {
        let roster = self.roster.load();
        let snapshot = |key: &Arc<Key>| {
            let quota = key.workspace().quota(now);
            KeySnapshot {
                standing: key.state(now),
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

/// What has changed of a workspace's keys since it was last told.
fn news_of_workspace(roster: &Roster, workspace: &Workspace, now: UnixMs) -> Vec<Transition> {
    let before = workspace.quiet().begin();
    let quota = workspace.quota(now);
    let mut until = workspace.next_change(&quota, now);
    let mut news = Vec::new();
    for key in roster.keys().iter().filter(|key| std::ptr::eq(key.workspace(), workspace)) {
        news.extend(news_of(roster, key, now));
        until = [until, key.next_change(now)].into_iter().flatten().min();
    }
    workspace.quiet().keep(before, outlook(roster, &quota), until.unwrap_or(UnixMs(u64::MAX)));
    news
}

/// The same after a charge, which seldom changes anything but the count.
fn news_of_charge(roster: &Roster, workspace: &Workspace, now: UnixMs) -> Vec<Transition> {
    let is_quiet = workspace.quiet().holds(outlook(roster, &workspace.quota(now)), now);
    if is_quiet { Vec::new() } else { news_of_workspace(roster, workspace, now) }
}

fn outlook(roster: &Roster, quota: &Quota) -> NextChange {
    NextChange {
        generation: roster.generation(),
        is_spent: quota.is_spent(),
        is_near: roster.is_near_limit(quota),
    }
}

fn news_of(roster: &Roster, key: &Arc<Key>, now: UnixMs) -> Option<Transition> {
    let quota = key.workspace().quota(now);
    let is_near = roster.is_near_limit(&quota);
    let change = key.announce(key.state(now), quota, is_near)?;
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
