//! Issues the provider's other credentials: single-use tokens, and signed URLs and conversation
//! tokens for agents. Each belongs to the key that requested it.

use serde_json::json;

use crate::clock;

use super::accounts::Refused;
use super::answer::{Answer, trace_id};
use super::job::{Job, require_key};
use super::route::query;
use super::shape::Shape;
use super::tokens::TokenScope;

/// `POST /v1/single-use-token/{token_type}`.
pub(super) fn token(job: Job<'_>, kind: &str) -> Result<Answer, Refused> {
    let key = require_key(job.presented)?;
    let scope = TokenScope::named(kind).ok_or(Shape::NotAString("token_type".into()))?;
    let token = format!("sutkn_{}", trace_id());
    job.world.state().tokens.add(&token, scope, key, clock::now());
    Ok(Answer::document(&json!({ "token": token })))
}

/// `GET /v1/convai/conversation/get-signed-url?agent_id=…`. The host is always the provider's own
/// (OpenAPI document), and a client connects there unless the proxy changes the URL.
pub(super) fn signed_url(job: Job<'_>) -> Result<Answer, Refused> {
    let (agent, signature) = conversation(job, "cvsig")?;
    let url = format!(
        "wss://api.elevenlabs.io/v1/convai/conversation?agent_id={agent}&conversation_signature={signature}"
    );
    Ok(Answer::document(&json!({ "signed_url": url })))
}

/// `GET /v1/convai/conversation/token?agent_id=…`.
pub(super) fn conversation_token(job: Job<'_>) -> Result<Answer, Refused> {
    let (_, token) = conversation(job, "cvtkn")?;
    Ok(Answer::document(&json!({ "token": token, "conversation_id": format!("conv_{}", trace_id()) })))
}

fn conversation(job: Job<'_>, kind: &str) -> Result<(String, String), Refused> {
    let parameter = query(job.query).find(|(name, _)| name == "agent_id");
    let (_, agent) = parameter.ok_or(Shape::FieldMissing("agent_id".into()))?;
    let key = require_key(job.presented)?;
    let mut state = job.world.state();
    state.accounts.permit(key, "convai_write")?;
    // A key grants access to agents of its own workspace only.
    if state.accounts.agent_payer(&agent, Some(key))? != key {
        return Err(Refused::with_subject(Shape::AgentNotFound, agent));
    }
    let token = format!("{kind}_{}", trace_id());
    state.tokens.add(&token, TokenScope::Agent(agent.clone()), key, clock::now());
    Ok((agent, token))
}
