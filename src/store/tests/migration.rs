//! Tests of the migration to schema version 12: each attempt gets a row of its own, many of them in steps
//! after the start.

use rusqlite::params;

use super::sums::{ALL, rows};
use super::*;
use crate::elevenlabs::affinity::{Kind, Named};
use crate::pool::{OwnerId, OwnershipIndex};
use crate::store::attempts::migration;
use crate::store::maintenance::{self, MaintenanceStep};
use crate::store::{owners, schema};

/// A file of version 11: three attempts in a shared row, one in a damaged one, and four with a row each,
/// one of them without a price and one with the id of an early version.
fn of_version_11(path: &Path) -> Connection {
    fs::create_dir(path.parent().unwrap()).unwrap();
    let old = Connection::open(path).unwrap();
    old.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::of_version(11))).unwrap();
    old.execute_batch(
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
    old
}

const EACH: &str = "SELECT id, request_id, number, started_at_ms, client, key_hash, workspace,
    method, route, model, status, verdict, request_bytes, response_bytes, characters, credits_reserved, credits,
    credits_from, first_byte_ms, total_ms, audio_ms FROM attempts ORDER BY id";

fn steps(database: &mut Database) -> usize {
    let settings = Settings { retention: Retention::of_days(0, 0), ..settings(8) };
    (1..1_000)
        .find(|_| maintenance::step(database, &settings, NOW).unwrap() == MaintenanceStep::Done)
        .unwrap()
}

#[track_caller]
fn check_finished(connection: &Connection) {
    let earlier = "SELECT name FROM sqlite_schema WHERE name IN ('series', 'attempt_rows', 'attempt_sheets',
        'owners_passing', 'earlier_outbox_events')";
    assert_eq!(rows(connection, earlier), [""; 0]);
}

#[test]
fn attempts_of_the_last_version_read_as_they_did() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let old = of_version_11(&path);
    let sound = "DELETE FROM attempt_sheets WHERE NOT json_valid(lines)";
    let before = old.unchecked_transaction().unwrap();
    before.execute(sound, []).unwrap();
    let expected = rows(&before, EACH);
    before.rollback().unwrap();
    assert_eq!(expected.len(), 7);
    drop(old);
    let database = opened(&location);
    assert_eq!(rows(&database.connection, EACH), expected);
    check_finished(&database.connection);
    let outbox = "SELECT * FROM outbox_events";
    let event = "[Text(\"01a22743-a5c5-77d9-bd8c-ea44d127fc02\"), Text(\"23514\"), Integer(5), Integer(2)]";
    assert_eq!(rows(&database.connection, outbox), [event]);
}

#[test]
fn many_attempts_are_moved_in_steps_and_none_is_lost_by_a_stop() {
    const ROWS: i64 = 10_000;
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let old = of_version_11(&path);
    let retired = Fingerprint::retired_of(KEYS[0]).unwrap().to_string();
    old.execute_batch(&format!(
        "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {ROWS})
         INSERT INTO attempt_rows SELECT unhex(printf('%032x', n)), 'r', 2, 1, {}, 1, 2, 3, 4, 5, 6, 7, 8 FROM n;
         UPDATE series SET key_hash = '{retired}';
         INSERT INTO retired_keys VALUES ('{retired}');
         DELETE FROM attempt_sheets WHERE NOT json_valid(lines);
         {}; PRAGMA user_version = {}",
        NOW.0,
        migration::TABLE,
        schema::VERSION,
    ))
    .unwrap();
    let left = |connection: &Connection| {
        ["attempts", "attempt_rows", "attempt_sheets"].map(|table| {
            let count = if table == "attempt_sheets" { "coalesce(sum(attempts), 0)" } else { "count(*)" };
            number(connection, &format!("SELECT {count} FROM {table}"))
        })
    };
    assert_eq!(left(&old), [0, ROWS + 4, 3]);
    let mut moved = 0;
    for round in 1.. {
        // Each step is that of another start, and the first one of each fails.
        let mut store = Store::open(&location, NOW).unwrap();
        store.recognize([ApiKey::new(KEYS[0]).unwrap()].iter());
        let trouble = "CREATE TEMP TRIGGER trouble BEFORE DELETE ON attempt_rows BEGIN SELECT raise(ABORT, 'full'); END";
        connection(&store).execute_batch(trouble).unwrap();
        migration::go_on(connection(&store)).unwrap_err();
        assert_eq!(left(connection(&store))[0], moved);
        connection(&store).execute_batch("DROP TRIGGER trouble").unwrap();
        assert!(migration::go_on(connection(&store)).unwrap());
        moved = 3 + (round * 4_096).min(ROWS + 4);
        assert_eq!(left(&old), [moved, ROWS + 7 - moved, 0]);
        if moved == ROWS + 7 {
            break;
        }
    }
    drop(old);
    let mut database = opened(&location);
    steps(&mut database);
    check_finished(&database.connection);
    assert_eq!(number(&database.connection, "SELECT count(*) FROM attempts"), ROWS + 7);
    let hash = Fingerprint::of(KEYS[0]).to_string();
    let of_key = format!("SELECT count(*) FROM attempts WHERE key_hash = '{hash}'");
    assert_eq!(
        number(&database.connection, &of_key),
        ROWS + 7,
        "also those that were moved after it was recognized"
    );
}

#[test]
fn a_start_moves_a_bounded_number_of_attempts() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let old = of_version_11(&path);
    // Shared rows that are counted as full ones.
    old.execute_batch(
        "DELETE FROM attempt_rows; DELETE FROM attempt_sheets;
         WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 20)
         INSERT INTO attempt_sheets (hour_ms, count, chance, attempts, lines)
         SELECT 1795953600000, n, 1, 4096, '[[5,0,\"r\",1,1,2,3,4,5,6]]' FROM n",
    )
    .unwrap();
    drop(old);
    let mut database = opened(&location);
    let left = |database: &Database| {
        ["attempts", "attempt_sheets"]
            .map(|table| number(&database.connection, &format!("SELECT count(*) FROM {table}")))
    };
    assert_eq!(left(&database), [16, 4]);
    // Records are written meanwhile.
    let pool = pool();
    write(&mut database, &[record(&pool, 1)], Mirrored::Nothing);
    assert_eq!(left(&database), [17, 4]);
    assert!(steps(&mut database) > 4);
    assert_eq!(number(&database.connection, "SELECT count(*) FROM attempts"), 21);
    check_finished(&database.connection);
}

#[test]
fn an_earlier_file_keeps_its_attempts_and_owners() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    fs::create_dir(path.parent().unwrap()).unwrap();
    let old = Connection::open(&path).unwrap();
    old.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::of_version(5))).unwrap();
    old.execute_batch(&format!(
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
    let known = OwnershipIndex::new(Keeping { identifiers_max: usize::MAX, ..KEEPING });
    let kind = Kind::HistoryItem;
    let mut insert = old
        .prepare("INSERT INTO owners_plentiful (id, kind, workspace, learned_at_ms, used_at_ms) VALUES (?1, ?2, ?3, ?4, ?4)")
        .unwrap();
    let mut expected = Vec::new();
    for index in 0..3_000 {
        let owner = OwnerId::of_word(["studio", "attic"][index % 2]);
        let at = NOW.plus(Duration::from_millis(index as u64 / 7));
        let recorded = known.record(Named::new(kind, &index.to_string()), &owner, at).unwrap();
        let columns = params![recorded.named.tag.bytes(), kind.word(), recorded.owner.word(), at.0 as i64];
        insert.execute(columns).unwrap();
        expected.push(recorded);
    }
    // The latest change of an identifier counts.
    let gone = expected.remove(0);
    insert.execute(params![gone.named.tag.bytes(), kind.word(), None::<&str>, 1]).unwrap();
    drop(insert);
    old.execute_batch("COMMIT").unwrap();
    let before = rows(&old, ALL);
    drop(old);

    let mut database = opened(&location);
    assert_eq!(number(&database.connection, "PRAGMA user_version"), schema::VERSION as i64);
    assert_eq!(rows(&database.connection, ALL), before);
    assert_eq!(number(&database.connection, "SELECT count(*) FROM outbox_events WHERE revision = 0"), 1);
    assert!(owners::read(&database.connection).unwrap() == expected);
    assert_eq!(
        number(&database.connection, "SELECT count(*) FROM sqlite_schema WHERE name LIKE '%_rows'"),
        0
    );
    // Writing continues.
    let forgotten = Named::new(kind, "2999");
    let owners_batch = batch_of_owners(vec![OwnershipUpdate::Forgotten(forgotten)]);
    rows::commit(&mut database, &owners_batch, &[], Mirrored::Nothing, NOW).unwrap();
    expected.retain(|recorded| recorded.named != forgotten);
    assert!(owners::read(&database.connection).unwrap() == expected);
}
