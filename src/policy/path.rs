//! A path as a lenient server would see it, split once into its words: decoded (twice, for doubled
//! escapes), without empty and dot segments.

use std::borrow::Cow;
use std::ops::Deref;

use super::endpoint::Literal;
use super::headers::decode;

/// A path, decoded.
#[derive(Clone, Debug)]
pub struct Path<'a>(Cow<'a, str>);

/// A segment of a path.
#[derive(Clone, Copy, Debug)]
pub struct Word<'a> {
    text: &'a str,
    literal: Option<Literal>,
}

/// The segments of a path.
#[derive(Clone, Debug)]
pub struct Words<'a> {
    few: [Word<'a>; FEW],
    count: usize,
    /// All of them, where they are many.
    many: Vec<Word<'a>>,
}

/// No path of the provider has more.
const FEW: usize = 12;

impl<'a> Path<'a> {
    /// `path` is as it was received.
    #[must_use]
    pub fn of(path: &'a str) -> Self {
        Self(match decode(path) {
            Cow::Borrowed(plain) => Cow::Borrowed(plain),
            Cow::Owned(decoded) => Cow::Owned(decode(&decoded).into_owned()),
        })
    }

    /// Its segments.
    #[must_use]
    pub fn words(&self) -> Words<'_> {
        Words::of(&self.0)
    }
}

impl<'a> Word<'a> {
    /// As it was written.
    pub(super) fn text(&self) -> &'a str {
        self.text
    }

    /// The fixed part of a path of the API that it is.
    pub(super) fn literal(&self) -> Option<Literal> {
        self.literal
    }

    /// That in lower case, or as it was written.
    pub(super) fn name(&self) -> &'a str {
        match self.literal {
            Some(literal) => literal.text(),
            None => self.text,
        }
    }
}

impl<'a> Words<'a> {
    /// The segments of a path that is decoded.
    pub(super) fn of(path: &'a str) -> Self {
        let mut words = Self { few: [Word { text: "", literal: None }; FEW], count: 0, many: Vec::new() };
        let has_parameters = memchr::memchr(b';', path.as_bytes()).is_some();
        let mut begin = 0;
        for end in memchr::memchr2_iter(b'/', b'\\', path.as_bytes()).chain([path.len()]) {
            let segment = &path[begin..end];
            words.take(if has_parameters { without_parameters(segment) } else { segment });
            begin = end + 1;
        }
        words
    }

    fn take(&mut self, segment: &'a str) {
        match trimmed(segment) {
            "" | "." => {}
            ".." => self.pop(),
            text => self.push(Word { text, literal: Literal::of(text) }),
        }
    }

    fn push(&mut self, word: Word<'a>) {
        if self.many.is_empty() && self.count < FEW {
            self.few[self.count] = word;
        } else {
            if self.many.is_empty() {
                self.many.extend_from_slice(&self.few);
            }
            self.many.push(word);
        }
        self.count += 1;
    }

    fn pop(&mut self) {
        self.many.pop();
        self.count = self.count.saturating_sub(1);
    }
}

fn without_parameters(segment: &str) -> &str {
    segment.split(';').next().unwrap_or_default()
}

/// Most have nothing to trim, and their ends show it.
fn trimmed(segment: &str) -> &str {
    match segment.as_bytes() {
        [first, .., last] if first.is_ascii_graphic() && last.is_ascii_graphic() => segment,
        _ => segment.trim(),
    }
}

impl<'a> Deref for Words<'a> {
    type Target = [Word<'a>];

    fn deref(&self) -> &[Word<'a>] {
        if self.many.is_empty() { &self.few[..self.count] } else { &self.many }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn texts(path: &str) -> Vec<String> {
        Path::of(path).words().iter().map(|word| word.text().to_owned()).collect()
    }

    /// The same in as few words as it can be said.
    fn plainly(path: &str) -> Vec<String> {
        let twice = decode(&decode(path)).into_owned();
        let mut segments: Vec<String> = Vec::new();
        for segment in twice.split(['/', '\\']).map(|segment| segment.split(';').next().unwrap().trim()) {
            match segment {
                "" | "." => {}
                ".." => {
                    segments.pop();
                }
                name => segments.push(name.to_owned()),
            }
        }
        segments
    }

    #[test]
    fn a_path_is_seen_through() {
        for (path, expected) in [
            ("", &[][..]),
            ("/", &[]),
            ("/v1/voices", &["v1", "voices"]),
            ("v1//./voices/", &["v1", "voices"]),
            ("/v1/a/../b/../../c", &["c"]),
            ("/../..", &[]),
            ("/v1%2fvoices\\x", &["v1", "voices", "x"]),
            ("/%2576oices;a=b;c/ +x+ ", &["voices", "x"]),
            ("/\u{a0}x\u{3000}", &["x"]),
        ] {
            assert_eq!(texts(path), expected, "{path}");
        }
    }

    #[test]
    fn long_paths_are_seen_to_their_ends_and_back() {
        for depth in 0..40 {
            let path = "/a".repeat(depth);
            assert_eq!(texts(&path).len(), depth);
            for back in 0..40 {
                let path = format!("{path}{}/b", "/..".repeat(back));
                assert_eq!(texts(&path), plainly(&path), "{path}");
            }
        }
    }

    proptest! {
        #[test]
        fn every_path_is_seen_as_it_is(parts in prop::collection::vec("[a-z.;%25/\\\\+ \u{a0}\u{e4}]{0,4}", 0..20)) {
            let path = parts.join("/");
            prop_assert_eq!(texts(&path), plainly(&path));
        }
    }
}
