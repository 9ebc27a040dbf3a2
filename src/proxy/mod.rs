//! The processing of requests: client limits, key selection, attempts, relaying and usage records.
//!
//! `exchange` holds the steps in their order and is the file to read first.

mod exchange;

mod account_affinity;
mod attempt;
mod base_url_hints;
mod client_usage;
mod conversation;
mod head;
mod list_affinity;
mod misses;
mod permits;
mod refusals;
mod relay;
mod request_limiter;
mod request_meta;
mod request_summary;
mod response_redaction;
mod retry_budget;
mod retry_state;
mod socket;
mod upstream_response;

mod access_log;
mod error;
mod usage;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use crate::policy::client::Clients;
use crate::policy::headers::Forwarded;
use crate::policy::min_rate::MinRate;
use crate::policy::origin::AccessRules;
use crate::pool::{OwnershipIndex, Pool};
use crate::telemetry::Meters;
use crate::upstream::{Connect, TcpTlsConnector, Upstream};

pub use crate::body::budget::BufferBudget;
use base_url_hints::BaseUrlHints;
pub use client_usage::{ClientLimitExceeded, ClientUsage, Used};
pub use conversation::{Conversation, Ended};
pub use error::ProxyError;
pub use exchange::ProxyResponse;
pub use head::{look_up, strip};
use list_affinity::ListAffinity;
use misses::Misses;
pub use relay::ResponseBody;
pub use request_limiter::Overloaded;
use request_limiter::RequestLimiter;
pub use response_redaction::{BuffersFull, Unredacted};
use retry_budget::SharedRetryBudget;
pub use socket::{Socket, SocketLimits as SocketBounds};
pub use usage::{
    AttemptRecord, CreditSource, Depth, OwnershipUpdate, QueueFull, QuotaCharge, UsageBatch, UsagePermit,
    UsageQueue, UsageSink,
};

/// Limits and switches for the processing of a request.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Maximum requests in progress at once.
    pub max_requests: usize,
    /// Maximum requests in progress of one client without a limit of its own.
    pub max_requests_per_client: u32,
    /// Credits that a request takes from its client's quota when neither an estimate nor its
    /// response names its price.
    pub unpriced_credits: u64,
    /// Maximum requests of unknown price that a client with a credit quota may have in progress.
    pub max_unpriced_requests: u32,
    /// Maximum pause of a client within a request body.
    pub request_body_timeout: Duration,
    /// Minimum rate at which a client must send a request body.
    pub min_request_body_rate: MinRate,
    /// Maximum attempts of one request.
    pub max_attempts: u32,
    /// No further attempt begins when this time has passed since the request body arrived.
    pub retry_timeout: Duration,
    /// Maximum bytes of an error response's body that are read to classify it.
    pub max_error_body_size: usize,
    /// Maximum time for reading that body.
    pub error_body_timeout: Duration,
    /// Maximum wait for a request's text to estimate its cost; zero disables the estimate by text.
    pub cost_estimate_timeout: Duration,
    /// Whether endpoints that could harm the pool are blocked.
    pub blocks_admin_endpoints: bool,
    /// Maximum bytes of a response that are searched for the identifiers it gives.
    pub max_response_scan_size: usize,
    /// How long a 404 of all accounts for a named resource is cached.
    pub not_found_ttl: Duration,
    /// Whether keys and the description of their owner are redacted from responses.
    pub redacts: bool,
    /// Headers of proxies in front that are forwarded to the provider.
    pub forwarded_headers: Forwarded,
    /// The memory budget for everything that is buffered for requests, responses and sockets.
    pub buffers: BufferBudget,
    /// The base that replaces the provider's host in socket addresses within responses.
    pub socket_base: Option<Arc<str>>,
    /// Limits of socket sessions.
    pub websocket: SocketBounds,
}

/// The settings that a reload replaces for the following requests: clients, their usage, and
/// limits.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// The configured clients, and the credentials that identify them.
    pub clients: Clients,
    /// The usage counters of the clients, which a reload keeps.
    pub client_usage: ClientUsage,
    /// Limits and switches.
    pub limits: Limits,
    /// The host names of the proxy, and the web origins that may use it.
    pub access_rules: AccessRules,
    /// A path prefix of all the proxy's and the provider's paths, without a trailing slash; empty
    /// for none.
    pub base_path: String,
}

/// The current configuration. A request loads it once and keeps it until its end.
pub type SharedConfig = Arc<ArcSwap<RuntimeConfig>>;

/// The state that requests are processed with. Its connections to the provider belong to one core;
/// all else is shared by all cores.
#[derive(Debug)]
pub struct Proxy<C = TcpTlsConnector> {
    config: SharedConfig,
    pool: Arc<Pool>,
    upstream: Upstream<C>,
    owners: Arc<OwnershipIndex>,
    list_affinity: Arc<ListAffinity>,
    misses: Arc<Misses>,
    usage: UsageSink,
    retry_budget: Arc<SharedRetryBudget>,
    base_url_hints: Arc<BaseUrlHints>,
    limiter: RequestLimiter,
    meters: Meters,
    /// The queue of ended conversations whose cost is not known.
    ended: Ended,
    /// Cancelled before connections are closed at shutdown.
    cut: CancellationToken,
}

/// The state that a proxy shares with the other parts of the program.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The current configuration.
    pub config: SharedConfig,
    /// The pool of API keys.
    pub pool: Arc<Pool>,
    /// Which account owns which of the provider's resources.
    pub owners: Arc<OwnershipIndex>,
    /// The queue of usage records to the usage store.
    pub usage: UsageSink,
    /// The metrics.
    pub meters: Meters,
    /// The queue of ended conversations whose cost is not known.
    pub ended: Ended,
}

impl<C> Proxy<C> {
    /// A proxy with this shared state. `cut` is cancelled before connections are closed at
    /// shutdown.
    pub fn new(shared: Shared, upstream: Upstream<C>, cut: CancellationToken) -> Self {
        let Shared { config, pool, owners, usage: books, meters, ended } = shared;
        Self {
            config,
            pool,
            upstream,
            owners,
            list_affinity: Arc::default(),
            misses: Arc::default(),
            usage: books,
            retry_budget: Arc::new(SharedRetryBudget::new()),
            base_url_hints: Arc::default(),
            limiter: RequestLimiter::default(),
            meters,
            ended,
            cut,
        }
    }

    /// The same proxy for one of `cores` cores, with its own connections to the provider.
    #[must_use]
    pub fn for_core(&self, cores: usize) -> Self
    where
        C: Connect + Clone,
    {
        Self {
            config: Arc::clone(&self.config),
            pool: Arc::clone(&self.pool),
            upstream: self.upstream.for_core(cores),
            owners: Arc::clone(&self.owners),
            list_affinity: Arc::clone(&self.list_affinity),
            misses: Arc::clone(&self.misses),
            usage: self.usage.clone(),
            retry_budget: Arc::clone(&self.retry_budget),
            base_url_hints: Arc::clone(&self.base_url_hints),
            limiter: self.limiter.clone(),
            meters: self.meters.clone(),
            ended: self.ended.clone(),
            cut: self.cut.clone(),
        }
    }
}
