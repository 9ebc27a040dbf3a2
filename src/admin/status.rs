//! The document of `GET /api/elevenlabs-status`, in the fixed format that apps rely on.

use serde::Serialize;

use crate::policy::key_state::KeyStatus;
use crate::policy::units::UnixMs;
use crate::pool::KeySnapshot;

/// The whole document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusDocument {
    total_keys: usize,
    active_keys: usize,
    exhausted_keys: usize,
    /// Keys near the limit and not yet over it.
    near_limit_keys: usize,
    /// Of keys that are usable or only in a cooldown; each workspace counts once.
    total_remaining_characters: u64,
    keys: Vec<KeyStatusEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct KeyStatusEntry {
    short_key: String,
    status: &'static str,
    character_count: u64,
    character_limit: u64,
    remaining_characters: u64,
    /// Whole percent, rounded down: 100 means that no credits are left.
    usage_percentage: u64,
    is_over_limit: bool,
    is_near_limit: bool,
    next_reset_date: Option<String>,
}

impl StatusDocument {
    /// The document for these keys, in their order.
    #[must_use]
    pub fn of(keys: &[KeySnapshot]) -> Self {
        let with_status = |status| keys.iter().filter(|key| key.state.status() == status).count();
        Self {
            total_keys: keys.len(),
            active_keys: with_status(KeyStatus::Active),
            exhausted_keys: with_status(KeyStatus::Exhausted),
            near_limit_keys: keys
                .iter()
                .filter(|key| key.is_near_limit && !key.quota.is_over_limit())
                .count(),
            total_remaining_characters: total_remaining(keys),
            keys: keys.iter().map(entry).collect(),
        }
    }
}

fn total_remaining(keys: &[KeySnapshot]) -> u64 {
    let is_usable =
        |key: &KeySnapshot| matches!(key.state.status(), KeyStatus::Active | KeyStatus::RateLimited);
    let mut total = 0_u64;
    for (index, key) in keys.iter().enumerate().filter(|(_, key)| is_usable(key)) {
        let same = |other: &KeySnapshot| std::ptr::eq(other.key.workspace(), key.key.workspace());
        if !keys[..index].iter().any(|earlier| is_usable(earlier) && same(earlier)) {
            total = total.saturating_add(key.quota.remaining());
        }
    }
    total
}

fn entry(snapshot: &KeySnapshot) -> KeyStatusEntry {
    let KeySnapshot { key, state, quota, is_near_limit, .. } = snapshot;
    KeyStatusEntry {
        short_key: key.api_key().short().to_string(),
        status: state.status().word(),
        character_count: quota.count,
        character_limit: quota.limit.unwrap_or(0),
        remaining_characters: quota.remaining(),
        usage_percentage: quota.usage_percent(),
        is_over_limit: quota.is_over_limit(),
        is_near_limit: *is_near_limit,
        next_reset_date: quota.resets_at.map(UnixMs::rfc3339),
    }
}
