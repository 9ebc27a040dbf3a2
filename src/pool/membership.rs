//! Assigns keys to workspaces.
//!
//! The provider's identifier decides if a key has permission to read it; otherwise the
//! configuration decides. A key without either is a workspace of its own.

use std::collections::HashMap;
use std::sync::Arc;

use super::roster::KeyEntry;
use crate::secret::Fingerprint;

/// The workspace identifiers that the provider has reported, by key.
pub(super) type ReportedIds = HashMap<Fingerprint, Arc<str>>;

/// The workspace that a key belongs to, as currently known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceMembership {
    basis: MembershipBasis,
    /// The workspace's name in the configuration.
    name: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum MembershipBasis {
    /// Known by the provider's identifier.
    Reported(Arc<str>),
    /// Known by its name in the configuration.
    Named(String),
    /// A workspace of one key alone.
    SingleKey(Fingerprint),
}

impl WorkspaceMembership {
    /// The workspace of `entry`, by the identifier that the provider reported for it or for a key
    /// configured for the same workspace, else by the configuration.
    pub(super) fn of(entry: &KeyEntry, entries: &[KeyEntry], reported_ids: &ReportedIds) -> Self {
        let id_of = |entry: &KeyEntry| reported_ids.get(&entry.key.fingerprint()).map(Arc::clone);
        let same_workspace =
            || entries.iter().filter(|other| entry.workspace.is_some() && other.workspace == entry.workspace);
        let basis = match (id_of(entry).or_else(|| same_workspace().find_map(id_of)), &entry.workspace) {
            (Some(id), _) => MembershipBasis::Reported(id),
            (None, Some(name)) => MembershipBasis::Named(name.clone()),
            (None, None) => MembershipBasis::SingleKey(entry.key.fingerprint()),
        };
        Self { basis, name: entry.workspace.clone() }
    }

    /// Whether both are the same workspace, whatever its name.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.basis == other.basis
    }

    /// Whether `other` may be the same workspace, identified more precisely.
    pub(super) fn may_become(&self, other: &Self) -> bool {
        matches!(self.basis, MembershipBasis::SingleKey(_))
            || matches!(other.basis, MembershipBasis::Reported(_))
    }

    /// The name in the configuration, if it has one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}
