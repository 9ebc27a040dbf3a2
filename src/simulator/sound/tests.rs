//! Tests the length, the pitch, the pauses and the headers of the generated audio, and the equality of melodies. An
//! independent decoder decodes MP3, and G.711 samples are compared with the tables of the standard.

use symphonia::core::codecs::audio::AudioDecoderOptions;
use symphonia::core::errors::Error;
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::{FormatOptions, TrackType};
use symphonia::core::io::MediaSourceStream;
use symphonia::core::meta::MetadataOptions;

use super::Sound;
use super::format::{Codec, Coding, Container, FORMATS, Format};
use super::melody::Melody;
use super::samples::{a_law, mu_law};

const TEXT: &str = "The choir sings, and every key holds its note.";

/// Returns the encoded melody of a text.
fn encode(text: &str, format: Format) -> Vec<u8> {
    let sound = Sound::new(Melody::new(text), format);
    let expected_bytes = sound.total_bytes;
    let bytes: Vec<u8> = sound.into_blocks().flatten().collect();
    let byte_count = u64::try_from(bytes.len()).unwrap();
    assert_eq!(byte_count, expected_bytes, "{} must have the length that was reported before", format.name);
    bytes
}

/// Returns the output of an independent decoder: the sample rate and the samples.
fn decode(mp3: Vec<u8>) -> (u32, Vec<f32>) {
    let stream = MediaSourceStream::new(Box::new(std::io::Cursor::new(mp3)), Default::default());
    let mut reader = symphonia::default::get_probe()
        .probe(&Hint::new(), stream, FormatOptions::default(), MetadataOptions::default())
        .unwrap();
    let track = reader.default_track(TrackType::Audio).unwrap();
    let parameters = track.codec_params.as_ref().unwrap().audio().unwrap();
    let sample_rate = parameters.sample_rate.unwrap();
    let mut decoder = symphonia::default::get_codecs()
        .make_audio_decoder(parameters, &AudioDecoderOptions::default())
        .unwrap();
    let mut samples = Vec::new();
    let mut block = Vec::new();
    loop {
        let packet = match reader.next_packet() {
            Ok(Some(packet)) => packet,
            Ok(None) => break,
            Err(Error::IoError(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => break,
            Err(error) => panic!("the stream cannot be read: {error}"),
        };
        let audio = decoder.decode(&packet).unwrap();
        assert_eq!(audio.spec().channels().count(), 1);
        audio.copy_to_vec_interleaved::<f32>(&mut block);
        samples.extend_from_slice(&block);
    }
    (sample_rate, samples)
}

fn peak_level(samples: &[f32]) -> f32 {
    samples.iter().fold(0.0, |max, sample| max.max(sample.abs()))
}

#[test]
fn every_mp3_format_decodes_to_audible_sound_of_the_expected_length() {
    for format in FORMATS {
        let Codec::Mp3 { sample_rate, .. } = format.codec else { continue };
        let (decoded_rate, samples) = decode(encode(TEXT, format));
        assert_eq!(decoded_rate, sample_rate, "{} must have its sample rate", format.name);
        let frame_samples = if sample_rate >= 32_000 { 1_152 } else { 576 };
        let expected = TEXT.chars().count() * 60 * usize::try_from(sample_rate).unwrap() / 1_000;
        assert!(
            samples.len().abs_diff(expected) <= frame_samples,
            "{} must have about {expected} samples: {}",
            format.name,
            samples.len()
        );
        let level = peak_level(&samples);
        assert!((0.05..=1.0).contains(&level), "{} must be audible: {level}", format.name);
    }
}

/// Returns the frequency of the decoded note of a word.
fn pitch_of(word: &str, format: &str) -> f64 {
    let (sample_rate, samples) = decode(encode(word, Format::find(format).unwrap()));
    let crossings = samples.windows(2).filter(|pair| pair[0] < 0.0 && pair[1] >= 0.0).count();
    crossings as f64 * f64::from(sample_rate) / samples.len() as f64
}

#[test]
fn words_are_different_notes_of_the_scale() {
    for format in ["mp3_44100_128", "mp3_24000_48", "mp3_22050_32"] {
        let low = pitch_of("abracadabracadabraca", format);
        let high = pitch_of("supercalifragilistic", format);
        assert!((low - high).abs() > 30.0, "the notes must differ in {format}: {low} Hz, {high} Hz");
        assert!(
            (230.0..720.0).contains(&low) && (230.0..720.0).contains(&high),
            "the notes must be in the scale in {format}: {low} Hz, {high} Hz"
        );
    }
}

#[test]
fn a_pause_is_silent() {
    let pauses = " ".repeat(20);
    let (_, samples) = decode(encode(&pauses, Format::DEFAULT));
    assert!(peak_level(&samples) < 1e-6);
    assert!(encode(&pauses, Format::find("pcm_16000").unwrap()).iter().all(|byte| *byte == 0));
}

#[test]
fn samples_last_as_long_as_the_text() {
    for format in FORMATS {
        let Codec::Samples { sample_rate, coding, container } = format.codec else { continue };
        let bytes = encode(TEXT, format);
        let header_bytes = if container == Container::Wave { 44 } else { 0 };
        let bytes_per_sample = if coding == Coding::Linear { 2 } else { 1 };
        let expected = TEXT.chars().count() * 60 * usize::try_from(sample_rate).unwrap() / 1_000;
        let sample_count = (bytes.len() - header_bytes) / bytes_per_sample;
        assert_eq!(sample_count, expected, "{} must last as long as the text", format.name);
    }
}

#[test]
fn the_header_of_a_wave_file_matches_its_samples() {
    let bytes = encode("hello", Format::find("wav_24000").unwrap());
    assert_eq!(&bytes[..4], b"RIFF");
    assert_eq!(u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize, bytes.len() - 8);
    assert_eq!(&bytes[8..16], b"WAVEfmt ");
    assert_eq!(u32::from_le_bytes(bytes[24..28].try_into().unwrap()), 24_000);
    assert_eq!(u32::from_le_bytes(bytes[40..44].try_into().unwrap()) as usize, bytes.len() - 44);
}

#[test]
fn a_sound_lasts_60_ms_per_character_and_at_least_300_ms() {
    for (text, ms) in [("", 300), ("a", 300), ("aaaaa", 300), ("aaaaaa", 360), ("日本語 日本語", 420)] {
        assert_eq!(Melody::new(text).duration_ms, ms, "the melody of {text:?} must have this length");
    }
}

#[test]
fn the_last_frame_ends_where_the_sound_ends() {
    for format in FORMATS {
        let last_frame = Sound::new(Melody::new(TEXT), format).frames.last().unwrap();
        let duration = Melody::new(TEXT).duration_ms;
        let end_ms = last_frame.end_ms;
        assert!(end_ms.abs_diff(duration) <= 27, "{} must end after {duration} ms: {end_ms}", format.name);
    }
}

#[test]
fn telephony_samples_match_the_tables_of_the_standard() {
    // Values of the G.711 tables: silence, both extremes, and a step between them.
    for (sample, mu_law_code, a_law_code) in [
        (0, 0xff, 0xd5),
        (i16::MAX, 0x80, 0xaa),
        (i16::MIN, 0x00, 0x2a),
        (1_000, 0xce, 0xfa),
        (-1_000, 0x4e, 0x7a),
    ] {
        assert_eq!(
            (mu_law(sample), a_law(sample)),
            (mu_law_code, a_law_code),
            "{sample} must have the codes of the tables"
        );
    }
}

#[test]
fn equal_texts_have_equal_melodies() {
    assert_eq!(encode(TEXT, Format::DEFAULT), encode(TEXT, Format::DEFAULT));
    assert_ne!(encode(TEXT, Format::DEFAULT), encode(&TEXT.replace("choir", "crowd"), Format::DEFAULT));
}
