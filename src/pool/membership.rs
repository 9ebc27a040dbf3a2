//! Determines the workspace of each key, and the digest by which replicas name the workspace.
//!
//! Keys belong to the same workspace if the provider reports the same workspace identifier for them. A key without a
//! reported identifier uses the identifier of another key with the same configured workspace name. If no such key has
//! an identifier, the name alone identifies the workspace. A key with neither an identifier nor a name is the only key
//! of its workspace.

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
    /// The digest by which replicas name the workspace.
    shared_id: SharedId,
    /// The name that the configuration gives to the workspace, or `None` if it gives none.
    name: Option<String>,
}

/// The value that two keys have in common if they belong to the same workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
enum MembershipBasis {
    /// The digest of the workspace identifier that the provider reports.
    Reported(SharedId),
    /// The configured name of the workspace.
    Configured(String),
    /// The fingerprint of the only key of the workspace.
    SingleKey(Fingerprint),
}

impl WorkspaceMembership {
    /// Determines the workspace of `entry`. It is identified by the identifier that the provider reported for this
    /// key or for another key with the same configured workspace, or else by the configuration.
    pub(super) fn for_entry(entry: &KeyEntry, entries: &[KeyEntry], reported_ids: &ReportedIds) -> Self {
        let reported_id = |entry: &KeyEntry| reported_ids.get(&entry.key.fingerprint()).copied();
        let reported_id_of_workspace = || {
            let has_same_name =
                |other: &&KeyEntry| entry.workspace.is_some() && other.workspace == entry.workspace;
            entries.iter().filter(has_same_name).find_map(reported_id)
        };
        let basis = match (reported_id(entry).or_else(reported_id_of_workspace), &entry.workspace) {
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

    /// Returns the digest by which replicas name the workspace. Replicas with the same configuration and the same
    /// reported identifiers compute the same digest.
    pub(super) fn shared_id(&self) -> SharedId {
        self.shared_id
    }

    /// Returns the configured name of the workspace, if it has one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}

impl MembershipBasis {
    fn shared_id(&self) -> SharedId {
        let digest = |name: &str| SharedId::new(SharedKind::Workspace, &[name.as_bytes()]);
        match self {
            Self::Reported(id) => *id,
            Self::Configured(name) => digest(name),
            Self::SingleKey(fingerprint) => digest(&fingerprint.to_string()),
        }
    }
}
