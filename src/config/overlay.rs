//! Defines the overlay `managed.toml`: keys, paused keys and clients that operators changed at runtime.
//!
//! The overlay is in the state directory and is read after the operator's configuration file, which Keychoir never
//! edits. Its `[[keys]]` and `[[clients]]` tables use the notation of that file, so that the same parsers validate
//! them. Keys that were added at runtime are in separate files, `managed_keys/NAME`, so that the overlay contains no
//! secret.
//!
//! Each entry contains the time of its last change, and a removed entry leaves a `[[removed]]` table with that time, so
//! that the overlays of several replicas can be merged.

mod directory;
mod reader;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use directory::{FileError, KEYS_DIRECTORY, LockError, StateDirectory, StateLock};
pub use reader::PausedKeyConfig;
pub(super) use reader::{
    add_keys, apply_clients, check_removed_entries, parse_generation, parse_paused_keys,
};

use crate::policy::client::Rules;
use crate::policy::rfc3339;
use crate::policy::units::UnixMs;

/// The contents of the overlay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Overlay {
    /// A number that increases with each change, by which clients of the admin API detect concurrent changes.
    pub generation: u64,
    /// Keys that are added to the configured keys.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<ManagedKey>,
    /// Keys that serve no new requests.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paused_keys: Vec<PausedKey>,
    /// Clients that are added, and changes of configured clients.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub clients: Vec<ManagedClient>,
    /// Entries that were removed, so that an older overlay of another replica does not restore them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<RemovedEntry>,
}

/// A key that was added at runtime.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManagedKey {
    /// The key name.
    pub name: String,
    /// The path of the key file, relative to the state directory.
    pub key_file: String,
    /// The name of the workspace whose credits the key uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workspace: Option<String>,
    /// The base URL of the key's host. `None` means `upstream.base_url`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_url: Option<String>,
    /// The key's weight relative to other keys. `None` means a weight of 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// The time of the entry's last change, which can be ahead of the clock.
    #[serde(default, skip_serializing_if = "is_zero", with = "rfc3339")]
    pub changed_at: UnixMs,
    /// Whether the key is not used, because the entry of another replica conflicts with the configuration file of
    /// this machine.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left_out: bool,
}

/// A key that serves no new requests.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PausedKey {
    /// The fingerprint of the key, 64 hexadecimal digits.
    pub fingerprint: String,
    /// The short form of the key, for readers of the file.
    pub short_key: String,
    /// The start of the pause.
    #[serde(with = "rfc3339")]
    pub since: UnixMs,
    /// The time at which the key is resumed. If it is `None`, only an operator resumes the key.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "rfc3339::optional")]
    pub until: Option<UnixMs>,
    /// The operator's reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The time of the entry's last change, which can be ahead of the clock.
    #[serde(default, skip_serializing_if = "is_zero", with = "rfc3339")]
    pub changed_at: UnixMs,
}

impl PausedKey {
    /// Returns whether the pause has not ended at `now`.
    #[must_use]
    pub fn is_active(&self, now: UnixMs) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

/// The kind of an entry of the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// A key that was added at runtime.
    Key,
    /// A pause of a key.
    PausedKey,
    /// A client that was added or changed at runtime.
    Client,
}

/// An entry that was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemovedEntry {
    /// The kind of the removed entry.
    pub kind: EntryKind,
    /// The fingerprint of the key, or the client name.
    pub id: String,
    /// The time of the removal, which can be ahead of the clock.
    #[serde(with = "rfc3339")]
    pub changed_at: UnixMs,
}

/// A client that was added or changed at runtime. If it has no rules, the client of the configuration file with the
/// same name keeps its rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct ManagedClient {
    /// The client name.
    pub name: String,
    /// SHA-256 of the client token. If it is `None`, the token of the configuration file stays valid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_sha256: Option<String>,
    /// The time at which the token expires, even if the token is from the configuration file.
    #[serde(skip_serializing_if = "Option::is_none", with = "rfc3339::optional")]
    pub expires_at: Option<UnixMs>,
    /// SHA-256 of the token that the last rotation replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous_token_sha256: Option<String>,
    /// The time at which the previous token expires.
    #[serde(skip_serializing_if = "Option::is_none", with = "rfc3339::optional")]
    pub previous_token_expires_at: Option<UnixMs>,
    /// SHA-256 of the token in the configuration file that the rotation or revocation replaced. If the file contains a
    /// different token, the operator wrote it after that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replaced_token_sha256: Option<String>,
    /// Whether the client of the configuration file was revoked.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub revoked: bool,
    /// The time of the entry's last change, which can be ahead of the clock.
    #[serde(skip_serializing_if = "is_zero", with = "rfc3339")]
    pub changed_at: UnixMs,
    /// Whether the entry has no effect, because the entry of another replica conflicts with the configuration file
    /// of this machine.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub left_out: bool,
    /// The limits and access rules of the client.
    #[serde(flatten)]
    pub rules: ManagedRules,
}

/// The rules of a client in the notation of `[[clients]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct ManagedRules {
    /// The client quota, such as `50 requests per day`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota: Option<String>,
    /// The quota of each end user of the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_quota: Option<String>,
    /// The rate limit of the client, such as `60 per minute`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<String>,
    /// The concurrency limit of the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_concurrent: Option<u32>,
    /// Prefixes of the paths that the client may use.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
    /// Names of the keys that may serve the client.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// Names of the workspaces whose keys may serve the client.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub workspaces: Vec<String>,
    /// Whether the client may bring its own key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bring_your_own_key: Option<bool>,
    /// Whether the client may request provider tokens although it has a quota.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider_tokens: Option<bool>,
}

impl From<&Rules> for ManagedRules {
    fn from(rules: &Rules) -> Self {
        let Rules {
            quota,
            user_quota,
            rate_limit,
            max_concurrent,
            paths,
            allowed_keys,
            may_bring_key,
            may_request_tokens,
        } = rules;
        Self {
            quota: quota.map(|quota| quota.to_string()),
            user_quota: user_quota.map(|quota| quota.to_string()),
            rate_limit: rate_limit.map(|rate_limit| rate_limit.to_string()),
            max_concurrent: *max_concurrent,
            paths: paths.clone(),
            keys: allowed_keys.keys.clone(),
            workspaces: allowed_keys.workspaces.clone(),
            bring_your_own_key: may_bring_key.then_some(true),
            provider_tokens: may_request_tokens.then_some(true),
        }
    }
}

/// The first line of the overlay.
const FIRST_LINE: &str = "# Written by Keychoir (`keychoir keys`, `keychoir clients` and the admin API). Do not edit it while \
     Keychoir runs.\n";

impl Overlay {
    /// Returns whether an entry with the given `name` has no effect on this machine. Pauses are never left out.
    #[must_use]
    pub fn is_left_out(&self, kind: EntryKind, name: &str) -> bool {
        match kind {
            EntryKind::Key => self.keys.iter().any(|entry| entry.left_out && entry.name == name),
            EntryKind::Client => self.clients.iter().any(|entry| entry.left_out && entry.name == name),
            EntryKind::PausedKey => false,
        }
    }

    /// Parses the overlay. Loading the configuration validates its values and reports mistakes with their
    /// positions.
    ///
    /// # Errors
    ///
    /// Fails when the text is not an overlay. The message contains the line.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    /// Formats the overlay in TOML.
    ///
    /// # Errors
    ///
    /// Fails when a number does not fit into TOML.
    pub fn format(&self) -> Result<String, String> {
        let text = toml::to_string(self).map_err(|error| error.to_string())?;
        Ok(format!("{FIRST_LINE}{text}"))
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference to the field")]
fn is_zero(time: &UnixMs) -> bool {
    *time == UnixMs(0)
}
