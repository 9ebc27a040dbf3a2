//! Merges defaults, file, environment and flags into one configuration. A later layer overrides an
//! earlier one. Every layer is validated, so that a mistake is reported even while another layer
//! overrides it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::document::{Contents, Document, TableEntry};
use super::host_port::HostPort;
use super::keys::{self, KeyListSource, unreadable};
use super::listen::{Listen, Listens};
use super::mask::shown;
use super::problem::{Problem, Problems, SourceSpan, ValueOrigin, Warning, WrongValue};
use super::reload::Files;
use super::setting::{self, Setting};
use super::source::{Unreadable, ValueSources};
use super::tls::TlsChoice;
use super::value::{Folders, Raw};
use super::{Config, Loaded, Need, Overrides, clients, supabase, variables};
use crate::policy::authority::Scheme;
use crate::policy::quantity::size::ShownSize;

/// Resolves the layers in `sources` and `overrides`.
pub(super) fn resolve(overrides: &Overrides, sources: &ValueSources<'_>) -> Result<Loaded, Problems> {
    let mut draft = ConfigDraft::default();
    let home = sources.environment.home();
    let state_file = sources.environment.state_file();
    if let Some(path) = &state_file {
        draft.config.storage.path.clone_from(path);
    }

    let named_file = draft.config_file(overrides, sources);
    let file = named_file
        .as_ref()
        .and_then(|(path, span)| Some((path.as_path(), draft.file_text(path, span, sources)?)));
    let document = file.as_ref().map(|(path, text)| Document::parse(path, text, &mut draft.syntax_errors));
    let contents = match &document {
        Some(document) => document.contents(&mut draft.problems),
        None => Contents::default(),
    };
    let folders = Folders { base: file.as_ref().and_then(|(path, _)| path.parent()), home };
    for assigned in &contents.settings {
        draft.set(assigned.setting, Raw::Toml(assigned.value), folders, &assigned.span);
    }
    let local = Folders { base: None, home };
    for (setting, text, span) in variables::settings(&sources.environment, &mut draft.problems) {
        draft.set(setting, Raw::Text(text), local, &span);
    }
    if let (false, Some(setting)) = (overrides.listen.is_empty(), setting::find("server.listen")) {
        let text = overrides.listen.join(",");
        draft.set(setting, Raw::Text(text.trim()), local, &SourceSpan::of(ValueOrigin::Flag("--listen")));
    }
    if let (true, Some(setting)) = (overrides.is_ephemeral, setting::find("storage.ephemeral")) {
        draft.set(setting, Raw::Text("true"), local, &SourceSpan::of(ValueOrigin::Flag("--ephemeral")));
    }
    if overrides.has_passed_sockets && !draft.spans.contains_key("server.listen") {
        draft.config.server.listen = Listens::systemd();
    }

    let path = file.as_ref().map(|(path, _)| path.to_path_buf());
    let key_search =
        keys::find(sources, path.clone(), &contents.keys, folders, &draft.config.upstream.base_url);
    draft.problems.extend(key_search.problems);
    draft.warnings.extend(key_search.warnings);
    draft.config.keys = key_search.keys;
    draft.config.key_source = key_search.source;
    draft.config.clients = clients::read(
        sources,
        &contents.clients,
        folders,
        &draft.config.keys,
        &mut draft.problems,
        &mut draft.warnings,
    );

    // A setting counts as missing only if the whole file was parsed.
    let is_complete = named_file.is_none() || document.as_ref().is_some_and(Document::is_fully_parsed);
    if is_complete {
        draft.check_keys(overrides.keys, sources);
        draft.check_exposure(!contents.clients.is_empty());
    }
    if state_file.is_none() {
        draft.check_storage();
    }
    draft.check_tls(sources, is_complete);
    draft.check_retry();
    draft.check_upstream();
    draft.check_loop();
    draft.find_supabase(sources, folders);
    if let Some(document) = &document {
        draft.problems.retain(|problem| !document.is_affected_by_syntax_error(problem));
    }
    let file_holds_secrets = contents.keys.iter().chain(&contents.clients).any(TableEntry::contains_secrets);
    draft.finish(path, file_holds_secrets)
}

/// The partly resolved configuration.
#[derive(Default)]
struct ConfigDraft {
    config: Config,
    /// The last source of each setting that is not at its default.
    spans: HashMap<&'static str, SourceSpan>,
    syntax_errors: Vec<Problem>,
    problems: Vec<Problem>,
    warnings: Vec<Warning>,
}

impl ConfigDraft {
    /// The path of the configuration file, and the source that named it.
    fn config_file(
        &mut self,
        overrides: &Overrides,
        sources: &ValueSources<'_>,
    ) -> Option<(PathBuf, SourceSpan)> {
        if let Some(path) = &overrides.config_file {
            return Some((path.clone(), SourceSpan::of(ValueOrigin::Flag("--config"))));
        }
        let Some(path) = sources.environment.value(variables::CONFIG) else {
            let mut files = sources.environment.config_files().into_iter();
            let existing = files.find(|path| (sources.read)(path) != Err(Unreadable::Missing))?;
            return Some((existing.clone(), SourceSpan::of(ValueOrigin::File(existing))));
        };
        let span = SourceSpan::of(ValueOrigin::Variable(variables::CONFIG.to_owned()));
        let folders = Folders { base: None, home: sources.environment.home() };
        match folders.file(path) {
            Ok(path) => Some((path, span)),
            Err(wrong) => {
                self.problems.push(span.problem(wrong));
                None
            }
        }
    }

    fn file_text(&mut self, path: &Path, span: &SourceSpan, sources: &ValueSources<'_>) -> Option<String> {
        let reason = match (sources.read)(path) {
            Ok(text) => return Some(text),
            Err(reason) => reason,
        };
        self.problems.push(match reason {
            Unreadable::NotUtf8 { line, column } => {
                let origin = ValueOrigin::Line { path: path.to_owned(), line, column };
                let wrong = WrongValue::new("the file is no UTF-8 text from here on");
                SourceSpan::of(origin).problem(wrong.advise("save it as UTF-8"))
            }
            Unreadable::Missing | Unreadable::Folder | Unreadable::TooLarge | Unreadable::Other(_) => {
                match &span.origin {
                    ValueOrigin::File(_) => span.problem(
                        unreadable("the file", &reason).advise("another one is named with --config FILE"),
                    ),
                    // The path from a flag may be shown. A variable may contain a secret.
                    ValueOrigin::Flag(_) => {
                        span.problem(unreadable(&format!("`{}`", path.display()), &reason))
                    }
                    ValueOrigin::Variable(_) | ValueOrigin::Line { .. } | ValueOrigin::Nowhere => {
                        span.problem(unreadable(&shown(&path.to_string_lossy()), &reason))
                    }
                }
            }
        });
        None
    }

    fn set(&mut self, setting: &'static Setting, raw: Raw<'_>, folders: Folders<'_>, span: &SourceSpan) {
        if let Err(wrong) = setting.read(raw, folders, &mut self.config) {
            self.problems.push(span.problem(wrong));
        }
        self.spans.insert(setting.path, span.clone());
    }

    /// The source to report for a rule over several settings: the source of the first of `paths`
    /// that is set.
    fn span_of(&self, paths: &[&str]) -> SourceSpan {
        paths
            .iter()
            .find_map(|path| self.spans.get(path))
            .cloned()
            .unwrap_or_else(|| SourceSpan::of(ValueOrigin::Nowhere))
    }

    fn check_keys(&mut self, need: Need, sources: &ValueSources<'_>) {
        let has_keys = self.config.key_source != KeyListSource::Absent
            || sources.environment.unreadable.iter().any(|name| name.starts_with("ELEVENLABS_API_KEYS"));
        match need {
            Need::Optional => return,
            Need::Required if has_keys => return,
            Need::Required => {}
        }
        // The provider's own libraries read this variable.
        let near = sources.environment.value("ELEVENLABS_API_KEY").map(|_| "ELEVENLABS_API_KEYS");
        let wrong = WrongValue::new("there are no ElevenLabs API keys")
            .suggest(near)
            .advise("set ELEVENLABS_API_KEYS=sk_first,sk_second")
            .advise("or put them in a file, one a line, and set ELEVENLABS_API_KEYS_FILE to its path")
            .advise("or write a [[keys]] entry with `key` or `key_file` for each in the configuration file")
            .advise("to see it work without a key: keychoir demo");
        self.problems.push(SourceSpan::of(ValueOrigin::Nowhere).problem(wrong));
    }

    fn check_exposure(&mut self, has_clients: bool) {
        let Some(listen) = self.config.server.listen.exposed().filter(|_| !has_clients) else { return };
        let wrong =
            WrongValue::new(format!("{listen} is open to other machines, and no client token is asked for"))
                .advise("write a [[clients]] entry with `name` and `token_sha256` in the configuration file")
                .advise(format!("or listen on 127.0.0.1:{}", listen.port()));
        self.problems.push(self.span_of(&["server.listen"]).problem(wrong));
    }

    fn check_storage(&mut self) {
        if self.config.storage.ephemeral || self.spans.contains_key("storage.path") {
            return;
        }
        let wrong = WrongValue::new("there is no folder for the usage database: HOME is not set")
            .advise("set KEYCHOIR_STORAGE__PATH to a file")
            .advise(
                "or KEYCHOIR_STORAGE__EPHEMERAL=true (or `serve --ephemeral`) to keep usage records in memory only",
            );
        self.problems.push(SourceSpan::of(ValueOrigin::Nowhere).problem(wrong));
    }

    fn check_tls(&mut self, sources: &ValueSources<'_>, is_complete: bool) {
        const TLS_WORD: &str = "server.tls";
        const FILES: [&str; 2] = ["server.tls.cert", "server.tls.key"];
        let is_variable = |span: &&SourceSpan| matches!(span.origin, ValueOrigin::Variable(_));
        let variable = |path: &str| self.spans.get(path).filter(is_variable);
        if let (Some(word_span), Some(_)) = (variable(TLS_WORD), FILES.iter().find_map(|path| variable(path)))
        {
            let wrong = WrongValue::new("variables set a word for TLS and files as well");
            self.problems.push(word_span.problem(
                wrong.advise("remove this one to use the files, or KEYCHOIR_SERVER__TLS__CERT and __KEY"),
            ));
            return;
        }
        let tls = self.config.server.tls.clone();
        if tls.choice() != TlsChoice::Files {
            return;
        }
        for (is_missing, [present, other], message) in [
            (tls.key.is_none(), FILES, "there is a certificate and no private key for it"),
            (tls.cert.is_none(), [FILES[1], FILES[0]], "there is a private key and no certificate for it"),
        ] {
            // An earlier problem may explain why the setting is missing.
            let other_origin = self.spans.get(other).map(|span| span.origin.clone());
            let is_reported =
                self.problems.iter().any(|problem| Some(problem.origin()) == other_origin.as_ref());
            if is_missing && is_complete && !is_reported {
                let name = other.rsplit('.').next().unwrap_or_default();
                let span = self.span_of(&[present]);
                let advice = match span.origin {
                    ValueOrigin::Variable(_) => {
                        format!("set KEYCHOIR_SERVER__TLS__{}=FILE", name.to_uppercase())
                    }
                    ValueOrigin::Flag(_)
                    | ValueOrigin::Line { .. }
                    | ValueOrigin::File(_)
                    | ValueOrigin::Nowhere => {
                        format!("write {name} = \"FILE\" beside it")
                    }
                };
                self.problems.push(span.problem(WrongValue::new(message).advise(advice)));
            }
        }
        let (cert, key) = (self.span_of(&FILES[..1]), self.span_of(&FILES[1..]));
        self.config.certificate =
            tls.certificate(sources, [&cert, &key], &mut self.problems, &mut self.warnings);
    }

    fn check_retry(&mut self) {
        let retry = &self.config.retry;
        let (max_per_request, max_total) = (retry.buffer_size, retry.max_total_buffer_size);
        if max_per_request > max_total {
            let (max_per_request, max_total) =
                (ShownSize(max_per_request as u64), ShownSize(max_total as u64));
            let message = format!(
                "one request may keep {max_per_request} (`retry.buffer_size`), but all requests together only {max_total}"
            );
            let span = self.span_of(&["retry.max_total_buffer_size", "retry.buffer_size"]);
            self.problems
                .push(span.problem(WrongValue::new(message).advise("raise `retry.max_total_buffer_size`")));
        }
    }

    /// Rejects provider URLs whose host and port are a listener of this proxy. Host names are not
    /// looked up.
    fn check_loop(&mut self) {
        let key_urls = self.config.keys.iter().filter_map(|key| key.base_url.as_ref());
        let urls = std::iter::once(&self.config.upstream.base_url).chain(key_urls);
        let listens = self.config.server.listen.iter();
        let ports: Vec<&HostPort> = listens.filter_map(Listen::port).collect();
        let Some((port, _)) = urls
            .flat_map(|url| ports.iter().map(move |port| (port, url)))
            .find(|(port, url)| port.is_reached_by(url.host(), url.port()))
        else {
            return;
        };
        let message = format!(
            "{port} is an address on which Keychoir itself listens: it would send requests to itself"
        );
        let wrong = WrongValue::new(message)
            .advise(
                "write the URL of ElevenLabs, of a gateway in front of it or of a simulator as the base URL",
            )
            .advise("or listen elsewhere (`server.listen`)");
        self.problems.push(self.span_of(&["upstream.base_url", "server.listen"]).problem(wrong));
    }

    fn check_upstream(&mut self) {
        let url = &self.config.upstream.base_url;
        if url.scheme() == Scheme::Http && !url.is_loopback() {
            let message =
                "the keys go over the network in clear text: write https:// if the host supports it";
            self.warnings.push(self.span_of(&["upstream.base_url"]).warning(message));
        }
    }

    fn find_supabase(&mut self, sources: &ValueSources<'_>, folders: Folders<'_>) {
        let span_of_setting = |path: &str| self.spans.get(path).cloned();
        let setting_spans = supabase::SettingSpans {
            url: span_of_setting("supabase.url"),
            secret_key_file: span_of_setting("supabase.secret_key_file"),
            folders,
        };
        let service_key = self.config.supabase.find_key(sources, setting_spans);
        self.problems.extend(service_key.problems);
        self.warnings.extend(service_key.warnings);
    }

    fn finish(mut self, file: Option<PathBuf>, file_holds_secrets: bool) -> Result<Loaded, Problems> {
        self.syntax_errors.append(&mut self.problems);
        match Problems::of(self.syntax_errors) {
            Some(problems) => Err(problems),
            None => {
                let (config, warnings, files) = (self.config, self.warnings, Files::default());
                Ok(Loaded { config, warnings, file, file_holds_secrets, files })
            }
        }
    }
}
