//! The credits of each key in the last hours, read from the usage database at most every 15 seconds for all viewers.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::clock;
use crate::policy::units::UnixMs;
use crate::store::{History, HistoryError, HourOfKey};

/// Time for which the sums are used again. Records are written after a fraction of a second, so the chart may lag by
/// this time.
const LIFETIME: Duration = Duration::from_secs(15);
/// The span of the chart.
pub(super) const CHART_SPAN: Duration = Duration::from_secs(24 * 3_600);
/// Maximum sums: more than a day of a thousand keys.
const MAX_ROWS: usize = 25_000;

/// The sums that were read last.
#[derive(Debug, Default)]
pub(super) struct HistoryCache(Mutex<Option<(Instant, Arc<Vec<HourOfKey>>)>>);

impl HistoryCache {
    pub(super) async fn hours(
        &self,
        history: &History,
        now: UnixMs,
    ) -> Result<Arc<Vec<HourOfKey>>, HistoryError> {
        if let Some((read_at, hours)) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner)
            && clock::elapsed_since(*read_at) < LIFETIME
        {
            return Ok(Arc::clone(hours));
        }
        let hours = history.credits_by_hour(now.minus(CHART_SPAN), UnixMs(now.0 + 1), MAX_ROWS).await?;
        let hours = Arc::new(hours);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((clock::instant(), Arc::clone(&hours)));
        Ok(hours)
    }
}
