//! Tests `keychoir db backup` under load, the restore of a backup, the files that a backup must not replace, and the
//! upgrade of a database of an earlier version by `keychoir db migrate` and at startup.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use keychoir::simulator::{Plan, Simulator};
use serde_json::Value;

use crate::support::program::{Program, keychoir_command, run, stderr};

const KEY: &str = "sk_key_number_one_000000000000000000000000000000001";
const SPEECH_PATH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM";

fn serve_command(database: &Path, upstream: &str) -> Command {
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    command
        .env("ELEVENLABS_API_KEYS", KEY)
        .env("KEYCHOIR_STORAGE__PATH", database)
        .env("KEYCHOIR_UPSTREAM__BASE_URL", upstream)
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
        .env("KEYCHOIR_LOG__FORMAT", "json");
    command
}

fn run_db_command(database: &Path, arguments: &[&str]) -> Output {
    run(keychoir_command(&[&["db"], arguments].concat()).env("KEYCHOIR_STORAGE__PATH", database))
}

#[track_caller]
fn parse_json_output(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Returns the sums that `keychoir usage` prints.
fn read_usage(database: &Path) -> Value {
    let output = run(keychoir_command(&["usage", "--json"]).env("KEYCHOIR_STORAGE__PATH", database));
    parse_json_output(&output)["total"].clone()
}

/// Returns the id and the credits of each attempt.
fn read_attempts(database: &Path) -> Vec<(String, i64)> {
    let connection = rusqlite::Connection::open(database).unwrap();
    let mut statement = connection.prepare("SELECT id, credits FROM attempts ORDER BY id").unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.map(Result::unwrap).collect()
}

async fn request_speech(client: &reqwest::Client, address: &str) {
    let body = serde_json::json!({"text": "hello", "model_id": "eleven_multilingual_v2"});
    let response = client.post(format!("http://{address}{SPEECH_PATH}")).json(&body).send().await.unwrap();
    assert_eq!(response.status(), 200);
    response.bytes().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_under_load_is_restored_with_all_its_records() {
    let directory = tempfile::tempdir().unwrap();
    let (database, copy) = (directory.path().join("keychoir.db"), directory.path().join("backup.db"));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let simulator = Simulator::start(listener, Plan::with_keys([(KEY, 10_000_000)])).await.unwrap();
    let upstream = simulator.base_url();
    let mut program = Program::start(&mut serve_command(&database, &upstream));
    let address = program.wait_for_address();
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let (stop, served_count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let traffic = keychoir::tasks::Tasks::new().spawn({
        let (stop, served_count, client) = (Arc::clone(&stop), Arc::clone(&served_count), client.clone());
        async move {
            while !stop.load(Ordering::Acquire) {
                request_speech(&client, &address).await;
                served_count.fetch_add(1, Ordering::Release);
            }
        }
    });
    // The first copies may precede the first records.
    let backup = loop {
        let (database, copy) = (database.clone(), copy.clone());
        let arguments = ["backup", copy.to_str().unwrap(), "--force", "--json"];
        let backup =
            tokio::task::block_in_place(|| parse_json_output(&run_db_command(&database, &arguments)));
        if backup["attempts"].as_u64().unwrap() > 20 {
            break backup;
        }
    };
    let count_at_backup = served_count.load(Ordering::Acquire);
    while served_count.load(Ordering::Acquire) < count_at_backup + 20 {
        tokio::task::yield_now().await;
    }
    stop.store(true, Ordering::Release);
    traffic.await.unwrap();
    assert_eq!(program.terminate().0, Some(0));

    let (final_attempts, copied_attempts) = (read_attempts(&database), read_attempts(&copy));
    assert_eq!(copied_attempts.len() as u64, backup["attempts"]);
    assert!(copied_attempts.len() < final_attempts.len(), "requests must be recorded after the backup");
    assert!(
        copied_attempts.iter().all(|attempt| final_attempts.contains(attempt)),
        "the copy must contain only records of real requests"
    );
    let sums = read_usage(&copy);
    assert_eq!(sums["attempts"], backup["attempts"], "the sums and the attempts must be of the same moment");

    // These are the steps of the restore in docs/operations.md.
    for suffix in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(directory.path().join(format!("keychoir.db{suffix}")));
    }
    fs::copy(&copy, &database).unwrap();
    let mut program = Program::start(&mut serve_command(&database, &upstream));
    let address = program.wait_for_address();
    assert_eq!((read_attempts(&database), read_usage(&database)), (copied_attempts.clone(), sums));
    request_speech(&client, &address).await;
    assert_eq!(program.terminate().0, Some(0));
    assert_eq!(read_attempts(&database).len(), copied_attempts.len() + 1);
    simulator.stop().await;
}

#[test]
fn a_backup_refuses_to_replace_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let (database, copy) = (directory.path().join("keychoir.db"), directory.path().join("backup.db"));
    let output = run_db_command(&database, &["backup", copy.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("there is no database at"),
        "the error message must contain `there is no database at`: {}",
        stderr(&output)
    );
    create_version_1_file(&database);
    fs::write(&copy, "important").unwrap();
    let output = run_db_command(&database, &["backup", copy.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("--force"),
        "the error message must contain `--force`: {}",
        stderr(&output)
    );
    assert_eq!(fs::read_to_string(&copy).unwrap(), "important");
    // The files next to the database belong to it, whether they exist or not.
    for name in ["keychoir.db", "keychoir.db-wal", "keychoir.db-shm", "keychoir.db.lock", "managed.toml"] {
        let content_before = fs::read(directory.path().join(name)).ok();
        let target = directory.path().join(name);
        let output = run_db_command(&database, &["backup", "--force", target.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{name}: the command must fail");
        assert!(
            stderr(&output).contains("belongs to the database"),
            "{name}: the error message must contain `belongs to the database`: {}",
            stderr(&output)
        );
        assert_eq!(
            fs::read(&target).ok(),
            content_before,
            "{name}: a refused backup must not change the file"
        );
    }
    let output = run_db_command(&database, &["backup", "--force", copy.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
    assert!(String::from_utf8(output.stdout).unwrap().contains("1 attempts"));
}

/// Creates a database as the first version of Keychoir did, with one attempt.
fn create_version_1_file(path: &Path) {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection
        .execute_batch(
            "CREATE TABLE keys (key_hash TEXT PRIMARY KEY, short_key TEXT NOT NULL, name TEXT, workspace TEXT,
                position INTEGER NOT NULL, status TEXT NOT NULL, character_count INTEGER NOT NULL,
                character_limit INTEGER, extension INTEGER, resets_at_ms INTEGER, park_reason TEXT,
                park_until_ms INTEGER, workspace_park_reason TEXT, workspace_park_until_ms INTEGER,
                updated_at_ms INTEGER NOT NULL) STRICT;
             CREATE TABLE attempts (id TEXT PRIMARY KEY, request_id TEXT NOT NULL, number INTEGER NOT NULL,
                started_at_ms INTEGER NOT NULL, client TEXT NOT NULL, key_hash TEXT NOT NULL, workspace TEXT,
                method TEXT NOT NULL, route TEXT NOT NULL, status INTEGER, verdict TEXT NOT NULL,
                request_bytes INTEGER NOT NULL, response_bytes INTEGER NOT NULL, credits INTEGER NOT NULL,
                credits_from TEXT NOT NULL, first_byte_ms INTEGER, total_ms INTEGER NOT NULL) STRICT, WITHOUT ROWID;
             CREATE INDEX attempts_by_time ON attempts (started_at_ms);
             INSERT INTO attempts VALUES ('a1', 'r1', 1, 1795955073908, 'local', 'own', NULL, 'GET', '/v1/models', 200,
                'served', 0, 5, 7, 'answer', 1, 2);
             PRAGMA user_version = 1",
        )
        .unwrap();
}

#[test]
fn a_start_upgrades_a_copied_database_and_logs_it() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("keychoir.db");
    create_version_1_file(&database);
    let dry_run = parse_json_output(&run_db_command(&database, &["migrate", "--dry-run", "--json"]));
    assert_eq!((&dry_run["from"], &dry_run["attempts_after"]), (&1.into(), &1.into()));
    let mut program = Program::start(&mut serve_command(&database, "http://127.0.0.1:9"));
    let copy = program.wait_for_event("database_migrating")["copy"].as_str().unwrap().to_owned();
    assert_eq!(copy, format!("{}.before-1", database.display()));
    let migrated = program.wait_for_event("database_migrated");
    assert_eq!((&migrated["from"], &migrated["to"]), (&dry_run["from"], &dry_run["to"]));
    program.wait_for_address();
    let output = run_db_command(&database, &["migrate"]);
    assert_eq!(
        output.status.code(),
        Some(0),
        "a second upgrade must have nothing to do: {}",
        stderr(&output)
    );
    assert_eq!(program.terminate().0, Some(0));
    assert_eq!(read_attempts(&database), [("a1".to_owned(), 7)]);
    assert_eq!(read_attempts(Path::new(&copy)), [("a1".to_owned(), 7)]);
    // The copy can be upgraded too.
    let output = run(&mut keychoir_command(&["db", "migrate", "--file", &copy]));
    assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("from schema 1 to") && text.contains("Attempts before 1, after 1"),
        "the output must describe the upgrade: {text}"
    );
}

#[test]
fn an_upgrade_without_its_copy_is_refused_with_advice() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("keychoir.db");
    create_version_1_file(&database);
    fs::create_dir(directory.path().join("keychoir.db.before-1")).unwrap();
    let (code, text) = Program::start(&mut serve_command(&database, "http://127.0.0.1:9")).wait_for_exit();
    assert_eq!(code, Some(78), "the program must refuse the upgrade: {text}");
    assert!(
        text.contains("needs a copy of it") && text.contains("Nothing was changed"),
        "the log must explain the refusal: {text}"
    );
    assert!(!text.contains("storage.ephemeral"), "the log must not suggest `storage.ephemeral`: {text}");
    assert_eq!(read_attempts(&database), [("a1".to_owned(), 7)]);
}
