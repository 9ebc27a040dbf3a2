//! Executes operations that cost credits. Their checks have the provider's order: the body's
//! schema, the key, its permission, the bill, the requested object, credits and concurrency. The
//! audio follows.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use crate::clock;

use super::accounts::{Admitted, Refused};
use super::answer::{Answer, set, trace_id};
use super::history::HistoryItem;
use super::models::Model;
use super::request::{MAX_JSON_BYTES, ReceivedBody};
use super::route::{Form, query};
use super::shape::{Facts, Shape, fixed_refusal};
use super::sound::format::{FORMATS, Format};
use super::sound::melody::Melody;
use super::sound::{Sound, seconds};
use super::speech::{characters_of, media_type, speech_body, whole};
use super::tokens::TokenScope;
use super::world::{Presented, World};

/// Credits of a sound effect without a given length (the provider's documentation, 2026).
const EFFECT_AUTO_CREDITS: u64 = 100;
/// Credits per second of a sound effect with a given length.
const EFFECT_CREDITS_PER_SECOND: u64 = 20;
/// The length of a sound effect without a given length.
const EFFECT_AUTO_MS: u64 = 5_000;
/// A rule of the simulator, because the provider bills the length of the decoded audio: 16,000
/// bytes count as one second (128 kbit/s), rounded up. A second of transcription costs one credit.
pub(super) const UPLOAD_BYTES_PER_SECOND: u64 = 16_000;
/// The value of the concurrency header for a workspace without a limit. The header is always
/// present.
const UNLIMITED: u32 = 1_000_000;

/// A parsed request for speech.
#[derive(Debug)]
struct SpeechRequest {
    /// The text. For a dialogue, all its inputs in order.
    text: String,
    voices: Vec<String>,
    model: String,
    /// Earlier requests that this one continues (request stitching).
    continued_requests: Vec<String>,
}

/// The generated audio, as the history stores it.
#[derive(Debug)]
pub(super) struct GeneratedAudio {
    pub(super) voice_id: String,
    pub(super) voice_name: String,
    pub(super) model_id: String,
    pub(super) text: String,
    pub(super) format: Format,
}

/// The data of one operation.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) world: &'a World,
    pub(super) presented: Presented,
    pub(super) received: &'a ReceivedBody,
    pub(super) query: &'a str,
}

impl Job<'_> {
    /// The paying key. It must have the permission, and its workspace must have paid its bill.
    pub(super) fn payer(&self, permission: &'static str) -> Result<usize, Shape> {
        let key = require_key(self.presented)?;
        let state = self.world.state();
        state.accounts.permit(key, permission)?;
        state.accounts.billing(key)?;
        Ok(key)
    }

    /// The requested audio format. The plan of the key's workspace must include it.
    pub(super) fn format(&self, key: usize) -> Result<Format, Refused> {
        let parameter = query(self.query).find(|(name, _)| name == "output_format");
        let Some((_, name)) = parameter else { return Ok(Format::DEFAULT) };
        let format = Format::named(&name).ok_or_else(|| {
            let known: Vec<_> = FORMATS.iter().map(|format| format.name).collect();
            let message =
                format!("Output format '{name}' is not supported. Supported formats: {}.", known.join(", "));
            Refused::with_subject(Shape::InvalidOutputFormat, message)
        })?;
        self.world.state().accounts.format(key, format)?;
        Ok(format)
    }

    /// Parses the body as a JSON object.
    pub(super) fn object(&self) -> Result<Map<String, Value>, Refused> {
        let Some(kept) = &self.received.kept else {
            let bound = u64::try_from(MAX_JSON_BYTES).unwrap_or(u64::MAX);
            let facts = Facts { bound, ..Facts::default() };
            return Err(Refused { shape: Shape::RequestTooLarge, facts: Box::new(facts) });
        };
        if kept.is_empty() {
            return Ok(Map::new());
        }
        serde_json::from_slice(kept).map_err(|_| Shape::MalformedJson.into())
    }

    fn speech_request(&self, voice: &str) -> Result<SpeechRequest, Refused> {
        let body = self.object()?;
        let text = string(&body, "text")?.ok_or(Shape::FieldMissing("text".into()))?;
        let model = string(&body, "model_id")?.unwrap_or_else(|| "eleven_multilingual_v2".to_owned());
        let requests =
            ["previous_request_ids", "next_request_ids"].into_iter().filter_map(|name| body.get(name));
        let continued_requests = requests.filter_map(Value::as_array).flatten().filter_map(Value::as_str);
        let continued_requests = continued_requests.map(str::to_owned).collect();
        Ok(SpeechRequest { text, voices: vec![voice.to_owned()], model, continued_requests })
    }

    fn dialogue_request(&self) -> Result<SpeechRequest, Refused> {
        let body = self.object()?;
        let inputs = body.get("inputs").and_then(Value::as_array);
        let inputs = inputs.ok_or(Shape::FieldMissing("inputs".into()))?;
        let model = string(&body, "model_id")?.unwrap_or_else(|| "eleven_v3".to_owned());
        let mut request =
            SpeechRequest { text: String::new(), voices: Vec::new(), model, continued_requests: Vec::new() };
        for input in inputs {
            let input = input.as_object().ok_or(Shape::FieldMissing("inputs".into()))?;
            request.text.push_str(&string(input, "text")?.ok_or(Shape::FieldMissing("text".into()))?);
            request.voices.push(string(input, "voice_id")?.ok_or(Shape::FieldMissing("voice_id".into()))?);
        }
        Ok(request)
    }

    /// The cost of the request, for refusals that contain it; 1 if the body does not show it.
    pub(super) fn estimate(&self) -> u64 {
        let Ok(request) = self.speech_request("").or_else(|_| self.dialogue_request()) else { return 1 };
        let characters = characters_of(&request.text);
        Model::find(&request.model).map_or(characters, |model| model.cost(characters)).max(1)
    }

    /// `POST /v1/text-to-speech/{voice_id}` and its variants.
    pub(super) fn speech(&self, voice: &str, form: Form) -> Result<Answer, Refused> {
        let request = self.speech_request(voice)?;
        self.speak(request, form)
    }

    /// `POST /v1/text-to-dialogue` and its variants.
    pub(super) fn dialogue(&self, form: Form) -> Result<Answer, Refused> {
        let request = self.dialogue_request()?;
        self.speak(request, form)
    }

    fn speak(&self, request: SpeechRequest, form: Form) -> Result<Answer, Refused> {
        let key = self.payer("text_to_speech")?;
        let format = self.format(key)?;
        let voice_name = self.voice_names(key, &request)?;
        self.find_requests(key, &request)?;
        let cost = self.price(key, &request)?;
        let (admitted, slot) = self.world.admit(key, cost)?;

        let body = speech_body(&request.text, format, form).with_slot(slot);
        let generated = GeneratedAudio {
            voice_id: request.voices.join(","),
            voice_name,
            model_id: request.model,
            text: request.text,
            format,
        };
        let answer = self.generated(key, &admitted, generated, media_type(form, format));
        Ok(Answer { body, ..answer })
    }

    /// The head of a response whose audio is added to the history.
    pub(super) fn generated(
        &self,
        key: usize,
        admitted: &Admitted,
        generated: GeneratedAudio,
        media_type: &str,
    ) -> Answer {
        let trace_id = trace_id();
        let GeneratedAudio { voice_id, voice_name, model_id, text, format } = generated;
        let item = HistoryItem {
            // The end of the trace id, which has random digits. The provider's ids have this
            // length, too.
            id: trace_id.get(12..).unwrap_or(&trace_id).to_owned(),
            request_id: super::answer::trace_id(),
            voice_id,
            voice_name,
            model_id,
            text,
            format,
            date_unix: clock::now().0 / 1_000,
            used_before: admitted.used_before,
            used_after: admitted.used_before + admitted.cost,
        };
        let mut answer = Answer::empty(&trace_id, media_type);
        set(&mut answer.headers, "request-id", &item.request_id);
        set(&mut answer.headers, "history-item-id", &item.id);
        speech_headers(&mut answer, admitted);
        answer.charged = admitted.cost;
        if let Some(workspace) = self.world.state().accounts.workspace_mut(key) {
            workspace.history.add(item);
        }
        answer
    }

    fn voice_names(&self, key: usize, request: &SpeechRequest) -> Result<String, Refused> {
        let state = self.world.state();
        let names = request.voices.iter().map(|voice| state.accounts.voice(key, voice));
        Ok(names.collect::<Result<Vec<_>, _>>()?.join(", "))
    }

    /// Checks the continued requests: they must be requests of the same workspace.
    fn find_requests(&self, key: usize, request: &SpeechRequest) -> Result<(), Refused> {
        let state = self.world.state();
        let has = |id: &String| {
            state.accounts.workspace(key).is_some_and(|workspace| workspace.history.has_request(id))
        };
        match request.continued_requests.iter().find(|id| !has(id)) {
            Some(unknown) => Err(Refused::with_subject(Shape::UnknownRequest, unknown)),
            None => Ok(()),
        }
    }

    fn price(&self, key: usize, request: &SpeechRequest) -> Result<u64, Refused> {
        let model = Model::find(&request.model)
            .ok_or_else(|| Refused::with_subject(Shape::ModelNotFound, &request.model))?;
        let state = self.world.state();
        state.accounts.model(key, model)?;
        if request.text.is_empty() {
            return Err(Shape::EmptyText.into());
        }
        let characters = characters_of(&request.text);
        state.accounts.length(key, model, characters)?;
        Ok(model.cost(characters))
    }

    /// `POST /v1/sound-generation`.
    pub(super) fn sound_effect(&self) -> Result<Answer, Refused> {
        let body = self.object()?;
        let text = string(&body, "text")?.ok_or(Shape::FieldMissing("text".into()))?;
        let seconds = body.get("duration_seconds").and_then(Value::as_f64);
        let key = self.payer("sound_generation")?;
        let format = self.format(key)?;
        // The provider allows 0.5 to 30 seconds (OpenAPI document).
        let requested_ms = seconds.map(|seconds| milliseconds(seconds.clamp(0.5, 30.0)));
        let cost =
            requested_ms.map_or(EFFECT_AUTO_CREDITS, |ms| (ms * EFFECT_CREDITS_PER_SECOND).div_ceil(1_000));
        let (_, slot) = self.world.admit(key, cost)?;
        let sound = Sound::of(Melody::lasting(&text, requested_ms.unwrap_or(EFFECT_AUTO_MS)), format);
        let mut answer = Answer::empty(&trace_id(), format.content_type());
        set(&mut answer.headers, "character-cost", &cost.to_string());
        answer.charged = cost;
        answer.body = whole(sound).with_slot(slot);
        Ok(answer)
    }

    /// The key that pays for a transcription. A token takes precedence over the key of the head
    /// (the Python SDK 2.78), and is consumed.
    fn transcriber(&self) -> Result<usize, Shape> {
        let Some((_, token)) = query(self.query).find(|(name, _)| name == "token") else {
            return self.payer("speech_to_text");
        };
        let key = self.world.state().tokens.take(&token, &TokenScope::BatchScribe, clock::now());
        Job { presented: Presented::Known(key.ok_or(Shape::InvalidKey)?), ..*self }.payer("speech_to_text")
    }

    /// `POST /v1/speech-to-text`. The transcript depends on the length of the upload, not on its
    /// content.
    pub(super) fn transcription(&self) -> Result<Answer, Refused> {
        if !self.received.names_model {
            return Err(Shape::FieldMissing("model_id".into()).into());
        }
        let key = self.transcriber()?;
        let seconds = self.received.bytes.div_ceil(UPLOAD_BYTES_PER_SECOND).max(1);
        let (_, slot) = self.world.admit(key, seconds)?;
        let mut answer = Answer::document(&transcript(seconds));
        set(&mut answer.headers, "character-cost", &seconds.to_string());
        answer.charged = seconds;
        answer.body = answer.body.with_slot(slot);
        Ok(answer)
    }
}

/// The index of the presented key, or the refusal of an invalid one.
pub(super) fn require_key(presented: Presented) -> Result<usize, Shape> {
    match presented {
        Presented::Known(key) => Ok(key),
        Presented::Unknown => Err(Shape::InvalidKey),
        Presented::OtherRegion => Err(fixed_refusal("wrong_host")),
        Presented::Nothing => Err(Shape::NeedsAuthorization),
    }
}

/// An optional string field. Any other type is refused by the schema.
pub(super) fn string(body: &Map<String, Value>, field: &'static str) -> Result<Option<String>, Shape> {
    match body.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            Err(Shape::NotAString(field.into()))
        }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to half a minute")]
fn milliseconds(seconds: f64) -> u64 {
    (seconds * 1_000.0).round() as u64
}

/// Sets the headers of a successful speech response (captured responses of August 2026).
fn speech_headers(answer: &mut Answer, admitted: &Admitted) {
    let running = admitted.running.to_string();
    let headers = &mut answer.headers;
    set(headers, "character-cost", &admitted.cost.to_string());
    set(headers, "current-concurrent-requests", &running);
    set(headers, "workspace-concurrent-requests", &running);
    set(headers, "maximum-concurrent-requests", &admitted.running_max.unwrap_or(UNLIMITED).to_string());
    set(headers, "tts-latency-ms", "75");
    set(headers, "collect-preference", "false");
    set(headers, "vary", "Accept-Language");
    set(headers, "access-control-allow-origin", "*");
    set(headers, "access-control-allow-headers", "*");
    set(headers, "access-control-allow-methods", "POST, PATCH, OPTIONS, DELETE, GET, PUT");
    set(headers, "access-control-max-age", "600");
    set(
        headers,
        "access-control-expose-headers",
        "request-id, history-item-id, tts-latency-ms, character-cost, current-concurrent-requests, \
         maximum-concurrent-requests, workspace-concurrent-requests, regeneration-count, generation-info, \
         x-region, x-trace-id",
    );
}

/// `SpeechToTextChunkResponseModel` of the OpenAPI document. It always contains the same words,
/// spread evenly over the time.
fn transcript(duration_secs: u64) -> Value {
    const WORDS: [&str; 5] = ["The", "simulator", "hears", "you", "well."];
    let total_ms = duration_secs.saturating_mul(1_000);
    // Nine slots: five words and four gaps between them.
    let time = |slot: u64| seconds(total_ms.saturating_mul(slot) / 9);
    let mut text = String::new();
    let mut words = Vec::new();
    for (slot, word) in (0..).step_by(2).zip(WORDS) {
        if slot > 0 {
            text.push(' ');
            words.push(transcript_word(" ", "spacing", time(slot - 1), time(slot)));
        }
        // Writing to a string cannot fail.
        let _written = write!(text, "{word}");
        words.push(transcript_word(word, "word", time(slot), time(slot + 1)));
    }
    json!({
        "language_code": "eng",
        "language_probability": 0.98,
        "text": text,
        "words": words,
        "transcription_id": trace_id(),
        "audio_duration_secs": seconds(total_ms),
    })
}

fn transcript_word(text: &str, kind: &str, start: f64, end: f64) -> Value {
    json!({ "text": text, "start": start, "end": end, "type": kind, "speaker_id": "speaker_0", "logprob": -0.01 })
}
