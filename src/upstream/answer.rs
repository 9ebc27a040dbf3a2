//! The body of an answer, and with it the connection it comes over: complete, the connection
//! waits for the next request; broken off or dropped, it is closed.

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

/// What is wrong with a connection.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// It ended before the answer did.
    #[error("it was closed")]
    Closed,
    /// It failed.
    #[error("{0}")]
    Failed(#[source] io::Error),
    /// What came is no answer.
    #[error("{0}")]
    Head(#[from] HeadError),
    /// The body is no body.
    #[error("{0}")]
    Chunk(#[from] ChunkError),
}

/// Why an answer broke off.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The connection broke.
    #[error("the answer broke off: {0}")]
    Broken(#[from] WireError),
    /// Nothing more came.
    #[error("the answer stood still for {} ms", .0.as_millis())]
    Stalled(Duration),
    /// It must not go on.
    #[error("the answer was cut: {0}")]
    Withheld(#[from] Withheld),
}

/// What a connection has become with its 101.
pub struct Switched {
    /// Its stream.
    pub stream: Wire,
    /// What was read of it already.
    pub heard: BytesMut,
}

/// An answer's body as it arrives. `S` is what the client's request body arrives as.
#[derive(Debug)]
pub struct AnswerBody<S> {
    connection: Option<Box<Connection>>,
    /// The request, while some of it is still to be sent: an answer may begin before.
    outgoing: Option<Box<RequestWriter<S>>>,
    rest: Rest,
    stays_open: bool,
    home: Arc<Idle>,
    idle_max: Duration,
    moved_at: Instant,
    /// Something has come since then.
    has_moved: bool,
    /// Why it broke off, until what came before has had its turn to go out.
    broken: Option<WireError>,
    /// What came before has had its turn.
    has_rested: bool,
    first: First,
}

/// The first piece of a fast answer goes out before more is read: what follows is so much that it
/// would wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    /// It is still to come.
    Awaited,
    /// It was handed on, and is to go out now.
    Passed,
    /// It is out, or what follows is little.
    Out,
}

/// What is still to come.
#[derive(Debug)]
enum Rest {
    Length(u64),
    Chunks(Chunks),
    Close,
}

impl Rest {
    fn next(&mut self, read: &mut BytesMut) -> Result<Next, ChunkError> {
        let piece = |bytes: usize, read: &mut BytesMut| match bytes {
            0 => Next::More,
            // Nobody else has a part of it.
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

impl<S> AnswerBody<S>
where
    S: Body<Data = Bytes> + Unpin,
{
    pub(super) fn new(
        head: &ResponseHead,
        connection: Box<Connection>,
        outgoing: RequestWriter<S>,
        home: Arc<Idle>,
        idle_max: Duration,
    ) -> Self {
        let rest = match head.end {
            BodyEnd::Length(bytes) => Rest::Length(bytes),
            BodyEnd::Chunks => Rest::Chunks(Chunks::default()),
            BodyEnd::Close => Rest::Close,
        };
        let mut body = Self {
            first: if connection.is_fast() { First::Awaited } else { First::Out },
            connection: Some(connection),
            outgoing: (!outgoing.is_over()).then(|| Box::new(outgoing)),
            rest,
            stays_open: head.stays_open,
            home,
            idle_max,
            moved_at: clock::instant(),
            has_moved: false,
            broken: None,
            has_rested: false,
        };
        if body.rest.is_over() && head.status != StatusCode::SWITCHING_PROTOCOLS {
            body.finish();
        }
        body
    }

    /// What the connection has become with its 101.
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn switched(self) -> Result<Switched, WireError> {
        let connection = self.connection.ok_or(WireError::Closed)?;
        Ok(Switched { stream: connection.stream, heard: connection.inbox })
    }

    /// Gives the connection back when the exchange is complete on both sides.
    fn finish(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        if self.stays_open && self.outgoing.is_none() && connection.inbox.is_empty() {
            Idle::put(&self.home, connection);
        }
    }

    /// Goes on sending a request whose answer began before its end.
    fn send_on(&mut self, cx: &mut Context<'_>) {
        let Some((outgoing, connection)) = self.outgoing.as_mut().zip(self.connection.as_mut()) else {
            return;
        };
        match outgoing.poll_send(cx, &mut *connection.stream) {
            Poll::Pending => {}
            Poll::Ready(sent) => {
                // What the provider says may be whole although it takes no more.
                self.stays_open &= sent.is_ok();
                self.outgoing = None;
            }
        }
    }

    /// What comes next of it, but for the time.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Next, WireError>> {
        self.send_on(cx);
        if let Some(error) = self.broken.take() {
            return Poll::Ready(Err(error));
        }
        let Some(connection) = &mut self.connection else { return Poll::Ready(Ok(Next::Over)) };
        loop {
            match self.rest.next(&mut connection.inbox)? {
                Next::More => {}
                next @ (Next::Piece(_) | Next::Trailers(_) | Next::Over) => return Poll::Ready(Ok(next)),
            }
            match std::task::ready!(connection.poll_fill(cx)) {
                Ok(0) if matches!(self.rest, Rest::Close) => return Poll::Ready(Ok(Next::Over)),
                Ok(0) => return Poll::Ready(Err(WireError::Closed)),
                Ok(_) => self.has_moved = true,
                Err(error) => return Poll::Ready(Err(WireError::Failed(error))),
            }
        }
    }

    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<AnswerError> {
        if mem::take(&mut self.has_moved) {
            self.moved_at = clock::instant();
        }
        let Some(connection) = &mut self.connection else { return Poll::Pending };
        let deadline = self.moved_at + self.idle_max;
        connection.patience.poll_until(deadline, cx).map(|()| AnswerError::Stalled(self.idle_max))
    }
}

impl<S> Body for AnswerBody<S>
where
    S: Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = AnswerError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        let this = &mut *self;
        // Who has nothing to wait for writes what there is.
        if this.first == First::Passed {
            (this.first, this.has_rested) = (First::Out, true);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let next = match this.poll_next(cx) {
            // A server that hears of the break at once would drop what it has not written yet.
            Poll::Ready(Err(error)) if !mem::replace(&mut this.has_rested, true) => {
                this.broken = Some(error);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(next) => next.map_err(AnswerError::Broken),
            Poll::Pending => {
                this.has_rested = true;
                Err(std::task::ready!(this.poll_stalled(cx)))
            }
        };
        Poll::Ready(match next {
            Ok(Next::Piece(piece)) => {
                this.has_rested = false;
                if this.first == First::Awaited {
                    this.first = First::Passed;
                }
                if this.rest.is_over() {
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
        self.rest.is_over()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.rest {
            Rest::Length(left) => SizeHint::with_exact(*left),
            Rest::Chunks(chunks) if chunks.is_over() => SizeHint::with_exact(0),
            Rest::Chunks(_) | Rest::Close => SizeHint::default(),
        }
    }
}
