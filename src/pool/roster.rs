//! Defines the roster: the ordered keys of the pool with their workspaces, the entries that configure them, the
//! settings, and the redactor that finds the keys in relayed bytes.
//!
//! A roster is immutable and replaced as a whole. The next roster shares the state of the keys and
//! workspaces that stay.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::Settings;
use super::key::Key;
use super::membership::{ReportedIds, WorkspaceMembership};
use super::ownership_index::OwnerId;
use super::workspace::Workspace;
use crate::policy::authority::Authority;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::key_state::{KeyOrigin, Pause};
use crate::policy::quota::Quota;
use crate::policy::select::ConcurrencyState;
use crate::policy::units::UnixMs;
use crate::secret::{ApiKey, Fingerprint, Redactor};

/// A key as it is configured.
#[derive(Clone, Debug)]
pub struct KeyEntry {
    /// The secret API key.
    pub key: ApiKey,
    /// The configured name, for operators, or `None` if the key has no name.
    pub name: Option<String>,
    /// The name of the key's workspace. Keys of one workspace share its credits. A key without a name is the only key
    /// of its workspace until the provider reports an identifier.
    pub workspace: Option<String>,
    /// The provider's host for this key, if it differs from the default host. The keys of a region are
    /// valid only at the host of the region.
    pub authority: Option<Arc<Authority>>,
    /// The default host through the key's own forward proxy, or directly, if the connections of this key differ from
    /// the connections of the other keys. Ignored for a key with an `authority`, which includes its forward proxy.
    pub default_route: Option<Arc<Authority>>,
    /// The host that accepted the key in a poll, after the default host refused it as a key of another region. `None`
    /// before such a poll.
    pub detected_region: Option<Arc<Authority>>,
    /// The key's share of the requests relative to other keys. 0 counts as 1. Only some strategies use weights.
    pub weight: u32,
    /// Credits of the workspace that this key leaves unspent.
    pub kept_credits: u64,
    /// The pause that an operator ordered, if there is one. It may have ended.
    pub pause: Option<Pause>,
    /// The kind of source from which the key was configured.
    pub origin: KeyOrigin,
}

impl From<ApiKey> for KeyEntry {
    fn from(key: ApiKey) -> Self {
        Self {
            key,
            name: None,
            workspace: None,
            authority: None,
            default_route: None,
            detected_region: None,
            weight: 1,
            kept_credits: 0,
            pause: None,
            origin: KeyOrigin::default(),
        }
    }
}

/// The keys of the pool, in order, and their settings. Positions of keys are valid only within one roster.
#[derive(Debug)]
pub struct Roster {
    keys: Vec<Arc<Key>>,
    pub(super) settings: Settings,
    pub(super) entries: Vec<KeyEntry>,
    pub(super) reported_ids: ReportedIds,
    redactor: Arc<Redactor>,
    /// Number of earlier rosters, modulo 256.
    pub(super) generation: u8,
    has_several_workspaces: bool,
    /// The position of the first key of each workspace, by every identity under which the resources of
    /// the workspace may be stored.
    first_positions: HashMap<OwnerId, usize>,
}

impl Roster {
    pub(super) fn new(entries: Vec<KeyEntry>, settings: Settings) -> Self {
        let empty = Self::with_keys(Vec::new(), settings, Vec::new(), ReportedIds::new(), 0);
        empty.next(entries, settings, ReportedIds::new())
    }

    /// Creates the roster that replaces this one after a change of the keys, the settings or the reported identifiers.
    /// It shares the state of the keys and workspaces that both rosters have.
    pub(super) fn next(&self, entries: Vec<KeyEntry>, settings: Settings, reported_ids: ReportedIds) -> Self {
        let memberships: Vec<WorkspaceMembership> = entries
            .iter()
            .map(|entry| WorkspaceMembership::for_entry(entry, &entries, &reported_ids))
            .collect();
        let mut keys: Vec<Arc<Key>> = Vec::with_capacity(entries.len());
        for (position, (entry, membership)) in entries.iter().zip(&memberships).enumerate() {
            let previous_key = self.find(entry.key.fingerprint());
            if let Some(unchanged_key) = previous_key.filter(|key| key.matches(entry, membership)) {
                unchanged_key.set_position(position);
                unchanged_key.set_pause(entry.pause.clone());
                keys.push(Arc::clone(unchanged_key));
                continue;
            }
            let workspace = self.workspace_for(entry, membership, previous_key, &keys, &memberships);
            let key = Key::new(position, entry.clone(), workspace);
            // Refusals apply to the key regardless of its configuration.
            if let Some(previous_key) = previous_key {
                key.copy_state(previous_key);
            }
            keys.push(Arc::new(key));
        }
        Self::with_keys(keys, settings, entries, reported_ids, self.generation.wrapping_add(1))
    }

    /// Adds the detected regions of this roster's keys to the `entries` that do not configure a host.
    pub(super) fn with_detected_regions(&self, mut entries: Vec<KeyEntry>) -> Vec<KeyEntry> {
        for entry in entries.iter_mut().filter(|entry| entry.authority.is_none()) {
            let previous_entry =
                self.entries.iter().find(|previous| previous.key.fingerprint() == entry.key.fingerprint());
            entry.detected_region = previous_entry.and_then(|previous| previous.detected_region.clone());
        }
        entries
    }

    fn with_keys(
        keys: Vec<Arc<Key>>,
        settings: Settings,
        entries: Vec<KeyEntry>,
        reported_ids: ReportedIds,
        generation: u8,
    ) -> Self {
        let redactor = Arc::new(Redactor::new(keys.iter().map(|key| key.api_key())));
        let has_several_workspaces =
            keys.windows(2).any(|pair| !Arc::ptr_eq(&pair[0].workspace, &pair[1].workspace));
        let first_positions = first_positions(&keys);
        Self {
            keys,
            settings,
            entries,
            reported_ids,
            redactor,
            generation,
            has_several_workspaces,
            first_positions,
        }
    }

    /// Returns the workspace with the same membership. If there is none, returns the previous workspace of the key
    /// under its new identification, if no other key claims it. Otherwise returns a new workspace.
    fn workspace_for(
        &self,
        entry: &KeyEntry,
        membership: &WorkspaceMembership,
        previous_key: Option<&Arc<Key>>,
        new_keys: &[Arc<Key>],
        claims: &[WorkspaceMembership],
    ) -> Arc<Workspace> {
        let mut workspaces = new_keys.iter().chain(&self.keys).map(|key| &key.workspace);
        if let Some(known) = workspaces.find(|workspace| workspace.membership().is_same(membership)) {
            // The configured name of the workspace may have changed.
            if membership.name().is_some() {
                known.set_membership(membership.clone());
            }
            return Arc::clone(known);
        }
        // Another configured name means another workspace, but a workspace without a name may receive one.
        let is_unclaimed = |workspace: &&Arc<Workspace>| {
            workspace.membership().may_become(membership)
                && !new_keys.iter().any(|key| Arc::ptr_eq(&key.workspace, workspace))
                && !claims.iter().any(|claim| workspace.membership().is_same(claim))
        };
        match previous_key.map(|key| &key.workspace).filter(is_unclaimed) {
            Some(previous) => {
                previous.set_membership(membership.clone());
                Arc::clone(previous)
            }
            None => {
                let identity = OwnerId::new(entry.workspace.as_deref(), entry.key.fingerprint());
                Arc::new(Workspace::new(membership.clone(), identity))
            }
        }
    }

    /// Returns the keys, in pool order.
    #[must_use]
    pub fn keys(&self) -> &[Arc<Key>] {
        &self.keys
    }

    /// Returns the key with the given `fingerprint`.
    #[must_use]
    pub fn find(&self, fingerprint: Fingerprint) -> Option<&Arc<Key>> {
        self.keys.iter().find(|key| key.api_key().fingerprint() == fingerprint)
    }

    /// Returns the position of `key` in this roster. [`Key::position`] may already be its position in a later
    /// roster.
    #[must_use]
    pub fn position_of(&self, key: &Key) -> Option<usize> {
        self.keys.iter().position(|known| std::ptr::eq(&**known, key))
    }

    /// Returns the positions of the keys whose concurrency group has capacity at `now`, or no positions when all keys
    /// have capacity.
    #[must_use]
    pub fn keys_with_capacity(&self, group: ConcurrencyGroup, now: UnixMs) -> Vec<usize> {
        let has_capacity =
            |key: &Arc<Key>| key.workspace().limiter(group).state(now) == ConcurrencyState::Free;
        let free_keys = self.keys.iter().enumerate().filter(|(_, key)| has_capacity(key));
        let free_positions: Vec<usize> = free_keys.map(|(position, _)| position).collect();
        if free_positions.len() == self.keys.len() { Vec::new() } else { free_positions }
    }

    /// Returns the current identity of the workspace that was stored as `owner`, or `None` if the roster has
    /// no key of that workspace.
    #[must_use]
    pub fn identity_of(&self, owner: &OwnerId) -> Option<&OwnerId> {
        self.workspace_of(owner).map(Workspace::identity)
    }

    /// Returns the workspace that was stored as `owner`, or `None` if the roster has no key of it.
    pub(super) fn workspace_of(&self, owner: &OwnerId) -> Option<&Workspace> {
        self.keys.get(*self.first_positions.get(owner)?).map(|key| key.workspace())
    }

    /// Whether the keys belong to more than one workspace.
    #[must_use]
    pub fn has_several_workspaces(&self) -> bool {
        self.has_several_workspaces
    }

    /// Whether the spent credits of `quota` are near its limit, by the configured ratio.
    #[must_use]
    pub fn is_near_limit(&self, quota: &Quota) -> bool {
        quota.is_near_limit(self.settings.near_limit_ratio)
    }

    /// Returns the redactor that finds the pool's keys in relayed bytes.
    #[must_use]
    pub fn redactor(&self) -> &Arc<Redactor> {
        &self.redactor
    }

    /// Returns the maximum time a request is queued for a key.
    #[must_use]
    pub fn queue_timeout(&self) -> Duration {
        self.settings.queue_timeout
    }
}

/// Returns the position of the first key of each workspace, by identity. The fingerprint of each key also identifies
/// its workspace, because resources may have been stored before the workspace had a name or shared its credits with
/// another key.
fn first_positions(keys: &[Arc<Key>]) -> HashMap<OwnerId, usize> {
    let mut positions = HashMap::new();
    for (position, key) in keys.iter().enumerate() {
        let workspace = key.workspace();
        let key_identity = OwnerId::new(None, key.api_key().fingerprint());
        let name = workspace.membership().name().map(OwnerId::from_stored);
        for owner in [workspace.identity().clone(), key_identity].into_iter().chain(name) {
            positions.entry(owner).or_insert(position);
        }
    }
    positions
}
