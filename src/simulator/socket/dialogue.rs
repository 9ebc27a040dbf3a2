//! Serves `/v1/text-to-dialogue/stream-input` and `…/multi-stream-input`: collects the lines of several voices, and
//! sends the audio of each turn. A line is a text with its voice, and a flush or a line with `new_turn` ends a turn.
//! The module is separate from `speech`, because all messages except credentials differ.
//!
//! Sources: the Python SDK 2.78 (all messages), a public issue of a voice framework (repeated names
//! of voices).

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::super::models::Model;
use super::super::query::query_value;
use super::super::speech::character_count;
use super::connection::{SessionConnection, SessionEnded};
use super::refusal;
use super::session_auth::SessionAuth;
use super::synthesizer::{AudioSegment, CharacterTimes, Synthesizer};
use super::{MAX_CONTEXTS, context_limit_error, is_set};

/// Maximum number of voices of a session or a context.
const MAX_VOICES: usize = 10;
/// The inactivity timeout in seconds.
const INACTIVITY_SECONDS: u32 = 20;
/// Number of characters that are collected before audio is generated. The provider's number is unknown, so this is the
/// number of the speech WebSockets.
const MIN_SPOKEN_CHARACTERS: u64 = 120;
/// The model if the query contains none.
const DEFAULT_MODEL: &str = "eleven_v3";
/// A model for a single voice, which has the price of the default model.
const CONVERSATIONAL_MODEL: &str = "eleven_v3_conversational";

/// The voices of a context, and its collected lines.
struct DialogueContext {
    voices: Vec<String>,
    text: String,
}

/// The contexts of a session. Without contexts, the session has a single one with an empty name.
struct Dialogue {
    synthesizer: Synthesizer,
    contexts: BTreeMap<String, DialogueContext>,
    has_contexts: bool,
    /// Whether audio messages contain the times of the characters.
    has_alignment: bool,
    max_voices: usize,
}

/// Serves the session until the client closes it.
pub(super) async fn serve(
    connection: &mut SessionConnection,
    auth: SessionAuth,
    has_contexts: bool,
    query: &str,
) -> Result<(), SessionEnded> {
    let mut message = receive_message(connection).await?;
    let key_index = auth.authorize(connection, Some(&message)).await?;
    let model = query_value(query, "model_id").unwrap_or_else(|| DEFAULT_MODEL.to_owned());
    if !model.starts_with("eleven_v3") && !model.starts_with("eleven_v4") && Model::find(&model).is_some() {
        let message = format!("The model '{model}' does not support dialogue.");
        return Err(refuse(connection, "unsupported_model", &message, Some("model_id")).await);
    }
    let (priced_model, max_voices) =
        if model == CONVERSATIONAL_MODEL { (DEFAULT_MODEL, 1) } else { (model.as_str(), MAX_VOICES) };
    let synthesizer = Synthesizer::new(&connection.session.provider, key_index, priced_model, query);
    let synthesizer = connection.require(synthesizer).await?;
    let has_alignment = query_value(query, "sync_alignment").is_some_and(|value| value == "true");
    let contexts = BTreeMap::new();
    let mut dialogue = Dialogue { synthesizer, contexts, has_contexts, has_alignment, max_voices };
    while !dialogue.process_message(connection, &message).await? {
        message = receive_message(connection).await?;
    }
    Ok(())
}

/// Receives the next message, or refuses the session after the inactivity timeout.
async fn receive_message(connection: &mut SessionConnection) -> Result<Value, SessionEnded> {
    let timeout =
        connection.session.provider.plan.websocket_timeout_second.saturating_mul(INACTIVITY_SECONDS);
    if let Some(message) = connection.receive_object(Some(timeout)).await? {
        return Ok(message);
    }
    let message = format!(
        "Have not received a new text input within the timeout of {INACTIVITY_SECONDS} seconds. Streaming input \
         terminated."
    );
    Err(refuse(connection, "input_timeout_exceeded", &message, None).await)
}

/// Returns a field that contains a text.
fn text_field<'a>(message: &'a Value, name: &str) -> Option<&'a str> {
    message.get(name).and_then(Value::as_str)
}

impl Dialogue {
    /// Processes a message. Returns true after the last message.
    async fn process_message(
        &mut self,
        connection: &mut SessionConnection,
        message: &Value,
    ) -> Result<bool, SessionEnded> {
        let is_last = is_set(message, "close_socket");
        let id = match text_field(message, "context_id") {
            Some(id) if self.has_contexts => id.to_owned(),
            None if self.has_contexts && !is_last => {
                let message = "context_id is required.";
                return Err(refuse(connection, "missing_required_field", message, Some("context_id")).await);
            }
            Some(_) | None => String::new(),
        };
        // A last message without voices does not open a context.
        let opens_no_context = is_last && message.get("voices").is_none();
        if !self.contexts.contains_key(&id) && !opens_no_context {
            self.open_context(connection, &id, message).await?;
        } else if message.get("voices").is_some_and(|voices| !voices.is_null()) {
            let message = "voices can only be set in the first message.";
            return Err(refuse(connection, "invalid_parameters", message, Some("voices")).await);
        }
        let inputs = message.get("inputs").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        for input in inputs {
            self.add_line(connection, &id, input).await?;
        }
        let has_enough_text =
            |context: &DialogueContext| character_count(&context.text) >= MIN_SPOKEN_CHARACTERS;
        if is_set(message, "flush") {
            self.end_turn(connection, &id).await?;
        } else if self.contexts.get(&id).is_some_and(has_enough_text) {
            self.speak(connection, &id).await?;
        }
        if self.has_contexts && is_set(message, "close_context") {
            self.close_context(connection, &id).await?;
        }
        if is_last {
            let ids: Vec<String> = self.contexts.keys().cloned().collect();
            for id in ids {
                self.close_context(connection, &id).await?;
            }
        }
        Ok(is_last)
    }

    /// Opens a context with the voices of its first message.
    async fn open_context(
        &mut self,
        connection: &mut SessionConnection,
        id: &str,
        message: &Value,
    ) -> Result<(), SessionEnded> {
        if self.contexts.len() == MAX_CONTEXTS {
            let (error, message) = context_limit_error();
            return Err(refuse(connection, error, &message, None).await);
        }
        let voices = message.get("voices").and_then(Value::as_array);
        let voices: Vec<String> =
            voices.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
        if voices.is_empty() || voices.len() > self.max_voices {
            let message = format!("The first message must name 1 to {} voices.", self.max_voices);
            return Err(refuse(connection, "missing_required_field", &message, Some("voices")).await);
        }
        let voice_check = self.synthesizer.check_voices(&connection.session.provider, &voices);
        connection.require(voice_check).await?;
        self.contexts.insert(id.to_owned(), DialogueContext { voices, text: String::new() });
        Ok(())
    }

    /// Adds a line. If the line begins a turn, the previous turn is spoken first.
    async fn add_line(
        &mut self,
        connection: &mut SessionConnection,
        id: &str,
        input: &Value,
    ) -> Result<(), SessionEnded> {
        let (Some(text), Some(voice)) = (text_field(input, "text"), text_field(input, "voice_id")) else {
            let message = "An input has a text and a voice_id.";
            return Err(refuse(connection, "missing_required_field", message, Some("inputs")).await);
        };
        if !self.contexts.get(id).is_some_and(|context| context.voices.iter().any(|name| name == voice)) {
            let message = format!("The voice '{voice}' was not named in the first message.");
            return Err(refuse(connection, "invalid_voice_id", &message, Some("inputs")).await);
        }
        if is_set(input, "new_turn") {
            self.end_turn(connection, id).await?;
        }
        if let Some(context) = self.contexts.get_mut(id) {
            context.text.push_str(text);
        }
        Ok(())
    }

    /// Speaks the collected lines. Returns whether there was text to speak.
    async fn speak(&mut self, connection: &mut SessionConnection, id: &str) -> Result<bool, SessionEnded> {
        let Some(context) = self.contexts.get_mut(id) else { return Ok(false) };
        let text = std::mem::take(&mut context.text);
        let context_id = self.has_contexts.then_some(id);
        let has_alignment = self.has_alignment;
        let create_message = |segment: &AudioSegment| {
            let mut message = json!({ "audio": segment.audio });
            if has_alignment {
                let CharacterTimes { characters, starts_ms, durations_ms } = segment.character_times();
                message["alignment"] = json!({
                    "chars": characters, "char_start_times_ms": starts_ms, "char_durations_ms": durations_ms,
                });
            }
            Message::text(with_context_id(message, context_id).to_string())
        };
        self.synthesizer.speak(connection, &text, &create_message).await?;
        Ok(!text.is_empty())
    }

    /// Speaks the collected lines, and sends the end of the turn.
    async fn end_turn(&mut self, connection: &mut SessionConnection, id: &str) -> Result<(), SessionEnded> {
        if self.speak(connection, id).await? {
            self.send(connection, id, json!({ "is_final_audio_for_turn": true })).await?;
        }
        Ok(())
    }

    /// Ends the turn of a context, removes the context, and sends its end.
    async fn close_context(
        &mut self,
        connection: &mut SessionConnection,
        id: &str,
    ) -> Result<(), SessionEnded> {
        self.end_turn(connection, id).await?;
        self.contexts.remove(id);
        self.send(connection, id, json!({ "is_final": true })).await
    }

    /// Sends a message about a context.
    async fn send(
        &self,
        connection: &mut SessionConnection,
        id: &str,
        message: Value,
    ) -> Result<(), SessionEnded> {
        connection.send_json(with_context_id(message, self.has_contexts.then_some(id))).await
    }
}

/// Adds the identifier of a context to a message.
fn with_context_id(mut message: Value, context_id: Option<&str>) -> Value {
    if let Some(context_id) = context_id {
        message["context_id"] = context_id.into();
    }
    message
}

/// Refuses the session. `param` is the wrong field of the message.
async fn refuse(
    connection: &mut SessionConnection,
    error: &str,
    message: &str,
    param: Option<&str>,
) -> SessionEnded {
    connection.send_refusal(refusal::dialogue_refusal(error, message, param)).await
}
