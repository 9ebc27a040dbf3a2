//! Wraps a response body to track it on its connection. Until hyper drops the body, its request counts as in progress.
//! A body error is delayed until hyper has written the preceding bytes. A truncated close-delimited response is marked,
//! so that the connection is reset.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::connection_state::{ActiveRequest, ConnectionState};
use super::counting_io::IoCounters;

pin_project! {
    /// A response body that updates the state of its connection.
    pub(super) struct TrackedBody<B: Body> {
        #[pin]
        body: B,
        counters: IoCounters,
        // The error of the body, which is delayed until the preceding bytes are written.
        error: Option<B::Error>,
        active_request: Option<ActiveRequest>,
        completion: Option<CompletionGuard>,
    }
}

impl<B: Body> TrackedBody<B> {
    /// Wraps the body of a 101 response. The session of the response holds the [`ActiveRequest`].
    pub(super) fn for_session(body: B, counters: IoCounters) -> Self {
        Self { body, counters, error: None, active_request: None, completion: None }
    }

    /// Wraps the body of any other response. `completion` is set for a close-delimited body.
    pub(super) fn new(
        body: B,
        counters: IoCounters,
        active_request: ActiveRequest,
        completion: Option<CompletionGuard>,
    ) -> Self {
        Self { body, counters, error: None, active_request: Some(active_request), completion }
    }
}

/// The guard of a close-delimited response. Marks the response as truncated if the guard is dropped before the end of
/// the body.
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

impl<B: Body<Data = Bytes>> Body for TrackedBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        if this.error.is_some() {
            // A blocked stream wakes the task when the client reads.
            return if this.counters.is_write_blocked() {
                Poll::Pending
            } else {
                Poll::Ready(this.error.take().map(Err))
            };
        }
        let poll_result = this.body.as_mut().poll_frame(cx);
        if let Poll::Ready(Some(Err(error))) = poll_result {
            // Hyper closes the connection on an error without writing its buffer. Delaying the error by one
            // poll lets hyper write a pending response head first.
            *this.error = Some(error);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some(completion) = this.completion {
            completion.is_complete |= matches!(poll_result, Poll::Ready(None)) || this.body.is_end_stream();
        }
        poll_result
    }

    fn is_end_stream(&self) -> bool {
        self.error.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
