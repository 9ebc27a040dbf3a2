//! Leaves out entries of other replicas that conflict with the configuration file of this machine. They stay in the
//! overlay, so that this replica still shares them.

use crate::config::{Config, EntryKind, Overlay, Problems};

/// An entry that is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LeftOutEntry {
    pub(super) kind: EntryKind,
    pub(super) name: String,
    pub(super) reason: String,
}

/// Leaves out each client that another replica has added and that the configuration file of this machine defines
/// with another token: applying the entry would make the token of the file invalid. `previous` is the overlay before
/// the merge, and `config` is the configuration with it.
pub(super) fn leave_out_clients_of_file(
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
        // A rotation names the token of the file that it replaced.
        let token = client.token.to_string();
        let is_same_client = entry.replaced_token_sha256.as_ref() == Some(&token)
            || entry.token_sha256.as_ref().is_none_or(|new| *new == token);
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

/// Leaves out each entry of `overlay` with a problem. Returns `None` if a problem has another cause, so that leaving
/// out entries does not solve it.
pub(super) fn leave_out_invalid(overlay: &mut Overlay, problems: &Problems) -> Option<Vec<LeftOutEntry>> {
    let mut left_out = Vec::new();
    for problem in problems.iter() {
        let (kind, index) = problem.overlay_entry()?;
        let (mark, name) = match kind {
            EntryKind::Key => overlay.keys.get_mut(index).map(|entry| (&mut entry.left_out, &entry.name))?,
            EntryKind::Client => {
                overlay.clients.get_mut(index).map(|entry| (&mut entry.left_out, &entry.name))?
            }
            EntryKind::PausedKey => return None,
        };
        // An entry can have several problems.
        if !std::mem::replace(mark, true) {
            left_out.push(LeftOutEntry { kind, name: name.clone(), reason: problem.summary() });
        }
    }
    (!left_out.is_empty()).then_some(left_out)
}
