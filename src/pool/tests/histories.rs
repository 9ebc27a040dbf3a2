//! Random histories of the whole pool under virtual time, in which no request may be queued or refused while
//! a key could serve it.

use std::time::Duration;

use std::fmt;
use std::sync::Mutex;

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
const KEYS: usize = 4;

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

#[derive(Clone, Copy, Debug)]
enum PollResponse {
    /// The remaining credits of 100, and the seconds until their reset.
    Remaining(u64, u64),
    /// Unlimited credits.
    Unlimited,
    Unreadable,
    Invalid,
}

#[derive(Clone, Debug)]
enum Step {
    Request(GeneratedRequest),
    /// The client of a queued request disconnects.
    Disconnect(Index),
    /// A request in flight is served and charged this percentage of its estimate.
    Serve(Index, u64),
    /// A request in flight is refused.
    Refuse(Index, Verdict),
    /// A lease is dropped without a result, after the request was sent or before.
    Drop(Index, bool),
    /// The provider reports the maximum of the concurrency group of a lease.
    ReportMaximum(Index, u32),
    /// A lease releases its slot and keeps the key.
    ReleaseSlot(Index),
    Poll(Index, PollResponse, &'static str),
    /// The refusals of a key are withdrawn.
    Withdraw(Index),
    /// The configuration is reloaded with these keys.
    Reload(Vec<usize>),
    /// The provider reports the same workspace for a key as for other keys.
    ShareWorkspace(Index),
    /// Virtual time passes.
    Wait(Duration),
}

/// Steps, which are printed one per line.
struct Steps(Vec<Step>);

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|step| write!(f, "\n    {}", format!("{step:?}").replace('\n', " ")))
    }
}

fn generated_request() -> impl Strategy<Value = GeneratedRequest> {
    let groups = prop_oneof![4 => Just(Some(ConcurrencyGroup::SPEECH)), 1 => Just(Some(ConcurrencyGroup::SOUND_EFFECTS)), 1 => Just(None)];
    let some_keys = |most| subsequence((0..KEYS).collect::<Vec<_>>(), 0..=most);
    let restraint = prop_oneof![
        Just(RestrictionLevel::Inferred),
        Just(RestrictionLevel::RefusedLongest),
        Just(RestrictionLevel::Refused),
        // Replaced with a time in the future when the request is sent.
        Just(RestrictionLevel::Until(UnixMs(1))),
    ];
    let restricted = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(restraint, KEYS)];
    (
        (0..3_usize, prop::option::weighted(0.9, 0..120_u64), groups),
        (
            prop_oneof![4 => some_keys(0), 1 => some_keys(2)],
            prop_oneof![4 => some_keys(0), 1 => some_keys(3)],
        ),
        prop_oneof![4 => some_keys(0), 1 => some_keys(2)],
        (restricted, prop::bool::weighted(0.1), prop::bool::weighted(0.2)),
    )
        .prop_map(
            |(
                (client_index, credits, group),
                (tried, ineligible),
                preferred,
                (restricted, is_free, refused),
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
                    was_refused: refused,
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
    let at = any::<Index>;
    let response = prop_oneof![
        4 => (0..=100_u64, prop_oneof![Just(2_u64), Just(8), Just(3_600)]).prop_map(|(left, s)| PollResponse::Remaining(left, s)),
        1 => Just(PollResponse::Unlimited),
        1 => Just(PollResponse::Unreadable),
        1 => Just(PollResponse::Invalid),
    ];
    let tier = prop_oneof![Just("free"), Just("creator"), Just("an unknown plan")];
    let spans = [1_u64, 40, 500, 1_000, 2_500, 11_000, 40_000];
    prop_oneof![
        10 => generated_request().prop_map(Step::Request),
        1 => at().prop_map(Step::Disconnect),
        3 => (at(), 0..=100_u64).prop_map(|(at, percent)| Step::Serve(at, percent)),
        4 => (at(), verdict()).prop_map(|(at, verdict)| Step::Refuse(at, verdict)),
        1 => (at(), any::<bool>()).prop_map(|(at, sent)| Step::Drop(at, sent)),
        2 => (at(), 1..3_u32).prop_map(|(at, slots)| Step::ReportMaximum(at, slots)),
        1 => at().prop_map(Step::ReleaseSlot),
        2 => (at(), response, tier).prop_map(|(at, response, tier)| Step::Poll(at, response, tier)),
        1 => at().prop_map(Step::Withdraw),
        1 => subsequence((0..KEYS).collect::<Vec<_>>(), 1..=KEYS).prop_shuffle().prop_map(Step::Reload),
        1 => at().prop_map(Step::ShareWorkspace),
        5 => prop::sample::select(spans.to_vec()).prop_map(|ms| Step::Wait(Duration::from_millis(ms))),
    ]
}

impl GeneratedRequest {
    /// Returns the request with the positions of a roster.
    fn request(&self, roster: &Roster) -> KeyRequest {
        let position = |number: &usize| {
            let fingerprint = entry(*number, None, None).key.fingerprint();
            roster.keys().iter().position(|key| key.api_key().fingerprint() == fingerprint)
        };
        let all = |numbers: &[usize]| {
            let mut positions: Vec<usize> = numbers.iter().filter_map(position).collect();
            positions.sort_unstable();
            positions
        };
        let in_future = |restraint: RestrictionLevel| match restraint {
            RestrictionLevel::Until(_) => RestrictionLevel::Until(clock::now().plus(Duration::from_secs(4))),
            other @ (RestrictionLevel::Inferred
            | RestrictionLevel::RefusedLongest
            | RestrictionLevel::Refused) => other,
        };
        let restricted = self
            .restricted
            .iter()
            .filter_map(|(number, restraint)| Some((position(number)?, in_future(*restraint))));
        let mut restricted: Vec<_> = restricted.collect();
        restricted.sort_unstable_by_key(|(position, _)| *position);
        let client = ClientName::new(["phone", "game", "reader"][self.client_index]);
        KeyRequest {
            tried: all(&self.tried),
            ineligible: all(&self.ineligible),
            preferred: all(&self.preferred),
            restricted,
            allow_exhausted: self.allow_exhausted,
            was_refused: self.was_refused,
            ..KeyRequest::new(client, self.credits, self.group)
        }
    }
}

/// Returns the rounds of a selection: preferred keys before the other keys, and restricted keys last.
fn rounds(request: &KeyRequest) -> Vec<SelectionRound> {
    let restraints =
        [RestrictionLevel::Inferred, RestrictionLevel::RefusedLongest, RestrictionLevel::Refused];
    let restraints = restraints.into_iter().take(if request.was_refused { 1 } else { 3 });
    let mut rounds = Vec::new();
    for max_level in std::iter::once(None).chain(restraints.map(Some)) {
        for is_preferred_only in [true, false] {
            for allow_exhausted in [false, true] {
                let may = (request.allow_exhausted || !allow_exhausted)
                    && (!is_preferred_only || !request.preferred.is_empty());
                rounds.extend(may.then_some(SelectionRound {
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
    choice(pool, roster, request, now).is_some()
}

fn choice(pool: &Pool, roster: &Roster, request: &KeyRequest, now: UnixMs) -> Option<Choice> {
    let strategy = roster.settings.strategy;
    let (mut is_busy, mut max_level) = (false, None);
    for round in rounds(request) {
        if is_busy && round.max_level != max_level {
            return None;
        }
        max_level = round.max_level;
        match select(strategy, candidates(pool, roster, request, round, now).into_iter()) {
            Ok(choice) => return Some(choice),
            // The request waits for a key that is only busy, before it tries a more restricted one.
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
    let is_busy = |key: &Candidate| {
        let is_usable =
            key.is_eligible && key.state == KeyState::Usable && key.affordability == Affordability::Enough;
        is_usable && key.concurrency == ConcurrencyState::Full { until: None }
    };
    rounds(request).into_iter().any(|round| candidates(pool, roster, request, round, now).iter().any(is_busy))
}

struct QueuedRequest {
    task: Id,
    abort: AbortHandle,
    generated: GeneratedRequest,
    /// The roster from which the request selects, and the request with positions in it.
    selection: Arc<Mutex<(Arc<Roster>, KeyRequest)>>,
}

struct LeasedRequest {
    lease: Lease,
    request: KeyRequest,
    roster: Arc<Roster>,
}

/// The lease, or the violation of the tested property. A request may also fail without a violation.
type RequestResult = Result<LeasedRequest, Option<String>>;

struct History {
    pool: Arc<Pool>,
    settings: Settings,
    tasks: JoinSet<RequestResult>,
    waiting: Vec<QueuedRequest>,
    leased: Vec<LeasedRequest>,
    rosters: Vec<Arc<Roster>>,
}

impl History {
    fn new(settings: Settings) -> Self {
        let pool = Arc::new(Pool::new((0..KEYS).map(|number| entry(number, None, None)).collect(), settings));
        for key in pool.roster().keys() {
            key.workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
        }
        let rosters = vec![pool.roster()];
        let (waiting, leased) = (Vec::new(), Vec::new());
        Self { pool, settings, tasks: JoinSet::new(), waiting, leased, rosters }
    }

    fn request(&mut self, generated: GeneratedRequest) {
        let pool = Arc::clone(&self.pool);
        let roster = pool.roster();
        let request = generated.request(&roster);
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
                let state_before =
                    UnixMs(now.0.saturating_sub(u64::try_from(MAX_TIMER_DELAY.as_millis()).unwrap()));
                if reason == Unavailable::Outdated {
                    let roster = pool.roster();
                    let request = template.request(&roster);
                    *shared_selection.lock().unwrap() = (roster, request);
                } else if [now, state_before].iter().all(|at| could_be_served(&pool, &roster, &request, *at))
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
                Some(Err(violation)) => prop_assert_eq!(violation, None),
                None => {}
            }
        }
        Ok(())
    }

    fn servable_waiter(&self) -> Option<(Id, &GeneratedRequest)> {
        let now = clock::now();
        let is_servable = |waiting: &&QueuedRequest| {
            let (roster, request) = waiting.selection.lock().unwrap().clone();
            could_be_served(&self.pool, &roster, &request, now)
        };
        self.waiting.iter().find(is_servable).map(|waiting| (waiting.task, &waiting.generated))
    }

    /// Checks that no request stays queued while a key could serve it, except for the delay of a timer.
    async fn check(&mut self) -> Result<(), TestCaseError> {
        let Some((suspect, _)) = self.servable_waiter() else { return Ok(()) };
        sleep(MAX_TIMER_DELAY).await;
        self.run_tasks().await?;
        if let Some((task, generated)) = self.servable_waiter()
            && task == suspect
        {
            let waiting = self.waiting.iter().find(|waiting| waiting.task == task);
            let (roster, request) = waiting.unwrap().selection.lock().unwrap().clone();
            let choice = choice(&self.pool, &roster, &request, clock::now());
            prop_assert!(false, "{generated:?} must not be queued while {choice:?} could serve it");
        }
        Ok(())
    }

    fn remove_at<T>(list: &mut Vec<T>, at: Index) -> Option<T> {
        (!list.is_empty()).then(|| list.swap_remove(at.index(list.len())))
    }

    async fn apply(&mut self, step: Step) {
        let now = clock::now();
        let roster = self.pool.roster();
        let key_at = |at: Index| Arc::clone(&roster.keys()[at.index(roster.keys().len())]);
        match step {
            Step::Request(generated) => self.request(generated),
            Step::Disconnect(at) => {
                if !self.waiting.is_empty() {
                    self.waiting[at.index(self.waiting.len())].abort.abort();
                }
            }
            Step::Serve(at, percent) => {
                let Some(mut leased) = Self::remove_at(&mut self.leased, at) else { return };
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
            Step::Refuse(at, verdict) => {
                let Some(mut leased) = Self::remove_at(&mut self.leased, at) else { return };
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
            Step::Drop(at, is_sent) => {
                let Some(mut leased) = Self::remove_at(&mut self.leased, at) else { return };
                if is_sent {
                    leased.lease.mark_sent();
                }
            }
            Step::ReportMaximum(at, slots) => {
                if !self.leased.is_empty() {
                    self.leased[at.index(self.leased.len())].lease.record_concurrency_limit(slots);
                }
            }
            Step::ReleaseSlot(at) => {
                if !self.leased.is_empty() {
                    let at = at.index(self.leased.len());
                    self.leased[at].lease.release_slot();
                }
            }
            Step::Poll(at, response, tier) => {
                let quota = |left, seconds| Quota {
                    count: 100 - left,
                    limit: Some(100),
                    extension: Extension::None,
                    resets_at: Some(now.plus(Duration::from_secs(seconds))),
                };
                let observation = |quota| Observation::Quota {
                    quota,
                    tier: Some(tier.to_owned()),
                    is_paid: Some(true),
                    capabilities: Capabilities::default(),
                };
                let observation = match response {
                    PollResponse::Remaining(left, seconds) => observation(quota(left, seconds)),
                    PollResponse::Unlimited => observation(Quota::default()),
                    PollResponse::Unreadable => Observation::Unreadable,
                    PollResponse::Invalid => invalid_observation(),
                };
                self.pool.observe(&roster, &key_at(at), observation, now);
            }
            Step::Withdraw(at) => {
                let key = key_at(at);
                for known in key.evidence().into_iter().chain(key.workspace().evidence()) {
                    self.pool.withdraw_refusal(&roster, &key, &known.source, now);
                }
            }
            Step::Reload(numbers) => {
                let entries = numbers.into_iter().map(|number| entry(number, None, None)).collect();
                self.pool.reload(entries, self.settings);
                self.rosters.push(self.pool.roster());
            }
            Step::ShareWorkspace(at) => {
                self.pool.record_workspace(&key_at(at), "ws_shared");
                self.rosters.push(self.pool.roster());
            }
            Step::Wait(duration) => sleep(duration).await,
        }
    }

    async fn run(mut self, steps: Vec<Step>) -> Result<(), TestCaseError> {
        for step in steps {
            self.apply(step).await;
            self.run_tasks().await?;
            self.check().await?;
        }
        // Every wait must end without an event.
        sleep(self.settings.queue_timeout + MAX_TIMER_DELAY).await;
        self.run_tasks().await?;
        prop_assert!(self.waiting.is_empty(), "{:?} must not be queued forever", self.waiting[0].generated);
        self.leased.clear();
        prop_assert_eq!(self.pool.queued_requests(), 0);
        for key in self.rosters.iter().flat_map(|roster| roster.keys()) {
            let workspace = key.workspace();
            let held = (key.in_flight(), workspace.in_flight(), workspace.reserved());
            prop_assert_eq!(held, (0, 0, 0), "{:?}", key);
            for group in ConcurrencyGroup::all() {
                prop_assert_eq!(workspace.concurrency(group).0, 0, "{:?}", key);
            }
        }
        Ok(())
    }
}

/// Runs the same 100 histories in every test run. `KEYCHOIR_HISTORIES=5000` runs 5000 random histories
/// instead.
fn histories() -> ProptestConfig {
    let configured_cases = std::env::var("KEYCHOIR_HISTORIES").ok().and_then(|text| text.parse().ok());
    let rng_seed = if configured_cases.is_some() { RngSeed::Random } else { RngSeed::Fixed(20_261_129) };
    let cases = configured_cases.unwrap_or(100);
    ProptestConfig { rng_seed, failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(histories())]

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
