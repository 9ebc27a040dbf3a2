//! What happens on a session, one event after another. What it waits for is in `polling`.

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
use crate::policy::classify::Verdict;
use crate::policy::frame::Sender;
use crate::policy::replay::Progress;
use crate::policy::socket::{Dialect, MessageKind, SpokenText, conversation_id};
use crate::proxy::access_log::AccessLog;
use crate::proxy::attempt::Attempt;
use crate::proxy::exchange::RequestContext;
use crate::proxy::usage::UsagePermit;
use crate::proxy::{Proxy, RuntimeConfig};
use crate::secret::Redactor;
use crate::telemetry::SocketOpen;
use crate::upstream::{Connect, Switched, Wire};

/// What a session begins with.
pub(super) struct SessionStart<C> {
    pub(super) proxy: Arc<Proxy<C>>,
    pub(super) config: Arc<RuntimeConfig>,
    pub(super) dialect: Dialect,
    /// Whether the client brought a token of the provider's own.
    pub(super) has_token: bool,
    pub(super) audio_format: Option<String>,
    pub(super) redactor: Option<Arc<Redactor>>,
    pub(super) pooled: Option<PooledSession>,
    pub(super) attempt: Box<Attempt>,
    pub(super) upstream: Switched,
}

/// What a session of the pool has beyond that: another key can take its place.
pub(super) struct PooledSession {
    pub(super) request: RequestContext,
    /// A place for what becomes known of whose things are.
    pub(super) ownership_permit: Option<UsagePermit>,
}

/// A session. Dropping it closes both ends, releases its key, and writes down what became of it.
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
    /// What the client has said so far, while it may have to be said again; `None` when it was too much
    /// or need not.
    pub(super) opening: Option<Vec<u8>>,
    pub(super) speech: SpeechPermit,
    /// Since when it looks for another key.
    pub(super) moving_since: Option<Instant>,
    /// Whether the attempt has ended and the next one has not begun.
    pub(super) is_between_keys: bool,
    /// Why it was refused, when the client has heard that.
    pub(super) refusal: Option<Verdict>,
    /// The provider's name of it, when it is a conversation with an agent.
    pub(super) conversation: Option<Arc<str>>,
    /// The provider takes no more; what it says may tell why.
    pub(super) is_deaf: bool,
    /// Whether the provider has said that the client waits for an agent that is busy.
    pub(super) is_queued: bool,
    pub(super) turns: polling::PollOrder,
    pub(super) began: Instant,
    pub(super) moved_at: Instant,
    /// When both ends had closed.
    pub(super) closed_at: Option<Instant>,
    /// When the client's quota of credits is looked at next.
    pub(super) quota_check_at: Option<Instant>,
    pub(super) timer: Option<Pin<Box<Sleep>>>,
    /// The memory of all its buffers.
    pub(super) share: BufferShare,
    _open: SocketOpen,
}

/// What happens next.
pub(super) enum SessionEvent {
    /// The client has said a message that waits for leave, and so much is in it.
    Said(SpokenText),
    /// A key that was waited for.
    Given(Given),
    /// The provider has said something that matters.
    Told(UpstreamEvent),
    /// Nothing was said for a while by a socket that speaks.
    Quiet,
    /// It is over.
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
        let bounds = config.limits.sockets;
        let now = clock::instant();
        Self {
            client_to_upstream: ClientToUpstream::new(
                dialect,
                bounds.slice_bytes_max(),
                bounds.session_buffer_max,
            ),
            upstream_to_client: UpstreamToClient::new(dialect, has_token, redactor),
            opening: (pooled.is_some() && dialect != Dialect::Foreign).then(Vec::new),
            speech: SpeechPermit::new(dialect, audio_format.as_deref()),
            _open: proxy.meters.socket_opened(dialect),
            upstream: upstream.stream,
            from_client: ReadBuffer::new(Sender::Client, dialect.is_read(), Bytes::new().into()),
            to_upstream: SendBuffer::default(),
            // The provider may have begun to speak with its 101.
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
        self.config.limits.sockets
    }

    /// Bytes that may still be read ahead of what is acted on.
    pub(super) fn read_ahead_max(&self) -> usize {
        let held = self.client_to_upstream.held_bytes() + self.opening.as_ref().map_or(0, Vec::len);
        self.bounds().session_buffer_max.saturating_sub(held)
    }

    /// Memory of its buffers, but for what was read of the client.
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

    /// Takes memory of the budget for its buffers and so much `more` of them. Whether that is left.
    pub(super) fn takes_memory(&mut self, more: usize) -> bool {
        let bytes = self.from_client.bytes.capacity() + self.capacity_beside();
        self.share.cover(bytes + more)
    }

    /// Takes memory of the budget for its buffers. Where it is not left, the opening messages are let go, and
    /// the session cannot move to another key any more. Whether it has what it needs.
    pub(super) fn takes_memory_or_lets_go(&mut self) -> bool {
        self.takes_memory(0) || (self.opening.take().is_some() && self.takes_memory(0))
    }
}

impl<C: Connect> Session<C> {
    /// Speaks with `client`, who has already sent `early`, to the end.
    pub(super) async fn run<S>(mut self: Box<Self>, mut client: S, early: Bytes)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.from_client.extend(&early);
        // Also when it is empty, it holds the buffer that the handshake was read into.
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
            // A client that leaves is noticed whatever is waited for: a key, its place, a handshake.
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

    /// Does what an event asks for; how the session ends, when it does.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it waits, it gives back what it waited for and leaves the session to be ended.
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
            // Nothing useful was heard of this key: another may be asked, if nothing is lost by it.
            SessionEvent::Over(Ending::UpstreamBroke | Ending::Violated(_, Side::Upstream))
                if !self.upstream_to_client.is_open() && self.fail_over(Progress::Unanswered).await => {}
            SessionEvent::Over(ending) => return Some(ending),
        }
        None
    }

    /// The session is served: the client hears what was held, and what it said need not be kept.
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
            if let Some(place) = ownership_permit.take() {
                place.record_ownership(changes);
            }
        }
        self.book();
    }

    /// It is refused. Before anything useful was said, the next key may serve; else the client hears
    /// it, and the pool learns.
    async fn refused(&mut self, verdict: Verdict) {
        if !self.upstream_to_client.is_open() && self.fail_over(Progress::Answered(verdict)).await {
            return;
        }
        // A message and the close behind it say the same.
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

    /// Keeps what goes on behind `from`, while it may have to be said again.
    pub(super) fn keep_opening(&mut self, from: usize) {
        let more = self.to_upstream.bytes.get(from..).unwrap_or_default();
        let max = self.config.limits.sockets.opening_bytes_max;
        self.opening = self.opening.take().filter(|kept| kept.len() + more.len() <= max);
        if let Some(kept) = &mut self.opening {
            kept.extend_from_slice(more);
        }
    }
}
