//! Tests the startup, and the commands without a running Keychoir: errors are reported with advice, no data is lost,
//! keys and clients are changed in the files, and the startup lines show the keys, the tokens and an unreachable
//! provider.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use crate::support::program::{Program, keychoir_command, run, stderr};

pub(super) const KEYS: &str = "sk_first_key_of_the_test_0001,sk_second_key_of_the_test_0002";

#[track_caller]
pub(super) fn assert_output(output: &Output, code: i32, messages: &[&str]) {
    let stderr = stderr(output);
    assert_eq!(output.status.code(), Some(code), "the program must exit with the code {code}: {stderr}");
    for message in messages {
        assert!(stderr.contains(message), "the output must contain {message:?}: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "the output must not contain `panicked`: {stderr}");
    assert!(!stderr.contains("key_of_the_test"), "the output must contain no key: {stderr}");
}

/// Runs `keychoir serve` with a configuration file that contains `toml`.
fn run_serve(directory: &Path, toml: &str) -> Output {
    let file = directory.join("keychoir.toml");
    fs::write(&file, toml).unwrap();
    run(keychoir_command(&["serve", "--config", file.to_str().unwrap()]).env("ELEVENLABS_API_KEYS", KEYS))
}

#[test]
fn a_start_without_keys_explains_how_to_add_them() {
    for arguments in [&[] as &[&str], &["serve"], &["check"]] {
        let output = run(&mut keychoir_command(arguments));
        assert_output(&output, 78, &["ELEVENLABS_API_KEYS", "[[keys]]", "keychoir demo"]);
    }
}

#[test]
fn a_malformed_key_is_reported_by_its_position_in_the_list() {
    let output = run(keychoir_command(&["check"])
        .env("ELEVENLABS_API_KEYS", "sk_first_key_of_the_test_0001,sk_k\u{e9}y_of_the_test"));
    assert_output(&output, 78, &["ELEVENLABS_API_KEYS", "2"]);
}

#[test]
fn a_key_list_with_quotes_and_spaces_is_accepted_with_a_warning() {
    let list_with_quotes_and_spaces = format!("\" {KEYS}, \n sk_first_key_of_the_test_0001,\"");
    let output = run(keychoir_command(&["check"])
        .env("HOME", "/nowhere")
        .env("ELEVENLABS_API_KEYS", list_with_quotes_and_spaces));
    assert_output(&output, 0, &["ELEVENLABS_API_KEYS"]);
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains("Loaded 2 ElevenLabs API keys"), "both keys must be loaded: {stdout}");
}

#[test]
fn an_unknown_setting_is_reported_with_its_line_and_a_suggestion() {
    let directory = tempfile::tempdir().unwrap();
    let output =
        run_serve(directory.path(), "[pool]\nstrateggy = \"fill-first\"\n[server]\nlisten = \"nonsense\"\n");
    assert_output(
        &output,
        78,
        &["keychoir.toml:2:1", "^^^^^^^^^", "did you mean `strategy`", "keychoir.toml:4"],
    );
}

#[test]
fn a_file_that_cannot_be_read_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing.toml");
    let output = run(&mut keychoir_command(&["serve", "--config", missing.to_str().unwrap()]));
    assert_output(&output, 78, &["missing.toml"]);
    let output = run(&mut keychoir_command(&["serve", "--config", directory.path().to_str().unwrap()]));
    assert_output(&output, 78, &[directory.path().to_str().unwrap()]);
}

#[test]
fn an_unknown_strategy_is_rejected_with_the_known_strategies() {
    let output = run(keychoir_command(&["check"])
        .env("ELEVENLABS_API_KEYS", KEYS)
        .env("KEYCHOIR_POOL__STRATEGY", "fastest"));
    assert_output(&output, 78, &["KEYCHOIR_POOL__STRATEGY", "fastest", "fill-first"]);
}

#[test]
fn an_address_beyond_loopback_needs_client_tokens() {
    let output = run(keychoir_command(&["check", "--listen", "0.0.0.0:0"]).env("ELEVENLABS_API_KEYS", KEYS));
    assert_output(&output, 78, &["[[clients]]"]);
}

#[test]
fn a_port_in_use_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut command = keychoir_command(&["serve", "--listen", &address]);
    command
        .env("ELEVENLABS_API_KEYS", KEYS)
        .env("KEYCHOIR_STORAGE__PATH", directory.path().join("keychoir.db"));
    assert_output(&run(&mut command), 1, &[&address, "--listen"]);
}

#[test]
fn an_unwritable_database_path_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    let path = directory.path().join("file").join("keychoir.db");
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    command.env("ELEVENLABS_API_KEYS", KEYS).env("KEYCHOIR_STORAGE__PATH", &path);
    assert_output(&run(&mut command), 78, &[path.to_str().unwrap(), "storage.path", "storage.ephemeral"]);
}

/// Returns a command that runs Keychoir on a free port, with its database at `path`.
fn command_with_database(path: &Path) -> Command {
    let mut command = keychoir_command(&["--listen", "127.0.0.1:0"]);
    command
        .env("ELEVENLABS_API_KEYS", KEYS)
        .env("KEYCHOIR_STORAGE__PATH", path)
        .env("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9")
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
        .env("KEYCHOIR_LOG__FORMAT", "json");
    command
}

/// Asserts that Keychoir exits at startup, with the given `messages`.
#[track_caller]
fn assert_refused(path: &Path, messages: &[&str]) {
    let (code, stderr) = Program::start(&mut command_with_database(path)).wait_for_exit();
    assert_eq!(code, Some(78), "the program must refuse the database: {stderr}");
    for message in [&[path.to_str().unwrap()], messages].concat() {
        assert!(stderr.contains(message), "the output must contain {message:?}: {stderr}");
    }
}

#[test]
fn a_broken_database_is_quarantined_and_requests_are_served() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keychoir.db");
    let mut program = Program::start(&mut command_with_database(&path));
    program.wait_for_address();
    assert_eq!(program.terminate().0, Some(0));
    fs::write(&path, "this file is not a database").unwrap();
    let mut program = Program::start(&mut command_with_database(&path));
    program.wait_for_address();
    let (code, stderr) = program.terminate();
    assert_eq!(code, Some(0), "the program must exit without an error: {stderr}");
    assert!(stderr.contains("keychoir.db.broken-"), "the log must name the quarantined file: {stderr}");
    let names: Vec<String> = fs::read_dir(directory.path())
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    let quarantined = names
        .iter()
        .find(|name| name.starts_with("keychoir.db.broken-"))
        .expect("the broken database must be kept");
    let quarantined_contents = fs::read_to_string(directory.path().join(quarantined)).unwrap();
    assert_eq!(quarantined_contents, "this file is not a database");
}

#[test]
fn a_file_of_another_program_is_not_changed() {
    let directory = tempfile::tempdir().unwrap();
    let (text_file, foreign_database) =
        (directory.path().join("letter.txt"), directory.path().join("photos.db"));
    fs::write(&text_file, "dear reader").unwrap();
    let connection = rusqlite::Connection::open(&foreign_database).unwrap();
    connection.execute_batch("CREATE TABLE photos (name TEXT); INSERT INTO photos VALUES ('a')").unwrap();
    drop(connection);
    let contents_before = fs::read(&foreign_database).unwrap();
    for path in [&text_file, &foreign_database] {
        assert_refused(path, &["is not a Keychoir database", "storage.path"]);
    }
    assert_eq!(
        (fs::read(&text_file).unwrap(), fs::read(&foreign_database).unwrap()),
        (b"dear reader".to_vec(), contents_before)
    );
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "no file must be created next to them");
}

#[test]
fn the_second_program_on_a_database_refuses_to_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keychoir.db");
    let mut program = Program::start(&mut command_with_database(&path));
    program.wait_for_address();
    let process = format!("process {}", program.id());
    assert_refused(&path, &["in use by another Keychoir", &process]);
    // Commands that only read need no lock.
    let mut usage = keychoir_command(&["usage"]);
    usage.env("KEYCHOIR_STORAGE__PATH", &path);
    assert_eq!(run(&mut usage).status.code(), Some(0));
    // The lock of a killed program is released.
    program.send_signal("KILL");
    program.wait_for_exit();
    let mut program = Program::start(&mut command_with_database(&path));
    program.wait_for_address();
    assert_eq!(program.terminate().0, Some(0));
}

#[test]
fn the_startup_lines_are_written_to_a_terminal() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    command
        .env("ELEVENLABS_API_KEYS", KEYS)
        .env("KEYCHOIR_STORAGE__PATH", directory.path().join("keychoir.db"))
        .env("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9")
        .env("KEYCHOIR_LOG__FORMAT", "terminal");
    let mut program = Program::start(&mut command);
    program.wait_for_line(|line| {
        (line == "✅ Loaded 2 ElevenLabs API keys from ELEVENLABS_API_KEYS").then_some(())
    });
    program.wait_for_line(|line| line.strip_prefix("Server started at http://127.0.0.1:").map(str::to_owned));
    program.wait_for_line(|line| line.contains("└─ Status:    http://127.0.0.1:").then_some(()));
    assert_eq!(program.terminate().0, Some(0));
}

#[test]
fn a_simulator_with_invalid_arguments_prints_its_usage() {
    let output = run(&mut keychoir_command(&["simulate", "--key", "sk_one"]));
    assert_output(&output, 2, &["KEY=CREDITS"]);
    let output = run(&mut keychoir_command(&["simulate", "--key", "sk_one=5", "--fault", "sk_two:quota"]));
    assert_output(&output, 1, &["--fault", "--key"]);
}

#[test]
fn the_migration_of_the_mirror_is_printed() {
    let output = run(&mut keychoir_command(&["supabase", "migrate", "--print"]));
    let file = include_str!("../../config/supabase/migrations/002_elevenlabs_key_tracking.sql");
    assert_eq!((output.status.code(), String::from_utf8(output.stdout).unwrap().as_str()), (Some(0), file));
    let output = run(&mut keychoir_command(&["supabase", "migrate"]));
    assert_output(&output, 2, &["keychoir supabase migrate --print"]);
}

pub(super) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Returns a command that runs `check` with the given `home` directory.
pub(super) fn check_command(home: &Path) -> std::process::Command {
    let mut command = keychoir_command(&["check"]);
    command.env("HOME", home).env("ELEVENLABS_API_KEYS", KEYS).current_dir(home);
    command.env("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9");
    command.env("KEYCHOIR_SERVER__LISTEN", "127.0.0.1:0");
    command
}

#[test]
fn a_client_is_added_on_a_fresh_machine_and_required_from_then_on() {
    let home = tempfile::tempdir().unwrap();
    let output = run(&mut check_command(home.path()));
    assert_output(&output, 0, &[]);
    assert!(stdout(&output).contains("No configuration file"), "no file must be read: {}", stdout(&output));

    let output = run(keychoir_command(&["clients", "add", "app"]).env("HOME", home.path()));
    let file = home.path().join(".local/state/keychoir/managed.toml");
    assert_output(&output, 0, &[file.to_str().unwrap()]);
    let token = stdout(&output).trim().to_owned();
    assert!(token.starts_with("kc_"), "the token must start with `kc_`: {token}");
    let output = run(&mut check_command(home.path()));
    assert!(
        stdout(&output).contains(&format!("; read {}", file.display())),
        "the output must name the file of the managed clients: {}",
        stdout(&output)
    );
    let output = run(keychoir_command(&["clients", "list"]).env("HOME", home.path()));
    assert_eq!(stdout(&output), "app  without limits\n");

    // `keychoir serve` also reads the file of the managed clients.
    let mut command = keychoir_command(&["serve"]);
    command
        .env("HOME", home.path())
        .env("ELEVENLABS_API_KEYS", KEYS)
        .env("KEYCHOIR_SERVER__LISTEN", "127.0.0.1:0")
        .env("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9")
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
        .env("KEYCHOIR_LOG__FORMAT", "json");
    let mut program = Program::start(&mut command);
    let read_event = program.wait_for_event("configuration_read");
    let message = read_event["message"].as_str().unwrap();
    assert!(
        message.contains(&format!("No configuration file; read {}", file.display())),
        "the event must name the file of the managed clients: {message}"
    );
    let address = program.wait_for_address();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_keychoir"))
        .args(["status", "--url", &format!("http://{address}")])
        .env_clear()
        .output()
        .unwrap();
    assert_output(&output, 1, &["requires a token", "--admin-token-file", "--token-file"]);
    // The command reads the generated admin token from the state directory.
    let mut status = keychoir_command(&["status", "--url", &format!("http://{address}")]);
    let output = run(status.env("HOME", home.path()));
    assert_output(&output, 0, &[]);
    assert!(stdout(&output).starts_with("#  key "), "the status must be printed: {}", stdout(&output));
    assert_eq!(program.terminate().0, Some(0));
}

#[test]
fn keys_are_added_paused_and_removed_without_a_running_program() {
    let home = tempfile::tempdir().unwrap();
    let key = "sk_00001111222233334444555566667777888899990000aaaa";
    fs::write(home.path().join("key"), format!("{key}\n")).unwrap();
    let keys = |arguments: &[&str]| {
        let arguments = [&["keys"], arguments].concat();
        run(keychoir_command(&arguments).env("HOME", home.path()))
    };
    let key_file = home.path().join("key");
    let output = keys(&["add", "spare", "--workspace", "team", "--key-file", key_file.to_str().unwrap()]);
    assert_output(&output, 0, &["Added the key `spare`", "applies at the next start"]);
    assert!(!stderr(&output).contains(key));
    let state = home.path().join(".local/state/keychoir");
    assert_eq!(fs::read_to_string(state.join("managed_keys/spare")).unwrap(), format!("{key}\n"));
    // No configuration file and no variable has a key, and the check passes with the managed key.
    let mut check = keychoir_command(&["check"]);
    check.env("HOME", home.path()).env("KEYCHOIR_SERVER__LISTEN", "127.0.0.1:0");
    let output = run(&mut check);
    assert_output(&output, 0, &[]);
    assert!(stdout(&output).contains("spare"), "the output must list the managed key: {}", stdout(&output));

    let output = keys(&["pause", "spare", "--until", "2h", "--reason", "billing", "--json"]);
    assert_output(&output, 0, &["Paused the key"]);
    let receipt: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(receipt["generation"], 2);
    assert!(fs::read_to_string(state.join("managed.toml")).unwrap().contains("reason = \"billing\""));
    assert_output(&keys(&["resume", "spare"]), 0, &["Resumed the key"]);
    assert_output(&keys(&["resume", "spare"]), 1, &["is not paused"]);
    assert_output(&keys(&["pause", "spare", "--until", "soon"]), 2, &["write a duration"]);
    assert_output(&keys(&["remove", "spare"]), 0, &["Removed the key"]);
    assert!(!state.join("managed_keys/spare").exists());
    assert_output(&keys(&["remove", "spare"]), 1, &["the pool has no key"]);
    fs::write(&key_file, "a".repeat(5_000)).unwrap();
    let output = keys(&["add", "long", "--key-file", key_file.to_str().unwrap()]);
    assert_output(&output, 2, &["it has more than 4096 bytes"]);
}

#[test]
fn a_token_is_rotated_with_a_grace_and_the_rules_are_changed() {
    let home = tempfile::tempdir().unwrap();
    let clients = |arguments: &[&str]| {
        let arguments = [&["clients"], arguments].concat();
        run(keychoir_command(&arguments).env("HOME", home.path()))
    };
    let first = clients(&["add", "app", "--quota", "3 requests", "--expires", "30d"]);
    assert_output(&first, 0, &["Added the client `app`", "requests without a token get 401"]);
    let second = clients(&["rotate", "app", "--grace", "1h"]);
    assert_output(&second, 0, &["has a new token"]);
    assert_ne!(stdout(&first), stdout(&second));
    let shown = clients(&["show", "app", "--json"]);
    let client: serde_json::Value = serde_json::from_str(&stdout(&shown)).unwrap();
    assert_eq!(client["quota"], "3 requests");
    assert_eq!(client["source"], "managed");
    // The new token ends when the previous one would have ended.
    assert!(
        client["expires_at"].is_string() && client["previous_token_expires_at"].is_string(),
        "the client must have the expiries of both tokens: {client}"
    );
    assert_output(&clients(&["rotate", "app", "--grace", "1h"]), 1, &["grace period of the last rotation"]);
    assert_output(&clients(&["set", "app", "--quota", "", "--max-concurrent", "4"]), 0, &[]);
    let list = stdout(&clients(&["list"]));
    assert!(list.starts_with("app  4 concurrent requests, expires 20"), "the rules must be changed: {list}");
    assert_output(&clients(&["set", "app"]), 78, &["names no rule"]);
    assert_output(&clients(&["show", "none"]), 1, &["no client has this name"]);
    assert_output(&clients(&["revoke", "app"]), 1, &["the only client", "keychoir clients rotate"]);
    assert_output(&clients(&["revoke", "../keys/0123456789ab"]), 2, &["this name is invalid"]);
}

/// Starts Keychoir. Returns it and its log lines up to the line with the URL of the status page.
fn start_and_read_lines(command: &mut std::process::Command) -> (Program, Vec<String>) {
    let mut program = Program::start(command);
    let lines = std::cell::RefCell::new(Vec::new());
    program.wait_for_line(|line| {
        lines.borrow_mut().push(line.to_owned());
        line.contains("/api/elevenlabs-status").then_some(())
    });
    (program, lines.into_inner())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_startup_lines_show_keys_and_tokens_in_80_columns_of_ascii() {
    use keychoir::simulator::{Plan, Simulator};
    const FIRST_KEY: &str = "sk_key_number_one_000000000000000000000000000000001";
    const SECOND_KEY: &str = "sk_key_number_two_000000000000000000000000000000002";
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let simulator = Simulator::start(listener, Plan::with_keys([(FIRST_KEY, 1_000), (SECOND_KEY, 100_000)]))
        .await
        .unwrap();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("k.toml");
    let command_with_clients = |clients: &str| {
        let keys =
            format!("[[keys]]\nkey = \"{FIRST_KEY}\"\nname = \"studio\"\n[[keys]]\nkey = \"{SECOND_KEY}\"\n");
        fs::write(&file, format!("{keys}{clients}")).unwrap();
        let mut command =
            keychoir_command(&["--config", file.to_str().unwrap(), "--listen", "127.0.0.1:0", "--ephemeral"]);
        command.env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url()).env("KEYCHOIR_LOG__FORMAT", "ascii");
        command
    };
    let (program, lines) = start_and_read_lines(&mut command_with_clients(""));
    let line_with = |lines: &[String], part: &str| {
        lines
            .iter()
            .find(|line| line.contains(part))
            .unwrap_or_else(|| panic!("a startup line must contain {part:?}: {lines:#?}"))
            .clone()
    };
    assert!(
        line_with(&lines, "studio").contains("sk_key_numb...00001"),
        "the first key must be shown: {lines:#?}"
    );
    assert!(
        line_with(&lines, "key 2").contains("sk_key_numb...00002"),
        "the second key must be shown: {lines:#?}"
    );
    assert!(
        line_with(&lines, "Base URL").contains("|- Base URL:  http://127.0.0.1:"),
        "the base URL must be shown in ASCII: {lines:#?}"
    );
    assert!(
        line_with(&lines, "Base URL").contains("api_key=\"anything\""),
        "any token must suffice: {lines:#?}"
    );
    for line in lines.iter().filter(|line| line.contains("sk_key_numb")) {
        assert!(line.is_ascii() && line.len() <= 80, "the line must be ASCII within 80 columns: {line}");
    }
    assert!(lines.iter().all(|line| !line.contains('?')), "no character must be lost: {lines:#?}");
    assert_eq!(program.terminate().0, Some(0));

    let clients = "[[clients]]\nname = \"app\"\ntoken = \"0123456789abcdef\"\n";
    let (program, lines) = start_and_read_lines(&mut command_with_clients(clients));
    assert!(line_with(&lines, "Base URL").contains("api_key=TOKEN"), "a token must be required: {lines:#?}");
    assert!(line_with(&lines, "TOKEN:").contains("of a client: app"), "the client must be named: {lines:#?}");
    assert_eq!(program.terminate().0, Some(0));
    simulator.stop().await;
}

#[test]
fn an_unreachable_provider_is_reported_at_startup_and_in_the_status() {
    let home = tempfile::tempdir().unwrap();
    // A free port refuses connections.
    let closed_address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0", "--ephemeral"]);
    command
        .env("HOME", home.path())
        .env("ELEVENLABS_API_KEYS", KEYS)
        .env("KEYCHOIR_UPSTREAM__BASE_URL", format!("http://{closed_address}"))
        .env("KEYCHOIR_LOG__FORMAT", "json");
    let mut program = Program::start(&mut command);
    program.wait_for_event("upstream_unreachable");
    let url = format!("http://{}", program.wait_for_address());
    let status = || run(&mut keychoir_command(&["status", "--check", "--url", &url]));
    let output = status();
    assert!(
        stdout(&output).contains("ElevenLabs cannot be reached"),
        "the output must contain `ElevenLabs cannot be reached`: {}",
        stdout(&output)
    );
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(program.terminate().0, Some(0));
}
