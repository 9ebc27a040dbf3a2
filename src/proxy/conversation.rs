//! Describes an ended conversation with an agent whose cost is unknown. The provider reports the cost only later, and
//! only to the key of the conversation, so `poller` requests it and completes the usage record.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::client_usage::CorrectableCharges;
use super::usage::{AttemptRecord, CreditSource, QuotaCharge};
use crate::clock;
use crate::pool::Key;

/// An ended conversation whose cost is unknown.
#[derive(Debug)]
pub struct EndedConversation {
    pub(super) id: Arc<str>,
    pub(super) key: Arc<Key>,
    pub(super) record: AttemptRecord,
    pub(super) charges: CorrectableCharges,
}

/// The queue of ended conversations. If it is full, the cost of a conversation stays unknown.
pub type ConversationSender = mpsc::Sender<EndedConversation>;

impl EndedConversation {
    /// Returns the provider's conversation ID.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the key that was used for the conversation.
    #[must_use]
    pub fn key(&self) -> &Arc<Key> {
        &self.key
    }

    /// Charges the client the reported cost instead of the reservation, and returns the usage record with
    /// that cost.
    #[must_use]
    pub fn into_priced_record(self, credits: u64) -> AttemptRecord {
        let Self { record, charges, .. } = self;
        let quota = QuotaCharge {
            credits: charges.replace(credits, clock::now()),
            replaced: record.quota.credits,
            ..record.quota
        };
        AttemptRecord {
            credits,
            credits_from: CreditSource::Reported,
            quota,
            is_price_update: true,
            ..record
        }
    }
}
