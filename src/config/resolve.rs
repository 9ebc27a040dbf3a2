//! Merges the layers into one configuration: defaults, file, environment, flags. A later layer
//! overwrites an earlier one, and every layer is validated: a mistake that another layer overrides
//! today is reported before it takes effect.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::document::{Contents, Document, Entry};
use super::host_port::HostPort;
use super::keys::{self, KeySource, unreadable};
use super::listen::{Listen, Listens};
use super::mask::shown;
use super::problem::{Origin, Place, Problem, Problems, Warning, WrongValue};
use super::reload::Files;
use super::setting::{self, Setting};
use super::source::{Sources, Unreadable};
use super::tls::TlsChoice;
use super::value::{Folders, Raw};
use super::{Config, Loaded, Need, Overrides, clients, supabase, variables};
use crate::policy::authority::Scheme;
use crate::policy::quantity::size::ShownSize;

/// Resolves the layers in `sources` and `overrides`.
pub(super) fn resolve(overrides: &Overrides, sources: &Sources<'_>) -> Result<Loaded, Problems> {
    let mut draft = Draft::default();
    let home = sources.environment.home();
    let state_file = sources.environment.state_file();
    if let Some(path) = &state_file {
        draft.config.storage.path.clone_from(path);
    }

    let named = draft.config_file(overrides, sources);
    let file = named
        .as_ref()
        .and_then(|(path, place)| Some((path.as_path(), draft.file_text(path, place, sources)?)));
    let document = file.as_ref().map(|(path, text)| Document::parse(path, text, &mut draft.syntax_errors));
    let contents = match &document {
        Some(document) => document.contents(&mut draft.problems),
        None => Contents::default(),
    };
    let folders = Folders { base: file.as_ref().and_then(|(path, _)| path.parent()), home };
    for given in &contents.settings {
        draft.set(given.setting, Raw::Toml(given.value), folders, &given.place);
    }
    let local = Folders { base: None, home };
    for (setting, text, place) in variables::settings(&sources.environment, &mut draft.problems) {
        draft.set(setting, Raw::Text(text), local, &place);
    }
    if let (false, Some(setting)) = (overrides.listen.is_empty(), setting::find("server.listen")) {
        let text = overrides.listen.join(",");
        draft.set(setting, Raw::Text(text.trim()), local, &Place::of(Origin::Flag("--listen")));
    }
    if let (true, Some(setting)) = (overrides.is_ephemeral, setting::find("storage.ephemeral")) {
        draft.set(setting, Raw::Text("true"), local, &Place::of(Origin::Flag("--ephemeral")));
    }
    if overrides.has_passed_sockets && !draft.places.contains_key("server.listen") {
        draft.config.server.listen = Listens::systemd();
    }

    let path = file.as_ref().map(|(path, _)| path.to_path_buf());
    let found = keys::find(sources, path.clone(), &contents.keys, folders, &draft.config.upstream.base_url);
    draft.problems.extend(found.problems);
    draft.warnings.extend(found.warnings);
    draft.config.keys = found.keys;
    draft.config.key_source = found.source;
    draft.config.clients = clients::read(
        sources,
        &contents.clients,
        folders,
        &draft.config.keys,
        &mut draft.problems,
        &mut draft.warnings,
    );

    // A setting counts as missing only if the whole file could be parsed.
    let is_complete = named.is_none() || document.as_ref().is_some_and(Document::is_sound);
    if is_complete {
        draft.check_keys(overrides.keys, sources);
        draft.check_exposure(!contents.clients.is_empty());
    }
    if state_file.is_none() {
        draft.check_books();
    }
    draft.check_tls(sources, is_complete);
    draft.check_retry();
    draft.check_upstream();
    draft.check_loop();
    draft.find_supabase(sources, folders);
    if let Some(document) = &document {
        draft.problems.retain(|problem| !document.is_guess(problem));
    }
    let file_holds_secrets = contents.keys.iter().chain(&contents.clients).any(Entry::holds_secrets);
    draft.finish(path, file_holds_secrets)
}

/// The configuration while it is being resolved.
#[derive(Default)]
struct Draft {
    config: Config,
    /// Where each setting that is not a default was given last.
    places: HashMap<&'static str, Place>,
    syntax_errors: Vec<Problem>,
    problems: Vec<Problem>,
    warnings: Vec<Warning>,
}

impl Draft {
    /// The path of the configuration file, and where it was named.
    fn config_file(&mut self, overrides: &Overrides, sources: &Sources<'_>) -> Option<(PathBuf, Place)> {
        if let Some(path) = &overrides.config_file {
            return Some((path.clone(), Place::of(Origin::Flag("--config"))));
        }
        let Some(path) = sources.environment.value(variables::CONFIG) else {
            let mut files = sources.environment.config_files().into_iter();
            let found = files.find(|path| (sources.read)(path) != Err(Unreadable::Missing))?;
            return Some((found.clone(), Place::of(Origin::File(found))));
        };
        let place = Place::of(Origin::Variable(variables::CONFIG.to_owned()));
        let folders = Folders { base: None, home: sources.environment.home() };
        match folders.file(path) {
            Ok(path) => Some((path, place)),
            Err(wrong) => {
                self.problems.push(place.problem(wrong));
                None
            }
        }
    }

    fn file_text(&mut self, path: &Path, place: &Place, sources: &Sources<'_>) -> Option<String> {
        let reason = match (sources.read)(path) {
            Ok(text) => return Some(text),
            Err(reason) => reason,
        };
        self.problems.push(match reason {
            Unreadable::NotUtf8 { line, column } => {
                let origin = Origin::Line { path: path.to_owned(), line, column };
                let wrong = WrongValue::new("the file is no UTF-8 text from here on");
                Place::of(origin).problem(wrong.advise("save it as UTF-8"))
            }
            Unreadable::Missing | Unreadable::Folder | Unreadable::TooLarge | Unreadable::Other(_) => {
                match &place.origin {
                    Origin::File(_) => place.problem(
                        unreadable("the file", &reason).advise("another one is named with --config FILE"),
                    ),
                    // The path of a flag may be shown; a variable may contain a secret.
                    Origin::Flag(_) => place.problem(unreadable(&format!("`{}`", path.display()), &reason)),
                    Origin::Variable(_) | Origin::Line { .. } | Origin::Nowhere => {
                        place.problem(unreadable(&shown(&path.to_string_lossy()), &reason))
                    }
                }
            }
        });
        None
    }

    fn set(&mut self, setting: &'static Setting, raw: Raw<'_>, folders: Folders<'_>, place: &Place) {
        if let Err(wrong) = setting.read(raw, folders, &mut self.config) {
            self.problems.push(place.problem(wrong));
        }
        self.places.insert(setting.path, place.clone());
    }

    /// The place to report for a rule over several settings: that of the first of `paths` that was
    /// given.
    fn place_of(&self, paths: &[&str]) -> Place {
        paths
            .iter()
            .find_map(|path| self.places.get(path))
            .cloned()
            .unwrap_or_else(|| Place::of(Origin::Nowhere))
    }

    fn check_keys(&mut self, need: Need, sources: &Sources<'_>) {
        let is_given = self.config.key_source != KeySource::Nowhere
            || sources.environment.unreadable.iter().any(|name| name.starts_with("ELEVENLABS_API_KEYS"));
        match need {
            Need::Optional => return,
            Need::Required if is_given => return,
            Need::Required => {}
        }
        // The variable that the provider's own libraries read.
        let near = sources.environment.value("ELEVENLABS_API_KEY").map(|_| "ELEVENLABS_API_KEYS");
        let wrong = WrongValue::new("there are no ElevenLabs API keys")
            .suggest(near)
            .advise("set ELEVENLABS_API_KEYS=sk_first,sk_second")
            .advise("or put them in a file, one a line, and set ELEVENLABS_API_KEYS_FILE to its path")
            .advise("or write a [[keys]] entry with `key` or `key_file` for each in the configuration file")
            .advise("to see it work without a key: keychoir demo");
        self.problems.push(Place::of(Origin::Nowhere).problem(wrong));
    }

    fn check_exposure(&mut self, has_clients: bool) {
        let Some(listen) = self.config.server.listen.exposed().filter(|_| !has_clients) else { return };
        let wrong =
            WrongValue::new(format!("{listen} is open to other machines, and no client token is asked for"))
                .advise("write a [[clients]] entry with `name` and `token_sha256` in the configuration file")
                .advise(format!("or listen on 127.0.0.1:{}", listen.port()));
        self.problems.push(self.place_of(&["server.listen"]).problem(wrong));
    }

    fn check_books(&mut self) {
        if self.config.storage.ephemeral || self.places.contains_key("storage.path") {
            return;
        }
        let wrong = WrongValue::new("there is no folder for the books: HOME is not set")
            .advise("set KEYCHOIR_STORAGE__PATH to a file")
            .advise(
                "or KEYCHOIR_STORAGE__EPHEMERAL=true (or `serve --ephemeral`) to keep them in memory only",
            );
        self.problems.push(Place::of(Origin::Nowhere).problem(wrong));
    }

    fn check_tls(&mut self, sources: &Sources<'_>, is_complete: bool) {
        const WORD: &str = "server.tls";
        const FILES: [&str; 2] = ["server.tls.cert", "server.tls.key"];
        let is_variable = |place: &&Place| matches!(place.origin, Origin::Variable(_));
        let variable = |path: &str| self.places.get(path).filter(is_variable);
        if let (Some(word), Some(_)) = (variable(WORD), FILES.iter().find_map(|path| variable(path))) {
            let wrong = WrongValue::new("variables give a word for TLS and files as well");
            self.problems.push(word.problem(
                wrong.advise("remove this one to use the files, or KEYCHOIR_SERVER__TLS__CERT and __KEY"),
            ));
            return;
        }
        let tls = self.config.server.tls.clone();
        if tls.choice() != TlsChoice::Files {
            return;
        }
        for (lacks, [there, other], what) in [
            (tls.key.is_none(), FILES, "there is a certificate and no private key for it"),
            (tls.cert.is_none(), [FILES[1], FILES[0]], "there is a private key and no certificate for it"),
        ] {
            // The reason why it is missing may have been reported already.
            let given = self.places.get(other).map(|place| place.origin.clone());
            let is_told = self.problems.iter().any(|problem| Some(problem.origin()) == given.as_ref());
            if lacks && is_complete && !is_told {
                let name = other.rsplit('.').next().unwrap_or_default();
                let place = self.place_of(&[there]);
                let advice = match place.origin {
                    Origin::Variable(_) => format!("set KEYCHOIR_SERVER__TLS__{}=FILE", name.to_uppercase()),
                    Origin::Flag(_) | Origin::Line { .. } | Origin::File(_) | Origin::Nowhere => {
                        format!("write {name} = \"FILE\" beside it")
                    }
                };
                self.problems.push(place.problem(WrongValue::new(what).advise(advice)));
            }
        }
        let (cert, key) = (self.place_of(&FILES[..1]), self.place_of(&FILES[1..]));
        self.config.certificate =
            tls.certificate(sources, [&cert, &key], &mut self.problems, &mut self.warnings);
    }

    fn check_retry(&mut self) {
        let retry = &self.config.retry;
        let (one, all) = (retry.buffer_size, retry.max_total_buffer_size);
        if one > all {
            let (one, all) = (ShownSize(one as u64), ShownSize(all as u64));
            let what = format!(
                "one request may keep {one} (`retry.buffer_size`), but all requests together only {all}"
            );
            let place = self.place_of(&["retry.max_total_buffer_size", "retry.buffer_size"]);
            self.problems
                .push(place.problem(WrongValue::new(what).advise("raise `retry.max_total_buffer_size`")));
        }
    }

    /// Rejects provider URLs that lead back to this proxy, as far as the text shows.
    fn check_loop(&mut self) {
        let own = self.config.keys.iter().filter_map(|key| key.base_url.as_ref());
        let urls = std::iter::once(&self.config.upstream.base_url).chain(own);
        let listens = self.config.server.listen.iter();
        let ports: Vec<&HostPort> = listens.filter_map(Listen::port).collect();
        let Some((port, _)) = urls
            .flat_map(|url| ports.iter().map(move |port| (port, url)))
            .find(|(port, url)| port.is_reached_by(url.host(), url.port()))
        else {
            return;
        };
        let what = format!("{port} is where Keychoir itself listens: it would send requests to itself");
        let wrong = WrongValue::new(what)
            .advise("write the URL of ElevenLabs, of a gateway before it or of a simulator as the base URL")
            .advise("or listen elsewhere (`server.listen`)");
        self.problems.push(self.place_of(&["upstream.base_url", "server.listen"]).problem(wrong));
    }

    fn check_upstream(&mut self) {
        let url = &self.config.upstream.base_url;
        if url.scheme() == Scheme::Http && !url.is_loopback() {
            let what = "the keys go over the network in clear text: write https:// if the host speaks it";
            self.warnings.push(self.place_of(&["upstream.base_url"]).warning(what));
        }
    }

    fn find_supabase(&mut self, sources: &Sources<'_>, folders: Folders<'_>) {
        let place = |path: &str| self.places.get(path).cloned();
        let given = supabase::Given {
            url: place("supabase.url"),
            secret_key_file: place("supabase.secret_key_file"),
            folders,
        };
        let found = self.config.supabase.find_key(sources, given);
        self.problems.extend(found.problems);
        self.warnings.extend(found.warnings);
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
