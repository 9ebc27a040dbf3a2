//! Tests of files in which an earlier version named keys by their plain SHA-256.

use sha2::{Digest, Sha256};

use super::*;
use crate::elevenlabs::affinity::{Kind, Named};
use crate::policy::retention::hour_of;
use crate::pool::{OwnerId, OwnershipIndex};

/// A key in the file that is no longer configured.
const GONE: &str = "sk_canary_of_the_store_number_three_00000000000003";

fn plain(key: &str) -> String {
    Sha256::digest(key.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn owned(owner: &str, kind: Kind, id: &str) -> OwnershipUpdate {
    let owners = OwnershipIndex::new(KEEPING);
    OwnershipUpdate::Recorded(owners.record(Named::new(kind, id), &OwnerId::of_word(owner), NOW).unwrap())
}

/// A file of version 7 with rows of the first key, the second and a removed one in every table, and
/// of another key in its free pages.
fn of_version_7(path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut old = Connection::open(path).unwrap();
    old.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::of_version(7))).unwrap();
    let hour = hour_of(NOW).0;
    for (position, key) in [KEYS[0], KEYS[1], GONE].iter().enumerate() {
        let (hash, series) = (plain(key), position + 1);
        old.execute_batch(&format!(
            "INSERT INTO keys VALUES ('{hash}', 's', NULL, NULL, {position}, 'active', 40, 100, NULL, NULL, NULL, NULL,
                NULL, NULL, 1);
             INSERT INTO series VALUES ({series}, 'local', '{hash}', NULL, 'POST', '/v1/a', 'm', 200, 'served', 'answer',
                {hour});
             INSERT INTO attempt_rows VALUES (randomblob(16), 'r', {series}, 1, {hour}, 1, 2, 3, NULL, 4, 5, 6, NULL);
             INSERT INTO hours VALUES ({hour}, '{hash}', 'local', '/v1/a', 'm', 1, 1, 1, 2, 3, 4, 0);
             INSERT INTO outbox_keys VALUES ('{hash}', 's', 'active', 40, 100, 60, 0.4, 0, 0, NULL, 1, 1, NULL, NULL);"
        ))
        .unwrap();
    }
    let mut changes = vec![owned("studio", Kind::Agent, "agent")];
    for key in [KEYS[0], GONE] {
        changes.extend([Kind::Voice, Kind::HistoryItem].map(|kind| owned(&plain(key), kind, key)));
        let log = "INSERT INTO owners_passing (changes, used_at_ms, pack) VALUES (1, 1, ?1)";
        old.execute(log, [plain(key).as_bytes()]).unwrap();
    }
    let transaction = old.transaction().unwrap();
    owners::write(&transaction, &changes, NOW).unwrap();
    transaction.commit().unwrap();
    old.execute_batch(&format!(
        "CREATE TABLE dropped AS SELECT '{}' AS hash FROM series; DROP TABLE dropped",
        plain("dropped")
    ))
    .unwrap();
}

#[track_caller]
fn check_no_plain_digest(path: &Path) {
    let log = fs::read(open::companion(path, "-wal")).unwrap_or_default();
    let heap = [fs::read(path).unwrap(), log].concat();
    for key in [KEYS[0], KEYS[1], GONE, "dropped"] {
        let (text, bytes) = (plain(key), Sha256::digest(key.as_bytes()).to_vec());
        let holds = |part: &[u8]| heap.windows(part.len()).any(|window| window == part);
        assert!(!holds(text.as_bytes()) && !holds(&bytes), "the plain digest of {key}");
    }
}

fn names_in(connection: &Connection, table: &str) -> Vec<String> {
    let mut statement =
        connection.prepare(&format!("SELECT key_hash FROM {table} ORDER BY key_hash")).unwrap();
    let rows = statement.query_map([], |row| row.get(0)).unwrap();
    rows.map(Result::unwrap).collect()
}

fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort_unstable();
    names
}

fn keys(texts: &[&str]) -> Vec<ApiKey> {
    texts.iter().map(|key| ApiKey::new(key).unwrap()).collect()
}

fn print(key: &str) -> String {
    Fingerprint::of(key).to_string()
}

fn retired(key: &str) -> String {
    Fingerprint::retired_of(key).unwrap().to_string()
}

#[test]
fn no_plain_digest_of_a_key_stays_in_an_older_file() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    of_version_7(&path);
    // Repeats the check without configured keys, and while the file is open.
    let store = Store::open(&location, NOW).unwrap();
    check_no_plain_digest(&path);
    drop(store);
    check_no_plain_digest(&path);
}

#[test]
fn the_state_of_a_key_in_an_older_file_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    of_version_7(&path);
    let mut store = Store::open(&location, NOW).unwrap();
    store.recognize(keys(&KEYS).iter());
    let expected = sorted(vec![print(KEYS[0]), print(KEYS[1]), retired(GONE)]);
    for table in ["keys", "hours", "outbox_keys", "attempts"] {
        assert_eq!(names_in(connection(&store), table), expected, "{table}");
    }
    let remembered: Vec<_> = store.remembered().unwrap().iter().map(|key| key.quota.count).collect();
    assert_eq!(remembered, [40; 3]);
    let owners = |store: &Store| -> Vec<String> {
        sorted(store.owners().unwrap().iter().map(|recorded| recorded.owner.word().to_owned()).collect())
    };
    let of = |names: [String; 2]| {
        sorted(names.iter().flat_map(|name| vec![name.clone(); 2]).chain(["studio".to_owned()]).collect())
    };
    assert_eq!(owners(&store), of([print(KEYS[0]), retired(GONE)]));
    drop(store);

    // A key that is configured again later finds its rows.
    let mut store = Store::open(&location, NOW).unwrap();
    store.recognize(keys(&[GONE]).iter());
    assert_eq!(names_in(connection(&store), "keys"), sorted([KEYS[0], KEYS[1], GONE].map(print).to_vec()));
    assert_eq!(owners(&store), of([print(KEYS[0]), print(GONE)]));
    assert_eq!(names_in(connection(&store), "retired_keys"), [""; 0]);
}

#[test]
fn a_key_with_rows_of_both_names_keeps_its_state_and_adds_its_sums() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    of_version_7(&path);
    let pool = pool();
    let opened = open::open(&location, NOW, IntegrityCheck::Quick).unwrap();
    let mut database = opened.database;
    // Repeats the check after a reload that adds the key.
    let snapshot = pool.snapshot(NOW);
    rows::commit(&mut database, &batch_of(&[record(&pool, 7)]), &snapshot, Mirrored::Keys, NOW).unwrap();
    let before = "UPDATE hours SET route = '/v1/a', model = 'm' WHERE credits = 7";
    database.connection.execute_batch(before).unwrap();
    database.recognize(keys(&KEYS).iter());
    let connection = &database.connection;
    let of = |sql: &str| {
        connection.query_row(sql, [print(KEYS[0])], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
    };
    let state: (i64, i64) = of("SELECT count(*), max(character_count) FROM keys WHERE key_hash = ?1");
    assert_eq!(state, (1, 0), "the later state is kept");
    let hour: (i64, i64) = of("SELECT count(*), sum(credits) FROM hours WHERE key_hash = ?1");
    assert_eq!(hour, (1, 11));
    let outbox: (i64, i64) = of("SELECT count(*), max(observed_at_ms) FROM outbox_keys WHERE key_hash = ?1");
    assert_eq!(outbox, (1, NOW.0 as i64));
}

#[tokio::test]
async fn the_mirror_gets_every_rename_once_and_no_full_digest() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    of_version_7(&path);
    let settings = Settings { mirrored: Mirrored::KeysAndEvents, ..settings(8) };
    let renamed = |names: [(String, String); 3]| {
        let renames = names.map(|(old, new)| Rename { beginning: old[..12].to_owned(), key_hash: new });
        let mut renames = renames.to_vec();
        renames.sort_by(|one, other| one.beginning.cmp(&other.beginning));
        renames
    };
    let pool = pool();
    let mut store = Store::open(&location, NOW).unwrap();
    store.recognize(keys(&KEYS).iter());
    let (usage, mut writing) = store.write(Arc::clone(&pool), settings).unwrap();
    drop(usage);
    assert!(writing.written(WAIT_MAX).await);
    let outbox = writing.outbox.take().unwrap();
    let batch = outbox.take(10).await.unwrap();
    let expected = renamed([
        (plain(KEYS[0]), print(KEYS[0])),
        (plain(KEYS[1]), print(KEYS[1])),
        (plain(GONE), retired(GONE)),
    ]);
    assert_eq!(batch.renames, expected);
    let sent = batch.renames.into_iter().map(RowName::Rename).collect();
    outbox.record(Delivery { sent, refused: Vec::new() }).await.unwrap();
    assert_eq!(outbox.take(10).await.unwrap().renames, []);
    drop(outbox);
    assert_eq!(writing.ended(WAIT_MAX).await, 0);

    let mut store = Store::open(&location, NOW).unwrap();
    store.recognize(keys(&[GONE]).iter());
    let (usage, mut writing) = store.write(pool, settings).unwrap();
    drop(usage);
    assert!(writing.written(WAIT_MAX).await);
    let outbox = writing.outbox.take().unwrap();
    let renames = outbox.take(10).await.unwrap().renames;
    assert_eq!(renames, [Rename { beginning: retired(GONE)[..12].to_owned(), key_hash: print(GONE) }]);
}

#[test]
fn a_file_that_could_not_be_rewritten_is_rewritten_by_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    of_version_7(&path);
    // An open reader keeps SQLite from truncating the log.
    let reader = Connection::open(&path).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM keys").unwrap();
    drop(Store::open(&location, NOW).unwrap());
    assert!(names::is_wipe_due(&reader).is_err(), "the transaction sees the old state");
    reader.execute_batch("END").unwrap();
    assert!(names::is_wipe_due(&reader).unwrap());
    drop(reader);
    drop(Store::open(&location, NOW).unwrap());
    check_no_plain_digest(&path);
}

#[test]
fn a_new_file_needs_no_wipe_and_an_older_one_is_migrated_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    of_version_7(&path);
    assert!(matches!(Reader::open(&path), Err(ReadError::Older(_))));
    let store = Store::open(&location, NOW).unwrap();
    assert!(Reader::open(&path).is_ok());
    assert!(!names::is_wipe_due(connection(&store)).unwrap());
    let fresh = Store::open(&DatabaseLocation::Memory, NOW).unwrap();
    assert!(!names::is_wipe_due(connection(&fresh)).unwrap());
}
