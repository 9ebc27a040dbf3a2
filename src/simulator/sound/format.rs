//! Lists the audio formats that a request can name in `output_format`, with their codecs and media types. They are the
//! formats of the OpenAPI document, except Opus, whose encoder would be larger than the simulator.

/// An audio format with its `output_format` name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::simulator) struct Format {
    pub(in crate::simulator) name: &'static str,
    pub(super) codec: Codec,
}

/// The encoder of a format, with its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    /// MPEG Layer III at a constant bit rate.
    Mp3 { sample_rate: u32, kbps: u32 },
    /// One code word per sample.
    Samples { sample_rate: u32, coding: Coding, container: Container },
}

/// The encoding of one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    /// Linear PCM of sixteen bits, little-endian.
    Linear,
    /// G.711 µ-law, the encoding of telephony in North America and Japan.
    MuLaw,
    /// G.711 A-law, the encoding of telephony elsewhere.
    ALaw,
}

/// The header before the samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Container {
    /// The samples have no header.
    Raw,
    /// The samples have a RIFF header of 44 bytes.
    Wave,
}

const fn mp3(name: &'static str, sample_rate: u32, kbps: u32) -> Format {
    Format { name, codec: Codec::Mp3 { sample_rate, kbps } }
}

const fn samples(name: &'static str, sample_rate: u32, coding: Coding, container: Container) -> Format {
    Format { name, codec: Codec::Samples { sample_rate, coding, container } }
}

/// Every format that the simulator can generate.
pub(in crate::simulator) const FORMATS: [Format; 23] = [
    mp3("mp3_22050_32", 22_050, 32),
    mp3("mp3_24000_48", 24_000, 48),
    mp3("mp3_44100_32", 44_100, 32),
    mp3("mp3_44100_64", 44_100, 64),
    mp3("mp3_44100_96", 44_100, 96),
    mp3("mp3_44100_128", 44_100, 128),
    mp3("mp3_44100_192", 44_100, 192),
    samples("pcm_8000", 8_000, Coding::Linear, Container::Raw),
    samples("pcm_16000", 16_000, Coding::Linear, Container::Raw),
    samples("pcm_22050", 22_050, Coding::Linear, Container::Raw),
    samples("pcm_24000", 24_000, Coding::Linear, Container::Raw),
    samples("pcm_32000", 32_000, Coding::Linear, Container::Raw),
    samples("pcm_44100", 44_100, Coding::Linear, Container::Raw),
    samples("pcm_48000", 48_000, Coding::Linear, Container::Raw),
    samples("wav_8000", 8_000, Coding::Linear, Container::Wave),
    samples("wav_16000", 16_000, Coding::Linear, Container::Wave),
    samples("wav_22050", 22_050, Coding::Linear, Container::Wave),
    samples("wav_24000", 24_000, Coding::Linear, Container::Wave),
    samples("wav_32000", 32_000, Coding::Linear, Container::Wave),
    samples("wav_44100", 44_100, Coding::Linear, Container::Wave),
    samples("wav_48000", 48_000, Coding::Linear, Container::Wave),
    samples("ulaw_8000", 8_000, Coding::MuLaw, Container::Raw),
    samples("alaw_8000", 8_000, Coding::ALaw, Container::Raw),
];

impl Format {
    /// The format of a request without `output_format` (OpenAPI document).
    pub(in crate::simulator) const DEFAULT: Format = mp3("mp3_44100_128", 44_100, 128);

    /// Returns the format with the given `name`. Returns `None` if the simulator cannot generate it.
    pub(in crate::simulator) fn find(name: &str) -> Option<Format> {
        FORMATS.into_iter().find(|format| format.name == name)
    }

    /// Returns the media type of a response in this format.
    pub(in crate::simulator) fn content_type(self) -> &'static str {
        match self.codec {
            Codec::Mp3 { .. } => "audio/mpeg",
            Codec::Samples { container: Container::Wave, .. } => "audio/wav",
            Codec::Samples { coding: Coding::Linear, .. } => "audio/pcm",
            Codec::Samples { coding: Coding::MuLaw, .. } => "audio/basic",
            Codec::Samples { coding: Coding::ALaw, .. } => "audio/x-alaw-basic",
        }
    }
}
