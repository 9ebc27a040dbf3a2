//! Decodes backslash escapes, so that the search also finds an escaped key, which a client's parser would restore. The
//! escapes are `\u0073` in JSON, `\\u0073` in JSON within JSON, and `\x73` and `\U00000073` in YAML.
//!
//! Escapes of URLs and HTML are not decoded. Searching for their markers as well would triple the cost of
//! every response, and no encoder of URLs or HTML escapes letters and digits.

use std::borrow::Cow;

/// Maximum number of backslashes before the letter of an escape. JSON contains one, JSON within JSON contains two, and
/// a third level contains four.
const MAX_BACKSLASHES: usize = 4;

/// The input of a search, in which the escapes of letters, digits, `_` and `-` are decoded.
#[derive(Debug)]
pub(super) struct Unescaped<'a> {
    /// The decoded bytes.
    pub(super) text: Cow<'a, [u8]>,
    /// The offsets directly after each escape: first in `text`, then in the original.
    offsets: Vec<(usize, usize)>,
    /// The offset of an incomplete escape at the end of the original, or else the length of the original.
    pub(super) partial_escape: usize,
}

/// Returns whether `text` may contain an escape.
pub(super) fn may_contain_escape(text: &[u8]) -> bool {
    memchr::memchr(b'\\', text).is_some()
}

/// The result of parsing at a backslash.
enum ParsedEscape {
    /// The backslash does not start an escape of a key character.
    Literal,
    /// A decoded character and the length of its escape in bytes.
    Character(u8, usize),
    /// The text ends within a possible escape.
    Partial,
}

impl<'a> Unescaped<'a> {
    /// Decodes the escapes in `text`. Returns `None` if `text` contains no escape and does not end within an escape.
    pub(super) fn decode(text: &'a [u8]) -> Option<Self> {
        let mut decoded: Vec<u8> = Vec::new();
        let mut offsets = Vec::new();
        let (mut copied_length, mut partial_escape) = (0, text.len());
        for offset in memchr::memchr_iter(b'\\', text) {
            // A backslash before `copied_length` is part of the previous escape.
            if offset < copied_length {
                continue;
            }
            match parse_escape(&text[offset..]) {
                ParsedEscape::Literal => {}
                ParsedEscape::Character(character, length) => {
                    decoded.extend_from_slice(&text[copied_length..offset]);
                    decoded.push(character);
                    copied_length = offset + length;
                    offsets.push((decoded.len(), copied_length));
                }
                ParsedEscape::Partial => {
                    partial_escape = offset;
                    break;
                }
            }
        }
        if offsets.is_empty() {
            let is_partial = partial_escape < text.len();
            let text = Cow::Borrowed(&text[..partial_escape]);
            return is_partial.then_some(Self { text, offsets, partial_escape });
        }
        decoded.extend_from_slice(&text[copied_length..partial_escape]);
        Some(Self { text: Cow::Owned(decoded), offsets, partial_escape })
    }

    /// Maps an offset in the decoded text to the original.
    pub(super) fn original_offset(&self, offset: usize) -> usize {
        let escapes_before = self.offsets.partition_point(|(decoded, _)| *decoded <= offset);
        match self.offsets[..escapes_before].last() {
            Some((decoded, original)) => original + (offset - decoded),
            None => offset,
        }
    }
}

/// Parses the escape at the start of `text`, whose first byte is a backslash.
fn parse_escape(text: &[u8]) -> ParsedEscape {
    let backslashes = text.iter().take(MAX_BACKSLASHES).take_while(|byte| **byte == b'\\').count();
    match text.get(backslashes..) {
        Some([b'u', digits @ ..]) => parse_digits(digits, 4, backslashes + 1),
        Some([b'U', digits @ ..]) => parse_digits(digits, 8, backslashes + 1),
        Some([b'x', digits @ ..]) => parse_digits(digits, 2, backslashes + 1),
        Some([]) | None => ParsedEscape::Partial,
        Some(_) => ParsedEscape::Literal,
    }
}

/// Parses `count` hexadecimal digits after the first `prefix_length` bytes of an escape.
fn parse_digits(text: &[u8], count: usize, prefix_length: usize) -> ParsedEscape {
    let digits = text.get(..count).unwrap_or(text);
    // Keys are ASCII, so only the last two digits may differ from zero.
    let is_small = digits.iter().take(count - 2).all(|digit| *digit == b'0');
    match parse_hexadecimal(digits) {
        _ if !is_small => ParsedEscape::Literal,
        None if digits.is_empty() => ParsedEscape::Partial,
        None => ParsedEscape::Literal,
        Some(_) if digits.len() < count => ParsedEscape::Partial,
        Some(code) => key_character(code, prefix_length + count),
    }
}

/// Parses a hexadecimal number. Returns `None` if `digits` is empty or contains other characters.
fn parse_hexadecimal(digits: &[u8]) -> Option<u32> {
    let add = |sum: u32, digit: &u8| Some(sum.wrapping_mul(16) + char::from(*digit).to_digit(16)?);
    (!digits.is_empty()).then(|| digits.iter().try_fold(0, add)).flatten()
}

/// Returns the character with the number `code` if a key may contain it. `length` is the length of its escape.
fn key_character(code: u32, length: usize) -> ParsedEscape {
    match u8::try_from(code) {
        Ok(byte) if byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-' => {
            ParsedEscape::Character(byte, length)
        }
        Ok(_) | Err(_) => ParsedEscape::Literal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asserts the decoded form of a text.
    #[track_caller]
    fn assert_decoded(text: &str, expected: &str) {
        let unescaped = Unescaped::decode(text.as_bytes());
        let decoded = unescaped.as_ref().map_or(text.as_bytes(), |unescaped| &unescaped.text);
        assert_eq!(String::from_utf8_lossy(decoded), expected, "{text} must be decoded correctly");
    }

    #[test]
    fn every_kind_of_escape_is_decoded() {
        for escape in [r"\u0073", r"\\u0073", r"\\\\u0073", r"\x73", r"\\x73", r"\U00000073"] {
            assert_decoded(&format!("a{escape}k_{escape}"), "ask_s");
        }
        assert_decoded(r"\u006B\u005f\u005F\x2d", "k__-");
    }

    #[test]
    fn text_without_escapes_of_key_characters_is_not_decoded() {
        for text in
            [r"\n\t\\ \u4e2d \u000a \u0020x", "100% %73 &#115;", r"\u00", "plain", r"\u{73}.", r"\x4g."]
        {
            let text = format!("{text} .");
            assert!(Unescaped::decode(text.as_bytes()).is_none(), "{text} must not be decoded");
        }
    }

    #[test]
    fn an_incomplete_escape_at_the_end_is_partial() {
        for (text, partial_escape) in [
            (r"a\", 1),
            (r"a\\", 1),
            (r"a\u", 1),
            (r"a\u00", 1),
            (r"a\u007", 1),
            (r"a\x7", 1),
            (r"a\U000000", 1),
            (r"\u0061\x", 6),
        ] {
            let unescaped = Unescaped::decode(text.as_bytes()).unwrap();
            assert_eq!(
                unescaped.partial_escape, partial_escape,
                "the partial escape in {text} must start at byte {partial_escape}"
            );
        }
        for text in [r"a\u4", r"a\xg", r"a\n", r"a\u01"] {
            assert!(Unescaped::decode(text.as_bytes()).is_none(), "{text} must contain no partial escape");
        }
    }

    #[test]
    fn offsets_are_mapped_to_the_original() {
        let unescaped = Unescaped::decode(br"ab\u0063d\x65f").unwrap();
        assert_eq!(&*unescaped.text, b"abcdef");
        let offsets: Vec<usize> = (0..=6).map(|offset| unescaped.original_offset(offset)).collect();
        assert_eq!(offsets, [0, 1, 2, 8, 9, 13, 14]);
    }
}
