//! Converts the parsed configuration into the settings of each module, for a start, a reload, or a check without a
//! start, so that most modules do not depend on `config`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;

use super::https::Https;
use crate::admin::PublicPages;
use crate::admin::control::ControlSender;
use crate::body::budget::{BufferBudget, BufferLimits};
use crate::config::{
    BaseUrl, ClientConfig, Config, KeyConfig, PausedKeyConfig, ProxySetting, ServerConfig, SettingValue,
    TlsMode,
};
use crate::elevenlabs::affinity::RetentionLimits;
use crate::policy::authority::Authority;
use crate::policy::client::{AnonymousAccess, Client, ClientName, ClientTokens, Clients, IssuedToken};
use crate::policy::headers::ForwardedHeaders;
use crate::policy::min_rate::{GRACE_PERIOD, MinRate};
use crate::policy::origin::AccessRules;
use crate::policy::retention::Retention;
use crate::policy::sessions::SessionLimits;
use crate::secret::AdminTokenFingerprint;
use crate::{mirror, poller, pool, proxy, server, shared, store, upstream};

/// The settings of all modules, for [`start`](super::start).
#[derive(Clone, Debug)]
pub struct AppConfig {
    /// The clients and their tokens.
    pub clients: Clients,
    /// The accepted host names, and the origins of web pages that may send requests.
    pub access_rules: AccessRules,
    /// The path prefix in the base URL of clients, empty if there is none.
    pub base_path: String,
    /// The keys, in pool order.
    pub keys: Vec<pool::KeyEntry>,
    /// The settings of the pool.
    pub pool: pool::Settings,
    /// The authority of the provider.
    pub authority: Authority,
    /// A file of root certificates that are trusted in addition to the root certificates of the public web.
    pub ca_file: Option<PathBuf>,
    /// Timeouts and limits of upstream connections.
    pub upstream: upstream::Settings,
    /// The limits of proxied requests.
    pub proxy: proxy::Limits,
    /// The source of the TLS certificates of the listeners.
    pub https: Https,
    /// The limits of client connections.
    pub server: server::ConnectionLimits,
    /// Maximum time that idle client connections stay open during a drain.
    pub drain_idle_timeout: Duration,
    /// The number of threads that serve connections. 0 means one thread per core.
    pub workers: usize,
    /// The settings of the quota poller, or `None` when polling is disabled.
    pub polling: Option<poller::Settings>,
    /// The location of the usage database.
    pub database: store::DatabaseLocation,
    /// The settings of the usage store.
    pub store: store::Settings,
    /// The settings of the mirror in Supabase, or `None` when it is disabled.
    pub mirror: Option<mirror::Settings>,
    /// The settings of the Redis server that replicas share, or `None` for a single replica.
    pub redis: Option<shared::LinkSettings>,
    /// Sends changes to the controller, or `None` if there is no controller.
    pub control: Option<ControlSender>,
    /// The digest of the admin token, or `None` to disable the admin API.
    pub admin_token: Option<AdminTokenFingerprint>,
    /// The pages that may be read without a token.
    pub public_pages: PublicPages,
    /// Maximum number of event listeners.
    pub max_event_listeners: usize,
    /// The file of the sessions of the dashboard, or `None` to keep them in memory only.
    pub sessions_file: Option<PathBuf>,
    /// The time limits of sessions of the dashboard.
    pub session_limits: SessionLimits,
    /// Timeout of a key check.
    pub key_check_timeout: Duration,
    /// The settings with their sources, for operators.
    pub setting_values: Vec<SettingValue>,
}

impl AppConfig {
    /// Converts `config` into the settings of each module.
    ///
    /// # Errors
    ///
    /// Fails when the host of an upstream is not valid in a `host` header.
    pub fn from_config(config: Config) -> Result<Self, http::Error> {
        let default_route = to_route(&config, &config.upstream.base_url, &ProxySetting::Inherited)?;
        let mirror = mirror_settings(&config);
        Ok(Self {
            clients: clients(&config),
            base_path: config.server.base_path.to_string(),
            access_rules: AccessRules {
                hosts: config.access.hosts.clone(),
                origins: config.access.origins.clone(),
            },
            keys: key_entries(&config)?,
            pool: pool_settings(&config),
            authority: default_route,
            ca_file: config.upstream.ca_file.clone(),
            upstream: upstream_settings(&config),
            proxy: proxy_limits(&config),
            https: https_source(&config),
            server: connection_limits(&config.server),
            drain_idle_timeout: config.server.drain_idle_timeout,
            workers: config.server.workers,
            polling: polling_settings(&config)?,
            database: match config.storage.file() {
                Some(path) => store::DatabaseLocation::File(path.to_owned()),
                None => store::DatabaseLocation::Memory,
            },
            store: store_settings(&config, mirror.is_some()),
            mirror,
            redis: link_settings(&config),
            control: None,
            admin_token: config.admin_token,
            public_pages: PublicPages {
                status: config.admin.is_public("status"),
                metrics: config.admin.is_public("metrics"),
            },
            max_event_listeners: config.admin.max_event_listeners,
            sessions_file: config.state_directory().map(|directory| directory.sessions_path()),
            session_limits: SessionLimits {
                idle_timeout: config.admin.session_idle_timeout,
                max_duration: config.admin.max_session_duration,
            },
            key_check_timeout: config.quota_polling.timeout,
            setting_values: config.setting_values(),
        })
    }

    /// Converts the configuration `loaded` for a reload. The settings that need a restart keep the values of `started`,
    /// the configuration with which Keychoir was started.
    ///
    /// # Errors
    ///
    /// Fails when the host of an upstream is not valid in a `host` header.
    pub fn from_reload(loaded: &Config, started: &Config) -> Result<Self, http::Error> {
        let applied_config = loaded.with_restart_settings_of(started);
        let setting_values = applied_config.setting_values_with_pending(loaded);
        Ok(Self { setting_values, ..Self::from_config(applied_config)? })
    }
}

fn clients(config: &Config) -> Clients {
    let client_tokens = config.clients.iter().map(|client| {
        let ClientConfig { name, token, expires_at, previous_token, rules, origin } = client;
        let current = IssuedToken { fingerprint: *token, expires_at: *expires_at };
        let previous = previous_token
            .map(|(fingerprint, expires_at)| IssuedToken { fingerprint, expires_at: Some(expires_at) });
        (
            Client { name: ClientName::new(name), rules: rules.clone() },
            ClientTokens { origin: *origin, current, previous },
        )
    });
    let anonymous = match config.access.bring_your_own_key {
        true => AnonymousAccess::BringKeys,
        false => AnonymousAccess::Refused,
    };
    Clients::new(client_tokens.collect(), anonymous)
}

fn key_entries(config: &Config) -> Result<Vec<pool::KeyEntry>, http::Error> {
    let key_entry = |key_config: &KeyConfig| {
        let KeyConfig { key, name, workspace, base_url, proxy, weight, reserve_credits, origin } =
            key_config.clone();
        let pause = config.paused_keys.iter().find(|paused| paused.fingerprint == key.fingerprint());
        let to_key_route = |url: &BaseUrl| to_route(config, url, &proxy).map(Arc::new);
        let default_route = match proxy {
            ProxySetting::Inherited => None,
            ProxySetting::Direct | ProxySetting::Proxy(_) => Some(to_key_route(&config.upstream.base_url)?),
        };
        Ok(pool::KeyEntry {
            key,
            name,
            workspace,
            authority: base_url.as_ref().map(to_key_route).transpose()?,
            default_route,
            detected_region: None,
            weight,
            kept_credits: reserve_credits.unwrap_or(config.pool.reserve_credits as u64),
            pause: pause.map(PausedKeyConfig::pause),
            origin,
        })
    };
    config.keys.iter().map(key_entry).collect()
}

fn pool_settings(config: &Config) -> pool::Settings {
    let pool = &config.pool;
    pool::Settings {
        strategy: pool.strategy.0,
        queue_timeout: pool.queue_timeout,
        max_queued: pool.max_queued,
        near_limit_ratio: pool.near_limit_ratio,
        rate_limited_cooldown: pool.rate_limited_cooldown,
        concurrency_cooldown: pool.concurrency_cooldown,
        exhausted_cooldown: pool.exhausted_cooldown,
        billing_cooldown: pool.billing_cooldown,
        invalid_confirm_cooldown: pool.invalid_confirm_cooldown,
        invalid_cooldown: pool.invalid_cooldown,
        permission_cooldown: pool.permission_cooldown,
        feature_cooldown: pool.feature_cooldown,
        endpoint_cooldown: pool.endpoint_cooldown,
        unproven_cooldown: pool.unproven_cooldown,
        max_retry_after: pool.max_retry_after,
        probe_after: pool.probe_after,
        quota_lag: config.quota_polling.quota_lag,
    }
}

fn upstream_settings(config: &Config) -> upstream::Settings {
    let upstream = &config.upstream;
    upstream::Settings {
        connect_timeout: upstream.connect_timeout,
        response_timeout: upstream.response_timeout,
        stream_idle_timeout: upstream.stream_idle_timeout,
        request_body_timeout: config.server.request_body_timeout,
        min_request_body_rate: min_rate(config.server.min_request_body_rate),
        max_idle_connections: upstream.max_idle_connections,
        keepalive_timeout: upstream.keepalive_timeout,
        max_connection_duration: upstream.max_connection_duration,
    }
}

fn proxy_limits(config: &Config) -> proxy::Limits {
    let Config { server, pool, retry, affinity, websocket, access, .. } = config;
    proxy::Limits {
        max_requests: server.max_requests,
        max_requests_per_client: max_requests_per_client(server, config.clients.len()),
        unpriced_credits: access.unpriced_credits as u64,
        max_unpriced_requests: u32::try_from(access.max_unpriced_requests).unwrap_or(u32::MAX),
        max_cached_users: access.max_cached_users,
        request_body_timeout: server.request_body_timeout,
        min_request_body_rate: min_rate(server.min_request_body_rate),
        max_attempts: u32::try_from(retry.max_attempts).unwrap_or(u32::MAX),
        retry_timeout: retry.timeout,
        max_error_body_size: retry.max_error_body_size,
        error_body_timeout: retry.error_body_timeout,
        cost_estimate_timeout: pool.cost_estimate_timeout,
        blocks_admin_endpoints: access.block_admin_endpoints,
        max_response_scan_size: affinity.max_response_scan_size,
        not_found_ttl: affinity.not_found_ttl,
        redacts: access.redact,
        forwarded_headers: ForwardedHeaders::new(
            access.forward_headers.iter().filter_map(|name| HeaderName::try_from(name).ok()),
        ),
        socket_base: websocket.signed_url_base.url().map(Into::into),
        websocket: proxy::SocketLimits {
            idle_timeout: websocket.idle_timeout,
            max_session_duration: websocket.max_session_duration,
            replay_buffer: websocket.replay_buffer,
            max_buffered_message_size: websocket.max_buffered_message_size,
            speech_idle_timeout: websocket.speech_idle_timeout,
            auth_message_timeout: websocket.auth_message_timeout,
            max_session_buffer: websocket.max_session_buffer,
            close_timeout: websocket.close_timeout,
            quota_check_interval: websocket.quota_check_interval,
        },
        buffers: BufferBudget::new(&BufferLimits {
            max_body_memory: retry.buffer_size as u64,
            max_total_memory: retry.max_total_buffer_size as u64,
            max_body_disk: retry.spill_size as u64,
            max_total_disk: retry.max_total_spill_size as u64,
            min_disk_free_percent: retry.min_disk_free_percent as u64,
            directory: retry.spill_directory.clone(),
        }),
    }
}

fn connection_limits(server: &ServerConfig) -> server::ConnectionLimits {
    server::ConnectionLimits {
        request_headers_timeout: server.request_headers_timeout,
        keepalive_timeout: server.keepalive_timeout,
        linger_timeout: server.linger_timeout,
        max_linger_size: server.max_linger_size as u64,
        send_timeout: server.send_timeout,
        min_response_rate: min_rate(server.min_response_rate),
        response_grace: GRACE_PERIOD,
        max_request_headers_size: server.max_request_headers_size,
        max_connections: server.max_connections,
        idle_after: server::IDLE_AFTER,
    }
}

fn polling_settings(config: &Config) -> Result<Option<poller::Settings>, http::Error> {
    let to_region = |url: &BaseUrl| to_route(config, url, &ProxySetting::Inherited).map(Arc::new);
    let regions: Arc<[Arc<Authority>]> =
        config.upstream.regions().iter().map(to_region).collect::<Result<_, _>>()?;
    let polling = &config.quota_polling;
    Ok(polling.enabled.then_some(poller::Settings {
        interval: polling.interval,
        response_timeout: polling.timeout,
        regions,
    }))
}

fn store_settings(config: &Config, has_mirror: bool) -> store::Settings {
    let Config { storage, affinity, supabase, .. } = config;
    store::Settings {
        max_queued_records: storage.max_queued_records,
        commit_interval: storage.commit_interval,
        retention: Retention {
            attempts: retention_limit(storage.attempts_retention),
            hours: retention_limit(storage.hourly_retention),
        },
        mirror_scope: match (has_mirror, supabase.events) {
            (false, _) => store::MirrorScope::Nothing,
            (true, false) => store::MirrorScope::Keys,
            (true, true) => store::MirrorScope::KeysAndEvents,
        },
        owner_limits: RetentionLimits {
            max_identifiers: affinity.max_identifiers,
            max_idle: retention_limit(affinity.retention),
        },
    }
}

fn min_rate(bytes_per_second: usize) -> MinRate {
    MinRate { bytes_per_second: u32::try_from(bytes_per_second).unwrap_or(u32::MAX) }
}

/// Returns the configured retention, or `None` for zero, which disables the limit.
fn retention_limit(retention: Duration) -> Option<Duration> {
    (!retention.is_zero()).then_some(retention)
}

/// Returns the maximum number of concurrent requests of a client that has no limit of its own. If
/// `server.max_requests_per_client` is 0 and there are several clients, one client may use at most half of the requests
/// that `server.max_requests` allows.
fn max_requests_per_client(server: &ServerConfig, client_count: usize) -> u32 {
    let max_requests = match (server.max_requests_per_client, client_count) {
        (0, 0 | 1) => server.max_requests,
        (0, _) => server.max_requests.div_ceil(2),
        (configured, _) => configured,
    };
    u32::try_from(max_requests).unwrap_or(u32::MAX)
}

fn mirror_settings(config: &Config) -> Option<mirror::Settings> {
    let supabase = &config.supabase;
    let (url, key) = supabase.target()?;
    Some(mirror::Settings {
        base_url: url.to_string(),
        proxy: config.proxy_routes().for_mirror(url, &supabase.proxy),
        ca_file: config.upstream.ca_file.clone(),
        key: key.clone(),
        interval: supabase.interval,
        max_batch_rows: supabase.max_batch_rows,
        connect_timeout: supabase.connect_timeout,
        response_timeout: supabase.request_timeout,
        max_retry_delay: supabase.max_retry_delay,
        pause: supabase.setup_error_delay,
        final_push_timeout: supabase.final_push_timeout,
    })
}

fn link_settings(config: &Config) -> Option<shared::LinkSettings> {
    let redis = &config.redis;
    Some(shared::LinkSettings {
        url: redis.url.url()?.clone(),
        ca_file: redis.ca_file.clone(),
        pool: redis.pool.clone(),
        wait_timeout: redis.wait_timeout,
        beat_interval: redis.beat_interval,
        response_timeout: redis.response_timeout,
        connect_timeout: redis.connect_timeout,
        max_reconnect_delay: redis.max_reconnect_delay,
    })
}

fn https_source(config: &Config) -> Https {
    match (config.server.tls.mode(), &config.certificate) {
        (TlsMode::Files, Some(certificate)) => Https::Configured(certificate.clone()),
        // `Files` without a certificate is a configuration error that was reported earlier.
        (TlsMode::Files, None) | (TlsMode::Off, _) => Https::Off,
        (TlsMode::Auto, _) => {
            Https::LocalCa { location: config.ca_location(), hosts: config.access.hosts.clone() }
        }
    }
}

/// Returns the route to the provider at `url`, through the forward proxy that `key_proxy`, the setting of a key,
/// selects.
fn to_route(config: &Config, url: &BaseUrl, key_proxy: &ProxySetting) -> Result<Authority, http::Error> {
    let authority = Authority::new(url.scheme(), url.host(), url.port(), url.path_prefix())?;
    Ok(authority.through(config.proxy_routes().for_upstream(url, key_proxy)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::ApiKey;

    #[test]
    fn a_reload_keeps_the_default_host_and_proxy_of_every_key() {
        let key = |name: &str| KeyConfig::from(ApiKey::new(name).unwrap());
        let keys = vec![
            key("sk_default"),
            KeyConfig { base_url: Some("https://own.example".parse().unwrap()), ..key("sk_own_host") },
            KeyConfig { proxy: "http://own:1".parse().unwrap(), ..key("sk_own_proxy") },
        ];
        let started_config = Config { keys, ..Config::default() };
        let mut loaded_config = started_config.clone();
        loaded_config.upstream.base_url = "https://new.example".parse().unwrap();
        loaded_config.upstream.proxy = "http://new:1".parse().unwrap();
        loaded_config.keys[1].weight = 7;
        let app_config = AppConfig::from_reload(&loaded_config, &started_config).unwrap();
        let [default_key, key_with_host, key_with_proxy] = app_config.keys.try_into().unwrap();
        assert!(default_key.authority.is_none() && default_key.default_route.is_none());
        assert!(key_with_host.authority.unwrap().proxy().is_none(), "the new proxy must not apply");
        assert_eq!(key_with_host.weight, 7);
        let route = key_with_proxy.default_route.unwrap();
        let started_host = started_config.upstream.base_url.host();
        assert_eq!(route.host(), started_host, "the new host must not apply");
        assert_eq!(route.proxy().unwrap().to_string(), "http://own:1");
        assert_eq!(app_config.authority.host(), started_host);
    }
}
