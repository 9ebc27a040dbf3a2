//! A request's way through the house. `exchange` is the file to read first: the ten steps, from
//! top to bottom.

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

/// Bounds and switches of a request's way.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Requests under way at once.
    pub requests_max: usize,
    /// Of these, requests of one client that has no limit of its own.
    pub max_requests_per_client: u32,
    /// Credits that a request takes from its client's quota when neither an estimate nor its answer names
    /// its price.
    pub unpriced_credits: u64,
    /// Requests without an estimate that a client with a quota of credits may have under way.
    pub max_unpriced_requests: u32,
    /// How long a client may pause within a request's body.
    pub body_idle_max: Duration,
    /// How slowly it may send that.
    pub body_min_rate: MinRate,
    /// Attempts that one request may have.
    pub attempts_max: u32,
    /// After this span no further attempt begins.
    pub replay_max: Duration,
    /// What is read of an error body to judge it.
    pub error_body_bytes_max: usize,
    /// How long that reading may take.
    pub error_body_max: Duration,
    /// How long a request's text is waited for, to know what it will cost; zero does not look.
    pub foresee_max: Duration,
    /// Whether endpoints that could harm the pool are denied.
    pub denies_dangerous: bool,
    /// What is looked at of an answer for the identifiers it gives.
    pub owned_bytes_max: usize,
    /// How long it is remembered that no account has what a request named.
    pub not_found_ttl: Duration,
    /// Whether keys and what describes their owner are taken out of answers.
    pub redacts: bool,
    /// Headers that are passed on although proxies before us made them.
    pub forwarded: Forwarded,
    /// What all that is buffered for requests, answers and sockets takes of.
    pub buffers: BufferBudget,
    /// What stands instead of the provider's host in the addresses of sockets that answers give.
    pub socket_base: Option<Arc<str>>,
    /// Bounds of sessions on sockets.
    pub sockets: SocketBounds,
}

/// What a reload may change for the next request: who may ask, and within which bounds.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// Who may ask.
    pub clients: Clients,
    /// What they have used and have under way.
    pub accounts: ClientUsage,
    /// Bounds and switches.
    pub limits: Limits,
    /// Which names are ours, and which pages may speak to us.
    pub doors: AccessRules,
    /// A path that stands before every path of ours and of the provider, without a slash at its end;
    /// empty for none.
    pub base_path: String,
}

/// The terms as they are now. A request loads them once and goes by them to its end.
pub type SharedTerms = Arc<ArcSwap<RuntimeConfig>>;

/// Everything a request meets on its way. Its connections to the provider are for one core; all else
/// is shared by all.
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
    /// Where conversations go whose price is not known.
    ended: Ended,
    /// Is cancelled before requests are cut at the end of the program.
    cut: CancellationToken,
}

/// What a proxy shares with the rest of the house.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Who may ask, and within which bounds.
    pub config: SharedTerms,
    /// The keys.
    pub pool: Arc<Pool>,
    /// What belongs to whom.
    pub owners: Arc<OwnershipIndex>,
    /// Where it is written down.
    pub books: UsageSink,
    /// Where it is counted.
    pub meters: Meters,
    /// Where conversations go whose price is not known.
    pub ended: Ended,
}

impl<C> Proxy<C> {
    /// A proxy of these parts. `cut` is cancelled before requests are cut at the end of the program.
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

    /// The same proxy for one of so many cores, with connections of its own to the provider.
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
