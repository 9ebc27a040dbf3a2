//! Checks the systemd units with systemd's own tools. Needs `systemd-analyze`; starts nothing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at its first surprise"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Maximum exposure level, of 10.
const EXPOSURE_MAX: f64 = 1.5;

/// The first systemd version with `Type=notify-reload`.
const NOTIFY_RELOAD_SINCE: u32 = 253;

fn analyze(arguments: &[&str]) -> Output {
    Command::new("systemd-analyze")
        .args(arguments)
        .env("SYSTEMD_COLORS", "0")
        .output()
        .expect("systemd-analyze judges the units: install the package `systemd`")
}

fn unit(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(name)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn systemd_finds_nothing_to_complain_about() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["keychoir.service", "keychoir.socket"] {
        // The program is not installed at the path of the unit.
        let unit = fs::read_to_string(unit(name)).unwrap();
        let unit = unit.replace("/usr/local/bin/keychoir", env!("CARGO_BIN_EXE_keychoir"));
        fs::write(folder.path().join(name), unit).unwrap();
    }
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let output = analyze(&["verify", "--man=no", &path("keychoir.service"), &path("keychoir.socket")]);
    let version = text(&analyze(&["--version"]).stdout);
    let version: u32 = version.split_whitespace().nth(1).unwrap().parse().unwrap();
    let is_expected = |line: &str| {
        version < NOTIFY_RELOAD_SINCE
            && line.ends_with("Failed to parse service type, ignoring: notify-reload")
    };
    // The tool also reports on the dependencies of the units, which are not ours.
    let said = text(&output.stderr);
    let ours: Vec<&str> =
        said.lines().filter(|line| line.contains("keychoir")).filter(|line| !is_expected(line)).collect();
    assert!(ours.is_empty(), "{ours:#?}");
    assert!(output.status.success(), "{said}");
}

#[test]
fn the_service_is_exposed_to_little() {
    let unit = unit("keychoir.service");
    let output = analyze(&["security", "--offline=true", "--no-pager", unit.to_str().unwrap()]);
    let said = text(&output.stdout);
    let (_, level) = said.split_once("Overall exposure level for keychoir.service: ").expect("a judgement");
    let level: f64 = level.split_whitespace().next().unwrap().parse().unwrap();
    assert!(level <= EXPOSURE_MAX, "{said}");
}

#[test]
fn a_crash_leaves_no_keys_on_the_disk() {
    let unit = fs::read_to_string(unit("keychoir.service")).unwrap();
    assert!(unit.lines().any(|line| line == "LimitCORE=0"));
}
