//! Decodes characters of a key that are written as escapes with a backslash: `\u0073` in JSON, also
//! in JSON within JSON, `\x73` and `\U00000073` in YAML. A parser would turn them back into the
//! key.
//!
//! Escapes of URLs and HTML are not decoded: searching for their marks as well would triple the
//! cost for every response, and no encoder escapes letters and digits there.

use std::borrow::Cow;

/// Maximum backslashes before a `u`: one in JSON, two in JSON within JSON, four one level deeper.
const MAX_BACKSLASHES: usize = 4;

/// A text with the escapes of letters, digits, `_` and `-` decoded.
#[derive(Debug)]
pub(super) struct Unescaped<'a> {
    pub(super) text: Cow<'a, [u8]>,
    /// Pairs of offsets in `text` and in the original, one behind each escape.
    offsets: Vec<(usize, usize)>,
    /// The offset in the original at which an incomplete escape begins; its length if there is
    /// none.
    pub(super) partial: usize,
}

/// Whether `text` may contain an escape.
pub(super) fn may_be_in(text: &[u8]) -> bool {
    memchr::memchr(b'\\', text).is_some()
}

enum EscapeParse {
    Literal,
    /// A character, and the length of its escape in bytes.
    Escape(u8, usize),
    /// The end of the text may be the start of an escape.
    Partial,
}

impl<'a> Unescaped<'a> {
    /// `None` if there is nothing to decode and the end is no start of an escape.
    pub(super) fn of(text: &'a [u8]) -> Option<Self> {
        let mut decoded: Vec<u8> = Vec::new();
        let mut offsets = Vec::new();
        let (mut copied, mut partial, mut escape_end) = (0, text.len(), 0);
        for at in memchr::memchr_iter(b'\\', text) {
            // Part of the previous escape.
            if at < escape_end {
                continue;
            }
            match read(&text[at..]) {
                EscapeParse::Literal => {}
                EscapeParse::Escape(character, length) => {
                    decoded.extend_from_slice(&text[copied..at]);
                    decoded.push(character);
                    escape_end = at + length;
                    copied = escape_end;
                    offsets.push((decoded.len(), escape_end));
                }
                EscapeParse::Partial => {
                    partial = at;
                    break;
                }
            }
        }
        let text = if offsets.is_empty() {
            if partial == text.len() {
                return None;
            }
            Cow::Borrowed(&text[..partial])
        } else {
            decoded.extend_from_slice(&text[copied..partial]);
            Cow::Owned(decoded)
        };
        Some(Self { text, offsets, partial })
    }

    /// The offset in the original of the offset `offset` in the text.
    pub(super) fn original(&self, offset: usize) -> usize {
        let before = self.offsets.partition_point(|(decoded, _)| *decoded <= offset);
        match before.checked_sub(1).and_then(|last| self.offsets.get(last)) {
            Some((decoded, original)) => original + (offset - decoded),
            None => offset,
        }
    }
}

/// Parses the escape at the start of `text`, which begins with a backslash.
fn read(text: &[u8]) -> EscapeParse {
    let slashes = text.iter().take(MAX_BACKSLASHES).take_while(|byte| **byte == b'\\').count();
    match text.get(slashes..) {
        Some([b'u', digits @ ..]) => hexadecimal(digits, 4, slashes + 1),
        Some([b'U', digits @ ..]) => hexadecimal(digits, 8, slashes + 1),
        Some([b'x', digits @ ..]) => hexadecimal(digits, 2, slashes + 1),
        Some([]) | None => EscapeParse::Partial,
        Some(_) => EscapeParse::Literal,
    }
}

/// Parses `count` hexadecimal digits that follow `before` bytes.
fn hexadecimal(text: &[u8], count: usize, before: usize) -> EscapeParse {
    let digits = text.get(..count).unwrap_or(text);
    // Keys are ASCII, so only the last two digits may differ from zero.
    let is_small = digits.iter().take(count - 2).all(|digit| *digit == b'0');
    match value(digits) {
        _ if !is_small => EscapeParse::Literal,
        None if digits.is_empty() => EscapeParse::Partial,
        None => EscapeParse::Literal,
        Some(_) if digits.len() < count => EscapeParse::Partial,
        Some(value) => character(value, before + count),
    }
}

/// Parses a hexadecimal number; `None` for other characters.
fn value(digits: &[u8]) -> Option<u32> {
    let add = |sum: u32, digit: &u8| Some(sum.wrapping_mul(16) + char::from(*digit).to_digit(16)?);
    (!digits.is_empty()).then(|| digits.iter().try_fold(0, add)).flatten()
}

fn character(value: u32, length: usize) -> EscapeParse {
    match u8::try_from(value) {
        Ok(byte) if byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-' => {
            EscapeParse::Escape(byte, length)
        }
        Ok(_) | Err(_) => EscapeParse::Literal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let unescaped = Unescaped::of(text.as_bytes());
        let decoded = unescaped.as_ref().map_or(text.as_bytes(), |unescaped| &unescaped.text);
        assert_eq!(String::from_utf8_lossy(decoded), expected, "{text}");
    }

    #[test]
    fn letters_are_decoded_in_every_escape() {
        for escape in [r"\u0073", r"\\u0073", r"\\\\u0073", r"\x73", r"\\x73", r"\U00000073"] {
            check(&format!("a{escape}k_{escape}"), "ask_s");
        }
        check(r"\u006B\u005f\u005F\x2d", "k__-");
    }

    #[test]
    fn other_text_is_kept() {
        for text in
            [r"\n\t\\ \u4e2d \u000a \u0020x", "100% %73 &#115;", r"\u00", "plain", r"\u{73}.", r"\x4g."]
        {
            let text = format!("{text} .");
            assert!(Unescaped::of(text.as_bytes()).is_none(), "{text}");
        }
    }

    #[test]
    fn an_incomplete_escape_at_the_end_is_partial() {
        for (text, partial) in [
            (r"a\", 1),
            (r"a\\", 1),
            (r"a\u", 1),
            (r"a\u00", 1),
            (r"a\u007", 1),
            (r"a\x7", 1),
            (r"a\U000000", 1),
            (r"\u0061\x", 6),
        ] {
            assert_eq!(Unescaped::of(text.as_bytes()).unwrap().partial, partial, "{text}");
        }
        for text in [r"a\u4", r"a\xg", r"a\n", r"a\u01"] {
            assert!(Unescaped::of(text.as_bytes()).is_none(), "{text}");
        }
    }

    #[test]
    fn offsets_are_mapped_to_the_original() {
        let unescaped = Unescaped::of(br"ab\u0063d\x65f").unwrap();
        assert_eq!(&*unescaped.text, b"abcdef");
        let offsets: Vec<usize> = (0..=6).map(|offset| unescaped.original(offset)).collect();
        assert_eq!(offsets, [0, 1, 2, 8, 9, 13, 14]);
    }
}
