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
use super::connect_error::RedisConnectError;
use super::connection::{RedisConnection, RedisEndpoint};
use super::link_counts::{LinkCounts, LinkFault};
use super::maps::{MapEntry, Message, store_calls};
use super::members::MEMBER_TTL;
use super::push::Push;
use super::replica::{Beat, Replica, ReplicaSettings};
use super::reply::{UnexpectedReply, fields};
use super::scripts::{Map, ScriptCall};
use super::shared_clock::Moment;
use super::view::{LinkState, PoolView, SharedPoolView, replica_infos};
use crate::clock;
use crate::policy::authority::Authority;
use crate::poller::OwnPoll;
use crate::poller::PollingRole;
use crate::pool::{Pool, PoolChange};
use crate::tasks::Tasks;
use crate::upstream::TlsError;

/// Minimum time between two beats, however many requests are queued.
const MIN_BEAT_INTERVAL: Duration = Duration::from_millis(5);
/// Minimum time between two messages by which a replica asks the others for what they do not need.
const MIN_DEMAND_INTERVAL: Duration = Duration::from_millis(50);
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

impl LinkError {
    /// Returns the reason for the metrics.
    fn fault(&self) -> LinkFault {
        match self {
            Self::Connect(error) => LinkFault::of_connect(error),
            Self::Command(error) => LinkFault::of_command(error),
            Self::Timeout(_) => LinkFault::Timeout,
            Self::Closed => LinkFault::Closed,
            Self::Reply(_) => LinkFault::Reply,
        }
    }
}

impl LinkTask {
    /// Prepares the link. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// Fails when `redis.ca_file` cannot be used.
    pub fn new(
        settings: LinkSettings,
        inputs: LinkInputs,
    ) -> Result<(Self, watch::Receiver<PollingRole>, SharedPoolView), TlsError> {
        /// Changes beyond this number are stated with the next restatement.
        const MAX_QUEUED_CHANGES: usize = 4_096;
        let LinkInputs { pool, replica_id, polls, regions } = inputs;
        let (changes_sender, changes) = mpsc::channel(MAX_QUEUED_CHANGES);
        pool.send_changes_to(changes_sender);
        let can_lead = polls.is_some();
        let (role, role_receiver) = watch::channel(PollingRole::Undecided);
        let view = SharedPoolView::default();
        let replica_settings =
            ReplicaSettings { id: replica_id, pool_name: settings.pool.clone(), can_lead, regions };
        let replica = Replica::new(replica_settings, pool, clock::now());
        let task = Self {
            endpoint: RedisEndpoint::new(&settings)?,
            settings,
            replica,
            changes,
            polls: polls.unwrap_or_else(|| mpsc::channel(1).1),
            role,
            view: view.clone(),
            tasks: Tasks::new(),
        };
        Ok((task, role_receiver, view))
    }

    /// Runs the link and never returns.
    pub async fn run(mut self) {
        let mut endpoint = self.endpoint.clone();
        let mut delay = FIRST_RECONNECT_DELAY;
        let mut is_reported = false;
        loop {
            let error = match self.connect(&endpoint).await {
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
            self.publish_view();
            endpoint = match &error {
                // The node of a cluster that has the keys of the pool, at once.
                LinkError::Command(error) if let Some(node) = endpoint.redirect(error) => {
                    endpoint = node;
                    continue;
                }
                _ => self.endpoint.clone(),
            };
            self.view.counts().record_error(error.fault());
            if !std::mem::replace(&mut is_reported, true) {
                warn!(
                    event = "redis_lost",
                    "This replica uses only its part of the pool until Redis responds: {error}"
                );
            }
            let pause = delay.mul_f64(0.5 + fastrand::f64() / 2.0);
            delay = (delay * 2).min(self.settings.max_reconnect_delay);
            self.stay_alone(pause).await;
        }
    }

    /// Uses only the part of this replica for the duration of `pause`. Drops the changes of the pool, which are stated
    /// again after the next connection.
    async fn stay_alone(&mut self, pause: Duration) {
        let wait = tokio::time::sleep(pause);
        tokio::pin!(wait);
        let mut ticks = interval(self.settings.beat_interval);
        loop {
            tokio::select! {
                () = &mut wait => return,
                _ = ticks.tick() => self.replica.fall_back(moment()),
                Some(_) = self.changes.recv() => {}
                Some(_) = self.polls.recv() => {}
            }
        }
    }

    async fn connect(&mut self, endpoint: &RedisEndpoint) -> Result<Link, LinkError> {
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
                    self.replica.fall_back(moment());
                }
            }
        };
        let mut link = Link {
            connection,
            counts: self.view.counts().clone(),
            response_timeout: self.settings.response_timeout,
            last_beat: None,
            last_demand: None,
        };
        let channel = self.replica.keyspace.channel();
        link.query(|mut commands| async move { commands.subscribe(channel).await }).await?;
        self.replica.set_alone(false);
        link.beat(self, true).await?;
        Ok(link)
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
    counts: LinkCounts,
    response_timeout: Duration,
    last_beat: Option<Instant>,
    last_demand: Option<Instant>,
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
            let replies = self.call(&beat.calls).await?;
            if !self.apply(task, &beat, &replies).await? {
                break;
            }
        }
        Ok(())
    }

    /// Applies the replies to a beat. Returns whether another beat must follow at once.
    async fn apply(
        &mut self,
        task: &mut LinkTask,
        beat: &Beat,
        replies: &[Value],
    ) -> Result<bool, LinkError> {
        let outcome = task.replica.apply(beat, replies, moment())?;
        task.publish_view();
        for map in outcome.outdated.to_read {
            self.read_map(task, map).await?;
        }
        for map in outcome.outdated.to_restate {
            let entries = task.replica.restate(map, clock::now());
            self.store(task, entries).await?;
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
                task.replica.apply_entry(&entry, &replica, moment());
                Ok(())
            }
            Message::Demand { .. } => {
                // The first beat lowers what this replica holds, and the second one states it.
                self.beat(task, true).await?;
                self.beat(task, true).await
            }
            Message::Owner { .. } => Ok(()),
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
                task.replica.apply_entry(&entry, "", moment());
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
        self.query_all(calls.len(), |mut commands| async move { pipeline.query_async(&mut commands).await })
            .await
    }

    /// Sends one command.
    async fn query<T, F>(&self, query: impl FnOnce(MultiplexedConnection) -> F) -> Result<T, LinkError>
    where
        F: Future<Output = Result<T, RedisError>>,
    {
        self.query_all(1, query).await
    }

    /// Sends this number of commands together.
    async fn query_all<T, F>(
        &self,
        commands: usize,
        query: impl FnOnce(MultiplexedConnection) -> F,
    ) -> Result<T, LinkError>
    where
        F: Future<Output = Result<T, RedisError>>,
    {
        let sent = clock::instant();
        self.counts.record_commands(commands);
        let response = timeout(self.response_timeout, query(self.connection.commands.clone())).await;
        if response.is_ok() {
            self.counts.record_round_trip(clock::elapsed_since(sent));
        }
        Ok(response.map_err(|_| LinkError::Timeout(self.response_timeout))??)
    }
}

fn moment() -> Moment {
    Moment { now: clock::now(), instant: clock::instant() }
}
