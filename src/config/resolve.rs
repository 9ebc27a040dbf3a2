//! Merges defaults, file, environment and flags into one configuration. A later layer overrides an earlier one. Every
//! layer is validated, so that a mistake is reported even if a later layer overrides it. The overlay, the file with the
//! changes that operators made at runtime, is then applied to the keys and clients of the layers. Secrets such as the
//! admin token are read from the files that settings name.

mod checks;

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::document::{AssignedValue, ConfigEntries, Document, OverlayEntries, TableEntry};
use super::key_format::KeyProvider;
use super::keys::{FoundKeys, KeySearch, find_keys};
use super::listen::ListenAddresses;
use super::mask::quote_masked;
use super::problem::{Problem, Problems, Report, SourceSpan, ValueError, ValueOrigin};
use super::proxy::{EnvironmentProxies, ProxySetting};
use super::reload::FileContents;
use super::setting::{self, Setting};
use super::source::{ReadFileError, ValueSources};
use super::value::{BaseDirectories, RawValue};
use super::value_file::{read_value_file, unreadable_file_error};
use super::variables::AssignedVariable;
use super::{Config, LoadedConfig, Overrides, StateDirectory, StateLocation, clients, overlay, variables};

/// Resolves the layers in `sources` and `overrides`.
pub(super) fn resolve(overrides: &Overrides, sources: &ValueSources<'_>) -> Result<LoadedConfig, Problems> {
    merge_layers(overrides, sources).finish()
}

/// Resolves the layers and ignores their mistakes. A setting with a mistake keeps the value of an earlier layer.
pub(super) fn resolve_ignoring_mistakes(overrides: &Overrides, sources: &ValueSources<'_>) -> Config {
    merge_layers(overrides, sources).draft.config
}

/// Merges and validates the layers.
fn merge_layers(overrides: &Overrides, sources: &ValueSources<'_>) -> MergedLayers {
    let mut draft = ConfigDraft::default();
    let home = sources.environment.home();
    let default_database = sources.environment.default_database();
    if let Some(path) = &default_database {
        draft.config.storage.path.clone_from(path);
    }

    let selected_file = draft.select_config_file(overrides, sources);
    let file = selected_file
        .as_ref()
        .and_then(|(path, span)| Some((path.as_path(), draft.read_config_file(path, span, sources)?)));
    let document = file.as_ref().map(|(path, text)| Document::parse(path, text, &mut draft.syntax_errors));
    let entries = match &document {
        Some(document) => document.collect(&mut draft.report.problems),
        None => ConfigEntries::default(),
    };
    let directories = BaseDirectories { base: file.as_ref().and_then(|(path, _)| path.parent()), home };
    draft.set_settings(&entries.settings, directories, overrides, sources);
    draft.read_proxy_files(sources);
    draft.config.redis.find_url(sources, &mut draft.spans, &mut draft.report);
    let path = file.as_ref().map(|(path, _)| path.to_path_buf());
    let base_url = &draft.config.upstream.base_url;
    let FoundKeys { keys, source } =
        find_keys(sources, path.clone(), &entries.keys, directories, base_url, &mut draft.report);
    (draft.config.keys, draft.config.key_source) = (keys, source);
    // The keys and clients of the overlay are added after those of all other sources.
    let state_directory = match &overrides.state_location {
        StateLocation::BesideDatabase => draft.config.state_directory(),
        StateLocation::Fixed(directory) => directory.clone(),
    };
    let overlay_file = state_directory.as_ref().and_then(|directory| draft.read_overlay(directory, sources));
    let overlay =
        overlay_file.as_ref().map(|(path, text)| Document::parse(path, text, &mut draft.syntax_errors));
    let managed = match &overlay {
        Some(document) => document.collect_overlay(&mut draft.report.problems),
        None => OverlayEntries::default(),
    };
    if let Some(directory) = &state_directory {
        draft.add_managed_keys(&managed.keys, directory, sources);
    }
    let has_invalid_clients = draft.resolve_clients(&entries.clients, directories, &managed.clients, sources);
    draft.config.paused_keys = overlay::parse_paused_keys(&managed.paused_keys, &mut draft.report.problems);
    overlay::check_removed_entries(&managed.removed, &mut draft.report.problems);
    draft.config.generation = managed.generation;
    let token_span = draft.find_span(&["admin.token_file"]);
    draft.config.admin_token =
        draft.config.admin.find_token(state_directory.as_ref(), sources, &token_span, &mut draft.report);

    // A setting counts as missing only if the whole file was parsed.
    let is_fully_parsed = selected_file.is_none() || document.as_ref().is_some_and(Document::is_fully_parsed);
    if is_fully_parsed {
        draft.check_keys(overrides.key_requirement, sources);
        let has_clients = has_invalid_clients || !draft.config.clients.is_empty();
        draft.check_exposure(has_clients || overrides.allows_exposure);
    }
    if default_database.is_none() {
        draft.check_storage();
    }
    draft.check_admin_listen();
    draft.read_certificate(sources, is_fully_parsed);
    draft.check_retry();
    draft.check_upstream();
    draft.config.supabase.find_target(sources, &mut draft.spans, &mut draft.report);
    draft.read_environment_proxies(sources);
    draft.check_loop();
    draft.config.setting_sources =
        draft.spans.iter().map(|(path, span)| (*path, span.origin.to_string())).collect();
    for document in [&document, &overlay].into_iter().flatten() {
        draft.report.problems.retain(|problem| !document.is_affected_by_syntax_error(problem));
    }
    let file_contains_secrets = entries.keys.iter().chain(&entries.clients).any(TableEntry::contains_secrets)
        || draft.file_contains_proxy_credentials()
        || draft.file_contains_redis_password();
    MergedLayers { draft, file: path, file_contains_secrets }
}

/// The merged layers with all their mistakes.
struct MergedLayers {
    draft: ConfigDraft,
    /// The path of the configuration file that was read.
    file: Option<PathBuf>,
    /// Whether the configuration file contains a key, a token or a password.
    file_contains_secrets: bool,
}

impl MergedLayers {
    /// Returns the configuration if it has no mistakes.
    fn finish(self) -> Result<LoadedConfig, Problems> {
        let Self { draft, file, file_contains_secrets } = self;
        let ConfigDraft { config, mut syntax_errors, report: Report { mut problems, warnings }, .. } = draft;
        syntax_errors.append(&mut problems);
        match Problems::new(syntax_errors) {
            Some(problems) => Err(problems),
            None => {
                let contents = FileContents::default();
                Ok(LoadedConfig { config, warnings, file, file_contains_secrets, contents })
            }
        }
    }
}

/// The setting of the forward proxy for the provider, and the setting that names a file instead.
const UPSTREAM_PROXY_SETTINGS: [&str; 2] = ["upstream.proxy", "upstream.proxy_file"];
/// The setting of the forward proxy for Supabase, and the setting that names a file instead.
const SUPABASE_PROXY_SETTINGS: [&str; 2] = ["supabase.proxy", "supabase.proxy_file"];

/// The partly resolved configuration.
#[derive(Default)]
struct ConfigDraft {
    config: Config,
    /// The source of the last layer that sets a setting, by the path of the setting.
    spans: HashMap<&'static str, SourceSpan>,
    syntax_errors: Vec<Problem>,
    report: Report,
}

impl ConfigDraft {
    /// Selects the configuration file. Returns its path and the source that named it.
    fn select_config_file(
        &mut self,
        overrides: &Overrides,
        sources: &ValueSources<'_>,
    ) -> Option<(PathBuf, SourceSpan)> {
        if let Some(path) = &overrides.config_file {
            return Some((path.clone(), SourceSpan::new(ValueOrigin::Flag("--config"))));
        }
        let Some(path) = sources.environment.value(variables::CONFIG) else {
            let mut paths = sources.environment.default_config_files().into_iter();
            let path = paths.find(|path| (sources.read_file)(path) != Err(ReadFileError::Missing))?;
            return Some((path.clone(), SourceSpan::new(ValueOrigin::File(path))));
        };
        let span = SourceSpan::new(ValueOrigin::Variable(variables::CONFIG.to_owned()));
        let directories = BaseDirectories { base: None, home: sources.environment.home() };
        match directories.resolve(path) {
            Ok(path) => Some((path, span)),
            Err(error) => {
                self.report.problems.push(span.problem(error));
                None
            }
        }
    }

    /// Reads the configuration file. `span` is the source that named it.
    fn read_config_file(
        &mut self,
        path: &Path,
        span: &SourceSpan,
        sources: &ValueSources<'_>,
    ) -> Option<String> {
        let reason = match (sources.read_file)(path) {
            Ok(text) => return Some(text),
            Err(reason) => reason,
        };
        self.report.problems.push(match reason {
            ReadFileError::NotUtf8 { line, column } => {
                let origin = ValueOrigin::Line { path: path.to_owned(), line, column };
                let error = ValueError::new("the file is not UTF-8 text from here on");
                SourceSpan::new(origin).problem(error.advise("save it as UTF-8"))
            }
            ReadFileError::Missing
            | ReadFileError::Directory
            | ReadFileError::TooLarge
            | ReadFileError::Other(_) => {
                match &span.origin {
                    ValueOrigin::File(_) => span.problem(
                        unreadable_file_error("the file", &reason)
                            .advise("use --config FILE to name another file"),
                    ),
                    // A path from a flag is shown completely, but a variable may contain a secret.
                    ValueOrigin::Flag(_) => {
                        span.problem(unreadable_file_error(&format!("`{}`", path.display()), &reason))
                    }
                    ValueOrigin::Variable(_) | ValueOrigin::Line { .. } | ValueOrigin::Absent => {
                        span.problem(unreadable_file_error(&quote_masked(&path.to_string_lossy()), &reason))
                    }
                }
            }
        });
        None
    }

    /// Reads the overlay. Returns `None` if it is missing or cannot be read.
    fn read_overlay(
        &mut self,
        directory: &StateDirectory,
        sources: &ValueSources<'_>,
    ) -> Option<(PathBuf, String)> {
        let path = directory.overlay_path();
        match (sources.read_file)(&path) {
            Ok(text) => Some((path, text)),
            // If a part of the path is not a directory, the error is reported when the database is opened.
            Err(ReadFileError::Missing | ReadFileError::Other(ErrorKind::NotADirectory)) => None,
            Err(reason) => {
                let span = SourceSpan::new(ValueOrigin::File(path));
                self.report.problems.push(span.problem(unreadable_file_error("the file", &reason)));
                None
            }
        }
    }

    /// Sets the settings of the file in `assigned_values`, then those of the environment, and then those of the flags.
    fn set_settings(
        &mut self,
        assigned_values: &[AssignedValue<'_>],
        file_directories: BaseDirectories<'_>,
        overrides: &Overrides,
        sources: &ValueSources<'_>,
    ) {
        for assigned in assigned_values {
            self.set(assigned.setting, RawValue::Toml(assigned.value), file_directories, &assigned.span);
        }
        let directories = BaseDirectories { base: None, home: sources.environment.home() };
        let variables = variables::find_settings(&sources.environment, &mut self.report.problems);
        for AssignedVariable { setting, text, span } in variables {
            self.set(setting, RawValue::Text(text), directories, &span);
        }
        if let (false, Some(setting)) = (overrides.listen.is_empty(), setting::find("server.listen")) {
            let (text, span) = (overrides.listen.join(","), SourceSpan::new(ValueOrigin::Flag("--listen")));
            self.set(setting, RawValue::Text(text.trim()), directories, &span);
        }
        if let (true, Some(setting)) = (overrides.is_ephemeral, setting::find("storage.ephemeral")) {
            let span = SourceSpan::new(ValueOrigin::Flag("--ephemeral"));
            self.set(setting, RawValue::Text("true"), directories, &span);
        }
        if overrides.has_passed_sockets && !self.spans.contains_key("server.listen") {
            self.config.server.listen = ListenAddresses::systemd();
        }
    }

    fn set(
        &mut self,
        setting: &'static Setting,
        raw: RawValue<'_>,
        directories: BaseDirectories<'_>,
        span: &SourceSpan,
    ) {
        if let Err(error) = setting.parse_into(raw, directories, &mut self.config) {
            self.report.problems.push(span.problem(error));
        }
        self.spans.insert(setting.path, span.clone());
    }

    /// Adds the keys of the overlay to the keys of the other sources.
    fn add_managed_keys(
        &mut self,
        entries: &[TableEntry<'_>],
        directory: &StateDirectory,
        sources: &ValueSources<'_>,
    ) {
        let found = FoundKeys {
            keys: std::mem::take(&mut self.config.keys),
            source: std::mem::take(&mut self.config.key_source),
        };
        let search = KeySearch {
            sources,
            directories: BaseDirectories { base: Some(directory.path()), home: sources.environment.home() },
            provider: KeyProvider::for_host(self.config.upstream.base_url.host()),
            report: &mut self.report,
            found,
        };
        let FoundKeys { keys, source } = overlay::add_keys(search, entries, directory);
        (self.config.keys, self.config.key_source) = (keys, source);
    }

    /// Parses the clients of the file and of the environment, and applies the entries of the overlay to them. Returns
    /// whether a client of the file or the environment has a mistake, so that it is not in the configuration.
    fn resolve_clients(
        &mut self,
        entries: &[TableEntry<'_>],
        file_directories: BaseDirectories<'_>,
        managed_entries: &[TableEntry<'_>],
        sources: &ValueSources<'_>,
    ) -> bool {
        let keys = &self.config.keys;
        let mut clients = clients::parse(sources, entries, file_directories, keys, &mut self.report);
        clients::add_default_client(sources, &mut clients, &mut self.report);
        let has_variable = sources.environment.value(variables::CLIENT_TOKEN_FILE).is_some();
        let has_invalid_clients = clients.len() < entries.len() + usize::from(has_variable);
        overlay::apply_clients(&mut clients, managed_entries, keys, &mut self.report);
        self.config.clients = clients;
        has_invalid_clients
    }

    /// Returns the source of the first setting in `paths` that is set, for a rule about several settings. If none is
    /// set, the source is [`ValueOrigin::Absent`].
    fn find_span(&self, paths: &[&str]) -> SourceSpan {
        paths
            .iter()
            .find_map(|path| self.spans.get(path))
            .cloned()
            .unwrap_or_else(|| SourceSpan::new(ValueOrigin::Absent))
    }

    /// Reads the proxies in the files that settings name.
    fn read_proxy_files(&mut self, sources: &ValueSources<'_>) {
        let Config { upstream, supabase, .. } = &mut self.config;
        for (proxy, path, names) in [
            (&mut upstream.proxy, &upstream.proxy_file, UPSTREAM_PROXY_SETTINGS),
            (&mut supabase.proxy, &supabase.proxy_file, SUPABASE_PROXY_SETTINGS),
        ] {
            let Some(path) = path else { continue };
            let is_set = *proxy != ProxySetting::Inherited;
            let file_setting =
                read_value_file(path, names, is_set, sources, &self.spans, &mut self.report, str::parse);
            *proxy = file_setting.unwrap_or_else(|| std::mem::take(proxy));
        }
    }

    /// Reads the proxies of the environment, which are used if no setting names a proxy and a host is on another
    /// machine.
    fn read_environment_proxies(&mut self, sources: &ValueSources<'_>) {
        let Config { upstream, supabase, keys, .. } = &self.config;
        let key_urls = keys.iter().filter_map(|key| key.base_url.as_ref());
        let mirror_url = supabase.target().map(|(url, _)| url);
        let mut urls = std::iter::once(&upstream.base_url).chain(key_urls).chain(mirror_url);
        let is_used = upstream.proxy == ProxySetting::Inherited && urls.any(|url| !url.is_loopback());
        self.config.environment_proxies =
            EnvironmentProxies::read(&sources.environment, is_used, &mut self.report);
    }

    /// Returns whether the configuration file contains the password of a proxy.
    fn file_contains_proxy_credentials(&self) -> bool {
        let Config { upstream, supabase, .. } = &self.config;
        [(&upstream.proxy, UPSTREAM_PROXY_SETTINGS), (&supabase.proxy, SUPABASE_PROXY_SETTINGS)]
            .iter()
            .any(|(proxy, [path, _])| proxy.has_credentials() && self.is_set_in_file(path))
    }

    /// Returns whether the configuration file contains the password of Redis.
    fn file_contains_redis_password(&self) -> bool {
        self.config.redis.url.has_credentials() && self.is_set_in_file("redis.url")
    }

    /// Returns whether the configuration file sets the setting `path`, and no later layer overrides it.
    fn is_set_in_file(&self, path: &str) -> bool {
        self.spans.get(path).is_some_and(|span| matches!(span.origin, ValueOrigin::Line { .. }))
    }
}
