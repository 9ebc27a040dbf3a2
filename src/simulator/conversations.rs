//! Stores conversations with agents. Their cost is in no WebSocket message; a client requests it
//! later.

use std::collections::VecDeque;

use serde_json::{Value, json};

use crate::policy::units::UnixMs;

use super::accounts::Refused;
use super::answer::Answer;
use super::job::{Job, require_key};
use super::shape::Shape;

/// Older conversations are dropped to bound the memory of a long test.
const MAX_CONVERSATIONS: usize = 200;

/// The conversations of a workspace, oldest first.
#[derive(Debug, Default)]
pub(super) struct Conversations(VecDeque<Conversation>);

#[derive(Clone, Debug)]
pub(super) struct Conversation {
    pub(super) id: String,
    pub(super) agent: String,
    pub(super) authorization: &'static str,
    pub(super) began: UnixMs,
    /// The time of its end.
    pub(super) ended: Option<UnixMs>,
    /// Credits charged for the call.
    pub(super) call_charge: u64,
    pub(super) llm_charge: u64,
    /// The messages of both sides, in order.
    pub(super) transcript: Vec<(&'static str, String)>,
}

impl Conversations {
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

/// `GET /v1/convai/conversations/{conversation_id}`, for the workspace that paid.
pub(super) fn answer(job: Job<'_>, id: &str) -> Result<Answer, Refused> {
    let key = require_key(job.presented)?;
    let mut state = job.world.state();
    state.accounts.permit(key, "convai_read")?;
    let conversation =
        state.accounts.workspace_mut(key).and_then(|workspace| workspace.conversations.find(id));
    let conversation = conversation.ok_or_else(|| Refused::with_subject(Shape::ConversationNotFound, id))?;
    Ok(Answer::document(&conversation.document()))
}

impl Conversation {
    /// `GetConversationResponseModel` of the OpenAPI document. The document contains the cost after
    /// the end of the conversation.
    fn document(&self) -> Value {
        let seconds = self.ended.map_or(0, |ended| ended.since(self.began).as_secs());
        let transcript = self.transcript.iter().map(|(role, text)| {
            json!({ "role": role, "message": text, "time_in_call_secs": 0, "tool_calls": [], "tool_results": [] })
        });
        json!({
            "agent_id": self.agent,
            "agent_name": null,
            "conversation_id": self.id,
            "status": if self.ended.is_some() { "done" } else { "in-progress" },
            "user_id": null,
            "metadata": {
                "start_time_unix_secs": self.began.0 / 1_000,
                "call_duration_secs": seconds,
                "cost": self.ended.map(|_| self.call_charge + self.llm_charge),
                "cost_fiat": null,
                "authorization_method": self.authorization,
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
