//! Counts the requests and the retries of all requests against one budget. The budget limits the retries after
//! failures that are independent of the key. [`crate::policy::retry_budget`] decides how the budget grows and is
//! spent.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::clock;
use crate::policy::retry_budget::RetryBudget;

/// The shared retry budget. Requests are counted without a lock. Only a retry takes the lock.
#[derive(Debug)]
pub(super) struct SharedRetryBudget {
    requests: AtomicU64,
    state: Mutex<BudgetState>,
}

#[derive(Debug)]
struct BudgetState {
    budget: RetryBudget,
    updated_at: Instant,
    /// The request count at `updated_at`.
    requests: u64,
}

impl SharedRetryBudget {
    pub(super) fn new() -> Self {
        let state = BudgetState { budget: RetryBudget::default(), updated_at: clock::instant(), requests: 0 };
        Self { requests: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// Counts a request, which adds to the budget.
    pub(super) fn count_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes one retry from the budget. Returns whether the budget allowed it.
    pub(super) fn try_take(&self) -> bool {
        let (now, requests) = (clock::instant(), self.requests.load(Ordering::Relaxed));
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = now.saturating_duration_since(state.updated_at);
        let budget = state.budget.replenish(elapsed, requests.saturating_sub(state.requests));
        let remaining_budget = budget.spend();
        *state = BudgetState { budget: remaining_budget.unwrap_or(budget), updated_at: now, requests };
        remaining_budget.is_some()
    }
}
