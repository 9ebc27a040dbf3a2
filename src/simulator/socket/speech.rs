//! `/v1/text-to-speech/{voice_id}/stream-input` and `…/multi-stream-input`: receives text in
//! pieces, collects it until the text is long enough, and sends it as audio. With contexts, one
//! connection collects several texts in parallel.
//!
//! Sources: the Python SDK 2.78 (all messages, and the times at which text is spoken), its public
//! issues and those of two voice frameworks (the texts of the refusals).

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::super::accounts::Refused;
use super::super::shape::Shape;
use super::super::speech::characters_of;
use super::query_value;
use super::refusal;
use super::session_auth::SessionAuth;
use super::voice::{Form, PIECE_CHARACTERS, Piece, Voice};
use super::wire::{ClientMessage, SessionEnded, Wire};

/// Characters that are collected before the first, second, third and each later audio.
const SCHEDULE: [u64; 4] = [120, 160, 250, 290];
/// The minimum and maximum of values that a client sets instead.
const MIN_SCHEDULE: u64 = 50;
const MAX_SCHEDULE: u64 = 500;
/// Maximum contexts of one connection.
const MAX_CONTEXTS: usize = 5;
/// The default inactivity timeout in seconds, and its maximum.
const INACTIVITY_SECONDS: u32 = 20;
const MAX_INACTIVITY_SECONDS: u32 = 180;
/// The name of a context without a name.
const DEFAULT_CONTEXT: &str = "default";
/// The model if the query contains none (the documentation).
const DEFAULT_MODEL: &str = "eleven_multilingual_v2";

/// `AudioOutput`, and with contexts `AudioOutputMulti`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Output<'a> {
    audio: Option<&'a str>,
    is_final: Option<bool>,
    normalized_alignment: Option<Value>,
    alignment: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    context_id: Option<&'a str>,
}

/// An audio message, with or without a context.
struct Chunk {
    context_id: Option<String>,
}

impl Form for Chunk {
    fn write(&self, piece: &Piece) -> String {
        let alignment = Some(piece.alignment());
        output(&Output {
            audio: Some(&piece.audio),
            is_final: None,
            normalized_alignment: alignment.clone(),
            alignment,
            context_id: self.context_id.as_deref(),
        })
    }
}

/// Collected text of one context.
struct Context {
    text: String,
    /// Characters to collect before each audio. The last number repeats.
    schedule: Vec<u64>,
    audio_count: usize,
}

/// The state of the session.
struct Speech {
    voice: Voice,
    contexts: BTreeMap<String, Context>,
    has_contexts: bool,
    /// Whether each message is spoken immediately.
    is_auto: bool,
}

/// Serves the session until the client ends the text.
pub(super) async fn serve(
    wire: &mut Wire,
    auth: SessionAuth,
    voice: String,
    has_contexts: bool,
    text: &str,
) -> SessionEnded {
    match converse(wire, auth, voice, has_contexts, text).await {
        Ok(()) => wire.close(1_000, "").await,
        Err(ended) => ended,
    }
}

async fn converse(
    wire: &mut Wire,
    auth: SessionAuth,
    voice: String,
    has_contexts: bool,
    text: &str,
) -> Result<(), SessionEnded> {
    let seconds = query_value(text, "inactivity_timeout")
        .and_then(|text| text.parse().ok())
        .unwrap_or(INACTIVITY_SECONDS);
    let seconds: u32 = u32::clamp(seconds, 1, MAX_INACTIVITY_SECONDS);
    let limit = wire.session.world.socket_second().saturating_mul(seconds);
    let first = next_message(wire, limit, seconds).await?;
    let key = auth.authorize(wire, Some(&first)).await?;
    let model = query_value(text, "model_id").unwrap_or_else(|| DEFAULT_MODEL.to_owned());
    let voice_check = Voice::new(&wire.session.world, key, &model, text);
    let voice_check = match voice_check {
        Ok(speaker) => speaker.find(&wire.session.world, &[voice]).map(|()| speaker),
        Err(refused) => Err(refused),
    };
    let voice = match voice_check {
        Ok(voice) => voice,
        Err(refused) => return Err(wire.refuse(&refused).await),
    };
    let is_auto = query_value(text, "auto_mode").is_some_and(|value| value == "true");
    let mut speech = Speech { voice, contexts: BTreeMap::new(), has_contexts, is_auto };
    let mut message = first;
    while !speech.handle(wire, &message).await? {
        message = next_message(wire, limit, seconds).await?;
    }
    Ok(())
}

fn is_set(message: &Value, name: &str) -> bool {
    message.get(name).and_then(Value::as_bool).unwrap_or(false)
}

/// The next message, which must be an object.
async fn next_message(wire: &mut Wire, limit: Duration, seconds: u32) -> Result<Value, SessionEnded> {
    let Some(received) = wire.next(Some(limit)).await? else {
        let message = format!(
            "Have not received a new text input within the timeout of {seconds} seconds. Streaming input terminated. Please make sure to either feed the input in the timely manner, or to send the end of input text (empty string \"\") when done."
        );
        return Err(wire.send_refusal(refusal::speech("input_timeout_exceeded", &message)).await);
    };
    let message = match &received {
        ClientMessage::Text(text) => serde_json::from_str(text).ok().filter(Value::is_object),
        ClientMessage::Binary(_) => None,
    };
    match message {
        Some(message) => Ok(message),
        None => Err(wire.refuse(&Refused::from(Shape::MalformedJson)).await),
    }
}

impl Speech {
    /// Handles a message. Returns true after the last message.
    async fn handle(&mut self, wire: &mut Wire, message: &Value) -> Result<bool, SessionEnded> {
        let id = match ["context_id", "contextId"].iter().find_map(|name| message.get(name)) {
            Some(Value::String(id)) if self.has_contexts => id.clone(),
            _ => DEFAULT_CONTEXT.to_owned(),
        };
        let text = message.get("text").and_then(Value::as_str);
        if self.has_contexts && is_set(message, "close_socket") {
            let open: Vec<String> = self.contexts.keys().cloned().collect();
            for id in open {
                self.speak(wire, &id).await?;
                self.end(wire, &id).await?;
            }
            return Ok(true);
        }
        if self.has_contexts && is_set(message, "close_context") {
            // Text that was not flushed is dropped.
            if self.contexts.contains_key(&id) {
                self.end(wire, &id).await?;
            }
            return Ok(false);
        }
        if !self.has_contexts && text == Some("") {
            self.speak(wire, &id).await?;
            self.end(wire, &id).await?;
            return Ok(true);
        }
        if !self.contexts.contains_key(&id) {
            if self.contexts.len() == MAX_CONTEXTS {
                let message = format!(
                    "Maximum simultaneous contexts per WebSocket connection exceeded ({MAX_CONTEXTS}). Please close an existing context before opening a new one."
                );
                return Err(wire.send_refusal(refusal::speech("max_active_conversations", &message)).await);
            }
            self.contexts.insert(id.clone(), Context::new(message));
        }
        let is_due = self.contexts.get_mut(&id).is_some_and(|context| {
            context.add(text.unwrap_or_default());
            let buffered = characters_of(&context.text);
            let is_triggered =
                is_set(message, "try_trigger_generation") && buffered >= PIECE_CHARACTERS as u64;
            is_set(message, "flush")
                || self.is_auto
                || is_triggered
                || buffered >= context.required_characters()
        });
        if is_due {
            self.speak(wire, &id).await?;
        }
        Ok(false)
    }

    /// Speaks the collected text.
    async fn speak(&mut self, wire: &mut Wire, id: &str) -> Result<(), SessionEnded> {
        let Some(context) = self.contexts.get_mut(id) else { return Ok(()) };
        let text = std::mem::take(&mut context.text);
        context.audio_count += 1;
        let chunk = Chunk { context_id: self.has_contexts.then(|| id.to_owned()) };
        self.voice.speak(wire, &text, &chunk).await
    }

    /// Removes a context and reports its end.
    async fn end(&mut self, wire: &mut Wire, id: &str) -> Result<(), SessionEnded> {
        self.contexts.remove(id);
        let context_id = self.has_contexts.then_some(id);
        let last = Output {
            audio: None,
            is_final: Some(true),
            normalized_alignment: None,
            alignment: None,
            context_id,
        };
        wire.send(output(&last)).await
    }
}

fn output(output: &Output<'_>) -> String {
    // Strings and numbers can always be serialized.
    serde_json::to_string(output).unwrap_or_default()
}

impl Context {
    fn new(message: &Value) -> Self {
        let requested =
            message.get("generation_config").and_then(|config| config.get("chunk_length_schedule"));
        let requested = requested.and_then(Value::as_array).map(|list| {
            let whole = list.iter().filter_map(|length| length.as_u64().or_else(|| whole(length.as_f64()?)));
            whole.map(|length| length.clamp(MIN_SCHEDULE, MAX_SCHEDULE)).take(16).collect::<Vec<_>>()
        });
        let schedule = requested.filter(|list| !list.is_empty()).unwrap_or_else(|| SCHEDULE.to_vec());
        Self { text: String::new(), schedule, audio_count: 0 }
    }

    /// Adds text. The blank in the first message is not part of the text.
    fn add(&mut self, text: &str) {
        if text != " " || self.audio_count > 0 || !self.text.is_empty() {
            self.text.push_str(text);
        }
    }

    fn required_characters(&self) -> u64 {
        let last = self.schedule.last().copied().unwrap_or(MAX_SCHEDULE);
        self.schedule.get(self.audio_count).copied().unwrap_or(last)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to the schedule's bounds"
)]
fn whole(number: f64) -> Option<u64> {
    number.is_finite().then(|| number.clamp(0.0, 500.0).round() as u64)
}
