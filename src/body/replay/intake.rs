//! Reads a body before it is sent, to inspect it and to reserve a key only when a short body is
//! complete.

use std::future::poll_fn;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::Body;

use super::{Replay, SourceState, lock, start};
use crate::body::replay_buffer::joined;
use crate::clock;
use crate::policy::min_rate::MinRate;

/// The reason why the proxy stops waiting for a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slow {
    /// No bytes arrived within the idle timeout.
    Stalled,
    /// The bytes arrive more slowly than the minimum rate.
    Trickles,
}

impl<B> Replay<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// Buffers the body without sending it, up to `bytes_max` bytes and for at most `span`; returns the
    /// buffered start, and whether the body is complete. An error of the body ends the
    /// buffering and is not returned: the attempt that sends the body fails with it.
    pub async fn peek_body(&self, bytes_max: usize, span: Duration) -> (Bytes, bool) {
        if self.length().is_some_and(|length| length > bytes_max as u64) {
            return (Bytes::new(), false);
        }
        let reading_ahead = poll_fn(|cx| {
            let mut shared = lock(&self.shared);
            loop {
                if shared.buffer.loss().is_some()
                    || shared.buffer.bytes() > bytes_max as u64
                    || !shared.covers_read_ahead()
                {
                    return Poll::Ready(());
                }
                ready!(shared.buffer.poll_capacity(cx));
                match ready!(shared.poll_source(cx)) {
                    Some(Ok(piece)) => shared.read_ahead.push_back(piece),
                    Some(Err(_)) | None => return Poll::Ready(()),
                }
            }
        });
        // After a timeout, the start consists of the pieces received so far.
        let _ = tokio::time::timeout(span, reading_ahead).await;
        let shared = lock(&self.shared);
        // The pieces read ahead are complete, whether or not the replay buffer could keep them.
        let start: Bytes = match shared.read_ahead.iter().collect::<Vec<_>>().as_slice() {
            [] => return start(&shared, bytes_max),
            [only] => only.slice(..only.len().min(bytes_max)),
            pieces => joined(pieces.iter().map(|piece| &piece[..]), bytes_max),
        };
        let is_whole =
            shared.source_state == SourceState::Complete && start.len() as u64 == shared.read_ahead_end();
        (start, is_whole)
    }

    /// Reads a body whose announced length is at most `bytes_max`, before it is sent. A longer body, and one
    /// without an announced length, is left to the attempt.
    ///
    /// # Errors
    ///
    /// When the client sends nothing for `idle_max`, or sends more slowly than `rate`.
    pub async fn wait_for_short_body(
        &self,
        bytes_max: usize,
        idle_max: Duration,
        rate: MinRate,
    ) -> Result<(), Slow> {
        if self.length().is_none_or(|length| length == 0 || length > bytes_max as u64) {
            return Ok(());
        }
        loop {
            let now = clock::instant();
            let due = {
                let shared = lock(&self.shared);
                // The rate applies from the first poll of the body on.
                let slow_at = shared.slow_at(rate).or_else(|| now.checked_add(rate.due(0)?));
                let idle_at = shared.arrived_at + idle_max;
                slow_at.map_or(idle_at, |slow_at| slow_at.min(idle_at))
            };
            self.peek_body(bytes_max, due.saturating_duration_since(now)).await;
            let shared = lock(&self.shared);
            let is_waiting = shared.source_state == SourceState::Pending && shared.buffer.loss().is_none();
            let now = clock::instant();
            if !is_waiting {
                return Ok(());
            }
            if shared.arrived_at + idle_max <= now {
                return Err(Slow::Stalled);
            }
            if shared.slow_at(rate).is_some_and(|slow_at| slow_at <= now) {
                return Err(Slow::Trickles);
            }
        }
    }
}
