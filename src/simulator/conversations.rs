//! Stores the conversations with agents, and serves their documents over HTTP. WebSocket messages never contain the
//! cost of a conversation, so clients request it later from the document.

use std::collections::VecDeque;

use serde_json::{Value, json};

use crate::policy::units::UnixMs;

use super::accounts::Refusal;
use super::context::{OperationContext, require_key};
use super::refusal::RefusalKind;
use super::response::ProviderResponse;

/// Maximum number of stored conversations, which bounds the memory of a long test.
const MAX_CONVERSATIONS: usize = 200;

/// The conversations of a workspace, oldest first.
#[derive(Debug, Default)]
pub(super) struct Conversations(VecDeque<Conversation>);

/// A conversation with an agent, as its document reports it.
#[derive(Clone, Debug)]
pub(super) struct Conversation {
    pub(super) id: String,
    pub(super) agent_id: String,
    pub(super) authorization_method: &'static str,
    pub(super) started_at: UnixMs,
    /// `None` while the conversation is running.
    pub(super) ended_at: Option<UnixMs>,
    /// Credits charged for the call.
    pub(super) call_charge: u64,
    /// Credits charged for the language model.
    pub(super) llm_charge: u64,
    /// The role and the text of each message, in order.
    pub(super) transcript: Vec<(&'static str, String)>,
}

impl Conversations {
    /// Adds a conversation, and drops the oldest one if the store is full.
    pub(super) fn add(&mut self, conversation: Conversation) {
        if self.0.len() == MAX_CONVERSATIONS {
            self.0.pop_front();
        }
        self.0.push_back(conversation);
    }

    pub(super) fn find(&mut self, id: &str) -> Option<&mut Conversation> {
        self.0.iter_mut().rev().find(|conversation| conversation.id == id)
    }
}

/// Responds to `GET /v1/convai/conversations/{conversation_id}` for the workspace that paid.
pub(super) fn respond(context: OperationContext<'_>, id: &str) -> Result<ProviderResponse, Refusal> {
    let key_index = require_key(context.presented_key)?;
    let mut state = context.provider.state();
    state.accounts.check_permission(key_index, "convai_read")?;
    let conversation = state.accounts.workspace_mut(key_index)?.conversations.find(id);
    let conversation =
        conversation.ok_or_else(|| Refusal::with_subject(RefusalKind::ConversationNotFound, id))?;
    Ok(ProviderResponse::document(&conversation.document()))
}

impl Conversation {
    /// Creates the `GetConversationResponseModel` of the OpenAPI document. It contains the cost only after
    /// the end of the conversation.
    fn document(&self) -> Value {
        let duration_seconds = self.ended_at.map_or(0, |ended_at| ended_at.since(self.started_at).as_secs());
        let transcript = self.transcript.iter().map(|(role, text)| {
            json!({ "role": role, "message": text, "time_in_call_secs": 0, "tool_calls": [], "tool_results": [] })
        });
        json!({
            "agent_id": self.agent_id,
            "agent_name": null,
            "conversation_id": self.id,
            "status": if self.ended_at.is_some() { "done" } else { "in-progress" },
            "user_id": null,
            "metadata": {
                "start_time_unix_secs": self.started_at.0 / 1_000,
                "call_duration_secs": duration_seconds,
                "cost": self.ended_at.map(|_| self.call_charge + self.llm_charge),
                "cost_fiat": null,
                "authorization_method": self.authorization_method,
                "termination_reason": "",
                "charging": {
                    "dev_discount": false,
                    "is_burst": false,
                    "tier": null,
                    "llm_charge": self.llm_charge,
                    "call_charge": self.call_charge,
                    "platform_charge": null,
                    "free_minutes_consumed": 0.0,
                    "free_llm_dollars_consumed": 0.0,
                },
            },
            "analysis": null,
            "has_audio": false,
            "has_user_audio": false,
            "has_response_audio": false,
            "has_auxiliary_audio": false,
            "transcript": transcript.collect::<Vec<_>>(),
        })
    }
}
