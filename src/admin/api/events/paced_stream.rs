//! Provides the response body of an event stream. It sends frames with a minimum time between them, and heartbeats when
//! there are no frames. It ends at the drain or when its session has ended. A listener is a client that receives the
//! stream.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame};
use tokio::time::Sleep;
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::clock;

/// Minimum time between two frames.
pub(super) const FRAME_INTERVAL: Duration = Duration::from_millis(250);

/// Maximum time without a frame. Proxies between the listener and Keychoir usually close connections after a
/// minute of silence.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(15);

/// The frame that is sent without events: a comment, which listeners ignore.
const HEARTBEAT: &[u8] = b": heartbeat\n\n";

/// A body of paced frames. `F` returns the next frame, or `None` if there is nothing to send. The body is polled only
/// when the connection accepts more data, so a slow listener never has more than one frame in memory.
pub(in crate::admin::api) struct PacedStream<F> {
    next_frame: F,
    timer: Pin<Box<Sleep>>,
    /// The time from the next frame to the one after it, at least [`FRAME_INTERVAL`].
    interval: Duration,
    /// The time of the last frame, or of the creation of the body before the first frame.
    sent_at: Instant,
    drain: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Returns whether the listener may still receive frames, for example because its session has not ended.
    is_open: Box<dyn Fn() -> bool + Send>,
}

impl<F> PacedStream<F> {
    /// Creates a body that ends when `drain` completes.
    pub(super) fn new(next_frame: F, drain: WaitForCancellationFutureOwned) -> Self {
        let timer = Box::pin(tokio::time::sleep(Duration::ZERO));
        let is_open = Box::new(|| true);
        Self {
            next_frame,
            timer,
            interval: FRAME_INTERVAL,
            sent_at: clock::instant(),
            drain: Box::pin(drain),
            is_open,
        }
    }

    /// Delays all frames after the first one by `offset`. If a worker wrote the frames of all listeners at the same
    /// time, its requests would have to wait. A different offset for each listener prevents this.
    pub(super) fn with_offset(self, offset: Duration) -> Self {
        Self { interval: FRAME_INTERVAL + offset, ..self }
    }

    /// Ends the body before the next frame if `is_open` returns false.
    pub(in crate::admin::api) fn while_open(self, is_open: impl Fn() -> bool + Send + 'static) -> Self {
        Self { is_open: Box::new(is_open), ..self }
    }
}

impl<F> fmt::Debug for PacedStream<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacedStream").field("sent_at", &self.sent_at).finish_non_exhaustive()
    }
}

impl<F: FnMut() -> Option<Bytes> + Unpin> Body for PacedStream<F> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        loop {
            if self.drain.as_mut().poll(cx).is_ready() {
                return Poll::Ready(None);
            }
            ready!(self.timer.as_mut().poll(cx));
            if !(self.is_open)() {
                return Poll::Ready(None);
            }
            let now = tokio::time::Instant::from_std(clock::instant());
            let interval = std::mem::replace(&mut self.interval, FRAME_INTERVAL);
            self.timer.as_mut().reset(now + interval);
            let is_heartbeat_due = clock::elapsed_since(self.sent_at) >= HEARTBEAT_INTERVAL;
            let heartbeat = || is_heartbeat_due.then_some(Bytes::from_static(HEARTBEAT));
            if let Some(data) = (self.next_frame)().or_else(heartbeat) {
                self.sent_at = clock::instant();
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use http_body_util::BodyExt;
    use tokio_util::sync::CancellationToken;

    use super::*;

    /// Returns the first `count` frames of a body, with the milliseconds at which each was sent. Each poll of the body
    /// takes the next of `polled_frames`, where `None` means that there is nothing to send.
    async fn sent_frames(
        polled_frames: &[Option<&'static str>],
        offset: Duration,
        count: usize,
    ) -> Vec<(u128, String)> {
        let mut polled_frames: VecDeque<_> = polled_frames.iter().copied().collect();
        let next_frame = move || polled_frames.pop_front().flatten().map(Bytes::from);
        let mut body =
            PacedStream::new(next_frame, CancellationToken::new().cancelled_owned()).with_offset(offset);
        let start = clock::instant();
        let mut frames = Vec::new();
        while frames.len() < count {
            let data = body.frame().await.unwrap().unwrap().into_data().unwrap();
            let text = String::from_utf8(data.to_vec()).unwrap();
            // The timer has a resolution of one millisecond.
            frames.push((clock::elapsed_since(start).as_millis().div_ceil(10) * 10, text));
        }
        frames
    }

    #[tokio::test(start_paused = true)]
    async fn frames_have_a_minimum_interval() {
        let sent_frames = sent_frames(&[Some("a"), Some("b"), None, Some("c")], Duration::ZERO, 3).await;
        let intervals: Vec<u128> = sent_frames.iter().map(|(time, _)| time / 250).collect();
        assert_eq!(intervals, [0, 1, 3], "frames must be 250 ms apart: {sent_frames:?}");
        assert_eq!(sent_frames[2].1, "c");
    }

    #[tokio::test(start_paused = true)]
    async fn the_offset_delays_all_frames_after_the_first_one() {
        let sent_frames =
            sent_frames(&[Some("a"), Some("b"), Some("c")], Duration::from_millis(100), 3).await;
        let times: Vec<u128> = sent_frames.iter().map(|(time, _)| *time).collect();
        assert!(
            times[0] < 10 && (350..370).contains(&times[1]) && (600..630).contains(&times[2]),
            "the frames must be sent at 0, 350 and 600 ms: {times:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_heartbeat_follows_15_seconds_of_silence() {
        let sent_frames = sent_frames(&[Some("a")], Duration::ZERO, 3).await;
        assert_eq!((&*sent_frames[1].1, &*sent_frames[2].1), (": heartbeat\n\n", ": heartbeat\n\n"));
        let seconds: Vec<u128> = sent_frames.iter().map(|(time, _)| time / 1_000).collect();
        assert_eq!(seconds, [0, 15, 30], "heartbeats must be 15 s apart: {sent_frames:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_drain_ends_the_body() {
        let drain = CancellationToken::new();
        let mut body = PacedStream::new(|| None, drain.clone().cancelled_owned());
        let start = clock::instant();
        let (end, ()) = tokio::join!(body.frame(), async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            drain.cancel();
        });
        assert!(end.is_none() && clock::elapsed_since(start) < FRAME_INTERVAL, "the end must not be delayed");
    }
}
