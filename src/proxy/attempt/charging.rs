//! Charges the client's quota for an attempt: by the response, or without one by whether a byte was
//! sent.

use super::Attempt;
use crate::clock;
use crate::policy::charge::ChargeOutcome;
use crate::policy::units::UnixMs;
use crate::proxy::usage::CreditSource;

/// What is still to be charged to the client's quota when the attempt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PendingCharge {
    /// No response head has come yet: the provider may serve what was sent.
    Answer,
    /// No response head to a socket handshake has come yet; without one the provider serves
    /// nothing.
    Handshake,
    /// A socket session was opened.
    Session {
        /// Whether the provider has served it.
        is_served: bool,
    },
    /// Everything is charged.
    Nothing,
}

impl Attempt {
    /// Charges the client's quota, and adds the charge to the usage record.
    pub(super) fn settle_quota(&mut self, outcome: ChargeOutcome, reported: Option<u64>, now: UnixMs) {
        let taken = self.permits.client().settle(outcome, reported, now);
        self.record.quota.add(taken);
    }

    /// Charges an attempt without a response: if its request was sent, the provider may have served
    /// it.
    pub(super) fn settle_unanswered(&mut self, is_sent: bool, now: UnixMs) {
        let may_be_served = is_sent && self.due == PendingCharge::Answer;
        self.settle_quota(
            if may_be_served { ChargeOutcome::Unknown } else { ChargeOutcome::Unsent },
            None,
            now,
        );
        self.due = PendingCharge::Nothing;
    }

    /// Charges what is pending at the end: the client disconnected before a response, or a session
    /// ended.
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
