//! Tests of `History` and `OfflineChanges`: reads of attempts, sums and changes, the recording and deletion of changes,
//! and databases of earlier versions, which a migration changes and an offline change does not.

use super::*;
use crate::policy::retention::start_of_hour;
use crate::store::schema;

fn change(action: &str, generation: u64) -> StoredChange {
    StoredChange {
        id: StoredChange::new_id(NOW),
        at: NOW,
        actor: "admin_token".to_owned(),
        address: Some("127.0.0.1".to_owned()),
        action: action.to_owned(),
        target: Some("studio".to_owned()),
        detail: "{}".to_owned(),
        generation,
    }
}

/// Starts a writer, waits until it has written `records`, runs `test`, and stops the writer.
async fn with_writer<F: Future<Output = ()>>(
    location: &DatabaseLocation,
    records: impl FnOnce(&Pool) -> Vec<AttemptRecord>,
    test: impl FnOnce(History) -> F,
) {
    let pool = pool();
    let records = records(&pool);
    let (usage, writer_handle) =
        Store::open(location, NOW).unwrap().start_writer(Arc::clone(&pool), settings(128)).unwrap();
    let (record_count, health) = (records.len() as u64, writer_handle.health.clone());
    for record in records {
        usage.acquire_permit().await.unwrap().write(record);
    }
    let all_written = async {
        while health.written_records() < record_count {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(WAIT_TIMEOUT, all_written).await.expect("the records must be written in time");
    test(writer_handle.history.clone()).await;
    drop(usage);
    assert_eq!(writer_handle.wait_until_closed(WAIT_TIMEOUT).await, 0);
}

/// Runs `test` with a writer of a database file, and then with a writer of an in-memory database.
async fn on_disk_and_in_memory<F: Future<Output = ()>>(
    records: impl Fn(&Pool) -> Vec<AttemptRecord>,
    test: impl Fn(History) -> F,
) {
    let directory = tempfile::tempdir().unwrap();
    with_writer(&location(directory.path()).0, &records, &test).await;
    with_writer(&DatabaseLocation::Memory, &records, &test).await;
}

#[tokio::test]
async fn a_recorded_change_is_read_at_once() {
    on_disk_and_in_memory(
        |_| Vec::new(),
        async |history: History| {
            let changes = [change("key_added", 1), change("key_paused", 2), change("key_resumed", 3)];
            for change in &changes {
                history.record_change(change.clone()).await.unwrap();
            }
            let [first, second, third] = changes;
            let latest = history.changes(None, 2).await.unwrap();
            assert_eq!(latest, [third, second.clone()]);
            assert_eq!(history.changes(Some(second.id), 9).await.unwrap(), [first]);
        },
    )
    .await;
}

#[test]
fn the_oldest_changes_are_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let database = open_database(&location(directory.path()).0);
    let insert_changes = "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 10000)
        INSERT INTO changes SELECT printf('%08d', n), n, 'reload', NULL, 'reloaded', NULL, '{}', n FROM n";
    database.connection.execute_batch(insert_changes).unwrap();
    changes::insert(&database.connection, &change("key_added", 10_001)).unwrap();
    let count_and_oldest = "SELECT count(*) * 1000 + min(generation) FROM changes";
    assert_eq!(query_number(&database.connection, count_and_oldest), 10_000_002);
}

#[tokio::test]
async fn a_command_records_its_change_while_no_writer_runs() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let offline_changes = [change("client_added", 7), change("client_revoked", 8)];
    // The first change creates the database.
    for change in &offline_changes {
        assert!(OfflineChanges::open(&path, NOW).unwrap().record(change));
    }
    with_writer(
        &location,
        |_| Vec::new(),
        async |history: History| {
            let changes = history.changes(None, 9).await.unwrap();
            assert_eq!(changes, offline_changes.into_iter().rev().collect::<Vec<_>>());
            let error = OfflineChanges::open(&path, NOW).unwrap_err();
            assert!(
                matches!(error, OpenError::InUse { pid: Some(_), .. }),
                "the database must be in use: {error}"
            );
        },
    )
    .await;
}

#[test]
fn a_change_does_not_upgrade_a_database_of_an_earlier_version() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    drop(Store::open(&location, NOW).unwrap());
    let connection = Connection::open(&path).unwrap();
    connection.execute_batch("DROP TABLE changes; PRAGMA user_version = 12").unwrap();
    drop(connection);
    assert!(!OfflineChanges::open(&path, NOW).unwrap().record(&change("client_added", 7)));
    assert_eq!(schema::version(&Connection::open(&path).unwrap()).unwrap(), 12);
    assert!(!open::companion(&path, ".before-12").exists(), "the change must not copy the database");
}

#[test]
fn a_database_of_version_12_keeps_its_attempts_and_gets_the_table_of_changes() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    fs::create_dir(path.parent().unwrap()).unwrap();
    let old_connection = Connection::open(&path).unwrap();
    old_connection.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::for_version(12))).unwrap();
    old_connection.execute_batch(
        "INSERT INTO attempts VALUES ('01a22743-a374-77d9-bd8c-e92cd127fc02', 'r', 1, 1795955073908, 'local',
            'own', NULL, 'GET', '/v1/models', NULL, 200, 'served', 0, 1, NULL, NULL, NULL, 7, 'answer', NULL, 2);
         DROP TABLE attempt_rows; DROP TABLE attempt_sheets; DROP TABLE series",
    )
    .unwrap();
    drop(old_connection);
    let database = open_database(&location);
    assert_eq!(query_number(&database.connection, "PRAGMA user_version"), 16);
    assert_eq!(query_number(&database.connection, "SELECT sum(credits) FROM attempts"), 7);
    changes::insert(&database.connection, &change("reloaded", 1)).unwrap();
}

#[tokio::test]
async fn attempts_are_read_in_pages_and_filtered() {
    let failed_record = |pool: &Pool, request: &str, number| AttemptRecord {
        request_id: request.into(),
        number,
        status: Some(401),
        outcome: Outcome::Shutdown,
        ..record(pool, 0)
    };
    on_disk_and_in_memory(
        |pool| vec![record(pool, 1), failed_record(pool, "moved", 1), record(pool, 3), record(pool, 4)],
        async |history: History| {
            let filter = AttemptFilter { limit: 2, ..AttemptFilter::default() };
            let page = history.attempts(filter.clone()).await.unwrap();
            let credits = |page: &AttemptPage| -> Vec<u64> {
                page.attempts.iter().map(|attempt| attempt.credits).collect()
            };
            assert_eq!(credits(&page), [4, 3]);
            assert_eq!(page.attempts[0].short_key.as_deref(), Some("sk_canary_o...00001"));
            let second_page =
                history.attempts(AttemptFilter { before: page.next, ..filter.clone() }).await.unwrap();
            assert_eq!((credits(&second_page), second_page.next), (vec![0, 1], None));
            let failed_page =
                history.attempts(AttemptFilter { failed_only: true, ..filter.clone() }).await.unwrap();
            assert_eq!(failed_page.attempts[0].request_id, "moved");
            let request_filter = AttemptFilter { request_id: Some("moved".to_owned()), ..filter };
            assert_eq!(history.attempts(request_filter).await.unwrap().attempts.len(), 1);
        },
    )
    .await;
}

#[tokio::test]
async fn attempts_of_a_request_id_with_a_time_are_found_near_that_time() {
    let day = Duration::from_secs(24 * 3_600);
    let id = AttemptRecord::new_id(NOW).to_string();
    let attempt_at = |pool: &Pool, started_at: UnixMs| AttemptRecord {
        request_id: id.as_str().into(),
        ..record_started_at(pool, started_at, 1)
    };
    let directory = tempfile::tempdir().unwrap();
    with_writer(
        &location(directory.path()).0,
        |pool| vec![attempt_at(pool, NOW), attempt_at(pool, NOW.plus(day * 2))],
        async |history: History| {
            let filter = AttemptFilter { limit: 9, request_id: Some(id.clone()), ..AttemptFilter::default() };
            let page = history.attempts(filter).await.unwrap();
            assert_eq!(page.attempts.iter().map(|attempt| attempt.started_at).collect::<Vec<_>>(), [NOW]);
        },
    )
    .await;
}

#[tokio::test]
async fn usage_is_summed_by_time_client_model_route_and_key() {
    let hour = Duration::from_secs(3_600);
    on_disk_and_in_memory(
        |pool| {
            vec![record_started_at(pool, NOW, 5), record_started_at(pool, NOW.plus(hour), 7), record(pool, 1)]
        },
        async |history: History| {
            let filter = |dimension| UsageFilter {
                since: NOW,
                until: NOW.plus(hour * 24),
                dimension,
                client: None,
                limit: 10,
            };
            let sums = async |filter| -> Vec<(String, u64, u64)> {
                let rows = history.usage(filter).await.unwrap();
                rows.into_iter().map(|row| (row.group, row.sums.credits, row.sums.attempts)).collect()
            };
            let row = |group: &str, credits, attempts| (group.to_owned(), credits, attempts);
            assert_eq!(
                sums(filter(UsageDimension::Hour)).await,
                [row("2026-11-30T01:00:00Z", 7, 1), row("2026-11-30T00:00:00Z", 6, 2)]
            );
            assert_eq!(sums(filter(UsageDimension::Day)).await, [row("2026-11-30T00:00:00Z", 13, 3)]);
            for (dimension, group) in [
                (UsageDimension::Client, "local"),
                (UsageDimension::Model, "eleven_v3"),
                (UsageDimension::Route, "/v1/text-to-speech/{id}"),
            ] {
                assert_eq!(sums(filter(dimension)).await, [row(group, 13, 3)]);
            }
            let keys = history.usage(filter(UsageDimension::Key)).await.unwrap();
            assert_eq!(keys[0].short_key.as_deref(), Some("sk_canary_o...00001"));
            let until = UsageFilter { until: NOW.plus(hour), ..filter(UsageDimension::Client) };
            assert_eq!(sums(UsageFilter { until: NOW, ..until.clone() }).await.len(), 1);
            let other_client = UsageFilter { client: Some("other".to_owned()), ..until };
            assert_eq!(sums(other_client).await, []);
        },
    )
    .await;
}

#[tokio::test]
async fn usage_of_several_keys_is_summed_by_day_client_and_model() {
    let hour = Duration::from_secs(3_600);
    on_disk_and_in_memory(
        |pool| {
            let second_key = |record| AttemptRecord { key: Some(pool.roster().keys()[1].clone()), ..record };
            let at = |time, credits| record_started_at(pool, time, credits);
            vec![at(NOW, 5), second_key(at(NOW, 9)), second_key(at(NOW.plus(hour), 3))]
        },
        async |history: History| {
            for (dimension, expected) in
                [(UsageDimension::Day, [17]), (UsageDimension::Client, [17]), (UsageDimension::Model, [17])]
            {
                let (until, client) = (NOW.plus(hour * 24), None);
                let filter = UsageFilter { since: NOW, until, dimension, client, limit: 10 };
                let rows = history.usage(filter).await.unwrap();
                assert_eq!(rows.iter().map(|row| row.sums.credits).collect::<Vec<_>>(), expected);
            }
            let last_hours = history.last_hours_of_clients(NOW).await.unwrap();
            assert_eq!(last_hours, [("local".to_owned(), start_of_hour(NOW.plus(hour)))]);
        },
    )
    .await;
}

#[tokio::test]
async fn credits_are_summed_by_hour_and_key() {
    let (hour, start) = (Duration::from_secs(3_600), start_of_hour(NOW));
    on_disk_and_in_memory(
        |pool| {
            let at = |time, credits| record_started_at(pool, time, credits);
            let second_key = |record| AttemptRecord { key: Some(pool.roster().keys()[1].clone()), ..record };
            let refused = |record| AttemptRecord { status: Some(401), ..record };
            let other_route = AttemptRecord { route: Route::parse("/v1/sound-generation"), ..at(NOW, 2) };
            vec![
                at(NOW, 5),
                other_route,
                second_key(at(NOW, 9)),
                refused(second_key(at(NOW, 0))),
                AttemptRecord { key: None, ..at(NOW, 0) },
                second_key(at(NOW.plus(hour), 3)),
            ]
        },
        async |history: History| {
            let read = async |since, until, limit| -> Vec<(u64, String, u64, u64, u64)> {
                let rows = history.credits_by_hour(since, until, limit).await.unwrap();
                let row = |row: HourOfKey| {
                    let name = row.short_key.unwrap_or(row.key_hash);
                    (row.hour.since(start).as_secs() / 3_600, name, row.credits, row.attempts, row.served)
                };
                rows.into_iter().map(row).collect()
            };
            let row = |hours, key: &str, credits, attempts, served| {
                (hours, key.to_owned(), credits, attempts, served)
            };
            let [first, second] = ["sk_canary_o...00001", "sk_canary_o...00002"];
            let all = [
                row(1, second, 3, 1, 1),
                row(0, "own", 0, 1, 1),
                row(0, first, 7, 2, 2),
                row(0, second, 9, 2, 1),
            ];
            let (next, end) = (start.plus(hour), start.plus(hour * 2));
            assert_eq!(read(start, end, 10).await, all);
            assert_eq!(
                read(next.minus(Duration::from_millis(1)), end, 10).await,
                all,
                "the whole first hour must be included"
            );
            assert_eq!(read(next, end, 10).await, all[..1]);
            assert_eq!(read(start, next, 10).await, all[1..]);
            assert_eq!(read(start, end, 2).await, all[..2], "the latest rows must be read");
        },
    )
    .await;
}

#[tokio::test]
async fn the_last_hour_of_each_client_is_read() {
    let (hour, start) = (Duration::from_secs(3_600), start_of_hour(NOW));
    on_disk_and_in_memory(
        |pool| vec![record_started_at(pool, NOW, 5), record_started_at(pool, NOW.plus(hour), 3)],
        async |history: History| {
            let read = async |since| -> Vec<u64> {
                let rows = history.last_hours_of_clients(since).await.unwrap();
                rows.into_iter().map(|(_, last)| last.since(start).as_secs() / 3_600).collect()
            };
            assert_eq!(read(start).await, [1], "the client must have one row, with its latest hour");
            assert!(read(start.plus(hour * 2)).await.is_empty());
        },
    )
    .await;
}
