//! Escapes texts in log lines: for JSON strings, and for terminals, which must not interpret control
//! characters. Bytes that need no escape, which are nearly all, are copied unchanged.

use std::fmt::{self, Write};

struct Text<'a>(&'a mut Vec<u8>);

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

/// Appends formatted text without escaping it.
pub(super) fn append_shown(line: &mut Vec<u8>, shown: fmt::Arguments<'_>) {
    // Writing to memory does not fail; a value whose formatting fails is cut there.
    let _ = Text(line).write_fmt(shown);
}

/// Escapes the bytes from `start` on for a JSON string.
pub(super) fn escape_from(line: &mut Vec<u8>, start: usize) {
    if line.get(start..).is_some_and(any_needs_escape) {
        let text = line.split_off(start);
        append_escaped(line, &text);
    }
}

/// Appends a JSON string with its quotation escape_bits.
pub(super) fn append_quoted(line: &mut Vec<u8>, text: &str) {
    line.push(b'"');
    append_escaped(line, text.as_bytes());
    line.push(b'"');
}

/// Appends an already escaped text with quotation escape_bits.
pub(super) fn append_within_quotes(line: &mut Vec<u8>, escaped: &[u8]) {
    line.push(b'"');
    line.extend_from_slice(escaped);
    line.push(b'"');
}

/// Appends the escaped text without quotation escape_bits.
pub(super) fn append_escaped(line: &mut Vec<u8>, text: &[u8]) {
    let mut rest = text;
    while any_needs_escape(rest) {
        let Some(index) = rest.iter().position(|&byte| needs_escape(byte)) else { break };
        let (plain, escaped) = rest.split_at(index);
        line.extend_from_slice(plain);
        rest = match escaped {
            [byte, rest @ ..] => {
                append_escape(line, *byte);
                rest
            }
            [] => escaped,
        };
    }
    line.extend_from_slice(rest);
}

/// Checks eight bytes at a time; some of the last eight may be checked twice.
fn any_needs_escape(text: &[u8]) -> bool {
    match text.last_chunk() {
        Some(last) => {
            let (words, _) = text.as_chunks();
            words.iter().chain([last]).fold(0, |any, word| any | escape_bits(*word)) != 0
        }
        None => text.iter().any(|&byte| needs_escape(byte)),
    }
}

/// Returns bits that are set when a byte needs an escape; 0 when none does.
fn escape_bits(word: [u8; 8]) -> u64 {
    const ONES: u64 = u64::MAX / 0xff;
    const TOPS: u64 = ONES << 7;
    let bytes = u64::from_ne_bytes(word);
    // The subtraction sets a top bit that was clear before in bytes less than the bound, and possibly in some
    // bytes above the first of them.
    let less_than = |bytes: u64, bound: u64| bytes.wrapping_sub(ONES * bound) & !bytes & TOPS;
    let is = |byte: u8| less_than(bytes ^ (ONES * u64::from(byte)), 1);
    less_than(bytes, 0x20) | is(b'"') | is(b'\\')
}

fn needs_escape(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

fn append_escape(line: &mut Vec<u8>, byte: u8) {
    let short = match byte {
        b'"' | b'\\' => byte,
        0x08 => b'b',
        b'\t' => b't',
        b'\n' => b'n',
        0x0c => b'f',
        b'\r' => b'r',
        _ => {
            let digit = |value: u8| b"0123456789abcdef"[usize::from(value & 0x0f)];
            return line.extend_from_slice(&[b'\\', b'u', b'0', b'0', digit(byte >> 4), digit(byte)]);
        }
    };
    line.extend_from_slice(&[b'\\', short]);
}

/// Replaces every control character, and characters beyond ASCII where the terminal shows only ASCII.
pub(super) fn make_safe(line: &mut Vec<u8>, is_ascii: bool) {
    // Control characters from U+0080 on begin with 0xc2, as harmless characters do.
    let is_suspect = |byte: u8| byte < 0x20 || byte == 0x7f || byte == 0xc2 || (is_ascii && byte > 0x7f);
    if !line.iter().fold(false, |any, &byte| any | is_suspect(byte)) {
        return;
    }
    let mut made = String::with_capacity(line.len());
    for c in String::from_utf8_lossy(line).chars() {
        match (c, is_ascii.then(|| in_ascii(c)).flatten()) {
            (_, Some(text)) => made.push_str(text),
            (c, None) if c.is_ascii() && !c.is_control() => made.push(c),
            (_, None) if is_ascii => made.push('?'),
            (c, None) if c.is_control() => made.push('\u{fffd}'),
            (c, None) => made.push(c),
        }
    }
    *line = made.into_bytes();
}

/// The ASCII form of characters that the program's own lines contain.
fn in_ascii(c: char) -> Option<&'static str> {
    match c {
        '├' | '│' => Some("|"),
        '└' => Some("`"),
        '─' | '–' | '—' => Some("-"),
        '…' => Some("..."),
        '×' => Some("x"),
        '“' | '”' | '„' => Some("\""),
        '‘' | '’' => Some("'"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_text_is_escaped_as_the_library_does(text in "(\\PC|[\\x00-\\x7f]){0,60}") {
            let mut line = b"x".to_vec();
            append_quoted(&mut line, &text);
            prop_assert_eq!(String::from_utf8(line).unwrap(), format!("x{}", serde_json::Value::from(&*text)));
        }

        #[test]
        fn a_terminal_line_has_no_control_characters(text in any::<String>(), is_ascii: bool) {
            prop_assume!(!text.chars().any(|c| in_ascii(c).is_some()));
            let mut line = text.clone().into_bytes();
            make_safe(&mut line, is_ascii);
            let line = String::from_utf8(line).unwrap();
            prop_assert_eq!(line.chars().count(), text.chars().count());
            for (c, from) in line.chars().zip(text.chars()) {
                let is_harmless = !from.is_control() && (from.is_ascii() || !is_ascii);
                let sign = if is_ascii { '?' } else { char::REPLACEMENT_CHARACTER };
                prop_assert_eq!(c, if is_harmless { from } else { sign });
            }
        }
    }

    #[test]
    fn symbols_of_the_program_have_ascii_forms() {
        let mut line = "├─ Base URL └─ base_url=… é\u{7}".as_bytes().to_vec();
        make_safe(&mut line, true);
        assert_eq!(String::from_utf8(line).unwrap(), "|- Base URL `- base_url=... ??");
    }

    #[test]
    fn every_control_is_escaped() {
        let text: String = (0..0x20).map(char::from).chain("\"\\/\u{7f}é".chars()).collect();
        let mut line = Vec::new();
        append_quoted(&mut line, &text);
        assert_eq!(String::from_utf8(line).unwrap(), serde_json::Value::from(text).to_string());
    }
}
