//! Writes a request to the upstream: its head, and its body as the bytes arrive from the client. A small chunk that is
//! available with the head is written together with it, but no chunk is delayed until the next one arrives.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use http_body::Body;

use super::connection::ByteStream;
use super::head::RequestFraming;
use crate::body::replay::{AttemptBody, UploadProgress};

/// Maximum size of a chunk that is copied into the buffer of the head. For a small chunk, a copy and a write of one
/// buffer are faster than a write of two buffers.
const MAX_COPIED_BYTES: usize = 4 * 1024;

/// The reason why sending the request ended early.
#[derive(Debug)]
pub(super) enum RequestWriteError {
    /// The connection accepts no more bytes.
    Connection(io::Error),
    /// The request body failed, or a later attempt has superseded it.
    Body,
}

/// A request that is being sent, and its bytes that the connection has not accepted yet.
pub(super) struct RequestWriter<B> {
    /// The head, the chunk sizes and small chunks, which are written first. The head contains a key.
    buffer: BytesMut,
    /// A large chunk, which is written after `buffer` without a copy.
    large_chunk: Bytes,
    /// The bytes of the chunked coding that follow `large_chunk`.
    chunk_end: &'static [u8],
    /// The body, or `None` after its end was read.
    body: Option<AttemptBody<B>>,
    framing: RequestFraming,
    upload: UploadProgress<B>,
    /// Whether the body has not been polled yet.
    is_first_poll: bool,
    /// Whether the connection has accepted a byte of the request.
    has_started: bool,
    /// Whether the stream is flushed after the last written byte.
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

    /// Returns whether the connection has accepted a byte of the request.
    pub(super) fn has_started(&self) -> bool {
        self.has_started
    }

    /// Returns whether the whole request is sent.
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

    /// Buffers one chunk of the body with its framing.
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

    /// Drops the body and buffers the bytes that end it.
    fn finish_body(&mut self) {
        self.body = None;
        if self.framing == RequestFraming::Chunked {
            if self.large_chunk.is_empty() {
                self.buffer.extend_from_slice(b"0\r\n\r\n");
            } else {
                self.chunk_end = b"\r\n0\r\n\r\n";
            }
        }
    }

    /// Writes all buffered bytes. Returns `Ready` once the connection has accepted them.
    fn poll_write<S: ByteStream + ?Sized>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut stream = Pin::new(&mut *stream);
            let written_bytes =
                match (self.buffer.is_empty(), self.large_chunk.is_empty() && self.chunk_end.is_empty()) {
                    (true, true) => return Poll::Ready(Ok(())),
                    (false, true) => ready!(stream.as_mut().poll_write(cx, &self.buffer))?,
                    (_, false) => {
                        let slices =
                            [&self.buffer[..], &self.large_chunk[..], self.chunk_end].map(IoSlice::new);
                        ready!(stream.as_mut().poll_write_vectored(cx, &slices))?
                    }
                };
            if written_bytes == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            if !std::mem::replace(&mut self.has_started, true) {
                self.upload.mark_started();
            }
            self.remove_written(written_bytes);
        }
    }

    /// Removes the first `written_bytes` from the buffers.
    fn remove_written(&mut self, written_bytes: usize) {
        let buffer_bytes = written_bytes.min(self.buffer.len());
        self.buffer.advance(buffer_bytes);
        let chunk_bytes = (written_bytes - buffer_bytes).min(self.large_chunk.len());
        self.large_chunk.advance(chunk_bytes);
        let end_bytes = (written_bytes - buffer_bytes - chunk_bytes).min(self.chunk_end.len());
        self.chunk_end = &self.chunk_end[end_bytes..];
    }
}

impl<B> fmt::Debug for RequestWriter<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestWriter").field("framing", &self.framing).finish_non_exhaustive()
    }
}
