//! Counts durations in a histogram, with an atomic counter per bucket. The histogram of `prometheus_client` is not
//! used, because it acquires a lock on every observation.

use std::fmt;
use std::iter::once;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// A histogram whose counts are shared by all clones.
#[derive(Clone, Debug)]
pub struct Histogram(Arc<Buckets>);

#[derive(Debug)]
struct Buckets {
    /// The upper bounds of the buckets in seconds, in ascending order.
    bounds: &'static [f64],
    /// One count per bound, and one for longer durations.
    counts: Box<[AtomicU64]>,
    /// The sum of all durations in microseconds.
    sum_us: AtomicU64,
}

impl Histogram {
    /// Creates an empty histogram whose buckets have the upper bounds `bounds`, in seconds and ascending.
    #[must_use]
    pub fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::default()).collect();
        Self(Arc::new(Buckets { bounds, counts, sum_us: AtomicU64::default() }))
    }

    /// Adds a duration to its bucket and to the sum.
    pub fn observe(&self, duration: Duration) {
        let Buckets { bounds, counts, sum_us } = &*self.0;
        let seconds = duration.as_secs_f64();
        let bucket = bounds.iter().position(|bound| seconds <= *bound).unwrap_or(bounds.len());
        // Relaxed ordering suffices because the counters are independent.
        if let Some(count) = counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        sum_us.fetch_add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Returns the number of observations in each bucket: one per bound, and one for longer durations.
    pub(super) fn counts(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.counts.iter().map(|count| count.load(Ordering::Relaxed))
    }
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let Buckets { bounds, sum_us, .. } = &*self.0;
        let bounds = bounds.iter().copied().chain(once(f64::INFINITY));
        let buckets: Vec<(f64, u64)> = bounds.zip(self.counts()).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = Duration::from_micros(sum_us.load(Ordering::Relaxed));
        encoder.encode_histogram::<NoLabelSet>(sum.as_secs_f64(), count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}
