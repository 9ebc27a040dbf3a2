//! Appends text to log lines: escapes it for JSON strings, and replaces characters that a terminal would interpret or
//! cannot show. Nearly all text needs no escape, so JSON strings are checked eight bytes at a time and copied
//! unchanged.

use std::fmt::{self, Write};

/// Appends formatted text to bytes.
struct ByteWriter<'a>(&'a mut Vec<u8>);

impl Write for ByteWriter<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

/// Appends formatted text without escaping it.
pub(super) fn append_formatted(line: &mut Vec<u8>, arguments: fmt::Arguments<'_>) {
    // Writing to memory cannot fail. If a value fails to be formatted, the text ends at that point.
    let _ = ByteWriter(line).write_fmt(arguments);
}

/// Escapes the bytes from index `start` on for a JSON string.
pub(super) fn escape_from(line: &mut Vec<u8>, start: usize) {
    if line.get(start..).is_some_and(any_needs_escape) {
        let text = line.split_off(start);
        append_escaped(line, &text);
    }
}

/// Appends a JSON string with its quotation marks.
pub(super) fn append_quoted(line: &mut Vec<u8>, text: &str) {
    line.push(b'"');
    append_escaped(line, text.as_bytes());
    line.push(b'"');
}

/// Appends escaped text in quotation marks.
pub(super) fn append_escaped_in_quotes(line: &mut Vec<u8>, escaped: &[u8]) {
    line.push(b'"');
    line.extend_from_slice(escaped);
    line.push(b'"');
}

/// Appends text, escaped for a JSON string, without quotation marks.
fn append_escaped(line: &mut Vec<u8>, text: &[u8]) {
    let mut remaining = text;
    while any_needs_escape(remaining) {
        let Some(index) = remaining.iter().position(|&byte| needs_escape(byte)) else { break };
        let (unescaped, tail) = remaining.split_at(index);
        line.extend_from_slice(unescaped);
        let Some((&byte, after)) = tail.split_first() else { break };
        append_escape(line, byte);
        remaining = after;
    }
    line.extend_from_slice(remaining);
}

/// Returns whether any byte needs an escape. Eight bytes are checked at a time, and the last eight bytes may overlap
/// with the bytes before them.
fn any_needs_escape(text: &[u8]) -> bool {
    match text.last_chunk() {
        Some(last) => {
            let (chunks, _) = text.as_chunks();
            chunks.iter().chain([last]).fold(0, |bits, chunk| bits | escape_bits(*chunk)) != 0
        }
        None => text.iter().any(|&byte| needs_escape(byte)),
    }
}

/// Returns a number that is 0 if and only if no byte of `chunk` needs an escape.
fn escape_bits(chunk: [u8; 8]) -> u64 {
    const ONES: u64 = u64::MAX / 0xff;
    const TOPS: u64 = ONES << 7;
    let bytes = u64::from_ne_bytes(chunk);
    // The subtraction sets the top bit of every byte that is less than the bound. A borrow from such a byte
    // may also set the top bit of the next byte, so the result shows whether any byte matches, but not which byte.
    let less_than = |bytes: u64, bound: u64| bytes.wrapping_sub(ONES * bound) & !bytes & TOPS;
    let equal_to = |byte: u8| less_than(bytes ^ (ONES * u64::from(byte)), 1);
    less_than(bytes, 0x20) | equal_to(b'"') | equal_to(b'\\')
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

/// Replaces control characters in the line of a terminal, and characters beyond ASCII if `is_ascii_only` is true.
pub(super) fn replace_unprintable(line: &mut Vec<u8>, is_ascii_only: bool) {
    // The UTF-8 encoding of control characters from U+0080 on starts with 0xc2. The encoding of some printable
    // characters starts with the same byte.
    let is_suspect = |byte: u8| byte < 0x20 || byte == 0x7f || byte == 0xc2 || (is_ascii_only && byte > 0x7f);
    if !line.iter().fold(false, |any, &byte| any | is_suspect(byte)) {
        return;
    }
    let mut safe = String::with_capacity(line.len());
    for character in String::from_utf8_lossy(line).chars() {
        match is_ascii_only.then(|| ascii_substitute(character)).flatten() {
            Some(substitute) => safe.push_str(substitute),
            None if character.is_ascii() && !character.is_control() => safe.push(character),
            None if is_ascii_only => safe.push('?'),
            None if character.is_control() => safe.push('\u{fffd}'),
            None => safe.push(character),
        }
    }
    *line = safe.into_bytes();
}

/// Returns the ASCII text for a character beyond ASCII that Keychoir's own messages contain.
fn ascii_substitute(character: char) -> Option<&'static str> {
    match character {
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
        fn text_is_escaped_as_serde_json_escapes_it(text in "(\\PC|[\\x00-\\x7f]){0,60}") {
            let mut line = b"x".to_vec();
            append_quoted(&mut line, &text);
            prop_assert_eq!(String::from_utf8(line).unwrap(), format!("x{}", serde_json::Value::from(&*text)));
        }

        #[test]
        fn a_terminal_line_has_no_control_characters(text in any::<String>(), is_ascii_only: bool) {
            prop_assume!(!text.chars().any(|character| ascii_substitute(character).is_some()));
            let mut line = text.clone().into_bytes();
            replace_unprintable(&mut line, is_ascii_only);
            let line = String::from_utf8(line).unwrap();
            prop_assert_eq!(line.chars().count(), text.chars().count());
            for (written, original) in line.chars().zip(text.chars()) {
                let is_printable = !original.is_control() && (original.is_ascii() || !is_ascii_only);
                let replacement = if is_ascii_only { '?' } else { char::REPLACEMENT_CHARACTER };
                prop_assert_eq!(written, if is_printable { original } else { replacement });
            }
        }
    }

    #[test]
    fn symbols_in_messages_have_ascii_substitutes() {
        let mut line = "├─ Base URL └─ base_url=… é\u{7}".as_bytes().to_vec();
        replace_unprintable(&mut line, true);
        assert_eq!(String::from_utf8(line).unwrap(), "|- Base URL `- base_url=... ??");
    }

    #[test]
    fn every_control_character_is_escaped() {
        let text: String = (0..0x20).map(char::from).chain("\"\\/\u{7f}é".chars()).collect();
        let mut line = Vec::new();
        append_quoted(&mut line, &text);
        assert_eq!(String::from_utf8(line).unwrap(), serde_json::Value::from(text).to_string());
    }
}
