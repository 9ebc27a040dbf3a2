//! An attempt that has opened a socket session: its verdict, its charges for text or time, and its
//! concurrency slot while speech is generated.

use std::sync::Arc;
use std::time::Duration;

use super::{Attempt, KeySource, PendingCharge, unknown_credits};
use crate::clock;
use crate::policy::charge::ChargeOutcome;
use crate::policy::outcome::Outcome;
use crate::policy::replay::Progress;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::pool::{Key, Lease};
use crate::proxy::conversation::Conversation;
use crate::proxy::retry_state::RetryState;
use crate::proxy::usage::{AttemptRecord, CreditSource};

impl Attempt {
    /// Records that a session is served, or that its messages refuse it.
    pub(in crate::proxy) fn record_verdict(&mut self, verdict: Verdict, retry: Option<&mut RetryState>) {
        let now = clock::now();
        self.record.outcome = verdict.outcome();
        if verdict == Verdict::Served {
            self.record.first_byte.get_or_insert(clock::since(self.began));
            self.record.model =
                self.body_features.as_ref().and_then(|body_features| body_features.model.clone());
        }
        self.update_key_state(verdict, None, retry, now);
        let is_served = verdict == Verdict::Served;
        // An error after the session was served refunds nothing; an error before it means nothing
        // is charged.
        if is_served {
            self.pending = PendingCharge::Session { is_served };
        } else if self.pending != (PendingCharge::Session { is_served: true }) {
            self.pending = PendingCharge::Nothing;
        }
        if is_served {
            let charged = self.permits.client().count(now);
            self.record.quota.add(charged);
        }
        // An error after the session was served refunds nothing.
        if verdict != Verdict::Served && self.record.first_byte.is_none() {
            // After the key's state is updated, as in `record_result`.
            self.settle_lease(0, now);
            self.record.credits_from = CreditSource::Free;
        }
    }

    /// Ends the attempt of a session that fails over before its key has replied. Text that was sent
    /// may have been charged; `may_be_charged` is false when nothing billable was sent.
    pub(in crate::proxy) fn abandon_unanswered(&mut self, progress: Progress, may_be_charged: bool) {
        let now = clock::now();
        self.settle_lease(0, now);
        if may_be_charged && progress != Progress::Unsent {
            self.charge_quota(ChargeOutcome::Unknown, Some(self.text_credits), now);
        }
        self.pending = PendingCharge::Nothing;
        (self.record.outcome, self.record.credits_from) = match progress {
            Progress::Unsent => (Outcome::ConnectFailed, CreditSource::Free),
            Progress::Unanswered | Progress::Answered(_) if may_be_charged => {
                (Outcome::NoResponse, unknown_credits(self.metering))
            }
            Progress::Unanswered | Progress::Answered(_) => (Outcome::NoResponse, CreditSource::Free),
        };
    }

    /// Records `characters` of speech and their `credits`, both counted from the start of the session. The
    /// credits were reserved in the client's quota before the text was sent.
    pub(in crate::proxy) fn record_speech(&mut self, characters: u64, credits: u64) {
        let now = clock::now();
        let more = credits.saturating_sub(self.record.credits);
        self.record.characters = Some(characters);
        (self.record.credits, self.record.credits_from) = (credits, CreditSource::Estimate);
        let charged = self.permits.client().charge_up_to(credits, now);
        self.record.quota.add(charged);
        self.settle_lease(more, now);
    }

    /// Sets the estimated credits of all text that was sent to the provider since the start of the
    /// session, which the provider may charge.
    pub(in crate::proxy) fn set_text_credits(&mut self, credits: u64) {
        self.text_credits = credits;
    }

    /// Charges a session at its end. A served session costs its text, its time, or the reservation
    /// for an unknown price; a session that was not served costs the text that was sent to the
    /// provider.
    pub(super) fn charge_session(&mut self, is_served: bool, now: UnixMs) {
        let is_text = self.speech_group.is_some();
        let (outcome, price) = match (is_served, self.text_credits) {
            // Text was charged when it was forwarded.
            (true, _) if is_text => (ChargeOutcome::Served, Some(0)),
            (true, _) if self.credits_per_minute.is_some() => {
                self.charge_time(now);
                (ChargeOutcome::Served, Some(0))
            }
            (true, _) => (ChargeOutcome::Served, None),
            (false, 0) => (ChargeOutcome::Unsent, None),
            (false, sent) => (ChargeOutcome::Unknown, Some(sent)),
        };
        self.charge_quota(outcome, price, now);
        self.pending = PendingCharge::Nothing;
    }

    /// Charges a session that is billed by its duration for the time so far; returns whether the
    /// client's quota has credits left for more.
    pub(in crate::proxy) fn charge_duration(&mut self) -> bool {
        let now = clock::now();
        if self.pending == (PendingCharge::Session { is_served: true }) {
            self.charge_time(now);
        }
        self.permits.client().may_spend(now)
    }

    fn charge_time(&mut self, now: UnixMs) {
        let Some(rate) = self.credits_per_minute else { return };
        let ms = u64::try_from(clock::since(self.began).as_millis()).unwrap_or(u64::MAX);
        let charged = self.permits.client().charge_up_to(rate.saturating_mul(ms).div_ceil(60_000), now);
        self.record.quota.add(charged);
    }

    /// The ended conversation `id` whose cost is to be polled from the provider, with the record
    /// and the late price to complete. `None` when the cost is known or the client's own key was
    /// used.
    pub(in crate::proxy) fn conversation(&self, id: Arc<str>) -> Option<Conversation> {
        let key = Arc::clone(self.key().filter(|_| self.record.credits_from == CreditSource::Unknown)?);
        Some(Conversation::new(id, key, self.record.clone(), self.permits.client().late_price()))
    }

    /// Records the end of a session: its outcome, and the bytes sent and received. `outcome` is
    /// `None` when this attempt has its outcome already, because the session failed over to
    /// another.
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

    /// Records the duration of the audio that was sent to be transcribed.
    pub(in crate::proxy) fn record_audio(&mut self, audio: Duration) {
        self.record.audio = Some(audio).filter(|audio| !audio.is_zero());
    }

    /// Credits that were charged so far.
    pub(in crate::proxy) fn credits(&self) -> u64 {
        self.record.credits
    }

    /// The model of the session, if it is known.
    pub(in crate::proxy) fn model(&self) -> Option<&str> {
        self.body_features.as_ref()?.model.as_deref()
    }

    /// The pool's key; `None` when the client's own key is used.
    pub(in crate::proxy) fn key(&self) -> Option<&Arc<Key>> {
        match &self.key_source {
            KeySource::Pool { lease, .. } => Some(lease.key()),
            KeySource::Client(_) => None,
        }
    }

    /// Continues with another lease of the same key, and releases the credits that the former one
    /// reserved.
    pub(in crate::proxy) fn replace_lease(&mut self, mut renewed: Lease) {
        self.settle_lease(0, clock::now());
        renewed.begin();
        if let KeySource::Pool { lease, .. } = &mut self.key_source {
            *lease = renewed;
        }
    }

    /// Releases the concurrency slot while no speech is generated.
    pub(in crate::proxy) fn release_slot(&mut self) {
        if let KeySource::Pool { lease, .. } = &mut self.key_source {
            lease.release_slot();
        }
    }

    /// Whether the lease holds a concurrency slot.
    pub(in crate::proxy) fn has_slot(&self) -> bool {
        matches!(&self.key_source, KeySource::Pool { lease, .. } if lease.has_slot())
    }
}
