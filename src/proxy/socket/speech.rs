//! The billable text of a session: it needs a concurrency slot while speech is generated, credits
//! for its characters, and the account that owns the resources it names.

use std::sync::Arc;

use super::session::{PooledSession, Session};
use super::speech_permit::ReservationResult;
use crate::clock;
use crate::elevenlabs::socket::{SpokenText, brings_token};
use crate::policy::replay::Progress;
use crate::pool::Reserved;
use crate::telemetry::log_transitions;
use crate::upstream::Connect;

impl<C: Connect> Session<C> {
    /// Whether the client's credit quota covers all text so far, with the message that waits. Its
    /// price is reserved then, so that parallel sessions cannot each spend the same rest of the
    /// quota.
    pub(super) fn covers_text(&self, content: SpokenText) -> bool {
        let Some(PooledSession { request: context, .. }) =
            self.pooled.as_ref().filter(|_| content.characters > 0)
        else {
            return true;
        };
        let total = self.price(self.speech.requested.saturating_add(content.characters));
        context.meta.permits.client().reserve(total, clock::now()).is_ok()
    }

    /// Whether the client's credit quota has anything left. A quota of requests does not end a
    /// session, which was counted when it began.
    pub(super) fn may_spend(&mut self) -> bool {
        self.pooled.is_none() || self.attempt.charge_duration()
    }

    /// Processes a message of the client. Text to speak needs a concurrency slot and credits, and a
    /// message may name a resource of another account; all other messages are forwarded.
    pub(super) async fn process_message(&mut self, SpokenText { characters, .. }: SpokenText) {
        // An earlier failover has a deadline of its own.
        self.failover_since = None;
        self.speech.requested += characters;
        let is_begun = self.upstream_to_client.is_open();
        if !is_begun && brings_token(self.client_to_upstream.held_start()) {
            self.upstream_to_client.record_token();
        }
        let credits = if characters > 0 { self.price(self.speech.requested) } else { 0 };
        let Some((PooledSession { request: context, .. }, key)) =
            self.pooled.as_mut().zip(self.attempt.key().cloned())
        else {
            return self.forward_held();
        };
        // A served session stays with its account.
        if !is_begun && self.speech.is_spoken {
            let named = context.retry.add_names(self.client_to_upstream.held_start(), &self.proxy, &key);
            if named == Ok(false) && characters == 0 {
                return self.find_key_again().await;
            }
            // When the resources belong to two accounts, no key is right: the provider reports the
            // missing one.
        }
        if characters == 0 {
            return self.forward_held();
        }
        self.speech.active_at = Some(clock::instant());
        if self.attempt.has_slot() {
            return self.forward_held();
        }
        if !is_begun {
            // From here on, every key for this session needs these credits and a concurrency slot.
            context.retry.set_speech(credits, context.meta.speech_group);
        }
        let more_credits = credits.saturating_sub(self.attempt.credits());
        let key_request =
            context.retry.speech_request(more_credits, context.meta.speech_group, &key, is_begun);
        let (pool, roster) = (Arc::clone(&self.proxy.pool), Arc::clone(context.retry.roster()));
        self.speech.waiting = Some(Box::pin(async move { pool.reserve(&roster, &key_request).await }));
    }

    /// Continues with the reserved key, or with the current one if there is none: then the provider
    /// decides.
    pub(super) async fn use_reservation(&mut self, result: ReservationResult) {
        if let Ok(Reserved { lease, transitions }) = result {
            log_transitions(&transitions);
            let is_same = self.attempt.key().is_some_and(|key| Arc::ptr_eq(key, lease.key()));
            if is_same {
                self.attempt.replace_lease(lease);
            } else if !self.upstream_to_client.is_open() {
                // Nothing was sent that the former key is charged for.
                self.attempt.abandon_unanswered(Progress::Unsent, false);
                self.change_key(lease).await;
            }
        }
        self.forward_held();
    }

    /// Reserves a key that may serve the named resources.
    async fn find_key_again(&mut self) {
        let Some(PooledSession { request: context, .. }) = &mut self.pooled else {
            return self.forward_held();
        };
        if let Ok(lease) = self.proxy.reserve(&mut context.retry).await {
            self.attempt.abandon_unanswered(Progress::Unsent, false);
            self.change_key(lease).await;
        }
        self.forward_held();
    }

    /// Forwards the message that is held.
    pub(super) fn forward_held(&mut self) {
        let from = self.to_upstream.bytes.len();
        self.client_to_upstream.release(&mut self.to_upstream.bytes);
        self.speech.characters = self.speech.requested;
        self.attempt.set_text_credits(self.price(self.speech.characters));
        self.keep_opening(from);
        if self.upstream_to_client.is_served() {
            // The refusal was about one of several contexts: the session continues.
            self.refusal = None;
            self.charge_text();
        }
    }

    /// Charges the text so far by its characters: no message of the provider reports the cost.
    pub(super) fn charge_text(&mut self) {
        if self.speech.is_spoken && self.speech.characters > 0 {
            let credits = self.price(self.speech.characters);
            self.attempt.record_speech(self.speech.characters, credits);
        }
    }

    /// The maximum cost of that many characters.
    pub(super) fn price(&self, characters: u64) -> u64 {
        let model = self.attempt.model().or(self.dialect.default_model()).unwrap_or_default();
        self.proxy.pool.models().credits(model, characters)
    }
}
