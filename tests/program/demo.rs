//! The demo as a new user runs it: every request is served, and the output is audible.

use std::fs::{self, File};

use crate::support::program::{keychoir_command, run, stderr};

#[test]
fn every_request_is_served_while_keys_run_out() {
    let folder = tempfile::tempdir().unwrap();
    let audio = folder.path().join("demo.mp3");
    let output = run(&mut keychoir_command(&["demo", "--output", audio.to_str().unwrap()]));
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(output.status.success(), "{said}");
    let ends =
        ["32 requests, 32 served, 3 keys exhausted, 0 failures", "1592 credits recorded, 1592 charged"];
    for end in ends {
        assert!(said.contains(end), "{said}");
    }
    assert!(said.contains("Rotated to key index 3"), "{said}");
    assert_eq!(said.matches("refused by key 2 (401), served by key 3").count(), 1, "{said}");
    assert!(said.contains("1 request was refused by one key and served by the next"), "{said}");
    assert!(said.contains("exhausted - rotating to next key"), "{said}");
    let sound = fs::read(audio).unwrap();
    // MPEG audio frames begin with eleven ones.
    assert!(sound.len() > 1_000_000 && sound[0] == 0xff && sound[1] & 0xe0 == 0xe0, "{} bytes", sound.len());
}

#[test]
fn an_unwritable_path_is_named_before_the_work() {
    let output = run(&mut keychoir_command(&["demo", "--output", "/nowhere/demo.mp3"]));
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("cannot write /nowhere/demo.mp3") && said.contains("--output"), "{said}");
    assert!(said.contains("No such file"), "{said}");
    assert!(output.stdout.is_empty(), "it began all the same");
}

#[test]
fn a_result_that_cannot_be_shown_is_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let audio = folder.path().join("demo.mp3");
    let mut command = keychoir_command(&["demo", "--output", audio.to_str().unwrap()]);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let status = command.stdout(full).status().unwrap();
    assert_eq!(status.code(), Some(1));
}
