//! Credentials that the provider hands out instead of a key: single-use tokens and what stands in
//! signed URLs. Each belongs to the key that asked for it, opens one kind of door, and is gone once
//! it was used. Values only; the time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

use crate::policy::units::UnixMs;

/// How long one may wait for its use (the documentation; for a signed URL: to begin).
const VALID: Duration = Duration::from_secs(15 * 60);
/// Older ones are forgotten, so that a long test costs bounded memory.
const TOKENS_MAX: usize = 10_000;

/// Which door a token opens.
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
    /// The door of a name of `POST /v1/single-use-token/{token_type}`.
    pub(super) fn named(name: &str) -> Option<Self> {
        match name {
            "realtime_scribe" => Some(Door::RealtimeScribe),
            "batch_scribe" => Some(Door::BatchScribe),
            "tts_websocket" => Some(Door::Speech),
            _ => None,
        }
    }
}

/// Those that have not been used.
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
    /// Keeps a new one, which belongs to the key at that place.
    pub(super) fn add(&mut self, text: &str, door: Door, key: usize, now: UnixMs) {
        if self.0.len() == TOKENS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(Token { text: text.to_owned(), door, key, until: now.plus(VALID) });
    }

    fn position(&self, text: &str, door: &Door, now: UnixMs) -> Option<usize> {
        self.0.iter().position(|token| token.text == text && token.door == *door && now < token.until)
    }

    /// Whose it is, if it opens that door.
    pub(super) fn owner(&self, text: &str, door: &Door, now: UnixMs) -> Option<usize> {
        self.position(text, door, now).and_then(|at| self.0.get(at)).map(|token| token.key)
    }

    /// The same, and it opens nothing any more.
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
