//! Defines the data for the admission of a request: the counters of its client and of the client's users, the
//! properties of the request, and the limit that the request exceeds.

use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::client_share::ClientShareCell;
use super::period_counters::PeriodCounters;
use super::quota_share::QuotaShare;
use super::users::UserTable;
use crate::policy::charge::Billing;
use crate::policy::client_quota::{QuotaExceeded, QuotaUnit};

/// The used and reserved amounts that a quota limits, of a client or of one of its users.
#[derive(Debug, Default)]
pub(in crate::proxy) struct UsageCounters {
    pub(super) requests: PeriodCounters,
    pub(super) credits: PeriodCounters,
    /// The number of requests in progress whose price is unknown until their response.
    pub(super) unpriced_in_progress: AtomicU32,
    /// The share in the quota, if other replicas use the quota too.
    share: OnceLock<Box<QuotaShare>>,
}

/// The counters of one client.
#[derive(Debug, Default)]
pub(in crate::proxy) struct ClientCounters {
    pub(super) usage: Arc<UsageCounters>,
    /// The time up to which the rate limit is used. See [`RateLimit`](crate::policy::client_quota::RateLimit).
    pub(super) rate_used_until: AtomicU64,
    /// The number of requests in progress.
    pub(super) in_progress: AtomicU32,
    /// The share in the rate limit and the concurrent requests, and the activity that determines it.
    pub(super) share: ClientShareCell,
    /// The users whose usage is in memory, if the client has a quota per user.
    users: Mutex<UserTable>,
}

/// The properties of a request on which its client's limits depend.
#[derive(Clone, Copy, Debug)]
pub struct AdmissionRequest {
    /// The provider's billing of the request.
    pub billing: Billing,
    /// Whether the response lets the client use the provider without the proxy.
    pub grants_direct_access: bool,
    /// Whether the client's quota is charged, which is false for a request with the client's own key.
    pub is_charged: bool,
    /// Maximum number of requests in progress of a client without a configured limit.
    pub max_concurrent: u32,
}

impl AdmissionRequest {
    /// Returns whether the request counts against quotas, unlike a request that costs no credits or a request with the
    /// client's own key.
    pub(in crate::proxy) fn counts_against_quotas(&self) -> bool {
        self.is_charged && self.billing != Billing::Free
    }
}

/// The limit of a client, or of its end user, that a request exceeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientLimitExceeded {
    /// The client has reached its concurrency limit.
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
    /// The client's quota is exhausted, or is insufficient for this request.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// The user's quota is exhausted, or is insufficient for this request.
    #[error("the user has used its {}", .0.quota)]
    UserQuota(QuotaExceeded),
    /// The user has its maximum number of requests of unknown price in progress.
    #[error("the user has {max} requests of unknown price in progress")]
    UserUnpriced {
        /// Maximum number of requests of unknown price in progress.
        max: u32,
    },
    /// The client or each of its users has a quota, and the response would let the client use the provider outside of
    /// that quota.
    #[error("the client has a quota and may not request direct access")]
    DirectAccess,
}

/// The owner of a quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum QuotaOwner {
    /// The client that sends the request.
    Client,
    /// The end user that the request names.
    User,
}

impl ClientCounters {
    /// Locks the table of the users in memory.
    pub(super) fn users(&self) -> MutexGuard<'_, UserTable> {
        // Every change is complete before the lock is released.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl UsageCounters {
    /// Returns the share in the quota, or `None` if there are no other replicas.
    pub(super) fn share(&self) -> Option<&QuotaShare> {
        self.share.get().map(|share| &**share)
    }

    /// Returns the share in the quota, which is created with `create` if it is missing.
    pub(super) fn share_with(&self, create: impl FnOnce() -> QuotaShare) -> &QuotaShare {
        self.share.get_or_init(|| Box::new(create()))
    }

    /// Returns the counters of the amounts in `unit`.
    pub(super) fn period_counters(&self, unit: QuotaUnit) -> &PeriodCounters {
        match unit {
            QuotaUnit::Requests => &self.requests,
            QuotaUnit::Credits => &self.credits,
        }
    }
}
