//! Wraps the stream that hyper reads from and writes to. First returns the bytes that were read before hyper started.
//! Counts received bytes, records whether a write is blocked, and checks for a disconnect while a request is in
//! progress. The count shows whether part of a request head has arrived, and whether the client sent bytes before a
//! 101 response.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::disconnect::{ConnectionPhase, Peek, SendingHalf};

/// The counters of a stream. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct IoCounters(Arc<StreamCounts>);

/// The values that the clones of [`IoCounters`] share.
#[derive(Debug, Default)]
struct StreamCounts {
    received_bytes: AtomicU64,
    is_write_blocked: AtomicBool,
    phase: ConnectionPhase,
}

impl IoCounters {
    /// Returns the number of bytes read so far.
    pub(super) fn received_bytes(&self) -> u64 {
        self.0.received_bytes.load(Ordering::Relaxed)
    }

    /// Returns whether the last write or flush is pending, because the client does not read.
    pub(super) fn is_write_blocked(&self) -> bool {
        self.0.is_write_blocked.load(Ordering::Relaxed)
    }

    /// Returns the phase of the connection.
    pub(super) fn phase(&self) -> &ConnectionPhase {
        &self.0.phase
    }

    /// Records whether a write or flush is pending, and returns its result `write_poll`.
    fn record_write<T>(&self, write_poll: Poll<T>) -> Poll<T> {
        self.0.is_write_blocked.store(write_poll.is_pending(), Ordering::Relaxed);
        write_poll
    }
}

pin_project! {
    /// A stream that updates its [`IoCounters`].
    pub(super) struct CountingIo<S> {
        #[pin]
        stream: S,
        counters: IoCounters,
        // Bytes that were already read from the stream. The next reads return them.
        read_buf: Bytes,
        sending_half: SendingHalf,
    }
}

impl<S> CountingIo<S> {
    pub(super) fn new(stream: S, counters: IoCounters) -> Self {
        Self { stream, counters, read_buf: Bytes::new(), sending_half: SendingHalf::Open }
    }

    /// Makes the next reads return `read_buf`, which was already read from the stream.
    pub(super) fn with_read_buf(self, read_buf: Bytes) -> Self {
        Self { read_buf, ..self }
    }

    pub(super) fn get_ref(&self) -> &S {
        &self.stream
    }

    /// Returns the inner stream, and the bytes that were read from it but not consumed.
    pub(super) fn into_parts(self) -> (S, Bytes) {
        (self.stream, self.read_buf)
    }
}

impl<S: AsyncRead> AsyncRead for CountingIo<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        if !this.read_buf.is_empty() {
            let count = this.read_buf.len().min(buffer.remaining());
            buffer.put_slice(&this.read_buf.split_to(count));
            return Poll::Ready(Ok(()));
        }
        let filled_before = buffer.filled().len();
        ready!(this.stream.poll_read(cx, buffer))?;
        // Only one task reads, so a load and a store suffice. They are cheaper than an atomic addition.
        let received_bytes = this.counters.received_bytes() + (buffer.filled().len() - filled_before) as u64;
        this.counters.0.received_bytes.store(received_bytes, Ordering::Relaxed);
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
        // Hyper flushes whenever its connection is polled, but does not read while a request is in progress.
        if this.counters.phase().is_idle() {
            if !matches!(this.sending_half, SendingHalf::Open) {
                *this.sending_half = SendingHalf::Open;
            }
        } else if this.stream.supports_half_close() && this.read_buf.is_empty() {
            this.sending_half.detect_disconnect(this.stream.as_mut(), cx, this.counters.phase())?;
        }
        this.counters.record_write(this.stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().stream.poll_shutdown(cx)
    }
}
