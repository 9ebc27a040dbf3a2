//! Checks the source and the documents of the repository without running Keychoir. This file checks that the names of
//! types are unique, that no file contains a forbidden word, that source files are short, start with documentation and
//! contain neither unfinished code nor `#[allow]`, and that tokens are compared in constant time. The submodules check
//! the imports of modules, and the names in documents.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test panics if an expectation fails"
)]

mod documents;
mod imports;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Maximum number of lines in a file without its tests.
const MAX_LINES: usize = 420;

/// Words that do not name the person or the thing that is meant.
const FORBIDDEN_WORDS: &[&str] = &["whoever", "somebody", "strangers", "the house"];

/// Type names that several modules may use.
const COMMON_NAMES: &[&str] =
    &["Arguments", "Command", "Error", "Inner", "Kind", "Reason", "Settings", "Shared", "State"];

/// A parsed Rust file in `src/`.
struct SourceFile {
    path: PathBuf,
    /// The module of the file with its parents, such as `["proxy", "socket", "frame"]`.
    modules: Vec<String>,
    /// Whether the file belongs to a module `tests`.
    is_test: bool,
    text: String,
    syntax: syn::File,
}

fn package_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns all Rust files in `src/`.
fn read_source_files() -> Vec<SourceFile> {
    let mut files = Vec::new();
    visit_files(&package_root().join("src"), &mut |path| {
        if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(SourceFile::read(path.to_owned()));
        }
    });
    assert!(files.len() > 40, "more than 40 source files must be found, and {} are found", files.len());
    files
}

/// Calls `visit` for each file in a directory and its subdirectories. Skips subdirectories that are hidden, and those
/// that contain files of build tools.
fn visit_files(directory: &Path, visit: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let is_generated_or_hidden =
            name.starts_with('.') || ["target", "node_modules", "__pycache__"].contains(&&*name);
        if path.is_dir() && !is_generated_or_hidden {
            visit_files(&path, visit);
        } else if path.is_file() {
            visit(&path);
        }
    }
}

impl SourceFile {
    fn read(path: PathBuf) -> Self {
        let text = fs::read_to_string(&path).unwrap();
        let syntax = syn::parse_file(&text)
            .unwrap_or_else(|error| panic!("{} must be valid Rust: {error}", path.display()));
        let relative_path = path.strip_prefix(package_root().join("src")).unwrap().with_extension("");
        let mut modules: Vec<String> =
            relative_path.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
        if modules.len() > 1 && modules.last().is_some_and(|last| last == "mod") {
            modules.pop();
        }
        let is_test = modules.iter().any(|module| module == "tests");
        Self { path, modules, is_test, text, syntax }
    }

    /// Returns the top-level module that contains the file.
    fn module(&self) -> &str {
        &self.modules[0]
    }

    /// Returns the number of lines, not counting test items.
    fn count_lines(&self) -> usize {
        let line_count = self.text.lines().count();
        let tests = self.syntax.items.iter().filter(|item| is_for_tests(attributes(item)));
        line_count - tests.map(count_item_lines).sum::<usize>()
    }
}

/// Returns whether an item with these attributes is compiled only for tests: `#[test]`, `#[cfg(test)]`, or
/// `#[cfg(all(test, …))]`.
fn is_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("test")
            || attribute.path().is_ident("cfg")
                && attribute.meta.require_list().is_ok_and(|list| {
                    let text = list.tokens.to_string();
                    text == "test" || text.starts_with("all (test") || text.starts_with("all(test")
                })
    })
}

/// Returns the attributes of an item. Returns none for `extern` items and for tokens that `syn` does not parse.
fn attributes(item: &syn::Item) -> &[syn::Attribute] {
    match item {
        syn::Item::Const(item) => &item.attrs,
        syn::Item::Enum(item) => &item.attrs,
        syn::Item::Fn(item) => &item.attrs,
        syn::Item::Impl(item) => &item.attrs,
        syn::Item::Macro(item) => &item.attrs,
        syn::Item::Mod(item) => &item.attrs,
        syn::Item::Static(item) => &item.attrs,
        syn::Item::Struct(item) => &item.attrs,
        syn::Item::Trait(item) => &item.attrs,
        syn::Item::Type(item) => &item.attrs,
        syn::Item::Union(item) => &item.attrs,
        syn::Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Returns the number of lines of an item, from its first attribute to its end.
fn count_item_lines(item: &syn::Item) -> usize {
    use syn::spanned::Spanned as _;
    let first = attributes(item).first().map_or_else(|| item.span().start(), |first| first.span().start());
    let last = item.span().end();
    last.line - first.line + 1
}

#[test]
fn type_names_are_unique() {
    let mut defined: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    // `platform::unix` and `platform::windows` define the same names, and each build contains only one of the modules.
    let is_windows_variant = |file: &SourceFile| {
        file.module() == "platform" && file.modules.get(1).is_some_and(|name| name == "windows")
    };
    let files = read_source_files();
    let production_files = files
        .iter()
        .filter(|file| !file.is_test && file.module() != "simulator" && !is_windows_variant(file));
    for file in production_files {
        for item in file.syntax.items.iter().filter(|item| !is_for_tests(attributes(item))) {
            let name = match item {
                syn::Item::Enum(item) => &item.ident,
                syn::Item::Struct(item) => &item.ident,
                syn::Item::Trait(item) => &item.ident,
                _ => continue,
            };
            defined.entry(name.to_string()).or_default().insert(file.modules.join("::"));
        }
    }
    let duplicates: Vec<String> = defined
        .iter()
        .filter(|(name, modules)| modules.len() > 1 && !COMMON_NAMES.contains(&name.as_str()))
        .map(|(name, modules)| format!("{name}: {modules:?}"))
        .collect();
    assert!(duplicates.is_empty(), "the names of types must be unique:\n{}", duplicates.join("\n"));
}

#[test]
fn forbidden_words_are_not_used() {
    let mut violations = Vec::new();
    let mut check_words = |path: &Path| {
        let Ok(text) = fs::read_to_string(path) else { return };
        for (number, line) in text.lines().enumerate() {
            let lower = line.to_lowercase();
            for word in FORBIDDEN_WORDS.iter().filter(|word| lower.contains(**word)) {
                violations.push(format!("{}:{}: contains `{word}`", path.display(), number + 1));
            }
        }
    };
    for directory in ["src", "tests", "benches", "config", "deploy", "docs", "systemd"] {
        visit_files(&package_root().join(directory), &mut |path| {
            let is_text = ["rs", "md", "toml", "py", "mjs", "js", "sql", "service", "txt"]
                .iter()
                .any(|extension| path.extension().is_some_and(|found| found == *extension));
            if is_text && !path.ends_with("tests/tidy/main.rs") {
                check_words(path);
            }
        });
    }
    for name in ["README.md", "ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile"]
    {
        check_words(&package_root().join(name));
    }
    assert!(violations.is_empty(), "forbidden words must not be used:\n{}", violations.join("\n"));
}

/// A derived comparison would stop at the first different byte, so that its duration would depend on the secret token.
#[test]
fn tokens_are_compared_in_constant_time() {
    let files = read_source_files();
    let file = files.iter().find(|file| file.modules == ["secret", "fingerprint"]).unwrap();
    for item in &file.syntax.items {
        match item {
            syn::Item::Struct(token) if token.ident.to_string().ends_with("TokenFingerprint") => {
                let derives =
                    token.attrs.iter().find(|attribute| attribute.path().is_ident("derive")).unwrap();
                let derived = derives.meta.require_list().unwrap().tokens.to_string();
                assert!(
                    !derived.contains("PartialEq") && !derived.contains("Hash"),
                    "{} must not derive a comparison: {derived}",
                    token.ident
                );
            }
            syn::Item::Impl(implementation) => {
                use quote::ToTokens as _;
                let text = implementation.to_token_stream().to_string();
                let is_token = ["TokenFingerprint", "AdminTokenFingerprint", "SessionTokenFingerprint"]
                    .iter()
                    .any(|name| text.starts_with(&format!("impl PartialEq for {name}")));
                assert!(!is_token || text.contains("ct_eq"), "the comparison must use `ct_eq`: {text}");
            }
            _ => {}
        }
    }
}

#[test]
fn no_file_exceeds_the_maximum_length() {
    for file in read_source_files().iter().filter(|file| !file.is_test) {
        let lines = file.count_lines();
        assert!(
            lines <= MAX_LINES,
            "{} must have at most {MAX_LINES} lines without its tests, and it has {lines}",
            file.path.display()
        );
    }
}

#[test]
fn every_file_starts_with_module_documentation() {
    for file in read_source_files().iter().filter(|file| !file.is_test) {
        assert!(file.text.starts_with("//! "), "{} must begin with `//!`", file.path.display());
    }
}

#[test]
fn the_source_has_no_unfinished_code_and_no_allow_attributes() {
    for file in read_source_files() {
        for word in ["todo!(", "unimplemented!(", "#[ignore", "#[allow("] {
            assert!(!file.text.contains(word), "{} must not contain `{word}`", file.path.display());
        }
    }
}
