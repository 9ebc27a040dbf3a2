//! Merges defaults, file, environment and flags into one configuration. A later layer overrides an
//! earlier one. Every layer is validated, so that a mistake is reported even if a later layer
//! overrides it.

mod checks;

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::document::{Contents, Document, OverlayContents, TableEntry};
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
use super::{Config, LoadedConfig, Overrides, StateDirectory, StateLocation, clients, overlay, variables};

/// Resolves the layers in `sources` and `overrides`.
pub(super) fn resolve(overrides: &Overrides, sources: &ValueSources<'_>) -> Result<LoadedConfig, Problems> {
    merge_layers(overrides, sources).finish()
}

/// Resolves the layers and ignores their mistakes. A setting with a mistake has the value of an earlier layer.
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
    let contents = match &document {
        Some(document) => document.collect(&mut draft.report.problems),
        None => Contents::default(),
    };
    let directories = BaseDirectories { base: file.as_ref().and_then(|(path, _)| path.parent()), home };
    for assigned in &contents.settings {
        draft.set(assigned.setting, RawValue::Toml(assigned.value), directories, &assigned.span);
    }
    let process_directories = BaseDirectories { base: None, home };
    for (setting, text, span) in variables::find_settings(&sources.environment, &mut draft.report.problems) {
        draft.set(setting, RawValue::Text(text), process_directories, &span);
    }
    if let (false, Some(setting)) = (overrides.listen.is_empty(), setting::find("server.listen")) {
        let (text, span) = (overrides.listen.join(","), SourceSpan::new(ValueOrigin::Flag("--listen")));
        draft.set(setting, RawValue::Text(text.trim()), process_directories, &span);
    }
    if let (true, Some(setting)) = (overrides.is_ephemeral, setting::find("storage.ephemeral")) {
        let span = SourceSpan::new(ValueOrigin::Flag("--ephemeral"));
        draft.set(setting, RawValue::Text("true"), process_directories, &span);
    }
    if overrides.has_passed_sockets && !draft.spans.contains_key("server.listen") {
        draft.config.server.listen = ListenAddresses::systemd();
    }

    draft.read_proxy_files(sources);
    draft.config.redis.find_url(sources, &mut draft.spans, &mut draft.report);
    let path = file.as_ref().map(|(path, _)| path.to_path_buf());
    let base_url = &draft.config.upstream.base_url;
    let FoundKeys { keys, source } =
        find_keys(sources, path.clone(), &contents.keys, directories, base_url, &mut draft.report);
    (draft.config.keys, draft.config.key_source) = (keys, source);
    // The overlay names runtime keys and clients, which apply after the keys and clients of all other sources.
    let directory = match &overrides.state_location {
        StateLocation::BesideDatabase => draft.config.state_directory(),
        StateLocation::Fixed(directory) => directory.clone(),
    };
    let overlay_file = directory.as_ref().and_then(|directory| draft.read_overlay(directory, sources));
    let overlay =
        overlay_file.as_ref().map(|(path, text)| Document::parse(path, text, &mut draft.syntax_errors));
    let managed = match &overlay {
        Some(document) => document.collect_overlay(&mut draft.report.problems),
        None => OverlayContents::default(),
    };
    if let Some(directory) = &directory {
        let found_keys = FoundKeys {
            keys: std::mem::take(&mut draft.config.keys),
            source: std::mem::take(&mut draft.config.key_source),
        };
        let search = KeySearch {
            sources,
            directories: BaseDirectories { base: Some(directory.path()), home },
            provider: KeyProvider::for_host(draft.config.upstream.base_url.host()),
            report: &mut draft.report,
            found: found_keys,
        };
        let FoundKeys { keys, source } = overlay::add_keys(search, &managed.keys, directory);
        (draft.config.keys, draft.config.key_source) = (keys, source);
    }
    let mut configured_clients =
        clients::parse(sources, &contents.clients, directories, &draft.config.keys, &mut draft.report);
    clients::add_default_client(sources, &mut configured_clients, &mut draft.report);
    // An entry or a variable with a mistake is still a client.
    let has_variable = sources.environment.value(variables::CLIENT_TOKEN_FILE).is_some();
    let has_invalid_clients = configured_clients.len() < contents.clients.len() + usize::from(has_variable);
    overlay::apply_clients(&mut configured_clients, &managed.clients, &draft.config.keys, &mut draft.report);
    draft.config.clients = configured_clients;
    draft.config.paused_keys = overlay::parse_paused_keys(&managed.paused_keys, &mut draft.report.problems);
    overlay::check_removed(&managed.removed, &mut draft.report.problems);
    draft.config.generation = managed.generation;
    let token_span = draft.find_span(&["admin.token_file"]);
    draft.config.admin_token =
        draft.config.admin.find_token(directory.as_ref(), sources, &token_span, &mut draft.report);

    // A setting counts as missing only if the whole file was parsed.
    let is_complete = selected_file.is_none() || document.as_ref().is_some_and(Document::is_fully_parsed);
    if is_complete {
        draft.check_keys(overrides.key_requirement, sources);
        let has_clients = has_invalid_clients || !draft.config.clients.is_empty();
        draft.check_exposure(has_clients || overrides.allows_exposure);
    }
    if default_database.is_none() {
        draft.check_storage();
    }
    draft.check_admin_listen();
    draft.check_tls(sources, is_complete);
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
    let file_contains_secrets =
        contents.keys.iter().chain(&contents.clients).any(TableEntry::contains_secrets)
            || draft.file_contains_proxy_credentials()
            || draft.file_contains_redis_password();
    MergedLayers { draft, file: path, file_contains_secrets }
}

/// The merged layers with all their mistakes.
struct MergedLayers {
    draft: ConfigDraft,
    /// The path of the configuration file that was read.
    file: Option<PathBuf>,
    /// Whether the configuration file contains keys or tokens.
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

/// The settings of proxies, each with the setting that names a file instead.
const PROXY_SETTINGS: [[&str; 2]; 2] =
    [["upstream.proxy", "upstream.proxy_file"], ["supabase.proxy", "supabase.proxy_file"]];

/// The partly resolved configuration.
#[derive(Default)]
struct ConfigDraft {
    config: Config,
    /// The last source of each setting that a layer sets.
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
                    // A path from a flag is shown. A variable may contain a secret.
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
            // Opening the database reports a path through a file.
            Err(ReadFileError::Missing | ReadFileError::Other(ErrorKind::NotADirectory)) => None,
            Err(reason) => {
                let span = SourceSpan::new(ValueOrigin::File(path));
                self.report.problems.push(span.problem(unreadable_file_error("the file", &reason)));
                None
            }
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

    /// Returns the source of the first setting in `paths` that is set, for a rule over several settings.
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
            (&mut upstream.proxy, &upstream.proxy_file, PROXY_SETTINGS[0]),
            (&mut supabase.proxy, &supabase.proxy_file, PROXY_SETTINGS[1]),
        ] {
            let Some(path) = path else { continue };
            let is_set = *proxy != ProxySetting::Inherited;
            let value =
                read_value_file(path, names, is_set, sources, &self.spans, &mut self.report, str::parse);
            *proxy = value.unwrap_or_else(|| std::mem::take(proxy));
        }
    }

    /// Reads the proxies of the environment, which are used if no setting names one and a host is on another
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

    /// Whether the configuration file contains the password of a proxy.
    fn file_contains_proxy_credentials(&self) -> bool {
        let Config { upstream, supabase, .. } = &self.config;
        [(&upstream.proxy, PROXY_SETTINGS[0]), (&supabase.proxy, PROXY_SETTINGS[1])]
            .iter()
            .any(|(proxy, [name, _])| proxy.has_credentials() && self.is_in_file(name))
    }

    /// Whether the configuration file contains the password of Redis.
    fn file_contains_redis_password(&self) -> bool {
        self.config.redis.url.has_credentials() && self.is_in_file("redis.url")
    }

    /// Whether the configuration file sets the setting `name`, and no later layer overrides it.
    fn is_in_file(&self, name: &str) -> bool {
        self.spans.get(name).is_some_and(|span| matches!(span.origin, ValueOrigin::Line { .. }))
    }
}
