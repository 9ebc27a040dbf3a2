//! Sends a request body more than once. The first attempt streams the body to the upstream while a replay buffer
//! keeps the bytes. A later attempt sends the buffered bytes, and continues with the bytes that still arrive. A body
//! that exceeds the buffer is sent only once.

mod read_ahead;
mod upload_wait;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::budget::{BufferBudget, BufferReservation};
use super::replay_buffer::{ReplayBuffer, ReplayLoss};
use crate::clock;
use crate::policy::min_rate::MinRate;
use crate::policy::replay::ReplayableBody;
use read_ahead::buffered_start;
pub use read_ahead::{BodyStart, SlowUploadError};
pub use upload_wait::UploadWait;

/// A request body and its replay buffer. Each attempt sends an [`AttemptBody`] from the first byte.
#[derive(Debug)]
pub struct Replay<B> {
    state: Arc<Mutex<ReplayState<B>>>,
}

/// The body of one attempt. The start of a later attempt makes this body fail, so that two connections never share
/// the bytes that still arrive.
#[derive(Debug)]
pub struct AttemptBody<B> {
    state: Arc<Mutex<ReplayState<B>>>,
    /// The number of the attempt.
    attempt: u32,
    /// The number of bytes that this body has returned.
    offset: u64,
}

/// The progress of the upload in the current attempt, for the task that waits for the response.
#[derive(Debug)]
pub struct UploadProgress<B> {
    state: Arc<Mutex<ReplayState<B>>>,
}

/// The reason why the body of an attempt ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttemptBodyError {
    /// A later attempt has started.
    #[error("another attempt has taken over the request body")]
    Superseded,
    /// The client's body ended early or was malformed.
    #[error("the request body of the client ended early")]
    ClientBodyFailed,
    /// The replay buffer cannot be read.
    #[error("the buffered part of the request body was lost: {0}")]
    Lost(ReplayLoss),
}

/// The state that a [`Replay`], its attempts and their [`UploadProgress`] share.
#[derive(Debug)]
struct ReplayState<B> {
    /// The body that the client sends, or `None` for a request that Keychoir sends without a body.
    source: Option<B>,
    source_state: SourceState,
    buffer: ReplayBuffer,
    /// Chunks that were read before the first attempt. They are kept here, because the replay buffer may drop them.
    read_ahead: VecDeque<Bytes>,
    /// The memory of `read_ahead` if the replay buffer is on disk. Otherwise, `read_ahead` and the replay
    /// buffer share the same bytes.
    read_ahead_reservation: Option<BufferReservation>,
    /// The offset of `read_ahead` in the body.
    read_ahead_offset: u64,
    /// The declared length of the body, or `None` if the client declares none.
    length: Option<u64>,
    /// The number of the current attempt. The first attempt has number 1.
    attempt: u32,
    /// The number of bytes that the connection has polled from the current attempt's body.
    polled_bytes: u64,
    /// Whether the connection has accepted a byte of the current attempt.
    has_started: bool,
    /// Whether no later attempt will need the buffer.
    is_released: bool,
    last_polled_at: Instant,
    last_received_at: Instant,
    received_bytes: u64,
    /// The duration of all waits for the client before `client_wait_start`.
    client_wait_time: Duration,
    /// The start of the current wait for the client, or `None` while the upload does not wait for the client.
    client_wait_start: Option<Instant>,
}

/// The result of the last poll of the client's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SourceState {
    /// Bytes have arrived, or the body has not been polled yet.
    Ready,
    Pending,
    Complete,
    Failed,
}

impl<B> Replay<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// Wraps `source`, whose bytes are buffered up to the limits of `budget`. The source is not read before an attempt
    /// is polled or the body is read ahead.
    #[must_use]
    pub fn new(source: B, budget: &BufferBudget) -> Self {
        let source_state = if source.is_end_stream() { SourceState::Complete } else { SourceState::Ready };
        let length = source.size_hint().exact();
        Self::from_source(Some(source), source_state, length, budget)
    }

    /// Creates an empty body, for a handshake that Keychoir sends when a WebSocket session fails over.
    #[must_use]
    pub fn empty() -> Self {
        Self::from_source(None, SourceState::Complete, Some(0), &BufferBudget::empty())
    }

    fn from_source(
        source: Option<B>,
        source_state: SourceState,
        length: Option<u64>,
        budget: &BufferBudget,
    ) -> Self {
        let now = clock::instant();
        let state = ReplayState {
            source,
            source_state,
            buffer: ReplayBuffer::new(budget.clone()),
            read_ahead: VecDeque::new(),
            read_ahead_reservation: None,
            read_ahead_offset: 0,
            length,
            attempt: 0,
            polled_bytes: 0,
            has_started: false,
            is_released: false,
            last_polled_at: now,
            last_received_at: now,
            received_bytes: 0,
            client_wait_time: Duration::ZERO,
            client_wait_start: None,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Starts an attempt from the first byte. The body of the previous attempt fails from then on.
    #[must_use]
    pub fn start_attempt(&self) -> AttemptBody<B> {
        let mut state = lock(&self.state);
        state.attempt += 1;
        state.polled_bytes = 0;
        state.has_started = false;
        state.last_polled_at = clock::instant();
        // The time between two attempts does not count as a wait for the client, because the body is not
        // polled during that time.
        state.client_wait_start = state.client_wait_start.map(|_| state.last_polled_at);
        AttemptBody { state: Arc::clone(&self.state), attempt: state.attempt, offset: 0 }
    }

    /// Returns the declared length of the body, or `None` if the client declares none.
    #[must_use]
    pub fn length(&self) -> Option<u64> {
        lock(&self.state).length
    }

    /// Returns whether another attempt could send all bytes that have arrived, and continue with the rest.
    #[must_use]
    pub fn replayable_body(&self) -> ReplayableBody {
        let state = lock(&self.state);
        let is_replayable = state.buffer.loss().is_none() && state.source_state != SourceState::Failed;
        if is_replayable { ReplayableBody::Buffered } else { ReplayableBody::Unavailable }
    }

    /// Returns the time at which bytes last arrived from the client, or the start of the request if none have
    /// arrived.
    #[must_use]
    pub fn last_received_at(&self) -> Instant {
        lock(&self.state).last_received_at
    }

    /// Returns the reason why the replay buffer is incomplete, or `None` while the buffer is complete.
    #[must_use]
    pub fn loss(&self) -> Option<ReplayLoss> {
        lock(&self.state).buffer.loss()
    }
}

impl<B> AttemptBody<B> {
    /// Returns a handle to the progress of the upload.
    #[must_use]
    pub fn upload(&self) -> UploadProgress<B> {
        UploadProgress { state: Arc::clone(&self.state) }
    }
}

impl<B> UploadProgress<B> {
    /// Returns the event that the upload waits for.
    #[must_use]
    pub fn waits_for(&self) -> UploadWait {
        match lock(&self.state).source_state {
            SourceState::Ready => UploadWait::ForUpstream,
            SourceState::Pending => UploadWait::ForClient,
            SourceState::Complete => UploadWait::ForResponse,
            SourceState::Failed => UploadWait::Failed,
        }
    }

    /// Records that the connection has accepted the first byte of the request.
    pub fn mark_started(&self) {
        lock(&self.state).has_started = true;
    }

    /// Returns whether the connection has accepted a byte of the request, so that the provider may process it.
    #[must_use]
    pub fn has_started(&self) -> bool {
        lock(&self.state).has_started
    }

    /// Returns the number of bytes that the connection has polled from the current attempt's body. Some of them may not
    /// be written yet.
    #[must_use]
    pub fn polled_bytes(&self) -> u64 {
        lock(&self.state).polled_bytes
    }

    /// Returns up to `max_bytes` of the start of the body from the replay buffer.
    #[must_use]
    pub fn buffered_start(&self, max_bytes: usize) -> BodyStart {
        buffered_start(&lock(&self.state), max_bytes)
    }

    /// Records that no further attempt will be started. The buffer is freed once the connection has polled all
    /// buffered bytes.
    pub fn release(&self) {
        let mut state = lock(&self.state);
        state.is_released = true;
        state.discard_if_released();
    }

    /// Returns the time by which the client must send more bytes to reach `rate`. Returns `None` while the upload does
    /// not wait for the client, or if the rate is not limited.
    #[must_use]
    pub fn min_rate_deadline(&self, rate: MinRate) -> Option<Instant> {
        lock(&self.state).min_rate_deadline(rate)
    }

    /// Returns the time at which the connection last polled bytes from the current attempt's body, or the start
    /// of the attempt.
    #[must_use]
    pub fn last_polled_at(&self) -> Instant {
        lock(&self.state).last_polled_at
    }
}

impl<B> ReplayState<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// Polls the next data for an attempt that has sent the body up to `offset`.
    fn poll_data(
        &mut self,
        offset: u64,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, AttemptBodyError>>> {
        if self.buffer.loss().is_none() {
            if let Some(data) = ready!(self.buffer.poll_read(offset, cx)) {
                return Poll::Ready(Some(data.map_err(AttemptBodyError::Lost)));
            }
            ready!(self.buffer.poll_capacity(cx));
        } else if let Some(data) = self.take_read_ahead(offset) {
            return Poll::Ready(Some(Ok(data)));
        }
        self.poll_source(cx)
    }

    /// Returns the data at `offset` that was read ahead, and drops the earlier chunks.
    fn take_read_ahead(&mut self, offset: u64) -> Option<Bytes> {
        loop {
            let chunk = self.read_ahead.front()?;
            let end = self.read_ahead_offset + chunk.len() as u64;
            if offset < end {
                let start =
                    usize::try_from(offset.saturating_sub(self.read_ahead_offset)).unwrap_or(usize::MAX);
                return Some(chunk.slice(start.min(chunk.len())..));
            }
            self.read_ahead_offset = end;
            self.read_ahead.pop_front();
        }
    }

    /// Polls the next data from the client, and buffers it.
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, AttemptBodyError>>> {
        loop {
            match self.source_state {
                SourceState::Complete => return Poll::Ready(None),
                SourceState::Failed => return Poll::Ready(Some(Err(AttemptBodyError::ClientBodyFailed))),
                SourceState::Ready | SourceState::Pending => {}
            }
            let Some(source) = &mut self.source else { return Poll::Ready(None) };
            self.source_state = SourceState::Pending;
            let Poll::Ready(frame) = Pin::new(&mut *source).poll_frame(cx) else {
                self.client_wait_start.get_or_insert_with(clock::instant);
                return Poll::Pending;
            };
            self.source_state = SourceState::Ready;
            self.last_received_at = clock::instant();
            if let Some(start) = self.client_wait_start.take() {
                self.client_wait_time += self.last_received_at.saturating_duration_since(start);
            }
            match frame {
                None => self.source_state = SourceState::Complete,
                Some(Err(_)) => self.source_state = SourceState::Failed,
                // Trailers are dropped, because a trailer could be named `xi-api-key`, and the provider reads no
                // trailers.
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        if source.is_end_stream() {
                            self.source_state = SourceState::Complete;
                        }
                        self.received_bytes += data.len() as u64;
                        self.buffer.push(&data);
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
            }
        }
    }
}

impl<B> ReplayState<B> {
    fn min_rate_deadline(&self, rate: MinRate) -> Option<Instant> {
        let remaining_time = rate.timeout_after(self.received_bytes)?.saturating_sub(self.client_wait_time);
        self.client_wait_start?.checked_add(remaining_time)
    }

    /// Reserves memory for the chunks that were read ahead. Returns whether the budget had the memory. Unless the
    /// replay buffer is on disk, the chunks share its memory and need no reservation.
    fn try_reserve_read_ahead(&mut self) -> bool {
        if !self.buffer.is_on_disk() {
            return true;
        }
        let bytes = self.read_ahead.iter().map(Bytes::len).sum();
        self.read_ahead_reservation
            .get_or_insert_with(|| self.buffer.budget().reservation(BufferReservation::UNBUDGETED_BYTES))
            .try_resize(bytes)
    }

    /// Returns the offset in the body at which `read_ahead` ends.
    fn read_ahead_end(&self) -> u64 {
        self.read_ahead_offset + self.read_ahead.iter().map(|chunk| chunk.len() as u64).sum::<u64>()
    }

    /// Records that the current attempt's body has returned `data`, and frees buffers that are not needed again.
    fn record_polled(&mut self, data: &Bytes) {
        self.last_polled_at = clock::instant();
        self.polled_bytes += data.len() as u64;
        if self.polled_bytes >= self.read_ahead_end() {
            self.read_ahead = VecDeque::new();
            self.read_ahead_reservation = None;
        }
        self.discard_if_released();
    }

    fn discard_if_released(&mut self) {
        if self.is_released && self.polled_bytes >= self.buffer.bytes() {
            self.buffer.discard(ReplayLoss::Released);
        }
    }
}

impl<B> Body for AttemptBody<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = AttemptBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, AttemptBodyError>>> {
        let this = &mut *self;
        let mut state = lock(&this.state);
        if state.attempt != this.attempt {
            return Poll::Ready(Some(Err(AttemptBodyError::Superseded)));
        }
        let data = ready!(state.poll_data(this.offset, cx));
        if let Some(Ok(data)) = &data {
            this.offset += data.len() as u64;
            state.record_polled(data);
        }
        Poll::Ready(data.map(|data| data.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        let state = lock(&self.state);
        state.source_state == SourceState::Complete
            && self.offset >= state.buffer.bytes()
            && self.offset >= state.read_ahead_end()
    }

    fn size_hint(&self) -> SizeHint {
        let remaining = lock(&self.state).length.map(|length| length.saturating_sub(self.offset));
        remaining.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

fn lock<B>(state: &Arc<Mutex<ReplayState<B>>>) -> MutexGuard<'_, ReplayState<B>> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
