//! Defines the settings of the pool: the strategy, the bounds of the queue, the cooldowns, the delay of probes, and the
//! values that interpret the quota of a poll.

use std::time::Duration;

use crate::policy::evidence::Cooldowns;
use crate::policy::strategy::Strategy;

/// The settings of the pool. A reload replaces them together with the roster.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The strategy that ranks the keys.
    pub strategy: &'static Strategy,
    /// Maximum time for which a request is queued. Zero disables the queue.
    pub queue_timeout: Duration,
    /// Maximum number of queued requests.
    pub max_queued: usize,
    /// The ratio of spent credits to the limit, from 0 to 1, from which a key is reported as near its limit.
    pub near_limit_ratio: f64,
    /// Cooldown after a rate limit without a `Retry-After`, of a concurrency group of a workspace or of a kind of
    /// request.
    pub rate_limited_cooldown: Duration,
    /// Cooldown after a refusal for too many concurrent requests, of a concurrency group of a workspace or of a kind of
    /// request.
    pub concurrency_cooldown: Duration,
    /// Cooldown of a workspace without credits whose reset date is unknown.
    pub exhausted_cooldown: Duration,
    /// Cooldown of a workspace whose invoice is unpaid, or which is suspected of abuse.
    pub billing_cooldown: Duration,
    /// Cooldown of a key after its first refusal as invalid, until a poll confirms the refusal.
    pub invalid_confirm_cooldown: Duration,
    /// Cooldown of a key whose refusal as invalid is confirmed.
    pub invalid_cooldown: Duration,
    /// Time for which a key is tried last for a request whose permission it lacked.
    pub permission_cooldown: Duration,
    /// Time for which a workspace, and other workspaces of its plan, are tried last for a feature that the plan lacks.
    /// Also the time for which a workspace is tried last for a resource of which it may have no more.
    pub feature_cooldown: Duration,
    /// Time for which a workspace is tried last for an endpoint that refused it without a known
    /// reason.
    pub endpoint_cooldown: Duration,
    /// Cooldown of a key, a workspace or a kind of request after a refusal whose message does not prove its reason.
    pub unproven_cooldown: Duration,
    /// Upper bound of the provider's `Retry-After`.
    pub max_retry_after: Duration,
    /// Delay after an unproven refusal until one request may probe the key. A request probes a key only when no other
    /// key can serve the request.
    pub probe_after: Duration,
    /// Maximum lag of the provider's count behind the spent credits.
    pub quota_lag: Duration,
}

impl Settings {
    /// Returns the cooldowns that turn evidence into key state.
    #[must_use]
    pub fn cooldowns(&self) -> Cooldowns {
        Cooldowns {
            unproven: self.unproven_cooldown,
            rate_limited: self.rate_limited_cooldown,
            max_retry_after: self.max_retry_after,
            exhausted: self.exhausted_cooldown,
            billing: self.billing_cooldown,
            invalid_confirm: self.invalid_confirm_cooldown,
            invalid: self.invalid_cooldown,
            quota_lag: self.quota_lag,
        }
    }
}

#[cfg(test)]
impl Settings {
    /// Settings for tests, without a queue and with cooldowns that do not end during a test.
    pub(crate) const FOR_TESTS: Self = Self {
        strategy: crate::policy::strategy::Strategy::DEFAULT,
        queue_timeout: Duration::ZERO,
        max_queued: 0,
        near_limit_ratio: 0.8,
        rate_limited_cooldown: Duration::from_secs(3_600),
        concurrency_cooldown: Duration::from_secs(3_600),
        exhausted_cooldown: Duration::from_secs(3_600),
        billing_cooldown: Duration::from_secs(3_600),
        invalid_confirm_cooldown: Duration::from_secs(3_600),
        invalid_cooldown: Duration::from_secs(3_600),
        permission_cooldown: Duration::from_secs(3_600),
        feature_cooldown: Duration::from_secs(3_600),
        endpoint_cooldown: Duration::from_secs(3_600),
        unproven_cooldown: Duration::from_secs(3_600),
        max_retry_after: Duration::from_secs(3_600),
        probe_after: Duration::from_secs(3_600),
        quota_lag: Duration::from_secs(3_600),
    };
}
