//! Kills the binary under load, or limits the size of its files like a full disk, and checks the usage records. After
//! each kill, the database must be intact, contain all records of earlier rounds and no record twice, and lack only the
//! last records of each client. At the file size limit, Keychoir must serve requests and report the failure. After the
//! limit is removed, it must write all records.
//!
//! `KEYCHOIR_KILLS` is the number of kills (5 by default, 100 in `make faults`). The test prints the number of lost
//! records and the age of the oldest one. The expected maximum of this age is `storage.commit_interval`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test panics if an expectation fails, and the measured values are printed"
)]

mod support;

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use keychoir::clock;
use keychoir::simulator::{Plan, Simulator};
use rusqlite::Connection;
use serde_json::{Value, json};
use support::program::{Program, keychoir_command};
use support::{FIRST_KEY, SECOND_KEY, SPEECH_PATH, bind_loopback, join_all, wait_until};

/// The number of clients that send requests at the same time.
const CLIENTS: usize = 8;

/// Configures a command that runs the binary in front of the simulator, with its database at `database`.
fn configure_command(mut command: Command, simulator: &Simulator, database: &Path) -> Command {
    command
        .env("KEYCHOIR_STORAGE__PATH", database)
        .env("KEYCHOIR_SERVER__TLS", "off")
        .env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url())
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
        .env("KEYCHOIR_LOG__FORMAT", "json")
        .env("KEYCHOIR_LOG__LEVEL", "warn,keychoir::cli=info,keychoir::store=info")
        .env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY},{SECOND_KEY}"));
    command
}

async fn start_simulator() -> Simulator {
    Simulator::start(bind_loopback().await, Plan::with_keys([(FIRST_KEY, 1 << 40), (SECOND_KEY, 1 << 40)]))
        .await
        .unwrap()
}

fn http_client() -> reqwest::Client {
    keychoir::upstream::http_client().unwrap().build().unwrap()
}

/// Sends a speech request with the ID `request_id`. Returns whether the response was complete.
async fn request_speech(client: &reqwest::Client, url: &str, request_id: &str) -> bool {
    let body = json!({"text": "a".repeat(7), "model_id": "eleven_v3"});
    let request = client.post(format!("{url}{SPEECH_PATH}")).header("x-request-id", request_id).json(&body);
    match request.send().await {
        Ok(response) => response.status() == 200 && response.bytes().await.is_ok(),
        Err(_) => false,
    }
}

/// Sends requests in sequence until one fails. Returns the IDs of the successful requests with the times of
/// their ends.
async fn send_until_failure(
    url: &str,
    id_prefix: String,
    response_count: &AtomicUsize,
) -> Vec<(String, Instant)> {
    let client = http_client();
    let mut completed_requests = Vec::new();
    loop {
        let request_id = format!("{id_prefix}-{}", completed_requests.len());
        if !request_speech(&client, url, &request_id).await {
            return completed_requests;
        }
        completed_requests.push((request_id, clock::instant()));
        response_count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Returns the IDs of the recorded requests, after a check of the database. The function reads a copy, because an
/// opened database would be recovered, which only Keychoir may do with the original.
fn recorded_ids(database: &Path) -> HashSet<String> {
    let directory = tempfile::tempdir().unwrap();
    for suffix in ["", "-wal"] {
        let source = format!("{}{suffix}", database.display());
        if Path::new(&source).exists() {
            fs::copy(source, directory.path().join(format!("copy.db{suffix}"))).unwrap();
        }
    }
    let connection = Connection::open(directory.path().join("copy.db")).unwrap();
    let integrity: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(integrity, "ok", "the database must be intact");
    let count_and_sum = |sql: &str| -> (i64, i64) {
        connection.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
    };
    let attempts = count_and_sum("SELECT count(*), coalesce(sum(credits), 0) FROM attempts");
    assert_eq!(
        count_and_sum("SELECT coalesce(sum(attempts), 0), coalesce(sum(credits), 0) FROM hours"),
        attempts,
        "the hourly sums must be committed together with the attempts"
    );
    let mut statement = connection.prepare("SELECT request_id FROM attempts").unwrap();
    let ids: Vec<String> = statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    let unique_ids: HashSet<String> = ids.iter().cloned().collect();
    assert_eq!(unique_ids.len(), ids.len(), "no request must be recorded twice");
    unique_ids
}

#[tokio::test]
async fn a_killed_program_keeps_its_committed_records_without_duplicates() {
    let kills: usize = std::env::var("KEYCHOIR_KILLS").map_or(5, |count| count.parse().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("keychoir.db");
    let simulator = start_simulator().await;
    let mut committed_ids = HashSet::new();
    let (mut served_count, mut lost_count, mut max_loss_age) = (0, 0, Duration::ZERO);
    for round in 0..kills {
        let mut program = Program::start(&mut configure_command(
            keychoir_command(&["serve", "--listen", "127.0.0.1:0"]),
            &simulator,
            &database,
        ));
        let url = format!("http://{}", program.wait_for_address());
        let (pid, response_count) = (program.id().to_string(), AtomicUsize::new(0));
        // Each round kills Keychoir after a different number of responses.
        let kill_after_responses = 1 + round * 97 % 400;
        let sending = join_all(
            (0..CLIENTS).map(|number| send_until_failure(&url, format!("{round}-{number}"), &response_count)),
        );
        let killing = async {
            wait_until(|| response_count.load(Ordering::Relaxed) >= kill_after_responses).await;
            // `kill` runs on another thread, so that the clients continue to read and their times are exact.
            keychoir::tasks::spawn_blocking(move || {
                assert!(Command::new("kill").args(["-s", "KILL", &pid]).status().unwrap().success());
                clock::instant()
            })
            .await
            .unwrap()
        };
        let (completed, killed_at) = tokio::join!(sending, killing);
        assert_eq!(program.wait_for_exit().0, None, "Keychoir must be killed by the signal");

        let found_ids = recorded_ids(&database);
        assert!(found_ids.is_superset(&committed_ids), "committed records must be kept");
        let was_sent = |id: &String| id.split('-').next().unwrap().parse::<usize>().unwrap() <= round;
        assert!(found_ids.iter().all(was_sent), "each record must belong to a round that has started");
        for client_requests in &completed {
            // A client sends its requests in order, and the record of a request is queued before the client
            // receives the end of the response.
            let is_lost = |(id, _): &(String, Instant)| !found_ids.contains(id);
            let first_lost = client_requests.iter().position(is_lost).unwrap_or(client_requests.len());
            let lost_requests = &client_requests[first_lost..];
            assert!(lost_requests.iter().all(is_lost), "the lost records of a client must be its last ones");
            served_count += client_requests.len();
            lost_count += lost_requests.len();
            for (_, completed_at) in lost_requests {
                max_loss_age = max_loss_age.max(killed_at.saturating_duration_since(*completed_at));
            }
        }
        committed_ids = found_ids;
    }
    // In short runs, most records may follow the last commit. The first commit after startup is immediate.
    assert!(
        committed_ids.len() > kills / 2,
        "more than {} requests must be recorded, not {} of {served_count}",
        kills / 2,
        committed_ids.len()
    );
    println!(
        "{kills} kills: {served_count} requests were served, and {lost_count} of them are not recorded. The oldest of \
         these was served {max_loss_age:?} before the kill."
    );
    simulator.stop().await;
}

async fn read_readiness(client: &reqwest::Client, url: &str) -> Value {
    client.get(format!("{url}/readyz")).send().await.unwrap().json().await.unwrap()
}

/// Limits the size of files, so that each write beyond the limit fails, instead of filling the disk of the machine.
/// `make faults` fills a separate file system.
#[tokio::test]
async fn a_file_size_limit_loses_neither_requests_nor_records() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("keychoir.db");
    let simulator = start_simulator().await;
    let script = "trap '' XFSZ; exec prlimit --fsize=262144:unlimited \"$0\" serve --listen 127.0.0.1:0";
    let mut limited_command = Command::new("sh");
    limited_command
        .args(["-c", script, env!("CARGO_BIN_EXE_keychoir")])
        .env_clear()
        .env("PATH", "/usr/bin:/bin");
    let mut program = Program::start(&mut configure_command(limited_command, &simulator, &database));
    let url = format!("http://{}", program.wait_for_address());
    let client = http_client();
    let mut sent_count = 0;
    let failing_readiness = loop {
        for _ in 0..20 {
            assert!(
                request_speech(&client, &url, &format!("0-{sent_count}")).await,
                "requests must be served while the database cannot be written"
            );
            sent_count += 1;
        }
        let readiness = read_readiness(&client, &url).await;
        if readiness["store"] == "failing" {
            break readiness;
        }
        assert!(sent_count < 5_000, "the database must exceed the file size limit");
    };
    assert_eq!(
        (&failing_readiness["status"], &failing_readiness["recordsLost"]),
        (&json!("degraded"), &json!(0))
    );
    assert!(recorded_ids(&database).len() < sent_count, "some records must be only in memory");
    program.wait_for_event("usage_store_failing");

    assert!(program.set_limit("--fsize=unlimited"), "the file size limit of the program must be removed");
    let recovery = async {
        while read_readiness(&client, &url).await["status"] != "ready" {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), recovery)
        .await
        .expect("the usage store must recover without a restart");
    let (code, stderr) = program.terminate();
    assert_eq!(code, Some(0), "the program must stop without an error: {stderr}");
    assert!(stderr.contains("usage_store_recovered"), "the recovery must be logged: {stderr}");
    assert_eq!(recorded_ids(&database).len(), sent_count, "all requests must be recorded");
    simulator.stop().await;
}
