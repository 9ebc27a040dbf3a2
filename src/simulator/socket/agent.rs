//! Serves `/v1/convai/conversation`: a conversation with an agent. The agent sends the first message, and replies to
//! each text of the user and to each half second of audio with the same sentence. Only the document of the conversation
//! contains its cost. A session holds a slot of the workspace's concurrency limit from its first message to its last.
//! If the workspace queues callers, a caller without a slot waits, receives `queue_status` events, and is not charged
//! for the wait.
//!
//! Sources: the Python SDK 2.78 and the AsyncAPI document of the JavaScript client (all messages),
//! captured close frames of 2026 (the quota), the changelog of September 2026 (the queue).

use serde_json::{Value, json};

use crate::clock;

use super::super::accounts::{CreditLimits, Refusal};
use super::super::base64::base64;
use super::super::conversations::Conversation;
use super::super::provider::{ConcurrencySlot, Provider};
use super::super::refusal::RefusalKind;
use super::super::response::new_trace_id;
use super::super::sound::Sound;
use super::super::sound::format::Format;
use super::super::sound::melody::Melody;
use super::connection::{SessionConnection, SessionEnded};
use super::session_auth::SessionAuth;

/// Credits of a reply for the call. They are a rule of the simulator, because the provider charges per minute and a
/// test would have to wait.
const CALL_CREDITS: u64 = 10;
/// Credits of a reply for the language model.
const LLM_CREDITS: u64 = 1;
/// All credits of a reply.
const REPLY_CREDITS: u64 = CALL_CREDITS + LLM_CREDITS;
/// Number of base64 characters of audio that count as one utterance: half a second of `pcm_16000`.
const UTTERANCE_CHARACTERS: usize = 16_000 / 3 * 4;
/// Maximum wait of a caller for a slot in seconds (OpenAPI document, `wait_timeout_seconds`).
const MAX_QUEUE_SECONDS: u32 = 180;
/// Maximum number of messages of a transcript, which bounds the memory of a long test.
const MAX_TRANSCRIPT_MESSAGES: usize = 100;
/// Maximum number of characters that a transcript stores of a user's message.
const MAX_MESSAGE_CHARACTERS: usize = 1_000;
/// The format of the audio in both directions.
const AUDIO_FORMAT: &str = "pcm_16000";
/// The text of each reply.
const REPLY: &str = "The simulator hears you well.";

/// A running conversation, which ends when this value is dropped.
struct AgentConversation {
    provider: Provider,
    key_index: usize,
    id: String,
    last_event_id: u64,
    /// Number of base64 characters of audio that were received after the last reply.
    audio_characters: usize,
    /// Whether the agent has replied and no audio of the user has interrupted the reply.
    is_speaking: bool,
}

/// Serves the session until the client disconnects.
pub(super) async fn serve(connection: &mut SessionConnection, auth: SessionAuth) -> Result<(), SessionEnded> {
    let agent_id = auth.agent_id.clone().unwrap_or_default();
    let authorization_method = auth.authorization_method();
    let key_index = auth.authorize(connection, None).await?;
    let provider = connection.session.provider.clone();
    // The credits must suffice for at least one reply.
    let credit_check =
        provider.state().accounts.check_credits(key_index, REPLY_CREDITS, CreditLimits::Workspace);
    connection.require(credit_check).await?;
    let _slot = acquire_slot(connection, key_index).await?;
    let mut conversation = AgentConversation::start(provider, key_index, agent_id, authorization_method);
    let metadata = json!({
        "conversation_id": conversation.id,
        "agent_output_audio_format": AUDIO_FORMAT,
        "user_input_audio_format": AUDIO_FORMAT,
    });
    connection
        .send_json(json!({
            "type": "conversation_initiation_metadata",
            "conversation_initiation_metadata_event": metadata,
        }))
        .await?;
    conversation.send_ping(connection).await?;
    loop {
        let Some(message) = connection.receive_object(None).await? else { continue };
        conversation.process_message(connection, &message).await?;
    }
}

/// Acquires a slot of the workspace's concurrency limit. If the workspace queues callers, waits for a slot
/// and sends a `queue_status` event every second.
async fn acquire_slot(
    connection: &mut SessionConnection,
    key_index: usize,
) -> Result<ConcurrencySlot, SessionEnded> {
    let provider = connection.session.provider.clone();
    let queues_callers =
        provider.state().accounts.workspace(key_index).is_ok_and(|workspace| workspace.plan.queues_callers);
    let mut changes = provider.changes();
    let mut waited_seconds = 0;
    loop {
        changes.mark_unchanged();
        let refusal = match connection.session.admit(key_index, 0, CreditLimits::Workspace) {
            Ok(slot) => return Ok(slot),
            Err(refusal) => refusal,
        };
        let is_queued = queues_callers && refusal.kind == RefusalKind::Concurrency;
        if !is_queued || waited_seconds == MAX_QUEUE_SECONDS {
            return Err(connection.refuse(&refusal).await);
        }
        // The provider documents the name and the interval of the event, but not its fields.
        let event = json!({ "position": 1, "waited_secs": waited_seconds });
        connection.send_json(json!({ "type": "queue_status", "queue_status_event": event })).await?;
        let slot_freed = async {
            while !provider.state().accounts.has_free_slot(key_index) {
                // Waiting cannot fail, because the sender lives as long as the provider.
                let _changed = changes.changed().await;
            }
        };
        // The next event is due after one second.
        let slot_freed_or_second_elapsed = async {
            let _elapsed = tokio::time::timeout(provider.plan.websocket_timeout_second, slot_freed).await;
        };
        connection.buffer_messages_until(slot_freed_or_second_elapsed).await?;
        waited_seconds += 1;
    }
}

impl AgentConversation {
    /// Adds the conversation to the conversations of the paying workspace.
    fn start(
        provider: Provider,
        key_index: usize,
        agent_id: String,
        authorization_method: &'static str,
    ) -> Self {
        let id = format!("conv_{}", new_trace_id());
        let conversation = Conversation {
            id: id.clone(),
            agent_id,
            authorization_method,
            started_at: clock::now(),
            ended_at: None,
            call_charge: 0,
            llm_charge: 0,
            transcript: Vec::new(),
        };
        if let Ok(workspace) = provider.state().accounts.workspace_mut(key_index) {
            workspace.conversations.add(conversation);
        }
        Self { provider, key_index, id, last_event_id: 0, audio_characters: 0, is_speaking: false }
    }

    /// Updates the stored conversation.
    fn update_record(&self, update: impl FnOnce(&mut Conversation)) {
        let mut state = self.provider.state();
        let workspace = state.accounts.workspace_mut(self.key_index).ok();
        workspace.and_then(|workspace| workspace.conversations.find(&self.id)).map(update);
    }

    /// Sends a message of the type `message_type`, whose field `event_field` contains `event` and its number.
    async fn send_event(
        &mut self,
        connection: &mut SessionConnection,
        message_type: &str,
        event_field: &str,
        mut event: Value,
    ) -> Result<(), SessionEnded> {
        self.last_event_id += 1;
        event["event_id"] = self.last_event_id.into();
        connection.send_json(json!({ "type": message_type, event_field: event })).await
    }

    async fn send_ping(&mut self, connection: &mut SessionConnection) -> Result<(), SessionEnded> {
        self.send_event(connection, "ping", "ping_event", json!({ "ping_ms": null })).await
    }

    /// Replies to a message, if its type has a reply.
    async fn process_message(
        &mut self,
        connection: &mut SessionConnection,
        message: &Value,
    ) -> Result<(), SessionEnded> {
        if let Some(chunk) = message.get("user_audio_chunk").and_then(Value::as_str) {
            return self.process_audio(connection, chunk).await;
        }
        match message.get("type").and_then(Value::as_str) {
            Some("user_message") => {
                let text = message.get("text").and_then(Value::as_str).unwrap_or_default();
                self.reply(connection, text).await
            }
            // The configuration of the conversation, pongs, updates and feedback have no reply.
            Some(_) => Ok(()),
            None => Err(connection.refuse(&Refusal::from(RefusalKind::FieldMissing("type".into()))).await),
        }
    }

    /// Interrupts the agent, and replies if the audio is long enough.
    async fn process_audio(
        &mut self,
        connection: &mut SessionConnection,
        chunk: &str,
    ) -> Result<(), SessionEnded> {
        if self.is_speaking {
            self.is_speaking = false;
            self.send_event(connection, "interruption", "interruption_event", json!({})).await?;
        }
        self.audio_characters = self.audio_characters.saturating_add(chunk.len());
        if self.audio_characters < UTTERANCE_CHARACTERS {
            return Ok(());
        }
        let user_text = "Hello, agent.";
        let event = json!({ "user_transcript": user_text });
        self.send_event(connection, "user_transcript", "user_transcription_event", event).await?;
        self.reply(connection, user_text).await
    }

    /// Charges and sends a reply to the user's text.
    async fn reply(
        &mut self,
        connection: &mut SessionConnection,
        user_text: &str,
    ) -> Result<(), SessionEnded> {
        let charge = connection.session.charge(self.key_index, REPLY_CREDITS, CreditLimits::Workspace);
        connection.require(charge).await?;
        self.update_record(|conversation| {
            conversation.call_charge += CALL_CREDITS;
            conversation.llm_charge += LLM_CREDITS;
            if conversation.transcript.len() < MAX_TRANSCRIPT_MESSAGES {
                let user_text = user_text.chars().take(MAX_MESSAGE_CHARACTERS).collect();
                conversation.transcript.push(("user", user_text));
                conversation.transcript.push(("agent", REPLY.to_owned()));
            }
        });
        self.audio_characters = 0;
        self.is_speaking = true;
        let event = json!({ "agent_response": REPLY });
        self.send_event(connection, "agent_response", "agent_response_event", event).await?;
        let format = Format::find(AUDIO_FORMAT).unwrap_or(Format::DEFAULT);
        let audio = base64(&Sound::new(Melody::new(REPLY), format).into_bytes());
        self.send_event(connection, "audio", "audio_event", json!({ "audio_base_64": audio })).await?;
        self.send_ping(connection).await
    }
}

impl Drop for AgentConversation {
    fn drop(&mut self) {
        self.update_record(|conversation| conversation.ended_at = Some(clock::now()));
    }
}
