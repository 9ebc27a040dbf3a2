//! Ends a session: writes its usage record and its access log, and queues a conversation whose cost is unknown. Then
//! sends close frames to both sides, if the reason for the end requires them.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::buffers::{ReadBuffer, ReadResult, SendBuffer, drain_client};
use super::close_frames::{CLOSE_FRAME_MASK, POLICY_VIOLATION, put_close, put_refusal};
use super::session::Session;
use super::session_end::SessionEnd;
use super::upstream_to_client::UpstreamToClient;
use crate::policy::outcome::Outcome;
use crate::upstream::Connect;

/// Maximum time for sending the last frames, and for the client to close its connection.
pub(super) const LAST_FRAMES_TIMEOUT: Duration = Duration::from_secs(1);

impl<C: Connect> Session<C> {
    /// Ends the session for `reason`. Writes the usage record and the access log before it sends the last frames.
    pub(super) async fn finish<S>(mut self: Box<Self>, reason: SessionEnd, mut client: S)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // After a close frame of either side, a disconnect before the close frame of the other side is a
        // normal end.
        let is_disconnect = matches!(reason, SessionEnd::ClientDisconnected | SessionEnd::UpstreamReset);
        let was_closed = self.client_to_upstream.has_closed || self.upstream_to_client.has_closed;
        let end = if is_disconnect && was_closed { SessionEnd::Closed } else { reason };
        let outcome = match (self.refusal, end) {
            (Some(verdict), _) => verdict.outcome(),
            (None, SessionEnd::UpstreamReset) if !self.upstream_to_client.is_served => Outcome::NoResponse,
            (None, end) => end.outcome(),
        };
        let bytes = [self.client_to_upstream.received_bytes, self.upstream_to_client.received_bytes];
        let audio = self.speech.audio_duration(self.client_to_upstream.audio_bytes());
        self.attempt.record_audio(audio);
        let record = self.attempt.record_end((!self.is_between_keys).then_some(outcome), bytes);
        self.log.summary.record_end(record);
        self.log.summary.set_outcome(outcome);
        if let Some(conversation) =
            self.conversation_id.take().and_then(|id| self.attempt.ended_conversation(id))
        {
            // If the queue is full, the cost of the conversation remains unknown.
            let _ = self.proxy.ended_conversations.try_send(conversation);
        }
        let Self {
            client_to_upstream, mut upstream_to_client, dialect, attempt, log, speech, pooled, ..
        } = *self;
        let Self { from_upstream, mut to_upstream, mut to_client, mut upstream, .. } = *self;
        // The key and the position in the wait queue are released, and the usage record is written, before
        // the last frames are sent.
        drop((attempt, log, speech, pooled));
        if end == SessionEnd::UpstreamReset {
            // The connection is dropped without a close frame, so that the client does not mistake a broken
            // stream for a clean end.
            return;
        }
        if let Some([client_close, upstream_close]) = end.close_frames() {
            let mut stream = UpstreamStream { upstream_to_client, from_upstream, to_client };
            let finish_frame = poll_fn(|cx| stream.poll_finish_frame(cx, &mut upstream, &mut client));
            let is_frame_complete = timeout(LAST_FRAMES_TIMEOUT, finish_frame).await.unwrap_or(false);
            UpstreamStream { upstream_to_client, to_client, .. } = stream;
            match client_close {
                _ if !is_frame_complete => {}
                (POLICY_VIOLATION, message)
                    if matches!(end, SessionEnd::QuotaExceeded(_)) && !upstream_to_client.is_in_message =>
                {
                    put_refusal(&mut to_client.bytes, dialect, end.outcome().as_str(), message);
                }
                close => put_close(&mut to_client.bytes, close, None),
            }
            if !client_to_upstream.is_in_frame() {
                put_close(&mut to_upstream.bytes, upstream_close, Some(CLOSE_FRAME_MASK));
            }
        }
        let close_upstream = poll_fn(|cx| to_upstream.poll_close(cx, &mut upstream));
        let (_, _) = tokio::join!(
            send_last_frames(&mut to_client, &mut client),
            timeout(LAST_FRAMES_TIMEOUT, close_upstream)
        );
    }
}

/// The stream from the provider to the client, up to the end of the current frame.
struct UpstreamStream {
    upstream_to_client: UpstreamToClient,
    from_upstream: ReadBuffer,
    to_client: SendBuffer,
}

impl UpstreamStream {
    /// Forwards the rest of the current frame, because a close frame cannot be inserted into it. Returns
    /// whether the frame is complete.
    fn poll_finish_frame<U, S>(
        &mut self,
        cx: &mut Context<'_>,
        upstream: &mut U,
        client: &mut S,
    ) -> Poll<bool>
    where
        U: AsyncRead + Unpin,
        S: AsyncWrite + Unpin,
    {
        let Self { upstream_to_client, from_upstream, to_client } = self;
        loop {
            let frame_remaining = usize::try_from(upstream_to_client.frame_remaining()).unwrap_or(usize::MAX);
            if frame_remaining == 0 {
                return Poll::Ready(true);
            }
            let frame_bytes = &mut from_upstream.bytes;
            let following_bytes = frame_bytes.split_off(frame_remaining.min(frame_bytes.len()));
            let former_length = frame_bytes.len();
            let _ = upstream_to_client.process_input(frame_bytes, &mut to_client.bytes);
            let has_progress = frame_bytes.len() < former_length;
            frame_bytes.unsplit(following_bytes);
            if ready!(to_client.poll_send(cx, client)).is_err() {
                return Poll::Ready(false);
            }
            if !has_progress && ready!(from_upstream.poll_read(cx, upstream)) != ReadResult::Bytes {
                return Poll::Ready(false);
            }
        }
    }
}

/// Sends the last frames to the client, and waits until the client closes its connection.
pub(super) async fn send_last_frames<S: AsyncRead + AsyncWrite + Unpin>(
    to_client: &mut SendBuffer,
    client: &mut S,
) {
    let send_and_drain = async {
        if poll_fn(|cx| to_client.poll_close(cx, client)).await.is_ok() {
            drain_client(client).await;
        }
    };
    // After the timeout, the connection is closed with or without the client.
    let _ = timeout(LAST_FRAMES_TIMEOUT, send_and_drain).await;
}
