//! Determines the data rate of the audio in which a client sends speech to a transcription session. The duration of the
//! audio, and thus its cost, follows from its bytes and this rate.

/// Returns the bytes per second of audio in the format that a query names. Returns the rate of the provider's default
/// format (PCM of 16 kHz) if the query names no format or an unknown format. PCM has samples of 16 bits, and µ-law and
/// A-law have samples of 8 bits.
///
/// Source: `AudioFormat` of the provider's Python SDK 2.78.
#[must_use]
pub fn audio_bytes_per_second(format: Option<&str>) -> u64 {
    const DEFAULT_RATE: u64 = 16_000 * 2;
    const MAX_SAMPLE_RATE: u64 = 384_000;
    let Some((coding, sample_rate)) = format.and_then(|format| format.split_once('_')) else {
        return DEFAULT_RATE;
    };
    let Some(sample_rate) =
        sample_rate.parse::<u64>().ok().filter(|rate| (1..=MAX_SAMPLE_RATE).contains(rate))
    else {
        return DEFAULT_RATE;
    };
    match coding {
        "pcm" => sample_rate * 2,
        "ulaw" | "alaw" => sample_rate,
        _ => DEFAULT_RATE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_determines_the_data_rate() {
        for (format, expected) in [
            (Some("pcm_16000"), 32_000),
            (Some("pcm_8000"), 16_000),
            (Some("pcm_48000"), 96_000),
            (Some("ulaw_8000"), 8_000),
            (Some("pcm_0"), 32_000),
            (Some("opus"), 32_000),
            (None, 32_000),
        ] {
            assert_eq!(audio_bytes_per_second(format), expected, "{format:?} must have its data rate");
        }
    }
}
