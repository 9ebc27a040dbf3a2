//! Which identifiers a request names and an answer gives. They belong to one account: a request that
//! names one can be served by the keys of that account only.
//!
//! What an identifier is of and where it stands is in `table`; which account it belongs to is
//! learned elsewhere. Identifiers leave this module as hashes.

mod fields;
mod kind;
mod table;

pub mod claim;

use http::{HeaderMap, Method};

use super::endpoint::{is_literal, segments};
use super::headers::decode;
use super::mend::is_version;
use fields::Field;
pub use kind::{Class, Keeping, Kind, Named, Tag};
use table::{ACCOUNT_READS, CURSORS, Row, rows};

/// The identifiers that a request names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// In its path: the request is about these.
    pub path: Vec<Named>,
    /// In its query and body: it makes use of these.
    pub others: Vec<Named>,
}

impl Names {
    /// Those in the path and the query of a request; `path` is as it was received.
    #[must_use]
    pub fn of(path: &str, query: Option<&str>) -> Self {
        let segments = segments(path);
        let names: Vec<&str> = segments.iter().map(String::as_str).collect();
        let rest = without_version(&names);
        let mut path = Vec::new();
        for pattern in rows().flat_map(|row| row.paths) {
            add_all(&mut path, match_path(pattern, rest));
        }
        let list = list_of(rest);
        let mut others = Vec::new();
        for pair in query.into_iter().flat_map(|query| query.split('&')) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decode(name), decode(value));
            let name = name.trim_end_matches("[]");
            let known = rows().flat_map(|row| row.query).find(|(known, _)| *known == name);
            if let Some((_, kind)) = known
                && !value.is_empty()
            {
                // Several may stand in one value.
                let is_many = name.ends_with("_ids");
                let values = value.split(move |c| is_many && c == ',').map(str::trim);
                add_all(&mut others, values.map(|value| named(*kind, value, &list)));
            }
        }
        Self { path, others }
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
    let fields: Vec<Field> = rows().flat_map(|row| row.body).copied().collect();
    fields::find(document, &fields, |kind, value| Some(Named::new(kind, value)))
}

/// The identifiers that the first message of a served session gives: an agent names the conversation.
#[must_use]
pub fn in_first_message(message: &[u8]) -> Vec<Named> {
    const FIELDS: [Field; 1] =
        [("conversation_initiation_metadata_event.conversation_id", Kind::Conversation)];
    fields::find(message, &FIELDS, |kind, value| Some(Named::new(kind, value)))
}

/// The identifiers that the head of an answer gives.
#[must_use]
pub fn in_headers(headers: &HeaderMap) -> Vec<Named> {
    let given = rows().flat_map(|row| row.headers).filter_map(|(name, kind)| {
        let value = headers.get(*name)?.to_str().ok().filter(|value| !value.is_empty())?;
        Some(Named::new(*kind, value))
    });
    given.collect()
}

/// What the answers of an endpoint are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gives {
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
pub fn gives(method: &Method, route: &str) -> Gives {
    let route = without_version_of(route);
    let has = |made: fn(&Row) -> &'static [table::Made]| {
        rows().flat_map(made).any(|(routes, _)| routes.contains(&route))
    };
    if *method == Method::GET && (ACCOUNT_READS.contains(&route) || has(|row| row.lists)) {
        return Gives::Account;
    }
    let makes = [Method::POST, Method::PUT, Method::PATCH].contains(method);
    if makes && has(|row| row.made) { Gives::Made } else { Gives::Nothing }
}

/// Whether a route makes speech with voices. A voice that is not there is refused whole: nothing is
/// made or charged.
#[must_use]
pub fn is_speech(route: &str) -> bool {
    const ROOTS: [&str; 4] = ["speech-to-speech", "text-to-dialogue", "text-to-speech", "voice-changer"];
    ROOTS.contains(&without_version_of(route).split('/').next().unwrap_or_default())
}

/// The identifiers that the JSON body of an answer gives, with the cursors of a list. What every
/// account has, such as premade voices, is not among them.
#[must_use]
pub fn in_answer(method: &Method, route: &str, path: &str, document: &[u8]) -> Vec<Named> {
    let route = without_version_of(route);
    let fields_of = |made: fn(&Row) -> &'static [table::Made]| -> Vec<Field> {
        let rows = rows().flat_map(made).filter(|(routes, _)| routes.contains(&route));
        rows.flat_map(|(_, fields)| *fields).copied().collect()
    };
    let fields = if *method == Method::GET {
        fields_of(|row| row.lists).into_iter().chain(CURSORS).collect()
    } else {
        fields_of(|row| row.made)
    };
    let segments = segments(path);
    let names: Vec<&str> = segments.iter().map(String::as_str).collect();
    let list = list_of(without_version(&names));
    fields::find(document, &fields, |kind, value| {
        // The URL is given, and its signature is what comes back.
        let value = if kind == Kind::Signature { signature(value)? } else { value.to_owned() };
        Some(named(kind, &value, &list))
    })
}

fn signature(url: &str) -> Option<String> {
    let (_, query) = url.split_once('?')?;
    let value = query.split('&').find_map(|pair| pair.strip_prefix("conversation_signature="))?;
    Some(decode(value)).filter(|value| !value.is_empty())
}

/// A cursor counts in its own list only: some are no more than a number.
fn named(kind: Kind, value: &str, list: &str) -> Named {
    if kind == Kind::Cursor { Named::new(kind, &format!("{list}\n{value}")) } else { Named::new(kind, value) }
}

fn list_of(segments: &[&str]) -> String {
    segments.join("/")
}

fn add_all(names: &mut Vec<Named>, more: impl IntoIterator<Item = Named>) {
    for named in more {
        if !names.contains(&named) {
            names.push(named);
        }
    }
}

fn without_version<'a, 'b>(names: &'a [&'b str]) -> &'a [&'b str] {
    match names {
        [version, rest @ ..] if is_version(version) => rest,
        all => all,
    }
}

fn without_version_of(route: &str) -> &str {
    let route = route.strip_prefix('/').unwrap_or(route);
    match route.split_once('/') {
        Some((version, rest)) if is_version(version) => rest,
        Some(_) | None => route,
    }
}

/// The identifiers of a path that begins with `pattern`. A word of the API is no identifier.
fn match_path(pattern: &str, segments: &[&str]) -> Vec<Named> {
    let mut found = Vec::new();
    let mut segments = segments.iter();
    for part in pattern.split('/') {
        let Some(segment) = segments.next() else { return Vec::new() };
        let is_word = || is_literal(&segment.to_lowercase());
        match part.strip_prefix('{').and_then(|part| part.strip_suffix('}')) {
            Some(_) if is_word() => return Vec::new(),
            Some(kind) => found.extend(Kind::of_word(kind).map(|kind| (kind, *segment))),
            None if part == "*" && !is_word() => {}
            None if part.eq_ignore_ascii_case(segment) => {}
            None => return Vec::new(),
        }
    }
    found.into_iter().map(|(kind, identifier)| Named::new(kind, identifier)).collect()
}

#[cfg(test)]
mod tests;
