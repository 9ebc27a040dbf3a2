//! An attempt that has opened a socket: what its messages say of its key, what is spoken, and the place
//! that it has while it speaks.

use std::sync::Arc;
use std::time::Duration;

use super::{Attempt, Payer, unknown};
use crate::clock;
use crate::policy::classify::Verdict;
use crate::policy::replay::Progress;
use crate::pool::{Key, Lease};
use crate::proxy::Conversation;
use crate::proxy::books::{AttemptRecord, CreditSource};
use crate::proxy::journey::Journey;

impl Attempt {
    /// The session of a socket is served, or refused in its messages.
    pub(in crate::proxy) fn heard(&mut self, verdict: Verdict, journey: Option<&mut Journey>) {
        let now = clock::now();
        self.record.verdict = verdict.word();
        if verdict == Verdict::Served {
            self.record.first_byte.get_or_insert(clock::since(self.began));
            self.record.model = self.asked.as_ref().and_then(|asked| asked.model.clone());
        }
        self.judge(verdict, None, journey, now);
        // Once it has served, an error takes nothing back.
        if verdict != Verdict::Served && self.record.first_byte.is_none() {
            // After the judgement, as above.
            self.settle(0, now);
            self.record.credits_from = CreditSource::Free;
        }
    }

    /// The session leaves its key, which has not said what it thinks of it. What was said may have been
    /// charged, unless nothing was that costs.
    pub(in crate::proxy) fn left_unheard(&mut self, progress: Progress, may_be_charged: bool) {
        self.settle(0, clock::now());
        (self.record.verdict, self.record.credits_from) = match progress {
            Progress::Unsent => ("unsent", CreditSource::Free),
            Progress::Unanswered | Progress::Answered(_) if may_be_charged => {
                ("unanswered", unknown(self.metering))
            }
            Progress::Unanswered | Progress::Answered(_) => ("unanswered", CreditSource::Free),
        };
    }

    /// So many characters were spoken so far, for so many credits. The client's quota was charged for them
    /// when they were sent.
    pub(in crate::proxy) fn spoken(&mut self, characters: u64, credits: u64) {
        let now = clock::now();
        let more = credits.saturating_sub(self.record.credits);
        self.record.characters = Some(characters);
        (self.record.credits, self.record.credits_from) = (credits, CreditSource::Estimate);
        self.settle(more, now);
    }

    /// The conversation of that name has ended: who asks for its price, and what is then completed. Nobody
    /// asks where a price is known.
    pub(in crate::proxy) fn conversation(&self, id: Arc<str>) -> Option<Conversation> {
        let key = Arc::clone(self.key().filter(|_| self.record.credits_from == CreditSource::Unknown)?);
        Some(Conversation::new(id, key, self.record.clone(), self.account.clone()))
    }

    /// A session has ended; what became of it, and how much passed in either direction. `None` where that
    /// is known already: the session had left this attempt for another.
    pub(in crate::proxy) fn ended(
        &mut self,
        verdict: Option<&'static str>,
        passed: [u64; 2],
    ) -> &AttemptRecord {
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
        match &self.payer {
            Payer::Pool { lease, .. } => Some(lease.key()),
            Payer::Client(_) => None,
        }
    }

    /// Goes on with another lease of the same key; what the one before had reserved is free.
    pub(in crate::proxy) fn renew(&mut self, mut renewed: Lease) {
        self.settle(0, clock::now());
        renewed.begin();
        if let Payer::Pool { lease, .. } = &mut self.payer {
            *lease = renewed;
        }
    }

    /// Nothing is spoken now: its place is free for others.
    pub(in crate::proxy) fn rest(&mut self) {
        if let Payer::Pool { lease, .. } = &mut self.payer {
            lease.rest();
        }
    }

    /// Whether it has a place among those that run at once.
    pub(in crate::proxy) fn has_place(&self) -> bool {
        matches!(&self.payer, Payer::Pool { lease, .. } if lease.has_place())
    }
}
