//! The words of an error body, whichever of the provider's five shapes it has.
//!
//! `{"detail":{…}}` with or without `type` and `code`, `{"detail":[…]}` of a schema error, a bare
//! `{"status","message"}`, an unwrapped `{"error","message"}`, and `{"detail":"Not Found"}`.

use serde_json::{Map, Value};

/// What an error body says of itself, lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorBody {
    words: Vec<String>,
    message: String,
}

impl ErrorBody {
    /// Reads a decoded body. Anything that is not JSON, or not of a known shape, says nothing.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Self {
        let Ok(Value::Object(outer)) = serde_json::from_slice(bytes) else {
            return Self::default();
        };
        match outer.get("detail") {
            Some(Value::Object(inner)) => Self::of(inner),
            Some(Value::String(message)) => Self { words: Vec::new(), message: message.to_lowercase() },
            Some(Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_)) | None => {
                Self::of(&outer)
            }
        }
    }

    /// What a message or an end says that has another shape: words, and a text for people.
    #[must_use]
    pub fn said<const N: usize>(words: [Option<&str>; N], message: &str) -> Self {
        Self {
            words: words.into_iter().flatten().map(str::to_lowercase).collect(),
            message: message.to_lowercase(),
        }
    }

    fn of(fields: &Map<String, Value>) -> Self {
        let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_lowercase);
        Self {
            words: ["code", "status", "type", "error"].into_iter().filter_map(text).collect(),
            message: text("message").unwrap_or_default(),
        }
    }

    /// Whether it says nothing: it is empty, a page for people, or not of a known shape.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.message.is_empty() && self.words.is_empty()
    }

    /// Whether `word` is the body's code, status, type or error.
    #[must_use]
    pub fn says(&self, word: &str) -> bool {
        self.any_word(|said| said == word)
    }

    /// Whether any of the code, status, type and error is as `test` wants it.
    pub fn any_word(&self, test: impl Fn(&str) -> bool) -> bool {
        self.words.iter().any(|word| test(word))
    }

    /// Whether the message begins with `prefix`, which is lower case.
    #[must_use]
    pub fn message_starts(&self, prefix: &str) -> bool {
        self.message.starts_with(prefix)
    }

    /// Whether the message contains `part`, which is lower case.
    #[must_use]
    pub fn message_has(&self, part: &str) -> bool {
        self.message.contains(part)
    }

    /// The most specific of its words, and its message cut to `chars_max` characters, for people who
    /// ask why; without control characters, in lower case. Empty when it says nothing.
    #[must_use]
    pub fn summary(&self, chars_max: usize) -> String {
        let word = self.words.iter().max_by_key(|word| word.matches('_').count()).map(String::as_str);
        let message: String = without_tokens(&self.message).chars().take(chars_max).collect();
        match (word.map(|word| word.chars().take(60).collect::<String>()), message.is_empty()) {
            (Some(word), false) => format!("{word}: {message}"),
            (Some(word), true) => word,
            (None, _) => message,
        }
    }

    /// The whole number that stands in the message between two lower-case texts.
    #[must_use]
    pub fn number_between(&self, before: &str, after: &str) -> Option<u64> {
        let digits = self.text_between(before, after)?.trim().bytes().filter(|byte| *byte != b',');
        let mut number = None;
        for digit in digits {
            let value = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
            number = Some(number.unwrap_or(0_u64).checked_mul(10)?.checked_add(value)?);
        }
        number
    }

    /// What stands in the message between two lower-case texts, lower case.
    #[must_use]
    pub fn text_between(&self, before: &str, after: &str) -> Option<&str> {
        let (_, rest) = self.message.split_once(before)?;
        rest.split_once(after).map(|(text, _)| text)
    }
}

/// Minimum length of a word with digits that is hidden as a part of a key or an identifier; words of a
/// sentence are shorter.
const TOKEN_CHARS_MIN: usize = 20;

/// The text with what may be a part of a key replaced by an ellipsis, and what a terminal or a page might
/// obey by spaces.
fn without_tokens(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut word = String::new();
    for char in text.chars().chain(std::iter::once(' ')) {
        if char.is_alphanumeric() {
            word.push(char);
            continue;
        }
        let has_digit = word.contains(|char: char| char.is_ascii_digit());
        out.push_str(if has_digit && word.chars().count() >= TOKEN_CHARS_MIN { "…" } else { &word });
        word.clear();
        out.push(if is_shown_as_it_is(char) { char } else { ' ' });
    }
    out.pop();
    out
}

/// Whether a character is nothing that changes how others are shown (controls, directions, marks of width
/// zero: categories Cc and Cf of Unicode, as far as they are in use).
fn is_shown_as_it_is(char: char) -> bool {
    !char.is_control()
        && !matches!(char, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
}
