//! Decides whether a lookup may be sent. A lookup is a query to Redis for which a client's request waits. The decision
//! is that of a circuit breaker: a request waits only while Redis is expected to reply within `redis.wait_timeout`.
//! Three consecutive lookups without a reply open the breaker. A beat is a regular round trip to Redis for which no
//! request waits. After a slow beat, one lookup without a reply opens the breaker. A fast beat and the reply to a
//! lookup close it.

use std::sync::atomic::{AtomicU32, Ordering};

/// The number of consecutive lookups without a reply after which no lookup is sent until a beat is fast enough.
const MAX_FAILED_LOOKUPS: u32 = 3;
/// The count of failed lookups at which one more failure opens the breaker. At this count, only one lookup is sent at a
/// time, so that only one request waits for a slow Redis.
const ONE_LOOKUP_LEFT: u32 = MAX_FAILED_LOOKUPS - 1;

/// The state of the breaker: the number of consecutive lookups without a reply.
#[derive(Debug, Default)]
pub(super) struct LookupBreaker {
    failed_lookups: AtomicU32,
}

impl LookupBreaker {
    /// Returns whether a lookup may be sent. The caller must record whether it got a reply. If only one lookup is left,
    /// and the caller records nothing because its client has disconnected, the breaker stays open until the next fast
    /// beat.
    pub(super) fn try_start(&self) -> bool {
        match self.failed_lookups.load(Ordering::Relaxed) {
            ..ONE_LOOKUP_LEFT => true,
            ONE_LOOKUP_LEFT => self
                .failed_lookups
                .compare_exchange(ONE_LOOKUP_LEFT, MAX_FAILED_LOOKUPS, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok(),
            MAX_FAILED_LOOKUPS.. => false,
        }
    }

    /// Records that the reply to a lookup arrived within `redis.wait_timeout`.
    pub(super) fn record_reply(&self) {
        self.failed_lookups.store(0, Ordering::Relaxed);
    }

    /// Records a lookup without a reply.
    pub(super) fn record_failure(&self) {
        self.failed_lookups.fetch_add(1, Ordering::Relaxed);
    }

    /// Records a beat, and whether its round trip was shorter than `redis.wait_timeout`. A lookup would have waited as
    /// long as the beat, so after a slow beat only one lookup at a time is sent.
    pub(super) fn record_beat(&self, is_fast: bool) {
        if is_fast {
            self.record_reply();
        } else {
            self.failed_lookups.fetch_max(ONE_LOOKUP_LEFT, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_breaker_opens_after_three_consecutive_failures() {
        let breaker = LookupBreaker::default();
        for _ in 0..2 {
            assert!(breaker.try_start(), "a lookup must be sent after fewer than three failures");
            breaker.record_failure();
        }
        breaker.record_reply();
        for _ in 0..3 {
            assert!(breaker.try_start(), "a reply must reset the count of failures");
            breaker.record_failure();
        }
        assert!(!breaker.try_start(), "three consecutive failures must open the breaker");
        breaker.record_beat(true);
        assert!(breaker.try_start(), "a fast beat must close the breaker");
    }

    #[test]
    fn one_lookup_at_a_time_is_sent_after_a_slow_beat() {
        let breaker = LookupBreaker::default();
        breaker.record_beat(false);
        assert!(breaker.try_start(), "one lookup must be sent after a slow beat");
        assert!(!breaker.try_start(), "no other lookup must be sent before the reply to the first");
        breaker.record_reply();
        assert!(breaker.try_start() && breaker.try_start(), "the reply must close the breaker");

        breaker.record_beat(false);
        assert!(breaker.try_start(), "one lookup must be sent after a slow beat");
        breaker.record_failure();
        breaker.record_beat(false);
        assert!(!breaker.try_start(), "another slow beat must not close the breaker");
    }

    #[test]
    fn concurrent_failures_leave_the_breaker_open() {
        let breaker = LookupBreaker::default();
        assert!((0..10).all(|_| breaker.try_start()), "concurrent lookups must be sent while Redis responds");
        for _ in 0..10 {
            breaker.record_failure();
        }
        assert!(!breaker.try_start(), "ten failures must open the breaker");
    }
}
