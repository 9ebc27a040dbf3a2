//! The news of a key in the words of the contract. Each is told once per transition.

use tracing::{info, warn};

use crate::clock;
use crate::policy::budget::{Cause, Quota};
use crate::policy::forecast::Forecast;
use crate::policy::standing::{Change, KeyStatus, ParkReason};
use crate::policy::units::{Grouped, UnixMs};
use crate::pool::{Key, KeySnapshot, Restriction, Transition};

/// The line for the keys that were loaded.
#[must_use]
pub fn keys_loaded(count: usize, source: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("Loaded {count} ElevenLabs API key{plural} from {source}")
}

/// What a key is called: its name, or else its number from 1.
#[must_use]
pub fn key_name(position: usize, name: Option<&str>) -> String {
    name.map_or_else(|| format!("key {}", position + 1), str::to_owned)
}

/// The line for a key in the table that is shown at the start: its number from 1, what may be
/// shown of it, its plan, what is used, when it resets, and how it stands.
#[must_use]
pub fn key_line(seen: &KeySnapshot) -> String {
    let KeySnapshot { key, quota, standing, is_near_limit, .. } = seen;
    let number = key.position() + 1;
    let short = key.api_key().short().as_str();
    let tier = key.workspace().tier().map_or_else(|| "-".to_owned(), |tier| tier.to_string());
    let used = match quota.limit {
        Some(limit) => {
            let spent = format!("{}/{}", Grouped(quota.count), Grouped(limit));
            format!("{spent:>19}  {:>5.1}% used", quota.usage_ratio() * 100.0)
        }
        None => format!("{:>19}  {:>11}", "quota unknown", ""),
    };
    let resets = quota.resets_at.map_or_else(String::new, |at| format!("resets {}", at.month_and_day()));
    let status = match standing.status() {
        KeyStatus::Active if *is_near_limit => "near limit",
        KeyStatus::Active => "active",
        KeyStatus::Exhausted => "exhausted",
        KeyStatus::RateLimited => "rate limited",
        KeyStatus::Invalid => "invalid",
    };
    format!("key {number:<2} {short:<19}  {tier:<9} {used}  {resets:<13}  {status}")
}

/// The lines for a change, without the symbols in front, each with the name of its event. `forecast`
/// says what will become of the key's credits.
#[must_use]
pub fn wording(news: &Transition, forecast: Forecast) -> Vec<(&'static str, String)> {
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
            vec![(
                "key_near_limit",
                format!("Key {short} near limit: {} ({percent:.1}%){}", left(&quota), expected(forecast)),
            )]
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
            ParkReason::WrongHost => (
                "key_wrong_host",
                format!(
                    "Key {short} is for another region of ElevenLabs - rotating to next key. Set its region's host \
                     in [[keys]], for example base_url = \"https://api.eu.residency.elevenlabs.io\" (also: in, sg)"
                ),
            ),
        }],
        Change::PassedOver { left, needed } => vec![(
            "key_passed_over",
            format!(
                "Key {short} has {} credits, this request needs {}; using the next key",
                Grouped(left),
                Grouped(needed)
            ),
        )],
        Change::Returns => vec![("key_returned", format!("Key {short} is usable again"))],
    }
}

/// Tells the news.
pub fn announce(news: &[Transition]) {
    // Nearly always there is none, and then nobody asks what time it is.
    if news.is_empty() {
        return;
    }
    let now = clock::now();
    for transition in news {
        let forecast = transition.key.workspace().forecast(now);
        let key = transition.key.api_key().short().as_str();
        let position = transition.key.position();
        for (event, text) in wording(transition, forecast) {
            match event {
                "key_in_use" | "key_rotated" | "key_returned" | "key_passed_over" => {
                    info!(event, key, position, "{text}")
                }
                _ => warn!(event, key, position, "{text}"),
            }
        }
    }
}

/// Logs what an account turned out not to be able to do. Requests that need it go to others.
pub fn announce_restriction(key: &Key, restriction: &Restriction) {
    let Restriction { limit, verdict, source, .. } = restriction;
    let plan = key.workspace().tier().map(|tier| format!(" (plan {tier})")).unwrap_or_default();
    let (short, status) = (key.api_key().short(), source.status.unwrap_or(0));
    let label = key.name().map_or_else(|| short.to_string(), |name| format!("{short} ({name})"));
    warn!(
        event = "key_restricted",
        key = short.as_str(),
        position = key.position(),
        verdict,
        status,
        request_id = &*source.request_id,
        "Key {label}{plan} was refused for {limit}; requests that need it go to other keys first",
    );
}

/// What will become of a key near its limit, where that is known and worth a thought.
fn expected(forecast: Forecast) -> String {
    match forecast {
        Forecast::SpentBy(at) => format!(" (spent by {} at this rate)", at.month_and_day()),
        Forecast::Lasts | Forecast::Unknown => String::new(),
    }
}

/// Tells that the provider counts so many credits more for the workspace of `key` than were booked,
/// or fewer; `twin` is a key of another workspace with the same figures.
pub fn announce_drift(key: &Key, credits: i64, twin: Option<&Key>) {
    let text = drift_wording(key, credits, twin);
    let short = key.api_key().short().as_str();
    info!(event = "workspace_drift", key = short, position = key.position(), credits, "{text}");
}

fn drift_wording(key: &Key, credits: i64, twin: Option<&Key>) -> String {
    let short = key.api_key().short();
    let amount = Grouped(credits.unsigned_abs());
    match (Cause::of(credits, twin.is_some()), twin) {
        (Cause::Twin, Some(twin)) => format!(
            "ElevenLabs counts {amount} credits more for key {short} than Keychoir has booked, and the same for {}: \
             both seem to be of one workspace (give both the same `workspace` in [[keys]])",
            twin.api_key().short()
        ),
        (Cause::Twin | Cause::Others, _) => format!(
            "ElevenLabs counts {amount} credits more for key {short} than Keychoir has booked: other apps spend on \
             its workspace, or a request had no price; its figure is taken over"
        ),
        (Cause::NeverCharged, _) => format!(
            "ElevenLabs counts {amount} credits fewer for key {short} than Keychoir had booked: they were never \
             charged; its figure is taken over"
        ),
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::policy::budget::Extension;
    use crate::policy::plan::Capabilities;
    use crate::pool::{Key, Observation, Pool, Settings};
    use crate::secret::ApiKey;

    const NOW: UnixMs = UnixMs(1_795_000_000_000);
    const DECEMBER_1: UnixMs = UnixMs(1_796_083_200_000);

    fn pool() -> Arc<Pool> {
        let key = ApiKey::new("sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b").unwrap();
        Arc::new(Pool::new(vec![key.into()], Settings::STILL))
    }

    fn key() -> Arc<Key> {
        Arc::clone(&pool().roster().keys()[0])
    }

    fn quota(count: u64) -> Quota {
        Quota { count, limit: Some(100_000), extension: Extension::None, resets_at: Some(DECEMBER_1) }
    }

    #[track_caller]
    fn check(change: Change, expected: &[(&str, &str)]) {
        let lines = wording(&Transition { key: key(), change }, Forecast::Unknown);
        let lines: Vec<(&str, &str)> = lines.iter().map(|(event, text)| (*event, &**text)).collect();
        assert_eq!(lines, expected);
    }

    #[test]
    fn the_contracts_words_are_kept() {
        assert_eq!(keys_loaded(8, "x"), "Loaded 8 ElevenLabs API keys from x");
        assert_eq!(keys_loaded(1, "x"), "Loaded 1 ElevenLabs API key from x");
        check(
            Change::InUse { quota: quota(5_420), rotated_to: None },
            &[("key_in_use", "Using key sk_6c036526...d452b (94,580 chars remaining)")],
        );
        check(
            Change::InUse { quota: quota(5_420), rotated_to: Some(3) },
            &[
                ("key_rotated", "Rotated to key index 3"),
                ("key_in_use", "Using key sk_6c036526...d452b (94,580 chars remaining)"),
            ],
        );
        check(
            Change::NearLimit(quota(84_766)),
            &[("key_near_limit", "Key sk_6c036526...d452b near limit: 15,234 chars remaining (84.8%)")],
        );
        check(
            Change::Rests { reason: ParkReason::Exhausted, until: Some(DECEMBER_1) },
            &[("key_exhausted", "Key sk_6c036526...d452b exhausted - rotating to next key (resets Dec 1)")],
        );
        check(
            Change::Rests { reason: ParkReason::RateLimited, until: None },
            &[("key_rate_limited", "Rate limited: sk_6c036526...d452b - rotating to next key")],
        );
    }

    #[test]
    fn an_unknown_quota_is_called_unknown() {
        check(
            Change::InUse { quota: Quota::default(), rotated_to: None },
            &[("key_in_use", "Using key sk_6c036526...d452b (chars remaining unknown)")],
        );
    }

    #[test]
    fn a_drift_is_explained() {
        let (key, twin) = (key(), key());
        let wording =
            |credits, twin: Option<&Arc<Key>>| drift_wording(&key, credits, twin.map(|twin| &**twin));
        let others = wording(1_200, None);
        assert!(
            others.starts_with(
                "ElevenLabs counts 1,200 credits more for key sk_6c036526...d452b than Keychoir"
            )
        );
        assert!(others.contains("other apps"), "{others}");
        assert!(wording(1_200, Some(&twin)).contains("the same `workspace`"));
        let below = wording(-7, Some(&twin));
        assert!(below.contains("counts 7 credits fewer") && below.contains("never charged"), "{below}");
    }

    #[test]
    fn a_key_has_a_line_in_the_table() {
        let pool = pool();
        let roster = pool.roster();
        assert_eq!(
            key_line(&pool.snapshot(NOW)[0]),
            "key 1  sk_6c036526...d452b  -               quota unknown                              active"
        );
        let seen = Observation::Quota {
            quota: quota(84_766),
            tier: Some("creator".to_owned()),
            is_paid: Some(true),
            capabilities: Capabilities::default(),
        };
        pool.observe(&roster, &roster.keys()[0], seen, NOW);
        assert_eq!(
            key_line(&pool.snapshot(NOW)[0]),
            "key 1  sk_6c036526...d452b  creator        84,766/100,000   84.8% used  resets Dec 1   near limit"
        );
    }
}
