//! Defines most sections of the configuration with their defaults. Each field has the name of its setting.
//! `config/keychoir.toml` explains each setting, and a test compares its defaults with those in this file. The sections
//! `[access]`, `[admin]`, `[redis]` and `[supabase]` are in their own modules.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::base_url::{BasePath, BaseUrl};
use super::listen::{ListenAddresses, UnixMode};
use super::log::{LogFilter, LogFormat};
use super::proxy::ProxySetting;
use super::socket_base::SocketBase;
use super::strategy::StrategyChoice;
use super::tls::TlsConfig;

/// The listeners, and the limits of client connections and requests.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerConfig {
    /// The addresses to listen on.
    pub listen: ListenAddresses,
    /// The mode of the files of Unix sockets.
    pub unix_mode: UnixMode,
    /// The certificate for HTTPS on TCP ports.
    pub tls: TlsConfig,
    /// The directory of the local CA. `None` means the directory `tls` beside the database.
    pub tls_directory: Option<PathBuf>,
    /// Timeout for a request's headers.
    pub request_headers_timeout: Duration,
    /// Maximum idle time of a client connection between two requests.
    pub keepalive_timeout: Duration,
    /// Maximum time for which the unread bytes of a request are read and discarded after a response that closes the
    /// connection.
    pub linger_timeout: Duration,
    /// Maximum number of unread bytes that are discarded.
    pub max_linger_size: usize,
    /// Maximum time without progress in sending a response to a client.
    pub send_timeout: Duration,
    /// Maximum number of bytes of a request's headers.
    pub max_request_headers_size: usize,
    /// Maximum number of client connections.
    pub max_connections: usize,
    /// Maximum number of concurrent requests.
    pub max_requests: usize,
    /// Maximum number of concurrent requests of a client without its own limit. 0 means half of `max_requests` if there
    /// are several clients, and `max_requests` otherwise.
    pub max_requests_per_client: usize,
    /// Number of threads that serve connections, or 0 for one per core.
    pub workers: usize,
    /// A path prefix that requests may have.
    pub base_path: BasePath,
    /// Maximum time at shutdown for running requests to finish.
    pub drain_timeout: Duration,
    /// Maximum time at shutdown during which idle client connections stay open. It is at most half of `drain_timeout`.
    pub drain_idle_timeout: Duration,
    /// Interval between two checks of the configuration files for changes, or zero for no checks.
    pub reload_interval: Duration,
    /// Maximum pause between two reads of a request's body.
    pub request_body_timeout: Duration,
    /// Minimum average rate of a request's body in bytes per second, or 0 for no minimum.
    pub min_request_body_rate: usize,
    /// Minimum average rate in bytes per second at which a client reads a response, measured while
    /// Keychoir waits for the client, or 0 for no minimum.
    pub min_response_rate: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: ListenAddresses::default(),
            unix_mode: UnixMode::default(),
            tls: TlsConfig::default(),
            tls_directory: None,
            request_headers_timeout: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(75),
            linger_timeout: Duration::from_secs(30),
            max_linger_size: 256 * 1024 * 1024,
            send_timeout: Duration::from_secs(600),
            max_request_headers_size: 64 * 1024,
            max_connections: 10_000,
            max_requests: 5_000,
            max_requests_per_client: 0,
            workers: 0,
            base_path: BasePath::default(),
            drain_timeout: Duration::from_secs(30),
            drain_idle_timeout: Duration::from_secs(5),
            reload_interval: Duration::from_secs(5),
            request_body_timeout: Duration::from_secs(60),
            min_request_body_rate: 500,
            min_response_rate: 2_000,
        }
    }
}

/// The provider's address, and the limits of connections and responses.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamConfig {
    /// The base URL of the provider.
    pub base_url: BaseUrl,
    /// A PEM file with certificates of additional trusted CAs.
    pub ca_file: Option<PathBuf>,
    /// The forward proxy for connections to the provider.
    pub proxy: ProxySetting,
    /// A file with the value of `proxy`.
    pub proxy_file: Option<PathBuf>,
    /// Timeout for DNS, TCP and TLS together.
    pub connect_timeout: Duration,
    /// Timeout from the end of a request to the head of its response.
    pub response_timeout: Duration,
    /// Maximum pause between two reads of a response's body.
    pub stream_idle_timeout: Duration,
    /// Maximum number of idle connections kept for later requests, or 0 for none.
    pub max_idle_connections: usize,
    /// Maximum idle time of a connection that is kept for later requests.
    pub keepalive_timeout: Duration,
    /// Age from which a connection gets no new requests.
    pub max_connection_duration: Duration,
    /// Base URLs of the provider's regions, at which the region of a key is searched.
    pub region_base_urls: Vec<String>,
}

/// The provider's regional hosts, in addition to the global one. Source: `environment.py` of its
/// Python SDK 2.78.
const REGIONS: [&str; 4] = [
    "https://api.eu.residency.elevenlabs.io",
    "https://api.in.residency.elevenlabs.io",
    "https://api.sg.residency.elevenlabs.io",
    "https://api.us.elevenlabs.io",
];

impl UpstreamConfig {
    /// Returns the regional hosts at which the region of a key is searched: the configured ones, or else
    /// the regions of the provider if the upstream is the provider. Another upstream has no default regions,
    /// because keys are sent only to configured hosts.
    #[must_use]
    pub fn regions(&self) -> Vec<BaseUrl> {
        let is_upstream_provider = BaseUrl::default().host() == self.base_url.host();
        let default_urls: Vec<String> =
            REGIONS.iter().filter(|_| is_upstream_provider).map(|url| (*url).to_owned()).collect();
        let urls = if self.region_base_urls.is_empty() { &default_urls } else { &self.region_base_urls };
        urls.iter().filter_map(|url| url.parse().ok()).collect()
    }
}

impl Default for UpstreamConfig {
    fn default() -> Self {
        Self {
            base_url: BaseUrl::default(),
            ca_file: None,
            proxy: ProxySetting::default(),
            proxy_file: None,
            connect_timeout: Duration::from_secs(10),
            response_timeout: Duration::from_secs(300),
            stream_idle_timeout: Duration::from_secs(300),
            max_idle_connections: 256,
            keepalive_timeout: Duration::from_secs(50),
            max_connection_duration: Duration::from_secs(60),
            region_base_urls: Vec::new(),
        }
    }
}

/// The selection of keys, the queue, and the cooldowns of refused keys.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolConfig {
    /// The strategy that chooses the key of a request.
    pub strategy: StrategyChoice,
    /// Credits of a workspace that its keys do not use. A key can have a different value.
    pub reserve_credits: usize,
    /// Maximum wait of a request in the queue for a key.
    pub queue_timeout: Duration,
    /// Maximum number of requests in the queue.
    pub max_queued: usize,
    /// Maximum wait for the text of a request, from which its cost is estimated.
    pub cost_estimate_timeout: Duration,
    /// Cooldown of a rate limited key when the response has no `Retry-After`.
    pub rate_limited_cooldown: Duration,
    /// Cooldown of a workspace after it refused a request because of its concurrency limit.
    pub concurrency_cooldown: Duration,
    /// Cooldown of a workspace without credits when its reset date is unknown.
    pub exhausted_cooldown: Duration,
    /// Cooldown of a key after the provider refused it as invalid for the first time.
    pub invalid_confirm_cooldown: Duration,
    /// Cooldown of a key after the provider refused it as invalid again.
    pub invalid_cooldown: Duration,
    /// Time in which a key is tried last for requests that need a permission that it lacks.
    pub permission_cooldown: Duration,
    /// Time in which accounts of a plan are tried last for a feature that the plan lacks.
    pub feature_cooldown: Duration,
    /// Time in which an account is tried last for an endpoint that it refused without a known reason.
    pub endpoint_cooldown: Duration,
    /// Maximum cooldown of a key or account after a refusal without credit counts.
    pub unproven_cooldown: Duration,
    /// Maximum cooldown that a response of the provider can set.
    pub max_retry_after: Duration,
    /// Time after a refusal without credit counts from which one request may use the key again if no
    /// other key can serve it.
    pub probe_after: Duration,
    /// Cooldown of a key with a payment problem.
    pub billing_cooldown: Duration,
    /// Ratio of used credits to the limit from which a key is near its limit: above 0 and at most 1.
    pub near_limit_ratio: f64,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            strategy: StrategyChoice::default(),
            reserve_credits: 0,
            queue_timeout: Duration::from_secs(30),
            max_queued: 1_000,
            cost_estimate_timeout: Duration::from_millis(250),
            rate_limited_cooldown: Duration::from_secs(60),
            concurrency_cooldown: Duration::from_secs(2),
            exhausted_cooldown: Duration::from_secs(3600),
            invalid_confirm_cooldown: Duration::from_secs(60),
            invalid_cooldown: Duration::from_secs(24 * 3600),
            permission_cooldown: Duration::from_secs(3600),
            feature_cooldown: Duration::from_secs(3600),
            endpoint_cooldown: Duration::from_secs(600),
            unproven_cooldown: Duration::from_secs(60),
            max_retry_after: Duration::from_secs(300),
            probe_after: Duration::from_secs(1),
            billing_cooldown: Duration::from_secs(3600),
            near_limit_ratio: 0.8,
        }
    }
}

/// The retries of requests, and the buffers for their bodies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryConfig {
    /// Maximum number of attempts of one request, including the first.
    pub max_attempts: usize,
    /// Maximum time from the last byte of a request to the start of its last attempt.
    pub timeout: Duration,
    /// Maximum number of bytes of one request's body in memory. The remaining bytes are written to disk.
    pub buffer_size: usize,
    /// Maximum number of bytes of all buffers in memory, including those of bodies. It is at least
    /// `buffer_size`.
    pub max_total_buffer_size: usize,
    /// Maximum number of bytes of one request body on disk, in addition to the bytes in memory.
    pub spill_size: usize,
    /// Maximum number of bytes of all buffered bodies on disk.
    pub max_total_spill_size: usize,
    /// Percentage of the disk that stays free.
    pub min_disk_free_percent: usize,
    /// The directory of the anonymous files that buffer bodies.
    pub spill_directory: PathBuf,
    /// Maximum number of bytes of a refusal's body that are read to classify the refusal.
    pub max_error_body_size: usize,
    /// Timeout for the body of a refusal.
    pub error_body_timeout: Duration,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self {
            max_attempts: 16,
            timeout: Duration::from_secs(120),
            buffer_size: 16 * 1024 * 1024,
            max_total_buffer_size: 128 * 1024 * 1024,
            spill_size: 6 * 1024 * 1024 * 1024,
            max_total_spill_size: 24 * 1024 * 1024 * 1024,
            min_disk_free_percent: 10,
            spill_directory: PathBuf::from("/var/tmp"),
            max_error_body_size: 64 * 1024,
            error_body_timeout: Duration::from_secs(2),
        }
    }
}

/// The polling of the keys' quotas from the provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaPollingConfig {
    /// Whether quotas are polled.
    pub enabled: bool,
    /// Interval between two polls of a key.
    pub interval: Duration,
    /// Timeout of a poll.
    pub timeout: Duration,
    /// Time after a request in which the provider's credit count may not include the request yet. During this time, the
    /// higher one of the pool's count and the provider's count is used.
    pub quota_lag: Duration,
}

impl Default for QuotaPollingConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            interval: Duration::from_secs(600),
            timeout: Duration::from_secs(10),
            quota_lag: Duration::from_secs(300),
        }
    }
}

/// The storage and retention of usage records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageConfig {
    /// The database file. The directory is created if it is missing. See [`file`](Self::file).
    pub path: PathBuf,
    /// Maximum number of usage records that wait to be written.
    pub max_queued_records: usize,
    /// Maximum time between two commits while records are received.
    pub commit_interval: Duration,
    /// Retention of the records of attempts, or zero for unlimited.
    pub attempts_retention: Duration,
    /// Retention of hourly sums, or zero for unlimited.
    pub hourly_retention: Duration,
    /// Whether usage records are kept only in memory.
    pub ephemeral: bool,
}

impl StorageConfig {
    /// Returns the database file, or `None` if usage records are kept only in memory.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        (!self.ephemeral).then_some(self.path.as_path())
    }
}

impl Default for StorageConfig {
    /// The default path depends on the environment, so resolving the configuration replaces it.
    fn default() -> Self {
        Self {
            path: PathBuf::from("keychoir.db"),
            max_queued_records: 8192,
            commit_interval: Duration::from_millis(500),
            attempts_retention: Duration::from_secs(30 * 24 * 3600),
            hourly_retention: Duration::from_secs(400 * 24 * 3600),
            ephemeral: false,
        }
    }
}

/// The records of the accounts that own identifiers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AffinityConfig {
    /// Maximum number of stored identifiers.
    pub max_identifiers: usize,
    /// Time after its last use at which an identifier is removed, or zero for unlimited.
    pub retention: Duration,
    /// Maximum number of bytes of a response that are searched for identifiers, or 0 for no search.
    pub max_response_scan_size: usize,
    /// Time for which Keychoir remembers that no account owns an identifier.
    pub not_found_ttl: Duration,
}

impl Default for AffinityConfig {
    fn default() -> Self {
        Self {
            max_identifiers: 200_000,
            retention: Duration::from_secs(400 * 24 * 3600),
            max_response_scan_size: 1024 * 1024,
            not_found_ttl: Duration::from_secs(60),
        }
    }
}

/// The limits of WebSocket sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebsocketConfig {
    /// Maximum time without a message in either direction, or zero for unlimited.
    pub idle_timeout: Duration,
    /// Maximum duration of a session, or zero for unlimited.
    pub max_session_duration: Duration,
    /// Maximum number of bytes of a client's first messages that are buffered, so that they can be sent
    /// again, until the provider accepts the key.
    pub replay_buffer: usize,
    /// Maximum number of bytes of a message that is buffered completely before it is forwarded.
    pub max_buffered_message_size: usize,
    /// Time after the last text or audio in which a speech session counts as concurrent.
    pub speech_idle_timeout: Duration,
    /// Timeout for the first message of a client that sends its token in it.
    pub auth_message_timeout: Duration,
    /// Maximum number of bytes of a client's messages that one session buffers.
    pub max_session_buffer: usize,
    /// Timeout for the reply to a close frame, and then for the connection to close.
    pub close_timeout: Duration,
    /// Interval between two checks of the client's credit quota.
    pub quota_check_interval: Duration,
    /// The base URL of Keychoir's WebSockets in signed URLs.
    pub signed_url_base: SocketBase,
}

impl Default for WebsocketConfig {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(300),
            max_session_duration: Duration::from_secs(24 * 3600),
            replay_buffer: 256 * 1024,
            max_buffered_message_size: 256 * 1024,
            speech_idle_timeout: Duration::from_secs(2),
            auth_message_timeout: Duration::from_secs(10),
            max_session_buffer: 1024 * 1024,
            close_timeout: Duration::from_secs(5),
            quota_check_interval: Duration::from_secs(5),
            signed_url_base: SocketBase::default(),
        }
    }
}

/// The format and level of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogConfig {
    /// The format of log lines.
    pub format: LogFormat,
    /// The minimum level of the events of each target.
    pub level: LogFilter,
}
