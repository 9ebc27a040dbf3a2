//! Parses requests for music, and creates the responses: the duration of a song, its description, and the multipart
//! body of the description and the audio.

use serde_json::{Map, Value, json};

use super::accounts::Refusal;
use super::context::{OperationContext, string_field};
use super::refusal::RefusalKind;
use super::response::{ProviderResponse, new_trace_id};
use super::response_body::ResponseBody;
use super::sound::Sound;
use super::sound::format::Format;

/// The minimum and maximum duration (OpenAPI document: `music_length_ms` is 3 to 600 seconds).
const DURATION_MS: std::ops::RangeInclusive<u64> = 3_000..=600_000;
/// The duration if the request does not contain one.
const DEFAULT_DURATION_MS: u64 = 10_000;

/// Adds the song's ID, and records the cost. A music response does not report the cost in a header
/// (captured, October 2026).
pub(super) fn with_song_id_and_cost(response: ProviderResponse, cost: u64) -> ProviderResponse {
    ProviderResponse { charged: cost, ..response.with_header("song-id", &new_trace_id()) }
}

/// Parses the body, which must contain at least one of `alternatives`. The refusal names the first of these fields.
pub(super) fn parse_body(
    context: OperationContext<'_>,
    alternatives: &[&'static str],
) -> Result<Map<String, Value>, Refusal> {
    let body = context.json_object()?;
    // The prompt must be a string. Its text is not needed.
    string_field(&body, "prompt")?;
    if alternatives.iter().all(|field| body.get(*field).is_none_or(Value::is_null)) {
        let first = alternatives.first().copied().unwrap_or_default();
        return Err(RefusalKind::FieldMissing(first.into()).into());
    }
    Ok(body)
}

/// Returns the requested duration, or the default, within the minimum and maximum.
pub(super) fn duration_ms(body: &Map<String, Value>) -> u64 {
    let requested_ms = body.get("music_length_ms").and_then(Value::as_u64);
    requested_ms.unwrap_or(DEFAULT_DURATION_MS).clamp(*DURATION_MS.start(), *DURATION_MS.end())
}

/// Creates the `MusicPrompt` of the OpenAPI document.
pub(super) fn composition_plan(body: &Map<String, Value>) -> Value {
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

/// The boundary between the parts of the multipart body.
pub(super) const BOUNDARY: &str = "simulated-song";

/// Creates the multipart body: a JSON part and an audio part.
pub(super) fn multipart_body(
    request_body: &Map<String, Value>,
    sound: Sound,
    format: Format,
) -> ResponseBody {
    let metadata = json!({
        "composition_plan": composition_plan(request_body),
        "song_metadata": {
            "title": "A melody",
            "description": null,
            "genres": [],
            "languages": [],
            "is_explicit": false,
        },
    });
    let head = format!(
        "--{BOUNDARY}\r\nContent-Type: application/json\r\n\r\n{metadata}\r\n\
         --{BOUNDARY}\r\nContent-Type: {}\r\nContent-Disposition: attachment; filename=\"song\"\r\n\r\n",
        format.content_type()
    );
    let tail = format!("\r\n--{BOUNDARY}--\r\n");
    let parts = std::iter::once(head.into()).chain(sound.into_blocks()).chain(std::iter::once(tail.into()));
    ResponseBody::generated(None, parts)
}
