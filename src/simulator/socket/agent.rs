//! `/v1/convai/conversation`: a conversation with an agent. The agent speaks first, and replies to
//! each message and to each half second of audio with the same sentence. Only the document of the
//! conversation contains its cost. A session holds a slot of the workspace's concurrency limit from
//! its first message to its last. If the workspace queues callers, a caller without a slot waits,
//! receives `queue_status` events, and is not charged for the wait.
//!
//! Sources: the Python SDK 2.78 and the AsyncAPI document of the JavaScript client (all messages),
//! captured closes of 2026 (the quota), the changelog of September 2026 (the queue).

use serde_json::{Value, json};

use crate::clock;

use super::super::accounts::{CreditLimits, Refused};
use super::super::answer::trace_id;
use super::super::conversations::Conversation;
use super::super::shape::Shape;
use super::super::sound::Sound;
use super::super::sound::format::Format;
use super::super::sound::melody::Melody;
use super::super::speech::base64;
use super::super::world::{Slot, World};
use super::session_auth::SessionAuth;
use super::wire::{ClientMessage, SessionEnded, Wire};

/// The price of a reply, for the call and for its language model. It is a rule of the simulator,
/// because the provider charges per minute and a test would have to wait.
const CALL_CREDITS: u64 = 10;
const LLM_CREDITS: u64 = 1;
/// Characters of base64 audio that count as one utterance: half a second of `pcm_16000`.
const UTTERANCE_CHARACTERS: usize = 16_000 / 3 * 4;
/// Maximum wait of a caller for a slot in seconds (OpenAPI document, `wait_timeout_seconds`).
const QUEUE_SECONDS: u32 = 180;
const FORMAT: &str = "pcm_16000";
const REPLY: &str = "The simulator hears you well.";

/// A conversation. It ends when this value is dropped.
struct ConversationSession {
    world: World,
    key: usize,
    id: String,
    events: u64,
    /// Characters of audio received after the last reply.
    audio_characters: usize,
    /// Whether the agent has replied since the last utterance of the user.
    is_speaking: bool,
}

/// Serves the session until the client disconnects.
pub(super) async fn serve(wire: &mut Wire, auth: SessionAuth) -> SessionEnded {
    match converse(wire, auth).await {
        Ok(never) => match never {},
        Err(ended) => ended,
    }
}

async fn converse(wire: &mut Wire, auth: SessionAuth) -> Result<std::convert::Infallible, SessionEnded> {
    let agent = auth.agent.clone().unwrap_or_default();
    let authorization = auth.authorization_method();
    let key = auth.authorize(wire, None).await?;
    // The credits must suffice for at least one reply.
    let min_credits = CALL_CREDITS + LLM_CREDITS;
    let credit_check = wire
        .session
        .world
        .state()
        .accounts
        .check_credits(key, min_credits, CreditLimits::Workspace)
        .map(|_| ());
    if let Err(refused) = credit_check {
        return Err(wire.refuse(&refused).await);
    }
    let _slot = begin(wire, key).await?;
    let mut session = ConversationSession::begin(wire.session.world.clone(), key, agent, authorization);
    let metadata = json!({
        "type": "conversation_initiation_metadata",
        "conversation_initiation_metadata_event": {
            "conversation_id": session.id,
            "agent_output_audio_format": FORMAT,
            "user_input_audio_format": FORMAT,
        },
    });
    wire.send(metadata.to_string()).await?;
    session.ping(wire).await?;
    loop {
        let Some(received) = wire.next(None).await? else { continue };
        let message = match &received {
            ClientMessage::Text(text) => serde_json::from_str(text).ok().filter(Value::is_object),
            ClientMessage::Binary(_) => None,
        };
        let Some(message) = message else {
            return Err(wire.refuse(&Refused::from(Shape::MalformedJson)).await);
        };
        session.handle(wire, &message).await?;
    }
}

/// Acquires a slot of the workspace's concurrency limit. If the workspace queues callers, this
/// waits for a slot and sends a `queue_status` event every second.
async fn begin(wire: &mut Wire, key: usize) -> Result<Slot, SessionEnded> {
    let world = wire.session.world.clone();
    let queues = world.state().accounts.workspace(key).is_some_and(|own| own.plan.queues_callers);
    let mut changes = world.changes();
    let mut waited = 0;
    loop {
        changes.mark_unchanged();
        let refused = match wire.session.begin(key, 0, CreditLimits::Workspace) {
            Ok(slot) => return Ok(slot),
            Err(refused) => refused,
        };
        if !queues || refused.shape != Shape::Concurrency || waited == QUEUE_SECONDS {
            return Err(wire.refuse(&refused).await);
        }
        // Only the name and the time of the event are known, not its fields.
        let event = json!({ "position": 1, "waited_secs": waited });
        wire.send(json!({ "type": "queue_status", "queue_status_event": event }).to_string()).await?;
        // Waits for a free slot, at most until the next event is due.
        let second = tokio::time::sleep(world.socket_second());
        tokio::pin!(second);
        loop {
            let is_free = async {
                // The sender lives as long as the world, so this cannot fail.
                let _changed = changes.changed().await;
            };
            let mut is_over = false;
            let event = async {
                tokio::select! {
                    () = is_free => {}
                    () = &mut second => is_over = true,
                }
            };
            wire.listen_until(event).await?;
            let has_free_slot = world.state().accounts.has_free_slot(key);
            if is_over || has_free_slot {
                break;
            }
        }
        waited += 1;
    }
}

impl ConversationSession {
    fn begin(world: World, key: usize, agent: String, authorization: &'static str) -> Self {
        let id = format!("conv_{}", trace_id());
        let conversation = Conversation {
            id: id.clone(),
            agent,
            authorization,
            began: clock::now(),
            ended: None,
            call_charge: 0,
            llm_charge: 0,
            transcript: Vec::new(),
        };
        if let Some(workspace) = world.state().accounts.workspace_mut(key) {
            workspace.conversations.add(conversation);
        }
        Self { world, key, id, events: 0, audio_characters: 0, is_speaking: false }
    }

    fn update_record(&self, change: impl FnOnce(&mut Conversation)) {
        let mut state = self.world.state();
        let workspace = state.accounts.workspace_mut(self.key);
        workspace.and_then(|workspace| workspace.conversations.find(&self.id)).map(change);
    }

    fn event(&mut self) -> u64 {
        self.events += 1;
        self.events
    }

    async fn ping(&mut self, wire: &mut Wire) -> Result<(), SessionEnded> {
        let event = json!({ "event_id": self.event(), "ping_ms": null });
        wire.send(json!({ "type": "ping", "ping_event": event }).to_string()).await
    }

    async fn handle(&mut self, wire: &mut Wire, message: &Value) -> Result<(), SessionEnded> {
        if let Some(chunk) = message.get("user_audio_chunk").and_then(Value::as_str) {
            if self.is_speaking {
                self.is_speaking = false;
                let event = json!({ "event_id": self.event() });
                wire.send(json!({ "type": "interruption", "interruption_event": event }).to_string()).await?;
            }
            self.audio_characters = self.audio_characters.saturating_add(chunk.len());
            if self.audio_characters < UTTERANCE_CHARACTERS {
                return Ok(());
            }
            let user_text = "Hello, agent.";
            let event = json!({ "user_transcript": user_text, "event_id": self.event() });
            wire.send(json!({ "type": "user_transcript", "user_transcription_event": event }).to_string())
                .await?;
            return self.reply(wire, user_text).await;
        }
        match message.get("type").and_then(Value::as_str) {
            Some("user_message") => {
                let text = message.get("text").and_then(Value::as_str).unwrap_or_default();
                self.reply(wire, text).await
            }
            // Messages without a reply: the configuration of the conversation, pongs, updates and
            // feedback.
            Some(_) => Ok(()),
            None => Err(wire.refuse(&Refused::from(Shape::FieldMissing("type".into()))).await),
        }
    }

    async fn reply(&mut self, wire: &mut Wire, user_text: &str) -> Result<(), SessionEnded> {
        if let Err(refused) =
            wire.session.spend(self.key, CALL_CREDITS + LLM_CREDITS, CreditLimits::Workspace)
        {
            return Err(wire.refuse(&refused).await);
        }
        self.update_record(|conversation| {
            conversation.call_charge += CALL_CREDITS;
            conversation.llm_charge += LLM_CREDITS;
            if conversation.transcript.len() < 100 {
                conversation.transcript.push(("user", user_text.chars().take(1_000).collect()));
                conversation.transcript.push(("agent", REPLY.to_owned()));
            }
        });
        self.audio_characters = 0;
        self.is_speaking = true;
        let event = json!({ "agent_response": REPLY, "event_id": self.event() });
        wire.send(json!({ "type": "agent_response", "agent_response_event": event }).to_string()).await?;
        let format = Format::named(FORMAT).unwrap_or(Format::DEFAULT);
        let audio: Vec<u8> = Sound::of(Melody::of(REPLY), format).into_blocks().flat_map(Vec::from).collect();
        let event = json!({ "audio_base_64": base64(&audio), "event_id": self.event() });
        wire.send(json!({ "type": "audio", "audio_event": event }).to_string()).await?;
        self.ping(wire).await
    }
}

impl Drop for ConversationSession {
    fn drop(&mut self) {
        self.update_record(|conversation| conversation.ended = Some(clock::now()));
    }
}
