//! Tests `keychoir attempts` and `keychoir usage`, which read the usage database while a running Keychoir writes it,
//! and explain a missing database.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use keychoir::simulator::{Plan, Simulator};
use serde_json::Value;

use crate::support::program::{Program, keychoir_command, run, stderr};

const EXHAUSTED_KEY: &str = "sk_key_number_one_000000000000000000000000000000001";
const FUNDED_KEY: &str = "sk_key_number_two_000000000000000000000000000000002";
const SPEECH_PATH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM";

/// The maximum wait for a line that a command prints.
const LINE_TIMEOUT: Duration = Duration::from_secs(30);

/// Returns a command that uses the given usage database.
fn reading_command(database: &Path, arguments: &[&str]) -> Command {
    let mut command = keychoir_command(arguments);
    command.env("KEYCHOIR_STORAGE__PATH", database);
    command
}

#[track_caller]
fn parse_json_output(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

async fn request_speech(client: &reqwest::Client, address: &str, request_id: &str) {
    let body = serde_json::json!({"text": "hello", "model_id": "eleven_multilingual_v2"});
    let request = client.post(format!("http://{address}{SPEECH_PATH}")).json(&body);
    let response = request.header("x-request-id", request_id).send().await.unwrap();
    assert_eq!(response.status(), 200);
    response.bytes().await.unwrap();
}

/// Asserts the reports of `keychoir usage` about a refused and a served attempt. Returns the report in CSV.
#[track_caller]
fn assert_usage_reports(database: &Path) -> String {
    let usage = |arguments: &[&str]| run(&mut reading_command(database, &[&["usage"], arguments].concat()));
    for by in ["day", "hour", "key", "client", "model", "route"] {
        let report = parse_json_output(&usage(&["--json", "--by", by, "--since", "1d"]));
        assert_eq!(report["total"]["attempts"], 2, "the usage by {by} must contain both attempts: {report}");
    }
    let report = parse_json_output(&usage(&["--json", "--since", "2w", "--until", "1w"]));
    assert_eq!(report["total"]["attempts"], 0);
    let report = parse_json_output(&usage(&["--json", "--failures"]));
    assert_eq!(
        report["failures"].as_array().unwrap().len(),
        1,
        "exactly one kind of failure must be reported: {report}"
    );
    assert_eq!(
        (&report["failures"][0]["outcome"], &report["failures"][0]["status"]),
        (&"workspace_quota".into(), &401.into())
    );
    let csv = String::from_utf8(usage(&["--csv", "--failures", "--by", "client"]).stdout).unwrap();
    assert_eq!(csv, "client,outcome,status,attempts\nlocal,workspace_quota,401,1\n");
    let refused_report = usage(&["--since", "1d", "--until", "2d"]);
    assert_eq!(
        refused_report.status.code(),
        Some(2),
        "a period that ends before it starts must be refused: {}",
        stderr(&refused_report)
    );
    csv
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attempts_are_listed_followed_and_summed() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("keychoir.db");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let plan = Plan::with_keys([(EXHAUSTED_KEY, 0), (FUNDED_KEY, 1_000_000)]);
    let simulator = Simulator::start(listener, plan).await.unwrap();
    let mut serve = reading_command(&database, &["serve", "--listen", "127.0.0.1:0"]);
    serve
        .env("ELEVENLABS_API_KEYS", format!("{EXHAUSTED_KEY},{FUNDED_KEY}"))
        .env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url())
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
        .env("KEYCHOIR_LOG__FORMAT", "json");
    let mut program = Program::start(&mut serve);
    let address = program.wait_for_address();
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();

    let mut follow = reading_command(&database, &["attempts", "--follow", "--json"]);
    let mut follower = follow.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    let (line_sender, line_receiver) = mpsc::channel();
    std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| line_sender.send(line)));
    request_speech(&client, &address, "request-one").await;
    let receive = || line_receiver.recv_timeout(LINE_TIMEOUT).expect("the follower must print each attempt");
    let followed: Vec<Value> =
        tokio::task::block_in_place(|| (0..2).map(|_| serde_json::from_str(&receive()).unwrap()).collect());
    let outcomes: Vec<&str> = followed.iter().map(|attempt| attempt["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["workspace_quota", "served"]);
    assert!(followed.iter().all(|attempt| attempt["request_id"] == "request-one"));
    follower.kill().unwrap();
    follower.wait().unwrap();

    let list_attempts = |arguments: &[&str]| {
        let output = run(&mut reading_command(&database, &[&["attempts", "--json"], arguments].concat()));
        parse_json_output(&output)["attempts"].as_array().unwrap().clone()
    };
    assert_eq!(list_attempts(&[]), followed);
    assert_eq!(list_attempts(&["--failed"]), followed[..1]);
    assert_eq!(list_attempts(&["--limit", "1"]), followed[1..]);
    assert_eq!(list_attempts(&["--request", "request-one"]), followed);
    assert_eq!(list_attempts(&["--request", "another"]), [Value::Null; 0]);

    let table = run(&mut reading_command(&database, &["attempts"]));
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.contains("workspace quota") && table.lines().all(|line| line.chars().count() <= 80),
        "the table must name the outcome within 80 columns: {table}"
    );
    let details = run(&mut reading_command(&database, &["attempts", "--request", "request-one"]));
    let details = String::from_utf8(details.stdout).unwrap();
    for part in ["attempt 1 ", "attempt 2 ", "received  401 workspace_quota", "client    local"] {
        assert!(details.contains(part), "the details must contain {part:?}: {details}");
    }

    let csv = assert_usage_reports(&database);
    for printed in [&table, &details, &csv] {
        assert!(!printed.contains("key_number"), "no key must be printed: {printed}");
    }
    assert_eq!(program.terminate().0, Some(0));
    simulator.stop().await;
}

#[test]
fn attempts_without_a_database_are_explained() {
    let directory = tempfile::tempdir().unwrap();
    let output = run(&mut reading_command(&directory.path().join("none.db"), &["attempts"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("there are no usage records at"),
        "the error message must contain `there are no usage records at`: {}",
        stderr(&output)
    );
}
