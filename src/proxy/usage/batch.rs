//! Defines the batch of queue entries that the writer of the usage store takes at a time.

use super::record::{AttemptRecord, OwnershipUpdate};

/// Usage records and ownership updates.
#[derive(Debug, Default)]
pub struct UsageBatch {
    /// The records of attempts. The records of one thread keep their order.
    pub attempts: Vec<AttemptRecord>,
    /// The ownership updates. The updates of one thread keep their order.
    pub owners: Vec<OwnershipUpdate>,
    /// Number of queue entries: one per record, and one per set of ownership updates.
    pub entries: u64,
}

impl UsageBatch {
    /// Returns whether the batch contains neither records nor ownership updates.
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
