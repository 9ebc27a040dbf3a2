//! Runs the event loop of a WebSocket session, which handles one event after another. `polling` provides the events.

use std::future::poll_fn;
use std::mem;
use std::pin::pin;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use super::buffers::ReadAheadLimits;
use super::session::{PooledSession, Session, SessionEvent};
use super::session_end::{SessionEnd, SessionSide};
use super::upstream_to_client::UpstreamEvent;
use crate::elevenlabs::socket::{Dialect, MessageKind, conversation_id};
use crate::policy::replay::Progress;
use crate::policy::verdict::Verdict;
use crate::upstream::Connect;

impl<C: Connect> Session<C> {
    /// Runs the session with `client`, which has already sent `early_bytes`, until the session ends.
    pub(super) async fn run<S>(mut self: Box<Self>, mut client: S, early_bytes: Bytes)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.from_client.extend(&early_bytes);
        // Even if `early_bytes` is empty, it retains the buffer into which the handshake was read.
        drop(early_bytes);
        if self.dialect == Dialect::Foreign {
            self.mark_served();
        }
        let mut drain_expired = pin!(self.proxy.drain_expired.clone().cancelled_owned());
        let end = loop {
            let event = tokio::select! {
                biased;
                () = drain_expired.as_mut() => break SessionEnd::Shutdown,
                event = poll_fn(|cx| self.poll_event(cx, &mut client)) => event,
            };
            // The client is read during every wait, for a key, a concurrency slot or a handshake, so that its
            // disconnect is detected.
            let (max_bytes, other_bytes) = (self.max_read_ahead(), self.other_capacity());
            let (mut from_client, mut reservation) =
                (mem::take(&mut self.from_client), mem::take(&mut self.reservation));
            let limits = ReadAheadLimits { max_bytes, reservation: &mut reservation, other_bytes };
            let end = tokio::select! {
                biased;
                () = drain_expired.as_mut() => Some(SessionEnd::Shutdown),
                end = self.handle_event(event) => end,
                end = from_client.read_ahead(&mut client, limits) => Some(end),
            };
            (self.from_client, self.reservation) = (from_client, reservation);
            if let Some(end) = end {
                break end;
            }
        };
        self.finish(end, client).await;
    }

    /// Handles an event. Returns the reason if the session ends.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future cancels its wait for a key or a connection. The session can then only be ended.
    async fn handle_event(&mut self, event: SessionEvent) -> Option<SessionEnd> {
        match event {
            SessionEvent::HeldMessage(content) => match self.reserve_text_credits(content).await {
                Ok(()) => self.process_message(content).await,
                Err(end) => return Some(end),
            },
            SessionEvent::Reserved(result) => self.apply_reservation(result).await,
            SessionEvent::Upstream(UpstreamEvent::Message(
                MessageKind::KeepAlive | MessageKind::UnknownError,
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
            // Before a useful message, another key may be tried if that is safe.
            SessionEvent::End(SessionEnd::UpstreamReset | SessionEnd::Violated(_, SessionSide::Upstream))
                if !self.upstream_to_client.is_open && self.fail_over(Progress::NoResponse).await => {}
            SessionEvent::End(end) => return Some(end),
        }
        None
    }

    /// Marks the session as served: forwards the held messages to the client, and frees the opening messages.
    fn mark_served(&mut self) {
        let first_message = self.upstream_to_client.first_message().to_vec();
        (self.opening_messages, self.is_queued) = (None, false);
        if self.dialect == Dialect::Agent {
            self.conversation_id = conversation_id(&first_message).map(Into::into);
        }
        self.upstream_to_client.mark_served(&mut self.to_client.bytes);
        self.refusal = None;
        let retry = self.pooled.as_mut().map(|pooled| &mut pooled.context.retry);
        self.attempt.record_verdict(Verdict::Served, retry);
        if let (Some(PooledSession { context, ownership_permit }), Some(key)) =
            (&mut self.pooled, self.attempt.key())
        {
            let updates = context.retry.affinity.record_session(&self.proxy, key, &first_message);
            if let Some(permit) = ownership_permit.take() {
                permit.record_ownership(updates);
            }
        }
        self.charge_text();
    }

    /// Handles a refusal. Before a useful message, the session fails over to the next key if possible.
    /// Otherwise, the refusal is forwarded to the client and recorded in the pool.
    async fn handle_refusal(&mut self, verdict: Verdict) {
        if !self.upstream_to_client.is_open && self.fail_over(Progress::Responded(verdict)).await {
            return;
        }
        // A message and the close frame after it report the same refusal.
        if self.refusal.is_none() {
            if self.upstream_to_client.is_open {
                let retry = self.pooled.as_mut().map(|pooled| &mut pooled.context.retry);
                self.attempt.record_verdict(verdict, retry);
            }
            if let (Verdict::NotFound, Some(PooledSession { context, .. })) = (verdict, &self.pooled) {
                context
                    .retry
                    .affinity
                    .cache_not_found(&self.proxy.not_found_cache, context.config.limits.not_found_ttl);
            }
            self.refusal = Some(verdict);
        }
        self.upstream_to_client.open(&mut self.to_client.bytes);
    }

    /// Appends the bytes to forward, starting at `start`, to the opening messages, while a failover is possible. Frees
    /// the opening messages if they would exceed the replay buffer.
    pub(super) fn extend_opening_messages(&mut self, start: usize) {
        let new_bytes = self.to_upstream.bytes.get(start..).unwrap_or_default();
        let max_size = self.limits().replay_buffer;
        self.opening_messages =
            self.opening_messages.take().filter(|messages| messages.len() + new_bytes.len() <= max_size);
        if let Some(messages) = &mut self.opening_messages {
            messages.extend_from_slice(new_bytes);
        }
    }
}
