//! Checks that the documents name code, files and tests that exist, and that `ARCHITECTURE.md` stays short.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use super::{package_root, visit_files};

/// Returns the code spans of a document.
fn code_spans(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split('`').skip(1).step_by(2))
}

#[test]
fn the_architecture_is_read_in_one_sitting() {
    let text = fs::read_to_string(package_root().join("ARCHITECTURE.md")).unwrap();
    let (_, glossary) = text.split_once("## Glossary").unwrap();
    let (glossary, _) = glossary.split_once("\n## ").unwrap();
    // Without the head of the table and its rule.
    let terms = glossary.lines().filter(|line| line.starts_with('|')).count() - 2;
    assert!(text.lines().count() <= 200 && terms <= 40, "{} lines, {terms} terms", text.lines().count());
}

#[test]
fn the_tests_of_the_invariants_exist() {
    let text = fs::read_to_string(package_root().join("ARCHITECTURE.md")).unwrap();
    let (_, invariants) = text.split_once("## Invariants").unwrap();
    let mut file = (String::new(), String::new());
    let mut count = 0;
    for name in code_spans(invariants) {
        if name.ends_with(".rs") {
            let path = if name.starts_with("src/") {
                package_root().join(name)
            } else {
                package_root().join("tests").join(name)
            };
            let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            file = (name.to_owned(), text);
        } else if name.contains('_') && !name.contains('/') && !file.0.is_empty() {
            assert!(file.1.contains(&format!("fn {name}(")), "{} must contain the test {name}", file.0);
            count += 1;
        }
    }
    assert!(count > 30, "{count}");
}

#[test]
fn documents_name_code_that_exists() {
    let (mut source, mut names) = (String::new(), BTreeSet::new());
    for place in ["src", "tests", "benches", "fuzz"] {
        visit_files(&package_root().join(place), &mut |path| {
            names.insert(path.file_name().unwrap().to_owned());
            if path.extension().is_some_and(|extension| extension == "rs") {
                source += &fs::read_to_string(path).unwrap();
            }
        });
    }
    let words: BTreeSet<&str> = source.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    let mut violations = Vec::new();
    let mut check = |path: &Path| {
        let text = fs::read_to_string(path).unwrap();
        for name in code_spans(&text) {
            let is_file = name.ends_with(".rs") && !name.contains([' ', '*']);
            let is_path =
                name.contains("::") && name.chars().all(|c| c.is_alphanumeric() || "_:".contains(c));
            let places = ["", "src", "tests", "benches", "src/proxy"];
            let exists = if is_file {
                names.contains(OsStr::new(name))
                    || places.iter().any(|place| package_root().join(place).join(name).exists())
            } else {
                !is_path || name.split("::").all(|part| words.contains(part))
            };
            if !exists {
                violations.push(format!("{}: `{name}`", path.display()));
            }
        }
    };
    visit_files(&package_root().join("docs"), &mut |path| {
        if path.extension().is_some_and(|extension| extension == "md") {
            check(path);
        }
    });
    for name in ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "README.md"] {
        check(&package_root().join(name));
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}
