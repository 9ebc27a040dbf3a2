//! The document of `GET /api/keychoir-keys`: what the contract's status document has no room for.

use serde::Serialize;

use crate::policy::forecast::Forecast;
use crate::policy::units::UnixMs;
use crate::pool::{KeySnapshot, Pool};

/// The whole document, in pool order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyDetails {
    /// Requests that wait for a key.
    waiting: usize,
    /// When all credits will be gone at this rate, if that is before any come back.
    spent_by: Option<String>,
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
    /// Credits of its workspace that requests under way may still spend.
    reserved: u64,
    /// Credits a day that its workspace spends, at the rate of the last hours.
    spent_per_day: u64,
    /// When its workspace's credits will be gone at this rate, if that is before they come back.
    spent_by: Option<String>,
}

impl KeyDetails {
    /// The document for the keys of `pool` at `now`.
    #[must_use]
    pub fn of(pool: &Pool, now: UnixMs) -> Self {
        let detail = |seen: &KeySnapshot| {
            let workspace = seen.key.workspace();
            KeyDetail {
                short_key: seen.key.api_key().short().to_string(),
                name: seen.key.name().map(str::to_owned),
                workspace: workspace.belonging().name().map(str::to_owned),
                plan: workspace.tier().map(|tier| tier.to_string()),
                drift: workspace.drift(),
                in_flight: seen.key.in_flight(),
                reserved: workspace.reserved(),
                spent_per_day: whole(workspace.spent_per_day(now)),
                spent_by: date(seen.forecast),
            }
        };
        Self {
            waiting: pool.waiting(),
            spent_by: date(pool.forecast(now)),
            keys: pool.snapshot(now).iter().map(detail).collect(),
        }
    }
}

fn date(forecast: Forecast) -> Option<String> {
    match forecast {
        Forecast::SpentBy(at) => Some(at.rfc3339()),
        Forecast::Lasts | Forecast::Unknown => None,
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate for people, saturating")]
fn whole(credits: f64) -> u64 {
    credits.round() as u64
}
