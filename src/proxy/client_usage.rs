//! Enforces the limits of clients: rate limit, concurrent requests and quota.
//!
//! The counters of a client are atomic integers. They are loaded from the usage store at the start, and
//! survive a reload of the configuration. Each admitted request holds its share of them as a
//! [`ClientPermit`].

mod counters;
mod permit;
mod tallies;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::clock;
use crate::policy::client::{Client, ClientName, Clients};
use crate::policy::client_quota::Period;
use crate::policy::units::UnixMs;
pub use counters::ClientLimitExceeded;
pub(super) use counters::{AdmissionRequest, ClientCounters};
pub(super) use permit::{ClientPermit, LatePrice};
use tallies::Tallies;

/// A client's usage in the current periods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageTotals {
    /// The configured name.
    pub client: ClientName,
    /// Requests counted by [`charge`](crate::policy::charge::charge), in the order of [`Period::ALL`].
    pub requests: [u64; 3],
    /// Charged credits, in the order of [`Period::ALL`].
    pub credits: [u64; 3],
}

/// The counters of all clients. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ClientUsage {
    by_name: Arc<HashMap<ClientName, Arc<ClientCounters>>>,
    /// Rate limits measure time since this instant.
    clock_origin: Instant,
}

impl ClientUsage {
    /// Creates the counters of `clients`, starting with the usage from the usage store at `now`.
    #[must_use]
    pub fn new(clients: &Clients, used: &[UsageTotals], now: UnixMs) -> Self {
        let mut by_name: HashMap<ClientName, Arc<ClientCounters>> = HashMap::new();
        for UsageTotals { client, requests, credits } in used {
            let counters = by_name.entry(client.clone()).or_default();
            counters.requests.add(requests, now);
            counters.credits.add(credits, now);
        }
        Self { by_name: Arc::new(by_name), clock_origin: clock::instant() }.with_clients(clients)
    }

    /// Returns the counters after a reload with `clients`. Existing counters are kept, even those of removed
    /// clients, because a later reload may add a client again.
    #[must_use]
    pub fn with_clients(&self, clients: &Clients) -> Self {
        let mut by_name = (*self.by_name).clone();
        for name in clients.names() {
            by_name.entry(name.clone()).or_default();
        }
        Self { by_name: Arc::new(by_name), clock_origin: self.clock_origin }
    }

    /// Returns the usage of a client at `now`, including the reservations of its requests in progress.
    #[must_use]
    pub fn used(&self, client: &ClientName, now: UnixMs) -> UsageTotals {
        let counters = self.by_name.get(client).cloned().unwrap_or_default();
        let totals = |tallies: &Tallies| Period::ALL.map(|period| tallies.used(period, now));
        UsageTotals {
            client: client.clone(),
            requests: totals(&counters.requests),
            credits: totals(&counters.credits),
        }
    }

    /// Admits a request if its client's limits allow it. A request that is not free is counted here. Its
    /// credits are reserved later, when its price is known; see [`ClientPermit::reserve`].
    pub(super) fn admit(
        &self,
        client: &Client,
        admission: AdmissionRequest,
        now: UnixMs,
    ) -> Result<ClientPermit, ClientLimitExceeded> {
        let counters = self.by_name.get(&client.name).cloned().unwrap_or_default();
        let rules = &client.rules;
        let in_progress = counters.in_progress.fetch_add(1, Ordering::AcqRel);
        let permit = ClientPermit::new(counters, rules.quota, admission);
        let counters = &permit.counters;
        let max = rules.max_concurrent.unwrap_or(admission.max_concurrent);
        if in_progress >= max {
            return Err(ClientLimitExceeded::Concurrency { max });
        }
        if let Some(quota) = permit.quota() {
            // Other requests may use up the quota before this request reserves its credits.
            quota.check(counters.tallies(quota.unit).used(quota.period, now), now)?;
            if admission.grants_direct_access && !rules.may_request_tokens {
                return Err(ClientLimitExceeded::DirectAccess);
            }
        }
        if let Some(rate) = rules.rate_limit {
            let elapsed_ns =
                u64::try_from(clock::elapsed_since(self.clock_origin).as_nanos()).unwrap_or(u64::MAX);
            let mut wait = Duration::ZERO;
            let admit =
                |used_until| rate.admit(used_until, elapsed_ns).map_err(|required| wait = required).ok();
            if counters.rate_used_until.fetch_update(Ordering::AcqRel, Ordering::Acquire, admit).is_err() {
                return Err(ClientLimitExceeded::Rate { wait });
            }
        }
        permit.count_at_admission(now)?;
        Ok(permit)
    }
}

#[cfg(test)]
mod tests;
