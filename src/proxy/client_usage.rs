//! Counters of what each client has used, has reserved and has in progress. They are atomic words,
//! loaded from the usage store at the start and kept when the configuration is reloaded. A request
//! holds its part of them in a [`ClientPermit`].

mod permit;
mod tallies;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::clock;
use crate::policy::charge::Billing;
use crate::policy::client::{Client, ClientName, Clients};
use crate::policy::client_quota::{Measure, Period, QuotaSpent};
use crate::policy::units::UnixMs;
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

/// The counters of one client.
#[derive(Debug, Default)]
pub(super) struct ClientCounters {
    requests: Tallies,
    credits: Tallies,
    /// The time up to which its rate limit is used, see
    /// [`Rate::book`](crate::policy::client_quota::Rate::book).
    booked: AtomicU64,
    under_way: AtomicU32,
    /// The requests in progress whose price is unknown until their response.
    unpriced: AtomicU32,
}

/// What a request needs of its client's limits.
#[derive(Clone, Copy, Debug)]
pub(super) struct LimitRequest {
    /// Whether the provider charges for it; free when the client brings its own key.
    pub(super) billing: Billing,
    /// Whether its response lets the client use the provider without the proxy.
    pub(super) gives_access: bool,
    /// Whether the client's quota is charged; false for a request with the client's own key.
    pub(super) is_charged: bool,
    /// Maximum requests in progress for a client without a limit of its own.
    pub(super) max_concurrent: u32,
}

impl ClientUsage {
    /// Counters of `clients`, starting with the usage from the usage store at `now`.
    #[must_use]
    pub fn new(clients: &Clients, used: &[Used], now: UnixMs) -> Self {
        let mut by_name: HashMap<ClientName, Arc<ClientCounters>> = HashMap::new();
        for Used { client, requests, credits } in used {
            let account = by_name.entry(client.clone()).or_default();
            account.requests.add(requests, now);
            account.credits.add(credits, now);
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
        let account = self.by_name.get(client).cloned().unwrap_or_default();
        let of = |tallies: &Tallies| Period::ALL.map(|period| tallies.used(period, now));
        Used { client: client.clone(), requests: of(&account.requests), credits: of(&account.credits) }
    }

    /// Admits a request if its client's limits allow it. A request that may cost something is
    /// counted here; its credits are reserved when its price is known, see
    /// [`ClientPermit::reserve`].
    pub(super) fn admit(
        &self,
        client: &Client,
        claim: LimitRequest,
        now: UnixMs,
    ) -> Result<ClientPermit, ClientLimitExceeded> {
        let account = self.by_name.get(&client.name).cloned().unwrap_or_default();
        let rules = &client.rules;
        let under_way = account.under_way.fetch_add(1, Ordering::AcqRel);
        let permit = ClientPermit::new(account, rules.allowance, claim);
        let account = permit.account();
        let max = rules.concurrency.unwrap_or(claim.max_concurrent);
        if under_way >= max {
            return Err(ClientLimitExceeded::Concurrency { max });
        }
        if let Some(allowance) = permit.quota() {
            // Only a check: other requests may use up the quota before this one reserves its
            // credits.
            allowance.check(account.tallies(allowance.measure).used(allowance.period, now), now)?;
            if claim.gives_access && !rules.may_take_tokens {
                return Err(ClientLimitExceeded::DirectAccess);
            }
        }
        if let Some(rate) = rules.rate {
            let moment = u64::try_from(clock::since(self.origin).as_nanos()).unwrap_or(u64::MAX);
            let mut wait = Duration::ZERO;
            let book = |booked| rate.book(booked, moment).map_err(|needed| wait = needed).ok();
            if account.booked.fetch_update(Ordering::AcqRel, Ordering::Acquire, book).is_err() {
                return Err(ClientLimitExceeded::Rate { wait });
            }
        }
        permit.count_ahead(now)?;
        Ok(permit)
    }
}

/// Why a client's request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientLimitExceeded {
    /// The client has its maximum of requests in progress.
    #[error("the client has {max} requests under way")]
    Concurrency {
        /// The maximum of requests in progress.
        max: u32,
    },
    /// The client has its maximum of requests of unknown price in progress.
    #[error("the client has {max} requests of unknown price under way")]
    Unpriced {
        /// The maximum of such requests.
        max: u32,
    },
    /// The client has reached its rate limit.
    #[error("the client begins requests too fast")]
    Rate {
        /// The time until its next request is admitted.
        wait: Duration,
    },
    /// The client's quota is used up, or has too little left for this request.
    #[error(transparent)]
    Spent(#[from] QuotaSpent),
    /// The client has a quota, and the response would let it use the provider outside of that
    /// quota.
    #[error("the client has a quota and may not ask for direct access")]
    DirectAccess,
}

impl ClientCounters {
    fn tallies(&self, measure: Measure) -> &Tallies {
        match measure {
            Measure::Requests => &self.requests,
            Measure::Credits => &self.credits,
        }
    }
}

#[cfg(test)]
mod tests;
