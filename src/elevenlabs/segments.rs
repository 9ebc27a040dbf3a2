//! Splits a decoded path into segments, and finds the literal that each segment equals. A literal is a fixed segment in
//! the paths of the provider's API. The endpoints, routes and identifiers of a request are found in these segments, so
//! that each path is split only once.

use std::ops::Deref;

use super::endpoint::Literal;
use crate::policy::path::Path;

/// A segment of a path.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    text: &'a str,
    literal: Option<Literal>,
}

/// The segments of a path, except empty ones. Segments are stored inline unless the path is unusually long,
/// so that splitting a path allocates no memory.
#[derive(Clone, Debug)]
pub struct Segments<'a> {
    /// The first segments. Only the first `count` of them are valid.
    inline: [Segment<'a>; MAX_INLINE],
    count: usize,
    /// All segments if their number exceeds [`MAX_INLINE`], and otherwise none.
    overflow: Vec<Segment<'a>>,
}

/// Maximum number of segments that are stored inline. No path of the provider has more.
const MAX_INLINE: usize = 12;

impl<'a> Segment<'a> {
    /// Returns the segment as it is written in the decoded path.
    pub(super) fn text(&self) -> &'a str {
        self.text
    }

    /// Returns the literal of the API that the segment equals, or `None` for any other segment.
    pub(super) fn literal(&self) -> Option<Literal> {
        self.literal
    }
}

impl<'a> Segments<'a> {
    /// Splits a path.
    #[must_use]
    pub fn new(path: &'a Path<'_>) -> Self {
        Self::split(path.as_str())
    }

    /// Splits a decoded path.
    pub(super) fn split(path: &'a str) -> Self {
        let mut segments = Self {
            inline: [Segment { text: "", literal: None }; MAX_INLINE],
            count: 0,
            overflow: Vec::new(),
        };
        let mut start = 0;
        for end in memchr::memchr_iter(b'/', path.as_bytes()).chain([path.len()]) {
            let text = &path[start..end];
            if !text.is_empty() {
                segments.push(Segment { text, literal: Literal::find(text) });
            }
            start = end + 1;
        }
        segments
    }

    fn push(&mut self, segment: Segment<'a>) {
        if let Some(slot) = self.inline.get_mut(self.count) {
            *slot = segment;
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
