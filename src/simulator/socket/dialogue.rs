//! `/v1/text-to-dialogue/stream-input` and `…/multi-stream-input`: lines of several voices, grouped
//! into turns. Separate from `speech`, because all messages except those with credentials differ.
//!
//! Sources: the Python SDK 2.78 (all messages), a public issue of a voice framework (repeated names
//! of voices).

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::accounts::Refused;
use super::super::models::Model;
use super::super::shape::Shape;
use super::super::speech::characters_of;
use super::query_value;
use super::refusal;
use super::session_auth::SessionAuth;
use super::voice::{Form, Piece, Voice};
use super::wire::{ClientMessage, SessionEnded, Wire};

/// Maximum voices of a session or a context.
const MAX_VOICES: usize = 10;
/// Maximum contexts of one connection, the same as for speech.
const MAX_CONTEXTS: usize = 5;
/// The inactivity timeout in seconds.
const INACTIVITY_SECONDS: u32 = 20;
/// Characters that are collected before audio is generated. The provider's number is unknown; this
/// is the number of speech.
const BUFFERED_CHARACTERS: u64 = 120;
const DEFAULT_MODEL: &str = "eleven_v3";
/// The model for a single voice. It has the price of the default model.
const CONVERSATIONAL: &str = "eleven_v3_conversational";

/// An audio message, with or without a context.
struct Chunk {
    context: Option<String>,
    is_aligned: bool,
}

impl Form for Chunk {
    fn write(&self, piece: &Piece) -> String {
        let mut message = json!({ "audio": piece.audio });
        if self.is_aligned {
            let (chars, starts, lengths) = piece.times();
            message["alignment"] =
                json!({ "chars": chars, "char_start_times_ms": starts, "char_durations_ms": lengths });
        }
        in_context(message, self.context.as_deref())
    }
}

fn in_context(mut message: Value, context: Option<&str>) -> String {
    if let Some(context) = context {
        message["context_id"] = context.into();
    }
    message.to_string()
}

/// Collected lines of one context.
struct Context {
    voices: Vec<String>,
    text: String,
}

struct Dialogue {
    voice: Voice,
    contexts: BTreeMap<String, Context>,
    has_contexts: bool,
    is_aligned: bool,
    max_voices: usize,
}

/// Serves the session until the client closes it.
pub(super) async fn serve(
    wire: &mut Wire,
    auth: SessionAuth,
    has_contexts: bool,
    text: &str,
) -> SessionEnded {
    match converse(wire, auth, has_contexts, text).await {
        Ok(()) => wire.close(1_000, "").await,
        Err(ended) => ended,
    }
}

async fn converse(
    wire: &mut Wire,
    auth: SessionAuth,
    has_contexts: bool,
    text: &str,
) -> Result<(), SessionEnded> {
    let limit = wire.session.world.socket_second().saturating_mul(INACTIVITY_SECONDS);
    let mut message = next_message(wire, limit).await?;
    let key = auth.authorize(wire, Some(&message)).await?;
    let model = query_value(text, "model_id").unwrap_or_else(|| DEFAULT_MODEL.to_owned());
    if !model.starts_with("eleven_v3") && !model.starts_with("eleven_v4") && Model::find(&model).is_some() {
        let error_text = format!("The model '{model}' does not support dialogue.");
        return Err(wire
            .send_refusal(refusal::dialogue("unsupported_model", &error_text, Some("model_id")))
            .await);
    }
    let priced = if model == CONVERSATIONAL { DEFAULT_MODEL } else { &model };
    let voice = match Voice::new(&wire.session.world, key, priced, text) {
        Ok(voice) => voice,
        Err(refused) => return Err(wire.refuse(&refused).await),
    };
    let is_aligned = query_value(text, "sync_alignment").is_some_and(|value| value == "true");
    let max_voices = if model == CONVERSATIONAL { 1 } else { MAX_VOICES };
    let mut dialogue = Dialogue { voice, contexts: BTreeMap::new(), has_contexts, is_aligned, max_voices };
    while !dialogue.handle(wire, &message).await? {
        message = next_message(wire, limit).await?;
    }
    Ok(())
}

async fn next_message(wire: &mut Wire, limit: Duration) -> Result<Value, SessionEnded> {
    let Some(received) = wire.next(Some(limit)).await? else {
        let message = format!(
            "Have not received a new text input within the timeout of {INACTIVITY_SECONDS} seconds. Streaming input terminated."
        );
        return Err(wire.send_refusal(refusal::dialogue("input_timeout_exceeded", &message, None)).await);
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

fn is_set(message: &Value, name: &str) -> bool {
    message.get(name).and_then(Value::as_bool).unwrap_or(false)
}

fn text_of<'a>(message: &'a Value, name: &str) -> Option<&'a str> {
    message.get(name).and_then(Value::as_str)
}

impl Dialogue {
    /// Handles a message. Returns true after the last message.
    async fn handle(&mut self, wire: &mut Wire, message: &Value) -> Result<bool, SessionEnded> {
        let is_last = is_set(message, "close_socket");
        let id = match text_of(message, "context_id") {
            Some(id) if self.has_contexts => id.to_owned(),
            None if self.has_contexts && !is_last => {
                return Err(
                    refuse(wire, "missing_required_field", "context_id is required.", "context_id").await
                );
            }
            Some(_) | None => String::new(),
        };
        // A message that only closes a context opens none.
        let is_only_last = is_last && message.get("voices").is_none();
        let opens = !self.contexts.contains_key(&id) && !is_only_last;
        if opens {
            self.open(wire, &id, message).await?;
        } else if message.get("voices").is_some_and(|voices| !voices.is_null()) {
            let error_text = "voices can only be set in the first message.";
            return Err(refuse(wire, "invalid_parameters", error_text, "voices").await);
        }
        let inputs = message.get("inputs").and_then(Value::as_array);
        for input in inputs.into_iter().flatten() {
            self.line(wire, &id, input).await?;
        }
        if is_set(message, "flush") {
            self.end_turn(wire, &id).await?;
        } else if self.contexts.get(&id).is_some_and(|open| characters_of(&open.text) >= BUFFERED_CHARACTERS)
        {
            self.speak(wire, &id).await?;
        }
        if self.has_contexts && is_set(message, "close_context") {
            self.close(wire, &id).await?;
        }
        if is_last {
            let open: Vec<String> = self.contexts.keys().cloned().collect();
            for id in open {
                self.close(wire, &id).await?;
            }
        }
        Ok(is_last)
    }

    async fn open(&mut self, wire: &mut Wire, id: &str, message: &Value) -> Result<(), SessionEnded> {
        if self.contexts.len() == MAX_CONTEXTS {
            let error_text = format!(
                "Maximum simultaneous contexts per WebSocket connection exceeded ({MAX_CONTEXTS}). Please close an existing context before opening a new one."
            );
            return Err(wire
                .send_refusal(refusal::dialogue("max_active_conversations", &error_text, None))
                .await);
        }
        let voices = message.get("voices").and_then(Value::as_array);
        let voices: Vec<String> =
            voices.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
        if voices.is_empty() || voices.len() > self.max_voices {
            let error_text = format!("The first message must name 1 to {} voices.", self.max_voices);
            return Err(refuse(wire, "missing_required_field", &error_text, "voices").await);
        }
        if let Err(refused) = self.voice.find(&wire.session.world, &voices) {
            return Err(wire.refuse(&refused).await);
        }
        self.contexts.insert(id.to_owned(), Context { voices, text: String::new() });
        Ok(())
    }

    /// Adds a line. If the line ends a turn, the turn is spoken first.
    async fn line(&mut self, wire: &mut Wire, id: &str, input: &Value) -> Result<(), SessionEnded> {
        let (Some(text), Some(voice)) = (text_of(input, "text"), text_of(input, "voice_id")) else {
            return Err(refuse(
                wire,
                "missing_required_field",
                "An input has a text and a voice_id.",
                "inputs",
            )
            .await);
        };
        if !self.contexts.get(id).is_some_and(|open| open.voices.iter().any(|known| known == voice)) {
            let error_text = format!("The voice '{voice}' was not named in the first message.");
            return Err(refuse(wire, "invalid_voice_id", &error_text, "inputs").await);
        }
        if is_set(input, "new_turn") {
            self.end_turn(wire, id).await?;
        }
        if let Some(open) = self.contexts.get_mut(id) {
            open.text.push_str(text);
        }
        Ok(())
    }

    /// Speaks the collected lines. Returns false if there are none.
    async fn speak(&mut self, wire: &mut Wire, id: &str) -> Result<bool, SessionEnded> {
        let Some(open) = self.contexts.get_mut(id) else { return Ok(false) };
        let text = std::mem::take(&mut open.text);
        let context = self.has_contexts.then(|| id.to_owned());
        let chunk = Chunk { context, is_aligned: self.is_aligned };
        self.voice.speak(wire, &text, &chunk).await?;
        Ok(!text.is_empty())
    }

    async fn end_turn(&mut self, wire: &mut Wire, id: &str) -> Result<(), SessionEnded> {
        if self.speak(wire, id).await? {
            let context = self.has_contexts.then_some(id);
            wire.send(in_context(json!({ "is_final_audio_for_turn": true }), context)).await?;
        }
        Ok(())
    }

    async fn close(&mut self, wire: &mut Wire, id: &str) -> Result<(), SessionEnded> {
        self.end_turn(wire, id).await?;
        self.contexts.remove(id);
        let context = self.has_contexts.then_some(id);
        wire.send(in_context(json!({ "is_final": true }), context)).await
    }
}

async fn refuse(wire: &mut Wire, error: &str, message: &str, param: &str) -> SessionEnded {
    wire.send_refusal(refusal::dialogue(error, message, Some(param))).await
}
