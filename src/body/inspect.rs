//! Copies a response body while the body is relayed, and delays the end of the body until the copy has been
//! inspected. Keychoir thus records the identifiers in a response before the client can use them in its next request.
//! A body that exceeds a size limit or the buffer budget is relayed without inspection.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::add_to_hint;
use super::budget::BufferReservation;

/// Inspects the copy of a body.
pub trait BodyInspector: Send + 'static {
    /// Inspects the complete body. This method is not called if the body fails, exceeds the size limit, or does not
    /// fit the buffer budget.
    fn inspect(self, body: &[u8]);
}

/// A body that passes a copy of itself to a [`BodyInspector`].
///
/// The last received frame is held until the next frame or the end of the body is received. A client thus receives the
/// end of the body only after [`BodyInspector::inspect`] has run. After the copy is discarded, each frame is relayed
/// without delay.
///
/// # Cancel safety
///
/// Dropping the body discards the copy, and the inspector is not called.
pub struct InspectedBody<B, I> {
    body: B,
    /// The inspector, or `None` if the body is not inspected or its inspection has ended.
    inspector: Option<I>,
    copy: Vec<u8>,
    /// Maximum size of the copy.
    max_bytes: usize,
    /// The memory of the copy.
    reservation: BufferReservation,
    held_frame: Option<Frame<Bytes>>,
    /// Whether the inner body has ended.
    has_ended: bool,
}

impl<B: Body<Data = Bytes>, I: BodyInspector> InspectedBody<B, I> {
    /// Relays `body`. `inspector` inspects the body unless the body exceeds `max_bytes` or `reservation` cannot grow
    /// for the copy. Without an inspector, the body is only relayed.
    pub fn new(body: B, inspector: Option<I>, max_bytes: usize, reservation: BufferReservation) -> Self {
        let is_too_large = body.size_hint().lower() > max_bytes as u64;
        let inspector = inspector.filter(|_| max_bytes > 0 && !is_too_large);
        Self { body, inspector, copy: Vec::new(), max_bytes, reservation, held_frame: None, has_ended: false }
    }

    fn copy_data(&mut self, data: &[u8]) {
        let length = self.copy.len() + data.len();
        // A `Vec` at least doubles its capacity when it grows.
        let capacity =
            if length > self.copy.capacity() { length.max(2 * self.copy.capacity()) } else { length };
        if length <= self.max_bytes && self.reservation.try_resize(capacity) {
            self.copy.extend_from_slice(data);
        } else {
            self.discard_copy();
        }
    }

    #[cfg(test)]
    pub(super) fn copy_capacity(&self) -> usize {
        self.copy.capacity()
    }

    fn discard_copy(&mut self) {
        (self.inspector, self.copy) = (None, Vec::new());
        self.reservation.shrink(0);
    }

    /// Inspects the copy and frees it. Later calls do nothing.
    fn inspect_copy(&mut self) {
        if let Some(inspector) = self.inspector.take() {
            inspector.inspect(&std::mem::take(&mut self.copy));
            self.reservation.shrink(0);
        }
    }
}

impl<B, I> Body for InspectedBody<B, I>
where
    B: Body<Data = Bytes> + Unpin,
    I: BodyInspector + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = &mut *self;
        loop {
            if this.inspector.is_none() {
                if let Some(frame) = this.held_frame.take() {
                    return Poll::Ready(Some(Ok(frame)));
                }
                return if this.has_ended {
                    Poll::Ready(None)
                } else {
                    Pin::new(&mut this.body).poll_frame(cx)
                };
            }
            match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                None => {
                    this.has_ended = true;
                    this.inspect_copy();
                }
                // The held frame is dropped with the incomplete copy.
                Some(Err(error)) => {
                    this.discard_copy();
                    (this.held_frame, this.has_ended) = (None, true);
                    return Poll::Ready(Some(Err(error)));
                }
                Some(Ok(frame)) => {
                    match frame.data_ref() {
                        Some(data) => this.copy_data(data),
                        // Trailers end the body.
                        None => this.inspect_copy(),
                    }
                    if this.body.is_end_stream() {
                        this.inspect_copy();
                    }
                    if let Some(previous) = this.held_frame.replace(frame) {
                        return Poll::Ready(Some(Ok(previous)));
                    }
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.held_frame.is_none()
            && (self.has_ended || (self.inspector.is_none() && self.body.is_end_stream()))
    }

    fn size_hint(&self) -> SizeHint {
        let held_bytes = self.held_frame.as_ref().and_then(Frame::data_ref).map_or(0, Bytes::len);
        add_to_hint(&self.body.size_hint(), held_bytes as u64)
    }
}

impl<B: fmt::Debug, I> fmt::Debug for InspectedBody<B, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InspectedBody").field("body", &self.body).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};

    use http::HeaderMap;
    use http_body_util::BodyExt;

    use super::*;

    #[derive(Clone, Debug, Default)]
    struct RecordingInspector(Arc<Mutex<Option<Vec<u8>>>>);

    impl BodyInspector for RecordingInspector {
        fn inspect(self, body: &[u8]) {
            assert!(
                self.0.lock().unwrap().replace(body.to_vec()).is_none(),
                "the inspector must not be called twice"
            );
        }
    }

    impl RecordingInspector {
        fn copy(&self) -> Option<String> {
            self.0.lock().unwrap().clone().map(|body| String::from_utf8(body).unwrap())
        }
    }

    type FramePoll = Poll<Result<Frame<Bytes>, &'static str>>;

    /// A body that returns the scripted poll results one after another.
    #[derive(Debug)]
    struct ScriptedBody {
        polls: VecDeque<FramePoll>,
        /// Whether `is_end_stream` returns `true` after the last frame.
        detects_end: bool,
    }

    impl Body for ScriptedBody {
        type Data = Bytes;
        type Error = &'static str;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
            match self.polls.pop_front() {
                None => Poll::Ready(None),
                Some(Poll::Ready(frame)) => Poll::Ready(Some(frame)),
                Some(Poll::Pending) => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
            }
        }

        fn is_end_stream(&self) -> bool {
            self.detects_end && self.polls.is_empty()
        }
    }

    fn ready_data(text: &'static str) -> FramePoll {
        Poll::Ready(Ok(Frame::data(Bytes::from_static(text.as_bytes()))))
    }

    /// Returns an inspected body that detects its end only when it is polled again, and its inspector.
    fn inspected_body(
        polls: impl IntoIterator<Item = FramePoll>,
        max_bytes: usize,
    ) -> (InspectedBody<ScriptedBody, RecordingInspector>, RecordingInspector) {
        let inspector = RecordingInspector::default();
        let body = ScriptedBody { polls: polls.into_iter().collect(), detects_end: false };
        (
            InspectedBody::new(body, Some(inspector.clone()), max_bytes, BufferReservation::default()),
            inspector,
        )
    }

    async fn next_chunk(inspected: &mut InspectedBody<ScriptedBody, RecordingInspector>) -> Option<String> {
        let data = inspected.frame().await?.unwrap().into_data().unwrap();
        Some(String::from_utf8(data.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn the_end_of_a_body_follows_its_inspection() {
        for detects_end in [false, true] {
            let polls = [ready_data("ab"), Poll::Pending, ready_data("cd"), Poll::Pending, ready_data("ef")];
            let (mut inspected, inspector) = inspected_body(polls, 6);
            inspected.body.detects_end = detects_end;
            assert_eq!(next_chunk(&mut inspected).await.as_deref(), Some("ab"));
            assert!(!inspected.is_end_stream());
            assert_eq!(next_chunk(&mut inspected).await.as_deref(), Some("cd"));
            if !detects_end {
                assert_eq!(inspector.copy(), None);
            }
            assert_eq!(next_chunk(&mut inspected).await.as_deref(), Some("ef"));
            assert_eq!(inspector.copy().as_deref(), Some("abcdef"));
            assert!(inspected.is_end_stream());
            assert_eq!(next_chunk(&mut inspected).await, None);
        }
    }

    #[tokio::test]
    async fn a_large_response_is_relayed_without_delay_and_not_inspected() {
        let (mut inspected, inspector) =
            inspected_body([ready_data("abc"), ready_data("def"), Poll::Pending, ready_data("g")], 5);
        for expected in ["abc", "def", "g"] {
            assert_eq!(next_chunk(&mut inspected).await.as_deref(), Some(expected));
        }
        assert_eq!(next_chunk(&mut inspected).await, None);
        assert_eq!(inspector.copy(), None);
    }

    #[tokio::test]
    async fn a_body_with_a_declared_length_above_the_limit_is_not_copied() {
        let inspector = RecordingInspector::default();
        let body = http_body_util::Full::new(Bytes::from_static(b"abcdef"));
        let mut inspected =
            InspectedBody::new(body, Some(inspector.clone()), 5, BufferReservation::default());
        assert_eq!(inspected.frame().await.unwrap().unwrap().into_data().unwrap(), "abcdef");
        assert_eq!((inspected.copy.capacity(), inspector.copy()), (0, None));
    }

    #[tokio::test]
    async fn trailers_end_a_body() {
        let trailers = Poll::Ready(Ok(Frame::trailers(HeaderMap::new())));
        let (mut inspected, inspector) = inspected_body([ready_data("ab"), trailers], 5);
        assert_eq!(next_chunk(&mut inspected).await.as_deref(), Some("ab"));
        assert_eq!(inspector.copy().as_deref(), Some("ab"));
        assert!(inspected.frame().await.unwrap().unwrap().is_trailers());
    }

    #[tokio::test]
    async fn a_failed_response_is_not_inspected() {
        let (mut inspected, inspector) =
            inspected_body([ready_data("ab"), ready_data("cd"), Poll::Ready(Err("reset"))], 50);
        assert_eq!(next_chunk(&mut inspected).await.as_deref(), Some("ab"));
        assert!(inspected.frame().await.unwrap().is_err());
        assert_eq!(inspector.copy(), None);
    }

    #[tokio::test]
    async fn an_empty_response_is_inspected() {
        let (mut inspected, inspector) = inspected_body([], 50);
        assert_eq!(next_chunk(&mut inspected).await, None);
        assert_eq!(inspector.copy().as_deref(), Some(""));
    }
}
