//! Counters of what each client has used, has reserved and has in progress. They are atomic words,
//! loaded from the usage store at the start and kept when the configuration is reloaded. A request
//! holds its part of them in a [`ClientPermit`].

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
pub(super) use counters::{ClientCounters, LimitRequest};
pub(super) use permit::{ClientPermit, LatePrice};
use tallies::Tallies;

/// A client's usage in the current periods, as the usage store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// The client's configured name.
    pub client: ClientName,
    /// Requests that counted, see [`charge`](crate::policy::charge::charge): in each of [`Period::ALL`].
    pub requests: [u64; 3],
    /// Credits, in the same order.
    pub credits: [u64; 3],
}

/// The counters of all clients. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ClientUsage {
    by_name: Arc<HashMap<ClientName, Arc<ClientCounters>>>,
    /// The origin of the rate limits' clock.
    origin: Instant,
}

impl ClientUsage {
    /// Counters of `clients`, starting with the usage from the usage store at `now`.
    #[must_use]
    pub fn new(clients: &Clients, used: &[Used], now: UnixMs) -> Self {
        let mut by_name: HashMap<ClientName, Arc<ClientCounters>> = HashMap::new();
        for Used { client, requests, credits } in used {
            let counters = by_name.entry(client.clone()).or_default();
            counters.requests.add(requests, now);
            counters.credits.add(credits, now);
        }
        Self { by_name: Arc::new(by_name), origin: clock::instant() }.following(clients)
    }

    /// Counters for other clients after a reload. Existing counters are kept, also for removed
    /// clients, which a later reload may add again.
    #[must_use]
    pub fn following(&self, clients: &Clients) -> Self {
        let mut by_name = (*self.by_name).clone();
        for name in clients.names() {
            by_name.entry(name.clone()).or_default();
        }
        Self { by_name: Arc::new(by_name), origin: self.origin }
    }

    /// The usage of a client at `now`, including what its requests in progress have reserved.
    #[must_use]
    pub fn used(&self, client: &ClientName, now: UnixMs) -> Used {
        let counters = self.by_name.get(client).cloned().unwrap_or_default();
        let of = |tallies: &Tallies| Period::ALL.map(|period| tallies.used(period, now));
        Used { client: client.clone(), requests: of(&counters.requests), credits: of(&counters.credits) }
    }

    /// Admits a request if its client's limits allow it. A request that may cost something is
    /// counted here; its credits are reserved when its price is known, see
    /// [`ClientPermit::reserve`].
    pub(super) fn admit(
        &self,
        client: &Client,
        limit_request: LimitRequest,
        now: UnixMs,
    ) -> Result<ClientPermit, ClientLimitExceeded> {
        let counters = self.by_name.get(&client.name).cloned().unwrap_or_default();
        let rules = &client.rules;
        let in_progress = counters.in_progress.fetch_add(1, Ordering::AcqRel);
        let permit = ClientPermit::new(counters, rules.quota, limit_request);
        let counters = permit.counters();
        let max = rules.concurrency.unwrap_or(limit_request.max_concurrent);
        if in_progress >= max {
            return Err(ClientLimitExceeded::Concurrency { max });
        }
        if let Some(quota) = permit.quota() {
            // Only a check: other requests may use up the quota before this one reserves its
            // credits.
            quota.check(counters.tallies(quota.measure).used(quota.period, now), now)?;
            if limit_request.gives_access && !rules.may_take_tokens {
                return Err(ClientLimitExceeded::DirectAccess);
            }
        }
        if let Some(rate) = rules.rate {
            let elapsed_ns = u64::try_from(clock::since(self.origin).as_nanos()).unwrap_or(u64::MAX);
            let mut wait = Duration::ZERO;
            let admit = |used_until| rate.admit(used_until, elapsed_ns).map_err(|needed| wait = needed).ok();
            if counters.rate_used_until.fetch_update(Ordering::AcqRel, Ordering::Acquire, admit).is_err() {
                return Err(ClientLimitExceeded::Rate { wait });
            }
        }
        permit.count_ahead(now)?;
        Ok(permit)
    }
}

#[cfg(test)]
mod tests;
