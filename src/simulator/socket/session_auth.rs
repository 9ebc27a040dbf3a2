//! Identifies the caller and the paying key of a WebSocket. A token takes precedence over a key,
//! and the key of the head over the key of the first message. HTTP requests use `presented`
//! instead, because they have no first message.

use http::Method;
use http::request::Parts;
use serde_json::Value;

use crate::clock;

use super::super::job::require_key;
use super::super::shape::Shape;
use super::super::tokens::TokenScope;
use super::super::world::{Presented, World};
use super::message_check::credential_of;
use super::session_faults::SessionFaults;
use super::wire::{SessionEnded, Wire};
use super::{Kind, OrRefused, query_value};

#[derive(Clone, Debug)]
pub(super) struct SessionAuth {
    /// The path of the WebSocket, which selects faults of routes.
    path: String,
    presented: Presented,
    /// The token in the query.
    token: Option<String>,
    /// The endpoint for which a token must be valid.
    scope: Option<TokenScope>,
    permission: Option<&'static str>,
    /// The requested agent, if the WebSocket is a conversation.
    pub(super) agent: Option<String>,
}

impl SessionAuth {
    pub(super) fn of(kind: &Kind, presented: Presented, parts: &Parts) -> Self {
        let text = parts.uri.query().unwrap_or_default();
        let agent = matches!(kind, Kind::Agent).then(|| query_value(text, "agent_id").unwrap_or_default());
        let (token, scope, permission) = match kind {
            Kind::Speech { .. } => {
                (query_value(text, "single_use_token"), Some(TokenScope::Speech), Some("text_to_speech"))
            }
            Kind::Dialogue { .. } => {
                (query_value(text, "single_use_token"), Some(TokenScope::Speech), Some("text_to_speech"))
            }
            Kind::Agent => {
                let token =
                    query_value(text, "conversation_signature").or_else(|| query_value(text, "token"));
                (token, agent.clone().map(TokenScope::Agent), Some("convai_write"))
            }
            Kind::Scribe => {
                (query_value(text, "token"), Some(TokenScope::RealtimeScribe), Some("speech_to_text"))
            }
            Kind::Echo => (None, None, None),
        };
        let path = parts.uri.path().to_owned();
        Self { path, presented, token, scope, permission, agent }
    }

    /// The provider's name for the method of authorization (OpenAPI document).
    pub(super) fn authorization_method(&self) -> &'static str {
        match (&self.token, self.presented) {
            (Some(_), _) => "signed_url",
            (None, Presented::Known(_) | Presented::Unknown | Presented::OtherRegion) => {
                "authorization_header"
            }
            (None, Presented::Nothing) => "public",
        }
    }

    pub(super) fn has_key_in_head(&self) -> bool {
        self.presented != Presented::Nothing
    }

    /// The key whose scripted faults apply to the session. The key of a token takes precedence
    /// here, too.
    pub(super) fn script_key(&self, world: &World) -> Presented {
        let owner = self
            .token
            .as_ref()
            .zip(self.scope.as_ref())
            .and_then(|(token, scope)| world.state().tokens.owner(token, scope, clock::now()));
        owner.map_or(self.presented, Presented::Known)
    }

    /// Returns the key whose workspace pays. It must have the permission, and its bill must be
    /// paid. A token is consumed. `first` is the first message of the client, on WebSockets that
    /// read one. A scripted refusal takes precedence over all others, as over HTTP.
    ///
    /// # Errors
    ///
    /// When the session was refused. The refusal was sent, and the session has ended.
    pub(super) async fn authorize(
        self,
        wire: &mut Wire,
        first: Option<&Value>,
    ) -> Result<usize, SessionEnded> {
        let identified = self.identify(wire, first);
        wire.begin().await?;
        let authorized = match identified {
            Ok(key) => self.check_permission(&wire.session.world, key),
            Err(refused) => Err(refused),
        };
        match authorized {
            Ok((key, name)) => {
                wire.session.update_summary(|socket| socket.payer = Some(name));
                wire.key = Presented::Known(key);
                Ok(key)
            }
            Err(refused) => Err(wire.refuse(&refused).await),
        }
    }

    fn check_permission(&self, world: &World, key: usize) -> OrRefused<(usize, String)> {
        let state = world.state();
        // The caller of a public agent in another workspace needs no permission there.
        let is_public_caller =
            self.agent.is_some() && self.token.is_none() && self.presented != Presented::Known(key);
        if let Some(permission) = self.permission.filter(|_| !is_public_caller) {
            state.accounts.permit(key, permission)?;
        }
        state.accounts.billing(key)?;
        let owner = state.accounts.keys.get(key).ok_or(Shape::InvalidKey)?;
        Ok((key, owner.plan.key.clone()))
    }

    fn identify(&self, wire: &mut Wire, first: Option<&Value>) -> OrRefused<usize> {
        let world = wire.session.world.clone();
        let in_message = first.and_then(|first| first.get("single_use_token")).and_then(Value::as_str);
        if let (Some(token), Some(scope)) = (self.token.as_deref().or(in_message), &self.scope) {
            return world.state().tokens.take(token, scope, clock::now()).ok_or(Shape::InvalidKey.into());
        }
        if let Some(agent) = &self.agent {
            let key = match self.presented {
                Presented::Nothing => None,
                Presented::Known(_) | Presented::Unknown | Presented::OtherRegion => {
                    Some(require_key(self.presented)?)
                }
            };
            if agent.is_empty() {
                return Err(Shape::FieldMissing("agent_id".into()).into());
            }
            return world.state().accounts.agent_payer(agent, key);
        }
        let presented = match (self.presented, first.and_then(credential_of)) {
            (Presented::Nothing, Some(key)) => {
                let presented = world.find(key);
                // The head did not identify the key whose script applies.
                wire.faults = SessionFaults::of(
                    world.take_fault(presented, &Method::GET, &self.path),
                    &world,
                    presented,
                );
                presented
            }
            (presented, _) => presented,
        };
        Ok(require_key(presented)?)
    }
}
