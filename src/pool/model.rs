//! Checks the invariants of the pool and of its cells with loom, which runs each test under every interleaving of its
//! threads, up to a maximum number of preemptions. `make test-model` runs these tests.

use std::sync::Arc;
use std::time::Duration;

use loom::thread;

use super::cells::{
    ConcurrencyLimiter, EvaluationInputs, FinishedReservation, ProbeCell, QuotaCell, ReportedDecrease,
    ReportedRemaining, StateChangeCache,
};
use super::sync::Ordering;
use super::*;
use crate::policy::client::ClientName;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::RefusalSource;
use crate::policy::select::Unavailable;
use crate::policy::verdict::Verdict;
use crate::secret::ApiKey;

const NOW: UnixMs = UnixMs(1_000);
const RESET: UnixMs = UnixMs(2_000);

/// Runs `check` under every interleaving with at most `max_preemptions` preemptions. Without a bound, the
/// search takes hours.
fn check_interleavings_with(max_preemptions: usize, check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(max_preemptions);
    builder.check(check);
}

fn check_interleavings(check: impl Fn() + Sync + Send + 'static) {
    check_interleavings_with(3, check);
}

/// Runs both closures concurrently, `first` in a new thread.
fn run_concurrently<A: 'static, B>(
    first: impl FnOnce() -> A + 'static,
    second: impl FnOnce() -> B,
) -> (A, B) {
    let thread = thread::spawn(first);
    let second_result = second();
    (thread.join().unwrap(), second_result)
}

fn quota_cell(count: u64, limit: u64) -> Arc<QuotaCell> {
    let cell = QuotaCell::default();
    let quota = Quota { count, limit: Some(limit), resets_at: Some(RESET), ..Quota::default() };
    cell.restore(quota, UnixMs(0));
    Arc::new(cell)
}

/// Reserves `reserved` credits and, if that succeeds, charges `spent` credits.
fn reserve_and_charge(cell: &QuotaCell, reserved: u64, spent: u64, now: UnixMs) {
    if cell.reserve(reserved, Some(0)) {
        cell.finish_reservation(FinishedReservation { reserved, spent }, now);
    }
}

#[test]
fn the_last_credits_go_to_one_request() {
    check_interleavings(|| {
        let cell = quota_cell(90, 100);
        let other = Arc::clone(&cell);
        let (first, second) =
            run_concurrently(move || other.reserve(6, Some(0)), || cell.reserve(6, Some(0)));
        assert!(first != second, "exactly one thread must succeed: {first}, {second}");
        assert_eq!((cell.load(NOW).count, cell.reserved()), (90, 6));
    });
}

#[test]
fn only_one_request_overcommits_at_a_time() {
    check_interleavings(|| {
        let cell = quota_cell(98, 100);
        let other = Arc::clone(&cell);
        let (first, second) = run_concurrently(move || other.overcommit(6), || cell.overcommit(6));
        assert!(!(first && second), "at most one request must overcommit");
    });
}

#[test]
fn spent_credits_are_counted_once() {
    check_interleavings(|| {
        let cell = quota_cell(0, 100);
        let other = Arc::clone(&cell);
        run_concurrently(
            move || reserve_and_charge(&other, 6, 5, NOW),
            || reserve_and_charge(&cell, 9, 9, NOW),
        );
        assert_eq!((cell.load(NOW).count, cell.reserved()), (14, 0));
    });
}

#[test]
fn a_reader_never_sees_more_credits_than_were_spent() {
    check_interleavings(|| {
        let cell = quota_cell(0, 10);
        let other = Arc::clone(&cell);
        let (_, count) =
            run_concurrently(move || reserve_and_charge(&other, 10, 4, NOW), || cell.load(NOW).count);
        assert!(count == 0 || count == 4, "the count must not include reserved credits: {count}");
    });
}

#[test]
fn a_period_ends_once_while_requests_are_in_flight() {
    check_interleavings(|| {
        let cell = quota_cell(50, 100);
        assert!(cell.reserve(6, Some(0)));
        let other = Arc::clone(&cell);
        run_concurrently(
            move || {
                other.load(RESET);
                other.finish_reservation(FinishedReservation { reserved: 6, spent: 6 }, RESET);
            },
            || cell.load(RESET),
        );
        let count = cell.load(RESET).count;
        assert!(
            count == 6 || count == 0,
            "the request must be charged in the new period or in the period before: {count}"
        );
        assert!(
            cell.reserved() == 0 && cell.fits(100 - count, 0) && !cell.fits(101 - count, 0),
            "exactly the unspent credits must be available"
        );
    });
}

#[test]
fn a_poll_is_applied_while_a_request_is_charged() {
    check_interleavings(|| {
        let cell = quota_cell(50, 100);
        assert!(cell.reserve(6, Some(0)));
        let other = Arc::clone(&cell);
        let polled = Quota { count: 70, limit: Some(100), resets_at: Some(RESET), ..Quota::default() };
        run_concurrently(
            move || other.finish_reservation(FinishedReservation { reserved: 6, spent: 4 }, NOW),
            || cell.apply_poll(polled, NOW, Duration::from_secs(1)),
        );
        let count = cell.load(NOW).count;
        assert!(
            count == 70 || count == 74,
            "the poll must be applied before or after the charge, not during it: {count}"
        );
        assert_eq!(cell.reserved(), 0);
    });
}

#[test]
fn reported_remaining_credits_are_subtracted_once() {
    check_interleavings(|| {
        let cell = Arc::new(ReportedRemaining::default());
        cell.report(10, RESET, NOW);
        let other = Arc::clone(&cell);
        let (first, second) = run_concurrently(move || other.decrease(6, NOW), || cell.decrease(6, NOW));
        assert_eq!(
            [first, second].iter().filter(|decrease| **decrease == ReportedDecrease::Subtracted).count(),
            1
        );
        assert_eq!(cell.credits(NOW), Some(4));
    });
}

#[test]
fn a_concurrency_group_never_exceeds_its_maximum() {
    check_interleavings(|| {
        let cell = Arc::new(ConcurrencyLimiter::default());
        cell.set_reported_max(1);
        let other = Arc::clone(&cell);
        let run = |cell: &ConcurrencyLimiter| {
            let is_acquired = cell.try_acquire();
            assert!(cell.running() <= 1, "at most one request must run");
            if is_acquired {
                cell.release();
            }
        };
        run_concurrently(move || run(&other), || run(&cell));
        assert_eq!(cell.running(), 0);
    });
}

#[test]
fn a_probe_is_claimed_by_one_request() {
    check_interleavings(|| {
        let cell = Arc::new(ProbeCell::default());
        cell.schedule(Some(Duration::ZERO), NOW);
        let other = Arc::clone(&cell);
        let pause = Duration::from_millis(100);
        let (first, second) = run_concurrently(move || other.claim(pause, NOW), || cell.claim(pause, NOW));
        assert!(first != second, "exactly one thread must succeed: {first}, {second}");
    });
}

#[test]
fn an_evaluation_during_a_change_is_not_stored() {
    check_interleavings(|| {
        // The word stands for the state of a key, from which the cached time is computed.
        let (cell, key_word) = (Arc::new(StateChangeCache::default()), Arc::new(AtomicU64::new(0)));
        let inputs = EvaluationInputs { roster_generation: 1, is_exhausted: false, is_near_limit: false };
        let (other, changed_word) = (Arc::clone(&cell), Arc::clone(&key_word));
        let (_, evaluated) = run_concurrently(
            move || {
                changed_word.store(1, Ordering::Release);
                other.invalidate();
            },
            || {
                let start = cell.start_evaluation();
                let evaluated = key_word.load(Ordering::Acquire);
                cell.store(start, inputs, RESET);
                evaluated
            },
        );
        assert!(evaluated == 1 || !cell.is_current(inputs, NOW), "the cache must not hide a change");
    });
}

/// Returns a pool of one key with `slots` concurrent speech requests.
fn pool_with_slots(slots: u32) -> Arc<Pool> {
    let key = ApiKey::new("sk_0000_of_the_pool_0").unwrap();
    let settings = Settings { queue_timeout: Duration::from_secs(60), max_queued: 9, ..Settings::FOR_TESTS };
    let pool = Pool::new(vec![key.into()], settings);
    pool.roster().keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(slots);
    Arc::new(pool)
}

fn speech_request() -> KeyRequest {
    KeyRequest::new(ClientName::new("app"), Some(5), Some(ConcurrencyGroup::SPEECH))
}

fn refused_attempt(verdict: Verdict) -> RefusedAttempt<'static> {
    RefusedAttempt { verdict, request: None, is_repeated_elsewhere: false, source: RefusalSource::default() }
}

/// Asserts that the key has no lease, no reserved credits and no running request.
fn assert_idle(pool: &Pool) {
    let roster = pool.roster();
    let key = &roster.keys()[0];
    assert_eq!((key.in_flight(), key.workspace().in_flight(), key.workspace().reserved()), (0, 0, 0));
    assert_eq!(key.workspace().concurrency(ConcurrencyGroup::SPEECH).0, 0);
}

#[test]
fn a_lease_ends_once_while_a_cooldown_of_its_key_begins() {
    check_interleavings_with(1, || {
        let pool = pool_with_slots(9);
        let other = Arc::clone(&pool);
        run_concurrently(
            move || {
                let roster = other.roster();
                drop(other.try_reserve(&roster, &speech_request(), NOW));
            },
            || {
                let roster = pool.roster();
                pool.record_refusal(&roster, &roster.keys()[0], refused_attempt(Verdict::Billing), NOW);
                assert!(
                    pool.try_reserve(&roster, &speech_request(), NOW).is_err(),
                    "a key in cooldown must not be selected"
                );
            },
        );
        assert_idle(&pool);
    });
}

#[test]
fn a_key_that_is_polled_immediately_does_not_stay_in_cooldown() {
    check_interleavings(|| {
        let pool = pool_with_slots(9);
        let other = Arc::clone(&pool);
        let roster = pool.roster();
        let key = &roster.keys()[0];
        run_concurrently(
            move || {
                let roster = other.roster();
                let key = &roster.keys()[0];
                if key.is_poll_requested() {
                    other.observe(&roster, key, Observation::Unreadable, NOW);
                }
            },
            || pool.record_refusal(&roster, key, refused_attempt(Verdict::InvalidKey), NOW),
        );
        assert_eq!(
            key.is_poll_requested(),
            key.cooldown().is_some(),
            "a poll must be able to end the cooldown of the key"
        );
    });
}

#[test]
fn a_slot_that_is_released_during_queuing_serves_the_waiter() {
    check_interleavings_with(2, || {
        let pool = pool_with_slots(1);
        let roster = pool.roster();
        let lease = pool.try_reserve(&roster, &speech_request(), NOW).unwrap();
        let other = Arc::clone(&pool);
        let releasing = thread::spawn(move || {
            drop(lease);
            drop(other);
        });
        let (waiter, mut receiver) = pool.queue.enqueue(&roster, &speech_request(), 9).unwrap();
        pool.dispatch_waiters(NOW);
        releasing.join().unwrap();
        let result = receiver.try_recv().expect("the waiters must be dispatched");
        assert!(
            !matches!(result, Err(Unavailable::Full { .. })),
            "the waiter must get the released slot: {result:?}"
        );
        drop(waiter);
        drop(result);
        assert_idle(&pool);
    });
}
