//! Polls the event sources of a session: both directions, the reservation for text, and the timers. Each source is
//! polled within the limits of `poll_order`, so that none of them starves the others. A direction is polled in turns of
//! up to [`MAX_READS_PER_TURN`] reads.

use std::future::Future;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite};

use super::buffers::{MAX_READ_SIZE, ReadAheadLimits, ReadResult};
use super::client_to_upstream::ClientMessage;
use super::poll_order::Direction;
use super::session::{Session, SessionEvent};
use super::session_end::{SessionEnd, SessionSide};
use crate::clock;
use crate::elevenlabs::socket::Dialect;
use crate::policy::websocket_frame::{StreamEnd, Violation};
use crate::proxy::socket_limits::SocketLimits;
use crate::upstream::Connect;

/// Maximum number of reads of one direction before the other direction is polled. Together, these reads return at
/// most 128 KiB.
const MAX_READS_PER_TURN: u32 = 8;
/// Maximum number of bytes that are read from the client while the provider accepts no bytes, so that a
/// disconnect is detected.
const MAX_READ_AHEAD: usize = 64 * 1024;

impl<C: Connect> Session<C> {
    /// Polls for the next event of the session.
    pub(super) fn poll_event<S>(&mut self, cx: &mut Context<'_>, client: &mut S) -> Poll<SessionEvent>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let is_turn_over = self.poll_order.count_event();
        if is_turn_over {
            cx.waker().wake_by_ref();
            return self.poll_timer(cx);
        }
        if let Poll::Ready(reservation_result) = self.speech.poll_reservation(cx) {
            return Poll::Ready(SessionEvent::Reserved(reservation_result));
        }
        let mut has_more = false;
        for direction in self.poll_order.next_order() {
            let turn_poll = match direction {
                Direction::ToUpstream => self.poll_to_upstream(cx, client),
                Direction::ToClient => self.poll_to_client(cx, client),
            };
            match turn_poll {
                Poll::Ready(Some(event)) => return Poll::Ready(event),
                Poll::Ready(None) => has_more = true,
                Poll::Pending => {}
            }
        }
        if !self.reserve_memory_or_drop_opening() {
            return Poll::Ready(SessionEvent::End(SessionEnd::BuffersFull));
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

    /// Polls the direction from the client to the provider for one turn. Returns `Ready(None)` if more bytes
    /// may be available.
    fn poll_to_upstream<S>(&mut self, cx: &mut Context<'_>, client: &mut S) -> Poll<Option<SessionEvent>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        if self.speech.reservation.is_some() {
            let (max_bytes, other_bytes) = (self.max_read_ahead(), self.other_capacity());
            let Self { from_client, reservation, .. } = self;
            let mut limits = ReadAheadLimits { max_bytes, reservation, other_bytes };
            return from_client
                .poll_read_ahead(cx, client, &mut limits)
                .map(|end| Some(SessionEvent::End(end)));
        }
        for _ in 0..MAX_READS_PER_TURN {
            let send_poll = if self.is_upload_closed {
                Poll::Pending
            } else {
                self.to_upstream.poll_send(cx, &mut self.upstream)
            };
            match send_poll {
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
                // The provider's last messages may explain why the upload was closed. The client's bytes are
                // dropped.
                (self.to_upstream.bytes, self.from_client.bytes) = Default::default();
                if let Some(end) = self.from_client.client_end() {
                    return end_session(end);
                }
            } else if send_poll.is_pending() {
                // The frames before the violation cannot be forwarded.
                if let Some(violation) = self.from_client.violation() {
                    return Poll::Ready(Some(client_violation(violation)));
                }
                let buffered_bytes = self.from_client.bytes.len();
                if buffered_bytes >= MAX_READ_AHEAD
                    || (buffered_bytes >= MAX_READ_SIZE && !self.reserve_memory(MAX_READ_SIZE))
                {
                    return Poll::Pending;
                }
            }
            if let Some(event) = ready!(self.poll_read_client(cx, client)) {
                return Poll::Ready(Some(event));
            }
        }
        Poll::Ready(None)
    }

    /// Processes the buffered bytes of the client. Returns an event that the session must handle, if any.
    fn process_client_bytes(&mut self) -> Option<SessionEvent> {
        let is_metered = self.quota_check_at.is_some() && self.dialect == Dialect::Transcription;
        if is_metered
            && !self.from_client.bytes.is_empty()
            && let Some(owner) = self.exhausted_quota()
        {
            return Some(SessionEvent::End(SessionEnd::QuotaExceeded(owner)));
        }
        let message =
            self.client_to_upstream.process_input(&mut self.from_client.bytes, &mut self.to_upstream.bytes);
        self.extend_opening_messages(0);
        match message {
            ClientMessage::Held(content) => return Some(SessionEvent::HeldMessage(content)),
            ClientMessage::Refused(violation) => return Some(client_violation(violation)),
            ClientMessage::Forwarded => {}
        }
        let buffered_bytes = self.from_client.bytes.len() + self.client_to_upstream.held_bytes();
        let max_size = self.limits().max_session_buffer;
        if buffered_bytes > max_size {
            return Some(client_violation(Violation::TooLarge));
        }
        if self.opening_messages.as_ref().is_some_and(|messages| buffered_bytes + messages.len() > max_size) {
            self.opening_messages = None;
        }
        // A violation ends the session after the preceding frames are forwarded.
        let is_forwarded = self.to_upstream.bytes.is_empty();
        self.from_client.violation().filter(|_| is_forwarded).map(client_violation)
    }

    /// Reads once from the client. Returns an event if the client has disconnected.
    fn poll_read_client<S: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut S,
    ) -> Poll<Option<SessionEvent>> {
        let read = self.from_client.poll_read(cx, client);
        if read.is_pending() {
            self.to_upstream.free_if_empty();
        }
        Poll::Ready(match ready!(read) {
            ReadResult::Bytes if !self.is_upload_closed => {
                self.last_activity = clock::instant();
                None
            }
            ReadResult::Bytes | ReadResult::Dropped => None,
            ReadResult::Disconnected => Some(SessionEvent::End(SessionEnd::ClientDisconnected)),
        })
    }

    /// Polls the direction from the provider to the client for one turn. Returns `Ready(None)` if more bytes
    /// may be available.
    fn poll_to_client<S>(&mut self, cx: &mut Context<'_>, client: &mut S) -> Poll<Option<SessionEvent>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        for _ in 0..MAX_READS_PER_TURN {
            if ready!(self.to_client.poll_send(cx, client)).is_err() {
                return end_session(SessionEnd::ClientDisconnected);
            }
            if let Some(event) = self
                .upstream_to_client
                .process_input(&mut self.from_upstream.bytes, &mut self.to_client.bytes)
            {
                return Poll::Ready(Some(SessionEvent::Upstream(event)));
            }
            if !self.to_client.bytes.is_empty() {
                continue;
            }
            if let Some(violation) = self.from_upstream.violation() {
                return end_session(SessionEnd::Violated(violation, SessionSide::Upstream));
            }
            let read = self.from_upstream.poll_read(cx, &mut self.upstream);
            if read.is_pending() {
                self.to_client.free_if_empty();
            }
            match ready!(read) {
                ReadResult::Bytes => {
                    self.last_activity = clock::instant();
                    self.speech.record_activity(self.last_activity);
                }
                ReadResult::Dropped => {}
                ReadResult::Disconnected if self.upstream_to_client.has_closed => {
                    return end_session(SessionEnd::Closed);
                }
                ReadResult::Disconnected => return end_session(SessionEnd::UpstreamReset),
            }
        }
        Poll::Ready(None)
    }

    /// Polls the single timer for all deadlines. The timer is reset when it expires, and not for every byte.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<SessionEvent> {
        let limits = self.limits();
        loop {
            let now = clock::instant();
            if self.quota_check_at.is_some_and(|at| at <= now) {
                if let Some(owner) = self.exhausted_quota() {
                    return Poll::Ready(SessionEvent::End(SessionEnd::QuotaExceeded(owner)));
                }
                self.quota_check_at = Some(now + limits.quota_check_interval);
            }
            let deadlines = self.deadlines(&limits, now);
            let next_deadline = deadlines.iter().filter_map(|(at, _)| *at).chain(self.quota_check_at).min();
            if let Some((_, event)) = deadlines.into_iter().find(|(at, _)| at.is_some_and(|at| at <= now)) {
                return Poll::Ready(event);
            }
            let Some(next_deadline) = next_deadline else { return Poll::Pending };
            let timer =
                self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(next_deadline.into())));
            // If the next deadline has become later, the timer is reset when it expires. If the deadline has become
            // earlier, the timer is reset immediately.
            if timer.is_elapsed() || timer.deadline() > next_deadline.into() {
                timer.as_mut().reset(next_deadline.into());
            }
            ready!(timer.as_mut().poll(cx));
        }
    }

    /// Returns the deadlines of the session with their events. Data that is received later may move a deadline.
    fn deadlines(&mut self, limits: &SocketLimits, now: Instant) -> [(Option<Instant>, SessionEvent); 4] {
        let SocketLimits { idle_timeout, max_session_duration, speech_idle_timeout, close_timeout, .. } =
            *limits;
        let speech_idle_at = self.attempt.has_slot().then_some(self.speech.last_activity).flatten();
        let is_closed_by_client = matches!(self.from_client.stream_end(), Some(StreamEnd::Closed { .. }))
            || self.client_to_upstream.has_closed;
        let close_at = match (is_closed_by_client, self.upstream_to_client.has_closed) {
            (true, true) => Some(*self.closed_at.get_or_insert(now) + close_timeout),
            (true, false) | (false, true) => Some(self.last_activity + close_timeout),
            (false, false) => None,
        };
        let has_idle_timeout = !idle_timeout.is_zero() && !self.is_queued;
        let has_max_duration = !max_session_duration.is_zero();
        [
            (speech_idle_at.map(|at| at + speech_idle_timeout), SessionEvent::SpeechIdle),
            (close_at, SessionEvent::End(SessionEnd::Closed)),
            (
                has_idle_timeout.then(|| self.last_activity + idle_timeout),
                SessionEvent::End(SessionEnd::Idle),
            ),
            (
                has_max_duration.then(|| self.started_at + max_session_duration),
                SessionEvent::End(SessionEnd::MaxDuration),
            ),
        ]
    }
}

/// Returns the event that ends the session for the reason `end`.
fn end_session(end: SessionEnd) -> Poll<Option<SessionEvent>> {
    Poll::Ready(Some(SessionEvent::End(end)))
}

/// Returns the event that ends the session because the client violates the protocol.
fn client_violation(violation: Violation) -> SessionEvent {
    SessionEvent::End(SessionEnd::Violated(violation, SessionSide::Client))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After tokio's task budget is exhausted, each resource returns `Pending`, even if it is ready. Both directions
    /// and the timers must therefore be polled within that budget.
    #[test]
    fn one_turn_of_both_directions_fits_into_the_task_budget() {
        const TASK_BUDGET: u32 = 128;
        const CALLS_PER_READ: u32 = 3;
        const { assert!(2 * MAX_READS_PER_TURN * CALLS_PER_READ < TASK_BUDGET) };
    }
}
