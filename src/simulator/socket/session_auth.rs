//! Identifies the caller and the paying key of a WebSocket, and checks the key's permission and bill. A token takes
//! precedence over a key, and the key of the head over the key of the first message. HTTP requests use
//! `request::find_presented_key` instead, because they have no first message.

use http::Method;
use http::request::Parts;
use serde_json::Value;

use crate::clock;

use super::super::accounts::Refusal;
use super::super::context::require_key;
use super::super::provider::{PresentedKey, Provider};
use super::super::query::query_value;
use super::super::refusal::RefusalKind;
use super::super::tokens::TokenScope;
use super::Endpoint;
use super::connection::{SessionConnection, SessionEnded};
use super::message_check::credential_of;
use super::session_faults::SessionFaults;

/// The credentials in the head of a handshake, and the permission that the WebSocket requires.
#[derive(Clone, Debug)]
pub(super) struct SessionAuth {
    /// The path of the WebSocket, which selects faults of routes.
    path: String,
    presented_key: PresentedKey,
    /// The token in the query string.
    token: Option<String>,
    /// The endpoint for which a token must be valid, or `None` if the WebSocket accepts no token.
    scope: Option<TokenScope>,
    /// The permission that the key must have, or `None` if the WebSocket requires none.
    permission: Option<&'static str>,
    /// The requested agent, if the WebSocket is a conversation. It is empty if the query names none.
    pub(super) agent_id: Option<String>,
}

impl SessionAuth {
    /// Collects the credentials from the head of the handshake `parts`.
    pub(super) fn new(endpoint: &Endpoint, presented_key: PresentedKey, parts: &Parts) -> Self {
        let query = parts.uri.query().unwrap_or_default();
        let agent_id =
            matches!(endpoint, Endpoint::Agent).then(|| query_value(query, "agent_id").unwrap_or_default());
        let (token, scope, permission) = match endpoint {
            Endpoint::Speech { .. } | Endpoint::Dialogue { .. } => {
                (query_value(query, "single_use_token"), Some(TokenScope::Speech), Some("text_to_speech"))
            }
            Endpoint::Agent => {
                let token =
                    query_value(query, "conversation_signature").or_else(|| query_value(query, "token"));
                (token, agent_id.clone().map(TokenScope::Agent), Some("convai_write"))
            }
            Endpoint::Scribe => {
                (query_value(query, "token"), Some(TokenScope::RealtimeScribe), Some("speech_to_text"))
            }
            Endpoint::Echo => (None, None, None),
        };
        let path = parts.uri.path().to_owned();
        Self { path, presented_key, token, scope, permission, agent_id }
    }

    /// Returns the provider's name for the method of authorization (OpenAPI document).
    pub(super) fn authorization_method(&self) -> &'static str {
        if self.token.is_some() {
            "signed_url"
        } else if self.has_key_in_head() {
            "authorization_header"
        } else {
            "public"
        }
    }

    /// Returns whether the head contains a key, valid or not.
    pub(super) fn has_key_in_head(&self) -> bool {
        self.presented_key != PresentedKey::Absent
    }

    /// Returns the key whose scripted faults apply to the session. The key of a token takes precedence over
    /// the presented key.
    pub(super) fn script_key(&self, provider: &Provider) -> PresentedKey {
        let token_key = self
            .token
            .as_ref()
            .zip(self.scope.as_ref())
            .and_then(|(token, scope)| provider.state().tokens.find_key(token, scope, clock::now()));
        token_key.map_or(self.presented_key, PresentedKey::Known)
    }

    /// Returns the index of the key whose workspace pays, and starts the session. The key must have the permission, and
    /// its bill must be paid. A token is consumed. `first_message` is `None` on WebSockets where the simulator
    /// sends first. A scripted refusal takes precedence over all other refusals, as over HTTP.
    ///
    /// # Errors
    ///
    /// Fails if the session is refused. The refusal has then been sent, and the session has ended.
    pub(super) async fn authorize(
        self,
        connection: &mut SessionConnection,
        first_message: Option<&Value>,
    ) -> Result<usize, SessionEnded> {
        let key_index = self.find_payer(connection, first_message);
        connection.start().await?;
        let key_index = connection.require(key_index).await?;
        let permission_check = self.check_permission(&connection.session.provider, key_index);
        connection.require(permission_check).await?;
        let payer = connection.session.provider.plan.keys.get(key_index).map(|plan| plan.key.clone());
        connection.session.update_summary(|socket| socket.payer = payer);
        Ok(key_index)
    }

    /// Refuses a key without the required permission, and an unpaid bill.
    fn check_permission(&self, provider: &Provider, key_index: usize) -> Result<(), Refusal> {
        let state = provider.state();
        // The caller of a public agent in another workspace needs no permission there.
        let is_public_caller = self.agent_id.is_some()
            && self.token.is_none()
            && self.presented_key != PresentedKey::Known(key_index);
        if let Some(permission) = self.permission.filter(|_| !is_public_caller) {
            state.accounts.check_permission(key_index, permission)?;
        }
        Ok(state.accounts.check_billing(key_index)?)
    }

    /// Finds the index of the paying key. If the key comes with the first message, takes the faults of its script.
    fn find_payer(
        &self,
        connection: &mut SessionConnection,
        first_message: Option<&Value>,
    ) -> Result<usize, Refusal> {
        let provider = connection.session.provider.clone();
        let message_token =
            first_message.and_then(|message| message.get("single_use_token")).and_then(Value::as_str);
        if let (Some(token), Some(scope)) = (self.token.as_deref().or(message_token), &self.scope) {
            let key_index = provider.state().tokens.consume(token, scope, clock::now());
            return key_index.ok_or(RefusalKind::InvalidKey.into());
        }
        if let Some(agent_id) = &self.agent_id {
            let key_index = self.has_key_in_head().then(|| require_key(self.presented_key)).transpose()?;
            if agent_id.is_empty() {
                return Err(RefusalKind::FieldMissing("agent_id".into()).into());
            }
            return provider.state().accounts.find_agent_payer(agent_id, key_index);
        }
        let mut presented_key = self.presented_key;
        if let (PresentedKey::Absent, Some(key)) = (presented_key, first_message.and_then(credential_of)) {
            presented_key = provider.find_key(key);
            // The script of this key applies now, because the head did not contain the key.
            let fault = provider.take_fault(presented_key, &Method::GET, &self.path);
            connection.faults = SessionFaults::new(fault, &provider, presented_key);
        }
        Ok(require_key(presented_key)?)
    }
}
