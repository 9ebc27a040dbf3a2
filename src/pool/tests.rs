use super::*;
use crate::policy::budget::Extension;
use crate::policy::classify::{Refusal, Shortfall};
use crate::secret::ApiKey;

const NOW: UnixMs = UnixMs(1_000_000);
const SETTINGS: Settings = Settings {
    strategy: Strategy::FillFirst,
    near_limit_ratio: 0.8,
    rate_limited_cooldown: Duration::from_secs(60),
    concurrency_cooldown: Duration::from_secs(2),
    exhausted_cooldown: Duration::from_secs(3_600),
    billing_cooldown: Duration::from_secs(7_200),
    invalid_cooldown: Duration::from_secs(86_400),
    quota_lag: Duration::from_secs(300),
};

fn pool(workspaces: &[Option<&str>]) -> Pool {
    let entries = workspaces.iter().enumerate().map(|(index, workspace)| KeyEntry {
        key: ApiKey::new(&format!("sk_{index}{index}{index}{index}_of_the_pool_{index}")).unwrap(),
        name: None,
        workspace: workspace.map(str::to_owned),
        authority: None,
    });
    Pool::new(entries.collect(), SETTINGS)
}

/// A pool of keys with a workspace each.
fn apart(count: usize) -> Pool {
    pool(&vec![None; count])
}

impl Pool {
    #[track_caller]
    fn chosen(&self, tried: &[usize], now: UnixMs) -> Result<usize, Unavailable> {
        self.reserve(&self.roster(), tried, |_| true, now).map(|reserved| reserved.lease.key().position())
    }

    fn judged(&self, position: usize, verdict: Verdict, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster();
        self.judge(&roster, &roster.keys()[position], verdict, now)
    }

    fn told(&self, position: usize, count: u64, limit: u64, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster();
        let quota = Quota {
            count,
            limit: Some(limit),
            extension: Extension::None,
            resets_at: Some(UnixMs(9_000_000)),
        };
        self.observe(&roster, &roster.keys()[position], Observation::Quota { quota, tier: None }, now)
    }

    fn spent(&self, position: usize, credits: u64, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster();
        self.spend(&roster, &roster.keys()[position], credits, now)
    }
}

fn later(seconds: u64) -> UnixMs {
    NOW.plus(Duration::from_secs(seconds))
}

fn quota_refusal() -> Verdict {
    Verdict::WorkspaceQuota(Shortfall::default())
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
    assert_eq!(pool.chosen(&[], UnixMs(8_999_999)), Err(Unavailable::Exhausted { resets_at: Some(reset) }));
    assert_eq!(pool.chosen(&[], reset), Ok(0));
    assert_eq!(pool.snapshot(reset)[0].quota.count, 0);
}

#[test]
fn an_empty_workspace_without_a_date_is_tried_again_after_a_while() {
    let pool = apart(1);
    pool.judged(0, quota_refusal(), NOW);
    assert!(pool.chosen(&[], later(3_599)).is_err());
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
    pool.judged(0, Verdict::KeyQuota(Shortfall::default()), NOW);
    assert_eq!(pool.chosen(&[], NOW), Ok(1));
}

#[test]
fn what_is_not_the_keys_fault_does_not_park_it() {
    let pool = apart(1);
    for verdict in [
        Verdict::Served,
        Verdict::MissingPermission,
        Verdict::PlanFeature,
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
        [(0, Change::Rests { reason: ParkReason::Exhausted, .. })]
    ));
    assert_eq!(pool.chosen(&[], NOW), Ok(1));
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
}

#[test]
fn what_is_settled_after_a_refusal_is_counted_once() {
    let pool = apart(1);
    pool.told(0, 90, 100, NOW);
    // The provider has charged the request that is still under way; the refusal knows of it.
    pool.judged(0, Verdict::WorkspaceQuota(Shortfall { remaining: Some(0), required: Some(50) }), NOW);
    pool.spent(0, 10, NOW);
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 100);
}

#[test]
fn the_key_in_use_is_told_once_and_again_when_it_changes() {
    let pool = apart(3);
    let roster = pool.roster();
    let news = |tried: &[usize]| changes(&pool.reserve(&roster, tried, |_| true, NOW).unwrap().news);
    assert!(matches!(news(&[])[..], [(0, Change::InUse { rotated_to: None, .. })]));
    assert!(news(&[]).is_empty());
    // A request of its own misfortune takes the next key; the pool stays where it is.
    assert!(news(&[0]).is_empty());
    pool.judged(0, quota_refusal(), NOW);
    assert!(matches!(news(&[0])[..], [(1, Change::InUse { rotated_to: Some(1), .. })]));
}

#[test]
fn a_lease_releases_when_it_is_dropped() {
    let pool = pool(&[Some("a"), Some("a")]);
    let roster = pool.roster();
    let (one, two) = (
        pool.reserve(&roster, &[], |_| true, NOW).unwrap(),
        pool.reserve(&roster, &[0], |_| true, NOW).unwrap(),
    );
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
    let park = |reason, seconds| Some(Park { reason, until: later(seconds) });
    let quota = Quota { count: 5, limit: Some(10), extension: Extension::None, resets_at: Some(later(50)) };
    let remembered =
        |fingerprint, park, workspace_park| Remembered { fingerprint, quota, park, workspace_park };
    pool.restore(&[
        remembered(prints[0], None, park(ParkReason::Exhausted, 10)),
        remembered(prints[1], park(ParkReason::Invalid, 10), None),
        remembered(Fingerprint::of("gone"), None, None),
    ]);
    assert_eq!(pool.chosen(&[], NOW), Ok(1));
    assert_eq!(pool.chosen(&[], later(10)), Ok(0));
    assert_eq!(pool.snapshot(NOW)[0].quota, quota);
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
                    let reserved = pool.reserve(&roster, &[], |_| true, NOW).unwrap();
                    pool.spend(&roster, reserved.lease.key(), 3, NOW);
                }
            });
        }
    });
    let snapshot = pool.snapshot(NOW);
    assert_eq!(snapshot.iter().map(|key| key.quota.count).sum::<u64>(), 24_000);
    assert!(snapshot.iter().all(|key| key.key.in_flight() == 0));
}

fn entry(number: usize, name: Option<&str>, workspace: Option<&str>) -> KeyEntry {
    KeyEntry {
        key: ApiKey::new(&format!("sk_{number}{number}{number}{number}_of_the_pool_{number}")).unwrap(),
        name: name.map(str::to_owned),
        workspace: workspace.map(str::to_owned),
        authority: None,
    }
}

/// A pool of three keys; the last two share a workspace. All of them have met something.
fn lived_in() -> Pool {
    let pool = Pool::new(
        vec![entry(0, None, None), entry(1, None, Some("w")), entry(2, Some("two"), Some("w"))],
        SETTINGS,
    );
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
    // Both still rest, and the one that served is gone.
    assert!(pool.reserve(&after, &[], |_| true, NOW).is_err());
    assert_eq!(pool.chosen(&[], later(60)), Ok(0));
}

#[test]
fn a_request_under_way_keeps_its_roster() {
    let pool = apart(2);
    let held = pool.roster();
    pool.reload(vec![entry(1, None, None), entry(0, None, None)], SETTINGS);
    let reserved = pool.reserve(&held, &[], |_| true, NOW).unwrap();
    assert_eq!(held.position_of(reserved.lease.key()), Some(0));
    assert_eq!(reserved.lease.key().position(), 1, "people see the latest place");
    let next = pool.reserve(&held, &[0], |_| true, NOW).unwrap();
    assert_eq!(held.position_of(next.lease.key()), Some(1));
    // A key that left the pool still takes what its last requests teach.
    pool.reload(vec![entry(1, None, None)], SETTINGS);
    pool.judge(&held, reserved.lease.key(), quota_refusal(), NOW);
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
    assert_eq!(after.keys()[0].standing(NOW), before.keys()[0].standing(NOW));
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
    assert_eq!(key.parked().unwrap().reason, ParkReason::RateLimited);
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
        pool.judge(roster, &roster.keys()[0], Verdict::RateLimited(None), NOW);
        roster.keys()[0].parked().unwrap().until
    };
    assert_eq!(rests_until(&pool.roster()), later(5));
    assert_eq!(rests_until(&held), later(60));
}

#[test]
fn the_key_in_use_is_not_told_again_because_it_moved() {
    let pool = apart(2);
    assert_eq!(pool.reserve(&pool.roster(), &[], |_| true, NOW).unwrap().news.len(), 1);
    pool.reload(vec![entry(2, None, None), entry(0, None, None)], SETTINGS);
    assert!(pool.reserve(&pool.roster(), &[0], |_| true, NOW).unwrap().news.is_empty());
}
