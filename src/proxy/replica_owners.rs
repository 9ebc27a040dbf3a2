//! Looks up the owners of identifiers and the list accounts that other replicas have recorded, and publishes those
//! that this replica records. A request looks up only values that this replica does not know. If no replica knows a
//! value, that result is cached for a short time.

use std::sync::Arc;
use std::time::Duration;

use super::negative_cache::NegativeCache;
use super::replica_link::{FoundOwner, LookupResult, ReplicaLink};
use super::usage::OwnershipUpdate;
use crate::elevenlabs::affinity::{Identifier, IdentifierHash, RequestIdentifiers};
use crate::policy::client::ClientName;
use crate::policy::units::UnixMs;
use crate::pool::{OwnerId, OwnershipIndex};

/// Maximum number of identifiers in one lookup. Most requests name one or two.
const MAX_IDENTIFIERS: usize = 16;

/// Time for which an identifier that no replica knows is not looked up again.
const ABSENT_OWNER_TTL: Duration = Duration::from_secs(10);

/// Time for which the list account of a client is not looked up again if no replica knows it.
const ABSENT_LIST_TTL: Duration = Duration::from_secs(60);

/// The access to the owners that other replicas have recorded, with a cache of unknown values.
#[derive(Debug)]
pub(super) struct ReplicaOwners {
    link: Arc<dyn ReplicaLink>,
    absent_owners: NegativeCache<IdentifierHash>,
    absent_lists: NegativeCache<ClientName>,
}

impl ReplicaOwners {
    pub(super) fn new(link: Arc<dyn ReplicaLink>) -> Self {
        Self { link, absent_owners: NegativeCache::default(), absent_lists: NegativeCache::default() }
    }

    /// Looks up the owners of the identifiers that are not in `owners` in the other replicas, all at once. Adds the
    /// result to `owners`, and returns the updates to write. Returns `None` if there is nothing to look up, if no
    /// replica knows an owner, or if there is no reply in time.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the wait, and nothing is recorded.
    pub(super) async fn find(
        &self,
        identifiers: &RequestIdentifiers,
        owners: &OwnershipIndex,
        now: UnixMs,
    ) -> Option<Vec<OwnershipUpdate>> {
        let is_unknown = |identifier: &Identifier| {
            !self.absent_owners.contains(&identifier.hash, now) && owners.find(identifier, now).is_none()
        };
        let unknown: Vec<Identifier> =
            identifiers.all().copied().filter(is_unknown).take(MAX_IDENTIFIERS).collect();
        if unknown.is_empty() {
            return None;
        }
        let found_owners = match self.link.find_owners(&unknown).await {
            LookupResult::Known(found_owners) => found_owners,
            LookupResult::Absent => Vec::new(),
            LookupResult::Unknown => return None,
        };
        let is_found =
            |identifier: &Identifier| found_owners.iter().any(|found| found.identifier == *identifier);
        for identifier in unknown.iter().filter(|identifier| !is_found(identifier)) {
            self.absent_owners.insert(identifier.hash, ABSENT_OWNER_TTL, now);
        }
        if found_owners.is_empty() {
            return None;
        }
        let record = |FoundOwner { identifier, owner }: FoundOwner| owners.record(identifier, &owner, now);
        Some(found_owners.into_iter().filter_map(record).map(OwnershipUpdate::Recorded).collect())
    }

    /// Looks up the account that last served a list to `client` in the other replicas. Returns `None` if no replica
    /// knows it, or if there is no reply in time.
    pub(super) async fn find_list_account(&self, client: &ClientName, now: UnixMs) -> Option<OwnerId> {
        if self.absent_lists.contains(client, now) {
            return None;
        }
        match self.link.find_list_account(client).await {
            LookupResult::Known(owner) => Some(owner),
            LookupResult::Absent => {
                self.absent_lists.insert(client.clone(), ABSENT_LIST_TTL, now);
                None
            }
            LookupResult::Unknown => None,
        }
    }

    /// Publishes the account that served `client` a list.
    pub(super) fn record_list_account(&self, client: &ClientName, owner: &OwnerId) {
        self.link.record_list_account(client, owner);
    }

    /// Publishes an ownership update.
    pub(super) fn publish(&self, update: &OwnershipUpdate) {
        match update {
            OwnershipUpdate::Recorded(entry) => self.link.record_owner(entry.identifier, &entry.owner),
            OwnershipUpdate::Removed(identifier) => self.link.remove_owner(*identifier),
        }
    }
}

/// Records the owner of an identifier that a response proved, and publishes it if it is new. Returns the update to
/// write to the usage store.
pub(super) fn record_owner(
    owners: &OwnershipIndex,
    replicas: Option<&ReplicaOwners>,
    identifier: Identifier,
    owner: &OwnerId,
    now: UnixMs,
) -> Option<OwnershipUpdate> {
    let update = OwnershipUpdate::Recorded(owners.record(identifier, owner, now)?);
    if let Some(replicas) = replicas {
        replicas.publish(&update);
    }
    Some(update)
}

#[cfg(test)]
pub(super) mod tests;
