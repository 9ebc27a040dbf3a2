//! Tests the exit code and the message of `keychoir healthcheck`: with a running Keychoir that has a usable key or
//! none, with a server that does not respond, without a server, and with mistakes in the configuration.

use std::net::TcpListener;
use std::process::Command;

use crate::environment::{FIRST_KEY, ProgramEnvironment};
use crate::support::program::{Program, keychoir_command, run, stderr};

/// Returns a health check with the configuration of Keychoir in `environment`.
fn healthcheck(environment: &ProgramEnvironment, arguments: &[&str]) -> Command {
    let config = environment.path("keychoir.toml");
    let mut command =
        keychoir_command(&[&["healthcheck", "--config", config.to_str().unwrap()], arguments].concat());
    command.env("KEYCHOIR_STORAGE__PATH", environment.path("keychoir.db"));
    command
}

#[track_caller]
fn assert_healthy(command: &mut Command) {
    let output = run(command);
    assert_eq!(output.status.code(), Some(0), "the health check must succeed: {}", stderr(&output));
    let state = String::from_utf8(output.stdout).unwrap();
    assert!(
        ["ready\n", "degraded\n"].contains(&state.as_str()),
        "the output must be the readiness, not {state:?}"
    );
}

#[track_caller]
fn assert_unhealthy(command: &mut Command, message: &str) {
    let output = run(command);
    assert_eq!(output.status.code(), Some(1), "the health check must fail: {}", stderr(&output));
    assert!(stderr(&output).contains(message), "the message must contain {message:?}: {}", stderr(&output));
}

#[test]
fn a_program_with_a_usable_key_is_healthy_at_each_of_its_listeners() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    // Clients with tokens change nothing: the readiness is public.
    environment.configure(&[FIRST_KEY], "[[clients]]\nname = \"app\"\ntoken = \"token-of-the-app-0123\"");
    let socket = format!("unix:{}", environment.path("k.sock").display());
    let mut program =
        Program::start(&mut environment.command(&["--listen", "127.0.0.1:0", "--listen", &socket]));
    let address = program.wait_for_address();
    program.wait_for_event("server_base_url");
    let port = address.rsplit_once(':').unwrap().1;

    for url in [format!("http://{address}"), format!("https://localhost:{port}"), socket.clone()] {
        assert_healthy(&mut healthcheck(&environment, &["--url", &url]));
    }
    for listen in [&address, &socket, &format!("0.0.0.0:{port}")] {
        assert_healthy(healthcheck(&environment, &[]).env("KEYCHOIR_SERVER__LISTEN", listen));
        assert_healthy(&mut healthcheck(&environment, &["--listen", listen]));
    }
}

#[test]
fn a_mistake_in_an_edited_configuration_makes_no_running_program_unhealthy() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "");
    let (_program, address) = environment.start();
    let listen = format!("listen = \"{address}\"");
    for mistake in ["drain_timeout = 3", "unknown = 1", "drain_timeout = \"3s", "[[clients]]\nname = \"A\""] {
        environment.configure(&["not a key"], &format!("[server]\n{listen}\n{mistake}"));
        assert_healthy(&mut healthcheck(&environment, &[]));
    }
}

#[test]
fn a_program_without_a_usable_key_is_unhealthy() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "");
    let (_program, address) = environment.start();
    let url = format!("http://{address}");
    let mut pause = keychoir_command(&["keys", "pause", "sk_key_numb...00001", "--url", &url]);
    let output = run(pause.env("KEYCHOIR_STORAGE__PATH", environment.path("keychoir.db")));
    assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
    assert_unhealthy(&mut healthcheck(&environment, &["--url", &url]), "no key can serve");
}

#[test]
fn a_server_that_does_not_respond_is_unhealthy_within_the_timeout() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "");
    // The system accepts connections for this listener, and nothing responds.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let arguments = ["--url", &url, "--timeout", "200ms"];
    assert_unhealthy(&mut healthcheck(&environment, &arguments), "did not respond within 200ms");
    drop(listener);
    assert_unhealthy(&mut healthcheck(&environment, &["--url", &url]), "does not respond at");
    let output = run(&mut healthcheck(&environment, &["--timeout", "2h"]));
    assert_eq!(output.status.code(), Some(2), "a timeout of two hours must be refused: {}", stderr(&output));
}

#[test]
fn a_program_without_a_fixed_address_needs_a_url() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "[server]\nlisten = \"127.0.0.1:0\"");
    assert_unhealthy(&mut healthcheck(&environment, &[]), "--url");
}
