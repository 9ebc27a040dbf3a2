//! Counts the bytes that a client has sent, and detects whether it reads the bytes sent to it. When
//! a WebSocket session takes the connection over, the count shows which bytes the client sent
//! before it could know of the session: no check has seen those bytes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::disconnect::{Peek, Phase, SendingHalf};

/// The counters of a stream.
#[derive(Clone, Debug, Default)]
pub(super) struct IoCounters(Arc<StreamCounts>);

#[derive(Debug, Default)]
struct StreamCounts {
    bytes: AtomicU64,
    is_write_blocked: AtomicBool,
    phase: Phase,
}

impl IoCounters {
    /// Bytes read so far.
    pub(super) fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// Whether bytes wait for the client to read them.
    pub(super) fn is_write_blocked(&self) -> bool {
        self.0.is_write_blocked.load(Ordering::Relaxed)
    }

    /// The phase of the current request.
    pub(super) fn phase(&self) -> &Phase {
        &self.0.phase
    }

    fn record_write<T>(&self, written: Poll<T>) -> Poll<T> {
        self.0.is_write_blocked.store(written.is_pending(), Ordering::Relaxed);
        written
    }
}

pin_project! {
    /// A stream that counts its bytes.
    pub(super) struct CountingIo<S> {
        #[pin]
        stream: S,
        counters: IoCounters,
        // Bytes that were read before and are read again.
        early: Bytes,
        sending_half: SendingHalf,
    }
}

impl<S> CountingIo<S> {
    pub(super) fn new(stream: S, counters: IoCounters) -> Self {
        Self { stream, counters, early: Bytes::new(), sending_half: SendingHalf::Open }
    }

    /// The same stream with bytes that were already read from it.
    pub(super) fn with_early(self, early: Bytes) -> Self {
        Self { early, ..self }
    }

    /// The inner stream.
    pub(super) fn get_ref(&self) -> &S {
        &self.stream
    }

    /// The inner stream, and the bytes read from it that are not consumed yet.
    pub(super) fn into_parts(self) -> (S, Bytes) {
        (self.stream, self.early)
    }
}

impl<S: AsyncRead> AsyncRead for CountingIo<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let this = self.project();
        if this.early.has_remaining() {
            let count = this.early.len().min(buffer.remaining());
            buffer.put_slice(&this.early.split_to(count));
            return Poll::Ready(Ok(()));
        }
        ready!(this.stream.poll_read(cx, buffer))?;
        // Only one task reads, so a load and a store suffice: cheaper than an atomic addition.
        let bytes = this.counters.bytes() + (buffer.filled().len() - before) as u64;
        this.counters.0.bytes.store(bytes, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Peek> AsyncWrite for CountingIo<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.project();
        this.counters.record_write(this.stream.poll_write(cx, data))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        this.counters.record_write(this.stream.poll_write_vectored(cx, data))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut this = self.project();
        // HTTP flushes whenever it is polled, and reads nothing while a request is under way.
        if this.counters.phase().is_idle() {
            if !matches!(this.sending_half, SendingHalf::Open) {
                *this.sending_half = SendingHalf::Open;
            }
        } else if this.stream.has_halves() && this.early.is_empty() {
            this.sending_half.poll(this.stream.as_mut(), cx, this.counters.phase())?;
        }
        this.counters.record_write(this.stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().stream.poll_shutdown(cx)
    }
}
