//! Uses an open connection to Redis: waits for the next event, and sends the commands that it requires. An event is,
//! for example, a message, a change of the pool or the time of the next beat. A beat is a round trip in which the
//! replica reports its use and receives its grants. `task.rs` opens the connection, and opens another connection after
//! a failure.

use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{RedisError, Value};
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};

use super::beat_calls::{Beat, BeatCause};
use super::clients::CallContext;
use super::connection::RedisConnection;
use super::demand_pace::DemandPace;
use super::link::{OwnerUpdate, owners_call};
use super::link_counts::LinkCounts;
use super::maps::{MapEntry, Message, newest_calls};
use super::overlay::OverlayPort;
use super::push::Push;
use super::reply::{UnexpectedReply, parse_fields};
use super::scripts::{ChangeMap, Keyspace, ScriptCall};
use super::shared_clock::Moment;
use super::task::{LinkError, LinkTask};
use crate::clock;
use crate::policy::shared_id::SharedId;
use crate::pool::PoolChange;
use crate::proxy::SharedConfig;

/// Minimum time between a beat and the next beat for queued requests.
const MIN_BEAT_INTERVAL: Duration = Duration::from_millis(5);
/// Minimum time between two calls that store the owners of identifiers which every speech request creates.
const MIN_OWNER_INTERVAL: Duration = Duration::from_millis(50);
/// Maximum number of owners that one call stores. With [`MIN_OWNER_INTERVAL`], one replica can store the owners of
/// 10,000 speech requests per second, which are two per request.
const MAX_OWNERS: usize = 1_024;
/// Maximum number of changes of the pool that are stored together.
const MAX_CHANGES: usize = 256;

/// An open connection to Redis, and the times of the next commands.
#[derive(Debug)]
pub(super) struct OpenLink {
    connection: RedisConnection,
    counts: LinkCounts,
    response_timeout: Duration,
    /// The time of the last beat, or of the last interval in which no beat was due. `None` before the first beat.
    last_beat: Option<Instant>,
    /// Whether requests were queued since the last beat, so that this replica may need a larger share.
    needs_beat: bool,
    demand_pace: DemandPace,
    /// The earliest time of the next call that stores frequent owners.
    next_owner_call: Instant,
    config: SharedConfig,
}

impl OpenLink {
    pub(super) fn new(
        connection: RedisConnection,
        counts: LinkCounts,
        response_timeout: Duration,
        config: SharedConfig,
    ) -> Self {
        Self {
            connection,
            counts,
            response_timeout,
            last_beat: None,
            needs_beat: false,
            demand_pace: DemandPace::default(),
            next_owner_call: clock::instant(),
            config,
        }
    }

    pub(super) fn connection(&self) -> &RedisConnection {
        &self.connection
    }

    /// Uses the connection until it fails.
    pub(super) async fn run(&mut self, task: &mut LinkTask) -> LinkError {
        loop {
            if let Err(error) = self.step(task).await {
                return error;
            }
        }
    }

    /// Waits for the next event, and sends the commands that it requires.
    async fn step(&mut self, task: &mut LinkTask) -> Result<(), LinkError> {
        let interval = if self.needs_beat { MIN_BEAT_INTERVAL } else { task.settings.beat_interval };
        let next_beat = self.last_beat.map_or_else(clock::instant, |last| last + interval);
        let pool = Arc::clone(&task.replica.pool);
        tokio::select! {
            biased;
            push = self.connection.pushes.next() => match push {
                Some(Push::Message(message)) => {
                    self.apply_message(task, &message);
                    Ok(())
                }
                // The reply contains the versions of the maps, by which the missed entries are detected.
                Some(Push::Missed) => self.send_beat(task, BeatCause::ReplyNeeded).await,
                None => Err(LinkError::Closed),
            },
            Some(change) = task.changes.recv() => self.publish_changes(task, change).await,
            Some(poll) = task.polls.recv() => {
                let entry = task.replica.entry_of_poll(poll);
                self.store_entries(task, entry.into_iter().collect()).await
            }
            Some(update) = task.owner_updates.urgent.recv() => {
                self.store_owners(&task.replica.keyspace, &mut task.owner_updates.urgent, update).await
            }
            Some(update) = next_update(&mut task.owner_updates.frequent, self.next_owner_call) => {
                self.next_owner_call = clock::instant() + MIN_OWNER_INTERVAL;
                self.store_owners(&task.replica.keyspace, &mut task.owner_updates.frequent, update).await
            }
            Some(port) = task.overlay_ports.recv() => {
                task.overlay = Some(port);
                // The overlay of another replica may have arrived before its receiver.
                task.replica.maps.forget(ChangeMap::Overlay);
                self.read_map(task, ChangeMap::Overlay).await?;
                self.store_overlay(task).await
            }
            () = task.leaving.cancelled() => {
                task.replica.leave();
                self.send_beat(task, BeatCause::ReplyNeeded).await?;
                Err(LinkError::Left)
            }
            () = sleep_until_some(self.demand_pace.response_at(clock::instant())) => {
                self.demand_pace.record_response(clock::instant());
                // The reply to the first beat lowers the grants of this replica, and the second beat confirms it.
                self.send_beat(task, BeatCause::DemandedByOthers).await?;
                self.send_beat(task, BeatCause::DemandedByOthers).await?;
                task.replica.record_response();
                Ok(())
            }
            () = overlay_changed(&mut task.overlay) => self.store_overlay(task).await,
            // `needs_beat` remains set until the next beat reports the demand.
            () = pool.demand_increased() => {
                self.needs_beat = true;
                Ok(())
            }
            () = sleep_until(next_beat.into()) => {
                let cause = if self.needs_beat { BeatCause::ReplyNeeded } else { BeatCause::Interval };
                self.send_beat(task, cause).await
            }
        }
    }

    /// Stores a change of the pool in Redis, with the changes that are queued behind it.
    async fn publish_changes(&mut self, task: &mut LinkTask, first: PoolChange) -> Result<(), LinkError> {
        let mut entries = vec![task.replica.entry_of_change(&first)];
        while entries.len() < MAX_CHANGES
            && let Ok(change) = task.changes.try_recv()
        {
            entries.push(task.replica.entry_of_change(&change));
        }
        self.store_entries(task, entries).await
    }

    /// Stores entries of maps in Redis.
    async fn store_entries(&self, task: &LinkTask, entries: Vec<MapEntry>) -> Result<(), LinkError> {
        let calls = newest_calls(&task.replica.keyspace, &task.replica.id, &entries);
        if calls.is_empty() { Ok(()) } else { self.call_scripts(&calls).await.map(|_| ()) }
    }

    /// Stores an owner of an identifier or an account of a list in Redis, with the updates that are queued behind it.
    async fn store_owners(
        &self,
        keyspace: &Keyspace,
        queued: &mut mpsc::Receiver<OwnerUpdate>,
        first: OwnerUpdate,
    ) -> Result<(), LinkError> {
        let mut updates = vec![first];
        while updates.len() < MAX_OWNERS
            && let Ok(update) = queued.try_recv()
        {
            updates.push(update);
        }
        self.call_scripts(&[owners_call(keyspace, &updates)]).await.map(|_| ())
    }

    /// Stores the overlay of this replica in Redis, unless the known entry is newer.
    async fn store_overlay(&self, task: &mut LinkTask) -> Result<(), LinkError> {
        let Some(port) = &mut task.overlay else { return Ok(()) };
        let overlay = port.outgoing.borrow_and_update().clone();
        let entry = task.replica.overlay_entry(&overlay, clock::now());
        self.store_entries(task, entry.into_iter().collect()).await
    }

    /// Sends a beat, and a second beat if the first is incomplete. A beat of [`BeatCause::Interval`] is sent only if a
    /// statement is due.
    pub(super) async fn send_beat(&mut self, task: &mut LinkTask, cause: BeatCause) -> Result<(), LinkError> {
        self.last_beat = Some(clock::instant());
        self.needs_beat = false;
        // The first beat of a process only reads the earlier statements of its replica. The second beat continues from
        // them.
        for _ in 0..2 {
            let beat = task.replica.make_beat(Moment::current(), cause);
            if !beat.is_due && cause == BeatCause::Interval {
                task.replica.fall_back(Moment::current());
                return Ok(());
            }
            if !self.exchange_beat(task, &beat).await? {
                break;
            }
        }
        Ok(())
    }

    /// Sends a beat, applies the replies, and reads and stores the maps that the replies require. Returns whether
    /// another beat must follow at once.
    async fn exchange_beat(&mut self, task: &mut LinkTask, beat: &Beat) -> Result<bool, LinkError> {
        let config = self.config.load_full();
        let context = CallContext {
            keyspace: &task.replica.keyspace,
            replica: &task.replica.id,
            replicas: task.replica.live_replica_count(),
        };
        let sent_at = Moment::current();
        let client_beat = task.clients.make_beat(&config.client_usage, context, task.replica.clock, sent_at);
        let calls = [beat.calls.as_slice(), &client_beat.calls].concat();
        let replies = self.call_scripts(&calls).await?;
        let round_trip = clock::elapsed_since(sent_at.instant);
        let (pool_replies, client_replies) =
            replies.split_at_checked(beat.calls.len()).ok_or(UnexpectedReply)?;
        let outcome = task.replica.apply_replies(beat, pool_replies, Moment::current())?;
        let replicas = task.replica.live_replica_count();
        task.clients.apply_replies(&config.client_usage, &client_beat, client_replies, replicas, sent_at)?;
        task.link.record_beat(task.replica.live_replica_count(), round_trip);
        task.publish_view();
        if outcome.has_duplicate_id {
            task.replace_id();
        }
        let demanded = outcome.demanded_workspaces(task.replica.statement_number);
        let has_redis_lost_data = outcome.has_redis_lost_statements || !outcome.outdated.to_resend.is_empty();
        for map in outcome.outdated.to_read {
            self.read_map(task, map).await?;
        }
        for map in outcome.outdated.to_resend {
            let entries = task.replica.entries_to_resend(map, clock::now());
            self.store_entries(task, entries).await?;
        }
        if has_redis_lost_data {
            task.clients.resend_all();
            self.store_overlay(task).await?;
        }
        if self.demand_pace.must_publish_demand(!demanded.is_empty(), clock::instant()) {
            self.publish_demand(task, &demanded).await?;
        }
        Ok(outcome.is_incomplete)
    }

    /// Publishes that this replica needs credits or slots of these workspaces. Other replicas respond with beats that
    /// return the credits and slots that they do not need.
    async fn publish_demand(&self, task: &LinkTask, workspaces: &[SharedId]) -> Result<(), LinkError> {
        let replica = &task.replica;
        let demand = Message::format_demand(&replica.id, workspaces);
        let mut publish = redis::cmd("PUBLISH");
        publish.arg(replica.keyspace.channel()).arg(demand);
        self.query(|mut commands| async move { publish.exec_async(&mut commands).await }).await
    }

    /// Applies a message of another replica. A message of this replica only advances the version of its map.
    fn apply_message(&mut self, task: &mut LinkTask, message: &[u8]) {
        let Some(message) = std::str::from_utf8(message).ok().and_then(Message::parse) else { return };
        if message.replica() == task.replica.id {
            if let Message::Entry { version, entry, .. } = message {
                task.replica.maps.advance(entry.map, version);
            }
            return;
        }
        match message {
            Message::Entry { replica, version, entry } => {
                task.replica.maps.advance(entry.map, version);
                task.apply_entry(&entry, &replica);
            }
            Message::Demand { workspaces, .. } => {
                self.demand_pace.record_demand();
                task.replica.record_demand(workspaces);
            }
        }
    }

    /// Reads a map as a whole, and applies its entries that this replica does not know.
    async fn read_map(&self, task: &mut LinkTask, map: ChangeMap) -> Result<(), LinkError> {
        let mut read = redis::cmd("HGETALL");
        read.arg(task.replica.keyspace.map(map));
        let hash: Value =
            self.query(|mut commands| async move { read.query_async(&mut commands).await }).await?;
        let mut version = 0;
        for (name, value) in parse_fields(&hash)? {
            if name == "_version" {
                version = value.parse().map_err(|_| UnexpectedReply)?;
            } else if let Some(entry) = MapEntry::parse(map, name, value) {
                task.apply_entry(&entry, "");
            }
        }
        task.replica.maps.set_version(map, version);
        Ok(())
    }

    /// Calls scripts in one pipeline, and returns their replies.
    async fn call_scripts(&self, calls: &[ScriptCall]) -> Result<Vec<Value>, LinkError> {
        let mut pipeline = redis::pipe();
        for call in calls {
            pipeline.add_command(call.to_command());
        }
        self.query_all(calls.len(), |mut commands| async move { pipeline.query_async(&mut commands).await })
            .await
    }

    /// Sends one command, and waits for its response.
    pub(super) async fn query<T, F>(
        &self,
        query: impl FnOnce(MultiplexedConnection) -> F,
    ) -> Result<T, LinkError>
    where
        F: Future<Output = Result<T, RedisError>>,
    {
        self.query_all(1, query).await
    }

    /// Sends `command_count` commands together, and waits for their responses.
    async fn query_all<T, F>(
        &self,
        command_count: usize,
        query: impl FnOnce(MultiplexedConnection) -> F,
    ) -> Result<T, LinkError>
    where
        F: Future<Output = Result<T, RedisError>>,
    {
        let sent_at = clock::instant();
        self.counts.record_commands(command_count);
        let response = timeout(self.response_timeout, query(self.connection.commands.clone())).await;
        if response.is_ok() {
            self.counts.record_round_trip(clock::elapsed_since(sent_at));
        }
        Ok(response.map_err(|_| LinkError::Timeout(self.response_timeout))??)
    }
}

/// Waits until `earliest`, and then for the next update. One call then stores all updates that have arrived.
///
/// # Cancel safety
///
/// Dropping the future loses no update.
async fn next_update(updates: &mut mpsc::Receiver<OwnerUpdate>, earliest: Instant) -> Option<OwnerUpdate> {
    sleep_until(earliest.into()).await;
    updates.recv().await
}

/// Sleeps until `time`, or forever if it is `None`.
async fn sleep_until_some(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

/// Completes when the overlay of this replica has changed. Never completes without an owner of the overlay.
async fn overlay_changed(port: &mut Option<OverlayPort>) {
    let is_changed = match port {
        Some(port) => port.outgoing.changed().await.is_ok(),
        None => false,
    };
    if !is_changed {
        // The owner of the overlay has not registered yet, or it has ended with the program.
        std::future::pending::<()>().await;
    }
}
