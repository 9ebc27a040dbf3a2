//! Tests of a store: queued records and the state of keys are written and read, and the database is private, contains
//! no key and has one writer. Startup quarantines corrupt files, and refuses files of other programs, newer files and
//! unusable paths. Defines the records, settings and databases that all store tests use.

mod attempt_list;
mod attempts;
mod days;
mod faults;
mod history;
mod migration;
mod old_names;
mod outbox;
mod pace;
mod power;
mod stored_owners;
mod sums;
mod upgrade;
mod users;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use http::Method;
use rusqlite::Connection;

use super::*;
use crate::elevenlabs::endpoint::Route;
use crate::elevenlabs::plan::Capabilities;
use crate::policy::authority::{Authority, Scheme};
use crate::policy::client::ClientName;
use crate::policy::evidence::RefusalSource;
use crate::policy::outcome::Outcome;
use crate::policy::quota::{Extension, Quota};
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::pool::{self, Observation, RefusedAttempt};
use crate::proxy::{AttemptRecord, CreditSource, OwnershipUpdate, QuotaCharge, UsageBatch};
use crate::secret::{ApiKey, Fingerprint};

const NOW: UnixMs = UnixMs(1_796_000_000_000);
const OWNER_LIMITS: RetentionLimits =
    RetentionLimits { max_identifiers: 4_000, max_idle: Some(Duration::from_secs(30 * 24 * 3_600)) };
const KEYS: [&str; 2] = [
    "sk_canary_of_the_store_number_one_0000000000000001",
    "sk_canary_of_the_store_number_two_0000000000000002",
];

fn pool() -> Arc<Pool> {
    let entries = KEYS.iter().map(|key| ApiKey::new(key).unwrap().into());
    Arc::new(Pool::new(entries.collect(), pool::Settings::FOR_TESTS))
}

fn record(pool: &Pool, credits: u64) -> AttemptRecord {
    AttemptRecord {
        id: AttemptRecord::new_id(NOW),
        request_id: "request".into(),
        number: 1,
        started_at: NOW,
        client: ClientName::new("local"),
        user: None,
        authority: Arc::new(Authority::new(Scheme::Https, "api.elevenlabs.io", 443, "").unwrap()),
        key: Some(Arc::clone(&pool.roster().keys()[0])),
        method: Method::POST,
        route: Route::parse("/v1/text-to-speech/{id}"),
        model: Some("eleven_v3".into()),
        audio: None,
        characters: Some(credits),
        credits_reserved: None,
        status: Some(200),
        outcome: Outcome::Served,
        request_bytes: 1,
        response_bytes: 2,
        credits,
        quota: QuotaCharge { requests: 1, credits, replaced: 0 },
        credits_from: CreditSource::Reported,
        first_byte: Some(Duration::from_millis(3)),
        total: Duration::from_millis(4),
        is_price_update: false,
    }
}

/// Returns an attempt that started at `started_at`, with an id of the same time.
fn record_started_at(pool: &Pool, started_at: UnixMs, credits: u64) -> AttemptRecord {
    AttemptRecord { id: AttemptRecord::new_id(started_at), started_at, ..record(pool, credits) }
}

/// Returns the record that adds the price of an attempt later.
fn late_price(record: &AttemptRecord, credits: u64) -> AttemptRecord {
    AttemptRecord { credits, credits_from: CreditSource::Reported, is_price_update: true, ..record.clone() }
}

const WAIT_TIMEOUT: Duration = Duration::from_secs(30);

fn settings(max_queued_records: usize) -> Settings {
    Settings {
        max_queued_records,
        // At low rates, the interval between commits is a fifth of this value.
        commit_interval: Duration::from_millis(250),
        retention: Retention::default(),
        mirror_scope: MirrorScope::Nothing,
        owner_limits: OWNER_LIMITS,
    }
}

fn connection(store: &Store) -> &Connection {
    &store.database.as_ref().unwrap().connection
}

fn attempt_batch(attempts: &[AttemptRecord]) -> UsageBatch {
    UsageBatch { attempts: attempts.to_vec(), ..UsageBatch::default() }
}

fn ownership_batch(owners: Vec<OwnershipUpdate>) -> UsageBatch {
    UsageBatch { owners, ..UsageBatch::default() }
}

/// Writes the records in one transaction.
fn write(database: &mut Database, records: &[AttemptRecord], mirror_scope: MirrorScope) {
    transaction::commit(database, &attempt_batch(records), &[], mirror_scope, NOW).unwrap();
}

/// Returns the receiver of a channel whose sender was dropped, so that it receives no command.
fn no_history_commands() -> tokio::sync::mpsc::Receiver<crate::store::history::HistoryCommand> {
    tokio::sync::mpsc::channel(1).1
}

fn open_database(location: &DatabaseLocation) -> Database {
    open::open(location, NOW, IntegrityCheck::Quick).unwrap().database
}

fn query_number(connection: &Connection, sql: &str) -> i64 {
    connection.query_row(sql, [], |row| row.get(0)).unwrap()
}

/// Returns the location and the path of a database in a directory that does not exist yet.
fn location(directory: &Path) -> (DatabaseLocation, PathBuf) {
    let path = directory.join("state").join("keychoir.db");
    (DatabaseLocation::File(path.clone()), path)
}

/// Returns the key hash and the credits of each attempt.
fn read_attempts(path: &Path) -> Vec<(String, i64)> {
    let connection = Connection::open(path).unwrap();
    let mut statement = connection.prepare("SELECT key_hash, credits FROM attempts ORDER BY id").unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.map(Result::unwrap).collect()
}

#[tokio::test]
async fn queued_records_are_written_before_the_writer_ends() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    let (usage, writer_handle) =
        Store::open(&location, NOW).unwrap().start_writer(Arc::clone(&pool), settings(128)).unwrap();
    for credits in 0..100 {
        usage.acquire_permit().await.unwrap().write(record(&pool, credits));
    }
    drop(usage);
    assert_eq!(writer_handle.wait_until_closed(WAIT_TIMEOUT).await, 0);
    let hash = ApiKey::new(KEYS[0]).unwrap().fingerprint().to_string();
    let attempts = read_attempts(&path);
    assert_eq!(attempts.len(), 100);
    assert!(attempts.iter().all(|(key_hash, _)| *key_hash == hash));
    assert_eq!(attempts.iter().map(|(_, credits)| credits).sum::<i64>(), 4_950);
}

/// Records that the provider refused the second key as invalid.
fn refuse_second_key(pool: &Pool, now: UnixMs) {
    let roster = pool.roster();
    let source =
        RefusalSource { status: Some(401), message: "invalid_api_key".into(), ..RefusalSource::default() };
    let refused =
        RefusedAttempt { verdict: Verdict::InvalidKey, request: None, is_repeated_elsewhere: false, source };
    pool.record_refusal(&roster, &roster.keys()[1], refused, now);
}

#[tokio::test]
async fn keys_are_read_as_they_were_written() {
    let directory = tempfile::tempdir().unwrap();
    let (location, _) = location(directory.path());
    let pool = pool();
    let roster = pool.roster();
    let quota = Quota {
        count: 7,
        limit: Some(10),
        extension: Extension::Unlimited,
        resets_at: Some(UnixMs(NOW.0 * 2)),
    };
    let capabilities = Capabilities::default();
    let observation = Observation::Quota { quota, tier: None, is_paid: None, capabilities };
    pool.observe(&roster, &roster.keys()[0], observation, NOW);
    refuse_second_key(&pool, NOW);
    let (usage, writer_handle) =
        Store::open(&location, NOW).unwrap().start_writer(Arc::clone(&pool), settings(8)).unwrap();
    usage.request_key_state_write();
    drop(usage);
    assert_eq!(writer_handle.wait_until_closed(WAIT_TIMEOUT).await, 0);

    let mut restored_keys = Store::open(&location, NOW).unwrap().read_keys().unwrap();
    restored_keys.sort_by_key(|key| key.quota.limit.is_none());
    let fingerprint_of = |key| ApiKey::new(key).unwrap().fingerprint();
    assert_eq!(
        restored_keys,
        [
            RestoredKey {
                fingerprint: fingerprint_of(KEYS[0]),
                quota,
                tier: None,
                key_evidence: vec![],
                workspace_evidence: vec![]
            },
            RestoredKey {
                fingerprint: fingerprint_of(KEYS[1]),
                quota: Quota::default(),
                tier: None,
                key_evidence: roster.keys()[1].evidence(),
                workspace_evidence: vec![],
            },
        ]
    );
}

#[test]
fn the_database_is_private_and_flushed_at_every_commit() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let store = Store::open(&location, NOW).unwrap();
    let mode_of = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode_of(path.parent().unwrap()), mode_of(&path)), (0o700, 0o600));
    let read_pragma = |name: &str| -> String {
        let read_value = |row: &rusqlite::Row<'_>| row.get::<_, rusqlite::types::Value>(0);
        format!("{:?}", connection(&store).query_row(&format!("PRAGMA {name}"), [], read_value).unwrap())
    };
    assert_eq!(
        (read_pragma("journal_mode"), read_pragma("synchronous")),
        ("Text(\"wal\")".to_owned(), "Integer(2)".to_owned())
    );
    assert_eq!(read_pragma("busy_timeout"), "Integer(500)", "writes must not wait long for a lock");
    assert!(
        rusqlite::version_number() >= 3_051_003,
        "SQLite {} must not be older than version 3.51.3",
        rusqlite::version()
    );
}

/// Asserts that startup renames a database after `corrupt` has changed it, and creates a new one.
#[track_caller]
fn check_quarantine(corrupt: impl Fn(&Path)) {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    drop(Store::open(&location, NOW).unwrap());
    corrupt(&path);
    let corrupt_content = fs::read(&path).unwrap();
    let store = Store::open(&location, NOW).unwrap();
    let quarantined = store.quarantined_path().expect("the corrupt file must be renamed");
    assert!(fs::read(quarantined).unwrap() == corrupt_content, "the renamed file must be unchanged");
    assert_eq!(store.read_keys().unwrap(), []);
}

#[test]
fn a_file_that_is_not_a_database_is_quarantined() {
    check_quarantine(|path| fs::write(path, "a text file").unwrap());
}

#[test]
fn a_corrupt_database_is_quarantined() {
    check_quarantine(|path| {
        let mut bytes = fs::read(path).unwrap();
        bytes[100..4_000].fill(0xff);
        fs::write(path, bytes).unwrap();
    });
}

#[test]
fn the_files_next_to_a_corrupt_database_are_quarantined_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    drop(Store::open(&location, NOW).unwrap());
    fs::write(&path, "a text file").unwrap();
    fs::write(path.with_extension("db-wal"), "a log").unwrap();
    let quarantined = Store::open(&location, NOW).unwrap().quarantined_path().unwrap().clone();
    let wal = PathBuf::from(format!("{}-wal", quarantined.display()));
    assert_eq!(fs::read_to_string(wal).unwrap(), "a log");
}

#[test]
fn a_file_of_another_program_is_refused_and_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    fs::create_dir(path.parent().unwrap()).unwrap();
    fs::write(&path, "a text file").unwrap();
    // The first refusal must not create a lock file, which would make the second start replace the file.
    for _ in 0..2 {
        let error = Store::open(&location, NOW).unwrap_err();
        assert!(
            matches!(error, OpenError::Foreign { .. }) && !error.is_temporary(),
            "the file must be refused as one of another program: {error}"
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "a text file");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no other file may be created");
    }
}

#[tokio::test]
async fn a_database_has_one_writer_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let (location, _) = location(directory.path());
    let first = Store::open(&location, NOW).unwrap();
    let assert_locked = || {
        let error = Store::open(&location, NOW).unwrap_err();
        assert!(
            matches!(error, OpenError::InUse { pid: Some(_), .. }) && !error.is_temporary(),
            "the database must be in use: {error}"
        );
        assert!(
            error.to_string().contains(&format!("process {}", std::process::id())),
            "the error must contain the id of this process: {error}"
        );
    };
    assert_locked();
    let (usage, writer_handle) = first.start_writer(pool(), settings(8)).unwrap();
    assert_locked();
    drop(usage);
    assert_eq!(writer_handle.wait_until_closed(WAIT_TIMEOUT).await, 0);
    Store::open(&location, NOW).unwrap();
}

#[test]
fn a_database_of_a_newer_version_is_refused_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    drop(Store::open(&location, NOW).unwrap());
    Connection::open(&path).unwrap().execute_batch("PRAGMA user_version = 99").unwrap();
    let error = Store::open(&location, NOW).unwrap_err();
    assert!(matches!(error, OpenError::Newer { version: 99, .. }), "the version must be refused: {error}");
    assert!(path.exists());
}

#[test]
fn an_error_names_the_path_that_cannot_be_written() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let path = file.join("keychoir.db");
    let error = Store::open(&DatabaseLocation::File(path.clone()), NOW).unwrap_err();
    assert!(matches!(&error, OpenError::Unwritable { .. }), "the path must be unwritable: {error}");
    assert!(error.to_string().contains(&path.display().to_string()));
}

#[tokio::test]
async fn no_key_is_in_the_database() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    let (usage, writer_handle) =
        Store::open(&location, NOW).unwrap().start_writer(Arc::clone(&pool), settings(8)).unwrap();
    usage.acquire_permit().await.unwrap().write(record(&pool, 1));
    drop(usage);
    assert_eq!(writer_handle.wait_until_closed(WAIT_TIMEOUT).await, 0);
    for file in fs::read_dir(path.parent().unwrap()).unwrap() {
        let bytes = fs::read(file.unwrap().path()).unwrap();
        for key in KEYS {
            // The short form contains the first and last characters; the characters in between are secret.
            let secret = &key.as_bytes()[11..key.len() - 5];
            assert!(
                !bytes.windows(secret.len()).any(|window| window == secret),
                "a database file must not contain a key"
            );
        }
    }
}
