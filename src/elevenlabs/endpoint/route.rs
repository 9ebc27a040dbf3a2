//! A route: the path of a request with every identifier replaced by `{id}`.

use std::collections::HashSet;
use std::fmt;
use std::sync::LazyLock;

use super::literals::Literal;
use crate::elevenlabs::normalize_path::is_version;
use crate::elevenlabs::segments::{Segment, Segments};

/// Maximum number of segments; deeper paths are cut, because a client chooses the path and a label must
/// stay short.
const SEGMENTS_MAX: usize = 10;

/// The path of a request as shown in logs and usage records: `/v1/text-to-speech/{id}/stream`. Stored as
/// a few bytes and written out only when it is formatted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Route {
    /// The numbers of the literals, and [`IDENTIFIER`] for other segments; unused bytes are 0.
    codes: [u8; SEGMENTS_MAX],
    /// Number of segments; [`SEGMENTS_MAX`] plus 1 for a longer path.
    count: u8,
    /// 1 if the first segment is a version.
    version_segments: u8,
}

const IDENTIFIER: u8 = u8::MAX;

impl Route {
    pub(in crate::elevenlabs) fn of(segments: &[Segment<'_>]) -> Self {
        let mut codes = [0; SEGMENTS_MAX];
        for (code, segment) in codes.iter_mut().zip(segments) {
            *code = segment.literal().map_or(IDENTIFIER, Literal::number);
        }
        #[expect(clippy::cast_possible_truncation, reason = "cut to eleven")]
        let count = segments.len().min(SEGMENTS_MAX + 1) as u8;
        let has_version =
            segments.first().and_then(Segment::literal).is_some_and(|first| is_version(first.text()));
        Self { codes, count, version_segments: u8::from(has_version) }
    }

    /// Parses a written route: each segment that is not a literal of the API stands for an identifier.
    #[must_use]
    pub fn read(text: &str) -> Self {
        Self::of(&Segments::of(text))
    }

    /// Whether the provider documents it: in its OpenAPI document (August 2026), or as a WebSocket. A
    /// label of metrics must be one of a fixed set, but the literals can be combined to any number of
    /// routes.
    #[must_use]
    pub fn is_documented(&self) -> bool {
        static DOCUMENTED: LazyLock<HashSet<Route>> =
            LazyLock::new(|| include_str!("routes.txt").lines().map(Route::read).collect());
        DOCUMENTED.contains(self)
    }

    fn is_longer(&self) -> bool {
        usize::from(self.count) > SEGMENTS_MAX
    }

    fn codes(&self) -> &[u8] {
        &self.codes[..usize::from(self.count).min(SEGMENTS_MAX)]
    }

    /// The segments that identify the route in every version. `None` for a path that was cut.
    pub(in crate::elevenlabs) fn after_version(&self) -> Option<&[u8]> {
        (!self.is_longer()).then_some(self.rest())
    }

    /// The first literal after the version.
    pub(in crate::elevenlabs) fn root(&self) -> Option<Literal> {
        self.rest().first().and_then(|code| Literal::of_number(*code))
    }

    fn rest(&self) -> &[u8] {
        &self.codes()[usize::from(self.version_segments)..]
    }

    /// Whether it has a single identifier, at its end.
    #[must_use]
    pub fn is_about_one(&self) -> bool {
        let codes = self.codes();
        let identifiers = codes.iter().filter(|code| **code == IDENTIFIER).count();
        !self.is_longer() && identifiers == 1 && codes.last() == Some(&IDENTIFIER)
    }

    /// A hash of the first segments and their number, which differ in most routes.
    #[must_use]
    pub fn mixed(&self) -> u64 {
        let [a, b, c, d, e, f, g, ..] = self.codes;
        u64::from_le_bytes([self.count, a, b, c, d, e, f, g])
    }

    /// Writes the route piece by piece: literals of the API, `{id}`, `/` and `…`.
    pub fn write(&self, mut write_piece: impl FnMut(&'static str)) {
        for code in self.codes() {
            write_piece("/");
            write_piece(text(*code).unwrap_or("{id}"));
        }
        if self.is_longer() {
            write_piece("/…");
        }
        if self.count == 0 {
            write_piece("/");
        }
    }
}

fn text(code: u8) -> Option<&'static str> {
    Literal::of_number(code).map(Literal::text)
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut result = Ok(());
        self.write(|piece| result = result.and_then(|()| f.write_str(piece)));
        result
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
