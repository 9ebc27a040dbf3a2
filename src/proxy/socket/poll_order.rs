//! Divides the time of a session fairly. It alternates the direction that is polled first, and limits the number of
//! events before other tasks run. A flood in one direction thus starves neither the other direction nor the timers.

/// Maximum number of consecutive events before the timers are polled and other tasks run. One read can contain
/// thousands of small messages.
const MAX_EVENTS_PER_TURN: u32 = 64;

/// The polling order of the directions, and the number of consecutive events.
#[derive(Debug, Default)]
pub(super) struct PollOrder {
    /// Whether the last poll started with the direction to the client.
    was_to_client_first: bool,
    /// Events since the session last waited or let other tasks run.
    events: u32,
}

/// A direction of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the client to the provider.
    ToUpstream,
    /// From the provider to the client.
    ToClient,
}

impl PollOrder {
    /// Counts an event. Returns whether timers and other tasks must run before the next event.
    pub(super) fn count_event(&mut self) -> bool {
        self.events += 1;
        let is_turn_over = self.events > MAX_EVENTS_PER_TURN;
        if is_turn_over {
            self.events = 0;
        }
        is_turn_over
    }

    /// Returns the order for the next poll, which is the reverse of the previous order.
    pub(super) fn next_order(&mut self) -> [Direction; 2] {
        self.was_to_client_first = !self.was_to_client_first;
        if self.was_to_client_first {
            [Direction::ToClient, Direction::ToUpstream]
        } else {
            [Direction::ToUpstream, Direction::ToClient]
        }
    }

    /// Resets the count, because the session waits for its next event.
    pub(super) fn reset(&mut self) {
        self.events = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directions_alternate() {
        let mut order = PollOrder::default();
        let firsts: Vec<Direction> = (0..4).map(|_| order.next_order()[0]).collect();
        assert_eq!(
            firsts,
            [Direction::ToClient, Direction::ToUpstream, Direction::ToClient, Direction::ToUpstream]
        );
        assert!((0..4).all(|_| order.next_order()[0] != order.next_order()[0]));
    }

    #[test]
    fn endless_events_yield_to_other_tasks() {
        let mut order = PollOrder::default();
        for _ in 0..3 {
            let events = (0..).take_while(|_| !order.count_event()).count();
            assert_eq!(events, MAX_EVENTS_PER_TURN as usize);
        }
        assert!(!order.count_event());
        order.reset();
        assert_eq!((0..).take_while(|_| !order.count_event()).count(), MAX_EVENTS_PER_TURN as usize);
    }
}
