//! The document of `GET /api/keychoir-keys`: what the contract's status document has no room for.

use serde::Serialize;

use crate::pool::KeySnapshot;

/// The whole document, in pool order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeyDetails {
    keys: Vec<KeyDetail>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct KeyDetail {
    short_key: String,
    name: Option<String>,
    /// As it is configured; keys without one are workspaces of their own.
    workspace: Option<String>,
    /// As the provider calls it.
    plan: Option<String>,
    /// By how many credits the provider's figures of this period were above ours, since the start.
    drift: i64,
    in_flight: u32,
}

impl KeyDetails {
    /// The document for these keys.
    #[must_use]
    pub fn of(keys: &[KeySnapshot]) -> Self {
        let detail = |seen: &KeySnapshot| {
            let workspace = seen.key.workspace();
            KeyDetail {
                short_key: seen.key.api_key().short().to_string(),
                name: seen.key.name().map(str::to_owned),
                workspace: workspace.name().map(str::to_owned),
                plan: workspace.tier().map(|tier| tier.to_string()),
                drift: workspace.drift(),
                in_flight: seen.key.in_flight(),
            }
        };
        Self { keys: keys.iter().map(detail).collect() }
    }
}
