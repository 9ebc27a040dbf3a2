mod attempts;
mod faults;
mod migration;
mod old_names;
mod outbox;
mod pace;
mod power;
mod stored_owners;
mod sums;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use http::Method;
use rusqlite::Connection;

use super::*;
use crate::elevenlabs::endpoint::Route;
use crate::elevenlabs::plan::Capabilities;
use crate::policy::budget::{Extension, Quota};
use crate::policy::client::ClientName;
use crate::policy::evidence::RefusalSource;
use crate::policy::outcome::Outcome;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::pool::{self, Observation, Refused};
use crate::proxy::{AttemptRecord, CreditSource, OwnershipUpdate, QuotaCharge, UsageBatch};
use crate::secret::{ApiKey, Fingerprint};

const NOW: UnixMs = UnixMs(1_796_000_000_000);
const KEEPING: Keeping = Keeping { identifiers_max: 4_000, kept: Some(Duration::from_secs(30 * 24 * 3_600)) };
const KEYS: [&str; 2] = [
    "sk_canary_of_the_store_number_one_0000000000000001",
    "sk_canary_of_the_store_number_two_0000000000000002",
];

fn pool() -> Arc<Pool> {
    let entries = KEYS.iter().map(|key| ApiKey::new(key).unwrap().into());
    Arc::new(Pool::new(entries.collect(), pool::Settings::STILL))
}

fn record(pool: &Pool, credits: u64) -> AttemptRecord {
    AttemptRecord {
        id: AttemptRecord::name(NOW),
        request_id: "request".into(),
        number: 1,
        started_at: NOW,
        client: ClientName::new("local"),
        key: Some(Arc::clone(&pool.roster().keys()[0])),
        method: Method::POST,
        route: Route::read("/v1/text-to-speech/{id}"),
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
        credits_from: CreditSource::Answer,
        first_byte: Some(Duration::from_millis(3)),
        total: Duration::from_millis(4),
        is_price: false,
    }
}

/// An attempt that began at a moment, with an id of that time.
fn record_at(pool: &Pool, started_at: UnixMs, credits: u64) -> AttemptRecord {
    AttemptRecord { id: AttemptRecord::name(started_at), started_at, ..record(pool, credits) }
}

/// The record that adds the price of an attempt.
fn priced(record: &AttemptRecord, credits: u64) -> AttemptRecord {
    AttemptRecord { credits, credits_from: CreditSource::Answer, is_price: true, ..record.clone() }
}

const WAIT_MAX: Duration = Duration::from_secs(30);

fn settings(queue_max: usize) -> Settings {
    Settings {
        queue_max,
        // Slow commits take up to a fifth of this interval.
        commit_interval: Duration::from_millis(250),
        retention: Retention::default(),
        mirrored: Mirrored::Nothing,
        owners: KEEPING,
    }
}

fn connection(store: &Store) -> &Connection {
    &store.database.as_ref().unwrap().connection
}

fn batch_of(attempts: &[AttemptRecord]) -> UsageBatch {
    UsageBatch { attempts: attempts.to_vec(), ..UsageBatch::default() }
}

fn batch_of_owners(owners: Vec<OwnershipUpdate>) -> UsageBatch {
    UsageBatch { owners, ..UsageBatch::default() }
}

/// Writes the records in one transaction.
fn write(database: &mut Database, records: &[AttemptRecord], mirrored: Mirrored) {
    rows::commit(database, &batch_of(records), &[], mirrored, NOW).unwrap();
}

fn opened(location: &DatabaseLocation) -> Database {
    open::open(location, NOW, IntegrityCheck::Quick).unwrap().database
}

fn number(connection: &Connection, sql: &str) -> i64 {
    connection.query_row(sql, [], |row| row.get(0)).unwrap()
}

/// The path of a database in a folder that does not exist yet.
fn location(folder: &Path) -> (DatabaseLocation, PathBuf) {
    let path = folder.join("state").join("keychoir.db");
    (DatabaseLocation::File(path.clone()), path)
}

fn attempts(path: &Path) -> Vec<(String, i64)> {
    let connection = Connection::open(path).unwrap();
    let mut statement = connection.prepare("SELECT key_hash, credits FROM attempts ORDER BY id").unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.map(Result::unwrap).collect()
}

#[tokio::test]
async fn sent_records_are_written_before_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let pool = pool();
    let (usage, writing) =
        Store::open(&location, NOW).unwrap().write(Arc::clone(&pool), settings(128)).unwrap();
    for credits in 0..100 {
        usage.permit().await.unwrap().write(record(&pool, credits));
    }
    drop(usage);
    assert_eq!(writing.ended(WAIT_MAX).await, 0);
    let hash = ApiKey::new(KEYS[0]).unwrap().fingerprint().to_string();
    let written = attempts(&path);
    assert_eq!(written.len(), 100);
    assert!(written.iter().all(|(key, _)| *key == hash));
    assert_eq!(written.iter().map(|(_, credits)| credits).sum::<i64>(), 4_950);
}

/// Refuses the second key as invalid.
fn refuse(pool: &Pool, now: UnixMs) {
    let roster = pool.roster();
    let source =
        RefusalSource { status: Some(401), words: "invalid_api_key".into(), ..RefusalSource::default() };
    let refused = Refused { verdict: Verdict::InvalidKey, request: None, is_agreed: false, source };
    pool.record_refusal(&roster, &roster.keys()[1], refused, now);
}

#[tokio::test]
async fn keys_are_read_back_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let (location, _) = location(folder.path());
    let pool = pool();
    let roster = pool.roster();
    let quota = Quota {
        count: 7,
        limit: Some(10),
        extension: Extension::Unlimited,
        resets_at: Some(UnixMs(NOW.0 * 2)),
    };
    let capabilities = Capabilities::default();
    let seen = Observation::Quota { quota, tier: None, is_paid: None, capabilities };
    pool.observe(&roster, &roster.keys()[0], seen, NOW);
    refuse(&pool, NOW);
    let (usage, writing) =
        Store::open(&location, NOW).unwrap().write(Arc::clone(&pool), settings(8)).unwrap();
    usage.keys_changed();
    drop(usage);
    assert_eq!(writing.ended(WAIT_MAX).await, 0);

    let mut remembered = Store::open(&location, NOW).unwrap().remembered().unwrap();
    remembered.sort_by_key(|known| known.quota.limit.is_none());
    let print = |key| ApiKey::new(key).unwrap().fingerprint();
    assert_eq!(
        remembered,
        [
            RestoredKey {
                fingerprint: print(KEYS[0]),
                quota,
                tier: None,
                of_key: vec![],
                of_workspace: vec![]
            },
            RestoredKey {
                fingerprint: print(KEYS[1]),
                quota: Quota::default(),
                tier: None,
                of_key: roster.keys()[1].evidence(),
                of_workspace: vec![],
            },
        ]
    );
}

#[test]
fn the_file_is_private_and_safe_against_a_power_cut() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let store = Store::open(&location, NOW).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(path.parent().unwrap()), mode(&path)), (0o700, 0o600));
    let pragma = |name: &str| -> String {
        let text = |row: &rusqlite::Row<'_>| row.get::<_, rusqlite::types::Value>(0);
        format!("{:?}", connection(&store).query_row(&format!("PRAGMA {name}"), [], text).unwrap())
    };
    assert_eq!(
        (pragma("journal_mode"), pragma("synchronous")),
        ("Text(\"wal\")".to_owned(), "Integer(2)".to_owned())
    );
    assert_eq!(pragma("busy_timeout"), "Integer(500)", "the queue does not wait long for a lock");
    assert!(rusqlite::version_number() >= 3_051_003, "{}", rusqlite::version());
}

#[track_caller]
fn check_quarantine(spoil: impl Fn(&Path)) {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    drop(Store::open(&location, NOW).unwrap());
    spoil(&path);
    let broken = fs::read(&path).unwrap();
    let store = Store::open(&location, NOW).unwrap();
    let quarantined = store.quarantined().expect("the broken file is quarantined");
    assert!(fs::read(quarantined).unwrap() == broken, "the file is complete");
    assert_eq!(store.remembered().unwrap(), []);
}

#[test]
fn a_file_that_is_no_database_is_quarantined() {
    check_quarantine(|path| fs::write(path, "these are not the books you are looking for").unwrap());
}

#[test]
fn a_broken_database_is_quarantined() {
    check_quarantine(|path| {
        let mut bytes = fs::read(path).unwrap();
        bytes[100..4_000].fill(0xff);
        fs::write(path, bytes).unwrap();
    });
}

#[test]
fn the_files_beside_a_broken_database_are_quarantined_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    drop(Store::open(&location, NOW).unwrap());
    fs::write(&path, "no database").unwrap();
    fs::write(path.with_extension("db-wal"), "its wal").unwrap();
    let quarantined = Store::open(&location, NOW).unwrap().quarantined().unwrap().clone();
    let wal = PathBuf::from(format!("{}-wal", quarantined.display()));
    assert_eq!(fs::read_to_string(wal).unwrap(), "its wal");
}

#[test]
fn a_file_of_another_program_is_refused_and_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    fs::create_dir(path.parent().unwrap()).unwrap();
    fs::write(&path, "a letter").unwrap();
    // The first refusal must not leave a file that the second one takes for a sign of an earlier start.
    for _ in 0..2 {
        let error = Store::open(&location, NOW).unwrap_err();
        assert!(matches!(error, OpenError::Foreign { .. }) && !error.may_pass(), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "a letter");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no other file is created");
    }
}

#[tokio::test]
async fn a_database_belongs_to_one_writer_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let (location, _) = location(folder.path());
    let first = Store::open(&location, NOW).unwrap();
    let check_held = || {
        let error = Store::open(&location, NOW).unwrap_err();
        assert!(matches!(error, OpenError::InUse { pid: Some(_), .. }) && !error.may_pass(), "{error}");
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    };
    check_held();
    let (usage, writing) = first.write(pool(), settings(8)).unwrap();
    check_held();
    drop(usage);
    assert_eq!(writing.ended(WAIT_MAX).await, 0);
    Store::open(&location, NOW).unwrap();
}

#[test]
fn a_database_of_a_newer_version_is_refused_and_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    drop(Store::open(&location, NOW).unwrap());
    Connection::open(&path).unwrap().execute_batch("PRAGMA user_version = 99").unwrap();
    let error = Store::open(&location, NOW).unwrap_err();
    assert!(matches!(error, OpenError::Newer { version: 99, .. }), "{error}");
    assert!(path.exists());
}

#[test]
fn a_path_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let path = file.join("keychoir.db");
    let error = Store::open(&DatabaseLocation::File(path.clone()), NOW).unwrap_err();
    assert!(matches!(&error, OpenError::Unwritable { .. }), "{error}");
    assert!(error.to_string().contains(&path.display().to_string()));
}

#[tokio::test]
async fn no_key_is_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let pool = pool();
    let (usage, writing) =
        Store::open(&location, NOW).unwrap().write(Arc::clone(&pool), settings(8)).unwrap();
    usage.permit().await.unwrap().write(record(&pool, 1));
    drop(usage);
    assert_eq!(writing.ended(WAIT_MAX).await, 0);
    for file in fs::read_dir(path.parent().unwrap()).unwrap() {
        let bytes = fs::read(file.unwrap().path()).unwrap();
        for key in KEYS {
            // The first and last characters are shown on purpose; the characters in between never
            // are.
            let secret = &key.as_bytes()[11..key.len() - 5];
            assert!(!bytes.windows(secret.len()).any(|window| window == secret));
        }
    }
}
