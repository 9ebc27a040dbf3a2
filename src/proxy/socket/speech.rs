//! Forwards the messages of a session that are charged by their characters. A text is forwarded when its credits and
//! a concurrency slot are reserved, with a key of the account that owns the resources that the messages name.

use std::sync::Arc;

use super::session::{PooledSession, Session};
use super::session_end::SessionEnd;
use super::speech_tracker::ReservationResult;
use crate::clock;
use crate::elevenlabs::socket::{ChargedContent, has_single_use_token};
use crate::policy::replay::Progress;
use crate::pool::Reserved;
use crate::proxy::attempt::SentText;
use crate::proxy::client_usage::{ClientLimitExceeded, QuotaOwner};
use crate::proxy::retry_state::SessionKeyUse;
use crate::telemetry::log_transitions;
use crate::upstream::Connect;

impl<C: Connect> Session<C> {
    /// Reserves the price of all text so far, including the held message, in the credit quotas of the client and
    /// its user. Concurrent sessions cannot reserve the same credits. If other replicas share the quota and the grant
    /// of this replica is insufficient, waits for their reply. The provider's messages are forwarded after the reply.
    ///
    /// # Errors
    ///
    /// Returns the reason for the end of the session if a quota is insufficient.
    pub(super) async fn reserve_text_credits(&mut self, content: ChargedContent) -> Result<(), SessionEnd> {
        let Some(PooledSession { context, .. }) = self.pooled.as_ref().filter(|_| content.characters > 0)
        else {
            return Ok(());
        };
        let total = self.text_price(self.speech.requested_characters.saturating_add(content.characters));
        let (permits, now) = (Arc::clone(&context.meta.permits), clock::now());
        permits.client.reserve(total, now).await.map_err(|exceeded| {
            SessionEnd::QuotaExceeded(match exceeded {
                ClientLimitExceeded::UserQuota(_) | ClientLimitExceeded::UserUnpriced { .. } => {
                    QuotaOwner::User
                }
                ClientLimitExceeded::Quota(_)
                | ClientLimitExceeded::Unpriced { .. }
                | ClientLimitExceeded::Concurrency { .. }
                | ClientLimitExceeded::Rate { .. }
                | ClientLimitExceeded::DirectAccess => QuotaOwner::Client,
            })
        })
    }

    /// Charges the session's duration so far, and returns the owner of a credit quota that has no credits left.
    /// A quota of requests does not end a session, because the session was counted when it started.
    pub(super) fn exhausted_quota(&mut self) -> Option<QuotaOwner> {
        self.pooled.as_ref()?;
        self.attempt.charge_duration()
    }

    /// Processes the held client message. A message without text is forwarded, unless it names a
    /// resource of another account. A message with text waits for a concurrency slot and credits.
    pub(super) async fn process_message(&mut self, ChargedContent { characters, .. }: ChargedContent) {
        // The next failover has a new deadline.
        self.failover_started_at = None;
        self.speech.requested_characters += characters;
        let is_open = self.upstream_to_client.is_open;
        if !is_open && has_single_use_token(&self.client_to_upstream.message_start) {
            self.upstream_to_client.has_token = true;
        }
        let credits = if characters > 0 { self.text_price(self.speech.requested_characters) } else { 0 };
        let Some((PooledSession { context, .. }, key)) =
            self.pooled.as_mut().zip(self.attempt.key().cloned())
        else {
            return self.forward_held_message();
        };
        // A served session remains with its account.
        if !is_open && self.dialect.generates_speech() {
            let message_start = &self.client_to_upstream.message_start;
            let may_serve = context.retry.add_message_identifiers(message_start, &self.proxy, &key).await;
            if may_serve == Ok(false) && characters == 0 {
                return self.select_owner_key().await;
            }
            // If the resources belong to two accounts, no key can use both, and the provider reports the
            // missing resource.
        }
        if characters == 0 {
            return self.forward_held_message();
        }
        self.speech.last_activity = Some(clock::instant());
        if self.attempt.has_slot() {
            return self.forward_held_message();
        }
        if !is_open {
            // Every later key for this session needs these credits and a concurrency slot.
            context.retry.set_speech_requirements(credits, context.meta.speech_group);
        }
        let additional_credits = credits.saturating_sub(self.attempt.charged_credits());
        let key_use = if is_open { SessionKeyUse::Required } else { SessionKeyUse::Preferred };
        let key_request =
            context.retry.speech_request(additional_credits, context.meta.speech_group, &key, key_use);
        let (pool, roster) = (Arc::clone(&self.proxy.pool), Arc::clone(&context.retry.roster));
        self.speech.reservation = Some(Box::pin(async move { pool.reserve(&roster, &key_request).await }));
    }

    /// Forwards the held message with the reserved key. If the reservation failed, the current key is used,
    /// and the provider accepts or refuses the text.
    pub(super) async fn apply_reservation(&mut self, reservation_result: ReservationResult) {
        if let Ok(Reserved { lease, transitions }) = reservation_result {
            log_transitions(&transitions);
            let is_same_key = self.attempt.key().is_some_and(|key| Arc::ptr_eq(key, lease.key()));
            if is_same_key {
                self.attempt.replace_lease(lease);
            } else if !self.upstream_to_client.is_open {
                // No billable text was sent with the former key.
                self.attempt.abandon(Progress::Unsent, SentText::None);
                self.change_key(lease).await;
            }
        }
        self.forward_held_message();
    }

    /// Changes to a key of the account that owns the named resources, and forwards the held message.
    async fn select_owner_key(&mut self) {
        let Some(PooledSession { context, .. }) = &mut self.pooled else {
            return self.forward_held_message();
        };
        if let Ok(lease) = self.proxy.reserve(&mut context.retry).await {
            self.attempt.abandon(Progress::Unsent, SentText::None);
            self.change_key(lease).await;
        }
        self.forward_held_message();
    }

    /// Forwards the held message with the current key.
    pub(super) fn forward_held_message(&mut self) {
        let start = self.to_upstream.bytes.len();
        self.client_to_upstream.release_message(&mut self.to_upstream.bytes);
        self.speech.forwarded_characters = self.speech.requested_characters;
        self.attempt.set_text_credits(self.text_price(self.speech.forwarded_characters));
        self.extend_opening_messages(start);
        if self.upstream_to_client.is_served {
            // The refusal was about one of several contexts, so the session continues.
            self.refusal = None;
            self.charge_text();
        }
    }

    /// Charges the text so far by its characters, because the provider's messages do not report the cost.
    pub(super) fn charge_text(&mut self) {
        if self.dialect.generates_speech() && self.speech.forwarded_characters > 0 {
            let credits = self.text_price(self.speech.forwarded_characters);
            self.attempt.record_speech(self.speech.forwarded_characters, credits);
        }
    }

    /// Returns the maximum cost of `characters` in credits.
    pub(super) fn text_price(&self, characters: u64) -> u64 {
        let model = self.attempt.model().or(self.dialect.default_model()).unwrap_or_default();
        self.proxy.pool.models().max_credits(model, characters)
    }
}
