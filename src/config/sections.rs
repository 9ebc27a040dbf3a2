//! The resolved sections of the configuration, with fields named as the settings. The defaults are
//! here and nowhere else; `config/keychoir.toml` gives the reason for each, and a test compares the
//! two.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::base_url::{BasePath, BaseUrl};
use super::choice::{LogFilter, LogFormat, StrategyChoice};
use super::listen::{Listens, UnixMode};
use super::socket_base::SocketBase;
use super::tls::TlsConfig;

/// The listeners and the limits of a client's connections and requests.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerConfig {
    /// The addresses to listen on.
    pub listen: Listens,
    /// The mode of the files of Unix sockets.
    pub unix_mode: UnixMode,
    /// How TLS is offered on TCP ports.
    pub tls: TlsConfig,
    /// The folder of the local CA; `None` for beside the database.
    pub tls_directory: Option<PathBuf>,
    /// Timeout for a request's headers.
    pub request_headers_timeout: Duration,
    /// How long a kept connection may be idle between two requests.
    pub keepalive_timeout: Duration,
    /// How long a request's rest is read and dropped after a response that ends its connection.
    pub linger_timeout: Duration,
    /// Bytes of that rest that are read.
    pub max_linger_size: usize,
    /// How long a client may accept no byte of its response.
    pub send_timeout: Duration,
    /// Bytes of a request's headers.
    pub max_request_headers_size: usize,
    /// Connected clients.
    pub max_connections: usize,
    /// Concurrent requests.
    pub max_requests: usize,
    /// Concurrent requests of one client without a limit of its own; 0 for a half, when there are
    /// several clients.
    pub max_requests_per_client: usize,
    /// Threads that serve connections; 0 for one a core.
    pub workers: usize,
    /// The prefix of every path.
    pub base_path: BasePath,
    /// How long a stop waits for concurrent requests.
    pub drain_timeout: Duration,
    /// How long a stop leaves kept connections without a request open.
    pub drain_idle_timeout: Duration,
    /// How often the files of the configuration are checked for changes; zero for never.
    pub reload_interval: Duration,
    /// How long a client may pause within a request's body.
    pub request_body_timeout: Duration,
    /// Bytes per second that a client must send of a body, on average; 0 sets no bound.
    pub min_request_body_rate: usize,
    /// Bytes per second that a client must read of a response, on average over the time in which
    /// the proxy waits for it; 0 sets no bound.
    pub min_response_rate: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: Listens::default(),
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

/// The provider and the bounds of its connections and responses.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamConfig {
    /// Where requests go.
    pub base_url: BaseUrl,
    /// Certificates of additional trusted CAs, in PEM.
    pub ca_file: Option<PathBuf>,
    /// Name lookup, TCP and TLS together.
    pub connect_timeout: Duration,
    /// From the end of the request to the head of the response.
    pub response_timeout: Duration,
    /// How long a response's body may pause.
    pub stream_idle_timeout: Duration,
    /// Connections kept open for later requests; 0 keeps none.
    pub max_idle_connections: usize,
    /// How long a kept connection may be idle.
    pub keepalive_timeout: Duration,
    /// How long a connection takes new requests.
    pub max_connection_duration: Duration,
    /// Base URLs of the provider's regions, at which a key of another region is tried.
    pub region_base_urls: Vec<String>,
}

/// The provider's regions beside its global host. Source: `environment.py` of its Python SDK 2.78.
const REGIONS: [&str; 4] = [
    "https://api.eu.residency.elevenlabs.io",
    "https://api.in.residency.elevenlabs.io",
    "https://api.sg.residency.elevenlabs.io",
    "https://api.us.elevenlabs.io",
];

impl UpstreamConfig {
    /// The regional hosts at which a key is tried that the upstream assigns to another region: the
    /// configured ones, else the provider's own. Any other upstream has none, because a key is only
    /// sent to where it is configured to go.
    #[must_use]
    pub fn regions(&self) -> Vec<BaseUrl> {
        let is_provider = BaseUrl::default().host() == self.base_url.host();
        let own: Vec<String> = REGIONS.iter().filter(|_| is_provider).map(|url| (*url).to_owned()).collect();
        let urls = if self.region_base_urls.is_empty() { &own } else { &self.region_base_urls };
        urls.iter().filter_map(|url| url.parse().ok()).collect()
    }
}

impl Default for UpstreamConfig {
    fn default() -> Self {
        Self {
            base_url: BaseUrl::default(),
            ca_file: None,
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

/// How a request's key is chosen, and how long a refused key is out of use.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolConfig {
    /// How the key of a request is chosen.
    pub strategy: StrategyChoice,
    /// Credits of its workspace that a key leaves, unless it has a figure of its own.
    pub reserve_credits: usize,
    /// How long a request waits in the queue for a key.
    pub queue_timeout: Duration,
    /// Requests in the queue.
    pub max_queued: usize,
    /// How long a request's text is awaited for an estimate of its cost.
    pub cost_estimate_timeout: Duration,
    /// How long a rate limited key is out of use when the response does not say.
    pub rate_limited_cooldown: Duration,
    /// How long a workspace is out of use after a concurrency refusal.
    pub concurrency_cooldown: Duration,
    /// How long a workspace without credits is out of use when its reset date is unknown.
    pub exhausted_cooldown: Duration,
    /// How long a key is out of use that is refused as invalid for the first time.
    pub invalid_confirm_cooldown: Duration,
    /// How long a key is out of use that is refused as invalid again.
    pub invalid_cooldown: Duration,
    /// How long a key is tried last for what it lacked the permission for.
    pub permission_cooldown: Duration,
    /// How long accounts of a plan are tried last for what the plan does not have.
    pub feature_cooldown: Duration,
    /// How long an account is tried last for an endpoint that it refuses without a known reason.
    pub endpoint_cooldown: Duration,
    /// How long a key or account is out of use after a refusal without figures.
    pub unproven_cooldown: Duration,
    /// The longest cooldown that the provider can impose.
    pub max_retry_after: Duration,
    /// How long after an unproven refusal one request may try a key again, when no other can serve.
    pub probe_after: Duration,
    /// How long a key with a payment problem is out of use.
    pub billing_cooldown: Duration,
    /// The used share of a key's credits from which it is near its limit; above 0, at most 1.
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

/// How often a refused request is sent again, and how much of its body is kept for that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryConfig {
    /// Attempts of one request, the first included.
    pub max_attempts: usize,
    /// From the first attempt on; no attempt starts later.
    pub timeout: Duration,
    /// Bytes of one request's body that are kept in memory; the rest goes to disk. 0 keeps none.
    pub buffer_size: usize,
    /// Bytes of all bodies kept in memory. At least `buffer_size`.
    pub max_total_buffer_size: usize,
    /// Bytes of one request's body that are kept on disk, beyond those in memory. 0 keeps none.
    pub spill_size: usize,
    /// Bytes of all bodies kept on disk. At least `spill_size`.
    pub max_total_spill_size: usize,
    /// The share of the disk, in percent, that is left free.
    pub min_disk_free_percent: usize,
    /// Where bodies on disk are kept, in anonymous files.
    pub spill_directory: PathBuf,
    /// Bytes of a refusal's body that are read to classify it.
    pub max_error_body_size: usize,
    /// How long a refusal's body is awaited.
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

/// How the keys' quotas are polled from the provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaPollingConfig {
    /// Whether they are polled at all.
    pub enabled: bool,
    /// From one round to the next.
    pub interval: Duration,
    /// How long one response may take.
    pub timeout: Duration,
    /// How long the provider's figures may lag behind what was spent.
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

/// Where usage records are kept, and how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageConfig {
    /// The database file. Its folder may not exist yet. Does not count when [`file`](Self::file) is `None`.
    pub path: PathBuf,
    /// Records waiting to be written.
    pub max_queued_records: usize,
    /// The longest time from one commit to the next while records keep coming.
    pub commit_interval: Duration,
    /// How long single attempts are kept; zero for ever.
    pub attempts_retention: Duration,
    /// How long sums by the hour are kept; zero for ever.
    pub hourly_retention: Duration,
    /// Whether records are kept in memory only.
    pub ephemeral: bool,
}

impl StorageConfig {
    /// The database file; `None` when records are kept in memory only.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        (!self.ephemeral).then_some(self.path.as_path())
    }
}

impl Default for StorageConfig {
    /// The path depends on the environment, so a resolved configuration never has this one.
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

/// How long the account of an identifier is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AffinityConfig {
    /// Identifiers that are remembered.
    pub max_identifiers: usize,
    /// How long after its last use an identifier is remembered; zero for ever.
    pub retention: Duration,
    /// Bytes of a response that are searched for identifiers; 0 searches none.
    pub max_response_scan_size: usize,
    /// How long a response "not found" of every account is remembered for an identifier.
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

/// The bounds of sessions on WebSockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebsocketConfig {
    /// How long a session may have no message in either direction; zero for ever.
    pub idle_timeout: Duration,
    /// How long a session may last; zero for ever.
    pub max_session_duration: Duration,
    /// Bytes of a client's first messages that are kept until the provider has accepted the key.
    pub replay_buffer: usize,
    /// Bytes up to which a message is read whole before it is sent on.
    pub max_buffered_message_size: usize,
    /// How long after the last text or audio a speech session counts as concurrent.
    pub speech_idle_timeout: Duration,
    /// How long a client may take to present its token in its first message.
    pub auth_message_timeout: Duration,
    /// Bytes of a client's messages that one session may have in memory.
    pub max_session_buffer: usize,
    /// Timeout for the reply to a close frame, and for the end of the connection after it.
    pub close_timeout: Duration,
    /// How often a session checks whether its client's quota of credits is exhausted.
    pub quota_check_interval: Duration,
    /// The address of Keychoir's WebSockets in signed URLs.
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

/// What the log contains, and in which format.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogConfig {
    /// The format of log lines.
    pub format: LogFormat,
    /// The minimum level, by target.
    pub level: LogFilter,
}
