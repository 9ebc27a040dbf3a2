//! Decodes request paths, and rejects ambiguous ones.
//!
//! The rule: *a path is forwarded only if each of its segments, percent-decoded once, is valid UTF-8 that
//! is not empty, is neither `.` nor `..`, neither starts nor ends with white space, and contains no slash,
//! backslash, semicolon, question mark, number sign, control character or further percent escape.* A
//! trailing slash is allowed.
//!
//! Servers interpret other paths differently. They decode once or twice, before or after they split the
//! path; they merge slashes, resolve dots, or ignore text after a semicolon. The path that the proxy checks
//! would differ from the path that the provider serves, and a client could reach a blocked endpoint. No
//! path of the provider needs any of these forms.

use std::borrow::Cow;

use http::Uri;
use http::uri::PathAndQuery;

use super::headers::hex_pair;

/// A decoded path that every server interprets in the same way.
#[derive(Clone, Debug)]
pub struct Path<'a>(Cow<'a, str>);

/// The reason why a path is ambiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AmbiguousPath {
    /// The path does not start with a slash.
    #[error("the path does not start with a slash")]
    Relative,
    /// The path has two adjacent slashes.
    #[error("the path has an empty segment (two slashes together; does the base URL end in a slash?)")]
    EmptySegment,
    /// A segment is `.` or `..`, in any encoding.
    #[error("the path has a segment of dots")]
    Dots,
    /// A segment starts or ends with white space.
    #[error("a segment starts or ends with white space")]
    Whitespace,
    /// A segment has a character that some servers treat as a separator.
    #[error("the path has a backslash, a semicolon, or an encoded slash, question mark or number sign")]
    Separator,
    /// The path has a control character.
    #[error("the path has a control character")]
    Control,
    /// A percent escape is truncated, or has characters other than hexadecimal digits.
    #[error("the path has a malformed percent escape")]
    Escape,
    /// A percent escape decodes to a part of another one.
    #[error("the path is percent-encoded twice")]
    DoubleEscape,
    /// The path has bytes that are not UTF-8, or characters that must be percent-encoded.
    #[error("the path is not percent-encoded UTF-8")]
    Encoding,
}

impl<'a> Path<'a> {
    /// Decodes the path of a request target.
    ///
    /// # Errors
    ///
    /// Fails if servers could interpret the path differently.
    pub fn parse(path: &'a str) -> Result<Self, AmbiguousPath> {
        if !path.starts_with('/') {
            return Err(AmbiguousPath::Relative);
        }
        let decoded = if has_escapes(path)? { Cow::Owned(decode(path)?) } else { Cow::Borrowed(path) };
        check_segments(&decoded)?;
        Ok(Self(decoded))
    }

    /// Returns the decoded path.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the path is `prefix` or below it, ignoring ASCII case. `prefix` is a decoded path; its segment
    /// `{id}` matches any segment.
    #[must_use]
    pub fn is_within(&self, prefix: &str) -> bool {
        let mut path_segments = segments(&self.0);
        segments(prefix).all(|expected| {
            path_segments
                .next()
                .is_some_and(|segment| expected == "{id}" || expected.eq_ignore_ascii_case(segment))
        })
    }
}

/// Returns the segments of a decoded path, except empty ones.
fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|segment| !segment.is_empty())
}

/// Removes `base` from the path of `target`. `base` is a path without a trailing slash. Returns `None` if
/// `base` is empty or `target` is not below it.
#[must_use]
pub fn strip_base_path(target: &Uri, base: &str) -> Option<Uri> {
    if base.is_empty() {
        return None;
    }
    let rest = target.path_and_query()?.as_str().strip_prefix(base)?;
    let ends_segment = rest.is_empty() || rest.starts_with(['/', '?']);
    let slash = if rest.starts_with('/') { "" } else { "/" };
    let path_and_query = ends_segment.then(|| PathAndQuery::try_from(format!("{slash}{rest}")))?.ok()?;
    let mut parts = target.clone().into_parts();
    parts.path_and_query = Some(path_and_query);
    Uri::from_parts(parts).ok()
}

/// Whether a path has percent escapes. Fails if the path has a byte that is not allowed.
fn has_escapes(path: &str) -> Result<bool, AmbiguousPath> {
    let classes = path.bytes().fold(0, |classes, byte| classes | BYTE_CLASSES[usize::from(byte)]);
    match classes {
        _ if classes & FORBIDDEN == 0 => Ok(classes & ESCAPE != 0),
        _ if !path.is_ascii() => Err(AmbiguousPath::Encoding),
        _ if path.bytes().any(|byte| byte.is_ascii_control()) => Err(AmbiguousPath::Control),
        _ => Err(AmbiguousPath::Separator),
    }
}

const ESCAPE: u8 = 1;
const FORBIDDEN: u8 = 2;

/// The class of each byte of a path: 0, [`ESCAPE`] or [`FORBIDDEN`]. The table makes the check one pass.
const BYTE_CLASSES: [u8; 256] = {
    let mut classes = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        #[expect(clippy::cast_possible_truncation, reason = "below 256")]
        let character = byte as u8;
        classes[byte] = match character {
            b'%' => ESCAPE,
            b'\\' | b';' | b'?' | b'#' => FORBIDDEN,
            _ if character.is_ascii_control() || !character.is_ascii() => FORBIDDEN,
            _ => 0,
        };
        byte += 1;
    }
    classes
};

/// Decodes the percent escapes of a path. Fails if an escape decodes to a character that is not allowed.
fn decode(path: &str) -> Result<String, AmbiguousPath> {
    let bytes = path.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut offset = 0;
    while let Some(&byte) = bytes.get(offset) {
        if byte != b'%' {
            decoded.push(byte);
            offset += 1;
            continue;
        }
        let value = bytes.get(offset + 1..offset + 3).and_then(hex_pair).ok_or(AmbiguousPath::Escape)?;
        match value {
            b'/' | b'\\' | b';' | b'?' | b'#' => return Err(AmbiguousPath::Separator),
            _ if value.is_ascii_control() => return Err(AmbiguousPath::Control),
            _ => decoded.push(value),
        }
        offset += 3;
    }
    // This also rejects overlong forms and unpaired surrogates.
    let text = String::from_utf8(decoded).map_err(|_| AmbiguousPath::Encoding)?;
    if !text.is_ascii() {
        if text.chars().any(char::is_control) {
            return Err(AmbiguousPath::Control);
        }
        if text.contains(LOOKALIKES) {
            return Err(AmbiguousPath::Separator);
        }
    }
    if has_escape_after_decoding(&text) {
        return Err(AmbiguousPath::DoubleEscape);
    }
    Ok(text)
}

/// Characters that a server maps to dots, slashes, semicolons or percent signs if the server folds text to
/// ASCII.
const LOOKALIKES: [char; 14] = [
    '\u{2024}', '\u{2025}', '\u{2044}', '\u{2215}', '\u{2216}', '\u{29f5}', '\u{fe52}', '\u{fe54}',
    '\u{fe68}', '\u{ff05}', '\u{ff0e}', '\u{ff0f}', '\u{ff1b}', '\u{ff3c}',
];

/// Whether a second decoding would change `text`, because it contains an escape such as `%41`, or
/// `%u0041`, which some servers accept.
fn has_escape_after_decoding(text: &str) -> bool {
    let is_escape = |offset: usize| {
        let after_percent = text.as_bytes().get(offset + 1..).unwrap_or_default();
        let digits = after_percent
            .strip_prefix(b"u")
            .or_else(|| after_percent.strip_prefix(b"U"))
            .unwrap_or(after_percent);
        digits.get(..2).is_some_and(|pair| pair.iter().all(u8::is_ascii_hexdigit))
    };
    memchr::memchr_iter(b'%', text.as_bytes()).any(is_escape)
}

/// Checks the segments of a decoded path. Only the last one may be empty.
fn check_segments(path: &str) -> Result<(), AmbiguousPath> {
    let bytes = path.as_bytes();
    let mut start = 1;
    for end in memchr::memchr_iter(b'/', bytes).skip(1).chain([bytes.len()]) {
        match bytes.get(start..end).unwrap_or_default() {
            [] if end == bytes.len() => {}
            [] => return Err(AmbiguousPath::EmptySegment),
            [b'.'] | [b'.', b'.'] => return Err(AmbiguousPath::Dots),
            [first, .., last] | [first @ last] if first.is_ascii_graphic() && last.is_ascii_graphic() => {}
            _ => {
                let segment = &path[start..end];
                if segment.trim().len() != segment.len() {
                    return Err(AmbiguousPath::Whitespace);
                }
            }
        }
        start = end + 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
