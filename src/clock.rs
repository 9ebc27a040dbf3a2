//! The only place that reads a clock, so that every decision elsewhere takes its time as an
//! argument and can be tested at any moment of any month.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::policy::units::UnixMs;

/// The wall clock, for what people and providers date: reset dates, cooldowns, records.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this is the place the lint points to")]
pub fn now() -> UnixMs {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMs(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}

/// The monotonic clock, for what is measured: time to first byte, totals, deadlines. It is the
/// runtime's, so that tests with virtual time see it move.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this is the place the lint points to")]
pub fn instant() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// How long ago `moment` was.
#[must_use]
pub fn since(moment: Instant) -> Duration {
    instant().saturating_duration_since(moment)
}
