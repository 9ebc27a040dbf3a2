//! A conversation with an agent that has ended: what it has cost, the provider says a while later, to
//! whoever asks with the key that it was held with.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::client_usage::LatePrice;
use super::usage::{AttemptRecord, CreditSource, QuotaCharge};
use crate::clock;
use crate::pool::Key;

/// One that is not priced yet.
#[derive(Debug)]
pub struct Conversation {
    /// The provider's name of it.
    id: Arc<str>,
    key: Arc<Key>,
    record: AttemptRecord,
    price: LatePrice,
}

/// Where those go that have ended. What finds no room there stays without a price.
pub type Ended = mpsc::Sender<Conversation>;

impl Conversation {
    pub(super) fn new(id: Arc<str>, key: Arc<Key>, record: AttemptRecord, price: LatePrice) -> Self {
        Self { id, key, record, price }
    }

    /// The provider's name of it.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The key that it was held with.
    #[must_use]
    pub fn key(&self) -> &Arc<Key> {
        &self.key
    }

    /// Its record, completed by what it has cost; its client is charged that instead of what was reserved.
    #[must_use]
    pub fn priced(self, credits: u64) -> AttemptRecord {
        let Self { record, price, .. } = self;
        let quota = QuotaCharge {
            credits: price.settle(credits, clock::now()),
            replaced: record.quota.credits,
            ..record.quota
        };
        AttemptRecord { credits, credits_from: CreditSource::Answer, quota, ..record }
    }
}
