//! Decides which entries of a merged overlay are left out: clients that the configuration file of this machine defines
//! with another token, and entries with which the configuration is invalid. A left-out entry has no effect on this
//! machine. It stays in the overlay, so that this replica still shares it.

use crate::config::{Config, EntryKind, Overlay, Problems};

/// An entry of the overlay that has no effect on this machine, and the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LeftOutEntry {
    pub(super) kind: EntryKind,
    pub(super) name: String,
    pub(super) reason: String,
}

/// Leaves out each client that another replica has added and that the configuration file of this machine defines
/// with another token, because applying the entry would make the token of the file invalid. `previous` is the overlay
/// before the merge, and `config` is the configuration with that overlay.
pub(super) fn leave_out_conflicting_clients(
    overlay: &mut Overlay,
    previous: &Overlay,
    config: &Config,
) -> Vec<LeftOutEntry> {
    let mut left_out = Vec::new();
    for entry in &mut overlay.clients {
        let was_applied =
            previous.clients.iter().any(|earlier| earlier.name == entry.name && !earlier.left_out);
        let configured_client = config.clients.iter().find(|client| client.name == entry.name);
        let Some(client) = configured_client.filter(|client| client.origin.is_in_file() && !was_applied)
        else {
            continue;
        };
        let file_token = client.token.to_string();
        // After a rotation, the entry contains the fingerprint of the token of the file that the rotation replaced.
        let is_same_client = entry.replaced_token_sha256.as_ref() == Some(&file_token)
            || entry.token_sha256.as_ref().is_none_or(|entry_token| *entry_token == file_token);
        if !is_same_client {
            entry.left_out = true;
            left_out.push(LeftOutEntry {
                kind: EntryKind::Client,
                name: entry.name.clone(),
                reason: "the configuration file of this machine defines it with another token".to_owned(),
            });
        }
    }
    left_out
}

/// Leaves out each entry of `overlay` that causes one of the `problems`. Returns `None` if a problem has another cause,
/// because leaving out entries does not solve it.
pub(super) fn leave_out_invalid(overlay: &mut Overlay, problems: &Problems) -> Option<Vec<LeftOutEntry>> {
    let mut left_out = Vec::new();
    for problem in problems.iter() {
        let (kind, index) = problem.overlay_entry()?;
        let (is_left_out, name) = match kind {
            EntryKind::Key => overlay.keys.get_mut(index).map(|entry| (&mut entry.left_out, &entry.name))?,
            EntryKind::Client => {
                overlay.clients.get_mut(index).map(|entry| (&mut entry.left_out, &entry.name))?
            }
            EntryKind::PausedKey => return None,
        };
        // An entry can have several problems.
        if !std::mem::replace(is_left_out, true) {
            left_out.push(LeftOutEntry { kind, name: name.clone(), reason: problem.summary() });
        }
    }
    (!left_out.is_empty()).then_some(left_out)
}
