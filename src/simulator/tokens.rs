//! Stores the tokens that the provider issues in addition to keys: single-use tokens and the tokens in signed URLs. A
//! token belongs to the key that requested it, is valid for one type of endpoint or one agent for 15 minutes, and can
//! be used once. The functions take the current time as an argument.

use std::collections::VecDeque;
use std::time::Duration;

use crate::policy::units::UnixMs;

/// Lifetime of an unused token, according to the provider's documentation. A signed URL must be used within this time.
const TOKEN_TTL: Duration = Duration::from_secs(15 * 60);
/// Maximum number of stored tokens, which bounds the memory of a long test.
const MAX_TOKENS: usize = 10_000;

/// The endpoint for which a token is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TokenScope {
    /// `realtime_scribe`: the transcription WebSocket.
    RealtimeScribe,
    /// `batch_scribe`: file transcription.
    BatchScribe,
    /// `tts_websocket`: the speech and dialogue WebSockets.
    Speech,
    /// A conversation with the agent that has this identifier.
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

/// The issued and unused tokens, oldest first.
#[derive(Debug, Default)]
pub(super) struct UnusedTokens(VecDeque<Token>);

/// An issued token, and the key that requested it.
#[derive(Debug)]
struct Token {
    text: String,
    scope: TokenScope,
    key_index: usize,
    expires_at: UnixMs,
}

impl UnusedTokens {
    /// Adds a token of the key at the index `key_index`, and drops the oldest token if the store is full.
    pub(super) fn add(&mut self, text: &str, scope: TokenScope, key_index: usize, now: UnixMs) {
        if self.0.len() == MAX_TOKENS {
            self.0.pop_front();
        }
        self.0.push_back(Token { text: text.to_owned(), scope, key_index, expires_at: now.plus(TOKEN_TTL) });
    }

    /// Returns the position of a token that is valid for `scope` at `now`.
    fn position(&self, text: &str, scope: &TokenScope, now: UnixMs) -> Option<usize> {
        self.0.iter().position(|token| token.text == text && token.scope == *scope && now < token.expires_at)
    }

    /// Returns the index of the key that owns a token, if the token is valid for `scope` at `now`.
    pub(super) fn find_key(&self, text: &str, scope: &TokenScope, now: UnixMs) -> Option<usize> {
        self.position(text, scope, now).and_then(|index| self.0.get(index)).map(|token| token.key_index)
    }

    /// Removes a token that is valid for `scope` at `now`. Returns the index of the key that owns the token.
    pub(super) fn consume(&mut self, text: &str, scope: &TokenScope, now: UnixMs) -> Option<usize> {
        self.position(text, scope, now).and_then(|index| self.0.remove(index)).map(|token| token.key_index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000_000);

    #[test]
    fn a_token_is_valid_once_for_its_scope_within_fifteen_minutes() {
        let mut tokens = UnusedTokens::default();
        tokens.add("t", TokenScope::RealtimeScribe, 3, NOW);
        let last_valid_time = UnixMs(NOW.0 + 15 * 60 * 1_000 - 1);
        assert_eq!(tokens.consume("t", &TokenScope::Speech, NOW), None);
        assert_eq!(tokens.consume("u", &TokenScope::RealtimeScribe, NOW), None);
        assert_eq!(tokens.find_key("t", &TokenScope::RealtimeScribe, UnixMs(last_valid_time.0 + 1)), None);
        assert_eq!(tokens.find_key("t", &TokenScope::RealtimeScribe, last_valid_time), Some(3));
        assert_eq!(tokens.consume("t", &TokenScope::RealtimeScribe, last_valid_time), Some(3));
        assert_eq!(tokens.consume("t", &TokenScope::RealtimeScribe, last_valid_time), None);
    }

    #[test]
    fn the_oldest_token_is_dropped_when_the_store_is_full() {
        let mut tokens = UnusedTokens::default();
        for index in 0..=MAX_TOKENS {
            tokens.add(&index.to_string(), TokenScope::Speech, 0, NOW);
        }
        assert_eq!(tokens.find_key("0", &TokenScope::Speech, NOW), None);
        assert_eq!(tokens.find_key("1", &TokenScope::Speech, NOW), Some(0));
        tokens.add("t", TokenScope::Agent("a".into()), 0, NOW);
        assert_eq!(tokens.find_key("t", &TokenScope::Agent("b".into()), NOW), None);
    }
}
