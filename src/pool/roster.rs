//! The keys and workspaces of the pool, in order.
//!
//! A roster is immutable and replaced as a whole; the state of keys and workspaces is carried over to the
//! next one.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::Settings;
use super::key::Key;
use super::membership::{ReportedIds, WorkspaceMembership};
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
    /// The secret.
    pub key: ApiKey,
    /// The configured name, for operators.
    pub name: Option<String>,
    /// The name of its workspace; keys of one workspace share its credits. Without a name, and until the
    /// provider reports an identifier, a key is a workspace of its own.
    pub workspace: Option<String>,
    /// The provider's host for this key, when it differs from the default one: the keys of a region
    /// are valid only at its own host.
    pub authority: Option<Arc<Authority>>,
    /// The host at which the key was found to be valid, after a refusal as a key of another region.
    pub found_region: Option<Arc<Authority>>,
    /// Its share of the requests relative to other keys, from 1, for strategies that use weights.
    pub weight: u32,
    /// Credits of its workspace that this key leaves unspent.
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

/// The keys of the pool, in order, and their settings. Replaced as a whole when the configuration
/// changes: a request uses the roster it has loaded to its end.
#[derive(Debug)]
pub struct Roster {
    keys: Vec<Arc<Key>>,
    settings: Settings,
    entries: Vec<KeyEntry>,
    reported_ids: ReportedIds,
    redactor: Arc<Redactor>,
    /// Number of rosters before this one, modulo 256.
    generation: u8,
    /// Whether there is more than one workspace.
    has_choice: bool,
    /// The position of the first key of each workspace, by every identity under which the workspace may
    /// be stored.
    by_owner: HashMap<OwnerId, usize>,
}

impl Roster {
    pub(super) fn new(entries: Vec<KeyEntry>, settings: Settings) -> Self {
        let empty = Self::of(Vec::new(), settings, Vec::new(), ReportedIds::new(), 0);
        empty.following(entries, settings, ReportedIds::new())
    }

    /// The roster of `entries`, which carries over the state of this roster's keys and workspaces.
    pub(super) fn following(
        &self,
        entries: Vec<KeyEntry>,
        settings: Settings,
        reported_ids: ReportedIds,
    ) -> Self {
        let memberships: Vec<WorkspaceMembership> =
            entries.iter().map(|entry| WorkspaceMembership::of(entry, &entries, &reported_ids)).collect();
        let mut keys: Vec<Arc<Key>> = Vec::with_capacity(entries.len());
        for (position, (entry, membership)) in entries.iter().zip(&memberships).enumerate() {
            let before = self.keys.iter().find(|key| key.api_key().fingerprint() == entry.key.fingerprint());
            if let Some(same) = before.filter(|key| key.matches(entry, membership)) {
                same.set_position(position);
                keys.push(Arc::clone(same));
                continue;
            }
            let workspace = self.workspace_for(entry, membership, before, &keys, &memberships);
            let key = Key::new(position, entry.clone(), workspace);
            // Refusals of the provider apply to the key, whatever its configuration is now.
            if let Some(before) = before {
                key.inherit(before);
            }
            keys.push(Arc::new(key));
        }
        Self::of(keys, settings, entries, reported_ids, self.generation.wrapping_add(1))
    }

    /// Returns `entries` with the regions that were found for keys of this roster whose configuration
    /// still names none.
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
        reported_ids: ReportedIds,
        generation: u8,
    ) -> Self {
        let redactor = Arc::new(Redactor::new(keys.iter().map(|key| key.api_key())));
        let has_choice = keys.windows(2).any(|two| !std::ptr::eq(two[0].workspace(), two[1].workspace()));
        let by_owner = by_owner(&keys);
        Self { keys, settings, entries, reported_ids, redactor, generation, has_choice, by_owner }
    }

    /// The workspace with the same membership; else the previous workspace of the key if no other key
    /// claims it, renamed; else a new one.
    fn workspace_for(
        &self,
        entry: &KeyEntry,
        membership: &WorkspaceMembership,
        before: Option<&Arc<Key>>,
        new_keys: &[Arc<Key>],
        claims: &[WorkspaceMembership],
    ) -> Arc<Workspace> {
        let mut known = new_keys.iter().chain(&self.keys).map(|key| key.workspace_arc());
        if let Some(same) = known.find(|workspace| workspace.membership().is_same(membership)) {
            // The workspace is the same; its name may have changed.
            if membership.name().is_some() {
                same.rename(membership.clone());
            }
            return Arc::clone(same);
        }
        // Another name in the configuration means another workspace; a name for an unnamed one does not.
        let is_free = |workspace: &&Arc<Workspace>| {
            workspace.membership().may_become(membership)
                && !new_keys.iter().any(|key| Arc::ptr_eq(key.workspace_arc(), workspace))
                && !claims.iter().any(|claim| workspace.membership().is_same(claim))
        };
        match before.map(|key| key.workspace_arc()).filter(is_free) {
            Some(own) => {
                own.rename(membership.clone());
                Arc::clone(own)
            }
            None => {
                let identity = OwnerId::of(entry.workspace.as_deref(), entry.key.fingerprint());
                Arc::new(Workspace::new(membership.clone(), identity))
            }
        }
    }

    /// The keys, in pool order.
    #[must_use]
    pub fn keys(&self) -> &[Arc<Key>] {
        &self.keys
    }

    /// The position of `key` in this roster. Its own [`position`](Key::position) may already be that of a
    /// later roster.
    #[must_use]
    pub fn position_of(&self, key: &Key) -> Option<usize> {
        self.keys.iter().position(|known| std::ptr::eq(&**known, key))
    }

    /// Positions of the keys whose concurrency group has capacity at `now`; empty when all keys
    /// have capacity.
    #[must_use]
    pub fn keys_with_capacity(&self, group: ConcurrencyGroup, now: UnixMs) -> Vec<usize> {
        let has_capacity =
            |key: &Arc<Key>| key.workspace().limiter(group).state(now) == ConcurrencyState::Free;
        let free = self.keys.iter().enumerate().filter(|(_, key)| has_capacity(key));
        let with_capacity: Vec<usize> = free.map(|(position, _)| position).collect();
        if with_capacity.len() == self.keys.len() { Vec::new() } else { with_capacity }
    }

    /// The current identity of the workspace that `owner` names; `None` when no key of that workspace is
    /// left.
    #[must_use]
    pub fn identity_of(&self, owner: &OwnerId) -> Option<&OwnerId> {
        self.keys.get(*self.by_owner.get(owner)?).map(|key| key.workspace().identity())
    }

    /// Whether there is more than one workspace to select from.
    #[must_use]
    pub fn has_choice(&self) -> bool {
        self.has_choice
    }

    /// Whether the spent credits of `quota` are near its limit, by the configured ratio.
    #[must_use]
    pub fn is_near_limit(&self, quota: &Quota) -> bool {
        quota.is_near_limit(self.settings.near_limit_ratio)
    }

    /// The redactor that finds the pool's keys in relayed bytes.
    #[must_use]
    pub fn redactor(&self) -> &Arc<Redactor> {
        &self.redactor
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation
    }

    /// Maximum time a request is queued for a key.
    #[must_use]
    pub fn queue_timeout(&self) -> Duration {
        self.settings.queue_timeout
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn entries(&self) -> &[KeyEntry] {
        &self.entries
    }

    pub(super) fn reported_ids(&self) -> &ReportedIds {
        &self.reported_ids
    }
}

/// The position of the first key of each workspace, by identity. A workspace that was named later, or
/// merged with that of another key, is also found by the fingerprint of its key.
fn by_owner(keys: &[Arc<Key>]) -> HashMap<OwnerId, usize> {
    let mut positions = HashMap::new();
    for (position, key) in keys.iter().enumerate() {
        let workspace = key.workspace();
        let of_key = OwnerId::of(None, key.api_key().fingerprint());
        let named = workspace.membership().name().map(OwnerId::of_word);
        for owner in [workspace.identity().clone(), of_key].into_iter().chain(named) {
            positions.entry(owner).or_insert(position);
        }
    }
    positions
}
