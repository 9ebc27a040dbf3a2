//! Wraps the TCP stream of a connection, and reports its flushes. A fault that breaks the connection waits for a flush,
//! so that the client receives all bytes that were written before.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::watch;

/// A stream that reports its flushes.
#[derive(Debug)]
pub(super) struct TrackedStream {
    io: TokioIo<TcpStream>,
    flushes: watch::Sender<()>,
}

/// Receives the flushes of a [`TrackedStream`].
#[derive(Clone, Debug)]
pub(super) struct Flushes(watch::Receiver<()>);

impl TrackedStream {
    pub(super) fn new(stream: TcpStream) -> (Self, Flushes) {
        let (flushes, receiver) = watch::channel(());
        (Self { io: TokioIo::new(stream), flushes }, Flushes(receiver))
    }

    /// Returns the TCP stream, for the protocol after an upgrade.
    pub(super) fn into_stream(self) -> TcpStream {
        self.io.into_inner()
    }
}

impl Flushes {
    /// Waits for the next flush after the first poll of this future, or for the end of the
    /// connection.
    pub(super) async fn next(mut self) {
        self.0.mark_unchanged();
        // An error means that the connection is closed and no flush will follow.
        let _closed = self.0.changed().await;
    }
}

impl Read for TrackedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for TrackedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    /// Reports the flush. hyper calls this method after it has written all its data.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        if flushed.is_ready() {
            self.flushes.send_replace(());
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
}
