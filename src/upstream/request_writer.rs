//! Writes a request to the upstream: its head, and its body as it arrives. Small pieces are written together,
//! but received bytes are never delayed until more arrive.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use http_body::Body;

use super::head::BodyLength;
use super::wire::Stream;
use crate::body::replay::{AttemptBody, Upload};

/// A piece up to this size is copied behind the previous bytes: one buffer is written faster than two.
const COPIED_BYTES_MAX: usize = 4 * 1024;

/// The reason that sending the request ended early.
#[derive(Debug)]
pub(super) enum SendFault {
    /// The connection accepts no more bytes.
    Wire(io::Error),
    /// The client's body broke off, cannot be read back, or belongs to another attempt now.
    Body,
}

/// A request that is being sent.
pub(super) struct RequestWriter<B> {
    /// The head, or the frame before a chunk; the head contains a key.
    front: BytesMut,
    piece: Bytes,
    /// The frame behind a chunk.
    back: &'static [u8],
    /// The body, until its end was read.
    body: Option<AttemptBody<B>>,
    length: BodyLength,
    /// Records that the connection has accepted the first byte.
    upload: Upload<B>,
    is_opening: bool,
    has_begun: bool,
    is_flushed: bool,
}

impl<B> RequestWriter<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// The framing of `body`.
    pub(super) fn length(body: &AttemptBody<B>) -> BodyLength {
        match body.size_hint().exact() {
            _ if body.is_end_stream() => BodyLength::Empty,
            Some(bytes) => BodyLength::Known(bytes),
            None => BodyLength::Chunked,
        }
    }

    /// A request of which no byte is sent.
    pub(super) fn new(head: BytesMut, length: BodyLength, body: AttemptBody<B>) -> Self {
        let upload = body.upload();
        let body = (length != BodyLength::Empty).then_some(body);
        Self {
            front: head,
            piece: Bytes::new(),
            back: b"",
            body,
            length,
            upload,
            is_opening: true,
            has_begun: false,
            is_flushed: false,
        }
    }

    /// Whether the connection has accepted a byte of the request.
    pub(super) fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Whether the request is sent completely.
    pub(super) fn is_over(&self) -> bool {
        self.body.is_none() && self.is_flushed
    }

    /// Sends the bytes that are available.
    pub(super) fn poll_send<S>(&mut self, cx: &mut Context<'_>, stream: &mut S) -> Poll<Result<(), SendFault>>
    where
        S: Stream + ?Sized,
    {
        loop {
            // The first part of the body that is already available is written together with the head.
            if !std::mem::take(&mut self.is_opening) {
                ready!(self.poll_write(cx, stream)).map_err(SendFault::Wire)?;
            }
            if self.body.is_some() && self.poll_next(cx)?.is_ready() {
                continue;
            }
            ready!(self.poll_write(cx, stream)).map_err(SendFault::Wire)?;
            if !self.is_flushed {
                ready!(Pin::new(&mut *stream).poll_flush(cx)).map_err(SendFault::Wire)?;
                self.is_flushed = true;
            }
            return if self.body.is_none() { Poll::Ready(Ok(())) } else { Poll::Pending };
        }
    }

    /// Takes the next piece of the body, or its end.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SendFault>> {
        let Some(body) = &mut self.body else { return Poll::Ready(Ok(())) };
        let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
        self.is_flushed = false;
        match frame {
            Some(Ok(frame)) => {
                let is_last = body.is_end_stream();
                if let Ok(piece) = frame.into_data() {
                    self.put(piece);
                }
                if is_last {
                    self.end();
                }
            }
            Some(Err(_)) => return Poll::Ready(Err(SendFault::Body)),
            None => self.end(),
        }
        Poll::Ready(Ok(()))
    }

    fn put(&mut self, piece: Bytes) {
        let is_chunked = self.length == BodyLength::Chunked;
        if piece.is_empty() {
            return;
        }
        if is_chunked {
            self.front.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        }
        if piece.len() <= COPIED_BYTES_MAX {
            self.front.extend_from_slice(&piece);
            self.front.extend_from_slice(if is_chunked { b"\r\n" } else { b"" });
        } else {
            self.back = if is_chunked { b"\r\n" } else { b"" };
            self.piece = piece;
        }
    }

    fn end(&mut self) {
        self.body = None;
        if self.length == BodyLength::Chunked {
            const LAST: &[u8] = b"\r\n0\r\n\r\n";
            if self.piece.is_empty() {
                self.front.extend_from_slice(&LAST[2..]);
            } else {
                self.back = LAST;
            }
        }
    }

    /// Writes all bytes that are ready.
    fn poll_write<S: Stream + ?Sized>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut stream = Pin::new(&mut *stream);
            let written = match (self.front.is_empty(), self.piece.is_empty() && self.back.is_empty()) {
                (true, true) => return Poll::Ready(Ok(())),
                (false, true) => ready!(stream.as_mut().poll_write(cx, &self.front))?,
                (_, false) => {
                    let slices = [&self.front[..], &self.piece[..], self.back].map(IoSlice::new);
                    ready!(stream.as_mut().poll_write_vectored(cx, &slices))?
                }
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            if !std::mem::replace(&mut self.has_begun, true) {
                self.upload.begun();
            }
            self.advance(written);
        }
    }

    fn advance(&mut self, mut written: usize) {
        let front = written.min(self.front.len());
        self.front.advance(front);
        written -= front;
        let piece = written.min(self.piece.len());
        self.piece.advance(piece);
        self.back = &self.back[(written - piece).min(self.back.len())..];
    }
}

impl<B> fmt::Debug for RequestWriter<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestWriter").field("length", &self.length).finish_non_exhaustive()
    }
}
