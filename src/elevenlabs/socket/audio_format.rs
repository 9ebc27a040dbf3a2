//! Returns the data rate of the audio formats in which a client sends speech.

/// Returns the bytes per second of audio in the format that a query names, or in the provider's default
/// format. PCM has samples of 16 bits, µ-law and A-law of 8 bits.
///
/// Source: `AudioFormat` of the provider's Python SDK 2.78.
#[must_use]
pub fn audio_bytes_per_second(format: Option<&str>) -> u64 {
    const DEFAULT_RATE: u64 = 16_000 * 2;
    let Some((coding, sample_rate)) = format.and_then(|format| format.split_once('_')) else {
        return DEFAULT_RATE;
    };
    let Some(sample_rate) = sample_rate.parse::<u64>().ok().filter(|rate| (1..=384_000).contains(rate))
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
    fn the_data_rate_follows_from_the_format() {
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
