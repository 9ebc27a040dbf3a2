//! Tests the output for shells and for `man`: completion scripts, manual pages, and the help for wrong arguments.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::program::{keychoir_command, run, stderr};

/// Runs `program` with `input` as its standard input. Returns whether it succeeded, and its standard output and error.
fn run_with_input(program: &str, arguments: &[&str], input: &[u8]) -> (bool, String) {
    let spawned = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = spawned.unwrap_or_else(|error| panic!("`{program}` must be installed: {error}"));
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    let outputs = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.success(), outputs.concat())
}

#[test]
fn completion_scripts_are_valid_in_their_shells() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = run(&mut keychoir_command(&["completions", shell]));
        assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(
            script.contains("keychoir") && script.contains("serve"),
            "the script for {shell} must complete the commands: {script}"
        );
        let (is_valid, errors) = match shell {
            "bash" => run_with_input("bash", &["-n"], script.as_bytes()),
            "zsh" => run_with_input("zsh", &["-n"], script.as_bytes()),
            "fish" => run_with_input("fish", &["--no-execute"], script.as_bytes()),
            _ => continue,
        };
        assert!(is_valid && errors.is_empty(), "{shell} must accept the script: {errors}");
    }
    let output = run(&mut keychoir_command(&["completions", "tcsh"]));
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn bash_completes_commands_and_flags() {
    let script = run(&mut keychoir_command(&["completions", "bash"])).stdout;
    for (words, index, expected) in [
        ("keychoir sta", 1, "status"),
        ("keychoir usage --sin", 2, "--since"),
        ("keychoir keys li", 2, "list"),
    ] {
        let current = words.rsplit(' ').next().unwrap();
        let completion_call = format!(
            "\nCOMP_WORDS=({words}); COMP_CWORD={index}; _keychoir keychoir {current} ''; echo \"${{COMPREPLY[@]}}\"\n"
        );
        let (_, completions) =
            run_with_input("bash", &[], &[script.as_slice(), completion_call.as_bytes()].concat());
        assert_eq!(completions.trim(), expected);
    }
}

/// Returns the name and the text of each page in a directory.
fn read_pages(directory: &Path) -> Vec<(String, String)> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let page = |path: std::path::PathBuf| {
        (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(path).unwrap())
    };
    entries.map(page).collect()
}

#[test]
fn manual_pages_are_written_and_valid() {
    let directory = tempfile::tempdir().unwrap();
    let man = directory.path().join("share/man/man1");
    let output = run(&mut keychoir_command(&["man", man.to_str().unwrap()]));
    assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
    let pages = read_pages(&man);
    for name in ["keychoir.1", "keychoir-serve.1", "keychoir-clients.1", "keychoir-clients-add.1"] {
        assert!(pages.iter().any(|(page, _)| page == name), "{name} must exist");
    }
    for (name, page) in &pages {
        // The date of a page would be the date of the release, which is unknown at build time.
        let arguments = ["-T", "lint", "-W", "warning"];
        let (_, warnings) = run_with_input("mandoc", &arguments, page.as_bytes());
        let mistakes: Vec<&str> = warnings.lines().filter(|line| !line.contains("missing date")).collect();
        assert!(mistakes.is_empty(), "{name} must be a valid manual page: {mistakes:#?}\n{page}");
    }
    // The command also succeeds if the directory exists and contains the pages of an earlier version.
    assert_eq!(run(&mut keychoir_command(&["man", man.to_str().unwrap()])).status.code(), Some(0));
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let output = run(&mut keychoir_command(&["man", file.to_str().unwrap()]));
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains(file.to_str().unwrap()),
        "the error message must name the path: {}",
        stderr(&output)
    );
}

#[test]
fn a_wrong_command_or_flag_is_answered_with_the_right_one() {
    for (arguments, suggestion) in [
        (&["start"] as &[&str], "'serve'"),
        (&["serve", "--port", "80"], "'--listen'"),
        (&["--port=80"], "'--listen'"),
        (&["clients", "create", "app"], "'add'"),
        (&["stauts"], "'status'"),
    ] {
        let output = run(&mut keychoir_command(arguments));
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "the arguments must be refused: {text}");
        assert!(text.contains(suggestion), "{arguments:?}: the output must contain {suggestion:?}: {text}");
    }
}

#[test]
fn help_shows_examples_and_exit_codes() {
    for arguments in [&["--help"] as &[&str], &["-h"], &["serve", "--help"], &["help", "usage"]] {
        let output = run(&mut keychoir_command(arguments));
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(
            text.contains("Examples:\n") && text.contains("Exit codes:\n"),
            "the help for {arguments:?} must have examples and exit codes: {text}"
        );
    }
}
