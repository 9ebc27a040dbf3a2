//! Tests `keychoir check`, `check --online` and `keychoir doctor`: the problems and warnings that they report, their
//! exit codes, and that they print no key. `check` must report each problem that prevents a start of `keychoir serve`.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use keychoir::policy::units::UnixMs;
use keychoir::simulator::{Plan, Simulator};
use keychoir::store::{DatabaseLocation, Store};
use serde_json::Value;

use crate::environment::{FIRST_KEY, ProgramEnvironment, SECOND_KEY, THIRD_KEY, start_simulator};
use crate::support::program::{keychoir_command, run, stderr};

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Returns a command with the given home directory, one key and no fixed port.
fn command_in(home: &Path, arguments: &[&str]) -> Command {
    let mut command = keychoir_command(arguments);
    command
        .env("HOME", home)
        .env("ELEVENLABS_API_KEYS", FIRST_KEY)
        .env("KEYCHOIR_SERVER__LISTEN", "127.0.0.1:0")
        .env("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9");
    command
}

#[test]
fn check_fails_for_each_cause_for_which_serve_fails() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).display().to_string();
    fs::create_dir(path("credentials")).unwrap();
    fs::create_dir_all(path("credentials/elevenlabs_api_keys")).unwrap();
    fs::create_dir(path("broken")).unwrap();
    fs::write(path("broken/managed.toml"), "generation = \"x\"\n").unwrap();
    fs::create_dir(path("lost")).unwrap();
    fs::write(path("lost/managed.toml"), "[[keys]]\nname = \"a\"\nkey_file = \"keys/a\"\n").unwrap();
    fs::write(path("short"), "x").unwrap();
    let client = format!("[[clients]]\nname = \"a\"\ntoken_file = \"{}\"\n", path("missing"));
    fs::write(path("client.toml"), client).unwrap();
    // Another program has changed the tables of this database, which has the current version.
    drop(Store::open(&DatabaseLocation::File(path("altered.db").into()), UnixMs(1_800_000_000_000)).unwrap());
    let altered_database = rusqlite::Connection::open(path("altered.db")).unwrap();
    altered_database.execute_batch("DROP TABLE keys; CREATE TABLE keys (x)").unwrap();
    drop(altered_database);
    for (variable, value, message) in [
        ("ELEVENLABS_API_KEYS_FILE", path("missing"), "cannot be read"),
        ("CREDENTIALS_DIRECTORY", path("credentials"), "cannot be read"),
        ("KEYCHOIR_CONFIG", path("client.toml"), "cannot be read"),
        ("KEYCHOIR_ADMIN__TOKEN_FILE", path("missing"), "admin token cannot be read"),
        ("KEYCHOIR_ADMIN__TOKEN_FILE", path("short"), "not a valid admin token"),
        ("KEYCHOIR_ADMIN_TOKEN", "short".to_owned(), "not a valid admin token"),
        ("KEYCHOIR_SERVER__LISTEN", "0.0.0.0:0".to_owned(), "client token"),
        ("KEYCHOIR_STORAGE__PATH", path("broken/keychoir.db"), "managed.toml"),
        ("KEYCHOIR_STORAGE__PATH", path("lost/keychoir.db"), "managed.toml"),
        ("KEYCHOIR_STORAGE__PATH", path("altered.db"), "no such column: key_hash"),
        ("KEYCHOIR_UPSTREAM__PROXY", "ftp://proxy".to_owned(), "scheme"),
        ("KEYCHOIR_UPSTREAM__PROXY_FILE", path("missing"), "cannot be read"),
        ("KEYCHOIR_SUPABASE__URL", "postgres://db".to_owned(), "URL of the database"),
        ("KEYCHOIR_LOG__LEVEL", "loud".to_owned(), "KEYCHOIR_LOG__LEVEL"),
    ] {
        for arguments in [&["check"][..], &["check", "--json"], &["serve"]] {
            let mut command = command_in(home.path(), arguments);
            if variable.ends_with("_FILE") || variable == "CREDENTIALS_DIRECTORY" {
                command.env_remove("ELEVENLABS_API_KEYS");
                if variable.starts_with("KEYCHOIR") {
                    command.env("ELEVENLABS_API_KEYS", FIRST_KEY);
                }
            }
            let output = run(command.env(variable, &value));
            assert_eq!(
                output.status.code(),
                Some(78),
                "the command {arguments:?} must fail with {variable}={value}: {}",
                stderr(&output)
            );
            let text = stderr(&output) + &stdout(&output);
            assert!(
                text.contains(message),
                "{variable}={value} {arguments:?} must report {message:?}: {text}"
            );
        }
    }
}

#[test]
fn check_warns_of_a_damaged_database_which_serve_would_rename() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("keychoir.db");
    drop(Store::open(&DatabaseLocation::File(path.clone()), UnixMs(1_800_000_000_000)).unwrap());
    let check = || run(command_in(home.path(), &["check"]).env("KEYCHOIR_STORAGE__PATH", &path));
    assert!(
        !stderr(&check()).contains("damaged"),
        "the error message must not contain `damaged`: {}",
        stderr(&check())
    );
    let mut content = fs::read(&path).unwrap();
    assert!(
        content.len() > 8 * 4096,
        "the database must have enough pages, and it has {} bytes",
        content.len()
    );
    content[2 * 4096..8 * 4096].fill(0x5a);
    fs::write(&path, content).unwrap();
    let output = check();
    assert_eq!(output.status.code(), Some(0), "a damaged database must not be an error: {}", stderr(&output));
    let text = stderr(&output) + &stdout(&output);
    assert!(
        text.contains("is damaged") && text.contains("empty database"),
        "the output must warn of the damaged database: {text}"
    );
}

#[test]
fn a_database_in_use_prevents_only_a_second_start() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "");
    let (program, address) = environment.start();
    let config = environment.path("keychoir.toml");
    let run_with_address = |name: &str, address: &str| {
        let mut command =
            keychoir_command(&[name, "--config", config.to_str().unwrap(), "--listen", address]);
        environment.set_environment(&mut command);
        run(&mut command)
    };
    let message = format!("in use by another Keychoir, process {}", program.id());
    for name in ["check", "serve"] {
        let output = run_with_address(name, "127.0.0.1:0");
        assert_eq!(
            output.status.code(),
            Some(78),
            "`{name}` must refuse the database in use: {}",
            stderr(&output)
        );
        assert!(stderr(&output).contains(&message), "`{name}` must report {message:?}: {}", stderr(&output));
    }
    let output = run_with_address("check", &address);
    assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
    assert!(stdout(&output).contains(&format!("note: a Keychoir is already running at {address}")));
    assert!(stdout(&output).contains(&message), "the output must contain {message:?}: {}", stdout(&output));
    assert_eq!(program.terminate().0, Some(0));
}

#[test]
fn too_few_open_files_are_a_warning_of_check() {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "ulimit -n 256; exec \"$0\" check", env!("CARGO_BIN_EXE_keychoir")])
        .env_clear()
        .env("HOME", home.path())
        .env("ELEVENLABS_API_KEYS", FIRST_KEY)
        .env("KEYCHOIR_SERVER__LISTEN", "127.0.0.1:0");
    let output = run(&mut command);
    assert_eq!(output.status.code(), Some(0));
    let message = "The system allows 256 open files, so at most 48 clients can be connected";
    assert!(
        stderr(&output).contains(message),
        "the error message must contain {message:?}: {}",
        stderr(&output)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_online_check_tests_each_key_at_the_provider() {
    let simulator = start_simulator(&[FIRST_KEY]).await;
    let home = tempfile::tempdir().unwrap();
    let check = |keys: &str, arguments: &[&str]| {
        let mut command = command_in(home.path(), &[&["check", "--online"], arguments].concat());
        command.env("ELEVENLABS_API_KEYS", keys).env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url());
        run(&mut command)
    };
    let output = check(FIRST_KEY, &[]);
    assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stdout(&output));
    for text in ["credits left", "responds, connected in", "this clock agrees", "The configuration is fine."]
    {
        assert!(stdout(&output).contains(text), "the output must contain {text:?}: {}", stdout(&output));
    }
    let output = check(&format!("{FIRST_KEY},{SECOND_KEY}"), &["--json"]);
    assert_eq!(output.status.code(), Some(1), "a refused key must be reported: {}", stdout(&output));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&document["status"], &document["starts"]), (&"problem".into(), &true.into()));
    let problems: Vec<&Value> = document["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["severity"] == "problem")
        .collect();
    assert_eq!(problems.len(), 1, "exactly one problem must be found: {document}");
    assert!(
        problems[0]["message"].as_str().unwrap().contains("key 2"),
        "the problem must name the second key: {document}"
    );
    assert!(problems[0]["next_step"].is_string(), "the problem must have a next step: {document}");
    for secret in [FIRST_KEY, SECOND_KEY] {
        let is_printed = stdout(&output).contains(secret) || stderr(&output).contains(secret);
        assert!(!is_printed, "the output must contain no key");
    }
    let charged_credits = simulator.ledger().totals.charged;
    assert_eq!(charged_credits, 0, "a check must cost nothing");
}

/// Starts an HTTP server that sends `response` on every connection. Returns the address of the server.
fn start_server(response: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let respond = move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) > 0 {
                head.push(byte[0]);
            }
            let _ = stream.write_all(response.as_bytes());
        }
    };
    keychoir::tasks::spawn_thread("server", respond).unwrap();
    address
}

#[test]
fn an_online_check_names_the_proxy_and_the_table_that_fail() {
    let home = tempfile::tempdir().unwrap();
    let proxy = start_server(
        "HTTP/1.1 407 Proxy Authentication Required\r\nproxy-authenticate: Basic\r\ncontent-length: 0\r\n\r\n",
    );
    let supabase = start_server("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    let mut command = command_in(home.path(), &["check", "--online"]);
    command
        .env("KEYCHOIR_UPSTREAM__BASE_URL", "http://provider.invalid")
        .env("KEYCHOIR_UPSTREAM__PROXY", format!("http://{proxy}"))
        .env("KEYCHOIR_SUPABASE__PROXY", "direct")
        .env("SUPABASE_URL", format!("http://{supabase}"))
        .env("SUPABASE_SECRET_KEY", "sb_secret_canary_0123456789");
    let output = run(&mut command);
    assert_eq!(output.status.code(), Some(1), "the command must fail: {}", stderr(&output));
    let text = stdout(&output);
    for expected in [
        "through the proxy http://127.0.0.1",
        "requires a user and a password (407)",
        "provider.invalid cannot be resolved",
        "elevenlabs_key_usage",
        "a table is missing",
    ] {
        assert!(text.contains(expected), "the output must contain {expected:?}: {text}");
    }
    let direct_checks: Vec<&str> = text.lines().filter(|line| line.contains("without the proxy")).collect();
    assert!(
        direct_checks.iter().all(|line| line.starts_with("ok")),
        "a closed direct route must not be a problem: {text}"
    );
    assert!(!text.contains("canary"), "the output must not contain the Supabase key: {text}");
}

/// Starts Keychoir, and returns the output of `keychoir doctor` with the same configuration. Asserts that the output
/// contains no key.
async fn run_doctor_beside_server(simulator: &Simulator, keys: &[&str], arguments: &[&str]) -> Output {
    let environment = ProgramEnvironment::new(&simulator.base_url().to_string());
    environment.configure(keys, "");
    fs::set_permissions(environment.path("keychoir.toml"), fs::Permissions::from_mode(0o600)).unwrap();
    let (program, address) = environment.start();
    let config = environment.path("keychoir.toml");
    let arguments =
        [&["doctor", "--config", config.to_str().unwrap(), "--listen", &address], arguments].concat();
    let mut command = keychoir_command(&arguments);
    environment.set_environment(&mut command);
    let output = tokio::task::spawn_blocking(move || run(&mut command)).await.unwrap();
    assert_eq!(program.terminate().0, Some(0));
    for secret in keys {
        let is_printed = stdout(&output).contains(secret) || stderr(&output).contains(secret);
        assert!(!is_printed, "the output must contain no key");
    }
    output
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_finds_nothing_wrong_with_a_healthy_program() {
    let simulator = start_simulator(&[FIRST_KEY]).await;
    let output = run_doctor_beside_server(&simulator, &[FIRST_KEY], &[]).await;
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "the program must be healthy: {text}");
    for expected in [
        "read from",
        "(mode 0600)",
        "open files suffice",
        "`keychoir serve` starts with this configuration",
        "is intact",
        "free for",
        "a Keychoir responds at http://127.0.0.1",
        "as that of this program",
        "responds, connected in",
        "this clock agrees",
        "credits left",
        "no mirror is configured",
        "0 problems, 0 warnings",
    ] {
        assert!(text.contains(expected), "the output must contain {expected:?}: {text}");
    }
    assert!(text.lines().count() < 30, "the output must have fewer than 30 lines: {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_warns_of_several_free_plans_and_reports_refused_keys() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut plan = Plan::with_keys([(FIRST_KEY, 10_000), (SECOND_KEY, 10_000)]);
    for key in &mut plan.keys {
        key.tier = Some("free".to_owned());
    }
    let simulator = Simulator::start(listener, plan).await.unwrap();
    let output = run_doctor_beside_server(&simulator, &[FIRST_KEY, SECOND_KEY], &[]).await;
    assert_eq!(output.status.code(), Some(1), "the exit code must report a warning: {}", stdout(&output));
    assert!(
        stdout(&output).contains("2 keys are of free plans"),
        "the output must contain `2 keys are of free plans`: {}",
        stdout(&output)
    );

    let output = run_doctor_beside_server(&simulator, &[FIRST_KEY, THIRD_KEY], &["--json"]).await;
    assert_eq!(output.status.code(), Some(2), "the exit code must report a problem: {}", stdout(&output));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["status"], "problem");
    let problems =
        document["findings"].as_array().unwrap().iter().filter(|finding| finding["severity"] == "problem");
    let messages: Vec<&str> = problems.map(|finding| finding["message"].as_str().unwrap()).collect();
    assert!(
        matches!(messages[..], [message] if message.contains("key 2") && message.contains("refused")),
        "only the refused key must be a problem: {messages:?}"
    );
}

#[test]
fn the_doctor_reports_a_broken_configuration_a_damaged_database_and_a_stopped_program() {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join("keychoir.toml");
    fs::write(&config, "[pool]\nstrateggy = \"fill-first\"\n").unwrap();
    let output = run(&mut command_in(home.path(), &["doctor", "--config", config.to_str().unwrap()]));
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stdout(&output).contains("strateggy"),
        "the output must contain `strateggy`: {}",
        stdout(&output)
    );
    assert!(
        stdout(&output).contains("1 problem, 0 warnings"),
        "the output must contain `1 problem, 0 warnings`: {}",
        stdout(&output)
    );

    let database = home.path().join("keychoir.db");
    let connection = rusqlite::Connection::open(&database).unwrap();
    let attempts: String = (0..2_000).map(|row| format!("INSERT INTO attempts VALUES ('{row}');")).collect();
    connection
        .execute_batch(&format!(
            "BEGIN; CREATE TABLE keys (x); CREATE TABLE attempts (x); {attempts} PRAGMA user_version = 13; COMMIT;"
        ))
        .unwrap();
    drop(connection);
    let mut bytes = fs::read(&database).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 4_096].fill(0xff);
    fs::write(&database, bytes).unwrap();
    let mut command = command_in(home.path(), &["doctor", "--offline"]);
    let output =
        run(command.env("KEYCHOIR_STORAGE__PATH", &database).env("KEYCHOIR_SERVER__LISTEN", "unix:/k.sock"));
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(2), "the exit code must report a problem: {text}");
    assert!(text.contains("is damaged"), "the output must contain `is damaged`: {text}");
    assert!(
        text.contains("Keychoir does not respond at unix:/k.sock"),
        "the output must contain `Keychoir does not respond at unix:/k.sock`: {text}"
    );
    assert!(!text.contains("127.0.0.1:9"), "an offline examination must not connect: {text}");
}
