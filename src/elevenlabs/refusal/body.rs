//! Extracts the codes and sentences of an error body in any of the provider's formats.
//!
//! Over HTTP: `{"detail":{…}}` with or without `type` and `code`, `{"detail":[…]}` of a schema error, a
//! bare `{"status","message"}`, an unwrapped `{"error","message"}`, and `{"detail":"Not Found"}`. On a
//! WebSocket: `{"message","error","code"}`, `{"message_type","error"}`, `{"type","message"}`, an
//! `error_event`, or the reason of a close frame. One parser accepts all of them, so that a word known in
//! one format is known in every other.

use serde_json::{Map, Value};

use crate::policy::plain_text::without_tokens;

/// The codes and sentences of an error body, in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorBody {
    codes: Vec<String>,
    sentences: Vec<String>,
}

/// Members with a code, the most specific first; some contain a sentence instead.
const CODES: [&str; 6] = ["code", "status", "error", "message_type", "error_type", "type"];
/// Members with a sentence; some contain a code instead.
const SENTENCES: [&str; 3] = ["message", "reason", "detail"];
/// Members that contain a nested error.
const NESTED: [&str; 3] = ["detail", "error", "error_event"];
/// Other members of WebSocket errors. Sources: captured errors; the Python SDK 2.78.
const OTHER_MEMBERS: [&str; 8] =
    ["param", "request_id", "docs_url", "context_id", "contextId", "event_id", "debug_message", "details"];

impl ErrorBody {
    /// Parses a decoded body. A body that is not JSON, or not in a known format, yields no words.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).map(|members| Self::of(&members)).unwrap_or_default()
    }

    /// Parses a message that is a JSON object.
    #[must_use]
    pub fn of(members: &Map<String, Value>) -> Self {
        let mut body = Self::default();
        for inner in NESTED.iter().filter_map(|name| members.get(*name)?.as_object()) {
            body.add(inner);
        }
        body.add(members);
        body
    }

    /// Parses the reason of a close frame: a sentence, a code, a code before a sentence, or an error as
    /// JSON.
    #[must_use]
    pub fn of_reason(reason: &str) -> Self {
        if let Ok(members) = serde_json::from_str(reason) {
            return Self::of(&members);
        }
        let mut body = Self::default();
        body.add_text(reason);
        let prefix = reason.split_once(": ").map(|(prefix, _)| prefix);
        body.codes.extend(prefix.filter(|prefix| is_code(prefix)).map(str::to_lowercase));
        body
    }

    /// Whether a message has no members but those of errors.
    #[must_use]
    pub fn has_only_error_members(members: &Map<String, Value>) -> bool {
        let known = || CODES.iter().chain(&SENTENCES).chain(&NESTED).chain(&OTHER_MEMBERS);
        members.keys().all(|name| known().any(|known| known == name))
    }

    /// The body without its sentences.
    #[must_use]
    pub fn codes_only(self) -> Self {
        Self { sentences: Vec::new(), ..self }
    }

    fn add(&mut self, members: &Map<String, Value>) {
        let members_of =
            |names: &'static [&str]| names.iter().filter_map(|name| members.get(*name)?.as_str());
        for text in members_of(&CODES) {
            if is_code(text) {
                self.codes.push(text.to_lowercase());
            } else {
                self.add_text(text);
            }
        }
        members_of(&SENTENCES).for_each(|text| self.add_text(text));
    }

    /// Adds a sentence, which is also a code when it is a single word.
    fn add_text(&mut self, text: &str) {
        let text = without_relay_prefix(text.trim()).to_lowercase();
        if text.is_empty() {
            return;
        }
        if is_code(&text) {
            self.codes.push(text.clone());
        }
        self.sentences.push(text);
    }

    /// Whether there are no words: the body is empty, an HTML page, or not in a known format.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sentences.is_empty() && self.codes.is_empty()
    }

    /// Whether `code` is the body's code, status, type or error.
    #[must_use]
    pub fn has_code(&self, code: &str) -> bool {
        self.any_code(|text| text == code)
    }

    /// Whether any of code, status, type and error satisfies `test`.
    pub fn any_code(&self, test: impl Fn(&str) -> bool) -> bool {
        self.codes.iter().any(|code| test(code))
    }

    /// Whether a sentence begins with `prefix`, which is lower case.
    #[must_use]
    pub fn message_starts(&self, prefix: &str) -> bool {
        self.sentences.iter().any(|text| text.starts_with(prefix))
    }

    /// Whether a sentence contains `part`, which is lower case.
    #[must_use]
    pub fn message_has(&self, part: &str) -> bool {
        self.sentences.iter().any(|text| text.contains(part))
    }

    /// The most specific code and the first sentence, cut to `chars_max` characters, for diagnosis: in
    /// lower case and without control characters. Empty when there are no words.
    #[must_use]
    pub fn summary(&self, chars_max: usize) -> String {
        let code = self.codes.iter().max_by_key(|code| code.matches('_').count()).map(String::as_str);
        let sentence = self.sentences.iter().find(|text| Some(text.as_str()) != code);
        let sentence = sentence.map(|text| without_tokens(text)).unwrap_or_default();
        let message: String = sentence.chars().take(chars_max).collect();
        match (code.map(|code| without_tokens(code).chars().take(60).collect::<String>()), message.is_empty())
        {
            (Some(code), false) => format!("{code}: {message}"),
            (Some(code), true) => code,
            (None, _) => message,
        }
    }

    /// The whole number between two lower-case texts in a sentence.
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

    /// The text between two lower-case texts in a sentence, in lower case.
    #[must_use]
    pub fn text_between(&self, before: &str, after: &str) -> Option<&str> {
        self.sentences.iter().find_map(|text| {
            let (_, rest) = text.split_once(before)?;
            rest.split_once(after).map(|(text, _)| text)
        })
    }

    /// The word after a lower-case text in a sentence, in lower case. The sentence may end there.
    #[must_use]
    pub fn word_after(&self, before: &str) -> Option<&str> {
        self.sentences.iter().find_map(|text| text.split_once(before)?.1.split_whitespace().next())
    }
}

/// Maximum length of a code; the longest known one has 41 characters.
const CODE_BYTES_MAX: usize = 64;

/// Whether a text is a code and not a sentence: a single word of code characters.
fn is_code(text: &str) -> bool {
    let is_of_code = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'+' | b'.');
    !text.is_empty() && text.len() <= CODE_BYTES_MAX && text.bytes().all(is_of_code)
}

/// The reason of an upstream close frame without the prefix that the provider adds when it passes one on:
/// "received 1002 (protocol error) This request exceeds your quota limit." (elevenlabs/packages#911).
fn without_relay_prefix(message: &str) -> &str {
    match message.strip_prefix("received 1").and_then(|rest| rest.split_once(") ")) {
        Some((_, reason)) => reason,
        None => message,
    }
}
