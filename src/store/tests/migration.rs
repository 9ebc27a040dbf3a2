//! Tests of the migration to schema version 12, in which each attempt gets a separate row: attempts, outbox rows and
//! owners are kept, and startup moves a limited number of attempts, so that most attempts of a large file are moved
//! later.

use rusqlite::params;

use super::sums::{ALL_ATTEMPTS, query_rows};
use super::*;
use crate::elevenlabs::affinity::{Identifier, ResourceKind};
use crate::pool::{OwnerId, OwnershipIndex};
use crate::store::attempts::migration;
use crate::store::maintenance::{self, MaintenanceProgress};
use crate::store::{days, owners, schema};

/// Creates a file of version 11 with three attempts in a shared row, one in a corrupt shared row, and four in
/// separate rows, one of which has no price and one an id of an early version.
fn create_version_11_database(path: &Path) -> Connection {
    fs::create_dir(path.parent().unwrap()).unwrap();
    let old_connection = Connection::open(path).unwrap();
    old_connection.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::for_version(11))).unwrap();
    old_connection.execute_batch(
        r#"INSERT INTO series VALUES
            (1, 'local', '54ae788b', NULL, 'GET', '/v1/models', NULL, 200, 'served', 'free', 1795953600000),
            (2, 'phone', 'own', 'studio', 'POST', '/v1/a/{id}', 'm', 200, 'served', 'answer', 1795953600000),
            (3, 'local', '54ae788b', NULL, 'GET', '/v1/b', NULL, NULL, 'shutdown', 'unknown', 1795953600000);
         INSERT INTO attempt_sheets (hour_ms, count, chance, attempts, lines) VALUES
            (1795953600000, 2158179969326, 3509058562, 3,
            '[[1473911,0,"01a22743-a377-77d9-bd8c-e92dd127fc02",1,1,0,5364,7,7,0],
              [1473917,32,"a \"quoted\" name",2,2,17,12,9,null,11,11,12,13],
              [0,-1,"",1,1,0,0,9,null,0]]'),
            (1795953600000, 1, 2, 1, '[[damaged');
         INSERT INTO attempt_rows VALUES
            (x'01a22743a37477d9bd8ce92cd127fc02', 'r1', 1, 1, 1795955073908, 0, 5364, NULL, NULL, 0, 1, 2, NULL),
            (x'01a22743a5c577d9bd8cea44d127fc02', 'r2', 2, 2, 1795955074501, 1, 2, 3, 4, 5, 6, 7, 8),
            (x'01a22743a6fc77d9bd8cea46d127fc02', 'r3', 3, 1, 1795955074812, 0, 0, NULL, 9, 0, NULL, 1, NULL),
            (CAST('early' AS BLOB), 'r4', 1, 1, 1795955074813, 0, 0, NULL, NULL, 0, NULL, 1, NULL);
         INSERT INTO outbox_events VALUES (x'01a22743a5c577d9bd8cea44d127fc02', '23514', 5, 2);
         INSERT INTO owners_passing (changes, used_at_ms, pack) VALUES (1, 1, x'00')"#,
    )
    .unwrap();
    old_connection
}

const ALL_COLUMNS: &str = "SELECT id, request_id, number, started_at_ms, client, key_hash, workspace,
    method, route, model, status, verdict, request_bytes, response_bytes, characters, credits_reserved, credits,
    credits_from, first_byte_ms, total_ms, audio_ms FROM attempts ORDER BY id";

/// Runs maintenance without a retention until no work is due, and returns the number of steps.
fn run_maintenance(database: &mut Database) -> usize {
    let settings = Settings { retention: Retention::from_days(0, 0), ..settings(8) };
    (1..1_000)
        .find(|_| maintenance::run_step(database, &settings, NOW).unwrap() == MaintenanceProgress::Done)
        .unwrap()
}

/// Asserts that the migration has dropped the tables of earlier versions.
#[track_caller]
fn check_finished(connection: &Connection) {
    let old_tables =
        "SELECT name FROM sqlite_schema WHERE name IN ('series', 'attempt_rows', 'attempt_sheets',
        'owners_passing', 'earlier_outbox_events')";
    assert_eq!(query_rows(connection, old_tables), [""; 0]);
}

#[test]
fn attempts_of_version_11_are_read_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let old_connection = create_version_11_database(&path);
    let delete_corrupt_rows = "DELETE FROM attempt_sheets WHERE NOT json_valid(lines)";
    let old_transaction = old_connection.unchecked_transaction().unwrap();
    old_transaction.execute(delete_corrupt_rows, []).unwrap();
    let expected = query_rows(&old_transaction, ALL_COLUMNS);
    old_transaction.rollback().unwrap();
    assert_eq!(expected.len(), 7);
    drop(old_connection);
    let database = open_database(&location);
    assert_eq!(query_rows(&database.connection, ALL_COLUMNS), expected);
    check_finished(&database.connection);
    let outbox = "SELECT * FROM outbox_events";
    let event = "[Text(\"01a22743-a5c5-77d9-bd8c-ea44d127fc02\"), Text(\"23514\"), Integer(5), Integer(2)]";
    assert_eq!(query_rows(&database.connection, outbox), [event]);
}

#[test]
fn many_attempts_are_moved_in_steps_and_no_attempt_is_lost_by_a_restart() {
    const ROWS: i64 = 10_000;
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let old_connection = create_version_11_database(&path);
    let retired = Fingerprint::replaced_plain_digest(KEYS[0]).unwrap().to_string();
    old_connection.execute_batch(&format!(
        "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {ROWS})
         INSERT INTO attempt_rows SELECT unhex(printf('%032x', n)), 'r', 2, 1, {}, 1, 2, 3, 4, 5, 6, 7, 8 FROM n;
         UPDATE series SET key_hash = '{retired}';
         INSERT INTO retired_keys VALUES ('{retired}');
         DELETE FROM attempt_sheets WHERE NOT json_valid(lines);
         {}; {} PRAGMA user_version = {}",
        NOW.0,
        migration::STATEMENTS,
        days::TABLE,
        schema::VERSION,
    ))
    .unwrap();
    let counts = |connection: &Connection| {
        ["attempts", "attempt_rows", "attempt_sheets"].map(|table| {
            let count = if table == "attempt_sheets" { "coalesce(sum(attempts), 0)" } else { "count(*)" };
            query_number(connection, &format!("SELECT {count} FROM {table}"))
        })
    };
    assert_eq!(counts(&old_connection), [0, ROWS + 4, 3]);
    let mut moved_count = 0;
    for round in 1.. {
        // Each step runs after a restart, and fails once before it succeeds.
        let mut store = Store::open(&location, NOW).unwrap();
        store.rename_keys([ApiKey::new(KEYS[0]).unwrap()].iter());
        let failing_trigger = "CREATE TEMP TRIGGER trouble BEFORE DELETE ON attempt_rows
            BEGIN SELECT raise(ABORT, 'full'); END";
        connection(&store).execute_batch(failing_trigger).unwrap();
        migration::move_next_attempts(connection(&store)).unwrap_err();
        assert_eq!(counts(connection(&store))[0], moved_count);
        connection(&store).execute_batch("DROP TRIGGER trouble").unwrap();
        assert!(migration::move_next_attempts(connection(&store)).unwrap());
        moved_count = 3 + (round * 4_096).min(ROWS + 4);
        assert_eq!(counts(&old_connection), [moved_count, ROWS + 7 - moved_count, 0]);
        if moved_count == ROWS + 7 {
            break;
        }
    }
    drop(old_connection);
    let mut database = open_database(&location);
    run_maintenance(&mut database);
    check_finished(&database.connection);
    assert_eq!(query_number(&database.connection, "SELECT count(*) FROM attempts"), ROWS + 7);
    let hash = Fingerprint::new(KEYS[0]).to_string();
    let attempts_of_key = format!("SELECT count(*) FROM attempts WHERE key_hash = '{hash}'");
    assert_eq!(
        query_number(&database.connection, &attempts_of_key),
        ROWS + 7,
        "attempts that are moved after the key was renamed must have its new name"
    );
}

#[test]
fn startup_moves_a_bounded_number_of_attempts() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let old_connection = create_version_11_database(&path);
    // Each shared row claims the maximum number of attempts of a step.
    old_connection
        .execute_batch(
            "DELETE FROM attempt_rows; DELETE FROM attempt_sheets;
         WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 20)
         INSERT INTO attempt_sheets (hour_ms, count, chance, attempts, lines)
         SELECT 1795953600000, n, 1, 4096, '[[5,0,\"r\",1,1,2,3,4,5,6]]' FROM n",
        )
        .unwrap();
    drop(old_connection);
    let mut database = open_database(&location);
    let counts = |database: &Database| {
        ["attempts", "attempt_sheets"]
            .map(|table| query_number(&database.connection, &format!("SELECT count(*) FROM {table}")))
    };
    assert_eq!(counts(&database), [16, 4]);
    // Records are written between the steps.
    let pool = pool();
    write(&mut database, &[record(&pool, 1)], MirrorScope::Nothing);
    assert_eq!(counts(&database), [17, 4]);
    assert!(run_maintenance(&mut database) > 4);
    assert_eq!(query_number(&database.connection, "SELECT count(*) FROM attempts"), 21);
    check_finished(&database.connection);
}

#[test]
fn an_earlier_database_keeps_its_attempts_and_owners() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    fs::create_dir(path.parent().unwrap()).unwrap();
    let old_connection = Connection::open(&path).unwrap();
    old_connection.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::for_version(5))).unwrap();
    old_connection.execute_batch(&format!(
        "INSERT INTO series VALUES (3, 'local', 'hash', 'studio', 'POST', '/v1/a', 'm', 200, 'served', 'answer', {0});
         INSERT INTO attempt_rows VALUES (x'01a229f128007abc8def0123456789ab', 'r1', 3, 1, {0}, 1, 2, 3, 4, 5, 6, 7, 8),
            (x'01a229f128007abc8def0123456789ac', 'r2', 3, 2, {0}, 0, 0, NULL, NULL, 0, NULL, 1, NULL);
         INSERT INTO outbox_events VALUES (x'01a229f128007abc8def0123456789ac', NULL, NULL);
         INSERT INTO owners_passing (id, kind, workspace, learned_at_ms, used_at_ms)
            VALUES (zeroblob(16), 'earlier request', 'studio', 1, 1);
         BEGIN",
        NOW.0,
    ))
    .unwrap();
    let ownership_index =
        OwnershipIndex::new(RetentionLimits { max_identifiers: usize::MAX, ..OWNER_LIMITS });
    let kind = ResourceKind::HistoryItem;
    let mut insert = old_connection
        .prepare(
            "INSERT INTO owners_plentiful (id, kind, workspace, learned_at_ms, used_at_ms)
             VALUES (?1, ?2, ?3, ?4, ?4)",
        )
        .unwrap();
    let mut expected = Vec::new();
    for index in 0..3_000 {
        let owner = OwnerId::from_stored(["studio", "attic"][index % 2]);
        let recorded_at = NOW.plus(Duration::from_millis(index as u64 / 7));
        let update =
            ownership_index.record(Identifier::new(kind, &index.to_string()), &owner, recorded_at).unwrap();
        let columns = params![
            update.identifier.hash.bytes(),
            kind.as_str(),
            update.owner.as_str(),
            recorded_at.0 as i64
        ];
        insert.execute(columns).unwrap();
        expected.push(update);
    }
    // The latest change of an identifier is valid.
    let removed_owner = expected.remove(0);
    insert.execute(params![removed_owner.identifier.hash.bytes(), kind.as_str(), None::<&str>, 1]).unwrap();
    drop(insert);
    old_connection.execute_batch("COMMIT").unwrap();
    let rows_before = query_rows(&old_connection, ALL_ATTEMPTS);
    drop(old_connection);

    let mut database = open_database(&location);
    assert_eq!(query_number(&database.connection, "PRAGMA user_version"), schema::VERSION as i64);
    assert_eq!(query_rows(&database.connection, ALL_ATTEMPTS), rows_before);
    assert_eq!(
        query_number(&database.connection, "SELECT count(*) FROM outbox_events WHERE revision = 0"),
        1
    );
    assert!(owners::read(&database.connection).unwrap() == expected);
    assert_eq!(
        query_number(&database.connection, "SELECT count(*) FROM sqlite_schema WHERE name LIKE '%_rows'"),
        0
    );
    // The migrated log can be appended to.
    let removed_identifier = Identifier::new(kind, "2999");
    let owners_batch = ownership_batch(vec![OwnershipUpdate::Removed(removed_identifier)]);
    transaction::commit(&mut database, &owners_batch, &[], MirrorScope::Nothing, NOW).unwrap();
    expected.retain(|recorded| recorded.identifier != removed_identifier);
    assert!(owners::read(&database.connection).unwrap() == expected);
}
