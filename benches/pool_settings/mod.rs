//! Provides the pool settings of `benches/pool.rs` and `benches/request_steps`. With them, no request is queued and no
//! cooldown ends during a measurement.

use std::time::Duration;

use keychoir::policy::strategy::Strategy;
use keychoir::pool::Settings;

/// A duration that is longer than any measurement.
pub(crate) const HOUR: Duration = Duration::from_secs(3_600);

/// Returns pool settings with the given `strategy`, under which no cooldown ends during a measurement.
pub(crate) fn pool_settings(strategy: &'static Strategy) -> Settings {
    Settings {
        strategy,
        // Without a queue, a full pool rejects a request immediately.
        queue_timeout: Duration::ZERO,
        max_queued: 0,
        near_limit_ratio: 0.8,
        rate_limited_cooldown: HOUR,
        concurrency_cooldown: HOUR,
        exhausted_cooldown: HOUR,
        billing_cooldown: HOUR,
        invalid_confirm_cooldown: HOUR,
        invalid_cooldown: HOUR,
        permission_cooldown: HOUR,
        feature_cooldown: HOUR,
        endpoint_cooldown: HOUR,
        unproven_cooldown: HOUR,
        max_retry_after: HOUR,
        probe_after: HOUR,
        quota_lag: HOUR,
    }
}
