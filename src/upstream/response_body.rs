//! Implements the body of a response, which owns its connection. The body also sends the rest of a request whose
//! response arrives early. A complete body returns the connection to the idle pool. A body that fails or is dropped
//! closes the connection. The body of a 101 response can be converted into its connection.

use std::io;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http_body::{Body, Frame, SizeHint};

use super::chunk_decoder::{ChunkDecoder, ChunkError, DecodedPart};
use super::connection::{BoxedStream, Connection};
use super::head::{HeadError, ResponseFraming, ResponseHead};
use super::idle_pool::IdlePool;
use super::request_writer::RequestWriter;
use crate::body::WithholdReason;
use crate::clock;

/// An error of an upstream connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The connection was closed before the response was complete.
    #[error("the connection was closed")]
    Closed,
    /// Reading or writing failed.
    #[error("{0}")]
    Failed(#[source] io::Error),
    /// The received bytes are not a valid response head, or the head is too large.
    #[error("{0}")]
    Head(#[from] HeadError),
    /// The chunked body is malformed or too large.
    #[error("{0}")]
    Chunk(#[from] ChunkError),
}

/// The reason why a response body ended early.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamBodyError {
    /// The connection failed, or the body is malformed.
    #[error("the response broke off: {0}")]
    Broken(#[from] ConnectionError),
    /// No bytes arrived within the idle timeout.
    #[error("the response stalled for {} ms", .0.as_millis())]
    Stalled(Duration),
    /// The body must not be forwarded.
    #[error("the response was withheld: {0}")]
    Withheld(#[from] WithholdReason),
}

/// The connection after a 101 response.
pub struct UpgradedConnection {
    /// The stream of the connection.
    pub stream: BoxedStream,
    /// Bytes that were read from the stream after the response head.
    pub read_buf: BytesMut,
}

/// A response body that is read from its connection when it is polled. `S` is the type of the client's request body.
#[derive(Debug)]
pub struct UpstreamBody<S> {
    /// The connection, or `None` after it was released or closed.
    connection: Option<Box<Connection>>,
    /// The writer of the rest of the request, or `None` after the request is complete.
    writer: Option<Box<RequestWriter<S>>>,
    remaining_body: RemainingBody,
    /// Whether the connection can be used for another request after this response.
    is_keep_alive: bool,
    idle_pool: Arc<IdlePool>,
    idle_timeout: Duration,
    last_received_at: Instant,
    /// Whether bytes were received after `last_received_at`. Each read sets this flag, because reading the clock takes
    /// longer.
    has_received: bool,
    /// The error that ended the body. The body returns it after hyper's server has written the preceding bytes. `None`
    /// if no error is delayed.
    delayed_error: Option<ConnectionError>,
    /// Whether the task has yielded after the last chunk, so that hyper's server could write the chunk.
    has_yielded: bool,
    first_chunk: FirstChunk,
}

/// The state of the first chunk of a fast response. The body is pending once after this chunk, so that hyper's server
/// writes the chunk before it reads the many bytes that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FirstChunk {
    /// The first chunk has not been received yet.
    Awaited,
    /// The first chunk was returned to hyper's server, but is not written yet.
    Returned,
    /// The first chunk is written, or the response is not fast.
    Written,
}

/// The part of the body that is not yet decoded.
#[derive(Debug)]
enum RemainingBody {
    /// This number of bytes.
    Length(u64),
    /// The chunks that the decoder has not decoded.
    Chunked(ChunkDecoder),
    /// All bytes until the connection is closed.
    UntilClose,
}

impl RemainingBody {
    /// Decodes the next part of the body and removes it from `read_buf`.
    fn decode(&mut self, read_buf: &mut BytesMut) -> Result<DecodedPart, ChunkError> {
        let take_data = |bytes: usize, read_buf: &mut BytesMut| match bytes {
            0 => DecodedPart::Incomplete,
            // The data fills the whole buffer, so the buffer is returned without a copy.
            _ if bytes == read_buf.capacity() => DecodedPart::Data(mem::take(read_buf).freeze()),
            _ => DecodedPart::Data(read_buf.split_to(bytes).freeze()),
        };
        match self {
            Self::Length(0) => Ok(DecodedPart::Complete),
            Self::Length(length) => {
                let bytes = usize::try_from(*length).unwrap_or(usize::MAX).min(read_buf.len());
                *length -= bytes as u64;
                Ok(take_data(bytes, read_buf))
            }
            Self::Chunked(decoder) => decoder.decode(read_buf),
            Self::UntilClose => Ok(take_data(read_buf.len(), read_buf)),
        }
    }

    fn is_complete(&self) -> bool {
        match self {
            Self::Length(length) => *length == 0,
            Self::Chunked(decoder) => decoder.is_complete(),
            Self::UntilClose => false,
        }
    }
}

impl<S> UpstreamBody<S>
where
    S: Body<Data = Bytes> + Unpin,
{
    pub(super) fn new(
        head: &ResponseHead,
        connection: Box<Connection>,
        writer: RequestWriter<S>,
        idle_pool: Arc<IdlePool>,
        idle_timeout: Duration,
    ) -> Self {
        let remaining_body = match head.framing {
            ResponseFraming::Length(length) => RemainingBody::Length(length),
            ResponseFraming::Chunked => RemainingBody::Chunked(ChunkDecoder::default()),
            ResponseFraming::Close => RemainingBody::UntilClose,
        };
        let mut body = Self {
            first_chunk: if connection.is_fast() { FirstChunk::Awaited } else { FirstChunk::Written },
            connection: Some(connection),
            writer: (!writer.is_complete()).then(|| Box::new(writer)),
            remaining_body,
            is_keep_alive: head.is_keep_alive,
            idle_pool,
            idle_timeout,
            last_received_at: clock::instant(),
            has_received: false,
            delayed_error: None,
            has_yielded: false,
        };
        if body.remaining_body.is_complete() && head.status != StatusCode::SWITCHING_PROTOCOLS {
            body.release_connection();
        }
        body
    }

    /// Returns the connection of a 101 response.
    ///
    /// # Errors
    ///
    /// Fails when the connection is already closed.
    pub fn into_upgraded(self) -> Result<UpgradedConnection, ConnectionError> {
        let connection = self.connection.ok_or(ConnectionError::Closed)?;
        Ok(UpgradedConnection { stream: connection.stream, read_buf: connection.read_buf })
    }

    /// Returns the connection to the idle pool if it can be reused, and closes the connection otherwise.
    fn release_connection(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        if self.is_keep_alive && self.writer.is_none() && connection.read_buf.is_empty() {
            self.idle_pool.put(connection);
        }
    }

    /// Sends the available bytes of the remaining request.
    fn poll_request(&mut self, cx: &mut Context<'_>) {
        let Some((writer, connection)) = self.writer.as_mut().zip(self.connection.as_mut()) else {
            return;
        };
        match writer.poll_send(cx, &mut *connection.stream) {
            Poll::Pending => {}
            Poll::Ready(send_result) => {
                // If the provider stops reading the request, its response can still be complete. Only the connection
                // cannot be reused.
                self.is_keep_alive &= send_result.is_ok();
                self.writer = None;
            }
        }
    }

    /// Polls the next part of the body. This method does not check the idle timeout.
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Result<DecodedPart, ConnectionError>> {
        self.poll_request(cx);
        if let Some(error) = self.delayed_error.take() {
            return Poll::Ready(Err(error));
        }
        let Some(connection) = &mut self.connection else { return Poll::Ready(Ok(DecodedPart::Complete)) };
        loop {
            match self.remaining_body.decode(&mut connection.read_buf)? {
                DecodedPart::Incomplete => {}
                part @ (DecodedPart::Data(_) | DecodedPart::Trailers(_) | DecodedPart::Complete) => {
                    return Poll::Ready(Ok(part));
                }
            }
            match ready!(connection.poll_fill(cx)) {
                Ok(0) if matches!(self.remaining_body, RemainingBody::UntilClose) => {
                    return Poll::Ready(Ok(DecodedPart::Complete));
                }
                Ok(0) => return Poll::Ready(Err(ConnectionError::Closed)),
                Ok(_) => self.has_received = true,
                Err(error) => return Poll::Ready(Err(ConnectionError::Failed(error))),
            }
        }
    }

    /// Polls the idle timeout. Returns `Ready` with the error once no bytes have arrived within the timeout.
    fn poll_idle_timeout(&mut self, cx: &mut Context<'_>) -> Poll<UpstreamBodyError> {
        if mem::take(&mut self.has_received) {
            self.last_received_at = clock::instant();
        }
        let Some(connection) = &mut self.connection else { return Poll::Pending };
        let deadline = self.last_received_at + self.idle_timeout;
        connection.timer.poll_until(deadline, cx).map(|()| UpstreamBodyError::Stalled(self.idle_timeout))
    }
}

impl<S> Body for UpstreamBody<S>
where
    S: Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = UpstreamBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UpstreamBodyError>>> {
        let this = &mut *self;
        // Hyper's server writes its buffered bytes while the body is pending.
        if this.first_chunk == FirstChunk::Returned {
            (this.first_chunk, this.has_yielded) = (FirstChunk::Written, true);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let body_part = match this.poll_part(cx) {
            // Hyper's server drops its buffered bytes on an error, so the task yields before it returns the
            // error.
            Poll::Ready(Err(error)) if !mem::replace(&mut this.has_yielded, true) => {
                this.delayed_error = Some(error);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(body_part) => body_part.map_err(UpstreamBodyError::Broken),
            Poll::Pending => {
                this.has_yielded = true;
                Err(ready!(this.poll_idle_timeout(cx)))
            }
        };
        Poll::Ready(match body_part {
            Ok(DecodedPart::Data(data)) => {
                this.has_yielded = false;
                if this.first_chunk == FirstChunk::Awaited {
                    this.first_chunk = FirstChunk::Returned;
                }
                if this.remaining_body.is_complete() {
                    this.release_connection();
                }
                Some(Ok(Frame::data(data)))
            }
            Ok(DecodedPart::Trailers(trailers)) => {
                this.release_connection();
                Some(Ok(Frame::trailers(trailers)))
            }
            Ok(DecodedPart::Complete | DecodedPart::Incomplete) => {
                this.release_connection();
                None
            }
            Err(error) => {
                this.connection = None;
                Some(Err(error))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.remaining_body.is_complete()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.remaining_body {
            RemainingBody::Length(length) => SizeHint::with_exact(*length),
            RemainingBody::Chunked(decoder) if decoder.is_complete() => SizeHint::with_exact(0),
            RemainingBody::Chunked(_) | RemainingBody::UntilClose => SizeHint::default(),
        }
    }
}
