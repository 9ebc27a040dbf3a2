//! What plans, workspaces and keys were refused for that others may be able to do: plan features,
//! permissions without a name, endpoints. It never makes a key unusable. It decides who is asked first,
//! and who is asked last.
//!
//! Requests read an immutable table, which is empty most of the time; a refusal replaces it.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::key::Key;
use super::ownership_index::OwnerId;
use super::refusal::{Earlier, RefusalRecord};
use super::roster::Roster;
use super::sync::{AtomicU64, Ordering};
use crate::policy::evidence::Source;
use crate::policy::features::{Feature, Limit, RequestFeatures};
use crate::policy::units::UnixMs;
use crate::secret::Fingerprint;

/// Restrictions that are kept at once: a client that is refused for ever new voices pushes out the
/// oldest, and each of them costs one request more than it would have.
pub const RESTRICTIONS_MAX: usize = 1_024;

/// Of which part of the pool something is restricted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Holder {
    /// All workspaces with a plan of this name.
    Plan(Arc<str>),
    /// A workspace.
    Workspace(OwnerId),
    /// A key.
    Key(Fingerprint),
}

/// How far a restriction keeps a request away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Restraint {
    /// The plan was refused in another workspace, or is known not to have it, or the refusal may have been
    /// about the request: asked after those that were not.
    Inferred,
    /// It was refused itself, and longer ago than all others that were: asked only when none but those can
    /// be, and only as the first. A key that has recovered meanwhile is found after as many requests as
    /// there are keys.
    RefusedLongest,
    /// It was refused itself: asked after that one, and only as the first.
    Refused,
    /// It is not asked before this moment, which the provider has named or a rate limit implies.
    Until(UnixMs),
}

/// How far a restriction holds for the account that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// Not at all: what it was refused for was put down to the whole account. When a poll contradicts that,
    /// and the like of it is refused again, it holds as [`Refused`](Self::Refused).
    Noted,
    /// It may have been about the request, because a second account has said the same.
    Suspected,
    /// It is about the account.
    Refused,
    /// It is about the account, and asking again would make it worse.
    Strict,
}

/// Something that is restricted.
#[derive(Clone, Debug)]
pub struct Restriction {
    /// Counts the restrictions of this run of the program: a later one, or one that has changed, has a
    /// higher number.
    pub number: u64,
    /// The refusal that all else is computed from.
    pub record: Arc<RefusalRecord>,
    /// Of what.
    pub holder: Holder,
    /// What.
    pub limit: Limit,
    /// The word of the verdict.
    pub verdict: &'static str,
    /// Since when.
    pub since: UnixMs,
    /// When it was refused last.
    pub refused_at: UnixMs,
    /// Until when it is remembered.
    pub until: UnixMs,
    /// How far it keeps requests from its holder until then.
    pub force: Force,
    /// Whether other accounts have said the same of the same request.
    pub is_agreed: bool,
    /// Where it was met.
    pub source: Arc<Source>,
}

type Table = HashMap<Feature, Vec<Restriction>>;

/// All restrictions of a pool.
#[derive(Debug, Default)]
pub struct Restrictions {
    table: ArcSwap<Table>,
    /// Numbers that were given.
    numbers: AtomicU64,
    /// Changes that were made.
    version: AtomicU64,
}

impl Restrictions {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.load().is_empty()
    }

    /// Grows with every change.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// All of them that hold at `now`, in the order of their numbers.
    #[must_use]
    pub fn all(&self, now: UnixMs) -> Vec<Restriction> {
        let table = self.table.load();
        let held = table.values().flatten().filter(|held| held.until > now);
        let mut found: Vec<Restriction> = held.cloned().collect();
        found.sort_unstable_by_key(|held| held.number);
        found
    }

    /// Takes up those of the last run of the program, the oldest first.
    pub(super) fn restore(&self, restrictions: &[Restriction]) {
        let latest = &restrictions[restrictions.len().saturating_sub(RESTRICTIONS_MAX)..];
        self.replace(|table| latest.iter().for_each(|held| self.put(table, held.clone())));
    }

    /// Has the restrictions of workspaces that are known by another identity in `roster` follow them.
    pub(super) fn follow(&self, roster: &Roster) {
        let moved = |held: &Restriction| {
            let Holder::Workspace(known) = &held.holder else { return None };
            held.record.workspace_in(roster).filter(|identity| identity != known)
        };
        if !self.table.load().values().flatten().any(|held| moved(held).is_some()) {
            return;
        }
        self.replace(|table| {
            for held in std::mem::take(table).into_values().flatten() {
                self.put(table, moved(&held).map_or(held.clone(), |identity| held.held_by(identity)));
            }
        });
    }

    /// Puts a restriction into a table. Of two for the same reason, the later one goes on with what counts of
    /// the earlier one.
    fn put(&self, table: &mut Table, mut restriction: Restriction) {
        let held = table.entry(restriction.limit.feature.clone()).or_default();
        if let Some(at) = held.iter().position(|known| known.holder == restriction.holder) {
            let mut earlier = held.swap_remove(at);
            if earlier.refused_at > restriction.refused_at {
                std::mem::swap(&mut earlier, &mut restriction);
            }
            restriction.follow(Earlier::of(&earlier));
        }
        restriction.number = self.numbers.fetch_add(1, Ordering::Relaxed);
        held.push(restriction);
    }

    fn replace(&self, change: impl Fn(&mut Table)) {
        self.table.rcu(|table| {
            let mut table = Table::clone(table);
            change(&mut table);
            table
        });
        // Behind the change: the reader of a version finds at least what it counts.
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Remembers a restriction. Whether it is news.
    pub(super) fn learn(&self, restriction: &Restriction, now: UnixMs) -> bool {
        let is_same = |known: &Restriction| known.holder == restriction.holder;
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let mut is_news = true;
        self.table.rcu(|table| {
            let mut table = Table::clone(table);
            forget_old(&mut table, now);
            let held = table.entry(restriction.limit.feature.clone()).or_default();
            let before = held.iter().position(is_same).map(|at| held.swap_remove(at));
            let mut kept = Restriction { number, ..restriction.clone() };
            let was_noted = before.as_ref().is_some_and(|known| known.force == Force::Noted);
            let is_other = before.as_ref().is_none_or(|known| known.limit != restriction.limit);
            if let Some(before) = before {
                kept.follow(Earlier::of(&before));
            }
            is_news = kept.force != Force::Noted && (is_other || was_noted);
            held.push(kept);
            table
        });
        self.version.fetch_add(1, Ordering::Release);
        is_news
    }

    /// What keeps a request with these features from the keys of `roster` at `now`: positions, ascending.
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
            needed.filter(|held| held.until > now && held.is_about(features)).collect();
        if in_force.is_empty() {
            return Vec::new();
        }
        let restraint = |key: &Key| in_force.iter().filter_map(|held| held.restraint(key)).max();
        let all = roster.keys().iter().enumerate();
        let mut found: Vec<_> = all.filter_map(|(position, key)| Some((position, restraint(key)?))).collect();
        let refused_at = |key: &Key| {
            let own = in_force.iter().filter(|held| held.restraint(key) == Some(Restraint::Refused));
            own.map(|held| held.refused_at).max()
        };
        let refused = found.iter_mut().filter(|(_, restraint)| *restraint == Restraint::Refused);
        let longest =
            refused.min_by_key(|(position, _)| roster.keys().get(*position).map(|key| refused_at(key)));
        if let Some((_, restraint)) = longest {
            *restraint = Restraint::RefusedLongest;
        }
        found
    }

    /// Whether several accounts other than that of `key` have refused the like of it with this verdict, and
    /// have not served it since.
    pub(super) fn is_said_of_another(
        &self,
        features: &RequestFeatures,
        key: &Key,
        verdict: &'static str,
        now: UnixMs,
    ) -> bool {
        let own = Holder::Workspace(key.workspace().identity().clone());
        let is_said = |held: &&Restriction| {
            let is_of_another = matches!(held.holder, Holder::Workspace(_)) && held.holder != own;
            let is_in_force = held.until > now && held.is_about(features);
            held.verdict == verdict && held.is_agreed && is_of_another && is_in_force
        };
        let table = self.table.load();
        features.all().filter_map(|feature| table.get(&feature)).flatten().any(|held| is_said(&held))
    }

    /// Whether the workspace of `key` has refused the like of it with this verdict.
    pub(super) fn is_known_of(
        &self,
        features: &RequestFeatures,
        key: &Key,
        verdict: &'static str,
        now: UnixMs,
    ) -> bool {
        let own = Holder::Workspace(key.workspace().identity().clone());
        let is_known = |held: &&Restriction| {
            held.verdict == verdict && held.holder == own && held.until > now && held.is_about(features)
        };
        let table = self.table.load();
        features.all().filter_map(|feature| table.get(&feature)).flatten().any(|held| is_known(&held))
    }

    /// Forgets what kept such a request from `key`, which has served it. Whether there was anything.
    pub(super) fn refute(&self, features: &RequestFeatures, key: &Key) -> bool {
        let is_refuted = |held: &Restriction| held.is_about(features) && held.restraint(key).is_some();
        let table = self.table.load();
        if !features.all().filter_map(|feature| table.get(&feature)).flatten().any(is_refuted) {
            return false;
        }
        self.retain(|held| {
            !(features.all().any(|feature| feature == held.limit.feature) && is_refuted(held))
        });
        true
    }

    /// Forgets the restrictions of a workspace that were refused with this verdict.
    pub(super) fn lift(&self, workspace: &OwnerId, verdict: &'static str) {
        let holder = Holder::Workspace(workspace.clone());
        let is_lifted = |held: &Restriction| held.verdict == verdict && held.holder == holder;
        if self.table.load().values().flatten().any(is_lifted) {
            self.retain(|held| !is_lifted(held));
        }
    }

    fn retain(&self, is_kept: impl Fn(&Restriction) -> bool) {
        self.replace(|table| {
            table.retain(|_, held| {
                held.retain(&is_kept);
                !held.is_empty()
            });
        });
    }

    /// What `key` was refused for, or its plan, that is remembered at `now`; the latest first.
    #[must_use]
    pub fn of(&self, key: &Key, now: UnixMs) -> Vec<Restriction> {
        let table = self.table.load();
        let of_key = |held: &&Restriction| held.until > now && held.restraint(key).is_some();
        let mut found: Vec<Restriction> = table.values().flatten().filter(of_key).cloned().collect();
        // The second part is for those of one millisecond, which a table has in no order.
        found.sort_by_cached_key(|held| (std::cmp::Reverse(held.since), held.limit.to_string()));
        found
    }
}

/// Makes room: what is over goes, and then the oldest.
fn forget_old(table: &mut Table, now: UnixMs) {
    table.retain(|_, held| {
        held.retain(|held| held.until > now);
        !held.is_empty()
    });
    while table.values().map(Vec::len).sum::<usize>() >= RESTRICTIONS_MAX {
        let oldest = table.iter().min_by_key(|(_, held)| held.iter().map(|held| held.since).min());
        let Some(feature) = oldest.map(|(feature, _)| feature.clone()) else { return };
        table.remove(&feature);
    }
}

impl Restriction {
    /// Takes in what counts of the refusals before it: since when, the shortest text that was refused, and
    /// whether it is the second one that was put down to the account.
    pub(super) fn follow(&mut self, earlier: Earlier) {
        self.record = Arc::new(RefusalRecord { earlier: Some(earlier), ..(*self.record).clone() });
        self.since = earlier.since;
        self.limit.from_characters = self.limit.from_characters.min(earlier.from_characters);
        // A second note holds, and what holds already is not weakened by a note.
        if self.force == Force::Noted {
            self.force = Force::Refused;
        }
    }

    fn held_by(self, workspace: OwnerId) -> Self {
        let record = RefusalRecord { workspace: workspace.clone(), ..(*self.record).clone() };
        Self { record: Arc::new(record), holder: Holder::Workspace(workspace), ..self }
    }

    /// Whether a request with these features is concerned: a shorter text than was refused is not.
    fn is_about(&self, features: &RequestFeatures) -> bool {
        self.limit.from_characters == 0
            || features.characters.is_some_and(|characters| characters >= self.limit.from_characters)
    }

    /// How far it keeps a request from `key`; `None` when it is not about that.
    fn restraint(&self, key: &Key) -> Option<Restraint> {
        let (is_its_own, is_inferred) = match &self.holder {
            Holder::Key(print) => (*print == key.api_key().fingerprint(), false),
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
