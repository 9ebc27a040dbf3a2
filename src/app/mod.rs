//! Wires all modules into a running Keychoir, reloads it and shuts it down. The command line and the tests start it
//! with the same function. Also checks, without a start, whether a configuration could be started and whether the
//! services that it names are reachable.

mod accessors;
mod app_config;
mod connection_limit;
mod dry_run;
mod https;
mod listen;
mod mirror_task;
mod online_check;
mod reload;
mod replica_task;
mod router;
mod start_error;

use std::future::{Future, pending};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use serde_json::Value;
use tokio::sync::{mpsc, watch};

use crate::admin::{
    Admin, AuthFailureTable, DrainFlag, EventSource, Sessions, SharedAdminToken, SharedSettings,
};
use crate::clock;
use crate::config::SettingValue;
use crate::poller::{self, ConversationPoller, KeyChecker, QuotaPoller};
use crate::pool::{OwnershipIndex, Pool};
use crate::proxy::{ClientUsage, Proxy, RuntimeConfig, SharedConfig, SharedState};
use crate::server::{ConnectionLimiter, Drain, Server, WorkerPool, WorkerThreads};
use crate::store::{DatabaseLocation, Store, WriterHandle};
use crate::tasks::{AbortOnDrop, Tasks};
use crate::telemetry::{EventRing, RequestMetrics, TimelineHandle, sample_timeline};
use crate::upstream::{ReachabilityCell, TcpTlsConnector, Upstream};

pub use crate::mirror::TableCheck;
pub use crate::poller::{CheckOutcome, KeyCheck};
pub use crate::server::{Address, InheritedSockets, Listener, open_files_limit, raise_open_files_limit};
pub use crate::shared::{LinkSettings, RedisProbe, RedisProbeError, RedisRefusal, acl_setuser_command};
pub use app_config::AppConfig;
pub use connection_limit::ConnectionLimit;
pub use dry_run::{DryRun, StartProblem, StartWarning, dry_run};
pub use https::{Https, HttpsState};
pub use listen::{ListenError, ProgramListeners, listen, listen_for_operators};
pub use online_check::{CheckedKey, OnlineCheck, RouteCheck};
pub use start_error::{StartError, UnprotectedListener};

use crate::shared::new_replica_id;
use https::Certificates;
use mirror_task::MirrorTask;
use replica_task::{LEAVE_TIMEOUT, PreparedReplica, ReplicaTask};
use router::{ListenerScope, Router};
use start_error::{check_exposure, check_operator_exposure};

/// A running Keychoir with all its tasks.
#[derive(Debug)]
pub struct RunningApp {
    addresses: Vec<Address>,
    operator_addresses: Vec<Address>,
    events: EventRing,
    reachability: ReachabilityCell,
    pool: Arc<Pool>,
    config: SharedConfig,
    settings: SharedSettings,
    admin_token: SharedAdminToken,
    polling_settings: Option<watch::Sender<poller::Settings>>,
    polling_rounds: watch::Receiver<u64>,
    certificates: Certificates,
    drain_flag: DrainFlag,
    drain: Drain,
    drain_idle_timeout: Duration,
    accept_tasks: Tasks,
    connection_tasks: Tasks,
    worker_pool: WorkerPool<Router>,
    operator_pool: WorkerPool<Router>,
    workers: WorkerThreads,
    quota_task: Option<AbortOnDrop>,
    conversation_task: AbortOnDrop,
    renewal_task: AbortOnDrop,
    timeline_task: AbortOnDrop,
    store_writer: WriterHandle,
    mirror_task: Option<MirrorTask>,
    replica: Option<ReplicaTask>,
}

/// The result of a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainOutcome {
    /// Every response was completed.
    Completed,
    /// Some requests were aborted, at the end of the drain timeout or because the abort signal completed.
    Aborted,
}

/// The result of a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownReport {
    /// The result of the drain, in which requests were completed or aborted.
    pub drain_outcome: DrainOutcome,
    /// The number of usage records that were lost after startup, because they could not be written.
    pub records_lost: u64,
}

/// Maximum number of ended conversations that wait until their cost is polled.
const MAX_ENDED_CONVERSATIONS: usize = 1_024;
/// Maximum number of connections to the listeners for operators. They do not count among `server.max_connections`, so
/// that operators can connect while clients use all of their connections.
const MAX_OPERATOR_CONNECTIONS: usize = 256;
/// Maximum wait for aborted connections and their workers to end.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum wait for the last usage records to be written.
const WRITE_TIMEOUT: Duration = Duration::from_secs(8);

/// Starts Keychoir and serves requests on `listeners`.
///
/// # Errors
///
/// Fails when a module cannot be started, or when other machines could use the keys or the admin API without a token.
pub fn start(
    app_config: AppConfig,
    listeners: impl Into<ProgramListeners>,
) -> Result<RunningApp, StartError> {
    let ProgramListeners { clients: listeners, operators: operator_listeners } = listeners.into();
    let addresses = listeners.iter().map(Listener::address).collect::<io::Result<Vec<_>>>()?;
    let operator_addresses =
        operator_listeners.iter().map(Listener::address).collect::<io::Result<Vec<_>>>()?;
    check_exposure(&addresses, &app_config.clients)?;
    check_operator_exposure(&operator_addresses, app_config.admin_token.is_some())?;
    let pool = Arc::new(Pool::new(app_config.keys, app_config.pool));
    let owners = Arc::new(OwnershipIndex::new(app_config.store.owner_limits));
    let store = open_store(&app_config.database, &pool, &owners)?;
    let client_totals = store.read_client_usage(clock::now())?;
    // A process that shares its pool with no other replicas needs no id.
    let redis = app_config
        .redis
        .map(|settings| Ok::<_, StartError>((settings, store.replica_id(&new_replica_id())?)));
    let redis = redis.transpose()?;
    let (usage, mut store_writer) = store.start_writer(Arc::clone(&pool), app_config.store)?;
    let user_reader = Arc::new(store_writer.history.clone());
    let mut client_usage = ClientUsage::new(&app_config.clients, &client_totals, user_reader, clock::now());
    let replica = redis.map(|(settings, replica_id)| {
        let regions = app_config.polling.as_ref().map(|polling| Arc::clone(&polling.regions));
        PreparedReplica::new(settings, &pool, replica_id, regions, app_config.store.owner_limits)
    });
    let replica = replica.transpose()?;
    let replica_link = replica.as_ref().map(PreparedReplica::link);
    if let Some(link) = &replica_link {
        client_usage = client_usage.with_link(Arc::clone(link), &app_config.clients, clock::now());
    }
    let mirror_task = MirrorTask::start(app_config.mirror, &mut store_writer)?;

    let upstream = {
        let connector = TcpTlsConnector::new(app_config.ca_file.as_deref())?;
        let buffers = Some(app_config.proxy.buffers.clone());
        Upstream::new(app_config.authority, connector, app_config.upstream, Tasks::new(), buffers)
    };
    let drain_flag = DrainFlag::default();
    let config = Arc::new(ArcSwap::from_pointee(RuntimeConfig {
        clients: app_config.clients,
        client_usage,
        limits: app_config.proxy,
        access_rules: app_config.access_rules,
        base_path: app_config.base_path,
    }));
    let replica = replica.map(|replica| replica.start(Arc::clone(&config)));
    let (metrics, connection_limiter) =
        (RequestMetrics::default(), ConnectionLimiter::new(app_config.server.max_connections));
    let timeline = TimelineHandle::new(metrics.clone());
    let timeline_task = Tasks::new().spawn_guarded(sample_timeline(timeline.clone()));
    let events = EventRing::default();
    let settings = Arc::new(ArcSwap::from_pointee(to_document(&app_config.setting_values)));
    let admin_token = Arc::new(ArcSwapOption::from(app_config.admin_token.map(Arc::new)));
    let key_checker =
        KeyChecker::new(Arc::clone(&pool), upstream.clone(), usage.clone(), app_config.key_check_timeout);
    let sessions =
        Sessions::open(app_config.sessions_file, app_config.session_limits, Arc::clone(&admin_token));
    let admin = Admin {
        config: Arc::clone(&config),
        pool: Arc::clone(&pool),
        store_health: store_writer.health.clone(),
        mirror: mirror_task.as_ref().map(|mirror_task| mirror_task.health.clone()),
        shared: replica.as_ref().map(|replica| replica.view.clone()),
        draining: drain_flag.clone(),
        metrics: metrics.clone(),
        timeline,
        connections: connection_limiter.clone(),
        reachability: upstream.reachability().clone(),
        started_at: clock::now(),
        control: app_config.control,
        admin_token: Arc::clone(&admin_token),
        public_pages: app_config.public_pages,
        history: store_writer.history.clone(),
        key_checker,
        settings: Arc::clone(&settings),
        auth_failures: AuthFailureTable::default(),
        events: EventSource::new(events.clone(), app_config.max_event_listeners),
        sessions,
    };
    let reachability = upstream.reachability().clone();
    let (rounds_sender, polling_rounds) = watch::channel(0);
    let (polling_settings, quota_task) = app_config
        .polling
        .map(|polling| {
            let (settings_sender, settings) = watch::channel(polling);
            let sharing = replica.as_ref().map(|replica| replica.poll_sharing.clone());
            let poller = QuotaPoller::new(Arc::clone(&pool), upstream.clone(), usage.clone(), settings)
                .with_sharing(sharing);
            (settings_sender, Tasks::new().spawn_guarded(poller.run(rounds_sender)))
        })
        .unzip();

    let (drain, accept_tasks, connection_tasks) = (Drain::default(), Tasks::new(), Tasks::new());
    let (ended_sender, ended_conversations) = mpsc::channel(MAX_ENDED_CONVERSATIONS);
    let conversation_poller = ConversationPoller::new(
        Arc::clone(&pool),
        upstream.clone(),
        usage.clone(),
        metrics.clone(),
        ended_conversations,
    );
    let conversation_task = Tasks::new().spawn_guarded(conversation_poller.run());
    let shared = SharedState {
        config: Arc::clone(&config),
        pool: Arc::clone(&pool),
        owners,
        replica_link,
        usage,
        metrics,
        events: events.clone(),
        ended_conversations: ended_sender,
    };
    let proxy = Proxy::new(shared, upstream, drain.abort.clone());
    let scope = if operator_listeners.is_empty() { ListenerScope::All } else { ListenerScope::Clients };
    let client_address = match scope {
        ListenerScope::All | ListenerScope::Operators => None,
        ListenerScope::Clients => addresses.iter().find_map(Address::tcp),
    };
    let router = Router::new(admin, proxy, client_address).with_scope(scope);
    let all_addresses = [addresses.as_slice(), &operator_addresses].concat();
    let certificates = Certificates::new(app_config.https, &all_addresses, clock::now())?;
    let renewal_task = Tasks::new().spawn_guarded(certificates.clone().renew_when_due());
    let workers = WorkerThreads::start(app_config.workers)?;
    let worker_pool = workers.create_pool(&drain, || router.for_core(workers.count()));
    let operator_router = router.with_scope(ListenerScope::Operators);
    let operator_pool = workers.create_pool(&drain, || operator_router.clone());
    let server = |worker_pool: &WorkerPool<Router>, connection_limiter| {
        Arc::new(Server {
            worker_pool: worker_pool.clone(),
            limits: app_config.server,
            connection_limiter,
            drain: drain.clone(),
            accept_tasks: accept_tasks.clone(),
            connection_tasks: connection_tasks.clone(),
        })
    };
    let client_server = server(&worker_pool, connection_limiter);
    let operator_server = server(&operator_pool, ConnectionLimiter::new(MAX_OPERATOR_CONNECTIONS));
    for (server, listeners, addresses) in
        [(client_server, listeners, &addresses), (operator_server, operator_listeners, &operator_addresses)]
    {
        for (listener, address) in listeners.into_iter().zip(addresses) {
            server.listen(listener, certificates.tls_for(address))?;
        }
    }
    Ok(RunningApp {
        addresses,
        operator_addresses,
        events,
        reachability,
        pool,
        config,
        settings,
        admin_token,
        polling_settings,
        polling_rounds,
        certificates,
        drain_flag,
        drain,
        drain_idle_timeout: app_config.drain_idle_timeout,
        accept_tasks,
        connection_tasks,
        worker_pool,
        operator_pool,
        workers,
        quota_task,
        conversation_task,
        renewal_task,
        timeline_task,
        store_writer,
        mirror_task,
        replica,
    })
}

/// Opens the usage store, renames the keys of earlier versions, and restores the state of the keys, their restrictions
/// and the owners of identifiers from it.
fn open_store(
    location: &DatabaseLocation,
    pool: &Pool,
    owners: &OwnershipIndex,
) -> Result<Store, StartError> {
    let mut store = Store::open(location, clock::now())?;
    store.rename_keys(pool.roster().keys().iter().map(|key| key.api_key()));
    pool.restore(&store.read_keys()?, clock::now());
    pool.restore_restrictions(store.read_refusals()?, clock::now());
    owners.restore(store.read_owners()?, clock::now());
    Ok(store)
}

/// Formats settings for the admin API.
fn to_document(settings: &[SettingValue]) -> Value {
    // Text and options are always valid JSON.
    serde_json::to_value(settings).unwrap_or_default()
}

impl RunningApp {
    /// Waits up to `timeout` until the quota of every key has been polled once. Returns whether all quotas
    /// have been polled.
    pub async fn wait_for_first_poll(&mut self, timeout: Duration) -> bool {
        let first_round = self.polling_rounds.wait_for(|&rounds| rounds > 0);
        matches!(tokio::time::timeout(timeout, first_round).await, Ok(Ok(_)))
    }

    /// Calls [`shut_down`](Self::shut_down) without an abort signal.
    pub async fn drain(self, drain_timeout: Duration) -> DrainOutcome {
        self.shut_down(drain_timeout, pending()).await.drain_outcome
    }

    /// Returns the maximum duration of a shutdown after its drain timeout.
    #[must_use]
    pub fn max_duration_after_drain(&self) -> Duration {
        ABORT_TIMEOUT
            + self.replica.as_ref().map_or(Duration::ZERO, |_| LEAVE_TIMEOUT)
            + WRITE_TIMEOUT
            + self.mirror_task.as_ref().map_or(Duration::ZERO, |mirror_task| mirror_task.final_push_timeout)
    }

    /// Drains Keychoir in the phases of [`Drain`], aborts the requests that exceed `drain_timeout`, writes all usage
    /// records, and waits until the mirror has sent its rows. When `abort_signal` completes, requests are aborted
    /// immediately, and the shutdown does not wait for the mirror.
    pub async fn shut_down(
        mut self,
        drain_timeout: Duration,
        abort_signal: impl Future<Output = ()>,
    ) -> ShutdownReport {
        let Drain { draining, kept_connections, stop_accepting, close_idle, abort, .. } = &self.drain;
        self.drain_flag.set();
        draining.cancel();
        drop((self.quota_task, self.conversation_task, self.renewal_task, self.timeline_task));
        // Idle connections get at most half of the drain timeout, because requests in progress need the rest.
        let idle_timeout = self.drain_idle_timeout.min(drain_timeout / 2);
        let finish_requests = async {
            // Clients of kept connections receive `connection: close` with their next response.
            let _ = tokio::time::timeout(idle_timeout, kept_connections.wait_until_ended()).await;
            stop_accepting.cancel();
            self.accept_tasks.wait_until_ended().await;
            self.worker_pool.wait_until_requests_ended().await;
            self.operator_pool.wait_until_requests_ended().await;
            close_idle.cancel();
            self.connection_tasks.wait_until_ended().await;
        };
        let mut abort_signal = pin!(abort_signal);
        let (drain_outcome, is_abort_requested) = tokio::select! {
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
            let _ = tokio::time::timeout(ABORT_TIMEOUT, self.connection_tasks.wait_until_ended()).await;
        }
        // The workers drop the tasks that are still running. No usage record is produced after that.
        drop((self.worker_pool, self.operator_pool));
        let workers_timeout = ABORT_TIMEOUT.saturating_sub(clock::elapsed_since(abort_start));
        let _ = tokio::time::timeout(workers_timeout, self.workers.shut_down()).await;
        if let Some(replica) = self.replica {
            replica.leave().await;
        }
        let write_start = clock::instant();
        let is_written = self.store_writer.wait_until_written(WRITE_TIMEOUT).await;
        // The wait for this write and the wait until the database is closed share one timeout.
        let close_timeout = WRITE_TIMEOUT.saturating_sub(clock::elapsed_since(write_start));
        if let Some(mirror_task) = self.mirror_task.filter(|_| is_written && !is_abort_requested) {
            tokio::select! {
                () = mirror_task.finish() => {}
                () = abort_signal => {}
            }
        }
        let records_lost = self.store_writer.wait_until_closed(close_timeout).await;
        ShutdownReport { drain_outcome, records_lost }
    }
}
