//! The order in which a session polls its two directions: they take turns, so that a flood in one starves
//! neither the other nor the timers.

/// Maximum events in a row before the timers are polled and other tasks run: one read can contain
/// thousands of small messages.
const EVENTS_PER_TURN: u32 = 64;

/// The order of the directions, and the events since the last wait.
#[derive(Debug, Default)]
pub(super) struct PollOrder {
    /// Whether the provider's direction was polled first the last time.
    was_down_first: bool,
    /// Events since the session last waited.
    events: u32,
}

/// A direction of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the client to the provider.
    Up,
    /// From the provider to the client.
    Down,
}

impl PollOrder {
    /// Counts an event; returns whether timers and other tasks have their turn now.
    pub(super) fn is_turn_over(&mut self) -> bool {
        self.events += 1;
        let is_turn_over = self.events > EVENTS_PER_TURN;
        if is_turn_over {
            self.events = 0;
        }
        is_turn_over
    }

    /// The order for this poll: the direction that was second is first.
    pub(super) fn next(&mut self) -> [Direction; 2] {
        self.was_down_first = !self.was_down_first;
        if self.was_down_first { [Direction::Down, Direction::Up] } else { [Direction::Up, Direction::Down] }
    }

    /// Resets the count, because nothing more is ready.
    pub(super) fn reset(&mut self) {
        self.events = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directions_are_first_in_turn() {
        let mut order = PollOrder::default();
        let firsts: Vec<Direction> = (0..4).map(|_| order.next()[0]).collect();
        assert_eq!(firsts, [Direction::Down, Direction::Up, Direction::Down, Direction::Up]);
        assert!((0..4).all(|_| order.next()[0] != order.next()[0]));
    }

    #[test]
    fn endless_events_yield_to_other_tasks() {
        let mut order = PollOrder::default();
        for _ in 0..3 {
            let events = (0..).take_while(|_| !order.is_turn_over()).count();
            assert_eq!(events, EVENTS_PER_TURN as usize);
        }
        assert!(!order.is_turn_over());
        order.reset();
        assert_eq!((0..).take_while(|_| !order.is_turn_over()).count(), EVENTS_PER_TURN as usize);
    }
}
