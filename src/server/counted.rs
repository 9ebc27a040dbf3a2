//! Wraps a response body on its way to the client: its request counts as under way until the body
//! was passed on, and the client can detect a truncated body.

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
        // An error that is held until the bytes before it are written.
        error: Option<B::Error>,
        active_request: Option<ActiveRequest>,
        completion: Option<CompletionGuard>,
    }
}

impl<B: Body> CountedBody<B> {
    /// The body of a response that starts a session: the session counts by itself.
    pub(super) fn of_session(body: B, counters: IoCounters) -> Self {
        Self { body, counters, error: None, active_request: None, completion: None }
    }

    /// The body of any other response. A body that is ended by the end of the connection has a `completion`.
    pub(super) fn of(
        body: B,
        counters: IoCounters,
        active_request: ActiveRequest,
        completion: Option<CompletionGuard>,
    ) -> Self {
        Self { body, counters, error: None, active_request: Some(active_request), completion }
    }
}

/// Detects a response that is ended by the end of the connection and is dropped before its end, so that the
/// connection is reset.
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
            // The stream is polled again when the client has read some bytes.
            return if this.counters.is_write_blocked() {
                Poll::Pending
            } else {
                Poll::Ready(this.error.take().map(Err))
            };
        }
        let polled = this.body.as_mut().poll_frame(cx);
        if let Poll::Ready(Some(Err(error))) = polled {
            // An error closes the connection at once, so it is delayed by one poll: a head that is
            // not written yet is written between this poll and the next one.
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
