//! Tests of the sums by user and region, of their migration and limits, and of the usage of a user and the index for
//! its query.

use super::sums::query_rows;
use super::*;
use crate::proxy::RequestUser;
use crate::secret::UserFingerprint;
use crate::store::users::{delete_excess, delete_older, read_usage};

const HOUR: u64 = 3_600_000;

fn user(id: &str) -> UserFingerprint {
    UserFingerprint::new("local", id.as_bytes())
}

/// Returns a charged attempt of a user that started at `started_at`.
fn attempt_of(id: &str, started_at: UnixMs, requests: u64, credits: u64) -> AttemptRecord {
    AttemptRecord {
        id: AttemptRecord::new_id(started_at),
        started_at,
        user: Some(RequestUser::new(user(id))),
        quota: QuotaCharge { requests, credits, replaced: 0 },
        ..record(&pool(), credits)
    }
}

fn commit(database: &mut Database, records: &[AttemptRecord]) {
    write(database, records, MirrorScope::Nothing);
}

/// Asserts the stored usage of a user. Each array contains the day, the month and the total.
#[track_caller]
fn check_usage(database: &Database, id: &str, requests: [u64; 3], credits: [u64; 3]) {
    let usage = read_usage(&database.connection, &ClientName::new("local"), user(id), NOW).unwrap();
    assert_eq!((usage.requests, usage.credits), (requests, credits), "the user {id} must have this usage");
}

#[test]
fn the_usage_of_a_user_is_the_sum_of_its_charges() {
    let mut database = open_database(&DatabaseLocation::Memory);
    let long_ago = UnixMs(NOW.0 - 40 * 24 * HOUR);
    let alice_attempt = attempt_of("alice", NOW, 1, 70);
    commit(
        &mut database,
        &[alice_attempt.clone(), attempt_of("alice", long_ago, 1, 5), attempt_of("bob", NOW, 1, 7)],
    );
    // Writing a record again changes nothing.
    commit(&mut database, &[alice_attempt]);
    check_usage(&database, "alice", [1, 1, 2], [70, 70, 75]);
    check_usage(&database, "bob", [1; 3], [7; 3]);
    check_usage(&database, "carol", [0; 3], [0; 3]);
    let other_client =
        read_usage(&database.connection, &ClientName::new("other"), user("alice"), NOW).unwrap();
    assert_eq!(other_client.requests, [0; 3]);
}

#[test]
fn a_later_price_replaces_the_charge_of_the_user() {
    let mut database = open_database(&DatabaseLocation::Memory);
    let unpriced =
        AttemptRecord { credits_from: CreditSource::Unknown, credits: 0, ..attempt_of("alice", NOW, 1, 800) };
    commit(&mut database, std::slice::from_ref(&unpriced));
    check_usage(&database, "alice", [1; 3], [800; 3]);
    let quota = QuotaCharge { requests: 1, credits: 296, replaced: 800 };
    let priced = AttemptRecord { quota, ..late_price(&unpriced, 296) };
    for _ in 0..2 {
        commit(&mut database, std::slice::from_ref(&priced));
        check_usage(&database, "alice", [1; 3], [296; 3]);
    }
}

#[test]
fn attempts_that_cost_nothing_add_no_row_for_their_user() {
    let mut database = open_database(&DatabaseLocation::Memory);
    let free_attempts: Vec<_> = (0..300).map(|number| attempt_of(&number.to_string(), NOW, 0, 0)).collect();
    commit(&mut database, &free_attempts);
    commit(&mut database, &[attempt_of("alice", NOW, 1, 4)]);
    let sums = "SELECT user, region, attempts, credits FROM user_hours ORDER BY user";
    assert_eq!(
        query_rows(&database.connection, sums),
        [
            "[Text(\"\"), Text(\"global\"), Integer(300), Integer(0)]".to_owned(),
            format!("[Text(\"{}\"), Text(\"global\"), Integer(1), Integer(4)]", user("alice")),
        ]
    );
    let users = query_number(&database.connection, "SELECT count(DISTINCT user) FROM attempts");
    assert_eq!(users, 301, "every attempt must have its user");
}

#[test]
fn the_sums_by_region_and_those_by_key_are_equal() {
    let mut database = open_database(&DatabaseLocation::Memory);
    let in_region = |host: &str| AttemptRecord {
        authority: Arc::new(Authority::new(Scheme::Https, host, 443, "").unwrap()),
        ..attempt_of("alice", NOW, 1, 3)
    };
    commit(
        &mut database,
        &[in_region("api.eu.residency.elevenlabs.io"), in_region("api.elevenlabs.io"), record(&pool(), 4)],
    );
    let sums = "SELECT region, sum(credits) FROM user_hours GROUP BY region ORDER BY region";
    assert_eq!(
        query_rows(&database.connection, sums),
        ["[Text(\"eu\"), Integer(3)]", "[Text(\"global\"), Integer(7)]"]
    );
    assert_eq!(query_number(&database.connection, "SELECT sum(credits) FROM hours"), 10);
    let attempts = "SELECT region, count(*) FROM attempts GROUP BY 1 ORDER BY 1";
    assert_eq!(
        query_rows(&database.connection, attempts),
        ["[Text(\"eu\"), Integer(1)]", "[Text(\"global\"), Integer(2)]"]
    );
}

#[test]
fn an_upgraded_database_keeps_its_sums_without_a_user() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    fs::create_dir(path.parent().unwrap()).unwrap();
    let old_connection = Connection::open(&path).unwrap();
    old_connection.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::for_version(13))).unwrap();
    // The three tables contain attempts of versions before 12. Their migration drops the tables when it has moved all
    // attempts, so most databases of version 13 lack them.
    old_connection
        .execute_batch(
            "INSERT INTO hours VALUES
            (3600000, 'k1', 'app', '/v1/x', '', 1, 2, 3, 4, 5, 6, 7, 8, 9),
            (3600000, 'k2', 'app', '/v1/y', 'm', 10, 20, 30, 40, 50, 60, 70, 80, 90),
            (7200000, 'k1', 'web', '/v1/x', '', 9007199254740992, 2, 3, 4, 5, 6, 7, 8, 9);
         DROP TABLE attempt_rows; DROP TABLE attempt_sheets; DROP TABLE series",
        )
        .unwrap();
    // Before the next startup migrates the database, `keychoir usage` and `keychoir attempts` read the tables that
    // exist.
    let reader = UsageReader::open(&path).unwrap();
    let all = UnixMs(0)..UnixMs(u64::MAX);
    assert_eq!(reader.usage(all.clone(), UsageDimension::Client).unwrap().len(), 2);
    assert!(matches!(reader.usage(all.clone(), UsageDimension::User), Err(ReadError::Older(_))));
    assert!(matches!(reader.failures(all, UsageDimension::Region), Err(ReadError::Older(_))));
    assert_eq!(reader.attempts(&AttemptQuery { limit: 1, ..AttemptQuery::default() }).unwrap(), []);
    drop((old_connection, reader));
    let database = open_database(&location);
    assert_eq!(
        query_rows(
            &database.connection,
            "SELECT concat_ws(' ', hour_ms, client, user, region, attempts, served, request_bytes, response_bytes,
                characters, credits, unpriced, quota_requests, quota_credits) FROM user_hours ORDER BY hour_ms"
        ),
        [
            "[Text(\"3600000 app   11 22 33 44 55 66 77 88 99\")]",
            "[Text(\"7200000 web   9007199254740992 2 3 4 5 6 7 8 9\")]"
        ]
    );
}

#[test]
fn the_oldest_users_of_an_in_memory_database_are_deleted() {
    let mut database = open_database(&DatabaseLocation::Memory);
    let records: Vec<_> =
        (0..20).map(|number| attempt_of(&number.to_string(), UnixMs(NOW.0 + number * HOUR), 1, 1)).collect();
    commit(&mut database, &records);
    commit(&mut database, &[record(&pool(), 1)]);
    assert_eq!(delete_excess(&database.connection, 5).unwrap(), 15);
    assert_eq!(delete_excess(&database.connection, 5).unwrap(), 0);
    check_usage(&database, "14", [0; 3], [0; 3]);
    let rows = query_number(&database.connection, "SELECT count(*) FROM user_hours");
    assert_eq!(rows, 6, "the sums without a user must stay");
    assert_eq!(delete_older(&database.connection, UnixMs(NOW.0 + 18 * HOUR), 512).unwrap(), 5);
}

#[test]
fn a_query_for_the_usage_of_a_user_uses_the_index() {
    let database = open_database(&DatabaseLocation::Memory);
    let explain = "EXPLAIN QUERY PLAN SELECT total(quota_requests) FROM user_hours
        WHERE user = 'a' AND user <> '' AND client = 'b'";
    let plan = query_rows(&database.connection, explain).join("\n");
    assert!(plan.contains("user_hours_by_user (user=? AND client=?)"), "the plan must use the index: {plan}");
}
