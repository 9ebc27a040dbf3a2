//! Serves `/v1/text-to-speech/{voice_id}/stream-input` and `…/multi-stream-input`: collects received text until it is
//! long enough, and sends it as audio. With contexts, one connection collects several texts in parallel.
//!
//! Sources: the Python SDK 2.78 (all messages, and the times at which text is spoken), its public
//! issues and those of two voice frameworks (the texts of the refusals).

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use tokio_tungstenite::tungstenite::Message;

use super::super::query::query_value;
use super::super::speech::character_count;
use super::connection::{SessionConnection, SessionEnded};
use super::refusal;
use super::session_auth::SessionAuth;
use super::synthesizer::{AudioSegment, SEGMENT_CHARACTERS, Synthesizer};
use super::{MAX_CONTEXTS, context_limit_error, is_set};

/// Numbers of characters that are collected before the first, the second, the third and each later audio.
const DEFAULT_SCHEDULE: [u64; 4] = [120, 160, 250, 290];
/// The minimum and the maximum number of characters that a client can request instead.
const MIN_SCHEDULE_LENGTH: u64 = 50;
const MAX_SCHEDULE_LENGTH: u64 = 500;
/// Maximum number of requested lengths that are used.
const MAX_SCHEDULE_ENTRIES: usize = 16;
/// The default inactivity timeout in seconds, and its maximum.
const DEFAULT_INACTIVITY_SECONDS: u32 = 20;
const MAX_INACTIVITY_SECONDS: u32 = 180;
/// The context of a message that names none.
const DEFAULT_CONTEXT: &str = "default";
/// The model if the query contains none (the documentation).
const DEFAULT_MODEL: &str = "eleven_multilingual_v2";

/// A message with audio, or about the end of the audio: the SDK's `AudioOutput`, and with contexts `AudioOutputMulti`.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct AudioOutput<'a> {
    audio: Option<&'a str>,
    is_final: Option<bool>,
    normalized_alignment: Option<Value>,
    alignment: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    context_id: Option<&'a str>,
}

impl AudioOutput<'_> {
    fn into_message(self) -> Message {
        // Strings and numbers can always be serialized.
        Message::text(serde_json::to_string(&self).unwrap_or_default())
    }
}

/// The collected text of a context, and the lengths at which it is spoken.
struct SpeechContext {
    text: String,
    /// Numbers of characters to collect before each audio. The last number repeats.
    schedule: Vec<u64>,
    /// Number of times that collected text has been spoken.
    audio_count: usize,
}

/// The contexts of a session. Without contexts, the session has only the default context.
struct Speech {
    synthesizer: Synthesizer,
    contexts: BTreeMap<String, SpeechContext>,
    has_contexts: bool,
    /// Whether each message is spoken immediately.
    is_auto_mode: bool,
}

/// Serves the session until the client ends the text.
pub(super) async fn serve(
    connection: &mut SessionConnection,
    auth: SessionAuth,
    voice: String,
    has_contexts: bool,
    query: &str,
) -> Result<(), SessionEnded> {
    let timeout_seconds = query_value(query, "inactivity_timeout")
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(DEFAULT_INACTIVITY_SECONDS)
        .clamp(1, MAX_INACTIVITY_SECONDS);
    let mut message = receive_message(connection, timeout_seconds).await?;
    let key_index = auth.authorize(connection, Some(&message)).await?;
    let provider = connection.session.provider.clone();
    let model = query_value(query, "model_id").unwrap_or_else(|| DEFAULT_MODEL.to_owned());
    let synthesizer = connection.require(Synthesizer::new(&provider, key_index, &model, query)).await?;
    connection.require(synthesizer.check_voices(&provider, &[voice])).await?;
    let is_auto_mode = query_value(query, "auto_mode").is_some_and(|value| value == "true");
    let mut speech = Speech { synthesizer, contexts: BTreeMap::new(), has_contexts, is_auto_mode };
    while !speech.process_message(connection, &message).await? {
        message = receive_message(connection, timeout_seconds).await?;
    }
    Ok(())
}

/// Receives the next message, or refuses the session after the inactivity timeout.
async fn receive_message(
    connection: &mut SessionConnection,
    timeout_seconds: u32,
) -> Result<Value, SessionEnded> {
    let timeout = connection.session.provider.plan.websocket_timeout_second.saturating_mul(timeout_seconds);
    if let Some(message) = connection.receive_object(Some(timeout)).await? {
        return Ok(message);
    }
    let message = format!(
        "Have not received a new text input within the timeout of {timeout_seconds} seconds. Streaming input \
         terminated. Please make sure to either feed the input in the timely manner, or to send the end of input text \
         (empty string \"\") when done."
    );
    Err(connection.send_refusal(refusal::speech_refusal("input_timeout_exceeded", &message)).await)
}

impl Speech {
    /// Processes a message. Returns true after the last message.
    async fn process_message(
        &mut self,
        connection: &mut SessionConnection,
        message: &Value,
    ) -> Result<bool, SessionEnded> {
        let id = match ["context_id", "contextId"].iter().find_map(|name| message.get(name)) {
            Some(Value::String(id)) if self.has_contexts => id.clone(),
            _ => DEFAULT_CONTEXT.to_owned(),
        };
        let text = message.get("text").and_then(Value::as_str);
        if self.has_contexts && is_set(message, "close_socket") {
            let ids: Vec<String> = self.contexts.keys().cloned().collect();
            for id in ids {
                self.speak(connection, &id).await?;
                self.close_context(connection, &id).await?;
            }
            return Ok(true);
        }
        if self.has_contexts && is_set(message, "close_context") {
            // Text that was not flushed is dropped.
            if self.contexts.contains_key(&id) {
                self.close_context(connection, &id).await?;
            }
            return Ok(false);
        }
        if !self.has_contexts && text == Some("") {
            self.speak(connection, &id).await?;
            self.close_context(connection, &id).await?;
            return Ok(true);
        }
        if !self.contexts.contains_key(&id) && self.contexts.len() == MAX_CONTEXTS {
            let (error, message) = context_limit_error();
            return Err(connection.send_refusal(refusal::speech_refusal(error, &message)).await);
        }
        let context = self.contexts.entry(id.clone()).or_insert_with(|| SpeechContext::new(message));
        context.add_text(text.unwrap_or_default());
        let collected_characters = character_count(&context.text);
        let is_speech_triggered =
            is_set(message, "try_trigger_generation") && collected_characters >= SEGMENT_CHARACTERS as u64;
        let is_speech_due = is_set(message, "flush") || self.is_auto_mode || is_speech_triggered;
        if is_speech_due || collected_characters >= context.required_characters() {
            self.speak(connection, &id).await?;
        }
        Ok(false)
    }

    /// Speaks the collected text.
    async fn speak(&mut self, connection: &mut SessionConnection, id: &str) -> Result<(), SessionEnded> {
        let Some(context) = self.contexts.get_mut(id) else { return Ok(()) };
        let text = std::mem::take(&mut context.text);
        context.audio_count += 1;
        let context_id = self.has_contexts.then_some(id);
        let create_message = |segment: &AudioSegment| {
            let alignment = Some(segment.alignment());
            let output = AudioOutput {
                audio: Some(&segment.audio),
                normalized_alignment: alignment.clone(),
                alignment,
                context_id,
                ..AudioOutput::default()
            };
            output.into_message()
        };
        self.synthesizer.speak(connection, &text, &create_message).await
    }

    /// Removes a context, and sends its end.
    async fn close_context(
        &mut self,
        connection: &mut SessionConnection,
        id: &str,
    ) -> Result<(), SessionEnded> {
        self.contexts.remove(id);
        let context_id = self.has_contexts.then_some(id);
        let last = AudioOutput { is_final: Some(true), context_id, ..AudioOutput::default() };
        connection.send(last.into_message()).await
    }
}

impl SpeechContext {
    /// Opens a context with the lengths that its first message requests.
    fn new(message: &Value) -> Self {
        let requested_schedule =
            message.get("generation_config").and_then(|config| config.get("chunk_length_schedule"));
        let requested_lengths = requested_schedule.and_then(Value::as_array).map(|list| {
            let lengths =
                list.iter().filter_map(|length| length.as_u64().or_else(|| round_length(length.as_f64()?)));
            lengths
                .map(|length| length.clamp(MIN_SCHEDULE_LENGTH, MAX_SCHEDULE_LENGTH))
                .take(MAX_SCHEDULE_ENTRIES)
                .collect::<Vec<_>>()
        });
        let schedule =
            requested_lengths.filter(|list| !list.is_empty()).unwrap_or_else(|| DEFAULT_SCHEDULE.to_vec());
        Self { text: String::new(), schedule, audio_count: 0 }
    }

    /// Adds text. The blank in the first message is not part of the text.
    fn add_text(&mut self, text: &str) {
        if text != " " || self.audio_count > 0 || !self.text.is_empty() {
            self.text.push_str(text);
        }
    }

    /// Returns the number of characters to collect before the next audio.
    fn required_characters(&self) -> u64 {
        let last = self.schedule.last().copied().unwrap_or(MAX_SCHEDULE_LENGTH);
        self.schedule.get(self.audio_count).copied().unwrap_or(last)
    }
}

/// Rounds a length that is not a whole number. A length above the maximum of the schedule becomes the
/// maximum.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the length is clamped before the conversion, so that it fits"
)]
fn round_length(length: f64) -> Option<u64> {
    length.is_finite().then(|| length.clamp(0.0, 500.0).round() as u64)
}
