//! Stores the share of this replica in the rate limit and the concurrent requests of a client, and measures the
//! activity from which the pool determines the shares.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::policy::client::ClientName;
use crate::policy::client_quota::RateLimit;

/// Time after a request in which a replica counts as a replica that serves the client.
const RECENT_PERIOD: Duration = Duration::from_secs(60);

/// The share of one replica in the limits of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientShare {
    /// The number of replicas that served the client recently. Each of them admits an equal part of the rate limit.
    pub rate_divisor: u32,
    /// Maximum number of concurrent requests at this replica, or `None` if it is unknown.
    pub max_concurrent: Option<u32>,
}

/// The activity of a client at this replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientActivity {
    /// The name of the client.
    pub client: ClientName,
    /// The number of requests in progress.
    pub running: u32,
    /// The number of concurrent requests that the client wants. It is the larger of two numbers since the last report:
    /// the peak of concurrent requests, and the sum of the running and the refused requests.
    pub demand: u32,
    /// The configured concurrency limit of all replicas together, or `None` if there is no limit.
    pub max_concurrent: Option<u32>,
    /// Whether the client sent a request in the last minute.
    pub is_recent: bool,
}

/// The share and the activity of one client. All values are zero if there are no other replicas.
#[derive(Debug, Default)]
pub(super) struct ClientShareCell {
    /// The divisor of the rate limit, or 0 if it is unknown.
    rate_divisor: AtomicU32,
    /// The maximum number of concurrent requests plus 1, or 0 if it is unknown.
    max_concurrent: AtomicU32,
    /// The configured concurrency limit, or 0 if there is no limit.
    configured_max: AtomicU32,
    /// The largest number of requests in progress since the last report.
    peak: AtomicU32,
    /// The number of requests that were refused since the last report.
    refused: AtomicU32,
    /// The time of the last request, in nanoseconds since `ClientUsage::clock_origin`, or 0 before the first request.
    used_at: AtomicU64,
}

impl ClientShareCell {
    /// Stores the share that the pool has determined.
    pub(super) fn set(&self, share: ClientShare) {
        self.rate_divisor.store(share.rate_divisor, Ordering::Release);
        let max_concurrent = share.max_concurrent.map_or(0, |max| max.saturating_add(1));
        self.max_concurrent.store(max_concurrent, Ordering::Release);
    }

    /// Returns the part of `limit` that this replica admits.
    pub(super) fn divide(&self, limit: RateLimit) -> RateLimit {
        limit.divided(self.rate_divisor.load(Ordering::Acquire))
    }

    /// Returns the concurrency limit at this replica, if the limit at all `replicas` together is `max`. An unknown
    /// share is an equal part, but at least one request.
    pub(super) fn max_concurrent(&self, max: u32, replicas: u32) -> u32 {
        let share = self.max_concurrent.load(Ordering::Acquire).checked_sub(1);
        share.unwrap_or_else(|| (max / replicas.max(1)).max(1)).min(max)
    }

    /// Records a request at `elapsed_ns`, in nanoseconds since `ClientUsage::clock_origin`. `in_progress` is the number
    /// of requests in progress, including this request.
    pub(super) fn record(
        &self,
        in_progress: u32,
        is_refused: bool,
        configured_max: Option<u32>,
        elapsed_ns: u64,
    ) {
        self.configured_max.store(configured_max.unwrap_or(0), Ordering::Relaxed);
        self.used_at.store(elapsed_ns.max(1), Ordering::Relaxed);
        self.peak.fetch_max(in_progress, Ordering::Relaxed);
        if is_refused {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the activity since the last report, with `running` requests in progress, or `None` if the client sent
    /// no request recently.
    pub(super) fn report(
        &self,
        client: &ClientName,
        running: u32,
        elapsed_ns: u64,
    ) -> Option<ClientActivity> {
        let used_at = self.used_at.load(Ordering::Relaxed);
        let age = Duration::from_nanos(elapsed_ns.saturating_sub(used_at));
        let is_recent = used_at > 0 && age < RECENT_PERIOD;
        let peak = self.peak.swap(0, Ordering::Relaxed);
        let refused = self.refused.swap(0, Ordering::Relaxed);
        let configured_max = self.configured_max.load(Ordering::Relaxed);
        (is_recent || (used_at > 0 && running > 0)).then(|| ClientActivity {
            client: client.clone(),
            running,
            demand: peak.max(running.saturating_add(refused)),
            max_concurrent: Some(configured_max).filter(|&max| max > 0),
            is_recent,
        })
    }
}
