//! Automatic checks of the project's structure and language, on parsed source: imports between modules,
//! purity of `elevenlabs` and `policy`, names of types, forbidden words, the size of files and module docs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a failed expectation ends the test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};

/// Each module and its permitted imports, without itself. `ARCHITECTURE.md` draws them.
const IMPORTS: &[(&str, &[&str])] = &[
    ("secret", &[]),
    ("policy", &["secret"]),
    ("elevenlabs", &["policy"]),
    ("clock", &["policy"]),
    ("tasks", &[]),
    ("pool", &["clock", "elevenlabs", "policy", "secret"]),
    ("body", &["clock", "policy", "secret", "tasks"]),
    ("certificate", &["policy", "private_file", "tasks"]),
    ("private_file", &[]),
    ("upstream", &["body", "clock", "policy", "secret", "tasks"]),
    ("telemetry", &["clock", "elevenlabs", "policy", "pool", "secret", "tasks"]),
    ("proxy", &["body", "clock", "elevenlabs", "policy", "pool", "secret", "telemetry", "upstream"]),
    ("server", &["clock", "policy", "tasks"]),
    (
        "shared",
        &[
            "clock",
            "elevenlabs",
            "policy",
            "poller",
            "pool",
            "proxy",
            "secret",
            "store",
            "tasks",
            "telemetry",
            "upstream",
        ],
    ),
    ("store", &["clock", "elevenlabs", "policy", "pool", "private_file", "proxy", "secret", "tasks"]),
    (
        "poller",
        &["body", "clock", "elevenlabs", "policy", "pool", "proxy", "secret", "telemetry", "upstream"],
    ),
    ("mirror", &["clock", "policy", "secret", "store", "upstream"]),
    (
        "admin",
        &[
            "clock",
            "mirror",
            "policy",
            "poller",
            "pool",
            "private_file",
            "proxy",
            "secret",
            "server",
            "shared",
            "store",
            "tasks",
            "telemetry",
            "upstream",
        ],
    ),
    ("dashboard", &["admin", "clock", "policy", "secret", "store", "telemetry"]),
    ("config", &["certificate", "clock", "policy", "private_file", "secret"]),
    ("simulator", &["clock", "elevenlabs", "policy", "secret", "tasks"]),
    (
        "app",
        &[
            "admin",
            "body",
            "certificate",
            "clock",
            "dashboard",
            "config",
            "elevenlabs",
            "mirror",
            "policy",
            "pool",
            "proxy",
            "secret",
            "server",
            "shared",
            "store",
            "tasks",
            "telemetry",
            "upstream",
            "poller",
            "secret",
        ],
    ),
    ("control", &["admin", "app", "clock", "config", "policy", "secret", "shared", "store", "telemetry"]),
    (
        "cli",
        &[
            "app",
            "admin",
            "certificate",
            "clock",
            "config",
            "control",
            "policy",
            "pool",
            "secret",
            "simulator",
            "store",
            "tasks",
            "telemetry",
            "upstream",
        ],
    ),
    ("main", &["cli"]),
    ("lib", &[]),
];

/// The modules whose functions are pure.
const PURE: &[&str] = &["elevenlabs", "policy"];

/// Crates that a pure module may use, beside the standard library.
const PURE_CRATES: &[&str] = &[
    "bytes",
    "http",
    "httparse",
    "httpdate",
    "jiff",
    "memchr",
    "rustix",
    "serde",
    "serde_json",
    "sha2",
    "strsim",
    "subtle",
    "thiserror",
    "tokio_tungstenite",
];

/// Modules of the standard library that a pure module may use. Each has only functions of their arguments.
const PURE_STD: &[&str] = &[
    "any",
    "array",
    "borrow",
    "cell",
    "char",
    "cmp",
    "collections",
    "error",
    "fmt",
    "hash",
    "iter",
    "marker",
    "mem",
    "num",
    "ops",
    "option",
    "result",
    "slice",
    "str",
    "string",
    "vec",
];

/// Single items of other modules of the standard library that a pure module may use.
const PURE_ITEMS: &[&str] = &[
    "sync::Arc",
    "sync::LazyLock",
    "time::Duration",
    "time::UNIX_EPOCH",
    "net::IpAddr",
    "net::Ipv4Addr",
    "net::Ipv6Addr",
];

/// Maximum lines of a file without its tests.
const MAX_LINES: usize = 420;

/// Words that do not name the subject of a sentence.
const FORBIDDEN_WORDS: &[&str] = &["whoever", "somebody", "strangers", "the house"];

/// Type names that several modules may use.
const COMMON_NAMES: &[&str] =
    &["Arguments", "Command", "Error", "Inner", "Kind", "Reason", "Settings", "Shared", "State"];

struct File {
    path: PathBuf,
    /// The modules that lead to the file: `["proxy", "socket", "frame"]`.
    modules: Vec<String>,
    is_test: bool,
    text: String,
    syntax: syn::File,
}

fn package_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read_files() -> Vec<File> {
    let mut files = Vec::new();
    visit_files(&package_root().join("src"), &mut |path| {
        if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(File::read(path.to_owned()));
        }
    });
    assert!(files.len() > 40, "the source files are found");
    files
}

fn visit_files(directory: &Path, visit: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let is_foreign = name.starts_with('.') || ["target", "node_modules", "__pycache__"].contains(&&*name);
        if path.is_dir() && !is_foreign {
            visit_files(&path, visit);
        } else if path.is_file() {
            visit(&path);
        }
    }
}

impl File {
    fn read(path: PathBuf) -> Self {
        let text = fs::read_to_string(&path).unwrap();
        let syntax = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let inside = path.strip_prefix(package_root().join("src")).unwrap().with_extension("");
        let mut modules: Vec<String> =
            inside.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
        if modules.len() > 1 && modules.last().is_some_and(|last| last == "mod") {
            modules.pop();
        }
        let is_test = modules.iter().any(|module| module == "tests");
        Self { path, modules, is_test, text, syntax }
    }

    fn module(&self) -> &str {
        &self.modules[0]
    }

    /// Returns the number of lines without those of test items.
    fn lines(&self) -> usize {
        let line_count = self.text.lines().count();
        let tests = self.syntax.items.iter().filter(|item| is_for_tests(attributes(item)));
        line_count - tests.map(|item| lines_of(item, &self.text)).sum::<usize>()
    }

    /// Returns all paths in the code, as segments from the crate root: `["crate", "pool", "Pool"]`.
    fn paths(&self) -> Paths {
        let mut paths = Paths { modules: self.modules.clone(), ..Paths::default() };
        if !self.is_test {
            paths.visit_file(&self.syntax);
        }
        paths
    }
}

/// Collects the paths of a file, including those in macros, except in test items.
#[derive(Default)]
struct Paths {
    modules: Vec<String>,
    found: BTreeSet<Vec<String>>,
    has_async: bool,
    violations: Vec<String>,
}

impl Paths {
    /// Adds a path. Leading `super` and `self` segments are replaced by the path from the crate root.
    fn add(&mut self, path: Vec<String>) {
        let mut base = self.modules.clone();
        let mut rest = path.as_slice();
        match path.first().map(String::as_str) {
            Some("self" | "super") => {
                while let [first, tail @ ..] = rest
                    && (first == "self" || first == "super")
                {
                    if first == "super" {
                        base.pop();
                    }
                    rest = tail;
                }
                let full_path = ["crate".to_owned()].into_iter().chain(base).chain(rest.iter().cloned());
                self.found.insert(full_path.collect());
            }
            _ => {
                self.found.insert(path);
            }
        }
    }

    fn add_tree(&mut self, before: &[String], tree: &syn::UseTree) {
        let path_with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.add_tree(&path_with(&path.ident), &path.tree),
            syn::UseTree::Name(name) => self.add(path_with(&name.ident)),
            syn::UseTree::Rename(name) => {
                let is_root = before.iter().all(|part| ["crate", "super", "self"].contains(&part.as_str()));
                if is_root
                    && ["crate", "self", "super", "keychoir"].contains(&name.ident.to_string().as_str())
                {
                    self.violations.push(format!("gives `{}` another name", name.ident));
                }
                self.add(path_with(&name.ident));
            }
            syn::UseTree::Glob(_) => {
                if ["crate", "keychoir"].contains(&before.join("::").as_str()) {
                    self.violations.push("imports all of the crate".to_owned());
                }
                self.add(before.to_vec());
            }
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.add_tree(before, tree)),
        }
    }

    /// Adds the paths in the tokens of a macro.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(name) => {
                    if colons != 2 {
                        self.add(std::mem::take(&mut path));
                    }
                    self.has_async |= name == "async";
                    path.push(name.to_string());
                    colons = 0;
                }
                TokenTree::Punct(mark) if mark.as_char() == ':' => colons += 1,
                TokenTree::Group(group) => {
                    self.add(std::mem::take(&mut path));
                    self.add_tokens(group.stream());
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => self.add(std::mem::take(&mut path)),
            }
        }
        self.add(path);
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if !is_for_tests(attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !is_for_tests(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        self.modules.push(module.ident.to_string());
        visit::visit_item_mod(self, module);
        self.modules.pop();
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.add_tree(&[], &item.tree);
    }

    fn visit_item_extern_crate(&mut self, item: &'ast syn::ItemExternCrate) {
        self.violations.push(format!("declares the crate `{}`", item.ident));
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.add(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.visit_path(&call.path);
        self.add_tokens(call.tokens.clone());
    }

    fn visit_signature(&mut self, signature: &'ast syn::Signature) {
        self.has_async |= signature.asyncness.is_some();
        visit::visit_signature(self, signature);
    }

    fn visit_expr_async(&mut self, block: &'ast syn::ExprAsync) {
        self.has_async = true;
        visit::visit_expr_async(self, block);
    }
}

/// Whether an item is compiled for tests only: `#[cfg(test)]`, or `#[cfg(all(test, …))]`.
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

/// Returns the lines of an item, from its attributes to its end.
fn lines_of(item: &syn::Item, text: &str) -> usize {
    use syn::spanned::Spanned as _;
    let first = attributes(item).first().map_or_else(|| item.span().start(), |first| first.span().start());
    let last = item.span().end();
    assert!(last.line <= text.lines().count() + 1);
    last.line - first.line + 1
}

/// Returns the modules of this package that a file imports.
fn imports(paths: &Paths) -> BTreeSet<&str> {
    let inside = |path: &&Vec<String>| ["crate", "keychoir"].contains(&path[0].as_str()) && path.len() > 1;
    let crate_paths = paths.found.iter().filter(|path| !path.is_empty()).filter(inside);
    crate_paths.map(|path| path[1].as_str()).filter(|name| name.starts_with(char::is_lowercase)).collect()
}

#[test]
fn imports_point_inward() {
    let allowed: BTreeMap<&str, &[&str]> = IMPORTS.iter().copied().collect();
    let mut violations = Vec::new();
    for file in read_files() {
        let module = file.module();
        let permitted = allowed.get(module).unwrap_or_else(|| panic!("{module} has no line in the table"));
        let paths = file.paths();
        for import in imports(&paths) {
            if import != module && !permitted.contains(&import) && allowed.contains_key(import) {
                violations.push(format!("{}: {module} imports {import}", file.path.display()));
            }
        }
        violations
            .extend(paths.violations.iter().map(|violation| format!("{}: {violation}", file.path.display())));
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn every_permitted_import_is_used() {
    let files = read_files();
    let paths: Vec<(&str, Paths)> = files.iter().map(|file| (file.module(), file.paths())).collect();
    for (module, permitted) in IMPORTS {
        for import in *permitted {
            let mut module_paths = paths.iter().filter(|(name, _)| name == module);
            let is_used = module_paths.any(|(_, paths)| imports(paths).contains(import));
            assert!(is_used, "{module} need not be allowed to import {import}");
        }
    }
}

#[test]
fn policy_and_elevenlabs_are_pure() {
    let crates = dependencies();
    let mut violations = Vec::new();
    for file in read_files().iter().filter(|file| PURE.contains(&file.module())) {
        let paths = file.paths();
        if paths.has_async {
            violations.push(format!("{}: is async", file.path.display()));
        }
        for path in paths.found.iter().filter(|path| path.len() > 1) {
            if let Some(violation) = purity_violation(path, &crates) {
                violations.push(format!("{}: {violation}", file.path.display()));
            }
        }
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

/// Returns why a pure module must not use a path, or `None` if it may.
fn purity_violation(path: &[String], crates: &BTreeSet<String>) -> Option<String> {
    let [first, second, rest @ ..] = path else { return None };
    let item = rest.first().map(|third| format!("{second}::{third}")).unwrap_or_default();
    match first.as_str() {
        "std" | "core" | "alloc" => {
            let is_pure = PURE_STD.contains(&second.as_str())
                || PURE_ITEMS.contains(&item.as_str())
                || second.starts_with(char::is_uppercase)
                // Number types, with their constants.
                || second.chars().any(|c| c.is_ascii_digit());
            let is_random = path.iter().any(|part| part == "RandomState");
            (!is_pure || is_random).then(|| format!("uses {}", path.join("::")))
        }
        // Other paths start with an item that the file imports by a path that is also checked.
        _ => (crates.contains(first) && !PURE_CRATES.contains(&first.as_str()))
            .then(|| format!("uses the crate {first}")),
    }
}

/// Returns the crates that the package depends on.
fn dependencies() -> BTreeSet<String> {
    let manifest = fs::read_to_string(package_root().join("Cargo.toml")).unwrap();
    let manifest: toml::Table = manifest.parse().unwrap();
    let names = manifest["dependencies"].as_table().unwrap().keys();
    names.map(|name| name.replace('-', "_")).collect()
}

#[test]
fn type_names_are_unique() {
    let mut defined: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in read_files().iter().filter(|file| !file.is_test && file.module() != "simulator") {
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
        .filter(|(name, places)| places.len() > 1 && !COMMON_NAMES.contains(&name.as_str()))
        .map(|(name, places)| format!("{name}: {places:?}"))
        .collect();
    assert!(duplicates.is_empty(), "{}", duplicates.join("\n"));
}

#[test]
fn forbidden_words_are_not_used() {
    let mut violations = Vec::new();
    let mut check = |path: &Path| {
        let Ok(text) = fs::read_to_string(path) else { return };
        for (number, line) in text.lines().enumerate() {
            let lower = line.to_lowercase();
            for word in FORBIDDEN_WORDS.iter().filter(|word| lower.contains(**word)) {
                violations.push(format!("{}:{}: contains `{word}`", path.display(), number + 1));
            }
        }
    };
    for place in ["src", "tests", "benches", "config", "deploy", "docs", "systemd"] {
        visit_files(&package_root().join(place), &mut |path| {
            let is_text = ["rs", "md", "toml", "py", "mjs", "js", "sql", "service", "txt"]
                .iter()
                .any(|extension| path.extension().is_some_and(|found| found == *extension));
            if is_text && !path.ends_with("tests/tidy.rs") {
                check(path);
            }
        });
    }
    for name in ["README.md", "ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile"]
    {
        check(&package_root().join(name));
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

/// A derived comparison of tokens would stop at the first difference.
#[test]
fn tokens_are_compared_in_constant_time() {
    let files = read_files();
    let file = files.iter().find(|file| file.modules == ["secret", "fingerprint"]).unwrap();
    for item in &file.syntax.items {
        match item {
            syn::Item::Struct(token) if token.ident.to_string().ends_with("TokenFingerprint") => {
                let derives =
                    token.attrs.iter().find(|attribute| attribute.path().is_ident("derive")).unwrap();
                let derived = derives.meta.require_list().unwrap().tokens.to_string();
                assert!(!derived.contains("PartialEq") && !derived.contains("Hash"), "{derived}");
            }
            syn::Item::Impl(eq) => {
                use quote::ToTokens as _;
                let text = eq.to_token_stream().to_string();
                let is_token = ["TokenFingerprint", "AdminTokenFingerprint", "SessionTokenFingerprint"]
                    .iter()
                    .any(|name| text.starts_with(&format!("impl PartialEq for {name}")));
                assert!(!is_token || text.contains("ct_eq"), "{text}");
            }
            _ => {}
        }
    }
}

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
            assert!(file.1.contains(&format!("fn {name}(")), "{} has no test {name}", file.0);
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

#[test]
fn no_file_exceeds_the_maximum_length() {
    for file in read_files().iter().filter(|file| !file.is_test) {
        let lines = file.lines();
        assert!(lines <= MAX_LINES, "{} has {lines} lines without its tests", file.path.display());
    }
}

#[test]
fn every_file_starts_with_module_documentation() {
    for file in read_files().iter().filter(|file| !file.is_test) {
        assert!(file.text.starts_with("//! "), "{} does not begin with `//!`", file.path.display());
    }
}

#[test]
fn the_source_has_no_unfinished_code_and_no_allow_attributes() {
    for file in read_files() {
        for word in ["todo!(", "unimplemented!(", "#[ignore", "#[allow("] {
            assert!(!file.text.contains(word), "{} contains `{word}`", file.path.display());
        }
    }
}

#[track_caller]
fn check_paths(code: &str, expected: &[&str]) {
    let mut paths = Paths { modules: vec!["policy".to_owned(), "cost".to_owned()], ..Paths::default() };
    paths.visit_file(&syn::parse_file(code).unwrap());
    for path in expected {
        let path: Vec<String> = path.split("::").map(str::to_owned).collect();
        assert!(paths.found.contains(&path), "{path:?} is not in {:?}", paths.found);
    }
}

#[test]
fn paths_are_found_in_every_form_of_import() {
    check_paths("use crate::{pool::Pool, proxy};", &["crate::pool::Pool", "crate::proxy"]);
    check_paths("use super::super::pool::Pool;", &["crate::pool::Pool"]);
    check_paths("fn f() { crate::pool::make() }", &["crate::pool::make"]);
    check_paths("#[cfg(test)] mod a {} fn f() { core::time::x() }", &["core::time::x"]);
    check_paths("fn f() { vec![std::env::vars()]; }", &["std::env::vars"]);
    check_paths("mod inner { use super::super::super::pool::Pool; }", &["crate::pool::Pool"]);
}
