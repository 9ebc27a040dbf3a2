//! An ended conversation with an agent whose cost is unknown. The provider reports the cost some
//! time later, and only to the key that the conversation was held with.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::client_usage::LatePrice;
use super::usage::{AttemptRecord, CreditSource, QuotaCharge};
use crate::clock;
use crate::pool::Key;

/// A conversation without a price.
#[derive(Debug)]
pub struct Conversation {
    /// The provider's conversation ID.
    id: Arc<str>,
    key: Arc<Key>,
    record: AttemptRecord,
    price: LatePrice,
}

/// The queue of ended conversations. Conversations that find it full stay without a price.
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

    /// The key that the conversation was held with.
    #[must_use]
    pub fn key(&self) -> &Arc<Key> {
        &self.key
    }

    /// The usage record with the reported cost; the client is charged that instead of the
    /// reservation.
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
