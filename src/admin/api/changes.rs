//! Parses a change of an operator from a request, sends it to the task that makes changes, and responds with its
//! receipt.

use std::net::IpAddr;

use http::{Method, StatusCode};
use serde_json::json;

use super::documents;
use super::error::ApiError;
use super::json_members::JsonMembers;
use super::router::{KeyAction, Resource};
use super::{Admin, ApiResponse};
use crate::admin::control::{
    Actor, Change, ChangeOrigin, ChangeReceipt, ClientRules, MAX_REASON_CHARS, NewKey, TokenExpiry,
    is_valid_reason,
};
use crate::policy::client::RULE_NAMES;
use crate::policy::units::UnixMs;
use crate::pool::Pool;
use crate::secret::ApiKey;

/// Returns the origin of a change that an API client requests.
pub(super) fn change_origin(peer: Option<IpAddr>) -> ChangeOrigin {
    ChangeOrigin { actor: Actor::AdminToken, address: peer }
}

/// Parses the change that a request describes.
pub(super) fn parse_change(
    resource: Resource<'_>,
    method: &Method,
    members: JsonMembers,
    pool: &Pool,
    now: UnixMs,
) -> Result<Change, ApiError> {
    match resource {
        Resource::Keys => parse_new_key(&members),
        Resource::Key(id) => {
            members.reject_unknown(&[])?;
            Ok(Change::RemoveKey { key: known_key_id(pool, id)? })
        }
        Resource::KeyAction(id, KeyAction::Pause) => {
            members.reject_unknown(&["until", "reason"])?;
            let reason = members.string("reason")?.filter(|reason| !reason.trim().is_empty());
            if let Some(reason) = &reason {
                require_valid_reason(reason)?;
            }
            let until = members.future_time("until", now)?;
            Ok(Change::PauseKey { key: known_key_id(pool, id)?, until, reason })
        }
        Resource::KeyAction(id, KeyAction::Resume) => {
            members.reject_unknown(&[])?;
            Ok(Change::ResumeKey { key: known_key_id(pool, id)? })
        }
        Resource::Clients => {
            members.reject_unknown(&[&["name", "expires", "expires_at"], RULE_NAMES.as_slice()].concat())?;
            Ok(Change::AddClient {
                name: members.required_string("name")?,
                rules: client_rules(&members)?,
                expires_at: token_expiry(&members, now)?,
            })
        }
        Resource::Client(name) if *method == Method::PATCH => {
            let known_members = [RULE_NAMES.as_slice(), &["expires_at"]].concat();
            members.reject_unknown(&known_members)?;
            let rules = client_rules(&members)?;
            let expiry = match members.future_time("expires_at", now)? {
                Some(time) => Some(TokenExpiry::At(time)),
                None => members.is_null("expires_at").then_some(TokenExpiry::Never),
            };
            if rules == ClientRules::default() && expiry.is_none() {
                let message =
                    format!("The body changes nothing. It may contain: {}.", known_members.join(", "));
                return Err(ApiError::bad_request("missing_member", message));
            }
            Ok(Change::SetClient { name: name.to_owned(), rules, expiry })
        }
        Resource::Client(name) => {
            members.reject_unknown(&[])?;
            Ok(Change::RevokeClient { name: name.to_owned() })
        }
        Resource::ClientRotation(name) => {
            members.reject_unknown(&["grace", "expires", "expires_at"])?;
            Ok(Change::RotateClient {
                name: name.to_owned(),
                grace: members.duration("grace")?.unwrap_or_default(),
                expires_at: token_expiry(&members, now)?,
            })
        }
        Resource::Reload => {
            members.reject_unknown(&[])?;
            Ok(Change::Reload)
        }
        Resource::KeyAction(_, KeyAction::Check)
        | Resource::Overview
        | Resource::Usage
        | Resource::Attempts
        | Resource::Config
        | Resource::Changes
        | Resource::Events
        | Resource::DashboardCodes
        | Resource::Me => Err(ApiError::unknown_path()),
    }
}

fn parse_new_key(members: &JsonMembers) -> Result<Change, ApiError> {
    members.reject_unknown(&["name", "key", "workspace", "base_url", "weight"])?;
    let key = ApiKey::new(members.required_string("key")?.trim()).map_err(|_| {
        let message = "The member `key` is not an API key: it is empty, or it contains a space, a control \
                       character or a character outside ASCII.";
        ApiError::bad_request("malformed_key", message)
    })?;
    Ok(Change::AddKey(NewKey {
        name: members.required_string("name")?,
        key,
        workspace: members.string("workspace")?.filter(|workspace| !workspace.is_empty()),
        base_url: members.string("base_url")?.filter(|url| !url.is_empty()),
        weight: members.number("weight")?,
    }))
}

/// Returns the time at which a new token expires: after the duration `expires`, or at `expires_at`.
fn token_expiry(members: &JsonMembers, now: UnixMs) -> Result<Option<UnixMs>, ApiError> {
    let expires_at = members.future_time("expires_at", now)?;
    match members.duration("expires")? {
        None => Ok(expires_at),
        Some(_) if expires_at.is_some() => {
            let message = "The members `expires` and `expires_at` exclude each other.";
            Err(ApiError::bad_request("invalid_member", message))
        }
        Some(duration) if duration.is_zero() => {
            let message = "The member `expires` must be longer than 0.";
            Err(ApiError::bad_request("invalid_member", message))
        }
        Some(duration) => Ok(Some(now.plus(duration))),
    }
}

/// Returns the rules of a client that the body contains.
fn client_rules(members: &JsonMembers) -> Result<ClientRules, ApiError> {
    Ok(ClientRules {
        quota: members.string("quota")?,
        user_quota: members.string("user_quota")?,
        rate_limit: members.string("rate_limit")?,
        max_concurrent: members.number("max_concurrent")?,
        paths: members.strings("paths")?,
        keys: members.strings("keys")?,
        workspaces: members.strings("workspaces")?,
        bring_your_own_key: members.boolean("bring_your_own_key")?,
        provider_tokens: members.boolean("provider_tokens")?,
    })
}

fn require_valid_reason(reason: &str) -> Result<(), ApiError> {
    if is_valid_reason(reason) {
        return Ok(());
    }
    let message = format!(
        "The member `reason` may have at most {MAX_REASON_CHARS} characters, and no line break or other \
         control character."
    );
    Err(ApiError::bad_request("invalid_member", message))
}

/// Returns `id`, or an error if no key of the pool has this id.
fn known_key_id(pool: &Pool, id: &str) -> Result<String, ApiError> {
    let is_known = pool.roster().keys().iter().any(|key| documents::key_id(key) == id);
    if is_known { Ok(id.to_owned()) } else { Err(ApiError::key_not_found()) }
}

impl Admin {
    /// Makes a change. The response contains the generation and the warnings, and, depending on the change, the key id,
    /// the client name and the new token.
    pub(super) async fn make_change(
        &self,
        change: Change,
        expected_generation: Option<u64>,
        origin: ChangeOrigin,
    ) -> Result<ApiResponse, ApiError> {
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
        let receipt = self.send_change(change, expected_generation, origin).await?;
        let mut document = json!({"generation": receipt.generation, "warnings": receipt.warnings});
        if let Some(members) = document.as_object_mut() {
            members.extend(receipt.key_id.map(|id| ("key_id".to_owned(), json!(id))));
            members.extend(client.map(|name| ("client".to_owned(), json!(name))));
            // This is the only response that contains the token.
            members.extend(receipt.token.map(|token| ("token".to_owned(), json!(token.expose()))));
        }
        Ok(ApiResponse { generation: Some(receipt.generation), ..ApiResponse::new(status, &document) })
    }

    /// Sends a change to the task that makes changes. Returns its receipt.
    pub(super) async fn send_change(
        &self,
        change: Change,
        expected_generation: Option<u64>,
        origin: ChangeOrigin,
    ) -> Result<ChangeReceipt, ApiError> {
        let control = self.control.as_ref().ok_or_else(ApiError::no_control)?;
        Ok(control.make(change, expected_generation, origin).await?)
    }
}
