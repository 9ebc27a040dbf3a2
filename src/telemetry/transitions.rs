//! Logs state changes of keys in the words of the contract, once per transition.

use tracing::{info, warn};

use crate::clock;
use crate::policy::budget::{Cause, Quota};
use crate::policy::forecast::Forecast;
use crate::policy::key_state::{CooldownReason, StateChange};
use crate::policy::units::{Grouped, UnixMs};
use crate::pool::{Key, Restriction, Transition};

/// The message about the keys that were loaded.
#[must_use]
pub fn keys_loaded(count: usize, source: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("Loaded {count} ElevenLabs API key{plural} from {source}")
}

/// The name of a key, or its number, from 1, where it has none.
#[must_use]
pub fn key_name(position: usize, name: Option<&str>) -> String {
    name.map_or_else(|| format!("key {}", position + 1), str::to_owned)
}

/// The words for an unknown limit: pay-as-you-go accounts have none.
#[must_use]
pub fn unknown_limit(plan: Option<&str>) -> &'static str {
    let letters: String =
        plan.unwrap_or_default().to_lowercase().chars().filter(char::is_ascii_alphabetic).collect();
    if letters.contains("payg") || letters.contains("payasyougo") { "pay as you go" } else { "unknown" }
}

/// The short form of a key in a message, with its name where it has one.
fn label(key: &Key) -> String {
    let short = key.api_key().short();
    key.name().map_or_else(|| short.to_string(), |name| format!("{short} ({name})"))
}

/// The messages about a change without their symbols, each with the name of its event. `forecast` is the
/// forecast of the key's credits, `resets_at` the reset date of its workspace, if it is known.
#[must_use]
pub fn wording(
    transition: &Transition,
    forecast: Forecast,
    resets_at: Option<UnixMs>,
) -> Vec<(&'static str, String)> {
    let short = label(&transition.key);
    let plan = transition.key.workspace().tier();
    let left = |quota: &Quota| left(quota, plan.as_deref().map(String::as_str));
    match transition.change {
        StateChange::InUse { quota, rotated_to } => {
            let rotated = rotated_to.map(|index| ("key_rotated", format!("Rotated to key index {index}")));
            rotated
                .into_iter()
                .chain([("key_in_use", format!("Using key {short} ({})", left(&quota)))])
                .collect()
        }
        StateChange::NearLimit(quota) => {
            let percent = quota.usage_ratio() * 100.0;
            vec![(
                "key_near_limit",
                format!(
                    "Key {short} near limit: {} ({percent:.1}%){}",
                    left(&quota),
                    forecast_text(forecast)
                ),
            )]
        }
        StateChange::Rests { reason, until } => vec![match reason {
            CooldownReason::Exhausted => (
                "key_exhausted",
                format!("Key {short} exhausted - rotating to next key{}", next_use(until, resets_at)),
            ),
            CooldownReason::Billing => (
                "key_exhausted",
                format!(
                    "Key {short} exhausted - rotating to next key (its account is locked or unpaid: \
                     sign in to ElevenLabs with it)"
                ),
            ),
            CooldownReason::RateLimited => (
                "key_rate_limited",
                format!("Rate limited: {short} - rotating to next key{}", time("until", until)),
            ),
            CooldownReason::Invalid => (
                "key_invalid",
                format!(
                    "Key {short} invalid - rotating to next key (ElevenLabs refuses it: replace or remove it)"
                ),
            ),
            CooldownReason::WrongHost => (
                "key_wrong_host",
                format!(
                    "Key {short} is for another region of ElevenLabs - rotating to next key. Set its region's host \
                     in [[keys]], for example base_url = \"https://api.eu.residency.elevenlabs.io\" (also: in, sg)"
                ),
            ),
        }],
        StateChange::PassedOver { left, needed } => vec![(
            "key_passed_over",
            format!(
                "Key {short} has {} credits, this request needs {}; using the next key",
                Grouped(left),
                Grouped(needed)
            ),
        )],
        StateChange::Returns => vec![("key_returned", format!("Key {short} is usable again"))],
    }
}

/// Logs these transitions.
pub fn log_transitions(transitions: &[Transition]) {
    // Nearly always there is none, and then the clock is not read.
    if transitions.is_empty() {
        return;
    }
    let now = clock::now();
    for transition in transitions {
        let workspace = transition.key.workspace();
        let (forecast, resets_at) = (workspace.forecast(now), workspace.quota(now).resets_at);
        let key = transition.key.api_key().short().as_str();
        let (name, number) = (transition.key.name(), number(&transition.key));
        for (event, text) in wording(transition, forecast, resets_at) {
            match event {
                "key_in_use" | "key_rotated" | "key_returned" | "key_passed_over" => {
                    info!(event, key, name, number, "{text}")
                }
                _ => warn!(event, key, name, number, "{text}"),
            }
        }
    }
}

/// Logs a restriction of an account: an operation that the provider refused. Requests that need it go to
/// other keys first.
pub fn log_restriction(key: &Key, restriction: &Restriction) {
    let Restriction { limit, verdict, source, .. } = restriction;
    let plan = key.workspace().tier().map(|tier| format!(" (plan {tier})")).unwrap_or_default();
    let (short, status) = (key.api_key().short(), source.status.unwrap_or(0));
    let label = label(key);
    warn!(
        event = "key_restricted",
        key = short.as_str(),
        name = key.name(),
        number = number(key),
        verdict,
        status,
        request_id = &*source.request_id,
        "Key {label}{plan} was refused for {limit}; requests that need it go to other keys first",
    );
}

/// The forecast for a key near its limit, where it is known and calls for action.
fn forecast_text(forecast: Forecast) -> String {
    match forecast {
        Forecast::SpentBy(at) => format!(" (spent by {} at this rate)", at.month_and_day()),
        Forecast::Lasts | Forecast::Unknown => String::new(),
    }
}

/// Logs how many credits the provider counts for the workspace of `key` beyond those recorded (below 0:
/// fewer); `twin` is a key of another workspace with the same figures.
pub fn log_discrepancy(key: &Key, credits: i64, twin: Option<&Key>) {
    let text = discrepancy_wording(key, credits, twin);
    let short = key.api_key().short().as_str();
    let (name, number) = (key.name(), number(key));
    info!(event = "quota_mismatch", key = short, name, number, credits, "{text}");
}

/// The number of a key, from 1, as in all tables.
fn number(key: &Key) -> usize {
    key.position() + 1
}

fn discrepancy_wording(key: &Key, credits: i64, twin: Option<&Key>) -> String {
    let short = label(key);
    let amount = Grouped(credits.unsigned_abs());
    match (Cause::of(credits, twin.is_some()), twin) {
        (Cause::Twin, Some(twin)) => format!(
            "ElevenLabs counts {amount} credits more for key {short} than Keychoir has recorded, and the same for {}: \
             both seem to be of one workspace (give both the same `workspace` in [[keys]])",
            label(twin)
        ),
        (Cause::Twin | Cause::Others, _) => format!(
            "ElevenLabs counts {amount} credits more for key {short} than Keychoir has recorded: other apps spend on \
             its workspace, or a request had no price; Keychoir uses ElevenLabs' figure"
        ),
        (Cause::NeverCharged, _) => format!(
            "ElevenLabs counts {amount} credits fewer for key {short} than Keychoir has recorded: they were never \
             charged; Keychoir uses ElevenLabs' figure"
        ),
    }
}

fn left(quota: &Quota, plan: Option<&str>) -> String {
    match (quota.limit, unknown_limit(plan)) {
        (Some(_), _) => format!("{} chars remaining", Grouped(quota.remaining())),
        (None, "unknown") => "chars remaining unknown".to_owned(),
        (None, why) => why.to_owned(),
    }
}

/// When a key without credits is used again: at its reset date, where it is known; otherwise it is tried
/// again.
fn next_use(until: Option<UnixMs>, resets_at: Option<UnixMs>) -> String {
    match until {
        Some(at) if until == resets_at => format!(" (resets {})", at.month_and_day()),
        other => time("tried again at", other),
    }
}

fn time(word: &str, at: Option<UnixMs>) -> String {
    at.map(|at| format!(" ({word} {})", at.rfc3339())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::elevenlabs::plan::Capabilities;
    use crate::policy::budget::Extension;
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
    fn check(change: StateChange, expected: &[(&str, &str)]) {
        check_of(&key(), change, expected);
    }

    #[track_caller]
    fn check_of(key: &Arc<Key>, change: StateChange, expected: &[(&str, &str)]) {
        let transition = Transition { key: Arc::clone(key), change };
        let lines = wording(&transition, Forecast::Unknown, Some(DECEMBER_1));
        let lines: Vec<(&str, &str)> = lines.iter().map(|(event, text)| (*event, &**text)).collect();
        assert_eq!(lines, expected);
    }

    #[test]
    fn the_texts_of_the_contract_are_kept() {
        assert_eq!(keys_loaded(8, "x"), "Loaded 8 ElevenLabs API keys from x");
        assert_eq!(keys_loaded(1, "x"), "Loaded 1 ElevenLabs API key from x");
        check(
            StateChange::InUse { quota: quota(5_420), rotated_to: None },
            &[("key_in_use", "Using key sk_6c036526...d452b (94,580 chars remaining)")],
        );
        check(
            StateChange::InUse { quota: quota(5_420), rotated_to: Some(3) },
            &[
                ("key_rotated", "Rotated to key index 3"),
                ("key_in_use", "Using key sk_6c036526...d452b (94,580 chars remaining)"),
            ],
        );
        check(
            StateChange::NearLimit(quota(84_766)),
            &[("key_near_limit", "Key sk_6c036526...d452b near limit: 15,234 chars remaining (84.8%)")],
        );
        check(
            StateChange::Rests { reason: CooldownReason::Exhausted, until: Some(DECEMBER_1) },
            &[("key_exhausted", "Key sk_6c036526...d452b exhausted - rotating to next key (resets Dec 1)")],
        );
        check(
            StateChange::Rests { reason: CooldownReason::RateLimited, until: None },
            &[("key_rate_limited", "Rate limited: sk_6c036526...d452b - rotating to next key")],
        );
    }

    #[test]
    fn an_unknown_quota_is_called_unknown() {
        check(
            StateChange::InUse { quota: Quota::default(), rotated_to: None },
            &[("key_in_use", "Using key sk_6c036526...d452b (chars remaining unknown)")],
        );
    }

    #[test]
    fn a_billing_discrepancy_is_explained() {
        let (key, twin) = (key(), key());
        let wording =
            |credits, twin: Option<&Arc<Key>>| discrepancy_wording(&key, credits, twin.map(|twin| &**twin));
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
    fn an_unknown_reset_is_not_named() {
        let until = UnixMs(DECEMBER_1.0 - 1_000);
        check(
            StateChange::Rests { reason: CooldownReason::Exhausted, until: Some(until) },
            &[(
                "key_exhausted",
                "Key sk_6c036526...d452b exhausted - rotating to next key (tried again at 2026-11-30T23:59:59.000Z)",
            )],
        );
        check(
            StateChange::Rests { reason: CooldownReason::Exhausted, until: None },
            &[("key_exhausted", "Key sk_6c036526...d452b exhausted - rotating to next key")],
        );
    }

    #[test]
    fn a_name_is_shown_beside_the_short_form_and_a_number_is_from_1() {
        let key = ApiKey::new("sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b").unwrap();
        let entry = crate::pool::KeyEntry { name: Some("studio".to_owned()), ..key.into() };
        let pool = Arc::new(Pool::new(vec![entry], Settings::STILL));
        let key = Arc::clone(&pool.roster().keys()[0]);
        check_of(
            &key,
            StateChange::InUse { quota: quota(0), rotated_to: None },
            &[("key_in_use", "Using key sk_6c036526...d452b (studio) (100,000 chars remaining)")],
        );
        assert_eq!((key_name(0, key.name()), key_name(1, None)), ("studio".to_owned(), "key 2".to_owned()));
    }

    #[test]
    fn an_account_without_a_limit_is_pay_as_you_go() {
        let pool = pool();
        let roster = pool.roster();
        let key = Arc::clone(&roster.keys()[0]);
        let seen = Observation::Quota {
            quota: Quota::default(),
            tier: Some("payg".to_owned()),
            is_paid: Some(true),
            capabilities: Capabilities::default(),
        };
        pool.observe(&roster, &key, seen, NOW);
        check_of(
            &key,
            StateChange::InUse { quota: Quota::default(), rotated_to: None },
            &[("key_in_use", "Using key sk_6c036526...d452b (pay as you go)")],
        );
        for (plan, expected) in
            [(None, "unknown"), (Some("creator"), "unknown"), (Some("pay_as_you_go"), "pay as you go")]
        {
            assert_eq!(unknown_limit(plan), expected);
        }
    }
}
