//! Who is in the pool, in which order. A roster is replaced whole; what is known of keys and
//! workspaces goes on from one to the next.

use std::sync::Arc;

use super::Settings;
use super::identity::{Identity, ToldIds};
use super::key::Key;
use super::workspace::Workspace;
use crate::policy::authority::Authority;
use crate::policy::budget::Quota;
use crate::secret::ApiKey;

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
    /// Its share beside other keys, from 1, where the strategy asks for one.
    pub weight: u32,
    /// Credits of its workspace that it leaves for others.
    pub kept_credits: u64,
}

impl From<ApiKey> for KeyEntry {
    fn from(key: ApiKey) -> Self {
        Self { key, name: None, workspace: None, authority: None, weight: 1, kept_credits: 0 }
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
}

impl Roster {
    pub(super) fn new(entries: Vec<KeyEntry>, settings: Settings) -> Self {
        let nobody = Self { keys: Vec::new(), settings, entries: Vec::new(), told: ToldIds::new() };
        nobody.following(entries, settings, ToldIds::new())
    }

    /// The roster of `entries`. What is known of this roster's keys and workspaces goes on.
    pub(super) fn following(&self, entries: Vec<KeyEntry>, settings: Settings, told: ToldIds) -> Self {
        let identities: Vec<Identity> =
            entries.iter().map(|entry| Identity::of(entry, &entries, &told)).collect();
        let mut keys: Vec<Arc<Key>> = Vec::with_capacity(entries.len());
        for (position, (entry, identity)) in entries.iter().zip(&identities).enumerate() {
            let before = self.keys.iter().find(|key| key.api_key().fingerprint() == entry.key.fingerprint());
            if let Some(same) = before.filter(|key| key.is(entry, identity)) {
                same.place(position);
                keys.push(Arc::clone(same));
                continue;
            }
            let workspace = self.workspace_for(identity, before, &keys, &identities);
            let key = Key::new(position, entry.clone(), workspace);
            // Whatever it is called now, the provider said this of this key.
            if let Some(park) = before.and_then(|key| key.parked()) {
                key.park(park);
            }
            keys.push(Arc::new(key));
        }
        Self { keys, settings, entries, told }
    }

    /// The workspace of that identity, or the one that the key had and nobody else claims, under its
    /// new name; or a new one.
    fn workspace_for(
        &self,
        identity: &Identity,
        before: Option<&Arc<Key>>,
        placed: &[Arc<Key>],
        claims: &[Identity],
    ) -> Arc<Workspace> {
        let mut known = placed.iter().chain(&self.keys).map(|key| key.workspace_arc());
        if let Some(same) = known.find(|workspace| workspace.identity().is_same(identity)) {
            return Arc::clone(same);
        }
        // Another name in the configuration is another workspace; one for what had none is not.
        let is_free = |workspace: &&Arc<Workspace>| {
            workspace.identity().may_become(identity)
                && !placed.iter().any(|key| Arc::ptr_eq(key.workspace_arc(), workspace))
                && !claims.iter().any(|claim| workspace.identity().is_same(claim))
        };
        match before.map(|key| key.workspace_arc()).filter(is_free) {
            Some(own) => {
                own.rename(identity.clone());
                Arc::clone(own)
            }
            None => Arc::new(Workspace::new(identity.clone())),
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

    /// Whether the use of such a quota has come near its limit.
    #[must_use]
    pub fn is_near_limit(&self, quota: &Quota) -> bool {
        quota.is_near_limit(self.settings.near_limit_ratio)
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
