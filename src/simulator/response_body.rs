//! Generates the body of a simulated response while it is sent, and holds the slot of its operation until the last
//! chunk is generated. A fault can delay the chunks or truncate the body.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::provider::ConcurrencySlot;
use super::tracked_stream::Flushes;

/// The body of a response: an available chunk, followed by chunks that are generated on demand.
pub(super) struct ResponseBody {
    /// The next chunk, or `None` at the end of the body.
    next_chunk: Option<Bytes>,
    generator: Option<Box<dyn Iterator<Item = Bytes> + Send>>,
    /// The remaining length, if it is known. It becomes the content length.
    remaining: Option<u64>,
    delay: Option<ChunkDelay>,
    cut: Option<Cut>,
    /// The slot is released when the last chunk is generated, not when it is sent. Otherwise a client could
    /// receive the whole response while its operation still counts as running.
    slot: Option<ConcurrencySlot>,
}

/// A delay before each chunk except the first.
struct ChunkDelay {
    duration: Duration,
    is_first_chunk: bool,
    sleep: Option<Pin<Box<tokio::time::Sleep>>>,
}

/// A break of the connection after a number of bytes.
struct Cut {
    /// Number of bytes to send before the break.
    remaining: u64,
    flushes: Flushes,
    flushed: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// The error of a body that a fault truncated.
#[derive(Debug, thiserror::Error)]
#[error("a fault broke this connection")]
pub(super) struct BodyAborted;

impl ResponseBody {
    /// Creates a body whose bytes are all available.
    pub(super) fn whole(bytes: Bytes) -> Self {
        let remaining = Some(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        let next_chunk = (!bytes.is_empty()).then_some(bytes);
        Self { next_chunk, generator: None, remaining, delay: None, cut: None, slot: None }
    }

    /// Creates a body that is generated while it is sent. Without a length it is sent chunked.
    pub(super) fn generated(
        length: Option<u64>,
        chunks: impl Iterator<Item = Bytes> + Send + 'static,
    ) -> Self {
        let mut body =
            Self { generator: Some(Box::new(chunks)), remaining: length, ..Self::whole(Bytes::new()) };
        body.generate_next();
        body
    }

    /// Holds `slot` until the last chunk is generated.
    pub(super) fn with_slot(mut self, slot: ConcurrencySlot) -> Self {
        self.slot = Some(slot);
        self.generate_next();
        self
    }

    /// Delays each chunk except the first.
    pub(super) fn delay_chunks(&mut self, duration: Duration) {
        self.delay = Some(ChunkDelay { duration, is_first_chunk: true, sleep: None });
    }

    /// Breaks the body after `bytes` bytes. The body is then always chunked.
    pub(super) fn cut_after(&mut self, bytes: u64, flushes: Flushes) {
        self.remaining = None;
        self.cut = Some(Cut { remaining: bytes, flushes, flushed: None });
    }

    /// Returns the bytes of a body that was created with [`ResponseBody::whole`].
    pub(super) fn into_bytes(self) -> Bytes {
        self.next_chunk.unwrap_or_default()
    }

    /// Generates one chunk in advance, so that the last chunk is recognized.
    fn generate_next(&mut self) {
        if self.next_chunk.is_none() {
            self.next_chunk = self.generator.as_mut().and_then(Iterator::next);
        }
        if self.next_chunk.is_none() {
            self.generator = None;
            self.slot = None;
        }
    }
}

impl ChunkDelay {
    /// Returns `Ready` when the delay before the next chunk has elapsed.
    fn poll_elapsed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_first_chunk {
            self.is_first_chunk = false;
            return Poll::Ready(());
        }
        let duration = self.duration;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(duration)));
        ready!(sleep.as_mut().poll(cx));
        self.sleep = None;
        Poll::Ready(())
    }
}

impl Cut {
    /// Returns `Ready` once all previous bytes are flushed to the socket. The client then receives every
    /// byte before the break, so a test knows their number.
    fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let flushes = &self.flushes;
        self.flushed.get_or_insert_with(|| Box::pin(flushes.clone().next())).as_mut().poll(cx)
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyAborted;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyAborted>>> {
        let body = &mut *self;
        if let Some(cut) = &mut body.cut
            && (cut.remaining == 0 || body.next_chunk.is_none())
        {
            ready!(cut.poll_flushed(cx));
            return Poll::Ready(Some(Err(BodyAborted)));
        }
        if body.next_chunk.is_none() {
            return Poll::Ready(None);
        }
        if let Some(delay) = &mut body.delay {
            ready!(delay.poll_elapsed(cx));
        }
        let Some(mut chunk) = body.next_chunk.take() else { return Poll::Ready(None) };
        let length = |chunk: &Bytes| u64::try_from(chunk.len()).unwrap_or(u64::MAX);
        if let Some(cut) = &mut body.cut {
            chunk.truncate(usize::try_from(cut.remaining).unwrap_or(usize::MAX));
            cut.remaining -= length(&chunk);
        }
        body.remaining = body.remaining.map(|remaining| remaining.saturating_sub(length(&chunk)));
        body.generate_next();
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.next_chunk.is_none() && self.cut.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.remaining.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}
