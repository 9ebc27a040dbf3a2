//! The data of an admission under a client's limits: the client's counters, the properties of the request,
//! and the limit that the request exceeds.

use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use super::tallies::Tallies;
use crate::policy::charge::Billing;
use crate::policy::client_quota::{QuotaExceeded, QuotaUnit};

/// The counters of one client.
#[derive(Debug, Default)]
pub(in crate::proxy) struct ClientCounters {
    pub(super) requests: Tallies,
    pub(super) credits: Tallies,
    /// The time up to which the rate limit is used; see
    /// [`RateLimit`](crate::policy::client_quota::RateLimit).
    pub(super) rate_used_until: AtomicU64,
    pub(super) in_progress: AtomicU32,
    /// The requests in progress whose price is unknown until their response.
    pub(super) unpriced_in_progress: AtomicU32,
}

/// The properties of a request on which its client's limits depend.
#[derive(Clone, Copy, Debug)]
pub(in crate::proxy) struct AdmissionRequest {
    /// How the provider bills the request.
    pub(in crate::proxy) billing: Billing,
    /// Whether the response lets the client use the provider without the proxy.
    pub(in crate::proxy) grants_direct_access: bool,
    /// Whether the client's quota is charged; false for a request with the client's own key.
    pub(in crate::proxy) is_charged: bool,
    /// Maximum number of requests in progress of a client without a configured limit.
    pub(in crate::proxy) max_concurrent: u32,
}

/// The limit of a client that its request exceeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientLimitExceeded {
    /// The client has its maximum number of requests in progress.
    #[error("the client has {max} requests in progress")]
    Concurrency {
        /// Maximum number of requests in progress.
        max: u32,
    },
    /// The client has its maximum number of requests of unknown price in progress.
    #[error("the client has {max} requests of unknown price in progress")]
    Unpriced {
        /// Maximum number of requests of unknown price in progress.
        max: u32,
    },
    /// The client has reached its rate limit.
    #[error("the client has reached its rate limit")]
    Rate {
        /// The time until its next request is admitted.
        wait: Duration,
    },
    /// The client's quota is used up, or is insufficient for this request.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// The client has a quota, and the response would let it use the provider outside of that
    /// quota.
    #[error("the client has a quota and may not request direct access")]
    DirectAccess,
}

impl ClientCounters {
    pub(super) fn tallies(&self, unit: QuotaUnit) -> &Tallies {
        match unit {
            QuotaUnit::Requests => &self.requests,
            QuotaUnit::Credits => &self.credits,
        }
    }
}
