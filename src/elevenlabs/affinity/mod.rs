//! Finds the identifiers in requests, responses and the first message of a WebSocket session, and determines whether a
//! response belongs to its account and whether a route generates speech. Each identifier belongs to one account: only
//! the keys of that account can serve a request that names the identifier.
//!
//! `table` lists the resources and the locations of their identifiers, and `required_owner` decides which account must
//! serve a request. The pool records the owner of each identifier. This module returns identifiers only as hashes.

mod fields;
mod index;
mod kind;
mod table;

pub mod required_owner;

use std::sync::LazyLock;

use http::{HeaderMap, Method};

use super::endpoint::Route;
use super::normalize_path::is_version;
use crate::elevenlabs::segments::{Segment, Segments};
use crate::policy::headers::decode_parameter;
use crate::policy::path::Path;
use fields::{IdentifierFields, find_identifiers};
use index::index;
pub use kind::{Identifier, IdentifierHash, ResourceKind, RetentionLimits, StorageClass};
#[cfg(test)]
use table::rows;

/// Maximum number of bytes of a WebSocket message that are searched for identifiers. Messages that name a
/// resource are short.
pub const MAX_IDENTIFIER_MESSAGE_BYTES: usize = 64 * 1024;

/// The identifiers in a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestIdentifiers {
    /// Identifiers in the path: the resources that the request is about.
    pub path: Vec<Identifier>,
    /// Identifiers in the query and the body: other resources that the request uses.
    pub others: Vec<Identifier>,
}

impl RequestIdentifiers {
    /// Finds the identifiers in the received path and query of a request. Returns none for an ambiguous path, because
    /// Keychoir rejects such a request.
    #[must_use]
    pub fn parse(path: &str, query: Option<&str>) -> Self {
        Path::parse(path).map(|path| Self::from_segments(&Segments::new(&path), query)).unwrap_or_default()
    }

    /// Finds the identifiers in the segments of a request's path, and in its query.
    #[must_use]
    pub fn from_segments(segments: &Segments<'_>, query: Option<&str>) -> Self {
        let resource_path = without_version(segments);
        let mut other_identifiers = Vec::new();
        for pair in query.into_iter().flat_map(|query| query.split('&')) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if value.is_empty() {
                continue;
            }
            let decoded_name = decode_parameter(name);
            let name = decoded_name.trim_end_matches("[]");
            let Some(kind) = index().parameter_kind(name) else { continue };
            let decoded_value = decode_parameter(value);
            let is_list = name.ends_with("_ids");
            let texts = decoded_value.split(move |char| is_list && char == ',').map(str::trim);
            add_distinct(&mut other_identifiers, texts.map(|text| identifier_in(resource_path, kind, text)));
        }
        Self { path: index().path_identifiers(resource_path), others: other_identifiers }
    }

    /// Adds the identifiers in a JSON body.
    pub fn add_body(&mut self, document: &[u8]) {
        add_distinct(&mut self.others, identifiers_in_document(document));
    }

    /// Returns an iterator over all identifiers of the request.
    pub fn all(&self) -> impl Iterator<Item = &Identifier> {
        self.path.iter().chain(&self.others)
    }

    /// Whether the request contains no identifiers.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.path.is_empty() && self.others.is_empty()
    }
}

/// Returns the identifiers in a JSON body of a request.
fn identifiers_in_document(document: &[u8]) -> Vec<Identifier> {
    find_identifiers(document, &index().body, |kind, text| Some(Identifier::new(kind, text)))
}

/// Returns the identifiers in the first message of a session with an agent. The message names the conversation.
#[must_use]
pub fn identifiers_in_first_message(message: &[u8]) -> Vec<Identifier> {
    static FIELDS: LazyLock<IdentifierFields> = LazyLock::new(|| {
        IdentifierFields::new([(
            "conversation_initiation_metadata_event.conversation_id",
            ResourceKind::Conversation,
        )])
    });
    find_identifiers(message, &FIELDS, |kind, text| Some(Identifier::new(kind, text)))
}

/// Returns the identifiers in the headers of a response.
#[must_use]
pub fn identifiers_in_headers(headers: &HeaderMap) -> Vec<Identifier> {
    let identifiers = index().headers.iter().filter_map(|(name, kind)| {
        let value = headers.get(name)?.to_str().ok().filter(|value| !value.is_empty())?;
        Some(Identifier::new(*kind, value))
    });
    identifiers.collect()
}

/// The relation between the response of an endpoint and the account that serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseOwnership {
    /// The response is not known to contain a resource of an account.
    None,
    /// The response contains a created or changed resource.
    Created,
    /// The response contains resources of the account or describes the account, so accounts have different responses.
    Account,
}

/// Returns the relation between the response of a request and its account. `route` is the route of the request's
/// [`Endpoint`](super::endpoint::Endpoint).
#[must_use]
pub fn response_ownership(method: &Method, route: &Route) -> ResponseOwnership {
    index().response_ownership(method, route)
}

/// Whether a route generates speech with voices. If a voice is missing, the provider refuses the whole request and
/// charges nothing.
#[must_use]
pub fn is_speech(route: &Route) -> bool {
    const ROOTS: [&str; 4] = ["speech-to-speech", "text-to-dialogue", "text-to-speech", "voice-changer"];
    route.root().is_some_and(|root| ROOTS.contains(&root.text()))
}

/// Returns the identifiers in the JSON body of a response, including the cursors of a list. Resources that
/// every account has, such as premade voices, are excluded.
#[must_use]
pub fn identifiers_in_response(
    method: &Method,
    route: &Route,
    path: &str,
    document: &[u8],
) -> Vec<Identifier> {
    // Keychoir forwards no request with an ambiguous path.
    let Ok(path) = Path::parse(path) else { return Vec::new() };
    let segments = Segments::new(&path);
    let resource_path = without_version(&segments);
    let Some(fields) = index().response_fields(method, route) else { return Vec::new() };
    find_identifiers(document, fields, |kind, text| {
        // The response contains the URL, and the later request contains only its signature.
        if kind == ResourceKind::Signature {
            return Some(Identifier::new(kind, &signature_in_url(text)?));
        }
        Some(identifier_in(resource_path, kind, text))
    })
}

/// Returns the decoded signature in a signed URL.
fn signature_in_url(url: &str) -> Option<String> {
    let (_, query) = url.split_once('?')?;
    let signature = query.split('&').find_map(|pair| pair.strip_prefix("conversation_signature="))?;
    Some(decode_parameter(signature).into_owned()).filter(|signature| !signature.is_empty())
}

/// Returns the identifier with the given `text` in a request to `resource_path` or its response. Some cursors are plain
/// numbers and thus unique only within their list, so the hash of a cursor includes the path of its list.
fn identifier_in(resource_path: &[Segment<'_>], kind: ResourceKind, text: &str) -> Identifier {
    if kind != ResourceKind::Cursor {
        return Identifier::new(kind, text);
    }
    let list_path: Vec<&str> = resource_path.iter().map(Segment::text).collect();
    Identifier::new(kind, &format!("{}\n{text}", list_path.join("/")))
}

/// Maximum number of different identifiers in the path, and in the query and the body. The number is limited, because
/// each new identifier is compared with all earlier identifiers. A request to the provider names at most a few dozen.
const MAX_IDENTIFIERS: usize = 512;

/// Adds the identifiers that the list does not contain, up to the maximum.
fn add_distinct(identifiers: &mut Vec<Identifier>, new_identifiers: impl IntoIterator<Item = Identifier>) {
    for identifier in new_identifiers {
        if identifiers.len() >= MAX_IDENTIFIERS {
            break;
        }
        if !identifiers.contains(&identifier) {
            identifiers.push(identifier);
        }
    }
}

/// Returns the segments after the version, or all segments of a path without a version.
fn without_version<'a, 'b>(segments: &'a [Segment<'b>]) -> &'a [Segment<'b>] {
    match segments {
        [version, rest @ ..] if is_version(version.text()) => rest,
        all => all,
    }
}

#[cfg(test)]
mod tests;
