//! Tests `keychoir status` with a running Keychoir: colours, paused keys, and `--watch` during a restart of Keychoir.

use std::cell::Cell;

use crate::environment::{FIRST_KEY, ProgramEnvironment, SECOND_KEY};
use crate::support::program::{Program, keychoir_command, run, stderr};

/// Starts a program on a Unix socket, whose path is the same after a restart. Returns it and the URL of the socket.
fn start(environment: &ProgramEnvironment) -> (Program, String) {
    let url = format!("unix:{}", environment.path("k.sock").display());
    let mut program = Program::start(&mut environment.command(&["--listen", &url]));
    program.wait_for_event("server_started");
    (program, url)
}

#[test]
fn a_paused_key_is_shown_as_paused() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY, SECOND_KEY], "");
    let (_program, url) = start(&environment);
    let keychoir = |arguments: &[&str]| {
        let mut command = keychoir_command(&[arguments, &["--url", &url]].concat());
        environment.set_environment(&mut command);
        let output = run(&mut command);
        assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let short = keychoir::secret::ApiKey::new(SECOND_KEY).unwrap().short().to_string();
    keychoir(&["keys", "pause", &short, "--reason", "billing dispute"]);
    let text = keychoir(&["status"]);
    let line = text.lines().find(|line| line.contains(&short)).unwrap();
    assert!(line.contains("paused"), "the line of the key must show that it is paused: {text}");
    assert!(
        text.contains("1 of 2 keys active, 1 paused"),
        "the output must contain `1 of 2 keys active, 1 paused`: {text}"
    );
    assert!(text.contains("billing dispute"), "the output must contain `billing dispute`: {text}");
    assert!(!text.contains('\u{1b}'), "the output of a pipe must have no colours: {text}");
    let colored = keychoir(&["status", "--color", "always"]);
    assert!(colored.contains("\u{1b}[33mpaused\u{1b}[0m"), "the status must be printed in yellow: {colored}");
    let mut plain = colored.clone();
    for code in ["32", "33", "31", "2", "0"] {
        plain = plain.replace(&format!("\u{1b}[{code}m"), "");
    }
    assert_eq!(plain, text, "colours must not change the layout");
}

#[test]
fn the_watched_state_survives_a_restart_of_the_server() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "");
    let (program, url) = start(&environment);
    let mut command = keychoir_command(&["status", "--watch", "500ms", "--url", &url]);
    let mut watch = Program::start_and_read_output(&mut command);
    let wait_for = |watch: &mut Program, text: &str| {
        let line_count = Cell::new(0);
        watch.wait_for_line(|line| {
            line_count.set(line_count.get() + 1);
            assert!(line_count.get() < 500, "a frame must contain {text:?}; the last line is {line:?}");
            line.contains(text).then_some(())
        });
    };
    wait_for(&mut watch, "1 of 1 keys active");
    assert_eq!(program.terminate().0, Some(0));
    wait_for(&mut watch, "No response since 20");
    wait_for(&mut watch, "Keychoir does not respond");
    // The command still shows the last state that it received.
    wait_for(&mut watch, "1 of 1 keys active");
    let (program, _) = start(&environment);
    wait_for(&mut watch, ", every 500ms");
    wait_for(&mut watch, "1 of 1 keys active");
    watch.send_signal("INT");
    assert_eq!(watch.wait_for_exit().0, Some(0), "an interrupted watch must succeed");
    assert_eq!(program.terminate().0, Some(0));
}
