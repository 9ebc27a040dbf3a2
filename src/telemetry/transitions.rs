//! Logs changes of key states, once per transition, and restrictions and billing discrepancies of keys. Also provides
//! the texts about keys that the command line and the pages share with the logs. Operators and scripts rely on the
//! messages about key states, so tests check their exact text.

use tracing::{info, warn};

use crate::clock;
use crate::policy::forecast::Forecast;
use crate::policy::key_state::{CooldownReason, StateChange};
use crate::policy::quota::{DiscrepancyCause, Quota};
use crate::policy::units::{Grouped, UnixMs};
use crate::pool::{Key, Restriction, Transition};

/// Returns the message that keys were loaded from `source`.
#[must_use]
pub fn keys_loaded_message(count: usize, source: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("Loaded {count} ElevenLabs API key{plural} from {source}")
}

/// Returns the name of a key, or its number, counted from 1, if it has no name.
#[must_use]
pub fn key_name(position: usize, name: Option<&str>) -> String {
    name.map_or_else(|| format!("key {}", position + 1), str::to_owned)
}

/// Describes a missing limit: a pay-as-you-go account has no limit, and the limit of any other account is unknown.
#[must_use]
pub fn describe_unknown_limit(plan: Option<&str>) -> &'static str {
    let letters: String =
        plan.unwrap_or_default().to_lowercase().chars().filter(char::is_ascii_alphabetic).collect();
    if letters.contains("payg") || letters.contains("payasyougo") { "pay as you go" } else { "unknown" }
}

/// Returns the short form of a key, followed by its name if it has one.
fn short_form_and_name(key: &Key) -> String {
    let short = key.api_key().short();
    key.name().map_or_else(|| short.to_string(), |name| format!("{short} ({name})"))
}

/// Returns the messages about a transition, each with the name of its event. `forecast` and `resets_at` are the
/// forecast and the reset time of the key's workspace.
#[must_use]
pub fn transition_messages(
    transition: &Transition,
    forecast: Forecast,
    resets_at: Option<UnixMs>,
) -> Vec<(&'static str, String)> {
    let key = short_form_and_name(&transition.key);
    let plan = transition.key.workspace().tier();
    let remaining = |quota: &Quota| format_remaining(quota, plan.as_deref().map(String::as_str));
    match transition.change {
        StateChange::InUse { quota, rotated_to } => {
            let rotation = rotated_to.map(|index| ("key_rotated", format!("Rotated to key index {index}")));
            rotation
                .into_iter()
                .chain([("key_in_use", format!("Using key {key} ({})", remaining(&quota)))])
                .collect()
        }
        StateChange::NearLimit(quota) => {
            let percent = quota.usage_ratio() * 100.0;
            vec![(
                "key_near_limit",
                format!(
                    "Key {key} near limit: {} ({percent:.1}%){}",
                    remaining(&quota),
                    format_forecast(forecast)
                ),
            )]
        }
        StateChange::CooldownStarted { reason, until } => vec![match reason {
            CooldownReason::Exhausted => (
                "key_exhausted",
                format!("Key {key} exhausted - rotating to next key{}", format_next_use(until, resets_at)),
            ),
            CooldownReason::Billing => (
                "key_exhausted",
                format!(
                    "Key {key} exhausted - rotating to next key (its account is locked or unpaid: \
                     sign in to ElevenLabs with it)"
                ),
            ),
            CooldownReason::RateLimited => (
                "key_rate_limited",
                format!("Rate limited: {key} - rotating to next key{}", format_time("until", until)),
            ),
            CooldownReason::Invalid => (
                "key_invalid",
                format!(
                    "Key {key} invalid - rotating to next key (ElevenLabs refuses it: replace or remove it)"
                ),
            ),
            CooldownReason::WrongHost => (
                "key_wrong_host",
                format!(
                    "Key {key} is for another region of ElevenLabs - rotating to next key. Set its region's host \
                     in [[keys]], for example base_url = \"https://api.eu.residency.elevenlabs.io\" (also: in, sg)"
                ),
            ),
        }],
        StateChange::Skipped { left, needed } => vec![(
            "key_passed_over",
            format!(
                "Key {key} has {} credits, this request needs {}; using the next key",
                Grouped(left),
                Grouped(needed)
            ),
        )],
        StateChange::Paused { until } => vec![(
            "key_paused",
            format!("Key {key} is paused - new requests use other keys{}", format_time("until", until)),
        )],
        StateChange::Resumed => vec![("key_resumed", format!("Key {key} is no longer paused"))],
        StateChange::CooldownEnded => vec![("key_returned", format!("Key {key} is usable again"))],
    }
}

/// Logs each transition of a key as one event, or as two events if Keychoir rotated to the key.
pub fn log_transitions(transitions: &[Transition]) {
    // Most calls have no transitions and need not read the clock.
    if transitions.is_empty() {
        return;
    }
    let now = clock::now();
    for transition in transitions {
        let workspace = transition.key.workspace();
        let (forecast, resets_at) = (workspace.forecast(now), workspace.quota(now).resets_at);
        let key = transition.key.api_key().short().as_str();
        let (name, number) = (transition.key.name(), key_number(&transition.key));
        for (event, message) in transition_messages(transition, forecast, resets_at) {
            match event {
                "key_in_use" | "key_rotated" | "key_returned" | "key_passed_over" | "key_paused"
                | "key_resumed" => {
                    info!(event, key, name, number, "{message}")
                }
                _ => warn!(event, key, name, number, "{message}"),
            }
        }
    }
}

/// Logs that the provider refused an operation, and that requests which need it will use other keys first.
pub fn log_restriction(key: &Key, restriction: &Restriction) {
    let Restriction { limit, verdict, record, .. } = restriction;
    let plan = key.workspace().tier().map(|tier| format!(" (plan {tier})")).unwrap_or_default();
    let (short, status) = (key.api_key().short(), record.source.status.unwrap_or(0));
    let key_description = short_form_and_name(key);
    warn!(
        event = "key_restricted",
        key = short.as_str(),
        name = key.name(),
        number = key_number(key),
        verdict,
        status,
        request_id = &*record.source.request_id,
        "Key {key_description}{plan} was refused for {limit}; requests that need it go to other keys first",
    );
}

/// Formats the date on which the credits will be exhausted, if this date is before their reset.
fn format_forecast(forecast: Forecast) -> String {
    match forecast {
        Forecast::ExhaustedAt(at) => format!(" (spent by {} at this rate)", at.month_and_day()),
        Forecast::LastsUntilReset | Forecast::Unknown => String::new(),
    }
}

/// Logs the difference `credits` between the usage that the provider reports for the workspace of `key` and the
/// recorded usage. It is negative if the provider reports less. `matching_key` is a key of another workspace with the
/// same quota, or `None` if there is none.
pub fn log_discrepancy(key: &Key, credits: i64, matching_key: Option<&Key>) {
    let message = discrepancy_message(key, credits, matching_key);
    let short = key.api_key().short().as_str();
    let (name, number) = (key.name(), key_number(key));
    info!(event = "quota_mismatch", key = short, name, number, credits, "{message}");
}

/// Returns the number of a key, counted from 1.
fn key_number(key: &Key) -> usize {
    key.position() + 1
}

fn discrepancy_message(key: &Key, credits: i64, matching_key: Option<&Key>) -> String {
    let key_description = short_form_and_name(key);
    let amount = Grouped(credits.unsigned_abs());
    match (DiscrepancyCause::new(credits, matching_key.is_some()), matching_key) {
        (DiscrepancyCause::SharedWorkspace, Some(matching_key)) => format!(
            "ElevenLabs counts {amount} credits more for key {key_description} than Keychoir has recorded, and the \
             same for {}: both seem to be of one workspace (give both the same `workspace` in [[keys]])",
            short_form_and_name(matching_key)
        ),
        (DiscrepancyCause::SharedWorkspace | DiscrepancyCause::OtherProgram, _) => format!(
            "ElevenLabs counts {amount} credits more for key {key_description} than Keychoir has recorded: other apps \
             spend on its workspace, or a request had no price; Keychoir uses ElevenLabs' figure"
        ),
        (DiscrepancyCause::Uncharged, _) => format!(
            "ElevenLabs counts {amount} credits fewer for key {key_description} than Keychoir has recorded: they were \
             never charged; Keychoir uses ElevenLabs' figure"
        ),
    }
}

fn format_remaining(quota: &Quota, plan: Option<&str>) -> String {
    match (quota.limit, describe_unknown_limit(plan)) {
        (Some(_), _) => format!("{} chars remaining", Grouped(quota.remaining())),
        (None, "unknown") => "chars remaining unknown".to_owned(),
        (None, description) => description.to_owned(),
    }
}

/// Formats the time at which an exhausted key is used again: at the reset of its credits, or at an earlier trial.
fn format_next_use(until: Option<UnixMs>, resets_at: Option<UnixMs>) -> String {
    match until {
        Some(reset) if until == resets_at => format!(" (resets {})", reset.month_and_day()),
        _ => format_time("tried again at", until),
    }
}

fn format_time(prefix: &str, time: Option<UnixMs>) -> String {
    time.map(|time| format!(" ({prefix} {})", time.rfc3339())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::elevenlabs::plan::Capabilities;
    use crate::policy::quota::Extension;
    use crate::pool::{Key, Observation, Pool, Settings};
    use crate::secret::ApiKey;

    const NOW: UnixMs = UnixMs(1_795_000_000_000);
    const RESET_TIME: UnixMs = UnixMs(1_796_083_200_000);

    fn pool() -> Arc<Pool> {
        let key = ApiKey::new("sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b").unwrap();
        Arc::new(Pool::new(vec![key.into()], Settings::FOR_TESTS))
    }

    fn key() -> Arc<Key> {
        Arc::clone(&pool().roster().keys()[0])
    }

    fn quota(count: u64) -> Quota {
        Quota { count, limit: Some(100_000), extension: Extension::None, resets_at: Some(RESET_TIME) }
    }

    /// Asserts the messages about a change of a key without a name.
    #[track_caller]
    fn assert_messages(change: StateChange, expected: &[(&str, &str)]) {
        assert_messages_for(&key(), change, expected);
    }

    /// Asserts the names of the events and the messages about a change of `key`.
    #[track_caller]
    fn assert_messages_for(key: &Arc<Key>, change: StateChange, expected: &[(&str, &str)]) {
        let transition = Transition { key: Arc::clone(key), change };
        let messages = transition_messages(&transition, Forecast::Unknown, Some(RESET_TIME));
        let messages: Vec<(&str, &str)> =
            messages.iter().map(|(event, message)| (*event, &**message)).collect();
        assert_eq!(messages, expected);
    }

    #[test]
    fn messages_have_their_documented_texts() {
        assert_eq!(keys_loaded_message(8, "x"), "Loaded 8 ElevenLabs API keys from x");
        assert_eq!(keys_loaded_message(1, "x"), "Loaded 1 ElevenLabs API key from x");
        assert_messages(
            StateChange::InUse { quota: quota(5_420), rotated_to: None },
            &[("key_in_use", "Using key sk_6c036526...d452b (94,580 chars remaining)")],
        );
        assert_messages(
            StateChange::InUse { quota: quota(5_420), rotated_to: Some(3) },
            &[
                ("key_rotated", "Rotated to key index 3"),
                ("key_in_use", "Using key sk_6c036526...d452b (94,580 chars remaining)"),
            ],
        );
        assert_messages(
            StateChange::NearLimit(quota(84_766)),
            &[("key_near_limit", "Key sk_6c036526...d452b near limit: 15,234 chars remaining (84.8%)")],
        );
        assert_messages(
            StateChange::CooldownStarted { reason: CooldownReason::Exhausted, until: Some(RESET_TIME) },
            &[("key_exhausted", "Key sk_6c036526...d452b exhausted - rotating to next key (resets Dec 1)")],
        );
        assert_messages(
            StateChange::CooldownStarted { reason: CooldownReason::RateLimited, until: None },
            &[("key_rate_limited", "Rate limited: sk_6c036526...d452b - rotating to next key")],
        );
    }

    #[test]
    fn an_unknown_quota_is_reported_as_unknown() {
        assert_messages(
            StateChange::InUse { quota: Quota::default(), rotated_to: None },
            &[("key_in_use", "Using key sk_6c036526...d452b (chars remaining unknown)")],
        );
    }

    #[test]
    fn a_billing_discrepancy_is_explained() {
        let (key, matching_key) = (key(), key());
        let message_for = |credits, matching_key: Option<&Arc<Key>>| {
            discrepancy_message(&key, credits, matching_key.map(|matching_key| &**matching_key))
        };
        let more_used = message_for(1_200, None);
        assert!(
            more_used.starts_with(
                "ElevenLabs counts 1,200 credits more for key sk_6c036526...d452b than Keychoir"
            )
        );
        assert!(more_used.contains("other apps"), "the message must name the cause: {more_used}");
        assert!(message_for(1_200, Some(&matching_key)).contains("the same `workspace`"));
        let less_used = message_for(-7, Some(&matching_key));
        assert!(
            less_used.contains("counts 7 credits fewer") && less_used.contains("never charged"),
            "the message must name the cause: {less_used}"
        );
    }

    #[test]
    fn an_exhausted_key_shows_an_earlier_trial_or_no_time() {
        let until = UnixMs(RESET_TIME.0 - 1_000);
        assert_messages(
            StateChange::CooldownStarted { reason: CooldownReason::Exhausted, until: Some(until) },
            &[(
                "key_exhausted",
                "Key sk_6c036526...d452b exhausted - rotating to next key (tried again at 2026-11-30T23:59:59.000Z)",
            )],
        );
        assert_messages(
            StateChange::CooldownStarted { reason: CooldownReason::Exhausted, until: None },
            &[("key_exhausted", "Key sk_6c036526...d452b exhausted - rotating to next key")],
        );
    }

    #[test]
    fn a_name_follows_the_short_form_and_numbers_start_at_1() {
        let key = ApiKey::new("sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b").unwrap();
        let entry = crate::pool::KeyEntry { name: Some("studio".to_owned()), ..key.into() };
        let pool = Arc::new(Pool::new(vec![entry], Settings::FOR_TESTS));
        let key = Arc::clone(&pool.roster().keys()[0]);
        assert_messages_for(
            &key,
            StateChange::InUse { quota: quota(0), rotated_to: None },
            &[("key_in_use", "Using key sk_6c036526...d452b (studio) (100,000 chars remaining)")],
        );
        assert_eq!((key_name(0, key.name()), key_name(1, None)), ("studio".to_owned(), "key 2".to_owned()));
    }

    #[test]
    fn a_pay_as_you_go_account_without_a_limit_is_not_unknown() {
        let pool = pool();
        let roster = pool.roster();
        let key = Arc::clone(&roster.keys()[0]);
        let observation = Observation::Quota {
            quota: Quota::default(),
            tier: Some("payg".to_owned()),
            is_paid: Some(true),
            capabilities: Capabilities::default(),
        };
        pool.observe(&roster, &key, observation, NOW);
        assert_messages_for(
            &key,
            StateChange::InUse { quota: Quota::default(), rotated_to: None },
            &[("key_in_use", "Using key sk_6c036526...d452b (pay as you go)")],
        );
        for (plan, expected) in
            [(None, "unknown"), (Some("creator"), "unknown"), (Some("pay_as_you_go"), "pay as you go")]
        {
            assert_eq!(describe_unknown_limit(plan), expected);
        }
    }
}
