//! What each client has used, has reserved and has under way, in atomic words: taken up from the books at the
//! start, and kept when the configuration is reloaded. A request holds its part of them in a [`ClientPermit`].

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

/// What a client has used in the present periods, as the books have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// Who.
    pub client: ClientName,
    /// Requests that counted, see [`charge`](crate::policy::charge::charge): in each of [`Period::ALL`].
    pub requests: [u64; 3],
    /// Credits, in the same order.
    pub credits: [u64; 3],
}

/// All clients' accounts. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ClientUsage {
    by_name: Arc<HashMap<ClientName, Arc<ClientCounters>>>,
    /// From when the rates count their time.
    origin: Instant,
}

/// One client's account.
#[derive(Debug, Default)]
pub(super) struct ClientCounters {
    requests: Tallies,
    credits: Tallies,
    /// Until when its requests are booked, see [`Rate::book`](crate::policy::client_quota::Rate::book).
    booked: AtomicU64,
    under_way: AtomicU32,
    /// The requests among them whose price is unknown until their response.
    unpriced: AtomicU32,
}

/// What a request asks of its client's limits.
#[derive(Clone, Copy, Debug)]
pub(super) struct LimitRequest {
    /// What is known of its price; free when the client brings its own key.
    pub(super) billing: Billing,
    /// Whether its answer lets the client use the provider without the proxy.
    pub(super) gives_access: bool,
    /// Whether the client's account is charged: it is not for a key of its own.
    pub(super) is_charged: bool,
    /// The maximum of requests under way of a client without a limit of its own.
    pub(super) max_concurrent: u32,
}

impl ClientUsage {
    /// The accounts of `clients`, with what the books say was used at `now`.
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

    /// The accounts of other clients. Those that were there stay as they are, also when their client
    /// is gone: it may come back.
    #[must_use]
    pub fn following(&self, clients: &Clients) -> Self {
        let mut by_name = (*self.by_name).clone();
        for name in clients.names() {
            by_name.entry(name.clone()).or_default();
        }
        Self { by_name: Arc::new(by_name), origin: self.origin }
    }

    /// What a client has used at `now`, with what its requests under way have reserved.
    #[must_use]
    pub fn used(&self, client: &ClientName, now: UnixMs) -> Used {
        let account = self.by_name.get(client).cloned().unwrap_or_default();
        let of = |tallies: &Tallies| Period::ALL.map(|period| tallies.used(period, now));
        Used { client: client.clone(), requests: of(&account.requests), credits: of(&account.credits) }
    }

    /// Lets a request in, if its client's limits leave room for it. A request that may cost something is
    /// counted here; its credits are reserved when its price is known, see [`ClientPermit::reserve`].
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
            // What is left may be taken by others before it is reserved; this one costs them nothing.
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

/// Why a client's request is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientLimitExceeded {
    /// It has as many under way as it may have.
    #[error("the client has {max} requests under way")]
    Concurrency {
        /// How many.
        max: u32,
    },
    /// It has as many under way as it may have of those whose price is not known before.
    #[error("the client has {max} requests of unknown price under way")]
    Unpriced {
        /// How many.
        max: u32,
    },
    /// It has begun as many as it may, and may begin another after this time.
    #[error("the client begins requests too fast")]
    Rate {
        /// How long.
        wait: Duration,
    },
    /// It has used what it may, or too much of it for this request.
    #[error(transparent)]
    Spent(#[from] QuotaSpent),
    /// It has a quota, and the answer would let it use the provider past that.
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
