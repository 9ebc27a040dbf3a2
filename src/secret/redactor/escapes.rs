//! Characters of a key that are written as escapes: `\u0073` in JSON, also in JSON within JSON, `\x73` in
//! YAML and JavaScript, `%73` in URLs and forms, `&#115;` and `&#x73;` in HTML and XML. Nobody has a reason to
//! write a letter so, and every reader makes a key of it.

use std::borrow::Cow;

/// Backslashes before a `u`: one in JSON, two in JSON that is a string in JSON, four in one more.
const MAX_BACKSLASHES: usize = 4;

/// A text with the escapes of letters, digits, `_` and `-` decoded.
#[derive(Debug)]
pub(super) struct Unescaped<'a> {
    pub(super) text: Cow<'a, [u8]>,
    /// Where the places in `text` and in the original part: behind each escape, both.
    jumps: Vec<(usize, usize)>,
    /// Where the original ends in what may become an escape; its length if it does not.
    pub(super) partial: usize,
}

enum Read {
    Literal,
    /// A character, and how many bytes it is written in.
    Escape(u8, usize),
    /// What is there may be the begin of an escape.
    Partial,
}

impl<'a> Unescaped<'a> {
    /// `None` if there is nothing to decode and the end is no begin of an escape.
    pub(super) fn of(text: &'a [u8]) -> Option<Self> {
        let mut decoded: Vec<u8> = Vec::new();
        let mut jumps = Vec::new();
        let (mut copied, mut partial, mut behind) = (0, text.len(), 0);
        for at in memchr::memchr3_iter(b'\\', b'%', b'&', text) {
            // Within the escape before.
            if at < behind {
                continue;
            }
            match read(&text[at..]) {
                Read::Literal => {}
                Read::Escape(character, length) => {
                    decoded.extend_from_slice(&text[copied..at]);
                    decoded.push(character);
                    behind = at + length;
                    copied = behind;
                    jumps.push((decoded.len(), behind));
                }
                Read::Partial => {
                    partial = at;
                    break;
                }
            }
        }
        let text = if jumps.is_empty() {
            if partial == text.len() {
                return None;
            }
            Cow::Borrowed(&text[..partial])
        } else {
            decoded.extend_from_slice(&text[copied..partial]);
            Cow::Owned(decoded)
        };
        Some(Self { text, jumps, partial })
    }

    /// Where the original has what is at `place` in the text.
    pub(super) fn original(&self, place: usize) -> usize {
        let before = self.jumps.partition_point(|(decoded, _)| *decoded <= place);
        match before.checked_sub(1).and_then(|last| self.jumps.get(last)) {
            Some((decoded, original)) => original + (place - decoded),
            None => place,
        }
    }
}

/// What `text`, which begins with a backslash, a percent sign or an ampersand, begins with.
fn read(text: &[u8]) -> Read {
    match text {
        [b'\\', ..] => {
            let slashes = text.iter().take(MAX_BACKSLASHES).take_while(|byte| **byte == b'\\').count();
            match text.get(slashes..) {
                Some([b'u', digits @ ..]) => hexadecimal(digits, 4, slashes + 1),
                Some([b'U', digits @ ..]) => hexadecimal(digits, 8, slashes + 1),
                Some([b'x', digits @ ..]) => hexadecimal(digits, 2, slashes + 1),
                Some([]) | None => Read::Partial,
                Some(_) => Read::Literal,
            }
        }
        [b'%', digits @ ..] => hexadecimal(digits, 2, 1),
        [b'&'] | [b'&', b'#'] => Read::Partial,
        [b'&', b'#', b'x' | b'X', digits @ ..] => reference(digits, 16, 3),
        [b'&', b'#', digits @ ..] => reference(digits, 10, 2),
        _ => Read::Literal,
    }
}

/// As many hexadecimal digits as `count`, behind `before` bytes.
fn hexadecimal(text: &[u8], count: usize, before: usize) -> Read {
    let digits = text.get(..count).unwrap_or(text);
    // No character of a key needs more than two.
    let is_small = digits.iter().take(count - 2).all(|digit| *digit == b'0');
    match value(digits, 16) {
        _ if !is_small => Read::Literal,
        None if digits.is_empty() => Read::Partial,
        None => Read::Literal,
        Some(_) if digits.len() < count => Read::Partial,
        Some(value) => character(value, before + count),
    }
}

/// A character reference of HTML: digits and a semicolon, behind `before` bytes.
fn reference(text: &[u8], radix: u32, before: usize) -> Read {
    const MAX_DIGITS: usize = 8;
    let is_digit = |byte: &&u8| char::from(**byte).is_digit(radix);
    let count = text.iter().take(MAX_DIGITS).take_while(is_digit).count();
    match (text.get(count), value(&text[..count], radix)) {
        (None, _) => Read::Partial,
        (Some(b';'), Some(value)) => character(value, before + count + 1),
        (Some(_), _) => Read::Literal,
    }
}

/// A number; `None` for no digits, or other characters.
fn value(digits: &[u8], radix: u32) -> Option<u32> {
    let add = |sum: u32, digit: &u8| Some(sum.wrapping_mul(radix) + char::from(*digit).to_digit(radix)?);
    (!digits.is_empty()).then(|| digits.iter().try_fold(0, add)).flatten()
}

fn character(value: u32, length: usize) -> Read {
    match u8::try_from(value) {
        Ok(byte) if byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-' => {
            Read::Escape(byte, length)
        }
        Ok(_) | Err(_) => Read::Literal,
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
    fn letters_are_read_however_they_are_written() {
        for escape in [
            r"\u0073",
            r"\\u0073",
            r"\\\\u0073",
            r"\x73",
            r"\\x73",
            r"\U00000073",
            "%73",
            "&#115;",
            "&#0115;",
            "&#x73;",
            "&#X0073;",
        ] {
            check(&format!("a{escape}k_{escape}"), "ask_s");
        }
        check(r"\u006B%5f%5F%2d", "k__-");
    }

    #[test]
    fn everything_else_stays() {
        for text in [
            r"\n\t\\ \u4e2d \u000a \u0020x",
            "100% sure %zz %20",
            "a&b&amp;c &#x; &#12345678;",
            r"\u00",
            "plain",
            r"\u{73}.",
            "%4g.",
            "&#115.",
        ] {
            let text = format!("{text} .");
            assert!(Unescaped::of(text.as_bytes()).is_none(), "{text}");
        }
    }

    #[test]
    fn an_end_may_be_the_begin_of_an_escape() {
        for (text, partial) in [
            (r"a\", 1),
            (r"a\\", 1),
            (r"a\u", 1),
            (r"a\u00", 1),
            (r"a\u007", 1),
            ("a%", 1),
            ("a%7", 1),
            ("a&", 1),
            ("a&#", 1),
            ("a&#x", 1),
            ("a&#x73", 1),
            ("a&#11", 1),
            (r"a\U000000", 1),
            (r"\u0061\x", 6),
        ] {
            assert_eq!(Unescaped::of(text.as_bytes()).unwrap().partial, partial, "{text}");
        }
        for text in [r"a\u4", "a%g", "a&a", r"a\n", r"a\u01"] {
            assert!(Unescaped::of(text.as_bytes()).is_none(), "{text}");
        }
    }

    #[test]
    fn places_are_told_in_the_original() {
        let unescaped = Unescaped::of(br"ab\u0063d%65f").unwrap();
        assert_eq!(&*unescaped.text, b"abcdef");
        let places: Vec<usize> = (0..=6).map(|place| unescaped.original(place)).collect();
        assert_eq!(places, [0, 1, 2, 8, 9, 12, 13]);
    }
}
