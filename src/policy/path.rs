//! Decodes request paths, rejects ambiguous paths, compares paths with prefixes, and removes a base path.
//!
//! The rule: *A path is forwarded only if each of its segments, percent-decoded once, is valid UTF-8 that is not empty,
//! is neither `.` nor `..`, neither starts nor ends with white space, and contains no slash, backslash, semicolon,
//! question mark, number sign, control character or further percent escape.* A trailing slash is allowed. An escape of
//! a Unicode character that looks like a dot, a separator or a percent sign is also rejected.
//!
//! Servers interpret other paths in different ways. They decode once or twice, before or after they split the path, and
//! some servers merge slashes, resolve dots, or ignore text after a semicolon. The path that Keychoir checks could then
//! differ from the path that the provider serves, and a client could reach a blocked endpoint. No endpoint of the
//! provider needs such a path.

use std::borrow::Cow;

use http::Uri;
use http::uri::PathAndQuery;

use super::headers::hex_pair;

/// A decoded path that every server interprets in the same way.
#[derive(Clone, Debug)]
pub struct Path<'a>(Cow<'a, str>);

/// The reason why a path is ambiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AmbiguousPathError {
    /// The path does not start with a slash.
    #[error("the path does not start with a slash")]
    Relative,
    /// The path contains two adjacent slashes.
    #[error("the path has an empty segment (two adjacent slashes; does the base URL end with a slash?)")]
    EmptySegment,
    /// A segment is `.` or `..`, in any encoding.
    #[error("a segment of the path is `.` or `..`")]
    Dots,
    /// A segment starts or ends with white space.
    #[error("a segment of the path starts or ends with white space")]
    Whitespace,
    /// A segment contains a separator, or a character that some servers convert to a dot, a separator or a percent
    /// sign.
    #[error(
        "the path contains a backslash, a semicolon, an encoded slash, question mark or number sign, or a Unicode \
         character that looks like a dot, a separator or a percent sign"
    )]
    Separator,
    /// The path contains a control character.
    #[error("the path contains a control character")]
    Control,
    /// A percent escape is truncated, or contains characters other than hexadecimal digits.
    #[error("the path contains a malformed percent escape")]
    Escape,
    /// The decoded path contains another percent escape.
    #[error("the path is percent-encoded twice")]
    DoubleEscape,
    /// The path contains bytes that are not UTF-8, or characters that must be percent-encoded.
    #[error("the path is not percent-encoded UTF-8")]
    Encoding,
}

impl<'a> Path<'a> {
    /// Decodes the path of a request target.
    ///
    /// # Errors
    ///
    /// Fails if servers could interpret the path differently.
    pub fn parse(path: &'a str) -> Result<Self, AmbiguousPathError> {
        if !path.starts_with('/') {
            return Err(AmbiguousPathError::Relative);
        }
        let decoded =
            if check_bytes(path)? { Cow::Owned(decode_escapes(path)?) } else { Cow::Borrowed(path) };
        check_segments(&decoded)?;
        Ok(Self(decoded))
    }

    /// Returns the decoded path.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the path is `prefix` or is below `prefix`, ignoring ASCII case. `prefix` is a decoded path, in which a
    /// segment `{id}` matches any segment.
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

/// Returns the non-empty segments of a decoded path.
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
    let stripped = target.path_and_query()?.as_str().strip_prefix(base)?;
    let ends_segment = stripped.is_empty() || stripped.starts_with(['/', '?']);
    let slash = if stripped.starts_with('/') { "" } else { "/" };
    let path_and_query = ends_segment.then(|| PathAndQuery::try_from(format!("{slash}{stripped}")))?.ok()?;
    let mut uri_parts = target.clone().into_parts();
    uri_parts.path_and_query = Some(path_and_query);
    Uri::from_parts(uri_parts).ok()
}

/// Checks that an undecoded path contains only allowed bytes. Returns whether it contains percent escapes.
fn check_bytes(path: &str) -> Result<bool, AmbiguousPathError> {
    let classes = path.bytes().fold(0, |classes, byte| classes | BYTE_CLASSES[usize::from(byte)]);
    match classes {
        _ if classes & FORBIDDEN == 0 => Ok(classes & ESCAPE != 0),
        _ if !path.is_ascii() => Err(AmbiguousPathError::Encoding),
        _ if path.bytes().any(|byte| byte.is_ascii_control()) => Err(AmbiguousPathError::Control),
        _ => Err(AmbiguousPathError::Separator),
    }
}

/// The class of the percent sign, which starts an escape.
const ESCAPE: u8 = 1;
/// The class of the bytes that a path must not contain.
const FORBIDDEN: u8 = 2;

/// The class of each byte value: 0, [`ESCAPE`] or [`FORBIDDEN`]. With this table, one pass checks all bytes of a path.
const BYTE_CLASSES: [u8; 256] = {
    let mut classes = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        #[expect(clippy::cast_possible_truncation, reason = "the byte is below 256")]
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
fn decode_escapes(path: &str) -> Result<String, AmbiguousPathError> {
    let bytes = path.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut offset = 0;
    while let Some(&byte) = bytes.get(offset) {
        if byte != b'%' {
            decoded.push(byte);
            offset += 1;
            continue;
        }
        let escaped =
            bytes.get(offset + 1..offset + 3).and_then(hex_pair).ok_or(AmbiguousPathError::Escape)?;
        match escaped {
            b'/' | b'\\' | b';' | b'?' | b'#' => return Err(AmbiguousPathError::Separator),
            _ if escaped.is_ascii_control() => return Err(AmbiguousPathError::Control),
            _ => decoded.push(escaped),
        }
        offset += 3;
    }
    // This conversion also rejects overlong forms and unpaired surrogates.
    let text = String::from_utf8(decoded).map_err(|_| AmbiguousPathError::Encoding)?;
    if !text.is_ascii() {
        if text.chars().any(char::is_control) {
            return Err(AmbiguousPathError::Control);
        }
        if text.contains(LOOKALIKES) {
            return Err(AmbiguousPathError::Separator);
        }
    }
    if has_escape_after_decoding(&text) {
        return Err(AmbiguousPathError::DoubleEscape);
    }
    Ok(text)
}

/// Characters that a server converts to dots, slashes, backslashes, semicolons or percent signs if the server folds
/// text to ASCII.
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

/// Checks the segments of a decoded path. Only the last segment may be empty.
fn check_segments(path: &str) -> Result<(), AmbiguousPathError> {
    let bytes = path.as_bytes();
    let mut start = 1;
    for end in memchr::memchr_iter(b'/', bytes).skip(1).chain([bytes.len()]) {
        match bytes.get(start..end).unwrap_or_default() {
            [] if end == bytes.len() => {}
            [] => return Err(AmbiguousPathError::EmptySegment),
            [b'.'] | [b'.', b'.'] => return Err(AmbiguousPathError::Dots),
            [first, .., last] | [first @ last] if first.is_ascii_graphic() && last.is_ascii_graphic() => {}
            _ => {
                let segment = &path[start..end];
                if segment.trim().len() != segment.len() {
                    return Err(AmbiguousPathError::Whitespace);
                }
            }
        }
        start = end + 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
