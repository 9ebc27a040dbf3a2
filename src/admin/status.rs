//! Renders the document of `GET /api/elevenlabs-status`: the status and the credits of each key, the number of keys by
//! status, and the sum of the remaining credits. The format of the document is fixed, because apps rely on it.

use std::collections::HashSet;
use std::ptr;

use serde::Serialize;

use crate::policy::key_state::KeyStatus;
use crate::policy::units::UnixMs;
use crate::pool::KeySnapshot;

/// The status document. Its fields and their names must not change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusDocument {
    total_keys: usize,
    /// Number of active keys that are not paused. A paused key has the status in `keys` that it would have without
    /// the pause.
    active_keys: usize,
    exhausted_keys: usize,
    /// Number of keys whose credits are almost used up. A key whose credits are used up is not counted.
    near_limit_keys: usize,
    /// The remaining credits of all workspaces with a key that is active or rate limited, and not paused.
    total_remaining_characters: u64,
    keys: Vec<KeyStatusDocument>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct KeyStatusDocument {
    short_key: String,
    status: &'static str,
    character_count: u64,
    character_limit: u64,
    remaining_characters: u64,
    /// The used part of the limit in percent, rounded down, so that 100 means that no credits are left.
    usage_percentage: u64,
    is_over_limit: bool,
    is_near_limit: bool,
    next_reset_date: Option<String>,
}

impl StatusDocument {
    /// Creates the document for `keys`, whose order it keeps.
    #[must_use]
    pub fn new(keys: &[KeySnapshot]) -> Self {
        let count_with_status = |status| keys.iter().filter(|key| key.state.status() == status).count();
        let is_active =
            |key: &&KeySnapshot| key.state.status() == KeyStatus::Active && !key.state.is_paused();
        Self {
            total_keys: keys.len(),
            active_keys: keys.iter().filter(is_active).count(),
            exhausted_keys: count_with_status(KeyStatus::Exhausted),
            near_limit_keys: keys
                .iter()
                .filter(|key| key.is_near_limit && !key.quota.is_over_limit())
                .count(),
            total_remaining_characters: total_remaining(keys),
            keys: keys.iter().map(KeyStatusDocument::new).collect(),
        }
    }
}

/// Counts each workspace once, because its keys share their credits.
fn total_remaining(keys: &[KeySnapshot]) -> u64 {
    let mut counted_workspaces = HashSet::new();
    keys.iter()
        .filter(|key| !key.state.is_paused())
        .filter(|key| matches!(key.state.status(), KeyStatus::Active | KeyStatus::RateLimited))
        .filter(|key| counted_workspaces.insert(ptr::from_ref(key.key.workspace())))
        .fold(0, |total: u64, key| total.saturating_add(key.quota.remaining()))
}

impl KeyStatusDocument {
    fn new(snapshot: &KeySnapshot) -> Self {
        let KeySnapshot { key, state, quota, is_near_limit, .. } = snapshot;
        Self {
            short_key: key.api_key().short().to_string(),
            status: state.status().as_str(),
            character_count: quota.count,
            character_limit: quota.limit.unwrap_or(0),
            remaining_characters: quota.remaining(),
            usage_percentage: quota.usage_percent(),
            is_over_limit: quota.is_over_limit(),
            is_near_limit: *is_near_limit,
            next_reset_date: quota.resets_at.map(UnixMs::rfc3339),
        }
    }
}
