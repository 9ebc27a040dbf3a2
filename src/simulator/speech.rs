//! Creates the bodies of speech responses: the audio as a whole, in chunks, or as JSON with the times of the
//! characters. The bodies are generated while they are sent. Other operations use the bodies with audio only.

use std::iter;

use bytes::Bytes;
use serde_json::{Value, json};

use super::base64::{Base64Encoder, base64};
use super::response_body::ResponseBody;
use super::route::SpeechOutput;
use super::sound::format::Format;
use super::sound::melody::Melody;
use super::sound::{Sound, to_seconds};

/// The length of an audio chunk. Even a short text has several chunks.
const STREAM_CHUNK_MS: u64 = 100;
/// Number of characters in an object of a stream with timestamps.
const TIMED_CHUNK_CHARACTERS: u64 = 10;

/// Returns the media type of a speech response.
pub(super) fn content_type(output: SpeechOutput, format: Format) -> &'static str {
    match output {
        SpeechOutput::Whole | SpeechOutput::Stream => format.content_type(),
        // The OpenAPI document has the same media type for the stream of objects and the single
        // object.
        SpeechOutput::TimedWhole | SpeechOutput::TimedStream => "application/json",
    }
}

/// Creates a response body with the whole sound and its length.
pub(super) fn whole_body(sound: Sound) -> ResponseBody {
    ResponseBody::generated(Some(sound.total_bytes), sound.into_blocks())
}

/// Creates a response body with the sound in chunks.
pub(super) fn streamed_body(sound: Sound) -> ResponseBody {
    ResponseBody::generated(None, sound.into_chunks(STREAM_CHUNK_MS))
}

/// Creates a response body with `text` as audio.
pub(super) fn speech_body(text: &str, format: Format, output: SpeechOutput) -> ResponseBody {
    let melody = Melody::new(text);
    let sound = Sound::new(melody.clone(), format);
    match output {
        SpeechOutput::Whole => whole_body(sound),
        SpeechOutput::Stream => streamed_body(sound),
        SpeechOutput::TimedWhole => timed_body(text, &melody, sound),
        SpeechOutput::TimedStream => timed_stream_body(text.to_owned(), melody, sound),
    }
}

/// Creates a body with one JSON object, whose audio is encoded in base64 while it is sent.
fn timed_body(text: &str, melody: &Melody, sound: Sound) -> ResponseBody {
    let alignment = alignment_document(text, melody, 0..character_count(text));
    let tail = format!("\",\"alignment\":{alignment},\"normalized_alignment\":{alignment}}}");
    let mut encoder = Base64Encoder::default();
    let audio = sound.into_blocks().map(Some).chain(iter::once(None)).map(move |block| match block {
        Some(block) => encoder.push(&block),
        None => encoder.finish(),
    });
    let head = iter::once(Bytes::from_static(b"{\"audio_base64\":\""));
    ResponseBody::generated(None, head.chain(audio).chain(iter::once(tail.into())))
}

/// Creates a body with a JSON object for each group of characters.
fn timed_stream_body(text: String, melody: Melody, mut sound: Sound) -> ResponseBody {
    let total = character_count(&text);
    let mut start = 0;
    let objects = iter::from_fn(move || {
        if start >= total {
            return None;
        }
        let end = (start + TIMED_CHUNK_CHARACTERS).min(total);
        let end_ms = if end == total { u64::MAX } else { melody.start_ms(end) };
        let audio = base64(&sound.take_until(end_ms).unwrap_or_default());
        let alignment = alignment_document(&text, &melody, start..end);
        start = end;
        let object = json!({
            "audio_base64": audio, "alignment": alignment, "normalized_alignment": alignment,
        });
        Some(Bytes::from(format!("{object}\n")))
    });
    ResponseBody::generated(None, objects)
}

/// Creates the `CharacterAlignmentResponseModel` of the OpenAPI document for the characters in `range`. Their times are
/// in seconds from the beginning of the audio.
fn alignment_document(text: &str, melody: &Melody, range: std::ops::Range<u64>) -> Value {
    let skipped = usize::try_from(range.start).unwrap_or(usize::MAX);
    let time = |index: u64| to_seconds(melody.start_ms(index));
    let characters: Vec<String> =
        text.chars().skip(skipped).zip(range.clone()).map(|(character, _)| character.to_string()).collect();
    json!({
        "characters": characters,
        "character_start_times_seconds": range.clone().map(time).collect::<Vec<_>>(),
        "character_end_times_seconds": range.map(|index| time(index + 1)).collect::<Vec<_>>(),
    })
}

/// Returns the number of Unicode scalar values, which the provider counts as characters.
pub(super) fn character_count(text: &str) -> u64 {
    u64::try_from(text.chars().count()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alignment_ends_where_the_sound_ends() {
        let text = "Hello, world";
        let melody = Melody::new(text);
        let document = alignment_document(text, &melody, 0..12);
        assert_eq!(document["characters"].as_array().unwrap().len(), 12);
        assert_eq!(document["character_start_times_seconds"][0], 0.0);
        assert_eq!(document["character_end_times_seconds"][11], 0.72);
        assert_eq!(alignment_document(text, &melody, 10..12)["characters"], json!(["l", "d"]));
    }
}
