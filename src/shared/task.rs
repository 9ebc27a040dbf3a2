//! Connects this replica to Redis, and connects again after a failure or to another node of a cluster. While Redis does
//! not respond, the replica is alone: it uses only its part of the pool. `open_link.rs` uses an open connection until
//! it fails. Also publishes the state of the connection and the polling role of this replica.

use std::sync::Arc;
use std::time::Duration;

use redis::RedisError;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::LinkSettings;
use super::beat_calls::BeatCause;
use super::changes::parse_overlay;
use super::clients::ClientShares;
use super::connect_error::RedisConnectError;
use super::connection::RedisEndpoint;
use super::link::{OwnerUpdates, RedisLink, RedisLinkSettings};
use super::link_counts::LinkFault;
use super::maps::MapEntry;
use super::members::MEMBER_TTL;
use super::open_link::OpenLink;
use super::overlay::OverlayPort;
use super::replica::{Replica, ReplicaSettings};
use super::reply::UnexpectedReply;
use super::scripts::{ChangeMap, Keyspace};
use super::shared_clock::Moment;
use super::slots::Fallback;
use super::view::{LinkState, PoolView, SharedPoolView, list_replicas};
use crate::clock;
use crate::elevenlabs::affinity::RetentionLimits;
use crate::policy::authority::Authority;
use crate::poller::{OwnPoll, PollingRole};
use crate::pool::{Pool, PoolChange};
use crate::proxy::{ReplicaLink, SharedConfig};
use crate::tasks::Tasks;
use crate::upstream::TlsError;

/// The delay before the second attempt to connect. The delay doubles with each further attempt.
const FIRST_RECONNECT_DELAY: Duration = Duration::from_millis(100);

/// The parts of the program that a [`LinkTask`] uses.
#[derive(Debug)]
pub struct LinkInputs {
    /// The pool whose state is shared.
    pub pool: Arc<Pool>,
    /// The id of this replica.
    pub replica_id: String,
    /// The results of the polls by this replica. `None` if it does not poll.
    pub polls: Option<mpsc::Receiver<OwnPoll>>,
    /// The regional hosts of the provider.
    pub regions: Arc<[Arc<Authority>]>,
    /// The maximum number and age of the recorded owners of identifiers.
    pub owner_limits: RetentionLimits,
}

/// The handles of a [`LinkTask`], for the rest of the program.
#[derive(Debug)]
pub struct LinkHandles {
    /// Whether this replica polls the provider for all replicas. It is undecided until the first attempt to connect has
    /// ended.
    pub role: watch::Receiver<PollingRole>,
    /// The state of the connection and of the replicas.
    pub view: SharedPoolView,
    /// Looks up owners, lists and quotas of other replicas for requests.
    pub link: Arc<dyn ReplicaLink>,
    /// Sends the channels of the overlay to the task. The part of the program that owns the overlay uses it once.
    pub overlay: mpsc::Sender<OverlayPort>,
    /// The program cancels this token when it ends, so that the replica returns its grants and slots.
    pub leaving: CancellationToken,
}

/// The task that keeps this replica connected to Redis.
#[derive(Debug)]
pub struct LinkTask {
    /// The configured Redis, before any redirect in a cluster.
    endpoint: RedisEndpoint,
    pub(super) settings: LinkSettings,
    pub(super) replica: Replica,
    /// The changes of the pool that other replicas must receive.
    pub(super) changes: mpsc::Receiver<PoolChange>,
    /// The results of the polls by this replica.
    pub(super) polls: mpsc::Receiver<OwnPoll>,
    role: watch::Sender<PollingRole>,
    pub(super) view: SharedPoolView,
    tasks: Tasks,
    pub(super) clients: ClientShares,
    /// The lookups of requests, which use the connection of this task.
    pub(super) link: Arc<RedisLink>,
    pub(super) owner_updates: OwnerUpdates,
    /// Receives the channels of the overlay, once.
    pub(super) overlay_ports: mpsc::Receiver<OverlayPort>,
    /// The channels of the overlay, or `None` before they were received.
    pub(super) overlay: Option<OverlayPort>,
    /// Cancelled when the program ends.
    pub(super) leaving: CancellationToken,
}

/// The reason why the task stops using a connection, or cannot open one.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error(transparent)]
    Connect(#[from] RedisConnectError),
    #[error("{0}")]
    Command(#[from] RedisError),
    #[error("Redis did not respond within {} ms", .0.as_millis())]
    Timeout(Duration),
    #[error("the connection was closed")]
    Closed,
    #[error("the program ends")]
    Left,
    #[error(transparent)]
    Reply(#[from] UnexpectedReply),
}

impl LinkError {
    /// Returns the reason under which the metric `redis_errors` counts the error.
    fn fault(&self) -> LinkFault {
        match self {
            Self::Connect(error) => LinkFault::of_connect(error),
            Self::Command(error) => LinkFault::of_command(error),
            Self::Timeout(_) => LinkFault::Timeout,
            Self::Closed | Self::Left => LinkFault::Closed,
            Self::Reply(_) => LinkFault::Reply,
        }
    }
}

impl LinkTask {
    /// Creates the task and its handles. [`LinkTask::run`] opens the connection.
    ///
    /// # Errors
    ///
    /// Fails when `redis.ca_file` cannot be used, or the TLS library supports no protocol version.
    pub fn new(settings: LinkSettings, inputs: LinkInputs) -> Result<(Self, LinkHandles), TlsError> {
        /// Maximum number of queued changes of the pool. A change beyond it is dropped, and sent again after the next
        /// connection.
        const MAX_QUEUED_CHANGES: usize = 4_096;
        let LinkInputs { pool, replica_id, polls, regions, owner_limits } = inputs;
        let (changes_sender, changes) = mpsc::channel(MAX_QUEUED_CHANGES);
        pool.send_changes_to(changes_sender);
        let (role, role_receiver) = watch::channel(PollingRole::Undecided);
        let view = SharedPoolView::default();
        let (link, owner_updates) = RedisLink::new(RedisLinkSettings {
            replica_id: replica_id.clone(),
            keyspace: Keyspace::new(settings.pool.clone()),
            wait_timeout: settings.wait_timeout,
            pool: Arc::clone(&pool),
            owner_limits,
            counts: view.counts().clone(),
        });
        let link = Arc::new(link);
        let replica_settings = ReplicaSettings {
            id: replica_id,
            pool_name: settings.pool.clone(),
            can_lead: polls.is_some(),
            regions,
        };
        let (overlay_sender, overlay_ports) = mpsc::channel(1);
        let leaving = CancellationToken::new();
        let task = Self {
            endpoint: RedisEndpoint::new(&settings)?,
            settings,
            replica: Replica::new(replica_settings, pool, clock::now()),
            changes,
            polls: polls.unwrap_or_else(|| mpsc::channel(1).1),
            role,
            view: view.clone(),
            tasks: Tasks::new(),
            clients: ClientShares::default(),
            link: Arc::clone(&link),
            owner_updates,
            overlay_ports,
            overlay: None,
            leaving: leaving.clone(),
        };
        Ok((task, LinkHandles { role: role_receiver, view, link, overlay: overlay_sender, leaving }))
    }

    /// Keeps the replica connected until it has left the pool.
    pub async fn run(mut self, config: SharedConfig) {
        let mut endpoint = self.endpoint.clone();
        let mut delay = FIRST_RECONNECT_DELAY;
        let mut is_loss_reported = false;
        loop {
            let error = match self.connect(&endpoint, &config).await {
                Ok(mut link) => {
                    let when = if is_loss_reported { "again" } else { "now" };
                    info!(
                        event = "redis_connected",
                        server = link.connection().server.address,
                        "The replicas share one pool {when}, through {}",
                        link.connection().server.address
                    );
                    (is_loss_reported, delay) = (false, FIRST_RECONNECT_DELAY);
                    link.run(&mut self).await
                }
                Err(error) => error,
            };
            if self.leaving.is_cancelled() {
                return;
            }
            self.replica.record_disconnected();
            self.link.set_connection(None);
            self.clients.resend_all();
            self.publish_view();
            let other_node =
                if let LinkError::Command(error) = &error { endpoint.redirect(error) } else { None };
            if let Some(node) = other_node {
                // This node of the cluster has the keys of the pool, so the task connects to it without a delay.
                endpoint = node;
                continue;
            }
            endpoint = self.endpoint.clone();
            self.view.counts().record_error(error.fault());
            if !std::mem::replace(&mut is_loss_reported, true) {
                warn!(
                    event = "redis_lost",
                    "This replica uses only its part of the pool until Redis responds: {error}"
                );
            }
            let pause = delay.mul_f64(0.5 + fastrand::f64() / 2.0);
            delay = (delay * 2).min(self.settings.max_reconnect_delay);
            self.stay_alone(pause, &config).await;
        }
    }

    /// Waits for the duration of `pause` before the next attempt to connect. Meanwhile, the replica uses only its part
    /// of the pool. It drops the changes of the pool, because it sends all evidence and restrictions again after the
    /// next connection.
    async fn stay_alone(&mut self, pause: Duration, config: &SharedConfig) {
        let wait = tokio::time::sleep(pause);
        tokio::pin!(wait);
        let mut ticks = interval(self.settings.beat_interval);
        loop {
            tokio::select! {
                () = &mut wait => return,
                () = self.leaving.cancelled() => return,
                _ = ticks.tick() => self.fall_back(config),
                Some(_) = self.changes.recv() => {}
                Some(_) = self.polls.recv() => {}
                () = self.owner_updates.discard() => {}
                Some(port) = self.overlay_ports.recv() => self.overlay = Some(port),
            }
        }
    }

    /// Replaces each ended grant by an equal part of the credits or slots that were left, and each grant of fewer slots
    /// than an equal part by the equal part.
    fn fall_back(&mut self, config: &SharedConfig) {
        self.replica.fall_back(Moment::current());
        let (usage, replicas) = (&config.load().client_usage, self.replica.live_replica_count());
        self.clients.fall_back(usage, replicas, Fallback::AtLeastEqualPart, Moment::current());
    }

    /// Opens a connection, subscribes to the channel of the pool, and sends the first beat.
    async fn connect(
        &mut self,
        endpoint: &RedisEndpoint,
        config: &SharedConfig,
    ) -> Result<OpenLink, LinkError> {
        let tasks = self.tasks.clone();
        let opening = endpoint.open(&tasks);
        tokio::pin!(opening);
        let mut ticks = interval(self.settings.beat_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let connection = loop {
            tokio::select! {
                connection = &mut opening => break connection?,
                // Until the first attempt to connect has ended, the replica may use the whole pool.
                _ = ticks.tick() => if self.view.get().link == LinkState::Alone {
                    self.fall_back(config);
                }
            }
        };
        let counts = self.view.counts().clone();
        let mut link = OpenLink::new(connection, counts, self.settings.response_timeout, Arc::clone(config));
        let channel = self.replica.keyspace.channel();
        link.query(|mut commands| async move { commands.subscribe(channel).await }).await?;
        self.replica.record_connected();
        link.send_beat(self, BeatCause::ReplyNeeded).await?;
        self.link.set_connection(Some(link.connection().commands.clone()));
        Ok(link)
    }

    /// Uses a new id, because another program uses the previous id.
    pub(super) fn replace_id(&mut self) {
        let id = new_replica_id();
        warn!(
            event = "replica_id_in_use",
            "Another replica has the id {}, because its database is a copy of that of this replica. Until the next \
             start, this replica is {id}. Delete the row of the table `replica` of one of them while it is stopped",
            self.replica.id
        );
        self.link.replace_id(id.clone());
        self.replica.replace_id(id);
    }

    /// Applies an entry of a map that `replica` has published. `replica` is empty if the entry was read from Redis.
    pub(super) fn apply_entry(&mut self, entry: &MapEntry, replica: &str) {
        let is_new = self.replica.apply_entry(entry, replica, Moment::current());
        if is_new
            && entry.map == ChangeMap::Overlay
            && let Some(port) = &self.overlay
            && let Some(overlay) = parse_overlay(&entry.value)
        {
            // The overlay is dropped when the channel is full: the next overlay contains all its changes as well.
            let _ = port.incoming.try_send(overlay);
        }
    }

    /// Publishes the connection and the replicas for status pages, and the role of this replica for the poller.
    pub(super) fn publish_view(&self) {
        let replica = &self.replica;
        let is_alone = replica.is_alone();
        let replicas = replica.membership().map_or_else(Vec::new, |membership| {
            let ttl = u64::try_from(MEMBER_TTL.as_millis()).unwrap_or(u64::MAX);
            list_replicas(membership, &replica.id, replica.clock, ttl)
        });
        let link = if is_alone { LinkState::Alone } else { LinkState::Connected };
        self.view.set(PoolView { link, replicas });
        let role = if replica.is_polling() { PollingRole::Leader } else { PollingRole::Follower };
        self.role.send_if_modified(|current| std::mem::replace(current, role) != role);
    }
}

/// Returns a new random id of a replica.
#[must_use]
pub fn new_replica_id() -> String {
    format!("r{:012x}", fastrand::u64(..1 << 48))
}
