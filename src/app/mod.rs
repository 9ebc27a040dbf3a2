//! The composition root: wires all modules into a running program, reloads it and shuts it down. The tests
//! start the same program as the command line.

mod app_config;
mod dry_run;
mod https;
mod listen;
mod mirroring;
mod router;

use std::future::{Future, pending};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};

use crate::admin::{Admin, AuthFailureTable, DrainFlag, SharedSettings};
use crate::clock;
use crate::mirror;
use crate::policy::client::Clients;
use crate::policy::key_state::Pause;
use crate::poller::{self as quotas, ConversationPoller, KeyChecker, QuotaPoller};
use crate::pool::{KeySnapshot, OwnershipIndex, Pool, ReloadSummary};
use crate::proxy::{ClientUsage, Limits, Proxy, RuntimeConfig, SharedConfig, SharedState};
use crate::secret::Fingerprint;
use crate::server::{ConnectionLimiter, Drain, Server, WorkerPool, WorkerThreads};
use crate::store::{self, OpenError, Store};
use crate::tasks::{AbortOnDrop, Tasks};
use crate::telemetry::{RequestMetrics, log_transitions};
use crate::upstream::{Reachability, ReachabilityCell, TcpTlsConnector, TlsError, Upstream};

pub use crate::server::{Address, InheritedSockets, Listener, open_files_limit, raise_open_files_limit};
pub use app_config::AppConfig;
pub use dry_run::{StartProblem, dry_run};
pub use https::{Https, HttpsState};
pub use listen::{ListenError, listen};

use https::Certificates;
use mirroring::Mirroring;
use router::Router;

/// The reason why the program cannot start.
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
    /// TLS for upstream connections cannot be configured.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// TLS for client connections cannot be configured.
    #[error("https cannot be configured: {0}")]
    Https(#[from] rustls::Error),
    /// The upstream address is invalid in a request head.
    #[error("the upstream address cannot be used: {0}")]
    Upstream(#[from] http::Error),
    /// Other machines could use the keys without a token.
    #[error(transparent)]
    UnprotectedListener(#[from] UnprotectedListener),
    /// The operating system reported an error.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// A listener that other machines can connect to without a client token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is open to other machines, and no client token is required")]
pub struct UnprotectedListener(pub Address);

fn check_exposure(addresses: &[Address], clients: &Clients) -> Result<(), UnprotectedListener> {
    match addresses.iter().find(|address| !address.is_local()) {
        Some(exposed) if !clients.require_token() => Err(UnprotectedListener(exposed.clone())),
        Some(_) | None => Ok(()),
    }
}

/// The running program.
#[derive(Debug)]
pub struct RunningApp {
    addresses: Vec<Address>,
    reachability: ReachabilityCell,
    pool: Arc<Pool>,
    config: SharedConfig,
    setting_values: SharedSettings,
    polling_settings: Option<watch::Sender<quotas::Settings>>,
    polling_rounds: watch::Receiver<u64>,
    certificates: Certificates,
    draining: DrainFlag,
    drain: Drain,
    drain_idle_timeout: Duration,
    accept_tasks: Tasks,
    connection_tasks: Tasks,
    worker_pool: WorkerPool<Router>,
    workers: WorkerThreads,
    quota_task: Option<AbortOnDrop>,
    conversation_task: AbortOnDrop,
    renewal_task: AbortOnDrop,
    writing: store::WriterHandle,
    mirroring: Option<Mirroring>,
}

/// Whether all requests were completed before the drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainOutcome {
    /// Every response was completed.
    Completed,
    /// Some requests were aborted at the end of the drain timeout.
    Aborted,
}

/// The result of a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownReport {
    /// Whether all requests were completed.
    pub drain_outcome: DrainOutcome,
    /// The number of usage records lost since the start, because they could not be written.
    pub records_lost: u64,
}

/// Maximum ended conversations that wait for the task that polls their cost.
const MAX_ENDED_CONVERSATIONS: usize = 1_024;
/// Maximum wait for aborted connections and their workers to end.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum wait for the last usage records to be written.
const WRITE_TIMEOUT: Duration = Duration::from_secs(8);

/// Starts the program and serves requests on `listeners`.
///
/// # Errors
///
/// Fails when a module cannot be started, or when other machines could use the keys without a token.
pub fn start(settings: AppConfig, listeners: Vec<Listener>) -> Result<RunningApp, StartError> {
    let addresses = listeners.iter().map(Listener::address).collect::<io::Result<Vec<_>>>()?;
    check_exposure(&addresses, &settings.clients)?;
    let pool = Arc::new(Pool::new(settings.keys, settings.pool));
    let mut store = Store::open(&settings.database, clock::now())?;
    store.rename_keys(pool.roster().keys().iter().map(|key| key.api_key()));
    pool.restore(&store.read_keys()?, clock::now());
    pool.restore_restrictions(store.read_refusals()?, clock::now());
    let owners = Arc::new(OwnershipIndex::new(settings.store.owner_limits));
    owners.restore(store.read_owners()?, clock::now());
    let client_usage =
        ClientUsage::new(&settings.clients, &store.read_client_usage(clock::now())?, clock::now());
    let (store, mut writing) = store.start_writer(Arc::clone(&pool), settings.store)?;
    let mirroring = Mirroring::start(settings.mirror, &mut writing)?;

    let upstream = {
        let connector = TcpTlsConnector::new(settings.ca_file.as_deref())?;
        let buffers = Some(settings.proxy.buffers.clone());
        Upstream::new(settings.authority, connector, settings.upstream, Tasks::new(), buffers)
    };
    let draining = DrainFlag::default();
    let config = Arc::new(ArcSwap::from_pointee(RuntimeConfig {
        clients: settings.clients,
        client_usage,
        limits: settings.proxy,
        access_rules: settings.access_rules,
        base_path: settings.base_path,
    }));
    let mirror_health = mirroring.as_ref().map(|mirroring| mirroring.health.clone());
    let (metrics, connection_limiter) =
        (RequestMetrics::default(), ConnectionLimiter::new(settings.server.max_connections));
    let setting_values = Arc::new(ArcSwap::from_pointee(settings.setting_values));
    let key_checker =
        KeyChecker::new(Arc::clone(&pool), upstream.clone(), store.clone(), settings.key_check_timeout);
    let admin = Admin {
        config: Arc::clone(&config),
        pool: Arc::clone(&pool),
        store_health: writing.health.clone(),
        mirror: mirror_health,
        draining: draining.clone(),
        metrics: metrics.clone(),
        connections: connection_limiter.clone(),
        reachability: upstream.reachability().clone(),
        started_at: clock::now(),
        control: settings.control,
        admin_token: settings.admin_token,
        public_pages: settings.public_pages,
        history: writing.history.clone(),
        key_checker,
        settings: Arc::clone(&setting_values),
        auth_failures: AuthFailureTable::default(),
    };
    let reachability = upstream.reachability().clone();
    let (rounds_sender, polling_rounds) = watch::channel(0);
    let (polling_settings, quota_task) = settings
        .polling
        .map(|settings| {
            let (sender, settings) = watch::channel(settings);
            let poller = QuotaPoller::new(Arc::clone(&pool), upstream.clone(), store.clone(), settings);
            (sender, Tasks::new().spawn_guarded(poller.run(rounds_sender)))
        })
        .unzip();

    let (drain, accept_tasks, connection_tasks) = (Drain::default(), Tasks::new(), Tasks::new());
    let (ended, conversations) = mpsc::channel(MAX_ENDED_CONVERSATIONS);
    let conversation_poller = ConversationPoller::new(
        Arc::clone(&pool),
        upstream.clone(),
        store.clone(),
        metrics.clone(),
        conversations,
    );
    let conversation_task = Tasks::new().spawn_guarded(conversation_poller.run());
    let shared = SharedState {
        config: Arc::clone(&config),
        pool: Arc::clone(&pool),
        owners,
        usage: store,
        metrics,
        ended_conversations: ended,
    };
    let proxy = Proxy::new(shared, upstream, drain.abort.clone());
    let router = Router::new(admin, proxy);
    let certificates = Certificates::new(settings.https, &addresses, clock::now())?;
    let renewal_task = Tasks::new().spawn_guarded(certificates.clone().renew_when_due());
    let workers = WorkerThreads::start(settings.workers)?;
    let worker_pool = workers.create_pool(&drain, || router.for_core(workers.count()));
    let server = Arc::new(Server {
        worker_pool: worker_pool.clone(),
        limits: settings.server,
        connection_limiter,
        drain: drain.clone(),
        accept_tasks: accept_tasks.clone(),
        connection_tasks: connection_tasks.clone(),
    });
    for (listener, address) in listeners.into_iter().zip(&addresses) {
        server.listen(listener, certificates.tls_for(address))?;
    }
    Ok(RunningApp {
        addresses,
        reachability,
        pool,
        config,
        setting_values,
        polling_settings,
        polling_rounds,
        certificates,
        draining,
        drain,
        drain_idle_timeout: settings.drain_idle_timeout,
        accept_tasks,
        connection_tasks,
        worker_pool,
        workers,
        quota_task,
        conversation_task,
        renewal_task,
        writing,
        mirroring,
    })
}

impl RunningApp {
    /// The address of the first TCP listener, or 127.0.0.1:0 without one.
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

    /// The sorted names of the clients with a token. Without such clients, no token is required.
    #[must_use]
    pub fn client_names(&self) -> Vec<String> {
        let config = self.config.load();
        let mut names: Vec<String> =
            config.clients.names_with_token().map(|name| name.as_str().to_owned()).collect();
        names.sort_unstable();
        names
    }

    /// Reads stored records, and records changes.
    #[must_use]
    pub fn history(&self) -> store::History {
        self.writing.history.clone()
    }

    /// Starts, changes or ends an operator's pause of a key at once. Returns whether the pool has the key.
    pub fn set_pause(&self, fingerprint: Fingerprint, pause: Option<Pause>) -> bool {
        let transitions = self.pool.set_pause(fingerprint, pause, clock::now());
        transitions.as_deref().map(log_transitions).is_some()
    }

    /// A snapshot of the keys and their state.
    #[must_use]
    pub fn keys(&self) -> Vec<KeySnapshot> {
        self.pool.snapshot(clock::now())
    }

    /// The number of requests that wait for a key.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.pool.queued_requests()
    }

    /// Whether the last connection attempt to the provider succeeded.
    #[must_use]
    pub fn reachability(&self) -> Reachability {
        self.reachability.get()
    }

    /// Waits up to `timeout` until the quota of every key is polled once; returns whether all are polled.
    pub async fn wait_for_first_poll(&mut self, timeout: Duration) -> bool {
        let first_round = self.polling_rounds.wait_for(|&rounds| rounds > 0);
        matches!(tokio::time::timeout(timeout, first_round).await, Ok(Ok(_)))
    }

    /// Checks that [`reload`](Self::reload) would accept these settings.
    ///
    /// # Errors
    ///
    /// When other machines could use the keys without a token.
    pub fn check_reload(&self, settings: &AppConfig) -> Result<(), UnprotectedListener> {
        check_exposure(&self.addresses, &settings.clients)
    }

    /// Applies the keys, clients and limits of `settings` to new requests, and the certificates to new
    /// connections. Other settings apply only at the next start. Requests in progress keep their settings,
    /// and remaining keys keep their state.
    ///
    /// # Errors
    ///
    /// Fails when other machines could use the keys without a token. Nothing is changed then.
    pub fn reload(&self, settings: AppConfig) -> Result<ReloadSummary, UnprotectedListener> {
        check_exposure(&self.addresses, &settings.clients)?;
        self.certificates.replace(settings.https, clock::now());
        let previous = self.config.load();
        let buffers = settings.proxy.buffers.with_counters_of(&previous.limits.buffers);
        let limits = Limits { buffers, ..settings.proxy };
        let AppConfig { clients, access_rules, base_path, setting_values, .. } = settings;
        self.setting_values.store(Arc::new(setting_values));
        let client_usage = previous.client_usage.with_clients(&clients);
        self.config.store(Arc::new(RuntimeConfig { clients, client_usage, limits, access_rules, base_path }));
        let reloaded = self.pool.reload(settings.keys, settings.pool);
        if let Some((sender, settings)) = self.polling_settings.as_ref().zip(settings.polling) {
            // Does not fail: the poller runs until the program ends.
            let _ = sender.send(settings);
        }
        Ok(reloaded)
    }

    /// Shuts the program down without a way to shorten the drain: see [`shut_down`](Self::shut_down).
    pub async fn drain(self, drain_timeout: Duration) -> DrainOutcome {
        self.shut_down(drain_timeout, pending()).await.drain_outcome
    }

    /// The maximum duration of a shutdown after its drain timeout.
    #[must_use]
    pub fn max_duration_after_drain(&self) -> Duration {
        ABORT_TIMEOUT
            + WRITE_TIMEOUT
            + self.mirroring.as_ref().map_or(Duration::ZERO, |mirroring| mirroring.final_push_timeout)
    }

    /// Drains the server in the phases of [`Drain`], aborts the requests that exceed `drain_timeout`, and
    /// writes all usage records. When `abort_signal` completes, requests are aborted immediately, and the
    /// mirror is not awaited.
    pub async fn shut_down(
        mut self,
        drain_timeout: Duration,
        abort_signal: impl Future<Output = ()>,
    ) -> ShutdownReport {
        let Drain { draining, kept_connections, stop_accepting, close_idle, abort, .. } = &self.drain;
        self.draining.set();
        draining.cancel();
        drop((self.quota_task, self.conversation_task, self.renewal_task));
        // At most half of the drain timeout, because requests in progress need the rest.
        let idle_timeout = self.drain_idle_timeout.min(drain_timeout / 2);
        let finish_requests = async {
            // Clients of kept connections receive `connection: close` with their next response.
            let _ = tokio::time::timeout(idle_timeout, kept_connections.ended()).await;
            stop_accepting.cancel();
            self.accept_tasks.ended().await;
            self.worker_pool.requests_ended().await;
            close_idle.cancel();
            self.connection_tasks.ended().await;
        };
        let mut abort_signal = pin!(abort_signal);
        let (drain_outcome, has_abort_signal) = tokio::select! {
            finished = tokio::time::timeout(drain_timeout, finish_requests) => match finished {
                Ok(()) => (DrainOutcome::Completed, false),
                Err(_) => (DrainOutcome::Aborted, false),
            },
            () = abort_signal.as_mut() => (DrainOutcome::Aborted, true),
        };
        stop_accepting.cancel();
        let abort_start = clock::instant();
        if drain_outcome == DrainOutcome::Aborted {
            abort.cancel();
            // The shutdown continues even if a connection does not end in time.
            let _ = tokio::time::timeout(ABORT_TIMEOUT, self.connection_tasks.ended()).await;
        }
        // The workers drop the tasks that still run. No usage record is produced after that.
        drop(self.worker_pool);
        let remaining = ABORT_TIMEOUT.saturating_sub(clock::elapsed_since(abort_start));
        let _ = tokio::time::timeout(remaining, self.workers.shut_down()).await;
        let write_start = clock::instant();
        let is_written = self.writing.wait_until_written(WRITE_TIMEOUT).await;
        // The time of this write counts against the end of the writer.
        let remaining = WRITE_TIMEOUT.saturating_sub(clock::elapsed_since(write_start));
        if let Some(mirroring) = self.mirroring.filter(|_| is_written && !has_abort_signal) {
            tokio::select! {
                () = mirroring.end() => {}
                () = abort_signal => {}
            }
        }
        ShutdownReport { drain_outcome, records_lost: self.writing.wait_until_closed(remaining).await }
    }
}
