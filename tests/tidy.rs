//! Automatic checks of the project's structure: imports between modules, purity of `policy`, the
//! size of files, and module docs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at its first surprise"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Each module and its permitted imports, without itself. `ARCHITECTURE.md` draws them.
const IMPORTS: &[(&str, &[&str])] = &[
    ("secret", &[]),
    ("policy", &["secret"]),
    ("clock", &["policy"]),
    ("tasks", &[]),
    ("pool", &["clock", "policy", "secret"]),
    ("body", &["clock", "policy", "secret", "tasks"]),
    ("certificate", &["policy", "tasks"]),
    ("upstream", &["body", "clock", "policy", "secret", "tasks"]),
    ("telemetry", &["clock", "policy", "pool", "tasks"]),
    ("proxy", &["body", "clock", "policy", "pool", "secret", "telemetry", "upstream"]),
    ("server", &["clock", "policy", "tasks"]),
    ("store", &["clock", "policy", "pool", "proxy", "secret", "tasks"]),
    ("poller", &["body", "clock", "policy", "pool", "proxy", "secret", "telemetry", "upstream"]),
    ("mirror", &["clock", "policy", "secret", "store", "upstream"]),
    ("admin", &["mirror", "policy", "pool", "proxy", "server", "store", "telemetry", "upstream"]),
    ("config", &["certificate", "clock", "policy", "secret"]),
    ("simulator", &["clock", "policy", "secret", "tasks"]),
    (
        "app",
        &[
            "admin",
            "body",
            "certificate",
            "clock",
            "config",
            "mirror",
            "policy",
            "pool",
            "proxy",
            "server",
            "store",
            "tasks",
            "telemetry",
            "upstream",
            "poller",
        ],
    ),
    (
        "cli",
        &[
            "app",
            "certificate",
            "clock",
            "config",
            "policy",
            "pool",
            "secret",
            "simulator",
            "store",
            "telemetry",
            "upstream",
        ],
    ),
    ("main", &["cli"]),
    ("lib", &[]),
];

/// Items that a pure function does not use.
const IMPURE: &[&str] = &[
    "std::fs",
    "std::io",
    "std::net",
    "std::env",
    "std::process",
    "std::thread",
    "std::sync::Mutex",
    "SystemTime",
    "Instant",
    "tokio",
    "hyper",
    "rusqlite",
    "reqwest",
    "tracing",
    "rand",
    "RandomState",
    "async ",
];

const LINES_MAX: usize = 420;

struct File {
    path: PathBuf,
    /// The source without its tests.
    code: String,
    text: String,
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn files() -> Vec<File> {
    let mut found = Vec::new();
    collect(&source(), &mut found);
    assert!(found.len() > 40, "the walk finds the sources");
    found
}

fn collect(folder: &Path, found: &mut Vec<File>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let code = if is_test(&path) { String::new() } else { without_tests(&text) };
            found.push(File { path, code, text });
        }
    }
}

/// `tests.rs`, or a file in a folder `tests`, below `src`.
fn is_test(path: &Path) -> bool {
    let inside = path.strip_prefix(source()).unwrap();
    inside.components().any(|part| ["tests", "tests.rs"].iter().any(|name| part.as_os_str() == *name))
}

fn without_tests(text: &str) -> String {
    text.split("\n#[cfg(test)]\n").next().unwrap_or_default().to_owned()
}

impl File {
    /// The module of the file.
    fn module(&self) -> String {
        let inside = self.path.strip_prefix(source()).unwrap();
        let first = inside.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
        first.trim_end_matches(".rs").to_owned()
    }

    /// The modules of this package in its code.
    fn imports(&self) -> Vec<String> {
        let mut imports: Vec<String> = Vec::new();
        let code: String = self.code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        for rest in code.split("crate::").skip(1) {
            match rest.strip_prefix('{') {
                // `use crate::{a, b::c}`
                Some(group) => {
                    let group = group.split(';').next().unwrap_or_default();
                    let mut depth = 0;
                    let mut name = String::new();
                    for c in group.chars() {
                        match c {
                            '{' => depth += 1,
                            '}' if depth == 0 => break,
                            '}' => depth -= 1,
                            ',' if depth == 0 => imports.push(std::mem::take(&mut name)),
                            c if depth == 0 => name.push(c),
                            _ => {}
                        }
                    }
                    imports.push(name);
                }
                None => imports.push(rest.to_owned()),
            }
        }
        imports
            .iter()
            .map(|path| path.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
            .filter(|name: &String| !name.is_empty() && name.chars().next().is_some_and(char::is_lowercase))
            .collect()
    }
}

#[test]
fn imports_point_inward() {
    let allowed: BTreeMap<&str, &[&str]> = IMPORTS.iter().copied().collect();
    let mut wrong = Vec::new();
    for file in files() {
        let module = file.module();
        let may = allowed.get(module.as_str()).unwrap_or_else(|| panic!("{module} has no line in the table"));
        for import in file.imports() {
            if import != module && !may.contains(&import.as_str()) {
                wrong.push(format!("{}: {module} imports {import}", file.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_of_imports_has_no_line_that_nobody_needs() {
    let mut used: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in files() {
        used.entry(file.module()).or_default().extend(file.imports());
    }
    // The binary imports the library by name, not as `crate`.
    for (module, may) in IMPORTS.iter().filter(|(module, _)| *module != "main") {
        for import in *may {
            let is_used = used.get(*module).is_some_and(|imports| imports.iter().any(|name| name == import));
            assert!(is_used, "{module} need not be allowed to import {import}");
        }
    }
}

#[test]
fn policy_is_pure() {
    for file in files().iter().filter(|file| file.module() == "policy") {
        for word in IMPURE {
            assert!(!file.code.contains(word), "{} says `{word}`", file.path.display());
        }
    }
}

#[test]
fn no_file_is_two_ideas_long() {
    for file in files() {
        let lines = file.code.lines().count();
        assert!(lines <= LINES_MAX, "{} has {lines} lines without its tests", file.path.display());
    }
}

#[test]
fn every_file_says_what_it_is_for() {
    for file in files().iter().filter(|file| !file.code.is_empty()) {
        assert!(file.text.starts_with("//! "), "{} does not begin with `//!`", file.path.display());
    }
}

#[test]
fn only_tests_are_allowed_shortcuts() {
    for file in files() {
        for word in ["todo!(", "unimplemented!(", "#[ignore", "#[allow("] {
            assert!(!file.text.contains(word), "{} says `{word}`", file.path.display());
        }
    }
}
