//! Credentials that the provider issues in place of a key: single-use tokens and those in signed
//! URLs. Each belongs to the key that requested it, is valid for one kind of endpoint, and is
//! consumed by its use. Values only; the time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

use crate::policy::units::UnixMs;

/// Validity of an unused token (the documentation; for a signed URL: until the session begins).
const VALID: Duration = Duration::from_secs(15 * 60);
/// Older tokens are dropped, so that a long test needs bounded memory.
const TOKENS_MAX: usize = 10_000;

/// The endpoint that a token is valid for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Door {
    /// `realtime_scribe`: the transcription socket.
    RealtimeScribe,
    /// `batch_scribe`: the transcription of a file.
    BatchScribe,
    /// `tts_websocket`: the sockets of speech and dialogue.
    Speech,
    /// A conversation with that agent.
    Agent(String),
}

impl Door {
    /// The endpoint of a `token_type` of `POST /v1/single-use-token/{token_type}`.
    pub(super) fn named(name: &str) -> Option<Self> {
        match name {
            "realtime_scribe" => Some(Door::RealtimeScribe),
            "batch_scribe" => Some(Door::BatchScribe),
            "tts_websocket" => Some(Door::Speech),
            _ => None,
        }
    }
}

/// The unused tokens.
#[derive(Debug, Default)]
pub(super) struct Tokens(VecDeque<Token>);

#[derive(Debug)]
struct Token {
    text: String,
    door: Door,
    key: usize,
    until: UnixMs,
}

impl Tokens {
    /// Adds a token of the key at the index `key`.
    pub(super) fn add(&mut self, text: &str, door: Door, key: usize, now: UnixMs) {
        if self.0.len() == TOKENS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(Token { text: text.to_owned(), door, key, until: now.plus(VALID) });
    }

    fn position(&self, text: &str, door: &Door, now: UnixMs) -> Option<usize> {
        self.0.iter().position(|token| token.text == text && token.door == *door && now < token.until)
    }

    /// The key of a token, if it is valid for that endpoint.
    pub(super) fn owner(&self, text: &str, door: &Door, now: UnixMs) -> Option<usize> {
        self.position(text, door, now).and_then(|at| self.0.get(at)).map(|token| token.key)
    }

    /// The same, and consumes the token.
    pub(super) fn take(&mut self, text: &str, door: &Door, now: UnixMs) -> Option<usize> {
        self.position(text, door, now).and_then(|at| self.0.remove(at)).map(|token| token.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000_000);

    #[test]
    fn a_token_opens_its_own_door_once_and_for_a_quarter_of_an_hour() {
        let mut tokens = Tokens::default();
        tokens.add("t", Door::RealtimeScribe, 3, NOW);
        let last = UnixMs(NOW.0 + 15 * 60 * 1_000 - 1);
        assert_eq!(tokens.take("t", &Door::Speech, NOW), None);
        assert_eq!(tokens.take("u", &Door::RealtimeScribe, NOW), None);
        assert_eq!(tokens.owner("t", &Door::RealtimeScribe, UnixMs(last.0 + 1)), None);
        assert_eq!(tokens.owner("t", &Door::RealtimeScribe, last), Some(3));
        assert_eq!(tokens.take("t", &Door::RealtimeScribe, last), Some(3));
        assert_eq!(tokens.take("t", &Door::RealtimeScribe, last), None);
    }

    #[test]
    fn only_so_many_are_kept() {
        let mut tokens = Tokens::default();
        for index in 0..=TOKENS_MAX {
            tokens.add(&index.to_string(), Door::Speech, 0, NOW);
        }
        assert_eq!(tokens.owner("0", &Door::Speech, NOW), None);
        assert_eq!(tokens.owner("1", &Door::Speech, NOW), Some(0));
        tokens.add("t", Door::Agent("a".into()), 0, NOW);
        assert_eq!(tokens.owner("t", &Door::Agent("b".into()), NOW), None);
    }
}
