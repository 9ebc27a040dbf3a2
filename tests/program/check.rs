//! Tests `check`: it rejects each configuration that `serve` rejects, accepts what startup accepts, creates no files, and
//! reports files that are unused or that other users can read, and a Keychoir that already runs.

use std::fs;
use std::net::TcpListener;

use super::startup::{KEYS, assert_output, check_command, stdout};
use crate::support::program::{Program, keychoir_command, run, stderr};

#[test]
fn an_unused_file_is_reported() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("keychoir.toml"), "").unwrap();
    assert_output(
        &run(&mut check_command(home.path())),
        0,
        &["keychoir.toml: this file is not read", "--config"],
    );
}

#[test]
fn check_rejects_each_configuration_that_serve_rejects() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name);
    fs::write(path("junk.pem"), "no certificate").unwrap();
    fs::write(path("file"), "").unwrap();
    let newer_database = rusqlite::Connection::open(path("newer.db")).unwrap();
    newer_database
        .execute_batch("CREATE TABLE keys (x); CREATE TABLE attempts (x); PRAGMA user_version = 99")
        .unwrap();
    drop(newer_database);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address_in_use = listener.local_addr().unwrap().to_string();
    let same_port_twice = "127.0.0.1:47113,localhost:47113";
    let path_below_a_file = path("file").join("keychoir.db");
    for (variable, value, messages) in [
        ("KEYCHOIR_UPSTREAM__CA_FILE", path("junk.pem").to_str().unwrap(), &["junk.pem"][..]),
        ("KEYCHOIR_UPSTREAM__CA_FILE", path("none.pem").to_str().unwrap(), &["none.pem"]),
        ("KEYCHOIR_SERVER__TLS__CERT", path("junk.pem").to_str().unwrap(), &["KEYCHOIR_SERVER__TLS__CERT"]),
        ("KEYCHOIR_SERVER__LISTEN", &address_in_use, &[&address_in_use, "Another program listens there"]),
        ("KEYCHOIR_SERVER__LISTEN", same_port_twice, &["the same port of the same address"]),
        (
            "KEYCHOIR_SERVER__LISTEN",
            "unix:/nowhere/k.sock",
            &["unix:/nowhere/k.sock", "directory does not exist"],
        ),
        ("KEYCHOIR_STORAGE__PATH", path("newer.db").to_str().unwrap(), &["newer.db", "newer Keychoir", "99"]),
        ("KEYCHOIR_STORAGE__PATH", path_below_a_file.to_str().unwrap(), &["cannot be written"]),
    ] {
        let output = run(check_command(home.path()).env(variable, value));
        assert_output(&output, 78, messages);
        assert!(!stdout(&output).contains("fine"), "`check` must not accept {variable}={value}");
        let mut serve = keychoir_command(&["serve"]);
        serve
            .env("HOME", home.path())
            .env("ELEVENLABS_API_KEYS", KEYS)
            .env("KEYCHOIR_SERVER__LISTEN", "127.0.0.1:0")
            .env(variable, value);
        assert!(!run(&mut serve).status.success(), "`serve` must refuse {variable}={value}");
    }
}

#[test]
fn check_accepts_an_admin_listener_for_other_machines_if_startup_has_an_admin_token() {
    let home = tempfile::tempdir().unwrap();
    let check = || {
        let mut check = check_command(home.path());
        check.env("KEYCHOIR_ADMIN__LISTEN", "0.0.0.0:0");
        check
    };
    // Startup generates a token in the state directory.
    assert_output(&run(&mut check()), 0, &[]);
    let token = "kca_0123456789abcdef0123456789abcdef0123456789";
    assert_output(&run(check().env("KEYCHOIR_ADMIN_TOKEN", token)), 0, &[]);
    let without_state = run(check().env("KEYCHOIR_STORAGE__EPHEMERAL", "true"));
    assert_output(&without_state, 78, &["0.0.0.0:", "no admin token"]);
}

#[test]
fn check_does_not_create_files() {
    let home = tempfile::tempdir().unwrap();
    assert_output(&run(&mut check_command(home.path())), 0, &[]);
    let socket = home.path().join("k.sock");
    let listen = format!("unix:{}", socket.display());
    assert_output(&run(check_command(home.path()).env("KEYCHOIR_SERVER__LISTEN", &listen)), 0, &[]);
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
}

#[test]
fn check_notes_that_a_keychoir_already_listens_on_the_port() {
    let home = tempfile::tempdir().unwrap();
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    command
        .env("HOME", home.path())
        .env("ELEVENLABS_API_KEYS", KEYS)
        .env("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9")
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
        .env("KEYCHOIR_LOG__FORMAT", "json");
    let mut program = Program::start(&mut command);
    let address = program.wait_for_address();
    let output = run(check_command(home.path()).env("KEYCHOIR_SERVER__LISTEN", &address));
    assert_output(&output, 0, &[]);
    let printed = stdout(&output);
    assert!(
        printed.contains(&format!("note: a Keychoir is already running at {address}")),
        "the output must note the running server: {printed}"
    );
    assert!(printed.contains("The configuration is fine."), "the configuration must be accepted: {printed}");
    assert_eq!(program.terminate().0, Some(0));
}

#[test]
fn files_that_other_users_can_read_are_reported() {
    use std::os::unix::fs::PermissionsExt;
    let home = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str, mode: u32| {
        let path = home.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    let keys = write("keys.txt", &KEYS.replace(',', "\n"), 0o644);
    let tokens = write("tokens.toml", "[[clients]]\nname = \"a\"\ntoken = \"0123456789abcdef\"\n", 0o640);
    let database = write("keychoir.db", "", 0o666);
    let check = || {
        let mut command = check_command(home.path());
        command
            .env_remove("ELEVENLABS_API_KEYS")
            .env("ELEVENLABS_API_KEYS_FILE", &keys)
            .env("KEYCHOIR_CONFIG", &tokens)
            .env("KEYCHOIR_STORAGE__PATH", &database);
        run(&mut command)
    };
    let output = check();
    assert_output(
        &output,
        0,
        &[
            "keys.txt: other users of this machine can read this file (mode 0644): restrict it with `chmod 600`",
            "tokens.toml: other users of this machine can read this file (mode 0640)",
            "keychoir.db: other users of this machine can change this file (mode 0666)",
        ],
    );
    for path in [&keys, &tokens, &database] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }
    assert!(!stderr(&check()).contains("other users"), "no file must be reported: {}", stderr(&check()));
    // Settings without secrets may be readable for all users.
    write("tokens.toml", "[log]\nlevel = \"warn\"\n", 0o644);
    assert!(!stderr(&check()).contains("other users"), "no file must be reported: {}", stderr(&check()));
}
