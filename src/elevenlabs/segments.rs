//! Splits a path into segments, and looks up the literal of the provider's API that each segment equals.

use std::ops::Deref;

use super::endpoint::Literal;
use crate::policy::path::Path;

/// A segment of a path.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    text: &'a str,
    literal: Option<Literal>,
}

/// The segments of a path.
#[derive(Clone, Debug)]
pub struct Segments<'a> {
    inline: [Segment<'a>; INLINE_MAX],
    count: usize,
    /// All segments, when there are more than [`INLINE_MAX`].
    overflow: Vec<Segment<'a>>,
}

/// Number of segments that are stored inline; no path of the provider has more.
const INLINE_MAX: usize = 12;

impl<'a> Segment<'a> {
    /// The segment as written.
    pub(super) fn text(&self) -> &'a str {
        self.text
    }

    /// The literal of the API that it equals, if any.
    pub(super) fn literal(&self) -> Option<Literal> {
        self.literal
    }

    /// The literal in lower case, or else the segment as written.
    pub(super) fn name(&self) -> &'a str {
        match self.literal {
            Some(literal) => literal.text(),
            None => self.text,
        }
    }
}

impl<'a> Segments<'a> {
    /// The segments of a path, without empty ones.
    #[must_use]
    pub fn of_path(path: &'a Path<'_>) -> Self {
        Self::of(path.text())
    }

    /// The segments of a decoded path.
    pub(super) fn of(path: &'a str) -> Self {
        let mut segments = Self {
            inline: [Segment { text: "", literal: None }; INLINE_MAX],
            count: 0,
            overflow: Vec::new(),
        };
        let mut begin = 0;
        for end in memchr::memchr_iter(b'/', path.as_bytes()).chain([path.len()]) {
            let segment = &path[begin..end];
            // The empty segments before the first slash and after the last one are skipped.
            if !segment.is_empty() {
                segments.push(Segment { text: segment, literal: Literal::of(segment) });
            }
            begin = end + 1;
        }
        segments
    }

    fn push(&mut self, segment: Segment<'a>) {
        if self.overflow.is_empty() && self.count < INLINE_MAX {
            self.inline[self.count] = segment;
        } else {
            if self.overflow.is_empty() {
                self.overflow.extend_from_slice(&self.inline);
            }
            self.overflow.push(segment);
        }
        self.count += 1;
    }
}

impl<'a> Deref for Segments<'a> {
    type Target = [Segment<'a>];

    fn deref(&self) -> &[Segment<'a>] {
        if self.overflow.is_empty() { &self.inline[..self.count] } else { &self.overflow }
    }
}
