//! Merges the overlays of replicas: the latest version of each entry is kept, removed entries are remembered, and keys
//! with the same name get different names. Also converts overlays to the mergeable [`OverlayState`] and back, lists the
//! changed entries, and checks the states of other replicas. The functions of this module are pure.
//!
//! An entry is identified by the fingerprint of its key or the name of its client, and has the time of its last
//! change. Of two versions of an entry, the later one is kept. Versions of the same millisecond are ordered by their
//! content, and a removal comes last. A merge is thus the maximum of a total order for each entry, so that replicas
//! that have received the same versions are equal, whatever the order and the number of the messages.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::edit::KeyFile;
use crate::admin::control::is_valid_reason;
use crate::config::{
    EntryKind, KEYS_DIRECTORY, ManagedClient, ManagedKey, Overlay, PausedKey, RemovedEntry, is_valid_name,
};
use crate::policy::units::UnixMs;
use crate::secret::{ApiKey, Fingerprint};

/// The time for which a removal and an ended pause are remembered. A replica that was stopped for longer restores
/// the entries that were removed meanwhile. A month is longer than a replica is usually absent, and a program that
/// adds and revokes 100 clients a day fills a quarter of the overlay's maximum size in this time.
const REMOVAL_RETENTION: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Latest accepted time of a change, 2100-01-01. A later time is a mistake of a clock, and each further change would
/// have to be later still.
const MAX_CHANGE_TIME: UnixMs = UnixMs(4_102_444_800_000);

/// Number of fingerprint digits that make a key name unique.
const SUFFIX_DIGITS: usize = 6;

/// Maximum number of bytes in a name before the suffix, so that the complete name has at most 64 bytes.
const MAX_SUFFIXED_BYTES: usize = 64 - 1 - SUFFIX_DIGITS;

/// The keys that are stored in files, by the `key_file` of their entries in the overlay.
pub(super) type KeySecrets = HashMap<String, ApiKey>;

/// A key that was added at runtime, with its secret.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SharedKey {
    pub(super) key: String,
    pub(super) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) workspace: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) base_url: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) weight: Option<u32>,
}

impl fmt::Debug for SharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedKey").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The content of a version. Of two versions with the same time, the one with the greater content is kept.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum EntryContent<T> {
    /// The entry exists with this content.
    Present(T),
    /// The entry was removed. This is the greatest content.
    Removed,
}

impl<T> EntryContent<T> {
    fn present(&self) -> Option<&T> {
        match self {
            Self::Present(content) => Some(content),
            Self::Removed => None,
        }
    }
}

/// A version of an entry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EntryVersion<T> {
    /// The time of the change in milliseconds, which can be ahead of the clock.
    pub(super) changed_at: UnixMs,
    pub(super) content: EntryContent<T>,
}

impl<T> EntryVersion<T> {
    fn present(changed_at: UnixMs, content: T) -> Self {
        Self { changed_at, content: EntryContent::Present(content) }
    }
}

/// The latest version of each entry, by its identifier.
pub(super) type Entries<T> = BTreeMap<String, EntryVersion<T>>;

/// All entries of an overlay. The entries themselves contain neither `changed_at` nor `left_out`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OverlayState {
    /// The keys, by fingerprint.
    pub(super) keys: Entries<SharedKey>,
    /// The pauses, by the fingerprint of the paused key.
    pub(super) paused_keys: Entries<PausedKey>,
    /// The clients, by name.
    pub(super) clients: Entries<ManagedClient>,
}

/// The names of entries that differ between two states, for the record of changes.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct ChangedNames {
    pub(super) keys: Vec<String>,
    pub(super) paused_keys: Vec<String>,
    pub(super) clients: Vec<String>,
}

impl OverlayState {
    /// Collects the entries of an overlay, whose keys are in `secrets`. An entry whose key is missing there is not
    /// shared.
    pub(super) fn new(overlay: &Overlay, secrets: &KeySecrets) -> Self {
        let mut state = Self::default();
        for RemovedEntry { kind, id, changed_at } in overlay.removed.clone() {
            match kind {
                EntryKind::Key => insert_removed(&mut state.keys, id, changed_at),
                EntryKind::PausedKey => insert_removed(&mut state.paused_keys, id, changed_at),
                EntryKind::Client => insert_removed(&mut state.clients, id, changed_at),
            }
        }
        // An entry that an operator has added again replaces its removal. `stamp_changes` sets its time.
        for entry in &overlay.keys {
            let Some(key) = secrets.get(&entry.key_file) else { continue };
            let ManagedKey { name, key_file: _, workspace, base_url, weight, changed_at, left_out: _ } =
                entry.clone();
            let shared_key = SharedKey { key: key.expose().to_owned(), name, workspace, base_url, weight };
            state.keys.insert(key.fingerprint().to_string(), EntryVersion::present(changed_at, shared_key));
        }
        for entry in overlay.paused_keys.iter().cloned() {
            let (id, changed_at) = (entry.fingerprint.clone(), entry.changed_at);
            let entry = PausedKey { changed_at: UnixMs(0), ..entry };
            state.paused_keys.insert(id, EntryVersion::present(changed_at, entry));
        }
        for entry in overlay.clients.iter().cloned() {
            let (id, changed_at) = (entry.name.clone(), entry.changed_at);
            let entry = ManagedClient { changed_at: UnixMs(0), left_out: false, ..entry };
            state.clients.insert(id, EntryVersion::present(changed_at, entry));
        }
        state
    }

    /// Merges the entries of another replica into this state. The later version of each entry is kept.
    #[must_use]
    pub(super) fn merge(mut self, other: Self) -> Self {
        let Self { keys, paused_keys, clients } = other;
        merge_entries(&mut self.keys, keys);
        merge_entries(&mut self.paused_keys, paused_keys);
        merge_entries(&mut self.clients, clients);
        self
    }

    /// Sets the time of each entry that differs from `previous`, and remembers the removal of missing entries. The
    /// time is later than every earlier change, even if the clock lags behind the clock of another replica.
    pub(super) fn stamp_changes(&mut self, previous: &Self, now: UnixMs) {
        let changed_at = now.max(UnixMs(previous.last_change().0.saturating_add(1)));
        stamp_entries(&mut self.keys, &previous.keys, changed_at);
        stamp_entries(&mut self.paused_keys, &previous.paused_keys, changed_at);
        stamp_entries(&mut self.clients, &previous.clients, changed_at);
    }

    /// Returns the time of the last change, or 1970-01-01 if there was no change.
    pub(super) fn last_change(&self) -> UnixMs {
        let Self { keys, paused_keys, clients } = self;
        let keys = keys.values().map(|entry| entry.changed_at);
        let paused_keys = paused_keys.values().map(|entry| entry.changed_at);
        let clients = clients.values().map(|entry| entry.changed_at);
        keys.chain(paused_keys).chain(clients).max().unwrap_or_default()
    }

    /// Forgets removals and ended pauses of more than 30 days ago.
    pub(super) fn forget_old(&mut self, now: UnixMs) {
        let is_kept = |time: UnixMs| time.plus(REMOVAL_RETENTION) > now;
        self.keys.retain(|_, entry| entry.content.present().is_some() || is_kept(entry.changed_at));
        self.clients.retain(|_, entry| entry.content.present().is_some() || is_kept(entry.changed_at));
        self.paused_keys.retain(|_, entry| match entry.content.present() {
            // An ended pause is remembered like a removal: an older version of it may have no end.
            Some(paused) => paused.until.is_none_or(|until| is_kept(until.max(entry.changed_at))),
            None => is_kept(entry.changed_at),
        });
    }

    /// Gives different names to keys with the same name, which two replicas can add at the same time. The key with the
    /// earliest change keeps its name. All replicas give the same names with the same times.
    pub(super) fn resolve_names(&mut self) {
        let mut by_age: Vec<(UnixMs, String)> =
            self.keys.iter().map(|(id, entry)| (entry.changed_at, id.clone())).collect();
        by_age.sort();
        let mut names = HashSet::new();
        for (_, id) in by_age {
            let Some(EntryVersion { changed_at, content: EntryContent::Present(key) }) =
                self.keys.get_mut(&id)
            else {
                continue;
            };
            if names.insert(key.name.clone()) {
                continue;
            }
            let (prefix, suffix) = (key.name.get(..MAX_SUFFIXED_BYTES), id.get(..SUFFIX_DIGITS));
            key.name = format!("{}-{}", prefix.unwrap_or(&key.name), suffix.unwrap_or(&id));
            names.insert(key.name.clone());
            *changed_at = UnixMs(changed_at.0.saturating_add(1));
        }
    }

    /// Replaces the entries of `overlay`, whose keys are in `secrets`, and returns the new key files. Entries that do
    /// not change keep their positions and files.
    pub(super) fn write_to(&self, overlay: &mut Overlay, secrets: &KeySecrets) -> Vec<KeyFile> {
        let new_files = self.write_keys(overlay, secrets);
        write_entries(
            &self.paused_keys,
            &mut overlay.paused_keys,
            |entry| &entry.fingerprint,
            |entry, time| PausedKey { changed_at: time, ..entry.clone() },
        );
        let left_out: HashSet<String> =
            overlay.clients.iter().filter(|entry| entry.left_out).map(|entry| entry.name.clone()).collect();
        write_entries(
            &self.clients,
            &mut overlay.clients,
            |entry| &entry.name,
            |entry, time| ManagedClient {
                changed_at: time,
                left_out: left_out.contains(&entry.name),
                ..entry.clone()
            },
        );
        overlay.removed = removed_entries(&self.keys, EntryKind::Key)
            .chain(removed_entries(&self.paused_keys, EntryKind::PausedKey))
            .chain(removed_entries(&self.clients, EntryKind::Client))
            .collect();
        new_files
    }

    /// Replaces the key entries of `overlay` and returns the new key files.
    fn write_keys(&self, overlay: &mut Overlay, secrets: &KeySecrets) -> Vec<KeyFile> {
        let mut used_files: HashSet<String> =
            overlay.keys.iter().map(|entry| entry.key_file.clone()).collect();
        let mut unwritten: BTreeMap<&str, (&SharedKey, UnixMs)> = present_entries(&self.keys).collect();
        overlay.keys.retain_mut(|entry| {
            let id = secrets.get(&entry.key_file).map(|key| key.fingerprint().to_string());
            let Some((key, changed_at)) = id.and_then(|id| unwritten.remove(id.as_str())) else {
                return false;
            };
            let (key_file, left_out) = (std::mem::take(&mut entry.key_file), entry.left_out);
            *entry = ManagedKey { left_out, ..key_entry(key, key_file, changed_at) };
            true
        });
        let mut new_files = Vec::new();
        for (id, (key, changed_at)) in unwritten {
            // `check_entries` has refused a document with an invalid key.
            let Ok(secret) = ApiKey::new(&key.key) else { continue };
            let name = unused_file_name(&key.name, id, |file| used_files.contains(file));
            used_files.insert(key_file_path(&name));
            overlay.keys.push(key_entry(key, key_file_path(&name), changed_at));
            new_files.push(KeyFile { name, key: secret });
        }
        new_files
    }

    /// Returns the names of the entries that differ from `previous`.
    pub(super) fn names_changed_since(&self, previous: &Self) -> ChangedNames {
        ChangedNames {
            keys: changed_names(&self.keys, &previous.keys, |key| key.name.clone()),
            paused_keys: changed_names(&self.paused_keys, &previous.paused_keys, |key| key.short_key.clone()),
            clients: changed_names(&self.clients, &previous.clients, |client| client.name.clone()),
        }
    }

    /// Checks the entries and the times of another replica. A valid name is a safe file name, and a valid key is safe
    /// in a header.
    ///
    /// # Errors
    ///
    /// Returns the reason, which contains no value of an entry.
    pub(super) fn check_entries(&self) -> Result<(), &'static str> {
        if self.last_change() > MAX_CHANGE_TIME {
            return Err("a time of a change is not plausible: check the clocks of the replicas");
        }
        for (id, (key, _)) in present_entries(&self.keys) {
            if ApiKey::new(&key.key).is_err() || Fingerprint::new(&key.key).to_string() != id {
                return Err("a key is invalid");
            }
            if !is_valid_name(&key.name) {
                return Err("the name of a key is invalid");
            }
        }
        for (id, (paused, _)) in present_entries(&self.paused_keys) {
            let has_valid_id = paused.fingerprint == id && Fingerprint::parse(id).is_some();
            let is_stamped = paused.changed_at != UnixMs(0);
            let has_valid_reason = paused.reason.as_deref().is_none_or(is_valid_reason);
            if !has_valid_id
                || is_stamped
                || !has_valid_reason
                || paused.short_key.chars().any(char::is_control)
            {
                return Err("a pause is invalid");
            }
        }
        for (id, (client, _)) in present_entries(&self.clients) {
            if client.name != id || !is_valid_name(id) || client.left_out || client.changed_at != UnixMs(0) {
                return Err("a client is invalid");
            }
        }
        Ok(())
    }
}

/// Returns the path of a key file relative to the state directory.
pub(super) fn key_file_path(name: &str) -> String {
    format!("{KEYS_DIRECTORY}/{name}")
}

/// Returns the file name of a new key: the key name, followed by the key's fingerprint if `is_used` returns true for
/// that file. The file of a removed key is deleted only after the overlay is written, and must not be overwritten
/// before.
pub(super) fn unused_file_name(name: &str, fingerprint: &str, is_used: impl Fn(&str) -> bool) -> String {
    if is_used(&key_file_path(name)) { format!("{name}-{fingerprint}") } else { name.to_owned() }
}

fn key_entry(key: &SharedKey, key_file: String, changed_at: UnixMs) -> ManagedKey {
    let SharedKey { key: _, name, workspace, base_url, weight } = key.clone();
    ManagedKey { name, key_file, workspace, base_url, weight, changed_at, left_out: false }
}

fn insert_removed<T>(entries: &mut Entries<T>, id: String, changed_at: UnixMs) {
    entries.insert(id, EntryVersion { changed_at, content: EntryContent::Removed });
}

fn merge_entries<T: Ord>(own: &mut Entries<T>, other: Entries<T>) {
    for (id, version) in other {
        if own.get(&id).is_none_or(|current| *current < version) {
            own.insert(id, version);
        }
    }
}

/// Sets the time of each entry that differs from `previous` to `changed_at`, and adds a removal for each entry that is
/// missing.
fn stamp_entries<T: Clone + PartialEq>(entries: &mut Entries<T>, previous: &Entries<T>, changed_at: UnixMs) {
    for (id, entry) in entries.iter_mut() {
        let unchanged = previous.get(id).filter(|earlier| earlier.content == entry.content);
        entry.changed_at = unchanged.map_or(changed_at, |earlier| earlier.changed_at);
    }
    for id in previous.keys().filter(|id| !entries.contains_key(*id)).cloned().collect::<Vec<_>>() {
        entries.insert(id, EntryVersion { changed_at, content: EntryContent::Removed });
    }
}

/// Returns the identifiers of the entries that are not removed, with their contents and the times of their last
/// changes.
fn present_entries<T>(entries: &Entries<T>) -> impl Iterator<Item = (&str, (&T, UnixMs))> {
    entries.iter().filter_map(|(id, entry)| Some((id.as_str(), (entry.content.present()?, entry.changed_at))))
}

fn removed_entries<T>(entries: &Entries<T>, kind: EntryKind) -> impl Iterator<Item = RemovedEntry> {
    let removed = entries.iter().filter(|(_, entry)| entry.content.present().is_none());
    removed.map(move |(id, entry)| RemovedEntry { kind, id: id.clone(), changed_at: entry.changed_at })
}

/// Replaces the entries of a list of the overlay in place, removes those that `entries` does not contain, and appends
/// new ones.
fn write_entries<T>(
    entries: &Entries<T>,
    list: &mut Vec<T>,
    id_of: impl Fn(&T) -> &str,
    with_time: impl Fn(&T, UnixMs) -> T,
) {
    let mut unwritten: BTreeMap<&str, (&T, UnixMs)> = present_entries(entries).collect();
    list.retain_mut(|entry| match unwritten.remove(id_of(entry)) {
        Some((content, changed_at)) => {
            *entry = with_time(content, changed_at);
            true
        }
        None => false,
    });
    list.extend(unwritten.into_values().map(|(content, changed_at)| with_time(content, changed_at)));
}

/// Returns the names of the entries that differ from `previous`. The name of a removed entry is the name that it had.
fn changed_names<T: PartialEq>(
    next: &Entries<T>,
    previous: &Entries<T>,
    name: impl Fn(&T) -> String,
) -> Vec<String> {
    let changed_entries = next.iter().filter(|(id, entry)| previous.get(*id) != Some(*entry));
    changed_entries
        .map(|(id, entry)| {
            let earlier = || previous.get(id).and_then(|earlier| earlier.content.present());
            entry.content.present().or_else(earlier).map_or_else(|| short_id(id), &name)
        })
        .collect()
}

/// Shortens an identifier to the length of a key id, so that the record contains no whole fingerprint.
fn short_id(id: &str) -> String {
    id.chars().take(crate::secret::KEY_ID_DIGITS).collect()
}

#[cfg(test)]
mod tests;
