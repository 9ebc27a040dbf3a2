//! Requests that are queued for a key, under virtual time: single events that wake them, and random
//! histories of the whole pool in which no request may be queued, or refused, while a key could serve it.

use std::time::Duration;

use std::fmt;
use std::sync::Mutex;

use proptest::prelude::*;
use proptest::sample::{Index, subsequence};
use proptest::strategy::Strategy;
use proptest::test_runner::RngSeed;
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::sleep;

use super::super::candidate::{SelectionRound, candidate};
use super::super::sync::Ordering;
use super::*;
use crate::clock;
use crate::policy::select::{Affordability, Candidate, Choice, ConcurrencyState, select};
use crate::policy::strategy::STRATEGIES;

// ---- Single events.

/// A pool of `count` keys with one slot for speech each, and a lease that holds the slot of the first
/// key.
fn with_one_leased(count: usize) -> (Arc<Pool>, Lease) {
    let pool = separate_keys(count);
    for key in pool.roster().keys() {
        key.workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
    }
    let held = pool.try_reserve(&pool.roster(), &speech(1, &[]), clock::now()).unwrap().lease;
    assert_eq!(held.key().position(), 0);
    (pool, held)
}

/// Rate limits the key at `position` for `span`.
fn limit(pool: &Arc<Pool>, position: usize, span: Duration) {
    pool.record(position, Verdict::RateLimited(Some(span)), clock::now());
}

/// The virtual time for which a request is queued from now on, and the key that serves it.
async fn timed_reserve(pool: &Arc<Pool>) -> (Duration, Result<usize, Unavailable>) {
    let began = clock::instant();
    let result = pool.reserve(&pool.roster(), &speech(1, &[])).await;
    (clock::since(began), result.map(|reserved| reserved.lease.key().position()))
}

#[tokio::test(start_paused = true)]
async fn a_cooldown_that_ends_before_a_slot_is_free_ends_the_wait() {
    let (pool, _held) = with_one_leased(2);
    limit(&pool, 1, Duration::from_millis(100));
    let (span, result) = timed_reserve(&pool).await;
    assert_eq!(result, Ok(1));
    assert!((100..=102).contains(&span.as_millis()), "{span:?}");
}

#[tokio::test(start_paused = true)]
async fn credits_that_are_reset_before_a_slot_is_free_end_the_wait() {
    let (pool, _held) = with_one_leased(2);
    let roster = pool.roster();
    let resets_at = Some(clock::now().plus(Duration::from_secs(3)));
    let spent = Quota { count: 100, limit: Some(100), extension: Extension::None, resets_at };
    pool.observe(&roster, &roster.keys()[1], figures(spent, Some(true)), clock::now());
    let (span, result) = timed_reserve(&pool).await;
    assert_eq!(result, Ok(1));
    assert!((3_000..=3_002).contains(&span.as_millis()), "{span:?}");
}

#[tokio::test(start_paused = true)]
async fn too_few_credits_that_are_reset_before_a_slot_is_free_end_the_wait() {
    let (pool, _held) = with_one_leased(2);
    let roster = pool.roster();
    let resets_at = Some(clock::now().plus(Duration::from_secs(3)));
    let short = Quota { count: 95, limit: Some(100), extension: Extension::None, resets_at };
    pool.observe(&roster, &roster.keys()[1], figures(short, Some(true)), clock::now());
    let began = clock::instant();
    let result = pool.reserve(&roster, &speech(20, &[])).await;
    assert_eq!(result.map(|reserved| reserved.lease.key().position()), Ok(1));
    assert!((3_000..=3_002).contains(&clock::since(began).as_millis()), "{:?}", clock::since(began));
}

#[tokio::test(start_paused = true)]
async fn a_lease_dropped_unsettled_dispatches_the_queue_at_the_present_time() {
    let (pool, held) = with_one_leased(1);
    pool.record(0, Verdict::Concurrency { maximum: Some(1) }, clock::now());
    sleep(Duration::from_secs(100)).await;
    let (roster, request) = (pool.roster(), speech(1, &[]));
    let mut waiting = Box::pin(pool.reserve(&roster, &request));
    assert!(poll_once(&mut waiting).is_none());
    sleep(Duration::from_secs(30)).await;
    // The cooldown of that refusal was over when this one was received, but not when the lease began.
    drop(held);
    let result = poll_once(&mut waiting).expect("the slot is free before the queue is dispatched");
    assert_eq!(result.unwrap().lease.key().position(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_event_that_makes_a_key_usable_dispatches_the_queue_at_once() {
    type Event = fn(&Arc<Pool>, &mut Lease);
    let events: [(&str, Event); 4] = [
        ("a poll that shows credits", |pool, _| {
            let roster = pool.roster();
            let quota = Quota { count: 0, limit: Some(100), ..Quota::default() };
            pool.observe(&roster, &roster.keys()[1], figures(quota, Some(true)), clock::now());
        }),
        ("a service that refutes the refusal", |pool, _| {
            pool.record(1, Verdict::Served, clock::now());
        }),
        ("a refusal that is withdrawn", |pool, _| {
            let roster = pool.roster();
            let source = &roster.keys()[1].workspace().evidence()[0].source;
            pool.withdraw_refusal(&roster, &roster.keys()[1], source, clock::now());
        }),
        ("a raised limit", |_, held| held.record_concurrency_limit(2)),
    ];
    for (name, event) in events {
        let (pool, mut held) = with_one_leased(2);
        pool.record(1, Verdict::WorkspaceQuota(Shortfall::default()), clock::now());
        let (roster, request) = (pool.roster(), speech(1, &[]));
        let mut waiting = Box::pin(pool.reserve(&roster, &request));
        assert!(poll_once(&mut waiting).is_none(), "{name}");
        event(&pool, &mut held);
        let result = poll_once(&mut waiting).expect(name);
        assert!(result.is_ok(), "{name}: {result:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_cooldown_that_begins_during_a_wait_ends_the_wait_at_its_end() {
    let (pool, held) = with_one_leased(2);
    limit(&pool, 1, Duration::from_secs(50));
    let end = async {
        sleep(Duration::from_secs(1)).await;
        // Its slot is free, and it is in cooldown for a second.
        limit(&pool, 0, Duration::from_secs(1));
        drop(held);
    };
    let ((span, result), ()) = tokio::join!(timed_reserve(&pool), end);
    assert_eq!(result, Ok(0));
    assert!((2_000..=2_002).contains(&span.as_millis()), "{span:?}");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_for_a_busy_key_does_not_hold_back_one_that_cannot_pay_with_it() {
    let (pool, _held) = with_one_leased(2);
    let roster = pool.roster();
    let half = Quota { count: 50, limit: Some(100), ..Quota::default() };
    pool.observe(&roster, &roster.keys()[0], figures(half, None), clock::now());
    pool.record(1, Verdict::WorkspaceQuota(Shortfall::default()), clock::now());
    let cheap = KeyRequest { client: ClientName::new("first"), ..speech(10, &[]) };
    let mut waiting = Box::pin(pool.reserve(&roster, &cheap));
    assert!(poll_once(&mut waiting).is_none());
    // The cooldown of the other key is not proven: one request may probe it.
    let began = clock::instant();
    let result = pool.reserve(&roster, &speech(80, &[])).await;
    assert_eq!(result.map(|reserved| reserved.lease.key().position()), Ok(1));
    assert!(clock::since(began) <= SETTINGS.probe_after + MAX_TIMER_DELAY, "{:?}", clock::since(began));
    assert!(poll_once(&mut waiting).is_none());
}

#[test]
fn a_probe_that_is_allowed_already_is_not_waited_for() {
    let (pool, _held) = with_one_leased(2);
    pool.record(1, Verdict::WorkspaceQuota(Shortfall::default()), clock::now());
    let now = clock::now().plus(SETTINGS.probe_after + Duration::from_secs(1));
    let blocked = pool.try_reserve(&pool.roster(), &speech(1, &[]), now).unwrap_err();
    assert_eq!(blocked.reason, Unavailable::Full { until: blocked.again_at });
    // The cooldown ends without an event later.
    assert!(blocked.again_at.is_some_and(|at| at > now), "{:?} at {now:?}", blocked.again_at);
}

#[tokio::test(start_paused = true)]
async fn a_restricted_key_that_is_only_busy_is_waited_for() {
    let (pool, held) = with_one_leased(1);
    let roster = pool.roster();
    for restraint in [Restraint::Inferred, Restraint::RefusedLongest, Restraint::Refused] {
        let request = KeyRequest { restricted: vec![(0, restraint)], ..speech(1, &[]) };
        let mut waiting = Box::pin(pool.reserve(&roster, &request));
        assert!(poll_once(&mut waiting).is_none(), "{restraint:?}");
    }
    let request = KeyRequest { restricted: vec![(0, Restraint::Refused)], ..speech(1, &[]) };
    let mut waiting = Box::pin(pool.reserve(&roster, &request));
    assert!(poll_once(&mut waiting).is_none());
    drop(held);
    assert!(poll_once(&mut waiting).is_some_and(|result| result.is_ok()));
}

// ---- Random histories.

/// Number of keys that exist; a reload configures some of them.
const KEYS: usize = 4;

/// Cooldowns that are short relative to the queue timeout, so that their ends are reached.
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

/// The needs of a request, by the numbers of keys.
#[derive(Clone, Debug)]
struct Needs {
    client: usize,
    credits: Option<u64>,
    group: Option<ConcurrencyGroup>,
    tried: Vec<usize>,
    ineligible: Vec<usize>,
    preferred: Vec<usize>,
    restricted: Vec<(usize, Restraint)>,
    allow_exhausted: bool,
    was_refused: bool,
}

#[derive(Clone, Copy, Debug)]
enum Figures {
    /// The remaining credits of 100, and the seconds until their reset.
    Left(u64, u64),
    /// Unlimited credits.
    Unlimited,
    Unreadable,
    Invalid,
}

#[derive(Clone, Debug)]
enum Step {
    Request(Needs),
    /// The client of a queued request disconnects.
    Leave(Index),
    /// A request in flight is served and charged this percentage of its estimate.
    Serve(Index, u64),
    /// A request in flight is refused.
    Refuse(Index, Verdict),
    /// A lease is dropped without a result, after the request was sent or before.
    Drop(Index, bool),
    /// The provider reports the limit of a lease's concurrency group.
    Limit(Index, u32),
    /// A lease releases its slot and keeps the key.
    ReleaseSlot(Index),
    Poll(Index, Figures, &'static str),
    /// The refusals of a key are withdrawn.
    Withdraw(Index),
    /// The configuration is reloaded with these keys.
    Reload(Vec<usize>),
    /// The provider reports a shared workspace for a key.
    Share(Index),
    Pass(Duration),
}

/// Printed one per line.
struct Steps(Vec<Step>);

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|step| write!(f, "\n    {}", format!("{step:?}").replace('\n', " ")))
    }
}

fn needs() -> impl Strategy<Value = Needs> {
    let groups = prop_oneof![4 => Just(Some(ConcurrencyGroup::SPEECH)), 1 => Just(Some(ConcurrencyGroup::EFFECTS)), 1 => Just(None)];
    let some_keys = |most| subsequence((0..KEYS).collect::<Vec<_>>(), 0..=most);
    let restraint = prop_oneof![
        Just(Restraint::Inferred),
        Just(Restraint::RefusedLongest),
        Just(Restraint::Refused),
        // In the past or in the future: virtual time begins at the present.
        Just(Restraint::Until(UnixMs(1))),
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
                (client, credits, group),
                (tried, ineligible),
                preferred,
                (restricted, needs_no_credits, refused),
            )| Needs {
                client,
                // A request that accounts without credits may serve costs none, and is in no concurrency
                // group.
                credits: if needs_no_credits { Some(0) } else { credits },
                group: group.filter(|_| !needs_no_credits),
                tried,
                ineligible,
                preferred,
                restricted: restricted.into_iter().enumerate().collect(),
                allow_exhausted: needs_no_credits,
                was_refused: refused,
            },
        )
}

fn verdict() -> impl Strategy<Value = Verdict> {
    let span = prop::option::of(prop_oneof![Just(1_u64), Just(3), Just(86_400)]);
    let figures =
        |remaining, required| Shortfall { remaining: Some(remaining), required: Some(required), quota: None };
    prop_oneof![
        span.prop_map(|span| Verdict::RateLimited(span.map(Duration::from_secs))),
        prop::option::of(1..3_u32).prop_map(|maximum| Verdict::Concurrency { maximum }),
        Just(Verdict::WorkspaceQuota(Shortfall::default())),
        (0..40_u64).prop_map(move |left| Verdict::WorkspaceQuota(figures(left, 50))),
        (0..40_u64).prop_map(move |left| Verdict::KeyQuota(figures(left, 50))),
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
    let figures = prop_oneof![
        4 => (0..=100_u64, prop_oneof![Just(2_u64), Just(8), Just(3_600)]).prop_map(|(left, s)| Figures::Left(left, s)),
        1 => Just(Figures::Unlimited),
        1 => Just(Figures::Unreadable),
        1 => Just(Figures::Invalid),
    ];
    let tier = prop_oneof![Just("free"), Just("creator"), Just("a plan of its own")];
    let spans = [1_u64, 40, 500, 1_000, 2_500, 11_000, 40_000];
    prop_oneof![
        10 => needs().prop_map(Step::Request),
        1 => at().prop_map(Step::Leave),
        3 => (at(), 0..=100_u64).prop_map(|(at, percent)| Step::Serve(at, percent)),
        4 => (at(), verdict()).prop_map(|(at, verdict)| Step::Refuse(at, verdict)),
        1 => (at(), any::<bool>()).prop_map(|(at, sent)| Step::Drop(at, sent)),
        2 => (at(), 1..3_u32).prop_map(|(at, slots)| Step::Limit(at, slots)),
        1 => at().prop_map(Step::ReleaseSlot),
        2 => (at(), figures, tier).prop_map(|(at, figures, tier)| Step::Poll(at, figures, tier)),
        1 => at().prop_map(Step::Withdraw),
        1 => subsequence((0..KEYS).collect::<Vec<_>>(), 1..=KEYS).prop_shuffle().prop_map(Step::Reload),
        1 => at().prop_map(Step::Share),
        5 => prop::sample::select(spans.to_vec()).prop_map(|ms| Step::Pass(Duration::from_millis(ms))),
    ]
}

impl Needs {
    /// The request with the positions of a roster.
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
        let in_future = |restraint: Restraint| match restraint {
            Restraint::Until(_) => Restraint::Until(clock::now().plus(Duration::from_secs(4))),
            other @ (Restraint::Inferred | Restraint::RefusedLongest | Restraint::Refused) => other,
        };
        let restricted = self
            .restricted
            .iter()
            .filter_map(|(number, restraint)| Some((position(number)?, in_future(*restraint))));
        let mut restricted: Vec<_> = restricted.collect();
        restricted.sort_unstable_by_key(|(position, _)| *position);
        let client = ClientName::new(["phone", "game", "reader"][self.client]);
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

/// The rounds of a selection: preferred keys before all, and restricted keys last.
fn rounds(request: &KeyRequest) -> Vec<SelectionRound> {
    let restraints = [Restraint::Inferred, Restraint::RefusedLongest, Restraint::Refused];
    let restraints = restraints.into_iter().take(if request.was_refused { 1 } else { 3 });
    let mut rounds = Vec::new();
    for max_restraint in std::iter::once(None).chain(restraints.map(Some)) {
        for is_preferred_only in [true, false] {
            for allow_exhausted in [false, true] {
                let may = (request.allow_exhausted || !allow_exhausted)
                    && (!is_preferred_only || !request.preferred.is_empty());
                rounds.extend(may.then_some(SelectionRound {
                    is_preferred_only,
                    allow_exhausted,
                    max_restraint,
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
    let turn = pool.turn.load(Ordering::Acquire);
    let keys = roster.keys().iter().enumerate();
    keys.map(|(position, key)| candidate(key, position, request, round, turn, now)).collect()
}

/// Whether a key could serve it, by examining each key without any shortcut.
fn could_be_served(pool: &Pool, roster: &Roster, request: &KeyRequest, now: UnixMs) -> bool {
    choice(pool, roster, request, now).is_some()
}

fn choice(pool: &Pool, roster: &Roster, request: &KeyRequest, now: UnixMs) -> Option<Choice> {
    let strategy = roster.settings().strategy;
    let (mut is_busy, mut max_restraint) = (false, None);
    for round in rounds(request) {
        if is_busy && round.max_restraint != max_restraint {
            return None;
        }
        max_restraint = round.max_restraint;
        match select(strategy, candidates(pool, roster, request, round, now).into_iter()) {
            Ok(choice) => return Some(choice),
            // The request waits for a key that is only busy, before it tries a more restricted one.
            Err(blocked) if matches!(blocked.reason, Unavailable::Full { .. }) => {
                is_busy = round.max_restraint != Some(Restraint::RefusedLongest);
            }
            Err(_) => {}
        }
    }
    None
}

/// Whether a key could serve it if its concurrency limit were not reached.
fn is_only_busy(pool: &Pool, roster: &Roster, request: &KeyRequest, now: UnixMs) -> bool {
    let is_busy = |key: &Candidate| {
        let is_usable =
            key.is_eligible && key.state == KeyState::Usable && key.affordability == Affordability::Enough;
        is_usable && key.concurrency == ConcurrencyState::Full { until: None }
    };
    rounds(request).into_iter().any(|round| candidates(pool, roster, request, round, now).iter().any(is_busy))
}

/// The maximum delay of a timer of the runtime: it counts whole milliseconds from its own beginning, as
/// our clock does from another, and a request that wakes too early checks again a millisecond later.
const MAX_TIMER_DELAY: Duration = Duration::from_millis(10);

struct QueuedRequest {
    task: Id,
    abort: AbortHandle,
    needs: Needs,
    /// The roster that it selects from, and its request for that roster.
    selection: Arc<Mutex<(Arc<Roster>, KeyRequest)>>,
}

struct Leased {
    lease: Lease,
    request: KeyRequest,
    roster: Arc<Roster>,
}

type Ended = Result<Leased, String>;

struct History {
    pool: Arc<Pool>,
    settings: Settings,
    tasks: JoinSet<Ended>,
    waiting: Vec<QueuedRequest>,
    leased: Vec<Leased>,
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

    fn request(&mut self, needs: Needs) {
        let pool = Arc::clone(&self.pool);
        let roster = pool.roster();
        let request = needs.request(&roster);
        let selection = Arc::new(Mutex::new((roster, request)));
        let (shared, cases_wanted) = (Arc::clone(&selection), needs.clone());
        let abort = self.tasks.spawn(async move {
            loop {
                let (roster, request) = shared.lock().unwrap().clone();
                let reason = match pool.reserve(&roster, &request).await {
                    Ok(Reserved { lease, .. }) => return Ok(Leased { lease, request, roster }),
                    Err(reason) => reason,
                };
                let now = clock::now();
                let before =
                    UnixMs(now.0.saturating_sub(u64::try_from(MAX_TIMER_DELAY.as_millis()).unwrap()));
                if reason == Unavailable::Outdated {
                    let roster = pool.roster();
                    let request = cases_wanted.request(&roster);
                    *shared.lock().unwrap() = (roster, request);
                } else if [now, before].iter().all(|at| could_be_served(&pool, &roster, &request, *at)) {
                    return Err(format!(
                        "{cases_wanted:?} was refused ({reason}) although a key could serve it"
                    ));
                } else if !matches!(reason, Unavailable::Full { .. })
                    && is_only_busy(&pool, &roster, &request, now)
                {
                    return Err(format!(
                        "{cases_wanted:?} was refused ({reason}) although a key was only busy"
                    ));
                } else {
                    return Err(String::new());
                }
            }
        });
        self.waiting.push(QueuedRequest { task: abort.id(), abort, needs, selection });
    }

    /// Runs all tasks until each of them waits for an event.
    async fn settle(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..30 {
            tokio::task::yield_now().await;
        }
        while let Some(ended) = self.tasks.try_join_next_with_id() {
            let (task, ended) = match ended {
                Ok((task, ended)) => (task, Some(ended)),
                // Its client has disconnected.
                Err(error) => (error.id(), None),
            };
            self.waiting.retain(|waiting| waiting.task != task);
            match ended {
                Some(Ok(leased)) => self.leased.push(leased),
                Some(Err(fault)) => prop_assert_eq!(fault, ""),
                None => {}
            }
        }
        Ok(())
    }

    fn servable_waiter(&self) -> Option<(Id, &Needs)> {
        let now = clock::now();
        let is_servable = |waiting: &&QueuedRequest| {
            let (roster, request) = waiting.selection.lock().unwrap().clone();
            could_be_served(&self.pool, &roster, &request, now)
        };
        self.waiting.iter().find(is_servable).map(|waiting| (waiting.task, &waiting.needs))
    }

    /// No request is queued while a key could serve it, beyond the delay of a timer.
    async fn check(&mut self) -> Result<(), TestCaseError> {
        let Some((suspect, _)) = self.servable_waiter() else { return Ok(()) };
        sleep(MAX_TIMER_DELAY).await;
        self.settle().await?;
        if let Some((task, needs)) = self.servable_waiter()
            && task == suspect
        {
            let waiting = self.waiting.iter().find(|waiting| waiting.task == task);
            let (roster, request) = waiting.unwrap().selection.lock().unwrap().clone();
            let choice = choice(&self.pool, &roster, &request, clock::now());
            prop_assert!(false, "{needs:?} waits although {choice:?} could serve it");
        }
        Ok(())
    }

    fn pick<T>(list: &mut Vec<T>, at: Index) -> Option<T> {
        (!list.is_empty()).then(|| list.swap_remove(at.index(list.len())))
    }

    async fn apply(&mut self, step: Step) {
        let now = clock::now();
        let roster = self.pool.roster();
        let key_at = |at: Index| Arc::clone(&roster.keys()[at.index(roster.keys().len())]);
        match step {
            Step::Request(needs) => self.request(needs),
            Step::Leave(at) => {
                if !self.waiting.is_empty() {
                    self.waiting[at.index(self.waiting.len())].abort.abort();
                }
            }
            Step::Serve(at, percent) => {
                let Some(mut leased) = Self::pick(&mut self.leased, at) else { return };
                leased.lease.begin();
                let served = Served {
                    request: Some(&leased.request),
                    began_at: leased.lease.since(),
                    is_charged: true,
                };
                self.pool.record_service(&leased.roster, leased.lease.key(), served, now);
                let credits = leased.lease.reserved() * percent / 100;
                self.pool.settle(&leased.roster, &mut leased.lease, credits, now);
            }
            Step::Refuse(at, verdict) => {
                let Some(mut leased) = Self::pick(&mut self.leased, at) else { return };
                leased.lease.begin();
                record_verdict(
                    &self.pool,
                    &leased.roster,
                    leased.lease.key(),
                    verdict,
                    Some(&leased.request),
                    now,
                );
                self.pool.settle(&leased.roster, &mut leased.lease, 0, now);
            }
            Step::Drop(at, is_sent) => {
                let Some(mut leased) = Self::pick(&mut self.leased, at) else { return };
                if is_sent {
                    leased.lease.begin();
                }
            }
            Step::Limit(at, slots) => {
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
            Step::Poll(at, figures, tier) => {
                let quota = |left, seconds| Quota {
                    count: 100 - left,
                    limit: Some(100),
                    extension: Extension::None,
                    resets_at: Some(now.plus(Duration::from_secs(seconds))),
                };
                let of = |quota| Observation::Quota {
                    quota,
                    tier: Some(tier.to_owned()),
                    is_paid: Some(true),
                    capabilities: Capabilities::default(),
                };
                let observation = match figures {
                    Figures::Left(left, seconds) => of(quota(left, seconds)),
                    Figures::Unlimited => of(Quota::default()),
                    Figures::Unreadable => Observation::Unreadable,
                    Figures::Invalid => invalid(),
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
            Step::Share(at) => {
                self.pool.record_workspace(&key_at(at), "ws_shared");
                self.rosters.push(self.pool.roster());
            }
            Step::Pass(span) => sleep(span).await,
        }
    }

    async fn run(mut self, steps: Vec<Step>) -> Result<(), TestCaseError> {
        for step in steps {
            self.apply(step).await;
            self.settle().await?;
            self.check().await?;
        }
        // Every wait ends, also without an event.
        sleep(self.settings.queue_timeout + MAX_TIMER_DELAY).await;
        self.settle().await?;
        prop_assert!(self.waiting.is_empty(), "{:?} waits for ever", self.waiting[0].needs);
        self.leased.clear();
        prop_assert_eq!(self.pool.waiting(), 0);
        for key in self.rosters.iter().flat_map(|roster| roster.keys()) {
            let workspace = key.workspace();
            let held = (key.in_flight(), workspace.in_flight(), workspace.reserved());
            prop_assert_eq!(held, (0, 0, 0), "{:?}", key);
            for group in ConcurrencyGroup::all() {
                prop_assert_eq!(workspace.running(group).0, 0, "{:?}", key);
            }
        }
        Ok(())
    }
}

/// The same 100 histories in every run of the tests; `KEYCHOIR_HISTORIES=5000` runs that many random ones.
fn histories() -> ProptestConfig {
    let cases_wanted = std::env::var("KEYCHOIR_HISTORIES").ok().and_then(|text| text.parse().ok());
    let rng_seed = if cases_wanted.is_some() { RngSeed::Random } else { RngSeed::Fixed(20_261_129) };
    let cases = cases_wanted.unwrap_or(100);
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
