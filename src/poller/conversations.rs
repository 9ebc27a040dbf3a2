//! Polls the provider for the cost of each ended conversation with an agent, charges the cost to the client and to the
//! workspace of the key, and writes the usage record. WebSocket messages do not contain this cost: the provider
//! publishes it seconds or minutes after the end of the conversation.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::debug;

use super::client::ProviderClient;
use crate::clock;
use crate::pool::Pool;
use crate::proxy::{EndedConversation, UsageSink};
use crate::telemetry::{RequestMetrics, log_transitions};
use crate::upstream::{Connect, Upstream};

/// Delay of each poll after the end of the conversation or after the previous poll. If the last poll returns
/// no cost, the cost stays unknown.
const POLL_DELAYS: [Duration; 8] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(30),
    Duration::from_secs(60),
    Duration::from_secs(300),
    Duration::from_secs(900),
];
/// Timeout from the start of a request to the end of its response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of conversations whose cost is still polled. The cost of any further conversation stays unknown.
const MAX_PENDING: usize = 10_000;

/// A poller of the costs of ended conversations, which sends one request at a time.
#[derive(Debug)]
pub struct ConversationPoller<C> {
    pool: Arc<Pool>,
    upstream: Upstream<C>,
    usage: UsageSink,
    metrics: RequestMetrics,
    ended: mpsc::Receiver<EndedConversation>,
    pending: Vec<PendingConversation>,
}

#[derive(Debug)]
struct PendingConversation {
    conversation: EndedConversation,
    next_poll_at: Instant,
    /// Number of polls that returned no cost.
    poll_count: usize,
}

impl<C: Connect> ConversationPoller<C> {
    /// Creates a poller for the conversations that `ended` receives.
    pub fn new(
        pool: Arc<Pool>,
        upstream: Upstream<C>,
        usage: UsageSink,
        metrics: RequestMetrics,
        ended: mpsc::Receiver<EndedConversation>,
    ) -> Self {
        Self { pool, upstream, usage, metrics, ended, pending: Vec::new() }
    }

    /// Polls until all senders of `ended` are dropped.
    pub async fn run(mut self) {
        loop {
            let next_poll_at = self.pending.iter().map(|pending| pending.next_poll_at).min();
            let next_poll = async {
                match next_poll_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ended = self.ended.recv() => match ended {
                    Some(conversation) => self.schedule_poll(conversation, 0),
                    None => return,
                },
                () = next_poll => self.poll_one().await,
            }
        }
    }

    /// Schedules the next poll of `conversation` after `poll_count` polls without a cost. Drops the conversation
    /// after the last poll, and when too many conversations are pending.
    fn schedule_poll(&mut self, conversation: EndedConversation, poll_count: usize) {
        let Some(delay) = POLL_DELAYS.get(poll_count).filter(|_| self.pending.len() < MAX_PENDING) else {
            return debug!(
                "the cost of a conversation stays unknown, because the provider did not publish it or because \
                 too many conversations are pending"
            );
        };
        let next_poll_at = clock::instant() + *delay;
        self.pending.push(PendingConversation { conversation, next_poll_at, poll_count });
    }

    /// Polls the cost of one conversation whose poll is due.
    async fn poll_one(&mut self) {
        let now = clock::instant();
        let Some(index) = self.pending.iter().position(|pending| pending.next_poll_at <= now) else { return };
        let PendingConversation { conversation, poll_count, .. } = self.pending.swap_remove(index);
        let client = ProviderClient { upstream: &self.upstream, response_timeout: RESPONSE_TIMEOUT };
        match client.request_conversation_cost(conversation.key(), conversation.id()).await {
            Some(credits) => self.charge_conversation(conversation, credits).await,
            None => self.schedule_poll(conversation, poll_count + 1),
        }
    }

    /// Charges `credits` to the workspace of the key and to the client, and writes the usage record.
    async fn charge_conversation(&self, conversation: EndedConversation, credits: u64) {
        let key = Arc::clone(conversation.key());
        log_transitions(&self.pool.charge_late(&self.pool.roster(), &key, credits, clock::now()));
        self.metrics.record_late_price(credits);
        let record = conversation.into_priced_record(credits);
        // If there is no permit, the usage store is closed. The store logs that it closes.
        if let Ok(permit) = self.usage.acquire_permit().await {
            permit.write(record);
        }
    }
}
