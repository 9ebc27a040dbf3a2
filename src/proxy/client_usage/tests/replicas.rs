//! Tests limits that several replicas share, with a pool of replicas in memory: exact quotas of clients and users, rate
//! limits, and concurrency limits. Also tests grants that are extended, given up or expired, missing replies, and
//! sessions.

use std::sync::atomic::AtomicUsize;

use tokio::runtime;

use super::replica_pool::{GRANT_DURATION, TestReplica, start_replicas};
use super::*;
use crate::proxy::replica_link::{QuotaGrant, QuotaReply};
use crate::tasks::Tasks;

fn request_rules(amount: u64) -> Rules {
    rules_with_quota(amount, QuotaUnit::Requests, Period::Total)
}

/// Returns the error of a request whose client has used its whole quota.
fn exhausted(rules: &Rules) -> ClientLimitExceeded {
    ClientLimitExceeded::Quota(QuotaExceeded {
        quota: rules.quota.unwrap(),
        resets_at: None,
        shortfall: None,
    })
}

/// Breaks or restores the links of `replicas` to the pool.
fn set_down(replicas: &[TestReplica], is_down: bool) {
    for replica in replicas {
        replica.link.is_down.store(is_down, Ordering::Release);
    }
}

/// Makes the regular exchange of all replicas, and then advances the time by `duration`.
async fn exchange_and_advance(replicas: &[TestReplica], duration: Duration) {
    for replica in replicas {
        replica.exchange(StatementScope::Active, NOW);
    }
    tokio::time::advance(duration).await;
}

/// Sends `count` requests to the replicas in rotation. Returns the number of admitted requests.
async fn serve_in_turn(replicas: &[TestReplica], rules: &Rules, count: usize) -> usize {
    let mut served = 0;
    for replica in replicas.iter().cycle().take(count) {
        served += usize::from(replica.serve(rules, NOW).await.is_ok());
    }
    served
}

#[tokio::test(start_paused = true)]
async fn a_quota_of_three_requests_over_three_replicas_is_exactly_three() {
    let rules = request_rules(3);
    let (_, replicas) = start_replicas(3, &rules, &[]);
    assert_eq!(serve_in_turn(&replicas, &rules, 3).await, 3);
    for replica in replicas.iter().cycle().take(9) {
        assert_eq!(replica.serve(&rules, NOW).await, Err(exhausted(&rules)));
    }
}

#[tokio::test(start_paused = true)]
async fn every_amount_over_every_number_of_replicas_is_exact() {
    for amount in [1, 2, 5, 10, 97, 300] {
        for count in 1..6 {
            let rules = request_rules(amount);
            let (_, replicas) = start_replicas(count, &rules, &[]);
            let served = serve_in_turn(&replicas, &rules, 1_000).await;
            assert_eq!(
                u64::try_from(served).unwrap(),
                amount,
                "{count} replicas together must serve the whole quota"
            );
        }
    }
}

#[test]
fn a_thousand_concurrent_requests_over_three_replicas_are_exactly_a_thousand() {
    let runtime = runtime::Builder::new_multi_thread().worker_threads(4).enable_time().build().unwrap();
    runtime.block_on(async {
        let rules = request_rules(1_000);
        let (pool, replicas) = start_replicas(3, &rules, &[]);
        let served = Arc::new(AtomicUsize::new(0));
        let tasks = Tasks::new();
        for index in 0..3_000 {
            let (replica, rules, served) = (replicas[index % 3].clone(), rules.clone(), Arc::clone(&served));
            tasks.spawn(async move {
                // Concurrent requests of a client are limited too.
                loop {
                    match replica.serve(&rules, NOW).await {
                        Ok(()) => served.fetch_add(1, Ordering::AcqRel),
                        Err(ClientLimitExceeded::Concurrency { .. }) => {
                            tokio::task::yield_now().await;
                            continue;
                        }
                        Err(_) => 0,
                    };
                    return;
                }
            });
        }
        tasks.wait_until_ended().await;
        assert_eq!(served.load(Ordering::Acquire), 1_000);
        let lookups = pool.lookups.load(Ordering::Acquire);
        assert!(lookups < 500, "waiting requests must share a reply, but there were {lookups} lookups");
    });
}

#[tokio::test(start_paused = true)]
async fn far_from_the_limit_requests_rarely_need_a_lookup() {
    let rules = request_rules(1_000_000);
    let (pool, replicas) = start_replicas(3, &rules, &[]);
    assert_eq!(serve_in_turn(&replicas, &rules, 3_000).await, 3_000);
    assert_eq!(pool.lookups.load(Ordering::Acquire), 3, "each replica must send one lookup");
}

#[tokio::test(start_paused = true)]
async fn not_every_request_looks_up_an_exhausted_quota() {
    let rules = request_rules(3);
    let (pool, replicas) = start_replicas(3, &rules, &[]);
    serve_in_turn(&replicas, &rules, 3).await;
    serve_in_turn(&replicas, &rules, 3).await;
    let lookups = pool.lookups.load(Ordering::Acquire);
    serve_in_turn(&replicas, &rules, 300).await;
    assert_eq!(pool.lookups.load(Ordering::Acquire), lookups);
}

#[tokio::test(start_paused = true)]
async fn a_shared_quota_has_the_errors_of_a_single_replica() {
    let rules = credit_rules(1_000);
    let alone = app_usage();
    let (_, replicas) = start_replicas(3, &rules, &[]);
    for (replica, amount) in [(0, 300), (1, 300), (2, 350), (0, 51), (1, 1_000), (2, 50), (0, 1), (1, 0)] {
        let expected = admit(&alone, &rules).and_then(|permit| {
            ready(permit.reserve(amount, NOW))?;
            permit.charge(ChargeOutcome::Served, Some(amount), NOW);
            Ok(())
        });
        // Each replica gives up the part of its grant that it does not need.
        for replica in replicas.iter().cycle().take(9) {
            replica.exchange(StatementScope::Active, NOW);
        }
        assert_eq!(
            replicas[replica].spend(&rules, amount, NOW).await,
            expected,
            "{amount} credits must have the same result as on a single replica"
        );
        tokio::time::advance(Duration::from_secs(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_unused_grant_is_given_up_for_the_other_replicas() {
    let rules = request_rules(1_000);
    let (_, replicas) = start_replicas(2, &rules, &[]);
    let [first, second] = replicas.as_slice() else { panic!("two replicas must be started") };
    first.serve(&rules, NOW).await.unwrap();
    let mut served = 1;
    for turn in 0..2_000 {
        served += u64::from(second.serve(&rules, NOW).await.is_ok());
        if turn % 10 == 0 {
            exchange_and_advance(&replicas, Duration::from_secs(1)).await;
        }
    }
    assert_eq!(served, 1_000, "the second replica must use the requests that the first one does not use");
}

#[tokio::test(start_paused = true)]
async fn an_idle_replica_gives_up_its_grant_and_sends_few_statements() {
    let rules = request_rules(1_000);
    let (_, replicas) = start_replicas(2, &rules, &[]);
    replicas[0].exchange(StatementScope::Active, NOW);
    replicas[0].serve(&rules, NOW).await.unwrap();
    assert_eq!(replicas[0].exchange(StatementScope::Active, NOW), 1);
    for (recent_use, held) in [("in the last interval", 5), ("two intervals ago", 1), ("earlier", 1)] {
        let statements = replicas[0].usage.quota_statements(StatementScope::Active, NOW);
        let held_amounts: Vec<u64> = statements.iter().map(|statement| statement.held).collect();
        assert_eq!(
            held_amounts,
            [held],
            "the replica must hold {held} for a quota that was used {recent_use}"
        );
    }
    tokio::time::advance(Duration::from_secs(29)).await;
    assert_eq!(replicas[0].exchange(StatementScope::Active, NOW), 1);
    tokio::time::advance(Duration::from_secs(1)).await;
    tokio::time::advance(GRANT_DURATION).await;
    assert_eq!(replicas[0].exchange(StatementScope::Active, NOW), 0);
    tokio::time::advance(Duration::from_secs(30)).await;
    assert_eq!(
        replicas[0].exchange(StatementScope::Active, NOW),
        1,
        "a statement of an idle client must be sent once in 30 s"
    );
    assert_eq!(replicas[0].exchange(StatementScope::All, NOW), 1);
}

#[tokio::test(start_paused = true)]
async fn a_late_reply_does_not_restore_a_returned_grant() {
    let rules = request_rules(1_000);
    let (_, replicas) = start_replicas(2, &rules, &[]);
    let usage = &replicas[0].usage;
    replicas[0].serve(&rules, NOW).await.unwrap();
    let regular = || usage.quota_statements(StatementScope::Active, NOW).remove(0);
    let early = regular();
    assert_eq!(early.held, 5);
    regular();
    let last = regular();
    assert_eq!((last.held, last.generation), (1, early.generation + 1));
    let grant =
        |granted| QuotaGrant { granted, used_by_others: 7, valid_until: clock::instant() + GRANT_DURATION };
    let admit_at_once = || replicas[0].admit(&rules, NOW).now_or_never();
    usage.apply_grant(&early, QuotaReply::Granted(grant(500)));
    assert!(admit_at_once().is_none(), "a replica that has returned its grant must request another one");
    assert_eq!(usage.totals(&app_name(), NOW).requests[2], 8, "the usage of other replicas must be applied");
    usage.apply_grant(&last, QuotaReply::Granted(grant(3)));
    for _ in 0..2 {
        admit_at_once().unwrap().unwrap().charge(ChargeOutcome::Served, None, NOW);
    }
    assert!(admit_at_once().is_none(), "only 3 requests must be granted");
}

#[tokio::test(start_paused = true)]
async fn a_pool_that_lost_its_data_is_restored_by_statements_of_all_quotas() {
    let rules = request_rules(100);
    let (pool, replicas) = start_replicas(2, &rules, &[]);
    assert_eq!(serve_in_turn(&replicas, &rules, 90).await, 90);
    tokio::time::advance(Duration::from_secs(60)).await;
    pool.clear();
    for replica in &replicas {
        replica.exchange(StatementScope::All, NOW);
    }
    assert_eq!(serve_in_turn(&replicas, &rules, 90).await, 10);
}

#[tokio::test(start_paused = true)]
async fn an_expired_grant_is_not_used() {
    let rules = request_rules(300);
    let (_, replicas) = start_replicas(3, &rules, &[]);
    // Each replica has a grant of about 50.
    assert_eq!(serve_in_turn(&replicas, &rules, 3).await, 3);
    exchange_and_advance(&replicas, GRANT_DURATION + Duration::from_secs(1)).await;
    // The third replica may use the expired grants of the others.
    let mut served = 3;
    while replicas[2].serve(&rules, NOW).await.is_ok() {
        served += 1;
    }
    assert_eq!(served, 300);
    for replica in &replicas {
        assert_eq!(replica.serve(&rules, NOW).await, Err(exhausted(&rules)));
    }
}

#[tokio::test(start_paused = true)]
async fn without_replies_each_replica_uses_its_grant_and_then_its_share_of_the_rest() {
    let rules = request_rules(100);
    let (_, replicas) = start_replicas(3, &rules, &[]);
    assert_eq!(serve_in_turn(&replicas, &rules, 40).await, 40);
    exchange_and_advance(&replicas, Duration::ZERO).await;
    for replica in &replicas {
        replica.exchange(StatementScope::Active, NOW);
    }
    set_down(&replicas, true);
    tokio::time::advance(GRANT_DURATION).await;
    for replica in &replicas {
        let served = serve_in_turn(std::slice::from_ref(replica), &rules, 100).await;
        assert_eq!(served, 20, "a replica must use a third of the remaining 60 requests");
        let served = serve_in_turn(std::slice::from_ref(replica), &rules, 100).await;
        assert_eq!(served, 0, "a replica must take no share of its share");
    }
    set_down(&replicas, false);
    exchange_and_advance(&replicas, Duration::ZERO).await;
    assert_eq!(serve_in_turn(&replicas, &rules, 100).await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_replica_without_any_reply_uses_its_share() {
    let rules = request_rules(10);
    let stored_usage = [UsageTotals { client: app_name(), requests: [2; 3], credits: [0; 3] }];
    let (_, replicas) = start_replicas(3, &rules, &stored_usage);
    set_down(&replicas, true);
    let served = serve_in_turn(&replicas[..1], &rules, 100).await;
    assert_eq!(served, 3, "the replica must use a third of the remaining 8 requests, rounded up");
}

#[tokio::test(start_paused = true)]
async fn a_lookup_without_a_reply_is_not_repeated_by_every_request() {
    let rules = request_rules(1_000);
    let (pool, replicas) = start_replicas(2, &rules, &[]);
    set_down(&replicas, true);
    for lookups in 1..3 {
        assert_eq!(serve_in_turn(&replicas[..1], &rules, 100).await, 100);
        assert_eq!(pool.lookups.load(Ordering::Acquire), lookups);
        tokio::time::advance(Duration::from_millis(100)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_period_starts_with_the_whole_quota() {
    let rules = rules_with_quota(6, QuotaUnit::Requests, Period::Day);
    let (_, replicas) = start_replicas(3, &rules, &[]);
    let tomorrow = Period::Day.end(NOW).unwrap();
    assert_eq!(serve_in_turn(&replicas, &rules, 20).await, 6);
    for now in [tomorrow, tomorrow.plus(Duration::from_secs(1))] {
        let mut served = 0;
        for replica in replicas.iter().cycle().take(30) {
            served += usize::from(replica.serve(&rules, now).await.is_ok());
        }
        assert_eq!(served, if now == tomorrow { 6 } else { 0 });
    }
    let statements = replicas[0].usage.quota_statements(StatementScope::Active, tomorrow);
    let starts: Vec<UnixMs> = statements.iter().map(|statement| statement.key.period_start).collect();
    assert_eq!(starts, [tomorrow]);
}

#[tokio::test(start_paused = true)]
async fn a_changed_quota_is_used_with_a_new_grant() {
    let (rules, larger) = (request_rules(10), request_rules(20));
    let (_, replicas) = start_replicas(3, &rules, &[]);
    assert_eq!(serve_in_turn(&replicas, &rules, 30).await, 10);
    assert_eq!(serve_in_turn(&replicas, &larger, 60).await, 10);
    assert_eq!(serve_in_turn(&replicas, &request_rules(5), 30).await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_refunded_request_may_be_used_by_another_replica() {
    let rules = request_rules(1);
    let (_, replicas) = start_replicas(2, &rules, &[]);
    let permit = replicas[0].admit(&rules, NOW).await.unwrap();
    assert_eq!(replicas[1].serve(&rules, NOW).await, Err(exhausted(&rules)));
    permit.charge(ChargeOutcome::Refused, None, NOW);
    drop(permit);
    exchange_and_advance(&replicas, Duration::from_millis(100)).await;
    replicas[1].serve(&rules, NOW).await.unwrap();
    assert_eq!(replicas[0].serve(&rules, NOW).await, Err(exhausted(&rules)));
}

#[tokio::test(start_paused = true)]
async fn a_request_of_unknown_price_reserves_the_credits_left_at_all_replicas() {
    let rules = credit_rules(1_500);
    let (_, replicas) = start_replicas(3, &rules, &[]);
    let first = replicas[0].admit(&rules, NOW).await.unwrap();
    first.reserve_unpriced(1_000, 1, NOW).await.unwrap();
    let second = replicas[1].admit(&rules, NOW).await.unwrap();
    second.reserve_unpriced(1_000, 1, NOW).await.unwrap();
    let reserved =
        |replica: &TestReplica| replica.usage.by_name[&app_name()].usage.credits.used(Period::Total, NOW);
    assert_eq!(reserved(&replicas[0]), 1_000);
    let reserved = reserved(&replicas[1]);
    assert!((1..=500).contains(&reserved), "1 to 500 credits must be reserved, not {reserved}");
}

#[tokio::test(start_paused = true)]
async fn a_session_uses_the_credits_of_all_replicas_until_they_are_exhausted() {
    let rules = credit_rules(1_000);
    let (_, replicas) = start_replicas(2, &rules, &[]);
    let session = replicas[0].admit(&rules, NOW).await.unwrap();
    session.reserve(0, NOW).await.unwrap();
    session.count_session(NOW);
    for total in [100, 300, 600] {
        session.charge_up_to(total, NOW);
        exchange_and_advance(&replicas, Duration::from_secs(1)).await;
        assert_eq!(
            session.exhausted_quota(NOW),
            None,
            "the session must be able to use more than {total} credits"
        );
    }
    assert!(replicas[1].spend(&rules, 401, NOW).await.is_err());
    // The first replica gives up the credits that the session does not use.
    for _ in 0..3 {
        exchange_and_advance(&replicas, Duration::from_secs(1)).await;
    }
    replicas[1].spend(&rules, 400, NOW).await.unwrap();
    exchange_and_advance(&replicas, Duration::from_secs(1)).await;
    exchange_and_advance(&replicas, Duration::from_secs(1)).await;
    assert_eq!(session.exhausted_quota(NOW), Some(QuotaOwner::Client));
    assert!(session.reserve(700, NOW).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_session_without_replies_ends_after_its_share() {
    let rules = credit_rules(1_000);
    let (_, replicas) = start_replicas(2, &rules, &[]);
    let session = replicas[0].admit(&rules, NOW).await.unwrap();
    session.charge_up_to(200, NOW);
    exchange_and_advance(&replicas, Duration::ZERO).await;
    set_down(&replicas, true);
    session.charge_up_to(599, NOW);
    tokio::time::advance(GRANT_DURATION).await;
    assert_eq!(session.exhausted_quota(NOW), None);
    session.charge_up_to(600, NOW);
    assert_eq!(session.exhausted_quota(NOW), Some(QuotaOwner::Client));
}

#[tokio::test(start_paused = true)]
async fn a_quota_of_users_is_shared_and_each_user_has_its_own() {
    let quota = ClientQuota { amount: 3, unit: QuotaUnit::Requests, period: Period::Total };
    let rules = Rules { user_quota: Some(quota), ..Rules::default() };
    let (_, replicas) = start_replicas(3, &rules, &[]);
    let client = Client { name: app_name(), rules };
    for user in [1_u64, 2] {
        let fingerprint = UserFingerprint::new("app", &user.to_be_bytes());
        let mut served = 0;
        for replica in replicas.iter().cycle().take(9) {
            let user = replica.usage.load_user(&app_name(), fingerprint, 10, NOW).await.unwrap();
            let mut permit = ready(replica.usage.admit(&client, METERED, NOW)).unwrap();
            match permit.admit_user(&user, quota, METERED, NOW).await {
                Ok(()) => {
                    permit.charge(ChargeOutcome::Served, None, NOW);
                    served += 1;
                }
                Err(refused) => {
                    assert!(
                        matches!(refused, ClientLimitExceeded::UserQuota(_)),
                        "the quota of the user must refuse the request, not {refused:?}"
                    );
                }
            }
        }
        assert_eq!(served, 3);
        tokio::time::advance(Duration::from_secs(2)).await;
        for replica in &replicas {
            let totals = replica.usage.user_totals(&client, fingerprint, 10, NOW).await.unwrap();
            assert_eq!(totals.requests[2], 3, "the usage at other replicas must be included");
        }
    }
    assert_eq!(replicas[0].exchange(StatementScope::Active, NOW), 2);
}

#[tokio::test(start_paused = true)]
async fn the_usage_includes_other_replicas_in_the_unit_and_period_of_the_quota() {
    let rules = rules_with_quota(1_000, QuotaUnit::Credits, Period::Month);
    let (_, replicas) = start_replicas(2, &rules, &[]);
    replicas[0].spend(&rules, 70, NOW).await.unwrap();
    replicas[1].spend(&rules, 30, NOW).await.unwrap();
    for _ in 0..2 {
        exchange_and_advance(&replicas, Duration::from_secs(1)).await;
    }
    let totals = replicas[0].usage.totals(&app_name(), NOW);
    assert_eq!((totals.requests, totals.credits), ([1; 3], [70, 100, 70]));
}

#[tokio::test(start_paused = true)]
async fn a_rate_limit_is_divided_and_its_refusal_names_the_longer_wait() {
    let rate_limit = Some(RateLimit { requests: 2, interval: Duration::from_secs(2) });
    let rules = Rules { rate_limit, ..Rules::default() };
    let (_, replicas) = start_replicas(3, &rules, &[]);
    let usage = &replicas[0].usage;
    usage.set_share(&app_name(), ClientShare { rate_divisor: 3, max_concurrent: None });
    admit(usage, &rules).unwrap();
    let Err(ClientLimitExceeded::Rate { wait }) = admit(usage, &rules) else {
        panic!("the rate limit must refuse the request")
    };
    assert_eq!(wait, Duration::from_secs(3), "2 requests in 2 s over 3 replicas are 1 request in 3 s");
    usage.set_share(&app_name(), ClientShare { rate_divisor: 1, max_concurrent: None });
    assert!(admit(usage, &rules).is_err(), "the used part of the limit must not be forgotten");
    tokio::time::advance(Duration::from_secs(2)).await;
    admit(usage, &rules).unwrap();
}

#[tokio::test(start_paused = true)]
async fn concurrent_requests_are_limited_to_the_share_and_reported() {
    let rules = Rules { max_concurrent: Some(7), ..Rules::default() };
    let (_, replicas) = start_replicas(3, &rules, &[]);
    let usage = &replicas[0].usage;
    assert_eq!(usage.take_activity(), []);
    let admit_all = || std::iter::from_fn(|| admit(usage, &rules).ok()).collect::<Vec<_>>();
    assert_eq!(admit_all().len(), 2, "before the share is known, the limit must be a third of 7");
    usage.set_share(&app_name(), ClientShare { rate_divisor: 1, max_concurrent: Some(5) });
    let permits = admit_all();
    assert_eq!(permits.len(), 5);
    assert_eq!(admit(usage, &rules).unwrap_err(), ClientLimitExceeded::Concurrency { max: 7 });
    let activity = |running, demand| ClientActivity {
        client: app_name(),
        running,
        demand,
        max_concurrent: Some(7),
        is_recent: true,
    };
    // Three requests were refused.
    assert_eq!(usage.take_activity(), [activity(5, 8)]);
    assert_eq!(usage.take_activity(), [activity(5, 5)]);
    drop(permits);
    assert_eq!(usage.take_activity(), [activity(0, 0)]);
    tokio::time::advance(Duration::from_secs(61)).await;
    assert_eq!(usage.take_activity(), []);
    usage.set_share(&app_name(), ClientShare { rate_divisor: 1, max_concurrent: Some(0) });
    assert!(admit(usage, &rules).is_err(), "a share of 0 must admit nothing");
}

/// A step of a test with three replicas.
#[derive(Clone, Debug)]
enum PoolStep {
    Begin { replica: usize, estimate: u64 },
    End { at: usize, percent: Option<u64> },
    Exchange(usize),
    Wait(u64),
    SetDown(usize, bool),
}

fn pool_step(may_fail: bool) -> impl Strategy<Value = PoolStep> {
    let replica = 0..3_usize;
    prop_oneof![
        6 => (replica.clone(), 1..200_u64)
            .prop_map(|(replica, estimate)| PoolStep::Begin { replica, estimate }),
        4 => (0..8_usize, proptest::option::of(0..=100_u64))
            .prop_map(|(at, percent)| PoolStep::End { at, percent }),
        3 => replica.clone().prop_map(PoolStep::Exchange),
        1 => (0..12_u64).prop_map(PoolStep::Wait),
        u32::from(may_fail) => (replica, any::<bool>())
            .prop_map(|(replica, is_down)| PoolStep::SetDown(replica, is_down)),
    ]
}

/// Runs `steps`, and returns the largest sum of the used and reserved credits of all replicas.
async fn run_steps(steps: Vec<PoolStep>, quota: u64) -> u64 {
    let rules = credit_rules(quota);
    let (_, replicas) = start_replicas(3, &rules, &[]);
    let mut in_progress = Vec::new();
    let mut largest_sum = 0;
    for step in steps {
        match step {
            PoolStep::Begin { replica, estimate } => {
                if let Ok(permit) = replicas[replica].admit(&rules, NOW).await
                    && permit.reserve(estimate, NOW).await.is_ok()
                {
                    in_progress.push((permit, estimate));
                }
            }
            PoolStep::End { at, percent } if at < in_progress.len() => {
                let (permit, estimate) = in_progress.swap_remove(at);
                match percent {
                    Some(percent) => {
                        permit.charge(ChargeOutcome::Served, Some(estimate * percent / 100), NOW)
                    }
                    None => permit.charge(ChargeOutcome::Refused, None, NOW),
                };
            }
            PoolStep::End { .. } => {}
            PoolStep::Exchange(replica) => {
                replicas[replica].exchange(StatementScope::Active, NOW);
            }
            // The usage since the last statement is reported before the grants expire.
            PoolStep::Wait(seconds) => exchange_and_advance(&replicas, Duration::from_secs(seconds)).await,
            PoolStep::SetDown(replica, is_down) => set_down(&replicas[replica..=replica], is_down),
        }
        let used_credits =
            |replica: &TestReplica| replica.usage.by_name[&app_name()].usage.credits.used(Period::Total, NOW);
        largest_sum = largest_sum.max(replicas.iter().map(used_credits).sum());
    }
    largest_sum
}

/// Runs `steps` with virtual time.
fn run_paused(steps: Vec<PoolStep>, quota: u64) -> u64 {
    let runtime = runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(run_steps(steps, quota))
}

proptest! {
    /// With refunds and expired grants in any order, all replicas together never use more than the quota.
    #[test]
    fn the_shared_quota_is_exact_in_every_order(steps in prop::collection::vec(pool_step(false), 0..200)) {
        prop_assert!(run_paused(steps, 1_000) <= 1_000);
    }

    /// Without replies, each replica uses at most its share of the remaining amount. A share is at most a third of the
    /// quota, rounded up.
    #[test]
    fn without_replies_the_quota_is_exceeded_by_the_shares_at_most(
        steps in prop::collection::vec(pool_step(true), 0..200),
    ) {
        prop_assert!(run_paused(steps, 1_000) <= 1_000 + 3 * 334);
    }
}
