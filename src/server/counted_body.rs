//! Wraps a response body: counts the request as in progress until hyper drops the body, writes the received
//! bytes before an error closes the connection, and resets the connection when a body without a length is
//! truncated.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::connection_state::{ActiveRequest, ConnectionState};
use super::counting_io::IoCounters;

pin_project! {
    pub(super) struct CountedBody<B: Body> {
        #[pin]
        body: B,
        counters: IoCounters,
        // The error of the body, held until the bytes before it are written.
        error: Option<B::Error>,
        active_request: Option<ActiveRequest>,
        completion: Option<CompletionGuard>,
    }
}

impl<B: Body> CountedBody<B> {
    /// Wraps the body of a 101 response. Its session holds the [`ActiveRequest`].
    pub(super) fn for_session(body: B, counters: IoCounters) -> Self {
        Self { body, counters, error: None, active_request: None, completion: None }
    }

    /// Wraps the body of any other response. `completion` is set for a body that the end of the connection
    /// ends.
    pub(super) fn new(
        body: B,
        counters: IoCounters,
        active_request: ActiveRequest,
        completion: Option<CompletionGuard>,
    ) -> Self {
        Self { body, counters, error: None, active_request: Some(active_request), completion }
    }
}

/// Marks the response as truncated when it is dropped before the end of the body.
pub(super) struct CompletionGuard {
    state: Arc<ConnectionState>,
    is_complete: bool,
}

impl CompletionGuard {
    pub(super) fn new(state: Arc<ConnectionState>) -> Self {
        Self { state, is_complete: false }
    }
}

impl Drop for CompletionGuard {
    fn drop(&mut self) {
        if !self.is_complete {
            self.state.mark_truncated();
        }
    }
}

impl<B: Body<Data = Bytes>> Body for CountedBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        if this.error.is_some() {
            // A blocked stream wakes the task when the client has read some bytes.
            return if this.counters.is_write_blocked() {
                Poll::Pending
            } else {
                Poll::Ready(this.error.take().map(Err))
            };
        }
        let polled = this.body.as_mut().poll_frame(cx);
        if let Poll::Ready(Some(Err(error))) = polled {
            // Hyper closes the connection on an error without writing its buffer. Delaying the error by one
            // poll lets hyper write a pending response head first.
            *this.error = Some(error);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some(completion) = this.completion {
            completion.is_complete |= matches!(polled, Poll::Ready(None)) || this.body.is_end_stream();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.error.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
