//! The body of a response, together with the connection that it is read from: when the body is complete, the
//! connection returns to the idle pool; when it breaks off or is dropped, the connection is closed.

use std::io;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http_body::{Body, Frame, SizeHint};

use super::chunks::{ChunkError, Chunks, Next};
use super::head::{BodyEnd, HeadError, ResponseHead};
use super::idle::Idle;
use super::request_writer::RequestWriter;
use super::wire::{Connection, Wire};
use crate::body::Withheld;
use crate::clock;

/// What is wrong with an upstream connection.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// It was closed before the response was complete.
    #[error("it was closed")]
    Closed,
    /// It failed with an I/O error.
    #[error("{0}")]
    Failed(#[source] io::Error),
    /// The bytes received are not a response head.
    #[error("{0}")]
    Head(#[from] HeadError),
    /// The chunked body is malformed or too large.
    #[error("{0}")]
    Chunk(#[from] ChunkError),
}

/// Why a response body broke off.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamBodyError {
    /// The connection broke.
    #[error("the response broke off: {0}")]
    Broken(#[from] WireError),
    /// No bytes came within the idle timeout.
    #[error("the response stalled for {} ms", .0.as_millis())]
    Stalled(Duration),
    /// The body must not be forwarded.
    #[error("the response was cut: {0}")]
    Withheld(#[from] Withheld),
}

/// The connection after a 101.
pub struct Switched {
    /// The stream of the connection.
    pub stream: Wire,
    /// Bytes already read from the stream.
    pub read_buf: BytesMut,
}

/// A response body as it arrives. `S` is the type of the client's request body.
#[derive(Debug)]
pub struct UpstreamBody<S> {
    connection: Option<Box<Connection>>,
    /// The request, while some of it is still to be sent: a response may begin before the request is
    /// complete.
    writer: Option<Box<RequestWriter<S>>>,
    remaining: Remaining,
    stays_open: bool,
    idle: Arc<Idle>,
    idle_timeout: Duration,
    moved_at: Instant,
    /// Whether bytes have come since `moved_at`.
    has_moved: bool,
    /// The error that broke the body, until the bytes before it could be written to the client.
    broken: Option<WireError>,
    /// Whether the task has yielded since the last piece, so that the server could write it.
    has_yielded: bool,
    first: FirstPiece,
}

/// How far the first piece of a fast response is: it is written to the client before more is read, because it
/// would otherwise wait for the many bytes that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FirstPiece {
    /// The first piece has not come yet.
    Awaited,
    /// The piece was passed on, and is to be written now.
    Passed,
    /// The piece is written, or the response is not a fast one.
    Written,
}

/// The framing of the remaining body.
#[derive(Debug)]
enum Remaining {
    Length(u64),
    Chunks(Chunks),
    Close,
}

impl Remaining {
    fn next(&mut self, read: &mut BytesMut) -> Result<Next, ChunkError> {
        let piece = |bytes: usize, read: &mut BytesMut| match bytes {
            0 => Next::More,
            // The buffer holds nothing but this piece, so it is passed on without a copy.
            _ if bytes == read.capacity() => Next::Piece(mem::take(read).freeze()),
            _ => Next::Piece(read.split_to(bytes).freeze()),
        };
        match self {
            Self::Length(0) => Ok(Next::Over),
            Self::Length(left) => {
                let here = usize::try_from(*left).unwrap_or(usize::MAX).min(read.len());
                *left -= here as u64;
                Ok(piece(here, read))
            }
            Self::Chunks(chunks) => chunks.next(read),
            Self::Close => Ok(piece(read.len(), read)),
        }
    }

    fn is_over(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunks(chunks) => chunks.is_over(),
            Self::Close => false,
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
        idle: Arc<Idle>,
        idle_timeout: Duration,
    ) -> Self {
        let remaining = match head.end {
            BodyEnd::Length(bytes) => Remaining::Length(bytes),
            BodyEnd::Chunks => Remaining::Chunks(Chunks::default()),
            BodyEnd::Close => Remaining::Close,
        };
        let mut body = Self {
            first: if connection.is_fast() { FirstPiece::Awaited } else { FirstPiece::Written },
            connection: Some(connection),
            writer: (!writer.is_over()).then(|| Box::new(writer)),
            remaining,
            stays_open: head.stays_open,
            idle,
            idle_timeout,
            moved_at: clock::instant(),
            has_moved: false,
            broken: None,
            has_yielded: false,
        };
        if body.remaining.is_over() && head.status != StatusCode::SWITCHING_PROTOCOLS {
            body.finish();
        }
        body
    }

    /// The stream of the connection after a 101.
    ///
    /// # Errors
    ///
    /// When the connection is already closed.
    pub fn switched(self) -> Result<Switched, WireError> {
        let connection = self.connection.ok_or(WireError::Closed)?;
        Ok(Switched { stream: connection.stream, read_buf: connection.read_buf })
    }

    /// Returns the connection to the idle pool when request and response are complete.
    fn finish(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        if self.stays_open && self.writer.is_none() && connection.read_buf.is_empty() {
            Idle::put(&self.idle, connection);
        }
    }

    /// Continues to send a request whose response began before the request was complete.
    fn poll_request(&mut self, cx: &mut Context<'_>) {
        let Some((writer, connection)) = self.writer.as_mut().zip(self.connection.as_mut()) else {
            return;
        };
        match writer.poll_send(cx, &mut *connection.stream) {
            Poll::Pending => {}
            Poll::Ready(sent) => {
                // The response may be complete although the provider stopped reading the request.
                self.stays_open &= sent.is_ok();
                self.writer = None;
            }
        }
    }

    /// The next part of the body, without the idle timeout.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Next, WireError>> {
        self.poll_request(cx);
        if let Some(error) = self.broken.take() {
            return Poll::Ready(Err(error));
        }
        let Some(connection) = &mut self.connection else { return Poll::Ready(Ok(Next::Over)) };
        loop {
            match self.remaining.next(&mut connection.read_buf)? {
                Next::More => {}
                next @ (Next::Piece(_) | Next::Trailers(_) | Next::Over) => return Poll::Ready(Ok(next)),
            }
            match std::task::ready!(connection.poll_fill(cx)) {
                Ok(0) if matches!(self.remaining, Remaining::Close) => return Poll::Ready(Ok(Next::Over)),
                Ok(0) => return Poll::Ready(Err(WireError::Closed)),
                Ok(_) => self.has_moved = true,
                Err(error) => return Poll::Ready(Err(WireError::Failed(error))),
            }
        }
    }

    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<UpstreamBodyError> {
        if mem::take(&mut self.has_moved) {
            self.moved_at = clock::instant();
        }
        let Some(connection) = &mut self.connection else { return Poll::Pending };
        let deadline = self.moved_at + self.idle_timeout;
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
        // A server writes its buffered bytes when the body is pending.
        if this.first == FirstPiece::Passed {
            (this.first, this.has_yielded) = (FirstPiece::Written, true);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let next = match this.poll_next(cx) {
            // A server that receives the error at once would drop bytes that it has not written yet.
            Poll::Ready(Err(error)) if !mem::replace(&mut this.has_yielded, true) => {
                this.broken = Some(error);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(next) => next.map_err(UpstreamBodyError::Broken),
            Poll::Pending => {
                this.has_yielded = true;
                Err(std::task::ready!(this.poll_stalled(cx)))
            }
        };
        Poll::Ready(match next {
            Ok(Next::Piece(piece)) => {
                this.has_yielded = false;
                if this.first == FirstPiece::Awaited {
                    this.first = FirstPiece::Passed;
                }
                if this.remaining.is_over() {
                    this.finish();
                }
                Some(Ok(Frame::data(piece)))
            }
            Ok(Next::Trailers(trailers)) => {
                this.finish();
                Some(Ok(Frame::trailers(trailers)))
            }
            Ok(Next::Over | Next::More) => {
                this.finish();
                None
            }
            Err(error) => {
                this.connection = None;
                Some(Err(error))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.remaining.is_over()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.remaining {
            Remaining::Length(left) => SizeHint::with_exact(*left),
            Remaining::Chunks(chunks) if chunks.is_over() => SizeHint::with_exact(0),
            Remaining::Chunks(_) | Remaining::Close => SizeHint::default(),
        }
    }
}
