//! Finds the identifiers that requests and responses name. Each belongs to one account: a request that
//! names one can be served only by the keys of that account.
//!
//! `table` lists the kinds of identifiers and where they appear; the pool records the owning accounts.
//! This module returns identifiers only as hashes.

mod fields;
mod index;
mod kind;
mod table;

pub mod claim;

use std::sync::LazyLock;

use http::{HeaderMap, Method};

use super::endpoint::Route;
use super::normalize_path::is_version;
use crate::elevenlabs::segments::{Segment, Segments};
use crate::policy::headers::decode;
use crate::policy::path::Path;
use fields::Fields;
use index::index;
pub use kind::{Class, Keeping, Kind, Named, Tag};
#[cfg(test)]
use table::rows;

/// The identifiers that a request names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Identifiers in the path: the resources that the request is about.
    pub path: Vec<Named>,
    /// Identifiers in the query and the body: other resources that the request uses.
    pub others: Vec<Named>,
}

impl Names {
    /// The identifiers in the path and the query of a request; `path` is as received. An ambiguous path
    /// has none, because its request is refused.
    #[must_use]
    pub fn of(path: &str, query: Option<&str>) -> Self {
        Path::read(path).map(|path| Self::of_segments(&Segments::of_path(&path), query)).unwrap_or_default()
    }

    /// The identifiers in the path and the query of a request, from the segments of its path.
    #[must_use]
    pub fn of_segments(segments: &Segments<'_>, query: Option<&str>) -> Self {
        let rest = without_version(segments);
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
            // One value may contain several identifiers.
            let is_many = name.ends_with("_ids");
            let values = value.split(move |c| is_many && c == ',').map(str::trim);
            add_all(&mut others, values.map(|value| named(kind, value, rest)));
        }
        Self { path: index().of_path(rest), others }
    }

    /// Adds the identifiers of a JSON body.
    pub fn add_body(&mut self, document: &[u8]) {
        add_all(&mut self.others, in_document(document));
    }

    /// All identifiers of the request.
    pub fn all(&self) -> impl Iterator<Item = &Named> {
        self.path.iter().chain(&self.others)
    }

    /// Whether the request names no identifier.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.path.is_empty() && self.others.is_empty()
    }
}

/// The identifiers that a JSON body, or a WebSocket message, names.
#[must_use]
pub fn in_document(document: &[u8]) -> Vec<Named> {
    fields::find(document, index().body(), |kind, value| Some(Named::new(kind, value)))
}

/// The identifier of the conversation in the first message of a session with an agent.
#[must_use]
pub fn in_first_message(message: &[u8]) -> Vec<Named> {
    static FIELDS: LazyLock<Fields> = LazyLock::new(|| {
        Fields::of([("conversation_initiation_metadata_event.conversation_id", Kind::Conversation)])
    });
    fields::find(message, &FIELDS, |kind, value| Some(Named::new(kind, value)))
}

/// The identifiers in the headers of a response.
#[must_use]
pub fn in_headers(headers: &HeaderMap) -> Vec<Named> {
    let identifiers = index().headers().iter().filter_map(|(name, kind)| {
        let value = headers.get(name)?.to_str().ok().filter(|value| !value.is_empty())?;
        Some(Named::new(*kind, value))
    });
    identifiers.collect()
}

/// How the response of an endpoint relates to its account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Yields {
    /// The response contains no resource of an account.
    Nothing,
    /// The response contains a created resource.
    Made,
    /// The response lists resources of the account, or describes the account: it differs between
    /// accounts.
    Account,
}

/// How a request's response relates to its account. `route` is that of its
/// [`Endpoint`](super::endpoint::Endpoint).
#[must_use]
pub fn yields(method: &Method, route: &Route) -> Yields {
    index().yields(method, route)
}

/// Whether a route generates speech with voices. A request with a missing voice is refused as a whole:
/// nothing is generated or charged.
#[must_use]
pub fn is_speech(route: &Route) -> bool {
    const ROOTS: [&str; 4] = ["speech-to-speech", "text-to-dialogue", "text-to-speech", "voice-changer"];
    route.root().is_some_and(|root| ROOTS.contains(&root.text()))
}

/// The identifiers in the JSON body of a response, including the cursors of a list. Resources of every
/// account, such as premade voices, are excluded.
#[must_use]
pub fn in_response(method: &Method, route: &Route, path: &str, document: &[u8]) -> Vec<Named> {
    // Only requests with an unambiguous path get a response.
    let Ok(path) = Path::read(path) else { return Vec::new() };
    let segments = Segments::of_path(&path);
    let list = without_version(&segments);
    let Some(fields) = index().of_response(method, route) else { return Vec::new() };
    fields::find(document, fields, |kind, value| {
        // The response contains the URL; the later request presents its signature.
        let is_signed = kind == Kind::Signature;
        Some(if is_signed { Named::new(kind, &signature(value)?) } else { named(kind, value, list) })
    })
}

fn signature(url: &str) -> Option<String> {
    let (_, query) = url.split_once('?')?;
    let value = query.split('&').find_map(|pair| pair.strip_prefix("conversation_signature="))?;
    Some(decode(value).into_owned()).filter(|value| !value.is_empty())
}

/// Names an identifier. A cursor is unique only within its list, because some are plain numbers, so its
/// hash includes the path of the list.
fn named(kind: Kind, value: &str, list: &[Segment<'_>]) -> Named {
    if kind != Kind::Cursor {
        return Named::new(kind, value);
    }
    let list: Vec<&str> = list.iter().map(Segment::text).collect();
    Named::new(kind, &format!("{}\n{value}", list.join("/")))
}

/// Maximum number of different identifiers in one part of a request: each new one is compared with all
/// before it. A request to the provider names a few dozen.
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

fn without_version<'a, 'b>(segments: &'a [Segment<'b>]) -> &'a [Segment<'b>] {
    match segments {
        [version, rest @ ..] if is_version(version.text()) => rest,
        all => all,
    }
}

#[cfg(test)]
mod tests;
