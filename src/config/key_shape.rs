//! Checks whether a text can be a key. ElevenLabs documents no key format, so an unknown format
//! causes only a warning. Errors are invalid characters, placeholders, short forms and words around
//! keys. A message contains the short form of the text, and no other part of it except the words
//! listed here.

use crate::secret::ShortKey;

/// The provider of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyProvider {
    /// ElevenLabs itself, whose keys have known formats.
    ElevenLabs,
    /// Another server, such as a simulator, which may accept any key.
    Other,
}

impl KeyProvider {
    /// The provider at this host.
    pub(super) fn of_host(host: &str) -> Self {
        let is_elevenlabs = host == "elevenlabs.io" || host.ends_with(".elevenlabs.io");
        if is_elevenlabs { Self::ElevenLabs } else { Self::Other }
    }
}

/// Minimum characters of a key. All known keys of ElevenLabs have 32 characters or more, and fewer
/// than 20 hexadecimal digits hold less than 80 bits.
const MIN_KEY_CHARS: usize = 20;

/// Words that placeholders contain and keys do not.
const PLACEHOLDERS: [&str; 8] =
    ["your", "placeholder", "changeme", "change_me", "change-me", "replace", "xxxx", "****"];

/// Words that precede keys in headers, tables, YAML and shells. Messages may contain them.
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

/// An error about an entry. The message completes a sentence that begins with the entry's position.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InvalidKey {
    pub(super) message: String,
    pub(super) advice: Option<&'static str>,
}

impl InvalidKey {
    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), advice: None }
    }

    fn advise(self, advice: &'static str) -> Self {
        Self { advice: Some(advice), ..self }
    }
}

/// Checks whether the single word `text` can be a key.
pub(super) fn check(text: &str, provider: KeyProvider) -> Result<(), InvalidKey> {
    const SHORT_FORM: &str =
        "a short form is only a part of a key: copy the whole key from where it was created";
    const PLACEHOLDER: &str = "write a key that ElevenLabs has made: elevenlabs.io, Developers, API keys";
    let lower = text.to_lowercase();
    let is_surrounding_word = SURROUNDING_WORDS.contains(&lower.trim_end_matches(':'));
    if is_surrounding_word {
        return Err(InvalidKey::new(format!("is the word `{lower}` and no key")));
    }
    if let Some(at) = ["...", "…", ".."].iter().find_map(|dots| text.find(dots)) {
        let has_end = !text[at..].trim_matches(['.', '…']).is_empty();
        return Err(if has_end {
            InvalidKey::new("is the short form of a key").advise(SHORT_FORM)
        } else {
            InvalidKey::new("is a placeholder").advise(PLACEHOLDER)
        });
    }
    if PLACEHOLDERS.iter().any(|word| lower.contains(word)) {
        return Err(InvalidKey::new("is a placeholder").advise(PLACEHOLDER));
    }
    if let Some(character) = text.chars().find(|character| !is_in_keys(*character)) {
        let message = if character.is_ascii_graphic() || character.is_alphabetic() {
            format!("contains the invalid character `{character}`")
        } else {
            "contains an invalid or invisible character".to_owned()
        };
        let advice = match character {
            '/' | '~' => Some("to read keys from a file, set ELEVENLABS_API_KEYS_FILE to its path"),
            '=' | ':' => Some("write the key alone, without a name before it"),
            '$' => Some("the variable was not replaced by its value: use double quotes, or none"),
            '#' => Some("write comments only into a file, on lines of their own that begin with `#`"),
            _ => None,
        };
        return Err(InvalidKey { message, advice });
    }
    if is_placeholder_of_words(&lower) {
        return Err(InvalidKey::new("is a placeholder").advise(PLACEHOLDER));
    }
    let count = text.chars().count();
    if provider == KeyProvider::ElevenLabs && count < MIN_KEY_CHARS {
        return Err(InvalidKey::new("is too short for a key of ElevenLabs"));
    }
    Ok(())
}

/// The error for several words in place of one key.
pub(super) fn check_words(words: &[&str]) -> InvalidKey {
    let is_equal = |word: &str, other: &str| word.trim_end_matches(':').eq_ignore_ascii_case(other);
    let advice = "write the key alone, without words around it";
    if words.iter().any(|word| is_equal(word, "bearer")) {
        return InvalidKey::new("has the word `Bearer` before the key").advise(advice);
    }
    if words.iter().any(|word| word.starts_with('#') || word.starts_with("//")) {
        return InvalidKey::new("has a comment in it")
            .advise("write comments only into a file, on lines of their own that begin with `#`");
    }
    if words.iter().any(|word| *word == "-" || word.ends_with(':')) {
        return InvalidKey::new("looks like YAML").advise(advice);
    }
    InvalidKey::new("has a space within a key, or words around one").advise(advice)
}

/// Whether the text has a recognizable key format. Several such texts, separated by spaces, are
/// several keys.
pub(super) fn looks_like_a_key(text: &str) -> bool {
    text.starts_with("sk_") || is_old_key(text)
}

/// Whether the text has one of the observed key formats of ElevenLabs.
pub(super) fn is_known_format(text: &str) -> bool {
    is_old_key(text) || text.strip_prefix("sk_").is_some_and(|rest| rest.len() == 48 && is_hexadecimal(rest))
}

/// Whether the text looks like a name, which is an error among keys.
pub(super) fn is_plain_word(text: &str) -> bool {
    !looks_like_a_key(text) && (text.len() < MIN_KEY_CHARS || !text.bytes().any(|byte| byte.is_ascii_digit()))
}

/// The short form of an invalid entry, by which an operator can find it.
pub(super) fn masked(text: &str) -> String {
    let count = text.chars().count();
    let is_shown = count >= 16 && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
    let head = if text.starts_with("sk_") { "sk_***, " } else { "" };
    let plural = if count == 1 { "" } else { "s" };
    if is_shown { ShortKey::of(text).to_string() } else { format!("{head}{count} character{plural}") }
}

fn is_in_keys(character: char) -> bool {
    character.is_ascii_alphanumeric() || character == '_' || character == '-'
}

fn is_old_key(text: &str) -> bool {
    text.len() == 32 && is_hexadecimal(text)
}

fn is_hexadecimal(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether the text is a placeholder made of words, such as `api-key`, `elevenlabs_api_key_here`,
/// `sk_first`.
fn is_placeholder_of_words(lower: &str) -> bool {
    const NAMES: [&str; 6] = ["api", "key", "apikey", "here", "elevenlabs", "example"];
    let is_of_words = !lower.bytes().any(|byte| byte.is_ascii_digit());
    let mut words = lower.split(['_', '-']);
    is_of_words && !lower.starts_with("sk_") && words.any(|word| NAMES.contains(&word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_refused(text: &str, message: &str) {
        for provider in [KeyProvider::ElevenLabs, KeyProvider::Other] {
            let refused = check(text, provider).unwrap_err();
            assert!(refused.message.contains(message), "{text}: {}", refused.message);
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
            check_refused(word, "and no key");
        }
    }

    #[test]
    fn a_short_text_can_be_a_key_of_another_provider() {
        assert_eq!(check("sk_one", KeyProvider::Other), Ok(()));
        assert!(check("sk_one", KeyProvider::ElevenLabs).unwrap_err().message.contains("too short"));
        assert_eq!(check(&"a1".repeat(10), KeyProvider::ElevenLabs), Ok(()));
        assert!(check(&"a1".repeat(10)[1..], KeyProvider::ElevenLabs).is_err());
        for (host, expected) in [
            ("api.elevenlabs.io", KeyProvider::ElevenLabs),
            ("api.eu.residency.elevenlabs.io", KeyProvider::ElevenLabs),
            ("notelevenlabs.io", KeyProvider::Other),
            ("127.0.0.1", KeyProvider::Other),
        ] {
            assert_eq!(KeyProvider::of_host(host), expected, "{host}");
        }
    }

    #[test]
    fn the_key_formats_of_elevenlabs_are_known() {
        let (old, new) = ("0123456789abcdef".repeat(2), format!("sk_{}", "0123456789abcdef".repeat(3)));
        assert!(is_known_format(&old) && is_known_format(&new));
        for text in [&old[1..], &new[..50], "sk_", &new.replace('f', "g")] {
            assert!(!is_known_format(text), "{text}");
        }
    }

    #[test]
    fn a_mask_shows_no_more_than_a_short_key_does() {
        let key = format!("sk_{}", "0123456789abcdef".repeat(3));
        assert_eq!(masked(&key), "sk_01234567...bcdef");
        assert_eq!(masked("sk_first"), "sk_***, 8 characters");
        assert_eq!(masked("x"), "1 character");
        assert_eq!(masked("sk_é0123456789abcdef"), "sk_***, 20 characters");
    }
}
