//! The task that connects this replica to Redis: it states at each beat what changed, publishes changes at once, and
//! applies those of others. Without a response, the replica continues alone until Redis responds again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{RedisError, Value};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep_until, timeout};
use tracing::{info, warn};

use super::LinkSettings;
use super::changes::parse_overlay;
use super::clients::{CallContext, ClientShares};
use super::connect_error::RedisConnectError;
use super::connection::{RedisConnection, RedisEndpoint};
use super::link::{OwnerUpdate, OwnerUpdates, RedisLink, RedisLinkSettings, owners_call};
use super::maps::{MapEntry, Message, store_calls};
use super::members::MEMBER_TTL;
use super::overlay::OverlayPort;
use super::push::Push;
use super::replica::{Beat, Replica, ReplicaSettings};
use super::reply::{UnexpectedReply, fields};
use super::scripts::{Keyspace, Map, ScriptCall};
use super::shared_clock::Moment;
use super::view::{LinkState, PoolView, SharedPoolView, replica_infos};
use crate::clock;
use crate::elevenlabs::affinity::RetentionLimits;
use crate::policy::authority::Authority;
use crate::poller::OwnPoll;
use crate::poller::PollingRole;
use crate::pool::{Pool, PoolChange};
use crate::proxy::{ReplicaLink, SharedConfig};
use crate::tasks::Tasks;
use crate::upstream::TlsError;

/// Minimum time between two beats, however many requests are queued.
const MIN_BEAT_INTERVAL: Duration = Duration::from_millis(5);
/// Minimum time between two messages by which a replica asks the others for what they do not need.
const MIN_DEMAND_INTERVAL: Duration = Duration::from_millis(50);
/// Minimum time between two calls that store owners of identifiers that every speech request creates.
const MIN_OWNER_INTERVAL: Duration = Duration::from_millis(50);
/// Maximum number of owners that one call stores. With [`MIN_OWNER_INTERVAL`], it suffices for 10,000 speech requests per
/// second at one replica.
const MAX_OWNERS: usize = 1_024;
/// Maximum number of changes that one call states.
const MAX_CHANGES: usize = 256;
/// The delay before the second attempt to connect. It doubles with each attempt.
const FIRST_RECONNECT_DELAY: Duration = Duration::from_millis(100);

/// The channels between the task and the rest of the program.
#[derive(Debug)]
pub struct LinkInputs {
    /// The pool whose state is shared.
    pub pool: Arc<Pool>,
    /// The id of this replica.
    pub replica_id: String,
    /// The polls of this replica. `None` if it does not poll.
    pub polls: Option<mpsc::Receiver<OwnPoll>>,
    /// The regional hosts of the provider.
    pub regions: Arc<[Arc<Authority>]>,
    /// How long owners of identifiers are kept.
    pub owner_limits: RetentionLimits,
}

/// The handles of a [`LinkTask`], for the rest of the program.
#[derive(Debug)]
pub struct LinkHandles {
    /// Whether this replica polls.
    pub role: watch::Receiver<PollingRole>,
    /// What this replica knows of the pool.
    pub view: SharedPoolView,
    /// The link of requests.
    pub link: Arc<dyn ReplicaLink>,
    /// Receives the channels of the owner of the overlay, once.
    pub overlay: mpsc::Sender<OverlayPort>,
}

/// The link of this replica to the pool.
#[derive(Debug)]
pub struct LinkTask {
    endpoint: RedisEndpoint,
    settings: LinkSettings,
    replica: Replica,
    changes: mpsc::Receiver<PoolChange>,
    polls: mpsc::Receiver<OwnPoll>,
    role: watch::Sender<PollingRole>,
    view: SharedPoolView,
    tasks: Tasks,
    clients: ClientShares,
    link: Arc<RedisLink>,
    owner_updates: OwnerUpdates,
    overlay_ports: mpsc::Receiver<OverlayPort>,
    overlay: Option<OverlayPort>,
}

/// The reason that a connection is not used any more.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Connect(#[from] RedisConnectError),
    #[error("{0}")]
    Command(#[from] RedisError),
    #[error("Redis did not respond within {} ms", .0.as_millis())]
    Timeout(Duration),
    #[error("the connection was closed")]
    Closed,
    #[error(transparent)]
    Reply(#[from] UnexpectedReply),
}

impl LinkTask {
    /// Prepares the link. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// Fails when `redis.ca_file` cannot be used.
    pub fn new(settings: LinkSettings, inputs: LinkInputs) -> Result<(Self, LinkHandles), TlsError> {
        /// Changes beyond this number are stated with the next restatement.
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
        });
        let link = Arc::new(link);
        let replica_settings = ReplicaSettings {
            id: replica_id,
            pool_name: settings.pool.clone(),
            can_lead: polls.is_some(),
            regions,
        };
        let (overlay_sender, overlay_ports) = mpsc::channel(1);
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
        };
        Ok((task, LinkHandles { role: role_receiver, view, link, overlay: overlay_sender }))
    }

    /// Runs the link and never returns.
    pub async fn run(mut self, config: SharedConfig) {
        let mut endpoint = self.endpoint.clone();
        let mut delay = FIRST_RECONNECT_DELAY;
        let mut is_reported = false;
        loop {
            let error = match self.connect(&endpoint, &config).await {
                Ok(mut link) => {
                    let state = if is_reported { "again" } else { "now" };
                    info!(
                        event = "redis_connected",
                        server = link.connection.server.address,
                        "The replicas share one pool {state}, through {}",
                        link.connection.server.address
                    );
                    (is_reported, delay) = (false, FIRST_RECONNECT_DELAY);
                    link.run(&mut self).await
                }
                Err(error) => error,
            };
            self.replica.set_alone(true);
            self.link.set_connection(None);
            self.clients.restate();
            self.publish_view();
            endpoint = match &error {
                // The node of a cluster that has the keys of the pool, at once.
                LinkError::Command(error) if let Some(node) = endpoint.redirect(error) => {
                    endpoint = node;
                    continue;
                }
                _ => self.endpoint.clone(),
            };
            if !std::mem::replace(&mut is_reported, true) {
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

    /// Uses only the part of this replica for the duration of `pause`. Drops the changes of the pool, which are stated
    /// again after the next connection.
    async fn stay_alone(&mut self, pause: Duration, config: &SharedConfig) {
        let wait = tokio::time::sleep(pause);
        tokio::pin!(wait);
        let mut ticks = interval(self.settings.beat_interval);
        loop {
            tokio::select! {
                () = &mut wait => return,
                _ = ticks.tick() => self.fall_back(config),
                Some(_) = self.changes.recv() => {}
                Some(_) = self.polls.recv() => {}
                () = self.owner_updates.discard() => {}
                Some(port) = self.overlay_ports.recv() => self.overlay = Some(port),
            }
        }
    }

    /// Replaces the grants that have ended by parts of what was left.
    fn fall_back(&mut self, config: &SharedConfig) {
        self.replica.fall_back(moment());
        self.clients.fall_back(&config.load().client_usage, self.replica.live_replicas(), moment());
    }

    async fn connect(&mut self, endpoint: &RedisEndpoint, config: &SharedConfig) -> Result<Link, LinkError> {
        let tasks = self.tasks.clone();
        let opening = endpoint.open(&tasks);
        tokio::pin!(opening);
        let mut ticks = interval(self.settings.beat_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let connection = loop {
            tokio::select! {
                connection = &mut opening => break connection?,
                // Before the first connection is decided, nothing is divided.
                _ = ticks.tick() => if self.view.get().link == LinkState::Alone {
                    self.fall_back(config);
                }
            }
        };
        let mut link = Link {
            connection,
            response_timeout: self.settings.response_timeout,
            last_beat: None,
            last_demand: None,
            next_owner_call: clock::instant(),
            config: Arc::clone(config),
        };
        let channel = self.replica.keyspace.channel();
        link.query(|mut commands| async move { commands.subscribe(channel).await }).await?;
        self.replica.set_alone(false);
        link.beat(self, true).await?;
        self.link.set_connection(Some(link.connection.commands.clone()));
        Ok(link)
    }

    /// Applies an entry of a map that `replica` has stated.
    fn apply_entry(&mut self, entry: &MapEntry, replica: &str) {
        let is_new = self.replica.apply_entry(entry, replica, moment());
        if is_new
            && entry.map == Map::Overlay
            && let Some(port) = &self.overlay
            && let Some(overlay) = parse_overlay(&entry.value)
        {
            // Each overlay contains all changes, so the next one replaces an overlay that is dropped here.
            let _ = port.incoming.try_send(overlay);
        }
    }

    fn publish_view(&self) {
        let replica = &self.replica;
        let is_alone = replica.is_alone();
        let replicas = replica.membership().map_or_else(Vec::new, |membership| {
            let ttl = u64::try_from(MEMBER_TTL.as_millis()).unwrap_or(u64::MAX);
            replica_infos(membership, &replica.id, replica.clock, ttl)
        });
        let link = if is_alone { LinkState::Alone } else { LinkState::Connected };
        self.view.set(PoolView { link, replicas });
        let role = if replica.is_polling() { PollingRole::Leader } else { PollingRole::Follower };
        self.role.send_if_modified(|known| std::mem::replace(known, role) != role);
    }
}

/// An open connection to Redis.
#[derive(Debug)]
struct Link {
    connection: RedisConnection,
    response_timeout: Duration,
    last_beat: Option<Instant>,
    last_demand: Option<Instant>,
    /// The time from which the next call may store owners.
    next_owner_call: Instant,
    config: SharedConfig,
}

impl Link {
    /// Uses the connection until it fails.
    async fn run(&mut self, task: &mut LinkTask) -> LinkError {
        loop {
            if let Err(error) = self.step(task).await {
                return error;
            }
        }
    }

    /// Waits for the next event and handles it.
    async fn step(&mut self, task: &mut LinkTask) -> Result<(), LinkError> {
        let next_beat = self.last_beat.map_or_else(clock::instant, |last| last + task.settings.beat_interval);
        let earliest_beat = self.last_beat.map_or_else(clock::instant, |last| last + MIN_BEAT_INTERVAL);
        let pool = Arc::clone(&task.replica.pool);
        let demand = async {
            pool.demand().await;
            sleep_until(earliest_beat.into()).await;
        };
        tokio::select! {
            biased;
            push = self.connection.pushes.next() => match push {
                Some(Push::Message(message)) => self.handle_message(task, &message).await,
                // A missed message is found by the version of its map.
                Some(Push::Missed) => self.beat(task, true).await,
                None => Err(LinkError::Closed),
            },
            Some(change) = task.changes.recv() => self.state_changes(task, change).await,
            Some(poll) = task.polls.recv() => {
                let entry = task.replica.entry_of_poll(poll);
                self.store(task, entry.into_iter().collect()).await
            }
            Some(update) = task.owner_updates.urgent.recv() => {
                self.store_owners(&mut task.owner_updates.urgent, update).await
            }
            Some(update) = next_update(&mut task.owner_updates.frequent, self.next_owner_call) => {
                self.next_owner_call = clock::instant() + MIN_OWNER_INTERVAL;
                self.store_owners(&mut task.owner_updates.frequent, update).await
            }
            Some(port) = task.overlay_ports.recv() => {
                task.overlay = Some(port);
                // The overlay of another replica may have arrived before its receiver.
                task.replica.maps.forget(Map::Overlay);
                self.read_map(task, Map::Overlay).await?;
                self.store_overlay(task).await
            }
            () = overlay_changed(&mut task.overlay) => self.store_overlay(task).await,
            () = demand => self.beat(task, true).await,
            () = sleep_until(next_beat.into()) => self.beat(task, false).await,
        }
    }

    async fn state_changes(&mut self, task: &mut LinkTask, first: PoolChange) -> Result<(), LinkError> {
        let mut entries: Vec<MapEntry> = task.replica.entry_of_change(&first).into_iter().collect();
        while entries.len() < MAX_CHANGES
            && let Ok(change) = task.changes.try_recv()
        {
            entries.extend(task.replica.entry_of_change(&change));
        }
        self.store(task, entries).await
    }

    /// States entries of maps.
    async fn store(&self, task: &LinkTask, entries: Vec<MapEntry>) -> Result<(), LinkError> {
        let calls = store_calls(&task.replica.keyspace, &task.replica.id, &entries);
        if calls.is_empty() { Ok(()) } else { self.call(&calls).await.map(|_| ()) }
    }

    /// Stores owners of identifiers, and the accounts of lists.
    async fn store_owners(
        &self,
        queued: &mut mpsc::Receiver<OwnerUpdate>,
        first: OwnerUpdate,
    ) -> Result<(), LinkError> {
        let mut updates = vec![first];
        while updates.len() < MAX_OWNERS
            && let Ok(update) = queued.try_recv()
        {
            updates.push(update);
        }
        self.call(&[owners_call(&updates)]).await.map(|_| ())
    }

    /// States the overlay of this replica, unless Redis has it.
    async fn store_overlay(&self, task: &mut LinkTask) -> Result<(), LinkError> {
        let Some(port) = &mut task.overlay else { return Ok(()) };
        let overlay = port.outgoing.borrow_and_update().clone();
        let entry = task.replica.overlay_entry(&overlay, clock::now());
        self.store(task, entry.into_iter().collect()).await
    }

    /// States what changed, or without a change only waits for the next beat. `is_needed` states it in any case.
    async fn beat(&mut self, task: &mut LinkTask, is_needed: bool) -> Result<(), LinkError> {
        self.last_beat = Some(clock::instant());
        // The first beat of a replica only reads its earlier statements, and is followed by another one.
        for _ in 0..2 {
            let beat = task.replica.beat(moment());
            if !beat.is_due && !is_needed {
                task.replica.fall_back(moment());
                return Ok(());
            }
            if !self.send(task, &beat).await? {
                break;
            }
        }
        Ok(())
    }

    /// Sends a beat and applies the replies. Returns whether another beat must follow at once.
    async fn send(&mut self, task: &mut LinkTask, beat: &Beat) -> Result<bool, LinkError> {
        let config = self.config.load_full();
        let context = CallContext {
            keyspace: &task.replica.keyspace,
            replica: &task.replica.id,
            replicas: task.replica.live_replicas(),
        };
        let sent = moment();
        let client_beat = task.clients.beat(&config.client_usage, context, task.replica.clock, sent);
        let calls = [beat.calls.as_slice(), &client_beat.calls].concat();
        let replies = self.call(&calls).await?;
        let round_trip = clock::elapsed_since(sent.instant);
        let (pool_replies, client_replies) =
            replies.split_at_checked(beat.calls.len()).ok_or(UnexpectedReply)?;
        let outcome = task.replica.apply(beat, pool_replies, moment())?;
        task.clients.apply(&config.client_usage, &client_beat, client_replies, sent)?;
        task.link.record_beat(task.replica.live_replicas(), round_trip);
        task.publish_view();
        let is_lost = !outcome.outdated.to_restate.is_empty();
        for map in outcome.outdated.to_read {
            self.read_map(task, map).await?;
        }
        for map in outcome.outdated.to_restate {
            let entries = task.replica.restate(map, clock::now());
            self.store(task, entries).await?;
        }
        if is_lost {
            task.clients.restate();
            self.store_overlay(task).await?;
        }
        if outcome.is_unmet {
            self.ask_for_unneeded(task).await?;
        }
        Ok(outcome.is_incomplete)
    }

    /// Asks the other replicas to state what they do not need.
    async fn ask_for_unneeded(&mut self, task: &LinkTask) -> Result<(), LinkError> {
        if self.last_demand.is_some_and(|last| clock::elapsed_since(last) < MIN_DEMAND_INTERVAL) {
            return Ok(());
        }
        self.last_demand = Some(clock::instant());
        let mut publish = redis::cmd("PUBLISH");
        publish.arg(task.replica.keyspace.channel()).arg(format!("demand {}", task.replica.id));
        self.query(|mut commands| async move { publish.exec_async(&mut commands).await }).await
    }

    async fn handle_message(&mut self, task: &mut LinkTask, message: &[u8]) -> Result<(), LinkError> {
        let Some(message) = std::str::from_utf8(message).ok().and_then(Message::parse) else { return Ok(()) };
        if message.replica() == task.replica.id {
            if let Message::Entry { version, entry, .. } = message {
                task.replica.maps.advance(entry.map, version);
            }
            return Ok(());
        }
        match message {
            Message::Entry { replica, version, entry } => {
                task.replica.maps.advance(entry.map, version);
                task.apply_entry(&entry, &replica);
                Ok(())
            }
            Message::Demand { .. } => {
                // The first beat lowers what this replica holds, and the second one states it.
                self.beat(task, true).await?;
                self.beat(task, true).await
            }
        }
    }

    async fn read_map(&self, task: &mut LinkTask, map: Map) -> Result<(), LinkError> {
        let mut read = redis::cmd("HGETALL");
        read.arg(task.replica.keyspace.map(map));
        let hash: Value =
            self.query(|mut commands| async move { read.query_async(&mut commands).await }).await?;
        let mut version = 0;
        for (name, text) in fields(&hash)? {
            if name == "_version" {
                version = text.parse().map_err(|_| UnexpectedReply)?;
            } else if let Some(entry) = MapEntry::parse(map, name, text) {
                task.apply_entry(&entry, "");
            }
        }
        task.replica.maps.set_version(map, version);
        Ok(())
    }

    async fn call(&self, calls: &[ScriptCall]) -> Result<Vec<Value>, LinkError> {
        let mut pipeline = redis::pipe();
        for call in calls {
            pipeline.add_command(call.command());
        }
        self.query(|mut commands| async move { pipeline.query_async(&mut commands).await }).await
    }

    async fn query<T, F>(&self, query: impl FnOnce(MultiplexedConnection) -> F) -> Result<T, LinkError>
    where
        F: Future<Output = Result<T, RedisError>>,
    {
        let response = timeout(self.response_timeout, query(self.connection.commands.clone())).await;
        Ok(response.map_err(|_| LinkError::Timeout(self.response_timeout))??)
    }
}

/// Waits for the next owner to be stored, and until `earliest`. Several owners are stored by one call.
///
/// # Cancel safety
///
/// Dropping the future loses no update.
async fn next_update(updates: &mut mpsc::Receiver<OwnerUpdate>, earliest: Instant) -> Option<OwnerUpdate> {
    sleep_until(earliest.into()).await;
    updates.recv().await
}

/// Completes when the overlay of this replica has changed.
async fn overlay_changed(port: &mut Option<OverlayPort>) {
    let is_changed = match port {
        Some(port) => port.outgoing.changed().await.is_ok(),
        None => false,
    };
    if !is_changed {
        // There is no owner of an overlay, or it has ended with the program.
        std::future::pending::<()>().await;
    }
}

fn moment() -> Moment {
    Moment { now: clock::now(), instant: clock::instant() }
}
