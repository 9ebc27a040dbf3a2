//! Which identifiers a request names and an answer gives. They belong to one account: a request that
//! names one can be served by the keys of that account only.
//!
//! What an identifier is of and where it stands is in `table`; which account it belongs to is
//! learned elsewhere. Identifiers leave this module as hashes.

mod fields;
mod index;
mod kind;
mod table;

pub mod claim;

use std::sync::LazyLock;

use http::{HeaderMap, Method};

use super::endpoint::Route;
use super::headers::decode;
use super::normalize_path::is_version;
use super::path::{Path, Segment, Segments};
use fields::Fields;
use index::index;
pub use kind::{Class, Keeping, Kind, Named, Tag};
#[cfg(test)]
use table::rows;

/// The identifiers that a request names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// In its path: the request is about these.
    pub path: Vec<Named>,
    /// In its query and body: it makes use of these.
    pub others: Vec<Named>,
}

impl Names {
    /// Those in the path and the query of a request; `path` is as it was received. None for a path that
    /// could be read in more than one way: such a request is refused.
    #[must_use]
    pub fn of(path: &str, query: Option<&str>) -> Self {
        Path::read(path).map(|path| Self::of_words(&path.words(), query)).unwrap_or_default()
    }

    /// The same, by the words of its path.
    #[must_use]
    pub fn of_words(words: &Segments<'_>, query: Option<&str>) -> Self {
        let rest = without_version(words);
        let mut others = Vec::new();
        for pair in query.into_iter().flat_map(|query| query.split('&')) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if value.is_empty() {
                continue;
            }
            let name = decode(name);
            let name = name.trim_end_matches("[]");
            let Some(kind) = index().of_parameter(name) else { continue };
            let value = decode(value);
            // Several may stand in one value.
            let is_many = name.ends_with("_ids");
            let values = value.split(move |c| is_many && c == ',').map(str::trim);
            add_all(&mut others, values.map(|value| named(kind, value, rest)));
        }
        Self { path: index().of_path(rest), others }
    }

    /// Takes in those of a JSON body.
    pub fn add_body(&mut self, document: &[u8]) {
        add_all(&mut self.others, in_document(document));
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Named> {
        self.path.iter().chain(&self.others)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.path.is_empty() && self.others.is_empty()
    }
}

/// The identifiers that a JSON body, or a message of a socket, names.
#[must_use]
pub fn in_document(document: &[u8]) -> Vec<Named> {
    fields::find(document, index().body(), |kind, value| Some(Named::new(kind, value)))
}

/// The identifiers that the first message of a served session gives: an agent names the conversation.
#[must_use]
pub fn in_first_message(message: &[u8]) -> Vec<Named> {
    static FIELDS: LazyLock<Fields> = LazyLock::new(|| {
        Fields::of([("conversation_initiation_metadata_event.conversation_id", Kind::Conversation)])
    });
    fields::find(message, &FIELDS, |kind, value| Some(Named::new(kind, value)))
}

/// The identifiers that the head of an answer gives.
#[must_use]
pub fn in_headers(headers: &HeaderMap) -> Vec<Named> {
    let given = index().headers().iter().filter_map(|(name, kind)| {
        let value = headers.get(name)?.to_str().ok().filter(|value| !value.is_empty())?;
        Some(Named::new(*kind, value))
    });
    given.collect()
}

/// What the answers of an endpoint are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Yields {
    /// Nothing that belongs to an account.
    Nothing,
    /// What was made.
    Made,
    /// What the account has, or how it stands: another account would say something else.
    Account,
}

/// What a request's answer is about. `route` is that of its
/// [`Endpoint`](super::endpoint::Endpoint).
#[must_use]
pub fn yields(method: &Method, route: &Route) -> Yields {
    index().gives(method, route)
}

/// Whether a route makes speech with voices. A voice that is not there is refused whole: nothing is
/// made or charged.
#[must_use]
pub fn is_speech(route: &Route) -> bool {
    const ROOTS: [&str; 4] = ["speech-to-speech", "text-to-dialogue", "text-to-speech", "voice-changer"];
    route.root().is_some_and(|root| ROOTS.contains(&root.text()))
}

/// The identifiers that the JSON body of an answer gives, with the cursors of a list. What every
/// account has, such as premade voices, is not among them.
#[must_use]
pub fn in_answer(method: &Method, route: &Route, path: &str, document: &[u8]) -> Vec<Named> {
    // Only requests whose path has one reading are answered.
    let Ok(path) = Path::read(path) else { return Vec::new() };
    let words = path.words();
    let list = without_version(&words);
    let Some(fields) = index().of_answer(method, route) else { return Vec::new() };
    fields::find(document, fields, |kind, value| {
        // The URL is given, and its signature is what comes back.
        let is_signed = kind == Kind::Signature;
        Some(if is_signed { Named::new(kind, &signature(value)?) } else { named(kind, value, list) })
    })
}

fn signature(url: &str) -> Option<String> {
    let (_, query) = url.split_once('?')?;
    let value = query.split('&').find_map(|pair| pair.strip_prefix("conversation_signature="))?;
    Some(decode(value).into_owned()).filter(|value| !value.is_empty())
}

/// A cursor counts in its own list only: some are no more than a number.
fn named(kind: Kind, value: &str, list: &[Segment<'_>]) -> Named {
    if kind != Kind::Cursor {
        return Named::new(kind, value);
    }
    let list: Vec<&str> = list.iter().map(Segment::text).collect();
    Named::new(kind, &format!("{}\n{value}", list.join("/")))
}

/// Different identifiers that one request names, of those that stand together: each new one is compared with
/// all before it. A request of the provider names a few dozen.
const MAX_NAMES: usize = 512;

fn add_all(names: &mut Vec<Named>, more: impl IntoIterator<Item = Named>) {
    for named in more {
        if names.len() >= MAX_NAMES {
            break;
        }
        if !names.contains(&named) {
            names.push(named);
        }
    }
}

fn without_version<'a, 'b>(words: &'a [Segment<'b>]) -> &'a [Segment<'b>] {
    match words {
        [version, rest @ ..] if is_version(version.text()) => rest,
        all => all,
    }
}

#[cfg(test)]
mod tests;
