//! The one reading of a path, and the refusal of a path that has more than one.
//!
//! The rule: *a path is passed on only if each of its segments, percent-decoded once, is valid text that
//! is not empty, is neither `.` nor `..`, neither begins nor ends with white space, and contains no slash,
//! backslash, semicolon, question mark, number sign or control character and no further percent escape.*
//! One slash may stand at the end.
//!
//! Servers differ in what they do with everything else: they decode once or twice, before or after the
//! path is split, merge slashes, resolve dots, cut off what follows a semicolon. What is judged here would
//! then not be what is served there, so a denied path could be reached in disguise. No path of the provider
//! needs any of it.

use std::borrow::Cow;
use std::ops::Deref;

use super::endpoint::Literal;
use super::headers::hex_pair;

/// A path that has one reading, decoded.
#[derive(Clone, Debug)]
pub struct Path<'a>(Cow<'a, str>);

/// A segment of a path.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    text: &'a str,
    literal: Option<Literal>,
}

/// The segments of a path.
#[derive(Clone, Debug)]
pub struct Segments<'a> {
    few: [Segment<'a>; FEW],
    count: usize,
    /// All of them, where they are many.
    many: Vec<Segment<'a>>,
}

/// No path of the provider has more.
const FEW: usize = 12;

/// Why a path could be read in more than one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ambiguous {
    /// It is no path from the root.
    #[error("it does not begin with a slash")]
    Relative,
    /// Two slashes stand together.
    #[error("it has an empty segment (two slashes together; does the base URL end in a slash?)")]
    EmptySegment,
    /// A segment is `.` or `..`, however it is written.
    #[error("it has a segment of dots")]
    Dots,
    /// A segment begins or ends with white space.
    #[error("a segment begins or ends with white space")]
    Blank,
    /// A character that separates, in some server's reading, within a segment.
    #[error("it has a backslash, a semicolon, or an encoded slash, question mark or number sign")]
    Separator,
    /// A control character.
    #[error("it has a control character")]
    Control,
    /// An escape that is cut off, or of other characters than hexadecimal digits.
    #[error("it has a malformed percent escape")]
    Escape,
    /// Escapes that decode to another escape.
    #[error("it is percent-encoded twice")]
    DoubleEscape,
    /// Bytes that are no UTF-8, or characters that are not percent-encoded.
    #[error("it is not percent-encoded UTF-8")]
    Encoding,
}

impl<'a> Path<'a> {
    /// Reads a path as it was received.
    ///
    /// # Errors
    ///
    /// When some server could read it otherwise.
    pub fn read(path: &'a str) -> Result<Self, Ambiguous> {
        if !path.starts_with('/') {
            return Err(Ambiguous::Relative);
        }
        let decoded = if is_plain(path)? { Cow::Borrowed(path) } else { Cow::Owned(decoded(path)?) };
        check_segments(&decoded)?;
        Ok(Self(decoded))
    }

    /// Its segments.
    #[must_use]
    pub fn words(&self) -> Segments<'_> {
        Segments::of(&self.0)
    }
}

/// Whether a path, as it was received, is already decoded. Its bytes are all those that may stand in it.
fn is_plain(path: &str) -> Result<bool, Ambiguous> {
    let kinds = path.bytes().fold(0, |kinds, byte| kinds | KINDS[usize::from(byte)]);
    match kinds {
        _ if kinds & FORBIDDEN == 0 => Ok(kinds & ESCAPE == 0),
        _ if !path.is_ascii() => Err(Ambiguous::Encoding),
        _ if path.bytes().any(|byte| byte.is_ascii_control()) => Err(Ambiguous::Control),
        _ => Err(Ambiguous::Separator),
    }
}

const ESCAPE: u8 = 1;
const FORBIDDEN: u8 = 2;

/// What a byte of a path is: nothing special, the begin of an escape, or not allowed as such.
const KINDS: [u8; 256] = {
    let mut kinds = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        #[expect(clippy::cast_possible_truncation, reason = "below 256")]
        let character = byte as u8;
        kinds[byte] = match character {
            b'%' => ESCAPE,
            b'\\' | b';' | b'?' | b'#' => FORBIDDEN,
            _ if character.is_ascii_control() || !character.is_ascii() => FORBIDDEN,
            _ => 0,
        };
        byte += 1;
    }
    kinds
};

/// A path without its escapes, none of which may decode to what has a meaning of its own.
fn decoded(path: &str) -> Result<String, Ambiguous> {
    let bytes = path.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        if byte != b'%' {
            decoded.push(byte);
            at += 1;
            continue;
        }
        let value = bytes.get(at + 1..at + 3).and_then(hex_pair).ok_or(Ambiguous::Escape)?;
        match value {
            b'/' | b'\\' | b';' | b'?' | b'#' => return Err(Ambiguous::Separator),
            _ if value.is_ascii_control() => return Err(Ambiguous::Control),
            _ => decoded.push(value),
        }
        at += 3;
    }
    // Overlong forms and halves of surrogates are no UTF-8.
    let text = String::from_utf8(decoded).map_err(|_| Ambiguous::Encoding)?;
    if !text.is_ascii() {
        if text.chars().any(char::is_control) {
            return Err(Ambiguous::Control);
        }
        if text.contains(LOOKALIKES) {
            return Err(Ambiguous::Separator);
        }
    }
    if is_escaped_again(&text) {
        return Err(Ambiguous::DoubleEscape);
    }
    Ok(text)
}

/// Characters that servers which fold text to ASCII take for dots, slashes, semicolons and percent signs.
const LOOKALIKES: [char; 14] = [
    '\u{2024}', '\u{2025}', '\u{2044}', '\u{2215}', '\u{2216}', '\u{29f5}', '\u{fe52}', '\u{fe54}',
    '\u{fe68}', '\u{ff05}', '\u{ff0e}', '\u{ff0f}', '\u{ff1b}', '\u{ff3c}',
];

/// Whether decoding once more would change a text: `%41`, or `%u0041` as some servers write it.
fn is_escaped_again(text: &str) -> bool {
    let is_escape = |at: usize| {
        let digits = text.as_bytes().get(at + 1..).unwrap_or_default();
        let digits = digits.strip_prefix(b"u").or_else(|| digits.strip_prefix(b"U")).unwrap_or(digits);
        digits.get(..2).is_some_and(|pair| pair.iter().all(u8::is_ascii_hexdigit))
    };
    memchr::memchr_iter(b'%', text.as_bytes()).any(is_escape)
}

/// Looks at the segments of a decoded path; the last may be empty.
fn check_segments(path: &str) -> Result<(), Ambiguous> {
    let bytes = path.as_bytes();
    let mut begin = 1;
    for end in memchr::memchr_iter(b'/', bytes).skip(1).chain([bytes.len()]) {
        match bytes.get(begin..end).unwrap_or_default() {
            [] if end == bytes.len() => {}
            [] => return Err(Ambiguous::EmptySegment),
            [b'.'] | [b'.', b'.'] => return Err(Ambiguous::Dots),
            [first, .., last] | [first @ last] if first.is_ascii_graphic() && last.is_ascii_graphic() => {}
            _ => {
                let segment = &path[begin..end];
                if segment.trim().len() != segment.len() {
                    return Err(Ambiguous::Blank);
                }
            }
        }
        begin = end + 1;
    }
    Ok(())
}

impl<'a> Segment<'a> {
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

impl<'a> Segments<'a> {
    /// The segments of a path that is decoded.
    pub(super) fn of(path: &'a str) -> Self {
        let mut words = Self { few: [Segment { text: "", literal: None }; FEW], count: 0, many: Vec::new() };
        let mut begin = 0;
        for end in memchr::memchr_iter(b'/', path.as_bytes()).chain([path.len()]) {
            let segment = &path[begin..end];
            // Before the first slash, and behind the last.
            if !segment.is_empty() {
                words.push(Segment { text: segment, literal: Literal::of(segment) });
            }
            begin = end + 1;
        }
        words
    }

    fn push(&mut self, word: Segment<'a>) {
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
}

impl<'a> Deref for Segments<'a> {
    type Target = [Segment<'a>];

    fn deref(&self) -> &[Segment<'a>] {
        if self.many.is_empty() { &self.few[..self.count] } else { &self.many }
    }
}

#[cfg(test)]
mod tests;
