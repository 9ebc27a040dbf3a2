//! The owners of identifiers and the list accounts that other replicas have recorded. A question is asked only for what
//! this replica does not know, and not again while the answer that no replica knows it is recent.

use std::sync::Arc;
use std::time::Duration;

use super::absent_answers::AbsentAnswers;
use super::replica_link::{Answer, FoundOwner, ReplicaLink};
use super::usage::OwnershipUpdate;
use crate::elevenlabs::affinity::{Identifier, IdentifierHash, RequestIdentifiers};
use crate::policy::client::ClientName;
use crate::policy::units::UnixMs;
use crate::pool::{OwnerId, OwnershipIndex};

/// Maximum number of identifiers in one question. Requests name one or two.
const MAX_IDENTIFIERS: usize = 16;

/// Time for which no question is asked about an identifier that no replica knows.
const ABSENT_OWNER_TTL: Duration = Duration::from_secs(10);

/// Time for which no question is asked about the lists of a client that no replica knows.
const ABSENT_LIST_TTL: Duration = Duration::from_secs(60);

/// The owners that other replicas have recorded.
#[derive(Debug)]
pub(super) struct ReplicaOwners {
    link: Arc<dyn ReplicaLink>,
    absent_owners: AbsentAnswers<IdentifierHash>,
    absent_lists: AbsentAnswers<ClientName>,
}

impl ReplicaOwners {
    pub(super) fn new(link: Arc<dyn ReplicaLink>) -> Self {
        Self { link, absent_owners: AbsentAnswers::default(), absent_lists: AbsentAnswers::default() }
    }

    /// Asks the other replicas for the owners of the identifiers that `owners` does not have, in one question. Adds
    /// their answer to `owners`, and returns the updates to write. Returns `None` if no replica knows an owner.
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
        let found = match self.link.find_owners(&unknown).await {
            Answer::Known(found) => found,
            Answer::Absent => Vec::new(),
            Answer::Unknown => return None,
        };
        let is_found = |identifier: &Identifier| found.iter().any(|found| found.identifier == *identifier);
        for identifier in unknown.iter().filter(|identifier| !is_found(identifier)) {
            self.absent_owners.insert(identifier.hash, ABSENT_OWNER_TTL, now);
        }
        if found.is_empty() {
            return None;
        }
        let record = |FoundOwner { identifier, owner }: FoundOwner| owners.record(identifier, &owner, now);
        Some(found.into_iter().filter_map(record).map(OwnershipUpdate::Recorded).collect())
    }

    /// Asks the other replicas for the account that last served `client` a list.
    pub(super) async fn find_list_account(&self, client: &ClientName, now: UnixMs) -> Option<OwnerId> {
        if self.absent_lists.contains(client, now) {
            return None;
        }
        match self.link.find_list_account(client).await {
            Answer::Known(owner) => Some(owner),
            Answer::Absent => {
                self.absent_lists.insert(client.clone(), ABSENT_LIST_TTL, now);
                None
            }
            Answer::Unknown => None,
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
