//! Accounts for an attempt of a WebSocket session: records its verdict, charges and end, and manages the concurrency
//! slot that the lease holds while speech is generated.

use std::sync::Arc;
use std::time::Duration;

use super::{Attempt, PendingCharge, unreported_credit_source};
use crate::clock;
use crate::policy::charge::ChargeOutcome;
use crate::policy::outcome::Outcome;
use crate::policy::replay::Progress;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::pool::{Key, Lease};
use crate::proxy::client_usage::QuotaOwner;
use crate::proxy::conversation::EndedConversation;
use crate::proxy::retry_state::RetryState;
use crate::proxy::usage::{AttemptRecord, CreditSource};

/// Milliseconds in a minute, the unit of the price of a session that is billed by its duration.
const MILLISECONDS_PER_MINUTE: u64 = 60_000;

/// The text that a session has sent with its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum SentText {
    /// No text that costs credits was sent.
    None,
    /// Text was sent, and the provider may have charged it.
    Billable,
}

impl Attempt {
    /// Records the verdict on the session: the provider serves it, or has refused it in a message.
    pub(in crate::proxy) fn record_verdict(&mut self, verdict: Verdict, retry: Option<&mut RetryState>) {
        let now = clock::now();
        self.record.outcome = verdict.outcome();
        let is_served = verdict == Verdict::Served;
        if is_served {
            self.record.first_byte.get_or_insert(clock::elapsed_since(self.started_at));
            self.record.model =
                self.body_features.as_ref().and_then(|body_features| body_features.model.clone());
        }
        self.update_key_state(verdict, None, retry, now);
        if is_served {
            self.pending_charge = PendingCharge::Session { is_served };
            let quota_charge = self.permits.client.count_session(now);
            self.record.quota.add(quota_charge);
            return;
        }
        // If the session has been served, an error does not refund its charges. If it has not, the client is not
        // charged.
        if self.pending_charge != (PendingCharge::Session { is_served: true }) {
            self.pending_charge = PendingCharge::Nothing;
        }
        if self.record.first_byte.is_none() {
            // The lease is charged after the key's state is updated, as in `record_result`.
            self.charge_lease(0, now);
            self.record.credits_from = CreditSource::Free;
        }
    }

    /// Ends an attempt whose session continues with another key before the provider has served it. Charges the client
    /// for text that the provider may have charged.
    pub(in crate::proxy) fn abandon(&mut self, progress: Progress, sent_text: SentText) {
        let may_be_charged = sent_text == SentText::Billable;
        let now = clock::now();
        self.charge_lease(0, now);
        if may_be_charged && progress.is_sent() {
            self.charge_quota(ChargeOutcome::Unknown, Some(self.text_credits), now);
        }
        self.pending_charge = PendingCharge::Nothing;
        (self.record.outcome, self.record.credits_from) = match progress {
            Progress::Unsent => (Outcome::ConnectFailed, CreditSource::Free),
            Progress::ProxyAuthenticationFailed => (Outcome::ProxyAuthenticationFailed, CreditSource::Free),
            Progress::NoResponse | Progress::Responded(_) if may_be_charged => {
                (Outcome::NoResponse, unreported_credit_source(self.metering))
            }
            Progress::NoResponse | Progress::Responded(_) => (Outcome::NoResponse, CreditSource::Free),
        };
    }

    /// Charges `credits` for `characters` of speech, both counted from the start of the session. The credits
    /// were reserved in the client's quota before the text was sent.
    pub(in crate::proxy) fn record_speech(&mut self, characters: u64, credits: u64) {
        let now = clock::now();
        let additional_credits = credits.saturating_sub(self.record.credits);
        self.record.characters = Some(characters);
        (self.record.credits, self.record.credits_from) = (credits, CreditSource::Estimate);
        let quota_charge = self.permits.client.charge_up_to(credits, now);
        self.record.quota.add(quota_charge);
        self.charge_lease(additional_credits, now);
    }

    /// Sets the estimated credits for all text sent since the start of the session. The provider may charge them even
    /// if it does not serve the session.
    pub(in crate::proxy) fn set_text_credits(&mut self, credits: u64) {
        self.text_credits = credits;
    }

    /// Charges a session at its end. A served session is charged for its text or its duration. If neither has a known
    /// price, the reserved credits are charged. A session that was not served is charged for the text already sent to
    /// the provider.
    pub(super) fn charge_session(&mut self, is_served: bool, now: UnixMs) {
        let is_billed_by_text = self.speech_group.is_some();
        let (outcome, price) = match (is_served, self.text_credits) {
            // Text was charged when it was forwarded.
            (true, _) if is_billed_by_text => (ChargeOutcome::Served, Some(0)),
            (true, _) if self.credits_per_minute.is_some() => {
                self.charge_elapsed_time(now);
                (ChargeOutcome::Served, Some(0))
            }
            (true, _) => (ChargeOutcome::Served, None),
            (false, 0) => (ChargeOutcome::Unsent, None),
            (false, text_credits) => (ChargeOutcome::Unknown, Some(text_credits)),
        };
        self.charge_quota(outcome, price, now);
        self.pending_charge = PendingCharge::Nothing;
    }

    /// Charges the elapsed time of a session that is billed by its duration. Returns the owner of the first exhausted
    /// quota, if any.
    pub(in crate::proxy) fn charge_duration(&mut self) -> Option<QuotaOwner> {
        let now = clock::now();
        if self.pending_charge == (PendingCharge::Session { is_served: true }) {
            self.charge_elapsed_time(now);
        }
        self.permits.client.exhausted_quota(now)
    }

    /// Charges the time since the start of the attempt, if the session is billed by its duration.
    fn charge_elapsed_time(&mut self, now: UnixMs) {
        let Some(credits_per_minute) = self.credits_per_minute else { return };
        let elapsed_ms = u64::try_from(clock::elapsed_since(self.started_at).as_millis()).unwrap_or(u64::MAX);
        let credits = credits_per_minute.saturating_mul(elapsed_ms).div_ceil(MILLISECONDS_PER_MINUTE);
        let quota_charge = self.permits.client.charge_up_to(credits, now);
        self.record.quota.add(quota_charge);
    }

    /// Returns the ended conversation `id`, whose cost must be requested from the provider. Returns `None` if the cost
    /// is known, or if the client's own key was used.
    pub(in crate::proxy) fn ended_conversation(&self, id: Arc<str>) -> Option<EndedConversation> {
        let key = Arc::clone(self.key().filter(|_| self.record.credits_from == CreditSource::Unknown)?);
        let (record, charges) = (self.record.clone(), self.permits.client.correctable_charges());
        Some(EndedConversation { id, key, record, charges })
    }

    /// Records the end of a session: its outcome, and the numbers of bytes that were sent to the provider and
    /// received from it, in this order. Returns the usage record. `outcome` is `None` if the session ends during a
    /// failover, because the outcome of this attempt has already been recorded.
    pub(in crate::proxy) fn record_end(
        &mut self,
        outcome: Option<Outcome>,
        bytes: [u64; 2],
    ) -> &AttemptRecord {
        self.charge_pending();
        self.record.outcome = outcome.unwrap_or(self.record.outcome);
        [self.record.request_bytes, self.record.response_bytes] = bytes;
        &self.record
    }

    /// Records the duration of the audio that was sent for transcription.
    pub(in crate::proxy) fn record_audio(&mut self, audio: Duration) {
        self.record.audio = Some(audio).filter(|audio| !audio.is_zero());
    }

    /// Returns the credits charged so far.
    pub(in crate::proxy) fn charged_credits(&self) -> u64 {
        self.record.credits
    }

    /// Returns the model of the session, if it is known.
    pub(in crate::proxy) fn model(&self) -> Option<&str> {
        self.body_features.as_ref()?.model.as_deref()
    }

    /// Returns the pool's key, or `None` if the client's own key is used.
    pub(in crate::proxy) fn key(&self) -> Option<&Arc<Key>> {
        self.key_source.lease().map(Lease::key)
    }

    /// Replaces the lease with a new lease of the same key, and releases the credits reserved by the old one.
    pub(in crate::proxy) fn replace_lease(&mut self, mut new_lease: Lease) {
        self.charge_lease(0, clock::now());
        new_lease.mark_sent();
        if let Some(lease) = self.key_source.lease_mut() {
            *lease = new_lease;
        }
    }

    /// Releases the concurrency slot while no speech is generated.
    pub(in crate::proxy) fn release_slot(&mut self) {
        if let Some(lease) = self.key_source.lease_mut() {
            lease.release_slot();
        }
    }

    /// Returns whether the attempt holds a concurrency slot.
    pub(in crate::proxy) fn has_slot(&self) -> bool {
        self.key_source.lease().is_some_and(Lease::has_slot)
    }
}
