//! One direction of a session: what was read and not yet looked at, and what goes on. Nothing is read
//! before everything that was read has gone on, so a slow end slows the other down and no buffer grows.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::io::poll_read_buf;

/// Room for one read.
pub(super) const READ_BYTES: usize = 16 * 1024;

/// One direction.
#[derive(Debug, Default)]
pub(super) struct Leg {
    /// What was read and not yet looked at.
    pub(super) inbox: BytesMut,
    /// What goes on.
    pub(super) outbox: BytesMut,
    is_unflushed: bool,
}

impl Leg {
    /// One of which this was read already.
    pub(super) fn having_read(inbox: BytesMut) -> Self {
        Self { inbox, ..Self::default() }
    }

    /// Sends what goes on, all of it.
    pub(super) fn poll_send<W>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        while !self.outbox.is_empty() {
            let sent = ready!(Pin::new(&mut *to).poll_write(cx, &self.outbox))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.outbox.advance(sent);
            self.is_unflushed = true;
        }
        if self.is_unflushed {
            ready!(Pin::new(to).poll_flush(cx))?;
            self.is_unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads more; 0 bytes are the end. What waits idly holds no memory.
    pub(super) fn poll_fetch<R>(&mut self, cx: &mut Context<'_>, from: &mut R) -> Poll<io::Result<usize>>
    where
        R: AsyncRead + Unpin,
    {
        self.inbox.reserve(READ_BYTES);
        let read = poll_read_buf(Pin::new(from), cx, &mut self.inbox);
        if read.is_pending() && self.inbox.is_empty() {
            self.inbox = BytesMut::new();
            if self.outbox.is_empty() {
                self.outbox = BytesMut::new();
            }
        }
        read
    }

    /// Sends what goes on, and closes that half.
    pub(super) fn poll_close<W>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        ready!(self.poll_send(cx, to))?;
        Pin::new(to).poll_shutdown(cx)
    }
}
