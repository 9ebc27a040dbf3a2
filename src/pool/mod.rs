//! The keys: an immutable [`Roster`] of workspaces and keys in an `ArcSwap`, their state in
//! atomics, and leases that release on drop.
//!
//! No lock is taken on the way of a request. A request loads the roster once; choosing reads
//! atomics, reserving counts up, and a [`Lease`] counts down when it is dropped.

mod cells;
mod lease;
mod roster;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::policy::budget::Quota;
use crate::policy::classify::Verdict;
use crate::policy::select::{Candidate, Strategy, Unavailable, select};
use crate::policy::standing::{Change, Park, ParkReason, Standing};
use crate::policy::units::UnixMs;
use crate::secret::Fingerprint;

pub use lease::Lease;
pub use roster::{Key, KeyEntry, Roster, Workspace};

/// A change and the key it is about.
pub type Transition = crate::policy::standing::Transition<Arc<Key>>;

/// How the pool behaves.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How keys are chosen.
    pub strategy: Strategy,
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
    /// How long a refused key rests before it is tried again.
    pub invalid_cooldown: Duration,
    /// How long the provider's figures may lag behind what was spent.
    pub quota_lag: Duration,
}

#[cfg(test)]
impl Settings {
    /// For tests of others, in which nothing ever comes back by itself.
    pub(crate) const STILL: Self = Self {
        strategy: Strategy::FillFirst,
        near_limit_ratio: 0.8,
        rate_limited_cooldown: Duration::from_secs(3_600),
        concurrency_cooldown: Duration::from_secs(3_600),
        exhausted_cooldown: Duration::from_secs(3_600),
        billing_cooldown: Duration::from_secs(3_600),
        invalid_cooldown: Duration::from_secs(3_600),
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
    },
    /// The key is good and may not ask.
    Unreadable,
    /// The key is refused as such.
    Invalid,
}

/// What was known of a key when the program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remembered {
    /// Whose.
    pub fingerprint: Fingerprint,
    /// The quota of its workspace.
    pub quota: Quota,
    /// Its own park.
    pub park: Option<Park>,
    /// The park of its workspace.
    pub workspace_park: Option<Park>,
}

/// A key as it stands at a moment, for those who report.
#[derive(Clone, Debug)]
pub struct KeySnapshot {
    /// Which.
    pub key: Arc<Key>,
    /// How it stands.
    pub standing: Standing,
    /// The quota of its workspace.
    pub quota: Quota,
    /// Whether its use has come near the limit.
    pub is_near_limit: bool,
}

/// A lease and the news that came with it.
#[derive(Debug)]
pub struct Reserved {
    /// The key to ask with.
    pub lease: Lease,
    /// What people are told.
    pub news: Vec<Transition>,
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
    /// The key that serves now, by its address, which stays when its position changes; [`NOBODY`]
    /// before the first request.
    in_use: AtomicUsize,
}

const NOBODY: usize = 0;

impl Pool {
    /// A pool of these keys, in this order.
    #[must_use]
    pub fn new(entries: Vec<KeyEntry>, settings: Settings) -> Self {
        Self {
            roster: ArcSwap::from_pointee(Roster::new(entries, settings)),
            in_use: AtomicUsize::new(NOBODY),
        }
    }

    /// The keys as they are now. A request loads them once and keeps to them.
    #[must_use]
    pub fn roster(&self) -> Arc<Roster> {
        self.roster.load_full()
    }

    /// Takes other keys and settings. What is known of a key that stays goes on. A key that goes
    /// gets no new request; requests under way end with the roster they hold.
    pub fn reload(&self, entries: Vec<KeyEntry>, settings: Settings) -> Reloaded {
        let before = self.roster();
        let next = Arc::new(before.following(entries, settings));
        self.roster.store(Arc::clone(&next));
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

    /// Reserves a key of `roster` that is not among the positions in `tried`, out of those that this
    /// request `may_use`: for it, there are no others.
    ///
    /// # Errors
    ///
    /// When no key can serve, with what stands in the way.
    pub fn reserve(
        &self,
        roster: &Arc<Roster>,
        tried: &[usize],
        may_use: impl Fn(&Key) -> bool,
        now: UnixMs,
    ) -> Result<Reserved, Unavailable> {
        let eligible = || roster.keys().iter().enumerate().filter(|(_, key)| may_use(key));
        let candidates: Vec<Candidate> = eligible()
            .map(|(position, key)| Candidate {
                standing: key.standing(now),
                is_tried: tried.contains(&position),
            })
            .collect();
        let chosen = select(roster.settings().strategy, candidates.iter().copied())?;
        let (position, key) = eligible().nth(chosen).ok_or(Unavailable::Tried)?;
        let mut news = news_of(roster, key, now).into_iter().collect::<Vec<_>>();
        // A key that only stands in for this one request is not the one in use.
        let is_passed_over = |(position, key): (usize, &Arc<Key>)| {
            (tried.contains(&position) || !may_use(key)) && key.standing(now) == Standing::Usable
        };
        let stands_in = roster.keys().iter().enumerate().any(is_passed_over);
        if !stands_in {
            let address = Arc::as_ptr(key).addr();
            let before = self.in_use.swap(address, Ordering::AcqRel);
            if before != address {
                let rotated_to = (before != NOBODY).then_some(position);
                let change = Change::InUse { quota: key.workspace().quota(now), rotated_to };
                news.push(Transition { key: Arc::clone(key), change });
            }
        }
        Ok(Reserved { lease: Lease::new(Arc::clone(key)), news })
    }

    /// Learns from the provider's judgement of a request with this key.
    pub fn judge(&self, roster: &Roster, key: &Key, verdict: Verdict, now: UnixMs) -> Vec<Transition> {
        let settings = roster.settings();
        let workspace = key.workspace();
        let rest = |reason, span| Park { reason, until: now.plus(span) };
        let until_reset = || Park {
            reason: ParkReason::Exhausted,
            until: workspace.quota(now).resets_at.unwrap_or_else(|| now.plus(settings.exhausted_cooldown)),
        };
        match verdict {
            // The figure that a refusal names is not taken over: requests that are still under way
            // are in it already, and would be counted a second time when they are settled.
            Verdict::WorkspaceQuota(_) => workspace.park(until_reset()),
            Verdict::KeyQuota(_) => key.park(until_reset()),
            Verdict::InvalidKey => key.park(rest(ParkReason::Invalid, settings.invalid_cooldown)),
            Verdict::Billing => workspace.park(rest(ParkReason::Billing, settings.billing_cooldown)),
            Verdict::RateLimited(told) => {
                key.park(rest(ParkReason::RateLimited, told.unwrap_or(settings.rate_limited_cooldown)));
            }
            Verdict::Concurrency { .. } => {
                workspace.park(rest(ParkReason::RateLimited, settings.concurrency_cooldown));
            }
            Verdict::Served
            | Verdict::MissingPermission
            | Verdict::PlanFeature
            | Verdict::Busy
            | Verdict::Unexplained(_)
            | Verdict::NotFound
            | Verdict::RequestError
            | Verdict::ServerError
            | Verdict::Unreadable => return Vec::new(),
        }
        news_of_workspace(roster, workspace, now)
    }

    /// Books what a request has cost.
    pub fn spend(&self, roster: &Roster, key: &Key, credits: u64, now: UnixMs) -> Vec<Transition> {
        if credits == 0 {
            return Vec::new();
        }
        key.workspace().spend(credits, now);
        news_of_workspace(roster, key.workspace(), now)
    }

    /// Learns what the provider told of a key's quota.
    pub fn observe(&self, roster: &Roster, key: &Key, seen: Observation, now: UnixMs) -> Vec<Transition> {
        match seen {
            Observation::Quota { quota, tier } => {
                key.pardon(ParkReason::Invalid);
                key.workspace().observe(quota, tier, now, roster.settings().quota_lag);
            }
            Observation::Unreadable => key.pardon(ParkReason::Invalid),
            Observation::Invalid => {
                key.park(Park {
                    reason: ParkReason::Invalid,
                    until: now.plus(roster.settings().invalid_cooldown),
                });
            }
        }
        news_of_workspace(roster, key.workspace(), now)
    }

    /// Takes up what was known when the program ended. Refused keys are not among it: the
    /// provider is asked anew.
    pub fn restore(&self, remembered: &[Remembered]) {
        for key in self.roster.load().keys() {
            let print = key.api_key().fingerprint();
            if let Some(known) = remembered.iter().find(|known| known.fingerprint == print) {
                key.workspace().restore(known.quota, known.workspace_park);
                if let Some(park) = known.park.filter(|park| park.reason != ParkReason::Invalid) {
                    key.park(park);
                }
            }
        }
    }

    /// Every key as it stands at `now`, in pool order.
    #[must_use]
    pub fn snapshot(&self, now: UnixMs) -> Vec<KeySnapshot> {
        let roster = self.roster.load();
        let snapshot = |key: &Arc<Key>| {
            let quota = key.workspace().quota(now);
            KeySnapshot {
                standing: key.standing(now),
                is_near_limit: quota.is_near_limit(roster.settings().near_limit_ratio),
                quota,
                key: Arc::clone(key),
            }
        };
        roster.keys().iter().map(snapshot).collect()
    }
}

fn news_of_workspace(roster: &Roster, workspace: &Workspace, now: UnixMs) -> Vec<Transition> {
    roster
        .keys()
        .iter()
        .filter(|key| std::ptr::eq(key.workspace(), workspace))
        .filter_map(|key| news_of(roster, key, now))
        .collect()
}

fn news_of(roster: &Roster, key: &Arc<Key>, now: UnixMs) -> Option<Transition> {
    let quota = key.workspace().quota(now);
    let is_near = quota.is_near_limit(roster.settings().near_limit_ratio);
    let change = key.announce(key.standing(now), quota, is_near)?;
    Some(Transition { key: Arc::clone(key), change })
}

#[cfg(test)]
mod tests;
