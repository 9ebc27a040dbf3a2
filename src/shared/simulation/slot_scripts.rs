//! Tests `slots.lua` in the model of Redis: it divides the slots by fair shares, and never exceeds the maximum in any
//! order of statements. It marks a grant as partial while other replicas hold slots to which the replica is entitled.

use super::super::scripts::{SLOTS, ScriptCall};
use super::redis_model::SimulatedRedis;
use super::scripts::parse_numbers;

/// The position of the lease in the arguments of a call.
const LEASE_POSITION: usize = 1;
/// The position of the rotation interval in the arguments of a call.
const ROTATION_POSITION: usize = 2;
/// The position of the granted slots in a reply.
const GRANTED: usize = 0;
/// The position of the number in a reply that is 1 if the grant is partial.
const PARTIAL: usize = 5;

/// Returns the call with a statement of `replica` about the slots of one concurrency group or client.
pub(super) fn slots_call(replica: &str, [held, demand, max, stamp]: [u64; 4]) -> ScriptCall {
    // The rotation interval is longer than a test, so that the remainder of the division stays at one replica.
    let mut arguments = vec![replica.to_owned(), "5000".to_owned(), "1000000000000000".to_owned()];
    arguments.extend([held, demand, max, stamp].map(|number| number.to_string()));
    ScriptCall { script: SLOTS, keys: vec!["slots".to_owned()], arguments }
}

#[test]
fn slots_are_divided_by_fair_shares() {
    for (max, demands, expected) in [
        (10, vec![10], vec![10]),
        (10, vec![2, 3], vec![5, 5]),
        (10, vec![10, 10], vec![5, 5]),
        (10, vec![1, 20, 20], vec![1, 5, 4]),
        (2, vec![1, 1, 1], vec![1, 1, 0]),
        (15, vec![4, 4, 4], vec![5, 5, 5]),
        (1, vec![8], vec![1]),
    ] {
        let redis = SimulatedRedis::new();
        redis.set_time(1_000_000_000);
        let mut shares = vec![0; demands.len()];
        // There are several rounds, because a replica returns surplus slots only with its next statement.
        for _ in 0..4 {
            for (index, demand) in demands.iter().enumerate() {
                let reply = parse_numbers(
                    &redis.run(&slots_call(&index.to_string(), [shares[index], *demand, max, 1])),
                );
                shares[index] = u64::try_from(reply[GRANTED]).unwrap();
                assert!(shares.iter().sum::<u64>() <= max, "{shares:?} must not exceed the maximum of {max}");
            }
        }
        let mut sorted = shares.clone();
        let mut expected_sorted = expected.clone();
        sorted.sort_unstable();
        expected_sorted.sort_unstable();
        assert_eq!(sorted, expected_sorted, "{max} slots must be divided fairly among {demands:?}");
    }
}

#[test]
fn a_grant_is_partial_until_other_replicas_return_their_slots() {
    let redis = SimulatedRedis::new();
    redis.set_time(1_000_000_000);
    let send_statement = |replica: &str, held| {
        let mut call = slots_call(replica, [held, 1, 11, 1]);
        "2000".clone_into(&mut call.arguments[ROTATION_POSITION]);
        let reply = parse_numbers(&redis.run(&call));
        (reply[GRANTED], reply[PARTIAL] == 1)
    };
    assert_eq!(send_statement("a", 0), (11, false), "the only replica must get all slots");
    assert_eq!(
        send_statement("b", 0),
        (0, true),
        "the second replica must get no slot before the first returns its slots"
    );
    let (kept, is_partial) = send_statement("a", 11);
    assert!(kept <= 6 && !is_partial, "the first replica must return the slots beyond its share");
    send_statement("a", u64::try_from(kept).unwrap());
    let (granted, is_partial) = send_statement("b", 0);
    assert_eq!((granted + kept, is_partial), (11, false), "the second replica must get the returned slots");
    redis.set_time(1_002_000_000);
    let (_, is_partial) = send_statement("a", u64::try_from(kept).unwrap());
    assert!(!is_partial, "a grant that lacks only the remainder of the division must not be partial");
}

#[test]
fn slots_never_exceed_the_maximum_in_any_order_of_statements() {
    for seed in 0..40 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let redis = SimulatedRedis::new();
        let max = rng.u64(1..16);
        let mut shares = [0_u64; 5];
        let mut running = [0_u64; 5];
        for step in 0..300 {
            redis.set_time((1_000_000 + step * 100) * 1_000);
            let index = rng.usize(..5);
            running[index] = rng.u64(0..=shares[index]);
            let demand = if rng.u8(..) < 30 { 0 } else { rng.u64(1..10) };
            let held = shares[index].max(running[index]);
            let mut call = slots_call(&index.to_string(), [held, demand, max, 1]);
            "2000".clone_into(&mut call.arguments[ROTATION_POSITION]);
            "60000".clone_into(&mut call.arguments[LEASE_POSITION]);
            let reply = parse_numbers(&redis.run(&call));
            // Requests in flight keep their slots.
            shares[index] = u64::try_from(reply[GRANTED]).unwrap().max(running[index]);
            assert!(
                shares.iter().sum::<u64>() <= max,
                "{shares:?} must not exceed the maximum of {max} with the seed {seed}"
            );
        }
    }
}
