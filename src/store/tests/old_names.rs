//! Tests of files in which an earlier version named keys by their plain SHA-256 digests: no digest remains, the rows
//! are renamed and keep their state, and the mirror receives the renames. An interrupted rewrite of a file is repeated.

use sha2::{Digest, Sha256};

use super::*;
use crate::elevenlabs::affinity::{Identifier, ResourceKind};
use crate::policy::retention::start_of_hour;
use crate::pool::{OwnerId, OwnershipIndex};

/// A key that is in the file and not in the configuration.
const REMOVED_KEY: &str = "sk_canary_of_the_store_number_three_00000000000003";

fn plain_digest(key: &str) -> String {
    Sha256::digest(key.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn ownership_of(owner: &str, kind: ResourceKind, id: &str) -> OwnershipUpdate {
    let owners = OwnershipIndex::new(OWNER_LIMITS);
    OwnershipUpdate::Recorded(
        owners.record(Identifier::new(kind, id), &OwnerId::from_stored(owner), NOW).unwrap(),
    )
}

/// Creates a file of version 7. Every table has rows of the two keys and of a removed key, and the free pages
/// contain the digest of another key.
fn create_version_7_database(path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut old_connection = Connection::open(path).unwrap();
    old_connection.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::for_version(7))).unwrap();
    let hour = start_of_hour(NOW).0;
    for (position, key) in [KEYS[0], KEYS[1], REMOVED_KEY].iter().enumerate() {
        let (hash, series) = (plain_digest(key), position + 1);
        old_connection.execute_batch(&format!(
            "INSERT INTO keys VALUES ('{hash}', 's', NULL, NULL, {position}, 'active', 40, 100, NULL, NULL, NULL, NULL,
                NULL, NULL, 1);
             INSERT INTO series VALUES ({series}, 'local', '{hash}', NULL, 'POST', '/v1/a', 'm', 200, 'served',
                'answer', {hour});
             INSERT INTO attempt_rows VALUES (randomblob(16), 'r', {series}, 1, {hour}, 1, 2, 3, NULL, 4, 5, 6, NULL);
             INSERT INTO hours VALUES ({hour}, '{hash}', 'local', '/v1/a', 'm', 1, 1, 1, 2, 3, 4, 0);
             INSERT INTO outbox_keys VALUES ('{hash}', 's', 'active', 40, 100, 60, 0.4, 0, 0, NULL, 1, 1, NULL, NULL);"
        ))
        .unwrap();
    }
    let mut changes = vec![ownership_of("studio", ResourceKind::Agent, "agent")];
    for key in [KEYS[0], REMOVED_KEY] {
        changes.extend(
            [ResourceKind::Voice, ResourceKind::HistoryItem]
                .map(|kind| ownership_of(&plain_digest(key), kind, key)),
        );
        let log = "INSERT INTO owners_passing (changes, used_at_ms, pack) VALUES (1, 1, ?1)";
        old_connection.execute(log, [plain_digest(key).as_bytes()]).unwrap();
    }
    let transaction = old_connection.transaction().unwrap();
    owners::write(&transaction, &changes, NOW).unwrap();
    transaction.commit().unwrap();
    old_connection
        .execute_batch(&format!(
            "CREATE TABLE dropped AS SELECT '{}' AS hash FROM series; DROP TABLE dropped",
            plain_digest("dropped")
        ))
        .unwrap();
}

/// Asserts that neither the file at `path` nor its log contains a plain digest.
#[track_caller]
fn check_no_plain_digest(path: &Path) {
    let log = fs::read(open::companion(path, "-wal")).unwrap_or_default();
    let content = [fs::read(path).unwrap(), log].concat();
    for key in [KEYS[0], KEYS[1], REMOVED_KEY, "dropped"] {
        let (digits, bytes) = (plain_digest(key), Sha256::digest(key.as_bytes()).to_vec());
        let contains = |part: &[u8]| content.windows(part.len()).any(|window| window == part);
        assert!(
            !contains(digits.as_bytes()) && !contains(&bytes),
            "the files must not contain the plain digest of {key}"
        );
    }
}

fn key_hashes_in(connection: &Connection, table: &str) -> Vec<String> {
    let mut statement =
        connection.prepare(&format!("SELECT key_hash FROM {table} ORDER BY key_hash")).unwrap();
    let rows = statement.query_map([], |row| row.get(0)).unwrap();
    rows.map(Result::unwrap).collect()
}

fn sort_names(mut names: Vec<String>) -> Vec<String> {
    names.sort_unstable();
    names
}

fn api_keys(keys: &[&str]) -> Vec<ApiKey> {
    keys.iter().map(|key| ApiKey::new(key).unwrap()).collect()
}

fn fingerprint(key: &str) -> String {
    Fingerprint::new(key).to_string()
}

fn retired_digest(key: &str) -> String {
    Fingerprint::replaced_plain_digest(key).unwrap().to_string()
}

#[test]
fn no_plain_digest_of_a_key_remains_in_an_older_database() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    create_version_7_database(&path);
    // The digests are removed before the file is used, even if no keys are configured.
    let store = Store::open(&location, NOW).unwrap();
    check_no_plain_digest(&path);
    drop(store);
    check_no_plain_digest(&path);
}

#[test]
fn the_state_of_a_key_in_an_older_database_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    create_version_7_database(&path);
    let mut store = Store::open(&location, NOW).unwrap();
    store.rename_keys(api_keys(&KEYS).iter());
    let expected = sort_names(vec![fingerprint(KEYS[0]), fingerprint(KEYS[1]), retired_digest(REMOVED_KEY)]);
    for table in ["keys", "hours", "outbox_keys", "attempts"] {
        assert_eq!(
            key_hashes_in(connection(&store), table),
            expected,
            "the keys in the table {table} must be renamed"
        );
    }
    let spent_credits: Vec<_> = store.read_keys().unwrap().iter().map(|key| key.quota.count).collect();
    assert_eq!(spent_credits, [40; 3]);
    let owners = |store: &Store| -> Vec<String> {
        sort_names(
            store.read_owners().unwrap().iter().map(|recorded| recorded.owner.as_str().to_owned()).collect(),
        )
    };
    let expected_owners = |names: [String; 2]| {
        sort_names(names.iter().flat_map(|name| vec![name.clone(); 2]).chain(["studio".to_owned()]).collect())
    };
    assert_eq!(owners(&store), expected_owners([fingerprint(KEYS[0]), retired_digest(REMOVED_KEY)]));
    drop(store);

    // The rows of a key are renamed when it is configured again.
    let mut store = Store::open(&location, NOW).unwrap();
    store.rename_keys(api_keys(&[REMOVED_KEY]).iter());
    assert_eq!(
        key_hashes_in(connection(&store), "keys"),
        sort_names([KEYS[0], KEYS[1], REMOVED_KEY].map(fingerprint).to_vec())
    );
    assert_eq!(owners(&store), expected_owners([fingerprint(KEYS[0]), fingerprint(REMOVED_KEY)]));
    assert_eq!(key_hashes_in(connection(&store), "retired_keys"), [""; 0]);
}

#[test]
fn a_key_with_rows_under_both_names_keeps_its_state_and_adds_its_sums() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    create_version_7_database(&path);
    let pool = pool();
    let opened = open::open(&location, NOW, IntegrityCheck::Quick).unwrap();
    let mut database = opened.database;
    // A reload has added the key, so it already has rows under its new name.
    let snapshot = pool.snapshot(NOW);
    transaction::commit(
        &mut database,
        &attempt_batch(&[record(&pool, 7)]),
        &snapshot,
        MirrorScope::Keys,
        NOW,
    )
    .unwrap();
    let same_group = "UPDATE hours SET route = '/v1/a', model = 'm' WHERE credits = 7";
    database.connection.execute_batch(same_group).unwrap();
    database.rename_keys(api_keys(&KEYS).iter());
    let connection = &database.connection;
    let query_pair = |sql: &str| {
        connection.query_row(sql, [fingerprint(KEYS[0])], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
    };
    let state: (i64, i64) = query_pair("SELECT count(*), max(character_count) FROM keys WHERE key_hash = ?1");
    assert_eq!(state, (1, 0), "the later state must be kept");
    let hour: (i64, i64) = query_pair("SELECT count(*), sum(credits) FROM hours WHERE key_hash = ?1");
    assert_eq!(hour, (1, 11));
    let outbox: (i64, i64) =
        query_pair("SELECT count(*), max(observed_at_ms) FROM outbox_keys WHERE key_hash = ?1");
    assert_eq!(outbox, (1, NOW.0 as i64));
}

#[tokio::test]
async fn the_mirror_receives_every_rename_once_and_no_full_digest() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    create_version_7_database(&path);
    let settings = Settings { mirror_scope: MirrorScope::KeysAndEvents, ..settings(8) };
    let expected_renames = |names: [(String, String); 3]| {
        let renames = names.map(|(old, new)| KeyRename { old_prefix: old[..12].to_owned(), key_hash: new });
        let mut renames = renames.to_vec();
        renames.sort_by(|left, right| left.old_prefix.cmp(&right.old_prefix));
        renames
    };
    let pool = pool();
    let mut store = Store::open(&location, NOW).unwrap();
    store.rename_keys(api_keys(&KEYS).iter());
    let (usage, mut writer_handle) = store.start_writer(Arc::clone(&pool), settings).unwrap();
    drop(usage);
    assert!(writer_handle.wait_until_written(WAIT_TIMEOUT).await);
    let outbox = writer_handle.outbox.take().unwrap();
    let batch = outbox.next_batch(10).await.unwrap();
    let expected = expected_renames([
        (plain_digest(KEYS[0]), fingerprint(KEYS[0])),
        (plain_digest(KEYS[1]), fingerprint(KEYS[1])),
        (plain_digest(REMOVED_KEY), retired_digest(REMOVED_KEY)),
    ]);
    assert_eq!(batch.renames, expected);
    let sent_rows = batch.renames.into_iter().map(RowVersion::Rename).collect();
    outbox.record_delivery(DeliveryReport { sent: sent_rows, refused: Vec::new() }).await.unwrap();
    assert_eq!(outbox.next_batch(10).await.unwrap().renames, []);
    drop(outbox);
    assert_eq!(writer_handle.wait_until_closed(WAIT_TIMEOUT).await, 0);

    let mut store = Store::open(&location, NOW).unwrap();
    store.rename_keys(api_keys(&[REMOVED_KEY]).iter());
    let (usage, mut writer_handle) = store.start_writer(pool, settings).unwrap();
    drop(usage);
    assert!(writer_handle.wait_until_written(WAIT_TIMEOUT).await);
    let outbox = writer_handle.outbox.take().unwrap();
    let renames = outbox.next_batch(10).await.unwrap().renames;
    assert_eq!(
        renames,
        [KeyRename {
            old_prefix: retired_digest(REMOVED_KEY)[..12].to_owned(),
            key_hash: fingerprint(REMOVED_KEY)
        }]
    );
}

#[test]
fn a_database_that_could_not_be_rewritten_is_rewritten_at_the_next_start() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    create_version_7_database(&path);
    // SQLite cannot truncate the log while another connection reads it.
    let reader = Connection::open(&path).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM keys").unwrap();
    drop(Store::open(&location, NOW).unwrap());
    assert!(key_names::is_wipe_due(&reader).is_err(), "the transaction must see the old state");
    reader.execute_batch("END").unwrap();
    assert!(key_names::is_wipe_due(&reader).unwrap());
    drop(reader);
    drop(Store::open(&location, NOW).unwrap());
    check_no_plain_digest(&path);
}

#[test]
fn a_new_database_needs_no_wipe_and_an_older_one_is_migrated_before_it_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    create_version_7_database(&path);
    assert!(matches!(UsageReader::open(&path), Err(ReadError::Older(_))));
    let store = Store::open(&location, NOW).unwrap();
    assert!(UsageReader::open(&path).is_ok());
    assert!(!key_names::is_wipe_due(connection(&store)).unwrap());
    let new_store = Store::open(&DatabaseLocation::Memory, NOW).unwrap();
    assert!(!key_names::is_wipe_due(connection(&new_store)).unwrap());
}
