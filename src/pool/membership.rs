//! Which workspace is which. The provider's identifier says it for certain, where a key may read it;
//! the configuration says it otherwise; a key of which nobody says anything is alone.

use std::collections::HashMap;
use std::sync::Arc;

use super::roster::KeyEntry;
use crate::secret::Fingerprint;

/// The workspace identifiers that the provider has told, by key.
pub(super) type ToldIds = HashMap<Fingerprint, Arc<str>>;

/// Which workspace a key belongs to, as far as is known now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceMembership {
    group: Group,
    /// Its name in the configuration.
    name: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Group {
    /// By the provider's identifier.
    Told(Arc<str>),
    /// By the configuration.
    Named(String),
    /// Of one key alone.
    Of(Fingerprint),
}

impl WorkspaceMembership {
    /// What is known of the workspace of `entry`: what the provider says of it, or of a key that is
    /// said to be beside it; else what the configuration says.
    pub(super) fn of(entry: &KeyEntry, entries: &[KeyEntry], told: &ToldIds) -> Self {
        let id_of = |entry: &KeyEntry| told.get(&entry.key.fingerprint()).map(Arc::clone);
        let beside =
            || entries.iter().filter(|other| entry.workspace.is_some() && other.workspace == entry.workspace);
        let group = match (id_of(entry).or_else(|| beside().find_map(id_of)), &entry.workspace) {
            (Some(id), _) => Group::Told(id),
            (None, Some(name)) => Group::Named(name.clone()),
            (None, None) => Group::Of(entry.key.fingerprint()),
        };
        Self { group, name: entry.workspace.clone() }
    }

    /// Whether it is the same workspace, whatever it is called.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.group == other.group
    }

    /// Whether `other` may be the same workspace, better known.
    pub(super) fn may_become(&self, other: &Self) -> bool {
        matches!(self.group, Group::Of(_)) || matches!(other.group, Group::Told(_))
    }

    /// Its name in the configuration, if it has one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}
