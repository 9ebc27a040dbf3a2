//! Which keys belong to one workspace.
//!
//! The provider's identifier decides, where a key may read it; otherwise the configuration; a key of
//! which neither is known is a workspace of its own.

use std::collections::HashMap;
use std::sync::Arc;

use super::roster::KeyEntry;
use crate::secret::Fingerprint;

/// The workspace identifiers that the provider has reported, by key.
pub(super) type ToldIds = HashMap<Fingerprint, Arc<str>>;

/// Which workspace a key belongs to, as far as is known now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceMembership {
    group: Group,
    /// The workspace's name in the configuration.
    name: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Group {
    /// Known by the provider's identifier.
    Told(Arc<str>),
    /// Known by its name in the configuration.
    Named(String),
    /// A workspace of one key alone.
    Of(Fingerprint),
}

impl WorkspaceMembership {
    /// The workspace of `entry`: by the identifier that the provider reported for it or for a key
    /// configured for the same workspace, else by the configuration.
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

    /// Whether both are the same workspace, whatever its name.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.group == other.group
    }

    /// Whether `other` may be the same workspace, identified more precisely.
    pub(super) fn may_become(&self, other: &Self) -> bool {
        matches!(self.group, Group::Of(_)) || matches!(other.group, Group::Told(_))
    }

    /// The name in the configuration, if it has one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}
