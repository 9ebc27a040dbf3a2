//! Tests the scripts directly, in the model of Redis, and compares that model with a real Redis.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use redis::Value;

use super::super::beat_calls::grant_arguments;
use super::super::credit_statement::CreditStatement;
use super::super::reply::{parse_amount, parse_integer, parse_list, parse_text, parse_tuple};
use super::super::scripts::{GRANTS, MEMBERS, NEWEST, ScriptCall};
use super::redis_model::SimulatedRedis;
use super::slot_scripts::slots_call;

const LEASE_MS: u64 = 10_000;
const LIMIT: u64 = 1_000;
const FRESH: CreditStatement = CreditStatement {
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
    static STATEMENT: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// The time for which a replica keeps its place in the line.
const TURN_MS: u64 = 100;
/// Longer than a test, so that no reply depends on the speed of the machine.
const LIST_INTERVAL_MS: u64 = 1_000_000_000;

fn grants_call(replica: &str, replicas: usize, statement: &CreditStatement) -> ScriptCall {
    STATEMENT.set(STATEMENT.get() + 1);
    let numbers = [replicas as u64, LEASE_MS, STATEMENT.get(), TURN_MS, LIST_INTERVAL_MS];
    let mut arguments = vec![replica.to_owned()];
    arguments.extend(numbers.map(|number| number.to_string()));
    arguments.extend(grant_arguments(statement, String::new(), Duration::from_secs(60)));
    ScriptCall { script: GRANTS, keys: vec!["credits".to_owned()], arguments }
}

fn newest_call(max: usize, entries: &[(&str, u64, u64)]) -> ScriptCall {
    let mut arguments = vec!["channel".to_owned(), "evidence".to_owned(), "r1".to_owned(), max.to_string()];
    for (name, stamp, expires) in entries {
        arguments.extend([(*name).to_owned(), stamp.to_string(), expires.to_string(), "a value".to_owned()]);
    }
    ScriptCall { script: NEWEST, keys: vec!["map".to_owned()], arguments }
}

/// The numbers of the first subject in a reply.
pub(super) fn numbers(reply: &Value) -> Vec<i64> {
    parse_list(&parse_list(reply).unwrap()[0])
        .unwrap()
        .iter()
        .filter_map(|number| parse_integer(number).ok())
        .collect()
}

/// The used credits of each other replica in a reply of `grants.lua`.
fn uses(reply: &Value) -> String {
    parse_text(&parse_list(&parse_list(reply).unwrap()[0]).unwrap()[12]).unwrap().to_owned()
}

/// A replica that uses a random part of its grant.
#[derive(Clone, Debug, Default)]
struct ModelReplica {
    used: u64,
    bound: u64,
    lease_end: u64,
    may_exceed: bool,
}

/// Returns the sum of the credits that the other replicas have used.
fn others_used(replicas: &[ModelReplica], me: usize) -> i64 {
    let others = replicas.iter().enumerate().filter(|(index, _)| *index != me);
    i64::try_from(others.map(|(_, replica)| replica.used).sum::<u64>()).unwrap()
}

/// Checks that the sums in the hash of `credits` are the sums of the records.
fn check_sums(redis: &SimulatedRedis, now: u64) {
    let Value::Map(fields) = redis.hash_fields("credits") else { panic!("credits are a hash") };
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
                    panic!()
                };
                let unused = if expires > now { held.saturating_sub(used) } else { 0 };
                let is_in_line = expires > now && since > 0;
                let record = [used, unused, reserved.min(unused), u64::from(is_in_line)];
                expected.iter_mut().zip(record).for_each(|(sum, number)| *sum += number);
            }
        }
    }
    let [_, used, unused, reserved, expires, queued, ..] = sums[..] else { panic!("there are no sums") };
    if expires == 0 || expires > now {
        assert_eq!([used, unused, reserved, queued], expected, "{fields:?} at {now}");
    } else {
        assert_eq!(used, expected[0], "{fields:?} at {now}");
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
            let used_by_others = others_used(&replicas, index).unsigned_abs();
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
            let reply = numbers(&redis.run(&grants_call(&index.to_string(), 4, &statement)));
            replica.bound = u64::try_from(reply[0]).unwrap();
            replica.may_exceed = reply[4] == 1;
            replica.lease_end = now + LEASE_MS - 1_000;
            epochs[index] = reply[10].unsigned_abs();
            check_sums(&redis, now);
            let total: u64 = replicas
                .iter()
                .map(
                    |replica| {
                        if replica.lease_end > now { replica.bound.max(replica.used) } else { replica.used }
                    },
                )
                .sum();
            assert!(total <= LIMIT, "seed {seed}: {total} are used or granted: {replicas:?}");
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
        let reply = numbers(&redis.run(&grants_call("3", 4, &statement)));
        assert!(reply[0] <= i64::try_from(used + LIMIT - total).unwrap(), "{reply:?}");
        assert_eq!(
            (reply[1], reply[6]),
            (others_used(&replicas, 3), i64::try_from(LIMIT - total).unwrap()),
            "seed {seed}"
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

    /// States the credits of a replica, 1 ms after the last statement. Returns its grant, and whether it may exceed
    /// the credits that are left.
    fn state(&mut self, replica: &str, statement: CreditStatement) -> (i64, bool) {
        self.now += 1;
        self.redis.set_time(self.now * 1_000);
        let reply = numbers(&self.redis.run(&grants_call(replica, 3, &statement)));
        (reply[0], reply[4] == 1)
    }
}

#[test]
fn one_replica_at_a_time_exceeds_what_is_left() {
    let mut line = CreditLine::new();
    let base = Some((990, 5));
    let wants = CreditStatement { queued: 20, least: 20, base, ..FRESH };
    assert_eq!(line.state("a", wants), (0, true), "10 credits suffice for no request");
    assert_eq!(line.state("b", wants), (0, false), "another replica has the right");
    assert_eq!(line.state("a", wants), (0, true), "the replica may need a slot first");
    line.now += TURN_MS;
    assert_eq!(line.state("a", wants), (0, false), "a right that was not used goes to the next one");
    assert_eq!(line.state("b", wants), (0, false), "the first replica may not know yet that its right ended");
    assert_eq!(line.state("a", wants), (0, false));
    assert_eq!(line.state("b", wants), (0, true));
    let uses = CreditStatement { reserved: 20, held: 20, queued: 0, least: 0, ..wants };
    assert_eq!(line.state("b", uses), (10, false), "the right was used");
    assert_eq!(line.state("a", wants), (0, false), "a request in flight exceeds what is left");
    line.state("b", FRESH);
    assert_eq!(line.state("a", wants), (0, true));
}

#[test]
fn a_request_that_fits_is_served_before_one_exceeds_what_is_left() {
    let mut line = CreditLine::new();
    let wants = CreditStatement { queued: 20, least: 20, base: Some((990, 5)), ..FRESH };
    assert_eq!(line.state("a", wants), (0, true));
    let small = CreditStatement { queued: 4, least: 4, ..FRESH };
    assert_eq!(line.state("b", small), (0, false), "what the other one spends is not known yet");
    assert_eq!(line.state("a", wants), (0, false), "the right ends for a request that fits");
    assert_eq!(line.state("b", small), (0, false), "the other one may not know it yet");
    assert_eq!(line.state("a", wants), (0, false));
    assert_eq!(line.state("b", small), (4, false));
    assert_eq!(line.state("a", wants), (0, false), "another replica has unused credits");
}

#[test]
fn the_first_replica_in_line_collects_the_returned_credits() {
    let mut line = CreditLine::new();
    let held = CreditStatement { base: Some((900, 5)), ..FRESH };
    assert_eq!(line.state("a", held), (16, false), "a part of 100");
    assert_eq!(line.state("b", held), (14, false), "a part of 84");
    let wants = CreditStatement { queued: 90, least: 90, ..FRESH };
    assert_eq!(line.state("c", wants), (70, false), "the first in line keeps what it has collected");
    assert_eq!(line.state("a", CreditStatement { queued: 30, least: 30, held: 16, ..FRESH }), (0, false));
    assert_eq!(line.state("a", CreditStatement { queued: 30, least: 30, ..FRESH }), (0, false));
    let small = CreditStatement { queued: 5, least: 5, held: 14, ..FRESH };
    assert_eq!(line.state("b", small), (5, false), "what the first one does not need is for the others");
    assert_eq!(line.state("b", CreditStatement { held: 5, ..small }), (5, false));
    assert_eq!(line.state("c", CreditStatement { held: 70, ..wants }), (90, false));
}

#[test]
fn the_use_of_a_replica_is_restored_by_another_replica() {
    let redis = SimulatedRedis::new();
    redis.set_time(1_000_000_000);
    let used = |replica: &str, used| {
        redis.run(&grants_call(replica, 2, &CreditStatement { used: Some(used), held: used, ..FRESH }))
    };
    used("a", 40);
    let reply = used("b", 7);
    assert_eq!(uses(&reply), "a 40 1 0");
    redis.flush();
    used("a", 20);
    let restores = |uses: &str| {
        let statement = CreditStatement { used: Some(7), held: 7, used_by_others: 40, ..FRESH };
        let mut call = grants_call("b", 2, &statement);
        uses.clone_into(call.arguments.last_mut().unwrap());
        redis.run(&call)
    };
    for _ in 0..2 {
        let reply = restores("a 40 1 0");
        assert_eq!(
            (numbers(&reply)[1], uses(&reply).as_str()),
            (40, "a 40 1 0"),
            "a restored amount is not added"
        );
    }
    assert_eq!(numbers(&used("a", 20))[5], 40, "a late statement does not lower the amount");
}

#[test]
fn the_charges_of_each_replica_are_returned_if_some_may_be_lost() {
    let redis = SimulatedRedis::new();
    let mut now = 1_000_000;
    let mut state = |replica, used, used_by_others, epoch| {
        now += 1;
        redis.set_time(now * 1_000);
        let statement = CreditStatement { used: Some(used), held: used, used_by_others, epoch, ..FRESH };
        let reply = redis.run(&grants_call(replica, 3, &statement));
        (numbers(&reply)[10].unsigned_abs(), uses(&reply))
    };
    let (epoch, _) = state("a", 40, 0, 0);
    assert_eq!(
        state("b", 7, 0, epoch),
        (epoch, String::new()),
        "a replica that knows the epoch needs only the sum"
    );
    assert_eq!(state("b", 7, 41, epoch).1, "a 40 1 0", "the sum has decreased");
    assert_eq!(state("b", 7, 40, 0).1, "a 40 1 0", "the replica has requested the charges");
    redis.flush();
    state("a", 60, 0, 0);
    let (new_epoch, uses) = state("b", 7, 40, epoch);
    assert!(new_epoch > epoch);
    assert_eq!(uses, "a 60 1 0", "the hash was lost, although the sum has grown since");
}

#[test]
fn one_other_replica_receives_the_charges_of_each_replica() {
    let redis = SimulatedRedis::new();
    redis.set_time(1_000_000_000);
    let state = |replica, used, used_by_others, epoch| {
        let statement = CreditStatement { used: Some(used), held: used, used_by_others, epoch, ..FRESH };
        let mut call = grants_call(replica, 3, &statement);
        "0".clone_into(&mut call.arguments[5]);
        let reply = redis.run(&call);
        (numbers(&reply)[10].unsigned_abs(), uses(&reply))
    };
    let (epoch, _) = state("a", 40, 0, 0);
    let state = |replica, used, used_by_others| state(replica, used, used_by_others, epoch).1;
    assert_eq!(state("a", 40, 0), "", "a replica knows its own charges");
    assert_eq!(state("b", 7, 40), "a 40 1 0", "the replica knows the sum only");
    assert_eq!(state("b", 7, 40), "", "another replica must receive the charges");
    assert_eq!(state("c", 0, 47), "a 40 1 0 b 7 1 0");
    assert_eq!(state("a", 41, 7), "", "all charges are known");
    assert_eq!(state("b", 8, 41), "a 41 1 0 c 0 1 0");
    assert_eq!(state("c", 1, 49), "a 41 1 0 b 8 1 0");
    assert_eq!(state("b", 8, 42), "a 41 1 0 c 1 1 0");
}

#[test]
fn the_use_of_an_earlier_process_is_added_when_it_becomes_known() {
    let redis = SimulatedRedis::new();
    redis.set_time(1_000_000_000);
    let state = |run, used, used_before| {
        let statement = CreditStatement { used: Some(used), held: used, run, used_before, ..FRESH };
        numbers(&redis.run(&grants_call("a", 2, &statement)))
    };
    // Redis has lost the 40 credits of process 1 when process 2 starts.
    state(2, 50, 0);
    let statement = CreditStatement { used_by_others: 90, ..FRESH };
    let mut call = grants_call("b", 2, &statement);
    "a 40 1 0".clone_into(call.arguments.last_mut().unwrap());
    let [granted, others, .., left, _] = numbers(&redis.run(&call))[..8] else { panic!() };
    assert_eq!((others, left), (90, 910), "{granted}");
    assert_eq!(state(2, 50, 0)[8..10], [2, 40], "the process learns the use of the earlier one");
    assert_eq!(state(2, 95, 40)[5..7], [90, 905]);
    assert_eq!(state(1, 45, 0)[5..7], [95, 900], "a late statement of the earlier process is added");
    assert_eq!(state(3, 100, 100)[8..10], [3, 100]);
}

#[test]
fn a_statement_that_arrives_late_frees_nothing() {
    let redis = SimulatedRedis::new();
    redis.set_time(1_000_000_000);
    let statement = |held| CreditStatement { held, queued: 900, least: 900, base: Some((0, 5)), ..FRESH };
    let late = grants_call("a", 2, &CreditStatement { queued: 0, least: 0, ..statement(0) });
    assert_eq!(numbers(&redis.run(&grants_call("a", 2, &statement(0))))[0], 900);
    redis.run(&late);
    assert_eq!(numbers(&redis.run(&grants_call("b", 2, &statement(0))))[0], 100);
}

#[test]
fn a_replica_that_can_serve_a_request_keeps_its_place_until_it_starts_one() {
    let mut line = CreditLine::new();
    let wants = CreditStatement { queued: 200, least: 100, base: Some((900, 5)), ..FRESH };
    assert_eq!(line.state("a", wants), (100, false));
    assert_eq!(line.state("b", wants), (0, false));
    let holds = CreditStatement { held: 100, ..wants };
    assert_eq!(line.state("a", holds), (100, false), "the replica may need a slot first");
    line.now += TURN_MS;
    line.state("a", holds);
    assert_eq!(line.state("a", holds), (0, false), "the replica had the time to start a request");
    let mut line = CreditLine::new();
    line.state("a", wants);
    line.state("b", CreditStatement { least: 40, ..wants });
    let started = CreditStatement { reserved: 60, held: 100, least: 40, queued: 100, ..wants };
    line.state("a", started);
    assert_eq!(line.state("a", started), (60, false), "the replica has started a request");
}

#[test]
fn the_newest_entry_wins_until_it_expires() {
    let redis = SimulatedRedis::new();
    redis.set_time(1_000 * 1_000);
    let stored = |entries: &[(&str, u64, u64)]| {
        let reply = redis.run(&newest_call(2, entries));
        let [version, results] = parse_tuple(&reply).unwrap();
        let results: Vec<i64> =
            parse_list(results).unwrap().iter().map(|result| parse_integer(result).unwrap()).collect();
        (parse_amount(version).unwrap(), results)
    };
    assert_eq!(stored(&[("a", 10, 5_000), ("b", 10, 6_000)]), (2, vec![1, 1]));
    assert_eq!(
        stored(&[("a", 10, 9_000), ("b", 9, 9_000)]),
        (2, vec![0, 0]),
        "only newer entries are stored"
    );
    let message = "evidence r1 2 b 10 6000 a value";
    assert_eq!(redis.take_published().last().map(String::as_str), Some(message));
    assert_eq!(stored(&[("c", 11, 7_000)]), (3, vec![1]));
    let Value::Map(fields) = redis.hash_fields("map") else { panic!("a map is a hash") };
    let names: Vec<&str> = fields.iter().map(|(name, _)| parse_text(name).unwrap()).collect();
    assert_eq!(names, ["_version", "b", "c"], "the entry that expires first must go");
}

#[test]
fn the_leader_stays_the_leader_until_it_sends_no_beats() {
    let redis = SimulatedRedis::new();
    let leader = |now: u64, replica: &str, lease: u64| {
        redis.set_time(now * 1_000);
        let keys = ["members", "leader", "map"].map(str::to_owned).to_vec();
        let mut arguments = vec![replica.to_owned(), "{}".to_owned()];
        arguments.extend([10_000, 3_600_000, lease].map(|number| number.to_string()));
        let reply = redis.run(&ScriptCall { script: MEMBERS, keys, arguments });
        let [_, leader, _, members] = parse_tuple(&reply).unwrap();
        (parse_text(leader).unwrap().to_owned(), parse_list(members).unwrap().len())
    };
    let is = |leader: &str, members| (leader.to_owned(), members);
    assert_eq!(leader(1_000, "a", 10_000), is("a", 1));
    assert_eq!(leader(2_000, "b", 10_000), is("a", 2));
    assert_eq!(leader(9_000, "a", 10_000), is("a", 2));
    assert_eq!(leader(18_999, "b", 10_000), is("a", 2));
    assert_eq!(leader(19_000, "b", 10_000), is("b", 2), "the lease has ended");
    assert_eq!(leader(20_000, "b", 0), is("", 2), "a replica that does not poll gives the lease up");
    assert_eq!(leader(3_700_000, "b", 0), is("", 1), "an ended replica is forgotten after an hour");
}

/// A Redis on a Unix socket.
struct RealRedis {
    process: Child,
    connection: redis::Connection,
    _folder: tempfile::TempDir,
}

impl RealRedis {
    /// Starts the server, or returns `None` if it is not installed.
    fn start() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("redis.sock");
        let process = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--unixsocket"])
            .arg(&socket)
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .spawn()
            .ok()?;
        let client = redis::Client::open(format!("redis+unix://{}", socket.display())).unwrap();
        let connection = loop {
            match client.get_connection() {
                Ok(connection) => break connection,
                Err(_) => std::thread::yield_now(),
            }
        };
        Some(Self { process, connection, _folder: folder })
    }
}

impl Drop for RealRedis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn the_model_of_redis_behaves_like_redis() {
    const EPOCH: u64 = 10_000_000_000_000;
    let Some(mut real) = RealRedis::start() else { return };
    let redis = SimulatedRedis::new();
    let mut is_stated = false;
    redis.set_time(crate::clock::now().0 * 1_000);
    let mut rng = fastrand::Rng::with_seed(1);
    let expires = crate::clock::now().0 + 3_600_000;
    let mut used = [0_u64; 3];
    for step in 0..300_u64 {
        let index = rng.usize(..3);
        let replica = index.to_string();
        used[index] += rng.u64(0..4);
        let call = match rng.u8(..4) {
            0 => slots_call(&replica, [rng.u64(0..4), rng.u64(0..5), rng.u64(0..9), step]),
            1 => newest_call(3, &[(&format!("name-{}", rng.u8(..6)), rng.u64(0..50), expires + step)]),
            _ => {
                let used = if rng.u8(..) < 20 { None } else { Some(used[index]) };
                let base = rng.bool().then(|| (rng.i64(-5..50), rng.u64(1..50)));
                let (queued, held) = (rng.u64(0..300), used.unwrap_or(0) + rng.u64(0..50));
                let (reserved, least) = (rng.u64(0..20), rng.u64(0..=queued));
                // The epoch is above the time of both servers, so that both use the same one.
                let epoch = if is_stated && rng.bool() { EPOCH + 1 } else { EPOCH };
                is_stated |= used.is_some();
                let statement = CreditStatement {
                    used,
                    reserved,
                    queued,
                    least,
                    held,
                    base,
                    is_idle: rng.bool(),
                    used_by_others: rng.u64(0..300),
                    epoch,
                    ..FRESH
                };
                grants_call(&replica, 3, &statement)
            }
        };
        let expected: Value = call.to_command().query(&mut real.connection).unwrap();
        assert_eq!(redis.run(&call), expected, "step {step}: {:?}", call.arguments);
    }
}
