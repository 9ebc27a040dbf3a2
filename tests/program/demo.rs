//! Tests `keychoir demo`: every request is served while keys run out of credits, the summary is printed, the audio file
//! is valid, and failed writes are reported.

use std::fs::{self, File};

use crate::support::program::{keychoir_command, run, stderr};

#[test]
fn every_request_is_served_while_keys_run_out() {
    let directory = tempfile::tempdir().unwrap();
    let audio = directory.path().join("demo.mp3");
    let output = run(&mut keychoir_command(&["demo", "--output", audio.to_str().unwrap()]));
    let stdout = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(output.status.success(), "the command must succeed: {stdout}");
    let expected_lines =
        ["32 requests, 32 served, 3 keys exhausted, 0 failures", "1592 credits recorded, 1592 charged"];
    for line in expected_lines {
        assert!(stdout.contains(line), "the output must contain {line:?}: {stdout}");
    }
    assert!(
        stdout.contains("Rotated to key index 3"),
        "the output must contain `Rotated to key index 3`: {stdout}"
    );
    assert_eq!(
        stdout.matches("refused by key 2 (401), served by key 3").count(),
        1,
        "exactly one refused request must be listed: {stdout}"
    );
    assert!(
        stdout.contains("1 request was refused by one key and served by the next"),
        "the output must report the refused request: {stdout}"
    );
    assert!(
        stdout.contains("exhausted - rotating to next key"),
        "the output must contain `exhausted - rotating to next key`: {stdout}"
    );
    let mp3 = fs::read(audio).unwrap();
    // An MPEG audio frame starts with eleven set bits.
    let is_mp3 = mp3.len() > 1_000_000 && mp3[0] == 0xff && mp3[1] & 0xe0 == 0xe0;
    assert!(is_mp3, "the file must be MPEG audio of more than 1 MB, and it has {} bytes", mp3.len());
}

#[test]
fn an_unwritable_output_path_is_reported_before_the_demo_starts() {
    let output = run(&mut keychoir_command(&["demo", "--output", "/nowhere/demo.mp3"]));
    assert_eq!(output.status.code(), Some(1));
    let message = stderr(&output);
    assert!(
        message.contains("cannot write /nowhere/demo.mp3") && message.contains("--output"),
        "the message must name the path and the flag: {message}"
    );
    assert!(message.contains("No such file"), "the message must contain `No such file`: {message}");
    assert!(output.stdout.is_empty(), "the demo must print nothing");
}

#[test]
fn a_summary_that_cannot_be_printed_is_a_failure() {
    let directory = tempfile::tempdir().unwrap();
    let audio = directory.path().join("demo.mp3");
    let mut command = keychoir_command(&["demo", "--output", audio.to_str().unwrap()]);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let status = command.stdout(full).status().unwrap();
    assert_eq!(status.code(), Some(1));
}
