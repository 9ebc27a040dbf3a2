//! Makes text of the provider or of a client safe to display: hides words that may be keys or identifiers, and replaces
//! characters that a terminal or a web page would interpret.

use std::borrow::Cow;

/// Minimum length in characters of a word that is hidden if it contains a digit. Words of a sentence are
/// shorter.
const MIN_TOKEN_LENGTH: usize = 20;

/// Replaces words that may be parts of keys with an ellipsis, and control and format characters with spaces.
#[must_use]
pub fn hide_tokens(text: &str) -> Cow<'_, str> {
    if is_plain(text) {
        return Cow::Borrowed(text);
    }
    let mut displayed = String::with_capacity(text.len());
    let mut word = String::new();
    for character in text.chars().chain(std::iter::once(' ')) {
        if character.is_alphanumeric() {
            word.push(character);
            continue;
        }
        let has_digit = word.contains(|character: char| character.is_ascii_digit());
        displayed.push_str(if has_digit && word.chars().count() >= MIN_TOKEN_LENGTH { "…" } else { &word });
        word.clear();
        displayed.push(if is_displayable(character) { character } else { ' ' });
    }
    displayed.pop();
    Cow::Owned(displayed)
}

/// Whether `text` is printable ASCII without long words and therefore needs no replacement.
fn is_plain(text: &str) -> bool {
    let mut word_length = 0;
    text.bytes().all(|byte| {
        word_length = if byte.is_ascii_alphanumeric() { word_length + 1 } else { 0 };
        word_length < MIN_TOKEN_LENGTH && matches!(byte, b' '..=b'~')
    })
}

/// Whether a character does not change the display of the characters around it. Control and format characters change
/// it, for example line separators, text directions and zero-width marks (the Unicode category Cc, most of the category
/// Cf, and the two separators).
fn is_displayable(character: char) -> bool {
    let is_format_character = matches!(
        character,
        '\u{ad}'
            | '\u{61c}'
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
    );
    !character.is_control() && !is_format_character
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_words_that_may_be_keys_and_control_characters_are_replaced() {
        for (text, expected) in [
            ("elevenlabs-python/2.78.0 (Linux; x86_64)", "elevenlabs-python/2.78.0 (Linux; x86_64)"),
            ("key sk_6c03652600112233445566778899aabb", "key sk_…"),
            ("6c03652600112233445566778899aabb", "…"),
            ("uncharacteristically long", "uncharacteristically long"),
            ("line\nbreak\u{202e}", "line break "),
            ("café", "café"),
            ("", ""),
        ] {
            assert_eq!(hide_tokens(text), expected);
        }
    }
}
