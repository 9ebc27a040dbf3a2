//! The budget of retries whose cause is not a key: when all requests fail at the same time, retrying all
//! of them would double the load.

use std::time::Duration;

/// Earned per request, in thousandths of a retry.
const PER_REQUEST: u64 = 200;
/// Earned per second, regardless of the traffic, so that a single request can be retried, too.
const PER_SECOND: u64 = 10_000;
/// Maximum of the budget: ten seconds without a failure.
const MAX_SAVED: u64 = 100_000;
/// The cost of one retry.
const RETRY_COST: u64 = 1_000;

/// The budget for retries, in thousandths of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryBudget {
    saved: u64,
}

impl Default for RetryBudget {
    /// The budget of one second.
    fn default() -> Self {
        Self { saved: PER_SECOND }
    }
}

impl RetryBudget {
    /// The budget after `span`, in which this many requests arrived.
    #[must_use]
    pub fn after(self, span: Duration, requests: u64) -> Self {
        let by_time = u64::try_from(span.as_millis()).unwrap_or(u64::MAX).saturating_mul(PER_SECOND / 1_000);
        let earned = by_time.saturating_add(requests.saturating_mul(PER_REQUEST));
        Self { saved: self.saved.saturating_add(earned).min(MAX_SAVED) }
    }

    /// The budget after one more retry; `None` when it does not suffice.
    #[must_use]
    pub fn spend(self) -> Option<Self> {
        self.saved.checked_sub(RETRY_COST).map(|saved| Self { saved })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of consecutive retries that the budget allows.
    fn retries(mut budget: RetryBudget) -> u32 {
        let mut count = 0;
        while let Some(left) = budget.spend() {
            budget = left;
            count += 1;
        }
        count
    }

    #[test]
    fn a_single_request_may_be_retried() {
        assert_eq!(retries(RetryBudget::default()), 10);
    }

    #[test]
    fn retries_of_many_failures_are_bounded() {
        let mut budget = RetryBudget::default();
        let mut retried = 0;
        // A hundred thousand requests in ten seconds, all of which fail.
        for _ in 0..100_000 {
            budget = budget.after(Duration::from_micros(100), 1);
            if let Some(left) = budget.spend() {
                budget = left;
                retried += 1;
            }
        }
        assert!((19_000..=20_210).contains(&retried), "{retried}");
    }

    #[test]
    fn a_long_pause_earns_a_bounded_budget() {
        assert_eq!(retries(RetryBudget::default().after(Duration::MAX, u64::MAX)), 100);
    }
}
