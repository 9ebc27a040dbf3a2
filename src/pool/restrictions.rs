//! Restrictions of plans, workspaces and keys: the features, permissions and endpoints that the
//! provider has refused to them and may allow to others.
//!
//! A restriction never makes a key unusable. It decides which keys are tried first and which last.
//! Requests read an immutable table, which is usually empty; a refusal replaces it.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::key::Key;
use super::ownership_index::OwnerId;
use super::refusal::{Earlier, RefusalRecord};
use super::roster::Roster;
use super::sync::{AtomicU64, Ordering};
use crate::elevenlabs::features::{Feature, Limit, RequestFeatures};
use crate::policy::evidence::RefusalSource;
use crate::policy::units::UnixMs;
use crate::secret::Fingerprint;

/// Maximum number of restrictions. A client that is refused for many different voices evicts the
/// oldest ones, and each eviction costs one additional attempt.
pub const RESTRICTIONS_MAX: usize = 1_024;

/// The scope of a restriction.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Holder {
    /// All workspaces with a plan of this name.
    Plan(Arc<str>),
    /// One workspace.
    Workspace(OwnerId),
    /// One key.
    Key(Fingerprint),
}

/// The degree to which a restriction keeps a request from a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Restraint {
    /// The plan was refused in another workspace, or is known to lack the feature, or the refusal may
    /// have been about the request: the key is tried after unrestricted keys.
    Inferred,
    /// The key itself was refused, longer ago than all other refused keys. It is tried only when no
    /// other key can serve, and only as the first attempt. A key that has recovered is thus found
    /// after at most as many requests as there are keys.
    RefusedLongest,
    /// The key itself was refused. It is tried after the one refused longest ago, and only as the
    /// first attempt.
    Refused,
    /// The key is not tried before this time, which the provider has named or a rate limit implies.
    Until(UnixMs),
}

/// The effect of a restriction on the account that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// No effect: the refusal was treated as one about the whole account. When a poll contradicts that and
    /// the same kind of request is refused again, the restriction becomes [`Refused`](Self::Refused).
    Noted,
    /// The refusal may have been about the request, because a second account has refused it with
    /// the same message.
    Suspected,
    /// The refusal is about the account.
    Refused,
    /// The refusal is about the account, and another attempt before its end would make it worse.
    Strict,
}

/// One restriction, with its scope, reason and times.
#[derive(Clone, Debug)]
pub struct Restriction {
    /// Sequence number within this run of the program; a later or changed restriction has a higher one.
    pub number: u64,
    /// The refusal that all other fields are computed from.
    pub record: Arc<RefusalRecord>,
    /// Key, workspace or plan.
    pub holder: Holder,
    /// The restricted feature and, where it matters, the length of the text.
    pub limit: Limit,
    /// The verdict's word, as in logs.
    pub verdict: &'static str,
    /// Time of the first refusal.
    pub since: UnixMs,
    /// Time of the last refusal.
    pub refused_at: UnixMs,
    /// Time at which the restriction expires.
    pub until: UnixMs,
    /// Its effect on the account until then.
    pub force: Force,
    /// Whether other accounts have refused the same request with the same message.
    pub is_agreed: bool,
    /// Route, status and message of the response.
    pub source: Arc<RefusalSource>,
}

type Table = HashMap<Feature, Vec<Restriction>>;

/// All restrictions of a pool.
#[derive(Debug, Default)]
pub struct Restrictions {
    table: ArcSwap<Table>,
    /// The next sequence number.
    next_number: AtomicU64,
    /// Number of changes so far.
    version: AtomicU64,
}

impl Restrictions {
    /// Whether there are no restrictions.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.load().is_empty()
    }

    /// Number of changes so far.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// All restrictions in force at `now`, ordered by number.
    #[must_use]
    pub fn all(&self, now: UnixMs) -> Vec<Restriction> {
        let table = self.table.load();
        let in_force = table.values().flatten().filter(|restriction| restriction.until > now);
        let mut restrictions: Vec<Restriction> = in_force.cloned().collect();
        restrictions.sort_unstable_by_key(|restriction| restriction.number);
        restrictions
    }

    /// Restores the restrictions of the previous run, the oldest first.
    pub(super) fn restore(&self, restrictions: &[Restriction]) {
        let latest = &restrictions[restrictions.len().saturating_sub(RESTRICTIONS_MAX)..];
        self.replace(|table| latest.iter().for_each(|restriction| self.put(table, restriction.clone())));
    }

    /// Updates the restrictions of workspaces that have another identity in `roster`.
    pub(super) fn follow(&self, roster: &Roster) {
        let new_identity = |restriction: &Restriction| {
            let Holder::Workspace(known) = &restriction.holder else { return None };
            restriction.record.workspace_in(roster).filter(|identity| identity != known)
        };
        if !self.table.load().values().flatten().any(|restriction| new_identity(restriction).is_some()) {
            return;
        }
        self.replace(|table| {
            for restriction in std::mem::take(table).into_values().flatten() {
                self.put(
                    table,
                    new_identity(&restriction)
                        .map_or(restriction.clone(), |identity| restriction.with_workspace(identity)),
                );
            }
        });
    }

    /// Inserts a restriction into a table. Of two for the same holder and feature, the later one
    /// continues the history of the earlier one.
    fn put(&self, table: &mut Table, mut restriction: Restriction) {
        let list = table.entry(restriction.limit.feature.clone()).or_default();
        if let Some(at) = list.iter().position(|known| known.holder == restriction.holder) {
            let mut earlier = list.swap_remove(at);
            if earlier.refused_at > restriction.refused_at {
                std::mem::swap(&mut earlier, &mut restriction);
            }
            restriction.continue_history(Earlier::of(&earlier));
        }
        restriction.number = self.next_number.fetch_add(1, Ordering::Relaxed);
        list.push(restriction);
    }

    fn replace(&self, change: impl Fn(&mut Table)) {
        self.table.rcu(|table| {
            let mut table = Table::clone(table);
            change(&mut table);
            table
        });
        // After the change, so that the reader of a version finds at least the changes it counts.
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Records a restriction. Returns whether it is new and has an effect.
    pub(super) fn record(&self, restriction: &Restriction, now: UnixMs) -> bool {
        let is_same = |known: &Restriction| known.holder == restriction.holder;
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        let mut is_new = true;
        self.table.rcu(|table| {
            let mut table = Table::clone(table);
            forget_old(&mut table, now);
            let list = table.entry(restriction.limit.feature.clone()).or_default();
            let before = list.iter().position(is_same).map(|at| list.swap_remove(at));
            let mut kept = Restriction { number, ..restriction.clone() };
            let was_noted = before.as_ref().is_some_and(|known| known.force == Force::Noted);
            let is_other = before.as_ref().is_none_or(|known| known.limit != restriction.limit);
            if let Some(before) = before {
                kept.continue_history(Earlier::of(&before));
            }
            is_new = kept.force != Force::Noted && (is_other || was_noted);
            list.push(kept);
            table
        });
        self.version.fetch_add(1, Ordering::Release);
        is_new
    }

    /// The keys of `roster` that are restricted for a request with these features at `now`: positions,
    /// ascending.
    #[must_use]
    pub fn matching(
        &self,
        features: &RequestFeatures,
        roster: &Roster,
        now: UnixMs,
    ) -> Vec<(usize, Restraint)> {
        let table = self.table.load();
        let needed = features.all().filter_map(|feature| table.get(&feature)).flatten();
        let in_force: Vec<&Restriction> =
            needed.filter(|restriction| restriction.until > now && restriction.is_about(features)).collect();
        if in_force.is_empty() {
            return Vec::new();
        }
        let restraint =
            |key: &Key| in_force.iter().filter_map(|restriction| restriction.restraint(key)).max();
        let all = roster.keys().iter().enumerate();
        let mut restrained: Vec<_> =
            all.filter_map(|(position, key)| Some((position, restraint(key)?))).collect();
        let refused_at = |key: &Key| {
            let own =
                in_force.iter().filter(|restriction| restriction.restraint(key) == Some(Restraint::Refused));
            own.map(|restriction| restriction.refused_at).max()
        };
        let refused = restrained.iter_mut().filter(|(_, restraint)| *restraint == Restraint::Refused);
        let longest =
            refused.min_by_key(|(position, _)| roster.keys().get(*position).map(|key| refused_at(key)));
        if let Some((_, restraint)) = longest {
            *restraint = Restraint::RefusedLongest;
        }
        restrained
    }

    /// Whether several accounts other than that of `key` have refused such a request with this verdict,
    /// and have not served one since.
    pub(super) fn is_refused_by_others(
        &self,
        features: &RequestFeatures,
        key: &Key,
        verdict: &'static str,
        now: UnixMs,
    ) -> bool {
        let own = Holder::Workspace(key.workspace().identity().clone());
        let is_of_another = |restriction: &Restriction| {
            matches!(restriction.holder, Holder::Workspace(_)) && restriction.holder != own
        };
        self.any_about(features, |restriction| {
            restriction.verdict == verdict
                && restriction.until > now
                && restriction.is_agreed
                && is_of_another(restriction)
        })
    }

    /// Whether the workspace of `key` has refused such a request with this verdict.
    pub(super) fn is_known_of(
        &self,
        features: &RequestFeatures,
        key: &Key,
        verdict: &'static str,
        now: UnixMs,
    ) -> bool {
        let own = Holder::Workspace(key.workspace().identity().clone());
        self.any_about(features, |restriction| {
            restriction.verdict == verdict && restriction.until > now && restriction.holder == own
        })
    }

    /// Whether `is_wanted` holds for any restriction of a request with these features.
    fn any_about(&self, features: &RequestFeatures, is_wanted: impl Fn(&Restriction) -> bool) -> bool {
        let table = self.table.load();
        let mut restrictions = features.all().filter_map(|feature| table.get(&feature)).flatten();
        restrictions.any(|restriction| restriction.is_about(features) && is_wanted(restriction))
    }

    /// Removes the restrictions of `key` for such a request, because it has served one. Returns
    /// whether there were any.
    pub(super) fn refute(&self, features: &RequestFeatures, key: &Key) -> bool {
        let is_refuted = |restriction: &Restriction| restriction.restraint(key).is_some();
        if !self.any_about(features, is_refuted) {
            return false;
        }
        self.keep_if(|restriction| {
            let is_about_it = features.all().any(|feature| feature == restriction.limit.feature);
            !(is_about_it && restriction.is_about(features) && is_refuted(restriction))
        });
        true
    }

    /// Removes the restrictions of a workspace that were refused with this verdict.
    pub(super) fn lift(&self, workspace: &OwnerId, verdict: &'static str) {
        let holder = Holder::Workspace(workspace.clone());
        let is_lifted =
            |restriction: &Restriction| restriction.verdict == verdict && restriction.holder == holder;
        if self.table.load().values().flatten().any(is_lifted) {
            self.keep_if(|restriction| !is_lifted(restriction));
        }
    }

    fn keep_if(&self, is_kept: impl Fn(&Restriction) -> bool) {
        self.replace(|table| {
            table.retain(|_, list| {
                list.retain(&is_kept);
                !list.is_empty()
            });
        });
    }

    /// The restrictions of `key` or its plan that are in force at `now`; the latest first.
    #[must_use]
    pub fn of(&self, key: &Key, now: UnixMs) -> Vec<Restriction> {
        let table = self.table.load();
        let of_key =
            |restriction: &&Restriction| restriction.until > now && restriction.restraint(key).is_some();
        let mut restrictions: Vec<Restriction> = table.values().flatten().filter(of_key).cloned().collect();
        // The elements after the time order restrictions of one millisecond, which the hash map
        // returns in any order. Two features may have the same text: calls of an endpoint with and
        // without effect.
        restrictions.sort_by_cached_key(|restriction| {
            (
                std::cmp::Reverse(restriction.since),
                restriction.limit.to_string(),
                restriction.verdict,
                restriction.until,
            )
        });
        restrictions
    }
}

/// Evicts expired restrictions, and then the oldest ones.
fn forget_old(table: &mut Table, now: UnixMs) {
    table.retain(|_, list| {
        list.retain(|restriction| restriction.until > now);
        !list.is_empty()
    });
    while table.values().map(Vec::len).sum::<usize>() >= RESTRICTIONS_MAX {
        let oldest =
            table.iter().min_by_key(|(_, list)| list.iter().map(|restriction| restriction.since).min());
        let Some(feature) = oldest.map(|(feature, _)| feature.clone()) else { return };
        table.remove(&feature);
    }
}

impl Restriction {
    /// Continues the history of earlier refusals: their first time, and the shortest refused text.
    /// A restriction with [`Force::Noted`] takes effect from the second refusal on.
    pub(super) fn continue_history(&mut self, earlier: Earlier) {
        self.record = Arc::new(RefusalRecord { earlier: Some(earlier), ..(*self.record).clone() });
        self.since = earlier.since;
        self.limit.from_characters = self.limit.from_characters.min(earlier.from_characters);
        if self.force == Force::Noted {
            self.force = Force::Refused;
        }
    }

    fn with_workspace(self, workspace: OwnerId) -> Self {
        let record = RefusalRecord { workspace: workspace.clone(), ..(*self.record).clone() };
        Self { record: Arc::new(record), holder: Holder::Workspace(workspace), ..self }
    }

    /// Whether the restriction applies to a request with these features. It does not apply to a
    /// text shorter than the refused one.
    fn is_about(&self, features: &RequestFeatures) -> bool {
        self.limit.from_characters == 0
            || features.characters.is_some_and(|characters| characters >= self.limit.from_characters)
    }

    /// The restraint of `key`; `None` when the restriction does not apply to the key.
    fn restraint(&self, key: &Key) -> Option<Restraint> {
        let (is_its_own, is_inferred) = match &self.holder {
            Holder::Key(fingerprint) => (*fingerprint == key.api_key().fingerprint(), false),
            Holder::Workspace(identity) => (identity == key.workspace().identity(), false),
            Holder::Plan(tier) => (false, key.workspace().tier().is_some_and(|known| **known == **tier)),
        };
        match (is_its_own, self.force) {
            (_, Force::Noted) => None,
            (true, Force::Strict) => Some(Restraint::Until(self.until)),
            (true, Force::Refused) => Some(Restraint::Refused),
            (true, Force::Suspected) => Some(Restraint::Inferred),
            (false, _) => is_inferred.then_some(Restraint::Inferred),
        }
    }
}
