//! What an attempt takes from its client's quota: by its answer, or without one by whether a byte was sent.

use super::Attempt;
use crate::clock;
use crate::policy::charge::ChargeOutcome;
use crate::policy::units::UnixMs;
use crate::proxy::usage::CreditSource;

/// What an attempt still owes its client's quota when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PendingCharge {
    /// No head of an answer came yet: what was sent may be served.
    Answer,
    /// No head of an answer came yet, and without one nothing is served: it asks for a socket.
    Handshake,
    /// A session was opened.
    Session {
        /// Whether the provider has served it.
        is_served: bool,
    },
    /// All is settled.
    Nothing,
}

impl Attempt {
    /// Settles what the client is charged.
    pub(super) fn settle_quota(&mut self, outcome: ChargeOutcome, reported: Option<u64>, now: UnixMs) {
        let taken = self.permits.client().settle(outcome, reported, now);
        self.record.quota.add(taken);
    }

    /// The same without an answer: what was sent may have been served.
    pub(super) fn settle_unanswered(&mut self, is_sent: bool, now: UnixMs) {
        let may_be_served = is_sent && self.due == PendingCharge::Answer;
        self.settle_quota(
            if may_be_served { ChargeOutcome::Unknown } else { ChargeOutcome::Unsent },
            None,
            now,
        );
        self.due = PendingCharge::Nothing;
    }

    /// Settles what is still due: the client has left before an answer, or a session is over.
    pub(super) fn settle_at_end(&mut self) {
        let now = clock::now();
        match self.due {
            PendingCharge::Answer | PendingCharge::Handshake => {
                let is_sent = self.upload.has_begun();
                if !is_sent {
                    self.settle(0, now);
                    self.record.credits_from = CreditSource::Free;
                }
                self.settle_unanswered(is_sent, now);
            }
            PendingCharge::Session { is_served } => self.settle_session(is_served, now),
            PendingCharge::Nothing => {}
        }
    }
}
