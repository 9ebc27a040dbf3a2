//! Estimates the cost of a request before it is sent, so that keys without enough credits are skipped. Also returns the
//! price per minute of sessions that report no cost while they run.
//!
//! For a text, the estimate is an upper bound if the provider's price is known: some plans charge less for the same
//! text, but no plan charges more. For uploaded audio, the estimate assumes the bit rate of the most common format. The
//! header `character-cost` of the response replaces the estimate.

use super::endpoint::Operation;
use super::models::Models;
use super::request_body::{DEFAULT_MODEL, RequestBodyFeatures};

/// Credits per second of a sound effect whose request contains a length. Source: the provider's documentation. In
/// measurements, the provider charged 5 to 10 credits per second.
const SOUND_EFFECT_CREDITS_PER_SECOND: u64 = 20;
/// Maximum credits of a sound effect whose request contains no length. Source: the provider's documentation, which
/// gives 100 to 200 credits.
const MAX_SOUND_EFFECT_CREDITS: u64 = 200;
/// Credits per minute of the voice changer and of audio isolation. Source: the provider's documentation.
const AUDIO_CREDITS_PER_MINUTE: u64 = 1_000;
/// Bytes per second of audio in the most common upload format, which is MP3 at 128 kbit/s.
const AUDIO_BYTES_PER_SECOND: u64 = 16_000;

/// Estimates the cost in credits from the operation, the text, the requested length and the size of the body. Returns 0
/// for [`Operation::Reading`], and `None` if the cost cannot be estimated.
#[must_use]
pub fn estimate_credits(
    operation: Operation,
    features: &RequestBodyFeatures,
    body_bytes: Option<u64>,
    models: &Models,
) -> Option<u64> {
    match operation {
        Operation::Reading => Some(0),
        Operation::Speech | Operation::Dialogue => {
            let model = features.model.as_deref().unwrap_or(DEFAULT_MODEL);
            features.characters.map(|characters| models.max_credits(model, characters))
        }
        Operation::SoundEffects => Some(features.duration_ms.map_or(MAX_SOUND_EFFECT_CREDITS, |ms| {
            ms.saturating_mul(SOUND_EFFECT_CREDITS_PER_SECOND).div_ceil(1_000)
        })),
        Operation::Conversion | Operation::Isolation => body_bytes.map(|bytes| {
            bytes.saturating_mul(AUDIO_CREDITS_PER_MINUTE).div_ceil(60 * AUDIO_BYTES_PER_SECOND)
        }),
        // The length of the input or of the output is unknown before the request is sent.
        Operation::Transcription
        | Operation::LiveTranscription
        | Operation::Conversation
        | Operation::Music
        | Operation::Other => None,
    }
}

/// Returns the credits per minute of a session that reports no cost while it runs. Source: the list prices of
/// June 2026 (0.08 USD per minute of an agent, 0.39 USD per hour of live transcription), at 0.10 USD for
/// 1,000 credits. Returns `None` for an operation without such sessions.
#[must_use]
pub fn credits_per_minute(operation: Operation) -> Option<u64> {
    match operation {
        Operation::Conversation => Some(800),
        Operation::LiveTranscription => Some(65),
        Operation::Reading
        | Operation::Speech
        | Operation::Dialogue
        | Operation::SoundEffects
        | Operation::Conversion
        | Operation::Isolation
        | Operation::Transcription
        | Operation::Music
        | Operation::Other => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares the estimate for a complete body with the expected one.
    #[track_caller]
    fn check_estimate(operation: Operation, body: &str, bytes: Option<u64>, expected: Option<u64>) {
        let features = RequestBodyFeatures::parse(body.as_bytes(), true);
        assert_eq!(estimate_credits(operation, &features, bytes, &Models::default()), expected);
    }

    #[test]
    fn speech_is_estimated_by_its_characters() {
        check_estimate(Operation::Speech, r#"{"text":"hello"}"#, None, Some(5));
        check_estimate(
            Operation::Speech,
            r#"{"text":"hello","model_id":"eleven_flash_v2_5"}"#,
            None,
            Some(3),
        );
        check_estimate(Operation::Dialogue, r#"{"inputs":[{"text":"ab"},{"text":"c"}]}"#, None, Some(3));
        check_estimate(Operation::Speech, "{}", None, None);
    }

    #[test]
    fn a_sound_effect_is_estimated_by_its_seconds() {
        check_estimate(Operation::SoundEffects, r#"{"text":"rain","duration_seconds":2.5}"#, None, Some(50));
        check_estimate(Operation::SoundEffects, r#"{"text":"rain"}"#, None, Some(200));
        check_estimate(
            Operation::SoundEffects,
            r#"{"text":"rain","duration_seconds":null}"#,
            None,
            Some(200),
        );
    }

    #[test]
    fn audio_is_estimated_by_its_minutes() {
        check_estimate(Operation::Conversion, "", Some(60 * 16_000), Some(1_000));
        check_estimate(Operation::Isolation, "", Some(1), Some(1));
        check_estimate(Operation::Conversion, "", None, None);
    }

    #[test]
    fn a_cost_without_a_known_rule_is_not_estimated() {
        check_estimate(Operation::Transcription, "", Some(5), None);
        check_estimate(Operation::Music, "{}", None, None);
        check_estimate(Operation::Reading, "", None, Some(0));
    }
}
