//! What a request will cost, before it is sent: enough to pass over a key that cannot pay.
//!
//! An estimate is an upper bound where the provider's rule is known: plans charge less for the same
//! text, none charges more. `character-cost` of the answer settles it.

use super::asked::{Asked, DEFAULT_MODEL};
use super::endpoint::Work;
use super::models::Models;

/// Credits a second of a sound effect whose length is given.
/// Source: the provider's documentation; 5 to 10 were measured.
const EFFECT_PER_SECOND: u64 = 20;
/// A sound effect that chooses its own length: 100 to 200 in the documentation.
const EFFECT: u64 = 200;
/// Credits a minute of voice changer and isolation. Source: the provider's documentation.
const AUDIO_PER_MINUTE: u64 = 1_000;
/// Bytes of a second of audio in the format that most uploads have: MP3 of 128 kbit/s.
const AUDIO_BYTES_PER_SECOND: u64 = 16_000;

/// Credits that a request will cost, as far as its kind, its words and the size of its body say.
/// `None` when nobody can tell; 0 for what is free.
#[must_use]
pub fn estimate(work: Work, asked: &Asked, body_bytes: Option<u64>, models: &Models) -> Option<u64> {
    match work {
        Work::Reading => Some(0),
        Work::Speech | Work::Dialogue => {
            let model = asked.model.as_deref().unwrap_or(DEFAULT_MODEL);
            asked.characters.map(|characters| models.credits(model, characters))
        }
        Work::Effects => {
            Some(asked.duration_ms.map_or(EFFECT, |ms| ms.saturating_mul(EFFECT_PER_SECOND).div_ceil(1_000)))
        }
        Work::Conversion | Work::Isolation => body_bytes
            .map(|bytes| bytes.saturating_mul(AUDIO_PER_MINUTE).div_ceil(60 * AUDIO_BYTES_PER_SECOND)),
        // The length of what is heard, or made, is not known before.
        Work::Transcription | Work::LiveTranscription | Work::Conversation | Work::Music | Work::Other => {
            None
        }
    }
}

/// Credits per minute of a session that reports no price while it runs. Source: the list prices of
/// June 2026 (0.08 USD a minute of an agent, 0.39 USD an hour of live transcription), at 0.10 USD for 1,000
/// credits.
#[must_use]
pub fn credits_per_minute(work: Work) -> Option<u64> {
    match work {
        Work::Conversation => Some(800),
        Work::LiveTranscription => Some(65),
        Work::Reading
        | Work::Speech
        | Work::Dialogue
        | Work::Effects
        | Work::Conversion
        | Work::Isolation
        | Work::Transcription
        | Work::Music
        | Work::Other => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(work: Work, body: &str, bytes: Option<u64>, expected: Option<u64>) {
        let asked = Asked::of(body.as_bytes(), true);
        assert_eq!(estimate(work, &asked, bytes, &Models::default()), expected);
    }

    #[test]
    fn speech_costs_its_characters() {
        check(Work::Speech, r#"{"text":"hello"}"#, None, Some(5));
        check(Work::Speech, r#"{"text":"hello","model_id":"eleven_flash_v2_5"}"#, None, Some(3));
        check(Work::Dialogue, r#"{"inputs":[{"text":"ab"},{"text":"c"}]}"#, None, Some(3));
        check(Work::Speech, "{}", None, None);
    }

    #[test]
    fn an_effect_costs_its_seconds() {
        check(Work::Effects, r#"{"text":"rain","duration_seconds":2.5}"#, None, Some(50));
        check(Work::Effects, r#"{"text":"rain"}"#, None, Some(200));
        check(Work::Effects, r#"{"text":"rain","duration_seconds":null}"#, None, Some(200));
    }

    #[test]
    fn audio_costs_its_minutes() {
        check(Work::Conversion, "", Some(60 * 16_000), Some(1_000));
        check(Work::Isolation, "", Some(1), Some(1));
        check(Work::Conversion, "", None, None);
    }

    #[test]
    fn what_nobody_can_tell_is_not_guessed() {
        check(Work::Transcription, "", Some(5), None);
        check(Work::Music, "{}", None, None);
        check(Work::Reading, "", None, Some(0));
    }
}
