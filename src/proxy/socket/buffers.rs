//! The two buffers of a direction: what was read of one end and not yet acted on, and what is sent to
//! the other. Frames are checked as they are read, so a close or a violation is known at once, also
//! while nothing is acted on.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::io::poll_read_buf;

use super::ending::{Ending, Side};
use crate::body::budget::BufferShare;
use crate::policy::frame::{FrameValidator, Sender, StreamEnd, Violation};

/// Room for one read.
pub(super) const READ_BYTES: usize = 16 * 1024;

/// What was read of one end and not yet acted on.
#[derive(Debug, Default)]
pub(super) struct ReadBuffer {
    pub(super) bytes: BytesMut,
    /// `None` where nothing is known of what passes: every byte does.
    rules: Option<Box<FrameValidator>>,
}

/// How much may be read ahead.
pub(super) struct ReadAhead<'a> {
    /// Bytes of the client that may wait.
    pub(super) bytes_max: usize,
    /// What the session has taken of the budget.
    pub(super) share: &'a mut BufferShare,
    /// Bytes of its other buffers.
    pub(super) beside: usize,
}

/// What a session may buffer for free: a read and a write of each direction.
pub(super) const FREE: usize = 4 * READ_BYTES;

/// What a read has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// Bytes that may be acted on.
    Some,
    /// Bytes that were dropped: they follow a close or a violation.
    Dropped,
    /// The connection has ended.
    Gone,
}

impl ReadBuffer {
    /// One for what `sender` sends, of which `early` was read already. Where the frames are not
    /// `checked`, every byte passes.
    pub(super) fn new(sender: Sender, checked: bool, early: BytesMut) -> Self {
        let mut buffer = Self { bytes: early, rules: checked.then(|| Box::new(FrameValidator::new(sender))) };
        buffer.check(0);
        buffer
    }

    /// Adds what was read elsewhere.
    pub(super) fn extend(&mut self, early: &[u8]) {
        let before = self.bytes.len();
        self.bytes.extend_from_slice(early);
        self.check(before);
    }

    /// Why nothing more is accepted, once that is so.
    pub(super) fn end(&self) -> Option<StreamEnd> {
        self.rules.as_ref().and_then(|rules| rules.end())
    }

    /// The rule that was broken.
    pub(super) fn violation(&self) -> Option<Violation> {
        match self.end() {
            Some(StreamEnd::Violated(violation)) => Some(violation),
            Some(StreamEnd::Closed { .. }) | None => None,
        }
    }

    /// How the session ends by what was read: the client has closed, or breaks the rules.
    pub(super) fn ending(&self) -> Option<Ending> {
        self.end().map(|end| match end {
            StreamEnd::Closed { code } => Ending::ClientClosed { code },
            StreamEnd::Violated(violation) => Ending::Violated(violation, Side::Client),
        })
    }

    /// Reads once. A buffer that waits without a byte in it takes no memory.
    pub(super) fn poll_read<R>(&mut self, cx: &mut Context<'_>, from: &mut R) -> Poll<Read>
    where
        R: AsyncRead + Unpin,
    {
        let before = self.bytes.len();
        self.bytes.reserve(READ_BYTES);
        let read = poll_read_buf(Pin::new(from), cx, &mut self.bytes);
        if read.is_pending() && self.bytes.is_empty() {
            self.bytes = BytesMut::new();
        }
        let Ok(1..) = ready!(read) else { return Poll::Ready(Read::Gone) };
        self.check(before);
        Poll::Ready(if self.bytes.len() > before { Read::Some } else { Read::Dropped })
    }

    /// Reads ahead while the session is busy elsewhere; ready when it need not go on: the client has
    /// left or closed, breaks the rules, or sends more than `ahead` allows.
    pub(super) fn poll_watch<R>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut R,
        ahead: &mut ReadAhead<'_>,
    ) -> Poll<Ending>
    where
        R: AsyncRead + Unpin,
    {
        loop {
            if let Some(ending) = self.ending() {
                return Poll::Ready(ending);
            }
            if self.bytes.len() > ahead.bytes_max {
                return Poll::Ready(Ending::Violated(Violation::TooLarge, Side::Client));
            }
            if !ahead.share.cover(ahead.beside + self.bytes.capacity()) {
                return Poll::Ready(Ending::NoMemory);
            }
            if ready!(self.poll_read(cx, client)) == Read::Gone {
                return Poll::Ready(Ending::ClientLeft);
            }
        }
    }

    /// The same as a future.
    pub(super) async fn watch<R: AsyncRead + Unpin>(
        &mut self,
        client: &mut R,
        mut ahead: ReadAhead<'_>,
    ) -> Ending {
        poll_fn(|cx| self.poll_watch(cx, client, &mut ahead)).await
    }

    /// Checks what was read behind `before`, and drops what may not be acted on.
    fn check(&mut self, before: usize) {
        if let Some(rules) = &mut self.rules {
            let checked = rules.check(self.bytes.get(before..).unwrap_or_default());
            self.bytes.truncate(before + checked.valid);
        }
    }
}

/// What is sent to one end.
#[derive(Debug, Default)]
pub(super) struct SendBuffer {
    pub(super) bytes: BytesMut,
    is_unflushed: bool,
}

impl SendBuffer {
    /// Sends all of it. Nothing more is read for this end before, so that a slow end slows the other
    /// down.
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

    /// Gives its memory back when nothing is to be sent.
    pub(super) fn rest(&mut self) {
        if self.bytes.is_empty() {
            self.bytes = BytesMut::new();
        }
    }

    /// Sends all of it, and closes that half.
    pub(super) fn poll_close<W>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        ready!(self.poll_send(cx, to))?;
        Pin::new(to).poll_shutdown(cx)
    }
}

/// Reads and drops what a client still sends, up to its end: a connection that is closed with unread
/// bytes is reset, and the client loses the close that was sent to it.
pub(super) async fn drain<R: AsyncRead + Unpin>(client: &mut R) {
    let mut scrap = BytesMut::with_capacity(READ_BYTES);
    while let Ok(1..) = poll_fn(|cx| poll_read_buf(Pin::new(&mut *client), cx, &mut scrap)).await {
        scrap.clear();
    }
}
