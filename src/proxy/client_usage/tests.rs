use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;

use super::*;
use crate::policy::charge::Billing;
use crate::policy::charge::{Charge, ChargeOutcome};
use crate::policy::client::{AnonymousAccess, Rules};
use crate::policy::client_quota::Measure;
use crate::policy::client_quota::{ClientQuota, QuotaShortfall, Rate};
use crate::secret::TokenFingerprint;

const NOW: UnixMs = UnixMs(1_796_000_000_000);

const METERED: LimitRequest =
    LimitRequest { billing: Billing::Metered, gives_access: false, is_charged: true, max_concurrent: 1_000 };
const FREE: LimitRequest = LimitRequest { billing: Billing::Free, ..METERED };
const UNLISTED: LimitRequest = LimitRequest { billing: Billing::Unlisted, ..METERED };

fn app() -> ClientName {
    ClientName::new("app")
}

fn clients(names: &[&str]) -> Clients {
    let client = |name: &&str| {
        let client = Client { name: ClientName::new(name), rules: Rules::default() };
        (client, TokenFingerprint::of(name))
    };
    Clients::new(names.iter().map(client).collect(), AnonymousAccess::Refused)
}

fn accounts() -> ClientUsage {
    ClientUsage::new(&clients(&["app"]), &[], NOW)
}

fn allowing(amount: u64, measure: Measure, period: Period) -> Rules {
    Rules { allowance: Some(ClientQuota { amount, measure, period }), ..Rules::default() }
}

fn credits(amount: u64) -> Rules {
    allowing(amount, Measure::Credits, Period::Ever)
}

fn enter_at(
    accounts: &ClientUsage,
    rules: &Rules,
    claim: LimitRequest,
    now: UnixMs,
) -> Result<ClientPermit, ClientLimitExceeded> {
    accounts.admit(&Client { name: app(), rules: rules.clone() }, claim, now)
}

fn enter(accounts: &ClientUsage, rules: &Rules) -> Result<ClientPermit, ClientLimitExceeded> {
    enter_at(accounts, rules, METERED, NOW)
}

/// The used requests and credits, including reserved ones.
#[track_caller]
fn check_taken(accounts: &ClientUsage, requests: u64, credits: u64) {
    let used = accounts.used(&app(), NOW);
    assert_eq!((used.requests, used.credits), ([requests; 3], [credits; 3]));
}

#[test]
fn what_was_served_counts_and_nothing_else() {
    let accounts = accounts();
    let rules = allowing(3, Measure::Requests, Period::Ever);
    for _ in 0..2 {
        let permit = enter(&accounts, &rules).unwrap();
        assert_eq!(permit.settle(ChargeOutcome::Served, Some(0), NOW), Charge { requests: 1, credits: 0 });
    }
    for outcome in [ChargeOutcome::Unsent, ChargeOutcome::Refused] {
        enter(&accounts, &rules).unwrap().settle(outcome, None, NOW);
    }
    drop(enter(&accounts, &rules).unwrap());
    check_taken(&accounts, 2, 0);
    let third = enter(&accounts, &rules).unwrap();
    assert!(matches!(enter(&accounts, &rules), Err(ClientLimitExceeded::Spent(_))), "it is counted ahead");
    third.settle(ChargeOutcome::Unknown, None, NOW);
    drop(third);
    assert!(
        matches!(enter(&accounts, &rules), Err(ClientLimitExceeded::Spent(_))),
        "ending gives nothing back"
    );
    assert!(enter_at(&accounts, &rules, FREE, NOW).is_ok(), "what is free goes on");
    assert!(enter_at(&accounts, &rules, UNLISTED, NOW).is_err(), "what is not known to be free does not");
}

#[test]
fn the_last_credits_are_reserved_once() {
    let accounts = accounts();
    let first = enter(&accounts, &credits(1_000)).unwrap();
    let second = enter(&accounts, &credits(1_000)).unwrap();
    first.reserve(1_000, NOW).unwrap();
    assert_eq!(second.reserve(1_000, NOW).unwrap_err().shortfall, None);
    check_taken(&accounts, 2, 1_000);
    assert_eq!(first.settle(ChargeOutcome::Served, Some(250), NOW), Charge { requests: 1, credits: 250 });
    check_taken(&accounts, 2, 250);
    let refused = second.reserve(1_000, NOW).unwrap_err();
    assert_eq!(refused.shortfall, Some(QuotaShortfall { left: 750, needed: 1_000 }));
    second.reserve(750, NOW).unwrap();
    drop(second);
    check_taken(&accounts, 1, 250);
}

#[test]
fn a_price_that_nobody_names_is_what_was_reserved() {
    let accounts = accounts();
    for outcome in [ChargeOutcome::Served, ChargeOutcome::Unknown] {
        let permit = enter(&accounts, &credits(1_000)).unwrap();
        permit.reserve(300, NOW).unwrap();
        // A refusal keeps the reservation for the next attempt.
        assert_eq!(permit.settle(ChargeOutcome::Refused, None, NOW), Charge::default());
        assert_eq!(permit.settle(outcome, None, NOW), Charge { requests: 1, credits: 300 });
        assert_eq!(permit.settle(outcome, None, NOW), Charge::default(), "once");
    }
    check_taken(&accounts, 2, 600);
}

#[test]
fn a_named_price_is_charged_whatever_was_expected() {
    let accounts = accounts();
    let permit = enter_at(&accounts, &credits(10), FREE, NOW).unwrap();
    assert_eq!(
        permit.settle(ChargeOutcome::Served, Some(5_000), NOW),
        Charge { requests: 1, credits: 5_000 }
    );
    drop(permit);
    check_taken(&accounts, 1, 5_000);
    let own = LimitRequest { is_charged: false, ..METERED };
    enter_at(&accounts, &credits(10), own, NOW).unwrap().settle(ChargeOutcome::Served, Some(7), NOW);
    check_taken(&accounts, 1, 5_000);
}

#[test]
fn of_unknown_prices_few_are_under_way_and_each_costs_something() {
    let accounts = accounts();
    let unpriced = || {
        let permit = enter_at(&accounts, &credits(1_500), UNLISTED, NOW)?;
        permit.reserve_unpriced(1_000, 1, NOW).map(|()| permit)
    };
    let first = unpriced().unwrap();
    assert_eq!(unpriced().unwrap_err(), ClientLimitExceeded::Unpriced { max: 1 });
    assert!(enter(&accounts, &credits(1_500)).unwrap().reserve(500, NOW).is_ok(), "known prices go on");
    first.settle(ChargeOutcome::Served, None, NOW);
    // The session may still run; its price is settled.
    let second = unpriced().unwrap();
    check_taken(&accounts, 2, 1_500);
    second.settle(ChargeOutcome::Unknown, None, NOW);
    drop((first, second));
    check_taken(&accounts, 2, 2_000);
    assert!(matches!(unpriced().unwrap_err(), ClientLimitExceeded::Spent(_)));
    let without_quota = enter_at(&accounts, &Rules::default(), UNLISTED, NOW).unwrap();
    assert_eq!(without_quota.reserve_unpriced(1_000, 1, NOW), Ok(()));
}

#[test]
fn direct_access_needs_leave_and_a_quota_that_is_not_used() {
    let accounts = accounts();
    let claim = LimitRequest { gives_access: true, ..UNLISTED };
    let may = |rules: &Rules| Rules { may_take_tokens: true, ..rules.clone() };
    assert!(enter_at(&accounts, &Rules::default(), claim, NOW).is_ok());
    assert_eq!(enter_at(&accounts, &credits(9), claim, NOW).unwrap_err(), ClientLimitExceeded::DirectAccess);
    assert!(enter_at(&accounts, &may(&credits(9)), claim, NOW).is_ok());
    enter(&accounts, &credits(9)).unwrap().settle(ChargeOutcome::Served, Some(9), NOW);
    for rules in [credits(9), may(&credits(9))] {
        assert!(matches!(enter_at(&accounts, &rules, claim, NOW), Err(ClientLimitExceeded::Spent(_))));
    }
}

#[test]
fn a_session_reserves_and_pays_as_it_goes_on() {
    let accounts = accounts();
    let session = enter(&accounts, &credits(100)).unwrap();
    session.reserve(0, NOW).unwrap();
    session.reserve(60, NOW).unwrap();
    check_taken(&accounts, 1, 60);
    assert_eq!(session.count(NOW), Charge { requests: 1, credits: 0 });
    assert_eq!(session.charge_up_to(60, NOW), Charge { requests: 0, credits: 60 });
    session.reserve(100, NOW).unwrap();
    assert!(session.reserve(101, NOW).is_err());
    assert!(session.may_spend(NOW), "what is reserved is its own");
    session.charge_up_to(100, NOW);
    assert!(!session.may_spend(NOW));
    assert_eq!(session.settle(ChargeOutcome::Served, None, NOW), Charge::default());
    drop(session);
    check_taken(&accounts, 1, 100);
}

#[test]
fn a_late_price_takes_the_place_of_what_was_charged() {
    let accounts = accounts();
    let permit = enter(&accounts, &credits(10_000)).unwrap();
    permit.reserve(800, NOW).unwrap();
    permit.settle(ChargeOutcome::Served, Some(500), NOW);
    let late = permit.late_price();
    drop(permit);
    assert_eq!(late.settle(296, NOW), 296);
    check_taken(&accounts, 1, 296);
    let nothing = enter(&accounts, &Rules::default()).unwrap();
    nothing.settle(ChargeOutcome::Served, None, NOW);
    assert_eq!(nothing.late_price().settle(4, NOW), 4);
    drop(nothing);
    check_taken(&accounts, 2, 300);
}

#[test]
fn what_is_settled_tomorrow_belongs_to_today() {
    let accounts = accounts();
    let rules = allowing(10, Measure::Credits, Period::Day);
    let tomorrow = Period::Day.end(NOW).unwrap();
    let first = enter(&accounts, &rules).unwrap();
    first.reserve(9, NOW).unwrap();
    let second = enter_at(&accounts, &rules, METERED, tomorrow).unwrap();
    second.reserve(10, tomorrow).unwrap();
    first.settle(ChargeOutcome::Served, Some(5), tomorrow);
    second.settle(ChargeOutcome::Served, Some(7), tomorrow);
    drop((first, second));
    let used = accounts.used(&app(), tomorrow);
    assert_eq!((used.requests[0], used.credits), (1, [7, 7, 12]));
}

#[test]
fn as_many_as_may_are_under_way_and_a_refusal_leaves_no_trace() {
    let accounts = accounts();
    let limited = Rules { concurrency: Some(2), ..allowing(3, Measure::Requests, Period::Ever) };
    for (rules, claim) in [
        (limited.clone(), METERED),
        (Rules { concurrency: None, ..limited.clone() }, LimitRequest { max_concurrent: 2, ..METERED }),
    ] {
        let one = enter_at(&accounts, &rules, claim, NOW).unwrap();
        let two = enter_at(&accounts, &rules, claim, NOW).unwrap();
        for _ in 0..5 {
            assert_eq!(
                enter_at(&accounts, &rules, claim, NOW).unwrap_err(),
                ClientLimitExceeded::Concurrency { max: 2 }
            );
        }
        drop((one, two));
        assert!(enter_at(&accounts, &rules, claim, NOW).is_ok());
        assert_eq!(accounts.by_name[&app()].under_way.load(Ordering::Acquire), 0);
    }
    check_taken(&accounts, 0, 0);
}

#[test]
fn a_rate_that_is_used_up_says_how_long_to_wait() {
    let accounts = accounts();
    let span = Duration::from_secs(3_600);
    let rules =
        Rules { rate: Some(Rate { requests: 1, span }), ..allowing(2, Measure::Requests, Period::Ever) };
    let first = enter(&accounts, &rules).unwrap();
    let Err(ClientLimitExceeded::Rate { wait }) = enter(&accounts, &rules) else { panic!("it was let in") };
    assert!(wait > span / 2 && wait <= span, "{wait:?}");
    check_taken(&accounts, 1, 0);
    drop(first);
}

#[test]
fn a_reload_and_a_restart_forget_nothing() {
    let used = |client| Used { client, requests: [1, 2, 3], credits: [4, 5, 6] };
    let accounts = ClientUsage::new(&clients(&["app"]), &[used(app()), used(ClientName::new("gone"))], NOW);
    enter(&accounts, &Rules::default()).unwrap().settle(ChargeOutcome::Served, Some(10), NOW);
    let accounts = accounts.following(&clients(&["other"])).following(&clients(&["app", "gone"]));
    assert_eq!(
        accounts.used(&app(), NOW),
        Used { client: app(), requests: [2, 3, 4], credits: [14, 15, 16] }
    );
    let gone = Client { name: ClientName::new("gone"), rules: allowing(3, Measure::Requests, Period::Ever) };
    assert!(accounts.admit(&gone, METERED, NOW).is_err());
}

#[test]
fn many_at_once_get_no_more_than_there_is() {
    let accounts = accounts();
    let (requests, of_credits) = (allowing(1_000, Measure::Requests, Period::Month), credits(100_000));
    let (let_in, spent) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let (accounts, requests, of_credits) = (&accounts, &requests, &of_credits);
            let (let_in, spent) = (&let_in, &spent);
            scope.spawn(move || {
                for turn in 0..300_u64 {
                    if let Ok(permit) = enter(accounts, requests) {
                        permit.settle(ChargeOutcome::Served, Some(0), NOW);
                        let_in.fetch_add(1, Ordering::AcqRel);
                    }
                    let estimate = 1 + (thread * 131 + turn * 17) % 400;
                    let permit = enter(accounts, of_credits);
                    if let Ok(permit) =
                        permit.and_then(|permit| Ok(permit.reserve(estimate, NOW).map(|()| permit)?))
                    {
                        let cost = estimate - turn % estimate.min(7);
                        spent.fetch_add(
                            permit.settle(ChargeOutcome::Served, Some(cost), NOW).credits,
                            Ordering::AcqRel,
                        );
                    }
                }
            });
        }
    });
    assert!(let_in.into_inner() <= 1_000);
    let spent = spent.into_inner();
    assert!(spent <= 100_000, "{spent}");
    assert_eq!(accounts.used(&app(), NOW).credits, [spent; 3]);
}

/// The events of a client's request.
#[derive(Clone, Debug)]
enum Step {
    Begin { estimate: u64, is_known: bool },
    Refuse(usize),
    Serve(usize, Option<u64>),
    Break(usize),
    Leave(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..8_usize;
    prop_oneof![
        3 => (1..400_u64, prop::bool::weighted(0.8))
            .prop_map(|(estimate, is_known)| Step::Begin { estimate, is_known }),
        1 => which.clone().prop_map(Step::Refuse),
        3 => (which.clone(), proptest::option::of(0..100_u64)).prop_map(|(at, percent)| Step::Serve(at, percent)),
        1 => which.clone().prop_map(Step::Break),
        1 => which.prop_map(Step::Leave),
    ]
}

proptest! {
    /// In any order of events, the charges stay within the quota, and at the end the tally is
    /// exactly the sum of the charges.
    #[test]
    fn the_quota_is_exact_in_every_order(steps in prop::collection::vec(step(), 0..120)) {
        const QUOTA: u64 = 2_000;
        let accounts = accounts();
        let rules = credits(QUOTA);
        let mut under_way: VecDeque<(ClientPermit, u64)> = VecDeque::new();
        let (mut requests, mut spent) = (0, 0);
        for step in steps {
            let mut end = |permit: ClientPermit, outcome, reported| {
                let Charge { requests: more, credits } = permit.settle(outcome, reported, NOW);
                requests += more;
                spent += credits;
            };
            match step {
                Step::Begin { estimate, is_known } => {
                    let Ok(permit) = enter(&accounts, &rules) else { continue };
                    let reserved = match is_known {
                        true => permit.reserve(estimate, NOW).map_err(ClientLimitExceeded::from),
                        false => permit.reserve_unpriced(100, 2, NOW),
                    };
                    if reserved.is_ok() {
                        under_way.push_back((permit, if is_known { estimate } else { 100 }));
                    }
                }
                Step::Refuse(at) => {
                    if let Some((permit, _)) = under_way.get(at) {
                        prop_assert_eq!(permit.settle(ChargeOutcome::Refused, None, NOW), Charge::default());
                    }
                }
                Step::Serve(at, percent) => {
                    if let Some((permit, estimate)) = under_way.remove(at) {
                        end(permit, ChargeOutcome::Served, percent.map(|percent| estimate * percent / 100));
                    }
                }
                Step::Break(at) => {
                    if let Some((permit, _)) = under_way.remove(at) {
                        end(permit, ChargeOutcome::Unknown, None);
                    }
                }
                Step::Leave(at) => drop(under_way.remove(at)),
            }
            let taken = accounts.used(&app(), NOW).credits[2];
            // Two requests of unknown price may each exceed the quota by what was reserved for
            // them.
            prop_assert!(spent <= taken && taken <= QUOTA + 200, "{} {}", spent, taken);
        }
        drop(under_way);
        let used = accounts.used(&app(), NOW);
        prop_assert_eq!((used.requests, used.credits), ([requests; 3], [spent; 3]));
        let account = &accounts.by_name[&app()];
        prop_assert_eq!(account.under_way.load(Ordering::Acquire), 0);
        prop_assert_eq!(account.unpriced.load(Ordering::Acquire), 0);
    }
}
