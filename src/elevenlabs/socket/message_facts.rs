//! Parses single facts from a client's messages and query: whether a message carries a token in place of
//! a key, and the data rate of its audio.

use serde_json::{Map, Value};

/// Maximum bytes of a message that are searched for identifiers, which appear in short messages.
pub const NAMING_BYTES_MAX: usize = 64 * 1024;

/// Whether a message carries one of the provider's own tokens, which replaces a key. Source: the
/// provider's Python SDK 2.78 (the first message of a dialogue).
#[must_use]
pub fn brings_token(message: &[u8]) -> bool {
    const NAME: &str = "single_use_token";
    let members = serde_json::from_slice::<Map<String, Value>>(message).unwrap_or_default();
    members.get(NAME).and_then(Value::as_str).is_some_and(|token| !token.is_empty())
}

/// Bytes per second of audio in a format that a query names. Source: `AudioFormat` of the provider's
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

    #[test]
    fn an_audio_format_has_its_data_rate() {
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
