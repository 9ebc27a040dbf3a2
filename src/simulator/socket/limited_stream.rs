//! Limits the number of bytes that are written to the TCP connection of a session. A fault uses the limit to break a
//! session in the middle of a frame.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// A connection that accepts a limited number of bytes to write.
pub(super) struct LimitedStream {
    pub(super) tcp: TcpStream,
    /// Number of bytes that may still be written, or `None` for no limit.
    pub(super) remaining: Option<u64>,
}

impl AsyncRead for LimitedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for LimitedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Some(remaining) = self.remaining else { return Pin::new(&mut self.tcp).poll_write(cx, bytes) };
        if remaining == 0 {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let allowed_bytes = usize::try_from(remaining).unwrap_or(usize::MAX).min(bytes.len());
        let written_bytes = ready!(Pin::new(&mut self.tcp).poll_write(cx, &bytes[..allowed_bytes]))?;
        self.remaining = Some(remaining.saturating_sub(u64::try_from(written_bytes).unwrap_or(u64::MAX)));
        Poll::Ready(Ok(written_bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
