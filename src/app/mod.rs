//! The composition root: builds a running program, with its addresses and a way to drain it, from settings
//! and listeners. The tests start the same program as the command line.

mod app_config;
mod https;
mod listen;
mod mirroring;
mod router;

mod dry_run;

use std::future::{Future, pending};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};

use crate::admin::{Admin, Draining};
use crate::clock;
use crate::mirror;
use crate::policy::client::Clients;
use crate::poller::{self as quotas, Conversations, QuotaPoller};
use crate::pool::{KeySnapshot, OwnershipIndex, Pool, Reloaded};
use crate::proxy::{ClientUsage, Limits, Proxy, RuntimeConfig, Shared, SharedConfig};
use crate::server::{ConnectionLimiter, Drain, Server, WorkerPool, WorkerThreads};
use crate::store::{self, OpenError, Store};
use crate::tasks::{AbortOnDrop, Tasks};
use crate::telemetry::Meters;
use crate::upstream::{Reach, ReachCell, TcpTlsConnector, TlsError, Upstream};

pub use crate::server::{Address, InheritedSockets, Listener, open_files_max, raise_open_files};
pub use app_config::AppConfig;
pub use dry_run::{Obstacle, dry_run};
pub use https::{Https, HttpsState};
pub use listen::{ListenError, listen};

use https::Certificates;
use mirroring::Mirroring;
use router::Router;

/// Why the program cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The usage database cannot be opened.
    #[error(transparent)]
    Database(#[from] OpenError),
    /// The usage records cannot be read.
    #[error("the usage records cannot be read: {0}")]
    Unreadable(#[from] rusqlite::Error),
    /// The mirror cannot be started.
    #[error(transparent)]
    Mirror(#[from] mirror::MirrorStartError),
    /// TLS for upstream connections cannot be configured, or not with these authorities.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// TLS for client connections cannot be configured.
    #[error("TLS cannot be served: {0}")]
    Https(#[from] rustls::Error),
    /// The upstream's address cannot be written to a request head.
    #[error("the upstream's address cannot be used: {0}")]
    Upstream(#[from] http::Error),
    /// Every machine on the network could use the keys.
    #[error(transparent)]
    Exposed(#[from] Exposed),
    /// The system refuses.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Other machines can connect, and no client token is required.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is open to other machines, and no client token is required")]
pub struct Exposed(pub Address);

fn check_exposure(addresses: &[Address], clients: &Clients) -> Result<(), Exposed> {
    match addresses.iter().find(|address| !address.is_local()) {
        Some(open) if !clients.are_known() => Err(Exposed(open.clone())),
        Some(_) | None => Ok(()),
    }
}

/// A running program.
#[derive(Debug)]
pub struct Running {
    addresses: Vec<Address>,
    reach: ReachCell,
    pool: Arc<Pool>,
    config: SharedConfig,
    quotas: Option<watch::Sender<quotas::Settings>>,
    rounds: watch::Receiver<u64>,
    certificates: Certificates,
    draining: Draining,
    drain: Drain,
    drain_idle_timeout: Duration,
    accepting: Tasks,
    connections: Tasks,
    worker_pool: WorkerPool<Router>,
    workers: WorkerThreads,
    polling: Option<AbortOnDrop>,
    pricing: AbortOnDrop,
    renewing: AbortOnDrop,
    writing: store::Writing,
    mirroring: Option<Mirroring>,
}

/// Whether all requests were completed before the drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Every response was completed.
    Clean,
    /// Some requests were cut at the end of the drain timeout.
    Cut,
}

/// How the program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Whether all requests were completed.
    pub drained: Drained,
    /// Usage records that could not be written since the start.
    pub records_lost: u64,
}

/// Maximum ended conversations that wait to be handed to the task that polls their cost.
const MAX_ENDED_CONVERSATIONS: usize = 1_024;
/// After the cut, how long to wait for the cut connections to end.
const CUT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait after that for all usage records to be written.
const WRITE_TIMEOUT: Duration = Duration::from_secs(8);

/// Starts all parts of the program. Requests are served from here on.
///
/// # Errors
///
/// When the usage database or TLS cannot be opened, or the system refuses.
pub fn start(settings: AppConfig, listeners: Vec<Listener>) -> Result<Running, StartError> {
    let addresses = listeners.iter().map(Listener::address).collect::<io::Result<Vec<_>>>()?;
    check_exposure(&addresses, &settings.clients)?;
    let pool = Arc::new(Pool::new(settings.keys, settings.pool));
    let mut store = Store::open(&settings.database, clock::now())?;
    store.recognize(pool.roster().keys().iter().map(|key| key.api_key()));
    pool.restore(&store.remembered()?, clock::now());
    pool.restore_restrictions(store.refusals()?, clock::now());
    let owners = Arc::new(OwnershipIndex::new(settings.store.owners));
    owners.restore(store.owners()?, clock::now());
    let client_usage = ClientUsage::new(&settings.clients, &store.used(clock::now())?, clock::now());
    let (store, mut writing) = store.write(Arc::clone(&pool), settings.store)?;
    let mirroring = Mirroring::start(settings.mirror, &mut writing)?;

    let upstream = {
        let connector = TcpTlsConnector::new(settings.ca_file.as_deref())?;
        let buffers = Some(settings.proxy.buffers.clone());
        Upstream::new(settings.authority, connector, settings.upstream, Tasks::new(), buffers)
    };
    let draining = Draining::default();
    let config = Arc::new(ArcSwap::from_pointee(RuntimeConfig {
        clients: settings.clients,
        client_usage,
        limits: settings.proxy,
        access_rules: settings.access_rules,
        base_path: settings.base_path,
    }));
    let mirror_health = mirroring.as_ref().map(|mirroring| mirroring.health.clone());
    let (meters, connection_limiter) =
        (Meters::default(), ConnectionLimiter::new(settings.server.max_connections));
    let admin = Admin {
        config: Arc::clone(&config),
        pool: Arc::clone(&pool),
        store_health: writing.health.clone(),
        mirror: mirror_health,
        draining: draining.clone(),
        meters: meters.clone(),
        connections: connection_limiter.clone(),
        reach: upstream.reach().clone(),
        started_at: clock::now(),
    };
    let reach = upstream.reach().clone();
    let (rounds_done, rounds) = watch::channel(0);
    let (quotas, polling) = settings
        .polling
        .map(|settings| {
            let (sender, settings) = watch::channel(settings);
            let poller = QuotaPoller::new(Arc::clone(&pool), upstream.clone(), store.clone(), settings);
            (sender, Tasks::new().spawn_guarded(poller.run(rounds_done)))
        })
        .unzip();

    let (drain, accepting, connections) = (Drain::default(), Tasks::new(), Tasks::new());
    let (ended, conversations) = mpsc::channel(MAX_ENDED_CONVERSATIONS);
    let pricing =
        Conversations::new(Arc::clone(&pool), upstream.clone(), store.clone(), meters.clone(), conversations);
    let pricing = Tasks::new().spawn_guarded(pricing.run());
    let shared =
        Shared { config: Arc::clone(&config), pool: Arc::clone(&pool), owners, usage: store, meters, ended };
    let proxy = Proxy::new(shared, upstream, drain.cut.clone());
    let router = Router::new(admin, proxy);
    let certificates = Certificates::new(settings.https, &addresses, clock::now())?;
    let renewing = Tasks::new().spawn_guarded(certificates.clone().renew_when_due());
    let workers = WorkerThreads::start(settings.workers)?;
    let worker_pool = workers.create_pool(&drain, || router.for_core(workers.count()));
    let server = Arc::new(Server {
        worker_pool: worker_pool.clone(),
        limits: settings.server,
        connection_limiter,
        drain: drain.clone(),
        accepting: accepting.clone(),
        connections: connections.clone(),
    });
    for (listener, address) in listeners.into_iter().zip(&addresses) {
        server.listen(listener, certificates.at(address))?;
    }
    Ok(Running {
        addresses,
        reach,
        pool,
        config,
        quotas,
        rounds,
        certificates,
        draining,
        drain,
        drain_idle_timeout: settings.drain_idle_timeout,
        accepting,
        connections,
        worker_pool,
        workers,
        polling,
        pricing,
        renewing,
        writing,
        mirroring,
    })
}

impl Running {
    /// The address of the first TCP listener; 127.0.0.1:0 when there is none.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        let port = self.addresses.iter().find_map(|address| match address {
            Address::Tcp(address) => Some(*address),
            Address::Unix(_) => None,
        });
        port.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    /// The addresses of all listeners.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// The TLS state of the listener at `address`.
    #[must_use]
    pub fn https(&self, address: &Address) -> HttpsState {
        self.certificates.state(address)
    }

    /// The names of the clients that have a token, sorted; without any, no token is required.
    #[must_use]
    pub fn client_names(&self) -> Vec<String> {
        let config = self.config.load();
        let mut names: Vec<String> =
            config.clients.token_holders().map(|name| name.as_str().to_owned()).collect();
        names.sort_unstable();
        names
    }

    /// A snapshot of the keys and their state.
    #[must_use]
    pub fn keys(&self) -> Vec<KeySnapshot> {
        self.pool.snapshot(clock::now())
    }

    /// Requests that wait for a key now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.pool.waiting()
    }

    /// Whether connections to the provider can be opened, as of the last attempt.
    #[must_use]
    pub fn reach(&self) -> Reach {
        self.reach.get()
    }

    /// Waits until every key's quota was polled once, but at most `within`; returns whether that is so.
    pub async fn first_round(&mut self, within: Duration) -> bool {
        let first_round_done = self.rounds.wait_for(|&rounds| rounds > 0);
        matches!(tokio::time::timeout(within, first_round_done).await, Ok(Ok(_)))
    }

    /// Applies the keys, the clients and the limits of `settings` to requests that come from now on, and its
    /// certificates to new connections; all other settings apply at the next start. Requests under way keep
    /// the settings they began with, and keys that remain keep their state.
    ///
    /// # Errors
    ///
    /// When no client token would be required and other machines can connect; then nothing changes.
    pub fn reload(&self, settings: AppConfig) -> Result<Reloaded, Exposed> {
        check_exposure(&self.addresses, &settings.clients)?;
        self.certificates.replace(settings.https, clock::now());
        let before = self.config.load();
        let buffers = settings.proxy.buffers.following(&before.limits.buffers);
        let limits = Limits { buffers, ..settings.proxy };
        let AppConfig { clients, access_rules, base_path, .. } = settings;
        let client_usage = before.client_usage.following(&clients);
        self.config.store(Arc::new(RuntimeConfig { clients, client_usage, limits, access_rules, base_path }));
        let reloaded = self.pool.reload(settings.keys, settings.pool);
        if let Some((quotas, settings)) = self.quotas.as_ref().zip(settings.polling) {
            // The poller ends only with the program.
            let _ = quotas.send(settings);
        }
        Ok(reloaded)
    }

    /// Closes kept connections with their next response, then stops accepting, lets requests under way finish
    /// within `grace`, cuts the others, and writes all usage records.
    pub async fn drain(self, grace: Duration) -> Drained {
        self.drain_unless(grace, pending()).await.drained
    }

    /// The maximum duration of a drain beyond the grace.
    #[must_use]
    pub fn max_end_duration(&self) -> Duration {
        CUT_TIMEOUT
            + WRITE_TIMEOUT
            + self.mirroring.as_ref().map_or(Duration::ZERO, Mirroring::max_end_duration)
    }

    /// Drains in the same way. When `hurry` completes, requests under way are cut, and the mirror is not waited
    /// for.
    pub async fn drain_unless(mut self, grace: Duration, hurry: impl Future<Output = ()>) -> Ended {
        let Drain { ending, kept, stop, close, cut, .. } = &self.drain;
        self.draining.set();
        ending.cancel();
        drop(self.polling);
        drop(self.pricing);
        drop(self.renewing);
        // At most half of the grace: requests under way need the rest.
        let idle_timeout = self.drain_idle_timeout.min(grace / 2);
        let finish = async {
            // Clients of kept connections receive `connection: close` with their next response. After this
            // timeout no connection is accepted, and requests of the accepted connections are served.
            let _ = tokio::time::timeout(idle_timeout, kept.ended()).await;
            stop.cancel();
            self.accepting.ended().await;
            self.worker_pool.requests_ended().await;
            close.cancel();
            self.connections.ended().await;
        };
        let mut hurry = pin!(hurry);
        let mut is_hurried = false;
        let drained = tokio::select! {
            finished = tokio::time::timeout(grace, finish) => match finished {
                Ok(()) => Drained::Clean,
                Err(_) => Drained::Cut,
            },
            () = hurry.as_mut() => {
                is_hurried = true;
                Drained::Cut
            }
        };
        stop.cancel();
        let begun = clock::instant();
        if drained == Drained::Cut {
            cut.cancel();
            // A connection that does not end after the cut is not waited for.
            let _ = tokio::time::timeout(CUT_TIMEOUT, self.connections.ended()).await;
        }
        // The workers drop the tasks that still run, which are the last that could produce usage records.
        drop(self.worker_pool);
        let left = CUT_TIMEOUT.saturating_sub(clock::since(begun));
        let _ = tokio::time::timeout(left, self.workers.end()).await;
        let begun = clock::instant();
        let is_written = self.writing.written(WRITE_TIMEOUT).await;
        // A slow write of the usage records reduces the time of the mirror.
        let left = WRITE_TIMEOUT.saturating_sub(clock::since(begun));
        if let Some(mirroring) = self.mirroring.filter(|_| is_written && !is_hurried) {
            tokio::select! {
                () = mirroring.end() => {}
                () = hurry => {}
            }
        }
        Ended { drained, records_lost: self.writing.ended(left).await }
    }
}
