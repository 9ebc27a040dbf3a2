//! Responds to requests for the credentials that the provider issues in addition to keys: single-use tokens, and signed
//! URLs and conversation tokens for agents. A credential belongs to the key that requested it, and `tokens` stores it.

use serde_json::json;

use crate::clock;

use super::accounts::Refusal;
use super::context::{OperationContext, require_key};
use super::query::query_value;
use super::refusal::RefusalKind;
use super::response::{ProviderResponse, new_trace_id};
use super::tokens::TokenScope;

/// Responds to `POST /v1/single-use-token/{token_type}`.
pub(super) fn issue_token(
    context: OperationContext<'_>,
    token_type: &str,
) -> Result<ProviderResponse, Refusal> {
    let key_index = require_key(context.presented_key)?;
    let scope = TokenScope::parse(token_type).ok_or(RefusalKind::NotAString("token_type".into()))?;
    let token = format!("sutkn_{}", new_trace_id());
    context.provider.state().tokens.add(&token, scope, key_index, clock::now());
    Ok(ProviderResponse::document(&json!({ "token": token })))
}

/// Responds to `GET /v1/convai/conversation/get-signed-url?agent_id=…`. The host in the URL is always the provider's
/// host (OpenAPI document). A client connects to this host unless a proxy changes the URL.
pub(super) fn issue_signed_url(context: OperationContext<'_>) -> Result<ProviderResponse, Refusal> {
    let (agent_id, signature) = issue_for_agent(context, "cvsig")?;
    let url = format!(
        "wss://api.elevenlabs.io/v1/convai/conversation?agent_id={agent_id}&conversation_signature={signature}"
    );
    Ok(ProviderResponse::document(&json!({ "signed_url": url })))
}

/// Responds to `GET /v1/convai/conversation/token?agent_id=…`.
pub(super) fn issue_conversation_token(context: OperationContext<'_>) -> Result<ProviderResponse, Refusal> {
    let (_, token) = issue_for_agent(context, "cvtkn")?;
    Ok(ProviderResponse::document(
        &json!({ "token": token, "conversation_id": format!("conv_{}", new_trace_id()) }),
    ))
}

/// Issues a token for the agent in the query. Returns the agent's ID and the token.
fn issue_for_agent(context: OperationContext<'_>, prefix: &str) -> Result<(String, String), Refusal> {
    let agent_id =
        query_value(context.query, "agent_id").ok_or(RefusalKind::FieldMissing("agent_id".into()))?;
    let key_index = require_key(context.presented_key)?;
    let mut state = context.provider.state();
    state.accounts.check_permission(key_index, "convai_write")?;
    // A key grants access only to agents in the workspace of the key.
    if state.accounts.find_agent_payer(&agent_id, Some(key_index))? != key_index {
        return Err(Refusal::with_subject(RefusalKind::AgentNotFound, agent_id));
    }
    let token = format!("{prefix}_{}", new_trace_id());
    state.tokens.add(&token, TokenScope::Agent(agent_id.clone()), key_index, clock::now());
    Ok((agent_id, token))
}
