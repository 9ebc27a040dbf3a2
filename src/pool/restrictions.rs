//! Records restrictions: kinds of requests that the provider has refused to a plan, a workspace or a key, although it
//! may serve them with other keys. The reason is a feature or a resource that the plan limits, a permission, an
//! endpoint, or a limit of the rate or of the concurrent requests.
//!
//! A restriction applies only to requests of its kind. It decides which keys are tried last, only as the first attempt,
//! or not before a given time. Requests read an immutable table, which is usually empty. A refusal replaces the table.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::key::Key;
use super::ownership_index::OwnerId;
use super::refusal::{RefusalHistory, RefusalRecord};
use super::roster::Roster;
use super::sync::{AtomicU64, Ordering};
use crate::elevenlabs::features::{Feature, Limit, RequestFeatures};
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::secret::Fingerprint;

/// Maximum number of restrictions. If a client is refused for many different voices, the oldest restrictions are
/// evicted. Each eviction may cost one additional attempt.
pub const MAX_RESTRICTIONS: usize = 1_024;

/// The keys that a restriction applies to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RestrictionScope {
    /// All keys of all workspaces with a plan of this name.
    Plan(Arc<str>),
    /// All keys of one workspace.
    Workspace(OwnerId),
    /// One key.
    Key(Fingerprint),
}

/// The degree to which restrictions keep a request from a key. A higher level is tried later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RestrictionLevel {
    /// The plan was refused in another workspace or is known to lack the feature, or the refusal may
    /// have been about the request. The key is tried after unrestricted keys.
    Inferred,
    /// The key or its workspace was refused, and its last refusal is older than that of every other refused key. The
    /// key is tried only when no other key can serve, and only as the first attempt. Therefore a key that the provider
    /// accepts again is found after at most as many requests as there are keys.
    RefusedLongest,
    /// The key or its workspace was refused. The key is tried after the key that was refused longest ago, and only as
    /// the first attempt.
    Refused,
    /// The key is not tried before this time, which is the end of a cooldown after a rate limit or after a refusal for
    /// too many concurrent requests.
    Until(UnixMs),
}

/// The effect of a restriction on the key or the workspace that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestrictionEffect {
    /// No effect, because the refusal was treated as a refusal of the whole account. If the same kind of request is
    /// refused again, the effect becomes [`Refused`](Self::Refused).
    None,
    /// The refusal may have been about the request, because a second account has refused it with
    /// the same message.
    Suspected,
    /// The refusal is about the key or its account.
    Refused,
    /// The refusal is a limit of the account, and an attempt before the end of the restriction would be refused again.
    Strict,
}

/// A restriction, with its scope, reason and times.
#[derive(Clone, Debug)]
pub struct Restriction {
    /// Sequence number in this run of Keychoir. A later or changed restriction has a higher number.
    pub sequence_number: u64,
    /// The last refusal. All other fields except the sequence number are computed from it.
    pub record: Arc<RefusalRecord>,
    /// The keys that the restriction applies to.
    pub scope: RestrictionScope,
    /// The restricted feature and, if the refusal was about a length, the length of the shortest refused text.
    pub limit: Limit,
    /// The name of the verdict, as in logs.
    pub verdict: &'static str,
    /// Time of the first refusal.
    pub first_refused_at: UnixMs,
    /// Time of the last refusal.
    pub refused_at: UnixMs,
    /// Time at which the restriction expires.
    pub until: UnixMs,
    /// The effect on the refused key or workspace.
    pub effect: RestrictionEffect,
}

impl Restriction {
    /// Whether this is a restriction because of `verdict` that has not expired.
    fn is_in_force(&self, verdict: Verdict, now: UnixMs) -> bool {
        self.verdict == verdict.as_str() && self.until > now
    }
}

type RestrictionTable = HashMap<Feature, Vec<Restriction>>;

/// All restrictions of a pool.
#[derive(Debug, Default)]
pub struct Restrictions {
    table: ArcSwap<RestrictionTable>,
    next_sequence_number: AtomicU64,
    version: AtomicU64,
}

impl Restrictions {
    /// Whether the table is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.load().is_empty()
    }

    /// Returns the number of times that the table was replaced.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Returns all restrictions that have not expired at `now`, by ascending sequence number.
    #[must_use]
    pub fn all(&self, now: UnixMs) -> Vec<Restriction> {
        let table = self.table.load();
        let current = table.values().flatten().filter(|restriction| restriction.until > now);
        let mut restrictions: Vec<Restriction> = current.cloned().collect();
        restrictions.sort_unstable_by_key(|restriction| restriction.sequence_number);
        restrictions
    }

    /// Returns the restrictions of `key` and its plan that have not expired at `now`, latest first.
    #[must_use]
    pub fn for_key(&self, key: &Key, now: UnixMs) -> Vec<Restriction> {
        let table = self.table.load();
        let applicable = table
            .values()
            .flatten()
            .filter(|restriction| restriction.until > now && restriction.level_for(key).is_some());
        let mut restrictions: Vec<Restriction> = applicable.cloned().collect();
        // Restrictions may have the same time and the same text of the limit, for example restrictions of requests to
        // one endpoint with and without an effect. The verdict and the end make the order the same in every run.
        restrictions.sort_by_cached_key(|restriction| {
            let Restriction { first_refused_at, limit, verdict, until, .. } = restriction;
            (Reverse(*first_refused_at), limit.to_string(), *verdict, *until)
        });
        restrictions
    }

    /// Returns the restricted keys of `roster` for a request with the given `features` at `now`: their positions,
    /// ascending, and levels.
    #[must_use]
    pub fn restricted_keys(
        &self,
        features: &RequestFeatures,
        roster: &Roster,
        now: UnixMs,
    ) -> Vec<(usize, RestrictionLevel)> {
        let table = self.table.load();
        let applicable: Vec<&Restriction> =
            applicable_to(features, &table).filter(|restriction| restriction.until > now).collect();
        if applicable.is_empty() {
            return Vec::new();
        }
        let level = |key: &Key| applicable.iter().filter_map(|restriction| restriction.level_for(key)).max();
        let keys = roster.keys().iter().enumerate();
        let mut restricted: Vec<_> =
            keys.filter_map(|(position, key)| Some((position, level(key)?))).collect();
        let refused_at = |position: usize| {
            let key = roster.keys().get(position)?;
            let refusals = applicable
                .iter()
                .filter(|restriction| restriction.level_for(key) == Some(RestrictionLevel::Refused));
            refusals.map(|restriction| restriction.refused_at).max()
        };
        let refused = restricted.iter_mut().filter(|(_, level)| *level == RestrictionLevel::Refused);
        if let Some((_, level)) = refused.min_by_key(|(position, _)| refused_at(*position)) {
            *level = RestrictionLevel::RefusedLongest;
        }
        restricted
    }

    /// Whether an account other than the account of `key` has refused a request with the given `features` with
    /// `verdict`, after a further account had refused the same request. Returns `false` if that account has served such
    /// a request since then.
    #[must_use]
    pub fn is_refused_by_others(
        &self,
        features: &RequestFeatures,
        key: &Key,
        verdict: Verdict,
        now: UnixMs,
    ) -> bool {
        let own_scope = RestrictionScope::Workspace(key.workspace().identity().clone());
        self.any_applicable(features, |restriction| {
            restriction.is_in_force(verdict, now)
                && restriction.record.is_repeated_elsewhere
                && matches!(restriction.scope, RestrictionScope::Workspace(_))
                && restriction.scope != own_scope
        })
    }

    /// Whether the workspace of `key` has refused a request with the given `features` with the given `verdict`.
    pub(super) fn is_refused_by_account(
        &self,
        features: &RequestFeatures,
        key: &Key,
        verdict: Verdict,
        now: UnixMs,
    ) -> bool {
        let own_scope = RestrictionScope::Workspace(key.workspace().identity().clone());
        self.any_applicable(features, |restriction| {
            restriction.is_in_force(verdict, now) && restriction.scope == own_scope
        })
    }

    /// Whether `is_match` returns `true` for a restriction that applies to a request with the given `features`.
    fn any_applicable(&self, features: &RequestFeatures, is_match: impl Fn(&Restriction) -> bool) -> bool {
        applicable_to(features, &self.table.load()).any(is_match)
    }

    /// Removes the restrictions of `key` for a request with the given `features`, because the key has served such a
    /// request. Returns whether restrictions were removed.
    pub fn refute(&self, features: &RequestFeatures, key: &Key) -> bool {
        let is_refuted = |restriction: &Restriction| restriction.level_for(key).is_some();
        if !self.any_applicable(features, is_refuted) {
            return false;
        }
        self.retain(|restriction| {
            let has_feature = features.all_features().any(|feature| feature == restriction.limit.feature);
            !(has_feature && restriction.applies_to_length(features) && is_refuted(restriction))
        });
        true
    }

    /// Removes the restrictions of a workspace that follow from refusals with the given `verdict`.
    pub(super) fn remove(&self, workspace: &OwnerId, verdict: Verdict) {
        let scope = RestrictionScope::Workspace(workspace.clone());
        let is_removed =
            |restriction: &Restriction| restriction.verdict == verdict.as_str() && restriction.scope == scope;
        if self.table.load().values().flatten().any(is_removed) {
            self.retain(|restriction| !is_removed(restriction));
        }
    }

    /// Records a restriction. Returns whether it is new and has an effect.
    pub(super) fn record(&self, restriction: &Restriction, now: UnixMs) -> bool {
        let mut is_new = false;
        self.update_table(|table| {
            evict_restrictions(table, now);
            is_new = self.insert(table, restriction.clone());
        });
        is_new
    }

    /// Restores the restrictions of the previous run, oldest first.
    pub(super) fn restore(&self, restrictions: &[Restriction]) {
        let latest = &restrictions[restrictions.len().saturating_sub(MAX_RESTRICTIONS)..];
        self.update_table(|table| {
            for restriction in latest {
                self.insert(table, restriction.clone());
            }
        });
    }

    /// Updates the restrictions of workspaces that have another identity in `roster`.
    pub(super) fn update_identities(&self, roster: &Roster) {
        let new_identity = |restriction: &Restriction| {
            let RestrictionScope::Workspace(known) = &restriction.scope else { return None };
            restriction.record.workspace_in(roster).filter(|identity| identity != known)
        };
        if !self.table.load().values().flatten().any(|restriction| new_identity(restriction).is_some()) {
            return;
        }
        self.update_table(|table| {
            for restriction in std::mem::take(table).into_values().flatten() {
                let restriction = match new_identity(&restriction) {
                    Some(identity) => restriction.with_workspace(identity),
                    None => restriction,
                };
                self.insert(table, restriction);
            }
        });
    }

    fn retain(&self, is_retained: impl Fn(&Restriction) -> bool) {
        self.update_table(|table| retain_restrictions(table, &is_retained));
    }

    /// Inserts a restriction into a table. If the table has a restriction with the same scope and
    /// feature, the later restriction replaces the earlier restriction and continues its history. Returns whether
    /// the inserted restriction is new and has an effect.
    fn insert(&self, table: &mut RestrictionTable, mut restriction: Restriction) -> bool {
        let same_feature = table.entry(restriction.limit.feature.clone()).or_default();
        let mut is_new = true;
        if let Some(index) = same_feature.iter().position(|known| known.scope == restriction.scope) {
            let mut earlier = same_feature.swap_remove(index);
            if earlier.refused_at > restriction.refused_at {
                std::mem::swap(&mut earlier, &mut restriction);
            }
            is_new = earlier.effect == RestrictionEffect::None || earlier.limit != restriction.limit;
            restriction.continue_history(RefusalHistory::up_to(&earlier));
        }
        is_new &= restriction.effect != RestrictionEffect::None;
        restriction.sequence_number = self.next_sequence_number.fetch_add(1, Ordering::Relaxed);
        same_feature.push(restriction);
        is_new
    }

    /// Replaces the table with a changed copy. Calls `change` again if another task has replaced the table meanwhile.
    fn update_table(&self, mut change: impl FnMut(&mut RestrictionTable)) {
        self.table.rcu(|table| {
            let mut new_table = RestrictionTable::clone(table);
            change(&mut new_table);
            new_table
        });
        // The version is incremented after the change. A task that reads a version therefore finds at
        // least the changes that the version counts.
        self.version.fetch_add(1, Ordering::Release);
    }
}

/// Returns the restrictions that apply to a request with the given `features`.
fn applicable_to<'t>(
    features: &RequestFeatures,
    table: &'t RestrictionTable,
) -> impl Iterator<Item = &'t Restriction> {
    let same_feature = features.all_features().filter_map(|feature| table.get(&feature)).flatten();
    same_feature.filter(|restriction| restriction.applies_to_length(features))
}

/// Removes the expired restrictions. While the table is full, removes all restrictions of the feature that was refused
/// first.
fn evict_restrictions(table: &mut RestrictionTable, now: UnixMs) {
    retain_restrictions(table, |restriction| restriction.until > now);
    while table.values().map(Vec::len).sum::<usize>() >= MAX_RESTRICTIONS {
        let oldest = table.iter().min_by_key(|(_, restrictions)| {
            restrictions.iter().map(|restriction| restriction.first_refused_at).min()
        });
        let Some(feature) = oldest.map(|(feature, _)| feature.clone()) else { return };
        table.remove(&feature);
    }
}

fn retain_restrictions(table: &mut RestrictionTable, is_retained: impl Fn(&Restriction) -> bool) {
    table.retain(|_, restrictions| {
        restrictions.retain(&is_retained);
        !restrictions.is_empty()
    });
}

impl Restriction {
    /// Continues the history of earlier refusals: the time of the first refusal, and the length of the shortest refused
    /// text. A restriction with [`RestrictionEffect::None`] takes effect from the second refusal on.
    pub(super) fn continue_history(&mut self, history: RefusalHistory) {
        self.record = Arc::new(RefusalRecord { history: Some(history), ..(*self.record).clone() });
        self.first_refused_at = history.first_refused_at;
        self.limit.from_characters = self.limit.from_characters.min(history.from_characters);
        if self.effect == RestrictionEffect::None {
            self.effect = RestrictionEffect::Refused;
        }
    }

    fn with_workspace(self, workspace: OwnerId) -> Self {
        let record = RefusalRecord { workspace: workspace.clone(), ..(*self.record).clone() };
        Self { record: Arc::new(record), scope: RestrictionScope::Workspace(workspace), ..self }
    }

    /// Whether the text of a request with the given `features` is at least as long as the refused text. Always true
    /// for a refusal that was not about a length.
    fn applies_to_length(&self, features: &RequestFeatures) -> bool {
        self.limit.from_characters == 0
            || features.characters.is_some_and(|characters| characters >= self.limit.from_characters)
    }

    /// Returns the level of `key`, or `None` if the restriction does not apply to the key.
    fn level_for(&self, key: &Key) -> Option<RestrictionLevel> {
        let (is_own, is_inferred) = match &self.scope {
            RestrictionScope::Key(fingerprint) => (*fingerprint == key.api_key().fingerprint(), false),
            RestrictionScope::Workspace(identity) => (identity == key.workspace().identity(), false),
            RestrictionScope::Plan(tier) => {
                (false, key.workspace().tier().is_some_and(|known| **known == **tier))
            }
        };
        match (is_own, self.effect) {
            (_, RestrictionEffect::None) => None,
            (true, RestrictionEffect::Strict) => Some(RestrictionLevel::Until(self.until)),
            (true, RestrictionEffect::Refused) => Some(RestrictionLevel::Refused),
            (true, RestrictionEffect::Suspected) => Some(RestrictionLevel::Inferred),
            (false, _) => is_inferred.then_some(RestrictionLevel::Inferred),
        }
    }
}
