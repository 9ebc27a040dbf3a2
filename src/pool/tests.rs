mod waiting;

use std::time::Duration;

use super::*;
use crate::policy::budget::Extension;
use crate::policy::client::ClientName;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::ClaimedFault;
use crate::policy::key_state::{Cooldown, CooldownReason, StateChange};
use crate::policy::select::Unavailable;
use crate::policy::verdict::{Refusal, Shortfall, Subject, Verdict};
use crate::secret::ApiKey;

const NOW: UnixMs = UnixMs(1_000_000);
const SETTINGS: Settings = Settings {
    strategy: crate::policy::strategy::Strategy::DEFAULT,
    queue_timeout: Duration::from_secs(60),
    max_queued: 100,
    near_limit_ratio: 0.8,
    rate_limited_cooldown: Duration::from_secs(60),
    concurrency_cooldown: Duration::from_secs(2),
    exhausted_cooldown: Duration::from_secs(3_600),
    billing_cooldown: Duration::from_secs(7_200),
    invalid_confirm_cooldown: Duration::from_secs(600),
    invalid_cooldown: Duration::from_secs(86_400),
    permission_cooldown: Duration::from_secs(3_600),
    feature_cooldown: Duration::from_secs(3_600),
    endpoint_cooldown: Duration::from_secs(600),
    unproven_cooldown: Duration::from_secs(60),
    max_retry_after: Duration::from_secs(300),
    probe_after: Duration::from_secs(30),
    quota_lag: Duration::from_secs(300),
};

fn entry(number: usize, name: Option<&str>, workspace: Option<&str>) -> KeyEntry {
    let key = ApiKey::new(&format!("sk_{number}{number}{number}{number}_of_the_pool_{number}")).unwrap();
    KeyEntry { name: name.map(str::to_owned), workspace: workspace.map(str::to_owned), ..key.into() }
}

fn pool(workspaces: &[Option<&str>]) -> Arc<Pool> {
    let entries = workspaces.iter().enumerate().map(|(number, workspace)| entry(number, None, *workspace));
    Arc::new(Pool::new(entries.collect(), SETTINGS))
}

/// A pool of keys with a workspace each.
fn separate_keys(count: usize) -> Arc<Pool> {
    pool(&vec![None; count])
}

/// A speech request that costs this many credits, of a client that has tried these keys.
fn speech(credits: u64, tried: &[usize]) -> KeyRequest {
    KeyRequest {
        tried: tried.to_vec(),
        ..KeyRequest::new(ClientName::new("app"), Some(credits), Some(ConcurrencyGroup::SPEECH))
    }
}

trait Trial {
    fn try_lease(&self, request: &KeyRequest, now: UnixMs) -> Result<Reserved, Unavailable>;
    fn select(&self, tried: &[usize], now: UnixMs) -> Result<usize, Unavailable>;
    fn record(&self, position: usize, verdict: Verdict, now: UnixMs) -> Vec<Transition>;
    fn report_quota(&self, position: usize, count: u64, limit: u64, now: UnixMs) -> Vec<Transition>;
    fn charge(&self, position: usize, credits: u64, now: UnixMs) -> Vec<Transition>;
}

impl Trial for Arc<Pool> {
    fn try_lease(&self, request: &KeyRequest, now: UnixMs) -> Result<Reserved, Unavailable> {
        self.try_reserve(&self.roster(), request, now).map_err(|blocked| blocked.reason)
    }

    #[track_caller]
    fn select(&self, tried: &[usize], now: UnixMs) -> Result<usize, Unavailable> {
        self.try_lease(&speech(0, tried), now).map(|reserved| reserved.lease.key().position())
    }

    fn record(&self, position: usize, verdict: Verdict, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster();
        record_verdict(self, &roster, &roster.keys()[position], verdict, Some(&speech(100, &[])), now)
    }

    fn report_quota(&self, position: usize, count: u64, limit: u64, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster();
        let quota = Quota {
            count,
            limit: Some(limit),
            extension: Extension::None,
            resets_at: Some(UnixMs(9_000_000)),
        };
        self.observe(&roster, &roster.keys()[position], figures(quota, None), now)
    }

    fn charge(&self, position: usize, credits: u64, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster();
        let mut lease = Lease::take(self, &roster.keys()[position], &speech(0, &[]), false, now).unwrap();
        self.settle(&roster, &mut lease, credits, now)
    }
}

fn figures(quota: Quota, is_paid: Option<bool>) -> Observation {
    Observation::Quota { quota, tier: None, is_paid, capabilities: Capabilities::default() }
}

fn record_verdict(
    pool: &Arc<Pool>,
    roster: &Roster,
    key: &Key,
    verdict: Verdict,
    request: Option<&KeyRequest>,
    now: UnixMs,
) -> Vec<Transition> {
    if verdict == Verdict::Served {
        return pool.record_service(roster, key, Served { request, began_at: now, is_charged: true }, now);
    }
    pool.record_refusal(
        roster,
        key,
        Refused { verdict, request, is_agreed: false, source: RefusalSource::default() },
        now,
    )
}

fn later(seconds: u64) -> UnixMs {
    NOW.plus(Duration::from_secs(seconds))
}

/// A refusal with figures, after which no credits are left.
fn quota_refusal() -> Verdict {
    Verdict::WorkspaceQuota(Shortfall { remaining: Some(0), required: Some(100), ..Shortfall::default() })
}

fn changes(transitions: &[Transition]) -> Vec<(usize, StateChange)> {
    transitions.iter().map(|transition| (transition.key.position(), transition.change)).collect()
}

#[test]
fn the_first_key_serves_until_it_is_refused() {
    let pool = separate_keys(3);
    assert_eq!(pool.select(&[], NOW), Ok(0));
    pool.record(0, quota_refusal(), NOW);
    assert_eq!(pool.select(&[], NOW), Ok(1));
}

#[test]
fn a_rate_limited_key_is_back_after_its_cooldown() {
    let pool = separate_keys(2);
    pool.record(0, Verdict::RateLimited(None), NOW);
    assert_eq!(pool.select(&[], later(59)), Ok(1));
    assert_eq!(pool.select(&[], later(60)), Ok(0));
    pool.record(0, Verdict::RateLimited(Some(Duration::from_secs(7))), later(60));
    assert_eq!(pool.select(&[], later(66)), Ok(1));
    assert_eq!(pool.select(&[], later(67)), Ok(0));
}

#[test]
fn a_concurrency_refusal_is_a_short_cooldown() {
    let pool = separate_keys(2);
    pool.record(0, Verdict::Concurrency { maximum: Some(4) }, NOW);
    assert_eq!(pool.select(&[], later(1)), Ok(1));
    assert_eq!(pool.select(&[], later(2)), Ok(0));
}

#[test]
fn an_empty_workspace_is_back_at_its_reset_date() {
    let pool = separate_keys(1);
    pool.report_quota(0, 10, 100, NOW);
    pool.record(0, quota_refusal(), NOW);
    let reset = UnixMs(9_000_000);
    assert_eq!(
        pool.select(&[], UnixMs(8_999_999)),
        Err(Unavailable::Exhausted { resets_at: Some(reset), left: None })
    );
    assert_eq!(pool.select(&[], reset), Ok(0));
    assert_eq!(pool.snapshot(reset)[0].quota.count, 0);
}

#[test]
fn an_empty_workspace_without_a_date_is_tried_again_after_a_while() {
    let pool = separate_keys(1);
    pool.record(0, quota_refusal(), NOW);
    assert!(pool.select(&[], later(29)).is_err());
    assert_eq!(pool.select(&[], later(3_600)), Ok(0));
}

#[test]
fn a_cooldown_of_a_workspace_is_one_of_all_its_keys_and_no_other() {
    let pool = pool(&[Some("a"), Some("b"), Some("a")]);
    let transitions = pool.record(0, quota_refusal(), NOW);
    assert_eq!(transitions.len(), 2);
    assert_eq!(pool.select(&[], NOW), Ok(1));
    assert_eq!(pool.select(&[1], NOW), Err(Unavailable::Tried));
}

#[test]
fn a_key_at_its_own_cap_leaves_its_workspace_open() {
    let pool = pool(&[Some("a"), Some("a")]);
    pool.record(
        0,
        Verdict::KeyQuota(Shortfall { remaining: Some(0), required: Some(1), ..Shortfall::default() }),
        NOW,
    );
    assert_eq!(pool.select(&[], NOW), Ok(1));
}

#[test]
fn a_verdict_about_something_else_is_no_cooldown_of_the_key() {
    let pool = separate_keys(1);
    for verdict in [
        Verdict::Served,
        Verdict::PlanFeature(Subject::Voice),
        Verdict::Slots,
        Verdict::Busy,
        Verdict::Unexplained(Refusal::Forbidden),
        Verdict::Unexplained(Refusal::Unauthorized),
        Verdict::NotFound,
        Verdict::RequestError,
        Verdict::ServerError,
        Verdict::Unreadable,
    ] {
        assert!(pool.record(0, verdict, NOW).is_empty());
        assert_eq!(pool.select(&[], NOW), Ok(0));
    }
}

#[test]
fn spending_to_the_limit_exhausts_a_key_without_a_poll() {
    let pool = separate_keys(2);
    pool.report_quota(0, 0, 100, NOW);
    assert!(pool.charge(0, 79, NOW).is_empty());
    assert!(
        matches!(changes(&pool.charge(0, 1, NOW))[..], [(0, StateChange::NearLimit(quota))] if quota.count == 80)
    );
    assert_eq!(pool.select(&[], NOW), Ok(0));
    assert!(matches!(
        changes(&pool.charge(0, 20, NOW))[..],
        [(0, StateChange::Rests { reason: CooldownReason::Exhausted, .. })]
    ));
    assert_eq!(pool.select(&[], NOW), Ok(1));
}

#[test]
fn a_charge_reports_every_changed_key_of_its_workspace() {
    let studio = Some("studio");
    let pool = pool(&[studio, studio, None]);
    pool.report_quota(0, 0, 100, NOW);
    pool.record(1, Verdict::RateLimited(None), NOW);
    let reported = |credits, at| changes(&pool.charge(0, credits, at));
    assert_eq!(reported(1, NOW), []);
    assert_eq!(reported(1, later(59)), []);
    // The cooldown has ended.
    assert_eq!(reported(1, later(60)), [(0, StateChange::Returns), (1, StateChange::Returns)]);
    assert_eq!(reported(1, later(61)), []);
    // A changed cooldown invalidates the cache.
    pool.roster().keys()[1].set_cooldown(Cooldown { reason: CooldownReason::Billing, until: later(90) });
    let cooldown = StateChange::Rests { reason: CooldownReason::Billing, until: Some(later(90)) };
    assert_eq!(reported(1, later(62)), [(1, cooldown)]);
    // The charge itself changes the state.
    let near = reported(75, later(63));
    assert!(matches!(near.as_slice(), [(0, StateChange::NearLimit(_))]), "{near:?}");
    assert_eq!(reported(1, later(64)), []);
    let spent = reported(19, later(65));
    let exhausted = |(position, change): &(usize, StateChange)| {
        *position < 2 && matches!(change, StateChange::Rests { reason: CooldownReason::Exhausted, .. })
    };
    assert!(spent.iter().any(exhausted), "{spent:?}");
}

#[test]
fn a_refused_key_comes_back_when_the_provider_accepts_it() {
    let pool = separate_keys(1);
    pool.record(0, Verdict::InvalidKey, NOW);
    assert_eq!(pool.select(&[], NOW), Err(Unavailable::Invalid));
    let roster = pool.roster();
    let transitions = pool.observe(&roster, &roster.keys()[0], Observation::Unreadable, later(1));
    assert_eq!(changes(&transitions), [(0, StateChange::Returns)]);
    assert_eq!(pool.select(&[], later(1)), Ok(0));
}

#[test]
fn a_lagging_figure_does_not_undo_a_refusal_and_a_new_limit_does() {
    let pool = separate_keys(1);
    pool.report_quota(0, 90, 100, NOW);
    pool.record(0, quota_refusal(), NOW);
    pool.report_quota(0, 90, 100, later(1));
    assert!(pool.select(&[], later(1)).is_err());
    pool.report_quota(0, 90, 1_000, later(2));
    assert_eq!(pool.select(&[], later(2)), Ok(0));
    // A figure that is older than the lag refutes the refusal, too.
    pool.record(0, quota_refusal(), later(3));
    pool.report_quota(0, 90, 1_000, later(302));
    assert!(pool.select(&[], later(302)).is_err());
    pool.report_quota(0, 90, 1_000, later(303));
    assert_eq!(pool.select(&[], later(303)), Ok(0));
}

#[test]
fn a_cost_settled_after_a_refusal_is_counted_once() {
    let pool = separate_keys(1);
    pool.report_quota(0, 90, 100, NOW);
    // The provider has charged the request in flight already, and the figures of the refusal include
    // that.
    pool.record(
        0,
        Verdict::WorkspaceQuota(Shortfall { remaining: Some(0), required: Some(50), ..Shortfall::default() }),
        NOW,
    );
    pool.charge(0, 10, NOW);
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 100);
}

#[test]
fn the_key_in_use_is_reported_once_and_again_when_it_changes() {
    let pool = separate_keys(3);
    let transitions = |tried: &[usize]| changes(&pool.try_lease(&speech(0, tried), NOW).unwrap().transitions);
    assert!(matches!(transitions(&[])[..], [(0, StateChange::InUse { rotated_to: None, .. })]));
    assert!(transitions(&[]).is_empty());
    // A request that fails on its own takes the next key; the key in use stays the same.
    assert!(transitions(&[0]).is_empty());
    pool.record(0, quota_refusal(), NOW);
    assert!(matches!(transitions(&[0])[..], [(1, StateChange::InUse { rotated_to: Some(1), .. })]));
}

#[test]
fn a_lease_releases_when_it_is_dropped() {
    let pool = pool(&[Some("a"), Some("a")]);
    let roster = pool.roster();
    let (one, two) =
        (pool.try_lease(&speech(5, &[]), NOW).unwrap(), pool.try_lease(&speech(5, &[0]), NOW).unwrap());
    let workspace = roster.keys()[0].workspace();
    assert_eq!(
        (roster.keys()[0].in_flight(), roster.keys()[1].in_flight(), workspace.in_flight()),
        (1, 1, 2)
    );
    drop(one);
    assert_eq!((roster.keys()[0].in_flight(), workspace.in_flight()), (0, 1));
    drop(two);
    assert_eq!(workspace.in_flight(), 0);
}

#[test]
fn restored_evidence_holds_again() {
    let pool = separate_keys(3);
    let prints: Vec<Fingerprint> =
        pool.roster().keys().iter().map(|key| key.api_key().fingerprint()).collect();
    let quota = Quota { count: 5, limit: Some(10), extension: Extension::None, resets_at: Some(later(50)) };
    let evidence = |claim, at| {
        vec![Evidence { claim, at, named_span: None, is_agreed: false, source: RefusalSource::default() }]
    };
    let spent = ClaimedFault::Credits { figures: Some((0, 7)), left_by_estimate: 0 };
    let unproven = ClaimedFault::Credits { figures: None, left_by_estimate: 0 };
    let remembered = |fingerprint, of_workspace| RestoredKey {
        fingerprint,
        quota,
        tier: None,
        of_key: vec![],
        of_workspace,
    };
    pool.restore(
        &[
            remembered(prints[0], evidence(spent, NOW)),
            // Words without figures have expired.
            remembered(prints[1], evidence(unproven, UnixMs(NOW.0 - 60_000))),
            remembered(Fingerprint::of("gone"), vec![]),
        ],
        NOW,
    );
    assert_eq!(pool.select(&[], NOW), Ok(1));
    assert_eq!(pool.select(&[], later(50)), Ok(0));
    assert_eq!(pool.snapshot(NOW)[1].quota, quota);
    assert_eq!(pool.snapshot(NOW)[2].quota, Quota::default());
}

#[test]
fn many_threads_lose_no_credit_and_no_lease() {
    let pool = separate_keys(2);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let roster = pool.roster();
                for _ in 0..1_000 {
                    let mut reserved = pool.try_reserve(&roster, &speech(5, &[]), NOW).unwrap();
                    pool.settle(&roster, &mut reserved.lease, 3, NOW);
                }
            });
        }
    });
    let snapshot = pool.snapshot(NOW);
    assert_eq!(snapshot.iter().map(|key| key.quota.count).sum::<u64>(), 24_000);
    assert!(snapshot.iter().all(|key| key.key.in_flight() == 0));
}

/// A pool of three keys, of which the last two share a workspace; all of them have a state to be kept.
fn pool_with_history() -> Arc<Pool> {
    let entries = vec![entry(0, None, None), entry(1, None, Some("w")), entry(2, Some("two"), Some("w"))];
    let pool = Arc::new(Pool::new(entries, SETTINGS));
    pool.report_quota(0, 10, 100, NOW);
    pool.report_quota(1, 20, 100, NOW);
    pool.record(0, Verdict::InvalidKey, NOW);
    pool.record(2, Verdict::RateLimited(None), NOW);
    pool
}

#[test]
fn a_reload_in_another_order_keeps_the_state_of_every_key() {
    let pool = pool_with_history();
    let before = pool.roster();
    pool.reload(vec![entry(2, Some("two"), Some("w")), entry(0, None, None)], SETTINGS);
    let after = pool.roster();
    assert!(Arc::ptr_eq(&after.keys()[0], &before.keys()[2]));
    assert!(Arc::ptr_eq(&after.keys()[1], &before.keys()[0]));
    assert_eq!(after.keys().iter().map(|key| key.position()).collect::<Vec<_>>(), [0, 1]);
    // Both are still in cooldown, and the key that served is gone.
    assert!(pool.try_reserve(&after, &speech(0, &[]), NOW).is_err());
    assert_eq!(pool.select(&[], later(60)), Ok(0));
}

#[test]
fn a_request_under_way_keeps_its_roster() {
    let pool = separate_keys(2);
    let held = pool.roster();
    pool.reload(vec![entry(1, None, None), entry(0, None, None)], SETTINGS);
    let reserved = pool.try_reserve(&held, &speech(0, &[]), NOW).unwrap();
    assert_eq!(held.position_of(reserved.lease.key()), Some(0));
    assert_eq!(reserved.lease.key().position(), 1, "status pages see the latest position");
    let next = pool.try_reserve(&held, &speech(0, &[0]), NOW).unwrap();
    assert_eq!(held.position_of(next.lease.key()), Some(1));
    // A removed key still records the results of its last requests.
    pool.reload(vec![entry(1, None, None)], SETTINGS);
    record_verdict(&pool, &held, reserved.lease.key(), quota_refusal(), None, NOW);
    assert_eq!(pool.roster().position_of(reserved.lease.key()), None);
    assert_eq!(pool.snapshot(NOW).len(), 1);
}

#[test]
fn a_key_with_another_name_is_still_that_key() {
    let pool = pool_with_history();
    let before = pool.roster();
    pool.reload(vec![entry(0, Some("zero"), None), entry(1, None, Some("w"))], SETTINGS);
    let after = pool.roster();
    assert_eq!(after.keys()[0].name(), Some("zero"));
    assert_eq!(after.keys()[0].state(NOW), before.keys()[0].state(NOW));
    assert!(std::ptr::eq(after.keys()[0].workspace(), before.keys()[0].workspace()));
}

#[test]
fn a_new_key_of_a_known_workspace_shares_its_credits() {
    let pool = pool_with_history();
    let reloaded = pool.reload(vec![entry(3, None, Some("w")), entry(1, None, Some("w"))], SETTINGS);
    assert_eq!(reloaded, Reloaded { keys: 2, added: 1, removed: 2 });
    let keys = pool.roster().keys().to_vec();
    assert!(std::ptr::eq(keys[0].workspace(), keys[1].workspace()));
    assert_eq!(keys[0].workspace().quota(NOW).count, 20);
}

#[test]
fn a_key_moved_to_another_workspace_keeps_its_own_cooldown_and_not_its_credits() {
    let pool = pool_with_history();
    pool.reload(vec![entry(2, Some("two"), Some("elsewhere"))], SETTINGS);
    let key = Arc::clone(&pool.roster().keys()[0]);
    assert!(key.cooldown().is_none(), "a rate limit is its workspace's");
    assert_eq!(key.workspace().quota(NOW), Quota::default());
}

#[test]
fn other_settings_hold_from_the_next_roster_on() {
    let pool = separate_keys(1);
    let held = pool.roster();
    pool.reload(
        vec![entry(0, None, None)],
        Settings { rate_limited_cooldown: Duration::from_secs(5), ..SETTINGS },
    );
    let rests_until = |roster: &Roster| {
        record_verdict(
            &pool,
            roster,
            &roster.keys()[0],
            Verdict::RateLimited(None),
            Some(&speech(1, &[])),
            NOW,
        );
        roster.keys()[0].workspace().limited_until(NOW).unwrap()
    };
    assert_eq!(rests_until(&pool.roster()), later(5));
    assert_eq!(rests_until(&held), later(60));
}

#[test]
fn the_key_in_use_is_not_reported_again_because_it_moved() {
    let pool = separate_keys(2);
    assert_eq!(pool.try_lease(&speech(0, &[]), NOW).unwrap().transitions.len(), 1);
    pool.reload(vec![entry(2, None, None), entry(0, None, None)], SETTINGS);
    assert!(pool.try_lease(&speech(0, &[0]), NOW).unwrap().transitions.is_empty());
}

/// A slot that is released between two evaluations of the keys is found by the second one, and the first
/// one is not taken for a lack of credits.
#[test]
fn a_request_without_a_slot_fails_because_all_keys_are_busy() {
    let pool = separate_keys(1);
    pool.roster().keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    match pool.try_lease(&speech(1, &[]), NOW) {
                        Ok(reserved) => drop(reserved),
                        Err(reason) => assert!(matches!(reason, Unavailable::Full { .. }), "{reason:?}"),
                    }
                }
            });
        }
    });
}

#[test]
fn the_last_credits_go_to_one_request() {
    let pool = separate_keys(2);
    pool.report_quota(0, 90, 100, NOW);
    let first = pool.try_lease(&speech(8, &[]), NOW).unwrap();
    assert_eq!(first.lease.key().position(), 0);
    let second = pool.try_lease(&speech(8, &[]), NOW).unwrap();
    assert_eq!(second.lease.key().position(), 1, "two credits are left of the first");
    // The substitute is not the key in use.
    assert!(second.transitions.is_empty());
    assert_eq!(pool.try_lease(&speech(2, &[]), NOW).unwrap().lease.key().position(), 0);
}

#[test]
fn an_unsettled_lease_costs_its_estimate() {
    let pool = separate_keys(1);
    pool.report_quota(0, 0, 100, NOW);
    let mut settled = pool.try_lease(&speech(30, &[]), NOW).unwrap().lease;
    pool.settle(&pool.roster(), &mut settled, 10, NOW);
    drop(settled);
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 10);
    let mut sent = pool.try_lease(&speech(30, &[]), NOW).unwrap().lease;
    sent.begin();
    drop(sent);
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 40);
    drop(pool.try_lease(&speech(30, &[]), NOW).unwrap());
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 40, "no request was sent with it");
    assert_eq!(pool.roster().keys()[0].workspace().reserved(), 0);
}

#[test]
fn the_richest_key_serves_one_request_when_no_key_can_pay() {
    let pool = separate_keys(2);
    pool.report_quota(0, 95, 100, NOW);
    pool.report_quota(1, 90, 100, NOW);
    let overcommitted = pool.try_lease(&speech(20, &[]), NOW).unwrap();
    assert_eq!(overcommitted.lease.key().position(), 1);
    let other = pool.try_lease(&speech(20, &[]), NOW).unwrap();
    assert_eq!(other.lease.key().position(), 0);
    let full = Unavailable::Full { until: Some(UnixMs(9_000_000)) };
    assert_eq!(pool.try_lease(&speech(20, &[]), NOW).unwrap_err(), full, "or the credits come back");
    // The refusal reports the remaining credits: larger requests skip the key, and smaller ones use it.
    let verdict =
        Verdict::WorkspaceQuota(Shortfall { remaining: Some(5), required: Some(10), ..Shortfall::default() });
    let roster = pool.roster();
    record_verdict(&pool, &roster, &roster.keys()[1], verdict, Some(&speech(20, &[])), NOW);
    pool.settle(&roster, &mut { overcommitted.lease }, 0, NOW);
    pool.settle(&roster, &mut { other.lease }, 0, NOW);
    assert_eq!(pool.snapshot(NOW)[1].state.status().word(), "active", "the key is short for that size only");
    let smaller = pool.try_lease(&speech(10, &[0]), NOW).unwrap().lease;
    assert_eq!(smaller.key().position(), 1);
    assert!(pool.try_lease(&speech(1, &[0]), NOW).is_err(), "ten of our credits are five of theirs");
    drop(smaller);
    assert!(pool.try_lease(&speech(11, &[0]), NOW).is_err());
}

#[test]
fn kept_credits_are_not_spent() {
    let entries = vec![KeyEntry { kept_credits: 50, ..entry(0, None, None) }, entry(1, None, None)];
    let pool = Arc::new(Pool::new(entries, SETTINGS));
    pool.report_quota(0, 0, 100, NOW);
    assert_eq!(pool.try_lease(&speech(50, &[]), NOW).unwrap().lease.key().position(), 0);
    assert_eq!(pool.try_lease(&speech(51, &[]), NOW).unwrap().lease.key().position(), 1);
}

#[test]
fn kept_credits_are_no_last_resort() {
    let entries = vec![KeyEntry { kept_credits: 50, ..entry(0, None, None) }];
    let pool = Arc::new(Pool::new(entries, SETTINGS));
    pool.report_quota(0, 0, 100, NOW);
    let resets_at = Some(UnixMs(9_000_000));
    assert_eq!(
        pool.try_lease(&speech(51, &[]), NOW).unwrap_err(),
        Unavailable::Exhausted { resets_at, left: Some(100) }
    );
    let held = pool.try_lease(&speech(40, &[]), NOW).unwrap().lease;
    let busy = pool.try_lease(&speech(20, &[]), NOW).unwrap_err();
    let full = Unavailable::Full { until: Some(UnixMs(9_000_000)) };
    assert_eq!(busy, full, "reserved credits may be returned");
    drop(held);
    assert!(pool.try_lease(&speech(50, &[]), NOW).is_ok());
}

fn invalid() -> Observation {
    Observation::Invalid { verdict: Verdict::InvalidKey, source: RefusalSource::default() }
}

#[test]
fn only_a_poll_makes_a_key_invalid_for_long() {
    let pool = separate_keys(1);
    let roster = pool.roster();
    let key = &roster.keys()[0];
    for at in [NOW, later(600), later(1_200)] {
        pool.record(0, Verdict::InvalidKey, at);
        assert!(key.wants_poll());
        assert_eq!(pool.select(&[], at.plus(Duration::from_secs(29))), Err(Unavailable::Invalid));
        // One request may probe it, and only one.
        let probe = at.plus(Duration::from_secs(30));
        assert_eq!(pool.select(&[], probe), Ok(0));
        assert_eq!(pool.select(&[], probe), Err(Unavailable::Invalid));
    }
    pool.observe(&roster, key, invalid(), later(1_201));
    assert!(!key.wants_poll());
    assert_eq!(pool.select(&[], later(1_201 + 86_399)), Err(Unavailable::Invalid));
    pool.observe(&roster, key, Observation::Unreadable, later(1_300));
    assert_eq!(pool.select(&[], later(1_300)), Ok(0));
}

#[test]
fn a_request_that_is_served_clears_its_key() {
    let pool = separate_keys(1);
    pool.record(0, Verdict::InvalidKey, NOW);
    pool.record(0, Verdict::Served, NOW);
    assert!(pool.roster().keys()[0].evidence().is_empty());
    assert_eq!(pool.select(&[], NOW), Ok(0));
}

#[test]
fn a_key_in_an_unproven_cooldown_is_probed_only_when_no_other_can_serve() {
    let pool = separate_keys(2);
    pool.record(0, Verdict::WorkspaceQuota(Shortfall::default()), NOW);
    assert_eq!(pool.select(&[], later(31)), Ok(1));
    // A request that the second key has refused has only the first one left.
    assert_eq!(pool.select(&[1], later(31)), Ok(0));
    // The request is served: the words are refuted.
    pool.record(0, Verdict::Served, later(31));
    assert_eq!(pool.select(&[], later(31)), Ok(0));
}

#[test]
fn a_key_in_two_unproven_cooldowns_may_be_probed() {
    for verdicts in [[Verdict::Abuse, Verdict::Billing], [Verdict::Billing, Verdict::Abuse]] {
        let pool = separate_keys(1);
        verdicts.into_iter().for_each(|verdict| drop(pool.record(0, verdict, NOW)));
        assert!(pool.select(&[], later(29)).is_err(), "{verdicts:?}");
        assert_eq!(pool.select(&[], later(30)), Ok(0), "{verdicts:?}");
    }
}

#[test]
fn a_rate_limit_holds_for_its_concurrency_group() {
    let pool = separate_keys(1);
    pool.record(0, Verdict::RateLimited(Some(Duration::from_secs(20))), NOW);
    assert_eq!(pool.select(&[], NOW), Err(Unavailable::Cooling { until: later(20) }));
    assert_eq!(pool.snapshot(NOW)[0].state.status().word(), "rate_limited");
    let other = KeyRequest { group: Some(ConcurrencyGroup::TRANSCRIPTION), ..speech(1, &[]) };
    assert!(pool.try_lease(&other, NOW).is_ok());
    assert!(pool.try_lease(&KeyRequest { group: None, ..speech(0, &[]) }, NOW).is_ok());
    // The `Retry-After` of a front end has an upper bound.
    pool.record(0, Verdict::RateLimited(Some(Duration::from_secs(86_400))), later(20));
    assert_eq!(pool.select(&[], later(21)), Err(Unavailable::Cooling { until: later(320) }));
}

#[test]
fn being_short_for_one_request_is_not_being_exhausted() {
    let pool = separate_keys(1);
    pool.report_quota(0, 50, 9_000, NOW);
    let short = Verdict::WorkspaceQuota(Shortfall {
        remaining: Some(8_950),
        required: Some(9_500),
        ..Shortfall::default()
    });
    let roster = pool.roster();
    let large = speech(9_500, &[]);
    record_verdict(&pool, &roster, &roster.keys()[0], short, Some(&large), NOW);
    assert_eq!(pool.snapshot(NOW)[0].state.status().word(), "active");
    assert!(pool.try_lease(&speech(50, &[]), NOW).is_ok());
    assert!(matches!(pool.try_lease(&large, NOW), Err(Unavailable::Exhausted { .. })));
}

#[test]
fn a_restricted_key_is_tried_last_and_a_refused_one_only_first() {
    let pool = separate_keys(3);
    let restricted =
        |levels: &[(usize, Restraint)]| KeyRequest { restricted: levels.to_vec(), ..speech(0, &[]) };
    let select =
        |request: &KeyRequest| pool.try_lease(request, NOW).map(|reserved| reserved.lease.key().position());
    let (inferred, refused) = (Restraint::Inferred, Restraint::Refused);
    assert_eq!(select(&restricted(&[(0, refused), (1, inferred)])), Ok(2));
    assert_eq!(select(&restricted(&[(0, refused), (1, inferred), (2, refused)])), Ok(1));
    let all = restricted(&[(0, refused), (1, refused), (2, refused)]);
    assert_eq!(select(&all), Ok(0));
    assert_eq!(select(&KeyRequest { was_refused: true, ..all }), Err(Unavailable::Tried));
    let longest = restricted(&[(0, refused), (1, Restraint::RefusedLongest), (2, refused)]);
    assert_eq!(select(&longest), Ok(1));
    assert_eq!(select(&KeyRequest { was_refused: true, ..longest }), Err(Unavailable::Tried));
    let until = Restraint::Until(later(9));
    let cooling = restricted(&[(0, until), (1, until), (2, until)]);
    assert_eq!(select(&cooling), Err(Unavailable::Cooling { until: later(9) }));
}

#[test]
fn keys_of_one_workspace_are_found_to_share_it() {
    let pool = separate_keys(3);
    for (key, count) in [(0, 10), (1, 10), (2, 70)] {
        pool.report_quota(key, count, 100, NOW);
    }
    let held = pool.roster();
    assert!(pool.record_workspace(&held.keys()[1], "ws_1"));
    assert!(pool.record_workspace(&held.keys()[0], "ws_1"));
    assert!(!pool.record_workspace(&held.keys()[0], "ws_1"));
    let keys = pool.roster().keys().to_vec();
    assert!(std::ptr::eq(keys[0].workspace(), keys[1].workspace()));
    assert!(!std::ptr::eq(keys[0].workspace(), keys[2].workspace()));
    assert_eq!(keys[0].workspace().quota(NOW).count, 10);
    assert_eq!(keys[1].workspace().identity(), keys[0].workspace().identity());
    pool.record(0, quota_refusal(), NOW);
    assert_eq!(pool.select(&[], NOW), Ok(2));
    // The evidence survives a changed configuration.
    pool.reload(vec![entry(2, None, None), entry(1, Some("one"), None), entry(0, None, None)], SETTINGS);
    let keys = pool.roster().keys().to_vec();
    assert!(std::ptr::eq(keys[1].workspace(), keys[2].workspace()));
    assert_eq!(keys[0].workspace().quota(NOW).count, 70);
}

#[test]
fn an_identifier_of_one_key_applies_to_its_configured_workspace() {
    let pool = pool(&[Some("w"), Some("w"), None]);
    pool.report_quota(0, 10, 100, NOW);
    pool.record_workspace(&pool.roster().keys()[1], "ws_1");
    pool.record_workspace(&pool.roster().keys()[2], "ws_1");
    let keys = pool.roster().keys().to_vec();
    assert!(keys.iter().all(|key| std::ptr::eq(key.workspace(), keys[0].workspace())));
    assert_eq!(keys[2].workspace().quota(NOW).count, 10);
}

/// Three workspaces with this many slots each.
fn with_slots(slots: u32) -> Arc<Pool> {
    let pool = separate_keys(3);
    for key in pool.roster().keys() {
        key.workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(slots);
    }
    pool
}

#[tokio::test]
async fn the_sixteenth_request_for_fifteen_slots_waits() {
    let pool = with_slots(5);
    let roster = pool.roster();
    let mut leases = Vec::new();
    for _ in 0..15 {
        leases.push(pool.reserve(&roster, &speech(1, &[])).await.unwrap().lease);
    }
    for (key, running) in roster.keys().iter().zip([5, 5, 5]) {
        assert_eq!(key.workspace().running(ConcurrencyGroup::SPEECH), (running, Some(5)));
    }
    let request = speech(1, &[]);
    let mut waiting = Box::pin(pool.reserve(&roster, &request));
    assert!(futures_poll(&mut waiting).is_none());
    assert_eq!(pool.waiting(), 1);
    // Another concurrency group has its own slots.
    let fast = KeyRequest { group: Some(ConcurrencyGroup::FAST_SPEECH), ..speech(1, &[]) };
    assert_eq!(pool.reserve(&roster, &fast).await.unwrap().lease.key().position(), 0);
    leases.remove(7);
    assert_eq!(waiting.await.unwrap().lease.key().position(), 1);
    assert_eq!(pool.waiting(), 0);
}

#[tokio::test]
async fn clients_take_turns_and_each_keeps_its_order() {
    let pool = with_slots(1);
    let roster = pool.roster();
    let held: Vec<Lease> =
        (0..3).map(|_| pool.try_reserve(&roster, &speech(1, &[]), NOW).unwrap().lease).collect();
    let order: Arc<Mutex<Vec<&str>>> = Arc::default();
    let mut waiting = Vec::new();
    for name in ["a1", "a2", "a3", "b1", "c1"] {
        let (pool, roster, order) = (Arc::clone(&pool), Arc::clone(&roster), Arc::clone(&order));
        let mut future = Box::pin(async move {
            let request = KeyRequest { client: ClientName::new(&name[..1]), ..speech(1, &[]) };
            let reserved = pool.reserve(&roster, &request).await.unwrap();
            order.lock().unwrap().push(name);
            reserved.lease
        });
        assert!(futures_poll(&mut future).is_none());
        waiting.push(future);
    }
    assert_eq!(pool.waiting(), 5);
    // One slot after the other; each lease is held, so that no other request gets the slot.
    let mut leased = Vec::new();
    for lease in held {
        drop(lease);
        leased.extend(
            waiting.iter_mut().enumerate().find_map(|(at, future)| Some((at, futures_poll(future)?))),
        );
        let (at, _) = leased.last().unwrap();
        drop(waiting.remove(*at));
    }
    assert_eq!(*order.lock().unwrap(), ["a1", "b1", "c1"]);
    drop(leased.remove(0));
    assert!(waiting.iter_mut().any(|future| futures_poll(future).is_some()));
    assert_eq!(order.lock().unwrap()[3], "a2");
}

#[tokio::test]
async fn a_request_does_not_wait_for_a_key_that_a_reload_has_added() {
    let pool = Arc::new(Pool::new(vec![entry(0, None, None)], SETTINGS));
    let before = pool.roster();
    before.keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
    let _held = pool.try_reserve(&before, &speech(1, &[]), NOW).unwrap();
    let request = speech(1, &[]);
    let mut queued = Box::pin(pool.reserve(&before, &request));
    assert!(futures_poll(&mut queued).is_none());
    pool.reload(vec![entry(0, None, None), entry(1, None, None)], SETTINGS);
    let after = pool.roster();
    let leased = futures_poll(&mut Box::pin(pool.reserve(&after, &request)))
        .expect("the request waits behind the others");
    assert_eq!(leased.unwrap().lease.key().position(), 1);
    // The queued request selects again, among the new keys.
    assert_eq!(queued.await.unwrap_err(), Unavailable::Outdated);
}

#[tokio::test]
async fn a_cancelled_request_leaves_the_queue() {
    let pool = with_slots(1);
    let roster = pool.roster();
    let mut held: Vec<Lease> =
        (0..3).map(|_| pool.try_reserve(&roster, &speech(1, &[]), NOW).unwrap().lease).collect();
    let request = speech(1, &[]);
    let mut cancelled = Box::pin(pool.reserve(&roster, &request));
    assert!(futures_poll(&mut cancelled).is_none());
    let mut waiting = Box::pin(pool.reserve(&roster, &request));
    assert!(futures_poll(&mut waiting).is_none());
    // Assigned at the moment in which its client disconnects: the next request gets the key.
    held.pop();
    drop(cancelled);
    assert!(waiting.await.is_ok());
    assert_eq!(pool.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_queued_request_times_out() {
    let pool = with_slots(1);
    let roster = pool.roster();
    let _held: Vec<Lease> =
        (0..3).map(|_| pool.try_reserve(&roster, &speech(1, &[]), NOW).unwrap().lease).collect();
    let leased = pool.reserve(&roster, &speech(1, &[])).await;
    assert_eq!(leased.unwrap_err(), Unavailable::Full { until: None });
    assert_eq!(pool.waiting(), 0);
}

#[tokio::test]
async fn a_full_queue_refuses_a_request() {
    let pool = Arc::new(Pool::new(vec![entry(0, None, None)], Settings { max_queued: 1, ..SETTINGS }));
    let roster = pool.roster();
    roster.keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).set_reported_max(1);
    let _held = pool.try_reserve(&roster, &speech(1, &[]), NOW).unwrap();
    let request = speech(1, &[]);
    let mut first = Box::pin(pool.reserve(&roster, &request));
    assert!(futures_poll(&mut first).is_none());
    assert_eq!(pool.reserve(&roster, &request).await.unwrap_err(), Unavailable::Full { until: None });
}

/// Polls a future once.
fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::Pin::new(future).poll(&mut cx) {
        std::task::Poll::Ready(output) => Some(output),
        std::task::Poll::Pending => None,
    }
}

#[test]
fn a_workspace_that_is_named_later_is_known_by_its_key() {
    let entry = |key: &str, workspace: Option<&str>| KeyEntry {
        workspace: workspace.map(str::to_owned),
        ..ApiKey::new(key).unwrap().into()
    };
    let pool = Pool::new(vec![entry("sk_a", None), entry("sk_b", None)], Settings::STILL);
    let before = pool.roster();
    assert!(before.has_choice());
    let of_a = before.keys()[0].workspace().identity().clone();
    pool.reload(vec![entry("sk_c", Some("studio")), entry("sk_a", Some("studio"))], Settings::STILL);
    let after = pool.roster();
    let studio = after.keys()[0].workspace().identity();
    assert_eq!(after.identity_of(&of_a), Some(studio));
    assert_eq!(after.identity_of(studio), Some(studio));
    assert_eq!(after.identity_of(before.keys()[1].workspace().identity()), None, "no key opens it");
    assert!(!after.has_choice());
}

#[test]
fn a_locked_workspace_is_usable_when_its_bill_is_paid() {
    let pool = separate_keys(1);
    pool.record(0, Verdict::Billing, NOW);
    let roster = pool.roster();
    let key = &roster.keys()[0];
    let seen = |is_paid| figures(Quota::default(), is_paid);
    assert!(pool.observe(&roster, key, seen(Some(false)), later(1)).is_empty());
    assert_eq!(changes(&pool.observe(&roster, key, seen(Some(true)), later(2))), [(0, StateChange::Returns)]);
}

#[test]
fn a_clock_step_resets_credits_once_and_ends_every_cooldown() {
    let pool = separate_keys(1);
    pool.report_quota(0, 100, 100, NOW);
    let reset = UnixMs(9_000_000);
    assert!(pool.select(&[], NOW).is_err());
    // Forward past the reset date: a new period, once.
    assert_eq!(pool.select(&[], reset), Ok(0));
    pool.charge(0, 7, reset);
    // Backward: the credits spent in the new period stay spent.
    assert_eq!(pool.select(&[], NOW), Ok(0));
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 7);
    // Evidence of a clock that ran ahead is dated to the present.
    pool.record(0, Verdict::InvalidKey, later(86_400));
    assert_eq!(pool.select(&[], NOW), Err(Unavailable::Invalid));
    pool.report_quota(0, 7, 100, later(86_401));
    assert_eq!(pool.select(&[], NOW), Ok(0));
}

#[test]
fn an_identified_workspace_takes_its_configured_name() {
    let pool = separate_keys(1);
    pool.record_workspace(&pool.roster().keys()[0], "ws_1");
    pool.reload(vec![entry(0, None, Some("studio"))], SETTINGS);
    let named = pool.roster();
    assert_eq!(named.keys()[0].workspace().membership().name(), Some("studio"));
    pool.reload(vec![entry(0, None, Some("studio"))], SETTINGS);
    assert!(Arc::ptr_eq(&named.keys()[0], &pool.roster().keys()[0]), "nothing has changed");
}

#[test]
fn a_slot_is_not_released_twice() {
    let pool = separate_keys(1);
    let mut reserved = pool.try_lease(&speech(1, &[]), NOW).unwrap();
    let roster = pool.roster();
    let limiter = roster.keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH);
    reserved.lease.release();
    assert!(!reserved.lease.has_slot());
    reserved.lease.release_slot();
    drop(reserved);
    assert_eq!(limiter.running(), 0);
}

/// All locks of the pool are held meanwhile: that of the queue, of the roster's replacement, and of each
/// workspace's evidence.
#[test]
fn a_key_is_chosen_and_released_without_a_lock() {
    let pool = separate_keys(3);
    let roster = pool.roster();
    let _queue = pool.queue.hold();
    let _replacing = pool.replacing.lock().unwrap();
    let _evidence: Vec<_> = roster.keys().iter().map(|key| key.workspace().evidence_cell().hold()).collect();
    let (sender, receiver) = std::sync::mpsc::channel();
    let chooser = Arc::clone(&pool);
    crate::tasks::thread("chooser", move || {
        let reserved = chooser.try_lease(&speech(10, &[]), NOW);
        let is_chosen = reserved.is_ok();
        drop(reserved);
        sender.send(is_chosen)
    })
    .unwrap();
    assert_eq!(receiver.recv_timeout(Duration::from_secs(30)), Ok(true), "the thread waits for a lock");
}
