//! The table of all settings.

use std::time::Duration;

use super::super::names;
use super::{DAY, Kind, Setting, ZERO};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const TEN_MINUTES: Duration = Duration::from_secs(600);
const HOUR: Duration = Duration::from_secs(3_600);
const MONTH: Duration = Duration::from_secs(31 * 24 * 3_600);
const KIBI: u64 = 1024;
const MEBI: u64 = 1024 * KIBI;
const GIBI: u64 = 1024 * MEBI;

const fn entry(path: &'static str, kind: Kind) -> Setting {
    Setting { path, kind }
}

pub(in crate::config) static TABLE: &[Setting] = &[
    entry("server.listen", Kind::Listen(|c| &mut c.server.listen)),
    entry("server.unix_mode", Kind::Word(|c| &mut c.server.unix_mode)),
    entry("server.tls", Kind::Tls(|c| &mut c.server.tls)),
    entry("server.tls.cert", Kind::OptionalFile(|c| &mut c.server.tls.cert)),
    entry("server.tls.key", Kind::OptionalFile(|c| &mut c.server.tls.key)),
    entry("server.tls_directory", Kind::OptionalFile(|c| &mut c.server.tls_directory)),
    entry(
        "server.request_headers_timeout",
        Kind::Duration(MS..=HOUR, |c| &mut c.server.request_headers_timeout),
    ),
    entry("server.keepalive_timeout", Kind::Duration(MS..=DAY, |c| &mut c.server.keepalive_timeout)),
    entry("server.linger_timeout", Kind::Duration(ZERO..=HOUR, |c| &mut c.server.linger_timeout)),
    entry("server.max_linger_size", Kind::Size(0..=1024 * GIBI, |c| &mut c.server.max_linger_size)),
    // hyper requires a buffer of at least 8 KiB.
    entry(
        "server.max_request_headers_size",
        Kind::Size(8 * KIBI..=MEBI, |c| &mut c.server.max_request_headers_size),
    ),
    entry("server.max_connections", Kind::Count(1..=1_000_000, |c| &mut c.server.max_connections)),
    entry("server.max_requests", Kind::Count(1..=1_000_000, |c| &mut c.server.max_requests)),
    entry(
        "server.max_requests_per_client",
        Kind::Count(0..=1_048_576, |c| &mut c.server.max_requests_per_client),
    ),
    entry("server.workers", Kind::Count(0..=1024, |c| &mut c.server.workers)),
    entry("server.base_path", Kind::Word(|c| &mut c.server.base_path)),
    entry("server.drain_timeout", Kind::Duration(ZERO..=HOUR, |c| &mut c.server.drain_timeout)),
    entry("server.drain_idle_timeout", Kind::Duration(ZERO..=HOUR, |c| &mut c.server.drain_idle_timeout)),
    entry("server.reload_interval", Kind::Duration(ZERO..=HOUR, |c| &mut c.server.reload_interval)),
    entry("server.send_timeout", Kind::Duration(MS..=DAY, |c| &mut c.server.send_timeout)),
    entry("server.request_body_timeout", Kind::Duration(MS..=HOUR, |c| &mut c.server.request_body_timeout)),
    entry("server.min_response_rate", Kind::Size(0..=MEBI, |c| &mut c.server.min_response_rate)),
    entry("server.min_request_body_rate", Kind::Size(0..=MEBI, |c| &mut c.server.min_request_body_rate)),
    entry("upstream.base_url", Kind::Word(|c| &mut c.upstream.base_url)),
    entry("upstream.ca_file", Kind::OptionalFile(|c| &mut c.upstream.ca_file)),
    entry("upstream.connect_timeout", Kind::Duration(MS..=TEN_MINUTES, |c| &mut c.upstream.connect_timeout)),
    entry("upstream.response_timeout", Kind::Duration(MS..=HOUR, |c| &mut c.upstream.response_timeout)),
    entry("upstream.stream_idle_timeout", Kind::Duration(MS..=HOUR, |c| &mut c.upstream.stream_idle_timeout)),
    entry(
        "upstream.max_idle_connections",
        Kind::Count(0..=100_000, |c| &mut c.upstream.max_idle_connections),
    ),
    entry("upstream.keepalive_timeout", Kind::Duration(MS..=HOUR, |c| &mut c.upstream.keepalive_timeout)),
    entry(
        "upstream.max_connection_duration",
        Kind::Duration(MS..=DAY, |c| &mut c.upstream.max_connection_duration),
    ),
    entry("upstream.region_base_urls", Kind::Names(names::base_url, |c| &mut c.upstream.region_base_urls)),
    entry("pool.strategy", Kind::Word(|c| &mut c.pool.strategy)),
    entry("pool.reserve_credits", Kind::Count(0..=1_000_000_000, |c| &mut c.pool.reserve_credits)),
    entry("pool.queue_timeout", Kind::Duration(ZERO..=HOUR, |c| &mut c.pool.queue_timeout)),
    entry("pool.max_queued", Kind::Count(0..=100_000, |c| &mut c.pool.max_queued)),
    entry("pool.cost_estimate_timeout", Kind::Duration(ZERO..=MINUTE, |c| &mut c.pool.cost_estimate_timeout)),
    entry("pool.rate_limited_cooldown", Kind::Duration(MS..=DAY, |c| &mut c.pool.rate_limited_cooldown)),
    entry("pool.concurrency_cooldown", Kind::Duration(MS..=HOUR, |c| &mut c.pool.concurrency_cooldown)),
    entry("pool.exhausted_cooldown", Kind::Duration(MS..=MONTH, |c| &mut c.pool.exhausted_cooldown)),
    entry(
        "pool.invalid_confirm_cooldown",
        Kind::Duration(MS..=DAY, |c| &mut c.pool.invalid_confirm_cooldown),
    ),
    entry("pool.invalid_cooldown", Kind::Duration(MS..=MONTH, |c| &mut c.pool.invalid_cooldown)),
    entry("pool.permission_cooldown", Kind::Duration(MS..=MONTH, |c| &mut c.pool.permission_cooldown)),
    entry("pool.feature_cooldown", Kind::Duration(MS..=MONTH, |c| &mut c.pool.feature_cooldown)),
    entry("pool.endpoint_cooldown", Kind::Duration(MS..=MONTH, |c| &mut c.pool.endpoint_cooldown)),
    entry("pool.unproven_cooldown", Kind::Duration(MS..=HOUR, |c| &mut c.pool.unproven_cooldown)),
    entry("pool.max_retry_after", Kind::Duration(MS..=DAY, |c| &mut c.pool.max_retry_after)),
    entry("pool.probe_after", Kind::Duration(MS..=HOUR, |c| &mut c.pool.probe_after)),
    entry("pool.billing_cooldown", Kind::Duration(MS..=MONTH, |c| &mut c.pool.billing_cooldown)),
    entry("pool.near_limit_ratio", Kind::Ratio(|c| &mut c.pool.near_limit_ratio)),
    entry("retry.max_attempts", Kind::Count(1..=1000, |c| &mut c.retry.max_attempts)),
    entry("retry.timeout", Kind::Duration(MS..=HOUR, |c| &mut c.retry.timeout)),
    entry("retry.buffer_size", Kind::Size(0..=GIBI, |c| &mut c.retry.buffer_size)),
    entry("retry.max_total_buffer_size", Kind::Size(0..=64 * GIBI, |c| &mut c.retry.max_total_buffer_size)),
    entry("retry.spill_size", Kind::Size(0..=1024 * GIBI, |c| &mut c.retry.spill_size)),
    entry("retry.max_total_spill_size", Kind::Size(0..=16_384 * GIBI, |c| &mut c.retry.max_total_spill_size)),
    entry("retry.min_disk_free_percent", Kind::Count(0..=100, |c| &mut c.retry.min_disk_free_percent)),
    entry("retry.spill_directory", Kind::File(|c| &mut c.retry.spill_directory)),
    entry("retry.max_error_body_size", Kind::Size(1..=16 * MEBI, |c| &mut c.retry.max_error_body_size)),
    entry("retry.error_body_timeout", Kind::Duration(MS..=MINUTE, |c| &mut c.retry.error_body_timeout)),
    entry("quota_polling.enabled", Kind::Switch(|c| &mut c.quota_polling.enabled)),
    // A round polls each key once, and the provider would rate limit an interval below a second.
    entry("quota_polling.interval", Kind::Duration(SECOND..=DAY, |c| &mut c.quota_polling.interval)),
    entry("quota_polling.timeout", Kind::Duration(MS..=TEN_MINUTES, |c| &mut c.quota_polling.timeout)),
    entry("quota_polling.quota_lag", Kind::Duration(MS..=DAY, |c| &mut c.quota_polling.quota_lag)),
    entry("storage.path", Kind::File(|c| &mut c.storage.path)),
    entry("storage.max_queued_records", Kind::Count(1..=1_048_576, |c| &mut c.storage.max_queued_records)),
    entry("storage.commit_interval", Kind::Duration(ZERO..=MINUTE, |c| &mut c.storage.commit_interval)),
    entry("storage.attempts_retention", Kind::Retention(|c| &mut c.storage.attempts_retention)),
    entry("storage.hourly_retention", Kind::Retention(|c| &mut c.storage.hourly_retention)),
    entry("storage.ephemeral", Kind::Switch(|c| &mut c.storage.ephemeral)),
    entry("supabase.enabled", Kind::Switch(|c| &mut c.supabase.enabled)),
    entry("supabase.url", Kind::Word(|c| &mut c.supabase.url)),
    entry("supabase.secret_key_file", Kind::OptionalFile(|c| &mut c.supabase.secret_key_file)),
    entry("supabase.events", Kind::Switch(|c| &mut c.supabase.events)),
    entry(
        "supabase.interval",
        Kind::Duration(Duration::from_millis(100)..=DAY, |c| &mut c.supabase.interval),
    ),
    // PostgREST and its gateway accept at least a megabyte, and a row has less than 2 KiB.
    entry("supabase.max_batch_rows", Kind::Count(1..=10_000, |c| &mut c.supabase.max_batch_rows)),
    entry("supabase.connect_timeout", Kind::Duration(MS..=TEN_MINUTES, |c| &mut c.supabase.connect_timeout)),
    entry("supabase.request_timeout", Kind::Duration(MS..=TEN_MINUTES, |c| &mut c.supabase.request_timeout)),
    entry("supabase.max_retry_delay", Kind::Duration(MS..=DAY, |c| &mut c.supabase.max_retry_delay)),
    entry("supabase.setup_error_delay", Kind::Duration(MS..=DAY, |c| &mut c.supabase.setup_error_delay)),
    entry("supabase.final_push_timeout", Kind::Duration(ZERO..=HOUR, |c| &mut c.supabase.final_push_timeout)),
    entry("affinity.max_identifiers", Kind::Count(256..=100_000_000, |c| &mut c.affinity.max_identifiers)),
    entry("affinity.retention", Kind::Retention(|c| &mut c.affinity.retention)),
    entry("affinity.not_found_ttl", Kind::Duration(ZERO..=DAY, |c| &mut c.affinity.not_found_ttl)),
    entry(
        "affinity.max_response_scan_size",
        Kind::Size(0..=64 * MEBI, |c| &mut c.affinity.max_response_scan_size),
    ),
    entry("websocket.idle_timeout", Kind::Duration(ZERO..=DAY, |c| &mut c.websocket.idle_timeout)),
    entry(
        "websocket.max_session_duration",
        Kind::Duration(ZERO..=MONTH, |c| &mut c.websocket.max_session_duration),
    ),
    entry("websocket.replay_buffer", Kind::Size(0..=64 * MEBI, |c| &mut c.websocket.replay_buffer)),
    entry(
        "websocket.max_buffered_message_size",
        Kind::Size(KIBI..=64 * MEBI, |c| &mut c.websocket.max_buffered_message_size),
    ),
    entry(
        "websocket.speech_idle_timeout",
        Kind::Duration(MS..=HOUR, |c| &mut c.websocket.speech_idle_timeout),
    ),
    entry(
        "websocket.auth_message_timeout",
        Kind::Duration(MS..=MINUTE, |c| &mut c.websocket.auth_message_timeout),
    ),
    entry(
        "websocket.max_session_buffer",
        Kind::Size(4 * KIBI..=64 * MEBI, |c| &mut c.websocket.max_session_buffer),
    ),
    entry("websocket.close_timeout", Kind::Duration(MS..=MINUTE, |c| &mut c.websocket.close_timeout)),
    entry(
        "websocket.quota_check_interval",
        Kind::Duration(MS..=HOUR, |c| &mut c.websocket.quota_check_interval),
    ),
    entry("websocket.signed_url_base", Kind::Word(|c| &mut c.websocket.signed_url_base)),
    entry("log.format", Kind::Word(|c| &mut c.log.format)),
    entry("log.level", Kind::Word(|c| &mut c.log.level)),
    entry("access.block_admin_endpoints", Kind::Switch(|c| &mut c.access.block_admin_endpoints)),
    entry("access.redact", Kind::Switch(|c| &mut c.access.redact)),
    entry("access.unpriced_credits", Kind::Count(0..=1_000_000_000, |c| &mut c.access.unpriced_credits)),
    entry(
        "access.max_unpriced_requests",
        Kind::Count(1..=1_048_576, |c| &mut c.access.max_unpriced_requests),
    ),
    entry("access.bring_your_own_key", Kind::Switch(|c| &mut c.access.bring_your_own_key)),
    entry("access.hosts", Kind::Names(names::host, |c| &mut c.access.hosts)),
    entry("access.origins", Kind::Names(names::origin, |c| &mut c.access.origins)),
    entry("access.forward_headers", Kind::Names(names::header, |c| &mut c.access.forward_headers)),
];
