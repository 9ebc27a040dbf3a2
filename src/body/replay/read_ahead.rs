//! Reads a request body before an attempt sends it. The `proxy` module searches the start of the body for the cost and
//! the identifiers of the request, and waits for a short body before it reserves a key.

use std::future::poll_fn;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::Body;

use super::{Replay, ReplayState, SourceState, lock};
use crate::body::replay_buffer::join_chunks;
use crate::clock;
use crate::policy::min_rate::MinRate;

/// The start of a request body that has been received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BodyStart {
    /// The first bytes of the body.
    pub bytes: Bytes,
    /// Whether `bytes` is the complete body.
    pub is_complete: bool,
}

/// The reason why the wait for a short body ends before the body is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlowUploadError {
    /// The client sent no bytes within the idle timeout.
    Stalled,
    /// The client sends the body at less than the minimum rate.
    BelowMinRate,
}

impl<B> Replay<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// Reads the start of the body ahead, for at most `timeout`. Returns up to `max_bytes` of it, and nothing if the
    /// declared length exceeds `max_bytes`. An error of the body is returned by the attempt that sends the body, not by
    /// this method.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not lose bytes: the next attempt sends the bytes that were read.
    pub async fn peek_body(&self, max_bytes: usize, timeout: Duration) -> BodyStart {
        if self.length().is_some_and(|length| length > max_bytes as u64) {
            return BodyStart { bytes: Bytes::new(), is_complete: false };
        }
        let read_ahead = poll_fn(|cx| {
            let mut state = lock(&self.state);
            loop {
                if state.buffer.loss().is_some()
                    || state.buffer.bytes() > max_bytes as u64
                    || !state.try_reserve_read_ahead()
                {
                    return Poll::Ready(());
                }
                ready!(state.buffer.poll_capacity(cx));
                match ready!(state.poll_source(cx)) {
                    Some(Ok(data)) => state.read_ahead.push_back(data),
                    Some(Err(_)) | None => return Poll::Ready(()),
                }
            }
        });
        // After a timeout, the start consists of the bytes that were received before the timeout.
        let _ = tokio::time::timeout(timeout, read_ahead).await;
        let state = lock(&self.state);
        // `read_ahead` contains all received bytes, even if the replay buffer has dropped them.
        let bytes = match state.read_ahead.iter().collect::<Vec<_>>().as_slice() {
            [] => return buffered_start(&state, max_bytes),
            [chunk] => chunk.slice(..chunk.len().min(max_bytes)),
            chunks => join_chunks(chunks.iter().map(|chunk| &chunk[..]), max_bytes),
        };
        let is_complete =
            state.source_state == SourceState::Complete && bytes.len() as u64 == state.read_ahead_end();
        BodyStart { bytes, is_complete }
    }

    /// Reads the complete body ahead if its declared length is at most `max_bytes`. Returns immediately if
    /// the body is longer or has no declared length.
    ///
    /// # Errors
    ///
    /// Fails when no bytes arrive within `idle_timeout`, or when the client sends at less than `rate`.
    pub async fn wait_for_short_body(
        &self,
        max_bytes: usize,
        idle_timeout: Duration,
        rate: MinRate,
    ) -> Result<(), SlowUploadError> {
        if self.length().is_none_or(|length| length == 0 || length > max_bytes as u64) {
            return Ok(());
        }
        loop {
            let wait_start = clock::instant();
            let deadline = {
                let state = lock(&self.state);
                // If the body has not been polled yet, the wait for the client starts with this poll.
                let rate_deadline =
                    state.min_rate_deadline(rate).or_else(|| wait_start.checked_add(rate.timeout_after(0)?));
                let idle_deadline = state.last_received_at + idle_timeout;
                rate_deadline.map_or(idle_deadline, |deadline| deadline.min(idle_deadline))
            };
            self.peek_body(max_bytes, deadline.saturating_duration_since(wait_start)).await;
            let state = lock(&self.state);
            let is_waiting_for_client =
                state.source_state == SourceState::Pending && state.buffer.loss().is_none();
            if !is_waiting_for_client {
                return Ok(());
            }
            let now = clock::instant();
            if state.last_received_at + idle_timeout <= now {
                return Err(SlowUploadError::Stalled);
            }
            if state.min_rate_deadline(rate).is_some_and(|deadline| deadline <= now) {
                return Err(SlowUploadError::BelowMinRate);
            }
        }
    }
}

/// Returns up to `max_bytes` of the start of the body from the replay buffer.
pub(super) fn buffered_start<B>(state: &ReplayState<B>, max_bytes: usize) -> BodyStart {
    let bytes = state.buffer.start(max_bytes);
    let is_complete = state.source_state == SourceState::Complete
        && state.buffer.loss().is_none()
        && state.buffer.bytes() == bytes.len() as u64;
    BodyStart { bytes, is_complete }
}
