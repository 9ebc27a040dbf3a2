//! A request body that can be sent more than once, without being stored before it is forwarded.
//!
//! The first attempt streams to the upstream while what passes is held. A later attempt starts
//! from what is held and goes on with what still arrives, so a refusal before the body is complete
//! costs no time. Past the bound the request goes on and only the replay is lost.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::clock;
use crate::policy::replay::Held;

/// Memory that all held bodies share.
#[derive(Clone, Debug)]
pub struct Memory {
    used: Arc<AtomicUsize>,
    total_bytes_max: usize,
    request_bytes_max: usize,
}

impl Memory {
    /// At most `request_bytes_max` for one body and `total_bytes_max` for all together.
    #[must_use]
    pub fn new(request_bytes_max: usize, total_bytes_max: usize) -> Self {
        Self { used: Arc::default(), total_bytes_max, request_bytes_max }
    }

    /// Bytes that are held now.
    #[must_use]
    pub fn used_bytes(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }

    fn reserve(&self, bytes: usize) -> bool {
        let fits = |used: usize| used.checked_add(bytes).filter(|&sum| sum <= self.total_bytes_max);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).is_ok()
    }

    fn release(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }
}

/// A client's body and what is held of it.
#[derive(Debug)]
pub struct Replay<B> {
    shared: Arc<Mutex<Shared<B>>>,
}

/// One passage of the body to the upstream. A later passage supersedes it: two connections never
/// share what still arrives.
#[derive(Debug)]
pub struct Attempt<B> {
    shared: Arc<Mutex<Shared<B>>>,
    passage: u32,
    at: usize,
}

/// How the passing of a body goes, for whoever waits for the answer.
#[derive(Debug)]
pub struct Upload<B> {
    shared: Arc<Mutex<Shared<B>>>,
}

/// What the upload waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// The client has not sent the next bytes.
    ForClient,
    /// The upstream has not taken them.
    ForUpstream,
    /// Nothing: all is sent.
    ForAnswer,
    /// Nothing will come: the client's body broke off or was malformed.
    Never,
}

/// Why a passage ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Interrupted {
    /// Another passage has begun.
    #[error("another attempt has taken over the request's body")]
    Superseded,
    /// The client's body broke off or was malformed.
    #[error("the client's request body broke off")]
    ClientBroke,
}

#[derive(Debug)]
struct Shared<B> {
    source: Option<B>,
    source_state: Source,
    held: Vec<Bytes>,
    held_bytes: usize,
    /// Whether everything that has arrived is in `held`.
    is_whole: bool,
    memory: Memory,
    /// The length the client announced.
    length: Option<u64>,
    passage: u32,
    passed_bytes: u64,
    is_released: bool,
    moved_at: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Ready,
    Pending,
    Complete,
    Broken,
}

impl<B> Replay<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// Holds `source` within the bounds of `memory`. Nothing is read before an attempt asks.
    #[must_use]
    pub fn hold(source: B, memory: &Memory) -> Self {
        let source_state = if source.is_end_stream() { Source::Complete } else { Source::Ready };
        let length = source.size_hint().exact();
        Self::of(Some(source), source_state, length, memory)
    }

    /// No body at all, for requests of our own.
    #[must_use]
    pub fn empty() -> Self {
        Self::of(None, Source::Complete, Some(0), &Memory::new(0, 0))
    }

    fn of(source: Option<B>, source_state: Source, length: Option<u64>, memory: &Memory) -> Self {
        let shared = Shared {
            source,
            source_state,
            held: Vec::new(),
            held_bytes: 0,
            is_whole: true,
            memory: memory.clone(),
            length,
            passage: 0,
            passed_bytes: 0,
            is_released: false,
            moved_at: clock::instant(),
        };
        Self { shared: Arc::new(Mutex::new(shared)) }
    }

    /// Begins a passage, from the first byte. Ends the one before.
    #[must_use]
    pub fn attempt(&self) -> Attempt<B> {
        let mut shared = lock(&self.shared);
        shared.passage += 1;
        shared.passed_bytes = 0;
        shared.moved_at = clock::instant();
        Attempt { shared: Arc::clone(&self.shared), passage: shared.passage, at: 0 }
    }

    /// Whether a new passage would send all of it.
    #[must_use]
    pub fn held(&self) -> Held {
        let shared = lock(&self.shared);
        if shared.is_whole && shared.source_state != Source::Broken { Held::Whole } else { Held::Lost }
    }
}

impl<B> Attempt<B> {
    /// A view on how the passing goes.
    #[must_use]
    pub fn upload(&self) -> Upload<B> {
        Upload { shared: Arc::clone(&self.shared) }
    }
}

impl<B> Upload<B> {
    /// What it waits for now.
    #[must_use]
    pub fn waiting(&self) -> Waiting {
        match lock(&self.shared).source_state {
            Source::Ready => Waiting::ForUpstream,
            Source::Pending => Waiting::ForClient,
            Source::Complete => Waiting::ForAnswer,
            Source::Broken => Waiting::Never,
        }
    }

    /// Bytes that the last passage has sent.
    #[must_use]
    pub fn passed_bytes(&self) -> u64 {
        lock(&self.shared).passed_bytes
    }

    /// Nobody will send the body again: what is held is let go as soon as it is passed on.
    pub fn release(&self) {
        let mut shared = lock(&self.shared);
        shared.is_released = true;
        if shared.passed_bytes >= shared.held_bytes as u64 {
            shared.forget();
        }
    }

    /// When bytes last moved on.
    #[must_use]
    pub fn moved_at(&self) -> Instant {
        lock(&self.shared).moved_at
    }
}

impl<B> Shared<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Interrupted>>> {
        loop {
            match self.source_state {
                Source::Complete => return Poll::Ready(None),
                Source::Broken => return Poll::Ready(Some(Err(Interrupted::ClientBroke))),
                Source::Ready | Source::Pending => {}
            }
            let Some(source) = &mut self.source else { return Poll::Ready(None) };
            self.source_state = Source::Pending;
            let frame = ready!(Pin::new(&mut *source).poll_frame(cx));
            self.source_state = Source::Ready;
            match frame {
                None => self.source_state = Source::Complete,
                Some(Err(_)) => self.source_state = Source::Broken,
                // Trailers are dropped: one could be called `xi-api-key`, and the provider reads none.
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        if source.is_end_stream() {
                            self.source_state = Source::Complete;
                        }
                        self.hold_chunk(&data);
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
            }
        }
    }

    fn hold_chunk(&mut self, data: &Bytes) {
        if !self.is_whole {
            return;
        }
        let fits =
            self.held_bytes + data.len() <= self.memory.request_bytes_max && self.memory.reserve(data.len());
        if fits {
            self.held_bytes += data.len();
            self.held.push(data.clone());
        } else {
            self.forget();
        }
    }
}

impl<B> Shared<B> {
    fn passed(&mut self, data: &Bytes) {
        self.moved_at = clock::instant();
        self.passed_bytes += data.len() as u64;
        if self.is_released && self.passed_bytes >= self.held_bytes as u64 {
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.is_whole = false;
        self.held = Vec::new();
        self.memory.release(std::mem::take(&mut self.held_bytes));
    }
}

impl<B> Drop for Shared<B> {
    fn drop(&mut self) {
        self.forget();
    }
}

impl<B> Body for Attempt<B>
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
        if shared.passage != this.passage {
            return Poll::Ready(Some(Err(Interrupted::Superseded)));
        }
        if let Some(chunk) = shared.held.get(this.at).cloned() {
            this.at += 1;
            shared.passed(&chunk);
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        let data = ready!(shared.poll_source(cx));
        if let Some(Ok(data)) = &data {
            this.at += 1;
            shared.passed(data);
        }
        Poll::Ready(data.map(|data| data.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        let shared = lock(&self.shared);
        shared.source_state == Source::Complete && self.at >= shared.held.len()
    }

    fn size_hint(&self) -> SizeHint {
        let shared = lock(&self.shared);
        let sent: usize = shared.held.iter().take(self.at).map(Bytes::len).sum();
        match shared.length {
            Some(length) if self.at == 0 => SizeHint::with_exact(length),
            Some(length) if shared.is_whole => SizeHint::with_exact(length.saturating_sub(sent as u64)),
            _ => SizeHint::default(),
        }
    }
}

fn lock<B>(shared: &Arc<Mutex<Shared<B>>>) -> MutexGuard<'_, Shared<B>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ForClient => "waiting for the client's body",
            Self::ForUpstream => "waiting for the upstream to take the body",
            Self::ForAnswer => "waiting for the answer",
            Self::Never => "the client's body broke off",
        })
    }
}

#[cfg(test)]
mod tests;
