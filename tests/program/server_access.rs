//! Tests how the commands find the address of a running Keychoir and its admin token, that they verify its certificate,
//! and that they change the files only if no Keychoir is running.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

use crate::environment::{FIRST_KEY, ProgramEnvironment};
use crate::support::program::{Program, keychoir_command, run, stderr};

/// A Keychoir with an admin token in its state directory. It listens on a TCP port and on a Unix socket.
struct RunningProgram {
    environment: ProgramEnvironment,
    /// The process. It is `None` after a test has stopped it.
    program: Option<Program>,
    address: String,
    socket: String,
}

impl RunningProgram {
    fn start() -> Self {
        let environment = ProgramEnvironment::new("http://127.0.0.1:9");
        environment.configure(&[FIRST_KEY], "");
        let socket = format!("unix:{}", environment.path("k.sock").display());
        let mut program =
            Program::start(&mut environment.command(&["--listen", "127.0.0.1:0", "--listen", &socket]));
        let address = program.wait_for_address();
        program.wait_for_event("server_base_url");
        Self { environment, program: Some(program), address, socket }
    }

    /// Returns a command with the configuration of Keychoir, and without its state directory.
    fn command(&self, arguments: &[&str]) -> Command {
        let config = self.environment.path("keychoir.toml");
        let mut command = keychoir_command(&[arguments, &["--config", config.to_str().unwrap()]].concat());
        command.env("HOME", self.environment.path("nowhere"));
        command
    }

    fn admin_token(&self) -> String {
        fs::read_to_string(self.environment.path("admin_token")).unwrap().trim().to_owned()
    }
}

/// Asserts that a command has used the running Keychoir, and not the files for its next start.
#[track_caller]
fn assert_online(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(output));
    assert!(
        !stderr(output).contains("no server responds"),
        "the error message must not contain `no server responds`: {}",
        stderr(output)
    );
}

#[test]
fn the_address_is_that_of_the_flag_the_variable_or_the_configuration() {
    let running = RunningProgram::start();
    let token = running.admin_token();
    let database = running.environment.path("keychoir.db");
    let https = format!("https://localhost:{}", running.address.rsplit_once(':').unwrap().1);
    let http = format!("http://{}", running.address);
    for (name, flag, variable) in [
        ("http", Some(&http), None),
        ("bare", Some(&running.address), None),
        ("socket", Some(&running.socket), None),
        ("https", Some(&https), None),
        ("variable", None, Some(&running.address)),
        ("variable-socket", None, Some(&running.socket)),
    ] {
        let mut arguments = vec!["clients", "add", name];
        arguments.extend(flag.iter().flat_map(|url| ["--url", url]));
        let mut command = running.command(&arguments);
        command.env("KEYCHOIR_ADMIN_TOKEN", &token);
        if flag.is_none_or(|url| url.starts_with("https")) {
            // The directory of the database contains the local CA.
            command.env("KEYCHOIR_STORAGE__PATH", &database);
        }
        command.envs(variable.map(|address| ("KEYCHOIR_SERVER__LISTEN", address)));
        assert_online(&run(&mut command));
    }
    running.environment.configure(&[FIRST_KEY], &format!("[server]\nlisten = \"{}\"", running.address));
    let mut command = running.command(&["clients", "add", "configured"]);
    assert_online(&run(command.env("KEYCHOIR_ADMIN_TOKEN", &token).env("KEYCHOIR_STORAGE__PATH", &database)));

    let mut list = running.command(&["clients", "list", "--json", "--url", &http]);
    let output = run(list.env("KEYCHOIR_ADMIN_TOKEN", &token));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        document["clients"].as_array().unwrap().len(),
        7,
        "every command must have added its client: {document}"
    );
}

#[test]
fn a_certificate_of_an_unknown_ca_is_refused() {
    let running = RunningProgram::start();
    let https = format!("https://localhost:{}", running.address.rsplit_once(':').unwrap().1);
    // This command has no state directory, so it does not trust the local CA of the running Keychoir.
    let output =
        run(running.command(&["status", "--url", &https]).env("KEYCHOIR_STORAGE__EPHEMERAL", "true"));
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("certificate"),
        "the error message must contain `certificate`: {}",
        stderr(&output)
    );
}

#[test]
fn the_admin_token_is_that_of_the_flag_the_variable_or_the_state_directory() {
    let running = RunningProgram::start();
    let token_file = running.environment.path("copied-token");
    fs::write(&token_file, format!("{}\n", running.admin_token())).unwrap();
    let http = format!("http://{}", running.address);
    let list = ["clients", "list", "--url", &http];
    let file = ["--admin-token-file", token_file.to_str().unwrap()];
    assert_online(&run(&mut running.command(&[&list[..], &file].concat())));
    // The flag precedes the variable.
    let mut command = running.command(&[&list[..], &file].concat());
    assert_online(&run(command.env("KEYCHOIR_ADMIN_TOKEN", "wrong-admin-token-0123456789")));
    assert_online(&run(running.command(&list).env("KEYCHOIR_ADMIN_TOKEN", running.admin_token())));
    let database = running.environment.path("keychoir.db");
    assert_online(&run(running.command(&list).env("KEYCHOIR_STORAGE__PATH", &database)));

    for (token, message) in
        [(None, "requires the admin token"), (Some("wrong-admin-token-0123456789"), "HTTP 401")]
    {
        let mut command = running.command(&list);
        command.envs(token.map(|token| ("KEYCHOIR_ADMIN_TOKEN", token)));
        let output = run(&mut command);
        assert_eq!(output.status.code(), Some(1));
        assert!(
            stderr(&output).contains(message),
            "the error message must contain {message:?}: {}",
            stderr(&output)
        );
    }
}

#[test]
fn the_expiry_of_a_token_is_changed_in_the_running_program_and_offline() {
    let mut running = RunningProgram::start();
    let http = format!("http://{}", running.address);
    let token = running.admin_token();
    let database = running.environment.path("keychoir.db");
    // These commands use the files, because no server listens at this address.
    let run_offline = |running: &RunningProgram, arguments: &[&str]| {
        let mut command = running.command(arguments);
        command.env("KEYCHOIR_STORAGE__PATH", &database).env("KEYCHOIR_SERVER__LISTEN", "127.0.0.1:0");
        run(&mut command)
    };
    let expires_at = |running: &RunningProgram| {
        let output = run_offline(running, &["clients", "show", "app", "--json"]);
        assert_eq!(output.status.code(), Some(0), "the client must be shown: {}", stderr(&output));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["expires_at"].clone()
    };
    let change_client = |arguments: &[&str]| {
        let mut command = running.command(&[arguments, &["--url", &http]].concat());
        assert_online(&run(command.env("KEYCHOIR_ADMIN_TOKEN", &token)));
    };
    change_client(&["clients", "add", "app"]);
    assert_eq!(expires_at(&running), Value::Null);
    change_client(&["clients", "set", "app", "--expires", "2100-01-01T00:00:00Z"]);
    assert_eq!(expires_at(&running), "2100-01-01T00:00:00.000Z");
    change_client(&["clients", "set", "app", "--expires", "never", "--max-concurrent", "3"]);
    assert_eq!(expires_at(&running), Value::Null);
    // A server listens at another address and would not notice a change of its files, so the command is refused.
    let set = ["clients", "set", "app", "--expires", "30d"];
    let output = run_offline(&running, &set);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("in use by another Keychoir"),
        "the error message must contain `in use by another Keychoir`: {}",
        stderr(&output)
    );
    assert_eq!(running.program.take().unwrap().terminate().0, Some(0));
    let output = run_offline(&running, &set);
    assert!(
        output.status.success() && stderr(&output).contains("no server responds"),
        "the command must change the files without a server: {}",
        stderr(&output)
    );
    assert!(expires_at(&running).is_string());
    let output = run(&mut running.command(&["clients", "set", "app", "--expires", "soon"]));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("never"), "the error message must contain `never`: {}", stderr(&output));
}
