//! Makes text of the provider or of a client safe to display: hides words that may be keys or
//! identifiers, and characters that a terminal or a page might interpret.

use std::borrow::Cow;

/// Minimum length of a word with digits that is hidden as part of a key or an identifier; words of a
/// sentence are shorter.
const MIN_TOKEN_CHARS: usize = 20;

/// The text with words that may be parts of keys replaced by an ellipsis, and with control and format
/// characters replaced by spaces.
#[must_use]
pub fn without_tokens(text: &str) -> Cow<'_, str> {
    if is_plain(text) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut word = String::new();
    for char in text.chars().chain(std::iter::once(' ')) {
        if char.is_alphanumeric() {
            word.push(char);
            continue;
        }
        let has_digit = word.contains(|char: char| char.is_ascii_digit());
        out.push_str(if has_digit && word.chars().count() >= MIN_TOKEN_CHARS { "…" } else { &word });
        word.clear();
        out.push(if is_displayable(char) { char } else { ' ' });
    }
    out.pop();
    Cow::Owned(out)
}

/// Whether a text is printable ASCII without long words.
fn is_plain(text: &str) -> bool {
    let mut length = 0;
    text.bytes().all(|byte| {
        length = if byte.is_ascii_alphanumeric() { length + 1 } else { 0 };
        length < MIN_TOKEN_CHARS && matches!(byte, b' '..=b'~')
    })
}

/// Whether a character is neither a control nor a format character, which would change how others are
/// displayed: line separators, text directions and zero-width marks (most of the Unicode categories Cc
/// and Cf, and the two separators).
fn is_displayable(char: char) -> bool {
    !char.is_control()
        && !matches!(char, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_may_be_keys_are_hidden_and_other_words_are_kept() {
        for (text, expected) in [
            ("elevenlabs-python/2.78.0 (Linux; x86_64)", "elevenlabs-python/2.78.0 (Linux; x86_64)"),
            ("key sk_6c03652600112233445566778899aabb", "key sk_…"),
            ("6c03652600112233445566778899aabb", "…"),
            ("uncharacteristically long", "uncharacteristically long"),
            ("line\nbreak\u{202e}", "line break "),
            ("café", "café"),
            ("", ""),
        ] {
            assert_eq!(without_tokens(text), expected);
        }
    }
}
