//! Reads a request body before an attempt sends it: to inspect its start, and to wait for a short body before
//! a key is reserved.

use std::future::poll_fn;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::Body;

use super::{Replay, SourceState, buffered_start, lock};
use crate::body::replay_buffer::join_chunks;
use crate::clock;
use crate::policy::min_rate::MinRate;

/// The reason why the proxy stops waiting for a short body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlowUpload {
    /// No bytes arrived within the idle timeout.
    Stalled,
    /// The bytes arrive below the minimum rate.
    BelowMinRate,
}

impl<B> Replay<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// Reads up to `max_bytes` of the body ahead, for at most `timeout`. Returns the start of the body, and
    /// whether it is the complete body. An error of the body is not returned here, but by the attempt that
    /// sends the body.
    pub async fn peek_body(&self, max_bytes: usize, timeout: Duration) -> (Bytes, bool) {
        if self.length().is_some_and(|length| length > max_bytes as u64) {
            return (Bytes::new(), false);
        }
        let read_ahead = poll_fn(|cx| {
            let mut shared = lock(&self.shared);
            loop {
                if shared.buffer.loss().is_some()
                    || shared.buffer.bytes() > max_bytes as u64
                    || !shared.covers_read_ahead()
                {
                    return Poll::Ready(());
                }
                ready!(shared.buffer.poll_capacity(cx));
                match ready!(shared.poll_source(cx)) {
                    Some(Ok(data)) => shared.read_ahead.push_back(data),
                    Some(Err(_)) | None => return Poll::Ready(()),
                }
            }
        });
        // After a timeout, the start consists of the bytes received so far.
        let _ = tokio::time::timeout(timeout, read_ahead).await;
        let shared = lock(&self.shared);
        // Bytes read ahead are complete even if the replay buffer could not keep them.
        let start: Bytes = match shared.read_ahead.iter().collect::<Vec<_>>().as_slice() {
            [] => return buffered_start(&shared, max_bytes),
            [chunk] => chunk.slice(..chunk.len().min(max_bytes)),
            chunks => join_chunks(chunks.iter().map(|chunk| &chunk[..]), max_bytes),
        };
        let is_complete =
            shared.source_state == SourceState::Complete && start.len() as u64 == shared.read_ahead_end();
        (start, is_complete)
    }

    /// Reads the complete body ahead if its declared length is at most `max_bytes`. Returns immediately for
    /// a longer body, and for one without a declared length.
    ///
    /// # Errors
    ///
    /// Fails when no bytes arrive within `idle_timeout`, or when the client sends below `rate`.
    pub async fn wait_for_short_body(
        &self,
        max_bytes: usize,
        idle_timeout: Duration,
        rate: MinRate,
    ) -> Result<(), SlowUpload> {
        if self.length().is_none_or(|length| length == 0 || length > max_bytes as u64) {
            return Ok(());
        }
        loop {
            let now = clock::instant();
            let deadline = {
                let shared = lock(&self.shared);
                // Before the first poll of the body, the rate applies from now on.
                let rate_deadline =
                    shared.min_rate_deadline(rate).or_else(|| now.checked_add(rate.timeout_after(0)?));
                let idle_deadline = shared.last_received_at + idle_timeout;
                rate_deadline.map_or(idle_deadline, |deadline| deadline.min(idle_deadline))
            };
            self.peek_body(max_bytes, deadline.saturating_duration_since(now)).await;
            let shared = lock(&self.shared);
            let is_waiting = shared.source_state == SourceState::Pending && shared.buffer.loss().is_none();
            let now = clock::instant();
            if !is_waiting {
                return Ok(());
            }
            if shared.last_received_at + idle_timeout <= now {
                return Err(SlowUpload::Stalled);
            }
            if shared.min_rate_deadline(rate).is_some_and(|deadline| deadline <= now) {
                return Err(SlowUpload::BelowMinRate);
            }
        }
    }
}
