//! Polls the cost of conversations with agents. No WebSocket message contains this cost; the
//! provider publishes it seconds or minutes after the end of a conversation.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::debug;

use super::client::ProviderClient;
use crate::clock;
use crate::pool::Pool;
use crate::proxy::{Conversation, UsageSink};
use crate::telemetry::{Meters, log_transitions};
use crate::upstream::{Connect, Upstream};

/// Delay before each poll of a conversation, from its end or from the previous poll. After the last
/// poll the cost of the conversation stays unknown.
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
/// Timeout of one response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum conversations whose cost is still polled.
const MAX_PENDING: usize = 10_000;

/// Polls the costs of conversations, with one request at a time.
#[derive(Debug)]
pub struct Conversations<C> {
    pool: Arc<Pool>,
    upstream: Upstream<C>,
    usage: UsageSink,
    meters: Meters,
    ended: mpsc::Receiver<Conversation>,
    pending: Vec<PendingConversation>,
}

#[derive(Debug)]
struct PendingConversation {
    conversation: Conversation,
    due: Instant,
    /// The number of polls so far.
    polls: usize,
}

impl<C: Connect> Conversations<C> {
    /// Creates a poller for the conversations that are sent to `ended`.
    pub fn new(
        pool: Arc<Pool>,
        upstream: Upstream<C>,
        usage: UsageSink,
        meters: Meters,
        ended: mpsc::Receiver<Conversation>,
    ) -> Self {
        Self { pool, upstream, usage, meters, ended, pending: Vec::new() }
    }

    /// Polls until all senders of `ended` are dropped.
    pub async fn run(mut self) {
        loop {
            let next = self.pending.iter().map(|pending| pending.due).min();
            let due = async {
                match next {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ended = self.ended.recv() => match ended {
                    Some(conversation) => self.schedule(conversation, 0),
                    None => return,
                },
                () = due => self.poll_one().await,
            }
        }
    }

    fn schedule(&mut self, conversation: Conversation, polls: usize) {
        let Some(delay) = POLL_DELAYS.get(polls).filter(|_| self.pending.len() < MAX_PENDING) else {
            return debug!("a conversation stays without a price: the provider did not publish it");
        };
        self.pending.push(PendingConversation { conversation, due: clock::instant() + *delay, polls });
    }

    /// Polls one conversation that is due.
    async fn poll_one(&mut self) {
        let now = clock::instant();
        let Some(index) = self.pending.iter().position(|pending| pending.due <= now) else { return };
        let PendingConversation { conversation, polls, .. } = self.pending.swap_remove(index);
        let client = ProviderClient { upstream: &self.upstream, response_timeout: RESPONSE_TIMEOUT };
        match client.cost(conversation.key(), conversation.id()).await {
            Some(credits) => self.record_price(conversation, credits).await,
            None => self.schedule(conversation, polls + 1),
        }
    }

    async fn record_price(&self, conversation: Conversation, credits: u64) {
        let key = Arc::clone(conversation.key());
        log_transitions(&self.pool.spend(&self.pool.roster(), &key, credits, clock::now()));
        self.meters.priced(credits);
        let record = conversation.priced(credits);
        // If the usage store is closed, it has logged this already.
        if let Ok(permit) = self.usage.permit().await {
            permit.write(record);
        }
    }
}
