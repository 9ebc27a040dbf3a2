//! Who is in the pool: workspaces, which own credits, and keys, which open them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;

use super::Settings;
use super::cells::{Announced, ParkCell, QuotaCell};
use crate::policy::authority::Authority;
use crate::policy::budget::Quota;
use crate::policy::standing::{Change, Park, ParkReason, Standing};
use crate::policy::units::UnixMs;
use crate::secret::{ApiKey, Redactor};

/// A key as it is configured.
#[derive(Clone, Debug)]
pub struct KeyEntry {
    /// The key.
    pub key: ApiKey,
    /// What people call it.
    pub name: Option<String>,
    /// The workspace it belongs to; keys of one workspace share its credits. Without a name, a
    /// key is a workspace of its own.
    pub workspace: Option<String>,
    /// Where it works, if not where all do: keys of a region are known at its own host only.
    pub authority: Option<Arc<Authority>>,
}

/// The keys of the pool, in order, and how they are treated. Replaced whole when the configuration
/// changes: a request that has loaded it goes by it to its end.
#[derive(Debug)]
pub struct Roster {
    keys: Vec<Arc<Key>>,
    settings: Settings,
    redactor: Arc<Redactor>,
}

impl Roster {
    pub(super) fn new(entries: Vec<KeyEntry>, settings: Settings) -> Self {
        let redactor = Arc::new(Redactor::new([].into_iter()));
        Self { keys: Vec::new(), settings, redactor }.following(entries, settings)
    }

    /// The roster of `entries`. What is known of this roster's keys and workspaces goes on.
    pub(super) fn following(&self, entries: Vec<KeyEntry>, settings: Settings) -> Self {
        let mut keys: Vec<Arc<Key>> = Vec::with_capacity(entries.len());
        for (position, entry) in entries.into_iter().enumerate() {
            let before = self.keys.iter().find(|key| key.api_key.fingerprint() == entry.key.fingerprint());
            if let Some(same) = before.filter(|key| key.is(&entry)) {
                same.position.store(position, Ordering::Release);
                keys.push(Arc::clone(same));
                continue;
            }
            let workspace = match &entry.workspace {
                Some(name) => {
                    let mut known = keys.iter().chain(&self.keys).map(|key| &key.workspace);
                    known.find(|workspace| workspace.name.as_ref() == Some(name)).map(Arc::clone)
                }
                // A key that was alone and got another name is still the same workspace.
                None => before.map(|key| &key.workspace).filter(|own| own.name.is_none()).map(Arc::clone),
            };
            let workspace = workspace.unwrap_or_else(|| Arc::new(Workspace::new(entry.workspace)));
            let key = Key::new(position, entry.key, entry.name, workspace, entry.authority);
            // Whatever it is called now, the provider said this of this key.
            if let Some(park) = before.and_then(|key| key.parked()) {
                key.park(park);
            }
            keys.push(Arc::new(key));
        }
        let redactor = Arc::new(Redactor::new(keys.iter().map(|key| &key.api_key)));
        Self { keys, settings, redactor }
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

    /// Finds its keys in what is relayed.
    #[must_use]
    pub fn redactor(&self) -> &Arc<Redactor> {
        &self.redactor
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }
}

/// A key: what opens a workspace.
///
/// Keys that different cores touch must not share a cache line, hence the alignment (two lines,
/// because processors fetch them in pairs).
#[repr(align(128))]
pub struct Key {
    /// In the latest roster, for people.
    position: AtomicUsize,
    api_key: ApiKey,
    name: Option<String>,
    workspace: Arc<Workspace>,
    authority: Option<Arc<Authority>>,
    park: ParkCell,
    in_flight: AtomicU32,
    announced: Announced,
}

impl Key {
    fn new(
        position: usize,
        api_key: ApiKey,
        name: Option<String>,
        workspace: Arc<Workspace>,
        authority: Option<Arc<Authority>>,
    ) -> Self {
        Self {
            position: AtomicUsize::new(position),
            api_key,
            name,
            workspace,
            authority,
            park: ParkCell::default(),
            in_flight: AtomicU32::new(0),
            announced: Announced::default(),
        }
    }

    /// Whether it is what `entry` asks for.
    fn is(&self, entry: &KeyEntry) -> bool {
        self.name == entry.name && self.workspace.name == entry.workspace && self.authority == entry.authority
    }

    /// Its place in the pool, from 0; the last one when it is in the pool no more.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position.load(Ordering::Acquire)
    }

    /// The secret.
    #[must_use]
    pub fn api_key(&self) -> &ApiKey {
        &self.api_key
    }

    /// What people call it, if they gave it a name.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Where it works, if not where all do.
    #[must_use]
    pub fn authority(&self) -> Option<&Arc<Authority>> {
        self.authority.as_ref()
    }

    /// Where it belongs.
    #[must_use]
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    /// Requests that hold a lease on it now.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Acquire)
    }

    /// How it stands at `now`.
    #[must_use]
    pub fn standing(&self, now: UnixMs) -> Standing {
        Standing::of(self.park.load(), self.workspace.park.load(), &self.workspace.quota(now), now)
    }

    /// Its own park, whether it still holds or not.
    #[must_use]
    pub fn parked(&self) -> Option<Park> {
        self.park.load()
    }

    pub(super) fn park(&self, park: Park) {
        self.park.join(park);
    }

    pub(super) fn pardon(&self, reason: ParkReason) {
        self.park.pardon(reason);
    }

    pub(super) fn announce(&self, standing: Standing, quota: Quota, is_near: bool) -> Option<Change> {
        self.announced.update(standing, quota, is_near)
    }

    pub(super) fn enter(&self) {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        self.workspace.in_flight.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
        self.workspace.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({} {})", self.position(), self.api_key.short())
    }
}

/// A workspace: what owns credits, concurrency and resources.
#[repr(align(128))]
#[derive(Debug)]
pub struct Workspace {
    name: Option<String>,
    quota: QuotaCell,
    park: ParkCell,
    in_flight: AtomicU32,
    tier: ArcSwapOption<String>,
}

impl Workspace {
    fn new(name: Option<String>) -> Self {
        Self {
            name,
            quota: QuotaCell::default(),
            park: ParkCell::default(),
            in_flight: AtomicU32::new(0),
            tier: ArcSwapOption::empty(),
        }
    }

    /// Its name, when it was configured.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Its credits as they stand at `now`.
    #[must_use]
    pub fn quota(&self, now: UnixMs) -> Quota {
        self.quota.load(now)
    }

    /// Its plan, when the provider has told.
    #[must_use]
    pub fn tier(&self) -> Option<Arc<String>> {
        self.tier.load_full()
    }

    /// Requests that hold a lease on one of its keys now.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Its park, whether it still holds or not.
    #[must_use]
    pub fn parked(&self) -> Option<Park> {
        self.park.load()
    }

    pub(super) fn park(&self, park: Park) {
        self.park.join(park);
    }

    pub(super) fn spend(&self, credits: u64, now: UnixMs) {
        self.quota.spend(credits, now);
    }

    pub(super) fn observe(&self, theirs: Quota, tier: Option<String>, now: UnixMs, lag: Duration) {
        // Figures lag: one that only repeats the old period does not undo a refusal.
        if self.quota.adopt(theirs, now, lag) {
            self.park.pardon(ParkReason::Exhausted);
        }
        self.tier.store(tier.map(Arc::new));
    }

    pub(super) fn restore(&self, quota: Quota, park: Option<Park>) {
        self.quota.restore(quota);
        if let Some(park) = park {
            self.park.join(park);
        }
    }
}
