//! Defines the route of a request: its path with every identifier replaced by `{id}`, as in logs, metrics and usage
//! records. Also checks whether the provider documents a route. A route uses a few bytes and no allocation, and its
//! text exists only while it is formatted. Paths with more than ten segments are truncated.

use std::collections::HashSet;
use std::fmt;
use std::sync::LazyLock;

use super::literals::Literal;
use crate::elevenlabs::normalize_path::is_version;
use crate::elevenlabs::segments::{Segment, Segments};

/// Maximum number of segments. Longer paths are truncated, because a client chooses the path, and the text of a route
/// must stay short.
const MAX_SEGMENTS: usize = 10;

/// The path of a request without its identifiers: `/v1/text-to-speech/{id}/stream`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Route {
    /// The numbers of the literals, and [`NOT_LITERAL`] for other segments. Unused bytes are 0.
    codes: [u8; MAX_SEGMENTS],
    /// The number of segments, or [`MAX_SEGMENTS`] plus 1 for a longer path.
    count: u8,
    /// The number of versions at the start, which is 0 or 1.
    version_segments: u8,
}

/// The code of a segment that is not a literal of the API.
const NOT_LITERAL: u8 = u8::MAX;

impl Route {
    /// Returns the route of a path.
    pub(in crate::elevenlabs) fn from_segments(segments: &[Segment<'_>]) -> Self {
        let mut codes = [0; MAX_SEGMENTS];
        for (code, segment) in codes.iter_mut().zip(segments) {
            *code = segment.literal().map_or(NOT_LITERAL, Literal::number);
        }
        #[expect(clippy::cast_possible_truncation, reason = "the number is at most eleven")]
        let count = segments.len().min(MAX_SEGMENTS + 1) as u8;
        let has_version =
            segments.first().and_then(Segment::literal).is_some_and(|first| is_version(first.text()));
        Self { codes, count, version_segments: u8::from(has_version) }
    }

    /// Parses a formatted route. Each segment that is not a literal of the API becomes an identifier.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        Self::from_segments(&Segments::split(text))
    }

    /// Whether the provider documents the route, in its OpenAPI document (August 2026) or as a WebSocket. Only
    /// documented routes become labels of metrics, because a client can combine literals into any number of other
    /// routes.
    #[must_use]
    pub fn is_documented(&self) -> bool {
        static DOCUMENTED: LazyLock<HashSet<Route>> =
            LazyLock::new(|| include_str!("routes.txt").lines().map(Route::parse).collect());
        DOCUMENTED.contains(self)
    }

    fn is_truncated(&self) -> bool {
        usize::from(self.count) > MAX_SEGMENTS
    }

    fn codes(&self) -> &[u8] {
        &self.codes[..usize::from(self.count).min(MAX_SEGMENTS)]
    }

    /// Returns the codes after the version, which identify the route in every version, or `None` for a
    /// truncated path.
    pub(in crate::elevenlabs) fn after_version(&self) -> Option<&[u8]> {
        (!self.is_truncated()).then_some(self.codes_after_version())
    }

    /// Returns the first segment after the version, or `None` if it is not a literal of the API.
    pub(in crate::elevenlabs) fn root(&self) -> Option<Literal> {
        self.codes_after_version().first().and_then(|code| Literal::from_number(*code))
    }

    fn codes_after_version(&self) -> &[u8] {
        &self.codes()[usize::from(self.version_segments)..]
    }

    /// Whether the route has exactly one identifier, at its end.
    #[must_use]
    pub fn ends_in_only_identifier(&self) -> bool {
        let first_identifier = self.codes().iter().position(|code| *code == NOT_LITERAL);
        !self.is_truncated() && first_identifier.is_some_and(|index| index + 1 == self.codes().len())
    }

    /// Calls `write_part` with each part of the formatted route: literals of the API, `{id}`, `/` and `…`.
    pub fn write_parts(&self, mut write_part: impl FnMut(&'static str)) {
        for code in self.codes() {
            write_part("/");
            write_part(Literal::from_number(*code).map_or("{id}", Literal::text));
        }
        if self.is_truncated() {
            write_part("/…");
        }
        if self.count == 0 {
            write_part("/");
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut write_result = Ok(());
        self.write_parts(|part| write_result = write_result.and_then(|()| f.write_str(part)));
        write_result
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
