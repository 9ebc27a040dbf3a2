//! Parses an error body in any of the provider's formats into its codes and messages. Also extracts a summary for
//! diagnosis, numbers and words from them.
//!
//! The formats over HTTP are `{"detail":{…}}` with or without `type` and `code`, `{"detail":[…]}` of a schema error, a
//! bare `{"status","message"}`, an unwrapped `{"error","message"}`, and `{"detail":"Not Found"}`. The formats on a
//! WebSocket are `{"message","error","code"}`, `{"message_type","error"}`, `{"type","message"}`, an `error_event`, and
//! the reason of a close frame. One parser accepts all formats, so that a code or message that is known in one format
//! is known in all formats.

use serde_json::{Map, Value};

use crate::policy::plain_text::hide_tokens;

/// The codes and messages of an error body, in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorBody {
    codes: Vec<String>,
    messages: Vec<String>,
}

/// Members that contain a code, the most specific first. Some responses contain a message in these members.
const CODE_MEMBERS: [&str; 6] = ["code", "status", "error", "message_type", "error_type", "type"];
/// Members that contain a message. Some responses contain a code in these members.
const MESSAGE_MEMBERS: [&str; 3] = ["message", "reason", "detail"];
/// Members that contain a nested error.
const NESTED_MEMBERS: [&str; 3] = ["detail", "error", "error_event"];
/// Other members of WebSocket errors. Sources: captured errors, and the provider's Python SDK 2.78.
const OTHER_MEMBERS: [&str; 8] =
    ["param", "request_id", "docs_url", "context_id", "contextId", "event_id", "debug_message", "details"];

impl ErrorBody {
    /// Parses a decoded body. A body that is not JSON or not in a known format has neither codes nor messages.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).map(|members| Self::from_members(&members)).unwrap_or_default()
    }

    /// Extracts the codes and messages of a JSON object.
    #[must_use]
    pub fn from_members(members: &Map<String, Value>) -> Self {
        let mut body = Self::default();
        for nested in NESTED_MEMBERS.iter().filter_map(|name| members.get(*name)?.as_object()) {
            body.add_members(nested);
        }
        body.add_members(members);
        body
    }

    /// Parses the reason of a close frame, which is a message, a code, a code before a message, or an error as JSON.
    #[must_use]
    pub fn from_close_reason(reason: &str) -> Self {
        if let Ok(members) = serde_json::from_str(reason) {
            return Self::from_members(&members);
        }
        let mut body = Self::default();
        body.add_message(reason);
        let prefix = reason.split_once(": ").map(|(prefix, _)| prefix);
        body.codes.extend(prefix.filter(|prefix| is_code(prefix)).map(str::to_lowercase));
        body
    }

    /// Whether all members of an object occur in the provider's errors.
    #[must_use]
    pub fn has_only_error_members(members: &Map<String, Value>) -> bool {
        let mut names = members.keys();
        names.all(|name| {
            CODE_MEMBERS
                .iter()
                .chain(&MESSAGE_MEMBERS)
                .chain(&NESTED_MEMBERS)
                .chain(&OTHER_MEMBERS)
                .any(|known| known == name)
        })
    }

    /// Returns the body without its messages.
    #[must_use]
    pub fn without_messages(self) -> Self {
        Self { messages: Vec::new(), ..self }
    }

    /// Adds the codes and messages among the members of an object, without nested objects.
    fn add_members(&mut self, members: &Map<String, Value>) {
        let texts = |names: &'static [&str]| names.iter().filter_map(|name| members.get(*name)?.as_str());
        for text in texts(&CODE_MEMBERS) {
            if is_code(text) {
                self.codes.push(text.to_lowercase());
            } else {
                self.add_message(text);
            }
        }
        texts(&MESSAGE_MEMBERS).for_each(|text| self.add_message(text));
    }

    /// Adds a message, which is also a code if it is a single word.
    fn add_message(&mut self, text: &str) {
        let message = without_relay_prefix(text.trim()).to_lowercase();
        if message.is_empty() {
            return;
        }
        if is_code(&message) {
            self.codes.push(message.clone());
        }
        self.messages.push(message);
    }

    /// Whether a code satisfies `predicate`.
    pub fn any_code(&self, predicate: impl Fn(&str) -> bool) -> bool {
        self.codes.iter().any(|code| predicate(code))
    }

    /// Whether a message starts with `prefix`, which is lower case.
    #[must_use]
    pub fn message_starts_with(&self, prefix: &str) -> bool {
        self.messages.iter().any(|message| message.starts_with(prefix))
    }

    /// Whether a message contains `part`, which is lower case.
    #[must_use]
    pub fn message_contains(&self, part: &str) -> bool {
        self.messages.iter().any(|message| message.contains(part))
    }

    /// Returns the most specific code and the first message for diagnosis, in lower case and without tokens
    /// and control characters. The message is truncated to `max_chars` characters. Returns an empty text if the body
    /// contains neither codes nor messages.
    #[must_use]
    pub fn summary(&self, max_chars: usize) -> String {
        let main_code = self.codes.iter().max_by_key(|code| code.matches('_').count());
        let first_message = self.messages.iter().find(|message| Some(*message) != main_code);
        let safe_message = first_message.map(|message| hide_tokens(message)).unwrap_or_default();
        let message: String = safe_message.chars().take(max_chars).collect();
        let Some(code) = main_code else { return message };
        let safe_code: String = hide_tokens(code).chars().take(MAX_SUMMARY_CODE_CHARS).collect();
        if message.is_empty() { safe_code } else { format!("{safe_code}: {message}") }
    }

    /// Parses the whole number between `before` and `after`, which are lower case, in the first message that contains
    /// both. Commas in the number are ignored. Returns `None` if there is no such message or number.
    #[must_use]
    pub fn number_between(&self, before: &str, after: &str) -> Option<u64> {
        let number = self.messages.iter().find_map(|message| {
            let (_, rest) = message.split_once(before)?;
            rest.split_once(after).map(|(number, _)| number.trim())
        })?;
        let mut digits = number.bytes().filter(|byte| *byte != b',').peekable();
        digits.peek()?;
        digits.try_fold(0_u64, |number, byte| {
            let digit = char::from(byte).to_digit(10)?;
            number.checked_mul(10)?.checked_add(digit.into())
        })
    }

    /// Returns the word after `before`, which is lower case, in the first message that contains `before`.
    #[must_use]
    pub fn word_after(&self, before: &str) -> Option<&str> {
        self.messages.iter().find_map(|message| message.split_once(before)?.1.split_whitespace().next())
    }
}

/// Maximum length of a code. The longest known code has 38 characters.
const MAX_CODE_BYTES: usize = 64;
/// Maximum length of the code in a summary.
const MAX_SUMMARY_CODE_CHARS: usize = 60;

/// Whether `text` is a code and not a message. A code is a single word of letters, digits and `_-+.`.
fn is_code(text: &str) -> bool {
    let is_code_byte = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'+' | b'.');
    !text.is_empty() && text.len() <= MAX_CODE_BYTES && text.bytes().all(is_code_byte)
}

/// Removes the prefix that the provider adds to a message that contains the reason of another close frame:
/// "received 1002 (protocol error) This request exceeds your quota limit." (elevenlabs/packages#911).
fn without_relay_prefix(message: &str) -> &str {
    match message.strip_prefix("received 1").and_then(|rest| rest.split_once(") ")) {
        Some((_, reason)) => reason,
        None => message,
    }
}
