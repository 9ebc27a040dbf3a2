//! Finds the keys of the pool in the environment or in files. All keys come from the first source
//! that has keys, so that an operator can see which keys are in use.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;

use super::base_url::BaseUrl;
use super::document::TableEntry;
use super::key_list::{self, InvalidEntry, KeyList, KeyListFormat};
use super::key_shape::KeyProvider;
use super::mask::{looks_secret, shown};
use super::problem::{Problem, SourceSpan, ValueOrigin, Warning, WrongValue};
use super::source::{Unreadable, ValueSources};
use super::value::Folders;
use crate::secret::ApiKey;

const LIST: &str = "ELEVENLABS_API_KEYS";
const LIST_FILE: &str = "ELEVENLABS_API_KEYS_FILE";
pub(super) const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";
const CREDENTIAL: &str = "elevenlabs_api_keys";

/// Maximum weight. With a larger weight the other keys would serve practically no request.
const MAX_WEIGHT: u32 = 1_000;
/// Maximum reserve. No plan of the provider has more credits.
const MAX_RESERVE_CREDITS: u32 = 1_000_000_000;

/// One key of the pool.
#[derive(Clone, Debug)]
pub struct KeyConfig {
    /// The API key.
    pub key: ApiKey,
    /// Its configured name.
    pub name: Option<String>,
    /// Its workspace. Keys of one workspace share credits.
    pub workspace: Option<String>,
    /// The provider's host for this key, if it differs from `upstream.base_url`. A key of a region
    /// is valid at the host of its region only.
    pub base_url: Option<BaseUrl>,
    /// Its weight relative to other keys, from 1.
    pub weight: u32,
    /// Credits of its workspace that the key does not use; `None` for the value of the pool.
    pub reserve_credits: Option<u64>,
}

impl From<ApiKey> for KeyConfig {
    fn from(key: ApiKey) -> Self {
        Self { key, name: None, workspace: None, base_url: None, weight: 1, reserve_credits: None }
    }
}

/// The source of the keys. It is printed at the end of `Loaded 2 ElevenLabs API keys from …`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KeyListSource {
    /// No keys were found.
    #[default]
    Absent,
    /// `ELEVENLABS_API_KEYS`.
    Variable,
    /// The file that `ELEVENLABS_API_KEYS_FILE` names.
    ListFile(PathBuf),
    /// `elevenlabs_api_keys` among the credentials of the service.
    Credential(PathBuf),
    /// The `[[keys]]` of the configuration file.
    ConfigFile(PathBuf),
    /// Passed by the program itself, for the demo and tests.
    Caller,
}

impl fmt::Display for KeyListSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("nowhere"),
            Self::Variable => f.write_str(LIST),
            Self::ListFile(path) | Self::Credential(path) | Self::ConfigFile(path) => {
                write!(f, "{}", path.display())
            }
            Self::Caller => f.write_str("memory"),
        }
    }
}

/// The keys, problems and warnings that were found.
#[derive(Default)]
pub(super) struct KeySearch {
    pub(super) keys: Vec<KeyConfig>,
    pub(super) source: KeyListSource,
    pub(super) problems: Vec<Problem>,
    pub(super) warnings: Vec<Warning>,
}

/// Searches the sources in order: the variable, the file that a variable names, the service's
/// credential, and the `[[keys]]` of the configuration file `file`, whose folder is in `folders`.
pub(super) fn find(
    sources: &ValueSources<'_>,
    file: Option<PathBuf>,
    entries: &[TableEntry<'_>],
    folders: Folders<'_>,
    base_url: &BaseUrl,
) -> KeySearch {
    let mut search = KeySearch::default();
    let provider = KeyProvider::of_host(base_url.host());
    // The sources with keys, in order of precedence. Only the first one is used.
    let mut key_sources = Vec::new();
    if let Some(text) = sources.environment.value(LIST) {
        key_sources.push(KeyListSource::Variable);
        let span = SourceSpan::of(ValueOrigin::Variable(LIST.to_owned()));
        search.add_list(
            key_list::parse(text, KeyListFormat::Variable, provider),
            KeyListFormat::Variable,
            &span,
        );
    }
    if let Some(path) = sources.environment.value(LIST_FILE) {
        let is_first = key_sources.is_empty();
        key_sources.push(KeyListSource::ListFile(PathBuf::from(path)));
        if is_first {
            search.add_list_file(sources, path, provider);
        }
    }
    if let Some(folder) = sources.environment.value(CREDENTIALS) {
        let path = PathBuf::from(folder).join(CREDENTIAL);
        let is_first = key_sources.is_empty();
        // The service may have credentials for other programs only.
        let text = Some((sources.read)(&path)).filter(|text| *text != Err(Unreadable::Missing));
        if let Some(text) = text {
            key_sources.push(KeyListSource::Credential(path.clone()));
            let span = SourceSpan::of(ValueOrigin::File(path));
            match text {
                _ if !is_first => {}
                Ok(text) => search.add_list(
                    key_list::parse(&text, KeyListFormat::File, provider),
                    KeyListFormat::File,
                    &span,
                ),
                Err(reason) => search.problems.push(span.problem(unreadable("the file", &reason))),
            }
        }
    }
    if let Some(file) = file.filter(|_| !entries.is_empty()) {
        let is_first = key_sources.is_empty();
        key_sources.push(KeyListSource::ConfigFile(file));
        search.add_entries(sources, entries, folders, provider, is_first);
    }
    let mut key_sources = key_sources.into_iter();
    if let Some(first) = key_sources.next() {
        for other in key_sources {
            let span = match &other {
                KeyListSource::ListFile(_) => SourceSpan::of(ValueOrigin::Variable(LIST_FILE.to_owned())),
                KeyListSource::Credential(path) => SourceSpan::of(ValueOrigin::File(path.clone())),
                KeyListSource::ConfigFile(path) => entries.first().map_or_else(
                    || SourceSpan::of(ValueOrigin::File(path.clone())),
                    |entry| entry.span.clone(),
                ),
                KeyListSource::Absent | KeyListSource::Variable | KeyListSource::Caller => {
                    SourceSpan::of(ValueOrigin::Nowhere)
                }
            };
            search
                .warnings
                .push(span.warning(format!("these keys are not used, because {first} has keys too")));
        }
        search.source = first;
    }
    search
}

impl KeySearch {
    fn add_list(&mut self, list: KeyList, format: KeyListFormat, span: &SourceSpan) {
        let notation = match format {
            KeyListFormat::Variable => {
                "write the keys alone, separated by commas: ELEVENLABS_API_KEYS=sk_first,sk_second"
            }
            KeyListFormat::File => "write the keys alone, one a line",
        };
        for InvalidEntry { message, advice } in list.invalid {
            let wrong = advice.into_iter().fold(WrongValue::new(message), WrongValue::advise);
            self.problems.push(span.problem(wrong.advise(notation)));
        }
        self.warnings.extend(list.corrections.into_iter().map(|message| span.warning(message)));
        self.keys.extend(list.keys.into_iter().map(KeyConfig::from));
    }

    fn add_list_file(&mut self, sources: &ValueSources<'_>, path: &str, provider: KeyProvider) {
        let span = SourceSpan::of(ValueOrigin::Variable(LIST_FILE.to_owned()));
        let folders = Folders { base: None, home: sources.environment.home() };
        let path = match folders.file(path) {
            Ok(path) => path,
            Err(wrong) => return self.problems.push(span.problem(wrong)),
        };
        match (sources.read)(&path) {
            Ok(text) => {
                let list = key_list::parse(&text, KeyListFormat::File, provider);
                self.add_list(list, KeyListFormat::File, &SourceSpan::of(ValueOrigin::File(path)));
            }
            Err(reason) => {
                let shown_path = shown(&path.to_string_lossy());
                let wrong = unreadable(&shown_path, &reason);
                let is_key = looks_secret(&path.to_string_lossy());
                self.problems.push(span.problem(wrong.suggest(is_key.then_some(LIST))));
            }
        }
    }

    /// Validates the entries. If another source is used, their key files are not read.
    fn add_entries(
        &mut self,
        sources: &ValueSources<'_>,
        entries: &[TableEntry<'_>],
        folders: Folders<'_>,
        provider: KeyProvider,
        is_used: bool,
    ) {
        let mut names: HashMap<String, usize> = HashMap::new();
        let mut keys = HashMap::new();
        for (index, entry) in entries.iter().enumerate() {
            entry.check_names(
                &["key", "key_file", "name", "workspace", "base_url", "weight", "reserve_credits"],
                &mut self.problems,
            );
            let weight = entry.count("weight", 1..=MAX_WEIGHT, &mut self.problems);
            let reserve_credits = entry.count("reserve_credits", 0..=MAX_RESERVE_CREDITS, &mut self.problems);
            let name = entry.text("name", &mut self.problems);
            let workspace = entry.text("workspace", &mut self.problems);
            for (text, span) in name.iter().chain(&workspace) {
                self.problems.extend(check_name(text).err().map(|wrong| span.problem(wrong)));
            }
            if let Some((name, span)) = &name
                && let Some(first) = names.insert((*name).to_owned(), index)
            {
                let message = format!("key {} has the same name as key {}", index + 1, first + 1);
                self.problems
                    .push(span.problem(WrongValue::new(message).advise("give each key its own name")));
            }
            let base_url = match entry.text("base_url", &mut self.problems) {
                None => None,
                Some((text, span)) => match text.parse::<BaseUrl>() {
                    Ok(base_url) => Some(base_url),
                    Err(wrong) => {
                        self.problems.push(span.problem(wrong));
                        None
                    }
                },
            };
            let Some((field, text, span)) = entry.one_of(&["key", "key_file"], &mut self.problems) else {
                continue;
            };
            let provider =
                base_url.as_ref().map_or(provider, |base_url| KeyProvider::of_host(base_url.host()));
            let key = match field {
                "key_file" if !is_used => continue,
                "key_file" => secret_file(sources, folders, text).and_then(|text| one_key(&text, provider)),
                _ => one_key(text, provider),
            };
            if let Ok((_, corrections)) = &key
                && is_used
            {
                self.warnings.extend(corrections.iter().map(|message| span.warning(message.clone())));
            }
            match key {
                Ok((key, _)) => match keys.insert(key.fingerprint(), index) {
                    _ if !is_used => {}
                    None => self.keys.push(KeyConfig {
                        key,
                        name: name.map(|(name, _)| name.to_owned()),
                        workspace: workspace.map(|(workspace, _)| workspace.to_owned()),
                        base_url,
                        weight: weight.unwrap_or(1),
                        reserve_credits: reserve_credits.map(u64::from),
                    }),
                    Some(first) => {
                        let message =
                            format!("key {} is the same as key {} ({})", index + 1, first + 1, key.short());
                        self.warnings.push(span.warning(message));
                    }
                },
                Err(wrong) => self.problems.push(span.problem(wrong)),
            }
        }
    }
}

/// The single key in `text`, with its corrections.
fn one_key(text: &str, provider: KeyProvider) -> Result<(ApiKey, Vec<String>), WrongValue> {
    let list = key_list::parse(text, KeyListFormat::File, provider);
    if list.keys.len() + list.invalid.len() > 1 {
        let wrong =
            WrongValue::new("there is more than one key here").advise("write one [[keys]] entry for each");
        return Err(wrong.advise(format!("or give all of them with {LIST_FILE}")));
    }
    match (list.keys.into_iter().next(), list.invalid.into_iter().next()) {
        (Some(key), _) => Ok((key, list.corrections)),
        (None, Some(InvalidEntry { message, advice })) => {
            Err(advice.into_iter().fold(WrongValue::new(message), WrongValue::advise))
        }
        (None, None) => Err(WrongValue::new("there is no key in it")),
    }
}

/// Reads a file that an entry names. No message contains the file name, because a secret may have
/// been written in the wrong field.
pub(super) fn secret_file(
    sources: &ValueSources<'_>,
    folders: Folders<'_>,
    text: &str,
) -> Result<String, WrongValue> {
    let path = folders.file(text)?;
    (sources.read)(&path).map_err(|reason| {
        unreadable("the file", &reason)
            .advise("a relative path starts at the folder of the configuration file")
    })
}

pub(super) fn unreadable(subject: &str, reason: &Unreadable) -> WrongValue {
    WrongValue::new(format!("{subject} cannot be read: {reason}"))
}

/// Checks a name. Names appear in logs, metrics and usage records, so a name must be short, contain
/// plain characters, and not look like a secret.
pub(super) fn check_name(name: &str) -> Result<(), WrongValue> {
    let is_plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
    if looks_secret(name) {
        return Err(
            WrongValue::new("this name looks like a key").advise("names appear in logs: write a short word")
        );
    }
    if !(1..=64).contains(&name.len()) || !name.bytes().all(is_plain) {
        return Err(WrongValue::new("this name is not plain")
            .advise("write 1 to 64 of `a`-`z`, `0`-`9`, `-` and `_`"));
    }
    Ok(())
}
