//! Defines the scenario and the state of one simulation: the replicas with their clocks and networks, Redis, and the
//! provider. Starts and kills replicas, polls the provider, and delivers the messages that Redis publishes.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::sleep;

use super::super::replica::{Replica, ReplicaSettings};
use super::invariants::{MaxUseWhileAlone, Violations};
use super::link::{LinkQuality, OutgoingUpdates, start_link};
use super::provider::Provider;
use super::redis_model::SimulatedRedis;
use crate::clock::{self, SIMULATED_CLOCK};
use crate::elevenlabs::plan::Capabilities;
use crate::policy::shared_pool_name::SharedPoolName;
use crate::policy::units::UnixMs;
use crate::poller::OwnPoll;
use crate::pool::{KeyEntry, Observation, Pool, PoolChange, RestoredKey, Settings};
use crate::secret::ApiKey;

/// The time of Redis at the start of a simulation, in ms since 1970.
const EPOCH_MS: u64 = 1_800_000_000_000;

/// The parameters of one simulation, which determine it completely.
#[derive(Clone, Debug)]
pub(super) struct Scenario {
    pub(super) seed: u64,
    /// The number of replicas.
    pub(super) replicas: usize,
    /// The limits of the workspaces in credits.
    pub(super) limits: Vec<u64>,
    /// The number of requests.
    pub(super) requests: usize,
    /// The time in which the requests and the faults begin.
    pub(super) duration: Duration,
    /// Interval between two polls of the leader, or `None` if it polls only once.
    pub(super) poll_interval: Option<Duration>,
    /// The maximum age of the count that a poll reports.
    pub(super) lag: Duration,
    /// The number of faults.
    pub(super) faults: usize,
    /// Whether replicas are killed, which loses charges that they have not reported.
    pub(super) has_kills: bool,
    /// Maximum number of requests at the end, which use the remaining credits.
    pub(super) max_drain_requests: usize,
    /// The rule that is broken, to prove that an invariant reports it.
    pub(super) mutation: Option<Mutation>,
}

/// A rule that a simulation breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutation {
    /// The first text, a part of a script, is replaced by the second text.
    Script(&'static str, &'static str),
    /// A replica that is alone (without a connection to Redis) uses the whole pool instead of its part.
    WholeShareAlone,
}

/// Returns the settings of the pools of all replicas.
pub(super) fn pool_settings() -> Settings {
    Settings {
        queue_timeout: Duration::from_secs(30),
        max_queued: 10_000,
        concurrency_cooldown: Duration::from_millis(100),
        rate_limited_cooldown: Duration::from_secs(2),
        unproven_cooldown: Duration::from_secs(2),
        probe_after: Duration::from_secs(1),
        quota_lag: QUOTA_LAG,
        ..Settings::FOR_TESTS
    }
}

/// The configured lag of polls, which is longer than the real lag of the provider.
pub(super) const QUOTA_LAG: Duration = Duration::from_secs(4);

/// One process of a replica, from its start to its end.
pub(super) struct Process {
    /// The number of the replica.
    pub(super) index: usize,
    pub(super) id: String,
    pub(super) replica: RefCell<Replica>,
    pub(super) pool: Arc<Pool>,
    /// Whether the replica accepts requests: its first attempt to connect has ended, and it does not shut down.
    pub(super) is_accepting: Cell<bool>,
    /// The start of the simulation, and the time that this replica's clock showed at that instant.
    pub(super) clock: (Instant, UnixMs),
    pub(super) tasks: RefCell<Vec<AbortHandle>>,
    /// Sends the results of polls to the link of the process.
    polls: mpsc::UnboundedSender<OwnPoll>,
    /// The maximum use of each workspace by this process while it is alone.
    pub(super) max_use_while_alone: RefCell<HashMap<usize, MaxUseWhileAlone>>,
}

/// The state of one simulation.
pub(super) struct World {
    pub(super) scenario: Scenario,
    pub(super) redis: SimulatedRedis,
    pub(super) provider: Rc<Provider>,
    pub(super) violations: Violations,
    /// Whether Redis accepts connections.
    pub(super) is_redis_up: Cell<bool>,
    /// The offset of the clock of Redis from the virtual time, in ms.
    clock_offset_ms: Cell<u64>,
    /// The start of the simulation.
    pub(super) start: Instant,
    rng: RefCell<fastrand::Rng>,
    /// The quality of each replica's network.
    qualities: RefCell<Vec<LinkQuality>>,
    /// For each connected replica, the channel of its messages with the times of their arrival.
    subscribers: RefCell<BTreeMap<usize, mpsc::UnboundedSender<(Instant, String)>>>,
    /// The process of each replica, or `None` while the replica is not running.
    processes: RefCell<Vec<Option<Rc<Process>>>>,
    /// The time that each replica's clock showed at the start of the simulation.
    clock_starts: Vec<UnixMs>,
    /// The time from which no fault has an effect.
    pub(super) healthy_at: Cell<Instant>,
    /// Whether no replica polls, so that the counts of the replicas can be compared.
    pub(super) is_polling_paused: Cell<bool>,
    /// The injected faults, for the report of a failed simulation.
    faults: RefCell<Vec<String>>,
}

impl World {
    pub(super) fn new(scenario: Scenario) -> Rc<Self> {
        let mut rng = fastrand::Rng::with_seed(scenario.seed);
        /// Maximum difference between the clock of a replica and the clock of Redis, in ms.
        const MAX_SKEW_MS: u64 = 3_600_000;
        let clock_starts = (0..scenario.replicas)
            .map(|_| UnixMs(EPOCH_MS - MAX_SKEW_MS + rng.u64(0..2 * MAX_SKEW_MS)))
            .collect();
        let provider_rng = RefCell::new(rng.fork());
        let start = clock::instant();
        Rc::new(Self {
            redis: SimulatedRedis::with_mutation(match scenario.mutation {
                Some(Mutation::Script(from, to)) => Some((from, to)),
                Some(Mutation::WholeShareAlone) | None => None,
            }),
            provider: Provider::new(&scenario.limits, start, || provider_rng.borrow_mut().f64()),
            violations: Violations::default(),
            is_redis_up: Cell::new(true),
            clock_offset_ms: Cell::new(EPOCH_MS),
            start,
            rng: RefCell::new(rng),
            qualities: RefCell::new(vec![LinkQuality::GOOD; scenario.replicas]),
            subscribers: RefCell::default(),
            processes: RefCell::new(vec![None; scenario.replicas]),
            clock_starts,
            healthy_at: Cell::new(start),
            is_polling_paused: Cell::new(false),
            faults: RefCell::default(),
            scenario,
        })
    }

    /// Records a fault for the report of a failed simulation.
    pub(super) fn record_fault(&self, fault: String) {
        self.faults.borrow_mut().push(format!("{:?}: {fault}", clock::elapsed_since(self.start)));
    }

    pub(super) fn faults(&self) -> Vec<String> {
        self.faults.borrow().clone()
    }

    /// Returns a random number from 0 to 1.
    pub(super) fn random(&self) -> f64 {
        self.rng.borrow_mut().f64()
    }

    pub(super) fn random_below(&self, bound: usize) -> usize {
        self.rng.borrow_mut().usize(0..bound)
    }

    /// Returns true with the probability `probability`.
    pub(super) fn chance(&self, probability: f64) -> bool {
        probability > 0.0 && self.random() < probability
    }

    pub(super) fn quality(&self, index: usize) -> LinkQuality {
        self.qualities.borrow()[index]
    }

    pub(super) fn set_quality(&self, index: usize, quality: LinkQuality) {
        self.qualities.borrow_mut()[index] = quality;
    }

    /// Returns a random delay of one message.
    pub(super) fn random_delay(&self, quality: LinkQuality) -> Duration {
        quality.max_delay.mul_f64(self.random())
    }

    /// Returns the running processes.
    pub(super) fn processes(&self) -> Vec<Rc<Process>> {
        self.processes.borrow().iter().flatten().cloned().collect()
    }

    /// Returns the process of the replica `index`, or `None` while the replica is not running.
    pub(super) fn process(&self, index: usize) -> Option<Rc<Process>> {
        self.processes.borrow()[index].clone()
    }

    /// Runs `query` on Redis, at the current time of its clock, and delivers the messages that it publishes.
    pub(super) fn run_at_redis<T>(&self, query: impl FnOnce(&Self) -> T) -> T {
        let elapsed = clock::elapsed_since(self.start);
        let micros = u64::try_from(elapsed.as_micros()).unwrap();
        self.redis.set_time(self.clock_offset_ms.get() * 1_000 + micros);
        let reply = query(self);
        for message in self.redis.take_published() {
            for (index, subscriber) in self.subscribers.borrow().iter() {
                let quality = self.quality(*index);
                if !self.chance(quality.request_loss) {
                    // The delay of a published message is constant, so that messages arrive in order. The receiver may
                    // have been dropped.
                    let _ = subscriber.send((clock::instant() + quality.max_delay / 2, message.clone()));
                }
            }
        }
        reply
    }

    /// Subscribes the replica `index` to the channel of the pool.
    pub(super) fn subscribe(&self, index: usize) -> mpsc::UnboundedReceiver<(Instant, String)> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.subscribers.borrow_mut().insert(index, sender);
        receiver
    }

    /// Closes the connection of one replica, or all connections if `index` is `None`.
    pub(super) fn disconnect(&self, index: Option<usize>) {
        self.subscribers.borrow_mut().retain(|subscriber, _| index.is_some_and(|index| *subscriber != index));
    }

    /// Moves the clock of Redis forward, or backward if `milliseconds` is negative. This simulates a failover to a
    /// machine with another clock.
    pub(super) fn shift_clock(&self, milliseconds: i64) {
        self.clock_offset_ms.set(self.clock_offset_ms.get().saturating_add_signed(milliseconds));
    }

    pub(super) fn api_key(workspace: usize) -> ApiKey {
        ApiKey::new(&format!("sk_simulated_workspace_{workspace:04}")).unwrap()
    }

    /// Starts the replica `index` with the content of its database.
    pub(super) fn start_replica(self: &Rc<Self>, index: usize, database: &[RestoredKey]) {
        let clock = (self.start, self.clock_starts[index]);
        let process = SIMULATED_CLOCK.sync_scope(clock, || {
            let entries = (0..self.scenario.limits.len()).map(|workspace| {
                let name = Some(format!("workspace-{workspace}"));
                KeyEntry { workspace: name, ..Self::api_key(workspace).into() }
            });
            let pool = Arc::new(Pool::new(entries.collect(), pool_settings()));
            pool.restore(database, clock::now());
            let (changes_sender, changes) = mpsc::channel::<PoolChange>(4_096);
            pool.send_changes_to(changes_sender);
            let id = format!("replica-{index}");
            let settings = ReplicaSettings {
                id: id.clone(),
                pool_name: SharedPoolName::default(),
                can_lead: true,
                regions: Arc::new([]),
            };
            let (polls_sender, polls) = mpsc::unbounded_channel();
            let process = Rc::new(Process {
                index,
                id,
                replica: RefCell::new(Replica::new(settings, Arc::clone(&pool), clock::now())),
                pool,
                is_accepting: Cell::new(false),
                clock,
                tasks: RefCell::default(),
                polls: polls_sender,
                max_use_while_alone: RefCell::default(),
            });
            start_link(self, &process, OutgoingUpdates { changes, polls });
            process
        });
        let poller = SIMULATED_CLOCK.scope(clock, run_poller(Rc::clone(self), Rc::clone(&process)));
        process.tasks.borrow_mut().push(spawn_local(poller).abort_handle());
        self.processes.borrow_mut()[index] = Some(process);
    }

    /// Kills the replica `index`, and returns the content of its database.
    pub(super) fn kill_replica(&self, index: usize) -> Vec<RestoredKey> {
        let Some(process) = self.processes.borrow_mut()[index].take() else { return Vec::new() };
        let database = SIMULATED_CLOCK.sync_scope(process.clock, || {
            let roster = process.pool.roster();
            let rows = roster.keys().iter().map(|key| RestoredKey {
                fingerprint: key.api_key().fingerprint(),
                quota: key.workspace().quota(clock::now()),
                tier: key.workspace().tier().map(|tier| tier.to_string()),
                key_evidence: key.evidence(),
                workspace_evidence: key.workspace().evidence(),
            });
            rows.collect()
        });
        process.tasks.borrow().iter().for_each(AbortHandle::abort);
        self.disconnect(Some(index));
        database
    }

    /// Polls the quota of every workspace on behalf of this replica, and updates its maximum use if it is alone.
    pub(super) fn poll_all(&self, process: &Process) {
        let lag = self.scenario.lag.mul_f64(self.random());
        for (index, workspace) in self.provider.workspaces.borrow_mut().iter_mut().enumerate() {
            let roster = process.pool.roster();
            let key = &roster.keys()[index];
            let observation = Observation::Quota {
                quota: workspace.report_quota(clock::instant(), lag),
                tier: Some(workspace.tier.to_owned()),
                is_paid: Some(true),
                capabilities: Capabilities::default(),
            };
            let at = clock::now();
            process.pool.observe(&roster, key, observation.clone(), at);
            let key = key.api_key().fingerprint();
            let _ = process.polls.send(OwnPoll { key, observation, at, region: None });
        }
        self.update_max_use_while_alone(process);
    }
}

/// Polls the provider while this replica is the leader or alone, or does not know the leader.
async fn run_poller(world: Rc<World>, process: Rc<Process>) {
    let mut has_polled = false;
    loop {
        sleep(Duration::from_millis(50)).await;
        let is_polling = process.is_accepting.get() && process.replica.borrow().is_polling();
        let has_limits = process
            .pool
            .roster()
            .keys()
            .iter()
            .all(|key| key.workspace().quota(clock::now()).limit.is_some());
        let is_poll_due = !has_polled && !has_limits || world.scenario.poll_interval.is_some();
        if is_polling && is_poll_due && !world.is_polling_paused.get() {
            has_polled = true;
            world.poll_all(&process);
            sleep(world.scenario.poll_interval.unwrap_or(Duration::ZERO)).await;
        }
    }
}
