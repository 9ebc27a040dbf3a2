//! The counters of one client, what a request needs of them, and why they refuse it.

use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use super::tallies::Tallies;
use crate::policy::charge::Billing;
use crate::policy::client_quota::{Measure, QuotaSpent};

/// The counters of one client.
#[derive(Debug, Default)]
pub(in crate::proxy) struct ClientCounters {
    pub(super) requests: Tallies,
    pub(super) credits: Tallies,
    /// The time up to which its rate limit is used, see
    /// [`Rate::book`](crate::policy::client_quota::Rate::book).
    pub(super) rate_used_until: AtomicU64,
    pub(super) in_progress: AtomicU32,
    /// The requests in progress whose price is unknown until their response.
    pub(super) unpriced: AtomicU32,
}

/// What a request needs of its client's limits.
#[derive(Clone, Copy, Debug)]
pub(in crate::proxy) struct LimitRequest {
    /// Whether the provider charges for it; free when the client brings its own key.
    pub(in crate::proxy) billing: Billing,
    /// Whether its response lets the client use the provider without the proxy.
    pub(in crate::proxy) gives_access: bool,
    /// Whether the client's quota is charged; false for a request with the client's own key.
    pub(in crate::proxy) is_charged: bool,
    /// Maximum requests in progress for a client without a limit of its own.
    pub(in crate::proxy) max_concurrent: u32,
}

/// Why a client's request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientLimitExceeded {
    /// The client has its maximum of requests in progress.
    #[error("the client has {max} requests in progress")]
    Concurrency {
        /// The maximum of requests in progress.
        max: u32,
    },
    /// The client has its maximum of requests of unknown price in progress.
    #[error("the client has {max} requests of unknown price in progress")]
    Unpriced {
        /// The maximum of such requests.
        max: u32,
    },
    /// The client has reached its rate limit.
    #[error("the client has reached its rate limit")]
    Rate {
        /// The time until its next request is admitted.
        wait: Duration,
    },
    /// The client's quota is used up, or has too little left for this request.
    #[error(transparent)]
    Spent(#[from] QuotaSpent),
    /// The client has a quota, and the response would let it use the provider outside of that
    /// quota.
    #[error("the client has a quota and may not request direct access")]
    DirectAccess,
}

impl ClientCounters {
    pub(super) fn tallies(&self, measure: Measure) -> &Tallies {
        match measure {
            Measure::Requests => &self.requests,
            Measure::Credits => &self.credits,
        }
    }
}
