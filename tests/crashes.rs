//! Usage records of the real binary when it is killed or the disk is full, under load: the database
//! stays intact, nothing is recorded twice, committed records are kept, and only the end of the
//! queue is lost: the requests since the last commit, whose interval is `storage.commit_interval`.
//!
//! `KEYCHOIR_KILLS` is the number of kills (5 by default, 100 in `make faults`). The number and age
//! of lost records are printed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test ends at its first surprise, and this one prints what it measured"
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

const CLIENTS: usize = 8;

/// The real binary in front of the simulator, with its database at `books`.
fn command(mut command: Command, simulator: &Simulator, books: &Path) -> Command {
    command
        .env("KEYCHOIR_STORAGE__PATH", books)
        .env("KEYCHOIR_SERVER__TLS", "off")
        .env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url())
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
        .env("KEYCHOIR_LOG__FORMAT", "json")
        .env("KEYCHOIR_LOG__LEVEL", "warn,keychoir::cli=info,keychoir::store=info")
        .env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY},{SECOND_KEY}"));
    command
}

async fn simulator() -> Simulator {
    Simulator::start(bind_loopback().await, Plan::of([(FIRST_KEY, 1 << 40), (SECOND_KEY, 1 << 40)]))
        .await
        .unwrap()
}

fn client() -> reqwest::Client {
    keychoir::upstream::http_client().unwrap().build().unwrap()
}

/// Sends a request for speech under this name; returns whether the whole response came.
async fn speak(client: &reqwest::Client, url: &str, name: &str) -> bool {
    let body = json!({"text": "a".repeat(7), "model_id": "eleven_v3"});
    let request = client.post(format!("{url}{SPEECH_PATH}")).header("x-request-id", name).json(&body);
    match request.send().await {
        Ok(answer) => answer.status() == 200 && answer.bytes().await.is_ok(),
        Err(_) => false,
    }
}

/// A client that sends one request after the other until one fails. Returns the names of the
/// successful ones, with the times of their ends.
async fn ask_on(url: &str, name: String, answered: &AtomicUsize) -> Vec<(String, Instant)> {
    let client = client();
    let mut ended = Vec::new();
    loop {
        let name = format!("{name}-{}", ended.len());
        if !speak(&client, url, &name).await {
            return ended;
        }
        ended.push((name, clock::instant()));
        answered.fetch_add(1, Ordering::Relaxed);
    }
}

/// The recorded names, read from a copy: the program itself must do the recovery.
fn written(books: &Path) -> HashSet<String> {
    let folder = tempfile::tempdir().unwrap();
    for suffix in ["", "-wal"] {
        let from = format!("{}{suffix}", books.display());
        if Path::new(&from).exists() {
            fs::copy(from, folder.path().join(format!("copy.db{suffix}"))).unwrap();
        }
    }
    let connection = Connection::open(folder.path().join("copy.db")).unwrap();
    let integrity: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(integrity, "ok");
    let sums = |sql: &str| -> (i64, i64) {
        connection.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
    };
    let attempts = sums("SELECT count(*), coalesce(sum(credits), 0) FROM attempts");
    assert_eq!(
        sums("SELECT coalesce(sum(attempts), 0), coalesce(sum(credits), 0) FROM hours"),
        attempts,
        "the sums are committed with their attempts"
    );
    let mut statement = connection.prepare("SELECT request_id FROM attempts").unwrap();
    let names: Vec<String> = statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    let set: HashSet<String> = names.iter().cloned().collect();
    assert_eq!(set.len(), names.len(), "nothing is there twice");
    set
}

#[tokio::test]
async fn a_killed_program_keeps_what_it_has_committed_and_nothing_twice() {
    let kills: usize = std::env::var("KEYCHOIR_KILLS").map_or(5, |count| count.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let books = folder.path().join("keychoir.db");
    let simulator = simulator().await;
    let mut kept = HashSet::new();
    let (mut total, mut lost, mut oldest) = (0, 0, Duration::ZERO);
    for round in 0..kills {
        let mut program = Program::start(&mut command(
            keychoir_command(&["serve", "--listen", "127.0.0.1:0"]),
            &simulator,
            &books,
        ));
        let url = format!("http://{}", program.wait_for_address());
        let (pid, answered) = (program.id().to_string(), AtomicUsize::new(0));
        // From the first responses to some hundreds, at another moment of the work each time.
        let enough = 1 + round * 97 % 400;
        let asking =
            join_all((0..CLIENTS).map(|number| ask_on(&url, format!("{round}-{number}"), &answered)));
        let killing = async {
            wait_until(|| answered.load(Ordering::Relaxed) >= enough).await;
            // Runs beside the clients, which continue to read, so that their times are exact.
            keychoir::tasks::spawn_blocking(move || {
                assert!(Command::new("kill").args(["-s", "KILL", &pid]).status().unwrap().success());
                clock::instant()
            })
            .await
            .unwrap()
        };
        let (ended, killed_at) = tokio::join!(asking, killing);
        assert_eq!(program.wait_for_exit().0, None, "it was killed");

        let found = written(&books);
        assert!(found.is_superset(&kept), "what was committed stays");
        let sent = |name: &String| name.split('-').next().unwrap().parse::<usize>().unwrap() <= round;
        assert!(found.iter().all(sent), "nobody made anything up");
        for client in &ended {
            // A client sends requests in order, and their records are queued before it receives the
            // end of a response.
            let first_lost =
                client.iter().position(|(name, _)| !found.contains(name)).unwrap_or(client.len());
            let (_, missing) = client.split_at(first_lost);
            assert!(
                missing.iter().all(|(name, _)| !found.contains(name)),
                "only the end of the queue is lost"
            );
            total += client.len();
            lost += missing.len();
            for (_, at) in missing {
                oldest = oldest.max(killed_at.saturating_duration_since(*at));
            }
        }
        kept = found;
    }
    // In short runs most records may come after the last commit; the first commit after the start
    // is immediate.
    assert!(kept.len() > kills / 2, "{} of {total} are there", kept.len());
    println!(
        "{kills} kills: {total} requests were answered, {lost} of them are not in the books, none of them answered \
         more than {oldest:?} before its kill"
    );
    simulator.stop().await;
}

async fn readiness(client: &reqwest::Client, url: &str) -> Value {
    client.get(format!("{url}/readyz")).send().await.unwrap().json().await.unwrap()
}

/// A limit on the size of files stands in for a full disk, which a test may not cause: every write
/// beyond it fails. The disk itself is filled in `make faults`.
#[tokio::test]
async fn a_disk_that_is_full_costs_no_request_and_no_record() {
    let folder = tempfile::tempdir().unwrap();
    let books = folder.path().join("keychoir.db");
    let simulator = simulator().await;
    let script = "trap '' XFSZ; exec prlimit --fsize=262144:unlimited \"$0\" serve --listen 127.0.0.1:0";
    let mut limited = Command::new("sh");
    limited.args(["-c", script, env!("CARGO_BIN_EXE_keychoir")]).env_clear().env("PATH", "/usr/bin:/bin");
    let mut program = Program::start(&mut command(limited, &simulator, &books));
    let url = format!("http://{}", program.wait_for_address());
    let client = client();
    let mut sent = 0;
    let failing = loop {
        for _ in 0..20 {
            assert!(speak(&client, &url, &format!("0-{sent}")).await, "traffic goes on");
            sent += 1;
        }
        let readiness = readiness(&client, &url).await;
        if readiness["store"] == "failing" {
            break readiness;
        }
        assert!(sent < 5_000, "the books grow beyond the limit");
    };
    assert_eq!((&failing["status"], &failing["recordsLost"]), (&json!("degraded"), &json!(0)));
    assert!(written(&books).len() < sent);
    program.wait_for_event("usage_store_failing");

    assert!(program.set_limit("--fsize=unlimited"));
    let looking = async {
        while readiness(&client, &url).await["status"] != "ready" {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), looking).await.expect("it recovers without a restart");
    let (code, said) = program.terminate();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("usage_store_recovered"), "{said}");
    assert_eq!(written(&books).len(), sent);
    simulator.stop().await;
}
