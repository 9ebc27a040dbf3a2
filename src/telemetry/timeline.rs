//! Counts the requests of the last 24 hours in intervals of five minutes, in memory, for the charts and figures of
//! the dashboard. A task reads the counters of the metrics periodically, so that requests do no work for the
//! timeline. The timeline does not use the stored records, because reading them would scan the attempts of a whole day.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::metrics::{Percentiles, RequestMetrics, RequestTotals};
use crate::clock;
use crate::policy::units::UnixMs;

/// The duration of an interval. It is short enough to show an interruption of some minutes.
pub const TIMELINE_INTERVAL: Duration = Duration::from_millis(INTERVAL_MS);
const INTERVAL_MS: u64 = 5 * 60 * 1_000;
/// Maximum number of intervals. They cover 24 hours and need 44 kB.
const MAX_INTERVALS: u64 = 24 * 60 / 5;

/// Time between two samples of the totals, which is the accuracy of the start of [`RecentRequests`]. Ten seconds are
/// exact enough for a number of requests per minute, and an interval consists of whole periods.
const SAMPLE_PERIOD: Duration = Duration::from_secs(10);
/// Maximum duration of [`RecentRequests`]. Its samples need 55 kB.
const MAX_RECENT: Duration = Duration::from_secs(3_600);
/// Maximum number of samples: those of [`MAX_RECENT`], and the sample before them.
const MAX_SAMPLES: usize = 3_600 / 10 + 1;

/// The requests of the last 24 hours.
#[derive(Debug, Default)]
pub struct Timeline {
    /// The earliest interval that was recorded, or `None` before the first record.
    first: Option<IntervalNumber>,
    /// The totals that the intervals include.
    totals: RequestTotals,
    /// The intervals in which requests ended, in their order.
    intervals: VecDeque<(IntervalNumber, RequestTotals)>,
    /// The totals at earlier times, in their order, at least [`SAMPLE_PERIOD`] apart.
    samples: VecDeque<(UnixMs, RequestTotals)>,
}

/// The number of an interval, counted from 1970.
type IntervalNumber = u64;

/// The requests that ended in an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimelineInterval {
    /// The start of the interval, a multiple of [`TIMELINE_INTERVAL`].
    pub start: UnixMs,
    /// Number of requests that ended.
    pub requests: u64,
    /// Number of requests without a response, or with a status of 500 or above.
    pub failed: u64,
    /// Number of attempts that were followed by another attempt.
    pub retries: u64,
    /// The time to the first byte, or `None` if there was no response.
    pub first_byte: Option<Percentiles>,
}

/// The requests that ended recently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecentRequests {
    /// The duration in which the requests ended. It exceeds the queried duration by less than the time between two
    /// samples. After a start or a jump of the clock, it is shorter than the queried duration.
    pub covered: Duration,
    /// Number of requests that ended.
    pub requests: u64,
    /// Number of requests without a response, or with a status of 500 or above.
    pub failed: u64,
    /// Number of attempts that were followed by another attempt.
    pub retries: u64,
    /// The time to the first byte, or `None` if there was no response.
    pub first_byte: Option<Percentiles>,
}

impl Timeline {
    /// Adds the requests since the previous call to the interval of `now`. `totals` are counted from startup.
    ///
    /// When the clock was set back, intervals in the future are added to the interval of `now`, so that no request is
    /// lost. When the clock was set forward, or the machine was suspended, the intervals in between have no requests.
    pub fn record(&mut self, now: UnixMs, totals: &RequestTotals) {
        let number = now.0 / INTERVAL_MS;
        self.first = Some(self.first.map_or(number, |first| first.min(number)));
        // A caller may have read its totals before the totals of the previous call were read.
        let totals = totals.max(&self.totals);
        let mut added = totals.since(&self.totals);
        self.totals = totals;
        while let Some((_, counts)) = self.intervals.pop_back_if(|(last, _)| *last >= number) {
            added = added.plus(&counts);
        }
        if added != RequestTotals::default() {
            self.intervals.push_back((number, added));
        }
        while self.intervals.pop_front_if(|(first, _)| *first + MAX_INTERVALS <= number).is_some() {}
        self.add_sample(now);
    }

    fn add_sample(&mut self, now: UnixMs) {
        while self.samples.pop_back_if(|(at, _)| *at > now).is_some() {}
        if self.samples.back().is_none_or(|(at, _)| now.since(*at) >= SAMPLE_PERIOD) {
            self.samples.push_back((now, self.totals));
        }
        if self.samples.len() > MAX_SAMPLES {
            self.samples.pop_front();
        }
    }

    /// Returns the intervals of the last 24 hours in their order, from the first record to the interval of `now`,
    /// which has not ended.
    #[must_use]
    pub fn intervals(&self, now: UnixMs) -> Vec<TimelineInterval> {
        let last = self.intervals.back().map_or(0, |(last, _)| *last).max(now.0 / INTERVAL_MS);
        let first = self.first.unwrap_or(last).max((last + 1).saturating_sub(MAX_INTERVALS));
        let mut recorded = self.intervals.iter().skip_while(|(number, _)| *number < first).peekable();
        let interval = |number| {
            let counts = recorded.next_if(|(recorded, _)| *recorded == number).map(|(_, counts)| *counts);
            let RequestTotals { requests, failed, retries, .. } = counts.unwrap_or_default();
            TimelineInterval {
                start: UnixMs(number * INTERVAL_MS),
                requests,
                failed,
                retries,
                first_byte: counts.and_then(|counts| counts.first_byte_percentiles()),
            }
        };
        (first..=last).map(interval).collect()
    }

    /// Returns the requests of the last `duration`, which is limited to an hour. `totals` are counted from startup.
    #[must_use]
    pub fn recent(&self, now: UnixMs, totals: &RequestTotals, duration: Duration) -> RecentRequests {
        // Samples are a period apart, so the first sample after this time is at least `duration` old.
        let earliest = now.minus(duration.min(MAX_RECENT) + SAMPLE_PERIOD);
        let first = self.samples.partition_point(|(at, _)| *at <= earliest);
        let sample = self.samples.get(first).filter(|(at, _)| *at <= now);
        let (start, earlier) = sample.copied().unwrap_or((now, *totals));
        let counts = totals.since(&earlier);
        let RequestTotals { requests, failed, retries, .. } = counts;
        let first_byte = counts.first_byte_percentiles();
        RecentRequests { covered: now.since(start), requests, failed, retries, first_byte }
    }
}

impl RecentRequests {
    /// Returns the number of requests per minute.
    #[must_use]
    pub fn requests_per_minute(&self) -> f64 {
        // Shortly after a start, a single request must not count as hundreds per minute.
        self.requests as f64 * 60.0 / self.covered.max(SAMPLE_PERIOD).as_secs_f64()
    }

    /// Returns the share of failed requests from 0 to 1, or `None` without requests.
    #[must_use]
    pub fn failed_share(&self) -> Option<f64> {
        (self.requests > 0).then(|| self.failed as f64 / self.requests as f64)
    }
}

/// The request timeline of Keychoir. Clones share it. Every read first records the current totals.
#[derive(Clone, Debug)]
pub struct TimelineHandle {
    metrics: RequestMetrics,
    timeline: Arc<Mutex<Timeline>>,
}

impl TimelineHandle {
    /// Creates the timeline of `metrics`, without intervals.
    #[must_use]
    pub fn new(metrics: RequestMetrics) -> Self {
        Self { metrics, timeline: Arc::default() }
    }

    /// Records the current totals.
    pub fn record(&self, now: UnixMs) {
        drop(self.lock_updated(now));
    }

    /// Returns the intervals of the last 24 hours, see [`Timeline::intervals`].
    #[must_use]
    pub fn intervals(&self, now: UnixMs) -> Vec<TimelineInterval> {
        self.lock_updated(now).intervals(now)
    }

    /// Returns the requests of the last `duration`, see [`Timeline::recent`].
    #[must_use]
    pub fn recent(&self, now: UnixMs, duration: Duration) -> RecentRequests {
        let timeline = self.lock_updated(now);
        timeline.recent(now, &timeline.totals, duration)
    }

    /// Locks the timeline after recording the current totals.
    fn lock_updated(&self, now: UnixMs) -> MutexGuard<'_, Timeline> {
        let mut timeline = self.timeline.lock().unwrap_or_else(PoisonError::into_inner);
        timeline.record(now, &self.metrics.totals());
        timeline
    }
}

/// Records the totals periodically, until the future is dropped.
///
/// # Cancel safety
///
/// Dropping the future ends the recording, and has no other effect.
pub async fn sample_timeline(timeline: TimelineHandle) {
    loop {
        timeline.record(clock::now());
        tokio::time::sleep(SAMPLE_PERIOD).await;
    }
}

#[cfg(test)]
mod tests;
