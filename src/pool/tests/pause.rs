//! Tests the pauses that operators set: their start and end, the reported state changes, and their effect on requests
//! in flight, queued requests and probes.

use super::*;
use crate::policy::key_state::Pause;

fn pause_until(until: Option<UnixMs>) -> Option<Pause> {
    Some(Pause { since: NOW, until, reason: Some("billing dispute".into()) })
}

/// Reloads the keys of the pool with another pause of one key, because every change by an operator is a reload. Returns
/// the state changes.
fn set_pause(pool: &Arc<Pool>, position: usize, pause: Option<Pause>, now: UnixMs) -> Vec<Transition> {
    let roster = pool.roster();
    let mut entries = roster.entries.clone();
    entries[position].pause = pause;
    pool.reload(entries, roster.settings);
    pool.transitions(now)
}

/// Reserves a key. If a reload replaces the roster while the request is queued, selects from the new roster.
async fn reserve(pool: &Arc<Pool>, request: &KeyRequest) -> Result<Reserved, Unavailable> {
    loop {
        match pool.reserve(&pool.roster(), request).await {
            Err(Unavailable::Outdated) => {}
            result => return result,
        }
    }
}

#[test]
fn a_paused_key_receives_no_new_request_and_completes_its_requests() {
    let pool = separate_keys(2);
    let old_roster = pool.roster();
    let lease = pool.try_lease(&speech_request(1, &[]), NOW).unwrap().lease;
    let transitions = set_pause(&pool, 0, pause_until(None), NOW);
    assert_eq!(changes(&transitions), [(0, StateChange::Paused { until: None })]);
    assert_eq!(changes(&set_pause(&pool, 0, pause_until(None), NOW)), []);
    assert_eq!(pool.select(&[], NOW), Ok(1));
    // A request that has loaded the earlier roster does not use the key either.
    let reserved = pool.try_reserve(&old_roster, &speech_request(1, &[]), NOW).unwrap();
    assert_eq!(reserved.lease.key().position(), 1);
    assert_eq!(lease.key().in_flight(), 1);
    drop(lease);
    assert_eq!(pool.roster().keys()[0].in_flight(), 0);
    assert_eq!(changes(&set_pause(&pool, 0, None, NOW)), [(0, StateChange::Resumed)]);
    assert_eq!(pool.select(&[], NOW), Ok(0));
}

#[test]
fn the_changes_of_a_reload_are_reported_once() {
    let pool = separate_keys(3);
    let entries = pool.roster().entries.clone();
    let paused = |position: usize| KeyEntry { pause: pause_until(None), ..entries[position].clone() };
    pool.reload(vec![paused(0), entries[1].clone(), paused(2)], SETTINGS);
    let paused_change = StateChange::Paused { until: None };
    assert_eq!(changes(&pool.transitions(NOW)), [(0, paused_change), (2, paused_change)]);
    assert_eq!(changes(&pool.transitions(NOW)), []);
    pool.reload(vec![entries[0].clone(), paused(2)], SETTINGS);
    assert_eq!(changes(&pool.transitions(NOW)), [(0, StateChange::Resumed)]);
}

#[test]
fn a_pause_ends_at_its_time_by_itself() {
    let pool = separate_keys(1);
    set_pause(&pool, 0, pause_until(Some(later(5))), NOW);
    let just_before = UnixMs(later(5).0 - 1);
    assert_eq!(pool.select(&[], just_before), Err(Unavailable::Paused { until: Some(later(5)) }));
    assert!(pool.snapshot(just_before)[0].pause.is_some());
    assert_eq!(pool.select(&[], later(5)), Ok(0));
    assert!(pool.snapshot(later(5))[0].pause.is_none());
    // The request at that time has reported the end of the pause.
    assert_eq!(changes(&pool.report_quota(0, 1, 100, later(6))), []);
}

#[test]
fn the_end_of_a_pause_is_reported_by_the_next_charge() {
    let pool = separate_keys(1);
    let mut lease = pool.try_lease(&speech_request(1, &[]), NOW).unwrap().lease;
    set_pause(&pool, 0, pause_until(Some(later(5))), NOW);
    let roster = pool.roster();
    assert_eq!(changes(&pool.charge(&roster, &mut lease, 1, later(4))), []);
    assert_eq!(changes(&pool.charge(&roster, &mut lease, 1, later(5))), [(0, StateChange::Resumed)]);
}

#[test]
fn a_paused_key_in_cooldown_is_not_probed() {
    let pool = separate_keys(1);
    pool.record_verdict(0, Verdict::Unexplained(UnexplainedRefusal::PaymentRequired), NOW);
    set_pause(&pool, 0, pause_until(None), NOW);
    assert_eq!(pool.select(&[], later(40)), Err(Unavailable::Paused { until: None }));
    set_pause(&pool, 0, None, later(40));
    assert_eq!(pool.select(&[], later(40)), Ok(0), "without the pause, the key must be probed");
}

#[test]
fn a_paused_key_keeps_the_status_of_its_credits() {
    let pool = separate_keys(1);
    pool.record_verdict(0, quota_refusal(), NOW);
    set_pause(&pool, 0, pause_until(None), NOW);
    let snapshot = &pool.snapshot(NOW)[0];
    assert!(snapshot.state.is_paused() && !snapshot.unpaused_state.is_paused());
    assert_eq!(snapshot.state.status().as_str(), "exhausted");
}

#[test]
fn a_pause_outlasts_a_poll_and_ends_with_a_reload_without_it() {
    let pool = separate_keys(2);
    set_pause(&pool, 0, pause_until(None), NOW);
    pool.report_quota(0, 1, 100, NOW);
    pool.record_workspace(&pool.roster().keys()[0], "ws_1");
    assert_eq!(pool.select(&[], NOW), Ok(1));
    let paused = KeyEntry { pause: pause_until(None), ..entry(1, None, None) };
    pool.reload(vec![entry(0, None, None), paused], SETTINGS);
    assert_eq!(pool.select(&[], NOW), Ok(0));
    assert_eq!(pool.select(&[0], NOW), Err(Unavailable::Tried));
}

#[tokio::test]
async fn a_queued_request_receives_a_key_that_is_resumed() {
    let pool = separate_keys(2);
    let roster = pool.roster();
    roster.keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
    set_pause(&pool, 1, pause_until(None), NOW);
    let _lease = pool.try_reserve(&roster, &speech_request(1, &[]), NOW).unwrap();
    let request = speech_request(1, &[]);
    let mut queued = Box::pin(reserve(&pool, &request));
    assert!(poll_once(&mut queued).is_none());
    set_pause(&pool, 1, None, NOW);
    let reserved = poll_once(&mut queued).expect("the request must be dispatched").unwrap();
    assert_eq!(reserved.lease.key().position(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_queued_request_receives_a_key_whose_pause_ends() {
    let pool = separate_keys(2);
    let roster = pool.roster();
    roster.keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
    let now = crate::clock::now();
    let until = now.plus(Duration::from_secs(30));
    set_pause(&pool, 1, pause_until(None), now);
    let _lease = pool.try_reserve(&roster, &speech_request(1, &[]), now).unwrap();
    let request = speech_request(1, &[]);
    let mut queued = Box::pin(reserve(&pool, &request));
    assert!(poll_once(&mut queued).is_none());
    // The request is queued already when an operator limits the pause.
    set_pause(&pool, 1, pause_until(Some(until)), now);
    let reserved = queued.await.unwrap();
    assert_eq!(reserved.lease.key().position(), 1);
    let now = crate::clock::now();
    assert!(
        now >= until && now.since(until) <= MAX_TIMER_DELAY,
        "the request must wait until {until:?}, not until {now:?}"
    );
}

#[tokio::test]
async fn a_queued_request_fails_when_the_last_usable_key_is_paused() {
    let pool = separate_keys(1);
    let roster = pool.roster();
    roster.keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
    let _lease = pool.try_reserve(&roster, &speech_request(1, &[]), NOW).unwrap();
    let request = speech_request(1, &[]);
    let mut queued = Box::pin(reserve(&pool, &request));
    assert!(poll_once(&mut queued).is_none());
    set_pause(&pool, 0, pause_until(None), NOW);
    let result = poll_once(&mut queued).expect("the request must be evaluated again");
    assert_eq!(result.unwrap_err(), Unavailable::Paused { until: None });
}
