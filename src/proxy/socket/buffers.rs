//! The two buffers of each direction: bytes that were read from one end and not yet processed, and bytes to
//! send to the other. Frames are validated as they are read. A close or a violation is thus detected at once,
//! also while no frames are processed.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::io::poll_read_buf;

use super::session_end::{SessionEnd, SessionSide};
use crate::body::budget::BufferShare;
use crate::policy::frame::{FrameValidator, Sender, StreamEnd, Violation};

/// Maximum bytes of one read.
pub(super) const READ_BYTES: usize = 16 * 1024;

/// Bytes that were read from one end and not yet processed.
#[derive(Debug, Default)]
pub(super) struct ReadBuffer {
    pub(super) bytes: BytesMut,
    /// `None` for unknown protocols: every byte is forwarded.
    validator: Option<Box<FrameValidator>>,
}

/// Limits for reading ahead.
pub(super) struct ReadAhead<'a> {
    /// Maximum bytes from the client that may wait.
    pub(super) bytes_max: usize,
    /// The session's share of the buffer budget.
    pub(super) share: &'a mut BufferShare,
    /// Bytes in the session's other buffers.
    pub(super) other_bytes: usize,
}

/// Bytes that a session may buffer without the budget: one read and one write of each direction.
pub(super) const FREE: usize = 4 * READ_BYTES;

/// The result of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadResult {
    /// Bytes to process.
    Bytes,
    /// Only bytes behind a close or a violation, which were dropped.
    Dropped,
    /// The connection has ended.
    Disconnected,
}

impl ReadBuffer {
    /// A buffer for the bytes of `sender`, of which `early` were read already. Without `checked`,
    /// frames are not validated.
    pub(super) fn new(sender: Sender, checked: bool, early: BytesMut) -> Self {
        let mut buffer =
            Self { bytes: early, validator: checked.then(|| Box::new(FrameValidator::new(sender))) };
        buffer.check(0);
        buffer
    }

    /// Adds bytes that were read elsewhere.
    pub(super) fn extend(&mut self, early: &[u8]) {
        let before = self.bytes.len();
        self.bytes.extend_from_slice(early);
        self.check(before);
    }

    /// The reason that no more bytes are accepted, if there is one.
    pub(super) fn end(&self) -> Option<StreamEnd> {
        self.validator.as_ref().and_then(|validator| validator.end())
    }

    /// The protocol violation, if there was one.
    pub(super) fn violation(&self) -> Option<Violation> {
        match self.end() {
            Some(StreamEnd::Violated(violation)) => Some(violation),
            Some(StreamEnd::Closed { .. }) | None => None,
        }
    }

    /// The end of the session by the client: a close or a violation.
    pub(super) fn ending(&self) -> Option<SessionEnd> {
        self.end().map(|end| match end {
            StreamEnd::Closed { code } => SessionEnd::ClientClosed { code },
            StreamEnd::Violated(violation) => SessionEnd::Violated(violation, SessionSide::Client),
        })
    }

    /// Reads once. While a read with an empty buffer is pending, the buffer holds no memory.
    pub(super) fn poll_read<R>(&mut self, cx: &mut Context<'_>, from: &mut R) -> Poll<ReadResult>
    where
        R: AsyncRead + Unpin,
    {
        let before = self.bytes.len();
        self.bytes.reserve(READ_BYTES);
        let read = poll_read_buf(Pin::new(from), cx, &mut self.bytes);
        if read.is_pending() && self.bytes.is_empty() {
            self.bytes = BytesMut::new();
        }
        let Ok(1..) = ready!(read) else { return Poll::Ready(ReadResult::Disconnected) };
        self.check(before);
        Poll::Ready(if self.bytes.len() > before { ReadResult::Bytes } else { ReadResult::Dropped })
    }

    /// Reads ahead while the session waits for something else. Ready when that wait is to be
    /// cancelled: the client has disconnected or closed, violates the protocol, or sends more than
    /// `ahead` allows.
    pub(super) fn poll_watch<R>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut R,
        ahead: &mut ReadAhead<'_>,
    ) -> Poll<SessionEnd>
    where
        R: AsyncRead + Unpin,
    {
        loop {
            if let Some(ending) = self.ending() {
                return Poll::Ready(ending);
            }
            if self.bytes.len() > ahead.bytes_max {
                return Poll::Ready(SessionEnd::Violated(Violation::TooLarge, SessionSide::Client));
            }
            if !ahead.share.cover(ahead.other_bytes + self.bytes.capacity()) {
                return Poll::Ready(SessionEnd::BuffersFull);
            }
            if ready!(self.poll_read(cx, client)) == ReadResult::Disconnected {
                return Poll::Ready(SessionEnd::ClientDisconnected);
            }
        }
    }

    /// `poll_watch` as a future.
    pub(super) async fn watch<R: AsyncRead + Unpin>(
        &mut self,
        client: &mut R,
        mut ahead: ReadAhead<'_>,
    ) -> SessionEnd {
        poll_fn(|cx| self.poll_watch(cx, client, &mut ahead)).await
    }

    /// Validates the bytes after `before`, and drops the bytes that must not be processed.
    fn check(&mut self, before: usize) {
        if let Some(validator) = &mut self.validator {
            let checked = validator.check(self.bytes.get(before..).unwrap_or_default());
            self.bytes.truncate(before + checked.valid);
        }
    }
}

/// Bytes to send to one end.
#[derive(Debug, Default)]
pub(super) struct SendBuffer {
    pub(super) bytes: BytesMut,
    is_unflushed: bool,
}

impl SendBuffer {
    /// Sends all bytes. Until then no bytes for this end are read: backpressure from a slow receiver to the
    /// sender.
    pub(super) fn poll_send<W>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        while !self.bytes.is_empty() {
            let sent = ready!(Pin::new(&mut *to).poll_write(cx, &self.bytes))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.bytes.advance(sent);
            self.is_unflushed = true;
        }
        if self.is_unflushed {
            ready!(Pin::new(to).poll_flush(cx))?;
            self.is_unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Frees the memory of an empty buffer.
    pub(super) fn free_if_empty(&mut self) {
        if self.bytes.is_empty() {
            self.bytes = BytesMut::new();
        }
    }

    /// Sends all bytes, and shuts down the write half.
    pub(super) fn poll_close<W>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        ready!(self.poll_send(cx, to))?;
        Pin::new(to).poll_shutdown(cx)
    }
}

/// Reads and drops the rest of a client's bytes: a connection that is closed with unread bytes is
/// reset, and the client would lose the close frame that was sent to it.
pub(super) async fn drain<R: AsyncRead + Unpin>(client: &mut R) {
    let mut discarded = BytesMut::with_capacity(READ_BYTES);
    while let Ok(1..) = poll_fn(|cx| poll_read_buf(Pin::new(&mut *client), cx, &mut discarded)).await {
        discarded.clear();
    }
}
