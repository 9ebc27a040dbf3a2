//! Writes a request to the upstream: its head, and its body as the bytes arrive from the client. Small chunks are
//! joined into one write, but a chunk is never delayed to wait for the next one.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use http_body::Body;

use super::connection::ByteStream;
use super::head::RequestFraming;
use crate::body::replay::{AttemptBody, UploadProgress};

/// Maximum size of a chunk that is copied into the buffer of the head, because one buffer is written faster
/// than two.
const MAX_COPIED_BYTES: usize = 4 * 1024;

/// The reason why sending the request ended early.
#[derive(Debug)]
pub(super) enum RequestWriteError {
    /// The connection accepts no more bytes.
    Connection(io::Error),
    /// The request body failed, or another attempt has taken it over.
    Body,
}

/// A request that is being sent.
pub(super) struct RequestWriter<B> {
    /// The head, the chunk sizes and small chunks, which are written first. The head contains a key.
    buffer: BytesMut,
    /// A large chunk, which is written after `buffer` without a copy.
    large_chunk: Bytes,
    /// The framing that follows `large_chunk`.
    chunk_end: &'static [u8],
    /// The body, or `None` after its end was read.
    body: Option<AttemptBody<B>>,
    framing: RequestFraming,
    upload: UploadProgress<B>,
    /// Whether the body has not been polled yet.
    is_first_poll: bool,
    /// Whether the connection has accepted a byte.
    has_started: bool,
    is_flushed: bool,
}

impl<B> RequestWriter<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    pub(super) fn new(head: BytesMut, framing: RequestFraming, body: AttemptBody<B>) -> Self {
        let upload = body.upload();
        let body = (framing != RequestFraming::Empty).then_some(body);
        Self {
            buffer: head,
            large_chunk: Bytes::new(),
            chunk_end: b"",
            body,
            framing,
            upload,
            is_first_poll: true,
            has_started: false,
            is_flushed: false,
        }
    }

    /// Whether the connection has accepted a byte of the request.
    pub(super) fn has_started(&self) -> bool {
        self.has_started
    }

    /// Whether the whole request is sent.
    pub(super) fn is_complete(&self) -> bool {
        self.body.is_none() && self.is_flushed
    }

    /// Sends the available bytes. Returns `Ready` once the whole request is sent.
    pub(super) fn poll_send<S>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<Result<(), RequestWriteError>>
    where
        S: ByteStream + ?Sized,
    {
        loop {
            // The first chunk of the body, if it is available, is written together with the head.
            if !std::mem::take(&mut self.is_first_poll) {
                ready!(self.poll_write(cx, stream)).map_err(RequestWriteError::Connection)?;
            }
            if self.body.is_some() && self.poll_body(cx)?.is_ready() {
                continue;
            }
            ready!(self.poll_write(cx, stream)).map_err(RequestWriteError::Connection)?;
            if !self.is_flushed {
                ready!(Pin::new(&mut *stream).poll_flush(cx)).map_err(RequestWriteError::Connection)?;
                self.is_flushed = true;
            }
            return if self.body.is_none() { Poll::Ready(Ok(())) } else { Poll::Pending };
        }
    }

    /// Buffers the next chunk or the end of the body.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RequestWriteError>> {
        let Some(body) = &mut self.body else { return Poll::Ready(Ok(())) };
        let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
        self.is_flushed = false;
        match frame {
            Some(Ok(frame)) => {
                let is_last = body.is_end_stream();
                if let Ok(data) = frame.into_data() {
                    self.push_data(data);
                }
                if is_last {
                    self.finish_body();
                }
            }
            Some(Err(_)) => return Poll::Ready(Err(RequestWriteError::Body)),
            None => self.finish_body(),
        }
        Poll::Ready(Ok(()))
    }

    fn push_data(&mut self, data: Bytes) {
        if data.is_empty() {
            return;
        }
        let is_chunked = self.framing == RequestFraming::Chunked;
        if is_chunked {
            self.buffer.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
        }
        let chunk_end: &'static [u8] = if is_chunked { b"\r\n" } else { b"" };
        if data.len() <= MAX_COPIED_BYTES {
            self.buffer.extend_from_slice(&data);
            self.buffer.extend_from_slice(chunk_end);
        } else {
            (self.large_chunk, self.chunk_end) = (data, chunk_end);
        }
    }

    fn finish_body(&mut self) {
        self.body = None;
        if self.framing == RequestFraming::Chunked {
            const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";
            if self.large_chunk.is_empty() {
                self.buffer.extend_from_slice(&LAST_CHUNK[2..]);
            } else {
                self.chunk_end = LAST_CHUNK;
            }
        }
    }

    /// Writes all buffered bytes.
    fn poll_write<S: ByteStream + ?Sized>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut stream = Pin::new(&mut *stream);
            let written =
                match (self.buffer.is_empty(), self.large_chunk.is_empty() && self.chunk_end.is_empty()) {
                    (true, true) => return Poll::Ready(Ok(())),
                    (false, true) => ready!(stream.as_mut().poll_write(cx, &self.buffer))?,
                    (_, false) => {
                        let slices =
                            [&self.buffer[..], &self.large_chunk[..], self.chunk_end].map(IoSlice::new);
                        ready!(stream.as_mut().poll_write_vectored(cx, &slices))?
                    }
                };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            if !std::mem::replace(&mut self.has_started, true) {
                self.upload.mark_started();
            }
            self.advance(written);
        }
    }

    /// Removes `written` bytes from the buffers.
    fn advance(&mut self, written: usize) {
        let from_buffer = written.min(self.buffer.len());
        self.buffer.advance(from_buffer);
        let from_chunk = (written - from_buffer).min(self.large_chunk.len());
        self.large_chunk.advance(from_chunk);
        let from_end = (written - from_buffer - from_chunk).min(self.chunk_end.len());
        self.chunk_end = &self.chunk_end[from_end..];
    }
}

impl<B> fmt::Debug for RequestWriter<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestWriter").field("framing", &self.framing).finish_non_exhaustive()
    }
}
