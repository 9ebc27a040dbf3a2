//! Tests the limits of clients on one replica: quotas, concurrent requests, rate limits and direct access. Also tests
//! the charges and refunds of requests and sessions, and that a reload or a restart keeps the usage. `replicas` tests
//! shared limits.

mod replica_pool;
mod replicas;

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;

use futures_util::FutureExt;
use proptest::prelude::*;

use super::*;
use crate::policy::charge::Billing;
use crate::policy::charge::{Charge, ChargeOutcome};
use crate::policy::client::{AnonymousAccess, Rules};
use crate::policy::client_quota::QuotaUnit;
use crate::policy::client_quota::{ClientQuota, QuotaExceeded, QuotaShortfall, RateLimit};
use crate::secret::TokenFingerprint;

const NOW: UnixMs = UnixMs(1_796_000_000_000);

const METERED: AdmissionRequest = AdmissionRequest {
    billing: Billing::Metered,
    grants_direct_access: false,
    is_charged: true,
    max_concurrent: 1_000,
};
const FREE: AdmissionRequest = AdmissionRequest { billing: Billing::Free, ..METERED };
const UNLISTED: AdmissionRequest = AdmissionRequest { billing: Billing::Unlisted, ..METERED };

/// Returns the name of the only client.
fn app_name() -> ClientName {
    ClientName::new("app")
}

fn clients(names: &[&str]) -> Clients {
    let client = |name: &&str| {
        let client = Client { name: ClientName::new(name), rules: Rules::default() };
        (client, TokenFingerprint::new(name).into())
    };
    Clients::new(names.iter().map(client).collect(), AnonymousAccess::Refused)
}

fn app_usage() -> ClientUsage {
    ClientUsage::new(&clients(&["app"]), &[], Arc::new(NoStoredUsage), NOW)
}

fn rules_with_quota(amount: u64, unit: QuotaUnit, period: Period) -> Rules {
    Rules { quota: Some(ClientQuota { amount, unit, period }), ..Rules::default() }
}

fn credit_rules(amount: u64) -> Rules {
    rules_with_quota(amount, QuotaUnit::Credits, Period::Total)
}

/// Returns the output of a future that needs no grant of other replicas, so that it completes at once.
#[track_caller]
fn ready<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("the request must not wait")
}

fn admit_at(
    usage: &ClientUsage,
    rules: &Rules,
    admission: AdmissionRequest,
    now: UnixMs,
) -> Result<ClientPermit, ClientLimitExceeded> {
    ready(usage.admit(&Client { name: app_name(), rules: rules.clone() }, admission, now))
}

fn admit(usage: &ClientUsage, rules: &Rules) -> Result<ClientPermit, ClientLimitExceeded> {
    admit_at(usage, rules, METERED, NOW)
}

/// Returns the shortfall of the client's quota that refused a request.
#[track_caller]
fn shortfall(refused: Result<(), ClientLimitExceeded>) -> Option<QuotaShortfall> {
    let Err(ClientLimitExceeded::Quota(exceeded)) = refused else {
        panic!("the quota of the client must refuse the request, not {refused:?}")
    };
    exceeded.shortfall
}

/// Checks the used requests and credits, including reserved ones.
#[track_caller]
fn check_used(usage: &ClientUsage, requests: u64, credits: u64) {
    let totals = usage.totals(&app_name(), NOW);
    assert_eq!((totals.requests, totals.credits), ([requests; 3], [credits; 3]));
}

#[test]
fn only_a_request_that_may_have_been_served_is_charged() {
    let usage = app_usage();
    let rules = rules_with_quota(3, QuotaUnit::Requests, Period::Total);
    for _ in 0..2 {
        let permit = admit(&usage, &rules).unwrap();
        assert_eq!(permit.charge(ChargeOutcome::Served, Some(0), NOW), Charge { requests: 1, credits: 0 });
    }
    for outcome in [ChargeOutcome::Unsent, ChargeOutcome::Refused] {
        admit(&usage, &rules).unwrap().charge(outcome, None, NOW);
    }
    drop(admit(&usage, &rules).unwrap());
    check_used(&usage, 2, 0);
    let third = admit(&usage, &rules).unwrap();
    assert!(
        matches!(admit(&usage, &rules), Err(ClientLimitExceeded::Quota(_))),
        "a request must count at admission"
    );
    third.charge(ChargeOutcome::Unknown, None, NOW);
    drop(third);
    assert!(
        matches!(admit(&usage, &rules), Err(ClientLimitExceeded::Quota(_))),
        "dropping the permit must not refund a charged request"
    );
    assert!(admit_at(&usage, &rules, FREE, NOW).is_ok(), "requests that cost no credits must be admitted");
    assert!(
        admit_at(&usage, &rules, UNLISTED, NOW).is_err(),
        "requests of unknown cost must count against the quota"
    );
}

#[test]
fn the_last_credits_are_reserved_once() {
    let usage = app_usage();
    let first = admit(&usage, &credit_rules(1_000)).unwrap();
    let second = admit(&usage, &credit_rules(1_000)).unwrap();
    ready(first.reserve(1_000, NOW)).unwrap();
    assert_eq!(shortfall(ready(second.reserve(1_000, NOW))), None);
    check_used(&usage, 2, 1_000);
    assert_eq!(first.charge(ChargeOutcome::Served, Some(250), NOW), Charge { requests: 1, credits: 250 });
    check_used(&usage, 2, 250);
    let refused = ready(second.reserve(1_000, NOW));
    assert_eq!(shortfall(refused), Some(QuotaShortfall { remaining: 750, needed: 1_000 }));
    ready(second.reserve(750, NOW)).unwrap();
    drop(second);
    check_used(&usage, 1, 250);
}

#[test]
fn an_unreported_price_charges_the_reservation() {
    let usage = app_usage();
    for outcome in [ChargeOutcome::Served, ChargeOutcome::Unknown] {
        let permit = admit(&usage, &credit_rules(1_000)).unwrap();
        ready(permit.reserve(300, NOW)).unwrap();
        // A refusal keeps the reservation for the next attempt.
        assert_eq!(permit.charge(ChargeOutcome::Refused, None, NOW), Charge::default());
        assert_eq!(permit.charge(outcome, None, NOW), Charge { requests: 1, credits: 300 });
        assert_eq!(
            permit.charge(outcome, None, NOW),
            Charge::default(),
            "the reservation must be charged once"
        );
    }
    check_used(&usage, 2, 600);
}

#[test]
fn a_reported_price_is_charged_unless_the_client_uses_its_own_key() {
    let usage = app_usage();
    let permit = admit_at(&usage, &credit_rules(10), FREE, NOW).unwrap();
    assert_eq!(
        permit.charge(ChargeOutcome::Served, Some(5_000), NOW),
        Charge { requests: 1, credits: 5_000 }
    );
    drop(permit);
    check_used(&usage, 1, 5_000);
    let own_key = AdmissionRequest { is_charged: false, ..METERED };
    admit_at(&usage, &credit_rules(10), own_key, NOW).unwrap().charge(ChargeOutcome::Served, Some(7), NOW);
    check_used(&usage, 1, 5_000);
}

#[test]
fn unpriced_requests_are_limited_and_charged() {
    let usage = app_usage();
    let unpriced = || {
        let permit = admit_at(&usage, &credit_rules(1_500), UNLISTED, NOW)?;
        ready(permit.reserve_unpriced(1_000, 1, NOW)).map(|()| permit)
    };
    let first = unpriced().unwrap();
    assert_eq!(unpriced().unwrap_err(), ClientLimitExceeded::Unpriced { max: 1 });
    assert!(
        ready(admit(&usage, &credit_rules(1_500)).unwrap().reserve(500, NOW)).is_ok(),
        "requests of known price must be admitted"
    );
    first.charge(ChargeOutcome::Served, None, NOW);
    // The second request reserves the rest of the quota. It may have been served, so the whole amount is charged.
    let second = unpriced().unwrap();
    check_used(&usage, 2, 1_500);
    second.charge(ChargeOutcome::Unknown, None, NOW);
    drop((first, second));
    check_used(&usage, 2, 2_000);
    assert!(matches!(unpriced().unwrap_err(), ClientLimitExceeded::Quota(_)));
    let without_quota = admit_at(&usage, &Rules::default(), UNLISTED, NOW).unwrap();
    assert_eq!(ready(without_quota.reserve_unpriced(1_000, 1, NOW)), Ok(()));
}

#[test]
fn a_client_with_a_quota_needs_permission_and_credits_for_direct_access() {
    let usage = app_usage();
    let admission = AdmissionRequest { grants_direct_access: true, ..UNLISTED };
    let with_tokens = |rules: &Rules| Rules { may_request_tokens: true, ..rules.clone() };
    assert!(admit_at(&usage, &Rules::default(), admission, NOW).is_ok());
    assert_eq!(
        admit_at(&usage, &credit_rules(9), admission, NOW).unwrap_err(),
        ClientLimitExceeded::DirectAccess
    );
    assert!(admit_at(&usage, &with_tokens(&credit_rules(9)), admission, NOW).is_ok());
    admit(&usage, &credit_rules(9)).unwrap().charge(ChargeOutcome::Served, Some(9), NOW);
    for rules in [credit_rules(9), with_tokens(&credit_rules(9))] {
        assert!(matches!(admit_at(&usage, &rules, admission, NOW), Err(ClientLimitExceeded::Quota(_))));
    }
}

#[test]
fn a_session_reserves_credits_and_is_charged_while_it_runs() {
    let usage = app_usage();
    let session = admit(&usage, &credit_rules(100)).unwrap();
    ready(session.reserve(0, NOW)).unwrap();
    ready(session.reserve(60, NOW)).unwrap();
    check_used(&usage, 1, 60);
    assert_eq!(session.count_session(NOW), Charge { requests: 1, credits: 0 });
    assert_eq!(session.charge_up_to(60, NOW), Charge { requests: 0, credits: 60 });
    ready(session.reserve(100, NOW)).unwrap();
    assert!(ready(session.reserve(101, NOW)).is_err());
    assert_eq!(session.exhausted_quota(NOW), None, "the session must be able to use its reserved credits");
    session.charge_up_to(100, NOW);
    assert_eq!(session.exhausted_quota(NOW), Some(QuotaOwner::Client));
    assert_eq!(session.charge(ChargeOutcome::Served, None, NOW), Charge::default());
    drop(session);
    check_used(&usage, 1, 100);
}

#[test]
fn a_late_price_replaces_the_charge() {
    let usage = app_usage();
    let permit = admit(&usage, &credit_rules(10_000)).unwrap();
    ready(permit.reserve(800, NOW)).unwrap();
    permit.charge(ChargeOutcome::Served, Some(500), NOW);
    let correctable_charges = permit.correctable_charges();
    drop(permit);
    assert_eq!(correctable_charges.replace(296, NOW), 296);
    check_used(&usage, 1, 296);
    let without_quota = admit(&usage, &Rules::default()).unwrap();
    without_quota.charge(ChargeOutcome::Served, None, NOW);
    assert_eq!(without_quota.correctable_charges().replace(4, NOW), 4);
    drop(without_quota);
    check_used(&usage, 2, 300);
}

#[test]
fn a_charge_after_midnight_counts_for_the_day_of_its_reservation() {
    let usage = app_usage();
    let rules = rules_with_quota(10, QuotaUnit::Credits, Period::Day);
    let tomorrow = Period::Day.end(NOW).unwrap();
    let first = admit(&usage, &rules).unwrap();
    ready(first.reserve(9, NOW)).unwrap();
    let second = admit_at(&usage, &rules, METERED, tomorrow).unwrap();
    ready(second.reserve(10, tomorrow)).unwrap();
    first.charge(ChargeOutcome::Served, Some(5), tomorrow);
    second.charge(ChargeOutcome::Served, Some(7), tomorrow);
    drop((first, second));
    let totals = usage.totals(&app_name(), tomorrow);
    assert_eq!((totals.requests[0], totals.credits), (1, [7, 7, 12]));
}

#[test]
fn concurrent_requests_are_limited_and_a_refused_request_is_not_counted() {
    let usage = app_usage();
    let limited =
        Rules { max_concurrent: Some(2), ..rules_with_quota(3, QuotaUnit::Requests, Period::Total) };
    for (rules, admission) in [
        (limited.clone(), METERED),
        (
            Rules { max_concurrent: None, ..limited.clone() },
            AdmissionRequest { max_concurrent: 2, ..METERED },
        ),
    ] {
        let first = admit_at(&usage, &rules, admission, NOW).unwrap();
        let second = admit_at(&usage, &rules, admission, NOW).unwrap();
        for _ in 0..5 {
            assert_eq!(
                admit_at(&usage, &rules, admission, NOW).unwrap_err(),
                ClientLimitExceeded::Concurrency { max: 2 }
            );
        }
        drop((first, second));
        assert!(admit_at(&usage, &rules, admission, NOW).is_ok());
        assert_eq!(usage.by_name[&app_name()].in_progress.load(Ordering::Acquire), 0);
    }
    check_used(&usage, 0, 0);
}

#[test]
fn an_exceeded_rate_limit_names_the_wait() {
    let usage = app_usage();
    let interval = Duration::from_secs(3_600);
    let rules = Rules {
        rate_limit: Some(RateLimit { requests: 1, interval }),
        ..rules_with_quota(2, QuotaUnit::Requests, Period::Total)
    };
    let first = admit(&usage, &rules).unwrap();
    let Err(ClientLimitExceeded::Rate { wait }) = admit(&usage, &rules) else {
        panic!("the rate limit must refuse the request")
    };
    assert!(
        wait > interval / 2 && wait <= interval,
        "the wait must be the rest of the interval, not {wait:?}"
    );
    check_used(&usage, 1, 0);
    drop(first);
}

#[test]
fn a_reload_and_a_restart_keep_the_usage() {
    let stored_usage = |client| UsageTotals { client, requests: [1, 2, 3], credits: [4, 5, 6] };
    let totals = [stored_usage(app_name()), stored_usage(ClientName::new("gone"))];
    let usage = ClientUsage::new(&clients(&["app"]), &totals, Arc::new(NoStoredUsage), NOW);
    admit(&usage, &Rules::default()).unwrap().charge(ChargeOutcome::Served, Some(10), NOW);
    let usage = usage.with_clients(&clients(&["other"])).with_clients(&clients(&["app", "gone"]));
    assert_eq!(
        usage.totals(&app_name(), NOW),
        UsageTotals { client: app_name(), requests: [2, 3, 4], credits: [14, 15, 16] }
    );
    let gone = Client {
        name: ClientName::new("gone"),
        rules: rules_with_quota(3, QuotaUnit::Requests, Period::Total),
    };
    assert!(ready(usage.admit(&gone, METERED, NOW)).is_err());
}

#[test]
fn parallel_requests_do_not_exceed_the_quota() {
    let usage = app_usage();
    let (request_rules, rules_of_credits) =
        (rules_with_quota(1_000, QuotaUnit::Requests, Period::Month), credit_rules(100_000));
    let (admitted, charged) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let (usage, request_rules, rules_of_credits) = (&usage, &request_rules, &rules_of_credits);
            let (admitted, charged) = (&admitted, &charged);
            scope.spawn(move || {
                for turn in 0..300_u64 {
                    if let Ok(permit) = admit(usage, request_rules) {
                        permit.charge(ChargeOutcome::Served, Some(0), NOW);
                        admitted.fetch_add(1, Ordering::AcqRel);
                    }
                    let estimate = 1 + (thread * 131 + turn * 17) % 400;
                    let permit = admit(usage, rules_of_credits);
                    if let Ok(permit) =
                        permit.and_then(|permit| ready(permit.reserve(estimate, NOW)).map(|()| permit))
                    {
                        let cost = estimate - turn % estimate.min(7);
                        charged.fetch_add(
                            permit.charge(ChargeOutcome::Served, Some(cost), NOW).credits,
                            Ordering::AcqRel,
                        );
                    }
                }
            });
        }
    });
    assert!(admitted.into_inner() <= 1_000);
    let charged = charged.into_inner();
    assert!(charged <= 100_000, "at most 100,000 credits must be charged, not {charged}");
    assert_eq!(usage.totals(&app_name(), NOW).credits, [charged; 3]);
}

/// A step in the lifecycle of a client's request.
#[derive(Clone, Debug)]
enum Step {
    Begin { estimate: u64, is_known: bool },
    Refuse(usize),
    Serve(usize, Option<u64>),
    Interrupt(usize),
    Disconnect(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let index = 0..8_usize;
    prop_oneof![
        3 => (1..400_u64, prop::bool::weighted(0.8))
            .prop_map(|(estimate, is_known)| Step::Begin { estimate, is_known }),
        1 => index.clone().prop_map(Step::Refuse),
        3 => (index.clone(), proptest::option::of(0..100_u64))
            .prop_map(|(index, percent)| Step::Serve(index, percent)),
        1 => index.clone().prop_map(Step::Interrupt),
        1 => index.prop_map(Step::Disconnect),
    ]
}

proptest! {
    /// In any order of steps, the charges exceed the quota at most by the reservations of requests of unknown price. At
    /// the end, the counters contain exactly the sum of the charges.
    #[test]
    fn charges_are_bounded_and_counted_exactly_in_every_order(steps in prop::collection::vec(step(), 0..120)) {
        const QUOTA: u64 = 2_000;
        let usage = app_usage();
        let rules = credit_rules(QUOTA);
        let mut in_progress: VecDeque<(ClientPermit, u64)> = VecDeque::new();
        let (mut requests, mut charged) = (0, 0);
        for step in steps {
            let mut end = |permit: ClientPermit, outcome, reported| {
                let Charge { requests: more, credits } = permit.charge(outcome, reported, NOW);
                requests += more;
                charged += credits;
            };
            match step {
                Step::Begin { estimate, is_known } => {
                    let Ok(permit) = admit(&usage, &rules) else { continue };
                    let reserved = match is_known {
                        true => ready(permit.reserve(estimate, NOW)),
                        false => ready(permit.reserve_unpriced(100, 2, NOW)),
                    };
                    if reserved.is_ok() {
                        in_progress.push_back((permit, if is_known { estimate } else { 100 }));
                    }
                }
                Step::Refuse(at) => {
                    if let Some((permit, _)) = in_progress.get(at) {
                        prop_assert_eq!(permit.charge(ChargeOutcome::Refused, None, NOW), Charge::default());
                    }
                }
                Step::Serve(at, percent) => {
                    if let Some((permit, estimate)) = in_progress.remove(at) {
                        end(permit, ChargeOutcome::Served, percent.map(|percent| estimate * percent / 100));
                    }
                }
                Step::Interrupt(at) => {
                    if let Some((permit, _)) = in_progress.remove(at) {
                        end(permit, ChargeOutcome::Unknown, None);
                    }
                }
                Step::Disconnect(at) => drop(in_progress.remove(at)),
            }
            let used_credits = usage.totals(&app_name(), NOW).credits[2];
            // At most two requests of unknown price are in progress, and each may exceed the quota by its 100 credits.
            prop_assert!(
                charged <= used_credits && used_credits <= QUOTA + 200,
                "the {} used credits must include the {} charged credits and exceed the quota by at most 200",
                used_credits, charged
            );
        }
        drop(in_progress);
        let totals = usage.totals(&app_name(), NOW);
        prop_assert_eq!((totals.requests, totals.credits), ([requests; 3], [charged; 3]));
        let counters = &usage.by_name[&app_name()];
        prop_assert_eq!(counters.in_progress.load(Ordering::Acquire), 0);
        prop_assert_eq!(counters.usage.unpriced_in_progress.load(Ordering::Acquire), 0);
    }
}
