//! Finds the keys of the pool. All keys come from one source: if several lists added up, it would
//! be unclear which keys are in use.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;

use super::base_url::BaseUrl;
use super::document::Entry;
use super::key_list::{self, Form, KeyList, Mistake};
use super::key_shape::Upstream;
use super::mask::{looks_secret, shown};
use super::problem::{Origin, Place, Problem, Warning, WrongValue};
use super::source::{Sources, Unreadable};
use super::value::Folders;
use crate::secret::ApiKey;

const LIST: &str = "ELEVENLABS_API_KEYS";
const LIST_FILE: &str = "ELEVENLABS_API_KEYS_FILE";
pub(super) const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";
const CREDENTIAL: &str = "elevenlabs_api_keys";

/// Maximum weight: with a larger share a key is practically alone.
const WEIGHT_MAX: u32 = 1_000;
/// Maximum reserve: more credits than any plan has.
const CREDITS_MAX: u32 = 1_000_000_000;

/// One key of the pool.
#[derive(Clone, Debug)]
pub struct KeyConfig {
    /// The API key.
    pub key: ApiKey,
    /// Its configured name.
    pub name: Option<String>,
    /// The workspace; keys of one workspace share its credits.
    pub workspace: Option<String>,
    /// The provider's host for this key, if not `upstream.base_url`: a region's keys are valid at
    /// its host only.
    pub base_url: Option<BaseUrl>,
    /// Its weight relative to other keys, from 1.
    pub weight: u32,
    /// Credits of its workspace that it leaves unused, instead of the setting of the pool.
    pub reserve_credits: Option<u64>,
}

impl From<ApiKey> for KeyConfig {
    fn from(key: ApiKey) -> Self {
        Self { key, name: None, workspace: None, base_url: None, weight: 1, reserve_credits: None }
    }
}

/// The source of the keys. Prints as the end of `Loaded 2 ElevenLabs API keys from …`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KeySource {
    /// No keys were found.
    #[default]
    Nowhere,
    /// `ELEVENLABS_API_KEYS`.
    Variable,
    /// The file that `ELEVENLABS_API_KEYS_FILE` names.
    ListFile(PathBuf),
    /// `elevenlabs_api_keys` among the credentials of the service.
    Credential(PathBuf),
    /// The `[[keys]]` of the configuration file.
    ConfigFile(PathBuf),
    /// Passed by the caller: the demo, a test.
    Caller,
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nowhere => f.write_str("nowhere"),
            Self::Variable => f.write_str(LIST),
            Self::ListFile(path) | Self::Credential(path) | Self::ConfigFile(path) => {
                write!(f, "{}", path.display())
            }
            Self::Caller => f.write_str("memory"),
        }
    }
}

/// The keys, and the problems and warnings of the search.
#[derive(Default)]
pub(super) struct Found {
    pub(super) keys: Vec<KeyConfig>,
    pub(super) source: KeySource,
    pub(super) problems: Vec<Problem>,
    pub(super) warnings: Vec<Warning>,
}

/// Searches the sources in order: the variable, the file it names, the service's credential, and
/// the `[[keys]]` of the configuration file `file`, whose folder is in `folders`.
pub(super) fn find(
    sources: &Sources<'_>,
    file: Option<PathBuf>,
    entries: &[Entry<'_>],
    folders: Folders<'_>,
    base_url: &BaseUrl,
) -> Found {
    let mut found = Found::default();
    let upstream = Upstream::of_host(base_url.host());
    // The sources that contain keys, in order of precedence; the first one is used.
    let mut givers = Vec::new();
    if let Some(text) = sources.environment.value(LIST) {
        givers.push(KeySource::Variable);
        let place = Place::of(Origin::Variable(LIST.to_owned()));
        found.take(key_list::parse(text, Form::Variable, upstream), Form::Variable, &place);
    }
    if let Some(path) = sources.environment.value(LIST_FILE) {
        let is_first = givers.is_empty();
        givers.push(KeySource::ListFile(PathBuf::from(path)));
        if is_first {
            found.take_list_file(sources, path, upstream);
        }
    }
    if let Some(folder) = sources.environment.value(CREDENTIALS) {
        let path = PathBuf::from(folder).join(CREDENTIAL);
        let is_first = givers.is_empty();
        // The service may have other credentials than Keychoir's.
        let text = Some((sources.read)(&path)).filter(|text| *text != Err(Unreadable::Missing));
        if let Some(text) = text {
            givers.push(KeySource::Credential(path.clone()));
            let place = Place::of(Origin::File(path));
            match text {
                _ if !is_first => {}
                Ok(text) => found.take(key_list::parse(&text, Form::File, upstream), Form::File, &place),
                Err(reason) => found.problems.push(place.problem(unreadable("the file", &reason))),
            }
        }
    }
    if let Some(file) = file.filter(|_| !entries.is_empty()) {
        let is_first = givers.is_empty();
        givers.push(KeySource::ConfigFile(file));
        found.take_entries(sources, entries, folders, upstream, is_first);
    }
    let mut givers = givers.into_iter();
    if let Some(first) = givers.next() {
        for other in givers {
            let place = match &other {
                KeySource::ListFile(_) => Place::of(Origin::Variable(LIST_FILE.to_owned())),
                KeySource::Credential(path) => Place::of(Origin::File(path.clone())),
                KeySource::ConfigFile(path) => entries
                    .first()
                    .map_or_else(|| Place::of(Origin::File(path.clone())), |entry| entry.place.clone()),
                KeySource::Nowhere | KeySource::Variable | KeySource::Caller => Place::of(Origin::Nowhere),
            };
            found.warnings.push(place.warning(format!("these keys are left out: {first} gives keys too")));
        }
        found.source = first;
    }
    found
}

impl Found {
    fn take(&mut self, list: KeyList, form: Form, place: &Place) {
        let how = match form {
            Form::Variable => {
                "write the keys alone, separated by commas: ELEVENLABS_API_KEYS=sk_first,sk_second"
            }
            Form::File => "write the keys alone, one a line",
        };
        for Mistake { what, advice } in list.mistakes {
            let wrong = advice.into_iter().fold(WrongValue::new(what), WrongValue::advise);
            self.problems.push(place.problem(wrong.advise(how)));
        }
        self.warnings.extend(list.oddities.into_iter().map(|what| place.warning(what)));
        self.keys.extend(list.keys.into_iter().map(KeyConfig::from));
    }

    fn take_list_file(&mut self, sources: &Sources<'_>, path: &str, upstream: Upstream) {
        let place = Place::of(Origin::Variable(LIST_FILE.to_owned()));
        let folders = Folders { base: None, home: sources.environment.home() };
        let path = match folders.file(path) {
            Ok(path) => path,
            Err(wrong) => return self.problems.push(place.problem(wrong)),
        };
        match (sources.read)(&path) {
            Ok(text) => {
                let list = key_list::parse(&text, Form::File, upstream);
                self.take(list, Form::File, &Place::of(Origin::File(path)));
            }
            Err(reason) => {
                let named = shown(&path.to_string_lossy());
                let wrong = unreadable(&named, &reason);
                let is_key = looks_secret(&path.to_string_lossy());
                self.problems.push(place.problem(wrong.suggest(is_key.then_some(LIST))));
            }
        }
    }

    /// Validates the entries; their files are read and their keys used only if this source is used.
    fn take_entries(
        &mut self,
        sources: &Sources<'_>,
        entries: &[Entry<'_>],
        folders: Folders<'_>,
        upstream: Upstream,
        counts: bool,
    ) {
        let mut names: HashMap<String, usize> = HashMap::new();
        let mut keys = HashMap::new();
        for (index, entry) in entries.iter().enumerate() {
            entry.check_names(
                &["key", "key_file", "name", "workspace", "base_url", "weight", "reserve_credits"],
                &mut self.problems,
            );
            let weight = entry.count("weight", 1..=WEIGHT_MAX, &mut self.problems);
            let reserve_credits = entry.count("reserve_credits", 0..=CREDITS_MAX, &mut self.problems);
            let name = entry.text("name", &mut self.problems);
            let workspace = entry.text("workspace", &mut self.problems);
            for (text, place) in name.iter().chain(&workspace) {
                self.problems.extend(check_name(text).err().map(|wrong| place.problem(wrong)));
            }
            if let Some((name, place)) = &name
                && let Some(first) = names.insert((*name).to_owned(), index)
            {
                let what = format!("key {} has the same name as key {}", index + 1, first + 1);
                self.problems.push(place.problem(WrongValue::new(what).advise("give each key its own name")));
            }
            let base_url = match entry.text("base_url", &mut self.problems) {
                None => None,
                Some((text, place)) => match text.parse::<BaseUrl>() {
                    Ok(base_url) => Some(base_url),
                    Err(wrong) => {
                        self.problems.push(place.problem(wrong));
                        None
                    }
                },
            };
            let Some((field, text, place)) = entry.one_of(&["key", "key_file"], &mut self.problems) else {
                continue;
            };
            let upstream = base_url.as_ref().map_or(upstream, |base_url| Upstream::of_host(base_url.host()));
            let key = match field {
                "key_file" if !counts => continue,
                "key_file" => secret_file(sources, folders, text).and_then(|text| one_key(&text, upstream)),
                _ => one_key(text, upstream),
            };
            if let Ok((_, oddities)) = &key
                && counts
            {
                self.warnings.extend(oddities.iter().map(|what| place.warning(what.clone())));
            }
            match key {
                Ok((key, _)) => match keys.insert(key.fingerprint(), index) {
                    _ if !counts => {}
                    None => self.keys.push(KeyConfig {
                        key,
                        name: name.map(|(name, _)| name.to_owned()),
                        workspace: workspace.map(|(workspace, _)| workspace.to_owned()),
                        base_url,
                        weight: weight.unwrap_or(1),
                        reserve_credits: reserve_credits.map(u64::from),
                    }),
                    Some(first) => {
                        let what =
                            format!("key {} is the same as key {} ({})", index + 1, first + 1, key.short());
                        self.warnings.push(place.warning(what));
                    }
                },
                Err(wrong) => self.problems.push(place.problem(wrong)),
            }
        }
    }
}

/// The only key in `text`, with its corrected oddities.
fn one_key(text: &str, upstream: Upstream) -> Result<(ApiKey, Vec<String>), WrongValue> {
    let list = key_list::parse(text, Form::File, upstream);
    if list.keys.len() + list.mistakes.len() > 1 {
        let wrong =
            WrongValue::new("there is more than one key here").advise("write one [[keys]] entry for each");
        return Err(wrong.advise(format!("or give all of them with {LIST_FILE}")));
    }
    match (list.keys.into_iter().next(), list.mistakes.into_iter().next()) {
        (Some(key), _) => Ok((key, list.oddities)),
        (None, Some(Mistake { what, advice })) => {
            Err(advice.into_iter().fold(WrongValue::new(what), WrongValue::advise))
        }
        (None, None) => Err(WrongValue::new("there is no key in it")),
    }
}

/// The text of a file that an entry names. No message contains the name: it may be the secret
/// itself, in the wrong field.
pub(super) fn secret_file(
    sources: &Sources<'_>,
    folders: Folders<'_>,
    text: &str,
) -> Result<String, WrongValue> {
    let path = folders.file(text)?;
    (sources.read)(&path).map_err(|reason| {
        unreadable("the file", &reason)
            .advise("a relative path starts at the folder of the configuration file")
    })
}

pub(super) fn unreadable(what: &str, reason: &Unreadable) -> WrongValue {
    WrongValue::new(format!("{what} cannot be read: {reason}"))
}

/// Checks a name: it appears in logs, metrics and usage records, so it must be short and plain, and
/// no secret in the wrong field.
pub(super) fn check_name(name: &str) -> Result<(), WrongValue> {
    let is_plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
    if looks_secret(name) {
        return Err(
            WrongValue::new("this name looks like a key").advise("names are shown: write a short word")
        );
    }
    if !(1..=64).contains(&name.len()) || !name.bytes().all(is_plain) {
        return Err(WrongValue::new("this name is not plain")
            .advise("write 1 to 64 of `a`-`z`, `0`-`9`, `-` and `_`"));
    }
    Ok(())
}
