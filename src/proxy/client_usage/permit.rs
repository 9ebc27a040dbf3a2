//! A request's part of its client's limits: one of those under way, one request, and credits that no other
//! request of the client can take meanwhile.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::tallies::Counted;
use super::{ClientCounters, ClientLimitExceeded, LimitRequest};
use crate::policy::charge::{Billing, Charge, ChargeOutcome, charge};
use crate::policy::client_quota::{ClientQuota, Measure, QuotaSpent};
use crate::policy::units::UnixMs;

/// A client's request under way.
///
/// Dropping it makes room for another, and gives back all that was reserved and not charged: what counts is
/// said before, by [`settle`](Self::settle) and its like.
#[derive(Debug)]
pub(in crate::proxy) struct ClientPermit {
    account: Arc<ClientCounters>,
    quota: Option<ClientQuota>,
    billing: Billing,
    is_charged: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The request, counted ahead or because it was charged.
    request: Option<Counted>,
    /// Whether it stays counted.
    is_counted: bool,
    /// The most that the request may cost so far, as far as that is known.
    expected: u64,
    /// What it has cost so far.
    charged: u64,
    /// Credits of it in the client's tallies that are reserved and not charged.
    held: u64,
    /// The periods in which `held` and `charged` are counted.
    credits: Option<Counted>,
    /// Whether it takes one of the places of requests without a known price.
    is_unpriced: bool,
}

impl ClientPermit {
    pub(super) fn new(account: Arc<ClientCounters>, quota: Option<ClientQuota>, claim: LimitRequest) -> Self {
        let LimitRequest { billing, is_charged, .. } = claim;
        Self { account, quota, billing, is_charged, state: Mutex::default() }
    }

    pub(super) fn account(&self) -> &ClientCounters {
        &self.account
    }

    /// The quota that the request needs room in.
    pub(super) fn quota(&self) -> Option<ClientQuota> {
        self.quota.filter(|_| self.is_charged && self.billing != Billing::Free)
    }

    fn credit_quota(&self) -> Option<ClientQuota> {
        self.quota().filter(|quota| quota.measure == Measure::Credits)
    }

    /// Whether the client has a quota of credits that this request counts against: then its price must be
    /// known before it is sent, if it can be.
    pub(in crate::proxy) fn needs_price(&self) -> bool {
        self.credit_quota().is_some()
    }

    /// What is known of its price.
    pub(in crate::proxy) fn billing(&self) -> Billing {
        self.billing
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the request, before it is known whether it is served.
    pub(super) fn count_ahead(&self, now: UnixMs) -> Result<(), QuotaSpent> {
        if !self.is_charged || self.billing == Billing::Free {
            return Ok(());
        }
        let of_requests = self.quota().filter(|quota| quota.measure == Measure::Requests);
        let counted = match of_requests {
            Some(quota) => self.account.requests.take(quota, now, |_| 1)?.1,
            None => self.account.requests.add(&[1; 3], now),
        };
        self.state().request = Some(counted);
        Ok(())
    }

    /// Reserves what the request may cost at the most: `total` credits from its begin on, of which what was
    /// reserved before is a part. One compare-and-swap on the sum of what the client has used and reserved
    /// decides, so no two requests get the same credits.
    ///
    /// # Errors
    ///
    /// When the quota has less left. What was reserved before stays reserved.
    pub(in crate::proxy) fn reserve(&self, total: u64, now: UnixMs) -> Result<(), QuotaSpent> {
        let mut state = self.state();
        let more = total.saturating_sub(state.expected);
        if let Some(quota) = self.credit_quota().filter(|_| more > 0) {
            let (taken, counted) = self.account.credits.take(quota, now, |_| more)?;
            self.hold(&mut state, taken, counted, now);
        }
        state.expected = state.expected.max(total);
        Ok(())
    }

    /// Reserves credits for a request of unknown price: `amount`, or what is left when that is less. A client
    /// may have at most `max` such requests under way, so their price bounds by how much the quota is
    /// exceeded.
    ///
    /// # Errors
    ///
    /// When nothing is left, or too many are under way.
    pub(in crate::proxy) fn reserve_unpriced(
        &self,
        amount: u64,
        max: u32,
        now: UnixMs,
    ) -> Result<(), ClientLimitExceeded> {
        let mut state = self.state();
        if let Some(quota) = self.credit_quota() {
            state.is_unpriced = true;
            if self.account.unpriced.fetch_add(1, Ordering::AcqRel) >= max {
                return Err(ClientLimitExceeded::Unpriced { max });
            }
            let left = |taken: u64| quota.amount.saturating_sub(taken);
            let (taken, counted) = self.account.credits.take(quota, now, |taken| amount.min(left(taken)))?;
            self.hold(&mut state, taken, counted, now);
        }
        state.expected = amount;
        Ok(())
    }

    /// Takes over what was added to the tallies. What was held from a period that has ended since moves to
    /// the present one.
    fn hold(&self, state: &mut State, more: u64, counted: Counted, now: UnixMs) {
        if let Some(before) = state.credits.filter(|before| *before != counted) {
            self.account.credits.settle(before, state.held, 0);
            self.account.credits.add(&[state.held; 3], now);
        }
        state.credits = Some(counted);
        state.held += more;
    }

    /// Whether more may be spent on what runs already: something of the quota is left, or reserved for it.
    pub(in crate::proxy) fn may_spend(&self, now: UnixMs) -> bool {
        let Some(quota) = self.credit_quota() else { return true };
        self.state().held > 0 || quota.check(self.account.credits.used(quota.period, now), now).is_ok()
    }

    /// An attempt has ended with `outcome`, and its answer named the price `reported`. Returns what that took
    /// from the quota.
    ///
    /// Something was served, or may have been: then what is still reserved is free for others. A refused or
    /// unsent attempt keeps it for the next one.
    pub(in crate::proxy) fn settle(
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
        let taken = self.take(&mut state, charge(self.billing, outcome, reported, due), now);
        if matches!(outcome, ChargeOutcome::Served | ChargeOutcome::Unknown) {
            self.release(&mut state);
        }
        taken
    }

    /// A session is served: it counts. What it costs is charged as it goes on.
    pub(in crate::proxy) fn count(&self, now: UnixMs) -> Charge {
        let is_free = !self.is_charged || self.billing == Billing::Free;
        let counts = Charge { requests: u64::from(!is_free), credits: 0 };
        self.take(&mut self.state(), counts, now)
    }

    /// A session under way has cost `total` credits from its begin on.
    pub(in crate::proxy) fn charge_up_to(&self, total: u64, now: UnixMs) -> Charge {
        if !self.is_charged {
            return Charge::default();
        }
        let mut state = self.state();
        let credits = total.saturating_sub(state.charged);
        self.take(&mut state, Charge { requests: u64::from(credits > 0), credits }, now)
    }

    /// Books a charge, of what is reserved first. The request itself is counted once.
    fn take(&self, state: &mut State, charge: Charge, now: UnixMs) -> Charge {
        let Charge { requests, credits } = charge;
        let is_first = requests > 0 && !state.is_counted;
        state.is_counted |= is_first;
        if is_first && state.request.is_none() {
            state.request = Some(self.account.requests.add(&[1; 3], now));
        }
        if credits > 0 {
            let held = state.held.min(credits);
            match state.credits {
                Some(counted) => self.account.credits.settle(counted, held, credits),
                None => state.credits = Some(self.account.credits.add(&[credits; 3], now)),
            }
            state.held -= held;
            state.charged += credits;
        }
        Charge { requests: u64::from(is_first), credits }
    }

    /// Gives back what is reserved and was not charged.
    fn release(&self, state: &mut State) {
        if let Some(counted) = state.credits.filter(|_| state.held > 0) {
            self.account.credits.settle(counted, state.held, 0);
            state.held = 0;
        }
        if std::mem::take(&mut state.is_unpriced) {
            self.account.unpriced.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// What is needed to correct the charge when the price becomes known after the request has ended.
    pub(in crate::proxy) fn late_price(&self) -> LatePrice {
        let state = self.state();
        let account = self.is_charged.then(|| Arc::clone(&self.account));
        LatePrice { account, charged: state.charged, credits: state.credits }
    }
}

impl Drop for ClientPermit {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.state());
        self.release(&mut state);
        if let Some(counted) = state.request.filter(|_| !state.is_counted) {
            self.account.requests.settle(counted, 1, 0);
        }
        self.account.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A charge of a request that has ended, for which a price may still be named.
#[derive(Debug)]
pub(in crate::proxy) struct LatePrice {
    account: Option<Arc<ClientCounters>>,
    charged: u64,
    credits: Option<Counted>,
}

impl LatePrice {
    /// The request has cost `credits`, and not what it was charged so far. Returns what it is charged now.
    pub(in crate::proxy) fn settle(self, credits: u64, now: UnixMs) -> u64 {
        let Some(account) = self.account else { return 0 };
        match self.credits {
            Some(counted) => account.credits.settle(counted, self.charged, credits),
            None => drop(account.credits.add(&[credits; 3], now)),
        }
        credits
    }
}
