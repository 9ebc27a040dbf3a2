//! Speech responses: the audio as a whole, in chunks, or as JSON with the times of the characters.
//! All forms are generated while they are sent.

use bytes::Bytes;
use serde_json::{Value, json};

use super::answer::AnswerBody;
use super::route::Form;
use super::sound::format::Format;
use super::sound::melody::Melody;
use super::sound::{Sound, seconds};

/// The length of a chunk. Even short texts have several chunks.
const STREAM_CHUNK_MS: u64 = 100;
/// Characters per object of a stream with timestamps.
const TIMED_CHUNK_CHARACTERS: u64 = 10;

/// The media type of the response.
pub(super) fn media_type(form: Form, format: Format) -> &'static str {
    match form {
        Form::Whole | Form::Stream => format.content_type(),
        // The OpenAPI document has the same media type for the stream of objects and the single
        // object.
        Form::TimedWhole | Form::TimedStream => "application/json",
    }
}

/// A response body with the whole sound and its length.
pub(super) fn whole(sound: Sound) -> AnswerBody {
    AnswerBody::pieces(Some(sound.bytes_total), sound.into_blocks())
}

/// A response body with the sound in chunks.
pub(super) fn streamed(mut sound: Sound) -> AnswerBody {
    let mut until_ms = 0;
    AnswerBody::pieces(
        None,
        std::iter::from_fn(move || {
            until_ms += STREAM_CHUNK_MS;
            sound.until(until_ms)
        }),
    )
}

/// A response body with `text` as audio in the requested form.
pub(super) fn speech_body(text: &str, format: Format, form: Form) -> AnswerBody {
    let melody = Melody::of(text);
    let mut sound = Sound::of(melody.clone(), format);
    match form {
        Form::Whole => whole(sound),
        Form::Stream => streamed(sound),
        Form::TimedWhole => {
            let alignment = alignment(text, &melody, 0..characters_of(text));
            let tail = format!("\",\"alignment\":{alignment},\"normalized_alignment\":{alignment}}}");
            let mut base64 = Base64::default();
            let mut blocks = Some(sound.into_blocks());
            let head = std::iter::once(Bytes::from_static(b"{\"audio_base64\":\""));
            let audio = std::iter::from_fn(move || {
                let Some(block) = blocks.as_mut()?.next() else {
                    blocks = None;
                    return Some(base64.finish());
                };
                Some(base64.push(&block))
            });
            AnswerBody::pieces(None, head.chain(audio).chain(std::iter::once(tail.into())))
        }
        Form::TimedStream => {
            let text = text.to_owned();
            let total = characters_of(&text);
            let mut from = 0;
            AnswerBody::pieces(
                None,
                std::iter::from_fn(move || {
                    if from >= total {
                        return None;
                    }
                    let to = (from + TIMED_CHUNK_CHARACTERS).min(total);
                    let mut audio = Vec::new();
                    let until_ms = if to == total { u64::MAX } else { melody.starts_ms(to) };
                    if let Some(bytes) = sound.until(until_ms) {
                        audio.extend_from_slice(&bytes);
                    }
                    let alignment = alignment(&text, &melody, from..to);
                    from = to;
                    let audio = base64(&audio);
                    let object = json!({
                        "audio_base64": audio, "alignment": alignment, "normalized_alignment": alignment,
                    });
                    Some(Bytes::from(format!("{object}\n")))
                }),
            )
        }
    }
}

/// `CharacterAlignmentResponseModel` of the OpenAPI document, in seconds from the beginning.
fn alignment(text: &str, melody: &Melody, range: std::ops::Range<u64>) -> Value {
    let skipped = usize::try_from(range.start).unwrap_or(usize::MAX);
    let time = |index: u64| seconds(melody.starts_ms(index));
    let characters: Vec<String> =
        text.chars().skip(skipped).zip(range.clone()).map(|(character, _)| character.to_string()).collect();
    json!({
        "characters": characters,
        "character_start_times_seconds": range.clone().map(time).collect::<Vec<_>>(),
        "character_end_times_seconds": range.map(|index| time(index + 1)).collect::<Vec<_>>(),
    })
}

/// The number of Unicode scalar values, which the provider counts as characters.
pub(super) fn characters_of(text: &str) -> u64 {
    u64::try_from(text.chars().count()).unwrap_or(u64::MAX)
}

/// Encodes data in base64.
pub(super) fn base64(bytes: &[u8]) -> String {
    let mut base64 = Base64::default();
    String::from_utf8([base64.push(bytes), base64.finish()].concat()).unwrap_or_default()
}

/// A base64 encoder of data that arrives in pieces.
#[derive(Debug, Default)]
struct Base64 {
    /// Less than three bytes, which are encoded together with the next piece.
    remainder: Vec<u8>,
}

impl Base64 {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

    fn push(&mut self, bytes: &[u8]) -> Bytes {
        self.remainder.extend_from_slice(bytes);
        let whole = self.remainder.len() / 3 * 3;
        let text: Vec<u8> = self.remainder[..whole].chunks_exact(3).flat_map(Self::digits).collect();
        self.remainder.drain(..whole);
        text.into()
    }

    fn finish(&mut self) -> Bytes {
        let missing = match self.remainder.len() {
            1 => 2,
            2 => 1,
            _ => return Bytes::new(),
        };
        self.remainder.resize(3, 0);
        let mut text = Self::digits(&self.remainder);
        self.remainder.clear();
        text[4 - missing..].fill(b'=');
        Bytes::copy_from_slice(&text)
    }

    fn digits(three: &[u8]) -> [u8; 4] {
        let bits = three.iter().fold(0_usize, |bits, byte| bits << 8 | usize::from(*byte));
        [18, 12, 6, 0].map(|shift| Self::DIGITS[bits >> shift & 63])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_64_is_the_same_however_the_bytes_are_split() {
        for (text, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
        ] {
            for size in 1..=6 {
                let mut base64 = Base64::default();
                let mut out: Vec<u8> =
                    text.as_bytes().chunks(size).flat_map(|chunk| base64.push(chunk)).collect();
                out.extend_from_slice(&base64.finish());
                assert_eq!(String::from_utf8(out).unwrap(), expected);
            }
        }
    }

    #[test]
    fn the_alignment_ends_where_the_sound_ends() {
        let text = "Hello, world";
        let melody = Melody::of(text);
        let document = alignment(text, &melody, 0..12);
        assert_eq!(document["characters"].as_array().unwrap().len(), 12);
        assert_eq!(document["character_start_times_seconds"][0], 0.0);
        assert_eq!(document["character_end_times_seconds"][11], 0.72);
        assert_eq!(alignment(text, &melody, 10..12)["characters"], json!(["l", "d"]));
    }
}
