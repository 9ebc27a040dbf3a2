//! Recognizes text that cannot be an API key: invalid characters, placeholders, short forms, and words around keys.
//! Also recognizes the known formats of keys, and masks entries for messages. ElevenLabs documents no key format, so
//! `key_list` accepts a key of an unknown format with a warning. Messages contain at most the short form of the text,
//! an invalid character, or a word that is listed in this file.

use super::problem::ValueError;
use crate::secret::ShortKey;

/// The provider of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyProvider {
    /// ElevenLabs, whose keys have known formats.
    ElevenLabs,
    /// Another server, such as a simulator, which may accept any key.
    Other,
}

impl KeyProvider {
    /// Returns the provider at the given `host`.
    pub(super) fn for_host(host: &str) -> Self {
        let is_elevenlabs = host == "elevenlabs.io" || host.ends_with(".elevenlabs.io");
        if is_elevenlabs { Self::ElevenLabs } else { Self::Other }
    }
}

/// Minimum number of characters in a key. All known keys of ElevenLabs have at least 32 characters, and fewer
/// than 20 hexadecimal digits contain less than 80 bits.
const MIN_KEY_CHARS: usize = 20;

/// Words that occur in placeholders and not in keys.
const PLACEHOLDERS: [&str; 8] =
    ["your", "placeholder", "changeme", "change_me", "change-me", "replace", "xxxx", "****"];

/// Words that precede keys in headers, tables, YAML and shell scripts.
const SURROUNDING_WORDS: [&str; 14] = [
    "bearer",
    "key",
    "keys",
    "name",
    "names",
    "token",
    "secret",
    "api_key",
    "api_keys",
    "apikey",
    "api-key",
    "xi-api-key",
    "export",
    "elevenlabs_api_key",
];

const COMMENT_ADVICE: &str = "write comments only in a file, on separate lines that begin with `#`";

/// Checks whether `text`, which contains no spaces, can be a key. The error message is the rest of a sentence that
/// begins with the position of the entry.
pub(super) fn check_key(text: &str, provider: KeyProvider) -> Result<(), ValueError> {
    let placeholder_error = || {
        ValueError::new("is a placeholder")
            .advise("write a key that was created at elevenlabs.io: Developers, API keys")
    };
    let lowercase = text.to_lowercase();
    if SURROUNDING_WORDS.contains(&lowercase.trim_end_matches(':')) {
        return Err(ValueError::new(format!("is the word `{lowercase}`, not a key")));
    }
    if let Some(index) = ["...", "…", ".."].iter().find_map(|dots| text.find(dots)) {
        let has_last_characters = !text[index..].trim_matches(['.', '…']).is_empty();
        return Err(if has_last_characters {
            ValueError::new("is the short form of a key")
                .advise("copy the whole key from where it was created")
        } else {
            placeholder_error()
        });
    }
    if PLACEHOLDERS.iter().any(|word| lowercase.contains(word)) {
        return Err(placeholder_error());
    }
    if let Some(character) = text.chars().find(|character| !is_key_character(*character)) {
        let error = if character.is_ascii_graphic() || character.is_alphabetic() {
            ValueError::new(format!("contains the invalid character `{character}`"))
        } else {
            ValueError::new("contains an invalid or invisible character")
        };
        let advice = match character {
            '/' | '~' => Some("to read keys from a file, set ELEVENLABS_API_KEYS_FILE to its path"),
            '=' | ':' => Some("write only the key, without a name before it"),
            '$' => Some("the shell did not expand the variable: use double quotes, or no quotes"),
            '#' => Some(COMMENT_ADVICE),
            _ => None,
        };
        return Err(advice.into_iter().fold(error, ValueError::advise));
    }
    if is_worded_placeholder(&lowercase) {
        return Err(placeholder_error());
    }
    if provider == KeyProvider::ElevenLabs && text.chars().count() < MIN_KEY_CHARS {
        return Err(ValueError::new("is too short for a key of ElevenLabs"));
    }
    Ok(())
}

/// Returns the error for an entry of several words.
pub(super) fn multiple_words_error(words: &[&str]) -> ValueError {
    let message = if words.iter().any(|word| word.trim_end_matches(':').eq_ignore_ascii_case("bearer")) {
        "has the word `Bearer` before the key"
    } else if words.iter().any(|word| word.starts_with('#') || word.starts_with("//")) {
        return ValueError::new("contains a comment").advise(COMMENT_ADVICE);
    } else if words.iter().any(|word| *word == "-" || word.ends_with(':')) {
        "looks like YAML"
    } else {
        "has a space within a key, or words around a key"
    };
    ValueError::new(message).advise("write only the key, without words around it")
}

/// Returns whether the text looks like a key. If several such texts are separated by spaces, each of them is a key.
pub(super) fn looks_like_key(text: &str) -> bool {
    text.starts_with("sk_") || is_hexadecimal_key(text)
}

/// Returns whether the text has one of the known key formats of ElevenLabs.
pub(super) fn is_known_format(text: &str) -> bool {
    is_hexadecimal_key(text)
        || text.strip_prefix("sk_").is_some_and(|rest| rest.len() == 48 && is_hexadecimal(rest))
}

/// Returns whether the text looks like a key name. A key name between keys is an error.
pub(super) fn looks_like_name(text: &str) -> bool {
    !looks_like_key(text) && (text.len() < MIN_KEY_CHARS || !text.bytes().any(|byte| byte.is_ascii_digit()))
}

/// Minimum number of characters of a text whose short form is shown. The short form of a shorter text would show most
/// of the text.
const MIN_SHORT_FORM_CHARS: usize = 16;

/// Masks an entry, so that an operator can find it and a message contains no key: returns its short form, or only its
/// length and whether it begins with `sk_`.
pub(super) fn mask_key(text: &str) -> String {
    let count = text.chars().count();
    let has_short_form =
        count >= MIN_SHORT_FORM_CHARS && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
    let prefix = if text.starts_with("sk_") { "sk_***, " } else { "" };
    let plural_suffix = if count == 1 { "" } else { "s" };
    if has_short_form {
        ShortKey::new(text).to_string()
    } else {
        format!("{prefix}{count} character{plural_suffix}")
    }
}

fn is_key_character(character: char) -> bool {
    character.is_ascii_alphanumeric() || character == '_' || character == '-'
}

fn is_hexadecimal_key(text: &str) -> bool {
    text.len() == 32 && is_hexadecimal(text)
}

fn is_hexadecimal(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Returns whether the lowercase text is a placeholder of words, such as `api-key` or
/// `elevenlabs_api_key_here`.
fn is_worded_placeholder(lowercase: &str) -> bool {
    const WORDS: [&str; 6] = ["api", "key", "apikey", "here", "elevenlabs", "example"];
    let has_digits = lowercase.bytes().any(|byte| byte.is_ascii_digit());
    let mut words = lowercase.split(['_', '-']);
    !has_digits && !lowercase.starts_with("sk_") && words.any(|word| WORDS.contains(&word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_refused(text: &str, message: &str) {
        for provider in [KeyProvider::ElevenLabs, KeyProvider::Other] {
            let error = check_key(text, provider).unwrap_err().to_string();
            assert!(error.contains(message), "the error for {text:?} must contain {message:?}: {error}");
        }
    }

    #[test]
    fn an_invalid_character_is_refused_for_every_provider() {
        for (text, character) in [
            ("<key>", "`<`"),
            ("$ELEVENLABS_KEY", "`$`"),
            ("key=sk_a", "`=`"),
            ("main:sk_a", "`:`"),
            ("sk_a#main", "`#`"),
            ("/run/secrets/keys", "`/`"),
            ("sk_\u{e9}", "`\u{e9}`"),
            ("sk_a\u{1}", "invalid or invisible"),
            ("sk_a|sk_b", "`|`"),
        ] {
            check_refused(text, character);
        }
    }

    #[test]
    fn placeholders_short_forms_and_words_are_refused_for_every_provider() {
        for text in [
            "sk_first…",
            "sk_…",
            "sk_first...",
            "your-api-key",
            "YOUR_ELEVENLABS_API_KEY",
            "sk_your_key_here",
            "sk_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
            "changeme",
            "my-api-key",
            "elevenlabs_key",
        ] {
            check_refused(text, "is a placeholder");
        }
        check_refused("sk_4b74d051...c99ae", "short form");
        check_refused("sk_4b74d051…c99ae", "short form");
        for word in ["Bearer", "name", "KEY", "api_key", "keys:"] {
            check_refused(word, "not a key");
        }
    }

    #[test]
    fn a_short_text_can_be_a_key_of_another_provider() {
        assert_eq!(check_key("sk_one", KeyProvider::Other), Ok(()));
        assert!(check_key("sk_one", KeyProvider::ElevenLabs).unwrap_err().to_string().contains("too short"));
        assert_eq!(check_key(&"a1".repeat(10), KeyProvider::ElevenLabs), Ok(()));
        assert!(check_key(&"a1".repeat(10)[1..], KeyProvider::ElevenLabs).is_err());
        for (host, expected) in [
            ("api.elevenlabs.io", KeyProvider::ElevenLabs),
            ("api.eu.residency.elevenlabs.io", KeyProvider::ElevenLabs),
            ("notelevenlabs.io", KeyProvider::Other),
            ("127.0.0.1", KeyProvider::Other),
        ] {
            assert_eq!(KeyProvider::for_host(host), expected, "the provider at {host} must be recognized");
        }
    }

    #[test]
    fn the_key_formats_of_elevenlabs_are_known() {
        let (hexadecimal, prefixed) =
            ("0123456789abcdef".repeat(2), format!("sk_{}", "0123456789abcdef".repeat(3)));
        assert!(is_known_format(&hexadecimal) && is_known_format(&prefixed));
        for text in [&hexadecimal[1..], &prefixed[..50], "sk_", &prefixed.replace('f', "g")] {
            assert!(!is_known_format(text), "{text:?} must not have a known format");
        }
    }

    #[test]
    fn a_masked_key_shows_no_more_than_its_short_form() {
        let key = format!("sk_{}", "0123456789abcdef".repeat(3));
        assert_eq!(mask_key(&key), "sk_01234567...bcdef");
        assert_eq!(mask_key("sk_first"), "sk_***, 8 characters");
        assert_eq!(mask_key("x"), "1 character");
        assert_eq!(mask_key("sk_é0123456789abcdef"), "sk_***, 20 characters");
    }
}
