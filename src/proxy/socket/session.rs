//! The event loop of a socket session: it handles one event after another. The events come from
//! `polling`.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Sleep;

use super::buffers::{self, ReadAhead, ReadBuffer, SendBuffer};
use super::client_to_upstream::ClientToUpstream;
use super::ending::{Ending, Side};
use super::speech::{Given, SpeechPermit};
use super::upstream_to_client::{UpstreamEvent, UpstreamToClient};
use super::{SocketLimits, polling};
use crate::body::budget::BufferShare;
use crate::clock;
use crate::elevenlabs::socket::{Dialect, MessageKind, SpokenText, conversation_id};
use crate::policy::frame::Sender;
use crate::policy::replay::Progress;
use crate::policy::verdict::Verdict;
use crate::proxy::access_log::AccessLog;
use crate::proxy::attempt::Attempt;
use crate::proxy::exchange::RequestContext;
use crate::proxy::usage::UsagePermit;
use crate::proxy::{Proxy, RuntimeConfig};
use crate::secret::Redactor;
use crate::telemetry::SocketOpen;
use crate::upstream::{Connect, Switched, Wire};

/// The data for the start of a session.
pub(super) struct SessionStart<C> {
    pub(super) proxy: Arc<Proxy<C>>,
    pub(super) config: Arc<RuntimeConfig>,
    pub(super) dialect: Dialect,
    /// Whether the client sent one of the provider's own tokens.
    pub(super) has_token: bool,
    pub(super) audio_format: Option<String>,
    pub(super) redactor: Option<Arc<Redactor>>,
    pub(super) pooled: Option<PooledSession>,
    pub(super) attempt: Box<Attempt>,
    pub(super) upstream: Switched,
}

/// The data of a session with a key of the pool, which can fail over to another key.
pub(super) struct PooledSession {
    pub(super) request: RequestContext,
    /// The permit for recording the ownership of resources.
    pub(super) ownership_permit: Option<UsagePermit>,
}

/// A running session. Dropping it closes both connections, releases its key, and writes its usage
/// record.
pub(super) struct Session<C> {
    pub(super) proxy: Arc<Proxy<C>>,
    pub(super) config: Arc<RuntimeConfig>,
    pub(super) dialect: Dialect,
    pub(super) pooled: Option<PooledSession>,
    pub(super) attempt: Box<Attempt>,
    pub(super) log: AccessLog,
    pub(super) upstream: Wire,
    pub(super) from_client: ReadBuffer,
    pub(super) to_upstream: SendBuffer,
    pub(super) from_upstream: ReadBuffer,
    pub(super) to_client: SendBuffer,
    pub(super) client_to_upstream: ClientToUpstream,
    pub(super) upstream_to_client: UpstreamToClient,
    /// The client's messages so far, for a failover; `None` when they were too long or the session
    /// cannot fail over any more.
    pub(super) opening: Option<Vec<u8>>,
    pub(super) speech: SpeechPermit,
    /// When the current failover began.
    pub(super) moving_since: Option<Instant>,
    /// Whether the attempt has ended and the next one has not begun.
    pub(super) is_between_keys: bool,
    /// The refusal that was forwarded to the client.
    pub(super) refusal: Option<Verdict>,
    /// The provider's conversation ID, when it is a conversation with an agent.
    pub(super) conversation: Option<Arc<str>>,
    /// Whether the provider accepts no more bytes; its last messages may still explain why.
    pub(super) is_deaf: bool,
    /// Whether the provider has reported that the client waits for a busy agent.
    pub(super) is_queued: bool,
    pub(super) turns: polling::PollOrder,
    pub(super) began: Instant,
    pub(super) moved_at: Instant,
    /// When both sides had sent a close frame.
    pub(super) closed_at: Option<Instant>,
    /// When the client's credit quota is checked next.
    pub(super) quota_check_at: Option<Instant>,
    pub(super) timer: Option<Pin<Box<Sleep>>>,
    /// The share of the buffer budget for all its buffers.
    pub(super) share: BufferShare,
    _open: SocketOpen,
}

/// The next event of a session.
pub(super) enum SessionEvent {
    /// The client has sent a message that is held until its text is paid for; with the size of its
    /// content.
    Said(SpokenText),
    /// The reservation that was waited for has completed.
    Given(Given),
    /// The provider has sent a message or a close that changes the session's state.
    Told(UpstreamEvent),
    /// A text-to-speech socket has been silent for its idle timeout.
    Quiet,
    /// The session ends.
    Over(Ending),
}

impl<C> Session<C> {
    pub(super) fn opened(start: SessionStart<C>, log: AccessLog) -> Self {
        let SessionStart {
            proxy,
            config,
            dialect,
            has_token,
            audio_format,
            redactor,
            pooled,
            attempt,
            upstream,
        } = start;
        let bounds = config.limits.websocket;
        let now = clock::instant();
        Self {
            client_to_upstream: ClientToUpstream::new(
                dialect,
                bounds.slice_bytes_max(),
                bounds.max_session_buffer,
            ),
            upstream_to_client: UpstreamToClient::new(dialect, has_token, redactor),
            opening: (pooled.is_some() && dialect != Dialect::Foreign).then(Vec::new),
            speech: SpeechPermit::new(dialect, audio_format.as_deref()),
            _open: proxy.meters.socket_opened(dialect),
            upstream: upstream.stream,
            from_client: ReadBuffer::new(Sender::Client, dialect.is_read(), Bytes::new().into()),
            to_upstream: SendBuffer::default(),
            // The provider may have sent its first frames together with its 101.
            from_upstream: ReadBuffer::new(Sender::Server, dialect.is_read(), upstream.heard),
            to_client: SendBuffer::default(),
            moving_since: None,
            is_between_keys: false,
            refusal: None,
            conversation: None,
            is_deaf: false,
            is_queued: false,
            turns: polling::PollOrder::default(),
            began: now,
            moved_at: now,
            closed_at: None,
            quota_check_at: polling::quota_checks(dialect, pooled.as_ref()).then_some(now),
            timer: None,
            share: config.limits.buffers.share(buffers::FREE),
            proxy,
            config,
            dialect,
            pooled,
            attempt,
            log,
        }
    }

    pub(super) fn bounds(&self) -> SocketLimits {
        self.config.limits.websocket
    }

    /// Bytes that may still be read ahead of processing.
    pub(super) fn read_ahead_max(&self) -> usize {
        let held = self.client_to_upstream.held_bytes() + self.opening.as_ref().map_or(0, Vec::len);
        self.bounds().max_session_buffer.saturating_sub(held)
    }

    /// Memory of its buffers, except the one for bytes from the client.
    pub(super) fn capacity_beside(&self) -> usize {
        let Self {
            to_upstream,
            from_upstream,
            to_client,
            client_to_upstream: upwards,
            upstream_to_client: downwards,
            opening,
            ..
        } = self;
        let passing = [&to_upstream.bytes, &from_upstream.bytes, &to_client.bytes].map(BytesMut::capacity);
        let kept = opening.as_ref().map_or(0, Vec::capacity) + upwards.capacity() + downwards.capacity();
        kept + passing.iter().sum::<usize>()
    }

    /// Reserves the memory of its buffers and `more` bytes in the budget; returns whether it was
    /// available.
    pub(super) fn takes_memory(&mut self, more: usize) -> bool {
        let bytes = self.from_client.bytes.capacity() + self.capacity_beside();
        self.share.cover(bytes + more)
    }

    /// Reserves the memory of its buffers in the budget. If that is not available, the opening
    /// messages are freed, and the session cannot fail over any more. Returns whether the memory is
    /// reserved.
    pub(super) fn takes_memory_or_lets_go(&mut self) -> bool {
        self.takes_memory(0) || (self.opening.take().is_some() && self.takes_memory(0))
    }
}

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
            self.served();
        }
        let mut cut = pin!(self.proxy.cut.clone().cancelled_owned());
        let ending = loop {
            let event = tokio::select! {
                biased;
                () = cut.as_mut() => break Ending::Cut,
                event = poll_fn(|cx| self.poll_event(cx, &mut client)) => event,
            };
            // A disconnect of the client is noticed during every wait: for a key, a concurrency
            // slot, a handshake.
            let (bytes_max, beside) = (self.read_ahead_max(), self.capacity_beside());
            let (mut from_client, mut share) =
                (std::mem::take(&mut self.from_client), std::mem::take(&mut self.share));
            let ahead = ReadAhead { bytes_max, share: &mut share, beside };
            let ending = tokio::select! {
                biased;
                () = cut.as_mut() => Some(Ending::Cut),
                ending = self.meet(event) => ending,
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
    async fn meet(&mut self, event: SessionEvent) -> Option<Ending> {
        match event {
            SessionEvent::Said(said) if self.may_say(said) => self.said(said).await,
            SessionEvent::Said(_) => return Some(Ending::Spent),
            SessionEvent::Given(given) => self.given(given).await,
            SessionEvent::Told(UpstreamEvent::Message(MessageKind::Aside | MessageKind::UnknownError)) => {}
            SessionEvent::Told(UpstreamEvent::Message(MessageKind::Queued)) => {
                self.is_queued = true;
                self.upstream_to_client.pass_on(&mut self.to_client.bytes);
            }
            SessionEvent::Told(UpstreamEvent::Message(MessageKind::Useful)) => self.served(),
            SessionEvent::Told(
                UpstreamEvent::Message(MessageKind::Refused(verdict)) | UpstreamEvent::Close(Some(verdict)),
            ) => {
                self.refused(verdict).await;
            }
            SessionEvent::Told(UpstreamEvent::Close(None)) => {
                self.upstream_to_client.open(&mut self.to_client.bytes)
            }
            SessionEvent::Quiet => self.attempt.rest(),
            // The provider has sent nothing useful with this key: another key may be tried, if that
            // is safe.
            SessionEvent::Over(Ending::UpstreamBroke | Ending::Violated(_, Side::Upstream))
                if !self.upstream_to_client.is_open() && self.fail_over(Progress::Unanswered).await => {}
            SessionEvent::Over(ending) => return Some(ending),
        }
        None
    }

    /// Marks the session as served: the held messages are forwarded to the client, and the opening
    /// messages are freed.
    fn served(&mut self) {
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
        self.book();
    }

    /// Handles a refusal. Before a useful message, the session fails over to the next key if
    /// possible; else the refusal is forwarded to the client and recorded in the pool.
    async fn refused(&mut self, verdict: Verdict) {
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
