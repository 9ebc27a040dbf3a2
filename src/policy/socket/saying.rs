//! What a client says on a socket, as far as the pool and the books want to know: how much of it will
//! be spoken, or how long the sound is that is to be written down. Texts are counted and never kept.

use std::borrow::Cow;

use serde::Deserialize;

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

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    inputs: Option<Vec<Line<'a>>>,
    #[serde(borrow, default)]
    audio_base_64: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow, default)]
    text: Option<Cow<'a, str>>,
}

/// What a whole text message of a client asks for. One that cannot be read asks for nothing: the
/// provider does not read it either.
#[must_use]
pub fn say(dialect: Dialect, message: &[u8]) -> Said {
    let has_figures = dialect.is_spoken() || dialect == Dialect::Transcription;
    if !has_figures || message.len() > SAID_BYTES_MAX {
        return Said::default();
    }
    let Ok(message) = serde_json::from_slice::<Message<'_>>(message) else { return Said::default() };
    if dialect == Dialect::Transcription {
        let coded = message.audio_base_64.map_or(0, |sound| sound.trim_end_matches('=').len());
        return Said { audio_bytes: coded as u64 * 3 / 4, characters: 0 };
    }
    let lines = message.inputs.into_iter().flatten().map(|line| line.text);
    let texts = lines.chain([message.text]).flatten();
    Said { characters: texts.map(|text| spoken(&text)).sum(), audio_bytes: 0 }
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
        check(Dialect::Speech, "{", 0, 0);
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
