//! Checks the units in `systemd/` with `systemd-analyze`, without starting them: they must be valid, and the service
//! must have a low exposure level. Also checks that the service writes no core dumps, which could contain keys.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test panics if an expectation fails"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The maximum exposure level on the scale of `systemd-analyze security`, from 0 to 10.
const MAX_EXPOSURE: f64 = 1.5;

/// The first systemd version with `Type=notify-reload`.
const NOTIFY_RELOAD_VERSION: u32 = 253;

/// Runs `systemd-analyze` and returns its output.
fn run_systemd_analyze(arguments: &[&str]) -> Output {
    Command::new("systemd-analyze")
        .args(arguments)
        .env("SYSTEMD_COLORS", "0")
        .output()
        .expect("`systemd-analyze` must be installed: apt-get install systemd")
}

fn unit_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(name)
}

fn to_text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn systemd_verifies_the_units_without_warnings() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["keychoir.service", "keychoir.socket"] {
        // `systemd-analyze` requires that the executable exists, so the installed path is replaced by the
        // test binary.
        let unit = fs::read_to_string(unit_path(name)).unwrap();
        let unit = unit.replace("/usr/local/bin/keychoir", env!("CARGO_BIN_EXE_keychoir"));
        fs::write(directory.path().join(name), unit).unwrap();
    }
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let output =
        run_systemd_analyze(&["verify", "--man=no", &path("keychoir.service"), &path("keychoir.socket")]);
    let version = to_text(&run_systemd_analyze(&["--version"]).stdout);
    let version_number: u32 = version.split_whitespace().nth(1).unwrap().parse().unwrap();
    let is_expected = |line: &str| {
        version_number < NOTIFY_RELOAD_VERSION
            && line.ends_with("Failed to parse service type, ignoring: notify-reload")
    };
    // `systemd-analyze` also reports problems of other units on which these units depend.
    let report = to_text(&output.stderr);
    let unexpected_lines: Vec<&str> =
        report.lines().filter(|line| line.contains("keychoir")).filter(|line| !is_expected(line)).collect();
    assert!(unexpected_lines.is_empty(), "the units must have no warnings: {unexpected_lines:#?}");
    assert!(output.status.success(), "the units must be valid: {report}");
}

#[test]
fn the_service_has_a_low_exposure_level() {
    let service_path = unit_path("keychoir.service");
    let output =
        run_systemd_analyze(&["security", "--offline=true", "--no-pager", service_path.to_str().unwrap()]);
    let report = to_text(&output.stdout);
    let (_, level) = report
        .split_once("Overall exposure level for keychoir.service: ")
        .expect("the report must contain the exposure level");
    let level: f64 = level.split_whitespace().next().unwrap().parse().unwrap();
    assert!(level <= MAX_EXPOSURE, "the exposure level must be at most {MAX_EXPOSURE}: {report}");
}

#[test]
fn a_crash_does_not_write_keys_to_a_core_dump() {
    let unit = fs::read_to_string(unit_path("keychoir.service")).unwrap();
    assert!(unit.lines().any(|line| line == "LimitCORE=0"), "the unit must contain LimitCORE=0");
}
