//! Who is in the pool, in which order. A roster is replaced whole; what is known of keys and
//! workspaces goes on from one to the next.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::Settings;
use super::key::Key;
use super::membership::{ToldIds, WorkspaceMembership};
use super::ownership_index::OwnerId;
use super::workspace::Workspace;
use crate::policy::authority::Authority;
use crate::policy::budget::Quota;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::select::ConcurrencyState;
use crate::policy::units::UnixMs;
use crate::secret::{ApiKey, Redactor};

/// A key as it is configured.
#[derive(Clone, Debug)]
pub struct KeyEntry {
    /// The key.
    pub key: ApiKey,
    /// What people call it.
    pub name: Option<String>,
    /// The workspace it belongs to; keys of one workspace share its credits. Without a name, and
    /// until the provider tells, a key is a workspace of its own.
    pub workspace: Option<String>,
    /// Where it works, if not where all do: keys of a region are known at its own host only.
    pub authority: Option<Arc<Authority>>,
    /// Where it was found to work, when it was refused as one of another region.
    pub found_region: Option<Arc<Authority>>,
    /// Its share beside other keys, from 1, where the strategy asks for one.
    pub weight: u32,
    /// Credits of its workspace that it leaves for others.
    pub kept_credits: u64,
}

impl From<ApiKey> for KeyEntry {
    fn from(key: ApiKey) -> Self {
        Self {
            key,
            name: None,
            workspace: None,
            authority: None,
            found_region: None,
            weight: 1,
            kept_credits: 0,
        }
    }
}

/// The keys of the pool, in order, and how they are treated. Replaced whole when the configuration
/// changes: a request that has loaded it goes by it to its end.
#[derive(Debug)]
pub struct Roster {
    keys: Vec<Arc<Key>>,
    settings: Settings,
    entries: Vec<KeyEntry>,
    told: ToldIds,
    redactor: Arc<Redactor>,
    /// How many rosters were before it, modulo 256.
    generation: u8,
    /// Whether there is more than one workspace.
    has_choice: bool,
    /// Under whatever name a workspace may have been written down, the first of its keys.
    by_owner: HashMap<OwnerId, usize>,
}

impl Roster {
    pub(super) fn new(entries: Vec<KeyEntry>, settings: Settings) -> Self {
        let nobody = Self::of(Vec::new(), settings, Vec::new(), ToldIds::new(), 0);
        nobody.following(entries, settings, ToldIds::new())
    }

    /// The roster of `entries`. What is known of this roster's keys and workspaces goes on.
    pub(super) fn following(&self, entries: Vec<KeyEntry>, settings: Settings, told: ToldIds) -> Self {
        let belongings: Vec<WorkspaceMembership> =
            entries.iter().map(|entry| WorkspaceMembership::of(entry, &entries, &told)).collect();
        let mut keys: Vec<Arc<Key>> = Vec::with_capacity(entries.len());
        for (position, (entry, belonging)) in entries.iter().zip(&belongings).enumerate() {
            let before = self.keys.iter().find(|key| key.api_key().fingerprint() == entry.key.fingerprint());
            if let Some(same) = before.filter(|key| key.is(entry, belonging)) {
                same.place(position);
                keys.push(Arc::clone(same));
                continue;
            }
            let workspace = self.workspace_for(entry, belonging, before, &keys, &belongings);
            let key = Key::new(position, entry.clone(), workspace);
            // Whatever it is called now, the provider said this of this key.
            if let Some(before) = before {
                key.inherit(before);
            }
            keys.push(Arc::new(key));
        }
        Self::of(keys, settings, entries, told, self.generation.wrapping_add(1))
    }

    /// `entries`, with the regions that were found for keys of this roster whose configuration still names
    /// none.
    pub(super) fn with_found_regions(&self, mut entries: Vec<KeyEntry>) -> Vec<KeyEntry> {
        for entry in entries.iter_mut().filter(|entry| entry.authority.is_none()) {
            let known = self.entries.iter().find(|known| known.key.fingerprint() == entry.key.fingerprint());
            entry.found_region = known.and_then(|known| known.found_region.clone());
        }
        entries
    }

    fn of(
        keys: Vec<Arc<Key>>,
        settings: Settings,
        entries: Vec<KeyEntry>,
        told: ToldIds,
        generation: u8,
    ) -> Self {
        let redactor = Arc::new(Redactor::new(keys.iter().map(|key| key.api_key())));
        let has_choice = keys.windows(2).any(|two| !std::ptr::eq(two[0].workspace(), two[1].workspace()));
        let by_owner = by_owner(&keys);
        Self { keys, settings, entries, told, redactor, generation, has_choice, by_owner }
    }

    /// The workspace of that identity, or the one that the key had and nobody else claims, under its
    /// new name; or a new one.
    fn workspace_for(
        &self,
        entry: &KeyEntry,
        belonging: &WorkspaceMembership,
        before: Option<&Arc<Key>>,
        placed: &[Arc<Key>],
        claims: &[WorkspaceMembership],
    ) -> Arc<Workspace> {
        let mut known = placed.iter().chain(&self.keys).map(|key| key.workspace_arc());
        if let Some(same) = known.find(|workspace| workspace.membership().is_same(belonging)) {
            // The same one, perhaps under another name.
            if belonging.name().is_some() {
                same.rename(belonging.clone());
            }
            return Arc::clone(same);
        }
        // Another name in the configuration is another workspace; one for what had none is not.
        let is_free = |workspace: &&Arc<Workspace>| {
            workspace.membership().may_become(belonging)
                && !placed.iter().any(|key| Arc::ptr_eq(key.workspace_arc(), workspace))
                && !claims.iter().any(|claim| workspace.membership().is_same(claim))
        };
        match before.map(|key| key.workspace_arc()).filter(is_free) {
            Some(own) => {
                own.rename(belonging.clone());
                Arc::clone(own)
            }
            None => {
                let identity = OwnerId::of(entry.workspace.as_deref(), entry.key.fingerprint());
                Arc::new(Workspace::new(belonging.clone(), identity))
            }
        }
    }

    /// The keys, in pool order.
    #[must_use]
    pub fn keys(&self) -> &[Arc<Key>] {
        &self.keys
    }

    /// The place of `key` in this roster. Its own [`position`](Key::position) may already be that of
    /// a later one.
    #[must_use]
    pub fn position_of(&self, key: &Key) -> Option<usize> {
        self.keys.iter().position(|known| std::ptr::eq(&**known, key))
    }

    /// Positions of the keys that have room for one more of a lane at `now`, when that tells them apart;
    /// else none.
    #[must_use]
    pub fn with_room(&self, group: ConcurrencyGroup, now: UnixMs) -> Vec<usize> {
        let has_room = |key: &Arc<Key>| key.workspace().limiter(group).look(now) == ConcurrencyState::Free;
        let with_room = self.keys.iter().enumerate().filter(|(_, key)| has_room(key));
        let positions: Vec<usize> = with_room.map(|(position, _)| position).collect();
        if positions.len() == self.keys.len() { Vec::new() } else { positions }
    }

    /// The identity that a workspace of this roster goes by now and that `owner` is another name of;
    /// `None` when no key opens that workspace any more.
    #[must_use]
    pub fn identity_of(&self, owner: &OwnerId) -> Option<&OwnerId> {
        self.keys.get(*self.by_owner.get(owner)?).map(|key| key.workspace().identity())
    }

    /// Whether there is more than one workspace to choose from.
    #[must_use]
    pub fn has_choice(&self) -> bool {
        self.has_choice
    }

    /// Whether the use of such a quota has come near its limit.
    #[must_use]
    pub fn is_near_limit(&self, quota: &Quota) -> bool {
        quota.is_near_limit(self.settings.near_limit_ratio)
    }

    /// Finds its keys in what is relayed.
    #[must_use]
    pub fn redactor(&self) -> &Arc<Redactor> {
        &self.redactor
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation
    }

    /// How long a request may wait for a key.
    #[must_use]
    pub fn queue_timeout(&self) -> Duration {
        self.settings.wait_max
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn entries(&self) -> &[KeyEntry] {
        &self.entries
    }

    pub(super) fn told(&self) -> &ToldIds {
        &self.told
    }
}

/// The first key of each workspace, under what that is known by: a workspace that was named later, or
/// that turned out to be another key's as well, is still known by its key.
fn by_owner(keys: &[Arc<Key>]) -> HashMap<OwnerId, usize> {
    let mut found = HashMap::new();
    for (position, key) in keys.iter().enumerate() {
        let workspace = key.workspace();
        let of_key = OwnerId::of(None, key.api_key().fingerprint());
        let named = workspace.membership().name().map(OwnerId::of_word);
        for owner in [workspace.identity().clone(), of_key].into_iter().chain(named) {
            found.entry(owner).or_insert(position);
        }
    }
    found
}
