//! Stores the tokens that the provider issues in addition to keys: single-use tokens, and the tokens
//! of signed URLs. A token belongs to the key that requested it, is valid for one type of endpoint, and
//! can be used once. The time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

use crate::policy::units::UnixMs;

/// Validity of an unused token (the documentation). A signed URL must be used within this time.
const VALIDITY: Duration = Duration::from_secs(15 * 60);
/// Maximum number of stored tokens, which bounds the memory of a long test.
const MAX_TOKENS: usize = 10_000;

/// The endpoint for which a token is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TokenScope {
    /// `realtime_scribe`: the WebSocket of transcription.
    RealtimeScribe,
    /// `batch_scribe`: the transcription of a file.
    BatchScribe,
    /// `tts_websocket`: the WebSockets of speech and dialogue.
    Speech,
    /// A conversation with this agent.
    Agent(String),
}

impl TokenScope {
    /// Parses the `token_type` of `POST /v1/single-use-token/{token_type}`.
    pub(super) fn parse(name: &str) -> Option<Self> {
        match name {
            "realtime_scribe" => Some(TokenScope::RealtimeScribe),
            "batch_scribe" => Some(TokenScope::BatchScribe),
            "tts_websocket" => Some(TokenScope::Speech),
            _ => None,
        }
    }
}

/// The tokens that were issued and not used yet, oldest first.
#[derive(Debug, Default)]
pub(super) struct Tokens(VecDeque<Token>);

#[derive(Debug)]
struct Token {
    text: String,
    scope: TokenScope,
    key_index: usize,
    expires_at: UnixMs,
}

impl Tokens {
    /// Adds a token for the key at the index `key_index`.
    pub(super) fn add(&mut self, text: &str, scope: TokenScope, key_index: usize, now: UnixMs) {
        if self.0.len() == MAX_TOKENS {
            self.0.pop_front();
        }
        self.0.push_back(Token { text: text.to_owned(), scope, key_index, expires_at: now.plus(VALIDITY) });
    }

    fn position(&self, text: &str, scope: &TokenScope, now: UnixMs) -> Option<usize> {
        self.0.iter().position(|token| token.text == text && token.scope == *scope && now < token.expires_at)
    }

    /// Returns the index of the key of a token that is valid for this endpoint.
    pub(super) fn find_key(&self, text: &str, scope: &TokenScope, now: UnixMs) -> Option<usize> {
        self.position(text, scope, now).and_then(|index| self.0.get(index)).map(|token| token.key_index)
    }

    /// Consumes a token that is valid for this endpoint. Returns the index of its key.
    pub(super) fn consume(&mut self, text: &str, scope: &TokenScope, now: UnixMs) -> Option<usize> {
        self.position(text, scope, now).and_then(|index| self.0.remove(index)).map(|token| token.key_index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000_000);

    #[test]
    fn a_token_is_valid_once_in_its_scope_for_fifteen_minutes() {
        let mut tokens = Tokens::default();
        tokens.add("t", TokenScope::RealtimeScribe, 3, NOW);
        let last_valid = UnixMs(NOW.0 + 15 * 60 * 1_000 - 1);
        assert_eq!(tokens.consume("t", &TokenScope::Speech, NOW), None);
        assert_eq!(tokens.consume("u", &TokenScope::RealtimeScribe, NOW), None);
        assert_eq!(tokens.find_key("t", &TokenScope::RealtimeScribe, UnixMs(last_valid.0 + 1)), None);
        assert_eq!(tokens.find_key("t", &TokenScope::RealtimeScribe, last_valid), Some(3));
        assert_eq!(tokens.consume("t", &TokenScope::RealtimeScribe, last_valid), Some(3));
        assert_eq!(tokens.consume("t", &TokenScope::RealtimeScribe, last_valid), None);
    }

    #[test]
    fn the_oldest_tokens_are_dropped_beyond_a_maximum() {
        let mut tokens = Tokens::default();
        for index in 0..=MAX_TOKENS {
            tokens.add(&index.to_string(), TokenScope::Speech, 0, NOW);
        }
        assert_eq!(tokens.find_key("0", &TokenScope::Speech, NOW), None);
        assert_eq!(tokens.find_key("1", &TokenScope::Speech, NOW), Some(0));
        tokens.add("t", TokenScope::Agent("a".into()), 0, NOW);
        assert_eq!(tokens.find_key("t", &TokenScope::Agent("b".into()), NOW), None);
    }
}
