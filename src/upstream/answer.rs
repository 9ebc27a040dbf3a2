//! The body of an answer, and with it the connection it comes over: complete, the connection
//! waits for the next request; broken off or dropped, it is closed.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Extensions, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::upgrade::{OnUpgrade, Upgraded};
use tokio::time::Sleep;

use super::idle::{Connection, Idle};
use crate::body::replay::{Attempt, Upload, Waiting};
use crate::clock;

/// Why an answer broke off.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The connection broke.
    #[error("the answer broke off: {0}")]
    Broken(#[from] hyper::Error),
    /// Nothing more came.
    #[error("the answer stood still for {} ms", .0.as_millis())]
    Stalled(Duration),
}

/// An answer's body as it arrives. `S` is what the client's request body arrives as.
#[derive(Debug)]
pub struct AnswerBody<S> {
    incoming: Incoming,
    connection: Option<Connection<Attempt<S>>>,
    home: Arc<Idle<Attempt<S>>>,
    upload: Upload<S>,
    idle_max: Duration,
    moved_at: Instant,
    /// Armed when the answer first stands still, and not per piece.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S> AnswerBody<S> {
    pub(super) fn new(
        incoming: Incoming,
        connection: Connection<Attempt<S>>,
        home: Arc<Idle<Attempt<S>>>,
        upload: Upload<S>,
        idle_max: Duration,
    ) -> Self {
        let moved_at = clock::instant();
        Self { incoming, connection: Some(connection), home, upload, idle_max, moved_at, timer: None }
    }

    /// The stream that the connection has become with its 101, whose head had these `extensions`.
    ///
    /// # Errors
    ///
    /// When the connection broke.
    pub async fn switched(self, extensions: &mut Extensions) -> Result<Upgraded, hyper::Error> {
        let upgrade = extensions.remove::<OnUpgrade>();
        // Until it is handed over, the connection is driven by what the body holds.
        match upgrade {
            Some(upgrade) => upgrade.await,
            None => hyper::upgrade::on(Response::new(())).await,
        }
    }

    /// Gives the connection back when the exchange is complete on both sides.
    fn finish(&mut self) {
        let is_sent = self.upload.waiting() == Waiting::ForAnswer;
        if let Some(connection) = self.connection.take().filter(|_| is_sent) {
            self.home.put(connection);
        }
    }

    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<AnswerError> {
        loop {
            let deadline = self.moved_at + self.idle_max;
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline.into())));
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if timer.deadline() >= deadline.into() {
                return Poll::Ready(AnswerError::Stalled(self.idle_max));
            }
            timer.as_mut().reset(deadline.into());
        }
    }
}

impl<S> Body for AnswerBody<S> {
    type Data = Bytes;
    type Error = AnswerError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        let this = &mut *self;
        let Poll::Ready(frame) = Pin::new(&mut this.incoming).poll_frame(cx) else {
            return this.poll_stalled(cx).map(|error| {
                this.connection = None;
                Some(Err(error))
            });
        };
        this.moved_at = clock::instant();
        match &frame {
            Some(Ok(frame)) if frame.is_data() && !this.incoming.is_end_stream() => {}
            // All of it has come: the last piece, the trailers, or the end itself.
            Some(Ok(_)) | None => this.finish(),
            Some(Err(_)) => this.connection = None,
        }
        Poll::Ready(frame.map(|frame| frame.map_err(AnswerError::Broken)))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl<S> Drop for AnswerBody<S> {
    fn drop(&mut self) {
        // An answer without a body is never asked for its end.
        if self.incoming.is_end_stream() {
            self.finish();
        }
    }
}
