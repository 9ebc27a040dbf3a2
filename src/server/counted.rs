//! A response body on its way to the client: its request counts as under way until the body was passed on,
//! and the client can detect a body that breaks off.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::connection_state::{ConnectionState, UnderWay};
use super::counting_io::IoCounters;

pin_project! {
    pub(super) struct Counted<B: Body> {
        #[pin]
        body: B,
        gauge: IoCounters,
        // An error that is held until the bytes before it are written.
        error: Option<B::Error>,
        under_way: Option<UnderWay>,
        whole: Option<Whole>,
    }
}

impl<B: Body> Counted<B> {
    /// The body of a response that starts a session: the session counts by itself.
    pub(super) fn of_session(body: B, gauge: IoCounters) -> Self {
        Self { body, gauge, error: None, under_way: None, whole: None }
    }

    /// The body of any other response. A body that is ended by the end of the connection has a `whole`.
    pub(super) fn of(body: B, gauge: IoCounters, under_way: UnderWay, whole: Option<Whole>) -> Self {
        Self { body, gauge, error: None, under_way: Some(under_way), whole }
    }
}

/// Detects a response that is ended by the end of the connection and is dropped before its end, so that the
/// connection is reset.
pub(super) struct Whole {
    here: Arc<ConnectionState>,
    is_whole: bool,
}

impl Whole {
    pub(super) fn new(here: Arc<ConnectionState>) -> Self {
        Self { here, is_whole: false }
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        if !self.is_whole {
            self.here.truncate();
        }
    }
}

impl<B: Body<Data = Bytes>> Body for Counted<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        if this.error.is_some() {
            // The stream is polled again when the client has read some bytes.
            return if this.gauge.is_stuck() {
                Poll::Pending
            } else {
                Poll::Ready(this.error.take().map(Err))
            };
        }
        let polled = this.body.as_mut().poll_frame(cx);
        if let Poll::Ready(Some(Err(error))) = polled {
            // An error closes the connection at once, and the head may not have been written yet: it is
            // written between this poll and the next one.
            *this.error = Some(error);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some(whole) = this.whole {
            whole.is_whole |= matches!(polled, Poll::Ready(None)) || this.body.is_end_stream();
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
