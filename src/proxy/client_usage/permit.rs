//! Counts a request against one quota, of its client or of its user, and reserves credits in the quota. No other
//! request can use these credits until the permit is charged or dropped.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::counters::{AdmissionRequest, UsageCounters};
use super::grant::GrantUse;
use super::period_counters::{AmountRange, PeriodNumbers};
use crate::policy::charge::{Billing, Charge, ChargeOutcome, charge};
use crate::policy::client_quota::{ClientQuota, QuotaExceeded, QuotaUnit};
use crate::policy::units::UnixMs;

/// Maximum number of grant extensions for one request. Other requests may use an extended grant before the request
/// that extended it.
const MAX_EXTENSIONS: u32 = 4;

/// The reason why an amount cannot be taken from a quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReservationRefused {
    /// The quota is exhausted, or is insufficient for this request.
    Quota(QuotaExceeded),
    /// The maximum number of requests of unknown price is in progress.
    Unpriced { max: u32 },
    /// The grant of this replica is insufficient, and the other replicas may extend it.
    Grant { demand: AmountRange, exceeded: QuotaExceeded },
}

/// The permit of a request in progress that counts against one quota.
///
/// Dropping the permit refunds the reserved amounts that were not charged. [`charge`](Self::charge) and the
/// methods for sessions charge the amounts beforehand.
#[derive(Debug)]
pub(super) struct QuotaPermit {
    counters: Arc<UsageCounters>,
    quota: Option<ClientQuota>,
    pub(super) billing: Billing,
    /// Whether the quota is charged, which is false for a request with the client's own key.
    is_charged: bool,
    state: Mutex<PermitState>,
}

/// The amounts of one request in the counters.
#[derive(Debug, Default)]
struct PermitState {
    /// The periods in which the request is counted, at admission or by its first charge.
    request_periods: Option<PeriodNumbers>,
    /// Whether the request was charged. A charged request is not refunded.
    was_charged: bool,
    /// The highest estimate of the request's total cost.
    estimated_credits: u64,
    /// Credits charged so far.
    charged_credits: u64,
    /// Credits that are reserved for this request in the counters and not charged.
    reserved_credits: u64,
    /// The periods in which the reserved and charged credits are counted.
    credit_periods: Option<PeriodNumbers>,
    /// Whether the request is counted as a request of unknown price.
    is_unpriced: bool,
}

impl QuotaPermit {
    pub(super) fn new(
        counters: Arc<UsageCounters>,
        quota: Option<ClientQuota>,
        admission: AdmissionRequest,
    ) -> Self {
        let AdmissionRequest { billing, is_charged, .. } = admission;
        Self { counters, quota, billing, is_charged, state: Mutex::default() }
    }

    /// Returns the quota that the request counts against, or `None` if the request costs no credits or is not charged.
    pub(super) fn quota(&self) -> Option<ClientQuota> {
        self.quota.filter(|_| self.is_charged && self.billing != Billing::Free)
    }

    /// Checks that the quota is not exhausted. Other requests may exhaust it before this request reserves its credits.
    pub(super) fn check_not_exhausted(
        &self,
        now: UnixMs,
        grant_use: GrantUse,
    ) -> Result<(), ReservationRefused> {
        let Some(quota) = self.quota() else { return Ok(()) };
        match self.counters.share() {
            Some(share) => share.check_not_exhausted(&self.counters, quota, now, grant_use),
            None => quota
                .check(self.counters.period_counters(quota.unit).used(quota.period, now), now)
                .map_err(ReservationRefused::Quota),
        }
    }

    /// Takes as much of `demand` from `quota` as remains. Returns the amount, and the periods in which it is counted.
    fn try_add(
        &self,
        quota: ClientQuota,
        demand: AmountRange,
        now: UnixMs,
        grant_use: GrantUse,
    ) -> Result<(u64, PeriodNumbers), ReservationRefused> {
        match self.counters.share() {
            Some(share) => share.try_add(&self.counters, quota, demand, now, grant_use),
            None => {
                let period_counters = self.counters.period_counters(quota.unit);
                let exceeded = |used| ReservationRefused::Quota(quota.exceeded(used, demand.min, now));
                period_counters.try_add(quota.period, quota.amount, demand, now).map_err(exceeded)
            }
        }
    }

    /// Calls `take`, which takes an amount from the quota. If other replicas share the quota and the grant of this
    /// replica is insufficient, requests a larger grant from them, and calls `take` again.
    ///
    /// # Errors
    ///
    /// Fails when the quota of all replicas is insufficient, or when `take` fails for a reason other than the grant.
    /// Without a reply in time, fails when the share of this replica is insufficient.
    pub(super) async fn with_grant<T: Send>(
        &self,
        now: UnixMs,
        take: impl Fn(&Self, GrantUse) -> Result<T, ReservationRefused> + Send + Sync,
    ) -> Result<T, ReservationRefused> {
        let grant_use =
            if self.counters.share().is_some() { GrantUse::Extensible } else { GrantUse::Current };
        match take(self, grant_use) {
            // Few requests need a larger grant. The box keeps the future of all others small.
            Err(ReservationRefused::Grant { demand, .. }) => {
                Box::pin(self.with_extended_grant(demand, now, take)).await
            }
            result => result,
        }
    }

    /// Requests a larger grant for `demand`, and calls `take` again.
    async fn with_extended_grant<T: Send>(
        &self,
        mut demand: AmountRange,
        now: UnixMs,
        take: impl Fn(&Self, GrantUse) -> Result<T, ReservationRefused> + Send + Sync,
    ) -> Result<T, ReservationRefused> {
        for _ in 0..MAX_EXTENSIONS {
            let (Some(share), Some(quota)) = (self.counters.share(), self.quota()) else { break };
            let grant_use = share.extend_grant(&self.counters, quota, demand, now).await;
            match take(self, grant_use) {
                Err(ReservationRefused::Grant { demand: next_demand, .. }) => demand = next_demand,
                result => return result,
            }
        }
        take(self, GrantUse::Current)
    }

    /// Returns the quota if it is a quota of credits that the request counts against.
    fn credit_quota(&self) -> Option<ClientQuota> {
        self.quota().filter(|quota| quota.unit == QuotaUnit::Credits)
    }

    /// Returns whether the request counts against a credit quota, so that its price should be known before it is
    /// sent.
    pub(super) fn needs_price(&self) -> bool {
        self.credit_quota().is_some()
    }

    fn state(&self) -> MutexGuard<'_, PermitState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the request at admission, when it is unknown whether the provider will serve it.
    pub(super) fn count_at_admission(
        &self,
        now: UnixMs,
        grant_use: GrantUse,
    ) -> Result<(), ReservationRefused> {
        if !self.is_charged || self.billing == Billing::Free {
            return Ok(());
        }
        let request_quota = self.quota().filter(|quota| quota.unit == QuotaUnit::Requests);
        let periods = match request_quota {
            Some(quota) => self.try_add(quota, AmountRange::exactly(1), now, grant_use)?.1,
            None => self.counters.requests.add(&[1; 3], now),
        };
        self.state().request_periods = Some(periods);
        Ok(())
    }

    /// Reserves the request's maximum cost: `total` credits since its start, including earlier reservations.
    /// A single compare-and-swap on the sum of the used and reserved credits ensures that two
    /// requests cannot reserve the same credits.
    ///
    /// # Errors
    ///
    /// Fails when the quota has fewer credits left than the request needs. Earlier reservations are kept.
    pub(super) fn reserve(
        &self,
        total: u64,
        now: UnixMs,
        grant_use: GrantUse,
    ) -> Result<(), ReservationRefused> {
        let mut state = self.state();
        let additional_credits = total.saturating_sub(state.estimated_credits);
        if let Some(quota) = self.credit_quota().filter(|_| additional_credits > 0) {
            let (reserved, periods) =
                self.try_add(quota, AmountRange::exactly(additional_credits), now, grant_use)?;
            self.add_reservation(&mut state, reserved, periods, now);
        }
        state.estimated_credits = state.estimated_credits.max(total);
        Ok(())
    }

    /// Reserves credits for a request of unknown price: `amount`, or the remaining quota if that is less.
    /// At most `max` requests of unknown price may be in progress, so the prices of at most `max` requests can
    /// exceed the quota.
    ///
    /// # Errors
    ///
    /// Fails when the quota is exhausted, or `max` requests of unknown price are in progress.
    pub(super) fn reserve_unpriced(
        &self,
        amount: u64,
        max: u32,
        now: UnixMs,
        grant_use: GrantUse,
    ) -> Result<(), ReservationRefused> {
        let mut state = self.state();
        if let Some(quota) = self.credit_quota() {
            // A second call for the same request does not count it again.
            let is_counted = std::mem::replace(&mut state.is_unpriced, true);
            if !is_counted && self.counters.unpriced_in_progress.fetch_add(1, Ordering::AcqRel) >= max {
                return Err(ReservationRefused::Unpriced { max });
            }
            let (reserved, periods) = self.try_add(quota, AmountRange::up_to(amount), now, grant_use)?;
            self.add_reservation(&mut state, reserved, periods, now);
        }
        state.estimated_credits = amount;
        Ok(())
    }

    /// Adds newly reserved credits. Earlier reservations move to the current periods if one has ended.
    fn add_reservation(
        &self,
        state: &mut PermitState,
        added_credits: u64,
        periods: PeriodNumbers,
        now: UnixMs,
    ) {
        if let Some(former_periods) = state.credit_periods.filter(|former| *former != periods) {
            self.counters.credits.replace(former_periods, state.reserved_credits, 0);
            self.counters.credits.add(&[state.reserved_credits; 3], now);
        }
        state.credit_periods = Some(periods);
        state.reserved_credits += added_credits;
    }

    /// Returns whether a running session may use more credits: some are reserved for it, or left in the quota.
    pub(super) fn may_spend(&self, now: UnixMs) -> bool {
        let Some(quota) = self.credit_quota() else { return true };
        self.state().reserved_credits > 0
            || match self.counters.share() {
                Some(share) => share.may_spend(&self.counters, quota, now),
                None => quota.check(self.counters.credits.used(quota.period, now), now).is_ok(),
            }
    }

    /// Charges an attempt that ended with `outcome`. `price` is its price, or `None` if the price is unknown. Returns
    /// the charge to the quota.
    ///
    /// If the provider served the attempt or may have served it, the rest of the reservation is refunded.
    /// After a refused or unsent attempt, the reservation remains for the next attempt.
    pub(super) fn charge(&self, outcome: ChargeOutcome, price: Option<u64>, now: UnixMs) -> Charge {
        if !self.is_charged {
            return Charge::default();
        }
        let mut state = self.state();
        let uncharged = state.estimated_credits.saturating_sub(state.charged_credits);
        let charged = self.apply_charge(&mut state, charge(self.billing, outcome, price, uncharged), now);
        if matches!(outcome, ChargeOutcome::Served | ChargeOutcome::Unknown) {
            self.refund(&mut state);
        }
        charged
    }

    /// Counts a served session as a request. Its credits are charged while it runs.
    pub(super) fn count_session(&self, now: UnixMs) -> Charge {
        let is_free = !self.is_charged || self.billing == Billing::Free;
        let charge = Charge { requests: u64::from(!is_free), credits: 0 };
        self.apply_charge(&mut self.state(), charge, now)
    }

    /// Charges a running session so that its total since its start is `total` credits.
    pub(super) fn charge_up_to(&self, total: u64, now: UnixMs) -> Charge {
        if !self.is_charged {
            return Charge::default();
        }
        let mut state = self.state();
        let credits = total.saturating_sub(state.charged_credits);
        self.apply_charge(&mut state, Charge { requests: u64::from(credits > 0), credits }, now)
    }

    /// Charges credits, first from the reservation. Counts the request with its first charge.
    fn apply_charge(&self, state: &mut PermitState, charge: Charge, now: UnixMs) -> Charge {
        let Charge { requests, credits } = charge;
        let is_first = requests > 0 && !state.was_charged;
        state.was_charged |= is_first;
        if is_first && state.request_periods.is_none() {
            state.request_periods = Some(self.counters.requests.add(&[1; 3], now));
        }
        if credits > 0 {
            let reserved = state.reserved_credits.min(credits);
            match state.credit_periods {
                Some(periods) => self.counters.credits.replace(periods, reserved, credits),
                None => state.credit_periods = Some(self.counters.credits.add(&[credits; 3], now)),
            }
            state.reserved_credits -= reserved;
            state.charged_credits += credits;
        }
        Charge { requests: u64::from(is_first), credits }
    }

    /// Refunds the reserved amounts that were not charged.
    fn refund(&self, state: &mut PermitState) {
        if let Some(periods) = state.credit_periods.filter(|_| state.reserved_credits > 0) {
            self.counters.credits.replace(periods, state.reserved_credits, 0);
            state.reserved_credits = 0;
        }
        if std::mem::take(&mut state.is_unpriced) {
            self.counters.unpriced_in_progress.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Returns the charge for its correction, if the price becomes known after the request has ended.
    pub(super) fn correctable_charge(&self) -> CorrectableCharge {
        let state = self.state();
        let counters = self.is_charged.then(|| Arc::clone(&self.counters));
        CorrectableCharge { counters, charged_credits: state.charged_credits, periods: state.credit_periods }
    }
}

impl Drop for QuotaPermit {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.state());
        self.refund(&mut state);
        if let Some(periods) = state.request_periods.filter(|_| !state.was_charged) {
            self.counters.requests.replace(periods, 1, 0);
        }
    }
}

/// The charge of an ended request to one quota, which can be corrected when the provider reports the price.
#[derive(Debug)]
pub(super) struct CorrectableCharge {
    /// The counters, or `None` if the quota is not charged.
    counters: Option<Arc<UsageCounters>>,
    charged_credits: u64,
    /// The periods in which the credits are counted, or `None` if no credits were charged.
    periods: Option<PeriodNumbers>,
}

impl CorrectableCharge {
    /// Replaces the charge with the reported price of `credits`. Returns the new charge.
    pub(super) fn replace(self, credits: u64, now: UnixMs) -> u64 {
        let Some(counters) = self.counters else { return 0 };
        match self.periods {
            Some(periods) => counters.credits.replace(periods, self.charged_credits, credits),
            None => drop(counters.credits.add(&[credits; 3], now)),
        }
        credits
    }
}
