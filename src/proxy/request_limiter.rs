//! Limits the requests in progress of all clients. A request counts from its head to the end of its response.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The counter of requests in progress. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct RequestLimiter(Arc<AtomicUsize>);

/// The error for a request beyond the maximum number of requests in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the maximum number of requests is in progress")]
pub struct Overloaded;

/// Counts one request in progress until it is dropped.
#[derive(Debug)]
pub(super) struct RequestPermit(Arc<AtomicUsize>);

impl RequestLimiter {
    /// Returns a permit, unless `max_requests` permits are in use.
    pub(super) fn try_acquire(&self, max_requests: usize) -> Result<RequestPermit, Overloaded> {
        let permit = RequestPermit(Arc::clone(&self.0));
        if self.0.fetch_add(1, Ordering::AcqRel) < max_requests { Ok(permit) } else { Err(Overloaded) }
    }
}

impl Drop for RequestPermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permit_becomes_available_when_a_request_ends() {
        let limiter = RequestLimiter::default();
        let first = limiter.try_acquire(2).unwrap();
        let second = limiter.try_acquire(2).unwrap();
        for _ in 0..3 {
            assert_eq!(limiter.try_acquire(2).unwrap_err(), Overloaded);
        }
        drop(first);
        assert!(limiter.try_acquire(2).is_ok());
        drop(second);
        assert_eq!(limiter.0.load(Ordering::Acquire), 0);
    }
}
