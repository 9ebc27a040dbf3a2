//! An ended conversation with an agent whose cost is unknown. The provider reports the cost some time later,
//! and only to the key that was used.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::client_usage::LatePrice;
use super::usage::{AttemptRecord, CreditSource, QuotaCharge};
use crate::clock;
use crate::pool::Key;

/// An ended conversation whose cost is unknown.
#[derive(Debug)]
pub struct Conversation {
    /// The provider's conversation ID.
    id: Arc<str>,
    key: Arc<Key>,
    record: AttemptRecord,
    price: LatePrice,
}

/// The queue of ended conversations. If it is full, the cost of the conversation stays unknown.
pub type Ended = mpsc::Sender<Conversation>;

impl Conversation {
    pub(super) fn new(id: Arc<str>, key: Arc<Key>, record: AttemptRecord, price: LatePrice) -> Self {
        Self { id, key, record, price }
    }

    /// The provider's conversation ID.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The key that was used for the conversation.
    #[must_use]
    pub fn key(&self) -> &Arc<Key> {
        &self.key
    }

    /// The usage record with the reported cost. The client is charged this cost instead of the reservation.
    #[must_use]
    pub fn priced(self, credits: u64) -> AttemptRecord {
        let Self { record, price, .. } = self;
        let quota = QuotaCharge {
            credits: price.replace(credits, clock::now()),
            replaced: record.quota.credits,
            ..record.quota
        };
        AttemptRecord { credits, credits_from: CreditSource::Answer, quota, is_price: true, ..record }
    }
}
