//! Reads the start of a response body to classify the response, and keeps it to relay it.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;

use super::budget::{BufferBudget, BufferShare};

/// A body whose start was read. It relays exactly the frames that arrived, in the same pieces.
#[derive(Debug)]
pub struct Peeked<B: Body> {
    frames: VecDeque<Frame<Bytes>>,
    /// An error that occurred while reading; it is returned after the frames read before it.
    error: Option<B::Error>,
    rest: B,
    /// The memory of the frames read.
    share: BufferShare,
    is_over_budget: bool,
}

impl<B> Peeked<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// A body of which no frame was read.
    #[must_use]
    pub fn untouched(body: B) -> Self {
        Self {
            frames: VecDeque::new(),
            error: None,
            rest: body,
            share: BufferShare::default(),
            is_over_budget: false,
        }
    }

    /// The inner body; frames already read are discarded.
    pub fn into_rest(self) -> B {
        self.rest
    }

    /// Reads `body` to its end, up to `bytes_max` bytes, for at most `within`, and within the
    /// memory of `budget`; without a budget, memory is unlimited. Also returns the bytes if they
    /// are the complete body.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the body.
    pub async fn read(
        body: B,
        bytes_max: usize,
        within: Duration,
        budget: Option<&BufferBudget>,
    ) -> (Self, Option<Vec<u8>>) {
        let mut peeked = Self::untouched(body);
        let whole = peeked.whole(bytes_max, within, budget).await;
        (peeked, whole)
    }

    /// Continues reading to the end, up to `bytes_max` bytes, for at most `within`, and within the
    /// memory of `budget`. Returns all bytes read so far if they are the complete body.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no bytes: the frames read are still relayed.
    pub async fn whole(
        &mut self,
        bytes_max: usize,
        within: Duration,
        budget: Option<&BufferBudget>,
    ) -> Option<Vec<u8>> {
        if self.share.budget().is_none() {
            self.share = budget.map(|budget| budget.share(BufferShare::FREE)).unwrap_or_default();
        }
        tokio::time::timeout(within, self.fill(bytes_max)).await.unwrap_or(None)
    }

    /// Whether reading ended because the budget was used up.
    #[must_use]
    pub fn is_over_budget(&self) -> bool {
        self.is_over_budget
    }

    /// Replaces the bytes read by `whole`.
    pub fn replace(&mut self, whole: Bytes) {
        self.frames.clear();
        self.share.shrink(whole.len());
        self.frames.push_back(Frame::data(whole));
    }

    async fn fill(&mut self, bytes_max: usize) -> Option<Vec<u8>> {
        if self.error.is_some() {
            return None;
        }
        let mut whole = Vec::new();
        self.frames.iter().filter_map(Frame::data_ref).for_each(|data| whole.extend_from_slice(data));
        if whole.len() > bytes_max {
            return None;
        }
        while let Some(frame) = self.rest.frame().await {
            match frame {
                Ok(frame) => {
                    whole.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
                    self.frames.push_back(frame);
                }
                Err(error) => {
                    self.error = Some(error);
                    return None;
                }
            }
            if whole.len() > bytes_max {
                return None;
            }
            // The bytes are in memory twice: as frames, and joined.
            if !self.share.cover(whole.len() + whole.capacity()) {
                self.is_over_budget = true;
                return None;
            }
        }
        Some(whole)
    }
}

impl<B> Body for Peeked<B>
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
                self.share.shrink(0);
            }
            return Poll::Ready(Some(Ok(frame)));
        }
        if let Some(error) = self.error.take() {
            return Poll::Ready(Some(Err(error)));
        }
        Pin::new(&mut self.rest).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty() && self.error.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let frames: usize = self.frames.iter().filter_map(Frame::data_ref).map(Bytes::len).sum();
        let rest = self.rest.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + frames as u64);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + frames as u64);
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use http_body_util::StreamBody;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn body(
        pieces: Vec<Result<&'static str, io::ErrorKind>>,
    ) -> impl Body<Data = Bytes, Error = io::Error> + Unpin {
        let frames = pieces.into_iter().map(|piece| match piece {
            Ok(text) => Ok(Frame::data(Bytes::from_static(text.as_bytes()))),
            Err(kind) => Err(io::Error::from(kind)),
        });
        StreamBody::new(Stream(frames.collect()))
    }

    async fn read<B>(body: B, bytes_max: usize, within: Duration) -> (Peeked<B>, Option<Vec<u8>>)
    where
        B: Body<Data = Bytes> + Unpin,
    {
        Peeked::read(body, bytes_max, within, None).await
    }

    struct Stream(VecDeque<Result<Frame<Bytes>, io::Error>>);

    impl futures_core::Stream for Stream {
        type Item = Result<Frame<Bytes>, io::Error>;

        fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            Poll::Ready(self.0.pop_front())
        }
    }

    #[tokio::test]
    async fn a_small_body_is_read_whole_and_relayed_in_its_pieces() {
        let (mut peeked, whole) = read(body(vec![Ok("ab"), Ok("c")]), 3, LONG).await;
        assert_eq!(whole.as_deref(), Some(&b"abc"[..]));
        assert_eq!(peeked.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
        assert_eq!(peeked.frame().await.unwrap().unwrap().into_data().unwrap(), "c");
        assert!(peeked.frame().await.is_none());
    }

    #[tokio::test]
    async fn a_large_body_is_not_classified_and_not_shortened() {
        let (peeked, whole) = read(body(vec![Ok("ab"), Ok("cd"), Ok("ef")]), 3, LONG).await;
        assert_eq!(whole, None);
        assert_eq!(peeked.collect().await.unwrap().to_bytes(), "abcdef");
    }

    #[tokio::test]
    async fn a_body_that_was_read_can_be_read_again_and_replaced() {
        let (mut peeked, _) = read(body(vec![Ok("ab"), Ok("cd")]), 3, LONG).await;
        assert_eq!(peeked.whole(3, LONG, None).await, None);
        assert_eq!(peeked.whole(4, LONG, None).await.as_deref(), Some(&b"abcd"[..]));
        peeked.replace(Bytes::from_static(b"other"));
        assert_eq!(peeked.collect().await.unwrap().to_bytes(), "other");
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_relayed_with_its_error() {
        let (mut peeked, whole) =
            read(body(vec![Ok("ab"), Err(io::ErrorKind::ConnectionReset)]), 9, LONG).await;
        assert_eq!(whole, None);
        assert_eq!(peeked.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
        assert!(!peeked.is_end_stream());
        assert_eq!(peeked.frame().await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test(start_paused = true)]
    async fn reading_an_endless_body_times_out() {
        let endless = Endless;
        let (_, whole) = read(endless, 9, Duration::from_secs(2)).await;
        assert_eq!(whole, None);
    }

    #[derive(Debug)]
    struct Endless;

    impl Body for Endless {
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
