//! Tests of the daily sums: they contain the sums of all hours before the next hour to add, including later prices, and
//! usage is the same with and without them. Maintenance deletes them with their hours, and fills them after an upgrade.

use proptest::prelude::*;

use super::sums::{any_record, query_rows, run_maintenance};
use super::*;
use crate::policy::retention::{Retention, start_of_hour};
use crate::store::history::{UsageFilter, read_usage};
use crate::store::{days, schema};

const HOUR: u64 = 3_600_000;
const DAY: u64 = 24 * HOUR;
const COLUMNS: &str =
    "key_hash, client, route, model, attempts, served, request_bytes, response_bytes, characters,
    credits, unpriced";

fn write(database: &mut Database, records: &[AttemptRecord]) {
    super::write(database, records, MirrorScope::Nothing);
}

/// Returns a record with a new id and start time, and the other columns of `record`.
fn copy_at(record: &AttemptRecord, started_at: UnixMs) -> AttemptRecord {
    AttemptRecord { id: AttemptRecord::new_id(started_at), started_at, ..record.clone() }
}

/// Asserts that the daily sums are the sums of the hours before the next hour to add.
#[track_caller]
fn check_days(database: &Database) {
    let connection = &database.connection;
    let next_hour = days::next_hour(connection).unwrap().0;
    let days = query_rows(connection, &format!("SELECT day_ms, {COLUMNS} FROM days ORDER BY 1, 2, 3, 4, 5"));
    let sums = query_rows(
        connection,
        &format!(
            "SELECT hour_ms - hour_ms % 86400000, key_hash, client, route, model, sum(attempts), sum(served),
                sum(request_bytes), sum(response_bytes), sum(characters), sum(credits), sum(unpriced)
             FROM hours WHERE hour_ms < {next_hour} GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5"
        ),
    );
    assert_eq!(days, sums);
}

/// Reads the sums of a period by key, model and route.
fn usage(database: &Database, since: UnixMs, until: UnixMs) -> Vec<String> {
    let dimensions = [UsageDimension::Key, UsageDimension::Model, UsageDimension::Route];
    let read_dimension = |dimension| {
        let filter = UsageFilter { since, until, dimension, client: None, limit: 100 };
        format!("{:?}", read_usage(&database.connection, &filter).unwrap())
    };
    dimensions.map(read_dimension).to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn usage_is_the_same_with_and_without_daily_sums(
        records in proptest::collection::vec((any_record(pool()), 0..96_u64), 1..60),
        batch_size in 1..40_usize,
        summed_hours in 0..100_u64,
        (since, until) in (0..100_u64, 0..100_u64),
    ) {
        let start = NOW.0 - NOW.0 % HOUR;
        let records: Vec<AttemptRecord> =
            records.iter().map(|(record, hour)| copy_at(record, UnixMs(start + hour * HOUR))).collect();
        let [mut plain, mut summed] = [(); 2].map(|()| open_database(&DatabaseLocation::Memory));
        for records in records.chunks(batch_size) {
            write(&mut plain, records);
            write(&mut summed, records);
            // The attempts of later batches belong to hours that are already added, or to hours that are not added yet.
            run_maintenance(&mut summed, &Retention::from_days(0, 0), UnixMs(start + summed_hours * HOUR));
            check_days(&summed);
        }
        let [since, until] = [since, until].map(|hour| UnixMs(start + hour * HOUR));
        prop_assert_eq!(usage(&summed, since, until), usage(&plain, since, until));
    }
}

#[test]
fn a_later_price_changes_the_sums_of_its_day() {
    let mut database = open_database(&DatabaseLocation::Memory);
    let unpriced = AttemptRecord { credits_from: CreditSource::Unknown, ..record(&pool(), 0) };
    write(&mut database, std::slice::from_ref(&unpriced));
    run_maintenance(&mut database, &Retention::from_days(0, 0), UnixMs(NOW.0 + DAY));
    assert_eq!(query_number(&database.connection, "SELECT unpriced FROM days"), 1);
    let price = AttemptRecord {
        is_price_update: true,
        credits: 700,
        credits_from: CreditSource::Reported,
        ..unpriced
    };
    write(&mut database, &[price]);
    check_days(&database);
    assert_eq!(query_number(&database.connection, "SELECT credits - unpriced FROM days"), 700);
}

#[test]
fn days_are_deleted_with_their_hours() {
    let mut database = open_database(&DatabaseLocation::Memory);
    let day = |number: u64| copy_at(&record(&pool(), 1), UnixMs(NOW.0 + number * DAY));
    write(&mut database, &[day(0), day(1), day(2)]);
    let now = UnixMs(NOW.0 + 3 * DAY);
    run_maintenance(&mut database, &Retention::from_days(0, 0), now);
    assert_eq!(query_number(&database.connection, "SELECT count(*) FROM days"), 3);
    run_maintenance(&mut database, &Retention::from_days(0, 1), now);
    let days_and_hours = "SELECT count(*) * 100 + (SELECT count(*) FROM hours) FROM days";
    assert_eq!(query_number(&database.connection, days_and_hours), 101, "the last day and hour must be kept");
}

#[test]
fn the_days_of_an_upgraded_database_are_filled_by_maintenance() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    fs::create_dir(path.parent().unwrap()).unwrap();
    let old_connection = Connection::open(&path).unwrap();
    old_connection.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::for_version(15))).unwrap();
    let first_hour = start_of_hour(UnixMs(NOW.0 - 40 * HOUR)).0;
    for hour in 0..40 {
        let row = format!(
            "INSERT INTO hours VALUES ({}, 'k1', 'app', '/v1/x', 'm', 1, 1, 1, 1, 1, {hour}, 0, 0, 0)",
            first_hour + hour * HOUR
        );
        old_connection.execute_batch(&row).unwrap();
    }
    drop(old_connection);
    let mut database = open_database(&location);
    assert_eq!(
        query_number(&database.connection, "SELECT count(*) FROM days"),
        0,
        "the migration must not fill the table, which would delay startup"
    );
    let (since, until) = (UnixMs(first_hour), NOW);
    let before = usage(&database, since, until);
    run_maintenance(&mut database, &Retention::from_days(0, 0), NOW);
    check_days(&database);
    assert_eq!(query_number(&database.connection, "SELECT sum(attempts) FROM days"), 40);
    assert_eq!(usage(&database, since, until), before);
    // The sums are read from `days`.
    database.connection.execute_batch("UPDATE days SET credits = credits + 1000000").unwrap();
    assert_ne!(usage(&database, since, until), before);
}
