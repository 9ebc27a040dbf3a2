//! Executes speech, dialogue, sound effects and transcription over HTTP, and estimates the cost in scripted refusals.
//! The checks have the provider's order: the schema of the body, the key, its permission, the bill, the requested
//! format and objects, credits and concurrency.

use serde_json::{Map, Value, json};

use crate::clock;

use super::accounts::Refusal;
use super::context::{GeneratedAudio, OperationContext, required_string, string_field};
use super::models::Model;
use super::provider::PresentedKey;
use super::query::query_value;
use super::refusal::RefusalKind;
use super::response::{ProviderResponse, new_trace_id};
use super::response_body::ResponseBody;
use super::route::SpeechOutput;
use super::sound::melody::Melody;
use super::sound::{Sound, to_seconds};
use super::speech::{character_count, content_type, speech_body, whole_body};
use super::tokens::TokenScope;

/// Credits for a sound effect without a requested length (the provider's documentation, 2026).
const EFFECT_AUTO_CREDITS: u64 = 100;
/// Credits per second of a sound effect with a requested length.
const EFFECT_CREDITS_PER_SECOND: u64 = 20;
/// The length of a sound effect without a requested length.
const EFFECT_AUTO_MS: u64 = 5_000;

/// A parsed request for speech.
#[derive(Debug)]
struct SpeechRequest {
    /// The text. For a dialogue, it consists of the texts of all inputs in order.
    text: String,
    voices: Vec<String>,
    model: String,
    /// The earlier requests that this request continues (request stitching).
    continued_requests: Vec<String>,
}

impl SpeechRequest {
    fn parse(body: &Map<String, Value>, voice: &str) -> Result<Self, Refusal> {
        let text = required_string(body, "text")?;
        let model = string_field(body, "model_id")?.unwrap_or_else(|| "eleven_multilingual_v2".to_owned());
        let continued_requests = ["previous_request_ids", "next_request_ids"]
            .into_iter()
            .filter_map(|field| body.get(field).and_then(Value::as_array))
            .flatten()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect();
        Ok(Self { text, voices: vec![voice.to_owned()], model, continued_requests })
    }

    fn parse_dialogue(body: &Map<String, Value>) -> Result<Self, Refusal> {
        let missing_inputs = || RefusalKind::FieldMissing("inputs".into());
        let inputs = body.get("inputs").and_then(Value::as_array).ok_or_else(missing_inputs)?;
        let model = string_field(body, "model_id")?.unwrap_or_else(|| "eleven_v3".to_owned());
        let (mut text, mut voices) = (String::new(), Vec::new());
        for input in inputs {
            let input = input.as_object().ok_or_else(missing_inputs)?;
            text.push_str(&required_string(input, "text")?);
            voices.push(required_string(input, "voice_id")?);
        }
        Ok(Self { text, voices, model, continued_requests: Vec::new() })
    }
}

impl OperationContext<'_> {
    /// Estimates the cost of the request from the text in its body, for scripted refusals that contain the cost. The
    /// estimate is at least 1, even if the body is invalid.
    pub(super) fn estimate_cost(&self) -> u64 {
        let request = self.json_object().and_then(|body| {
            SpeechRequest::parse(&body, "").or_else(|_| SpeechRequest::parse_dialogue(&body))
        });
        let Ok(request) = request else { return 1 };
        let characters = character_count(&request.text);
        Model::find(&request.model).map_or(characters, |model| model.cost(characters)).max(1)
    }

    /// Responds to `POST /v1/text-to-speech/{voice_id}` and its variants.
    pub(super) fn serve_speech(
        &self,
        voice: &str,
        output: SpeechOutput,
    ) -> Result<ProviderResponse, Refusal> {
        self.generate_speech(SpeechRequest::parse(&self.json_object()?, voice)?, output)
    }

    /// Responds to `POST /v1/text-to-dialogue` and its variants.
    pub(super) fn serve_dialogue(&self, output: SpeechOutput) -> Result<ProviderResponse, Refusal> {
        self.generate_speech(SpeechRequest::parse_dialogue(&self.json_object()?)?, output)
    }

    fn generate_speech(
        &self,
        request: SpeechRequest,
        output: SpeechOutput,
    ) -> Result<ProviderResponse, Refusal> {
        let key_index = self.require_payer("text_to_speech")?;
        let format = self.requested_format(key_index)?;
        let voice_name = self.find_voices(key_index, &request)?;
        self.check_continued_requests(key_index, &request)?;
        let cost = self.speech_cost(key_index, &request)?;
        let (admission, slot) = self.provider.admit(key_index, cost)?;

        let body = speech_body(&request.text, format, output).with_slot(slot);
        let audio = GeneratedAudio {
            voice_id: request.voices.join(","),
            voice_name,
            model_id: request.model,
            text: request.text,
            format,
        };
        let response = self.record_audio(key_index, &admission, audio, content_type(output, format))?;
        Ok(response.with_body(body))
    }

    /// Returns the names of the requested voices, and refuses a voice that the workspace may not use.
    fn find_voices(&self, key_index: usize, request: &SpeechRequest) -> Result<String, Refusal> {
        let state = self.provider.state();
        let names = request.voices.iter().map(|voice| state.accounts.find_voice(key_index, voice));
        Ok(names.collect::<Result<Vec<_>, _>>()?.join(", "))
    }

    /// Refuses to continue a request that is not in the history of the same workspace.
    fn check_continued_requests(&self, key_index: usize, request: &SpeechRequest) -> Result<(), Refusal> {
        let state = self.provider.state();
        let history = &state.accounts.workspace(key_index)?.history;
        match request.continued_requests.iter().find(|id| !history.has_request(id)) {
            Some(unknown_id) => Err(Refusal::with_subject(RefusalKind::UnknownRequest, unknown_id)),
            None => Ok(()),
        }
    }

    /// Returns the cost of speech, and refuses a model or a text that the plan does not allow.
    fn speech_cost(&self, key_index: usize, request: &SpeechRequest) -> Result<u64, Refusal> {
        let model = Model::find(&request.model)
            .ok_or_else(|| Refusal::with_subject(RefusalKind::ModelNotFound, &request.model))?;
        let state = self.provider.state();
        let plan = &state.accounts.workspace(key_index)?.plan;
        plan.check_model(model)?;
        if request.text.is_empty() {
            return Err(RefusalKind::EmptyText.into());
        }
        let characters = character_count(&request.text);
        plan.check_length(model, characters)?;
        Ok(model.cost(characters))
    }

    /// Responds to `POST /v1/sound-generation`.
    pub(super) fn serve_sound_effect(&self) -> Result<ProviderResponse, Refusal> {
        let body = self.json_object()?;
        let text = required_string(&body, "text")?;
        let requested_seconds = body.get("duration_seconds").and_then(Value::as_f64);
        let key_index = self.require_payer("sound_generation")?;
        let format = self.requested_format(key_index)?;
        // The provider allows 0.5 to 30 seconds (OpenAPI document).
        let requested_ms = requested_seconds.map(|seconds| to_milliseconds(seconds.clamp(0.5, 30.0)));
        let cost =
            requested_ms.map_or(EFFECT_AUTO_CREDITS, |ms| (ms * EFFECT_CREDITS_PER_SECOND).div_ceil(1_000));
        let (_, slot) = self.provider.admit(key_index, cost)?;
        let melody = Melody::with_duration(&text, requested_ms.unwrap_or(EFFECT_AUTO_MS));
        let body = whole_body(Sound::new(melody, format)).with_slot(slot);
        Ok(ProviderResponse::empty(format.content_type()).with_cost(cost).with_body(body))
    }

    /// Returns the index of the key that pays for a transcription. A token takes precedence over the key of the head
    /// (the Python SDK 2.78), and is consumed.
    fn require_transcription_payer(&self) -> Result<usize, RefusalKind> {
        let mut payer_context = *self;
        if let Some(token) = query_value(self.query, "token") {
            let mut state = self.provider.state();
            let key_index = state.tokens.consume(&token, &TokenScope::BatchScribe, clock::now());
            payer_context.presented_key = PresentedKey::Known(key_index.ok_or(RefusalKind::InvalidKey)?);
        }
        payer_context.require_payer("speech_to_text")
    }

    /// Responds to `POST /v1/speech-to-text`. The transcript depends on the length of the upload, not on its content. A
    /// second costs one credit.
    pub(super) fn serve_transcription(&self) -> Result<ProviderResponse, Refusal> {
        if !self.received.has_model_id_part {
            return Err(RefusalKind::FieldMissing("model_id".into()).into());
        }
        let key_index = self.require_transcription_payer()?;
        let seconds = self.uploaded_seconds();
        let (_, slot) = self.provider.admit(key_index, seconds)?;
        let body = ResponseBody::whole(transcript_document(seconds).to_string().into()).with_slot(slot);
        Ok(ProviderResponse::empty("application/json").with_cost(seconds).with_body(body))
    }
}

/// Converts seconds to milliseconds. The caller has limited the seconds to half a minute.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the caller clamps the seconds, so that the result fits"
)]
fn to_milliseconds(seconds: f64) -> u64 {
    (seconds * 1_000.0).round() as u64
}

/// Creates the `SpeechToTextChunkResponseModel` of the OpenAPI document. It always contains the same words,
/// spread evenly over the duration.
fn transcript_document(duration_secs: u64) -> Value {
    const WORDS: [&str; 9] = ["The", " ", "simulator", " ", "hears", " ", "you", " ", "well."];
    let total_ms = duration_secs.saturating_mul(1_000);
    let time = |index: u64| to_seconds(total_ms.saturating_mul(index) / WORDS.len() as u64);
    let words = WORDS.iter().zip(0..).map(|(text, index)| {
        json!({
            "text": text,
            "start": time(index),
            "end": time(index + 1),
            "type": if *text == " " { "spacing" } else { "word" },
            "speaker_id": "speaker_0",
            "logprob": -0.01,
        })
    });
    json!({
        "language_code": "eng",
        "language_probability": 0.98,
        "text": WORDS.concat(),
        "words": words.collect::<Vec<_>>(),
        "transcription_id": new_trace_id(),
        "audio_duration_secs": to_seconds(total_ms),
    })
}
