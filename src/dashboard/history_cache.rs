//! Caches the credits that each key has used in each of the last 24 hours. All viewers of the overview share the cache,
//! so the usage database is read about every 15 seconds, regardless of the number of viewers.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::clock;
use crate::policy::units::UnixMs;
use crate::store::{History, HistoryError, HourOfKey};

/// The time for which the cached sums are used. The chart of the overview may be this old.
const CACHE_TTL: Duration = Duration::from_secs(15);
/// The time that the chart covers.
pub(super) const CHART_SPAN: Duration = Duration::from_secs(24 * 3_600);
/// Maximum number of sums, one per key and hour. It is enough for a thousand keys: the chart shows 25 hours, because
/// its first and its last hour are incomplete.
const MAX_ROWS: usize = 25_000;

/// The latest sums of credits by hour and key, and the time at which they were read.
#[derive(Debug, Default)]
pub(super) struct HistoryCache(Mutex<Option<(Instant, Arc<Vec<HourOfKey>>)>>);

impl HistoryCache {
    /// Returns the sums from the cache, or reads the sums until `now` if the cached sums are too old.
    pub(super) async fn credits_by_hour(
        &self,
        history: &History,
        now: UnixMs,
    ) -> Result<Arc<Vec<HourOfKey>>, HistoryError> {
        if let Some((read_at, hours)) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner)
            && clock::elapsed_since(*read_at) < CACHE_TTL
        {
            return Ok(Arc::clone(hours));
        }
        let hours = history.credits_by_hour(now.minus(CHART_SPAN), UnixMs(now.0 + 1), MAX_ROWS).await?;
        let hours = Arc::new(hours);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((clock::instant(), Arc::clone(&hours)));
        Ok(hours)
    }
}
