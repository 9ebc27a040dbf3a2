//! Model tests of the pool's state under every interleaving of threads: `make test-model`.

use std::sync::Arc;
use std::time::Duration;

use loom::thread;

use super::cells::{
    ConcurrencyLimiter, NextChange, ProbeCell, QuotaCell, ReportedDecrease, ReportedRemaining,
    SettledReservation, StateChangeCache,
};
use super::sync::Ordering;
use super::*;
use crate::policy::client::ClientName;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::select::Unavailable;
use crate::policy::verdict::Verdict;
use crate::secret::ApiKey;

const NOW: UnixMs = UnixMs(1_000);
const RESET: UnixMs = UnixMs(2_000);

/// Runs `check` under every interleaving, with at most `max_preemptions` preemptions: without a bound the
/// search takes hours.
fn model_with(max_preemptions: usize, check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(max_preemptions);
    builder.check(check);
}

fn model(check: impl Fn() + Sync + Send + 'static) {
    model_with(3, check);
}

/// Runs both closures concurrently.
fn both<A, B>(one: impl FnOnce() -> A + 'static, other: impl FnOnce() -> B) -> (A, B)
where
    A: 'static,
{
    let one = thread::spawn(one);
    let other = other();
    (one.join().unwrap(), other)
}

fn quota_cell(count: u64, limit: u64) -> Arc<QuotaCell> {
    let cell = QuotaCell::default();
    let quota = Quota { count, limit: Some(limit), resets_at: Some(RESET), ..Quota::default() };
    cell.restore(quota, UnixMs(0));
    Arc::new(cell)
}

fn spend(cell: &QuotaCell, reserved: u64, spent: u64, now: UnixMs) -> bool {
    let has = cell.reserve(reserved, Some(0));
    if has {
        cell.settle(SettledReservation { reserved, spent }, now);
    }
    has
}

#[test]
fn the_last_credits_go_to_one_request() {
    model(|| {
        let cell = quota_cell(90, 100);
        let other = Arc::clone(&cell);
        let (one, two) = both(move || other.reserve(6, Some(0)), || cell.reserve(6, Some(0)));
        assert!(one != two, "{one} {two}");
        assert_eq!((cell.load(NOW).count, cell.reserved()), (90, 6));
    });
}

#[test]
fn only_one_request_overcommits_at_a_time() {
    model(|| {
        let cell = quota_cell(98, 100);
        let other = Arc::clone(&cell);
        let (one, two) = both(move || other.overcommit(6), || cell.overcommit(6));
        assert!(!(one && two));
    });
}

#[test]
fn spent_credits_are_counted_once() {
    model(|| {
        let cell = quota_cell(0, 100);
        let other = Arc::clone(&cell);
        both(move || spend(&other, 6, 5, NOW), || spend(&cell, 9, 9, NOW));
        assert_eq!((cell.load(NOW).count, cell.reserved()), (14, 0));
    });
}

#[test]
fn a_reader_never_sees_more_credits_than_were_spent() {
    model(|| {
        let cell = quota_cell(0, 10);
        let other = Arc::clone(&cell);
        let (_, seen) = both(move || spend(&other, 10, 4, NOW), || cell.load(NOW).count);
        assert!(seen == 0 || seen == 4, "{seen}: the key would look exhausted");
    });
}

#[test]
fn a_period_ends_once_while_requests_are_under_way() {
    model(|| {
        let cell = quota_cell(50, 100);
        assert!(cell.reserve(6, Some(0)));
        let other = Arc::clone(&cell);
        both(
            move || {
                other.load(RESET);
                other.settle(SettledReservation { reserved: 6, spent: 6 }, RESET);
            },
            || cell.load(RESET),
        );
        let count = cell.load(RESET).count;
        assert!(count == 6 || count == 0, "{count}: in the new period, or just before its end");
        assert!(cell.reserved() == 0 && cell.fits(100 - count, 0) && !cell.fits(101 - count, 0));
    });
}

#[test]
fn figures_are_adopted_while_requests_are_settled() {
    model(|| {
        let cell = quota_cell(50, 100);
        assert!(cell.reserve(6, Some(0)));
        let other = Arc::clone(&cell);
        let polled = Quota { count: 70, limit: Some(100), resets_at: Some(RESET), ..Quota::default() };
        both(
            move || other.settle(SettledReservation { reserved: 6, spent: 4 }, NOW),
            || cell.adopt(polled, NOW, Duration::from_secs(1)),
        );
        let count = cell.load(NOW).count;
        assert!(count == 70 || count == 74, "{count}: before the request was settled, or after");
        assert_eq!(cell.reserved(), 0);
    });
}

#[test]
fn reported_remaining_credits_are_taken_once() {
    model(|| {
        let cell = Arc::new(ReportedRemaining::default());
        cell.report(10, RESET, NOW);
        let other = Arc::clone(&cell);
        let (one, two) = both(move || other.take(6, NOW), || cell.take(6, NOW));
        assert_eq!([one, two].iter().filter(|taken| **taken == ReportedDecrease::Taken).count(), 1);
        assert_eq!(cell.left(NOW), Some(4));
    });
}

#[test]
fn a_concurrency_group_never_exceeds_its_maximum() {
    model(|| {
        let cell = Arc::new(ConcurrencyLimiter::default());
        cell.set_reported_max(1);
        let other = Arc::clone(&cell);
        let run = |cell: &ConcurrencyLimiter| {
            let has = cell.try_acquire();
            assert!(cell.running() <= 1);
            if has {
                cell.release();
            }
        };
        both(move || run(&other), || run(&cell));
        assert_eq!(cell.running(), 0);
    });
}

#[test]
fn a_probe_is_claimed_by_one_request() {
    model(|| {
        let cell = Arc::new(ProbeCell::default());
        cell.allow(Some(Duration::ZERO), NOW);
        let other = Arc::clone(&cell);
        let pause = Duration::from_millis(100);
        let (one, two) = both(move || other.claim(pause, NOW), || cell.claim(pause, NOW));
        assert!(one != two, "{one} {two}");
    });
}

#[test]
fn an_evaluation_during_a_change_is_not_stored() {
    model(|| {
        let (cell, value) = (Arc::new(StateChangeCache::default()), Arc::new(AtomicU64::new(0)));
        let inputs = NextChange { generation: 1, is_spent: false, is_near: false };
        let (other, changes) = (Arc::clone(&cell), Arc::clone(&value));
        let (_, seen) = both(
            move || {
                changes.store(1, Ordering::Release);
                other.invalidate();
            },
            || {
                let before = cell.begin();
                let seen = value.load(Ordering::Acquire);
                cell.keep(before, inputs, RESET);
                seen
            },
        );
        assert!(seen == 1 || !cell.holds(inputs, NOW), "a change would not be evaluated");
    });
}

fn pool(slots: u32) -> Arc<Pool> {
    let key = ApiKey::new("sk_0000_of_the_pool_0").unwrap();
    let settings = Settings { queue_timeout: Duration::from_secs(60), max_queued: 9, ..Settings::STILL };
    let pool = Pool::new(vec![key.into()], settings);
    pool.roster().keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(slots);
    Arc::new(pool)
}

fn request() -> KeyRequest {
    KeyRequest::new(ClientName::new("app"), Some(5), Some(ConcurrencyGroup::SPEECH))
}

fn refused(verdict: Verdict) -> Refused<'static> {
    Refused { verdict, request: None, is_agreed: false, source: RefusalSource::default() }
}

fn assert_idle(pool: &Pool) {
    let roster = pool.roster();
    let key = &roster.keys()[0];
    assert_eq!((key.in_flight(), key.workspace().in_flight(), key.workspace().reserved()), (0, 0, 0));
    assert_eq!(key.workspace().running(ConcurrencyGroup::SPEECH).0, 0);
}

#[test]
fn a_lease_ends_once_while_its_key_begins_a_cooldown() {
    model_with(1, || {
        let pool = pool(9);
        let other = Arc::clone(&pool);
        both(
            move || {
                let roster = other.roster();
                drop(other.try_reserve(&roster, &request(), NOW));
            },
            || {
                let roster = pool.roster();
                pool.record_refusal(&roster, &roster.keys()[0], refused(Verdict::Billing), NOW);
                assert!(
                    pool.try_reserve(&roster, &request(), NOW).is_err(),
                    "a key in cooldown is never selected"
                );
            },
        );
        assert_idle(&pool);
    });
}

#[test]
fn a_key_that_is_polled_at_once_does_not_stay_in_cooldown() {
    model(|| {
        let pool = pool(9);
        let other = Arc::clone(&pool);
        let roster = pool.roster();
        let key = &roster.keys()[0];
        both(
            move || {
                let roster = other.roster();
                let key = &roster.keys()[0];
                if key.wants_poll() {
                    other.observe(&roster, key, Observation::Unreadable, NOW);
                }
            },
            || pool.record_refusal(&roster, key, refused(Verdict::InvalidKey), NOW),
        );
        assert_eq!(key.wants_poll(), key.cooldown().is_some(), "no poll would end its cooldown");
    });
}

#[test]
fn a_release_serves_every_waiter() {
    model_with(2, || {
        let pool = pool(1);
        let roster = pool.roster();
        let held = pool.try_reserve(&roster, &request(), NOW).unwrap();
        let other = Arc::clone(&pool);
        let releasing = thread::spawn(move || {
            drop(held);
            drop(other);
        });
        let (waiter, mut result) = pool.queue.join(&roster, &request(), 9).unwrap();
        pool.dispatch_waiters(NOW);
        releasing.join().unwrap();
        let result = result.try_recv().expect("the waiters were not dispatched");
        assert!(!matches!(result, Err(Unavailable::Full { .. })));
        drop(waiter);
        drop(result);
        assert_idle(&pool);
    });
}
