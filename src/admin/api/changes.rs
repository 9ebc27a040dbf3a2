//! Changes: parses the bodies of requests, sends the changes to their task, and answers with the result.

use std::net::IpAddr;

use http::{Method, StatusCode};
use serde_json::json;

use super::documents;
use super::error::ApiError;
use super::fields::Fields;
use super::router::{KeyAction, Resource};
use super::{Admin, Answer};
use crate::admin::control::{Actor, Change, ChangeOrigin, ClientRules, MAX_REASON_CHARS, NewKey};
use crate::policy::units::UnixMs;
use crate::pool::Pool;
use crate::secret::ApiKey;

/// The origin of the changes of a client of the API.
pub(super) fn origin(peer: Option<IpAddr>) -> ChangeOrigin {
    ChangeOrigin { actor: Actor::AdminToken, address: peer }
}

/// The members of a client's rules.
const RULES: [&str; 9] = [
    "quota",
    "user_quota",
    "rate_limit",
    "max_concurrent",
    "paths",
    "keys",
    "workspaces",
    "bring_your_own_key",
    "provider_tokens",
];

/// Parses the change that a request orders.
pub(super) fn parse(
    resource: Resource<'_>,
    method: &Method,
    fields: Fields,
    pool: &Pool,
    now: UnixMs,
) -> Result<Change, ApiError> {
    match resource {
        Resource::Keys => add_key(&fields),
        Resource::Key(id) => {
            fields.check(&[])?;
            Ok(Change::RemoveKey { key: known_key(pool, id)? })
        }
        Resource::KeyAction(id, KeyAction::Pause) => {
            fields.check(&["until", "reason"])?;
            let reason = fields.text("reason")?.filter(|reason| !reason.trim().is_empty());
            if let Some(reason) = &reason {
                check_reason(reason)?;
            }
            let until = fields.future_time("until", now)?;
            Ok(Change::PauseKey { key: known_key(pool, id)?, until, reason })
        }
        Resource::KeyAction(id, KeyAction::Resume) => {
            fields.check(&[])?;
            Ok(Change::ResumeKey { key: known_key(pool, id)? })
        }
        Resource::Clients => {
            fields.check(&[&["name", "expires_at"], RULES.as_slice()].concat())?;
            Ok(Change::AddClient {
                name: fields.required_text("name")?,
                rules: client_rules(&fields)?,
                expires_at: fields.future_time("expires_at", now)?,
            })
        }
        Resource::Client(name) if *method == Method::PATCH => {
            fields.check(&RULES)?;
            let rules = client_rules(&fields)?;
            if rules == ClientRules::default() {
                let message = format!("The body changes nothing. It may have: {}.", RULES.join(", "));
                return Err(ApiError::bad_request("missing_member", message));
            }
            Ok(Change::SetClient { name: name.to_owned(), rules })
        }
        Resource::Client(name) => {
            fields.check(&[])?;
            Ok(Change::RevokeClient { name: name.to_owned() })
        }
        Resource::ClientRotation(name) => {
            fields.check(&["grace", "expires_at"])?;
            Ok(Change::RotateClient {
                name: name.to_owned(),
                grace: fields.duration("grace")?.unwrap_or_default(),
                expires_at: fields.future_time("expires_at", now)?,
            })
        }
        Resource::Reload => {
            fields.check(&[])?;
            Ok(Change::Reload)
        }
        Resource::KeyAction(_, KeyAction::Check)
        | Resource::Overview
        | Resource::Usage
        | Resource::Attempts
        | Resource::Config
        | Resource::Changes
        | Resource::Me => Err(ApiError::unknown_path()),
    }
}

fn add_key(fields: &Fields) -> Result<Change, ApiError> {
    fields.check(&["name", "key", "workspace", "base_url", "weight"])?;
    let key = ApiKey::new(fields.required_text("key")?.trim()).map_err(|_| {
        let message = "The member `key` is not an API key: it contains a space, a control character or a \
                       character outside ASCII.";
        ApiError::bad_request("malformed_key", message)
    })?;
    Ok(Change::AddKey(NewKey {
        name: fields.required_text("name")?,
        key,
        workspace: fields.text("workspace")?.filter(|workspace| !workspace.is_empty()),
        base_url: fields.text("base_url")?.filter(|url| !url.is_empty()),
        weight: fields.number("weight")?,
    }))
}

fn client_rules(fields: &Fields) -> Result<ClientRules, ApiError> {
    Ok(ClientRules {
        quota: fields.text("quota")?,
        user_quota: fields.text("user_quota")?,
        rate_limit: fields.text("rate_limit")?,
        max_concurrent: fields.number("max_concurrent")?,
        paths: fields.texts("paths")?,
        keys: fields.texts("keys")?,
        workspaces: fields.texts("workspaces")?,
        bring_your_own_key: fields.boolean("bring_your_own_key")?,
        provider_tokens: fields.boolean("provider_tokens")?,
    })
}

fn check_reason(reason: &str) -> Result<(), ApiError> {
    if reason.chars().count() <= MAX_REASON_CHARS && !reason.chars().any(char::is_control) {
        return Ok(());
    }
    let message = format!(
        "The member `reason` may have at most {MAX_REASON_CHARS} characters, and no line break or other \
         control character."
    );
    Err(ApiError::bad_request("invalid_member", message))
}

/// The id of a key, which must be in the pool.
fn known_key(pool: &Pool, id: &str) -> Result<String, ApiError> {
    let is_known = pool.roster().keys().iter().any(|key| documents::key_id(key) == id);
    if is_known { Ok(id.to_owned()) } else { Err(ApiError::not_found("key_not_found", "key", id)) }
}

impl Admin {
    /// Makes a change. Answers with the generation, and with the key or the new token.
    pub(super) async fn change(
        &self,
        change: Change,
        expected_generation: Option<u64>,
        origin: ChangeOrigin,
    ) -> Result<Answer, ApiError> {
        let control = self.control.as_ref().ok_or_else(ApiError::no_control)?;
        let (status, client) = match &change {
            Change::AddKey(_) => (StatusCode::CREATED, None),
            Change::AddClient { name, .. } => (StatusCode::CREATED, Some(name.clone())),
            Change::SetClient { name, .. }
            | Change::RotateClient { name, .. }
            | Change::RevokeClient { name } => (StatusCode::OK, Some(name.clone())),
            Change::RemoveKey { .. }
            | Change::PauseKey { .. }
            | Change::ResumeKey { .. }
            | Change::Reload => (StatusCode::OK, None),
        };
        let receipt = control.make(change, expected_generation, origin).await?;
        let mut document = json!({"generation": receipt.generation, "warnings": receipt.warnings});
        if let Some(members) = document.as_object_mut() {
            members.extend(receipt.key_id.map(|id| ("key_id".to_owned(), json!(id))));
            members.extend(client.map(|name| ("client".to_owned(), json!(name))));
            // The only response that has the token, and it has it once.
            members.extend(receipt.token.map(|token| ("token".to_owned(), json!(token.expose()))));
        }
        Ok(Answer { generation: Some(receipt.generation), ..Answer::new(status, &document) })
    }
}
