//! A request body that can be sent more than once: the first attempt streams it to the upstream and
//! keeps the bytes in a replay buffer; a later one starts from the buffer and continues with the
//! bytes that still arrive. A body that exceeds the buffer is still sent, but only once.

mod intake;
mod upload_wait;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::budget::{BufferBudget, BufferShare};
use super::replay_buffer::{Loss, ReplayBuffer};
use crate::clock;
use crate::policy::min_rate::MinRate;
use crate::policy::replay::Replayable;
pub use intake::Slow;
pub use upload_wait::UploadWait;

/// A client's request body and its replay buffer.
#[derive(Debug)]
pub struct Replay<B> {
    shared: Arc<Mutex<Shared<B>>>,
}

/// One pass of the body to the upstream. A later pass supersedes it: two connections never share the bytes
/// that still arrive.
#[derive(Debug)]
pub struct AttemptBody<B> {
    shared: Arc<Mutex<Shared<B>>>,
    pass: u32,
    at: u64,
}

/// The progress of a body's upload, for the task that waits for the response.
#[derive(Debug)]
pub struct Upload<B> {
    shared: Arc<Mutex<Shared<B>>>,
}

/// The reason why a pass ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Interrupted {
    /// A later pass has begun.
    #[error("another attempt has taken over the request's body")]
    Superseded,
    /// The client's body broke off or was malformed.
    #[error("the client's request body broke off")]
    ClientBroke,
    /// The replay buffer cannot be read back.
    #[error("the buffered part of the request's body is lost: {0}")]
    Lost(Loss),
}

#[derive(Debug)]
struct Shared<B> {
    source: Option<B>,
    source_state: SourceState,
    buffer: ReplayBuffer,
    /// Pieces read before an attempt sends them, in case the replay buffer cannot keep them.
    read_ahead: VecDeque<Bytes>,
    /// The memory of these pieces when the replay buffer is on disk.
    read_ahead_share: Option<BufferShare>,
    /// The offset in the body at which these pieces begin.
    read_ahead_offset: u64,
    /// The length the client announced.
    length: Option<u64>,
    pass: u32,
    passed_bytes: u64,
    /// Whether the connection has accepted a byte of the last pass's request.
    has_begun: bool,
    is_released: bool,
    /// Time at which bytes were last passed to an attempt.
    moved_at: Instant,
    /// Time at which bytes last arrived from the client.
    arrived_at: Instant,
    /// Bytes received so far, the time spent waiting for the client before that, and the start of the current
    /// wait.
    arrived_bytes: u64,
    client_wait: Duration,
    waiting_since: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SourceState {
    Ready,
    Pending,
    Complete,
    Broken,
}

impl<B> Replay<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// Keeps `source` within the bounds of `budget`. The body is not read before an attempt polls it.
    #[must_use]
    pub fn hold(source: B, budget: &BufferBudget) -> Self {
        let source_state = if source.is_end_stream() { SourceState::Complete } else { SourceState::Ready };
        let length = source.size_hint().exact();
        Self::of(Some(source), source_state, length, budget)
    }

    /// An empty body, for the proxy's own requests.
    #[must_use]
    pub fn empty() -> Self {
        Self::of(None, SourceState::Complete, Some(0), &BufferBudget::none())
    }

    fn of(source: Option<B>, source_state: SourceState, length: Option<u64>, budget: &BufferBudget) -> Self {
        let now = clock::instant();
        let shared = Shared {
            source,
            source_state,
            buffer: ReplayBuffer::new(budget.clone()),
            read_ahead: VecDeque::new(),
            read_ahead_share: None,
            read_ahead_offset: 0,
            length,
            pass: 0,
            passed_bytes: 0,
            has_begun: false,
            is_released: false,
            moved_at: now,
            arrived_at: now,
            arrived_bytes: 0,
            client_wait: Duration::ZERO,
            waiting_since: None,
        };
        Self { shared: Arc::new(Mutex::new(shared)) }
    }

    /// Begins a pass, from the first byte. Ends the one before.
    #[must_use]
    pub fn attempt(&self) -> AttemptBody<B> {
        let mut shared = lock(&self.shared);
        shared.pass += 1;
        shared.passed_bytes = 0;
        shared.has_begun = false;
        shared.moved_at = clock::instant();
        // The body is not polled while the request waits for a key, so this time is not counted as
        // a wait for the client.
        shared.waiting_since = shared.waiting_since.map(|_| shared.moved_at);
        AttemptBody { shared: Arc::clone(&self.shared), pass: shared.pass, at: 0 }
    }

    /// The length the client announced.
    #[must_use]
    pub fn length(&self) -> Option<u64> {
        lock(&self.shared).length
    }

    /// Whether a new pass would send the complete body.
    #[must_use]
    pub fn holding(&self) -> Replayable {
        let shared = lock(&self.shared);
        let is_broken = shared.source_state == SourceState::Broken;
        if shared.buffer.loss().is_none() && !is_broken { Replayable::Whole } else { Replayable::Lost }
    }

    /// The time of the last bytes from the client, or of the beginning of the request before the first ones.
    #[must_use]
    pub fn arrived_at(&self) -> Instant {
        lock(&self.shared).arrived_at
    }

    /// The loss of the replay buffer because of which a new pass cannot send the complete body.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        lock(&self.shared).buffer.loss()
    }
}

impl<B> AttemptBody<B> {
    /// A view of the upload's progress.
    #[must_use]
    pub fn upload(&self) -> Upload<B> {
        Upload { shared: Arc::clone(&self.shared) }
    }
}

impl<B> Upload<B> {
    /// The event that the upload waits for now.
    #[must_use]
    pub fn waiting(&self) -> UploadWait {
        match lock(&self.shared).source_state {
            SourceState::Ready => UploadWait::ForUpstream,
            SourceState::Pending => UploadWait::ForClient,
            SourceState::Complete => UploadWait::ForResponse,
            SourceState::Broken => UploadWait::Never,
        }
    }

    /// Records that the connection has accepted the first byte of the request.
    pub fn begun(&self) {
        lock(&self.shared).has_begun = true;
    }

    /// Whether the connection has accepted any byte of the request: then the provider may serve it.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        lock(&self.shared).has_begun
    }

    /// Bytes that the last pass has sent.
    #[must_use]
    pub fn passed_bytes(&self) -> u64 {
        lock(&self.shared).passed_bytes
    }

    /// The start of the body that is in memory, and whether it is the complete body.
    #[must_use]
    pub fn start(&self, bytes_max: usize) -> (Bytes, bool) {
        start(&lock(&self.shared), bytes_max)
    }

    /// Gives up the replay: no attempt will send the body again, so the buffer is freed once its bytes are
    /// passed on.
    pub fn release(&self) {
        let mut shared = lock(&self.shared);
        shared.is_released = true;
        shared.discard_if_released();
    }

    /// Deadline for more bytes of the body at this rate; `None` while the upload does not wait for
    /// the client.
    #[must_use]
    pub fn slow_at(&self, rate: MinRate) -> Option<Instant> {
        lock(&self.shared).slow_at(rate)
    }

    /// The time at which bytes were last passed to an attempt.
    #[must_use]
    pub fn moved_at(&self) -> Instant {
        lock(&self.shared).moved_at
    }
}

fn start<B>(shared: &Shared<B>, bytes_max: usize) -> (Bytes, bool) {
    let start = shared.buffer.start(bytes_max);
    let is_whole = shared.source_state == SourceState::Complete
        && shared.buffer.loss().is_none()
        && shared.buffer.bytes() == start.len() as u64;
    (start, is_whole)
}

impl<B> Shared<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// The next piece for a pass that has sent `at` bytes.
    fn poll_piece(&mut self, at: u64, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Interrupted>>> {
        if self.buffer.loss().is_none() {
            if let Some(piece) = ready!(self.buffer.poll_piece(at, cx)) {
                return Poll::Ready(Some(piece.map_err(Interrupted::Lost)));
            }
            ready!(self.buffer.poll_capacity(cx));
        } else if let Some(piece) = self.read_ahead_piece(at) {
            return Poll::Ready(Some(Ok(piece)));
        }
        self.poll_source(cx)
    }

    /// The piece at offset `at` among the pieces read ahead.
    fn read_ahead_piece(&mut self, at: u64) -> Option<Bytes> {
        loop {
            let piece = self.read_ahead.front()?;
            let end = self.read_ahead_offset + piece.len() as u64;
            if at < end {
                let begin = usize::try_from(at.saturating_sub(self.read_ahead_offset)).unwrap_or(usize::MAX);
                return Some(piece.slice(begin.min(piece.len())..));
            }
            self.read_ahead_offset = end;
            self.read_ahead.pop_front();
        }
    }

    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Interrupted>>> {
        loop {
            match self.source_state {
                SourceState::Complete => return Poll::Ready(None),
                SourceState::Broken => return Poll::Ready(Some(Err(Interrupted::ClientBroke))),
                SourceState::Ready | SourceState::Pending => {}
            }
            let Some(source) = &mut self.source else { return Poll::Ready(None) };
            self.source_state = SourceState::Pending;
            let Poll::Ready(frame) = Pin::new(&mut *source).poll_frame(cx) else {
                self.waiting_since.get_or_insert_with(clock::instant);
                return Poll::Pending;
            };
            self.source_state = SourceState::Ready;
            self.arrived_at = clock::instant();
            if let Some(since) = self.waiting_since.take() {
                self.client_wait += self.arrived_at.saturating_duration_since(since);
            }
            match frame {
                None => self.source_state = SourceState::Complete,
                Some(Err(_)) => self.source_state = SourceState::Broken,
                // Trailers are dropped: one could be called `xi-api-key`, and the provider reads none.
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        if source.is_end_stream() {
                            self.source_state = SourceState::Complete;
                        }
                        self.arrived_bytes += data.len() as u64;
                        self.buffer.push(&data);
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
            }
        }
    }
}

impl<B> Shared<B> {
    fn slow_at(&self, rate: MinRate) -> Option<Instant> {
        let left = rate.due(self.arrived_bytes)?.saturating_sub(self.client_wait);
        self.waiting_since?.checked_add(left)
    }

    /// Whether the budget covers another piece read ahead. A piece in memory shares its bytes with
    /// the replay buffer.
    fn covers_read_ahead(&mut self) -> bool {
        if !self.buffer.is_on_disk() {
            return true;
        }
        let bytes = self.read_ahead.iter().map(Bytes::len).sum();
        self.read_ahead_share
            .get_or_insert_with(|| self.buffer.budget().share(BufferShare::FREE))
            .cover(bytes)
    }

    /// The offset at which the pieces read ahead end.
    fn read_ahead_end(&self) -> u64 {
        self.read_ahead_offset + self.read_ahead.iter().map(|piece| piece.len() as u64).sum::<u64>()
    }

    fn passed(&mut self, data: &Bytes) {
        self.moved_at = clock::instant();
        self.passed_bytes += data.len() as u64;
        if self.passed_bytes >= self.read_ahead_end() {
            self.read_ahead = VecDeque::new();
            self.read_ahead_share = None;
        }
        self.discard_if_released();
    }

    fn discard_if_released(&mut self) {
        if self.is_released && self.passed_bytes >= self.buffer.bytes() {
            self.buffer.discard(Loss::Released);
        }
    }
}

impl<B> Body for AttemptBody<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = Interrupted;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Interrupted>>> {
        let this = &mut *self;
        let mut shared = lock(&this.shared);
        if shared.pass != this.pass {
            return Poll::Ready(Some(Err(Interrupted::Superseded)));
        }
        let piece = ready!(shared.poll_piece(this.at, cx));
        if let Some(Ok(data)) = &piece {
            this.at += data.len() as u64;
            shared.passed(data);
        }
        Poll::Ready(piece.map(|piece| piece.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        let shared = lock(&self.shared);
        shared.source_state == SourceState::Complete
            && self.at >= shared.buffer.bytes()
            && self.at >= shared.read_ahead_end()
    }

    fn size_hint(&self) -> SizeHint {
        let length = lock(&self.shared).length;
        length.map_or_else(SizeHint::default, |length| SizeHint::with_exact(length.saturating_sub(self.at)))
    }
}

fn lock<B>(shared: &Arc<Mutex<Shared<B>>>) -> MutexGuard<'_, Shared<B>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
