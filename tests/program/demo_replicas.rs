//! Tests the program that `make demo-replicas` runs: no request fails when a replica is killed, and the usage records
//! contain every credit. Also tests that HAProxy accepts the configuration file of this deployment.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::program::{run, stderr};

/// The minimum number of requests of the demo, which kills a replica after a third of them.
const REQUESTS: &str = "90";

fn deploy_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/replicas").join(name)
}

#[test]
fn a_killed_replica_fails_no_request_and_every_credit_is_accounted_for() {
    // With `-B`, Python writes no compiled modules into the repository.
    let mut command = Command::new("python3");
    command.arg("-B").arg(deploy_path("demo/demo.py"));
    let output = run(command.args([env!("CARGO_BIN_EXE_keychoir"), "--requests", REQUESTS]));
    let stdout = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(output.status.success(), "the command must succeed: {stdout}{}", stderr(&output));
    assert!(stdout.contains(" served, 0 failed\n"), "the output must report no failed request: {stdout}");
    assert!(
        stdout.contains("replica two is killed (SIGKILL)"),
        "the output must contain `replica two is killed (SIGKILL)`: {stdout}"
    );
    assert!(
        stdout.ends_with("0 failed requests, and every credit is accounted for\n"),
        "the output must end with the comparison of the credits: {stdout}"
    );
}

#[test]
fn haproxy_accepts_the_configuration_without_variables() {
    let mut command = Command::new("haproxy");
    let output = run(command.arg("-c").arg("-f").arg(deploy_path("haproxy.cfg")));
    assert!(output.status.success(), "the command must succeed: {}", stderr(&output));
    assert!(
        !stderr(&output).contains("WARNING"),
        "the error message must not contain `WARNING`: {}",
        stderr(&output)
    );
}
