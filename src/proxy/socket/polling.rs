//! Polls everything that a session waits for: both directions, a reservation for text to speak, and
//! the timers. The directions take turns, so that a flood in one starves neither the other, nor the
//! timers, nor the other tasks of its worker.

use std::future::Future;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite};

use super::buffers::{READ_BYTES, ReadAhead, ReadResult};
use super::client_to_upstream::ClientMessage;
use super::poll_order::Direction;
use super::session::{Session, SessionEvent};
use super::session_end::{SessionEnd, SessionSide};
use crate::clock;
use crate::elevenlabs::socket::Dialect;
use crate::policy::frame::{StreamEnd, Violation};
use crate::proxy::socket_limits::SocketLimits;
use crate::upstream::Connect;

/// Maximum reads of one direction before the other has its turn: 128 KiB.
const READS_PER_TURN: u32 = 8;
/// Maximum bytes that are read from a client while the provider accepts none, so that a disconnect
/// is noticed.
const READ_AHEAD_BYTES: usize = 64 * 1024;

impl<C: Connect> Session<C> {
    pub(super) fn poll_event<S>(&mut self, cx: &mut Context<'_>, client: &mut S) -> Poll<SessionEvent>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        if self.poll_order.is_turn_over() {
            cx.waker().wake_by_ref();
            return self.poll_timer(cx);
        }
        if let Poll::Ready(result) = self.speech.poll_reservation(cx) {
            return Poll::Ready(SessionEvent::Reserved(result));
        }
        let mut has_more = false;
        for direction in self.poll_order.next() {
            let turn = match direction {
                Direction::Up => self.poll_up(cx, client),
                Direction::Down => self.poll_down(cx, client),
            };
            match turn {
                Poll::Ready(Some(event)) => return Poll::Ready(event),
                Poll::Ready(None) => has_more = true,
                Poll::Pending => {}
            }
        }
        if !self.reserve_memory_or_drop_opening() {
            return Poll::Ready(SessionEvent::Over(SessionEnd::NoMemory));
        }
        if let Poll::Ready(event) = self.poll_timer(cx) {
            return Poll::Ready(event);
        }
        self.poll_order.reset();
        if has_more {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Polls the client's direction for one turn. `None` when there is more to do.
    fn poll_up<S>(&mut self, cx: &mut Context<'_>, client: &mut S) -> Poll<Option<SessionEvent>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        if self.speech.is_waiting() {
            let (bytes_max, other_bytes) = (self.read_ahead_max(), self.other_capacity());
            let Self { from_client, share, .. } = self;
            let mut ahead = ReadAhead { bytes_max, share, other_bytes };
            return from_client
                .poll_watch(cx, client, &mut ahead)
                .map(|ending| Some(SessionEvent::Over(ending)));
        }
        for _ in 0..READS_PER_TURN {
            let sent = if self.is_upload_closed {
                Poll::Pending
            } else {
                self.to_upstream.poll_send(cx, &mut self.upstream)
            };
            match sent {
                Poll::Ready(Ok(())) => {
                    if let Some(event) = self.process_client_bytes() {
                        return Poll::Ready(Some(event));
                    }
                    if !self.to_upstream.bytes.is_empty() {
                        continue;
                    }
                }
                Poll::Ready(Err(_)) => self.is_upload_closed = true,
                Poll::Pending => {}
            }
            if self.is_upload_closed {
                // The provider's last messages may explain why; the client's bytes are dropped.
                (self.to_upstream.bytes, self.from_client.bytes) = Default::default();
                if let Some(ending) = self.from_client.ending() {
                    return Poll::Ready(Some(SessionEvent::Over(ending)));
                }
            } else if sent.is_pending() {
                // The frames before the violation cannot be forwarded.
                if let Some(violation) = self.from_client.violation() {
                    return Poll::Ready(Some(violated(violation)));
                }
                let ahead = self.from_client.bytes.len();
                if ahead >= READ_AHEAD_BYTES || (ahead >= READ_BYTES && !self.reserve_memory(READ_BYTES)) {
                    return Poll::Pending;
                }
            }
            if let Some(event) = ready!(self.poll_client(cx, client)) {
                return Poll::Ready(Some(event));
            }
        }
        Poll::Ready(None)
    }

    /// Processes bytes from the client.
    fn process_client_bytes(&mut self) -> Option<SessionEvent> {
        let is_metered = self.quota_check_at.is_some() && self.dialect == Dialect::Transcription;
        if is_metered && !self.from_client.bytes.is_empty() && !self.may_spend() {
            return Some(SessionEvent::Over(SessionEnd::Spent));
        }
        let message = self.client_to_upstream.take(&mut self.from_client.bytes, &mut self.to_upstream.bytes);
        self.keep_opening(0);
        match message {
            ClientMessage::Message(content) => return Some(SessionEvent::HeldMessage(content)),
            ClientMessage::Refused(violation) => return Some(violated(violation)),
            ClientMessage::Forwarded => {}
        }
        let held = self.from_client.bytes.len() + self.client_to_upstream.held_bytes();
        let max = self.limits().max_session_buffer;
        if held > max {
            return Some(violated(Violation::TooLarge));
        }
        if self.opening.as_ref().is_some_and(|opening| held + opening.len() > max) {
            self.opening = None;
        }
        // A violation ends the session after the frames before it were forwarded.
        let is_done = self.to_upstream.bytes.is_empty();
        self.from_client.violation().filter(|_| is_done).map(violated)
    }

    /// Reads once from the client; returns an event when it has disconnected.
    fn poll_client<S: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut S,
    ) -> Poll<Option<SessionEvent>> {
        let read = self.from_client.poll_read(cx, client);
        if read.is_pending() {
            self.to_upstream.free_if_empty();
        }
        Poll::Ready(match ready!(read) {
            ReadResult::Some if !self.is_upload_closed => {
                self.active_at = clock::instant();
                None
            }
            ReadResult::Some | ReadResult::Dropped => None,
            ReadResult::Gone => Some(SessionEvent::Over(SessionEnd::ClientLeft)),
        })
    }

    /// Polls the provider's direction for one turn. `None` when there is more to do.
    fn poll_down<S>(&mut self, cx: &mut Context<'_>, client: &mut S) -> Poll<Option<SessionEvent>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        for _ in 0..READS_PER_TURN {
            if ready!(self.to_client.poll_send(cx, client)).is_err() {
                return Poll::Ready(Some(SessionEvent::Over(SessionEnd::ClientLeft)));
            }
            if let Some(event) =
                self.upstream_to_client.take(&mut self.from_upstream.bytes, &mut self.to_client.bytes)
            {
                return Poll::Ready(Some(SessionEvent::Upstream(event)));
            }
            if !self.to_client.bytes.is_empty() {
                continue;
            }
            if let Some(violation) = self.from_upstream.violation() {
                return Poll::Ready(Some(SessionEvent::Over(SessionEnd::Violated(
                    violation,
                    SessionSide::Upstream,
                ))));
            }
            let read = self.from_upstream.poll_read(cx, &mut self.upstream);
            if read.is_pending() {
                self.to_client.free_if_empty();
            }
            match ready!(read) {
                ReadResult::Some => {
                    self.active_at = clock::instant();
                    self.speech.record_activity(self.active_at);
                }
                ReadResult::Dropped => {}
                ReadResult::Gone if self.upstream_to_client.has_closed() => {
                    return Poll::Ready(Some(SessionEvent::Over(SessionEnd::Closed)));
                }
                ReadResult::Gone => return Poll::Ready(Some(SessionEvent::Over(SessionEnd::UpstreamBroke))),
            }
        }
        Poll::Ready(None)
    }

    /// Polls one timer for all deadlines. It is set again when it expires, and not with every byte.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<SessionEvent> {
        let limits = self.limits();
        loop {
            let now = clock::instant();
            if self.quota_check_at.is_some_and(|at| at <= now) {
                if !self.may_spend() {
                    return Poll::Ready(SessionEvent::Over(SessionEnd::Spent));
                }
                self.quota_check_at = Some(now + limits.quota_check_interval);
            }
            let deadlines = self.deadlines(&limits, now);
            for (at, event) in &deadlines {
                if at.is_some_and(|at| at <= now) {
                    return Poll::Ready(event.event());
                }
            }
            let deadlines = deadlines.into_iter().map(|(at, _)| at).chain([self.quota_check_at]);
            let Some(next) = deadlines.flatten().min() else { return Poll::Pending };
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(next.into())));
            // A later deadline is noticed when the timer expires; an earlier one must be set.
            if timer.is_elapsed() || timer.deadline() > next.into() {
                timer.as_mut().reset(next.into());
            }
            ready!(timer.as_mut().poll(cx));
        }
    }

    /// The deadlines of the session, if nothing is received until then, with their events.
    fn deadlines(&mut self, limits: &SocketLimits, now: Instant) -> [(Option<Instant>, TimerEvent); 4] {
        let SocketLimits {
            idle_timeout: idle_max,
            max_session_duration: lifetime_max,
            speech_idle_timeout: speech_idle_max,
            close_timeout: close_max,
            ..
        } = *limits;
        let is_idle = !idle_max.is_zero() && !self.is_queued;
        let closed_by_client = matches!(self.from_client.end(), Some(StreamEnd::Closed { .. }));
        let has_client_closed = closed_by_client || self.client_to_upstream.has_closed();
        let closing_at = match (has_client_closed, self.upstream_to_client.has_closed()) {
            (true, true) => Some(*self.closed_at.get_or_insert(now) + close_max),
            (true, false) | (false, true) => Some(self.active_at + close_max),
            (false, false) => None,
        };
        let idle_at = self.attempt.has_slot().then(|| self.speech.idle_at(speech_idle_max)).flatten();
        [
            (idle_at, TimerEvent::SpeechIdle),
            (closing_at, TimerEvent::End(SessionEnd::Closed)),
            (is_idle.then(|| self.active_at + idle_max), TimerEvent::End(SessionEnd::Idle)),
            ((!lifetime_max.is_zero()).then(|| self.began + lifetime_max), TimerEvent::End(SessionEnd::Old)),
        ]
    }
}

/// The event of a deadline.
#[derive(Clone, Copy)]
enum TimerEvent {
    SpeechIdle,
    End(SessionEnd),
}

impl TimerEvent {
    fn event(self) -> SessionEvent {
        match self {
            Self::SpeechIdle => SessionEvent::SpeechIdle,
            Self::End(ending) => SessionEvent::Over(ending),
        }
    }
}

fn violated(violation: Violation) -> SessionEvent {
    SessionEvent::Over(SessionEnd::Violated(violation, SessionSide::Client))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both directions and the timers are polled within tokio's budget of a task: a resource that
    /// is polled after the budget is used up returns pending, even if it is ready.
    #[test]
    fn one_turn_of_both_directions_is_within_the_budget_of_a_task() {
        const BUDGET: u32 = 128;
        const CALLS_PER_READ: u32 = 3;
        const { assert!(2 * READS_PER_TURN * CALLS_PER_READ < BUDGET) };
    }
}
