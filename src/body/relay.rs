//! Wraps the provider's response body, which hyper's server sends to the client. Counts the relayed bytes, and reports
//! exactly once how the relay ended, even if hyper's server drops the body before its end.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

/// The outcome of the relay of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayEnd {
    /// The complete body was passed to hyper's server, which sends it to the client.
    Complete,
    /// The body was dropped before its end, for example because the client disconnected or Keychoir shuts down.
    Dropped,
    /// The body ended with an error: the provider failed, or the rest of the body must not be forwarded.
    BodyFailed,
}

/// Receives the outcome of a relay, exactly once.
pub trait OnBodyEnd: Send + 'static {
    /// Records that the relay has ended. `relayed_bytes` is the number of relayed bytes of the body.
    fn on_end(self, end: RelayEnd, relayed_bytes: u64);
}

/// A body that calls [`OnBodyEnd`] when it ends, fails or is dropped.
///
/// # Cancel safety
///
/// Dropping the body reports [`RelayEnd::Dropped`], or [`RelayEnd::Complete`] if all frames were returned:
/// if the length of a body is known, hyper's server does not poll it again after the last byte. Nothing is reported if
/// the end was reported before.
#[derive(Debug)]
pub struct Relay<B: Body, O: OnBodyEnd> {
    /// The body, which is `None` only while this value is dropped.
    body: Option<B>,
    /// The receiver of the outcome, which is `None` after the end was reported.
    on_end: Option<O>,
    relayed_bytes: u64,
}

impl<B: Body, O: OnBodyEnd> Relay<B, O> {
    /// Relays `body` and calls [`OnBodyEnd::on_end`] at its end.
    pub fn new(body: B, on_end: O) -> Self {
        Self { body: Some(body), on_end: Some(on_end), relayed_bytes: 0 }
    }

    fn report_end(&mut self, end: RelayEnd) {
        if let Some(on_end) = self.on_end.take() {
            on_end.on_end(end, self.relayed_bytes);
        }
    }
}

impl<B, O> Body for Relay<B, O>
where
    B: Body<Data = Bytes> + Unpin,
    O: OnBodyEnd + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => match frame.data_ref() {
                Some(data) => self.relayed_bytes += data.len() as u64,
                // Trailers end the body, so hyper's server does not poll it again.
                None => self.report_end(RelayEnd::Complete),
            },
            Some(Err(_)) => self.report_end(RelayEnd::BodyFailed),
            None => self.report_end(RelayEnd::Complete),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(B::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(B::size_hint).unwrap_or_default()
    }
}

impl<B: Body, O: OnBodyEnd> Drop for Relay<B, O> {
    fn drop(&mut self) {
        let end = if self.body.as_ref().is_none_or(B::is_end_stream) {
            RelayEnd::Complete
        } else {
            RelayEnd::Dropped
        };
        // The upstream body is dropped first. Its drop closes the connection of an incomplete body, so the provider can
        // detect the end of this request before another request uses the concurrency slot of the key.
        self.body = None;
        self.report_end(end);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use http::HeaderMap;
    use http_body_util::{BodyExt, Full};

    use super::*;

    struct EndSender(Sender<(RelayEnd, u64)>);

    impl OnBodyEnd for EndSender {
        fn on_end(self, end: RelayEnd, relayed_bytes: u64) {
            self.0.send((end, relayed_bytes)).unwrap();
        }
    }

    fn relay<B: Body>(body: B) -> (Relay<B, EndSender>, Receiver<(RelayEnd, u64)>) {
        let (sender, receiver) = channel();
        (Relay::new(body, EndSender(sender)), receiver)
    }

    fn reported_ends(receiver: Receiver<(RelayEnd, u64)>) -> Vec<(RelayEnd, u64)> {
        receiver.into_iter().collect()
    }

    #[tokio::test]
    async fn a_response_read_to_its_end_is_complete() {
        let (relay, receiver) = relay(Full::new(Bytes::from_static(b"abc")));
        assert_eq!(relay.collect().await.unwrap().to_bytes(), "abc");
        assert_eq!(reported_ends(receiver), [(RelayEnd::Complete, 3)]);
    }

    #[tokio::test]
    async fn a_response_is_complete_without_a_poll_after_its_last_byte() {
        let (mut relay, receiver) = relay(Full::new(Bytes::from_static(b"abc")));
        relay.frame().await.unwrap().unwrap();
        drop(relay);
        assert_eq!(reported_ends(receiver), [(RelayEnd::Complete, 3)]);
    }

    #[tokio::test]
    async fn trailers_complete_a_response() {
        let body = Full::new(Bytes::from_static(b"abc")).with_trailers(async { Some(Ok(HeaderMap::new())) });
        let (mut relay, receiver) = relay(Box::pin(body));
        relay.frame().await.unwrap().unwrap();
        assert!(relay.frame().await.unwrap().unwrap().is_trailers());
        drop(relay);
        assert_eq!(reported_ends(receiver), [(RelayEnd::Complete, 3)]);
    }

    #[test]
    fn an_empty_response_is_complete() {
        let (relay, receiver) = relay(Full::<Bytes>::default());
        drop(relay);
        assert_eq!(reported_ends(receiver), [(RelayEnd::Complete, 0)]);
    }

    #[test]
    fn a_dropped_response_is_reported() {
        let (relay, receiver) = relay(Full::new(Bytes::from_static(b"abc")));
        drop(relay);
        assert_eq!(reported_ends(receiver), [(RelayEnd::Dropped, 0)]);
    }

    #[test]
    fn the_upstream_body_is_dropped_before_the_end_is_reported() {
        struct ReferenceCountSender {
            reference: Arc<()>,
            sender: Sender<usize>,
        }
        impl OnBodyEnd for ReferenceCountSender {
            fn on_end(self, _: RelayEnd, _: u64) {
                self.sender.send(Arc::strong_count(&self.reference)).unwrap();
            }
        }
        let (reference, (sender, receiver)) = (Arc::new(()), channel());
        let body = Box::pin(PendingBody(Arc::clone(&reference)));
        drop(Relay::new(body, ReferenceCountSender { reference, sender }));
        assert_eq!(receiver.recv().unwrap(), 1, "the body must be dropped before the end is reported");
    }

    struct PendingBody(#[expect(dead_code, reason = "`ReferenceCountSender` counts the reference")] Arc<()>);

    impl Body for PendingBody {
        type Data = Bytes;
        type Error = &'static str;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn a_failed_response_is_reported_once() {
        let (mut relay, receiver) = relay(FailingBody);
        assert!(relay.frame().await.unwrap().is_err());
        drop(relay);
        assert_eq!(reported_ends(receiver), [(RelayEnd::BodyFailed, 0)]);
    }

    struct FailingBody;

    impl Body for FailingBody {
        type Data = Bytes;
        type Error = &'static str;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
            Poll::Ready(Some(Err("reset")))
        }
    }
}
