//! The permit of a request under its client's limits. It counts one request in progress and one request of
//! the quota, and reserves credits, which no other request of the client can then use.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::counters::{ClientCounters, ClientLimitExceeded, LimitRequest};
use super::tallies::Counted;
use crate::policy::charge::{Billing, Charge, ChargeOutcome, charge};
use crate::policy::client_quota::{ClientQuota, Measure, QuotaSpent};
use crate::policy::units::UnixMs;

/// A request in progress of one client.
///
/// Dropping it ends the request for the concurrency limit, and refunds all reserved amounts that were not
/// charged. Amounts are charged before, with [`charge`](Self::charge) and the methods for sessions.
#[derive(Debug)]
pub(in crate::proxy) struct ClientPermit {
    counters: Arc<ClientCounters>,
    quota: Option<ClientQuota>,
    billing: Billing,
    is_charged: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The counted request: counted at admission, or when it was first charged.
    request: Option<Counted>,
    /// Whether it was charged, so that it is not refunded.
    is_counted: bool,
    /// The highest known estimate of the request's total cost.
    expected: u64,
    /// Credits that were charged so far.
    charged: u64,
    /// Credits in the client's tallies that are reserved for this request and not charged.
    held: u64,
    /// The periods in which `held` and `charged` are counted.
    credits: Option<Counted>,
    /// Whether it counts as a request of unknown price.
    is_unpriced: bool,
}

impl ClientPermit {
    pub(super) fn new(
        counters: Arc<ClientCounters>,
        quota: Option<ClientQuota>,
        limit_request: LimitRequest,
    ) -> Self {
        let LimitRequest { billing, is_charged, .. } = limit_request;
        Self { counters, quota, billing, is_charged, state: Mutex::default() }
    }

    pub(super) fn counters(&self) -> &ClientCounters {
        &self.counters
    }

    /// The quota that the request counts against, unless it is free or not charged.
    pub(super) fn quota(&self) -> Option<ClientQuota> {
        self.quota.filter(|_| self.is_charged && self.billing != Billing::Free)
    }

    fn credit_quota(&self) -> Option<ClientQuota> {
        self.quota().filter(|quota| quota.measure == Measure::Credits)
    }

    /// Whether the request counts against a credit quota: then its price should be known before it
    /// is sent.
    pub(in crate::proxy) fn needs_price(&self) -> bool {
        self.credit_quota().is_some()
    }

    /// The billing of the request.
    pub(in crate::proxy) fn billing(&self) -> Billing {
        self.billing
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the request at admission, when it is still unknown whether the provider serves it.
    pub(super) fn count_ahead(&self, now: UnixMs) -> Result<(), QuotaSpent> {
        if !self.is_charged || self.billing == Billing::Free {
            return Ok(());
        }
        let of_requests = self.quota().filter(|quota| quota.measure == Measure::Requests);
        let counted = match of_requests {
            Some(quota) => self.counters.requests.take(quota, now, |_| 1)?.1,
            None => self.counters.requests.add(&[1; 3], now),
        };
        self.state().request = Some(counted);
        Ok(())
    }

    /// Reserves the request's maximum cost: `total` credits since its start, including earlier reservations.
    /// One compare-and-swap on the sum of the client's used and reserved credits decides, so that no two
    /// requests get the same credits.
    ///
    /// # Errors
    ///
    /// When the quota has fewer credits left. Earlier reservations are kept.
    pub(in crate::proxy) fn reserve(&self, total: u64, now: UnixMs) -> Result<(), QuotaSpent> {
        let mut state = self.state();
        let more = total.saturating_sub(state.expected);
        if let Some(quota) = self.credit_quota().filter(|_| more > 0) {
            let (reserved, counted) = self.counters.credits.take(quota, now, |_| more)?;
            self.hold(&mut state, reserved, counted, now);
        }
        state.expected = state.expected.max(total);
        Ok(())
    }

    /// Reserves credits for a request of unknown price: `amount`, or the rest of the quota if that is less. A
    /// client may have at most `max` such requests in progress. The prices of these requests thus limit by
    /// how much the quota can be exceeded.
    ///
    /// # Errors
    ///
    /// When nothing is left in the quota, or `max` such requests are in progress.
    pub(in crate::proxy) fn reserve_unpriced(
        &self,
        amount: u64,
        max: u32,
        now: UnixMs,
    ) -> Result<(), ClientLimitExceeded> {
        let mut state = self.state();
        if let Some(quota) = self.credit_quota() {
            state.is_unpriced = true;
            if self.counters.unpriced.fetch_add(1, Ordering::AcqRel) >= max {
                return Err(ClientLimitExceeded::Unpriced { max });
            }
            let left = |used: u64| quota.amount.saturating_sub(used);
            let (reserved, counted) =
                self.counters.credits.take(quota, now, |used| amount.min(left(used)))?;
            self.hold(&mut state, reserved, counted, now);
        }
        state.expected = amount;
        Ok(())
    }

    /// Adds newly reserved credits. Credits that were reserved in a period which has ended since
    /// move to the current one.
    fn hold(&self, state: &mut State, more: u64, counted: Counted, now: UnixMs) {
        if let Some(before) = state.credits.filter(|before| *before != counted) {
            self.counters.credits.replace(before, state.held, 0);
            self.counters.credits.add(&[state.held; 3], now);
        }
        state.credits = Some(counted);
        state.held += more;
    }

    /// Whether a running session may cost more: credits are left in the quota, or reserved for it.
    pub(in crate::proxy) fn may_spend(&self, now: UnixMs) -> bool {
        let Some(quota) = self.credit_quota() else { return true };
        self.state().held > 0 || quota.check(self.counters.credits.used(quota.period, now), now).is_ok()
    }

    /// Charges an attempt that ended with `outcome`, whose response reported the price `reported`. Returns
    /// the charge to the quota.
    ///
    /// When the provider served the attempt or may have served it, the rest of the reservation is released.
    /// After a refused or unsent attempt it is kept for the next attempt.
    pub(in crate::proxy) fn charge(
        &self,
        outcome: ChargeOutcome,
        reported: Option<u64>,
        now: UnixMs,
    ) -> Charge {
        if !self.is_charged {
            return Charge::default();
        }
        let mut state = self.state();
        let due = state.expected.saturating_sub(state.charged);
        let charged = self.take(&mut state, charge(self.billing, outcome, reported, due), now);
        if matches!(outcome, ChargeOutcome::Served | ChargeOutcome::Unknown) {
            self.release(&mut state);
        }
        charged
    }

    /// Counts a served session as a request. Its credits are charged while it runs.
    pub(in crate::proxy) fn count(&self, now: UnixMs) -> Charge {
        let is_free = !self.is_charged || self.billing == Billing::Free;
        let counts = Charge { requests: u64::from(!is_free), credits: 0 };
        self.take(&mut self.state(), counts, now)
    }

    /// Charges a running session up to `total` credits since its start.
    pub(in crate::proxy) fn charge_up_to(&self, total: u64, now: UnixMs) -> Charge {
        if !self.is_charged {
            return Charge::default();
        }
        let mut state = self.state();
        let credits = total.saturating_sub(state.charged);
        self.take(&mut state, Charge { requests: u64::from(credits > 0), credits }, now)
    }

    /// Charges credits, from the reservation first. The request itself is counted once.
    fn take(&self, state: &mut State, charge: Charge, now: UnixMs) -> Charge {
        let Charge { requests, credits } = charge;
        let is_first = requests > 0 && !state.is_counted;
        state.is_counted |= is_first;
        if is_first && state.request.is_none() {
            state.request = Some(self.counters.requests.add(&[1; 3], now));
        }
        if credits > 0 {
            let held = state.held.min(credits);
            match state.credits {
                Some(counted) => self.counters.credits.replace(counted, held, credits),
                None => state.credits = Some(self.counters.credits.add(&[credits; 3], now)),
            }
            state.held -= held;
            state.charged += credits;
        }
        Charge { requests: u64::from(is_first), credits }
    }

    /// Refunds the reserved amounts that were not charged.
    fn release(&self, state: &mut State) {
        if let Some(counted) = state.credits.filter(|_| state.held > 0) {
            self.counters.credits.replace(counted, state.held, 0);
            state.held = 0;
        }
        if std::mem::take(&mut state.is_unpriced) {
            self.counters.unpriced.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// The data for correcting the charge when the price becomes known after the request has ended.
    pub(in crate::proxy) fn late_price(&self) -> LatePrice {
        let state = self.state();
        let counters = self.is_charged.then(|| Arc::clone(&self.counters));
        LatePrice { counters, charged: state.charged, credits: state.credits }
    }
}

impl Drop for ClientPermit {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.state());
        self.release(&mut state);
        if let Some(counted) = state.request.filter(|_| !state.is_counted) {
            self.counters.requests.replace(counted, 1, 0);
        }
        self.counters.in_progress.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The charge of an ended request whose price may still be reported.
#[derive(Debug)]
pub(in crate::proxy) struct LatePrice {
    counters: Option<Arc<ClientCounters>>,
    charged: u64,
    credits: Option<Counted>,
}

impl LatePrice {
    /// Replaces the charge by the reported price of `credits`. Returns the new charge.
    pub(in crate::proxy) fn replace(self, credits: u64, now: UnixMs) -> u64 {
        let Some(counters) = self.counters else { return 0 };
        match self.credits {
            Some(counted) => counters.credits.replace(counted, self.charged, credits),
            None => drop(counters.credits.add(&[credits; 3], now)),
        }
        credits
    }
}
