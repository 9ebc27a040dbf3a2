//! Holds the state that all requests share. Only the idle connections to the provider are separate for each core.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::base_url_hints::BaseUrlHints;
use super::config::SharedConfig;
use super::conversation::ConversationSender;
use super::list_affinity::ListAffinity;
use super::not_found_cache::NotFoundCache;
use super::replica_link::ReplicaLink;
use super::replica_owners::ReplicaOwners;
use super::request_limiter::RequestLimiter;
use super::retry_budget::SharedRetryBudget;
use super::usage::UsageSink;
use crate::pool::{OwnershipIndex, Pool};
use crate::telemetry::{EventRing, RequestMetrics};
use crate::upstream::{Connect, TcpTlsConnector, Upstream};

/// The state with which requests are processed. The connections to the provider belong to one core. All other
/// state is shared between cores, and by the clones of a proxy.
#[derive(Clone, Debug)]
pub struct Proxy<C = TcpTlsConnector> {
    pub(super) config: SharedConfig,
    pub(super) pool: Arc<Pool>,
    pub(super) upstream: Upstream<C>,
    pub(super) owners: Arc<OwnershipIndex>,
    pub(super) list_affinity: Arc<ListAffinity>,
    pub(super) not_found_cache: Arc<NotFoundCache>,
    /// The owners that other replicas have recorded, if there are other replicas.
    pub(super) replica_owners: Option<Arc<ReplicaOwners>>,
    pub(super) usage: UsageSink,
    pub(super) retry_budget: Arc<SharedRetryBudget>,
    pub(super) base_url_hints: Arc<BaseUrlHints>,
    pub(super) request_limiter: RequestLimiter,
    pub(super) metrics: RequestMetrics,
    pub(super) events: EventRing,
    pub(super) ended_conversations: ConversationSender,
    /// Cancelled when the drain timeout expires at shutdown, before connections are closed.
    pub(super) drain_expired: CancellationToken,
}

/// The part of a proxy's state that `app` creates, because other modules use it as well.
#[derive(Clone, Debug)]
pub struct SharedState {
    /// The current configuration.
    pub config: SharedConfig,
    /// The pool of API keys.
    pub pool: Arc<Pool>,
    /// The owners of the provider's resources.
    pub owners: Arc<OwnershipIndex>,
    /// The other replicas of the pool, or `None` without `[redis]`.
    pub replica_link: Option<Arc<dyn ReplicaLink>>,
    /// The queue of usage records to the usage store.
    pub usage: UsageSink,
    /// The metrics of requests and attempts.
    pub metrics: RequestMetrics,
    /// The events for listeners of the admin API.
    pub events: EventRing,
    /// The queue of ended conversations whose cost is still unknown.
    pub ended_conversations: ConversationSender,
}

impl<C> Proxy<C> {
    /// Creates a proxy. `drain_expired` is cancelled when the drain timeout expires at shutdown.
    pub fn new(shared: SharedState, upstream: Upstream<C>, drain_expired: CancellationToken) -> Self {
        let SharedState { config, pool, owners, replica_link, usage, metrics, events, ended_conversations } =
            shared;
        Self {
            config,
            pool,
            upstream,
            owners,
            list_affinity: Arc::default(),
            not_found_cache: Arc::default(),
            replica_owners: replica_link.map(|link| Arc::new(ReplicaOwners::new(link))),
            usage,
            retry_budget: Arc::new(SharedRetryBudget::new()),
            base_url_hints: Arc::default(),
            request_limiter: RequestLimiter::default(),
            metrics,
            events,
            ended_conversations,
            drain_expired,
        }
    }

    /// Returns a clone for one of `cores` cores. The clone shares all state except the connections to the provider.
    #[must_use]
    pub fn for_core(&self, cores: usize) -> Self
    where
        C: Connect + Clone,
    {
        Self { upstream: self.upstream.for_core(cores), ..self.clone() }
    }
}
