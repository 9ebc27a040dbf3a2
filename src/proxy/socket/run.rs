//! The event loop of a WebSocket session: it handles one event after another. The events come from
//! `polling`.

use std::future::poll_fn;
use std::pin::pin;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use super::buffers::ReadAhead;
use super::session::{PooledSession, Session, SessionEvent};
use super::session_end::{SessionEnd, SessionSide};
use super::upstream_to_client::UpstreamEvent;
use crate::elevenlabs::socket::{Dialect, MessageKind, conversation_id};
use crate::policy::replay::Progress;
use crate::policy::verdict::Verdict;
use crate::upstream::Connect;

impl<C: Connect> Session<C> {
    /// Runs the session with `client`, which has already sent `early`, to its end.
    pub(super) async fn run<S>(mut self: Box<Self>, mut client: S, early: Bytes)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.from_client.extend(&early);
        // Even when it is empty, it holds the buffer that the handshake was read into.
        drop(early);
        if self.dialect == Dialect::Foreign {
            self.mark_served();
        }
        let mut cut = pin!(self.proxy.cut.clone().cancelled_owned());
        let ending = loop {
            let event = tokio::select! {
                biased;
                () = cut.as_mut() => break SessionEnd::Shutdown,
                event = poll_fn(|cx| self.poll_event(cx, &mut client)) => event,
            };
            // A disconnect of the client is noticed during every wait: for a key, a concurrency
            // slot, a handshake.
            let (bytes_max, other_bytes) = (self.read_ahead_max(), self.other_capacity());
            let (mut from_client, mut share) =
                (std::mem::take(&mut self.from_client), std::mem::take(&mut self.share));
            let ahead = ReadAhead { bytes_max, share: &mut share, other_bytes };
            let ending = tokio::select! {
                biased;
                () = cut.as_mut() => Some(SessionEnd::Shutdown),
                ending = self.handle(event) => ending,
                ending = from_client.watch(&mut client, ahead) => Some(ending),
            };
            (self.from_client, self.share) = (from_client, share);
            if let Some(ending) = ending {
                break ending;
            }
        };
        self.end(ending, client).await;
    }

    /// Handles an event; returns how the session ends, if it does.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future while it waits cancels that wait, and leaves the session to be ended.
    async fn handle(&mut self, event: SessionEvent) -> Option<SessionEnd> {
        match event {
            SessionEvent::HeldMessage(content) if self.covers_text(content) => {
                self.process_message(content).await
            }
            SessionEvent::HeldMessage(_) => return Some(SessionEnd::QuotaExceeded),
            SessionEvent::Reserved(result) => self.use_reservation(result).await,
            SessionEvent::Upstream(UpstreamEvent::Message(
                MessageKind::Aside | MessageKind::UnknownError,
            )) => {}
            SessionEvent::Upstream(UpstreamEvent::Message(MessageKind::Queued)) => {
                self.is_queued = true;
                self.upstream_to_client.forward_held(&mut self.to_client.bytes);
            }
            SessionEvent::Upstream(UpstreamEvent::Message(MessageKind::Useful)) => self.mark_served(),
            SessionEvent::Upstream(
                UpstreamEvent::Message(MessageKind::Refused(verdict)) | UpstreamEvent::Close(Some(verdict)),
            ) => {
                self.handle_refusal(verdict).await;
            }
            SessionEvent::Upstream(UpstreamEvent::Close(None)) => {
                self.upstream_to_client.open(&mut self.to_client.bytes)
            }
            SessionEvent::SpeechIdle => self.attempt.release_slot(),
            // The provider has sent no useful message with this key: another key may be tried, if that is
            // safe.
            SessionEvent::End(SessionEnd::UpstreamReset | SessionEnd::Violated(_, SessionSide::Upstream))
                if !self.upstream_to_client.is_open() && self.fail_over(Progress::Unanswered).await => {}
            SessionEvent::End(ending) => return Some(ending),
        }
        None
    }

    /// Marks the session as served: the held messages are forwarded to the client, and the opening
    /// messages are freed.
    fn mark_served(&mut self) {
        let first = self.upstream_to_client.first().to_vec();
        (self.opening, self.is_queued) = (None, false);
        if self.dialect == Dialect::Agent {
            self.conversation = conversation_id(&first).map(Into::into);
        }
        self.upstream_to_client.serve(&mut self.to_client.bytes);
        self.refusal = None;
        let retry = self.pooled.as_mut().map(|pooled| &mut pooled.request.retry);
        self.attempt.record_verdict(Verdict::Served, retry);
        if let (Some(PooledSession { request: context, ownership_permit }), Some(key)) =
            (&mut self.pooled, self.attempt.key())
        {
            let changes = context.retry.record_session(&self.proxy, key, &first);
            if let Some(permit) = ownership_permit.take() {
                permit.record_ownership(changes);
            }
        }
        self.charge_text();
    }

    /// Handles a refusal. Before a useful message, the session fails over to the next key if
    /// possible; else the refusal is forwarded to the client and recorded in the pool.
    async fn handle_refusal(&mut self, verdict: Verdict) {
        if !self.upstream_to_client.is_open() && self.fail_over(Progress::Answered(verdict)).await {
            return;
        }
        // A message and the close behind it report the same refusal.
        if self.refusal.is_none() {
            if self.upstream_to_client.is_open() {
                let retry = self.pooled.as_mut().map(|pooled| &mut pooled.request.retry);
                self.attempt.record_verdict(verdict, retry);
            }
            if let (Verdict::NotFound, Some(PooledSession { request: context, .. })) = (verdict, &self.pooled)
            {
                context.retry.remember_miss(&self.proxy, &context.config.limits);
            }
            self.refusal = Some(verdict);
        }
        self.upstream_to_client.open(&mut self.to_client.bytes);
    }

    /// Adds the forwarded bytes behind `from` to the opening messages, while a failover is
    /// possible.
    pub(super) fn keep_opening(&mut self, from: usize) {
        let more = self.to_upstream.bytes.get(from..).unwrap_or_default();
        let max = self.config.limits.websocket.replay_buffer;
        self.opening = self.opening.take().filter(|kept| kept.len() + more.len() <= max);
        if let Some(kept) = &mut self.opening {
            kept.extend_from_slice(more);
        }
    }
}
