mod waiting;

use std::time::Duration;

use super::*;
use crate::policy::budget::Extension;
use crate::policy::client::ClientName;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::ClaimedFault;
use crate::policy::key_state::{Change, Cooldown, CooldownReason};
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
fn apart(count: usize) -> Arc<Pool> {
    pool(&vec![None; count])
}

/// A speech request that costs this many credits, of a client that has tried these keys.
fn speech(credits: u64, excluded: &[usize]) -> KeyRequest {
    KeyRequest {
        tried: excluded.to_vec(),
        ..KeyRequest::new(ClientName::new("app"), Some(credits), Some(ConcurrencyGroup::SPEECH))
    }
}

trait Trial {
    fn taken(&self, request: &KeyRequest, now: UnixMs) -> Result<Reserved, Unavailable>;
    fn chosen(&self, tried: &[usize], now: UnixMs) -> Result<usize, Unavailable>;
    fn judged(&self, position: usize, verdict: Verdict, now: UnixMs) -> Vec<Transition>;
    fn told(&self, position: usize, count: u64, limit: u64, now: UnixMs) -> Vec<Transition>;
    fn spent(&self, position: usize, credits: u64, now: UnixMs) -> Vec<Transition>;
}

impl Trial for Arc<Pool> {
    fn taken(&self, request: &KeyRequest, now: UnixMs) -> Result<Reserved, Unavailable> {
        self.try_reserve(&self.roster(), request, now).map_err(|blocked| blocked.why)
    }

    #[track_caller]
    fn chosen(&self, tried: &[usize], now: UnixMs) -> Result<usize, Unavailable> {
        self.taken(&speech(0, tried), now).map(|reserved| reserved.lease.key().position())
    }

    fn judged(&self, position: usize, verdict: Verdict, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster();
        judge(self, &roster, &roster.keys()[position], verdict, Some(&speech(100, &[])), now)
    }

    fn told(&self, position: usize, count: u64, limit: u64, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster();
        let quota = Quota {
            count,
            limit: Some(limit),
            extension: Extension::None,
            resets_at: Some(UnixMs(9_000_000)),
        };
        self.observe(&roster, &roster.keys()[position], figures(quota, None), now)
    }

    fn spent(&self, position: usize, credits: u64, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster();
        let mut lease = Lease::take(self, &roster.keys()[position], &speech(0, &[]), false, now).unwrap();
        self.settle(&roster, &mut lease, credits, now)
    }
}

fn figures(quota: Quota, is_paid: Option<bool>) -> Observation {
    Observation::Quota { quota, tier: None, is_paid, capabilities: Capabilities::default() }
}

fn judge(
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
        Refused { verdict, request, is_agreed: false, source: Source::default() },
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

fn changes(news: &[Transition]) -> Vec<(usize, Change)> {
    news.iter().map(|news| (news.key.position(), news.change)).collect()
}

#[test]
fn the_first_key_serves_until_it_is_refused() {
    let pool = apart(3);
    assert_eq!(pool.chosen(&[], NOW), Ok(0));
    pool.judged(0, quota_refusal(), NOW);
    assert_eq!(pool.chosen(&[], NOW), Ok(1));
}

#[test]
fn a_rate_limited_key_is_back_after_its_cooldown() {
    let pool = apart(2);
    pool.judged(0, Verdict::RateLimited(None), NOW);
    assert_eq!(pool.chosen(&[], later(59)), Ok(1));
    assert_eq!(pool.chosen(&[], later(60)), Ok(0));
    pool.judged(0, Verdict::RateLimited(Some(Duration::from_secs(7))), later(60));
    assert_eq!(pool.chosen(&[], later(66)), Ok(1));
    assert_eq!(pool.chosen(&[], later(67)), Ok(0));
}

#[test]
fn a_concurrency_refusal_is_no_sixty_second_sentence() {
    let pool = apart(2);
    pool.judged(0, Verdict::Concurrency { maximum: Some(4) }, NOW);
    assert_eq!(pool.chosen(&[], later(1)), Ok(1));
    assert_eq!(pool.chosen(&[], later(2)), Ok(0));
}

#[test]
fn an_empty_workspace_is_back_at_its_reset_date() {
    let pool = apart(1);
    pool.told(0, 10, 100, NOW);
    pool.judged(0, quota_refusal(), NOW);
    let reset = UnixMs(9_000_000);
    assert_eq!(
        pool.chosen(&[], UnixMs(8_999_999)),
        Err(Unavailable::Exhausted { resets_at: Some(reset), left: None })
    );
    assert_eq!(pool.chosen(&[], reset), Ok(0));
    assert_eq!(pool.snapshot(reset)[0].quota.count, 0);
}

#[test]
fn an_empty_workspace_without_a_date_is_tried_again_after_a_while() {
    let pool = apart(1);
    pool.judged(0, quota_refusal(), NOW);
    assert!(pool.chosen(&[], later(29)).is_err());
    assert_eq!(pool.chosen(&[], later(3_600)), Ok(0));
}

#[test]
fn parking_a_workspace_parks_all_its_keys_and_no_other() {
    let pool = pool(&[Some("a"), Some("b"), Some("a")]);
    let news = pool.judged(0, quota_refusal(), NOW);
    assert_eq!(news.len(), 2);
    assert_eq!(pool.chosen(&[], NOW), Ok(1));
    assert_eq!(pool.chosen(&[1], NOW), Err(Unavailable::Tried));
}

#[test]
fn a_key_at_its_own_cap_leaves_its_workspace_open() {
    let pool = pool(&[Some("a"), Some("a")]);
    pool.judged(
        0,
        Verdict::KeyQuota(Shortfall { remaining: Some(0), required: Some(1), ..Shortfall::default() }),
        NOW,
    );
    assert_eq!(pool.chosen(&[], NOW), Ok(1));
}

#[test]
fn what_is_not_the_keys_fault_does_not_park_it() {
    let pool = apart(1);
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
        assert!(pool.judged(0, verdict, NOW).is_empty());
        assert_eq!(pool.chosen(&[], NOW), Ok(0));
    }
}

#[test]
fn spending_to_the_limit_exhausts_without_asking() {
    let pool = apart(2);
    pool.told(0, 0, 100, NOW);
    assert!(pool.spent(0, 79, NOW).is_empty());
    assert!(
        matches!(changes(&pool.spent(0, 1, NOW))[..], [(0, Change::NearLimit(quota))] if quota.count == 80)
    );
    assert_eq!(pool.chosen(&[], NOW), Ok(0));
    assert!(matches!(
        changes(&pool.spent(0, 20, NOW))[..],
        [(0, Change::Rests { reason: CooldownReason::Exhausted, .. })]
    ));
    assert_eq!(pool.chosen(&[], NOW), Ok(1));
}

#[test]
fn a_charge_tells_of_every_key_of_its_workspace_whatever_has_changed() {
    let studio = Some("studio");
    let pool = pool(&[studio, studio, None]);
    pool.told(0, 0, 100, NOW);
    pool.judged(1, Verdict::RateLimited(None), NOW);
    let told = |credits, at| changes(&pool.spent(0, credits, at));
    assert_eq!(told(1, NOW), []);
    assert_eq!(told(1, later(59)), []);
    // The cooldown has ended.
    assert_eq!(told(1, later(60)), [(0, Change::Returns), (1, Change::Returns)]);
    assert_eq!(told(1, later(61)), []);
    // A changed cooldown invalidates the cache.
    pool.roster().keys()[1].rest(Cooldown { reason: CooldownReason::Billing, until: later(90) });
    let rests = Change::Rests { reason: CooldownReason::Billing, until: Some(later(90)) };
    assert_eq!(told(1, later(62)), [(1, rests)]);
    // The charge itself changes the state.
    let near = told(75, later(63));
    assert!(matches!(near.as_slice(), [(0, Change::NearLimit(_))]), "{near:?}");
    assert_eq!(told(1, later(64)), []);
    let spent = told(19, later(65));
    let exhausted = |(position, change): &(usize, Change)| {
        *position < 2 && matches!(change, Change::Rests { reason: CooldownReason::Exhausted, .. })
    };
    assert!(spent.iter().any(exhausted), "{spent:?}");
}

#[test]
fn a_refused_key_comes_back_when_the_provider_accepts_it() {
    let pool = apart(1);
    pool.judged(0, Verdict::InvalidKey, NOW);
    assert_eq!(pool.chosen(&[], NOW), Err(Unavailable::Invalid));
    let roster = pool.roster();
    let news = pool.observe(&roster, &roster.keys()[0], Observation::Unreadable, later(1));
    assert_eq!(changes(&news), [(0, Change::Returns)]);
    assert_eq!(pool.chosen(&[], later(1)), Ok(0));
}

#[test]
fn a_lagging_figure_does_not_undo_a_refusal_and_a_new_limit_does() {
    let pool = apart(1);
    pool.told(0, 90, 100, NOW);
    pool.judged(0, quota_refusal(), NOW);
    pool.told(0, 90, 100, later(1));
    assert!(pool.chosen(&[], later(1)).is_err());
    pool.told(0, 90, 1_000, later(2));
    assert_eq!(pool.chosen(&[], later(2)), Ok(0));
    // A figure that is older than the lag refutes the refusal, too.
    pool.judged(0, quota_refusal(), later(3));
    pool.told(0, 90, 1_000, later(302));
    assert!(pool.chosen(&[], later(302)).is_err());
    pool.told(0, 90, 1_000, later(303));
    assert_eq!(pool.chosen(&[], later(303)), Ok(0));
}

#[test]
fn what_is_settled_after_a_refusal_is_counted_once() {
    let pool = apart(1);
    pool.told(0, 90, 100, NOW);
    // The provider has charged the request in flight already, and the figures of the refusal include
    // that.
    pool.judged(
        0,
        Verdict::WorkspaceQuota(Shortfall { remaining: Some(0), required: Some(50), ..Shortfall::default() }),
        NOW,
    );
    pool.spent(0, 10, NOW);
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 100);
}

#[test]
fn the_key_in_use_is_told_once_and_again_when_it_changes() {
    let pool = apart(3);
    let news = |tried: &[usize]| changes(&pool.taken(&speech(0, tried), NOW).unwrap().news);
    assert!(matches!(news(&[])[..], [(0, Change::InUse { rotated_to: None, .. })]));
    assert!(news(&[]).is_empty());
    // A request that fails on its own takes the next key; the key in use stays the same.
    assert!(news(&[0]).is_empty());
    pool.judged(0, quota_refusal(), NOW);
    assert!(matches!(news(&[0])[..], [(1, Change::InUse { rotated_to: Some(1), .. })]));
}

#[test]
fn a_lease_releases_when_it_is_dropped() {
    let pool = pool(&[Some("a"), Some("a")]);
    let roster = pool.roster();
    let (one, two) = (pool.taken(&speech(5, &[]), NOW).unwrap(), pool.taken(&speech(5, &[0]), NOW).unwrap());
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
fn what_was_remembered_holds_again() {
    let pool = apart(3);
    let prints: Vec<Fingerprint> =
        pool.roster().keys().iter().map(|key| key.api_key().fingerprint()).collect();
    let quota = Quota { count: 5, limit: Some(10), extension: Extension::None, resets_at: Some(later(50)) };
    let evidence = |claim, at| {
        vec![Evidence { claim, at, named_span: None, is_agreed: false, source: Source::default() }]
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
    assert_eq!(pool.chosen(&[], NOW), Ok(1));
    assert_eq!(pool.chosen(&[], later(50)), Ok(0));
    assert_eq!(pool.snapshot(NOW)[1].quota, quota);
    assert_eq!(pool.snapshot(NOW)[2].quota, Quota::default());
}

#[test]
fn many_threads_lose_no_credit_and_no_lease() {
    let pool = apart(2);
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
fn lived_in() -> Arc<Pool> {
    let entries = vec![entry(0, None, None), entry(1, None, Some("w")), entry(2, Some("two"), Some("w"))];
    let pool = Arc::new(Pool::new(entries, SETTINGS));
    pool.told(0, 10, 100, NOW);
    pool.told(1, 20, 100, NOW);
    pool.judged(0, Verdict::InvalidKey, NOW);
    pool.judged(2, Verdict::RateLimited(None), NOW);
    pool
}

#[test]
fn a_reload_in_another_order_keeps_every_key_as_it_stood() {
    let pool = lived_in();
    let before = pool.roster();
    pool.reload(vec![entry(2, Some("two"), Some("w")), entry(0, None, None)], SETTINGS);
    let after = pool.roster();
    assert!(Arc::ptr_eq(&after.keys()[0], &before.keys()[2]));
    assert!(Arc::ptr_eq(&after.keys()[1], &before.keys()[0]));
    assert_eq!(after.keys().iter().map(|key| key.position()).collect::<Vec<_>>(), [0, 1]);
    // Both are still in cooldown, and the key that served is gone.
    assert!(pool.try_reserve(&after, &speech(0, &[]), NOW).is_err());
    assert_eq!(pool.chosen(&[], later(60)), Ok(0));
}

#[test]
fn a_request_under_way_keeps_its_roster() {
    let pool = apart(2);
    let held = pool.roster();
    pool.reload(vec![entry(1, None, None), entry(0, None, None)], SETTINGS);
    let reserved = pool.try_reserve(&held, &speech(0, &[]), NOW).unwrap();
    assert_eq!(held.position_of(reserved.lease.key()), Some(0));
    assert_eq!(reserved.lease.key().position(), 1, "people see the latest place");
    let next = pool.try_reserve(&held, &speech(0, &[0]), NOW).unwrap();
    assert_eq!(held.position_of(next.lease.key()), Some(1));
    // A removed key still records the results of its last requests.
    pool.reload(vec![entry(1, None, None)], SETTINGS);
    judge(&pool, &held, reserved.lease.key(), quota_refusal(), None, NOW);
    assert_eq!(pool.roster().position_of(reserved.lease.key()), None);
    assert_eq!(pool.snapshot(NOW).len(), 1);
}

#[test]
fn a_key_with_another_name_is_still_that_key() {
    let pool = lived_in();
    let before = pool.roster();
    pool.reload(vec![entry(0, Some("zero"), None), entry(1, None, Some("w"))], SETTINGS);
    let after = pool.roster();
    assert_eq!(after.keys()[0].name(), Some("zero"));
    assert_eq!(after.keys()[0].state(NOW), before.keys()[0].state(NOW));
    assert!(std::ptr::eq(after.keys()[0].workspace(), before.keys()[0].workspace()));
}

#[test]
fn a_new_key_of_a_known_workspace_shares_its_credits() {
    let pool = lived_in();
    let reloaded = pool.reload(vec![entry(3, None, Some("w")), entry(1, None, Some("w"))], SETTINGS);
    assert_eq!(reloaded, Reloaded { keys: 2, added: 1, removed: 2 });
    let keys = pool.roster().keys().to_vec();
    assert!(std::ptr::eq(keys[0].workspace(), keys[1].workspace()));
    assert_eq!(keys[0].workspace().quota(NOW).count, 20);
}

#[test]
fn a_key_of_another_workspace_keeps_its_own_park_and_not_its_credits() {
    let pool = lived_in();
    pool.reload(vec![entry(2, Some("two"), Some("elsewhere"))], SETTINGS);
    let key = Arc::clone(&pool.roster().keys()[0]);
    assert!(key.cooldown().is_none(), "a rate limit is its workspace's");
    assert_eq!(key.workspace().quota(NOW), Quota::default());
}

#[test]
fn other_settings_hold_from_the_next_roster_on() {
    let pool = apart(1);
    let held = pool.roster();
    pool.reload(
        vec![entry(0, None, None)],
        Settings { rate_limited_cooldown: Duration::from_secs(5), ..SETTINGS },
    );
    let rests_until = |roster: &Roster| {
        judge(&pool, roster, &roster.keys()[0], Verdict::RateLimited(None), Some(&speech(1, &[])), NOW);
        roster.keys()[0].workspace().limited_until(NOW).unwrap()
    };
    assert_eq!(rests_until(&pool.roster()), later(5));
    assert_eq!(rests_until(&held), later(60));
}

#[test]
fn the_key_in_use_is_not_told_again_because_it_moved() {
    let pool = apart(2);
    assert_eq!(pool.taken(&speech(0, &[]), NOW).unwrap().news.len(), 1);
    pool.reload(vec![entry(2, None, None), entry(0, None, None)], SETTINGS);
    assert!(pool.taken(&speech(0, &[0]), NOW).unwrap().news.is_empty());
}

/// A slot that is released between two evaluations of the keys is found by the second one, and the first
/// one is not taken for a lack of credits.
#[test]
fn a_request_without_a_place_hears_that_all_keys_are_busy() {
    let pool = apart(1);
    pool.roster().keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).learn(1);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    match pool.taken(&speech(1, &[]), NOW) {
                        Ok(reserved) => drop(reserved),
                        Err(why) => assert!(matches!(why, Unavailable::Full { .. }), "{why:?}"),
                    }
                }
            });
        }
    });
}

#[test]
fn the_last_credits_go_to_one_request() {
    let pool = apart(2);
    pool.told(0, 90, 100, NOW);
    let first = pool.taken(&speech(8, &[]), NOW).unwrap();
    assert_eq!(first.lease.key().position(), 0);
    let second = pool.taken(&speech(8, &[]), NOW).unwrap();
    assert_eq!(second.lease.key().position(), 1, "two credits are left of the first");
    // The substitute is not the key in use.
    assert!(second.news.is_empty());
    assert_eq!(pool.taken(&speech(2, &[]), NOW).unwrap().lease.key().position(), 0);
}

#[test]
fn a_lease_that_nobody_settles_costs_what_was_expected() {
    let pool = apart(1);
    pool.told(0, 0, 100, NOW);
    let mut settled = pool.taken(&speech(30, &[]), NOW).unwrap().lease;
    pool.settle(&pool.roster(), &mut settled, 10, NOW);
    drop(settled);
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 10);
    let mut sent = pool.taken(&speech(30, &[]), NOW).unwrap().lease;
    sent.begin();
    drop(sent);
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 40);
    drop(pool.taken(&speech(30, &[]), NOW).unwrap());
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 40, "nothing was asked with it");
    assert_eq!(pool.roster().keys()[0].workspace().reserved(), 0);
}

#[test]
fn when_nobody_can_pay_the_richest_is_asked_alone() {
    let pool = apart(2);
    pool.told(0, 95, 100, NOW);
    pool.told(1, 90, 100, NOW);
    let asked = pool.taken(&speech(20, &[]), NOW).unwrap();
    assert_eq!(asked.lease.key().position(), 1);
    let other = pool.taken(&speech(20, &[]), NOW).unwrap();
    assert_eq!(other.lease.key().position(), 0);
    let full = Unavailable::Full { until: Some(UnixMs(9_000_000)) };
    assert_eq!(pool.taken(&speech(20, &[]), NOW).unwrap_err(), full, "or the credits come back");
    // The refusal reports the remaining credits: larger requests skip the key, and smaller ones use it.
    let verdict =
        Verdict::WorkspaceQuota(Shortfall { remaining: Some(5), required: Some(10), ..Shortfall::default() });
    let roster = pool.roster();
    judge(&pool, &roster, &roster.keys()[1], verdict, Some(&speech(20, &[])), NOW);
    pool.settle(&roster, &mut { asked.lease }, 0, NOW);
    pool.settle(&roster, &mut { other.lease }, 0, NOW);
    assert_eq!(pool.snapshot(NOW)[1].standing.status().word(), "active", "it is short for that size only");
    let smaller = pool.taken(&speech(10, &[0]), NOW).unwrap().lease;
    assert_eq!(smaller.key().position(), 1);
    assert!(pool.taken(&speech(1, &[0]), NOW).is_err(), "ten of our credits are five of theirs");
    drop(smaller);
    assert!(pool.taken(&speech(11, &[0]), NOW).is_err());
}

#[test]
fn what_a_key_leaves_for_others_it_does_not_spend() {
    let entries = vec![KeyEntry { kept_credits: 50, ..entry(0, None, None) }, entry(1, None, None)];
    let pool = Arc::new(Pool::new(entries, SETTINGS));
    pool.told(0, 0, 100, NOW);
    assert_eq!(pool.taken(&speech(50, &[]), NOW).unwrap().lease.key().position(), 0);
    assert_eq!(pool.taken(&speech(51, &[]), NOW).unwrap().lease.key().position(), 1);
}

#[test]
fn what_a_key_leaves_for_others_is_no_last_resort() {
    let entries = vec![KeyEntry { kept_credits: 50, ..entry(0, None, None) }];
    let pool = Arc::new(Pool::new(entries, SETTINGS));
    pool.told(0, 0, 100, NOW);
    let resets_at = Some(UnixMs(9_000_000));
    assert_eq!(
        pool.taken(&speech(51, &[]), NOW).unwrap_err(),
        Unavailable::Exhausted { resets_at, left: Some(100) }
    );
    let held = pool.taken(&speech(40, &[]), NOW).unwrap().lease;
    let busy = pool.taken(&speech(20, &[]), NOW).unwrap_err();
    let full = Unavailable::Full { until: Some(UnixMs(9_000_000)) };
    assert_eq!(busy, full, "what is reserved may come back");
    drop(held);
    assert!(pool.taken(&speech(50, &[]), NOW).is_ok());
}

fn invalid() -> Observation {
    Observation::Invalid { verdict: Verdict::InvalidKey, source: Source::default() }
}

#[test]
fn only_a_poll_makes_a_key_invalid_for_long() {
    let pool = apart(1);
    let roster = pool.roster();
    let key = &roster.keys()[0];
    for at in [NOW, later(600), later(1_200)] {
        pool.judged(0, Verdict::InvalidKey, at);
        assert!(key.wants_poll());
        assert_eq!(pool.chosen(&[], at.plus(Duration::from_secs(29))), Err(Unavailable::Invalid));
        // One request may probe it, and only one.
        let probe = at.plus(Duration::from_secs(30));
        assert_eq!(pool.chosen(&[], probe), Ok(0));
        assert_eq!(pool.chosen(&[], probe), Err(Unavailable::Invalid));
    }
    pool.observe(&roster, key, invalid(), later(1_201));
    assert!(!key.wants_poll());
    assert_eq!(pool.chosen(&[], later(1_201 + 86_399)), Err(Unavailable::Invalid));
    pool.observe(&roster, key, Observation::Unreadable, later(1_300));
    assert_eq!(pool.chosen(&[], later(1_300)), Ok(0));
}

#[test]
fn a_request_that_is_served_clears_its_key() {
    let pool = apart(1);
    pool.judged(0, Verdict::InvalidKey, NOW);
    pool.judged(0, Verdict::Served, NOW);
    assert!(pool.roster().keys()[0].evidence().is_empty());
    assert_eq!(pool.chosen(&[], NOW), Ok(0));
}

#[test]
fn a_key_that_may_be_tried_is_tried_only_when_no_other_can_serve() {
    let pool = apart(2);
    pool.judged(0, Verdict::WorkspaceQuota(Shortfall::default()), NOW);
    assert_eq!(pool.chosen(&[], later(31)), Ok(1));
    // A request that the second key has refused has only the first one left.
    assert_eq!(pool.chosen(&[1], later(31)), Ok(0));
    // The request is served: the words are refuted.
    pool.judged(0, Verdict::Served, later(31));
    assert_eq!(pool.chosen(&[], later(31)), Ok(0));
}

#[test]
fn a_key_that_rests_for_two_things_that_are_not_proven_may_be_tried() {
    for verdicts in [[Verdict::Abuse, Verdict::Billing], [Verdict::Billing, Verdict::Abuse]] {
        let pool = apart(1);
        verdicts.into_iter().for_each(|verdict| drop(pool.judged(0, verdict, NOW)));
        assert!(pool.chosen(&[], later(29)).is_err(), "{verdicts:?}");
        assert_eq!(pool.chosen(&[], later(30)), Ok(0), "{verdicts:?}");
    }
}

#[test]
fn a_rate_limit_holds_for_its_concurrency_group() {
    let pool = apart(1);
    pool.judged(0, Verdict::RateLimited(Some(Duration::from_secs(20))), NOW);
    assert_eq!(pool.chosen(&[], NOW), Err(Unavailable::Cooling { until: later(20) }));
    assert_eq!(pool.snapshot(NOW)[0].standing.status().word(), "rate_limited");
    let other = KeyRequest { group: Some(ConcurrencyGroup::TRANSCRIPTION), ..speech(1, &[]) };
    assert!(pool.taken(&other, NOW).is_ok());
    assert!(pool.taken(&KeyRequest { group: None, ..speech(0, &[]) }, NOW).is_ok());
    // The `Retry-After` of a front end has an upper bound.
    pool.judged(0, Verdict::RateLimited(Some(Duration::from_secs(86_400))), later(20));
    assert_eq!(pool.chosen(&[], later(21)), Err(Unavailable::Cooling { until: later(320) }));
}

#[test]
fn being_short_for_one_request_is_not_being_exhausted() {
    let pool = apart(1);
    pool.told(0, 50, 9_000, NOW);
    let short = Verdict::WorkspaceQuota(Shortfall {
        remaining: Some(8_950),
        required: Some(9_500),
        ..Shortfall::default()
    });
    let roster = pool.roster();
    let large = speech(9_500, &[]);
    judge(&pool, &roster, &roster.keys()[0], short, Some(&large), NOW);
    assert_eq!(pool.snapshot(NOW)[0].standing.status().word(), "active");
    assert!(pool.taken(&speech(50, &[]), NOW).is_ok());
    assert!(matches!(pool.taken(&large, NOW), Err(Unavailable::Exhausted { .. })));
}

#[test]
fn a_restricted_key_is_asked_last_and_a_refused_one_only_first() {
    let pool = apart(3);
    let restricted =
        |levels: &[(usize, Restraint)]| KeyRequest { restricted: levels.to_vec(), ..speech(0, &[]) };
    let chosen =
        |request: &KeyRequest| pool.taken(request, NOW).map(|reserved| reserved.lease.key().position());
    let (inferred, refused) = (Restraint::Inferred, Restraint::Refused);
    assert_eq!(chosen(&restricted(&[(0, refused), (1, inferred)])), Ok(2));
    assert_eq!(chosen(&restricted(&[(0, refused), (1, inferred), (2, refused)])), Ok(1));
    let all = restricted(&[(0, refused), (1, refused), (2, refused)]);
    assert_eq!(chosen(&all), Ok(0));
    assert_eq!(chosen(&KeyRequest { was_refused: true, ..all }), Err(Unavailable::Tried));
    let longest = restricted(&[(0, refused), (1, Restraint::RefusedLongest), (2, refused)]);
    assert_eq!(chosen(&longest), Ok(1));
    assert_eq!(chosen(&KeyRequest { was_refused: true, ..longest }), Err(Unavailable::Tried));
    let until = Restraint::Until(later(9));
    let cooling = restricted(&[(0, until), (1, until), (2, until)]);
    assert_eq!(chosen(&cooling), Err(Unavailable::Cooling { until: later(9) }));
}

#[test]
fn keys_of_one_workspace_are_found_to_share_it() {
    let pool = apart(3);
    for (key, count) in [(0, 10), (1, 10), (2, 70)] {
        pool.told(key, count, 100, NOW);
    }
    let held = pool.roster();
    assert!(pool.learn_workspace(&held.keys()[1], "ws_1"));
    assert!(pool.learn_workspace(&held.keys()[0], "ws_1"));
    assert!(!pool.learn_workspace(&held.keys()[0], "ws_1"));
    let keys = pool.roster().keys().to_vec();
    assert!(std::ptr::eq(keys[0].workspace(), keys[1].workspace()));
    assert!(!std::ptr::eq(keys[0].workspace(), keys[2].workspace()));
    assert_eq!(keys[0].workspace().quota(NOW).count, 10);
    assert_eq!(keys[1].workspace().identity(), keys[0].workspace().identity());
    pool.judged(0, quota_refusal(), NOW);
    assert_eq!(pool.chosen(&[], NOW), Ok(2));
    // The evidence survives a changed configuration.
    pool.reload(vec![entry(2, None, None), entry(1, Some("one"), None), entry(0, None, None)], SETTINGS);
    let keys = pool.roster().keys().to_vec();
    assert!(std::ptr::eq(keys[1].workspace(), keys[2].workspace()));
    assert_eq!(keys[0].workspace().quota(NOW).count, 70);
}

#[test]
fn one_key_that_may_tell_speaks_for_those_beside_it() {
    let pool = pool(&[Some("w"), Some("w"), None]);
    pool.told(0, 10, 100, NOW);
    pool.learn_workspace(&pool.roster().keys()[1], "ws_1");
    pool.learn_workspace(&pool.roster().keys()[2], "ws_1");
    let keys = pool.roster().keys().to_vec();
    assert!(keys.iter().all(|key| std::ptr::eq(key.workspace(), keys[0].workspace())));
    assert_eq!(keys[2].workspace().quota(NOW).count, 10);
}

/// Three workspaces with this many slots each.
fn with_places(places: u32) -> Arc<Pool> {
    let pool = apart(3);
    for key in pool.roster().keys() {
        key.workspace().limiter(ConcurrencyGroup::SPEECH).learn(places);
    }
    pool
}

#[tokio::test]
async fn the_sixteenth_of_fifteen_waits() {
    let pool = with_places(5);
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
    let pool = with_places(1);
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
    let mut given = Vec::new();
    for lease in held {
        drop(lease);
        given.extend(
            waiting.iter_mut().enumerate().find_map(|(at, future)| Some((at, futures_poll(future)?))),
        );
        let (at, _) = given.last().unwrap();
        drop(waiting.remove(*at));
    }
    assert_eq!(*order.lock().unwrap(), ["a1", "b1", "c1"]);
    drop(given.remove(0));
    assert!(waiting.iter_mut().any(|future| futures_poll(future).is_some()));
    assert_eq!(order.lock().unwrap()[3], "a2");
}

#[tokio::test]
async fn a_key_that_a_reload_has_brought_is_not_waited_for() {
    let pool = Arc::new(Pool::new(vec![entry(0, None, None)], SETTINGS));
    let before = pool.roster();
    before.keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).learn(1);
    let _held = pool.try_reserve(&before, &speech(1, &[]), NOW).unwrap();
    let request = speech(1, &[]);
    let mut waits = Box::pin(pool.reserve(&before, &request));
    assert!(futures_poll(&mut waits).is_none());
    pool.reload(vec![entry(0, None, None), entry(1, None, None)], SETTINGS);
    let after = pool.roster();
    let given =
        futures_poll(&mut Box::pin(pool.reserve(&after, &request))).expect("it waits behind the others");
    assert_eq!(given.unwrap().lease.key().position(), 1);
    // The queued request selects again, among the new keys.
    assert_eq!(waits.await.unwrap_err(), Unavailable::Outdated);
}

#[tokio::test]
async fn who_leaves_the_line_is_not_waited_for() {
    let pool = with_places(1);
    let roster = pool.roster();
    let mut held: Vec<Lease> =
        (0..3).map(|_| pool.try_reserve(&roster, &speech(1, &[]), NOW).unwrap().lease).collect();
    let request = speech(1, &[]);
    let mut gone = Box::pin(pool.reserve(&roster, &request));
    assert!(futures_poll(&mut gone).is_none());
    let mut stays = Box::pin(pool.reserve(&roster, &request));
    assert!(futures_poll(&mut stays).is_none());
    // Assigned at the moment in which its client disconnects: the next request gets the key.
    held.pop();
    drop(gone);
    assert!(stays.await.is_ok());
    assert_eq!(pool.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn waiting_has_an_end() {
    let pool = with_places(1);
    let roster = pool.roster();
    let _held: Vec<Lease> =
        (0..3).map(|_| pool.try_reserve(&roster, &speech(1, &[]), NOW).unwrap().lease).collect();
    let given = pool.reserve(&roster, &speech(1, &[])).await;
    assert_eq!(given.unwrap_err(), Unavailable::Full { until: None });
    assert_eq!(pool.waiting(), 0);
}

#[tokio::test]
async fn a_line_that_is_long_enough_takes_nobody() {
    let pool = Arc::new(Pool::new(vec![entry(0, None, None)], Settings { max_queued: 1, ..SETTINGS }));
    let roster = pool.roster();
    roster.keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH).learn(1);
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
fn a_locked_workspace_is_back_when_its_bill_is_paid() {
    let pool = apart(1);
    pool.judged(0, Verdict::Billing, NOW);
    let roster = pool.roster();
    let key = &roster.keys()[0];
    let seen = |is_paid| figures(Quota::default(), is_paid);
    assert!(pool.observe(&roster, key, seen(Some(false)), later(1)).is_empty());
    assert_eq!(changes(&pool.observe(&roster, key, seen(Some(true)), later(2))), [(0, Change::Returns)]);
}

#[test]
fn a_clock_that_steps_brings_no_key_back_twice_and_loses_none() {
    let pool = apart(1);
    pool.told(0, 100, 100, NOW);
    let reset = UnixMs(9_000_000);
    assert!(pool.chosen(&[], NOW).is_err());
    // Forward past the reset date: a new period, once.
    assert_eq!(pool.chosen(&[], reset), Ok(0));
    pool.spent(0, 7, reset);
    // Backward: the credits spent in the new period stay spent.
    assert_eq!(pool.chosen(&[], NOW), Ok(0));
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 7);
    // Evidence of a clock that ran ahead is dated to the present.
    pool.judged(0, Verdict::InvalidKey, later(86_400));
    assert_eq!(pool.chosen(&[], NOW), Err(Unavailable::Invalid));
    pool.told(0, 7, 100, later(86_401));
    assert_eq!(pool.chosen(&[], NOW), Ok(0));
}

#[test]
fn a_workspace_that_the_provider_knows_takes_the_name_that_it_is_given() {
    let pool = apart(1);
    pool.learn_workspace(&pool.roster().keys()[0], "ws_1");
    pool.reload(vec![entry(0, None, Some("studio"))], SETTINGS);
    let named = pool.roster();
    assert_eq!(named.keys()[0].workspace().membership().name(), Some("studio"));
    pool.reload(vec![entry(0, None, Some("studio"))], SETTINGS);
    assert!(Arc::ptr_eq(&named.keys()[0], &pool.roster().keys()[0]), "nothing has changed");
}

#[test]
fn a_released_place_is_not_given_back_twice() {
    let pool = apart(1);
    let mut reserved = pool.taken(&speech(1, &[]), NOW).unwrap();
    let roster = pool.roster();
    let room = roster.keys()[0].workspace().limiter(ConcurrencyGroup::SPEECH);
    reserved.lease.release();
    assert!(!reserved.lease.has_place());
    reserved.lease.rest();
    drop(reserved);
    assert_eq!(room.running(), 0);
}
