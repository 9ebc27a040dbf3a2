//! Limits how often a replica asks the others for what they do not need, and how often it responds. Without these
//! limits, the statements of a pool without spare credits would grow with the square of its replicas.

use std::time::{Duration, Instant};

/// Minimum time between two questions, and between two responses.
const MIN_INTERVAL: Duration = Duration::from_millis(50);
/// Maximum time between two questions while the responses return nothing.
const MAX_INTERVAL: Duration = Duration::from_secs(1);

/// The times of the questions and responses of this replica.
#[derive(Debug, Default)]
pub(super) struct DemandPace {
    asked_at: Option<Instant>,
    /// The time between the last question and the next one.
    interval: Duration,
    responded_at: Option<Instant>,
    is_response_due: bool,
}

impl DemandPace {
    /// Returns whether this replica asks the others now, after a beat whose demand `is_unmet`.
    pub(super) fn asks(&mut self, is_unmet: bool, now: Instant) -> bool {
        if !is_unmet {
            self.interval = Duration::ZERO;
            return false;
        }
        let pause = self.interval.max(MIN_INTERVAL);
        if self.asked_at.is_some_and(|at| now.saturating_duration_since(at) < pause) {
            return false;
        }
        self.asked_at = Some(now);
        self.interval = (pause * 2).min(MAX_INTERVAL);
        true
    }

    /// Records that another replica has asked.
    pub(super) fn record_question(&mut self) {
        self.is_response_due = true;
    }

    /// Returns the time at which this replica must state what it does not need.
    pub(super) fn response_at(&self, now: Instant) -> Option<Instant> {
        let earliest = self.responded_at.map_or(now, |at| at + MIN_INTERVAL);
        self.is_response_due.then_some(earliest)
    }

    /// Records that this replica states what it does not need.
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
    fn questions_become_rare_while_the_responses_return_nothing() {
        let start = clock::instant();
        let mut pace = DemandPace::default();
        let asked: Vec<u64> =
            (0..5_000).filter(|ms| pace.asks(true, start + Duration::from_millis(*ms))).collect();
        assert_eq!(asked, [0, 100, 300, 700, 1_500, 2_500, 3_500, 4_500]);
        assert!(!pace.asks(false, start + Duration::from_millis(5_000)));
        assert!(pace.asks(true, start + Duration::from_millis(5_001)), "a new demand must not wait");
    }

    #[test]
    fn several_questions_get_one_response() {
        let start = clock::instant();
        let mut pace = DemandPace::default();
        assert_eq!(pace.response_at(start), None);
        pace.record_question();
        pace.record_question();
        assert_eq!(pace.response_at(start), Some(start));
        pace.record_response(start);
        assert_eq!(pace.response_at(start), None);
        pace.record_question();
        assert_eq!(pace.response_at(start), Some(start + MIN_INTERVAL));
    }
}
