//! The contents of the queue between the requests and the usage store.

use super::record::{AttemptRecord, OwnershipUpdate};

/// Usage records and ownership updates.
#[derive(Debug, Default)]
pub struct UsageBatch {
    /// The records of attempts. Records that one thread has queued keep their order.
    pub attempts: Vec<AttemptRecord>,
    /// The ownership updates. Those that one thread has queued keep their order.
    pub owners: Vec<OwnershipUpdate>,
    /// Number of entries: one per record, and one per set of ownership updates.
    pub entries: u64,
}

impl UsageBatch {
    /// Whether there are no records and no ownership updates.
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
