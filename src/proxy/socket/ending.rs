//! The end of a session: its close frames, its usage record and its access log.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::buffers::{ReadBuffer, ReadResult, SendBuffer, drain};
use super::close_frames::{MASK, POLICY, put_close, put_refusal};
use super::session::Session;
use super::session_end::SessionEnd;
use super::upstream_to_client::UpstreamToClient;
use crate::policy::outcome::Outcome;
use crate::upstream::Connect;

/// Maximum time for sending the last frames and for the end of the connection.
pub(super) const LAST_FRAMES_MAX: Duration = Duration::from_secs(1);

impl<C: Connect> Session<C> {
    /// Sends close frames to both sides, and writes the usage record and the access log.
    pub(super) async fn end<S>(mut self: Box<Self>, ending: SessionEnd, mut client: S)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // When the client or the provider has sent a close frame, a disconnect before the other
        // side's close frame is a normal end.
        let is_disconnect = matches!(ending, SessionEnd::ClientLeft | SessionEnd::UpstreamBroke);
        let was_closed = self.client_to_upstream.has_closed() || self.upstream_to_client.has_closed();
        let ending = if is_disconnect && was_closed { SessionEnd::Closed } else { ending };
        let outcome = match (self.refusal, ending) {
            (Some(verdict), _) => verdict.outcome(),
            (None, SessionEnd::UpstreamBroke) if !self.upstream_to_client.is_served() => Outcome::NoResponse,
            (None, ending) => ending.outcome(),
        };
        let bytes = [self.client_to_upstream.bytes(), self.upstream_to_client.bytes()];
        let audio = self.speech.audio_duration(self.client_to_upstream.audio_bytes());
        self.attempt.record_audio(audio);
        let record = self.attempt.record_end((!self.is_between_keys).then_some(outcome), bytes);
        self.log.summary.record_end(record);
        self.log.summary.ended_as(outcome);
        if let Some(conversation) = self.conversation.take().and_then(|id| self.attempt.conversation(id)) {
            // A conversation that finds the queue full stays without a price.
            let _ = self.proxy.ended.try_send(conversation);
        }
        let Self {
            client_to_upstream, mut upstream_to_client, dialect, attempt, log, speech, pooled, ..
        } = *self;
        let Self { from_upstream, mut to_upstream, mut to_client, mut upstream, .. } = *self;
        // Releases the key, the position in the wait queue and the usage record before the last frames
        // are sent.
        drop((attempt, log, speech, pooled));
        if ending == SessionEnd::UpstreamBroke {
            // A broken stream must not look like a clean end: the connection is dropped without a
            // close frame.
            return;
        }
        if let Some([client_close, upstream_close]) = ending.close_frames() {
            let mut down = Frames { upstream_to_client, from_upstream, to_client };
            let finishing = poll_fn(|cx| down.poll_finish(cx, &mut upstream, &mut client));
            let is_whole = timeout(LAST_FRAMES_MAX, finishing).await.unwrap_or(false);
            Frames { upstream_to_client, to_client, .. } = down;
            match client_close {
                _ if !is_whole => {}
                (POLICY, reason) if ending == SessionEnd::Spent && !upstream_to_client.is_in_message() => {
                    put_refusal(&mut to_client.bytes, dialect, ending.outcome().word(), reason);
                }
                close => put_close(&mut to_client.bytes, close, None),
            }
            if !client_to_upstream.is_in_frame() {
                put_close(&mut to_upstream.bytes, upstream_close, Some(MASK));
            }
        }
        let closing = poll_fn(|cx| to_upstream.poll_close(cx, &mut upstream));
        let (_, _) =
            tokio::join!(send_last_frames(&mut to_client, &mut client), timeout(LAST_FRAMES_MAX, closing));
    }
}

/// The provider's stream, up to the end of the current frame.
struct Frames {
    upstream_to_client: UpstreamToClient,
    from_upstream: ReadBuffer,
    to_client: SendBuffer,
}

impl Frames {
    /// Forwards the rest of the current frame, as no close can be put into it. Returns whether it
    /// is complete.
    fn poll_finish<U, S>(&mut self, cx: &mut Context<'_>, upstream: &mut U, client: &mut S) -> Poll<bool>
    where
        U: AsyncRead + Unpin,
        S: AsyncWrite + Unpin,
    {
        let Self { upstream_to_client, from_upstream, to_client } = self;
        loop {
            let left = usize::try_from(upstream_to_client.frame_left()).unwrap_or(usize::MAX);
            if left == 0 {
                return Poll::Ready(true);
            }
            let read = &mut from_upstream.bytes;
            let behind = read.split_off(left.min(read.len()));
            let before = read.len();
            let _ = upstream_to_client.take(read, &mut to_client.bytes);
            let has_progress = read.len() < before;
            read.unsplit(behind);
            if ready!(to_client.poll_send(cx, client)).is_err() {
                return Poll::Ready(false);
            }
            if !has_progress && ready!(from_upstream.poll_read(cx, upstream)) != ReadResult::Some {
                return Poll::Ready(false);
            }
        }
    }
}

/// Sends the last frames to a client, and waits for the end of its connection.
pub(super) async fn send_last_frames<S: AsyncRead + AsyncWrite + Unpin>(
    to_client: &mut SendBuffer,
    client: &mut S,
) {
    let sending = async {
        if poll_fn(|cx| to_client.poll_close(cx, client)).await.is_ok() {
            drain(client).await;
        }
    };
    // A client that is gone, or does not close in time, is not waited for.
    let _ = timeout(LAST_FRAMES_MAX, sending).await;
}
