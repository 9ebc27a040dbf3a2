//! Assigns keys to workspaces.
//!
//! Keys belong to the same workspace if the provider reports the same workspace identifier for them. If a key lacks
//! the permission to read its identifier, the configured workspace name decides. A key without an identifier and a
//! name is the only key of its workspace.

use std::collections::HashMap;

use super::roster::KeyEntry;
use crate::policy::shared_id::{SharedId, SharedKind};
use crate::secret::Fingerprint;

/// Digests of the reported workspace identifiers, by key.
pub(super) type ReportedIds = HashMap<Fingerprint, SharedId>;

/// The known identification of the workspace of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceMembership {
    basis: MembershipBasis,
    /// The name of the workspace for other replicas.
    shared_id: SharedId,
    /// The workspace's name in the configuration.
    name: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum MembershipBasis {
    /// A digest of the provider's workspace identifier.
    Reported(SharedId),
    /// The name in the configuration.
    Configured(String),
    /// The only key of the workspace.
    SingleKey(Fingerprint),
}

impl WorkspaceMembership {
    /// Determines the workspace of `entry`. It is identified by the identifier that the provider reported for this
    /// key or for another key with the same configured workspace, or else by the configuration.
    pub(super) fn for_entry(entry: &KeyEntry, entries: &[KeyEntry], reported_ids: &ReportedIds) -> Self {
        let reported_id = |entry: &KeyEntry| reported_ids.get(&entry.key.fingerprint()).copied();
        let same_workspace =
            || entries.iter().filter(|other| entry.workspace.is_some() && other.workspace == entry.workspace);
        let basis =
            match (reported_id(entry).or_else(|| same_workspace().find_map(reported_id)), &entry.workspace) {
                (Some(id), _) => MembershipBasis::Reported(id),
                (None, Some(name)) => MembershipBasis::Configured(name.clone()),
                (None, None) => MembershipBasis::SingleKey(entry.key.fingerprint()),
            };
        Self { shared_id: basis.shared_id(), basis, name: entry.workspace.clone() }
    }

    /// Whether both values identify the same workspace. The configured name may differ.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.basis == other.basis
    }

    /// Whether `other` may be a more precise identification of the same workspace.
    pub(super) fn may_become(&self, other: &Self) -> bool {
        matches!(self.basis, MembershipBasis::SingleKey(_))
            || matches!(other.basis, MembershipBasis::Reported(_))
    }

    /// Returns the name of the workspace for other replicas. Replicas with the same configuration and the same reported
    /// identifiers have the same names.
    pub(super) fn shared_id(&self) -> SharedId {
        self.shared_id
    }

    /// Returns the name in the configuration, if it has one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}

impl MembershipBasis {
    fn shared_id(&self) -> SharedId {
        let name = |text: &str| SharedId::new(SharedKind::Workspace, &[text.as_bytes()]);
        match self {
            Self::Reported(id) => *id,
            Self::Configured(configured) => name(configured),
            Self::SingleKey(fingerprint) => name(&fingerprint.to_string()),
        }
    }
}
