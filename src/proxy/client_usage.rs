//! Enforces the limits of clients: rate limit, concurrent requests, quota, and the quota of each end user. A client
//! with a quota may not request direct access to the provider unless its configuration allows it. Reports the usage of
//! clients and users.
//!
//! The counters of a client are atomic integers. They are loaded from the usage store at startup, and survive a
//! reload of the configuration. The counters of a user are loaded with the first request of the user. Each admitted
//! request holds a [`ClientPermit`], which counts it in the counters of its client and its user.

mod client_permit;
mod counters;
mod period_counters;
mod permit;
mod users;

// Limits that several replicas share.
mod client_share;
mod grant;
mod quota_share;
mod replicas;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::clock;
use crate::policy::client::{Client, ClientName, Clients};
use crate::policy::client_quota::{Period, QuotaUnit};
use crate::policy::units::UnixMs;
use crate::secret::UserFingerprint;
pub use client_permit::ClientPermit;
pub(super) use client_permit::CorrectableCharges;
pub use client_share::{ClientActivity, ClientShare};
pub(super) use counters::QuotaOwner;
pub use counters::{AdmissionRequest, ClientLimitExceeded};
use counters::{ClientCounters, UsageCounters};
use period_counters::PeriodCounters;
use permit::QuotaPermit;
use replicas::SharedUsage;
pub use replicas::StatementScope;
pub use users::{NoStoredUsage, RequestUser, UserUsageFuture, UserUsageReader, UserUsageUnavailable};

/// The usage of a client, or of one of its users, in the current periods. The totals that [`ClientUsage`] returns may
/// include the reservations of requests in progress and the usage at other replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageTotals {
    /// The configured name of the client.
    pub client: ClientName,
    /// Requests as [`charge`](crate::policy::charge::charge) counts them, in the order of [`Period::ALL`].
    pub requests: [u64; 3],
    /// Credits, in the order of [`Period::ALL`].
    pub credits: [u64; 3],
}

/// The counters of all clients. Clones share them.
#[derive(Clone, Debug)]
pub struct ClientUsage {
    by_name: Arc<HashMap<ClientName, Arc<ClientCounters>>>,
    /// Reads the stored usage of users.
    user_reader: Arc<dyn UserUsageReader>,
    /// Rate limits measure time since this instant.
    clock_origin: Instant,
    /// The link to the other replicas that share the client limits, if there are any.
    shared: Option<SharedUsage>,
}

impl ClientUsage {
    /// Creates the counters of `clients`, starting with the usage from the usage store at `now`. The usage of
    /// users is read with `user_reader` when it is needed.
    #[must_use]
    pub fn new(
        clients: &Clients,
        stored_usage: &[UsageTotals],
        user_reader: Arc<dyn UserUsageReader>,
        now: UnixMs,
    ) -> Self {
        let mut by_name: HashMap<ClientName, Arc<ClientCounters>> = HashMap::new();
        for UsageTotals { client, requests, credits } in stored_usage {
            let usage = &by_name.entry(client.clone()).or_default().usage;
            usage.requests.add(requests, now);
            usage.credits.add(credits, now);
        }
        let (by_name, clock_origin) = (Arc::new(by_name), clock::instant());
        Self { by_name, user_reader, clock_origin, shared: None }.with_clients(clients)
    }

    /// Returns the counters after a reload with `clients`. Existing counters are kept, even for removed
    /// clients, because a later reload may add a client again. The users of clients without a quota per user are
    /// removed, because their requests are not counted in memory.
    #[must_use]
    pub fn with_clients(&self, clients: &Clients) -> Self {
        let mut by_name = (*self.by_name).clone();
        for name in clients.names() {
            by_name.entry(name.clone()).or_default();
        }
        let configured = clients.with_token().map(|configured| &configured.client);
        for client in configured.filter(|client| client.rules.user_quota.is_none()) {
            by_name.entry(client.name.clone()).or_default().users().clear();
        }
        let usage = Self { by_name: Arc::new(by_name), ..self.clone() };
        usage.configure_shares(clients, clock::now());
        usage
    }

    /// Returns the usage of a client at `now`, including the reservations of its requests in progress. In the unit
    /// and the period of its quota, it includes the usage at other replicas.
    #[must_use]
    pub fn totals(&self, client: &ClientName, now: UnixMs) -> UsageTotals {
        let counters = self.by_name.get(client).cloned().unwrap_or_default();
        usage_totals(client, &counters.usage, now)
    }

    /// Returns the usage of a user at `now`. If the client has a quota per user, the usage includes the reservations of
    /// requests in progress and the usage at other replicas. The user then stays in memory as after a request.
    ///
    /// # Errors
    ///
    /// Fails when the stored usage cannot be read in time.
    pub async fn user_totals(
        &self,
        client: &Client,
        user: UserFingerprint,
        max_cached_users: usize,
        now: UnixMs,
    ) -> Result<UsageTotals, UserUsageUnavailable> {
        if client.rules.user_quota.is_none() {
            return self.user_reader.read_user_usage(&client.name, user, now).await;
        }
        let user = self.load_user(&client.name, user, max_cached_users, now).await?;
        let counters = user.counters().ok_or(UserUsageUnavailable)?;
        self.refresh_user(client, counters, now).await;
        Ok(usage_totals(&client.name, counters, now))
    }

    /// Returns the user of a request with its counters, which are read from the usage store if they are not in
    /// memory. At most `max_cached_users` idle users of a client stay in memory.
    ///
    /// # Errors
    ///
    /// Fails when the stored usage cannot be read in time.
    pub(super) async fn load_user(
        &self,
        client: &ClientName,
        user: UserFingerprint,
        max_cached_users: usize,
        now: UnixMs,
    ) -> Result<RequestUser, UserUsageUnavailable> {
        let counters = self.by_name.get(client).cloned().unwrap_or_default();
        let loaded = users::load(client, &counters, user, max_cached_users, &*self.user_reader, now).await?;
        if let (Some(shared), Some(counters)) = (&self.shared, loaded.counters()) {
            shared.share(counters, client, Some(user));
        }
        Ok(loaded)
    }

    /// Admits a request if its client's limits allow it. A request that may cost credits is counted here. Its
    /// credits are reserved later by [`ClientPermit::reserve`], when its price is known. If other replicas share the
    /// quota and the grant of this replica is insufficient, requests a larger grant from them.
    ///
    /// # Errors
    ///
    /// Fails when a limit of the client does not allow the request.
    pub async fn admit(
        &self,
        client: &Client,
        admission: AdmissionRequest,
        now: UnixMs,
    ) -> Result<ClientPermit, ClientLimitExceeded> {
        let (permit, counters) = self.count_in_progress(client, admission)?;
        if let Some(shared) = &self.shared
            && client.rules.quota.is_some()
        {
            shared.share(&counters.usage, &client.name, None);
        }
        permit.take_from_client(now, |quota, grant_use| quota.check_not_exhausted(now, grant_use)).await?;
        self.check_access_and_rate(client, &counters, admission)?;
        let count = |quota: &QuotaPermit, grant_use| quota.count_at_admission(now, grant_use);
        permit.take_from_client(now, count).await?;
        Ok(permit)
    }

    /// Counts a request in progress, if the client may have another request in progress.
    fn count_in_progress(
        &self,
        client: &Client,
        admission: AdmissionRequest,
    ) -> Result<(ClientPermit, Arc<ClientCounters>), ClientLimitExceeded> {
        let counters = self.by_name.get(&client.name).cloned().unwrap_or_default();
        let rules = &client.rules;
        let in_progress = counters.in_progress.fetch_add(1, Ordering::AcqRel);
        let permit = ClientPermit::new(Arc::clone(&counters), rules.quota, admission);
        let max = rules.max_concurrent.unwrap_or(admission.max_concurrent);
        let mut max_here = max;
        if let Some(shared) =
            self.shared.as_ref().filter(|_| rules.max_concurrent.is_some() || rules.rate_limit.is_some())
        {
            if rules.max_concurrent.is_some() {
                max_here = counters.share.max_concurrent(max, shared.link.replicas());
            }
            let is_refused = in_progress >= max_here;
            counters.share.record(in_progress + 1, is_refused, rules.max_concurrent, self.elapsed_ns());
        }
        if in_progress >= max_here {
            return Err(ClientLimitExceeded::Concurrency { max });
        }
        Ok((permit, counters))
    }

    /// Checks that the client may request direct access, and counts the request against the client's rate limit.
    fn check_access_and_rate(
        &self,
        client: &Client,
        counters: &ClientCounters,
        admission: AdmissionRequest,
    ) -> Result<(), ClientLimitExceeded> {
        let rules = &client.rules;
        if admission.grants_direct_access
            && admission.counts_against_quotas()
            && (rules.quota.is_some() || rules.user_quota.is_some())
            && !rules.may_request_tokens
        {
            return Err(ClientLimitExceeded::DirectAccess);
        }
        let Some(rate) = rules.rate_limit else { return Ok(()) };
        let rate = if self.shared.is_some() { counters.share.divide(rate) } else { rate };
        let elapsed_ns = self.elapsed_ns();
        let mut wait = Duration::ZERO;
        let admit = |used_until| rate.admit(used_until, elapsed_ns).map_err(|required| wait = required).ok();
        match counters.rate_used_until.fetch_update(Ordering::AcqRel, Ordering::Acquire, admit) {
            Ok(_) => Ok(()),
            Err(_) => Err(ClientLimitExceeded::Rate { wait }),
        }
    }

    /// Returns the time since the origin of the clock of rate limits, in nanoseconds.
    fn elapsed_ns(&self) -> u64 {
        u64::try_from(clock::elapsed_since(self.clock_origin).as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Returns the amounts of `counters` in the periods that contain `now`, including the usage at other replicas.
fn usage_totals(client: &ClientName, counters: &UsageCounters, now: UnixMs) -> UsageTotals {
    let totals =
        |period_counters: &PeriodCounters| Period::ALL.map(|period| period_counters.used(period, now));
    let (mut requests, mut credits) = (totals(&counters.requests), totals(&counters.credits));
    if let Some((quota, used_by_others)) = counters.share().and_then(|share| share.used_by_others(now)) {
        let amounts = match quota.unit {
            QuotaUnit::Requests => &mut requests,
            QuotaUnit::Credits => &mut credits,
        };
        let total = &mut amounts[period_counters::period_index(quota.period)];
        *total = total.saturating_add(used_by_others);
    }
    UsageTotals { client: client.clone(), requests, credits }
}

#[cfg(test)]
mod tests;
