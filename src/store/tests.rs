mod faults;
mod old_names;
mod outbox;
mod pace;
mod power;
mod series;
mod sheets;
mod sums;
mod whose;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use http::Method;
use rusqlite::Connection;

use super::pending::CommitUncertainty;
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
use crate::proxy::{AttemptRecord, CreditSource, QuotaCharge, UsageBatch};
use crate::secret::{ApiKey, Fingerprint};

const NOW: UnixMs = UnixMs(1_796_000_000_000);
const KEEPING: Keeping = Keeping { identifiers_max: 4_000, kept: Some(Duration::from_secs(30 * 24 * 3_600)) };
const KEYS: [&str; 2] = [
    "sk_canary_of_the_books_number_one_0000000000000001",
    "sk_canary_of_the_books_number_two_0000000000000002",
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
    }
}

/// An attempt that began at a moment, with an id of that time.
fn record_at(pool: &Pool, started_at: UnixMs, credits: u64) -> AttemptRecord {
    AttemptRecord { id: AttemptRecord::name(started_at), started_at, ..record(pool, credits) }
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
    &store.ledger.as_ref().unwrap().connection
}

fn sheet_of(records: &[AttemptRecord]) -> UsageBatch {
    let mut sheet = UsageBatch::default();
    records.iter().for_each(|record| sheet.add(record));
    sheet
}

/// Writes the records in one transaction.
fn write(ledger: &mut Database, records: &[AttemptRecord], mirrored: Mirrored) {
    rows::commit(ledger, &[sheet_of(records)], &[], mirrored, &mut CommitUncertainty::default(), NOW)
        .unwrap();
}

/// The path of a database in a folder that does not exist yet.
fn place(folder: &Path) -> (DatabaseLocation, PathBuf) {
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
async fn what_is_sent_is_written_before_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let (place, path) = place(folder.path());
    let pool = pool();
    let (books, writing) = Store::open(&place, NOW).unwrap().write(Arc::clone(&pool), settings(128)).unwrap();
    for credits in 0..100 {
        books.permit().await.unwrap().write(&record(&pool, credits));
    }
    drop(books);
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
    let (place, _) = place(folder.path());
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
    let (books, writing) = Store::open(&place, NOW).unwrap().write(Arc::clone(&pool), settings(8)).unwrap();
    books.keys_changed();
    drop(books);
    assert_eq!(writing.ended(WAIT_MAX).await, 0);

    let mut remembered = Store::open(&place, NOW).unwrap().remembered().unwrap();
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
    let (place, path) = place(folder.path());
    let store = Store::open(&place, NOW).unwrap();
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
fn check_set_aside(spoil: impl Fn(&Path)) {
    let folder = tempfile::tempdir().unwrap();
    let (place, path) = place(folder.path());
    drop(Store::open(&place, NOW).unwrap());
    spoil(&path);
    let broken = fs::read(&path).unwrap();
    let store = Store::open(&place, NOW).unwrap();
    let aside = store.set_aside().expect("the broken file is set aside");
    assert!(fs::read(aside).unwrap() == broken, "not a byte of it is lost");
    assert_eq!(store.remembered().unwrap(), []);
}

#[test]
fn a_file_that_is_no_database_is_set_aside() {
    check_set_aside(|path| fs::write(path, "these are not the books you are looking for").unwrap());
}

#[test]
fn a_broken_database_is_set_aside() {
    check_set_aside(|path| {
        let mut bytes = fs::read(path).unwrap();
        bytes[100..4_000].fill(0xff);
        fs::write(path, bytes).unwrap();
    });
}

#[test]
fn the_files_beside_a_broken_database_go_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let (place, path) = place(folder.path());
    drop(Store::open(&place, NOW).unwrap());
    fs::write(&path, "no database").unwrap();
    fs::write(path.with_extension("db-wal"), "its wal").unwrap();
    let aside = Store::open(&place, NOW).unwrap().set_aside().unwrap().clone();
    let wal = PathBuf::from(format!("{}-wal", aside.display()));
    assert_eq!(fs::read_to_string(wal).unwrap(), "its wal");
}

#[test]
fn a_file_of_another_program_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (place, path) = place(folder.path());
    fs::create_dir(path.parent().unwrap()).unwrap();
    fs::write(&path, "a letter").unwrap();
    // The second refusal must not mistake what the first one left for a sign of an earlier start.
    for _ in 0..2 {
        let error = Store::open(&place, NOW).unwrap_err();
        assert!(matches!(error, OpenError::Foreign { .. }) && !error.may_pass(), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "a letter");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is made beside it");
    }
}

#[tokio::test]
async fn a_database_belongs_to_one_writer_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let (place, _) = place(folder.path());
    let first = Store::open(&place, NOW).unwrap();
    let check_held = || {
        let error = Store::open(&place, NOW).unwrap_err();
        assert!(matches!(error, OpenError::InUse { pid: Some(_), .. }) && !error.may_pass(), "{error}");
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    };
    check_held();
    let (books, writing) = first.write(pool(), settings(8)).unwrap();
    check_held();
    drop(books);
    assert_eq!(writing.ended(WAIT_MAX).await, 0);
    Store::open(&place, NOW).unwrap();
}

#[test]
fn books_of_a_newer_version_are_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (place, path) = place(folder.path());
    drop(Store::open(&place, NOW).unwrap());
    Connection::open(&path).unwrap().execute_batch("PRAGMA user_version = 99").unwrap();
    let error = Store::open(&place, NOW).unwrap_err();
    assert!(matches!(error, OpenError::Newer { found: 99, .. }), "{error}");
    assert!(path.exists());
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
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
    let (place, path) = place(folder.path());
    let pool = pool();
    let (books, writing) = Store::open(&place, NOW).unwrap().write(Arc::clone(&pool), settings(8)).unwrap();
    books.permit().await.unwrap().write(&record(&pool, 1));
    drop(books);
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
