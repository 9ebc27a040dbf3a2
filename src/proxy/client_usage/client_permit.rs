//! Admits a request under its client's limits, and charges it. A [`ClientPermit`] counts as a concurrent request, and
//! against the quotas of the client and of the end user. Both quotas are charged the same amounts.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::counters::{AdmissionRequest, ClientCounters, ClientLimitExceeded, QuotaOwner};
use super::grant::GrantUse;
use super::permit::{CorrectableCharge, QuotaPermit, ReservationRefused};
use super::users::RequestUser;
use crate::policy::charge::{Billing, Charge, ChargeOutcome};
use crate::policy::client_quota::{ClientQuota, QuotaExceeded};
use crate::policy::units::UnixMs;

/// The permit of a client's request in progress.
///
/// Dropping the permit ends the request for the concurrency limit, and refunds the reserved amounts that were
/// not charged.
#[derive(Debug)]
pub struct ClientPermit {
    counters: Arc<ClientCounters>,
    client: QuotaPermit,
    /// The user's permit, if the client has a quota per user and the request names its user.
    user: Option<QuotaPermit>,
}

impl ClientPermit {
    /// Creates the permit of a request that was added to the client's requests in progress.
    pub(super) fn new(
        counters: Arc<ClientCounters>,
        quota: Option<ClientQuota>,
        admission: AdmissionRequest,
    ) -> Self {
        let client = QuotaPermit::new(Arc::clone(&counters.usage), quota, admission);
        Self { counters, client, user: None }
    }

    /// Calls `take`, which takes an amount from the client's quota by the permit that it receives. If other replicas
    /// share the quota and the grant of this replica is insufficient, requests a larger grant from them, and calls
    /// `take` again.
    pub(super) async fn take_from_client(
        &self,
        now: UnixMs,
        take: impl Fn(&QuotaPermit, GrantUse) -> Result<(), ReservationRefused> + Send + Sync,
    ) -> Result<(), ClientLimitExceeded> {
        let take_result = self.client.with_grant(now, take).await;
        take_result.map_err(|refused| limit_exceeded(refused, QuotaOwner::Client))
    }

    /// Admits the request under the quota of its user. A request that may cost credits is counted here. If other
    /// replicas share the quota and the grant of this replica is insufficient, requests a larger grant from them.
    ///
    /// # Errors
    ///
    /// Fails when the user's quota is exhausted.
    pub(in crate::proxy) async fn admit_user(
        &mut self,
        user: &RequestUser,
        quota: ClientQuota,
        admission: AdmissionRequest,
        now: UnixMs,
    ) -> Result<(), ClientLimitExceeded> {
        let Some(counters) = user.counters() else { return Ok(()) };
        let permit = QuotaPermit::new(Arc::clone(counters), Some(quota), admission);
        let exceeded = |refused| limit_exceeded(refused, QuotaOwner::User);
        permit
            .with_grant(now, |permit, grant_use| permit.check_not_exhausted(now, grant_use))
            .await
            .map_err(exceeded)?;
        let count = permit.with_grant(now, |permit, grant_use| permit.count_at_admission(now, grant_use));
        count.await.map_err(exceeded)?;
        self.user = Some(permit);
        Ok(())
    }

    /// Returns how the provider bills the request.
    pub(in crate::proxy) fn billing(&self) -> Billing {
        self.client.billing
    }

    /// Returns whether the request counts against a credit quota, so that its price should be known before it is
    /// sent.
    pub(in crate::proxy) fn needs_price(&self) -> bool {
        self.client.needs_price() || self.user.as_ref().is_some_and(QuotaPermit::needs_price)
    }

    /// Reserves the request's maximum cost: `total` credits since its start, including earlier reservations. If other
    /// replicas share the quota and the grant of this replica is insufficient, requests a larger grant from them.
    ///
    /// # Errors
    ///
    /// Fails when a quota has fewer credits left than the request needs. Earlier reservations are kept.
    pub async fn reserve(&self, total: u64, now: UnixMs) -> Result<(), ClientLimitExceeded> {
        for (permit, owner) in self.quotas() {
            let reserved =
                permit.with_grant(now, |permit, grant_use| permit.reserve(total, now, grant_use)).await;
            reserved.map_err(|refused| limit_exceeded(refused, owner))?;
        }
        Ok(())
    }

    /// Reserves credits for a request of unknown price, like [`reserve`](Self::reserve). See
    /// `QuotaPermit::reserve_unpriced`.
    ///
    /// # Errors
    ///
    /// Fails when a quota is exhausted, or `max_unpriced` requests of unknown price are in progress.
    pub(in crate::proxy) async fn reserve_unpriced(
        &self,
        amount: u64,
        max_unpriced: u32,
        now: UnixMs,
    ) -> Result<(), ClientLimitExceeded> {
        for (permit, owner) in self.quotas() {
            let reserved = permit
                .with_grant(now, |permit, grant_use| {
                    permit.reserve_unpriced(amount, max_unpriced, now, grant_use)
                })
                .await;
            reserved.map_err(|refused| limit_exceeded(refused, owner))?;
        }
        Ok(())
    }

    /// Returns the permit for each quota.
    fn quotas(&self) -> impl Iterator<Item = (&QuotaPermit, QuotaOwner)> {
        let user = self.user.iter().map(|user| (user, QuotaOwner::User));
        std::iter::once((&self.client, QuotaOwner::Client)).chain(user)
    }

    /// Returns the owner of the quota that does not let a running session use more credits. A session may use more
    /// credits if some are reserved for the session or left in the quota.
    pub(in crate::proxy) fn exhausted_quota(&self, now: UnixMs) -> Option<QuotaOwner> {
        if !self.client.may_spend(now) {
            return Some(QuotaOwner::Client);
        }
        self.user.as_ref().filter(|user| !user.may_spend(now)).map(|_| QuotaOwner::User)
    }

    /// Charges an attempt. See `QuotaPermit::charge`. Returns the charge to each quota.
    pub fn charge(&self, outcome: ChargeOutcome, price: Option<u64>, now: UnixMs) -> Charge {
        self.charge_quotas(|permit| permit.charge(outcome, price, now))
    }

    /// Counts a served session as a request. Its credits are charged while it runs.
    pub(in crate::proxy) fn count_session(&self, now: UnixMs) -> Charge {
        self.charge_quotas(|permit| permit.count_session(now))
    }

    /// Charges a running session so that its total since its start is `total` credits.
    pub(in crate::proxy) fn charge_up_to(&self, total: u64, now: UnixMs) -> Charge {
        self.charge_quotas(|permit| permit.charge_up_to(total, now))
    }

    /// Calls `charge` for the quotas of the client and the user. Both permits have the same reservations, so both
    /// charges are equal.
    fn charge_quotas(&self, charge: impl Fn(&QuotaPermit) -> Charge) -> Charge {
        if let Some(user) = &self.user {
            charge(user);
        }
        charge(&self.client)
    }

    /// Returns the charges for their correction, if the price becomes known after the request has ended.
    pub(in crate::proxy) fn correctable_charges(&self) -> CorrectableCharges {
        CorrectableCharges {
            client: self.client.correctable_charge(),
            user: self.user.as_ref().map(QuotaPermit::correctable_charge),
        }
    }
}

impl Drop for ClientPermit {
    fn drop(&mut self) {
        self.counters.in_progress.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Returns the limit that a refused reservation exceeds.
fn limit_exceeded(refused: ReservationRefused, owner: QuotaOwner) -> ClientLimitExceeded {
    let quota_exceeded = |exceeded: QuotaExceeded| match owner {
        QuotaOwner::Client => ClientLimitExceeded::Quota(exceeded),
        QuotaOwner::User => ClientLimitExceeded::UserQuota(exceeded),
    };
    match (refused, owner) {
        (ReservationRefused::Quota(exceeded) | ReservationRefused::Grant { exceeded, .. }, _) => {
            quota_exceeded(exceeded)
        }
        (ReservationRefused::Unpriced { max }, QuotaOwner::Client) => ClientLimitExceeded::Unpriced { max },
        (ReservationRefused::Unpriced { max }, QuotaOwner::User) => ClientLimitExceeded::UserUnpriced { max },
    }
}

/// The charges of an ended request to the quotas of its client and its user, which can be corrected when the provider
/// reports the price.
#[derive(Debug)]
pub(in crate::proxy) struct CorrectableCharges {
    client: CorrectableCharge,
    user: Option<CorrectableCharge>,
}

impl CorrectableCharges {
    /// Replaces the charges with the reported price of `credits`. Returns the new charge.
    pub(in crate::proxy) fn replace(self, credits: u64, now: UnixMs) -> u64 {
        if let Some(user) = self.user {
            user.replace(credits, now);
        }
        self.client.replace(credits, now)
    }
}
