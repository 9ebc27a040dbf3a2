//! What a client says on a socket, as far as the pool and the books want to know: how much of it will
//! be spoken, or how long the sound is that is to be written down. Texts are counted and never kept.

use serde_json::{Map, Value};

use super::Dialect;

/// What a message asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Characters of text that will be spoken.
    pub characters: u64,
    /// Bytes of sound that will be written down.
    pub audio_bytes: u64,
}

/// Longer messages are not read.
pub const SAID_BYTES_MAX: usize = 256 * 1024;

/// What a whole text message of a client asks for. Members are read as the provider reads them: of two
/// with one name the last counts, and one of another type is not there. A message that only the provider
/// can read may be spoken as a whole: nothing is longer than its bytes.
#[must_use]
pub fn say(dialect: Dialect, message: &[u8]) -> Said {
    let is_heard = dialect == Dialect::Transcription;
    if !(dialect.is_spoken() || is_heard) || message.len() > SAID_BYTES_MAX {
        return Said::default();
    }
    let Ok(members) = serde_json::from_slice::<Map<String, Value>>(message) else {
        let characters = if is_heard { 0 } else { message.len() as u64 };
        return Said { characters, audio_bytes: 0 };
    };
    if is_heard {
        let sound = members.get("audio_base_64").and_then(Value::as_str).unwrap_or_default();
        return Said { audio_bytes: sound.trim_end_matches('=').len() as u64 * 3 / 4, characters: 0 };
    }
    let lines = members.get("inputs").and_then(Value::as_array).into_iter().flatten();
    let texts = lines.filter_map(|line| line.get("text")).chain(members.get("text"));
    Said { characters: texts.filter_map(Value::as_str).map(spoken).sum(), audio_bytes: 0 }
}

/// Whether a message carries one of the provider's own tokens, which takes the place of a key. Source: the
/// provider's Python SDK 2.78 (the first message of a dialogue).
#[must_use]
pub fn brings_token(message: &[u8]) -> bool {
    const NAME: &str = "single_use_token";
    let members = serde_json::from_slice::<Map<String, Value>>(message).unwrap_or_default();
    members.get(NAME).and_then(Value::as_str).is_some_and(|token| !token.is_empty())
}

/// A blank text opens a context and is not spoken.
fn spoken(text: &str) -> u64 {
    if text.trim().is_empty() { 0 } else { text.chars().count() as u64 }
}

/// Bytes of a second of sound in a format that a query names. Source: `AudioFormat` of the provider's
/// Python SDK 2.78; samples of 16 bits, and of 8 in µ-law.
#[must_use]
pub fn audio_bytes_per_second(format: Option<&str>) -> u64 {
    const DEFAULT: u64 = 16_000 * 2;
    let Some((coding, rate)) = format.and_then(|format| format.split_once('_')) else { return DEFAULT };
    let Some(rate) = rate.parse::<u64>().ok().filter(|rate| (1..=384_000).contains(rate)) else {
        return DEFAULT;
    };
    match coding {
        "pcm" => rate * 2,
        "ulaw" | "alaw" => rate,
        _ => DEFAULT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(dialect: Dialect, message: &str, characters: u64, audio_bytes: u64) {
        assert_eq!(say(dialect, message.as_bytes()), Said { characters, audio_bytes }, "{message}");
    }

    #[test]
    fn the_characters_of_a_text_are_counted() {
        check(Dialect::Speech, r#"{"text":"Hell\u00f6 "}"#, 6, 0);
        check(Dialect::Speech, r#"{"text":" ","xi_api_key":"k"}"#, 0, 0);
        check(Dialect::Speech, r#"{"text":""}"#, 0, 0);
        check(Dialect::SpeechContexts, r#"{"text":null,"context_id":"a","flush":true}"#, 0, 0);
        check(
            Dialect::Dialogue,
            r#"{"inputs":[{"text":"ab","voice_id":"v"},{"text":"c"}],"voices":["v"]}"#,
            3,
            0,
        );
        check(Dialect::Speech, r#"{"text":"","text":"last"}"#, 4, 0);
        check(Dialect::Speech, r#"{"text":"still","inputs":0}"#, 5, 0);
        check(Dialect::Speech, r#"{"text":"hi","seed":NaN}"#, 24, 0);
        check(Dialect::Agent, r#"{"type":"user_message","text":"hello"}"#, 0, 0);
    }

    #[test]
    fn the_bytes_of_a_sound_are_counted() {
        check(Dialect::Transcription, r#"{"message_type":"input_audio_chunk","audio_base_64":"AAAA"}"#, 0, 3);
        check(Dialect::Transcription, r#"{"audio_base_64":"AA==","commit":true}"#, 0, 1);
        check(Dialect::Transcription, r#"{"audio_base_64":""}"#, 0, 0);
    }

    #[test]
    fn a_format_has_its_rate() {
        for (format, expected) in [
            (Some("pcm_16000"), 32_000),
            (Some("pcm_8000"), 16_000),
            (Some("pcm_48000"), 96_000),
            (Some("ulaw_8000"), 8_000),
            (Some("pcm_0"), 32_000),
            (Some("opus"), 32_000),
            (None, 32_000),
        ] {
            assert_eq!(audio_bytes_per_second(format), expected, "{format:?}");
        }
    }
}
