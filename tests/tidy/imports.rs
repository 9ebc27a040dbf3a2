//! Parses all source files in `src` with `syn`, and checks the paths in them. Each module must import exactly the
//! modules that [`IMPORTS`] permits, only `platform` may use APIs of a single operating system, and `elevenlabs` and
//! `policy` must be pure: they do no I/O, read no clock, and use neither `async` nor random numbers. Another test
//! checks that the paths of every form of import are found.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};

use super::{SourceFile, attributes, is_for_tests, package_root, read_source_files};

/// Each module, and the other modules that it may import.
const IMPORTS: &[(&str, &[&str])] = &[
    ("secret", &[]),
    ("policy", &["secret"]),
    ("elevenlabs", &["policy"]),
    ("clock", &["policy"]),
    ("tasks", &[]),
    ("platform", &[]),
    ("pool", &["clock", "elevenlabs", "policy", "secret"]),
    ("body", &["clock", "platform", "policy", "secret", "tasks"]),
    ("certificate", &["platform", "policy", "private_file", "tasks"]),
    ("private_file", &["platform"]),
    ("upstream", &["body", "clock", "policy", "secret", "tasks"]),
    ("telemetry", &["clock", "elevenlabs", "policy", "pool", "secret", "tasks"]),
    ("proxy", &["body", "clock", "elevenlabs", "policy", "pool", "secret", "telemetry", "upstream"]),
    ("server", &["clock", "platform", "policy", "tasks"]),
    (
        "shared",
        &[
            "clock",
            "elevenlabs",
            "platform",
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
    (
        "store",
        &["clock", "elevenlabs", "platform", "policy", "pool", "private_file", "proxy", "secret", "tasks"],
    ),
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
    ("config", &["certificate", "clock", "platform", "policy", "private_file", "secret"]),
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
            "platform",
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

/// The modules whose functions depend only on their arguments and have no side effects.
const PURE_MODULES: &[&str] = &["elevenlabs", "policy"];

/// Crates that a pure module may use, in addition to the standard library.
const PURE_CRATES: &[&str] = &[
    "bytes",
    "http",
    "httparse",
    "httpdate",
    "jiff",
    "memchr",
    "serde",
    "serde_json",
    "sha2",
    "strsim",
    "subtle",
    "thiserror",
    "tokio_tungstenite",
];

/// Modules of the standard library that a pure module may use. Their functions have no side effects.
const PURE_STD_MODULES: &[&str] = &[
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
const PURE_STD_ITEMS: &[&str] = &[
    "sync::Arc",
    "sync::LazyLock",
    "time::Duration",
    "time::UNIX_EPOCH",
    "net::IpAddr",
    "net::Ipv4Addr",
    "net::Ipv6Addr",
];

impl SourceFile {
    /// Returns all paths in the code as segments, such as `["crate", "pool", "Pool"]`. Returns none for a test file.
    fn paths(&self) -> CollectedPaths {
        let mut paths = CollectedPaths { modules: self.modules.clone(), ..CollectedPaths::default() };
        if !self.is_test {
            paths.visit_file(&self.syntax);
        }
        paths
    }
}

/// Collects the paths in a file, including paths in macros, except in test items.
#[derive(Default)]
struct CollectedPaths {
    /// The modules that contain the visited item, from the crate root.
    modules: Vec<String>,
    /// The segments of each path.
    found: BTreeSet<Vec<String>>,
    /// Whether the file contains an asynchronous function or block.
    has_async: bool,
    /// Descriptions of imports that would hide a path from this collection.
    violations: Vec<String>,
}

impl CollectedPaths {
    /// Adds a path. Replaces leading `super` and `self` segments with the path from the crate root.
    fn add(&mut self, path: Vec<String>) {
        let mut base = self.modules.clone();
        let mut remaining_segments = path.as_slice();
        match path.first().map(String::as_str) {
            Some("self" | "super") => {
                while let [first, tail @ ..] = remaining_segments
                    && (first == "self" || first == "super")
                {
                    if first == "super" {
                        base.pop();
                    }
                    remaining_segments = tail;
                }
                let full_path =
                    ["crate".to_owned()].into_iter().chain(base).chain(remaining_segments.iter().cloned());
                self.found.insert(full_path.collect());
            }
            _ => {
                self.found.insert(path);
            }
        }
    }

    /// Adds the paths of a `use` declaration. `before` contains the segments that precede `tree`.
    fn add_use_tree(&mut self, before: &[String], tree: &syn::UseTree) {
        let path_with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.add_use_tree(&path_with(&path.ident), &path.tree),
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
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.add_use_tree(before, tree)),
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

impl<'ast> Visit<'ast> for CollectedPaths {
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
        self.add_use_tree(&[], &item.tree);
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

/// Returns the modules of this package that a file imports.
fn imported_modules(paths: &CollectedPaths) -> BTreeSet<&str> {
    let is_of_package =
        |path: &&Vec<String>| ["crate", "keychoir"].contains(&path[0].as_str()) && path.len() > 1;
    let crate_paths = paths.found.iter().filter(|path| !path.is_empty()).filter(is_of_package);
    crate_paths.map(|path| path[1].as_str()).filter(|name| name.starts_with(char::is_lowercase)).collect()
}

#[test]
fn each_module_imports_only_permitted_modules() {
    let allowed: BTreeMap<&str, &[&str]> = IMPORTS.iter().copied().collect();
    let mut violations = Vec::new();
    for file in read_source_files() {
        let module = file.module();
        let permitted = allowed.get(module).unwrap_or_else(|| panic!("`IMPORTS` must contain {module}"));
        let paths = file.paths();
        for import in imported_modules(&paths) {
            if import != module && !permitted.contains(&import) && allowed.contains_key(import) {
                violations.push(format!("{}: {module} imports {import}", file.path.display()));
            }
        }
        violations
            .extend(paths.violations.iter().map(|violation| format!("{}: {violation}", file.path.display())));
    }
    assert!(violations.is_empty(), "the source must contain none of these:\n{}", violations.join("\n"));
}

#[test]
fn every_permitted_import_is_used() {
    let files = read_source_files();
    let paths: Vec<(&str, CollectedPaths)> = files.iter().map(|file| (file.module(), file.paths())).collect();
    for (module, permitted) in IMPORTS {
        for import in *permitted {
            let mut module_paths = paths.iter().filter(|(name, _)| name == module);
            let is_used = module_paths.any(|(_, paths)| imported_modules(paths).contains(import));
            assert!(is_used, "{module} does not import {import}, so `IMPORTS` must not permit it");
        }
    }
}

/// Crates, modules and types that only some operating systems support.
const SYSTEM_PATHS: &[&[&str]] = &[
    &["rustix"],
    &["sd_notify"],
    &["std", "os"],
    &["tokio", "io", "unix"],
    &["tokio", "net", "UnixListener"],
    &["tokio", "net", "UnixStream"],
    &["tokio", "signal", "unix"],
    &["tokio", "signal", "windows"],
];

#[test]
fn only_platform_uses_apis_of_one_operating_system() {
    let mut violations = Vec::new();
    let mut platform_uses = 0;
    for file in read_source_files() {
        let is_system_path =
            |path: &&Vec<String>| SYSTEM_PATHS.iter().any(|start| path_starts_with(path, start));
        let paths = file.paths();
        let found: Vec<String> =
            paths.found.iter().filter(is_system_path).map(|path| path.join("::")).collect();
        match file.module() {
            "platform" => platform_uses += found.len(),
            _ => violations.extend(found.iter().map(|path| format!("{}: {path}", file.path.display()))),
        }
    }
    assert!(
        platform_uses > 10,
        "`platform` must use more than 10 paths of `SYSTEM_PATHS`, and it uses {platform_uses}"
    );
    assert!(violations.is_empty(), "the source must contain none of these:\n{}", violations.join("\n"));
}

fn path_starts_with(path: &[String], start: &[&str]) -> bool {
    path.len() >= start.len() && path.iter().zip(start).all(|(part, expected)| part == expected)
}

#[test]
fn policy_and_elevenlabs_are_pure() {
    let crates = dependencies();
    let mut violations = Vec::new();
    for file in read_source_files().iter().filter(|file| PURE_MODULES.contains(&file.module())) {
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
    assert!(violations.is_empty(), "the source must contain none of these:\n{}", violations.join("\n"));
}

/// Returns why a pure module must not use a path, or `None` if it may.
fn purity_violation(path: &[String], crates: &BTreeSet<String>) -> Option<String> {
    let [first, second, rest @ ..] = path else { return None };
    let item = rest.first().map(|third| format!("{second}::{third}")).unwrap_or_default();
    match first.as_str() {
        "std" | "core" | "alloc" => {
            let has_no_side_effects = PURE_STD_MODULES.contains(&second.as_str())
                || PURE_STD_ITEMS.contains(&item.as_str())
                || second.starts_with(char::is_uppercase)
                // A number type, such as `u64`.
                || second.chars().any(|character| character.is_ascii_digit());
            let is_random = path.iter().any(|part| part == "RandomState");
            (!has_no_side_effects || is_random).then(|| format!("uses {}", path.join("::")))
        }
        // Other paths start with an item that the file imports by a path that is also checked.
        _ => (crates.contains(first) && !PURE_CRATES.contains(&first.as_str()))
            .then(|| format!("uses the crate {first}")),
    }
}

/// Returns the crates that the package depends on, without those that only its tests use.
fn dependencies() -> BTreeSet<String> {
    let manifest = fs::read_to_string(package_root().join("Cargo.toml")).unwrap();
    let manifest: toml::Table = manifest.parse().unwrap();
    let target_tables = manifest["target"].as_table().unwrap().values();
    let tables = target_tables
        .chain([&manifest["dependencies"]])
        .map(|table| table.get("dependencies").unwrap_or(table));
    tables.flat_map(|table| table.as_table().unwrap().keys()).map(|name| name.replace('-', "_")).collect()
}

/// Checks that the paths in `code`, as a file of the module `policy::cost`, include the `expected` ones.
#[track_caller]
fn check_collected_paths(code: &str, expected: &[&str]) {
    let mut paths =
        CollectedPaths { modules: vec!["policy".to_owned(), "cost".to_owned()], ..CollectedPaths::default() };
    paths.visit_file(&syn::parse_file(code).unwrap());
    for path in expected {
        let path: Vec<String> = path.split("::").map(str::to_owned).collect();
        assert!(paths.found.contains(&path), "{path:?} must be one of the found paths: {:?}", paths.found);
    }
}

#[test]
fn paths_are_found_in_every_form_of_import() {
    check_collected_paths("use crate::{pool::Pool, proxy};", &["crate::pool::Pool", "crate::proxy"]);
    check_collected_paths("use super::super::pool::Pool;", &["crate::pool::Pool"]);
    check_collected_paths("fn f() { crate::pool::make() }", &["crate::pool::make"]);
    check_collected_paths("#[cfg(test)] mod a {} fn f() { core::time::x() }", &["core::time::x"]);
    check_collected_paths("fn f() { vec![std::env::vars()]; }", &["std::env::vars"]);
    check_collected_paths("mod inner { use super::super::super::pool::Pool; }", &["crate::pool::Pool"]);
}
