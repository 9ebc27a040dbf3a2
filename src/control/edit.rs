//! Edits the overlay: from a change, the current overlay and the current configuration to the next overlay.
//! Nothing is read or written here.

use std::time::Duration;

use serde_json::{Value, json};

use crate::admin::control::{
    Change, ClientRules, ClientToken, ControlError, MAX_REASON_CHARS, NewKey, TokenExpiry,
};
use crate::config::{
    ClientConfig, Config, KEYS_FOLDER, KeyConfig, ManagedClient, ManagedKey, ManagedRules, Overlay, PausedKey,
};
use crate::policy::client::Rules;
use crate::policy::key_state::KeyOrigin;
use crate::policy::quantity::duration::DisplayDuration;
use crate::policy::units::UnixMs;
use crate::secret::{ApiKey, TokenFingerprint};

/// The digits of a key's fingerprint that are its id in the admin API.
const KEY_ID_DIGITS: usize = 12;

/// An edited overlay.
pub(super) struct Edit {
    pub(super) overlay: Overlay,
    /// The name of a new key, which is also that of its file.
    pub(super) new_key: Option<(String, ApiKey)>,
    pub(super) summary: EditSummary,
}

/// The parts of a record and of a receipt that depend on the change.
pub(super) struct EditSummary {
    pub(super) action: &'static str,
    pub(super) target: String,
    pub(super) detail: Value,
    pub(super) key_id: Option<String>,
    pub(super) token: Option<ClientToken>,
    pub(super) warnings: Vec<String>,
}

impl EditSummary {
    fn for_key(action: &'static str, key: &ApiKey, name: Option<&str>, detail: Value) -> Self {
        let target = name.unwrap_or(key.short().as_str()).to_owned();
        Self { action, target, detail, key_id: Some(key_id(key)), token: None, warnings: Vec::new() }
    }

    fn for_client(action: &'static str, name: &str, detail: Value) -> Self {
        Self { action, target: name.to_owned(), detail, key_id: None, token: None, warnings: Vec::new() }
    }
}

/// Edits the overlay. `token` is the new token of a client, if the change needs one.
pub(super) fn edit(
    change: Change,
    mut overlay: Overlay,
    config: &Config,
    now: UnixMs,
    token: String,
) -> Result<Edit, ControlError> {
    // Pauses that have ended are not kept.
    overlay.paused_keys.retain(|paused| paused.until.is_none_or(|until| until > now));
    let mut new_key = None;
    let summary = match change {
        Change::AddKey(key) => add_key(key, &mut overlay, &mut new_key, config)?,
        Change::RemoveKey { key } => remove_key(&key, &mut overlay, config)?,
        Change::PauseKey { key, until, reason } => pause_key(&key, until, reason, &mut overlay, config, now)?,
        Change::ResumeKey { key } => resume_key(&key, &mut overlay, config)?,
        Change::AddClient { name, rules, expires_at } => {
            add_client(&name, &rules, expires_at, token, &mut overlay, config, now)?
        }
        Change::SetClient { name, rules, expiry } => {
            set_client(&name, &rules, expiry, &mut overlay, config, now)?
        }
        Change::RotateClient { name, grace, expires_at } => {
            rotate_client(&name, grace, expires_at, token, &mut overlay, config, now)?
        }
        Change::RevokeClient { name } => revoke_client(&name, &mut overlay, config)?,
        Change::Reload => return Err(ControlError::Invalid("a reload edits nothing".to_owned())),
    };
    Ok(Edit { overlay, new_key, summary })
}

fn key_id(key: &ApiKey) -> String {
    let mut id = key.fingerprint().to_string();
    id.truncate(KEY_ID_DIGITS);
    id
}

/// The name of a key for messages.
fn label(key: &KeyConfig) -> &str {
    key.name.as_deref().unwrap_or(key.key.short().as_str())
}

/// Finds a key by its id, name or short form.
fn find_key<'a>(text: &str, config: &'a Config) -> Result<&'a KeyConfig, ControlError> {
    let by_id = config.keys.iter().find(|key| key_id(&key.key) == text);
    let by_name = || config.keys.iter().find(|key| key.name.as_deref() == Some(text));
    if let Some(key) = by_id.or_else(by_name) {
        return Ok(key);
    }
    let mut by_short_form = config.keys.iter().filter(|key| key.key.short().as_str() == text);
    match (by_short_form.next(), by_short_form.next()) {
        (Some(key), None) => Ok(key),
        (Some(_), Some(_)) => {
            Err(ControlError::Invalid("several keys have this short form: use the id of the key".to_owned()))
        }
        // The text is not repeated: it may be a key that was passed by mistake.
        (None, _) => Err(ControlError::NotFound(
            "the pool has no key with this id, name or short form: `keychoir keys list` lists them"
                .to_owned(),
        )),
    }
}

fn add_key(
    key: NewKey,
    overlay: &mut Overlay,
    new_key: &mut Option<(String, ApiKey)>,
    config: &Config,
) -> Result<EditSummary, ControlError> {
    let NewKey { name, key, workspace, base_url, weight } = key;
    if let Some(same) = config.keys.iter().find(|other| other.key.fingerprint() == key.fingerprint()) {
        return Err(ControlError::AlreadyExists(format!("the pool has this key already: {}", label(same))));
    }
    if name.len() == KEY_ID_DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let message = format!("a name of {KEY_ID_DIGITS} hexadecimal digits could be the id of another key");
        return Err(ControlError::Invalid(message));
    }
    let has_name = config.keys.iter().any(|other| other.name.as_deref() == Some(&*name));
    if has_name || overlay.keys.iter().any(|other| other.name == name) {
        return Err(ControlError::AlreadyExists(format!("a key named `{name}` already exists")));
    }
    let detail = json!({
        "short_key": key.short().as_str(),
        "workspace": workspace,
        "base_url": base_url,
        "weight": weight,
    });
    let summary = EditSummary::for_key("key_added", &key, Some(&name), detail);
    let key_file = format!("{KEYS_FOLDER}/{name}");
    overlay.keys.push(ManagedKey { name: name.clone(), key_file, workspace, base_url, weight });
    *new_key = Some((name, key));
    Ok(summary)
}

fn remove_key(text: &str, overlay: &mut Overlay, config: &Config) -> Result<EditSummary, ControlError> {
    let is_used = |key: &KeyConfig| key.origin == KeyOrigin::Managed && key.name.as_deref() == Some(text);
    if let Some(index) = overlay.keys.iter().position(|managed| managed.name == text)
        && !config.keys.iter().any(is_used)
    {
        // The entry has no effect, because another source has the same key.
        let ManagedKey { name, .. } = overlay.keys.remove(index);
        let detail = json!({});
        let (action, target) = ("key_removed", name);
        return Ok(EditSummary { action, target, detail, key_id: None, token: None, warnings: Vec::new() });
    }
    let key = find_key(text, config)?;
    let configured_in = match key.origin {
        KeyOrigin::Managed => None,
        KeyOrigin::Environment => Some("the environment"),
        KeyOrigin::File => Some("a file of the configuration"),
    };
    if let Some(configured_in) = configured_in {
        return Err(ControlError::NotManaged(format!(
            "the key {} is configured in {configured_in}: remove it there; here it can only be paused",
            label(key)
        )));
    }
    let fingerprint = key.key.fingerprint().to_string();
    overlay.keys.retain(|managed| Some(&managed.name) != key.name.as_ref());
    overlay.paused_keys.retain(|paused| paused.fingerprint != fingerprint);
    let detail = json!({"short_key": key.key.short().as_str()});
    Ok(EditSummary::for_key("key_removed", &key.key, key.name.as_deref(), detail))
}

fn pause_key(
    text: &str,
    until: Option<UnixMs>,
    reason: Option<String>,
    overlay: &mut Overlay,
    config: &Config,
    now: UnixMs,
) -> Result<EditSummary, ControlError> {
    let key = find_key(text, config)?;
    check_future(until, now, "the end of the pause")?;
    let reason = reason.map(|reason| reason.trim().to_owned()).filter(|reason| !reason.is_empty());
    if let Some(reason) = &reason
        && (reason.chars().count() > MAX_REASON_CHARS || reason.chars().any(char::is_control))
    {
        let message = format!("the reason must be one line of at most {MAX_REASON_CHARS} characters");
        return Err(ControlError::Invalid(message));
    }
    let fingerprint = key.key.fingerprint().to_string();
    let earlier = overlay.paused_keys.iter().position(|paused| paused.fingerprint == fingerprint);
    let since = earlier.map_or(now, |index| overlay.paused_keys.remove(index).since);
    let detail = json!({"until": until.map(UnixMs::rfc3339), "reason": reason});
    let short_key = key.key.short().to_string();
    overlay.paused_keys.push(PausedKey { fingerprint, short_key, since, until, reason });
    Ok(EditSummary::for_key("key_paused", &key.key, key.name.as_deref(), detail))
}

fn resume_key(text: &str, overlay: &mut Overlay, config: &Config) -> Result<EditSummary, ControlError> {
    let key = find_key(text, config)?;
    let fingerprint = key.key.fingerprint().to_string();
    let Some(index) = overlay.paused_keys.iter().position(|paused| paused.fingerprint == fingerprint) else {
        return Err(ControlError::NotPaused(format!("the key {} is not paused", label(key))));
    };
    overlay.paused_keys.remove(index);
    Ok(EditSummary::for_key("key_resumed", &key.key, key.name.as_deref(), json!({})))
}

fn add_client(
    name: &str,
    rules: &ClientRules,
    expires_at: Option<UnixMs>,
    token: String,
    overlay: &mut Overlay,
    config: &Config,
    now: UnixMs,
) -> Result<EditSummary, ControlError> {
    if config.clients.iter().any(|client| client.name == name) {
        return Err(ControlError::AlreadyExists(format!("a client named `{name}` already exists")));
    }
    check_future(expires_at, now, "the end of the token")?;
    let mut new_rules = apply_rules(rules, ManagedRules::default());
    let revoked = overlay.clients.iter().position(|client| client.name == name);
    let revoked = revoked.map(|index| overlay.clients.remove(index));
    if revoked.is_some() {
        // The entry replaces the rules of the revoked client in the configuration file.
        keep_explicit(&mut new_rules);
    }
    overlay.clients.push(ManagedClient {
        name: name.to_owned(),
        token_sha256: Some(TokenFingerprint::new(&token).to_string()),
        expires_at,
        replaced_token_sha256: revoked.and_then(|client| client.replaced_token_sha256),
        rules: new_rules,
        ..ManagedClient::default()
    });
    let detail = json!({"expires_at": expires_at.map(UnixMs::rfc3339), "rules": rules.to_json()});
    let token = Some(ClientToken::new(token));
    Ok(EditSummary { token, ..EditSummary::for_client("client_added", name, detail) })
}

fn set_client(
    name: &str,
    rules: &ClientRules,
    expiry: Option<TokenExpiry>,
    overlay: &mut Overlay,
    config: &Config,
    now: UnixMs,
) -> Result<EditSummary, ControlError> {
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
        check_future(expires_at, now, "the end of the token")?;
        entry.expires_at = expires_at;
        detail["expires_at"] = expires_at.map(UnixMs::rfc3339).into();
    }
    if changes_rules {
        let mut next = apply_rules(rules, rules_in_notation(&client.rules, &entry.rules));
        if client.origin.is_in_file() {
            keep_explicit(&mut next);
        }
        entry.rules = next;
    }
    Ok(EditSummary::for_client("client_changed", name, detail))
}

fn rotate_client(
    name: &str,
    grace: Duration,
    expires_at: Option<UnixMs>,
    token: String,
    overlay: &mut Overlay,
    config: &Config,
    now: UnixMs,
) -> Result<EditSummary, ControlError> {
    let client = find_client(name, config)?;
    // A token that was to expire is not replaced by one that never expires.
    let expires_at = expires_at.or(client.expires_at);
    check_future(expires_at, now, "the end of the token")?;
    let has_valid_previous = client.previous_token.is_some_and(|(_, end)| end > now);
    if has_valid_previous && !grace.is_zero() {
        return Err(ControlError::GraceNotEnded);
    }
    let grace_end = now.plus(grace);
    // The grace does not prolong the life of the previous token.
    let previous_end = client.expires_at.map_or(grace_end, |end| end.min(grace_end));
    let previous = (previous_end > now).then_some(client.token);
    let entry = client_entry(client, overlay);
    entry.replaced_token_sha256.get_or_insert_with(|| client.token.to_string());
    entry.token_sha256 = Some(TokenFingerprint::new(&token).to_string());
    entry.expires_at = expires_at;
    entry.previous_token_sha256 = previous.map(|previous| previous.to_string());
    entry.previous_token_expires_at = previous.map(|_| previous_end);
    let detail = json!({
        "grace": DisplayDuration(grace).to_string(),
        "expires_at": expires_at.map(UnixMs::rfc3339),
    });
    let token = Some(ClientToken::new(token));
    Ok(EditSummary { token, ..EditSummary::for_client("client_rotated", name, detail) })
}

fn revoke_client(name: &str, overlay: &mut Overlay, config: &Config) -> Result<EditSummary, ControlError> {
    let client = find_client(name, config)?;
    if config.clients.len() == 1 {
        return Err(ControlError::LastClient);
    }
    let earlier = overlay.clients.iter().position(|entry| entry.name == name);
    let earlier = earlier.map(|index| overlay.clients.remove(index));
    if client.origin.is_in_file() {
        let replaced = earlier.and_then(|entry| entry.replaced_token_sha256);
        overlay.clients.push(ManagedClient {
            name: name.to_owned(),
            replaced_token_sha256: Some(replaced.unwrap_or_else(|| client.token.to_string())),
            revoked: true,
            ..ManagedClient::default()
        });
    }
    Ok(EditSummary::for_client("client_revoked", name, json!({})))
}

fn find_client<'a>(name: &str, config: &'a Config) -> Result<&'a ClientConfig, ControlError> {
    let client = config.clients.iter().find(|client| client.name == name);
    client.ok_or_else(|| {
        // The text is not repeated: it may be a token that was passed by mistake.
        ControlError::NotFound("no client has this name: `keychoir clients list` lists them".to_owned())
    })
}

/// The entry of a client in the overlay, which is added if it is missing.
fn client_entry<'a>(client: &ClientConfig, overlay: &'a mut Overlay) -> &'a mut ManagedClient {
    let index = overlay.clients.iter().position(|entry| entry.name == client.name).unwrap_or_else(|| {
        overlay.clients.push(ManagedClient { name: client.name.clone(), ..ManagedClient::default() });
        overlay.clients.len() - 1
    });
    &mut overlay.clients[index]
}

fn check_future(time: Option<UnixMs>, now: UnixMs, subject: &str) -> Result<(), ControlError> {
    match time {
        Some(time) if time <= now => Err(ControlError::Invalid(format!("{subject} is not in the future"))),
        Some(_) | None => Ok(()),
    }
}

/// Writes the rules of a client in the notation of `[[clients]]`. A rule that the entry in the overlay has
/// already stays as it is written.
fn rules_in_notation(rules: &Rules, written: &ManagedRules) -> ManagedRules {
    if *written != ManagedRules::default() {
        return written.clone();
    }
    let Rules {
        quota,
        user_quota,
        rate_limit,
        max_concurrent,
        paths,
        allowed_keys,
        may_bring_key,
        may_request_tokens,
    } = rules;
    ManagedRules {
        quota: quota.map(|quota| quota.to_string()),
        user_quota: user_quota.map(|quota| quota.to_string()),
        rate_limit: rate_limit.map(|rate_limit| rate_limit.to_string()),
        max_concurrent: *max_concurrent,
        paths: paths.clone(),
        keys: allowed_keys.keys.clone(),
        workspaces: allowed_keys.workspaces.clone(),
        bring_your_own_key: may_bring_key.then_some(true),
        provider_tokens: may_request_tokens.then_some(true),
    }
}

/// Replaces the rules that `change` sets. An empty text or list and a zero remove a rule.
fn apply_rules(change: &ClientRules, mut rules: ManagedRules) -> ManagedRules {
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

/// Writes at least one rule, because an entry without any keeps the rules of the configuration file.
fn keep_explicit(rules: &mut ManagedRules) {
    if *rules == ManagedRules::default() {
        rules.bring_your_own_key = Some(false);
    }
}
