//! An attempt that has opened a socket: what its messages say of its key, what is spoken, and the place
//! that it has while it speaks.

use std::sync::Arc;
use std::time::Duration;

use super::charging::PendingCharge;
use super::{Attempt, KeySource, unknown};
use crate::clock;
use crate::policy::charge::ChargeOutcome;
use crate::policy::classify::Verdict;
use crate::policy::replay::Progress;
use crate::policy::units::UnixMs;
use crate::pool::{Key, Lease};
use crate::proxy::Conversation;
use crate::proxy::retry_state::RetryState;
use crate::proxy::usage::{AttemptRecord, CreditSource};

impl Attempt {
    /// The session of a socket is served, or refused in its messages.
    pub(in crate::proxy) fn record_verdict(&mut self, verdict: Verdict, retry: Option<&mut RetryState>) {
        let now = clock::now();
        self.record.verdict = verdict.word();
        if verdict == Verdict::Served {
            self.record.first_byte.get_or_insert(clock::since(self.began));
            self.record.model = self.asked.as_ref().and_then(|asked| asked.model.clone());
        }
        self.judge(verdict, None, retry, now);
        let is_served = verdict == Verdict::Served;
        // Once it has served, an error takes nothing back; before, it says that it does not serve.
        if is_served {
            self.due = PendingCharge::Session { is_served };
        } else if self.due != (PendingCharge::Session { is_served: true }) {
            self.due = PendingCharge::Nothing;
        }
        if is_served {
            let taken = self.permits.client().count(now);
            self.record.quota.add(taken);
        }
        // Once it has served, an error takes nothing back.
        if verdict != Verdict::Served && self.record.first_byte.is_none() {
            // After the judgement, as above.
            self.settle(0, now);
            self.record.credits_from = CreditSource::Free;
        }
    }

    /// The session leaves its key, which has not said what it thinks of it. What was said may have been
    /// charged, unless nothing was that costs.
    pub(in crate::proxy) fn abandon_unanswered(&mut self, progress: Progress, may_be_charged: bool) {
        let now = clock::now();
        self.settle(0, now);
        if may_be_charged && progress != Progress::Unsent {
            self.settle_quota(ChargeOutcome::Unknown, Some(self.text_credits), now);
        }
        self.due = PendingCharge::Nothing;
        (self.record.verdict, self.record.credits_from) = match progress {
            Progress::Unsent => ("connect_failed", CreditSource::Free),
            Progress::Unanswered | Progress::Answered(_) if may_be_charged => {
                ("no_response", unknown(self.metering))
            }
            Progress::Unanswered | Progress::Answered(_) => ("no_response", CreditSource::Free),
        };
    }

    /// Records `characters` of speech and their `credits`, both counted from the start of the session. The
    /// credits were reserved in the client's quota before the text was sent.
    pub(in crate::proxy) fn spoken(&mut self, characters: u64, credits: u64) {
        let now = clock::now();
        let more = credits.saturating_sub(self.record.credits);
        self.record.characters = Some(characters);
        (self.record.credits, self.record.credits_from) = (credits, CreditSource::Estimate);
        let taken = self.permits.client().charge_up_to(credits, now);
        self.record.quota.add(taken);
        self.settle(more, now);
    }

    /// Records the estimated credits of all text that was sent to the provider since the start of the
    /// session, which may be charged.
    pub(in crate::proxy) fn said(&mut self, credits: u64) {
        self.text_credits = credits;
    }

    /// Charges a session at its end. One that was served costs its text, its time, or the reservation of an
    /// unknown price; one that was not costs the text that was sent to the provider.
    pub(super) fn settle_session(&mut self, is_served: bool, now: UnixMs) {
        let is_text = self.speech_lane.is_some();
        let (outcome, price) = match (is_served, self.text_credits) {
            // Text is charged when it goes on, time up to now.
            (true, _) if is_text => (ChargeOutcome::Served, Some(0)),
            (true, _) if self.credits_per_minute.is_some() => {
                self.charge_time(now);
                (ChargeOutcome::Served, Some(0))
            }
            (true, _) => (ChargeOutcome::Served, None),
            (false, 0) => (ChargeOutcome::Unsent, None),
            (false, sent) => (ChargeOutcome::Unknown, Some(sent)),
        };
        self.settle_quota(outcome, price, now);
        self.due = PendingCharge::Nothing;
    }

    /// Charges a session that is paid by its time for what has passed of it; whether the client's quota has room
    /// for more.
    pub(in crate::proxy) fn may_go_on(&mut self) -> bool {
        let now = clock::now();
        if self.due == (PendingCharge::Session { is_served: true }) {
            self.charge_time(now);
        }
        self.permits.client().may_spend(now)
    }

    fn charge_time(&mut self, now: UnixMs) {
        let Some(rate) = self.credits_per_minute else { return };
        let ms = u64::try_from(clock::since(self.began).as_millis()).unwrap_or(u64::MAX);
        let taken = self.permits.client().charge_up_to(rate.saturating_mul(ms).div_ceil(60_000), now);
        self.record.quota.add(taken);
    }

    /// The conversation of that name has ended: who asks for its price, and what is then completed. Nobody
    /// asks where a price is known.
    pub(in crate::proxy) fn conversation(&self, id: Arc<str>) -> Option<Conversation> {
        let key = Arc::clone(self.key().filter(|_| self.record.credits_from == CreditSource::Unknown)?);
        Some(Conversation::new(id, key, self.record.clone(), self.permits.client().late_price()))
    }

    /// A session has ended; what became of it, and how much passed in either direction. `None` where that
    /// is known already: the session had left this attempt for another.
    pub(in crate::proxy) fn ended(
        &mut self,
        verdict: Option<&'static str>,
        passed: [u64; 2],
    ) -> &AttemptRecord {
        self.settle_at_end();
        self.record.verdict = verdict.unwrap_or(self.record.verdict);
        [self.record.request_bytes, self.record.response_bytes] = passed;
        &self.record
    }

    /// How much sound was sent to be written down.
    pub(in crate::proxy) fn heard_all(&mut self, audio: Duration) {
        self.record.audio = Some(audio).filter(|audio| !audio.is_zero());
    }

    /// Credits that were charged so far.
    pub(in crate::proxy) fn credits(&self) -> u64 {
        self.record.credits
    }

    /// The model that was asked for.
    pub(in crate::proxy) fn model(&self) -> Option<&str> {
        self.asked.as_ref()?.model.as_deref()
    }

    /// The pool's key; `None` for a client's own.
    pub(in crate::proxy) fn key(&self) -> Option<&Arc<Key>> {
        match &self.key_source {
            KeySource::Pool { lease, .. } => Some(lease.key()),
            KeySource::Client(_) => None,
        }
    }

    /// Goes on with another lease of the same key; what the one before had reserved is free.
    pub(in crate::proxy) fn renew(&mut self, mut renewed: Lease) {
        self.settle(0, clock::now());
        renewed.begin();
        if let KeySource::Pool { lease, .. } = &mut self.key_source {
            *lease = renewed;
        }
    }

    /// Nothing is spoken now: its place is free for others.
    pub(in crate::proxy) fn rest(&mut self) {
        if let KeySource::Pool { lease, .. } = &mut self.key_source {
            lease.rest();
        }
    }

    /// Whether it has a place among those that run at once.
    pub(in crate::proxy) fn has_place(&self) -> bool {
        matches!(&self.key_source, KeySource::Pool { lease, .. } if lease.has_place())
    }
}
