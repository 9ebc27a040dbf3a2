//! Charges an attempt to the client's quota and to the credits of the workspace. The response determines the charge.
//! Without a response, the charge depends on whether a byte was sent. `session` computes the charges of WebSocket
//! sessions.

use super::{Attempt, KeySource, PendingCharge};
use crate::clock;
use crate::elevenlabs::endpoint::Metering;
use crate::policy::charge::ChargeOutcome;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::proxy::usage::CreditSource;
use crate::telemetry::log_transitions;

impl Attempt {
    /// Charges the cost of a response when its head is received. The provider reports the cost in the head, so a
    /// response whose body is interrupted was probably also charged.
    pub(super) fn charge(&mut self, verdict: Verdict, reported_credits: Option<u64>, now: UnixMs) {
        let reserved_credits = self.key_source.reserved_credits();
        let (credits, source) = match (reported_credits, verdict) {
            (Some(credits), _) => (credits, CreditSource::Reported),
            (None, Verdict::Served) if reserved_credits > 0 => (reserved_credits, CreditSource::Estimate),
            (None, Verdict::Served | Verdict::ServerError) => (0, unreported_credit_source(self.metering)),
            (None, _) => (0, CreditSource::Free),
        };
        (self.record.credits, self.record.credits_from) = (credits, source);
        let outcome = if verdict == Verdict::Served { ChargeOutcome::Served } else { ChargeOutcome::Refused };
        self.charge_quota(outcome, reported_credits, now);
        self.pending_charge = PendingCharge::Nothing;
        self.charge_lease(credits, now);
    }

    /// Charges the client's quota, and adds the charge to the usage record. `price` is `None` if the price is
    /// unknown.
    pub(super) fn charge_quota(&mut self, outcome: ChargeOutcome, price: Option<u64>, now: UnixMs) {
        let quota_charge = self.permits.client.charge(outcome, price, now);
        self.record.quota.add(quota_charge);
    }

    /// Charges an attempt without a response. A request that was sent may have been served, unless it is a WebSocket
    /// handshake.
    pub(super) fn charge_without_response(&mut self, is_sent: bool, now: UnixMs) {
        let may_be_served = is_sent && self.pending_charge == PendingCharge::Response;
        let outcome = if may_be_served { ChargeOutcome::Unknown } else { ChargeOutcome::Unsent };
        self.charge_quota(outcome, None, now);
        self.pending_charge = PendingCharge::Nothing;
    }

    /// Makes the charge that is pending at the end of the attempt, because the attempt ended before the response head
    /// arrived, or because a session ended.
    pub(super) fn charge_pending(&mut self) {
        let now = clock::now();
        match self.pending_charge {
            PendingCharge::Response | PendingCharge::Handshake => {
                let is_sent = self.upload.has_started();
                if !is_sent {
                    self.charge_lease(0, now);
                    self.record.credits_from = CreditSource::Free;
                }
                self.charge_without_response(is_sent, now);
            }
            PendingCharge::Session { is_served } => self.charge_session(is_served, now),
            PendingCharge::Nothing => {}
        }
    }

    /// Charges the lease of the key, if the key is from the pool.
    pub(super) fn charge_lease(&mut self, credits: u64, now: UnixMs) {
        if let KeySource::Pool { pool, roster, lease } = &mut self.key_source {
            log_transitions(&pool.charge(roster, lease, credits, now));
        }
    }
}

/// Returns the source of a number of credits that comes neither from the response nor from an estimate.
pub(super) fn unreported_credit_source(metering: Metering) -> CreditSource {
    match metering {
        Metering::Credits => CreditSource::Unknown,
        Metering::Free => CreditSource::Free,
    }
}
