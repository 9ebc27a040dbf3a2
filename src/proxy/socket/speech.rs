//! The billable text of a session: it needs a concurrency slot while speech is generated, credits
//! for its characters, and the account that owns the resources it names.

use std::sync::Arc;

use super::session::{PooledSession, Session};
use super::speech_permit::Given;
use crate::clock;
use crate::elevenlabs::socket::{SpokenText, brings_token};
use crate::policy::replay::Progress;
use crate::pool::Reserved;
use crate::telemetry::announce;
use crate::upstream::Connect;

impl<C: Connect> Session<C> {
    /// Whether the client's credit quota covers all text so far, with the message that waits. Its
    /// price is reserved then, so that parallel sessions cannot each spend the same rest of the
    /// quota.
    pub(super) fn may_say(&self, said: SpokenText) -> bool {
        let Some(PooledSession { request: context, .. }) =
            self.pooled.as_ref().filter(|_| said.characters > 0)
        else {
            return true;
        };
        let total = self.price(self.speech.asked.saturating_add(said.characters));
        context.meta.permits.client().reserve(total, clock::now()).is_ok()
    }

    /// Whether the client's credit quota has anything left. A quota of requests does not end a
    /// session, which was counted when it began.
    pub(super) fn may_spend(&mut self) -> bool {
        self.pooled.is_none() || self.attempt.may_go_on()
    }

    /// Processes a message of the client. Text to speak needs a concurrency slot and credits, and a
    /// message may name a resource of another account; all other messages are forwarded.
    pub(super) async fn said(&mut self, SpokenText { characters, .. }: SpokenText) {
        // An earlier failover has a deadline of its own.
        self.moving_since = None;
        self.speech.asked += characters;
        let is_begun = self.upstream_to_client.is_open();
        if !is_begun && brings_token(self.client_to_upstream.said()) {
            self.upstream_to_client.judge_token();
        }
        let credits = if characters > 0 { self.price(self.speech.asked) } else { 0 };
        let Some((PooledSession { request: context, .. }, key)) =
            self.pooled.as_mut().zip(self.attempt.key().cloned())
        else {
            return self.let_go();
        };
        // A served session stays with its account.
        if !is_begun && self.speech.is_spoken {
            let named = context.retry.add_names(self.client_to_upstream.said(), &self.proxy, &key);
            if named == Ok(false) && characters == 0 {
                return self.find_key_again().await;
            }
            // When the resources belong to two accounts, no key is right: the provider reports the
            // missing one.
        }
        if characters == 0 {
            return self.let_go();
        }
        self.speech.sounded_at = Some(clock::instant());
        if self.attempt.has_place() {
            return self.let_go();
        }
        if !is_begun {
            // From here on, every key for this session needs these credits and a concurrency slot.
            context.retry.set_speech(credits, context.meta.speech_lane);
        }
        let due = credits.saturating_sub(self.attempt.credits());
        let key_request = context.retry.speech_request(due, context.meta.speech_lane, &key, is_begun);
        let (pool, roster) = (Arc::clone(&self.proxy.pool), Arc::clone(context.retry.roster()));
        self.speech.waiting = Some(Box::pin(async move { pool.reserve(&roster, &key_request).await }));
    }

    /// Continues with the reserved key, or with the current one if there is none: then the provider
    /// decides.
    pub(super) async fn given(&mut self, given: Given) {
        if let Ok(Reserved { lease, news }) = given {
            announce(&news);
            let is_same = self.attempt.key().is_some_and(|key| Arc::ptr_eq(key, lease.key()));
            if is_same {
                self.attempt.renew(lease);
            } else if !self.upstream_to_client.is_open() {
                // Nothing was sent that the former key is charged for.
                self.attempt.abandon_unanswered(Progress::Unsent, false);
                self.change_key(lease).await;
            }
        }
        self.let_go();
    }

    /// Reserves a key that may serve the named resources.
    async fn find_key_again(&mut self) {
        let Some(PooledSession { request: context, .. }) = &mut self.pooled else { return self.let_go() };
        if let Ok(lease) = self.proxy.reserve(&mut context.retry).await {
            self.attempt.abandon_unanswered(Progress::Unsent, false);
            self.change_key(lease).await;
        }
        self.let_go();
    }

    /// Forwards the message that is held.
    pub(super) fn let_go(&mut self) {
        let from = self.to_upstream.bytes.len();
        self.client_to_upstream.release(&mut self.to_upstream.bytes);
        self.speech.characters = self.speech.asked;
        self.attempt.said(self.price(self.speech.characters));
        self.keep_opening(from);
        if self.upstream_to_client.is_served() {
            // The refusal was about one of several contexts: the session continues.
            self.refusal = None;
            self.book();
        }
    }

    /// Charges the text so far by its characters: no message of the provider reports the cost.
    pub(super) fn book(&mut self) {
        if self.speech.is_spoken && self.speech.characters > 0 {
            let credits = self.price(self.speech.characters);
            self.attempt.spoken(self.speech.characters, credits);
        }
    }

    /// The maximum cost of that many characters.
    pub(super) fn price(&self, characters: u64) -> u64 {
        let model = self.attempt.model().or(self.dialect.default_model()).unwrap_or_default();
        self.proxy.pool.models().credits(model, characters)
    }
}
