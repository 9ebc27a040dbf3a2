//! Computes the totals of the request metrics since startup, and the percentiles of the time to the first byte, for the
//! timeline. They are computed from the counters of the metrics page, so that requests do no further work.

use std::sync::atomic::Ordering;
use std::time::Duration;

use http::StatusCode;

use super::{REQUEST_BUCKETS, RequestMetrics};

/// The number of buckets of the time to the first byte: one per bound, and one for longer times.
const FIRST_BYTE_BUCKETS: usize = REQUEST_BUCKETS.len() + 1;

/// Counts of ended requests, since startup or between two moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestTotals {
    /// Number of requests that have ended.
    pub requests: u64,
    /// Number of requests without a response, or with a status of 500 or above. Requests whose labels exceed the
    /// maximum number of series have no recorded status and are not included.
    pub failed: u64,
    /// Number of attempts that were followed by another attempt.
    pub retries: u64,
    /// Number of relayed responses in each bucket of their time to the first byte.
    pub first_byte: [u64; FIRST_BYTE_BUCKETS],
}

/// Percentiles of the time to the first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Percentiles {
    /// The duration that half of the responses did not exceed.
    pub p50: Duration,
    /// The duration that 95 % of the responses did not exceed.
    pub p95: Duration,
}

impl RequestMetrics {
    /// Returns the totals since startup. The counters are read one after another, so a request that ends during this
    /// call may be included in only a part of them.
    #[must_use]
    pub fn totals(&self) -> RequestTotals {
        let mut totals = RequestTotals::default();
        self.0.requests.for_each(|labels, count| {
            let count = count.get();
            let is_failed = labels.code.is_none_or(|code| code >= StatusCode::INTERNAL_SERVER_ERROR.as_u16());
            totals.requests = totals.requests.saturating_add(count);
            totals.failed = totals.failed.saturating_add(if is_failed { count } else { 0 });
        });
        self.0.attempts.for_each(|_, counts| {
            let retries = counts.retries.iter().map(|count| count.load(Ordering::Relaxed));
            totals.retries = retries.fold(totals.retries, u64::saturating_add);
        });
        let buckets = self.0.request_time_to_first_byte.counts();
        totals.first_byte.iter_mut().zip(buckets).for_each(|(total, count)| *total = count);
        totals
    }
}

impl RequestTotals {
    /// Returns the differences to the counts of `earlier`, or 0 if the earlier count is greater.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        self.combine(earlier, u64::saturating_sub)
    }

    /// Returns the sums of the counts.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        self.combine(other, u64::saturating_add)
    }

    /// Returns the maximum of each count.
    #[must_use]
    pub fn max(&self, other: &Self) -> Self {
        self.combine(other, u64::max)
    }

    fn combine(&self, other: &Self, combine: impl Fn(u64, u64) -> u64) -> Self {
        let mut first_byte = self.first_byte;
        first_byte
            .iter_mut()
            .zip(other.first_byte)
            .for_each(|(count, other)| *count = combine(*count, other));
        Self {
            requests: combine(self.requests, other.requests),
            failed: combine(self.failed, other.failed),
            retries: combine(self.retries, other.retries),
            first_byte,
        }
    }

    /// Returns the percentiles of the time to the first byte, or `None` if there was no response.
    #[must_use]
    pub fn first_byte_percentiles(&self) -> Option<Percentiles> {
        let quantile = |share| quantile(&self.first_byte, REQUEST_BUCKETS, share);
        Some(Percentiles { p50: quantile(0.5)?, p95: quantile(0.95)? })
    }
}

/// Estimates the duration that a share of the observations did not exceed, like `histogram_quantile` of Prometheus: the
/// observations of a bucket are assumed to be evenly distributed between its bounds. For the last bucket, which has no
/// upper bound, it returns the lower bound. Without observations, it returns `None`.
fn quantile(counts: &[u64], bounds: &[f64], share: f64) -> Option<Duration> {
    let total = counts.iter().fold(0_u64, |total, count| total.saturating_add(*count));
    if total == 0 {
        return None;
    }
    let rank = share * total as f64;
    let (mut lower, mut counted) = (0.0, 0.0);
    for (&upper, &count) in bounds.iter().zip(counts) {
        let count = count as f64;
        if counted + count >= rank {
            return Some(Duration::from_secs_f64(lower + (upper - lower) * (rank - counted) / count));
        }
        counted += count;
        lower = upper;
    }
    Some(Duration::from_secs_f64(lower))
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::super::RequestLabels;
    use super::*;
    use crate::policy::outcome::Outcome;

    const BOUNDS: &[f64] = &[0.1, 0.5, 1.0];

    /// Asserts a quantile of a histogram with [`BOUNDS`].
    #[track_caller]
    fn assert_quantile(counts: [u64; 4], share: f64, expected_ms: Option<u64>) {
        let actual = quantile(&counts, BOUNDS, share).map(|duration| duration.as_secs_f64());
        let expected = expected_ms.map(|ms| ms as f64 / 1_000.0);
        let is_equal = match (actual, expected) {
            (Some(actual), Some(expected)) => (actual - expected).abs() < 1e-6,
            (actual, expected) => actual == expected,
        };
        assert!(is_equal, "the quantile {share} of {counts:?} must be {expected:?}, not {actual:?}");
    }

    #[test]
    fn a_percentile_is_interpolated_in_its_bucket() {
        assert_quantile([0, 0, 0, 0], 0.5, None);
        assert_quantile([1, 0, 0, 0], 0.5, Some(50));
        assert_quantile([10, 0, 0, 0], 0.95, Some(95));
        assert_quantile([0, 1, 0, 0], 0.5, Some(300));
        assert_quantile([0, 4, 0, 0], 0.25, Some(200));
        // The rank is exactly at the end of the first bucket.
        assert_quantile([5, 5, 0, 0], 0.5, Some(100));
        assert_quantile([5, 0, 5, 0], 0.75, Some(750));
        assert_quantile([90, 5, 5, 0], 0.95, Some(500));
    }

    #[test]
    fn a_percentile_beyond_the_last_bound_is_this_bound() {
        assert_quantile([0, 0, 0, 1], 0.5, Some(1_000));
        assert_quantile([9, 0, 0, 1], 0.95, Some(1_000));
        assert_quantile([19, 0, 0, 1], 0.95, Some(100));
    }

    #[test]
    fn the_totals_are_the_sums_of_the_counters() {
        let metrics = RequestMetrics::default();
        assert_eq!(metrics.totals(), RequestTotals::default());
        for code in [Some(200), Some(101), Some(499), Some(500), Some(599), Some(999), None] {
            let labels = RequestLabels { method: Method::GET, route: None, code, client: None };
            metrics.record_request_end(&labels, Duration::from_secs(1));
        }
        metrics.record_retry(None, Outcome::Shutdown);
        metrics.record_retry(None, Outcome::ClientClosed);
        metrics.record_response_start(Duration::from_millis(10), Duration::ZERO);
        metrics.record_response_start(Duration::from_secs(301), Duration::ZERO);
        let totals = metrics.totals();
        assert_eq!((totals.requests, totals.failed, totals.retries), (7, 3, 2));
        assert_eq!((totals.first_byte[0], totals.first_byte[FIRST_BYTE_BUCKETS - 1]), (1, 1));
        let percentiles = totals.first_byte_percentiles().unwrap();
        assert_eq!((percentiles.p50, percentiles.p95), (Duration::from_millis(10), Duration::from_secs(300)));
    }
}
