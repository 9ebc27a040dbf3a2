//! Tests of the hourly sums, of the usage of clients that is computed from them, of the schedule and the retention of
//! maintenance, and of the migration of older databases. A corrupt record must not spoil the sums.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rusqlite::Row;

use super::*;
use crate::policy::retention::start_of_hour;
use crate::store::maintenance::{self, MaintenanceProgress};
use crate::store::{open, owners, schema};

const HOUR: u64 = 3_600_000;

fn write(database: &mut Database, records: &[AttemptRecord]) {
    super::write(database, records, MirrorScope::Nothing);
}

/// The sums of each group. A group consists of the hour, key, client, route and model.
type SumsByGroup = BTreeMap<Vec<String>, Vec<i64>>;

/// Reads rows whose first five columns identify the group and whose remaining columns are its sums.
fn read_sums(connection: &Connection, sql: &str) -> SumsByGroup {
    let format_value =
        |row: &Row<'_>, index| format!("{:?}", row.get::<_, rusqlite::types::Value>(index).unwrap());
    let mut statement = connection.prepare(sql).unwrap();
    let rows = statement.query_map([], |row| {
        let group = (0..5).map(|index| format_value(row, index)).collect();
        Ok((group, (5..12).map(|index| row.get(index)).collect::<Result<_, _>>()?))
    });
    rows.unwrap().map(Result::unwrap).collect()
}

/// Returns the stored sums, and the sums computed from the attempts.
fn stored_and_computed_sums(connection: &Connection) -> (SumsByGroup, SumsByGroup) {
    let stored_sums = read_sums(
        connection,
        "SELECT hour_ms, key_hash, client, route, model, attempts, served, request_bytes, response_bytes,
            characters, credits, unpriced FROM hours",
    );
    let computed_sums = read_sums(
        connection,
        "SELECT started_at_ms / 3600000 * 3600000, key_hash, client, route, coalesce(model, ''), count(*),
            sum(coalesce(status < 400, 0)), sum(request_bytes), sum(response_bytes),
            coalesce(sum(characters), 0), sum(credits), sum(credits_from = 'unknown')
         FROM attempts GROUP BY 1, 2, 3, 4, 5",
    );
    (stored_sums, computed_sums)
}

prop_compose! {
    pub(super) fn any_record(pool: Arc<Pool>)(
        offset_ms in 0..3 * HOUR,
        key_index in 0..2_usize,
        (client, route, model) in (0..2_u8, 0..2_u8, proptest::option::of(0..2_u8)),
        status in prop_oneof![Just(None), Just(Some(200)), Just(Some(399)), Just(Some(400)), Just(Some(503))],
        (request_bytes, response_bytes) in (0..1_u64 << 40, 0..1_u64 << 40),
        characters in proptest::option::of(0..100_000_u64),
        credits in 0..1_u64 << 40,
        credits_from in prop_oneof![
            Just(CreditSource::Reported), Just(CreditSource::Free), Just(CreditSource::Unknown)
        ],
    ) -> AttemptRecord {
        AttemptRecord {
            id: AttemptRecord::new_id(UnixMs(NOW.0 + offset_ms)),
            started_at: UnixMs(NOW.0 + offset_ms),
            client: ClientName::new(["one", "two"][usize::from(client)]),
            key: Some(Arc::clone(&pool.roster().keys()[key_index])),
            route: Route::parse(["/v1/voices", "/v1/models"][usize::from(route)]),
            model: model.map(|model| ["m1", "m2"][usize::from(model)].into()),
            status,
            request_bytes,
            response_bytes,
            characters,
            credits,
            credits_from,
            ..record(&pool, 0)
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_stored_sums_are_the_sums_of_the_attempts(
        records in proptest::collection::vec(any_record(pool()), 1..60),
        batch_size in 1..40_usize,
    ) {
        let mut database = open_database(&DatabaseLocation::Memory);
        for records in records.chunks(batch_size) {
            write(&mut database, records);
            // A record that is written twice must count once.
            write(&mut database, records);
        }
        let (stored_sums, computed_sums) = stored_and_computed_sums(&database.connection);
        prop_assert_eq!(&stored_sums, &computed_sums);
        let credits: i64 = stored_sums.values().map(|sums| sums[5]).sum();
        prop_assert_eq!(credits as u64, records.iter().map(|record| record.credits).sum::<u64>());
        prop_assert_eq!(query_number(&database.connection, "SELECT count(*) FROM attempts") as usize, records.len());
    }
}

#[test]
fn a_corrupt_record_does_not_prevent_others_from_being_written() {
    let pool = pool();
    let corrupt_record = || AttemptRecord {
        started_at: UnixMs(u64::MAX),
        request_bytes: u64::MAX,
        response_bytes: u64::MAX,
        characters: Some(u64::MAX),
        credits_reserved: Some(u64::MAX),
        total: Duration::MAX,
        ..record(&pool, u64::MAX)
    };
    let mut database = open_database(&DatabaseLocation::Memory);
    for _ in 0..40 {
        write(&mut database, &[corrupt_record(), record(&pool, 1)]);
    }
    assert_eq!(query_number(&database.connection, "SELECT count(*) FROM attempts"), 80);
    assert_eq!(query_number(&database.connection, "SELECT max(credits) FROM attempts"), 1 << 48);
    assert_eq!(query_number(&database.connection, "SELECT max(credits) FROM hours"), 1 << 53);
    assert_eq!(query_number(&database.connection, "SELECT min(credits) FROM hours"), 40);
}

/// Runs maintenance until no work is due, and returns the number of steps.
pub(super) fn run_maintenance(database: &mut Database, retention: &Retention, now: UnixMs) -> usize {
    let settings = Settings { retention: *retention, ..settings(8) };
    (1..1_000)
        .find(|_| maintenance::run_step(database, &settings, now).unwrap() == MaintenanceProgress::Done)
        .unwrap()
}

#[test]
fn old_records_are_deleted_in_small_steps_and_the_database_shrinks() {
    let directory = tempfile::tempdir().unwrap();
    let (location, _) = location(directory.path());
    let mut database = open_database(&location);
    let pool = pool();
    let record_at = |ms| record_started_at(&pool, UnixMs(ms), 1);
    let now = UnixMs(start_of_hour(NOW).0 + 40 * 24 * HOUR + 5);
    let (attempts_edge, hours_edge) = (now.0 - 5 - 24 * HOUR, now.0 - 5 - 48 * HOUR);
    let old_records: Vec<_> = (0..10_000).map(|index| record_at(NOW.0 + index * HOUR / 50)).collect();
    write(&mut database, &old_records);
    let edges = [attempts_edge - 1, attempts_edge, now.0, hours_edge - 1, hours_edge];
    write(&mut database, &edges.map(record_at));
    let pages_before = query_number(&database.connection, "PRAGMA page_count");

    let steps = run_maintenance(&mut database, &Retention::from_days(1, 2), now);
    assert!(steps > 3, "the records must be deleted in more than 3 steps, not {steps}");
    assert_eq!(query_number(&database.connection, "SELECT count(*) FROM attempts"), 2);
    assert_eq!(
        query_number(&database.connection, "SELECT min(started_at_ms) FROM attempts") as u64,
        attempts_edge
    );
    assert_eq!(query_number(&database.connection, "SELECT count(*) FROM hours"), 4);
    assert_eq!(query_number(&database.connection, "SELECT min(hour_ms) FROM hours") as u64, hours_edge);
    assert_eq!(query_number(&database.connection, "PRAGMA freelist_count"), 0);
    assert!(query_number(&database.connection, "PRAGMA page_count") < pages_before / 4);
}

#[test]
fn every_attempt_is_kept_without_a_retention() {
    let mut database = open_database(&DatabaseLocation::Memory);
    let pool = pool();
    write(&mut database, &[record(&pool, 1)]);
    // The first step adds the hour to its day.
    assert_eq!(run_maintenance(&mut database, &Retention::from_days(0, 0), UnixMs(u64::MAX)), 2);
    assert_eq!(query_number(&database.connection, "SELECT count(*) FROM attempts"), 1);
}

#[test]
fn maintenance_runs_after_writing_and_once_an_hour() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    let settings = Settings { retention: Retention::from_days(1, 0), ..settings(8) };
    let store = Store::open(&location, NOW).unwrap();
    let mut writer = store.into_writer(Arc::clone(&pool), settings, Health::default());
    // This time is older than the retention at any time that a clock may show.
    let long_ago = UnixMs(1_000_000_000_000);
    for (started_at, credits) in [(long_ago, 1), (crate::clock::now(), 2)] {
        writer.add_batch(attempt_batch(&[record_started_at(&pool, started_at, credits)]));
    }
    writer.run_due_work(crate::clock::instant());
    // The first step added an hour to its day, and the second step finds no further work.
    writer.run_due_work(crate::clock::instant());
    let credits = || read_attempts(&path).into_iter().map(|(_, credits)| credits).collect::<Vec<_>>();
    assert_eq!(credits(), [2]);
    assert_eq!(
        query_number(&Connection::open(&path).unwrap(), "SELECT count(*) FROM hours"),
        2,
        "the sums must be kept"
    );
    // The next maintenance is an hour later.
    writer.add_batch(attempt_batch(&[record_started_at(&pool, long_ago, 3)]));
    writer.run_due_work(crate::clock::instant());
    assert_eq!(credits(), [3, 2], "the attempts must be in the order of time");
    writer.run_due_work(crate::clock::instant() + Duration::from_secs(3_601));
    assert_eq!(credits(), [2]);
}

#[test]
fn an_older_database_keeps_its_rows_and_gets_its_sums() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    fs::create_dir(path.parent().unwrap()).unwrap();
    let old_connection = Connection::open(&path).unwrap();
    old_connection.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::for_version(1))).unwrap();
    for (id, hour, status, credits, credits_from) in [
        ("a", 0, "200", i64::MAX, "'answer'"),
        ("b", 0, "NULL", i64::MAX, "'unknown'"),
        ("c", 0, "401", 0, "'free'"),
        ("d", 1, "200", 43, "'answer'"),
    ] {
        let started_at = NOW.0 + hour * HOUR;
        old_connection.execute_batch(&format!(
            "INSERT INTO attempts VALUES ('{id}', 'r', 1, {started_at}, 'local', 'hash', NULL, 'POST', '/v1/a',
                {status}, 'served', 1, 2, {credits}, {credits_from}, 3, 4)"
        ))
        .unwrap();
    }
    drop(old_connection);

    let store = Store::open(&location, NOW).unwrap();
    let connection = connection(&store);
    assert_eq!(query_number(connection, "SELECT count(*) FROM attempts WHERE model IS NULL"), 4);
    assert_eq!(query_number(connection, "PRAGMA user_version"), schema::VERSION as i64);
    assert_eq!(query_number(connection, "PRAGMA auto_vacuum"), 2, "the migrated file must be able to shrink");
    let sums = |hour| {
        let sql = format!(
            "SELECT attempts || ' ' || served || ' ' || request_bytes || ' ' || credits || ' ' || unpriced
             FROM hours WHERE hour_ms = {}",
            start_of_hour(NOW).0 + hour * HOUR
        );
        connection.query_row(&sql, [], |row| row.get::<_, String>(0)).unwrap()
    };
    assert_eq!(sums(0), "3 1 3 9007199254740992 1");
    assert_eq!(sums(1), "1 1 1 43 0");
    let log = fs::metadata(open::companion(&path, "-wal")).unwrap().len();
    assert_eq!(log, 0, "a checkpoint must follow a migration");
}

/// Creates a file of version 4. Two of its three attempts have the same common columns, and two are in the
/// outbox.
fn create_version_4_database(path: &Path) -> Connection {
    fs::create_dir(path.parent().unwrap()).unwrap();
    let old_connection = Connection::open(path).unwrap();
    old_connection.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::for_version(4))).unwrap();
    let now = NOW.0;
    old_connection.execute_batch(&format!(
        "INSERT INTO attempts (id, request_id, number, started_at_ms, client, key_hash, workspace, method, route,
            status, verdict, request_bytes, response_bytes, credits, credits_from, first_byte_ms, total_ms, model,
            characters, credits_reserved)
         VALUES
            ('01a229f1-2800-7abc-8def-0123456789ab', 'r1', 1, {now}, 'local', 'hash', NULL, 'POST', '/v1/a', 200,
                'served', 10, 20, 7, 'answer', 3, 4, 'eleven_v3', 7, 9),
            ('01a229f1-2800-7abc-8def-0123456789ac', 'r2', 2, {now}, 'local', 'hash', NULL, 'POST', '/v1/a', 200,
                'served', 30, 40, 8, 'answer', NULL, 5, 'eleven_v3', NULL, NULL),
            ('01a229f1-2801-7abc-8def-0123456789ad', 'r3', 1, {now} + 3, 'phone', 'own', 'studio', 'GET', '/v1/b', NULL,
                'no_response', 0, 0, 0, 'unknown', NULL, 6, NULL, NULL, NULL);
         INSERT INTO owners VALUES (zeroblob(16), 'voice', 0, 'w', 1, 9), (x'{0}1', 'history item', 1, 'w', 1, 8),
            (x'{0}2', 'history item', 1, 'w', 1, 7), (x'{0}3', 'earlier request', 2, 'w', 1, 6);
         INSERT INTO outbox_events VALUES ('01a229f1-2800-7abc-8def-0123456789ac', NULL, NULL),
            ('01a229f1-2801-7abc-8def-0123456789ad', '23514', 5);",
        "0".repeat(31),
    ))
    .unwrap();
    old_connection
}

/// The columns of `attempts` that the files of all versions have.
pub(super) const ALL_ATTEMPTS: &str = "SELECT id, request_id, number, started_at_ms, client, key_hash, workspace,
    method, route, model, status, verdict, request_bytes, response_bytes, characters, credits_reserved, credits,
    credits_from, first_byte_ms, total_ms FROM attempts ORDER BY id";

/// Returns each row of a query as the text of its values.
pub(super) fn query_rows(connection: &Connection, sql: &str) -> Vec<String> {
    let mut statement = connection.prepare(sql).unwrap();
    let column_count = statement.column_count();
    let format_row = |row: &Row<'_>| -> rusqlite::Result<String> {
        let values = (0..column_count).map(|index| row.get::<_, rusqlite::types::Value>(index));
        Ok(format!("{:?}", values.collect::<Result<Vec<_>, _>>()?))
    };
    statement.query_map([], format_row).unwrap().map(Result::unwrap).collect()
}

#[test]
fn attempts_of_an_older_database_are_read_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let old_connection = create_version_4_database(&path);
    let rows_before = query_rows(&old_connection, ALL_ATTEMPTS);
    assert_eq!(rows_before.len(), 3);
    drop(old_connection);
    let mut database = open_database(&location);
    assert_eq!(query_rows(&database.connection, ALL_ATTEMPTS), rows_before);
    let outbox = "SELECT id, refused, parked_until_ms FROM outbox_events ORDER BY id";
    assert_eq!(
        query_rows(&database.connection, outbox),
        [
            "[Text(\"01a229f1-2800-7abc-8def-0123456789ac\"), Null, Null]",
            "[Text(\"01a229f1-2801-7abc-8def-0123456789ad\"), Text(\"23514\"), Integer(5)]"
        ]
    );
    let used_at: Vec<u64> =
        owners::read(&database.connection).unwrap().iter().map(|recorded| recorded.used_at.0).collect();
    assert_eq!(used_at, [9, 7, 8], "the owners of each class must be in the order of their use");
    // When their retention ends, the attempts are deleted with their outbox rows.
    run_maintenance(&mut database, &Retention::from_days(1, 0), UnixMs(NOW.0 + 24 * HOUR));
    assert_eq!(query_number(&database.connection, "SELECT count(*) FROM attempts"), 3);
    run_maintenance(&mut database, &Retention::from_days(1, 0), UnixMs(NOW.0 + 25 * HOUR));
    for table in ["attempts", "outbox_events"] {
        assert_eq!(
            query_number(&database.connection, &format!("SELECT count(*) FROM {table}")),
            0,
            "the table {table} must have no rows"
        );
    }
}

/// Asserts the stored usage of the only client. Each array contains the day, the month and the total.
#[track_caller]
fn check_usage(database: &Database, requests: [u64; 3], credits: [u64; 3]) {
    let usage = crate::store::read::client_usage(&database.connection, NOW).unwrap();
    let [usage] = usage.as_slice() else { panic!("one client must have usage: {usage:?}") };
    assert_eq!((usage.requests, usage.credits), (requests, credits));
}

#[test]
fn the_usage_of_a_client_is_the_sum_of_its_charges() {
    let (pool, mut database) = (pool(), open_database(&DatabaseLocation::Memory));
    let charged_record = |started_at, requests, credits, replaced| AttemptRecord {
        quota: QuotaCharge { requests, credits, replaced },
        status: Some(500),
        ..record_started_at(&pool, started_at, 999)
    };
    // The usage depends only on `quota`, and not on the status or the credits of an attempt.
    write(
        &mut database,
        &[
            charged_record(NOW, 1, 0, 0),
            charged_record(NOW, 1, 0, 0),
            charged_record(NOW, 0, 0, 0),
            charged_record(NOW, 1, 70, 0),
        ],
    );
    check_usage(&database, [3; 3], [70; 3]);
    let long_ago = UnixMs(NOW.0 - 40 * 24 * HOUR);
    write(&mut database, &[charged_record(long_ago, 1, 5, 0)]);
    check_usage(&database, [3, 3, 4], [70, 70, 75]);
    // A later price replaces the charge.
    let unpriced = AttemptRecord { credits_from: CreditSource::Unknown, ..charged_record(NOW, 1, 800, 0) };
    write(&mut database, std::slice::from_ref(&unpriced));
    let quota = QuotaCharge { requests: 1, credits: 296, replaced: 800 };
    let priced = AttemptRecord { quota, ..late_price(&unpriced, 296) };
    for _ in 0..2 {
        write(&mut database, std::slice::from_ref(&priced));
        check_usage(&database, [4, 4, 5], [366, 366, 371]);
    }
}
