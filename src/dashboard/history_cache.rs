//! Caches the credits that each key has used in each of the last 24 hours, so that the overview reads them from the
//! usage database about every 15 seconds for all viewers together.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::clock;
use crate::policy::units::UnixMs;
use crate::store::{History, HistoryError, HourOfKey};

/// The time for which the cached sums are used. The chart of the overview may be this old.
const CACHE_TTL: Duration = Duration::from_secs(15);
/// The time that the chart covers.
pub(super) const CHART_SPAN: Duration = Duration::from_secs(24 * 3_600);
/// Maximum number of sums. It suffices for a thousand keys, each with 25 hours, of which the first and the last are
/// incomplete.
const MAX_ROWS: usize = 25_000;

/// The sums that were read last, and the time of that.
#[derive(Debug, Default)]
pub(super) struct HistoryCache(Mutex<Option<(Instant, Arc<Vec<HourOfKey>>)>>);

impl HistoryCache {
    /// Returns the sums until `now`, from the cache or from the database.
    pub(super) async fn hours(
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
