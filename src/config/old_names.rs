//! Recognizes the old names of renamed settings, sections, fields of clients and strategies. An old name is an error,
//! whose message contains the line to write instead, with a value in the new notation. Old names are not aliases,
//! because a file with both names would then set the setting twice.

use std::time::Duration;

use toml::de::DeValue;

use super::mask::quote_masked;
use super::problem::ValueError;
use super::setting::{self, Setting};
use super::value::{self, RawValue};
use crate::policy::client_quota::{ClientQuota, RateLimit};
use crate::policy::quantity::duration::DisplayDuration;
use crate::policy::quantity::size::DisplaySize;

/// The unit of an old setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OldUnit {
    Milliseconds,
    Days,
    Bytes,
    /// The value has the same notation in the new setting.
    Same,
}

/// The old path and the new path of each setting, and the unit of the old value.
pub(super) const RENAMED_SETTINGS: &[(&str, &str, OldUnit)] = &[
    ("server.head_read_ms_max", "server.request_headers_timeout", OldUnit::Milliseconds),
    ("server.body_idle_ms_max", "server.request_body_timeout", OldUnit::Milliseconds),
    ("server.write_idle_ms_max", "server.send_timeout", OldUnit::Milliseconds),
    ("server.connections_max", "server.max_connections", OldUnit::Same),
    ("server.requests_max", "server.max_requests", OldUnit::Same),
    ("server.head_bytes_max", "server.max_request_headers_size", OldUnit::Bytes),
    ("server.shutdown_grace_ms", "server.drain_timeout", OldUnit::Milliseconds),
    ("server.reload_interval_ms", "server.reload_interval", OldUnit::Milliseconds),
    ("server.request_body_min_rate", "server.min_request_body_rate", OldUnit::Bytes),
    ("upstream.connect_ms_max", "upstream.connect_timeout", OldUnit::Milliseconds),
    ("upstream.first_byte_ms_max", "upstream.response_timeout", OldUnit::Milliseconds),
    ("upstream.stream_idle_ms_max", "upstream.stream_idle_timeout", OldUnit::Milliseconds),
    ("upstream.idle_ms_max", "upstream.keepalive_timeout", OldUnit::Milliseconds),
    ("upstream.idle_connections_max", "upstream.max_idle_connections", OldUnit::Same),
    ("upstream.connection_age_ms_max", "upstream.max_connection_duration", OldUnit::Milliseconds),
    ("pool.wait_ms_max", "pool.queue_timeout", OldUnit::Milliseconds),
    ("pool.waiting_max", "pool.max_queued", OldUnit::Same),
    ("pool.foresee_ms_max", "pool.cost_estimate_timeout", OldUnit::Milliseconds),
    ("pool.rate_limited_cooldown_ms", "pool.rate_limited_cooldown", OldUnit::Milliseconds),
    ("pool.concurrency_cooldown_ms", "pool.concurrency_cooldown", OldUnit::Milliseconds),
    ("pool.exhausted_cooldown_ms", "pool.exhausted_cooldown", OldUnit::Milliseconds),
    ("pool.invalid_confirm_ms", "pool.invalid_confirm_cooldown", OldUnit::Milliseconds),
    ("pool.invalid_cooldown_ms", "pool.invalid_cooldown", OldUnit::Milliseconds),
    ("pool.permission_cooldown_ms", "pool.permission_cooldown", OldUnit::Milliseconds),
    ("pool.feature_cooldown_ms", "pool.feature_cooldown", OldUnit::Milliseconds),
    ("pool.endpoint_cooldown_ms", "pool.endpoint_cooldown", OldUnit::Milliseconds),
    ("pool.unproven_cooldown_ms", "pool.unproven_cooldown", OldUnit::Milliseconds),
    ("pool.billing_cooldown_ms", "pool.billing_cooldown", OldUnit::Milliseconds),
    ("pool.max_retry_after_ms", "pool.max_retry_after", OldUnit::Milliseconds),
    ("pool.probe_after_ms", "pool.probe_after", OldUnit::Milliseconds),
    ("replay.memory_max", "retry.buffer_size", OldUnit::Bytes),
    ("replay.memory_total_max", "retry.max_total_buffer_size", OldUnit::Bytes),
    ("replay.disk_max", "retry.spill_size", OldUnit::Bytes),
    ("replay.disk_total_max", "retry.max_total_spill_size", OldUnit::Bytes),
    ("replay.disk_free_percent_min", "retry.min_disk_free_percent", OldUnit::Same),
    ("replay.directory", "retry.spill_directory", OldUnit::Same),
    ("replay.attempts_max", "retry.max_attempts", OldUnit::Same),
    ("replay.deadline_ms", "retry.timeout", OldUnit::Milliseconds),
    ("replay.error_body_bytes_max", "retry.max_error_body_size", OldUnit::Bytes),
    ("replay.error_body_ms_max", "retry.error_body_timeout", OldUnit::Milliseconds),
    ("watch.enabled", "quota_polling.enabled", OldUnit::Same),
    ("watch.interval_ms", "quota_polling.interval", OldUnit::Milliseconds),
    ("watch.timeout_ms", "quota_polling.timeout", OldUnit::Milliseconds),
    ("watch.quota_lag_ms", "quota_polling.quota_lag", OldUnit::Milliseconds),
    ("storage.queue_records_max", "storage.max_queued_records", OldUnit::Same),
    ("storage.commit_interval_ms", "storage.commit_interval", OldUnit::Milliseconds),
    ("storage.attempts_kept_days_max", "storage.attempts_retention", OldUnit::Days),
    ("storage.hours_kept_days_max", "storage.hourly_retention", OldUnit::Days),
    ("supabase.interval_ms", "supabase.interval", OldUnit::Milliseconds),
    ("supabase.batch_rows_max", "supabase.max_batch_rows", OldUnit::Same),
    ("supabase.connect_ms_max", "supabase.connect_timeout", OldUnit::Milliseconds),
    ("supabase.answer_ms_max", "supabase.request_timeout", OldUnit::Milliseconds),
    ("supabase.retry_ms_max", "supabase.max_retry_delay", OldUnit::Milliseconds),
    ("supabase.pause_ms", "supabase.setup_error_delay", OldUnit::Milliseconds),
    ("supabase.final_push_ms_max", "supabase.final_push_timeout", OldUnit::Milliseconds),
    ("ownership.identifiers_max", "affinity.max_identifiers", OldUnit::Same),
    ("ownership.kept_days_max", "affinity.retention", OldUnit::Days),
    ("ownership.answer_bytes_max", "affinity.max_response_scan_size", OldUnit::Bytes),
    ("ownership.not_found_ttl_ms", "affinity.not_found_ttl", OldUnit::Milliseconds),
    ("sockets.idle_ms_max", "websocket.idle_timeout", OldUnit::Milliseconds),
    ("sockets.lifetime_ms_max", "websocket.max_session_duration", OldUnit::Milliseconds),
    ("sockets.opening_bytes_max", "websocket.replay_buffer", OldUnit::Bytes),
    ("sockets.frame_bytes_max", "websocket.max_buffered_message_size", OldUnit::Bytes),
    ("sockets.quiet_ms_max", "websocket.speech_idle_timeout", OldUnit::Milliseconds),
    ("sockets.introduction_ms_max", "websocket.auth_message_timeout", OldUnit::Milliseconds),
    ("sockets.max_session_buffer", "websocket.max_session_buffer", OldUnit::Bytes),
    ("sockets.close_timeout", "websocket.close_timeout", OldUnit::Milliseconds),
    ("sockets.quota_check_interval", "websocket.quota_check_interval", OldUnit::Milliseconds),
    ("sockets.signed_url_base", "websocket.signed_url_base", OldUnit::Same),
    ("access.deny_dangerous", "access.block_admin_endpoints", OldUnit::Same),
];

/// The old and the new name of each section.
pub(super) const RENAMED_SECTIONS: &[(&str, &str)] =
    &[("replay", "retry"), ("watch", "quota_polling"), ("ownership", "affinity"), ("sockets", "websocket")];

/// The old and the new name of each field of a `[[clients]]` entry.
pub(super) const RENAMED_CLIENT_FIELDS: &[(&str, &str)] =
    &[("allowance", "quota"), ("rate", "rate_limit"), ("concurrency", "max_concurrent")];

/// The old and the new name of each strategy.
const RENAMED_STRATEGIES: &[(&str, &str)] = &[("least-busy", "least-requests")];

/// Returns the new name of an old section.
pub(super) fn new_section(old_name: &str) -> Option<&'static str> {
    find_new_name(RENAMED_SECTIONS, old_name)
}

/// Returns the new name of an old strategy.
pub(super) fn new_strategy(old_name: &str) -> Option<&'static str> {
    find_new_name(RENAMED_STRATEGIES, old_name)
}

fn find_new_name(names: &[(&str, &'static str)], old_name: &str) -> Option<&'static str> {
    names.iter().find(|(name, _)| *name == old_name).map(|(_, new_name)| *new_name)
}

/// Returns the error for an old setting in a file, or `None` if `section.name` is not an old path.
pub(super) fn error_in_file(section: &str, name: &str, value: &DeValue<'_>) -> Option<ValueError> {
    let path = format!("{section}.{name}");
    let (_, new_path, old_unit) = RENAMED_SETTINGS.iter().find(|(old, ..)| *old == path)?;
    let new_setting = setting::find(new_path)?;
    let raw = RawValue::Toml(value);
    let line = match convert_value(*old_unit, raw) {
        Some(value) => format!("`{} = {value}`", new_setting.name()),
        None => format!("`{}`", new_setting.name()),
    };
    let advice = if new_setting.section() == section {
        line
    } else {
        format!("{line} in [{}]", new_setting.section())
    };
    Some(ValueError::new(format!("`{path}` has a new name")).advise(format!("write {advice}")))
}

/// Returns the error for the environment variable of an old setting, or `None` if the variable is not one.
pub(super) fn error_in_environment(variable: &str, text: &str) -> Option<ValueError> {
    let (_, new_path, old_unit) =
        RENAMED_SETTINGS.iter().find(|(old, ..)| setting::variable_name(old) == variable)?;
    let new_name = setting::find(new_path).map(Setting::variable_name)?;
    let advice = match convert_value(*old_unit, RawValue::Text(text)) {
        Some(value) => format!("set {new_name}={value}"),
        None => format!("set {new_name}"),
    };
    Some(ValueError::new("this setting has a new name").advise(advice))
}

/// Returns the error for an old field of a client, or `None` if the name is not an old one.
pub(super) fn error_in_client(name: &str, value: &DeValue<'_>) -> Option<ValueError> {
    let new_name = find_new_name(RENAMED_CLIENT_FIELDS, name)?;
    // A string in an entry may be a token, so the message contains it only if it parses as a limit.
    let is_limit = match value {
        DeValue::String(text) => text.parse::<ClientQuota>().is_ok() || text.parse::<RateLimit>().is_ok(),
        DeValue::Integer(_) => true,
        DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_)
        | DeValue::Array(_)
        | DeValue::Table(_) => false,
    };
    let line = match format_if_harmless(RawValue::Toml(value)).filter(|_| is_limit) {
        Some(value) => format!("`{new_name} = {value}`"),
        None => format!("`{new_name}`"),
    };
    Some(ValueError::new(format!("`{name}` has a new name")).advise(format!("write {line}")))
}

/// Converts an old value to the notation of the new setting. Returns `None` if the value is invalid or may be a secret.
fn convert_value(old_unit: OldUnit, old: RawValue<'_>) -> Option<String> {
    let number = || value::parse_integer(old).ok();
    let quantity = match old_unit {
        OldUnit::Milliseconds => DisplayDuration(Duration::from_millis(number()?)).to_string(),
        OldUnit::Days => DisplayDuration(Duration::from_secs(number()?.checked_mul(24 * 3_600)?)).to_string(),
        OldUnit::Bytes => DisplaySize(number()?).to_string(),
        OldUnit::Same => return format_if_harmless(old),
    };
    Some(match old {
        RawValue::Text(_) => quantity,
        RawValue::Toml(_) => format!("\"{quantity}\""),
    })
}

/// Formats a value in the notation in which it is written. Returns `None` for a string that a message would mask,
/// escape or truncate, and for types that no renamed setting has.
fn format_if_harmless(old: RawValue<'_>) -> Option<String> {
    let is_harmless = |text: &str| quote_masked(text) == format!("`{text}`") && !text.contains('"');
    match old {
        RawValue::Text(text) => is_harmless(text).then(|| text.to_owned()),
        RawValue::Toml(DeValue::String(text)) => is_harmless(text).then(|| format!("\"{text}\"")),
        RawValue::Toml(DeValue::Integer(_)) => Some(value::parse_integer(old).ok()?.to_string()),
        RawValue::Toml(DeValue::Boolean(is_on)) => Some(is_on.to_string()),
        RawValue::Toml(DeValue::Float(_) | DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_)) => {
            None
        }
    }
}
