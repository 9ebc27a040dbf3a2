//! The state that requests are processed with, shared with the other parts of the program.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::base_url_hints::BaseUrlHints;
use super::config::SharedConfig;
use super::conversation::Ended;
use super::list_affinity::ListAffinity;
use super::misses::Misses;
use super::request_limiter::RequestLimiter;
use super::retry_budget::SharedRetryBudget;
use super::usage::UsageSink;
use crate::pool::{OwnershipIndex, Pool};
use crate::telemetry::Meters;
use crate::upstream::{Connect, TcpTlsConnector, Upstream};

/// The state that requests are processed with. Its connections to the provider belong to one core; all other
/// state is shared by all cores.
#[derive(Debug)]
pub struct Proxy<C = TcpTlsConnector> {
    pub(super) config: SharedConfig,
    pub(super) pool: Arc<Pool>,
    pub(super) upstream: Upstream<C>,
    pub(super) owners: Arc<OwnershipIndex>,
    pub(super) list_affinity: Arc<ListAffinity>,
    pub(super) misses: Arc<Misses>,
    pub(super) usage: UsageSink,
    pub(super) retry_budget: Arc<SharedRetryBudget>,
    pub(super) base_url_hints: Arc<BaseUrlHints>,
    pub(super) limiter: RequestLimiter,
    pub(super) meters: Meters,
    /// The queue of ended conversations whose cost is not known.
    pub(super) ended: Ended,
    /// Cancelled before connections are closed at shutdown.
    pub(super) cut: CancellationToken,
}

/// The state that a proxy shares with the other parts of the program.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The current configuration.
    pub config: SharedConfig,
    /// The pool of API keys.
    pub pool: Arc<Pool>,
    /// The owners of the provider's resources.
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
        let Shared { config, pool, owners, usage, meters, ended } = shared;
        Self {
            config,
            pool,
            upstream,
            owners,
            list_affinity: Arc::default(),
            misses: Arc::default(),
            usage,
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
