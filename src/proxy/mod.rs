//! The processing of requests: client limits, key selection, attempts, relaying and usage records.
//!
//! `exchange` holds the steps in their order and is the file to read first.

mod exchange;

mod account_affinity;
mod answer;
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
mod response_redaction;
mod retry_budget;
mod retry_state;
mod socket;

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
    AttemptRecord, CreditSource, Depth, OwnershipUpdate, QueueFull, QuotaCharge, RecordId, UsageBatch,
    UsageDimensions, UsagePermit, UsageQueue, UsageRow, UsageSink,
};

/// Limits and switches for the processing of a request.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Maximum requests in progress at once.
    pub requests_max: usize,
    /// Maximum requests in progress of one client without a limit of its own.
    pub max_requests_per_client: u32,
    /// Credits that a request takes from its client's quota when neither an estimate nor its
    /// response names its price.
    pub unpriced_credits: u64,
    /// Maximum requests of unknown price that a client with a credit quota may have in progress.
    pub max_unpriced_requests: u32,
    /// Maximum pause of a client within a request body.
    pub body_idle_max: Duration,
    /// Minimum rate at which a client must send a request body.
    pub body_min_rate: MinRate,
    /// Maximum attempts of one request.
    pub attempts_max: u32,
    /// No further attempt begins when this time has passed since the request body arrived.
    pub replay_max: Duration,
    /// Maximum bytes of an error response's body that are read to classify it.
    pub error_body_bytes_max: usize,
    /// Maximum time for reading that body.
    pub error_body_max: Duration,
    /// Maximum wait for a request's text to estimate its cost; zero disables the estimate by text.
    pub foresee_max: Duration,
    /// Whether endpoints that could harm the pool are blocked.
    pub denies_dangerous: bool,
    /// Maximum bytes of a response that are searched for the identifiers it gives.
    pub owned_bytes_max: usize,
    /// How long a 404 of all accounts for a named resource is cached.
    pub not_found_ttl: Duration,
    /// Whether keys and the description of their owner are redacted from responses.
    pub redacts: bool,
    /// Headers of proxies in front that are forwarded to the provider.
    pub forwarded: Forwarded,
    /// The memory budget for everything that is buffered for requests, responses and sockets.
    pub buffers: BufferBudget,
    /// The base that replaces the provider's host in socket addresses within responses.
    pub socket_base: Option<Arc<str>>,
    /// Limits of socket sessions.
    pub sockets: SocketBounds,
}

/// The settings that a reload replaces for the following requests: clients, their usage, and
/// limits.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// The configured clients, and the credentials that identify them.
    pub clients: Clients,
    /// The usage counters of the clients, which a reload keeps.
    pub accounts: ClientUsage,
    /// Limits and switches.
    pub limits: Limits,
    /// The host names of the proxy, and the web origins that may use it.
    pub doors: AccessRules,
    /// A path prefix of all the proxy's and the provider's paths, without a trailing slash; empty
    /// for none.
    pub base_path: String,
}

/// The current configuration. A request loads it once and keeps it until its end.
pub type SharedTerms = Arc<ArcSwap<RuntimeConfig>>;

/// The state that requests are processed with. Its connections to the provider belong to one core;
/// all else is shared by all cores.
#[derive(Debug)]
pub struct Proxy<C = TcpTlsConnector> {
    config: SharedTerms,
    pool: Arc<Pool>,
    upstream: Upstream<C>,
    owners: Arc<OwnershipIndex>,
    homes: Arc<ListAffinity>,
    misses: Arc<Misses>,
    books: UsageSink,
    retries: Arc<SharedRetryBudget>,
    hints: Arc<BaseUrlHints>,
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
    pub config: SharedTerms,
    /// The pool of API keys.
    pub pool: Arc<Pool>,
    /// Which account owns which of the provider's resources.
    pub owners: Arc<OwnershipIndex>,
    /// The queue of usage records to the usage store.
    pub books: UsageSink,
    /// The metrics.
    pub meters: Meters,
    /// The queue of ended conversations whose cost is not known.
    pub ended: Ended,
}

impl<C> Proxy<C> {
    /// A proxy with this shared state. `cut` is cancelled before connections are closed at
    /// shutdown.
    pub fn new(shared: Shared, upstream: Upstream<C>, cut: CancellationToken) -> Self {
        let Shared { config, pool, owners, books, meters, ended } = shared;
        Self {
            config,
            pool,
            upstream,
            owners,
            homes: Arc::default(),
            misses: Arc::default(),
            books,
            retries: Arc::new(SharedRetryBudget::new()),
            hints: Arc::default(),
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
            homes: Arc::clone(&self.homes),
            misses: Arc::clone(&self.misses),
            books: self.books.clone(),
            retries: Arc::clone(&self.retries),
            hints: Arc::clone(&self.hints),
            limiter: self.limiter.clone(),
            meters: self.meters.clone(),
            ended: self.ended.clone(),
            cut: self.cut.clone(),
        }
    }
}
