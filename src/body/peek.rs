//! Reads a response body, so that the response can be classified or redacted, and keeps the frames, so that the body
//! can still be relayed. Reading is limited by a number of bytes, a timeout and the buffer budget.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;

use super::add_to_hint;
use super::budget::{BufferBudget, BufferReservation};

/// A body whose first frames are already read. The body relays exactly the received frames, unless
/// [`replace`](Self::replace) was called.
#[derive(Debug)]
pub struct PeekedBody<B: Body> {
    frames: VecDeque<Frame<Bytes>>,
    /// The error that ended reading. It is returned after `frames`.
    error: Option<B::Error>,
    inner: B,
    /// The memory of `frames`.
    reservation: BufferReservation,
    is_over_budget: bool,
}

impl<B> PeekedBody<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// Wraps a body without reading it.
    #[must_use]
    pub fn new(body: B) -> Self {
        Self {
            frames: VecDeque::new(),
            error: None,
            inner: body,
            reservation: BufferReservation::default(),
            is_over_budget: false,
        }
    }

    /// Returns the inner body, and discards the frames already read.
    pub fn into_inner(self) -> B {
        self.inner
    }

    /// Wraps `body` and calls [`read_to_end`](Self::read_to_end). Returns the peeked body and the result of that call.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the body.
    pub async fn read(
        body: B,
        max_bytes: usize,
        timeout: Duration,
        budget: Option<&BufferBudget>,
    ) -> (Self, Option<Vec<u8>>) {
        let mut peeked = Self::new(body);
        let whole_body = peeked.read_to_end(max_bytes, timeout, budget).await;
        (peeked, whole_body)
    }

    /// Reads the body until its end, for at most `timeout`, while the body has at most `max_bytes` bytes, and while
    /// `budget` has memory. If `budget` is `None`, the memory is unlimited. Returns all bytes of the body, including
    /// the bytes that earlier calls have read. Returns `None` if the end of the body was not read.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not lose bytes: the frames already read are still relayed.
    pub async fn read_to_end(
        &mut self,
        max_bytes: usize,
        timeout: Duration,
        budget: Option<&BufferBudget>,
    ) -> Option<Vec<u8>> {
        if self.reservation.budget().is_none() {
            self.reservation = budget
                .map(|budget| budget.reservation(BufferReservation::UNBUDGETED_BYTES))
                .unwrap_or_default();
        }
        tokio::time::timeout(timeout, self.read_frames(max_bytes)).await.unwrap_or(None)
    }

    /// Returns whether reading ended because the budget was exhausted.
    #[must_use]
    pub fn is_over_budget(&self) -> bool {
        self.is_over_budget
    }

    /// Replaces the frames already read with `data`. The whole body is replaced if
    /// [`read_to_end`](Self::read_to_end) has returned it. Otherwise, the unread rest of the body follows `data`.
    pub fn replace(&mut self, data: Bytes) {
        self.frames.clear();
        self.reservation.shrink(data.len());
        self.frames.push_back(Frame::data(data));
    }

    async fn read_frames(&mut self, max_bytes: usize) -> Option<Vec<u8>> {
        if self.error.is_some() {
            return None;
        }
        let mut whole_body = Vec::new();
        self.frames.iter().filter_map(Frame::data_ref).for_each(|data| whole_body.extend_from_slice(data));
        if whole_body.len() > max_bytes {
            return None;
        }
        while let Some(frame) = self.inner.frame().await {
            match frame {
                Ok(frame) => {
                    whole_body.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
                    self.frames.push_back(frame);
                }
                Err(error) => {
                    self.error = Some(error);
                    return None;
                }
            }
            if whole_body.len() > max_bytes {
                return None;
            }
            // The bytes are in memory twice: in the frames, and joined in `whole_body`.
            if !self.reservation.try_resize(whole_body.len() + whole_body.capacity()) {
                self.is_over_budget = true;
                return None;
            }
        }
        Some(whole_body)
    }
}

impl<B> Body for PeekedBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if let Some(frame) = self.frames.pop_front() {
            if self.frames.is_empty() {
                self.reservation.shrink(0);
            }
            return Poll::Ready(Some(Ok(frame)));
        }
        if let Some(error) = self.error.take() {
            return Poll::Ready(Some(Err(error)));
        }
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty() && self.error.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let frame_bytes: usize = self.frames.iter().filter_map(Frame::data_ref).map(Bytes::len).sum();
        add_to_hint(&self.inner.size_hint(), frame_bytes as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use http_body_util::StreamBody;

    use super::*;

    const READ_TIMEOUT: Duration = Duration::from_secs(60);

    fn body(
        chunks: Vec<Result<&'static str, io::ErrorKind>>,
    ) -> impl Body<Data = Bytes, Error = io::Error> + Unpin {
        let frames = chunks.into_iter().map(|chunk| match chunk {
            Ok(text) => Ok(Frame::data(Bytes::from_static(text.as_bytes()))),
            Err(kind) => Err(io::Error::from(kind)),
        });
        StreamBody::new(FrameStream(frames.collect()))
    }

    async fn peek<B>(body: B, max_bytes: usize, timeout: Duration) -> (PeekedBody<B>, Option<Vec<u8>>)
    where
        B: Body<Data = Bytes> + Unpin,
    {
        PeekedBody::read(body, max_bytes, timeout, None).await
    }

    /// A stream of scripted frames.
    struct FrameStream(VecDeque<Result<Frame<Bytes>, io::Error>>);

    impl futures_core::Stream for FrameStream {
        type Item = Result<Frame<Bytes>, io::Error>;

        fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            Poll::Ready(self.0.pop_front())
        }
    }

    #[tokio::test]
    async fn a_small_body_is_read_completely_and_relayed_in_the_same_frames() {
        let (mut peeked, whole_body) = peek(body(vec![Ok("ab"), Ok("c")]), 3, READ_TIMEOUT).await;
        assert_eq!(whole_body.as_deref(), Some(&b"abc"[..]));
        assert_eq!(peeked.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
        assert_eq!(peeked.frame().await.unwrap().unwrap().into_data().unwrap(), "c");
        assert!(peeked.frame().await.is_none());
    }

    #[tokio::test]
    async fn a_large_body_is_not_returned_and_is_relayed_completely() {
        let (peeked, whole_body) = peek(body(vec![Ok("ab"), Ok("cd"), Ok("ef")]), 3, READ_TIMEOUT).await;
        assert_eq!(whole_body, None);
        assert_eq!(peeked.collect().await.unwrap().to_bytes(), "abcdef");
    }

    #[tokio::test]
    async fn a_partly_read_body_can_be_read_to_its_end_and_replaced() {
        let (mut peeked, _) = peek(body(vec![Ok("ab"), Ok("cd")]), 3, READ_TIMEOUT).await;
        assert_eq!(peeked.read_to_end(3, READ_TIMEOUT, None).await, None);
        assert_eq!(peeked.read_to_end(4, READ_TIMEOUT, None).await.as_deref(), Some(&b"abcd"[..]));
        peeked.replace(Bytes::from_static(b"replaced"));
        assert_eq!(peeked.collect().await.unwrap().to_bytes(), "replaced");
    }

    #[tokio::test]
    async fn a_body_that_fails_is_relayed_with_its_error() {
        let (mut peeked, whole_body) =
            peek(body(vec![Ok("ab"), Err(io::ErrorKind::ConnectionReset)]), 9, READ_TIMEOUT).await;
        assert_eq!(whole_body, None);
        assert_eq!(peeked.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
        assert!(!peeked.is_end_stream());
        assert_eq!(peeked.frame().await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test(start_paused = true)]
    async fn reading_a_pending_body_times_out() {
        let (_, whole_body) = peek(PendingBody, 9, Duration::from_secs(2)).await;
        assert_eq!(whole_body, None);
    }

    #[derive(Debug)]
    struct PendingBody;

    impl Body for PendingBody {
        type Data = Bytes;
        type Error = io::Error;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
            Poll::Pending
        }
    }
}
