//! Limits how often a replica publishes a demand for credits or slots, and how often it responds to the demands of
//! other replicas. A response consists of beats that return unneeded credits and slots. Each demand causes a response
//! of every other replica. Without these limits, the number of responses in a pool without spare credits would grow
//! with the square of the number of replicas.

use std::time::{Duration, Instant};

/// Minimum time between two demands of this replica, and between two of its responses.
const MIN_INTERVAL: Duration = Duration::from_millis(50);
/// The upper limit of the minimum time between two demands, which doubles while other replicas return too little.
const MAX_INTERVAL: Duration = Duration::from_secs(1);

/// The times of the last demand and the last response of this replica, from which the next ones follow.
#[derive(Debug, Default)]
pub(super) struct DemandPace {
    /// The time of the last demand, or `None` before the first demand.
    demanded_at: Option<Instant>,
    /// The minimum time between the last demand and the next demand. It is zero after a demand was met.
    min_interval: Duration,
    /// The time of the last response, or `None` before the first response.
    responded_at: Option<Instant>,
    /// Whether another replica has published a demand since the last response.
    is_response_due: bool,
}

impl DemandPace {
    /// Returns whether a demand must be published at `now`: the demand is unmet, and the minimum time has passed.
    /// Records the time of that demand.
    pub(super) fn must_publish_demand(&mut self, is_demand_unmet: bool, now: Instant) -> bool {
        if !is_demand_unmet {
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

    /// Returns the time at which this replica must respond, or `None` if it has responded to all demands.
    pub(super) fn response_at(&self, now: Instant) -> Option<Instant> {
        let response_at = self.responded_at.map_or(now, |at| at + MIN_INTERVAL);
        self.is_response_due.then_some(response_at)
    }

    /// Records that this replica responds, by beats that return the credits and slots that it does not need.
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
            .filter(|ms| pace.must_publish_demand(true, start + Duration::from_millis(*ms)))
            .collect();
        assert_eq!(
            published_at,
            [0, 100, 300, 700, 1_500, 2_500, 3_500, 4_500],
            "the interval must double up to one second"
        );
        assert!(
            !pace.must_publish_demand(false, start + Duration::from_millis(5_000)),
            "a demand that is met must not be published"
        );
        assert!(
            pace.must_publish_demand(true, start + Duration::from_millis(5_001)),
            "the first demand after a met demand must be published at once"
        );
    }

    #[test]
    fn several_demands_get_one_response() {
        let start = clock::instant();
        let mut pace = DemandPace::default();
        assert_eq!(pace.response_at(start), None, "no response is due without a demand");
        pace.record_demand();
        pace.record_demand();
        assert_eq!(pace.response_at(start), Some(start), "the first response is due at once");
        pace.record_response(start);
        assert_eq!(pace.response_at(start), None, "one response is enough for both demands");
        pace.record_demand();
        assert_eq!(
            pace.response_at(start),
            Some(start + MIN_INTERVAL),
            "the next response must wait for the minimum interval"
        );
    }
}
