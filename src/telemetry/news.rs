//! The news of a key in the words of the contract. Each is told once per transition.

use tracing::{info, warn};

use crate::policy::budget::Quota;
use crate::policy::standing::{Change, ParkReason};
use crate::policy::units::{Grouped, UnixMs};
use crate::pool::Transition;

/// The line for the keys that were loaded.
#[must_use]
pub fn keys_loaded(count: usize, source: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("Loaded {count} ElevenLabs API key{plural} from {source}")
}

/// The lines for a change, without the symbols in front, each with the name of its event.
#[must_use]
pub fn wording(news: &Transition) -> Vec<(&'static str, String)> {
    let short = news.key.api_key().short();
    match news.change {
        Change::InUse { quota, rotated_to } => {
            let rotated = rotated_to.map(|index| ("key_rotated", format!("Rotated to key index {index}")));
            rotated
                .into_iter()
                .chain([("key_in_use", format!("Using key {short} ({})", left(&quota)))])
                .collect()
        }
        Change::NearLimit(quota) => {
            let percent = quota.usage_ratio() * 100.0;
            vec![("key_near_limit", format!("Key {short} near limit: {} ({percent:.1}%)", left(&quota)))]
        }
        Change::Rests { reason, until } => vec![match reason {
            ParkReason::Exhausted => (
                "key_exhausted",
                format!("Key {short} exhausted - rotating to next key{}", date("resets", until)),
            ),
            ParkReason::Billing => (
                "key_exhausted",
                format!(
                    "Key {short} exhausted - rotating to next key (its account is locked or unpaid: \
                     sign in to ElevenLabs with it)"
                ),
            ),
            ParkReason::RateLimited => (
                "key_rate_limited",
                format!("Rate limited: {short} - rotating to next key{}", time("until", until)),
            ),
            ParkReason::Invalid => (
                "key_invalid",
                format!(
                    "Key {short} invalid - rotating to next key (ElevenLabs refuses it: replace or remove it)"
                ),
            ),
        }],
        Change::Returns => vec![("key_returned", format!("Key {short} is usable again"))],
    }
}

/// Tells the news.
pub fn announce(news: &[Transition]) {
    for transition in news {
        let key = transition.key.api_key().short().as_str();
        let position = transition.key.position();
        for (event, text) in wording(transition) {
            match event {
                "key_in_use" | "key_rotated" | "key_returned" => info!(event, key, position, "{text}"),
                _ => warn!(event, key, position, "{text}"),
            }
        }
    }
}

fn left(quota: &Quota) -> String {
    match quota.limit {
        Some(_) => format!("{} chars remaining", Grouped(quota.remaining())),
        None => "chars remaining unknown".to_owned(),
    }
}

fn date(word: &str, at: Option<UnixMs>) -> String {
    at.map(|at| format!(" ({word} {})", at.month_and_day())).unwrap_or_default()
}

fn time(word: &str, at: Option<UnixMs>) -> String {
    at.map(|at| format!(" ({word} {})", at.rfc3339())).unwrap_or_default()
}
