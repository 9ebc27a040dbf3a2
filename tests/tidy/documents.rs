//! Checks the code spans of four documents in the root and of all documents in `docs`: each Rust file and each part of
//! a path with `::` must exist in the source. Each test that `ARCHITECTURE.md` lists for an invariant must exist in the
//! file that it names. `ARCHITECTURE.md` may have at most 200 lines, and its glossary at most 40 terms.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use super::{package_root, visit_files};

/// Returns the code spans of a document, which are the parts between backticks.
fn code_spans(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split('`').skip(1).step_by(2))
}

#[test]
fn the_architecture_document_stays_short() {
    let text = fs::read_to_string(package_root().join("ARCHITECTURE.md")).unwrap();
    let (_, glossary) = text.split_once("## Glossary").unwrap();
    let (glossary, _) = glossary.split_once("\n## ").unwrap();
    // The first two lines of a table are its head and a rule.
    let terms = glossary.lines().filter(|line| line.starts_with('|')).count() - 2;
    let lines = text.lines().count();
    assert!(
        lines <= 200 && terms <= 40,
        "ARCHITECTURE.md may have 200 lines and 40 terms, and it has {lines} lines and {terms} terms"
    );
}

#[test]
fn the_tests_of_the_invariants_exist() {
    let text = fs::read_to_string(package_root().join("ARCHITECTURE.md")).unwrap();
    let (_, invariants) = text.split_once("## Invariants").unwrap();
    let (mut file_name, mut file_text) = (String::new(), String::new());
    let mut test_count = 0;
    for name in code_spans(invariants) {
        if name.ends_with(".rs") {
            let path = if name.starts_with("src/") {
                package_root().join(name)
            } else {
                package_root().join("tests").join(name)
            };
            name.clone_into(&mut file_name);
            file_text =
                fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name} must be readable: {error}"));
        } else if name.contains('_') && !name.contains('/') && !file_name.is_empty() {
            assert!(file_text.contains(&format!("fn {name}(")), "{file_name} must contain the test {name}");
            test_count += 1;
        }
    }
    assert!(test_count > 30, "ARCHITECTURE.md must name more than 30 tests, and it names {test_count}");
}

#[test]
fn documents_name_code_that_exists() {
    let (mut source, mut file_names) = (String::new(), BTreeSet::new());
    for directory in ["src", "tests", "benches", "fuzz"] {
        visit_files(&package_root().join(directory), &mut |path| {
            file_names.insert(path.file_name().unwrap().to_owned());
            if path.extension().is_some_and(|extension| extension == "rs") {
                source += &fs::read_to_string(path).unwrap();
            }
        });
    }
    let is_separator = |character: char| !character.is_alphanumeric() && character != '_';
    let identifiers: BTreeSet<&str> = source.split(is_separator).collect();
    let mut violations = Vec::new();
    let mut check_document = |path: &Path| {
        let text = fs::read_to_string(path).unwrap();
        for name in code_spans(&text) {
            let is_file = name.ends_with(".rs") && !name.contains([' ', '*']);
            let is_path = name.contains("::")
                && name.chars().all(|character| character.is_alphanumeric() || "_:".contains(character));
            let directories = ["", "src", "tests", "benches", "src/proxy"];
            let exists = if is_file {
                file_names.contains(OsStr::new(name))
                    || directories.iter().any(|directory| package_root().join(directory).join(name).exists())
            } else {
                !is_path || name.split("::").all(|part| identifiers.contains(part))
            };
            if !exists {
                violations.push(format!("{}: `{name}`", path.display()));
            }
        }
    };
    visit_files(&package_root().join("docs"), &mut |path| {
        if path.extension().is_some_and(|extension| extension == "md") {
            check_document(path);
        }
    });
    for name in ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "README.md"] {
        check_document(&package_root().join(name));
    }
    assert!(
        violations.is_empty(),
        "the documents must name only code that exists:\n{}",
        violations.join("\n")
    );
}
