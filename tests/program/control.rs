//! Tests the changes that `keychoir keys` and `keychoir clients` make: in a running Keychoir, through its address for
//! operators, and without a running Keychoir. Each change is recorded, and a change that cannot be saved has no effect.

use std::fs;
use std::path::Path;
use std::process::Output;

use crate::environment::recorded_actions;
use crate::support::program::{Program, keychoir_command, read_all_files, run, stderr};
use keychoir::secret::ApiKey;
use keychoir::simulator::{Plan, Simulator};
use serde_json::{Value, json};

const FIRST_KEY: &str = "sk_key_number_one_000000000000000000000000000000001";
const SECOND_KEY: &str = "sk_key_number_two_000000000000000000000000000000002";

/// The address of a running Keychoir, its state directory and an HTTP client.
struct RunningProgram {
    directory: tempfile::TempDir,
    address: String,
    client: reqwest::Client,
}

impl RunningProgram {
    /// Runs a command that finds Keychoir by `--url` and the admin token in the state directory.
    fn run(&self, arguments: &[&str]) -> Output {
        let url = format!("http://{}", self.address);
        let arguments = [arguments, &["--url", &url]].concat();
        let mut command = keychoir_command(&arguments);
        run(command.env("KEYCHOIR_STORAGE__PATH", self.directory.path().join("keychoir.db")))
    }

    /// Runs a command that must succeed. Returns its standard output.
    #[track_caller]
    fn run_successfully(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(
            output.status.code(),
            Some(0),
            "{arguments:?}: the command must succeed: {}",
            stderr(&output)
        );
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Returns the status of a speech request with the given `token`.
    async fn request_speech(&self, token: &str) -> u16 {
        let url = format!("http://{}/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM", self.address);
        let body = json!({"text": "hello", "model_id": "eleven_multilingual_v2"});
        let request = self.client.post(url).header("xi-api-key", token).json(&body);
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        response.bytes().await.unwrap();
        status
    }
}

fn request_count(simulator: &Simulator, key: &str) -> usize {
    let ledger = simulator.ledger();
    ledger.requests.iter().filter(|request| request.key.as_deref() == Some(key)).count()
}

/// Adds, pauses, resumes and removes keys, and asserts that each change affects the next request.
async fn change_keys(running: &RunningProgram, simulator: &Simulator) {
    let key_file = running.directory.path().join("spare.key");
    fs::write(&key_file, SECOND_KEY).unwrap();
    running.run_successfully(&["keys", "add", "spare", "--key-file", key_file.to_str().unwrap()]);
    fs::remove_file(&key_file).unwrap();
    let short_key = ApiKey::new(FIRST_KEY).unwrap().short().to_string();
    running.run_successfully(&["keys", "pause", &short_key, "--until", "2h", "--reason", "billing dispute"]);
    let mut list = keychoir_command(&["keys", "list", "--json"]);
    list.env("KEYCHOIR_STORAGE__PATH", running.directory.path().join("keychoir.db"));
    let listed_keys: Value =
        serde_json::from_slice(&run(list.env("ELEVENLABS_API_KEYS", FIRST_KEY)).stdout).unwrap();
    assert_eq!(listed_keys[0]["status"], "paused", "the list must show the paused key: {listed_keys}");
    assert_eq!(listed_keys[0]["id"], ApiKey::new(FIRST_KEY).unwrap().fingerprint().key_id());
    assert_eq!(running.request_speech("any").await, 200);
    assert_eq!((request_count(simulator, FIRST_KEY), request_count(simulator, SECOND_KEY)), (0, 1));
    running.run_successfully(&["keys", "resume", &short_key]);
    let refused_removal = running.run(&["keys", "remove", &short_key]);
    assert_ne!(refused_removal.status.code(), Some(0));
    assert!(
        stderr(&refused_removal).contains("can only be paused"),
        "the error message must contain `can only be paused`: {}",
        stderr(&refused_removal)
    );
    running.run_successfully(&["keys", "remove", "spare"]);
    assert_eq!(running.request_speech("any").await, 200);
    assert_eq!((request_count(simulator, FIRST_KEY), request_count(simulator, SECOND_KEY)), (1, 1));
}

/// Adds, rotates and changes clients, and asserts that each change affects the next request. Returns the tokens of the
/// client `app`.
async fn change_clients(running: &RunningProgram) -> [String; 2] {
    let old_token = running.run_successfully(&["clients", "add", "app", "--quota", "100 requests"]);
    assert_eq!((running.request_speech("any").await, running.request_speech(&old_token).await), (401, 200));
    let new_token = running.run_successfully(&["clients", "rotate", "app", "--grace", "1h"]);
    assert_eq!(
        (running.request_speech(&new_token).await, running.request_speech(&old_token).await),
        (200, 200)
    );
    running.run_successfully(&["clients", "set", "app", "--max-concurrent", "3"]);
    let list = running.run_successfully(&["clients", "list"]);
    assert_eq!(list, "app  100 requests, 3 concurrent requests");
    // The quota has the notation of the configuration, as it has without a running server.
    let document: Value =
        serde_json::from_str(&running.run_successfully(&["clients", "list", "--json"])).unwrap();
    assert_eq!(
        document["clients"][0]["quota"], "100 requests",
        "the quota must have the notation of the configuration: {document}"
    );
    assert_eq!(
        document["clients"][0]["requests"]["total"], 3,
        "three requests of the client must be counted: {document}"
    );
    running.run_successfully(&["clients", "rotate", "app"]);
    assert_eq!(
        (running.request_speech(&new_token).await, running.request_speech(&old_token).await),
        (401, 401)
    );
    let free_token = running.run_successfully(&["clients", "add", "free", "--user-quota", "3 requests"]);
    assert_eq!(running.request_speech(&free_token).await, 400, "a request without a user must be refused");
    running.run_successfully(&["clients", "set", "free", "--user-quota", ""]);
    assert_eq!(running.request_speech(&free_token).await, 200);
    running.run_successfully(&["clients", "set", "free", "--user-quota", "5 credits per day"]);
    assert_eq!(running.request_speech(&free_token).await, 400);
    let shown = running.run_successfully(&["clients", "show", "free"]);
    assert!(
        shown.starts_with("free  5 credits per day for each user"),
        "the output must show the quota of each user: {shown}"
    );
    [old_token, new_token]
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_change_the_running_program_at_once_and_every_change_is_recorded() {
    let plan = Plan::with_keys([(FIRST_KEY, 1_000_000), (SECOND_KEY, 1_000_000)]);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let simulator = Simulator::start(listener, plan).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    command
        .env("ELEVENLABS_API_KEYS", FIRST_KEY)
        .env("KEYCHOIR_STORAGE__PATH", directory.path().join("keychoir.db"))
        .env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url())
        .env("KEYCHOIR_SERVER__RELOAD_INTERVAL", "0s")
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
        .env("KEYCHOIR_LOG__LEVEL", "trace")
        .env("KEYCHOIR_LOG__FORMAT", "json");
    let mut program = Program::start(&mut command);
    let address = program.wait_for_address();
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let running = RunningProgram { directory, address, client };

    change_keys(&running, &simulator).await;
    let [old_token, new_token] = change_clients(&running).await;

    let admin_token = fs::read_to_string(running.directory.path().join("admin_token")).unwrap();
    let url = format!("http://{}/api/keychoir/v1/changes", running.address);
    let request = running.client.get(url).bearer_auth(admin_token.trim());
    let document: Value = request.send().await.unwrap().json().await.unwrap();
    let expected = [
        "key_added",
        "key_paused",
        "key_resumed",
        "key_removed",
        "client_added",
        "client_rotated",
        "client_changed",
        "client_rotated",
        "client_added",
        "client_changed",
        "client_changed",
    ];
    assert_eq!(recorded_actions(&document), expected);

    let (code, log) = program.terminate();
    assert_eq!(code, Some(0));
    let files = read_all_files(running.directory.path());
    for event in ["key_paused", "key_resumed"] {
        assert_eq!(log.matches(&format!("\"event\":\"{event}\"")).count(), 1, "{event} must be logged");
    }
    for secret in [FIRST_KEY, SECOND_KEY, &old_token, &new_token] {
        assert!(!log.contains(secret), "the log must contain no secret");
        let is_in_file = files.windows(secret.len()).any(|bytes| bytes == secret.as_bytes());
        assert!(!is_in_file, "the files must contain no secret");
    }
    assert!(!log.contains(admin_token.trim()), "the log must not contain the admin token");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_use_the_address_for_operators() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    let admin_listen = format!("unix:{}", socket.display());
    let configure = |command: &mut std::process::Command| {
        command
            .env("ELEVENLABS_API_KEYS", FIRST_KEY)
            .env("KEYCHOIR_STORAGE__PATH", directory.path().join("keychoir.db"))
            .env("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9")
            .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
            .env("KEYCHOIR_ADMIN__LISTEN", &admin_listen)
            .env("KEYCHOIR_LOG__FORMAT", "json");
    };
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    configure(&mut command);
    let mut program = Program::start(&mut command);
    let address = program.wait_for_address();
    assert_eq!(program.wait_for_event("admin_started")["address"], *admin_listen);
    let run_command = |arguments: &[&str]| {
        let mut command = keychoir_command(arguments);
        configure(&mut command);
        let output = run(&mut command);
        assert_eq!(
            output.status.code(),
            Some(0),
            "{arguments:?}: the command must succeed: {}",
            stderr(&output)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    let token = run_command(&["clients", "add", "app"]);
    assert!(run_command(&["clients", "list"]).contains("app"));
    let check_output = run_command(&["check", "--listen", "127.0.0.1:0"]);
    let note = format!("note: a Keychoir is already running at {admin_listen}");
    assert!(check_output.contains(&note), "the output must contain {note:?}: {check_output}");
    // The change has taken effect: clients need a token.
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let usage =
        |token: String| client.get(format!("http://{address}/api/keychoir-usage")).bearer_auth(token).send();
    assert_eq!(usage("other".to_owned()).await.unwrap().status(), 401);
    assert_eq!(usage(token.trim().to_owned()).await.unwrap().status(), 200);
    let (code, _) = program.terminate();
    assert_eq!(code, Some(0));
    assert!(!socket.exists(), "the socket file must be removed at the exit");
}

#[test]
fn check_reports_an_address_for_operators_that_is_also_an_address_for_clients() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = keychoir_command(&["check", "--listen", "127.0.0.1:18080"]);
    command
        .env("ELEVENLABS_API_KEYS", FIRST_KEY)
        .env("KEYCHOIR_STORAGE__PATH", directory.path().join("keychoir.db"))
        .env("KEYCHOIR_ADMIN__LISTEN", "localhost:18080");
    let output = run(&mut command);
    assert_eq!(output.status.code(), Some(78), "the configuration must be refused: {}", stderr(&output));
    let expected =
        "KEYCHOIR_ADMIN__LISTEN: localhost:18080 and 127.0.0.1:18080 of server.listen are the same address";
    assert!(
        stderr(&output).contains(expected),
        "the error message must contain {expected:?}: {}",
        stderr(&output)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_without_a_record_is_recorded_at_the_next_start() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("keychoir.db");
    let mut add = keychoir_command(&["clients", "add", "app"]);
    assert_eq!(run(add.env("KEYCHOIR_STORAGE__PATH", &database)).status.code(), Some(0));
    // The deletion leaves the state of a Keychoir that was killed after it saved the overlay.
    let connection = rusqlite::Connection::open(&database).unwrap();
    assert_eq!(connection.execute("DELETE FROM changes", []).unwrap(), 1);
    drop(connection);
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    command
        .env("ELEVENLABS_API_KEYS", FIRST_KEY)
        .env("KEYCHOIR_STORAGE__PATH", &database)
        .env("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9")
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
        .env("KEYCHOIR_LOG__FORMAT", "json");
    for _ in 0..2 {
        let mut program = Program::start(&mut command);
        let url = format!("http://{}/api/keychoir/v1/changes", program.wait_for_address());
        let token = fs::read_to_string(directory.path().join("admin_token")).unwrap();
        let client = keychoir::upstream::http_client().unwrap().build().unwrap();
        let response = client.get(url).bearer_auth(token.trim()).send().await.unwrap();
        let document: Value = response.json().await.unwrap();
        let changes = document["changes"].as_array().unwrap();
        assert_eq!(changes.len(), 1, "exactly one change must be recorded: {document}");
        assert_eq!(
            changes[0]["action"], "unrecorded_changes",
            "the lost record must be replaced: {document}"
        );
        assert_eq!((&changes[0]["actor"], &changes[0]["generation"]), (&json!("startup"), &json!(1)));
        assert_eq!(program.terminate().0, Some(0));
    }
}

/// Returns the content of every file below `state_directory` that a change may write, by name.
fn state_files(state_directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for directory in [state_directory.to_owned(), state_directory.join("managed_keys")] {
        for entry in fs::read_dir(directory).into_iter().flatten() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_file() && !name.starts_with("keychoir.db") {
                files.push((name, fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

#[test]
fn a_change_that_does_not_fit_on_the_disk_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("keychoir.db");
    for name in ["first", "second", "third", "fourth", "fifth"] {
        let mut add = keychoir_command(&["clients", "add", name]);
        assert_eq!(run(add.env("KEYCHOIR_STORAGE__PATH", &database)).status.code(), Some(0));
    }
    let files_before = state_files(directory.path());
    assert!(files_before.iter().any(|(name, content)| name == "managed.toml" && content.len() > 512));
    let key_file = directory.path().join("spare.key");
    fs::write(&key_file, SECOND_KEY).unwrap();
    // No file may be larger than one block, so that the key can be written and the overlay cannot. The shell ignores
    // the signal of this limit, so that the write fails as on a full disk.
    let script = format!(
        "trap '' XFSZ; ulimit -f 1; exec \"{}\" keys add spare --key-file \"{}\"",
        env!("CARGO_BIN_EXE_keychoir"),
        key_file.display()
    );
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", &script]).env_clear().env("KEYCHOIR_STORAGE__PATH", &database);
    let output = run(&mut shell);
    assert_eq!(output.status.code(), Some(1), "the command must fail: {}", stderr(&output));
    assert!(
        stderr(&output).contains("the change cannot be saved"),
        "the error message must contain `the change cannot be saved`: {}",
        stderr(&output)
    );
    fs::remove_file(&key_file).unwrap();
    assert_eq!(state_files(directory.path()), files_before);
}
