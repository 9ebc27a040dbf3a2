//! The settings of the pools that are measured.

use std::time::Duration;

use keychoir::policy::strategy::Strategy;
use keychoir::pool::Settings;

pub(crate) const HOUR: Duration = Duration::from_secs(3_600);

/// Returns settings with the given `strategy`. No cooldown ends during a measurement.
pub(crate) fn pool_settings(strategy: &'static Strategy) -> Settings {
    Settings {
        strategy,
        // No queue: a full pool rejects a request immediately.
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
