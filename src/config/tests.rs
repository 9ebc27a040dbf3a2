//! Tests how the complete configuration is resolved from fake variables, files and flags. This file contains the fake
//! machine, and each submodule tests one part.

mod canaries;
mod clients;
mod document;
mod keys;
mod layers;
mod old_names;
mod overlay;
mod proxy;
mod redis;
mod reference;
mod supabase;
mod tls;

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::source::{Environment, ReadFileError, ValueSources};
use super::{Config, KeyRequirement, LoadedConfig, Overrides, Problems, StateLocation, resolve};
use crate::policy::units::UnixMs;

/// A key in a known format of ElevenLabs.
const KEY: &str = "sk_0123456789abcdef0123456789abcdef0123456789abcdef";
const OTHER_KEY: &str = "sk_fedcba9876543210fedcba9876543210fedcba9876543210";
const TOKEN: &str = "canary-token-of-a-client";

/// The time at which certificates are checked.
const NOW: UnixMs = UnixMs(1_800_000_000_000);

/// The variables, files and flags from which a test resolves a configuration.
#[derive(Clone, Default)]
struct FakeMachine<'a> {
    variables: Vec<(&'a str, &'a str)>,
    files: Vec<(&'a str, &'a str)>,
    listen: Option<&'a str>,
    config: Option<&'a str>,
    is_ephemeral: bool,
    has_passed_sockets: bool,
    key_requirement: KeyRequirement,
}

impl<'a> FakeMachine<'a> {
    /// Creates a machine with a home directory and one key.
    fn with_key() -> Self {
        Self { variables: vec![("HOME", "/home/me"), ("ELEVENLABS_API_KEYS", KEY)], ..Self::default() }
    }

    /// Creates a machine with a home directory only.
    fn without_key() -> Self {
        Self { variables: vec![("HOME", "/home/me")], ..Self::default() }
    }

    /// Sets an upstream other than ElevenLabs, for which a key may have any format.
    fn simulated(self) -> Self {
        self.variable("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:1")
    }

    fn variable(mut self, name: &'a str, value: &'a str) -> Self {
        self.variables.push((name, value));
        self
    }

    fn file(mut self, path: &'a str, text: &'a str) -> Self {
        self.files.push((path, text));
        self
    }

    /// Adds a configuration file that `--config` names.
    fn toml(self, text: &'a str) -> Self {
        Self { config: Some("/etc/k.toml"), ..self.file("/etc/k.toml", text) }
    }

    fn resolve(&self) -> Result<LoadedConfig, Problems> {
        let files: HashMap<PathBuf, &str> =
            self.files.iter().map(|(path, text)| (PathBuf::from(path), *text)).collect();
        let read_file = |path: &Path| match files.get(path) {
            Some(text) => Ok((*text).to_owned()),
            None if path == Path::new("/directory") => Err(ReadFileError::Directory),
            None if path == Path::new("/latin1.toml") => Err(ReadFileError::NotUtf8 { line: 3, column: 7 }),
            None => Err(ReadFileError::Missing),
        };
        let environment: Environment = self
            .variables
            .iter()
            .map(|(name, value)| (OsString::from(name), OsString::from(value)))
            .collect();
        let overrides = Overrides {
            config_file: self.config.map(PathBuf::from),
            listen: self.listen.map(str::to_owned).into_iter().collect(),
            is_ephemeral: self.is_ephemeral,
            has_passed_sockets: self.has_passed_sockets,
            key_requirement: self.key_requirement,
            allows_exposure: false,
            state_location: StateLocation::default(),
        };
        resolve::resolve(&overrides, &ValueSources { environment, read_file: &read_file, now: NOW })
    }

    /// Returns the configuration, which must be valid.
    #[track_caller]
    fn config(&self) -> Config {
        match self.resolve() {
            Ok(loaded) => loaded.config,
            Err(problems) => panic!("the configuration must be valid: {problems}"),
        }
    }

    /// Checks that the configuration is invalid, and compares its problems with `expected`.
    #[track_caller]
    fn check_problems(&self, expected: &str) {
        match self.resolve() {
            Ok(loaded) => panic!("the configuration must be invalid: {loaded:?}"),
            Err(problems) => {
                let printed_text = problems.to_string();
                let (problems, _) = printed_text.rsplit_once('\n').unwrap();
                let expected = expected.trim_start_matches('\n').trim_end();
                assert_eq!(problems, expected, "the problems must be the expected ones:\n{printed_text}");
            }
        }
    }

    /// Checks that the configuration is valid, and compares its warnings with `expected`.
    #[track_caller]
    fn check_warnings(&self, expected: &[&str]) {
        let warnings = self.resolve().unwrap().warnings;
        assert_eq!(warnings.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
    }
}
