//! The retry budget for failures that are independent of the key, shared by all requests.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::clock;
use crate::policy::retry_budget::RetryBudget;

/// Requests are counted without a lock; the lock is only taken for a retry.
#[derive(Debug)]
pub(super) struct SharedRetryBudget {
    requests: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    budget: RetryBudget,
    at: Instant,
    requests: u64,
}

impl SharedRetryBudget {
    pub(super) fn new() -> Self {
        let state = State { budget: RetryBudget::default(), at: clock::instant(), requests: 0 };
        Self { requests: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// Counts a request, which adds to the budget.
    pub(super) fn count(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes one retry from the budget, if one is left.
    pub(super) fn take(&self) -> bool {
        let (now, requests) = (clock::instant(), self.requests.load(Ordering::Relaxed));
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let span = now.saturating_duration_since(state.at);
        let budget = state.budget.after(span, requests.saturating_sub(state.requests));
        let spent = budget.spend();
        *state = State { budget: spent.unwrap_or(budget), at: now, requests };
        spent.is_some()
    }
}
