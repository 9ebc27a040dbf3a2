//! Computes a change without reading or writing files: from the current overlay and the current configuration, it
//! returns the next overlay, the files of new keys, and the parts of the record in the database and of the receipt for
//! the operator. It refuses a change if a value is invalid, an added entry exists already, or a key or client is
//! unknown or cannot be changed here. It also refuses to resume a key that is not paused, to start a grace period of a
//! client before the earlier one has ended, and to revoke the last client.

mod clients;

use serde_json::{Value, json};

use super::overlay_state::{key_file_path, unused_file_name};
use crate::admin::control::{Change, ClientToken, ControlError, MAX_REASON_CHARS, NewKey, is_valid_reason};
use crate::config::{Config, EntryKind, KeyConfig, ManagedKey, Overlay, PausedKey};
use crate::policy::key_state::KeyOrigin;
use crate::policy::units::UnixMs;
use crate::secret::{ApiKey, KEY_ID_DIGITS};
use clients::ClientEditor;

/// The next overlay, the files of new keys, and the summary for the record and the receipt.
pub(super) struct Edit {
    pub(super) overlay: Overlay,
    pub(super) new_keys: Vec<KeyFile>,
    pub(super) summary: EditSummary,
}

/// The file of a new key.
pub(super) struct KeyFile {
    /// The file name: the key name, followed by the fingerprint if another key uses the file with this name.
    pub(super) name: String,
    pub(super) key: ApiKey,
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
        Self {
            action,
            target,
            detail,
            key_id: Some(key.fingerprint().key_id()),
            token: None,
            warnings: Vec::new(),
        }
    }

    fn for_client(action: &'static str, name: &str, detail: Value) -> Self {
        Self { action, target: name.to_owned(), detail, key_id: None, token: None, warnings: Vec::new() }
    }
}

/// Edits the overlay. The caller sets the times of the changed entries. `token` becomes the new token of the client, if
/// the change needs one.
pub(super) fn edit_overlay(
    change: Change,
    mut overlay: Overlay,
    config: &Config,
    now: UnixMs,
    token: String,
) -> Result<Edit, ControlError> {
    check_left_out(&change, &overlay)?;
    let mut new_keys = Vec::new();
    let summary = match change {
        Change::AddKey(key) => add_key(key, &mut overlay, &mut new_keys, config)?,
        Change::RemoveKey { key } => remove_key(&key, &mut overlay, config)?,
        Change::PauseKey { key, until, reason } => pause_key(&key, until, reason, &mut overlay, config, now)?,
        Change::ResumeKey { key } => resume_key(&key, &mut overlay, config, now)?,
        Change::AddClient { name, rules, expires_at } => {
            ClientEditor { overlay: &mut overlay, config, now }.add(&name, &rules, expires_at, token)?
        }
        Change::SetClient { name, rules, expiry } => {
            ClientEditor { overlay: &mut overlay, config, now }.set(&name, &rules, expiry)?
        }
        Change::RotateClient { name, grace, expires_at } => {
            ClientEditor { overlay: &mut overlay, config, now }.rotate(&name, grace, expires_at, token)?
        }
        Change::RevokeClient { name } => ClientEditor { overlay: &mut overlay, config, now }.revoke(&name)?,
        Change::Reload => return Err(ControlError::Invalid("a reload does not edit the overlay".to_owned())),
    };
    Ok(Edit { overlay, new_keys, summary })
}

/// Refuses a change that names a left-out entry, which is an entry of the overlay without effect on this machine. On
/// this machine, the name may belong to another key or client. A pause and its end are not checked, because an entry of
/// a pause is never left out.
fn check_left_out(change: &Change, overlay: &Overlay) -> Result<(), ControlError> {
    let (kind, name) = match change {
        Change::AddKey(NewKey { name, .. }) | Change::RemoveKey { key: name } => (EntryKind::Key, name),
        Change::AddClient { name, .. }
        | Change::SetClient { name, .. }
        | Change::RotateClient { name, .. }
        | Change::RevokeClient { name } => (EntryKind::Client, name),
        Change::PauseKey { .. } | Change::ResumeKey { .. } | Change::Reload => return Ok(()),
    };
    if overlay.is_left_out(kind, name) {
        return Err(ControlError::NotManaged(format!(
            "another replica has added a different `{name}`, which conflicts with the configuration file of this \
             machine: remove one of them where it was added"
        )));
    }
    Ok(())
}

/// Returns the name of a key for messages, or its short form if it has no name.
fn key_label(key: &KeyConfig) -> &str {
    key.name.as_deref().unwrap_or(key.key.short().as_str())
}

/// Finds the key whose id, name or short form is `reference`. An id has precedence over a name.
fn find_key<'a>(reference: &str, config: &'a Config) -> Result<&'a KeyConfig, ControlError> {
    let by_id = config.keys.iter().find(|key| key.key.fingerprint().key_id() == reference);
    let by_name = || config.keys.iter().find(|key| key.name.as_deref() == Some(reference));
    if let Some(key) = by_id.or_else(by_name) {
        return Ok(key);
    }
    let mut by_short_form = config.keys.iter().filter(|key| key.key.short().as_str() == reference);
    match (by_short_form.next(), by_short_form.next()) {
        (Some(key), None) => Ok(key),
        (Some(_), Some(_)) => {
            Err(ControlError::Invalid("several keys have this short form: use the id of the key".to_owned()))
        }
        // The error does not contain the reference, because it may be a key that was passed by mistake.
        (None, _) => Err(ControlError::NotFound(
            "the pool has no key with this id, name or short form: `keychoir keys list` lists them"
                .to_owned(),
        )),
    }
}

fn add_key(
    key: NewKey,
    overlay: &mut Overlay,
    new_keys: &mut Vec<KeyFile>,
    config: &Config,
) -> Result<EditSummary, ControlError> {
    let NewKey { name, key, workspace, base_url, weight } = key;
    if let Some(same) = config.keys.iter().find(|other| other.key.fingerprint() == key.fingerprint()) {
        return Err(ControlError::AlreadyExists(format!(
            "the pool has this key already: {}",
            key_label(same)
        )));
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
    let is_used = |file: &str| overlay.keys.iter().any(|other| other.key_file == file);
    let file_name = unused_file_name(&name, &key.fingerprint().to_string(), is_used);
    let key_file = key_file_path(&file_name);
    overlay.keys.push(ManagedKey { name, key_file, workspace, base_url, weight, ..ManagedKey::default() });
    new_keys.push(KeyFile { name: file_name, key });
    Ok(summary)
}

fn remove_key(reference: &str, overlay: &mut Overlay, config: &Config) -> Result<EditSummary, ControlError> {
    let is_managed_key =
        |key: &KeyConfig| key.origin == KeyOrigin::Managed && key.name.as_deref() == Some(reference);
    if let Some(index) = overlay.keys.iter().position(|managed| managed.name == reference)
        && !config.keys.iter().any(is_managed_key)
    {
        // The entry has no effect, because another source has the same key.
        let ManagedKey { name, .. } = overlay.keys.remove(index);
        return Ok(EditSummary {
            action: "key_removed",
            target: name,
            detail: json!({}),
            key_id: None,
            token: None,
            warnings: Vec::new(),
        });
    }
    let key = find_key(reference, config)?;
    let configured_in = match key.origin {
        KeyOrigin::Managed => None,
        KeyOrigin::Environment => Some("the environment"),
        KeyOrigin::File => Some("a file of the configuration"),
    };
    if let Some(configured_in) = configured_in {
        return Err(ControlError::NotManaged(format!(
            "the key {} is configured in {configured_in}: remove it there; here it can only be paused",
            key_label(key)
        )));
    }
    let fingerprint = key.key.fingerprint().to_string();
    overlay.keys.retain(|managed| Some(&managed.name) != key.name.as_ref());
    overlay.paused_keys.retain(|paused| paused.fingerprint != fingerprint);
    let detail = json!({"short_key": key.key.short().as_str()});
    Ok(EditSummary::for_key("key_removed", &key.key, key.name.as_deref(), detail))
}

fn pause_key(
    reference: &str,
    until: Option<UnixMs>,
    reason: Option<String>,
    overlay: &mut Overlay,
    config: &Config,
    now: UnixMs,
) -> Result<EditSummary, ControlError> {
    let key = find_key(reference, config)?;
    check_is_future(until, now, "the end of the pause")?;
    let reason = reason.map(|reason| reason.trim().to_owned()).filter(|reason| !reason.is_empty());
    if let Some(reason) = &reason
        && !is_valid_reason(reason)
    {
        let message = format!("the reason must be one line of at most {MAX_REASON_CHARS} characters");
        return Err(ControlError::Invalid(message));
    }
    let fingerprint = key.key.fingerprint().to_string();
    let earlier_index = overlay.paused_keys.iter().position(|paused| paused.fingerprint == fingerprint);
    let earlier_entry = earlier_index.map(|index| overlay.paused_keys.remove(index));
    let since = earlier_entry.filter(|paused| paused.is_active(now)).map_or(now, |paused| paused.since);
    let detail = json!({"until": until.map(UnixMs::rfc3339), "reason": reason});
    let short_key = key.key.short().to_string();
    // The caller sets the time of the change.
    let changed_at = UnixMs(0);
    overlay.paused_keys.push(PausedKey { fingerprint, short_key, since, until, reason, changed_at });
    Ok(EditSummary::for_key("key_paused", &key.key, key.name.as_deref(), detail))
}

fn resume_key(
    reference: &str,
    overlay: &mut Overlay,
    config: &Config,
    now: UnixMs,
) -> Result<EditSummary, ControlError> {
    let key = find_key(reference, config)?;
    let fingerprint = key.key.fingerprint().to_string();
    let is_paused = |paused: &PausedKey| paused.fingerprint == fingerprint && paused.is_active(now);
    let Some(index) = overlay.paused_keys.iter().position(is_paused) else {
        return Err(ControlError::NotPaused(format!("the key {} is not paused", key_label(key))));
    };
    overlay.paused_keys.remove(index);
    Ok(EditSummary::for_key("key_resumed", &key.key, key.name.as_deref(), json!({})))
}

/// Refuses a time that has passed. `subject` names the time in the error.
fn check_is_future(time: Option<UnixMs>, now: UnixMs, subject: &str) -> Result<(), ControlError> {
    match time {
        Some(time) if time <= now => Err(ControlError::Invalid(format!("{subject} is not in the future"))),
        Some(_) | None => Ok(()),
    }
}
