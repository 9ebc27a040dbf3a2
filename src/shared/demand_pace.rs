//! Limits how often a replica publishes a demand for credits, and how often it responds to the demands of other
//! replicas. Without these limits, the number of statements of a pool without spare credits would grow with the
//! square of its replicas.

use std::time::{Duration, Instant};

/// Minimum time between two demands of this replica, and between two of its responses.
const MIN_INTERVAL: Duration = Duration::from_millis(50);
/// Maximum of the minimum time between two demands, which doubles while other replicas return nothing.
const MAX_INTERVAL: Duration = Duration::from_secs(1);

/// The times of the last demand and the last response of this replica.
#[derive(Debug, Default)]
pub(super) struct DemandPace {
    demanded_at: Option<Instant>,
    /// The minimum time to the next demand; zero after a met demand.
    min_interval: Duration,
    responded_at: Option<Instant>,
    is_response_due: bool,
}

impl DemandPace {
    /// Records and permits a demand if `is_unmet` and the interval has passed. Returns whether it must be published.
    pub(super) fn try_publish_demand(&mut self, is_unmet: bool, now: Instant) -> bool {
        if !is_unmet {
            self.min_interval = Duration::ZERO;
            return false;
        }
        let min_interval = self.min_interval.max(MIN_INTERVAL);
        if self.demanded_at.is_some_and(|at| now.saturating_duration_since(at) < min_interval) {
            return false;
        }
        self.demanded_at = Some(now);
        self.min_interval = (min_interval * 2).min(MAX_INTERVAL);
        true
    }

    /// Records a demand of another replica.
    pub(super) fn record_demand(&mut self) {
        self.is_response_due = true;
    }

    /// Returns when this replica must respond, or `None` if no demand is open.
    pub(super) fn response_at(&self, now: Instant) -> Option<Instant> {
        let response_at = self.responded_at.map_or(now, |at| at + MIN_INTERVAL);
        self.is_response_due.then_some(response_at)
    }

    /// Records that this replica responds: it states the credits and slots that it does not need.
    pub(super) fn record_response(&mut self, now: Instant) {
        self.is_response_due = false;
        self.responded_at = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn demands_become_rare_while_nothing_is_returned() {
        let start = clock::instant();
        let mut pace = DemandPace::default();
        let published_at: Vec<u64> = (0..5_000)
            .filter(|ms| pace.try_publish_demand(true, start + Duration::from_millis(*ms)))
            .collect();
        assert_eq!(published_at, [0, 100, 300, 700, 1_500, 2_500, 3_500, 4_500]);
        assert!(!pace.try_publish_demand(false, start + Duration::from_millis(5_000)));
        assert!(
            pace.try_publish_demand(true, start + Duration::from_millis(5_001)),
            "a new demand must not wait"
        );
    }

    #[test]
    fn several_demands_get_one_response() {
        let start = clock::instant();
        let mut pace = DemandPace::default();
        assert_eq!(pace.response_at(start), None);
        pace.record_demand();
        pace.record_demand();
        assert_eq!(pace.response_at(start), Some(start));
        pace.record_response(start);
        assert_eq!(pace.response_at(start), None);
        pace.record_demand();
        assert_eq!(pace.response_at(start), Some(start + MIN_INTERVAL));
    }
}
