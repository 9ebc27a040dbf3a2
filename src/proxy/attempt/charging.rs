//! Charges the client's quota and settles the workspace's credits for an attempt: by the response; if there is
//! none, depending on whether a byte was sent.

use super::{Attempt, PendingCharge, unknown_credits};
use crate::clock;
use crate::policy::charge::ChargeOutcome;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::proxy::usage::CreditSource;

impl Attempt {
    /// Charges the cost. The provider reports it in the response head, before the body: a response whose body
    /// breaks off is probably charged too.
    pub(super) fn charge(&mut self, verdict: Verdict, reported: Option<u64>, now: UnixMs) {
        let expected = self.key_source.reserved();
        let (credits, source) = match (reported, verdict) {
            (Some(reported), _) => (reported, CreditSource::Answer),
            (None, Verdict::Served) if expected > 0 => (expected, CreditSource::Estimate),
            (None, Verdict::Served | Verdict::ServerError) => (0, unknown_credits(self.metering)),
            (None, _) => (0, CreditSource::Free),
        };
        (self.record.credits, self.record.credits_from) = (credits, source);
        let outcome = if verdict == Verdict::Served { ChargeOutcome::Served } else { ChargeOutcome::Refused };
        self.charge_quota(outcome, reported, now);
        self.pending = PendingCharge::Nothing;
        self.settle_lease(credits, now);
    }

    /// Charges the client's quota, and adds the charge to the usage record.
    pub(super) fn charge_quota(&mut self, outcome: ChargeOutcome, reported: Option<u64>, now: UnixMs) {
        let charged = self.permits.client().charge(outcome, reported, now);
        self.record.quota.add(charged);
    }

    /// Charges an attempt without a response: if its request was sent, the provider may have served
    /// it.
    pub(super) fn charge_unanswered(&mut self, is_sent: bool, now: UnixMs) {
        let may_be_served = is_sent && self.pending == PendingCharge::Response;
        self.charge_quota(
            if may_be_served { ChargeOutcome::Unknown } else { ChargeOutcome::Unsent },
            None,
            now,
        );
        self.pending = PendingCharge::Nothing;
    }

    /// Charges the pending amount at the end: the client disconnected before a response, or a session ended.
    pub(super) fn charge_pending(&mut self) {
        let now = clock::now();
        match self.pending {
            PendingCharge::Response | PendingCharge::Handshake => {
                let is_sent = self.upload.has_begun();
                if !is_sent {
                    self.settle_lease(0, now);
                    self.record.credits_from = CreditSource::Free;
                }
                self.charge_unanswered(is_sent, now);
            }
            PendingCharge::Session { is_served } => self.charge_session(is_served, now),
            PendingCharge::Nothing => {}
        }
    }
}
