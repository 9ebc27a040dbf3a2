//! Tests the commands `status`, `usage` and `keys list` as processes: their tables, JSON and CSV, their exit codes and
//! their error messages. Most tables are compared exactly, because scripts parse them. Also tests a usage database in
//! memory, and the report of credits that were spent outside the proxy.

use std::process::Output;

use crate::support::program::{Program, keychoir_command, run, stderr};
use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, THIRD_KEY, TestProxy, bind_loopback, start_proxy,
    start_proxy_with, wait_until,
};
use keychoir::config::ClientConfig;
use keychoir::policy::units::UnixMs;
use keychoir::secret::{Fingerprint, TokenFingerprint};
use keychoir::simulator::{Plan, Simulator, WorkspacePlan};
use keychoir::store::{UsageDimension, UsageReader};
use serde_json::{Value, json};

/// The reset of the workspaces, 2099-01-01.
const RESETS_AT: UnixMs = UnixMs(4_070_908_800_000);

/// Returns a plan of three workspaces: one with low usage, one near its limit, and one whose key may not read the
/// subscription.
fn plan() -> Plan {
    let workspace = |name: &str, used| WorkspacePlan {
        used,
        reset: Some(RESETS_AT),
        ..WorkspacePlan::new(name, 100_000)
    };
    let mut plan = Plan::with_keys([(FIRST_KEY, 0), (SECOND_KEY, 0), (THIRD_KEY, 1_000)]);
    plan.keys[0].workspace = Some("one".to_owned());
    plan.keys[1].workspace = Some("two".to_owned());
    plan.keys[2].permissions = Some(vec!["text_to_speech".to_owned()]);
    plan.with_workspace(workspace("one", 5_420)).with_workspace(workspace("two", 84_766))
}

/// Runs the binary on another thread, so that the proxy can serve its requests.
async fn run_in_background(arguments: &[&str]) -> Output {
    let mut command = keychoir_command(arguments);
    keychoir::tasks::spawn_blocking(move || run(&mut command)).await.unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

async fn run_status(proxy: &TestProxy, options: &[&str]) -> Output {
    let mut arguments = vec!["status", "--url", &proxy.url];
    arguments.extend(options);
    run_in_background(&arguments).await
}

#[tokio::test]
async fn the_status_is_printed_as_a_table() {
    let proxy = start_proxy(plan()).await;
    let output = run_status(&proxy, &[]).await;
    assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
    assert_eq!(
        stdout(&output),
        "\
#  key                  status         left      used/limit  used  resets
1  sk_key_numb...00001  active       94,580   5,420/100,000    5%  Jan 1
2  sk_key_numb...00002  near limit   15,234  84,766/100,000   84%  Jan 1
3  sk_key_numb...00003  active      unknown             0/?     -  -

3 of 3 keys active, 109,814 characters left and 1 key without a known limit
"
    );
    proxy.close().await;
}

#[tokio::test]
async fn the_json_status_is_the_status_document() {
    let proxy = start_proxy(plan()).await;
    let output = run_status(&proxy, &["--json"]).await;
    let document = proxy.get("/api/elevenlabs-status").await.text().await.unwrap();
    assert_eq!(stdout(&output), format!("{document}\n"));
    proxy.close().await;
}

#[tokio::test]
async fn a_status_check_sets_the_exit_code() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 1_000), (SECOND_KEY, 1_000)])).await;
    assert_eq!(run_status(&proxy, &["--check"]).await.status.code(), Some(0));
    proxy.set_fault(FIRST_KEY, "quota");
    proxy.request_speech(10).await;
    let output = run_status(&proxy, &["--check"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stdout(&output).contains("  exhausted "),
        "the key must be shown as exhausted: {}",
        stdout(&output)
    );
    let summary = "\n1 of 2 keys active, 990 characters left\nkey 1: exhausted until ";
    assert!(stdout(&output).contains(summary), "the output must contain {summary:?}: {}", stdout(&output));
    assert_eq!(
        run_status(&proxy, &[]).await.status.code(),
        Some(0),
        "without --check, an exhausted key must not be an error"
    );
    proxy.set_fault(SECOND_KEY, "invalid");
    proxy.request_speech(10).await;
    assert_eq!(run_status(&proxy, &["--check", "--json"]).await.status.code(), Some(2));
    let url = proxy.url.clone();
    proxy.close().await;
    let output = run_in_background(&["status", "--check", "--url", &url]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("does not respond at http://127.0.0.1:"),
        "the error message must contain `does not respond at http://127.0.0.1:`: {}",
        stderr(&output)
    );
    assert_eq!(run_in_background(&["status", "--url", &url]).await.status.code(), Some(1));
}

#[tokio::test]
async fn the_status_requires_a_token_if_clients_are_configured() {
    let client = ClientConfig::new("ops".to_owned(), TokenFingerprint::new(CLIENT_TOKEN), Default::default());
    let proxy = start_proxy_with(plan(), |config| config.clients = vec![client]).await;
    let output = run_status(&proxy, &[]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("--token-file"),
        "the error message must contain `--token-file`: {}",
        stderr(&output)
    );

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    for (token, code) in [(format!("{CLIENT_TOKEN}\n"), 0), ("another token canary".to_owned(), 1)] {
        std::fs::write(&file, &token).unwrap();
        let output = run_status(&proxy, &["--token-file", file.to_str().unwrap()]).await;
        assert_eq!(output.status.code(), Some(code), "the exit code must be {code}: {}", stderr(&output));
        assert!(
            !stderr(&output).contains("canary"),
            "the error message must contain no token: {}",
            stderr(&output)
        );
    }
    proxy.close().await;
}

#[tokio::test]
async fn the_status_command_reads_the_address_from_the_configuration() {
    let proxy = start_proxy(plan()).await;
    let address = proxy.app.address().to_string();
    let mut command = keychoir_command(&["status"]);
    command.env("KEYCHOIR_SERVER__LISTEN", address).env("HOME", "/nowhere");
    let output = keychoir::tasks::spawn_blocking(move || run(&mut command)).await.unwrap();
    assert!(
        stdout(&output).starts_with("#  key "),
        "the output must be the status table: {}",
        stderr(&output)
    );
    proxy.close().await;
}

#[tokio::test]
async fn a_server_that_is_not_keychoir_is_reported() {
    let proxy = start_proxy(plan()).await;
    let url = proxy.simulator.base_url();
    let output = run_in_background(&["status", "--url", &url]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("is not a Keychoir"),
        "the error message must contain `is not a Keychoir`: {}",
        stderr(&output)
    );
    for (url, expected) in [("https://127.0.0.1:1", "does not respond at https://"), ("ftp://x", "http://")] {
        let output = run_in_background(&["status", "--url", url]).await;
        assert!(
            stderr(&output).contains(expected),
            "the error message must contain {expected:?}: {}",
            stderr(&output)
        );
    }
    proxy.close().await;
}

/// Waits until the usage database contains the given number of attempts.
async fn wait_for_attempts(proxy: &TestProxy, attempts: u64) {
    let path = proxy.database_path();
    wait_until(|| {
        let all_time = UnixMs(0)..UnixMs(u64::MAX);
        let rows = UsageReader::open(&path).and_then(|reader| reader.usage(all_time, UsageDimension::Client));
        rows.is_ok_and(|rows| rows.iter().map(|(_, sums)| sums.attempts).sum::<u64>() == attempts)
    })
    .await;
}

async fn run_usage(proxy: &TestProxy, options: &[&str]) -> Output {
    let path = proxy.database_path();
    let mut arguments = vec!["usage", "--file", path.to_str().unwrap(), "--since", "2020-01-01"];
    arguments.extend(options);
    run_in_background(&arguments).await
}

/// Sends requests with two models, a free request, and a request that the first key refuses.
async fn send_requests(proxy: &TestProxy) {
    for (characters, model) in
        [(30, "eleven_multilingual_v2"), (20, "eleven_multilingual_v2"), (5, "eleven_v3")]
    {
        let body = json!({"text": "a".repeat(characters), "model_id": model});
        assert_eq!(proxy.post(SPEECH_PATH, &body).await.status(), 200);
    }
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    proxy.set_fault(FIRST_KEY, "quota");
    assert_eq!(proxy.request_speech(100).await.status(), 200);
    wait_for_attempts(proxy, 6).await;
}

fn two_keys() -> Plan {
    Plan::with_keys([(FIRST_KEY, 10_000), (SECOND_KEY, 10_000)])
}

#[tokio::test]
async fn usage_is_printed_as_a_table_by_any_dimension() {
    let proxy = start_proxy_with(two_keys(), |config| config.keys[0].name = Some("first".to_owned())).await;
    send_requests(&proxy).await;
    for (by, table) in [
        (
            "key",
            "\
key                        attempts  served  characters  credits  unpriced
sk_key_numb...00002               1       1         100      100         0
sk_key_numb...00001 first         5       4          55       55         0
total                             6       5         155      155         0
",
        ),
        (
            "client",
            "\
client  attempts  served  characters  credits  unpriced
local          6       5         155      155         0
total          6       5         155      155         0
",
        ),
        (
            "model",
            "\
model                   attempts  served  characters  credits  unpriced
eleven_multilingual_v2         3       3         150      150         0
eleven_v3                      1       1           5        5         0
-                              2       1           0        0         0
total                          6       5         155      155         0
",
        ),
        (
            "route",
            "\
route                    attempts  served  characters  credits  unpriced
/v1/text-to-speech/{id}         5       4         155      155         0
/v1/voices                      1       1           0        0         0
total                           6       5         155      155         0
",
        ),
    ] {
        let output = run_usage(&proxy, &["--by", by]).await;
        assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
        assert_eq!(stdout(&output), format!("Since 2020-01-01 00:00 UTC\n\n{table}"));
    }
    proxy.close().await;
}

#[tokio::test]
async fn csv_and_json_usage_contain_every_sum() {
    let proxy = start_proxy_with(two_keys(), |config| config.keys[0].name = Some("a,b".to_owned())).await;
    send_requests(&proxy).await;
    let path = proxy.database_path();
    let csv_output = run_in_background(&["usage", "--file", path.to_str().unwrap(), "--csv"]).await;
    assert_eq!(
        stdout(&csv_output),
        stdout(&run_usage(&proxy, &["--csv"]).await),
        "the default period must include all requests"
    );
    let (first_hash, second_hash) = (Fingerprint::new(FIRST_KEY), Fingerprint::new(SECOND_KEY));
    let csv = stdout(&csv_output);
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(
        lines[0],
        "key,key_hash,name,attempts,served,characters,credits,unpriced,request_bytes,response_bytes"
    );
    assert!(
        lines[1].starts_with(&format!("sk_key_numb...00002,{second_hash},,1,1,100,100,0,")),
        "the first row must have the sums of the second key: {csv}"
    );
    assert!(
        lines[2].starts_with(&format!("sk_key_numb...00001,{first_hash},\"a,b\",5,4,55,55,0,")),
        "the second row must have the sums of the first key: {csv}"
    );
    assert_eq!(lines.len(), 3);

    let mut document: Value =
        serde_json::from_slice(&run_usage(&proxy, &["--json", "--by", "model"]).await.stdout).unwrap();
    let total = document["total"].take();
    assert_eq!(document["since"], "2020-01-01T00:00:00.000Z");
    assert_eq!(
        (&document["by"], &document["rows"][0]["model"]),
        (&json!("model"), &json!("eleven_multilingual_v2"))
    );
    assert_eq!(document["rows"][2]["model"], Value::Null);
    let sums =
        ["attempts", "served", "characters", "credits", "unpriced"].map(|name| total[name].as_u64().unwrap());
    assert_eq!(sums, [6, 5, 155, 155, 0]);
    let total_bytes: i64 =
        proxy.into_records().await.iter().map(|record| record.request_bytes + record.response_bytes).sum();
    let bytes = ["requestBytes", "responseBytes"].map(|name| total[name].as_i64().unwrap());
    assert_eq!(bytes.iter().sum::<i64>(), total_bytes);
}

#[tokio::test]
async fn usage_before_the_first_request_is_empty() {
    let proxy = start_proxy(two_keys()).await;
    wait_for_attempts(&proxy, 0).await;
    assert_eq!(stdout(&run_usage(&proxy, &[]).await), "No requests since 2020-01-01 00:00 UTC.\n");
    proxy.close().await;
}

#[track_caller]
fn assert_fails(output: &Output, code: i32, fragments: &[&str]) {
    let stderr_text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "the exit code must be {code}: {stderr_text}");
    for fragment in fragments {
        assert!(stderr_text.contains(fragment), "the error message must contain {fragment:?}: {stderr_text}");
    }
    assert_eq!(stdout(output), "");
}

#[test]
fn an_unreadable_usage_database_is_explained() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keychoir.db");
    let file = path.to_str().unwrap();
    let usage = || run(&mut keychoir_command(&["usage", "--file", file]));
    assert_fails(&usage(), 1, &[file, "no usage records", "keychoir serve"]);
    assert!(!path.exists(), "reading the usage must not create a file");
    std::fs::write(&path, "").unwrap();
    assert_fails(&usage(), 1, &[file, "no usage records yet"]);
    std::fs::write(&path, "this file is not a database").unwrap();
    assert_fails(&usage(), 1, &[file, "is not a usage database"]);
    std::fs::remove_file(&path).unwrap();
    let database = rusqlite::Connection::open(&path).unwrap();
    database.execute_batch("PRAGMA user_version = 99").unwrap();
    assert_fails(&usage(), 1, &[file, "newer Keychoir", "99"]);
    database.execute_batch("PRAGMA user_version = 1").unwrap();
    assert_fails(&usage(), 1, &[file, "older Keychoir"]);
    for since in ["7m", "yesterday", "2026-02-30"] {
        let output = run(&mut keychoir_command(&["usage", "--file", file, "--since", since]));
        assert_fails(&output, 2, &[since, "7d", "2026-11-01"]);
    }
    assert_fails(&run(&mut keychoir_command(&["usage", "--by", "voice"])), 2, &["voice", "model"]);
    let mut ephemeral = keychoir_command(&["usage"]);
    assert_fails(&run(ephemeral.env("KEYCHOIR_STORAGE__EPHEMERAL", "true")), 1, &["in memory"]);
}

#[tokio::test]
async fn keys_are_listed_by_their_short_forms() {
    let proxy = start_proxy_with(two_keys(), |config| {
        config.keys[0].name = Some("first".to_owned());
        config.keys[0].workspace = Some("studio".to_owned());
    })
    .await;
    send_requests(&proxy).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keychoir.toml");
    let toml = format!(
        "[[keys]]\nkey = \"{FIRST_KEY}\"\nname = \"first\"\nworkspace = \"studio\"\n[[keys]]\nkey = \"{SECOND_KEY}\"\n\
         [[keys]]\nkey = \"{THIRD_KEY}\"\n"
    );
    std::fs::write(&file, toml).unwrap();
    let path = proxy.database_path();
    let arguments = ["keys", "list", "--config", file.to_str().unwrap(), "--file", path.to_str().unwrap()];
    let output = run_in_background(&arguments).await;
    assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
    let table = "\
#  key                  name   workspace  status        left
1  sk_key_numb...00001  first  studio     exhausted    9,945
2  sk_key_numb...00002  -      -          active       9,900
3  sk_key_numb...00003  -      -          -          unknown
";
    assert_eq!(stdout(&output), table);
    let output = run_in_background(&[&arguments[..], &["--json"]].concat()).await;
    let keys: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        keys[0],
        json!({"id": Fingerprint::new(FIRST_KEY).key_id(), "shortKey": "sk_key_numb...00001", "name": "first",
            "workspace": "studio", "status": "exhausted", "characterCount": 55, "characterLimit": 10_000})
    );
    assert_eq!(keys[2]["status"], Value::Null);
    // Without keys in the configuration, the command lists the keys of the database.
    let output = run_in_background(&["keys", "list", "--file", path.to_str().unwrap()]).await;
    assert_eq!(
        stdout(&output).lines().count(),
        3,
        "the table must have a head and the two keys of the database: {}",
        stderr(&output)
    );
    proxy.close().await;
}

#[test]
fn keys_are_listed_without_a_database() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keychoir.db");
    let arguments = ["keys", "list", "--file", path.to_str().unwrap()];
    let output = run(keychoir_command(&arguments).env("ELEVENLABS_API_KEYS", FIRST_KEY));
    assert_eq!(output.status.code(), Some(0));
    assert!(
        stdout(&output).ends_with("1  sk_key_numb...00001  -     -          -       unknown\n"),
        "the key must be listed without a state: {}",
        stdout(&output)
    );
    assert!(
        stderr(&output).contains("no usage records"),
        "the error message must contain `no usage records`: {}",
        stderr(&output)
    );
}

#[tokio::test]
async fn an_ephemeral_database_counts_usage_and_creates_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let simulator = Simulator::start(bind_loopback().await, two_keys()).await.unwrap();
    for (arguments, variable) in [(&["--ephemeral"] as &[&str], "false"), (&[], "true")] {
        let mut command = keychoir_command(&[&["serve", "--listen", "127.0.0.1:0"], arguments].concat());
        command
            .current_dir(directory.path())
            .env("HOME", directory.path())
            .env("KEYCHOIR_STORAGE__EPHEMERAL", variable)
            .env("KEYCHOIR_RETRY__SPILL_DIRECTORY", directory.path())
            .env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url())
            .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
            .env("KEYCHOIR_LOG__FORMAT", "json")
            .env("ELEVENLABS_API_KEYS", FIRST_KEY);
        let mut program = Program::start(&mut command);
        let url = format!("http://{}", program.wait_for_address());
        let body = json!({"text": "a".repeat(30), "model_id": "eleven_v3"});
        let client = keychoir::upstream::http_client().unwrap().build().unwrap();
        assert_eq!(
            client.post(format!("{url}{SPEECH_PATH}")).json(&body).send().await.unwrap().status(),
            200
        );
        let document = stdout(&run_in_background(&["status", "--json", "--url", &url]).await);
        let document: Value = serde_json::from_str(&document).unwrap();
        assert_eq!(document["keys"][0]["characterCount"], 30);
        let files: Vec<_> =
            std::fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap().path()).collect();
        assert_eq!(files, Vec::<std::path::PathBuf>::new());
        assert_eq!(program.terminate().0, Some(0));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
    simulator.stop().await;
}

/// Requests speech directly from the provider, bypassing the proxy.
async fn request_speech_directly(simulator: &Simulator, key: &str, characters: usize) {
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let body = json!({"text": "a".repeat(characters), "model_id": "eleven_multilingual_v2"});
    let request =
        client.post(format!("{}{SPEECH_PATH}", simulator.base_url())).header("xi-api-key", key).json(&body);
    assert_eq!(request.send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn credits_spent_outside_the_proxy_are_counted_and_reported_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut plan = Plan::with_keys([(FIRST_KEY, 0), (SECOND_KEY, 0)]);
    plan.keys[0].workspace = Some("one".to_owned());
    plan.keys[1].workspace = Some("two".to_owned());
    let workspace =
        |name: &str, used| WorkspacePlan { used, reset: Some(RESETS_AT), ..WorkspacePlan::new(name, 10_000) };
    let plan = plan.with_workspace(workspace("one", 100)).with_workspace(workspace("two", 200));
    let simulator = Simulator::start(bind_loopback().await, plan).await.unwrap();
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    command
        .env("KEYCHOIR_STORAGE__PATH", directory.path().join("keychoir.db"))
        .env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url())
        .env("KEYCHOIR_QUOTA_POLLING__INTERVAL", "1s")
        .env("KEYCHOIR_LOG__FORMAT", "json")
        .env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY},{SECOND_KEY}"));
    let mut program = Program::start(&mut command);
    let url = format!("http://{}", program.wait_for_address());
    let speech = json!({"text": "a".repeat(30), "model_id": "eleven_multilingual_v2"});
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    assert_eq!(client.post(format!("{url}{SPEECH_PATH}")).json(&speech).send().await.unwrap().status(), 200);
    request_speech_directly(&simulator, FIRST_KEY, 40).await;

    let (program, event) = keychoir::tasks::spawn_blocking(move || {
        let event = program.wait_for_event("quota_mismatch");
        (program, event)
    })
    .await
    .unwrap();
    assert_eq!((&event["credits"], &event["level"]), (&json!(40), &json!("info")));
    assert!(
        event["message"].as_str().unwrap().contains("other apps"),
        "the event must name the cause: {event}"
    );
    let status_text = stdout(&run_in_background(&["status", "--url", &url]).await);
    assert!(
        status_text.contains("\nDrift of sk_key_numb...00001: 40 credits spent by others or unpriced\n"),
        "the output must report the discrepancy: {status_text}"
    );
    assert!(
        status_text.contains("  9,830  170/10,000 "),
        "the usage must be 170 credits: 100 before the start, 30 by the proxy and 40 outside it: {status_text}"
    );

    // The polls after the report must not report it again. Each round polls two keys.
    let poll_count = || {
        let requests = simulator.ledger().requests;
        requests.iter().filter(|request| request.path_and_query == "/v1/user/subscription").count()
    };
    let polls_before = poll_count();
    wait_until(|| poll_count() >= polls_before + 6).await;
    let log = keychoir::tasks::spawn_blocking(move || {
        program.send_signal("TERM");
        program.wait_for_exit().1
    })
    .await
    .unwrap();
    assert_eq!(log.matches("quota_mismatch").count(), 1, "the discrepancy must be reported once: {log}");
    simulator.stop().await;
}
