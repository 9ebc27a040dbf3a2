//! Adds, changes, rotates and revokes clients in the overlay.

use std::time::Duration;

use serde_json::json;

use super::{EditSummary, check_is_future};
use crate::admin::control::{ClientRules, ClientToken, ControlError, TokenExpiry};
use crate::config::{ClientConfig, Config, ManagedClient, ManagedRules, Overlay};
use crate::policy::client::Rules;
use crate::policy::quantity::duration::DisplayDuration;
use crate::policy::units::UnixMs;
use crate::secret::TokenFingerprint;

/// Edits the clients in an overlay.
pub(super) struct ClientEditor<'a> {
    pub(super) overlay: &'a mut Overlay,
    /// The configuration with the overlay as it is before the edit.
    pub(super) config: &'a Config,
    pub(super) now: UnixMs,
}

impl ClientEditor<'_> {
    /// Adds a client with a new token.
    pub(super) fn add(
        self,
        name: &str,
        rules: &ClientRules,
        expires_at: Option<UnixMs>,
        token: String,
    ) -> Result<EditSummary, ControlError> {
        let Self { overlay, config, now } = self;
        if config.clients.iter().any(|client| client.name == name) {
            return Err(ControlError::AlreadyExists(format!("a client named `{name}` already exists")));
        }
        check_is_future(expires_at, now, "the end of the token")?;
        let mut new_rules = replace_rules(rules, ManagedRules::default());
        let revoked_entry = overlay.clients.iter().position(|client| client.name == name);
        let revoked_entry = revoked_entry.map(|index| overlay.clients.remove(index));
        if revoked_entry.is_some() {
            // The entry replaces the rules of the revoked client in the configuration file.
            ensure_one_rule(&mut new_rules);
        }
        overlay.clients.push(ManagedClient {
            name: name.to_owned(),
            token_sha256: Some(TokenFingerprint::new(&token).to_string()),
            expires_at,
            replaced_token_sha256: revoked_entry.and_then(|client| client.replaced_token_sha256),
            rules: new_rules,
            ..ManagedClient::default()
        });
        let detail = json!({"expires_at": expires_at.map(UnixMs::rfc3339), "rules": rules.to_json()});
        let token = Some(ClientToken::new(token));
        let mut summary = EditSummary::for_client("client_added", name, detail);
        if config.clients.is_empty() {
            summary
                .warnings
                .push("this is the first client: from now on, requests without a token get 401".to_owned());
        }
        Ok(EditSummary { token, ..summary })
    }

    /// Replaces the rules that `rules` sets, and the end of the current token.
    pub(super) fn set(
        self,
        name: &str,
        rules: &ClientRules,
        expiry: Option<TokenExpiry>,
    ) -> Result<EditSummary, ControlError> {
        let Self { overlay, config, now } = self;
        let client = find_client(name, config)?;
        let changes_rules = *rules != ClientRules::default();
        if !changes_rules && expiry.is_none() {
            return Err(ControlError::Invalid("the change names no rule and no end of the token".to_owned()));
        }
        let entry = client_entry(client, overlay);
        let mut detail = json!({"rules": rules.to_json()});
        if let Some(expiry) = expiry {
            let expires_at = match expiry {
                TokenExpiry::Never => None,
                TokenExpiry::At(time) => Some(time),
            };
            check_is_future(expires_at, now, "the end of the token")?;
            entry.expires_at = expires_at;
            detail["expires_at"] = expires_at.map(UnixMs::rfc3339).into();
        }
        if changes_rules {
            let mut next = replace_rules(rules, format_rules(&client.rules, &entry.rules));
            if client.origin.is_in_file() {
                ensure_one_rule(&mut next);
            }
            entry.rules = next;
        }
        Ok(EditSummary::for_client("client_changed", name, detail))
    }

    /// Replaces a client token. The previous token stays valid for `grace`.
    pub(super) fn rotate(
        self,
        name: &str,
        grace: Duration,
        expires_at: Option<UnixMs>,
        token: String,
    ) -> Result<EditSummary, ControlError> {
        let Self { overlay, config, now } = self;
        let client = find_client(name, config)?;
        // A token with an end is not replaced by one that never expires.
        let expires_at = expires_at.or(client.expires_at);
        check_is_future(expires_at, now, "the end of the token")?;
        let has_valid_previous = client.previous_token.is_some_and(|(_, end)| end > now);
        if has_valid_previous && !grace.is_zero() {
            return Err(ControlError::GraceNotEnded);
        }
        let grace_end = now.plus(grace);
        // The grace period does not prolong the validity of the previous token.
        let previous_end = client.expires_at.map_or(grace_end, |end| end.min(grace_end));
        let previous_token = (previous_end > now).then_some(client.token);
        let entry = client_entry(client, overlay);
        entry.replaced_token_sha256.get_or_insert_with(|| client.token.to_string());
        entry.token_sha256 = Some(TokenFingerprint::new(&token).to_string());
        entry.expires_at = expires_at;
        entry.previous_token_sha256 = previous_token.map(|previous_token| previous_token.to_string());
        entry.previous_token_expires_at = previous_token.map(|_| previous_end);
        let detail = json!({
            "grace": DisplayDuration(grace).to_string(),
            "expires_at": expires_at.map(UnixMs::rfc3339),
        });
        let token = Some(ClientToken::new(token));
        Ok(EditSummary { token, ..EditSummary::for_client("client_rotated", name, detail) })
    }

    /// Removes a client and its tokens. For a client of the configuration file, the overlay gets an entry that revokes
    /// it.
    pub(super) fn revoke(self, name: &str) -> Result<EditSummary, ControlError> {
        let Self { overlay, config, now: _ } = self;
        let client = find_client(name, config)?;
        if config.clients.len() == 1 {
            return Err(ControlError::LastClient);
        }
        let earlier_index = overlay.clients.iter().position(|entry| entry.name == name);
        let earlier_entry = earlier_index.map(|index| overlay.clients.remove(index));
        if client.origin.is_in_file() {
            let replaced_token = earlier_entry.and_then(|entry| entry.replaced_token_sha256);
            overlay.clients.push(ManagedClient {
                name: name.to_owned(),
                replaced_token_sha256: Some(replaced_token.unwrap_or_else(|| client.token.to_string())),
                revoked: true,
                ..ManagedClient::default()
            });
        }
        Ok(EditSummary::for_client("client_revoked", name, json!({})))
    }
}

fn find_client<'a>(name: &str, config: &'a Config) -> Result<&'a ClientConfig, ControlError> {
    let client = config.clients.iter().find(|client| client.name == name);
    client.ok_or_else(|| {
        // The error does not contain the name, because it may be a token that was passed by mistake.
        ControlError::NotFound("no client has this name: `keychoir clients list` lists them".to_owned())
    })
}

/// Returns the entry of a client in the overlay. Adds the entry if it is missing.
fn client_entry<'a>(client: &ClientConfig, overlay: &'a mut Overlay) -> &'a mut ManagedClient {
    let index = overlay.clients.iter().position(|entry| entry.name == client.name).unwrap_or_else(|| {
        overlay.clients.push(ManagedClient { name: client.name.clone(), ..ManagedClient::default() });
        overlay.clients.len() - 1
    });
    &mut overlay.clients[index]
}

/// Returns the rules of a client in the notation of `[[clients]]`. If the entry in the overlay has rules, they stay as
/// they are written there.
fn format_rules(rules: &Rules, written: &ManagedRules) -> ManagedRules {
    if *written != ManagedRules::default() {
        return written.clone();
    }
    ManagedRules::from(rules)
}

/// Replaces the rules that `change` sets. An empty text or list, a zero or `false` removes the rule.
fn replace_rules(change: &ClientRules, mut rules: ManagedRules) -> ManagedRules {
    let replace_text = |rule: &mut Option<String>, text: &Option<String>| {
        if let Some(text) = text {
            *rule = Some(text.trim().to_owned()).filter(|text| !text.is_empty());
        }
    };
    let replace_list = |rule: &mut Vec<String>, list: &Option<Vec<String>>| {
        if let Some(list) = list {
            rule.clone_from(list);
        }
    };
    replace_text(&mut rules.quota, &change.quota);
    replace_text(&mut rules.user_quota, &change.user_quota);
    replace_text(&mut rules.rate_limit, &change.rate_limit);
    if let Some(count) = change.max_concurrent {
        rules.max_concurrent = Some(count).filter(|count| *count > 0);
    }
    replace_list(&mut rules.paths, &change.paths);
    replace_list(&mut rules.keys, &change.keys);
    replace_list(&mut rules.workspaces, &change.workspaces);
    if let Some(is_allowed) = change.bring_your_own_key {
        rules.bring_your_own_key = is_allowed.then_some(true);
    }
    if let Some(is_allowed) = change.provider_tokens {
        rules.provider_tokens = is_allowed.then_some(true);
    }
    rules
}

/// Adds a rule without effect if there are no rules, because an entry without rules keeps the rules of the
/// configuration file.
fn ensure_one_rule(rules: &mut ManagedRules) {
    if *rules == ManagedRules::default() {
        rules.bring_your_own_key = Some(false);
    }
}
