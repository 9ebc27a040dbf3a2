//! Music responses: their length, their description, and the multipart response with both parts.

use serde_json::{Map, Value, json};

use super::accounts::Refused;
use super::answer::{Answer, AnswerBody, set, trace_id};
use super::job::{Job, string};
use super::shape::Shape;
use super::sound::Sound;
use super::sound::format::Format;

/// The minimum and maximum length (OpenAPI document: `music_length_ms` is 3 to 600 seconds).
const MUSIC_MS: std::ops::RangeInclusive<u64> = 3_000..=600_000;
const DEFAULT_MUSIC_MS: u64 = 10_000;

/// Adds the header of a music response with the song's id. No header contains the cost (captured,
/// October 2026).
pub(super) fn song(mut answer: Answer, cost: u64) -> Answer {
    set(&mut answer.headers, "song-id", &trace_id());
    answer.charged = cost;
    answer
}

/// The body, if it contains one of `members`.
pub(super) fn body_of(job: Job<'_>, members: &[&'static str]) -> Result<Map<String, Value>, Refused> {
    let body = job.object()?;
    string(&body, "prompt")?;
    let is_present = |name: &&&'static str| body.get(**name).is_some_and(|value| !value.is_null());
    match (members.iter().find(is_present), members.first()) {
        (None, Some(first)) => Err(Shape::FieldMissing((*first).into()).into()),
        (Some(_), _) | (None, None) => Ok(body),
    }
}

pub(super) fn duration_ms(body: &Map<String, Value>) -> u64 {
    let requested = body.get("music_length_ms").and_then(Value::as_u64);
    requested.unwrap_or(DEFAULT_MUSIC_MS).clamp(*MUSIC_MS.start(), *MUSIC_MS.end())
}

/// `MusicPrompt` of the OpenAPI document.
pub(super) fn plan_of(body: &Map<String, Value>) -> Value {
    json!({
        "positive_global_styles": ["humming"],
        "negative_global_styles": [],
        "sections": [{
            "section_name": "Melody",
            "positive_local_styles": [],
            "negative_local_styles": [],
            "duration_ms": duration_ms(body),
            "lines": [],
        }],
    })
}

/// The boundary between the parts.
pub(super) const BOUNDARY: &str = "simulated-song";

/// The multipart body: a JSON part and an audio part.
pub(super) fn detailed(body: &Map<String, Value>, sound: Sound, format: Format) -> AnswerBody {
    let metadata = json!({
        "composition_plan": plan_of(body),
        "song_metadata": { "title": "A melody", "description": null, "genres": [], "languages": [], "is_explicit": false },
    });
    let head = format!(
        "--{BOUNDARY}\r\nContent-Type: application/json\r\n\r\n{metadata}\r\n--{BOUNDARY}\r\nContent-Type: {}\r\nContent-Disposition: attachment; filename=\"song\"\r\n\r\n",
        format.content_type()
    );
    let tail = format!("\r\n--{BOUNDARY}--\r\n");
    let parts = std::iter::once(head.into()).chain(sound.into_blocks()).chain(std::iter::once(tail.into()));
    AnswerBody::pieces(None, parts)
}
