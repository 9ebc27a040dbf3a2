//! Tests three scripts in the model of Redis: the grants and the restored charges of `grants.lua`, the stored entries
//! of `newest.lua`, and the leader of `members.lua`.

use std::time::Duration;

use redis::Value;

use super::super::beat_calls::grant_arguments;
use super::super::credit_statement::CreditStatement;
use super::super::reply::{parse_amount, parse_integer, parse_list, parse_text, parse_tuple};
use super::super::scripts::{GRANTS, MEMBERS, NEWEST, ScriptCall};
use super::redis_model::SimulatedRedis;

/// The lease of a grant.
const LEASE_MS: u64 = 10_000;
/// The credits of the workspace.
const LIMIT: u64 = 1_000;
/// The statement of a replica that neither uses nor needs credits.
pub(super) const FRESH: CreditStatement = CreditStatement {
    used: Some(0),
    run: 1,
    used_before: 0,
    reserved: 0,
    queued: 0,
    least: 0,
    held: 0,
    limit: LIMIT,
    base: None,
    is_idle: false,
    used_by_others: 0,
    epoch: 0,
};

thread_local! {
    /// The number of the last statement of the test.
    static STATEMENT_NUMBER: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// The maximum time for which a replica that can serve a request keeps its place in the line of waiting replicas.
const MAX_TURN_MS: u64 = 100;
/// The minimum time between two replies with the charges of each replica. It is longer than a test, so that no reply
/// depends on the speed of the machine.
const LIST_INTERVAL_MS: u64 = 1_000_000_000;

/// Returns the call with a statement of `replica`, which is one of `replicas` replicas.
pub(super) fn grants_call(replica: &str, replicas: usize, statement: &CreditStatement) -> ScriptCall {
    STATEMENT_NUMBER.set(STATEMENT_NUMBER.get() + 1);
    let numbers = [replicas as u64, LEASE_MS, STATEMENT_NUMBER.get(), MAX_TURN_MS, LIST_INTERVAL_MS];
    let mut arguments = vec![replica.to_owned()];
    arguments.extend(numbers.map(|number| number.to_string()));
    arguments.extend(grant_arguments(statement, String::new(), Duration::from_secs(60)));
    ScriptCall { script: GRANTS, keys: vec!["credits".to_owned()], arguments }
}

/// Returns the call that stores entries in a map of at most `max` entries. Each entry has a name, a stamp and an
/// expiry.
pub(super) fn newest_call(max: usize, entries: &[(&str, u64, u64)]) -> ScriptCall {
    let mut arguments = vec!["channel".to_owned(), "evidence".to_owned(), "r1".to_owned(), max.to_string()];
    for (name, stamp, expires) in entries {
        arguments.extend([(*name).to_owned(), stamp.to_string(), expires.to_string(), "a value".to_owned()]);
    }
    ScriptCall { script: NEWEST, keys: vec!["map".to_owned()], arguments }
}

// The positions in a reply of `grants.lua` about one workspace.
const GRANTED: usize = 0;
const USED_BY_OTHERS: usize = 1;
const MAY_EXCEED: usize = 4;
const FORMER_USE: usize = 5;
const LEFT: usize = 6;
const RUN: usize = 8;
const USED_BEFORE: usize = 9;
const EPOCH: usize = 10;
const USES: usize = 12;

/// Returns the numbers of the first subject in a reply.
pub(super) fn parse_numbers(reply: &Value) -> Vec<i64> {
    parse_list(&parse_list(reply).unwrap()[0])
        .unwrap()
        .iter()
        .filter_map(|number| parse_integer(number).ok())
        .collect()
}

/// Returns the used credits of each other replica in a reply of `grants.lua`.
fn parse_uses(reply: &Value) -> String {
    parse_text(&parse_list(&parse_list(reply).unwrap()[0]).unwrap()[USES]).unwrap().to_owned()
}

/// A replica that uses random parts of its grants.
#[derive(Clone, Debug, Default)]
struct ModelReplica {
    used: u64,
    bound: u64,
    lease_end: u64,
    may_exceed: bool,
}

/// Returns the sum of the credits that all replicas except the replica `index` have used.
fn sum_used_by_others(replicas: &[ModelReplica], index: usize) -> i64 {
    let others = replicas.iter().enumerate().filter(|(other, _)| *other != index);
    i64::try_from(others.map(|(_, replica)| replica.used).sum::<u64>()).unwrap()
}

/// Asserts that the sums in the hash `credits` are the sums of the records.
#[track_caller]
fn assert_sums(redis: &SimulatedRedis, now: u64) {
    let Value::Map(fields) = redis.hash_fields("credits") else { panic!("the credits must be a hash") };
    let parse =
        |numbers: &str| -> Vec<u64> { numbers.split(' ').map(|number| number.parse().unwrap()).collect() };
    let mut expected = [0; 4];
    let mut sums = Vec::new();
    for (name, value) in &fields {
        match parse_text(name).unwrap() {
            "sums" => {
                let (numbers, _unlisted) = parse_text(value).unwrap().rsplit_once(' ').unwrap();
                sums = parse(numbers);
            }
            "base" | "right" => {}
            _ => {
                let [used, held, expires, reserved, _, _, since, ..] = parse(parse_text(value).unwrap())[..]
                else {
                    panic!("{name:?} must have the fields of a record")
                };
                let unused = if expires > now { held.saturating_sub(used) } else { 0 };
                let is_in_line = expires > now && since > 0;
                let record = [used, unused, reserved.min(unused), u64::from(is_in_line)];
                expected.iter_mut().zip(record).for_each(|(sum, number)| *sum += number);
            }
        }
    }
    let [_, used, unused, reserved, expires, queued, ..] = sums[..] else {
        panic!("the hash must contain the sums")
    };
    if expires == 0 || expires > now {
        assert_eq!([used, unused, reserved, queued], expected, "the sums at {now} must match {fields:?}");
    } else {
        assert_eq!(used, expected[0], "the sum of the used credits at {now} must match {fields:?}");
    }
}

#[test]
fn grants_never_exceed_the_limit_in_any_order_of_statements() {
    for seed in 0..40 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let redis = SimulatedRedis::new();
        let mut replicas = vec![ModelReplica::default(); 4];
        let mut now = 1_000_000;
        let mut epochs = [0; 4];
        for _ in 0..400 {
            // A long pause ends leases.
            now += if rng.u8(..) < 8 { rng.u64(0..12_000) } else { rng.u64(0..300) };
            redis.set_time(now * 1_000);
            let index = rng.usize(..replicas.len());
            let used_by_others = sum_used_by_others(&replicas, index).unsigned_abs();
            let replica = &mut replicas[index];
            if replica.lease_end <= now {
                // The replica stops using a grant that has ended.
                replica.bound = replica.used;
            }
            replica.used += rng.u64(0..=replica.bound.saturating_sub(replica.used).min(40));
            let queued = if rng.bool() { rng.u64(0..200) } else { 0 };
            let least = queued.min(rng.u64(1..200));
            let held = replica.bound.max(replica.used);
            let statement = CreditStatement {
                used: Some(replica.used),
                queued,
                least,
                held,
                is_idle: rng.bool(),
                used_by_others,
                epoch: if rng.u8(..) < 20 { 0 } else { epochs[index] },
                ..FRESH
            };
            let reply = parse_numbers(&redis.run(&grants_call(&index.to_string(), 4, &statement)));
            replica.bound = u64::try_from(reply[GRANTED]).unwrap();
            replica.may_exceed = reply[MAY_EXCEED] == 1;
            replica.lease_end = now + LEASE_MS - 1_000;
            epochs[index] = reply[EPOCH].unsigned_abs();
            assert_sums(&redis, now);
            let total: u64 = replicas
                .iter()
                .map(
                    |replica| {
                        if replica.lease_end > now { replica.bound.max(replica.used) } else { replica.used }
                    },
                )
                .sum();
            assert!(
                total <= LIMIT,
                "the grants must not exceed the limit with the seed {seed}: {replicas:?}"
            );
        }
        // After all replicas have returned their unused credits, the last request gets all credits that are left.
        let total: u64 = replicas.iter().map(|replica| replica.used).sum();
        for _ in 0..2 {
            for (index, replica) in replicas.iter().enumerate() {
                let statement = CreditStatement {
                    used: Some(replica.used),
                    held: replica.used,
                    queued: LIMIT,
                    least: LIMIT,
                    ..FRESH
                };
                redis.run(&grants_call(&index.to_string(), 4, &statement));
            }
        }
        now += 7_000;
        redis.set_time(now * 1_000);
        let used = replicas[3].used;
        let rest = LIMIT - total;
        let statement = CreditStatement { used: Some(used), held: used, queued: rest, least: rest, ..FRESH };
        redis.run(&grants_call("3", 4, &statement));
        for (index, replica) in replicas.iter().take(3).enumerate() {
            let used = replica.used;
            let statement = CreditStatement { used: Some(used), held: used, ..FRESH };
            redis.run(&grants_call(&index.to_string(), 4, &statement));
            redis.run(&grants_call(&index.to_string(), 4, &statement));
        }
        let reply = parse_numbers(&redis.run(&grants_call("3", 4, &statement)));
        assert!(
            reply[GRANTED] <= i64::try_from(used + LIMIT - total).unwrap(),
            "the grant must not exceed the credits that are left: {reply:?}"
        );
        assert_eq!(
            (reply[USED_BY_OTHERS], reply[LEFT]),
            (sum_used_by_others(&replicas, 3), i64::try_from(LIMIT - total).unwrap()),
            "the reply must contain the used and the remaining credits with the seed {seed}"
        );
    }
}

/// A workspace whose credits three replicas need.
struct CreditLine {
    redis: SimulatedRedis,
    now: u64,
}

impl CreditLine {
    fn new() -> Self {
        Self { redis: SimulatedRedis::new(), now: 1_000_000 }
    }

    /// Sends the statement of a replica, 1 ms after the last statement. Returns its grant, and whether the replica may
    /// exceed the credits that are left.
    fn send(&mut self, replica: &str, statement: CreditStatement) -> (i64, bool) {
        self.now += 1;
        self.redis.set_time(self.now * 1_000);
        let reply = parse_numbers(&self.redis.run(&grants_call(replica, 3, &statement)));
        (reply[GRANTED], reply[MAY_EXCEED] == 1)
    }
}

#[test]
fn one_replica_at_a_time_exceeds_the_remaining_credits() {
    let mut line = CreditLine::new();
    let base = Some((990, 5));
    let wants = CreditStatement { queued: 20, least: 20, base, ..FRESH };
    assert_eq!(
        line.send("a", wants),
        (0, true),
        "the first replica must get the right, because 10 credits suffice for no request"
    );
    assert_eq!(line.send("b", wants), (0, false), "only one replica may have the right");
    assert_eq!(
        line.send("a", wants),
        (0, true),
        "the right must last, because the replica may need a slot first"
    );
    line.now += MAX_TURN_MS;
    assert_eq!(line.send("a", wants), (0, false), "a right that was not used must end");
    assert_eq!(line.send("b", wants), (0, false), "the first replica must confirm the end of its right");
    assert_eq!(line.send("a", wants), (0, false), "the first replica must confirm the end of its right");
    assert_eq!(line.send("b", wants), (0, true), "the second replica must get the right");
    let uses = CreditStatement { reserved: 20, held: 20, queued: 0, least: 0, ..wants };
    assert_eq!(line.send("b", uses), (10, false), "a right that was used must end");
    assert_eq!(
        line.send("a", wants),
        (0, false),
        "no replica may get the right during the request of another replica that exceeds the remaining credits"
    );
    line.send("b", FRESH);
    assert_eq!(line.send("a", wants), (0, true), "the first replica must get the right after that request");
}

#[test]
fn a_request_that_fits_ends_the_right_to_exceed_the_remaining_credits() {
    let mut line = CreditLine::new();
    let wants = CreditStatement { queued: 20, least: 20, base: Some((990, 5)), ..FRESH };
    assert_eq!(line.send("a", wants), (0, true), "the only replica in the line must get the right");
    let small = CreditStatement { queued: 4, least: 4, ..FRESH };
    assert_eq!(
        line.send("b", small),
        (0, false),
        "no credits must be granted before the next statement of the first replica, whose use is unknown"
    );
    assert_eq!(line.send("a", wants), (0, false), "a request that fits must end the right");
    assert_eq!(line.send("b", small), (0, false), "the first replica must confirm the end of its right");
    assert_eq!(line.send("a", wants), (0, false), "the first replica must confirm the end of its right");
    assert_eq!(line.send("b", small), (4, false), "the request that fits must get its credits");
    assert_eq!(
        line.send("a", wants),
        (0, false),
        "no replica may get the right while another has unused credits"
    );
}

#[test]
fn the_first_replica_in_line_collects_the_returned_credits() {
    let mut line = CreditLine::new();
    let held = CreditStatement { base: Some((900, 5)), ..FRESH };
    assert_eq!(
        line.send("a", held),
        (16, false),
        "a replica without requests must get a part of 100 credits"
    );
    assert_eq!(line.send("b", held), (14, false), "another replica must get a part of the other 84 credits");
    let wants = CreditStatement { queued: 90, least: 90, ..FRESH };
    assert_eq!(
        line.send("c", wants),
        (70, false),
        "the first replica in the line must keep the credits that it has collected"
    );
    let waiting = CreditStatement { queued: 30, least: 30, ..FRESH };
    let holding = CreditStatement { held: 16, ..waiting };
    assert_eq!(line.send("a", holding), (0, false), "a replica behind the first must return its credits");
    assert_eq!(line.send("a", waiting), (0, false), "a replica behind the first must get no credits");
    let small = CreditStatement { queued: 5, least: 5, held: 14, ..FRESH };
    assert_eq!(
        line.send("b", small),
        (5, false),
        "a request that fits beside the first replica's must get its credits"
    );
    let returned = CreditStatement { held: 5, ..small };
    assert_eq!(line.send("b", returned), (5, false), "the grant must not change");
    let collected = CreditStatement { held: 70, ..wants };
    assert_eq!(line.send("c", collected), (90, false), "the first replica must get the returned credits");
}

#[test]
fn the_use_of_a_replica_is_restored_by_another_replica() {
    let redis = SimulatedRedis::new();
    redis.set_time(1_000_000_000);
    let report_use = |replica: &str, used| {
        redis.run(&grants_call(replica, 2, &CreditStatement { used: Some(used), held: used, ..FRESH }))
    };
    report_use("a", 40);
    let reply = report_use("b", 7);
    assert_eq!(parse_uses(&reply), "a 40 1 0", "another replica must receive the charges");
    redis.flush();
    report_use("a", 20);
    let restore = |uses: &str| {
        let statement = CreditStatement { used: Some(7), held: 7, used_by_others: 40, ..FRESH };
        let mut call = grants_call("b", 2, &statement);
        uses.clone_into(call.arguments.last_mut().unwrap());
        redis.run(&call)
    };
    for _ in 0..2 {
        let reply = restore("a 40 1 0");
        assert_eq!(
            (parse_numbers(&reply)[USED_BY_OTHERS], parse_uses(&reply).as_str()),
            (40, "a 40 1 0"),
            "a restored amount must not be added to the recorded amount"
        );
    }
    assert_eq!(
        parse_numbers(&report_use("a", 20))[FORMER_USE],
        40,
        "a late statement must not lower the amount"
    );
}

#[test]
fn the_charges_of_each_replica_are_returned_if_some_may_be_lost() {
    let redis = SimulatedRedis::new();
    let mut now = 1_000_000;
    let mut report_use = |replica, used, used_by_others, epoch| {
        now += 1;
        redis.set_time(now * 1_000);
        let statement = CreditStatement { used: Some(used), held: used, used_by_others, epoch, ..FRESH };
        let reply = redis.run(&grants_call(replica, 3, &statement));
        (parse_numbers(&reply)[EPOCH].unsigned_abs(), parse_uses(&reply))
    };
    let (epoch, _) = report_use("a", 40, 0, 0);
    assert_eq!(
        report_use("b", 7, 0, epoch),
        (epoch, String::new()),
        "a replica that knows the epoch must receive only the sum"
    );
    let after_decrease = report_use("b", 7, 41, epoch).1;
    assert_eq!(after_decrease, "a 40 1 0", "the charges must be returned if the sum has decreased");
    let after_request = report_use("b", 7, 40, 0).1;
    assert_eq!(after_request, "a 40 1 0", "the charges must be returned if the replica requests them");
    redis.flush();
    report_use("a", 60, 0, 0);
    let (new_epoch, after_loss) = report_use("b", 7, 40, epoch);
    assert!(new_epoch > epoch, "a new hash must have a higher epoch");
    assert_eq!(after_loss, "a 60 1 0", "the charges must be returned if the hash was lost");
}

#[test]
fn one_other_replica_receives_the_charges_of_each_replica() {
    let redis = SimulatedRedis::new();
    redis.set_time(1_000_000_000);
    let report_use = |replica, used, used_by_others, epoch| {
        /// The position of the minimum time between two replies with the charges of each replica.
        const LIST_INTERVAL_POSITION: usize = 5;
        let statement = CreditStatement { used: Some(used), held: used, used_by_others, epoch, ..FRESH };
        let mut call = grants_call(replica, 3, &statement);
        "0".clone_into(&mut call.arguments[LIST_INTERVAL_POSITION]);
        let reply = redis.run(&call);
        (parse_numbers(&reply)[EPOCH].unsigned_abs(), parse_uses(&reply))
    };
    let (epoch, _) = report_use("a", 40, 0, 0);
    for (replica, used, used_by_others, returned_uses) in [
        ("a", 40, 0, ""),
        ("b", 7, 40, "a 40 1 0"),
        ("b", 7, 40, ""),
        ("c", 0, 47, "a 40 1 0 b 7 1 0"),
        ("a", 41, 7, ""),
        ("b", 8, 41, "a 41 1 0 c 0 1 0"),
        ("c", 1, 49, "a 41 1 0 b 8 1 0"),
        ("b", 8, 42, "a 41 1 0 c 1 1 0"),
    ] {
        let (_, uses) = report_use(replica, used, used_by_others, epoch);
        assert_eq!(
            uses, returned_uses,
            "{replica} must receive the charges if others have changed since the last reply with charges"
        );
    }
}

#[test]
fn the_use_of_an_earlier_process_is_added_when_it_becomes_known() {
    let redis = SimulatedRedis::new();
    redis.set_time(1_000_000_000);
    let report_use = |run, used, used_before| {
        let statement = CreditStatement { used: Some(used), held: used, run, used_before, ..FRESH };
        parse_numbers(&redis.run(&grants_call("a", 2, &statement)))
    };
    // Redis has lost the 40 credits of process 1 when process 2 starts.
    report_use(2, 50, 0);
    let statement = CreditStatement { used_by_others: 90, ..FRESH };
    let mut call = grants_call("b", 2, &statement);
    "a 40 1 0".clone_into(call.arguments.last_mut().unwrap());
    let reply = parse_numbers(&redis.run(&call));
    assert_eq!(
        (reply[USED_BY_OTHERS], reply[LEFT]),
        (90, 910),
        "the restored use must be added to the use of process 2"
    );
    assert_eq!(
        report_use(2, 50, 0)[RUN..=USED_BEFORE],
        [2, 40],
        "process 2 must receive the use of process 1"
    );
    assert_eq!(
        report_use(2, 95, 40)[FORMER_USE..=LEFT],
        [90, 905],
        "the use of process 2 must increase by 5"
    );
    assert_eq!(
        report_use(1, 45, 0)[FORMER_USE..=LEFT],
        [95, 900],
        "a late statement of process 1 must be added"
    );
    assert_eq!(
        report_use(3, 100, 100)[RUN..=USED_BEFORE],
        [3, 100],
        "process 3 must continue the use of both"
    );
}

#[test]
fn a_statement_that_arrives_late_frees_nothing() {
    let redis = SimulatedRedis::new();
    redis.set_time(1_000_000_000);
    let statement = |held| CreditStatement { held, queued: 900, least: 900, base: Some((0, 5)), ..FRESH };
    let late_call = grants_call("a", 2, &CreditStatement { queued: 0, least: 0, ..statement(0) });
    let reply = parse_numbers(&redis.run(&grants_call("a", 2, &statement(0))));
    assert_eq!(reply[GRANTED], 900, "the first replica must get the credits that it needs");
    redis.run(&late_call);
    let reply = parse_numbers(&redis.run(&grants_call("b", 2, &statement(0))));
    assert_eq!(reply[GRANTED], 100, "the late statement must not return the credits of the first replica");
}

#[test]
fn a_replica_that_can_serve_a_request_keeps_its_place_until_it_starts_one() {
    let mut line = CreditLine::new();
    let wants = CreditStatement { queued: 200, least: 100, base: Some((900, 5)), ..FRESH };
    assert_eq!(line.send("a", wants), (100, false), "the first replica must get all credits");
    assert_eq!(line.send("b", wants), (0, false), "the second replica must wait");
    let holds = CreditStatement { held: 100, ..wants };
    assert_eq!(
        line.send("a", holds),
        (100, false),
        "the grant must last, because the replica may need a slot"
    );
    line.now += MAX_TURN_MS;
    line.send("a", holds);
    assert_eq!(line.send("a", holds), (0, false), "the turn must end after its maximum time");
    let mut line = CreditLine::new();
    line.send("a", wants);
    line.send("b", CreditStatement { least: 40, ..wants });
    let started = CreditStatement { reserved: 60, held: 100, least: 40, queued: 100, ..wants };
    line.send("a", started);
    assert_eq!(
        line.send("a", started),
        (60, false),
        "the turn must end when the replica has started a request"
    );
}

#[test]
fn the_newest_entry_is_stored_until_it_is_removed() {
    let redis = SimulatedRedis::new();
    redis.set_time(1_000 * 1_000);
    let store = |entries: &[(&str, u64, u64)]| {
        let reply = redis.run(&newest_call(2, entries));
        let [version, results] = parse_tuple(&reply).unwrap();
        let results: Vec<i64> =
            parse_list(results).unwrap().iter().map(|result| parse_integer(result).unwrap()).collect();
        (parse_amount(version).unwrap(), results)
    };
    assert_eq!(store(&[("a", 10, 5_000), ("b", 10, 6_000)]), (2, vec![1, 1]), "new entries must be stored");
    assert_eq!(
        store(&[("a", 10, 9_000), ("b", 9, 9_000)]),
        (2, vec![0, 0]),
        "only newer entries must be stored"
    );
    let message = "evidence r1 2 b 10 6000 a value";
    let published = redis.take_published();
    assert_eq!(published.last().map(String::as_str), Some(message), "a stored entry must be published");
    assert_eq!(store(&[("c", 11, 7_000)]), (3, vec![1]), "an entry must be stored in a full map");
    let Value::Map(fields) = redis.hash_fields("map") else { panic!("the map must be a hash") };
    let names: Vec<&str> = fields.iter().map(|(name, _)| parse_text(name).unwrap()).collect();
    assert_eq!(names, ["_version", "b", "c"], "the entry that expires first must be removed");
}

#[test]
fn a_leader_is_replaced_when_its_lease_has_ended() {
    let redis = SimulatedRedis::new();
    let send_beat = |now: u64, replica: &str, lease: u64| {
        redis.set_time(now * 1_000);
        let keys = ["members", "leader", "map"].map(str::to_owned).to_vec();
        let mut arguments = vec![replica.to_owned(), "{}".to_owned()];
        arguments.extend([10_000, 3_600_000, lease].map(|number| number.to_string()));
        let reply = redis.run(&ScriptCall { script: MEMBERS, keys, arguments });
        let [_, leader, _, members] = parse_tuple(&reply).unwrap();
        (parse_text(leader).unwrap().to_owned(), parse_list(members).unwrap().len())
    };
    for (now, replica, lease, leader, member_count, reason) in [
        (1_000, "a", 10_000, "a", 1, "the first replica must become the leader"),
        (2_000, "b", 10_000, "a", 2, "another replica must not replace the leader"),
        (9_000, "a", 10_000, "a", 2, "a beat of the leader must renew its lease"),
        (18_999, "b", 10_000, "a", 2, "the renewed lease must last for 10 s"),
        (19_000, "b", 10_000, "b", 2, "another replica must become the leader after the lease"),
        (20_000, "b", 0, "", 2, "a replica that does not poll must give up the lease"),
        (3_700_000, "b", 0, "", 1, "an ended replica must be removed after an hour"),
    ] {
        assert_eq!(send_beat(now, replica, lease), (leader.to_owned(), member_count), "{reason}");
    }
}
