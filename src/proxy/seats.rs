//! How many requests are under way at once, from their heads to the ends of their answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the requests under way. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Seats(Arc<AtomicUsize>);

/// There are as many requests under way as there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many requests are under way")]
pub struct NoSeat;

/// A request under way, until it is dropped.
#[derive(Debug)]
pub(super) struct Seat(Arc<AtomicUsize>);

impl Seats {
    /// A seat, unless `requests_max` are taken.
    pub(super) fn take(&self, requests_max: usize) -> Result<Seat, NoSeat> {
        let seat = Seat(Arc::clone(&self.0));
        if self.0.fetch_add(1, Ordering::AcqRel) < requests_max { Ok(seat) } else { Err(NoSeat) }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seat_is_free_again_when_its_request_ends() {
        let seats = Seats::default();
        let first = seats.take(2).unwrap();
        let second = seats.take(2).unwrap();
        for _ in 0..3 {
            assert_eq!(seats.take(2).unwrap_err(), NoSeat);
        }
        drop(first);
        assert!(seats.take(2).is_ok());
        drop(second);
        assert_eq!(seats.0.load(Ordering::Acquire), 0);
    }
}
