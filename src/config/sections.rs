//! The resolved sections: what the rest of the house reads. The defaults are here and nowhere
//! else; `config/keychoir.toml` gives the reason for each, and a test holds the two together.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::base_url::{BasePath, BaseUrl};
use super::choice::{LogFilter, LogFormat, StrategyChoice};
use super::listen::{Listens, UnixMode};
use super::socket_base::SocketBase;
use super::tls::TlsConfig;

/// Where clients come in, and how long they may keep us waiting.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerConfig {
    /// Where to listen.
    pub listen: Listens,
    /// Who may connect to a Unix socket that is listened on.
    pub unix_mode: UnixMode,
    /// How clients may speak TLS on a port.
    pub tls: TlsConfig,
    /// Where the local authority lives; beside the database when nothing is said.
    pub tls_directory: Option<PathBuf>,
    /// For a request's head to arrive.
    pub head_read_max: Duration,
    /// For the next request on a kept connection.
    pub keepalive_timeout: Duration,
    /// For a client to finish what it sends after an answer that ends its connection.
    pub linger_timeout: Duration,
    /// What a client may still send then.
    pub linger_bytes_max: usize,
    /// For a client to take something of an answer that waits for it.
    pub write_idle_max: Duration,
    /// A request's head.
    pub head_bytes_max: usize,
    /// Clients connected at once.
    pub connections_max: usize,
    /// Requests under way at once.
    pub requests_max: usize,
    /// Of these, requests of one client without a limit of its own; 0 for a half, when there are several.
    pub max_requests_per_client: usize,
    /// Threads that serve connections; 0 for one a core.
    pub workers: usize,
    /// What stands before every path.
    pub base_path: BasePath,
    /// How long a stop waits for the requests under way.
    pub shutdown_grace: Duration,
    /// How long a stop leaves kept connections open that have no request.
    pub drain_idle_timeout: Duration,
    /// From one look at the files of the configuration to the next; zero never looks.
    pub reload_interval: Duration,
    /// How long a client may pause within a request's body.
    pub body_idle_max: Duration,
    /// Bytes a second that a client sends of a body at the least, on average; 0 sets no bound.
    pub request_body_min_rate: usize,
    /// Bytes a second that a client takes of an answer at the least, on average over the time in which it is
    /// waited for; 0 sets no bound.
    pub response_min_rate: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: Listens::default(),
            unix_mode: UnixMode::default(),
            tls: TlsConfig::default(),
            tls_directory: None,
            head_read_max: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(75),
            linger_timeout: Duration::from_secs(30),
            linger_bytes_max: 256 * 1024 * 1024,
            write_idle_max: Duration::from_secs(600),
            head_bytes_max: 64 * 1024,
            connections_max: 10_000,
            requests_max: 5_000,
            max_requests_per_client: 0,
            workers: 0,
            base_path: BasePath::default(),
            shutdown_grace: Duration::from_secs(30),
            drain_idle_timeout: Duration::from_secs(5),
            reload_interval: Duration::from_secs(5),
            body_idle_max: Duration::from_secs(60),
            request_body_min_rate: 500,
            response_min_rate: 2_000,
        }
    }
}

/// The provider, and how long it may keep us waiting.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamConfig {
    /// Where requests go.
    pub base_url: BaseUrl,
    /// Certificates of authorities that are trusted beside the web's, in PEM.
    pub ca_file: Option<PathBuf>,
    /// Name lookup, TCP and TLS together.
    pub connect_max: Duration,
    /// From the end of the request to the head of the answer.
    pub first_byte_max: Duration,
    /// How long an answer's body may pause.
    pub stream_idle_max: Duration,
    /// Connections kept open for later requests; 0 keeps none.
    pub idle_connections_max: usize,
    /// How long a kept connection may lie idle.
    pub idle_max: Duration,
    /// How long a connection takes new requests.
    pub connection_age_max: Duration,
    /// Base URLs of the provider's regions, where a key of another region is looked for.
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
    /// The regions in which a key is looked for that the upstream calls one of another region: those
    /// that are configured, else the provider's own, and for any other upstream none, because a key
    /// leaves only for where it is configured to go.
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
            connect_max: Duration::from_secs(10),
            first_byte_max: Duration::from_secs(300),
            stream_idle_max: Duration::from_secs(300),
            idle_connections_max: 256,
            idle_max: Duration::from_secs(50),
            connection_age_max: Duration::from_secs(60),
            region_base_urls: Vec::new(),
        }
    }
}

/// Which key is taken, and how long a refused one rests.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolConfig {
    /// How the key of a request is chosen.
    pub strategy: StrategyChoice,
    /// Credits of its workspace that a key leaves, unless it says otherwise itself.
    pub reserve_credits: usize,
    /// How long a request waits for a key that is only busy.
    pub wait_max: Duration,
    /// How many requests may wait at once.
    pub waiting_max: usize,
    /// How long a request's text is waited for, to know what it will cost.
    pub foresee_max: Duration,
    /// How long a rate limited key rests when the answer does not say.
    pub rate_limited_cooldown: Duration,
    /// How long a workspace rests after a concurrency refusal.
    pub concurrency_cooldown: Duration,
    /// How long a workspace without credits rests when its reset date is unknown.
    pub exhausted_cooldown: Duration,
    /// How long a key rests that is refused as such for the first time.
    pub invalid_confirm: Duration,
    /// How long a key that is refused as such rests before it is tried again.
    pub invalid_cooldown: Duration,
    /// How long a key is asked last for what it lacked the permission for.
    pub permission_cooldown: Duration,
    /// How long accounts of a plan are asked last for what the plan does not have.
    pub feature_cooldown: Duration,
    /// How long an account is asked last for an endpoint that it refuses without a known reason.
    pub endpoint_cooldown: Duration,
    /// How long a key or account rests after a refusal in words without figures.
    pub unproven_cooldown: Duration,
    /// The longest rest that the provider can name.
    pub max_retry_after: Duration,
    /// How long after such a refusal one request may try a key again, when no other can serve.
    pub probe_after: Duration,
    /// How long a key with a payment problem rests before it is tried again.
    pub billing_cooldown: Duration,
    /// The used share of a key's credits from which it is near its limit; above 0, at most 1.
    pub near_limit_ratio: f64,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            strategy: StrategyChoice::default(),
            reserve_credits: 0,
            wait_max: Duration::from_secs(30),
            waiting_max: 1_000,
            foresee_max: Duration::from_millis(250),
            rate_limited_cooldown: Duration::from_secs(60),
            concurrency_cooldown: Duration::from_secs(2),
            exhausted_cooldown: Duration::from_secs(3600),
            invalid_confirm: Duration::from_secs(60),
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

/// How much of a request is kept to send it again, and how often that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayConfig {
    /// Bytes kept of one request's body in memory; what is longer goes to disk. 0 keeps none.
    pub memory_bytes_max: usize,
    /// Bytes of all buffers of requests, answers and sockets in memory. At least `memory_bytes_max`.
    pub memory_total_bytes_max: usize,
    /// Bytes of one request's body kept on disk, beyond those in memory. 0 keeps none.
    pub disk_bytes_max: usize,
    /// Bytes of all bodies kept on disk. At least `disk_bytes_max`.
    pub disk_total_bytes_max: usize,
    /// The share of the disk, in percent, that is left free.
    pub disk_free_percent_min: usize,
    /// Where kept bodies go on disk, in files without a name.
    pub directory: PathBuf,
    /// Attempts of one request, the first included.
    pub attempts_max: usize,
    /// From the first attempt on; no attempt starts later.
    pub deadline: Duration,
    /// Bytes read of a refusal to classify it.
    pub error_body_bytes_max: usize,
    /// How long a refusal's body is waited for.
    pub error_body_max: Duration,
}

impl Default for ReplayConfig {
    fn default() -> Self {
        Self {
            memory_bytes_max: 16 * 1024 * 1024,
            memory_total_bytes_max: 128 * 1024 * 1024,
            disk_bytes_max: 6 * 1024 * 1024 * 1024,
            disk_total_bytes_max: 24 * 1024 * 1024 * 1024,
            disk_free_percent_min: 10,
            directory: PathBuf::from("/var/tmp"),
            attempts_max: 16,
            deadline: Duration::from_secs(120),
            error_body_bytes_max: 64 * 1024,
            error_body_max: Duration::from_secs(2),
        }
    }
}

/// Asking the provider for the keys' quotas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchConfig {
    /// Whether it is asked at all.
    pub is_enabled: bool,
    /// From one round to the next.
    pub interval: Duration,
    /// How long one answer is waited for.
    pub timeout: Duration,
    /// How long the provider's figures may lag behind what was spent.
    pub quota_lag: Duration,
}

impl Default for WatchConfig {
    fn default() -> Self {
        Self {
            is_enabled: true,
            interval: Duration::from_secs(600),
            timeout: Duration::from_secs(10),
            quota_lag: Duration::from_secs(300),
        }
    }
}

/// Where the books are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageConfig {
    /// The database file. Its folder may not exist yet. [`file`](Self::file) says whether it counts.
    pub path: PathBuf,
    /// Records waiting to be written.
    pub queue_records_max: usize,
    /// While many records come, a commit begins so long after the last.
    pub commit_interval: Duration,
    /// Days that single attempts are kept; 0 for ever.
    pub attempts_kept_days: usize,
    /// Days that sums by the hour are kept; 0 for ever.
    pub hours_kept_days: usize,
    /// Whether the books live in memory only.
    pub is_ephemeral: bool,
}

impl StorageConfig {
    /// The database file; `None` when the books live in memory only.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        (!self.is_ephemeral).then_some(self.path.as_path())
    }
}

impl Default for StorageConfig {
    /// The path depends on the environment, so a resolved configuration never has this one.
    fn default() -> Self {
        Self {
            path: PathBuf::from("keychoir.db"),
            queue_records_max: 8192,
            commit_interval: Duration::from_millis(500),
            attempts_kept_days: 30,
            hours_kept_days: 400,
            is_ephemeral: false,
        }
    }
}

/// What is remembered of whose identifiers are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnershipConfig {
    /// Identifiers that are remembered.
    pub identifiers_max: usize,
    /// Days after its last use that one is; 0 for ever.
    pub kept_days: usize,
    /// Bytes of an answer that are looked at for identifiers; 0 looks at none.
    pub answer_bytes_max: usize,
    /// How long it is remembered that no account has something.
    pub not_found_ttl: Duration,
}

impl Default for OwnershipConfig {
    fn default() -> Self {
        Self {
            identifiers_max: 200_000,
            kept_days: 400,
            answer_bytes_max: 1024 * 1024,
            not_found_ttl: Duration::from_secs(60),
        }
    }
}

/// Sessions on sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketsConfig {
    /// How long nothing may pass in either direction; zero for ever.
    pub idle_max: Duration,
    /// How long a session may last; zero for ever.
    pub lifetime_max: Duration,
    /// Bytes of a client's opening messages that are kept until the provider is heard.
    pub opening_bytes_max: usize,
    /// Bytes of a message that are read before it goes on in parts.
    pub frame_bytes_max: usize,
    /// How long after the last text or sound a speech socket counts as speaking.
    pub quiet_max: Duration,
    /// How long a client may take to present its token in its first message.
    pub introduction_max: Duration,
    /// Bytes that one session may have in memory of what its client has sent.
    pub max_session_buffer: usize,
    /// How long the answer to a close, and the end of the connection behind it, may take.
    pub close_timeout: Duration,
    /// How often a session looks whether its client's quota of credits is used.
    pub quota_check_interval: Duration,
    /// Where clients reach our sockets, for signed URLs.
    pub signed_url_base: SocketBase,
}

impl Default for SocketsConfig {
    fn default() -> Self {
        Self {
            idle_max: Duration::from_secs(300),
            lifetime_max: Duration::from_secs(24 * 3600),
            opening_bytes_max: 256 * 1024,
            frame_bytes_max: 256 * 1024,
            quiet_max: Duration::from_secs(2),
            introduction_max: Duration::from_secs(10),
            max_session_buffer: 1024 * 1024,
            close_timeout: Duration::from_secs(5),
            quota_check_interval: Duration::from_secs(5),
            signed_url_base: SocketBase::default(),
        }
    }
}

/// What is written for operators.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogConfig {
    /// How it looks.
    pub format: LogFormat,
    /// What is written and what is not.
    pub level: LogFilter,
}
