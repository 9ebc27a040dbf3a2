//! Tests leases: which key is reserved, how its credits and slots are reserved, charged and returned, and which state
//! changes a lease and a charge report. Also tests leases of several threads, and that no lock is taken.

use super::*;

#[test]
fn the_key_in_use_is_reported_once_and_again_when_it_changes() {
    let pool = separate_keys(3);
    let transitions =
        |tried: &[usize]| changes(&pool.try_lease(&speech_request(0, tried), NOW).unwrap().transitions);
    assert!(matches!(transitions(&[])[..], [(0, StateChange::InUse { rotated_to: None, .. })]));
    assert!(transitions(&[]).is_empty());
    // A request that is refused for its own content uses the next key, and the key in use stays the same.
    assert!(transitions(&[0]).is_empty());
    pool.record_verdict(0, quota_refusal(), NOW);
    assert!(matches!(transitions(&[0])[..], [(1, StateChange::InUse { rotated_to: Some(1), .. })]));
}

#[test]
fn the_last_credits_go_to_one_request() {
    let pool = separate_keys(2);
    pool.report_quota(0, 90, 100, NOW);
    let first = pool.try_lease(&speech_request(8, &[]), NOW).unwrap();
    assert_eq!(first.lease.key().position(), 0);
    let second = pool.try_lease(&speech_request(8, &[]), NOW).unwrap();
    assert_eq!(second.lease.key().position(), 1, "two unreserved credits must not suffice for eight");
    // The second key only substitutes for the key in use.
    assert!(second.transitions.is_empty());
    assert_eq!(pool.try_lease(&speech_request(2, &[]), NOW).unwrap().lease.key().position(), 0);
}

#[test]
fn the_key_with_most_credits_serves_one_request_when_no_key_can_pay() {
    let pool = separate_keys(2);
    pool.report_quota(0, 95, 100, NOW);
    pool.report_quota(1, 90, 100, NOW);
    let overcommitted = pool.try_lease(&speech_request(20, &[]), NOW).unwrap();
    assert_eq!(overcommitted.lease.key().position(), 1);
    let other_lease = pool.try_lease(&speech_request(20, &[]), NOW).unwrap();
    assert_eq!(other_lease.lease.key().position(), 0);
    let full = Unavailable::Full { until: Some(UnixMs(9_000_000)) };
    assert_eq!(
        pool.try_lease(&speech_request(20, &[]), NOW).unwrap_err(),
        full,
        "the request must wait for reserved credits"
    );
    // The refusal reports the remaining credits. Larger requests skip the key, and smaller requests use it.
    let verdict =
        Verdict::WorkspaceQuota(Shortfall { remaining: Some(5), required: Some(10), ..Shortfall::default() });
    let roster = pool.roster();
    record_attempt(&pool, &roster, &roster.keys()[1], verdict, Some(&speech_request(20, &[])), NOW);
    pool.charge(&roster, &mut { overcommitted.lease }, 0, NOW);
    pool.charge(&roster, &mut { other_lease.lease }, 0, NOW);
    assert_eq!(
        pool.snapshot(NOW)[1].state.status().as_str(),
        "active",
        "a key that is short of credits only for larger requests must stay active"
    );
    let smaller = pool.try_lease(&speech_request(10, &[0]), NOW).unwrap().lease;
    assert_eq!(smaller.key().position(), 1);
    assert!(
        pool.try_lease(&speech_request(1, &[0]), NOW).is_err(),
        "the reserved ten credits must be all credits that the provider has reported, on the scale of estimates"
    );
    drop(smaller);
    assert!(pool.try_lease(&speech_request(11, &[0]), NOW).is_err());
}

#[test]
fn kept_credits_are_not_spent() {
    let entries = vec![KeyEntry { kept_credits: 50, ..entry(0, None, None) }, entry(1, None, None)];
    let pool = Arc::new(Pool::new(entries, SETTINGS));
    pool.report_quota(0, 0, 100, NOW);
    assert_eq!(pool.try_lease(&speech_request(50, &[]), NOW).unwrap().lease.key().position(), 0);
    assert_eq!(pool.try_lease(&speech_request(51, &[]), NOW).unwrap().lease.key().position(), 1);
}

#[test]
fn kept_credits_are_not_overcommitted() {
    let entries = vec![KeyEntry { kept_credits: 50, ..entry(0, None, None) }];
    let pool = Arc::new(Pool::new(entries, SETTINGS));
    pool.report_quota(0, 0, 100, NOW);
    let resets_at = Some(UnixMs(9_000_000));
    assert_eq!(
        pool.try_lease(&speech_request(51, &[]), NOW).unwrap_err(),
        Unavailable::Exhausted { resets_at, left: Some(100) }
    );
    let lease = pool.try_lease(&speech_request(40, &[]), NOW).unwrap().lease;
    assert_eq!(
        pool.try_lease(&speech_request(20, &[]), NOW).unwrap_err(),
        Unavailable::Full { until: resets_at },
        "the request must wait, because the reserved credits may be returned"
    );
    drop(lease);
    assert!(pool.try_lease(&speech_request(50, &[]), NOW).is_ok());
}

#[test]
fn spending_to_the_limit_exhausts_a_key_without_a_poll() {
    let pool = separate_keys(2);
    pool.report_quota(0, 0, 100, NOW);
    assert!(pool.charge_key(0, 79, NOW).is_empty());
    assert!(
        matches!(changes(&pool.charge_key(0, 1, NOW))[..], [(0, StateChange::NearLimit(quota))] if quota.count == 80)
    );
    assert_eq!(pool.select(&[], NOW), Ok(0));
    assert!(matches!(
        changes(&pool.charge_key(0, 20, NOW))[..],
        [(0, StateChange::CooldownStarted { reason: CooldownReason::Exhausted, .. })]
    ));
    assert_eq!(pool.select(&[], NOW), Ok(1));
}

#[test]
fn a_charge_reports_every_changed_key_of_its_workspace() {
    let pool = pool(&[Some("studio"), Some("studio"), None]);
    pool.report_quota(0, 0, 100, NOW);
    pool.record_verdict(1, Verdict::RateLimited(None), NOW);
    let reported_changes = |credits, at| changes(&pool.charge_key(0, credits, at));
    assert_eq!(reported_changes(1, NOW), []);
    assert_eq!(reported_changes(1, later(59)), []);
    // The cooldown has ended.
    assert_eq!(
        reported_changes(1, later(60)),
        [(0, StateChange::CooldownEnded), (1, StateChange::CooldownEnded)]
    );
    assert_eq!(reported_changes(1, later(61)), []);
    // A changed cooldown is found, although the last evaluation was current.
    pool.roster().keys()[1].set_cooldown(Cooldown { reason: CooldownReason::Billing, until: later(90) });
    let cooldown = StateChange::CooldownStarted { reason: CooldownReason::Billing, until: Some(later(90)) };
    assert_eq!(reported_changes(1, later(62)), [(1, cooldown)]);
    // The charge itself changes the state.
    let near_limit = reported_changes(75, later(63));
    assert!(
        matches!(near_limit.as_slice(), [(0, StateChange::NearLimit(_))]),
        "only the first key must be reported as near its limit: {near_limit:?}"
    );
    assert_eq!(reported_changes(1, later(64)), []);
    let last_changes = reported_changes(19, later(65));
    let is_exhaustion = |(position, change): &(usize, StateChange)| {
        *position < 2
            && matches!(change, StateChange::CooldownStarted { reason: CooldownReason::Exhausted, .. })
    };
    assert!(
        last_changes.iter().any(is_exhaustion),
        "a key of the workspace must be reported as exhausted: {last_changes:?}"
    );
}

#[test]
fn a_charge_after_a_refusal_is_counted_once() {
    let pool = separate_keys(1);
    pool.report_quota(0, 90, 100, NOW);
    // The numbers of the refusal include the request in flight, which the provider has charged already.
    pool.record_verdict(
        0,
        Verdict::WorkspaceQuota(Shortfall { remaining: Some(0), required: Some(50), ..Shortfall::default() }),
        NOW,
    );
    pool.charge_key(0, 10, NOW);
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 100);
}

#[test]
fn a_sent_request_without_a_reported_cost_is_charged_its_estimate() {
    let pool = separate_keys(1);
    pool.report_quota(0, 0, 100, NOW);
    let mut charged_lease = pool.try_lease(&speech_request(30, &[]), NOW).unwrap().lease;
    pool.charge(&pool.roster(), &mut charged_lease, 10, NOW);
    drop(charged_lease);
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 10);
    let mut sent_lease = pool.try_lease(&speech_request(30, &[]), NOW).unwrap().lease;
    sent_lease.mark_sent();
    drop(sent_lease);
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 40);
    drop(pool.try_lease(&speech_request(30, &[]), NOW).unwrap());
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 40, "a lease without a sent request must cost no credits");
    assert_eq!(pool.roster().keys()[0].workspace().reserved(), 0);
}

#[test]
fn a_dropped_lease_releases_its_key() {
    let pool = pool(&[Some("a"), Some("a")]);
    let roster = pool.roster();
    let (first, second) = (
        pool.try_lease(&speech_request(5, &[]), NOW).unwrap(),
        pool.try_lease(&speech_request(5, &[0]), NOW).unwrap(),
    );
    let workspace = roster.keys()[0].workspace();
    assert_eq!(
        (roster.keys()[0].in_flight(), roster.keys()[1].in_flight(), workspace.in_flight()),
        (1, 1, 2)
    );
    drop(first);
    assert_eq!((roster.keys()[0].in_flight(), workspace.in_flight()), (0, 1));
    drop(second);
    assert_eq!(workspace.in_flight(), 0);
}

#[test]
fn a_slot_is_not_released_twice() {
    let pool = separate_keys(1);
    let mut reserved = pool.try_lease(&speech_request(1, &[]), NOW).unwrap();
    let roster = pool.roster();
    let limiter = roster.keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH);
    reserved.lease.release();
    assert!(!reserved.lease.has_slot());
    reserved.lease.release_slot();
    drop(reserved);
    assert_eq!(limiter.running(), 0);
}

#[test]
fn concurrent_leases_lose_no_credits() {
    let pool = separate_keys(2);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let roster = pool.roster();
                for _ in 0..1_000 {
                    let mut reserved = pool.try_reserve(&roster, &speech_request(5, &[]), NOW).unwrap();
                    pool.charge(&roster, &mut reserved.lease, 3, NOW);
                }
            });
        }
    });
    let snapshot = pool.snapshot(NOW);
    assert_eq!(snapshot.iter().map(|key| key.quota.count).sum::<u64>(), 24_000);
    assert!(snapshot.iter().all(|key| key.key.in_flight() == 0));
}

/// A slot may be released between the two evaluations of a selection. The request must then not fail with a
/// reason other than busy keys.
#[test]
fn a_request_without_a_slot_fails_because_all_keys_are_busy() {
    let pool = separate_keys(1);
    pool.roster().keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    match pool.try_lease(&speech_request(1, &[]), NOW) {
                        Ok(reserved) => drop(reserved),
                        Err(reason) => assert!(
                            matches!(reason, Unavailable::Full { .. }),
                            "the reason must be that all keys are busy, not {reason:?}"
                        ),
                    }
                }
            });
        }
    });
}

/// The test holds the locks of the queue, of roster updates, and of the evidence of each workspace while another thread
/// selects and releases a key.
#[test]
fn a_key_is_selected_and_released_without_a_lock() {
    let pool = separate_keys(3);
    let roster = pool.roster();
    let _queue_lock = pool.queue.hold_lock();
    let _roster_lock = pool.roster_update.lock().unwrap();
    let _evidence_locks: Vec<_> =
        roster.keys().iter().map(|key| key.workspace().evidence_cell.hold_lock()).collect();
    let (sender, receiver) = std::sync::mpsc::channel();
    let selecting_pool = Arc::clone(&pool);
    crate::tasks::spawn_thread("selector", move || {
        let reserved = selecting_pool.try_lease(&speech_request(10, &[]), NOW);
        let is_reserved = reserved.is_ok();
        drop(reserved);
        sender.send(is_reserved)
    })
    .unwrap();
    assert_eq!(
        receiver.recv_timeout(Duration::from_secs(30)),
        Ok(true),
        "the thread must not be blocked by a lock"
    );
}
