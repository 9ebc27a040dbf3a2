//! Finds the keys of the pool in the environment or in files. All configured keys come from the first source that has
//! keys, so that an operator knows which keys are in use. `overlay` then adds the keys that operators added at runtime.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;

use super::base_url::BaseUrl;
use super::document::{StringField, TableEntry};
use super::key_format::KeyProvider;
use super::key_list::{self, KeyListFormat};
use super::mask::{looks_like_secret, quote_masked};
use super::problem::{Problem, Report, SourceSpan, ValueError, ValueOrigin};
use super::proxy::ProxySetting;
use super::source::{ReadFileError, ValueSources};
use super::value::BaseDirectories;
use super::value_file::{conflicting_settings_error, read_secret_file, unreadable_file_error};
use crate::policy::key_state::KeyOrigin;
use crate::secret::ApiKey;

/// The variable with a list of keys.
const LIST: &str = "ELEVENLABS_API_KEYS";
/// The variable with the path of a file that contains a list of keys.
const LIST_FILE: &str = "ELEVENLABS_API_KEYS_FILE";
/// The variable that systemd sets to the directory of the service's credentials.
pub(super) const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";
/// The name of the credential that contains a list of keys.
const KEYS_CREDENTIAL: &str = "elevenlabs_api_keys";

/// The fields of a `[[keys]]` entry of the configuration file.
const KEY_FIELDS: [&str; 9] =
    ["key", "key_file", "name", "workspace", "base_url", "proxy", "proxy_file", "weight", "reserve_credits"];

/// The fields of a `[[keys]]` entry of the overlay.
const MANAGED_KEY_FIELDS: [&str; 7] =
    ["key_file", "name", "workspace", "base_url", "weight", "changed_at", "left_out"];

/// Maximum weight of a key. With a larger weight, the other keys would serve almost no requests.
const MAX_WEIGHT: u32 = 1_000;
/// Maximum reserve of a key. No plan of the provider has more credits.
const MAX_RESERVE_CREDITS: u32 = 1_000_000_000;

/// One key of the pool.
#[derive(Clone, Debug)]
pub struct KeyConfig {
    /// The API key.
    pub key: ApiKey,
    /// The configured name, if the key has one.
    pub name: Option<String>,
    /// The workspace name of the key. Keys of one workspace share credits.
    pub workspace: Option<String>,
    /// The provider's URL for this key, if it differs from `upstream.base_url`. A key of a region is
    /// valid only at the host of its region.
    pub base_url: Option<BaseUrl>,
    /// The forward proxy for this key, if it differs from `upstream.proxy`.
    pub proxy: ProxySetting,
    /// The key's weight relative to other keys, at least 1.
    pub weight: u32,
    /// Credits of the workspace that the key does not use. `None` means the number in `pool.reserve_credits`.
    pub reserve_credits: Option<u64>,
    /// The kind of source from which the key was configured.
    pub origin: KeyOrigin,
}

impl KeyConfig {
    fn new(key: ApiKey, origin: KeyOrigin) -> Self {
        Self {
            key,
            name: None,
            workspace: None,
            base_url: None,
            proxy: ProxySetting::default(),
            weight: 1,
            reserve_credits: None,
            origin,
        }
    }

    /// Returns whether `other` is the same key and has the same settings.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        let Self { key, name, workspace, base_url, proxy, weight, reserve_credits, origin } = self;
        key.fingerprint() == other.key.fingerprint()
            && *name == other.name
            && *workspace == other.workspace
            && *base_url == other.base_url
            && *proxy == other.proxy
            && *weight == other.weight
            && *reserve_credits == other.reserve_credits
            && *origin == other.origin
    }
}

impl From<ApiKey> for KeyConfig {
    fn from(key: ApiKey) -> Self {
        Self::new(key, KeyOrigin::Environment)
    }
}

/// The source of the keys. Its text form is the end of the message `Loaded 2 ElevenLabs API keys from …`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KeyListSource {
    /// No keys were found.
    #[default]
    Absent,
    /// `ELEVENLABS_API_KEYS`.
    Variable,
    /// The file to which `ELEVENLABS_API_KEYS_FILE` is set.
    ListFile(PathBuf),
    /// The systemd credential `elevenlabs_api_keys`.
    Credential(PathBuf),
    /// The `[[keys]]` entries of the configuration file.
    ConfigFile(PathBuf),
    /// The overlay, if no other source has keys.
    Managed(PathBuf),
    /// The caller passed the keys, as the demo and tests do.
    Caller,
}

impl fmt::Display for KeyListSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("nowhere"),
            Self::Variable => f.write_str(LIST),
            Self::ListFile(path) | Self::Credential(path) | Self::ConfigFile(path) | Self::Managed(path) => {
                write!(f, "{}", path.display())
            }
            Self::Caller => f.write_str("memory"),
        }
    }
}

/// The keys of the pool and their source.
pub(super) struct FoundKeys {
    pub(super) keys: Vec<KeyConfig>,
    pub(super) source: KeyListSource,
}

impl Default for FoundKeys {
    fn default() -> Self {
        Self { keys: Vec::new(), source: KeyListSource::Absent }
    }
}

/// Searches the sources in order: the variable, the file that a variable names, the service's
/// credential, and the `[[keys]]` entries of the configuration file `config_file`, whose directory is in
/// `directories`.
pub(super) fn find_keys(
    sources: &ValueSources<'_>,
    config_file: Option<PathBuf>,
    entries: &[TableEntry<'_>],
    directories: BaseDirectories<'_>,
    base_url: &BaseUrl,
    report: &mut Report,
) -> FoundKeys {
    let provider = KeyProvider::for_host(base_url.host());
    let mut search = KeySearch { sources, directories, provider, report, found: FoundKeys::default() };
    if let Some(text) = sources.environment.value(LIST) {
        let span = SourceSpan::new(ValueOrigin::Variable(LIST.to_owned()));
        search.select(KeyListSource::Variable, &span);
        search.add_list(text, KeyListFormat::Variable, KeyOrigin::Environment, &span);
    }
    if let Some(path) = sources.environment.value(LIST_FILE) {
        let span = SourceSpan::new(ValueOrigin::Variable(LIST_FILE.to_owned()));
        if search.select(KeyListSource::ListFile(PathBuf::from(path)), &span) {
            search.add_list_file(path, &span);
        }
    }
    if let Some(directory) = sources.environment.value(CREDENTIALS) {
        let path = PathBuf::from(directory).join(KEYS_CREDENTIAL);
        let content = (sources.read_file)(&path);
        // The service may have credentials for other programs only.
        if content != Err(ReadFileError::Missing) {
            let span = SourceSpan::new(ValueOrigin::File(path.clone()));
            if search.select(KeyListSource::Credential(path), &span) {
                match content {
                    Ok(text) => search.add_list(&text, KeyListFormat::File, KeyOrigin::File, &span),
                    Err(reason) => search.report_problem(&span, unreadable_file_error("the file", &reason)),
                }
            }
        }
    }
    if let (Some(config_file), Some(first)) = (config_file, entries.first()) {
        let selection = match search.select(KeyListSource::ConfigFile(config_file), &first.span) {
            true => SourceSelection::Selected,
            false => SourceSelection::Unselected,
        };
        search.add_entries(&entries.iter().collect::<Vec<_>>(), KeyOrigin::File, selection);
    }
    search.found
}

/// Whether the keys of a source are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SourceSelection {
    /// The keys of this source are used.
    Selected,
    /// An earlier source has keys, so the keys of this source are only validated.
    Unselected,
}

/// A search for keys in the sources in order of precedence.
pub(super) struct KeySearch<'a> {
    pub(super) sources: &'a ValueSources<'a>,
    /// The base directories of the paths in the file that is read.
    pub(super) directories: BaseDirectories<'a>,
    /// The provider of the keys without a base URL.
    pub(super) provider: KeyProvider,
    pub(super) report: &'a mut Report,
    pub(super) found: FoundKeys,
}

impl KeySearch<'_> {
    /// Selects a source with keys, unless an earlier source was selected. Returns whether it was selected. If it was
    /// not, adds a warning at `span`.
    fn select(&mut self, source: KeyListSource, span: &SourceSpan) -> bool {
        if self.found.source == KeyListSource::Absent {
            self.found.source = source;
            return true;
        }
        let message = format!("these keys are not used, because {} has keys too", self.found.source);
        self.report.warnings.push(span.warning(message));
        false
    }

    fn report_problem(&mut self, span: &SourceSpan, error: ValueError) {
        self.report.problems.push(span.problem(error));
    }

    /// Adds the keys of a list, and the messages about its mistakes at `span`.
    fn add_list(&mut self, text: &str, format: KeyListFormat, origin: KeyOrigin, span: &SourceSpan) {
        let notation = match format {
            KeyListFormat::Variable => {
                "write only keys, separated by commas: ELEVENLABS_API_KEYS=sk_first,sk_second"
            }
            KeyListFormat::File => "write only keys, one per line",
        };
        let list = key_list::parse(text, format, self.provider);
        for error in list.errors {
            self.report_problem(span, error.advise(notation));
        }
        self.report.warnings.extend(list.corrections.into_iter().map(|message| span.warning(message)));
        self.found.keys.extend(list.keys.into_iter().map(|key| KeyConfig::new(key, origin)));
    }

    /// Adds the keys of the file `path`, which the variable at `span` names.
    fn add_list_file(&mut self, path: &str, span: &SourceSpan) {
        let directories = BaseDirectories { base: None, home: self.sources.environment.home() };
        let path = match directories.resolve(path) {
            Ok(path) => path,
            Err(error) => return self.report_problem(span, error),
        };
        match (self.sources.read_file)(&path) {
            Ok(text) => {
                let span = SourceSpan::new(ValueOrigin::File(path));
                self.add_list(&text, KeyListFormat::File, KeyOrigin::File, &span);
            }
            Err(reason) => {
                let path = path.to_string_lossy();
                let suggestion = looks_like_secret(&path).then_some(LIST);
                let error = unreadable_file_error(&quote_masked(&path), &reason).suggest(suggestion);
                self.report_problem(span, error);
            }
        }
    }

    /// Validates the entries, and adds their keys if this source is selected. Otherwise, their key
    /// files are not read.
    pub(super) fn add_entries(
        &mut self,
        entries: &[&TableEntry<'_>],
        origin: KeyOrigin,
        selection: SourceSelection,
    ) {
        let is_selected = selection == SourceSelection::Selected;
        let found_keys = self.found.keys.iter().enumerate();
        let mut index_by_name: HashMap<String, usize> =
            found_keys.clone().filter_map(|(index, key)| Some((key.name.clone()?, index))).collect();
        let mut index_by_fingerprint: HashMap<_, _> =
            found_keys.map(|(index, key)| (key.key.fingerprint(), index)).collect();
        let offset = self.found.keys.len();
        for (index, entry) in entries.iter().enumerate() {
            let index = offset + index;
            let problems = &mut self.report.problems;
            entry.report_unknown_fields(
                match origin {
                    KeyOrigin::Managed => &MANAGED_KEY_FIELDS,
                    KeyOrigin::File | KeyOrigin::Environment => &KEY_FIELDS,
                },
                problems,
            );
            let weight = entry.parse_count("weight", 1..=MAX_WEIGHT, problems);
            let reserve_credits = entry.parse_count("reserve_credits", 0..=MAX_RESERVE_CREDITS, problems);
            let name = entry.parse_string("name", problems);
            let workspace = entry.parse_string("workspace", problems);
            for (text, span) in name.iter().chain(&workspace) {
                problems.extend(check_name(text).err().map(|error| span.problem(error)));
            }
            if let Some((name, span)) = &name
                && let Some(first) = index_by_name.insert((*name).to_owned(), index)
            {
                let message = format!("key {} has the same name as key {}", index + 1, first + 1);
                problems.push(span.problem(ValueError::new(message).advise("give each key its own name")));
            }
            let base_url: Option<BaseUrl> = entry.parse("base_url", problems);
            let proxy = read_entry_proxy(entry, self.sources, self.directories, problems);
            let key_field = entry.require_one_of(&["key", "key_file"], problems);
            let Some(StringField { name: field, text, span }) = key_field else { continue };
            let provider =
                base_url.as_ref().map_or(self.provider, |base_url| KeyProvider::for_host(base_url.host()));
            let key_result = match field {
                "key_file" if !is_selected => continue,
                "key_file" => read_secret_file(self.sources, self.directories, text)
                    .map_err(|error| match origin {
                        KeyOrigin::Managed => error.advise("restore the file, or delete this entry"),
                        KeyOrigin::File | KeyOrigin::Environment => error,
                    })
                    .and_then(|text| parse_single_key(&text, provider)),
                _ => parse_single_key(text, provider),
            };
            let (key, corrections) = match key_result {
                Ok(key_result) => key_result,
                Err(error) => {
                    problems.push(span.problem(error));
                    continue;
                }
            };
            if !is_selected {
                continue;
            }
            let warnings = &mut self.report.warnings;
            warnings.extend(corrections.into_iter().map(|message| span.warning(message)));
            // If several entries contain the same key, only the first one counts.
            let first_index = *index_by_fingerprint.entry(key.fingerprint()).or_insert(index);
            match Some(first_index).filter(|first_index| *first_index != index) {
                None => self.found.keys.push(KeyConfig {
                    key,
                    name: name.map(|(name, _)| name.to_owned()),
                    workspace: workspace.map(|(workspace, _)| workspace.to_owned()),
                    base_url,
                    proxy,
                    weight: weight.unwrap_or(1),
                    reserve_credits: reserve_credits.map(u64::from),
                    origin,
                }),
                Some(first) => {
                    let message =
                        format!("key {} is the same as key {} ({})", index + 1, first + 1, key.short());
                    warnings.push(span.warning(message));
                }
            }
        }
    }
}

/// Parses the `proxy` of an entry, or the content of its `proxy_file`.
fn read_entry_proxy(
    entry: &TableEntry<'_>,
    sources: &ValueSources<'_>,
    directories: BaseDirectories<'_>,
    problems: &mut Vec<Problem>,
) -> ProxySetting {
    let proxy: Option<ProxySetting> = entry.parse("proxy", problems);
    let Some((path, span)) = entry.parse_string("proxy_file", problems) else {
        return proxy.unwrap_or_default();
    };
    if proxy.is_some() {
        problems.push(span.problem(conflicting_settings_error("proxy", "proxy_file")));
    }
    let proxy_result = read_secret_file(sources, directories, path).and_then(|text| text.parse());
    proxy_result.map_err(|error| problems.push(span.problem(error))).unwrap_or_default()
}

/// Parses the only key in `text`. Returns it with the messages about corrected mistakes.
fn parse_single_key(text: &str, provider: KeyProvider) -> Result<(ApiKey, Vec<String>), ValueError> {
    let mut list = key_list::parse(text, KeyListFormat::File, provider);
    if list.keys.len() + list.errors.len() > 1 {
        return Err(ValueError::new("this is more than one key")
            .advise("write one [[keys]] entry for each key")
            .advise(format!("or set {LIST_FILE} to a file with all keys")));
    }
    match (list.keys.pop(), list.errors.pop()) {
        (Some(key), _) => Ok((key, list.corrections)),
        (None, error) => Err(error.unwrap_or_else(|| ValueError::new(key_list::NO_KEY))),
    }
}

/// Checks a key, workspace or client name. Names appear in logs, metrics and usage records, so a name must be short
/// and must not look like a secret.
pub(super) fn check_name(name: &str) -> Result<(), ValueError> {
    let is_name_byte =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
    if looks_like_secret(name) {
        return Err(
            ValueError::new("this name looks like a key").advise("names appear in logs: write a short name")
        );
    }
    if !(1..=64).contains(&name.len()) || !name.bytes().all(is_name_byte) {
        return Err(ValueError::new("this name is invalid")
            .advise("write 1 to 64 characters of `a`-`z`, `0`-`9`, `-` and `_`"));
    }
    Ok(())
}
