//! The contents of the queue between the requests and the usage store.

use super::{AttemptRecord, OwnershipUpdate};

/// Usage records and ownership changes.
#[derive(Debug, Default)]
pub struct UsageBatch {
    /// The records of attempts. Those of one thread are in the order in which they were sent.
    pub attempts: Vec<AttemptRecord>,
    /// The ownership changes, in the same order.
    pub owners: Vec<OwnershipUpdate>,
    /// Number of entries: one per record, and one per set of ownership changes.
    pub entries: u64,
}

impl UsageBatch {
    /// Whether there are no records and no ownership changes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.attempts.is_empty() && self.owners.is_empty()
    }

    /// Appends another batch.
    pub fn append(&mut self, mut other: Self) {
        self.attempts.append(&mut other.attempts);
        self.owners.append(&mut other.owners);
        self.entries += other.entries;
    }
}
