//! Executes the operations that a table defines: changed voices, cleaned audio, dubbing, music, alignment and the
//! studio. The table lists the method, the path, the permission, the form parts, the price and the output of each
//! operation.
//!
//! Sources: the OpenAPI document (paths, parts, responses), the documentation and price lists of
//! 2026 (credits per minute). The length of an upload follows a rule of the simulator, see `context`.

use http::Method;
use serde_json::{Map, Value, json};

use crate::clock;

use super::accounts::Refusal;
use super::context::{GeneratedAudio, OperationContext};
use super::music;
use super::refusal::{RefusalKind, fixed_refusal};
use super::resources::{Resource, ResourceKind};
use super::response::{ProviderResponse, new_trace_id};
use super::response_body::ResponseBody;
use super::sound::format::Format;
use super::sound::melody::Melody;
use super::sound::{Sound, to_seconds};
use super::speech::{streamed_body, whole_body};

/// A row of the table: one operation.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct OperationRow {
    method: &'static str,
    /// The path segments, in which `{}` stands for an identifier.
    path: &'static str,
    permission: &'static str,
    /// The form parts that a request must have.
    required_parts: &'static [&'static str],
    price: Price,
    output: Output,
}

/// The price of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Price {
    Free,
    /// Credits per minute of the upload.
    UploadedMinute(u64),
    /// Credits per minute of the requested music.
    MusicMinute(u64),
}

/// The content of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    /// Audio of the upload's length in another voice.
    Voice(AudioTransfer),
    /// Audio of the upload's length without noise.
    Audio(AudioTransfer),
    Music(AudioTransfer),
    /// The music with its description, as two parts.
    DetailedMusic,
    CompositionPlan,
    Alignment,
    CreatedResource(ResourceKind),
    ResourceList(ResourceKind),
    Resource(ResourceKind),
    DeletedResource(ResourceKind),
    DubbedAudio,
}

/// The transfer of the audio in a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AudioTransfer {
    /// The response declares the length of its body.
    Whole,
    /// The body of the response is chunked.
    Streamed,
}

const fn operation(
    method: &'static str,
    path: &'static str,
    permission: &'static str,
    required_parts: &'static [&'static str],
    price: Price,
    output: Output,
) -> OperationRow {
    OperationRow { method, path, permission, required_parts, price, output }
}

/// The table of operations. Changed voices and cleaned audio cost 1,000 credits per minute (the documentation). The
/// costs of the other operations are converted from the price lists.
#[rustfmt::skip] // a table with one operation per line
const OPERATIONS: &[OperationRow] = {
    use AudioTransfer::{Streamed, Whole};
    use Output::{
        Alignment, Audio, CompositionPlan, CreatedResource, DeletedResource, DetailedMusic, DubbedAudio, Music,
        Resource, ResourceList, Voice,
    };
    use ResourceKind::{Dubbing, Project};
    use Price::{Free, MusicMinute, UploadedMinute};
    const MINUTE: Price = UploadedMinute(1_000);
    const MUSIC: Price = MusicMinute(3_000);
    &[
        operation("POST", "v1/speech-to-speech/{}", "speech_to_speech", &["audio"], MINUTE, Voice(Whole)),
        operation("POST", "v1/speech-to-speech/{}/stream", "speech_to_speech", &["audio"], MINUTE, Voice(Streamed)),
        operation("POST", "v1/voice-changer/{}", "speech_to_speech", &["audio"], MINUTE, Voice(Whole)),
        operation("POST", "v1/voice-changer/{}/stream", "speech_to_speech", &["audio"], MINUTE, Voice(Streamed)),
        operation("POST", "v1/audio-isolation", "audio_isolation", &["audio"], MINUTE, Audio(Whole)),
        operation("POST", "v1/audio-isolation/stream", "audio_isolation", &["audio"], MINUTE, Audio(Streamed)),
        operation("POST", "v1/dubbing", "dubbing_write", &["target_lang"], UploadedMinute(3_000), CreatedResource(Dubbing)),
        operation("GET", "v1/dubbing", "dubbing_read", &[], Free, ResourceList(Dubbing)),
        operation("GET", "v1/dubbing/{}", "dubbing_read", &[], Free, Resource(Dubbing)),
        operation("DELETE", "v1/dubbing/{}", "dubbing_write", &[], Free, DeletedResource(Dubbing)),
        operation("GET", "v1/dubbing/{}/audio/{}", "dubbing_read", &[], Free, DubbedAudio),
        operation("POST", "v1/music", "music_generation", &[], MUSIC, Music(Whole)),
        operation("POST", "v1/music/stream", "music_generation", &[], MUSIC, Music(Streamed)),
        operation("POST", "v1/music/detailed", "music_generation", &[], MUSIC, DetailedMusic),
        operation("POST", "v1/music/plan", "music_generation", &[], Free, CompositionPlan),
        operation("POST", "v1/forced-alignment", "forced_alignment", &["file", "text"], UploadedMinute(60), Alignment),
        operation("POST", "v1/studio/projects", "projects_write", &["name"], Free, CreatedResource(Project)),
        operation("GET", "v1/studio/projects", "projects_read", &[], Free, ResourceList(Project)),
        operation("GET", "v1/studio/projects/{}", "projects_read", &[], Free, Resource(Project)),
        operation("DELETE", "v1/studio/projects/{}", "projects_write", &[], Free, DeletedResource(Project)),
    ]
};

/// Maximum length of audio that is generated from an upload, which bounds the size of the response.
const MAX_GENERATED_MS: u64 = 60_000;
/// The model in the history of a changed voice.
const VOICE_CHANGER_MODEL: &str = "eleven_multilingual_sts_v2";

impl OperationRow {
    /// Finds the operation of a method and a path. Returns the operation and the identifiers in the path.
    ///
    /// # Errors
    ///
    /// Returns the provider's 404 or 405 refusal.
    pub(super) fn find(
        method: &Method,
        segments: &[&str],
    ) -> Result<(&'static Self, Vec<String>), RefusalKind> {
        let mut allowed_method = None;
        for operation in OPERATIONS {
            let Some(ids) = operation.match_path(segments) else { continue };
            if operation.method == method.as_str() {
                return Ok((operation, ids));
            }
            allowed_method.get_or_insert(operation.method);
        }
        Err(allowed_method.map_or(RefusalKind::NotFound, RefusalKind::MethodNotAllowed))
    }

    /// Returns the identifiers in a path of this operation. Returns `None` for the path of another operation.
    fn match_path(&self, segments: &[&str]) -> Option<Vec<String>> {
        if self.path.split('/').count() != segments.len() {
            return None;
        }
        let mut ids = Vec::new();
        for (expected, segment) in self.path.split('/').zip(segments) {
            if expected == "{}" {
                ids.push((*segment).to_owned());
            } else if expected != *segment {
                return None;
            }
        }
        Some(ids)
    }

    /// Returns the cost of a request, derived from its body.
    pub(super) fn cost(&self, context: OperationContext<'_>) -> u64 {
        match self.price {
            Price::Free => 0,
            Price::UploadedMinute(credits) => context.uploaded_seconds().saturating_mul(credits).div_ceil(60),
            Price::MusicMinute(credits) => {
                let body = context.json_object().unwrap_or_default();
                music::duration_ms(&body).saturating_mul(credits).div_ceil(60_000)
            }
        }
    }

    /// Executes the operation, with the identifiers `ids` of the path.
    pub(super) fn execute(
        &self,
        context: OperationContext<'_>,
        ids: &[String],
    ) -> Result<ProviderResponse, Refusal> {
        if let Some(missing) = self.required_parts.iter().find(|part| !context.received.has_form_part(part)) {
            return Err(RefusalKind::FieldMissing((*missing).into()).into());
        }
        let body = match self.output {
            Output::Music(_) | Output::DetailedMusic => {
                music::parse_body(context, &["prompt", "composition_plan"])?
            }
            Output::CompositionPlan => music::parse_body(context, &["prompt"])?,
            Output::Voice(_)
            | Output::Audio(_)
            | Output::Alignment
            | Output::CreatedResource(_)
            | Output::ResourceList(_)
            | Output::Resource(_)
            | Output::DeletedResource(_)
            | Output::DubbedAudio => Map::new(),
        };
        let key_index = if self.price == Price::Free {
            context.require_permission(self.permission)?
        } else {
            context.require_payer(self.permission)?
        };
        let id = ids.first().map_or("", String::as_str);
        let cost = self.cost(context);
        let duration_ms = match self.price {
            Price::MusicMinute(_) => music::duration_ms(&body),
            Price::Free | Price::UploadedMinute(_) => generated_ms(context.uploaded_seconds()),
        };
        let sound = |format| Sound::new(Melody::with_duration(self.path, duration_ms), format);
        match self.output {
            Output::Voice(transfer) => {
                let format = context.requested_format(key_index)?;
                let voice_name = context.provider.state().accounts.find_voice(key_index, id)?;
                let (admission, slot) = context.provider.admit(key_index, cost)?;
                let audio = GeneratedAudio {
                    voice_id: id.to_owned(),
                    voice_name,
                    model_id: VOICE_CHANGER_MODEL.to_owned(),
                    text: String::new(),
                    format,
                };
                let response = context.record_audio(key_index, &admission, audio, format.content_type())?;
                Ok(response.with_body(transfer.create_body(sound(format)).with_slot(slot)))
            }
            Output::Audio(transfer) => {
                let (_, slot) = context.provider.admit(key_index, cost)?;
                let body = transfer.create_body(sound(Format::DEFAULT)).with_slot(slot);
                Ok(ProviderResponse::empty("audio/mpeg").with_cost(cost).with_body(body))
            }
            Output::Music(transfer) => {
                let format = context.requested_format(key_index)?;
                let (_, slot) = context.provider.admit(key_index, cost)?;
                let response =
                    music::with_song_id_and_cost(ProviderResponse::empty(format.content_type()), cost);
                Ok(response.with_body(transfer.create_body(sound(format)).with_slot(slot)))
            }
            Output::DetailedMusic => {
                let format = context.requested_format(key_index)?;
                let (_, slot) = context.provider.admit(key_index, cost)?;
                let content_type = format!("multipart/mixed; boundary={}", music::BOUNDARY);
                let response = music::with_song_id_and_cost(ProviderResponse::empty(&content_type), cost);
                Ok(response.with_body(music::multipart_body(&body, sound(format), format).with_slot(slot)))
            }
            Output::CompositionPlan => Ok(ProviderResponse::document(&music::composition_plan(&body))),
            Output::Alignment => {
                let text = context.received.form_part("text").unwrap_or_default();
                let (_, slot) = context.provider.admit(key_index, cost)?;
                let document = alignment_document(&text, duration_ms).to_string();
                let body = ResponseBody::whole(document.into()).with_slot(slot);
                Ok(ProviderResponse::empty("application/json").with_cost(cost).with_body(body))
            }
            Output::CreatedResource(kind) => create_resource(context, key_index, kind, cost),
            Output::ResourceList(kind) => list_resources(context, key_index, kind),
            Output::Resource(kind) => {
                let mut state = context.provider.state();
                let resource = state.accounts.workspace_mut(key_index)?.resources.find(kind, id)?;
                resource.status_requests = resource.status_requests.saturating_add(1);
                Ok(ProviderResponse::document(&resource.document()))
            }
            Output::DubbedAudio => {
                read_dubbed_audio(context, key_index, id, ids.get(1).map_or("", String::as_str))
            }
            Output::DeletedResource(kind) => {
                context.provider.state().accounts.workspace_mut(key_index)?.resources.delete(kind, id)?;
                Ok(ProviderResponse::document(&json!({ "status": "ok" })))
            }
        }
    }
}

impl AudioTransfer {
    fn create_body(self, sound: Sound) -> ResponseBody {
        match self {
            AudioTransfer::Whole => whole_body(sound),
            AudioTransfer::Streamed => streamed_body(sound),
        }
    }
}

/// Returns the length of audio that is generated from an upload.
fn generated_ms(uploaded_seconds: u64) -> u64 {
    uploaded_seconds.saturating_mul(1_000).min(MAX_GENERATED_MS)
}

/// Creates a dubbing or a project from the form, and charges its cost.
fn create_resource(
    context: OperationContext<'_>,
    key_index: usize,
    kind: ResourceKind,
    cost: u64,
) -> Result<ProviderResponse, Refusal> {
    // A real dubbing takes longer than the request. Here the slot is released with the response.
    let (_, _slot) = context.provider.admit(key_index, cost)?;
    let resource = Resource {
        kind,
        id: new_trace_id().get(12..).unwrap_or_default().to_owned(),
        name: context.received.form_part("name").unwrap_or_else(|| "Untitled".to_owned()),
        language: context.received.form_part("target_lang").unwrap_or_default(),
        upload_seconds: context.uploaded_seconds(),
        created_unix: clock::now().0 / 1_000,
        status_requests: 0,
    };
    let document = match kind {
        ResourceKind::Dubbing => {
            json!({ "dubbing_id": resource.id, "expected_duration_sec": resource.upload_seconds })
        }
        ResourceKind::Project => json!({ "project": resource.document() }),
    };
    context.provider.state().accounts.workspace_mut(key_index)?.resources.add(resource);
    Ok(ProviderResponse { charged: cost, ..ProviderResponse::document(&document) })
}

fn list_resources(
    context: OperationContext<'_>,
    key_index: usize,
    kind: ResourceKind,
) -> Result<ProviderResponse, Refusal> {
    let state = context.provider.state();
    let resources = state.accounts.workspace(key_index)?.resources.documents(kind);
    Ok(ProviderResponse::document(&match kind {
        ResourceKind::Dubbing => json!({ "dubs": resources, "next_cursor": null, "has_more": false }),
        ResourceKind::Project => json!({ "projects": resources }),
    }))
}

/// Returns the audio of the dubbing `id` in a language, if the dubbing is done and has this language.
fn read_dubbed_audio(
    context: OperationContext<'_>,
    key_index: usize,
    id: &str,
    language: &str,
) -> Result<ProviderResponse, Refusal> {
    let mut state = context.provider.state();
    let dubbing = state.accounts.workspace_mut(key_index)?.resources.find(ResourceKind::Dubbing, id)?;
    if dubbing.language != language {
        return Err(Refusal::with_subject(fixed_refusal("dubbing_language_not_found"), language));
    }
    if !dubbing.is_dubbed() {
        return Err(fixed_refusal("dubbing_not_dubbed").into());
    }
    let melody = Melody::with_duration(language, generated_ms(dubbing.upload_seconds));
    let body = whole_body(Sound::new(melody, Format::DEFAULT));
    Ok(ProviderResponse::empty("audio/mpeg").with_body(body))
}

/// Creates the `ForcedAlignmentResponseModel` of the OpenAPI document, in which all characters have the same duration.
fn alignment_document(text: &str, duration_ms: u64) -> Value {
    let characters: Vec<char> = text.chars().collect();
    let character_count = u64::try_from(characters.len()).unwrap_or(u64::MAX).max(1);
    let time = |index: u64| to_seconds(duration_ms.saturating_mul(index) / character_count);
    let timed_characters = (0..).zip(&characters).map(|(index, character)| {
        json!({ "text": character.to_string(), "start": time(index), "end": time(index + 1) })
    });
    let mut words = Vec::new();
    let mut index = 0;
    for word in text.split(' ') {
        let end = index + u64::try_from(word.chars().count()).unwrap_or(0);
        words.push(json!({ "text": word, "start": time(index), "end": time(end), "loss": 0.1 }));
        index = end + 1;
    }
    json!({ "characters": timed_characters.collect::<Vec<_>>(), "words": words, "loss": 0.1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_methods_and_identifiers_are_distinguished() {
        let find = |method: Method, path: &str| {
            let segments: Vec<&str> = path.split('/').collect();
            OperationRow::find(&method, &segments).map(|(operation, ids)| (operation.output, ids))
        };
        let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            find(Method::GET, "v1/dubbing"),
            Ok((Output::ResourceList(ResourceKind::Dubbing), ids(&[])))
        );
        assert_eq!(
            find(Method::DELETE, "v1/dubbing/d"),
            Ok((Output::DeletedResource(ResourceKind::Dubbing), ids(&["d"])))
        );
        assert_eq!(find(Method::GET, "v1/dubbing/d/audio/de"), Ok((Output::DubbedAudio, ids(&["d", "de"]))));
        assert_eq!(find(Method::PUT, "v1/dubbing/d"), Err(RefusalKind::MethodNotAllowed("GET")));
        assert_eq!(find(Method::GET, "v1/music"), Err(RefusalKind::MethodNotAllowed("POST")));
        for path in ["v1/dubbing/d/audio", "v1/musics", "v1", ""] {
            assert_eq!(
                find(Method::GET, path),
                Err(RefusalKind::NotFound),
                "no operation must have the path {path:?}"
            );
        }
    }

    #[test]
    fn an_alignment_covers_the_text() {
        let document = alignment_document("ab c", 1_000);
        assert_eq!(document["characters"].as_array().unwrap().len(), 4);
        assert_eq!(document["words"][1], json!({ "text": "c", "start": 0.75, "end": 1.0, "loss": 0.1 }));
        assert_eq!(alignment_document("", 1_000)["characters"], json!([]));
    }
}
