//! Buffers the bytes of a session. Each direction has one buffer for bytes that were read and not processed yet, and
//! one for bytes to send. Frames are validated when they are read, so that a close frame or a protocol violation is
//! detected even while no frames are processed.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::io::poll_read_buf;

use super::session_end::{SessionEnd, SessionSide};
use crate::body::budget::BufferReservation;
use crate::policy::websocket_frame::{FrameValidator, Sender, StreamEnd, Violation};

/// Maximum number of bytes of one read.
pub(super) const MAX_READ_SIZE: usize = 16 * 1024;

/// Bytes that were read from one side and not yet processed.
#[derive(Debug, Default)]
pub(super) struct ReadBuffer {
    pub(super) bytes: BytesMut,
    /// Validates the frames, or is `None` for an unknown protocol, whose bytes are all forwarded.
    validator: Option<Box<FrameValidator>>,
}

/// The limits for reading ahead while a session waits.
pub(super) struct ReadAheadLimits<'a> {
    /// Maximum number of bytes from the client that may be buffered.
    pub(super) max_bytes: usize,
    /// The session's reservation in the buffer budget.
    pub(super) reservation: &'a mut BufferReservation,
    /// Memory of the session's other buffers.
    pub(super) other_bytes: usize,
}

/// Bytes of a session that do not count against the budget: one read and one write in each direction.
pub(super) const UNBUDGETED_SESSION_BYTES: usize = 4 * MAX_READ_SIZE;

/// The result of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadResult {
    /// The buffer has new bytes to process.
    Bytes,
    /// All bytes were dropped, because they followed a close frame or a violation.
    Dropped,
    /// The connection was closed, or the read failed.
    Disconnected,
}

impl ReadBuffer {
    /// Creates a buffer for the bytes of `sender`, which start with `already_read`. Unless `is_validated`,
    /// every byte is accepted.
    pub(super) fn new(sender: Sender, is_validated: bool, already_read: BytesMut) -> Self {
        let validator = is_validated.then(|| Box::new(FrameValidator::new(sender)));
        let mut buffer = Self { bytes: already_read, validator };
        buffer.validate_from(0);
        buffer
    }

    /// Adds bytes that were already read.
    pub(super) fn extend(&mut self, already_read: &[u8]) {
        let former_length = self.bytes.len();
        self.bytes.extend_from_slice(already_read);
        self.validate_from(former_length);
    }

    /// Returns the close frame or violation after which no more bytes are accepted.
    pub(super) fn stream_end(&self) -> Option<StreamEnd> {
        self.validator.as_ref().and_then(|validator| validator.end())
    }

    /// Returns the protocol violation, if one was detected.
    pub(super) fn violation(&self) -> Option<Violation> {
        match self.stream_end() {
            Some(StreamEnd::Violated(violation)) => Some(violation),
            Some(StreamEnd::Closed { .. }) | None => None,
        }
    }

    /// Returns the end of the session by the client: a close frame or a violation.
    pub(super) fn client_end(&self) -> Option<SessionEnd> {
        self.stream_end().map(|end| match end {
            StreamEnd::Closed { code } => SessionEnd::ClientClosed { code },
            StreamEnd::Violated(violation) => SessionEnd::Violated(violation, SessionSide::Client),
        })
    }

    /// Reads once. An empty buffer is freed while the read is pending.
    pub(super) fn poll_read<R>(&mut self, cx: &mut Context<'_>, from: &mut R) -> Poll<ReadResult>
    where
        R: AsyncRead + Unpin,
    {
        let former_length = self.bytes.len();
        self.bytes.reserve(MAX_READ_SIZE);
        let read = poll_read_buf(Pin::new(from), cx, &mut self.bytes);
        if read.is_pending() && self.bytes.is_empty() {
            self.bytes = BytesMut::new();
        }
        let Ok(1..) = ready!(read) else { return Poll::Ready(ReadResult::Disconnected) };
        self.validate_from(former_length);
        Poll::Ready(if self.bytes.len() > former_length { ReadResult::Bytes } else { ReadResult::Dropped })
    }

    /// Reads ahead while the session waits. Returns the end of the session when the wait must be cancelled, because
    /// the client has disconnected, has sent a close frame, violates the protocol, or exceeds `limits`.
    pub(super) fn poll_read_ahead<R>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut R,
        limits: &mut ReadAheadLimits<'_>,
    ) -> Poll<SessionEnd>
    where
        R: AsyncRead + Unpin,
    {
        loop {
            if let Some(end) = self.client_end() {
                return Poll::Ready(end);
            }
            if self.bytes.len() > limits.max_bytes {
                return Poll::Ready(SessionEnd::Violated(Violation::TooLarge, SessionSide::Client));
            }
            if !limits.reservation.try_resize(limits.other_bytes + self.bytes.capacity()) {
                return Poll::Ready(SessionEnd::BuffersFull);
            }
            if ready!(self.poll_read(cx, client)) == ReadResult::Disconnected {
                return Poll::Ready(SessionEnd::ClientDisconnected);
            }
        }
    }

    /// Awaits [`poll_read_ahead`](Self::poll_read_ahead).
    pub(super) async fn read_ahead<R: AsyncRead + Unpin>(
        &mut self,
        client: &mut R,
        mut limits: ReadAheadLimits<'_>,
    ) -> SessionEnd {
        poll_fn(|cx| self.poll_read_ahead(cx, client, &mut limits)).await
    }

    /// Validates the bytes from `start` on, and drops the bytes that must not be processed.
    fn validate_from(&mut self, start: usize) {
        if let Some(validator) = &mut self.validator {
            let validation = validator.validate(self.bytes.get(start..).unwrap_or_default());
            self.bytes.truncate(start + validation.valid_length);
        }
    }
}

/// Bytes to send to one side.
#[derive(Debug, Default)]
pub(super) struct SendBuffer {
    pub(super) bytes: BytesMut,
    /// Whether written bytes are not flushed yet.
    is_unflushed: bool,
}

impl SendBuffer {
    /// Sends all bytes. The session does not read from the other side until all bytes are sent, so that a
    /// slow receiver slows down the sender.
    pub(super) fn poll_send<W>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        while !self.bytes.is_empty() {
            let sent_count = ready!(Pin::new(&mut *to).poll_write(cx, &self.bytes))?;
            if sent_count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.bytes.advance(sent_count);
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

    /// Sends all bytes, and shuts down the write half of the connection.
    pub(super) fn poll_close<W>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        ready!(self.poll_send(cx, to))?;
        Pin::new(to).poll_shutdown(cx)
    }
}

/// Reads and drops the rest of a client's bytes. Closing a connection with unread bytes resets the
/// connection, and the client could lose the close frame that was sent to it.
pub(super) async fn drain_client<R: AsyncRead + Unpin>(client: &mut R) {
    let mut discarded = BytesMut::with_capacity(MAX_READ_SIZE);
    while let Ok(1..) = poll_fn(|cx| poll_read_buf(Pin::new(&mut *client), cx, &mut discarded)).await {
        discarded.clear();
    }
}
