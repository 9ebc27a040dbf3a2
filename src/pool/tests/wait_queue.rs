//! Tests the wait queue: its order, its bounds, and the events that end the wait of a request.

use tokio::time::sleep;

use super::*;
use crate::clock;

/// Returns a pool of three keys, each with a workspace of `slots` concurrent requests.
fn pool_with_slots(slots: u32) -> Arc<Pool> {
    let pool = separate_keys(3);
    for key in pool.roster().keys() {
        key.workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(slots);
    }
    pool
}

#[tokio::test]
async fn the_sixteenth_request_for_fifteen_slots_waits() {
    let pool = pool_with_slots(5);
    let roster = pool.roster();
    let mut leases = Vec::new();
    for _ in 0..15 {
        leases.push(pool.reserve(&roster, &speech_request(1, &[])).await.unwrap().lease);
    }
    for key in roster.keys() {
        assert_eq!(key.workspace().concurrency(ConcurrencyGroup::SPEECH), (5, Some(5)));
    }
    let request = speech_request(1, &[]);
    let mut waiting = Box::pin(pool.reserve(&roster, &request));
    assert!(poll_once(&mut waiting).is_none());
    assert_eq!(pool.queued_requests(), 1);
    // Another concurrency group has its own slots.
    let fast = KeyRequest { group: Some(ConcurrencyGroup::FAST_SPEECH), ..speech_request(1, &[]) };
    assert_eq!(pool.reserve(&roster, &fast).await.unwrap().lease.key().position(), 0);
    leases.remove(7);
    assert_eq!(waiting.await.unwrap().lease.key().position(), 1);
    assert_eq!(pool.queued_requests(), 0);
}

#[tokio::test]
async fn clients_take_turns_and_each_keeps_its_order() {
    let pool = pool_with_slots(1);
    let roster = pool.roster();
    let leases: Vec<Lease> =
        (0..3).map(|_| pool.try_reserve(&roster, &speech_request(1, &[]), NOW).unwrap().lease).collect();
    let order: Arc<Mutex<Vec<&str>>> = Arc::default();
    let mut waiting = Vec::new();
    for name in ["a1", "a2", "a3", "b1", "c1"] {
        let (pool, roster, order) = (Arc::clone(&pool), Arc::clone(&roster), Arc::clone(&order));
        let mut future = Box::pin(async move {
            let request = KeyRequest { client: ClientName::new(&name[..1]), ..speech_request(1, &[]) };
            let reserved = pool.reserve(&roster, &request).await.unwrap();
            order.lock().unwrap().push(name);
            reserved.lease
        });
        assert!(poll_once(&mut future).is_none());
        waiting.push(future);
    }
    assert_eq!(pool.queued_requests(), 5);
    // The slots are released one after the other. The test keeps each new lease, so that it occupies its slot.
    let mut new_leases = Vec::new();
    for lease in leases {
        drop(lease);
        let served =
            waiting.iter_mut().enumerate().find_map(|(index, future)| Some((index, poll_once(future)?)));
        let (index, new_lease) = served.expect("a queued request must get the released slot");
        drop(waiting.remove(index));
        new_leases.push(new_lease);
    }
    assert_eq!(*order.lock().unwrap(), ["a1", "b1", "c1"]);
    drop(new_leases.remove(0));
    assert!(waiting.iter_mut().any(|future| poll_once(future).is_some()));
    assert_eq!(order.lock().unwrap()[3], "a2");
}

#[tokio::test]
async fn a_request_does_not_wait_for_a_key_that_a_reload_has_added() {
    let pool = Arc::new(Pool::new(vec![entry(0, None, None)], SETTINGS));
    let old_roster = pool.roster();
    old_roster.keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
    let _lease = pool.try_reserve(&old_roster, &speech_request(1, &[]), NOW).unwrap();
    let request = speech_request(1, &[]);
    let mut queued = Box::pin(pool.reserve(&old_roster, &request));
    assert!(poll_once(&mut queued).is_none());
    pool.reload(vec![entry(0, None, None), entry(1, None, None)], SETTINGS);
    let new_roster = pool.roster();
    let result = poll_once(&mut Box::pin(pool.reserve(&new_roster, &request)))
        .expect("the request must not queue behind requests of the previous roster");
    assert_eq!(result.unwrap().lease.key().position(), 1);
    // The queued request must select again among the new keys.
    assert_eq!(queued.await.unwrap_err(), Unavailable::Outdated);
}

#[tokio::test]
async fn a_cancelled_request_leaves_the_queue() {
    let pool = pool_with_slots(1);
    let roster = pool.roster();
    let mut leases: Vec<Lease> =
        (0..3).map(|_| pool.try_reserve(&roster, &speech_request(1, &[]), NOW).unwrap().lease).collect();
    let request = speech_request(1, &[]);
    let mut cancelled = Box::pin(pool.reserve(&roster, &request));
    assert!(poll_once(&mut cancelled).is_none());
    let mut waiting = Box::pin(pool.reserve(&roster, &request));
    assert!(poll_once(&mut waiting).is_none());
    // The key is assigned to a request that is then cancelled, so the next request gets the key.
    leases.pop();
    drop(cancelled);
    assert!(waiting.await.is_ok());
    assert_eq!(pool.queued_requests(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_queued_request_times_out() {
    let pool = pool_with_slots(1);
    let roster = pool.roster();
    let _leases: Vec<Lease> =
        (0..3).map(|_| pool.try_reserve(&roster, &speech_request(1, &[]), NOW).unwrap().lease).collect();
    let result = pool.reserve(&roster, &speech_request(1, &[])).await;
    assert_eq!(result.unwrap_err(), Unavailable::Full { until: None });
    assert_eq!(pool.queued_requests(), 0);
}

#[tokio::test]
async fn a_full_queue_refuses_a_request() {
    let pool = Arc::new(Pool::new(vec![entry(0, None, None)], Settings { max_queued: 1, ..SETTINGS }));
    let roster = pool.roster();
    roster.keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
    let _lease = pool.try_reserve(&roster, &speech_request(1, &[]), NOW).unwrap();
    let request = speech_request(1, &[]);
    let mut first = Box::pin(pool.reserve(&roster, &request));
    assert!(poll_once(&mut first).is_none());
    assert_eq!(pool.reserve(&roster, &request).await.unwrap_err(), Unavailable::Full { until: None });
}

/// Returns a pool of `count` keys with one slot for speech each, and a lease that holds the slot of the first key.
fn pool_with_leased_key(count: usize) -> (Arc<Pool>, Lease) {
    let pool = separate_keys(count);
    for key in pool.roster().keys() {
        key.workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
    }
    let lease = pool.try_reserve(&pool.roster(), &speech_request(1, &[]), clock::now()).unwrap().lease;
    assert_eq!(lease.key().position(), 0);
    (pool, lease)
}

/// Rate limits the key at `position` for `duration`.
fn rate_limit(pool: &Arc<Pool>, position: usize, duration: Duration) {
    pool.record_verdict(position, Verdict::RateLimited(Some(duration)), clock::now());
}

/// Reserves a key for a request with the estimated cost `credits`. Returns the virtual time that the reservation takes,
/// and the position of the key.
async fn measure_reservation(pool: &Arc<Pool>, credits: u64) -> (Duration, Result<usize, Unavailable>) {
    let started_at = clock::instant();
    let result = pool.reserve(&pool.roster(), &speech_request(credits, &[])).await;
    (clock::elapsed_since(started_at), result.map(|reserved| reserved.lease.key().position()))
}

/// Checks that a request waited until `expected`, with the delay of a timer.
#[track_caller]
fn check_wait(waited: Duration, expected: Duration) {
    let delay = waited.checked_sub(expected);
    assert!(
        delay.is_some_and(|delay| delay.as_millis() <= 2),
        "the request must wait for {expected:?}, not for {waited:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_cooldown_that_ends_before_a_slot_is_free_ends_the_wait() {
    let (pool, _lease) = pool_with_leased_key(2);
    rate_limit(&pool, 1, Duration::from_millis(100));
    let (waited, result) = measure_reservation(&pool, 1).await;
    assert_eq!(result, Ok(1));
    check_wait(waited, Duration::from_millis(100));
}

#[tokio::test(start_paused = true)]
async fn credits_that_are_reset_before_a_slot_is_free_end_the_wait() {
    let (pool, _lease) = pool_with_leased_key(2);
    let roster = pool.roster();
    let resets_at = Some(clock::now().plus(Duration::from_secs(3)));
    let spent = Quota { count: 100, limit: Some(100), extension: Extension::None, resets_at };
    pool.observe(&roster, &roster.keys()[1], quota_observation(spent, Some(true)), clock::now());
    let (waited, result) = measure_reservation(&pool, 1).await;
    assert_eq!(result, Ok(1));
    check_wait(waited, Duration::from_secs(3));
}

#[tokio::test(start_paused = true)]
async fn too_few_credits_that_are_reset_before_a_slot_is_free_end_the_wait() {
    let (pool, _lease) = pool_with_leased_key(2);
    let roster = pool.roster();
    let resets_at = Some(clock::now().plus(Duration::from_secs(3)));
    let short = Quota { count: 95, limit: Some(100), extension: Extension::None, resets_at };
    pool.observe(&roster, &roster.keys()[1], quota_observation(short, Some(true)), clock::now());
    let (waited, result) = measure_reservation(&pool, 20).await;
    assert_eq!(result, Ok(1));
    check_wait(waited, Duration::from_secs(3));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_lease_dispatches_the_queue_at_the_current_time() {
    let (pool, lease) = pool_with_leased_key(1);
    pool.record_verdict(0, Verdict::Concurrency { maximum: Some(1) }, clock::now());
    sleep(Duration::from_secs(100)).await;
    let (roster, request) = (pool.roster(), speech_request(1, &[]));
    let mut waiting = Box::pin(pool.reserve(&roster, &request));
    assert!(poll_once(&mut waiting).is_none());
    sleep(Duration::from_secs(30)).await;
    // The cooldown has ended since the request was queued.
    drop(lease);
    let result = poll_once(&mut waiting).expect("the release must dispatch the queue at the current time");
    assert_eq!(result.unwrap().lease.key().position(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_event_that_makes_a_key_usable_dispatches_the_queue() {
    type Event = fn(&Arc<Pool>, &mut Lease);
    let events: [(&str, Event); 4] = [
        ("a poll that reports credits", |pool, _| {
            let roster = pool.roster();
            let quota = Quota { count: 0, limit: Some(100), ..Quota::default() };
            pool.observe(&roster, &roster.keys()[1], quota_observation(quota, Some(true)), clock::now());
        }),
        ("a served request that refutes the refusal", |pool, _| {
            pool.record_verdict(1, Verdict::Served, clock::now());
        }),
        ("a refusal that is withdrawn", |pool, _| {
            let roster = pool.roster();
            let source = &roster.keys()[1].workspace().evidence()[0].source;
            pool.withdraw_refusal(&roster, &roster.keys()[1], source, clock::now());
        }),
        ("a raised limit", |_, lease| lease.record_concurrency_limit(2)),
    ];
    for (name, event) in events {
        let (pool, mut lease) = pool_with_leased_key(2);
        pool.record_verdict(1, Verdict::WorkspaceQuota(Shortfall::default()), clock::now());
        let (roster, request) = (pool.roster(), speech_request(1, &[]));
        let mut waiting = Box::pin(pool.reserve(&roster, &request));
        assert!(poll_once(&mut waiting).is_none(), "the request must be queued before {name}");
        event(&pool, &mut lease);
        let result = poll_once(&mut waiting);
        assert!(matches!(result, Some(Ok(_))), "{name} must dispatch the request: {result:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_cooldown_that_begins_during_a_wait_ends_the_wait() {
    let (pool, lease) = pool_with_leased_key(2);
    rate_limit(&pool, 1, Duration::from_secs(50));
    let start_cooldown = async {
        sleep(Duration::from_secs(1)).await;
        // The slot of the first key is released during a cooldown of one second.
        rate_limit(&pool, 0, Duration::from_secs(1));
        drop(lease);
    };
    let ((waited, result), ()) = tokio::join!(measure_reservation(&pool, 1), start_cooldown);
    assert_eq!(result, Ok(0));
    check_wait(waited, Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_for_a_busy_key_does_not_block_a_request_that_cannot_use_it() {
    let (pool, _lease) = pool_with_leased_key(2);
    let roster = pool.roster();
    let half_spent = Quota { count: 50, limit: Some(100), ..Quota::default() };
    pool.observe(&roster, &roster.keys()[0], quota_observation(half_spent, None), clock::now());
    pool.record_verdict(1, Verdict::WorkspaceQuota(Shortfall::default()), clock::now());
    let cheap = KeyRequest { client: ClientName::new("first"), ..speech_request(10, &[]) };
    let mut waiting = Box::pin(pool.reserve(&roster, &cheap));
    assert!(poll_once(&mut waiting).is_none());
    // The cooldown of the other key is unproven, so one request may probe it.
    let (waited, result) = measure_reservation(&pool, 80).await;
    assert_eq!(result, Ok(1));
    assert!(
        waited <= SETTINGS.probe_after + MAX_TIMER_DELAY,
        "the request must wait only for the probe, not for {waited:?}"
    );
    assert!(poll_once(&mut waiting).is_none());
}

#[test]
fn a_request_does_not_wait_for_a_probe_that_is_already_due() {
    let (pool, _lease) = pool_with_leased_key(2);
    pool.record_verdict(1, Verdict::WorkspaceQuota(Shortfall::default()), clock::now());
    let now = clock::now().plus(SETTINGS.probe_after + Duration::from_secs(1));
    let blocked = pool.try_reserve(&pool.roster(), &speech_request(1, &[]), now).unwrap_err();
    assert_eq!(blocked.reason, Unavailable::Full { until: blocked.retry_at });
    assert!(
        blocked.retry_at.is_some_and(|at| at > now),
        "the request must wait for the end of the cooldown, not for the due probe: {:?} at {now:?}",
        blocked.retry_at
    );
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_for_a_restricted_key_that_is_only_busy() {
    let (pool, lease) = pool_with_leased_key(1);
    let roster = pool.roster();
    for level in [RestrictionLevel::Inferred, RestrictionLevel::RefusedLongest, RestrictionLevel::Refused] {
        let request = KeyRequest { restricted: vec![(0, level)], ..speech_request(1, &[]) };
        let mut waiting = Box::pin(pool.reserve(&roster, &request));
        assert!(poll_once(&mut waiting).is_none(), "a request must wait for a key with the level {level:?}");
    }
    let request = KeyRequest { restricted: vec![(0, RestrictionLevel::Refused)], ..speech_request(1, &[]) };
    let mut waiting = Box::pin(pool.reserve(&roster, &request));
    assert!(poll_once(&mut waiting).is_none());
    drop(lease);
    assert!(poll_once(&mut waiting).is_some_and(|result| result.is_ok()));
}
