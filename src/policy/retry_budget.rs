//! Limits the rate of retries whose cause is not a key. If all requests fail at the same time, retries of all of them
//! would double the load on the provider.

use std::time::Duration;

/// The budget that each request adds, in thousandths of a retry.
const EARNED_PER_REQUEST: u64 = 200;
/// The budget that each second adds regardless of the traffic, in thousandths of a retry, so that a single request can
/// be retried.
const EARNED_PER_SECOND: u64 = 10_000;
/// Maximum budget in thousandths of a retry, which ten seconds without a retry earn.
const MAX_BALANCE: u64 = 100_000;
/// The budget that a retry spends, in thousandths of a retry.
const RETRY_COST: u64 = 1_000;

/// The remaining budget for retries. Requests and time replenish it, and each retry spends a part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryBudget {
    /// The remaining budget in thousandths of a retry.
    balance: u64,
}

impl Default for RetryBudget {
    /// Returns the budget that one second earns.
    fn default() -> Self {
        Self { balance: EARNED_PER_SECOND }
    }
}

impl RetryBudget {
    /// Returns the budget after `elapsed`, during which `requests` requests were received.
    #[must_use]
    pub fn replenish(self, elapsed: Duration, requests: u64) -> Self {
        let earned_by_time =
            u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).saturating_mul(EARNED_PER_SECOND / 1_000);
        let earned = earned_by_time.saturating_add(requests.saturating_mul(EARNED_PER_REQUEST));
        Self { balance: self.balance.saturating_add(earned).min(MAX_BALANCE) }
    }

    /// Returns the budget after a retry, or `None` if the budget does not suffice.
    #[must_use]
    pub fn spend(self) -> Option<Self> {
        self.balance.checked_sub(RETRY_COST).map(|balance| Self { balance })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts the consecutive retries that the budget allows.
    fn count_retries(mut budget: RetryBudget) -> u32 {
        let mut count = 0;
        while let Some(remaining) = budget.spend() {
            budget = remaining;
            count += 1;
        }
        count
    }

    #[test]
    fn a_single_request_may_be_retried() {
        assert_eq!(count_retries(RetryBudget::default()), 10);
    }

    #[test]
    fn retries_of_many_failures_are_bounded() {
        let mut budget = RetryBudget::default();
        let mut retried = 0;
        // A hundred thousand requests arrive within ten seconds, and all of them fail.
        for _ in 0..100_000 {
            budget = budget.replenish(Duration::from_micros(100), 1);
            if let Some(remaining) = budget.spend() {
                budget = remaining;
                retried += 1;
            }
        }
        assert!(
            (19_000..=20_210).contains(&retried),
            "a fifth of the requests must be retried, not {retried}"
        );
    }

    #[test]
    fn a_long_pause_earns_a_bounded_budget() {
        assert_eq!(count_retries(RetryBudget::default().replenish(Duration::MAX, u64::MAX)), 100);
    }
}
