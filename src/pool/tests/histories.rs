//! Tests the whole pool with random histories under virtual time. No request may be queued or refused while a key could
//! serve it, and at the end of a history no lease, no reserved credits and no acquired slot may remain.

use std::fmt;
use std::sync::Mutex;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::{Index, subsequence};
use proptest::strategy::Strategy;
use proptest::test_runner::RngSeed;
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::sleep;

use super::super::candidate::{SelectionRound, evaluate_key};
use super::super::sync::Ordering;
use super::*;
use crate::clock;
use crate::policy::select::{Affordability, Candidate, Choice, ConcurrencyState, select};
use crate::policy::strategy::STRATEGIES;

/// Number of existing keys. A reload configures some of them.
const KEY_COUNT: usize = 4;

/// Cooldowns that are short relative to the queue timeout, so that queued requests outlast them.
const SHORT_COOLDOWNS: Settings = Settings {
    max_queued: 6,
    rate_limited_cooldown: Duration::from_secs(10),
    exhausted_cooldown: Duration::from_secs(30),
    billing_cooldown: Duration::from_secs(30),
    invalid_confirm_cooldown: Duration::from_secs(10),
    invalid_cooldown: Duration::from_secs(60),
    permission_cooldown: Duration::from_secs(10),
    unproven_cooldown: Duration::from_secs(10),
    max_retry_after: Duration::from_secs(20),
    probe_after: Duration::from_secs(1),
    quota_lag: Duration::from_secs(5),
    ..SETTINGS
};

/// A generated request, with the numbers of keys instead of positions in a roster.
#[derive(Clone, Debug)]
struct GeneratedRequest {
    client_index: usize,
    credits: Option<u64>,
    group: Option<ConcurrencyGroup>,
    tried: Vec<usize>,
    ineligible: Vec<usize>,
    preferred: Vec<usize>,
    restricted: Vec<(usize, RestrictionLevel)>,
    allow_exhausted: bool,
    was_refused: bool,
}

/// The response of the provider to a generated poll.
#[derive(Clone, Copy, Debug)]
enum PollResponse {
    /// The remaining credits of a limit of 100 credits.
    Remaining {
        credits: u64,
        seconds_until_reset: u64,
    },
    /// A quota without a limit.
    Unlimited,
    Unreadable,
    Invalid,
}

/// A step of a history. An [`Index`] selects one of the queued requests, leases or keys.
#[derive(Clone, Debug)]
enum Step {
    /// A client sends a request.
    Request(GeneratedRequest),
    /// The client of a queued request disconnects.
    Disconnect(Index),
    /// A request in flight is served and charged this percentage of its estimate.
    Serve(Index, u64),
    /// A request in flight is refused.
    Refuse(Index, Verdict),
    /// A lease is dropped without a result, after the request was sent or before.
    Drop { lease: Index, is_sent: bool },
    /// The provider reports the maximum of the concurrency group of a lease.
    ReportMaximum(Index, u32),
    /// A lease releases its slot and keeps the key.
    ReleaseSlot(Index),
    /// The provider responds to a poll with a key.
    Poll { key: Index, response: PollResponse, tier: &'static str },
    /// The refusals of a key are withdrawn.
    Withdraw(Index),
    /// The configuration is reloaded with these keys.
    Reload(Vec<usize>),
    /// The provider reports the same workspace for a key as for other keys.
    ShareWorkspace(Index),
    /// Virtual time passes.
    Wait(Duration),
}

/// The steps of a history, which are printed one per line.
struct Steps(Vec<Step>);

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|step| write!(f, "\n    {}", format!("{step:?}").replace('\n', " ")))
    }
}

fn generated_request() -> impl Strategy<Value = GeneratedRequest> {
    let groups = prop_oneof![
        4 => Just(Some(ConcurrencyGroup::SPEECH)),
        1 => Just(Some(ConcurrencyGroup::SOUND_EFFECTS)),
        1 => Just(None),
    ];
    let at_most = |max_keys| subsequence((0..KEY_COUNT).collect::<Vec<_>>(), 0..=max_keys);
    let level = prop_oneof![
        Just(RestrictionLevel::Inferred),
        Just(RestrictionLevel::RefusedLongest),
        Just(RestrictionLevel::Refused),
        // The time is replaced with a time in the future when the request is sent.
        Just(RestrictionLevel::Until(UnixMs(1))),
    ];
    let restricted = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(level, KEY_COUNT)];
    (
        (0..3_usize, prop::option::weighted(0.9, 0..120_u64), groups),
        (prop_oneof![4 => at_most(0), 1 => at_most(2)], prop_oneof![4 => at_most(0), 1 => at_most(3)]),
        prop_oneof![4 => at_most(0), 1 => at_most(2)],
        (restricted, prop::bool::weighted(0.1), prop::bool::weighted(0.2)),
    )
        .prop_map(
            |(
                (client_index, credits, group),
                (tried, ineligible),
                preferred,
                (restricted, is_free, was_refused),
            )| {
                GeneratedRequest {
                    client_index,
                    // A request that an account without credits may serve costs none and has no concurrency
                    // group.
                    credits: if is_free { Some(0) } else { credits },
                    group: group.filter(|_| !is_free),
                    tried,
                    ineligible,
                    preferred,
                    restricted: restricted.into_iter().enumerate().collect(),
                    allow_exhausted: is_free,
                    was_refused,
                }
            },
        )
}

fn verdict() -> impl Strategy<Value = Verdict> {
    let retry_after_seconds = prop::option::of(prop_oneof![Just(1_u64), Just(3), Just(86_400)]);
    let shortfall =
        |remaining, required| Shortfall { remaining: Some(remaining), required: Some(required), quota: None };
    prop_oneof![
        retry_after_seconds.prop_map(|seconds| Verdict::RateLimited(seconds.map(Duration::from_secs))),
        prop::option::of(1..3_u32).prop_map(|maximum| Verdict::Concurrency { maximum }),
        Just(Verdict::WorkspaceQuota(Shortfall::default())),
        (0..40_u64).prop_map(move |left| Verdict::WorkspaceQuota(shortfall(left, 50))),
        (0..40_u64).prop_map(move |left| Verdict::KeyQuota(shortfall(left, 50))),
        Just(Verdict::Billing),
        Just(Verdict::Abuse),
        Just(Verdict::InvalidKey),
        Just(Verdict::WrongHost),
        Just(Verdict::MissingPermission(None)),
        Just(Verdict::Busy),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<Index>;
    let response = prop_oneof![
        4 => (0..=100_u64, prop_oneof![Just(2_u64), Just(8), Just(3_600)])
            .prop_map(|(credits, seconds_until_reset)| PollResponse::Remaining { credits, seconds_until_reset }),
        1 => Just(PollResponse::Unlimited),
        1 => Just(PollResponse::Unreadable),
        1 => Just(PollResponse::Invalid),
    ];
    let tier = prop_oneof![Just("free"), Just("creator"), Just("an unknown plan")];
    let wait_millis = [1_u64, 40, 500, 1_000, 2_500, 11_000, 40_000];
    prop_oneof![
        10 => generated_request().prop_map(Step::Request),
        1 => index().prop_map(Step::Disconnect),
        3 => (index(), 0..=100_u64).prop_map(|(lease, percent)| Step::Serve(lease, percent)),
        4 => (index(), verdict()).prop_map(|(lease, verdict)| Step::Refuse(lease, verdict)),
        1 => (index(), any::<bool>()).prop_map(|(lease, is_sent)| Step::Drop { lease, is_sent }),
        2 => (index(), 1..3_u32).prop_map(|(lease, slots)| Step::ReportMaximum(lease, slots)),
        1 => index().prop_map(Step::ReleaseSlot),
        2 => (index(), response, tier).prop_map(|(key, response, tier)| Step::Poll { key, response, tier }),
        1 => index().prop_map(Step::Withdraw),
        1 => subsequence((0..KEY_COUNT).collect::<Vec<_>>(), 1..=KEY_COUNT).prop_shuffle().prop_map(Step::Reload),
        1 => index().prop_map(Step::ShareWorkspace),
        5 => prop::sample::select(wait_millis.to_vec()).prop_map(|millis| Step::Wait(Duration::from_millis(millis))),
    ]
}

impl GeneratedRequest {
    /// Returns the request with the positions of its keys in `roster`.
    fn in_roster(&self, roster: &Roster) -> KeyRequest {
        let position = |number: &usize| {
            let fingerprint = entry(*number, None, None).key.fingerprint();
            roster.keys().iter().position(|key| key.api_key().fingerprint() == fingerprint)
        };
        let sorted_positions = |numbers: &[usize]| {
            let mut positions: Vec<usize> = numbers.iter().filter_map(position).collect();
            positions.sort_unstable();
            positions
        };
        let in_future = |level: RestrictionLevel| match level {
            RestrictionLevel::Until(_) => RestrictionLevel::Until(clock::now().plus(Duration::from_secs(4))),
            other @ (RestrictionLevel::Inferred
            | RestrictionLevel::RefusedLongest
            | RestrictionLevel::Refused) => other,
        };
        let restricted =
            self.restricted.iter().filter_map(|(number, level)| Some((position(number)?, in_future(*level))));
        let mut restricted: Vec<_> = restricted.collect();
        restricted.sort_unstable_by_key(|(position, _)| *position);
        let client = ClientName::new(["phone", "game", "reader"][self.client_index]);
        KeyRequest {
            tried: sorted_positions(&self.tried),
            ineligible: sorted_positions(&self.ineligible),
            preferred: sorted_positions(&self.preferred),
            restricted,
            allow_exhausted: self.allow_exhausted,
            was_refused: self.was_refused,
            ..KeyRequest::new(client, self.credits, self.group)
        }
    }
}

/// Returns the rounds of a selection: preferred keys before the other keys, and restricted keys last.
fn rounds(request: &KeyRequest) -> Vec<SelectionRound> {
    let levels = [RestrictionLevel::Inferred, RestrictionLevel::RefusedLongest, RestrictionLevel::Refused];
    let levels = levels.into_iter().take(if request.was_refused { 1 } else { 3 });
    let mut rounds = Vec::new();
    for max_level in std::iter::once(None).chain(levels.map(Some)) {
        for is_preferred_only in [true, false] {
            for allow_exhausted in [false, true] {
                let is_tried = (request.allow_exhausted || !allow_exhausted)
                    && (!is_preferred_only || !request.preferred.is_empty());
                rounds.extend(is_tried.then_some(SelectionRound {
                    is_preferred_only,
                    allow_exhausted,
                    max_level,
                }));
            }
        }
    }
    rounds
}

fn candidates(
    pool: &Pool,
    roster: &Roster,
    request: &KeyRequest,
    round: SelectionRound,
    now: UnixMs,
) -> Vec<Candidate> {
    let turn = pool.last_turn.load(Ordering::Acquire);
    let keys = roster.keys().iter().enumerate();
    keys.map(|(position, key)| evaluate_key(key, position, request, round, turn, now)).collect()
}

/// Whether a key could serve the request. Evaluates every key, without the shortcuts of the pool.
fn could_be_served(pool: &Pool, roster: &Roster, request: &KeyRequest, now: UnixMs) -> bool {
    find_choice(pool, roster, request, now).is_some()
}

/// Returns the choice of a selection in which every key is evaluated in every round.
fn find_choice(pool: &Pool, roster: &Roster, request: &KeyRequest, now: UnixMs) -> Option<Choice> {
    let strategy = roster.settings.strategy;
    let (mut is_busy, mut max_level) = (false, None);
    for round in rounds(request) {
        if is_busy && round.max_level != max_level {
            return None;
        }
        max_level = round.max_level;
        match select(strategy, candidates(pool, roster, request, round, now).into_iter()) {
            Ok(choice) => return Some(choice),
            // The request waits for a key that is only busy, before it tries a key with more restrictions.
            Err(blocked) if matches!(blocked.reason, Unavailable::Full { .. }) => {
                is_busy = round.max_level != Some(RestrictionLevel::RefusedLongest);
            }
            Err(_) => {}
        }
    }
    None
}

/// Whether a key could serve the request if it had a free slot.
fn is_only_busy(pool: &Pool, roster: &Roster, request: &KeyRequest, now: UnixMs) -> bool {
    let is_busy = |candidate: &Candidate| {
        candidate.is_eligible
            && candidate.state == KeyState::Usable
            && candidate.affordability == Affordability::Enough
            && candidate.concurrency == ConcurrencyState::Full { until: None }
    };
    rounds(request).into_iter().any(|round| candidates(pool, roster, request, round, now).iter().any(is_busy))
}

/// A request whose task waits for a key.
struct QueuedRequest {
    task: Id,
    abort: AbortHandle,
    generated: GeneratedRequest,
    /// The roster from which the request selects, and the request with positions in it.
    selection: Arc<Mutex<(Arc<Roster>, KeyRequest)>>,
}

/// A request in flight.
struct LeasedRequest {
    lease: Lease,
    request: KeyRequest,
    roster: Arc<Roster>,
}

/// The lease, or the violation of the tested property. A request may also fail without a violation.
type RequestResult = Result<LeasedRequest, Option<String>>;

/// The pool and the requests of a history.
struct History {
    pool: Arc<Pool>,
    settings: Settings,
    tasks: JoinSet<RequestResult>,
    waiting: Vec<QueuedRequest>,
    leased: Vec<LeasedRequest>,
    /// All rosters of the pool, for the check that no key has a request at the end.
    rosters: Vec<Arc<Roster>>,
}

impl History {
    fn new(settings: Settings) -> Self {
        let pool =
            Arc::new(Pool::new((0..KEY_COUNT).map(|number| entry(number, None, None)).collect(), settings));
        for key in pool.roster().keys() {
            key.workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
        }
        let rosters = vec![pool.roster()];
        let (waiting, leased) = (Vec::new(), Vec::new());
        Self { pool, settings, tasks: JoinSet::new(), waiting, leased, rosters }
    }

    /// Starts a task that reserves a key for a request. The task returns a violation if the request is refused although
    /// a key could serve it.
    fn start_request(&mut self, generated: GeneratedRequest) {
        let pool = Arc::clone(&self.pool);
        let roster = pool.roster();
        let request = generated.in_roster(&roster);
        let selection = Arc::new(Mutex::new((roster, request)));
        let (shared_selection, template) = (Arc::clone(&selection), generated.clone());
        let abort = self.tasks.spawn(async move {
            loop {
                let (roster, request) = shared_selection.lock().unwrap().clone();
                let reason = match pool.reserve(&roster, &request).await {
                    Ok(Reserved { lease, .. }) => return Ok(LeasedRequest { lease, request, roster }),
                    Err(reason) => reason,
                };
                let now = clock::now();
                let before_timer =
                    UnixMs(now.0.saturating_sub(u64::try_from(MAX_TIMER_DELAY.as_millis()).unwrap()));
                if reason == Unavailable::Outdated {
                    let roster = pool.roster();
                    let request = template.in_roster(&roster);
                    *shared_selection.lock().unwrap() = (roster, request);
                } else if [now, before_timer].iter().all(|at| could_be_served(&pool, &roster, &request, *at))
                {
                    return Err(Some(format!(
                        "{template:?} was refused ({reason}) although a key could serve it"
                    )));
                } else if !matches!(reason, Unavailable::Full { .. })
                    && is_only_busy(&pool, &roster, &request, now)
                {
                    return Err(Some(format!(
                        "{template:?} was refused ({reason}) although a key was only busy"
                    )));
                } else {
                    return Err(None);
                }
            }
        });
        self.waiting.push(QueuedRequest { task: abort.id(), abort, generated, selection });
    }

    /// Runs all tasks until each of them waits for an event, and collects the results of ended tasks.
    async fn run_tasks(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..30 {
            tokio::task::yield_now().await;
        }
        while let Some(joined) = self.tasks.try_join_next_with_id() {
            let (task, result) = match joined {
                Ok((task, result)) => (task, Some(result)),
                // The client of the request has disconnected.
                Err(error) => (error.id(), None),
            };
            self.waiting.retain(|waiting| waiting.task != task);
            match result {
                Some(Ok(leased)) => self.leased.push(leased),
                Some(Err(violation)) => {
                    prop_assert_eq!(violation, None, "a request must use a free key and wait for a busy key");
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Returns a queued request that a key could serve.
    fn find_servable_request(&self) -> Option<(Id, &GeneratedRequest)> {
        let now = clock::now();
        let is_servable = |waiting: &&QueuedRequest| {
            let (roster, request) = waiting.selection.lock().unwrap().clone();
            could_be_served(&self.pool, &roster, &request, now)
        };
        self.waiting.iter().find(is_servable).map(|waiting| (waiting.task, &waiting.generated))
    }

    /// Checks that no request stays queued while a key could serve it, except for the delay of a timer.
    async fn check_queued_requests(&mut self) -> Result<(), TestCaseError> {
        let Some((suspect, _)) = self.find_servable_request() else { return Ok(()) };
        sleep(MAX_TIMER_DELAY).await;
        self.run_tasks().await?;
        if let Some((task, generated)) = self.find_servable_request()
            && task == suspect
        {
            let waiting = self.waiting.iter().find(|waiting| waiting.task == task);
            let (roster, request) = waiting.unwrap().selection.lock().unwrap().clone();
            let choice = find_choice(&self.pool, &roster, &request, clock::now());
            prop_assert!(false, "{generated:?} must not be queued while {choice:?} could serve it");
        }
        Ok(())
    }

    /// Removes the request in flight that `index` selects, if there is one.
    fn take_leased(&mut self, index: Index) -> Option<LeasedRequest> {
        let count = self.leased.len();
        (count > 0).then(|| self.leased.swap_remove(index.index(count)))
    }

    async fn apply_step(&mut self, step: Step) {
        let now = clock::now();
        let roster = self.pool.roster();
        let key_at = |index: Index| Arc::clone(&roster.keys()[index.index(roster.keys().len())]);
        match step {
            Step::Request(generated) => self.start_request(generated),
            Step::Disconnect(index) => {
                if !self.waiting.is_empty() {
                    self.waiting[index.index(self.waiting.len())].abort.abort();
                }
            }
            Step::Serve(index, percent) => {
                let Some(mut leased) = self.take_leased(index) else { return };
                leased.lease.mark_sent();
                let served = ServedAttempt {
                    request: Some(&leased.request),
                    began_at: leased.lease.reserved_at(),
                    is_charged: true,
                };
                self.pool.record_service(&leased.roster, leased.lease.key(), served, now);
                let credits = leased.lease.reserved() * percent / 100;
                self.pool.charge(&leased.roster, &mut leased.lease, credits, now);
            }
            Step::Refuse(index, verdict) => {
                let Some(mut leased) = self.take_leased(index) else { return };
                leased.lease.mark_sent();
                record_attempt(
                    &self.pool,
                    &leased.roster,
                    leased.lease.key(),
                    verdict,
                    Some(&leased.request),
                    now,
                );
                self.pool.charge(&leased.roster, &mut leased.lease, 0, now);
            }
            Step::Drop { lease, is_sent } => {
                let Some(mut leased) = self.take_leased(lease) else { return };
                if is_sent {
                    leased.lease.mark_sent();
                }
            }
            Step::ReportMaximum(index, slots) => {
                if !self.leased.is_empty() {
                    self.leased[index.index(self.leased.len())].lease.record_concurrency_limit(slots);
                }
            }
            Step::ReleaseSlot(index) => {
                if !self.leased.is_empty() {
                    let position = index.index(self.leased.len());
                    self.leased[position].lease.release_slot();
                }
            }
            Step::Poll { key, response, tier } => {
                let observe_quota = |quota| Observation::Quota {
                    quota,
                    tier: Some(tier.to_owned()),
                    is_paid: Some(true),
                    capabilities: Capabilities::default(),
                };
                let observation = match response {
                    PollResponse::Remaining { credits, seconds_until_reset } => observe_quota(Quota {
                        count: 100 - credits,
                        limit: Some(100),
                        extension: Extension::None,
                        resets_at: Some(now.plus(Duration::from_secs(seconds_until_reset))),
                    }),
                    PollResponse::Unlimited => observe_quota(Quota::default()),
                    PollResponse::Unreadable => Observation::Unreadable,
                    PollResponse::Invalid => invalid_observation(),
                };
                self.pool.observe(&roster, &key_at(key), observation, now);
            }
            Step::Withdraw(index) => {
                let key = key_at(index);
                for evidence in key.evidence().into_iter().chain(key.workspace().evidence()) {
                    self.pool.withdraw_refusal(&roster, &key, &evidence.source, now);
                }
            }
            Step::Reload(numbers) => {
                let entries = numbers.into_iter().map(|number| entry(number, None, None)).collect();
                self.pool.reload(entries, self.settings);
                self.rosters.push(self.pool.roster());
            }
            Step::ShareWorkspace(index) => {
                self.pool.record_workspace(&key_at(index), "ws_shared");
                self.rosters.push(self.pool.roster());
            }
            Step::Wait(duration) => sleep(duration).await,
        }
    }

    async fn run(mut self, steps: Vec<Step>) -> Result<(), TestCaseError> {
        for step in steps {
            self.apply_step(step).await;
            self.run_tasks().await?;
            self.check_queued_requests().await?;
        }
        // Every wait must end without another step.
        sleep(self.settings.queue_timeout + MAX_TIMER_DELAY).await;
        self.run_tasks().await?;
        prop_assert!(self.waiting.is_empty(), "{:?} must not be queued forever", self.waiting[0].generated);
        self.leased.clear();
        prop_assert_eq!(self.pool.queued_requests(), 0);
        for key in self.rosters.iter().flat_map(|roster| roster.keys()) {
            let workspace = key.workspace();
            let in_use = (key.in_flight(), workspace.in_flight(), workspace.reserved());
            prop_assert_eq!(in_use, (0, 0, 0), "no lease and no reserved credits must remain at {:?}", key);
            for group in ConcurrencyGroup::all() {
                let (running, _) = workspace.concurrency(group);
                prop_assert_eq!(running, 0, "no slot must remain acquired at {:?}", key);
            }
        }
        Ok(())
    }
}

/// Returns a configuration that runs the same 100 histories in every test run. `KEYCHOIR_HISTORIES=5000` runs 5000
/// random histories instead.
fn history_config() -> ProptestConfig {
    let configured_cases = std::env::var("KEYCHOIR_HISTORIES").ok().and_then(|count| count.parse().ok());
    let rng_seed = if configured_cases.is_some() { RngSeed::Random } else { RngSeed::Fixed(20_261_129) };
    let cases = configured_cases.unwrap_or(100);
    ProptestConfig { rng_seed, failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(history_config())]

    #[test]
    fn no_request_waits_or_is_refused_while_a_key_could_serve_it(
        strategy in 0..STRATEGIES.len(),
        steps in prop::collection::vec(step(), 1..60).prop_map(Steps),
    ) {
        let settings = Settings { strategy: &STRATEGIES[strategy], ..SHORT_COOLDOWNS };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(async { History::new(settings).run(steps.0).await })?;
    }
}
