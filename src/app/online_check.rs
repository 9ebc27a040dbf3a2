//! Checks the parts that need the network, for which startup does not wait: the routes to the provider, each key at the
//! provider, the tables of the mirror, and Redis. `keychoir check --online` and `keychoir doctor` use these checks,
//! whether or not `keychoir serve` runs.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::AppConfig;
use crate::certificate::PeerCertificate;
use crate::clock;
use crate::mirror::{self, MirrorStartError, TableCheck};
use crate::policy::authority::Authority;
use crate::policy::units::UnixMs;
use crate::poller::{CheckInProgress, KeyCheck, KeyChecker};
use crate::pool::{Key, Pool};
use crate::proxy::{QueueDepth, UsageSink};
use crate::shared::{self, LinkSettings, RedisProbe, RedisProbeError};
use crate::tasks::Tasks;
use crate::upstream::{self, ProbeError, ProbeTimeouts, RouteProbe, TcpTlsConnector, TlsError, Upstream};

/// Maximum number of keys that are checked at the same time, so that the provider does not mistake the checks of many
/// keys for an attack.
const MAX_CONCURRENT_KEY_CHECKS: usize = 8;

/// The online checks of one configuration.
#[derive(Debug)]
pub struct OnlineCheck {
    connector: TcpTlsConnector,
    upstream: Upstream,
    pool: Arc<Pool>,
    key_check_timeout: Duration,
    timeouts: ProbeTimeouts,
    mirror: Option<mirror::Settings>,
    mirrors_events: bool,
    redis: Option<LinkSettings>,
}

/// A route to a host of the provider, and the results of its check.
#[derive(Debug)]
pub struct RouteCheck {
    /// The host, with the forward proxy through which it was reached.
    pub authority: Arc<Authority>,
    /// Whether requests use this route. The direct route is also checked if a forward proxy is configured.
    pub is_used: bool,
    /// The addresses of the forward proxy, or of the host if there is no forward proxy.
    pub addresses: io::Result<Vec<IpAddr>>,
    /// The result of a connection through the route.
    pub probe: Result<RouteProbe, ProbeError>,
    /// The time at which the route responded or failed.
    pub responded_at: UnixMs,
}

impl RouteCheck {
    /// Returns the certificate of the host, if the host presented one.
    #[must_use]
    pub fn certificate(&self) -> Option<PeerCertificate> {
        PeerCertificate::parse(self.probe.as_ref().ok()?.certificates.first()?)
    }
}

/// A key and the result of its check.
#[derive(Debug)]
pub struct CheckedKey {
    /// The checked key.
    pub key: Arc<Key>,
    /// The result of the check, unless another check of the key is in progress.
    pub result: Result<KeyCheck, CheckInProgress>,
}

impl OnlineCheck {
    /// Prepares the checks, and sends nothing.
    ///
    /// # Errors
    ///
    /// Fails when the TLS settings of `app_config` are invalid.
    pub fn new(app_config: AppConfig) -> Result<Self, TlsError> {
        let AppConfig {
            keys,
            pool,
            authority,
            ca_file,
            upstream: upstream_settings,
            key_check_timeout,
            mirror,
            store,
            redis,
            ..
        } = app_config;
        let connector = TcpTlsConnector::new(ca_file.as_deref())?;
        let timeouts =
            ProbeTimeouts { connect: upstream_settings.connect_timeout, response: key_check_timeout };
        let mirrors_events = store.mirror_scope == crate::store::MirrorScope::KeysAndEvents;
        let upstream = Upstream::new(authority, connector.clone(), upstream_settings, Tasks::new(), None);
        let pool = Arc::new(Pool::new(keys, pool));
        Ok(Self { connector, upstream, pool, key_check_timeout, timeouts, mirror, mirrors_events, redis })
    }

    /// Connects at the same time through every route that a key uses. For each route through a forward proxy, it also
    /// connects to the host directly.
    pub async fn check_routes(&self) -> Vec<RouteCheck> {
        let mut routes: Vec<(Arc<Authority>, bool)> = vec![(Arc::clone(self.upstream.authority()), true)];
        routes.extend(
            self.pool.roster().keys().iter().filter_map(|key| Some((Arc::clone(key.destination()?), true))),
        );
        let direct_routes: Vec<_> = routes
            .iter()
            .filter(|(authority, _)| authority.proxy().is_some())
            .map(|(authority, _)| (Arc::new(Authority::clone(authority).through(None)), false))
            .collect();
        routes.extend(direct_routes);
        let mut seen_authorities: Vec<Arc<Authority>> = Vec::new();
        routes.retain(|(authority, _)| {
            let is_new = !seen_authorities.contains(authority);
            seen_authorities.push(Arc::clone(authority));
            is_new
        });
        let mut probes = JoinSet::new();
        for (position, (authority, is_used)) in routes.into_iter().enumerate() {
            let (connector, timeouts) = (self.connector.clone(), self.timeouts);
            probes
                .spawn(async move { (position, check_route(connector, timeouts, authority, is_used).await) });
        }
        collect_in_order(probes).await
    }

    /// Checks each key with requests to the provider that cost no credits. Several keys are checked at the same time.
    pub async fn check_keys(&self) -> Vec<CheckedKey> {
        // The queue is dropped, so that the records of the checks are not written.
        let (usage, _) = UsageSink::new(1, 1, QueueDepth::default());
        let checker =
            KeyChecker::new(Arc::clone(&self.pool), self.upstream.clone(), usage, self.key_check_timeout);
        let permits = Arc::new(Semaphore::new(MAX_CONCURRENT_KEY_CHECKS));
        let mut checks = JoinSet::new();
        for (position, key) in self.pool.roster().keys().iter().cloned().enumerate() {
            let (checker, permits) = (checker.clone(), Arc::clone(&permits));
            checks.spawn(async move {
                // The semaphore is never closed, so an error cannot occur.
                let _permit = permits.acquire_owned().await.ok();
                let result = checker.check(&key).await;
                (position, CheckedKey { key, result })
            });
        }
        collect_in_order(checks).await
    }

    /// Queries each table of the mirror without selecting rows, which shows whether the table exists and the key may
    /// use it. Returns `None` without a mirror.
    ///
    /// # Errors
    ///
    /// Fails when the HTTP client cannot be created.
    pub async fn check_mirror(&self) -> Option<Result<Vec<TableCheck>, MirrorStartError>> {
        let settings = self.mirror.as_ref()?;
        Some(mirror::check_tables(settings, self.mirrors_events).await)
    }

    /// Checks whether a replica could use Redis. Returns `None` without Redis.
    ///
    /// # Errors
    ///
    /// Fails when a replica could not use Redis.
    pub async fn check_redis(&self) -> Option<Result<RedisProbe, RedisProbeError>> {
        Some(shared::probe(self.redis.as_ref()?).await)
    }

    /// Returns the settings of Redis, or `None` if it is not configured.
    #[must_use]
    pub fn redis(&self) -> Option<&LinkSettings> {
        self.redis.as_ref()
    }

    /// Returns the URL of the Supabase project of the mirror, or `None` without a mirror.
    #[must_use]
    pub fn mirror_url(&self) -> Option<&str> {
        self.mirror.as_ref().map(|settings| settings.base_url.as_str())
    }
}

async fn check_route(
    connector: TcpTlsConnector,
    timeouts: ProbeTimeouts,
    authority: Arc<Authority>,
    is_used: bool,
) -> RouteCheck {
    // A forward proxy resolves the name of the provider.
    let name = authority.proxy().map_or_else(|| authority.host(), |proxy| proxy.host());
    let lookup = upstream::resolve(name, timeouts.connect);
    let (addresses, probe) = tokio::join!(lookup, connector.probe(&authority, timeouts));
    RouteCheck { is_used, addresses, probe, responded_at: clock::now(), authority }
}

/// Waits for all tasks, and returns their results by position. A task that panicked has no result.
async fn collect_in_order<T: 'static>(mut tasks: JoinSet<(usize, T)>) -> Vec<T> {
    let mut results = Vec::new();
    while let Some(result) = tasks.join_next().await {
        results.extend(result.ok());
    }
    results.sort_by_key(|(position, _)| *position);
    results.into_iter().map(|(_, result)| result).collect()
}
