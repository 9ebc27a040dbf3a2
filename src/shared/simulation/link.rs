//! Connects one replica to the model of Redis over a network that delays and loses messages. The code repeats the steps
//! of `task.rs` and `open_link.rs`, because the code of those files needs a real Redis. It leaves out the owners of
//! identifiers, the limits of clients and the overlay.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::Value;
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio::time::{sleep, sleep_until, timeout};

use super::super::beat_calls::{Beat, BeatCause};
use super::super::demand_pace::DemandPace;
use super::super::maps::{MapEntry, Message, newest_calls};
use super::super::replica::Replica;
use super::super::reply::parse_fields;
use super::super::scripts::{ChangeMap, ScriptCall};
use super::super::shared_clock::Moment;
use super::world::{Mutation, Process, World};
use crate::clock;
use crate::poller::OwnPoll;
use crate::pool::PoolChange;

// These are the defaults of `[redis]`, except for a shorter response timeout, and the constants of `task.rs` and
// `open_link.rs`.
const BEAT_INTERVAL: Duration = Duration::from_millis(200);
pub(super) const RESPONSE_TIMEOUT: Duration = Duration::from_millis(250);
const MIN_BEAT_INTERVAL: Duration = Duration::from_millis(5);
const FIRST_RECONNECT_DELAY: Duration = Duration::from_millis(100);
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(1);

/// The quality of the network of one replica.
#[derive(Clone, Copy, Debug)]
pub(super) struct LinkQuality {
    /// Maximum delay in each direction.
    pub(super) max_delay: Duration,
    /// The probability that a request is lost.
    pub(super) request_loss: f64,
    /// The probability that a reply is lost.
    pub(super) reply_loss: f64,
    /// The probability that a request arrives only after the response timeout of the replica.
    pub(super) late_request: f64,
}

impl LinkQuality {
    /// A network that delays messages by a few milliseconds and loses none.
    pub(super) const GOOD: Self =
        Self { max_delay: Duration::from_millis(3), request_loss: 0.0, reply_loss: 0.0, late_request: 0.0 };
    /// A network that loses every request.
    pub(super) const CUT: Self = Self { request_loss: 1.0, ..Self::GOOD };
}

/// The error of a connection that was closed, or over which no response arrived in time.
pub(super) struct ConnectionFailed;

type LinkResult<T> = Result<T, ConnectionFailed>;

/// The changes and polls of one process that other replicas must receive.
pub(super) struct OutgoingUpdates {
    pub(super) changes: mpsc::Receiver<PoolChange>,
    pub(super) polls: mpsc::UnboundedReceiver<OwnPoll>,
}

/// An open connection to the simulated Redis, which replaces `OpenLink`.
struct SimulatedConnection {
    world: Rc<World>,
    process: Rc<Process>,
    /// The published messages, with the times of their arrival.
    pushes: mpsc::UnboundedReceiver<(Instant, String)>,
    /// The next message, which may not have arrived yet.
    next_push: VecDeque<(Instant, String)>,
    last_beat: Option<Instant>,
    demand_pace: DemandPace,
    needs_beat: bool,
}

/// Connects a replica and keeps it connected, with the steps of `LinkTask::run`.
pub(super) async fn run_link(world: Rc<World>, process: Rc<Process>, mut outgoing: OutgoingUpdates) {
    let mut delay = FIRST_RECONNECT_DELAY;
    loop {
        if let Ok(mut connection) = connect(&world, &process).await {
            delay = FIRST_RECONNECT_DELAY;
            while connection.step(&mut outgoing).await.is_ok() {}
        }
        process.is_accepting.set(true);
        process.replica.borrow_mut().record_disconnected();
        world.record_max_use_while_alone(&process);
        if world.scenario.mutation == Some(Mutation::WholeShareAlone) {
            process.replica.borrow_mut().live_replicas = 1;
        }
        let pause = delay.mul_f64(0.5 + world.random() / 2.0);
        delay = (delay * 2).min(MAX_RECONNECT_DELAY);
        stay_alone(&world, &process, &mut outgoing, pause).await;
    }
}

/// Waits for the duration of `pause`, with the steps of `LinkTask::stay_alone`.
async fn stay_alone(
    world: &Rc<World>,
    process: &Rc<Process>,
    outgoing: &mut OutgoingUpdates,
    pause: Duration,
) {
    let end = clock::instant() + pause;
    loop {
        process.replica.borrow_mut().fall_back(Moment::current());
        world.record_max_use_while_alone(process);
        while outgoing.changes.try_recv().is_ok() || outgoing.polls.try_recv().is_ok() {}
        let now = clock::instant();
        if now >= end {
            return;
        }
        sleep(BEAT_INTERVAL.min(end - now)).await;
    }
}

/// Opens a connection and sends the first beat, with the steps of `LinkTask::connect`.
async fn connect(world: &Rc<World>, process: &Rc<Process>) -> LinkResult<SimulatedConnection> {
    let opening = async {
        let quality = world.quality(process.index);
        sleep(world.random_delay(quality)).await;
        if !world.is_redis_up.get() || world.chance(quality.request_loss) {
            sleep(RESPONSE_TIMEOUT).await;
            return Err(ConnectionFailed);
        }
        Ok(())
    };
    tokio::pin!(opening);
    loop {
        tokio::select! {
            biased;
            result = &mut opening => { result?; break }
            () = sleep(BEAT_INTERVAL) => if process.is_accepting.get() {
                process.replica.borrow_mut().fall_back(Moment::current());
            }
        }
    }
    let mut connection = SimulatedConnection {
        world: Rc::clone(world),
        process: Rc::clone(process),
        pushes: world.subscribe(process.index),
        next_push: VecDeque::new(),
        last_beat: None,
        demand_pace: DemandPace::default(),
        needs_beat: false,
    };
    process.replica.borrow_mut().record_connected();
    connection.send_beat(BeatCause::ReplyNeeded).await?;
    process.is_accepting.set(true);
    Ok(connection)
}

impl SimulatedConnection {
    fn replica(&self) -> std::cell::RefMut<'_, Replica> {
        RefCell::borrow_mut(&self.process.replica)
    }

    /// Waits for the next event, and sends the commands that it requires.
    async fn step(&mut self, outgoing: &mut OutgoingUpdates) -> LinkResult<()> {
        let interval = if self.needs_beat { MIN_BEAT_INTERVAL } else { BEAT_INTERVAL };
        let next_beat = self.last_beat.map_or_else(clock::instant, |last| last + interval);
        let response_at = self.demand_pace.response_at(clock::instant());
        let pool = Arc::clone(&self.process.pool);
        tokio::select! {
            biased;
            message = next_message(&mut self.pushes, &mut self.next_push) => match message {
                Some(message) => {
                    self.apply_message(&message);
                    Ok(())
                }
                None => Err(ConnectionFailed),
            },
            Some(change) = outgoing.changes.recv() => {
                let mut entries = vec![self.replica().entry_of_change(&change)];
                while let Ok(change) = outgoing.changes.try_recv() {
                    entries.push(self.replica().entry_of_change(&change));
                }
                self.store_entries(entries).await
            }
            Some(poll) = outgoing.polls.recv() => {
                let entry = self.replica().entry_of_poll(poll);
                self.store_entries(entry.into_iter().collect()).await
            }
            () = sleep_until_some(response_at) => {
                self.demand_pace.record_response(clock::instant());
                // The reply to the first beat lowers the grants of this replica, and the second beat confirms it.
                self.send_beat(BeatCause::DemandedByOthers).await?;
                self.send_beat(BeatCause::DemandedByOthers).await?;
                self.replica().record_response();
                Ok(())
            }
            () = pool.demand_increased() => {
                self.needs_beat = true;
                Ok(())
            }
            () = sleep_until(next_beat.into()) => {
                let cause = if self.needs_beat { BeatCause::ReplyNeeded } else { BeatCause::Interval };
                self.send_beat(cause).await
            }
        }
    }

    /// Sends a beat, and a second beat if the first is incomplete.
    async fn send_beat(&mut self, cause: BeatCause) -> LinkResult<()> {
        self.last_beat = Some(clock::instant());
        self.needs_beat = false;
        for _ in 0..2 {
            let beat = self.replica().make_beat(Moment::current(), cause);
            if !beat.is_due && cause == BeatCause::Interval {
                self.replica().fall_back(Moment::current());
                return Ok(());
            }
            let replies = self.call_scripts(&beat.calls).await?;
            if !self.apply_replies(&beat, &replies).await? {
                break;
            }
        }
        Ok(())
    }

    /// Applies the replies to a beat. Returns whether another beat must follow at once.
    async fn apply_replies(&mut self, beat: &Beat, replies: &[Value]) -> LinkResult<bool> {
        let outcome = self.replica().apply_replies(beat, replies, Moment::current()).unwrap();
        let demanded = outcome.demanded_workspaces(self.replica().statement_number);
        // The maximum use that is recorded when the connection is lost must follow from the grants of this reply.
        self.process.max_use_while_alone.borrow_mut().clear();
        for map in outcome.outdated.to_read {
            self.read_map(map).await?;
        }
        for map in outcome.outdated.to_resend {
            let entries = self.replica().entries_to_resend(map, clock::now());
            self.store_entries(entries).await?;
        }
        if self.demand_pace.must_publish_demand(!demanded.is_empty(), clock::instant()) {
            let message = Message::format_demand(&self.process.id, &demanded);
            self.query(move |world| world.redis.publish(message)).await?;
        }
        Ok(outcome.is_incomplete)
    }

    fn apply_message(&mut self, message: &str) {
        let message = Message::parse(message).unwrap();
        let is_own = message.replica() == self.process.id;
        match message {
            Message::Entry { replica, version, entry } => {
                self.replica().maps.advance(entry.map, version);
                if !is_own {
                    self.replica().apply_entry(&entry, &replica, Moment::current());
                }
            }
            Message::Demand { workspaces, .. } if !is_own => {
                self.demand_pace.record_demand();
                self.replica().record_demand(workspaces);
            }
            Message::Demand { .. } => {}
        }
    }

    async fn read_map(&mut self, map: ChangeMap) -> LinkResult<()> {
        let key = self.replica().keyspace.map(map);
        let hash = self.query(move |world| world.redis.hash_fields(&key)).await?;
        let mut version = 0;
        for (name, value) in parse_fields(&hash).unwrap() {
            if name == "_version" {
                version = value.parse().unwrap();
            } else if let Some(entry) = MapEntry::parse(map, name, value) {
                self.replica().apply_entry(&entry, "", Moment::current());
            }
        }
        self.replica().maps.set_version(map, version);
        Ok(())
    }

    async fn store_entries(&self, entries: Vec<MapEntry>) -> LinkResult<()> {
        let calls = newest_calls(&self.replica().keyspace, &self.process.id, &entries);
        if calls.is_empty() { Ok(()) } else { self.call_scripts(&calls).await.map(|_| ()) }
    }

    async fn call_scripts(&self, calls: &[ScriptCall]) -> LinkResult<Vec<Value>> {
        let calls = calls.to_vec();
        self.query(move |world| calls.iter().map(|call| world.redis.run(call)).collect()).await
    }

    /// Runs `query` on Redis with the delays and the losses of the network. Fails if no reply arrives in time.
    async fn query<T: 'static>(&self, query: impl FnOnce(&World) -> T + 'static) -> LinkResult<T> {
        let world = &self.world;
        let quality = world.quality(self.process.index);
        let exchange = async {
            sleep(world.random_delay(quality)).await;
            if !world.is_redis_up.get() || world.chance(quality.request_loss) {
                return std::future::pending().await;
            }
            if world.chance(quality.late_request) {
                // The request arrives at Redis after the timeout, while this replica connects again.
                let (late_world, delay) =
                    (Rc::clone(world), RESPONSE_TIMEOUT.mul_f64(1.0 + 8.0 * world.random()));
                spawn_local(async move {
                    sleep(delay).await;
                    late_world.run_at_redis(query);
                });
                return std::future::pending().await;
            }
            let reply = world.run_at_redis(query);
            sleep(world.random_delay(quality)).await;
            if world.chance(quality.reply_loss) {
                return std::future::pending().await;
            }
            reply
        };
        timeout(RESPONSE_TIMEOUT, exchange).await.map_err(|_| ConnectionFailed)
    }
}

/// Waits until the next message arrives, and returns it. Returns `None` after the connection was closed.
async fn next_message(
    pushes: &mut mpsc::UnboundedReceiver<(Instant, String)>,
    next_push: &mut VecDeque<(Instant, String)>,
) -> Option<String> {
    if next_push.is_empty() {
        next_push.push_back(pushes.recv().await?);
    }
    let (arrives_at, _) = next_push.front()?;
    sleep_until((*arrives_at).into()).await;
    next_push.pop_front().map(|(_, message)| message)
}

/// Sleeps until `time`, or forever if it is `None`.
async fn sleep_until_some(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

/// Starts the task that keeps a process connected, on the clock of the process.
pub(super) fn start_link(world: &Rc<World>, process: &Rc<Process>, outgoing: OutgoingUpdates) {
    let link = run_link(Rc::clone(world), Rc::clone(process), outgoing);
    let task = spawn_local(clock::SIMULATED_CLOCK.scope(process.clock, link));
    process.tasks.borrow_mut().push(task.abort_handle());
}
