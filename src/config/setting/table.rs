//! Lists all settings with their paths, their types and limits, and the fields that store them.

use std::time::Duration;

use super::super::list_items;
use super::{DAY, Setting, ValueKind, ZERO};

const MS: Duration = Duration::from_millis(1);
const TEN_MS: Duration = Duration::from_millis(10);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const TEN_MINUTES: Duration = Duration::from_secs(600);
const HOUR: Duration = Duration::from_secs(3_600);
const MONTH: Duration = Duration::from_secs(31 * 24 * 3_600);
const KIBI: u64 = 1024;
const MEBI: u64 = 1024 * KIBI;
const GIBI: u64 = 1024 * MEBI;

/// Creates the function that returns a field of the configuration, as in `field!(log.level)`.
macro_rules! field {
    ($section:ident $(.$field:ident)+) => {
        |config| &mut config.$section$(.$field)+
    };
}

const fn entry(path: &'static str, kind: ValueKind) -> Setting {
    Setting { path, kind }
}

/// All settings. The settings of one section are adjacent.
pub(in crate::config) static SETTINGS: &[Setting] = &[
    entry("server.listen", ValueKind::Listen(field!(server.listen))),
    entry("server.unix_mode", ValueKind::Text(field!(server.unix_mode))),
    entry("server.tls", ValueKind::Tls(field!(server.tls))),
    entry("server.tls.cert", ValueKind::OptionalFile(field!(server.tls.cert))),
    entry("server.tls.key", ValueKind::OptionalFile(field!(server.tls.key))),
    entry("server.tls_directory", ValueKind::OptionalFile(field!(server.tls_directory))),
    entry(
        "server.request_headers_timeout",
        ValueKind::Duration(MS..=HOUR, field!(server.request_headers_timeout)),
    ),
    entry("server.keepalive_timeout", ValueKind::Duration(MS..=DAY, field!(server.keepalive_timeout))),
    entry("server.linger_timeout", ValueKind::Duration(ZERO..=HOUR, field!(server.linger_timeout))),
    entry("server.max_linger_size", ValueKind::Size(0..=1024 * GIBI, field!(server.max_linger_size))),
    // hyper requires a buffer of at least 8 KiB.
    entry(
        "server.max_request_headers_size",
        ValueKind::Size(8 * KIBI..=MEBI, field!(server.max_request_headers_size)),
    ),
    entry("server.max_connections", ValueKind::Count(1..=1_000_000, field!(server.max_connections))),
    entry("server.max_requests", ValueKind::Count(1..=1_000_000, field!(server.max_requests))),
    entry(
        "server.max_requests_per_client",
        ValueKind::Count(0..=1_048_576, field!(server.max_requests_per_client)),
    ),
    entry("server.workers", ValueKind::Count(0..=1024, field!(server.workers))),
    entry("server.base_path", ValueKind::Text(field!(server.base_path))),
    entry("server.drain_timeout", ValueKind::Duration(ZERO..=HOUR, field!(server.drain_timeout))),
    entry("server.drain_idle_timeout", ValueKind::Duration(ZERO..=HOUR, field!(server.drain_idle_timeout))),
    entry("server.reload_interval", ValueKind::Duration(ZERO..=HOUR, field!(server.reload_interval))),
    entry("server.send_timeout", ValueKind::Duration(MS..=DAY, field!(server.send_timeout))),
    entry("server.request_body_timeout", ValueKind::Duration(MS..=HOUR, field!(server.request_body_timeout))),
    entry("server.min_response_rate", ValueKind::Size(0..=MEBI, field!(server.min_response_rate))),
    entry("server.min_request_body_rate", ValueKind::Size(0..=MEBI, field!(server.min_request_body_rate))),
    entry("upstream.base_url", ValueKind::Text(field!(upstream.base_url))),
    entry("upstream.ca_file", ValueKind::OptionalFile(field!(upstream.ca_file))),
    entry("upstream.proxy", ValueKind::Proxy(field!(upstream.proxy))),
    entry("upstream.proxy_file", ValueKind::OptionalFile(field!(upstream.proxy_file))),
    entry(
        "upstream.connect_timeout",
        ValueKind::Duration(MS..=TEN_MINUTES, field!(upstream.connect_timeout)),
    ),
    entry("upstream.response_timeout", ValueKind::Duration(MS..=HOUR, field!(upstream.response_timeout))),
    entry(
        "upstream.stream_idle_timeout",
        ValueKind::Duration(MS..=HOUR, field!(upstream.stream_idle_timeout)),
    ),
    entry(
        "upstream.max_idle_connections",
        ValueKind::Count(0..=100_000, field!(upstream.max_idle_connections)),
    ),
    entry("upstream.keepalive_timeout", ValueKind::Duration(MS..=HOUR, field!(upstream.keepalive_timeout))),
    entry(
        "upstream.max_connection_duration",
        ValueKind::Duration(MS..=DAY, field!(upstream.max_connection_duration)),
    ),
    entry(
        "upstream.region_base_urls",
        ValueKind::Strings(list_items::parse_base_url, field!(upstream.region_base_urls)),
    ),
    entry("pool.strategy", ValueKind::Text(field!(pool.strategy))),
    entry("pool.reserve_credits", ValueKind::Count(0..=1_000_000_000, field!(pool.reserve_credits))),
    entry("pool.queue_timeout", ValueKind::Duration(ZERO..=HOUR, field!(pool.queue_timeout))),
    entry("pool.max_queued", ValueKind::Count(0..=100_000, field!(pool.max_queued))),
    entry(
        "pool.cost_estimate_timeout",
        ValueKind::Duration(ZERO..=MINUTE, field!(pool.cost_estimate_timeout)),
    ),
    entry("pool.rate_limited_cooldown", ValueKind::Duration(MS..=DAY, field!(pool.rate_limited_cooldown))),
    entry("pool.concurrency_cooldown", ValueKind::Duration(MS..=HOUR, field!(pool.concurrency_cooldown))),
    entry("pool.exhausted_cooldown", ValueKind::Duration(MS..=MONTH, field!(pool.exhausted_cooldown))),
    entry(
        "pool.invalid_confirm_cooldown",
        ValueKind::Duration(MS..=DAY, field!(pool.invalid_confirm_cooldown)),
    ),
    entry("pool.invalid_cooldown", ValueKind::Duration(MS..=MONTH, field!(pool.invalid_cooldown))),
    entry("pool.permission_cooldown", ValueKind::Duration(MS..=MONTH, field!(pool.permission_cooldown))),
    entry("pool.feature_cooldown", ValueKind::Duration(MS..=MONTH, field!(pool.feature_cooldown))),
    entry("pool.endpoint_cooldown", ValueKind::Duration(MS..=MONTH, field!(pool.endpoint_cooldown))),
    entry("pool.unproven_cooldown", ValueKind::Duration(MS..=HOUR, field!(pool.unproven_cooldown))),
    entry("pool.max_retry_after", ValueKind::Duration(MS..=DAY, field!(pool.max_retry_after))),
    entry("pool.probe_after", ValueKind::Duration(MS..=HOUR, field!(pool.probe_after))),
    entry("pool.billing_cooldown", ValueKind::Duration(MS..=MONTH, field!(pool.billing_cooldown))),
    entry("pool.near_limit_ratio", ValueKind::Ratio(field!(pool.near_limit_ratio))),
    entry("retry.max_attempts", ValueKind::Count(1..=1000, field!(retry.max_attempts))),
    entry("retry.timeout", ValueKind::Duration(MS..=HOUR, field!(retry.timeout))),
    entry("retry.buffer_size", ValueKind::Size(0..=GIBI, field!(retry.buffer_size))),
    entry("retry.max_total_buffer_size", ValueKind::Size(0..=64 * GIBI, field!(retry.max_total_buffer_size))),
    entry("retry.spill_size", ValueKind::Size(0..=1024 * GIBI, field!(retry.spill_size))),
    entry(
        "retry.max_total_spill_size",
        ValueKind::Size(0..=16_384 * GIBI, field!(retry.max_total_spill_size)),
    ),
    entry("retry.min_disk_free_percent", ValueKind::Count(0..=100, field!(retry.min_disk_free_percent))),
    entry("retry.spill_directory", ValueKind::File(field!(retry.spill_directory))),
    entry("retry.max_error_body_size", ValueKind::Size(1..=16 * MEBI, field!(retry.max_error_body_size))),
    entry("retry.error_body_timeout", ValueKind::Duration(MS..=MINUTE, field!(retry.error_body_timeout))),
    entry("quota_polling.enabled", ValueKind::Bool(field!(quota_polling.enabled))),
    // Each round polls every key once. With an interval below a second, the provider would rate limit the polls.
    entry("quota_polling.interval", ValueKind::Duration(SECOND..=DAY, field!(quota_polling.interval))),
    entry("quota_polling.timeout", ValueKind::Duration(MS..=TEN_MINUTES, field!(quota_polling.timeout))),
    entry("quota_polling.quota_lag", ValueKind::Duration(MS..=DAY, field!(quota_polling.quota_lag))),
    entry("storage.path", ValueKind::File(field!(storage.path))),
    entry("storage.max_queued_records", ValueKind::Count(1..=1_048_576, field!(storage.max_queued_records))),
    entry("storage.commit_interval", ValueKind::Duration(ZERO..=MINUTE, field!(storage.commit_interval))),
    entry("storage.attempts_retention", ValueKind::Retention(field!(storage.attempts_retention))),
    entry("storage.hourly_retention", ValueKind::Retention(field!(storage.hourly_retention))),
    entry("storage.ephemeral", ValueKind::Bool(field!(storage.ephemeral))),
    entry("supabase.enabled", ValueKind::Bool(field!(supabase.enabled))),
    entry("supabase.url", ValueKind::Text(field!(supabase.url))),
    entry("supabase.secret_key_file", ValueKind::OptionalFile(field!(supabase.secret_key_file))),
    entry("supabase.proxy", ValueKind::Proxy(field!(supabase.proxy))),
    entry("supabase.proxy_file", ValueKind::OptionalFile(field!(supabase.proxy_file))),
    entry("supabase.events", ValueKind::Bool(field!(supabase.events))),
    entry(
        "supabase.interval",
        ValueKind::Duration(Duration::from_millis(100)..=DAY, field!(supabase.interval)),
    ),
    // PostgREST and its gateway accept at least a megabyte, and a row has less than 2 KiB.
    entry("supabase.max_batch_rows", ValueKind::Count(1..=10_000, field!(supabase.max_batch_rows))),
    entry(
        "supabase.connect_timeout",
        ValueKind::Duration(MS..=TEN_MINUTES, field!(supabase.connect_timeout)),
    ),
    entry(
        "supabase.request_timeout",
        ValueKind::Duration(MS..=TEN_MINUTES, field!(supabase.request_timeout)),
    ),
    entry("supabase.max_retry_delay", ValueKind::Duration(MS..=DAY, field!(supabase.max_retry_delay))),
    entry("supabase.setup_error_delay", ValueKind::Duration(MS..=DAY, field!(supabase.setup_error_delay))),
    entry(
        "supabase.final_push_timeout",
        ValueKind::Duration(ZERO..=HOUR, field!(supabase.final_push_timeout)),
    ),
    entry("redis.url", ValueKind::Redis(field!(redis.url))),
    entry("redis.url_file", ValueKind::OptionalFile(field!(redis.url_file))),
    entry("redis.ca_file", ValueKind::OptionalFile(field!(redis.ca_file))),
    entry("redis.pool", ValueKind::Text(field!(redis.pool))),
    entry("redis.wait_timeout", ValueKind::Duration(MS..=SECOND, field!(redis.wait_timeout))),
    entry(
        "redis.beat_interval",
        ValueKind::Duration(Duration::from_millis(20)..=Duration::from_secs(2), field!(redis.beat_interval)),
    ),
    entry(
        "redis.response_timeout",
        ValueKind::Duration(TEN_MS..=Duration::from_secs(10), field!(redis.response_timeout)),
    ),
    entry("redis.connect_timeout", ValueKind::Duration(TEN_MS..=MINUTE, field!(redis.connect_timeout))),
    entry(
        "redis.max_reconnect_delay",
        ValueKind::Duration(TEN_MS..=MINUTE, field!(redis.max_reconnect_delay)),
    ),
    entry("affinity.max_identifiers", ValueKind::Count(256..=100_000_000, field!(affinity.max_identifiers))),
    entry("affinity.retention", ValueKind::Retention(field!(affinity.retention))),
    entry("affinity.not_found_ttl", ValueKind::Duration(ZERO..=DAY, field!(affinity.not_found_ttl))),
    entry(
        "affinity.max_response_scan_size",
        ValueKind::Size(0..=64 * MEBI, field!(affinity.max_response_scan_size)),
    ),
    entry("websocket.idle_timeout", ValueKind::Duration(ZERO..=DAY, field!(websocket.idle_timeout))),
    entry(
        "websocket.max_session_duration",
        ValueKind::Duration(ZERO..=MONTH, field!(websocket.max_session_duration)),
    ),
    entry("websocket.replay_buffer", ValueKind::Size(0..=64 * MEBI, field!(websocket.replay_buffer))),
    entry(
        "websocket.max_buffered_message_size",
        ValueKind::Size(KIBI..=64 * MEBI, field!(websocket.max_buffered_message_size)),
    ),
    entry(
        "websocket.speech_idle_timeout",
        ValueKind::Duration(MS..=HOUR, field!(websocket.speech_idle_timeout)),
    ),
    entry(
        "websocket.auth_message_timeout",
        ValueKind::Duration(MS..=MINUTE, field!(websocket.auth_message_timeout)),
    ),
    entry(
        "websocket.max_session_buffer",
        ValueKind::Size(4 * KIBI..=64 * MEBI, field!(websocket.max_session_buffer)),
    ),
    entry("websocket.close_timeout", ValueKind::Duration(MS..=MINUTE, field!(websocket.close_timeout))),
    entry(
        "websocket.quota_check_interval",
        ValueKind::Duration(MS..=HOUR, field!(websocket.quota_check_interval)),
    ),
    entry("websocket.signed_url_base", ValueKind::Text(field!(websocket.signed_url_base))),
    entry("log.format", ValueKind::Text(field!(log.format))),
    entry("log.level", ValueKind::Text(field!(log.level))),
    entry("admin.listen", ValueKind::Text(field!(admin.listen))),
    entry("admin.token_file", ValueKind::OptionalFile(field!(admin.token_file))),
    entry("admin.public", ValueKind::Strings(list_items::parse_public_page, field!(admin.public))),
    entry("admin.max_event_listeners", ValueKind::Count(1..=1_000, field!(admin.max_event_listeners))),
    entry(
        "admin.session_idle_timeout",
        ValueKind::Duration(MINUTE..=MONTH, field!(admin.session_idle_timeout)),
    ),
    entry(
        "admin.max_session_duration",
        ValueKind::Duration(MINUTE..=MONTH, field!(admin.max_session_duration)),
    ),
    entry("access.block_admin_endpoints", ValueKind::Bool(field!(access.block_admin_endpoints))),
    entry("access.redact", ValueKind::Bool(field!(access.redact))),
    entry("access.unpriced_credits", ValueKind::Count(0..=1_000_000_000, field!(access.unpriced_credits))),
    entry(
        "access.max_unpriced_requests",
        ValueKind::Count(1..=1_048_576, field!(access.max_unpriced_requests)),
    ),
    entry("access.max_cached_users", ValueKind::Count(1..=10_000_000, field!(access.max_cached_users))),
    entry("access.bring_your_own_key", ValueKind::Bool(field!(access.bring_your_own_key))),
    entry("access.hosts", ValueKind::Strings(list_items::parse_host, field!(access.hosts))),
    entry("access.origins", ValueKind::Strings(list_items::parse_origin, field!(access.origins))),
    entry(
        "access.forward_headers",
        ValueKind::Strings(list_items::parse_header_name, field!(access.forward_headers)),
    ),
];
