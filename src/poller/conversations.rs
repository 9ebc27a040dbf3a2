//! Polls the cost of conversations with agents. No message on their socket contains it; the provider
//! publishes it after analysing the conversation, seconds or minutes after its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::debug;

use super::ask::ProviderClient;
use crate::clock;
use crate::pool::Pool;
use crate::proxy::{Conversation, UsageSink};
use crate::telemetry::{Meters, announce};
use crate::upstream::{Connect, Upstream};

/// Delays before each poll of a conversation, from its end or from the previous poll. After the last one it
/// stays without a price.
const PAUSES: [Duration; 8] = [
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
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Maximum conversations that wait for their price.
const WAITING_MAX: usize = 10_000;

/// Polls the prices of conversations, with one request at a time.
#[derive(Debug)]
pub struct Conversations<C> {
    pool: Arc<Pool>,
    upstream: Upstream<C>,
    books: UsageSink,
    meters: Meters,
    ended: mpsc::Receiver<Conversation>,
    waiting: Vec<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    conversation: Conversation,
    due: Instant,
    /// The number of polls so far.
    asked: usize,
}

impl<C: Connect> Conversations<C> {
    /// A poller for the conversations that are sent to `ended`.
    pub fn new(
        pool: Arc<Pool>,
        upstream: Upstream<C>,
        books: UsageSink,
        meters: Meters,
        ended: mpsc::Receiver<Conversation>,
    ) -> Self {
        Self { pool, upstream, books, meters, ended, waiting: Vec::new() }
    }

    /// Polls until all senders of `ended` are dropped.
    pub async fn run(mut self) {
        loop {
            let next = self.waiting.iter().map(|waiting| waiting.due).min();
            let due = async {
                match next {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ended = self.ended.recv() => match ended {
                    Some(conversation) => self.wait_for(conversation, 0),
                    None => return,
                },
                () = due => self.ask().await,
            }
        }
    }

    fn wait_for(&mut self, conversation: Conversation, asked: usize) {
        let Some(pause) = PAUSES.get(asked).filter(|_| self.waiting.len() < WAITING_MAX) else {
            return debug!("a conversation stays without a price: the provider did not tell it");
        };
        self.waiting.push(Waiting { conversation, due: clock::instant() + *pause, asked });
    }

    /// Polls one conversation that is due.
    async fn ask(&mut self) {
        let now = clock::instant();
        let Some(at) = self.waiting.iter().position(|waiting| waiting.due <= now) else { return };
        let Waiting { conversation, asked, .. } = self.waiting.swap_remove(at);
        let asking = ProviderClient { upstream: &self.upstream, answer_max: ANSWER_MAX };
        match asking.cost(conversation.key(), conversation.id()).await {
            Some(credits) => self.book(conversation, credits).await,
            None => self.wait_for(conversation, asked + 1),
        }
    }

    async fn book(&self, conversation: Conversation, credits: u64) {
        let key = Arc::clone(conversation.key());
        announce(&self.pool.spend(&self.pool.roster(), &key, credits, clock::now()));
        self.meters.priced(credits);
        let record = conversation.priced(credits);
        // A usage store that is closed has logged it already.
        if let Ok(place) = self.books.permit().await {
            place.write(record);
        }
    }
}
