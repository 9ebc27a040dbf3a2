//! Decodes a path, and refuses ambiguous ones.
//!
//! The rule: *a path is forwarded only if each of its segments, percent-decoded once, is valid text that
//! is not empty, is neither `.` nor `..`, neither begins nor ends with white space, and contains no
//! slash, backslash, semicolon, question mark, number sign or control character and no further percent
//! escape.* A trailing slash is allowed.
//!
//! Servers interpret all other paths differently: they decode once or twice, before or after the path is
//! split, merge slashes, resolve dots, cut off the text after a semicolon. The path that the proxy checks
//! would then differ from the path that the provider serves, so that a client could reach a denied path.
//! No path of the provider needs any of these forms.

use std::borrow::Cow;

use http::Uri;
use http::uri::PathAndQuery;

use super::headers::hex_pair;

/// A path with a single meaning, decoded.
#[derive(Clone, Debug)]
pub struct Path<'a>(Cow<'a, str>);

/// Why a path is ambiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ambiguous {
    /// It does not begin at the root.
    #[error("it does not begin with a slash")]
    Relative,
    /// Two adjacent slashes.
    #[error("it has an empty segment (two slashes together; does the base URL end in a slash?)")]
    EmptySegment,
    /// A segment is `.` or `..`, in any encoding.
    #[error("it has a segment of dots")]
    Dots,
    /// A segment begins or ends with white space.
    #[error("a segment begins or ends with white space")]
    Blank,
    /// A character within a segment that some servers treat as a separator.
    #[error("it has a backslash, a semicolon, or an encoded slash, question mark or number sign")]
    Separator,
    /// A control character.
    #[error("it has a control character")]
    Control,
    /// An escape that is truncated, or has characters other than hexadecimal digits.
    #[error("it has a malformed percent escape")]
    Escape,
    /// Escapes that decode to another escape.
    #[error("it is percent-encoded twice")]
    DoubleEscape,
    /// Bytes that are not UTF-8, or characters that are not percent-encoded.
    #[error("it is not percent-encoded UTF-8")]
    Encoding,
}

impl<'a> Path<'a> {
    /// Decodes a path as received.
    ///
    /// # Errors
    ///
    /// When some server could interpret it otherwise.
    pub fn read(path: &'a str) -> Result<Self, Ambiguous> {
        if !path.starts_with('/') {
            return Err(Ambiguous::Relative);
        }
        let decoded = if is_plain(path)? { Cow::Borrowed(path) } else { Cow::Owned(decoded(path)?) };
        check_segments(&decoded)?;
        Ok(Self(decoded))
    }

    /// The decoded path.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Whether it is `prefix`, a decoded path, or below it, in upper or lower case. A segment `{id}` of the
    /// prefix matches any segment.
    #[must_use]
    pub fn is_within(&self, prefix: &str) -> bool {
        let mut path_segments = segments(&self.0);
        segments(prefix).all(|wanted| {
            path_segments
                .next()
                .is_some_and(|segment| wanted == "{id}" || wanted.eq_ignore_ascii_case(segment))
        })
    }
}

/// The segments of a decoded path, without empty ones.
fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|segment| !segment.is_empty())
}

/// Removes `base` (empty, or a path without a trailing slash) from the path of `target`; `None` if the
/// path does not begin with it.
#[must_use]
pub fn without_base(target: &Uri, base: &str) -> Option<Uri> {
    if base.is_empty() {
        return None;
    }
    let rest = target.path_and_query()?.as_str().strip_prefix(base)?;
    let is_whole = rest.is_empty() || rest.starts_with(['/', '?']);
    let slash = if rest.starts_with('/') { "" } else { "/" };
    let rest = is_whole.then(|| PathAndQuery::try_from(format!("{slash}{rest}")))?.ok()?;
    let mut parts = target.clone().into_parts();
    parts.path_and_query = Some(rest);
    Uri::from_parts(parts).ok()
}

/// Whether a path, as received, has no escapes. Fails on bytes that may not appear in it.
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

/// The class of each byte of a path: not special, the start of an escape, or forbidden.
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

/// Decodes a path; fails on escapes that decode to a special character.
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
    // Overlong forms and unpaired surrogates are not UTF-8.
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

/// Characters that servers which fold text to ASCII map to dots, slashes, semicolons and percent signs.
const LOOKALIKES: [char; 14] = [
    '\u{2024}', '\u{2025}', '\u{2044}', '\u{2215}', '\u{2216}', '\u{29f5}', '\u{fe52}', '\u{fe54}',
    '\u{fe68}', '\u{ff05}', '\u{ff0e}', '\u{ff0f}', '\u{ff1b}', '\u{ff3c}',
];

/// Whether a second decoding would change the text: it contains `%41`, or `%u0041` as some servers accept
/// it.
fn is_escaped_again(text: &str) -> bool {
    let is_escape = |at: usize| {
        let digits = text.as_bytes().get(at + 1..).unwrap_or_default();
        let digits = digits.strip_prefix(b"u").or_else(|| digits.strip_prefix(b"U")).unwrap_or(digits);
        digits.get(..2).is_some_and(|pair| pair.iter().all(u8::is_ascii_hexdigit))
    };
    memchr::memchr_iter(b'%', text.as_bytes()).any(is_escape)
}

/// Checks the segments of a decoded path; the last may be empty.
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

#[cfg(test)]
mod tests;
